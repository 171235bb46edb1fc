from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers.refusals import refused, warned

from ltloss.errors import UserError
from ltloss.training.model.registry import LOSSES, build_loss, loss_arguments
from ltloss.training.run.run_config import RunConfig, read_settings_file
from ltloss.training.run.settings import SETTINGS, Settings, changed_settings
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
    now, before = {"drw_start", "many_threshold", "few_threshold"}, {"drw_from", "many_above", "few_below"}
    expected = set(SETTINGS) - now | before | {"class_names", "class_counts", "image_shape", "mean", "std", "versions"}
    assert written.keys() == expected


@pytest.mark.parametrize("item", fields(Settings), ids=lambda item: item.name)
def test_every_setting_has_words_for_help_and_refuses_a_wrong_type(item) -> None:  # type: ignore[no-untyped-def]
    assert item.metadata["help"]
    with refused(item.name, "[1]", error=UserError):
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


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_records_the_value_of_every_option(loss: str, tmp_path: Path) -> None:
    """And the loss that is built from what it recorded is the one that was trained."""
    given = RunConfig(Settings(loss=loss), ("a", "b", "c"), (9, 3, 1), (1, 8, 8), (0.5,), (0.5,), {})
    config = given.in_force(amp=False)
    (tmp_path / "config.json").write_text(config.to_json())
    recorded = RunConfig.read(tmp_path)
    assert recorded.settings == config.settings == recorded.in_force(amp=True).settings
    assert None not in recorded.settings.all_loss_options.values()
    assert recorded.settings.amp is False
    before, after = (build_loss(loss, (9, 3, 1), 64, item.settings.all_loss_options) for item in (given, recorded))
    assert repr(before) == repr(after)
    if loss != "softmax":
        assert recorded.settings.scale == before.scale


def test_values_in_force_of_the_two_long_tail_losses() -> None:
    def recorded(loss: str, **given: Any) -> Settings:
        config = RunConfig(Settings(loss=loss, **given), ("a", "b"), (9, 1), (1, 8, 8), (0.5,), (0.5,), {})
        return config.in_force().settings

    plain, prior = recorded("long-tail"), recorded("long-tail-prior")
    assert (plain.scale, plain.margin, plain.tau) == (8.0, 0.5, 0.0)
    assert (prior.scale, prior.margin, prior.tau) == (8.0, 0.5, 1.0)
    names = ("margin_normalize", "min_angle_weight", "feature_norm_weight", "feature_norm", "feature_norm_radius")
    assert [plain.loss_options[name] for name in names] == ["none", 0.1, 0.1, "ring", 10.0]
    assert [prior.loss_options[name] for name in names[:3]] == ["max", 0.0, 0.0]
    given = recorded("ldam", margin=0.2, loss_options={"label_smoothing": 0.1, "scale": 5.0})
    assert (given.margin, given.all_loss_options["scale"], given.loss_options["label_smoothing"]) == (0.2, 5.0, 0.1)


