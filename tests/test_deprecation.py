"""Names of version 0.1 work for one version more: they warn, and do what the names of today do."""

from __future__ import annotations

import json
import warnings
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.refusals import refused, warned

import ltloss
from ltloss import class_balance, functional, reference
from ltloss._deprecation import renamed_keywords
from ltloss.cli.command import build_parser
from ltloss.errors import UserError
from ltloss.training.measure.class_groups import Thresholds
from ltloss.training.measure.metrics import Metrics
from ltloss.training.model.registry import build_loss
from ltloss.training.predict.predict import PredictionSummary
from ltloss.training.run.run_config import RunConfig, read_settings_file
from ltloss.training.run.run_folder import open_run
from ltloss.training.run.settings import Settings, changed_settings


@renamed_keywords(old="new", exact="not loose")
def _given(new: int = 0, loose: bool = True) -> tuple[int, bool]:
    return new, loose


def test_a_former_keyword_and_an_opposite() -> None:
    with warned("old", "new"):
        assert _given(old=3) == (3, True)
    with warned("exact=True", "loose=False"):
        assert _given(4, exact=True) == (4, False)


def test_both_names_at_once_are_refused() -> None:
    with refused("old", "new", error=TypeError):
        _given(new=1, old=1)
    with refused("exact", "loose", error=TypeError):
        _given(loose=True, exact=False)


def test_the_warning_points_at_the_caller() -> None:
    with warned("old", "new") as caught:
        _given(old=3)
    assert [warning.filename for warning in caught] == [__file__]


def test_images_are_called_pictures_too() -> None:
    values = {item.name: None for item in fields(Metrics)} | {"images": 7}
    metrics = Metrics(**values)
    with warned("Metrics.pictures", "images"):
        assert metrics.pictures == 7
    with warned("pictures", "images"):
        assert Metrics(**{name: v for name, v in values.items() if name != "images"}, pictures=7) == metrics
    with pytest.raises(FrozenInstanceError):
        metrics.pictures = 8
    summary = PredictionSummary(Path(), Path(), Path(), images=7, classes=2, uncertain=0, skipped=0, sorted_into=None)
    with warned("PredictionSummary.pictures", "images"):
        assert summary.pictures == 7


@pytest.mark.parametrize("module", [functional, reference])
def test_rows_are_classes(module: Any) -> None:
    prototypes, chosen = torch.randn(5, 3), torch.tensor([3, 0])
    with warned("rows", "classes"):
        found = module.nearest_prototype(prototypes, rows=chosen)
    assert all(map(torch.equal, found, module.nearest_prototype(prototypes, classes=chosen)))
    with warned("rows", "classes"):
        angle = module.min_angle_regularizer(prototypes, rows=chosen)
    assert torch.equal(angle, module.min_angle_regularizer(prototypes, classes=chosen))


@pytest.mark.parametrize("loss", ["long-tail", "long-tail-prior"])
def test_min_angle_rows_are_classes(loss: str) -> None:
    with warned("min_angle_rows", "min_angle_classes"):
        head = ltloss.LongTailLoss.from_counts([5, 3, 1], 4, min_angle_rows="batch")
    assert head.min_angle_classes == "batch"
    with warned("min_angle_rows", "min_angle_classes"):
        head.min_angle_rows = "all"
    assert head.hyper_parameters()["min_angle_classes"] == "all"
    with warned("min_angle_rows", "min_angle_classes"):
        assert build_loss(loss, [5, 3, 1], 4, {"min_angle_rows": "batch"}).min_angle_classes == "batch"
    stored = Settings(loss=loss, loss_options={"min_angle_classes": "batch"})
    with warned("min_angle_rows", "min_angle_classes"):
        assert not changed_settings(stored, {"loss_options": {"min_angle_rows": "batch"}})


@pytest.mark.parametrize("name", ["margins_from_counts", "inverse_frequency_weights"])
def test_power_is_the_count_exponent(name: str) -> None:
    function = getattr(class_balance, name)
    with warned("power", "count_exponent"):
        found = function([9, 4, 1], power=0.5)
    assert torch.equal(found, function([9, 4, 1], count_exponent=0.5))
    assert not torch.equal(found, function([9, 4, 1]))


