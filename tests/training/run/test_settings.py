from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from ltloss.errors import UserError
from ltloss.training.model.registry import LOSSES, loss_arguments
from ltloss.training.run.settings import SETTINGS, RunConfig, Settings, changed_settings, read_settings_file
from ltloss.training.run.trainer import TrainingResult


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'loss = "arcface"\nlr = 1\nbatch-size = 8\n[loss_options]\nbeyond_pi = "arcface"\n'
    )
    (tmp_path / "a.json").write_text(
        json.dumps({"loss": "arcface", "lr": 1, "batch_size": 8, "loss_options": {"beyond_pi": "arcface"}})
    )
    from_toml, from_json = (read_settings_file(tmp_path / name) for name in ("a.toml", "a.json"))
    assert from_toml == from_json
    settings = Settings(**from_toml)
    assert (settings.lr, settings.batch_size, settings.loss_options) == (1.0, 8, {"beyond_pi": "arcface"})


def test_the_config_of_a_run_is_a_config_file(toy_run: TrainingResult) -> None:
    config = RunConfig.read(toy_run.run)
    assert Settings(**read_settings_file(toy_run.run / "config.json")) == config.settings
    assert config.class_names == ("apple", "bean", "corn")
    assert config.class_counts == (20, 20, 20)
    assert config == toy_run.evaluation.config


def test_every_setting_is_in_the_config_of_a_run(toy_run: TrainingResult) -> None:
    written = json.loads((toy_run.run / "config.json").read_text())
    expected = set(SETTINGS) | {"class_names", "class_counts", "image_shape", "mean", "std", "versions"}
    assert written.keys() == expected


@pytest.mark.parametrize("item", fields(Settings), ids=lambda item: item.name)
def test_every_setting_has_words_for_help_and_refuses_a_wrong_type(item) -> None:  # type: ignore[no-untyped-def]
    assert item.metadata["help"]
    with pytest.raises(UserError, match=f"{item.name} must be of type"):
        Settings(**{item.name: [1]})


def test_what_may_change_on_resume() -> None:
    stored = Settings(data="digits", epochs=10, loss="cosface", margin=0.2)
    assert (
        changed_settings(stored, {"epochs": 12, "data": "/moved", "device": "cpu", "workers": 9, "margin": 0.2}) == []
    )
    assert changed_settings(stored, {"epochs": 9, "margin": 0.3, "lr": 1}) == [
        "epochs (run: 10, now: 9)",
        "margin (run: 0.2, now: 0.3)",
        "lr (run: 0.05, now: 1.0)",
    ]


def test_options_go_to_the_argument_of_that_name() -> None:
    assert loss_arguments("ldam", {"margin": 0.3, "scale": 8.0}) == {"max_margin": 0.3, "scale": 8.0}
    assert loss_arguments("long-tail", {"margin": 0.3, "feature_norm": "ring", "beyond_pi": "arcface"}) == {
        "margin": 0.3,
        "feature_norm": "ring",
        "beyond_pi": "arcface",
    }


@pytest.mark.parametrize("loss", LOSSES)
def test_no_loss_takes_what_the_run_decides(loss: str) -> None:
    for option in ("num_classes", "class_counts", "device", "reduction", "self"):
        with pytest.raises(UserError, match=f"loss {loss} has no option {option}"):
            loss_arguments(loss, {option: 1})