@pytest.mark.parametrize(
    ("options", "version", "loss", "expected"),
    [
        ({}, "0.1.0", "long-tail-prior", {}),
        ({"form": "published", "margin_power": 0.5}, "0.1.0", "long-tail", {"margin_power": 0.5}),
        ({"form": "recommended"}, "0.1.0", "long-tail-prior", {}),
        ({"min_angle_rows": "batch"}, "0.1.0", "long-tail-prior", {"min_angle_classes": "batch"}),
        (
            {"normalize_features": False},
            "0.1.0",
            "long-tail-prior",
            {"normalize_features": False, "feature_norm_weight": 0.1},
        ),
        ({}, "0.2.0", "long-tail", {}),
    ],
)
def test_a_run_of_version_0_1_keeps_its_loss(
    options: dict[str, Any], version: str, loss: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    settings = Settings(data="digits", loss="long-tail", loss_options=options)
    config = RunConfig(settings, ("a", "b"), (9, 1), (1, 8, 8), (0.5,), (0.5,), {"ltloss": version})
    (tmp_path / "config.json").write_text(config.to_json())
    read = RunConfig.read(tmp_path).settings
    assert (read.loss, read.loss_options) == (loss, expected)
    assert Settings(**read_settings_file(tmp_path / "config.json")) == read


def test_an_option_may_be_given_again_on_resume() -> None:
    config = RunConfig(Settings(loss="long-tail"), ("a", "b"), (9, 1), (1, 8, 8), (0.5,), (0.5,), {})
    stored = config.in_force().settings
    assert changed_settings(stored, {"loss_options": {"min_angle_weight": 0.1, "margin": 0.5}, "tau": 0}) == []
    assert changed_settings(stored, {"loss_options": {"min_angle_weight": 0.2, "margin": 0.5}}) == [
        "min_angle_weight (run: 0.1, now: 0.2)"
    ]


def test_options_go_to_the_argument_of_that_name() -> None:
    assert loss_arguments("ldam", {"margin": 0.3, "scale": 8.0}) == {"max_margin": 0.3, "scale": 8.0}
    assert loss_arguments("long-tail", {"margin": 0.3, "feature_norm": "ring", "beyond_pi": "arcface"}) == {
        "margin": 0.3,
        "feature_norm": "ring",
        "beyond_pi": "arcface",
    }
    assert loss_arguments("long-tail-prior", {"tau": 2.0}) == {
        "tau": 2.0,
        "margin_normalize": "max",
        "min_angle_weight": 0.0,
        "feature_norm_weight": 0.0,
    }


def test_the_form_of_version_0_1_is_still_an_option_of_the_long_tail_loss() -> None:
    with warned("form='recommended'", "margin_normalize='max'"):
        old = build_loss("long-tail", (9, 3, 1), 8, {"form": "recommended"})
    assert repr(old) == repr(build_loss("long-tail-prior", (9, 3, 1), 8, {}))
    settings = Settings(loss="long-tail", loss_options={"form": "recommended"})
    config = RunConfig(settings, ("a", "b", "c"), (9, 3, 1), (1, 8, 8), (0.5,), (0.5,), {})
    with warned("form='recommended'", "margin_normalize='max'"):
        recorded = config.in_force().settings.all_loss_options
    assert repr(build_loss("long-tail", (9, 3, 1), 64, recorded)) == repr(
        build_loss("long-tail-prior", (9, 3, 1), 64, {})
    )


@pytest.mark.parametrize("loss", ["long-tail", "long-tail-prior"])
def test_the_precision_of_version_0_1_is_still_an_option_of_the_long_tail_losses(loss: str) -> None:
    settings = Settings(loss=loss, loss_options={"min_angle_exact": True})
    config = RunConfig(settings, ("a", "b", "c"), (9, 3, 1), (1, 8, 8), (0.5,), (0.5,), {})
    with warned("min_angle_exact=True", "min_angle_allow_tf32=False"):
        recorded = config.in_force().settings.all_loss_options
    assert recorded["min_angle_allow_tf32"] is False
    assert "min_angle_exact" not in recorded


@pytest.mark.parametrize("loss", LOSSES)
def test_no_loss_takes_what_the_run_decides(loss: str) -> None:
    for option in ("num_classes", "class_counts", "device", "reduction", "self"):
        with refused(loss, option, error=UserError):
            loss_arguments(loss, {option: 1})


@pytest.mark.parametrize(
    ("file", "text", "fact"),
    [
        ("twice.json", '{"epochs": 1, "epochs": 2}', "epochs"),
        ("twice.toml", "batch-size = 2\nbatch_size = 3", "batch_size"),
        ("type.toml", "epochs = 'many'", "epochs"),
        ("range.json", '{"lr": -1}', "lr"),
        ("long.toml", f"epochs = 0x{'f' * 5000}", "4300"),  # digits that Python writes
    ],
)
def test_what_a_file_cannot_say_names_the_file(file: str, text: str, fact: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    with refused(f"--config {tmp_path / file}", fact, error=UserError):
        read_settings_file(tmp_path / file)