@pytest.mark.parametrize("module", [functional, reference])
def test_power_of_the_minimum_angle_is_the_count_exponent(module: Any) -> None:
    prototypes, counts = torch.randn(4, 3), torch.tensor([9, 4, 1, 1])
    with warned("power", "count_exponent"):
        found = module.min_angle_regularizer(prototypes, counts, power=1.0)
    assert torch.equal(found, module.min_angle_regularizer(prototypes, counts, count_exponent=1.0))


SETTINGS_OF_0_1 = {"drw_from": 0.5, "many_above": 40, "few_below": 5}
SETTINGS_NOW = {"drw_start": 0.5, "many_threshold": 40, "few_threshold": 5}


@pytest.mark.parametrize(("former", "now"), list(zip(SETTINGS_OF_0_1, SETTINGS_NOW, strict=True)))
class TestSettings:
    def test_in_python(self, former: str, now: str, tmp_path: Path) -> None:
        value, expected = SETTINGS_OF_0_1[former], Settings(data="digits", **{now: SETTINGS_NOW[now]})
        with warned(former, now):
            found = Settings(data="digits", **{former: value})
        assert found == expected
        with warned(former, now):
            assert getattr(found, former) == value
        with warned(former, now):
            assert open_run(tmp_path / "run", {"data": "digits", former: value}, False)[0] == replace(
                expected, data=found.data
            )

    def test_on_the_command_line(self, former: str, now: str) -> None:
        old, new = ("--" + name.replace("_", "-") for name in (former, now))
        value = str(SETTINGS_OF_0_1[former])
        for line in (["train", "--out", "run"], ["compare", "--out", "run", "--losses", "ce"]):
            with warned(old, new):
                found = build_parser().parse_args([*line, old, value])
            assert vars(found)[now] == vars(build_parser().parse_args([*line, new, value]))[now]

    def test_help_shows_the_name_of_today_alone(
        self, former: str, now: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            build_parser().parse_args(["train", "--help"])
        shown = capsys.readouterr().out
        assert "--" + now.replace("_", "-") in shown
        assert "--" + former.replace("_", "-") not in shown

    def test_in_a_settings_file(self, former: str, now: str, tmp_path: Path) -> None:
        (tmp_path / "old.toml").write_text(f"{former.replace('_', '-')} = {SETTINGS_OF_0_1[former]}")
        with warned(former, now):
            assert read_settings_file(tmp_path / "old.toml") == {now: SETTINGS_NOW[now]}
        (tmp_path / "both.toml").write_text(f"{former} = 1\n{now} = 1")
        with refused(former, now, error=UserError):
            read_settings_file(tmp_path / "both.toml")


def test_a_run_keeps_the_keys_of_0_1_and_is_read_without_a_warning(tmp_path: Path) -> None:
    settings = Settings(data="digits", loss="ldam", **SETTINGS_NOW)
    (tmp_path / "config.json").write_text(
        RunConfig(settings, ("a", "b"), (9, 1), (1, 8, 8), (0.5,), (0.5,), {"ltloss": "0.1.0"}).to_json()
    )
    stored = json.loads((tmp_path / "config.json").read_text())
    assert SETTINGS_OF_0_1.items() <= stored.items()
    assert not stored.keys() & SETTINGS_NOW.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RunConfig.read(tmp_path).settings == settings
        assert Settings(**read_settings_file(tmp_path / "config.json")) == settings


def test_thresholds() -> None:
    with warned("many_above", "many_threshold") as caught:
        found = Thresholds(many_above=50, few_below=10)
    assert len(caught) == 2
    assert found == Thresholds(many_threshold=50, few_threshold=10) == Thresholds(50, 10)
    with warned("Thresholds.few_below", "few_threshold"):
        assert found.few_below == 10


def test_debug_is_a_switch_a_block_and_a_flag_still() -> None:
    with ltloss.debug_labels(False):
        with warned("ltloss.debug", "ltloss.set_debug", "ltloss.debug_labels"):
            block = ltloss.debug()
        assert ltloss.current_debug()
        with block, warned("ltloss.debug", "ltloss.current_debug"):
            assert ltloss.debug
        assert not ltloss.current_debug()


def test_the_terms_of_a_loss_by_their_former_name() -> None:
    for module in (ltloss.LongTailLoss.from_counts([4, 2, 1], 4), ltloss.CosineSpaceLoss(3, 4)):
        module(torch.randn(3, 4), torch.tensor([0, 1, 2]))
        with warned("parts", "terms"):
            assert module.parts is module.terms
