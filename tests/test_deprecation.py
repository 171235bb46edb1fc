"""Names of version 0.1 work for one version more: they warn, and do what the names of today do."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
from helpers.refusals import refused, warned

from ltloss._deprecation import renamed_keywords
from ltloss.training.measure.metrics import Metrics
from ltloss.training.predict.predict import PredictionSummary


@renamed_keywords(old="new", exact="not loose")
def _given(new: int = 0, loose: bool = True) -> tuple[int, bool]:
    return new, loose


def test_a_former_keyword_and_an_opposite() -> None:
    with warned("old=3", "new=3"):
        assert _given(old=3) == (3, True)  # type: ignore[call-arg]
    with warned("exact=True", "loose=False"):
        assert _given(4, exact=True) == (4, False)  # type: ignore[call-arg]


def test_both_names_at_once_are_refused() -> None:
    with refused("old", "new", error=TypeError):
        _given(new=1, old=1)  # type: ignore[call-arg]
    with refused("exact", "loose", error=TypeError):
        _given(loose=True, exact=False)  # type: ignore[call-arg]


def test_the_warning_points_at_the_caller() -> None:
    with warned("old=3") as caught:
        _given(old=3)  # type: ignore[call-arg]
    assert [warning.filename for warning in caught] == [__file__]


def test_images_are_called_pictures_too() -> None:
    values = {item.name: None for item in fields(Metrics)} | {"images": 7}
    metrics = Metrics(**values)  # type: ignore[arg-type]
    with warned("Metrics.pictures", "images"):
        assert metrics.pictures == 7  # type: ignore[attr-defined]
    with warned("pictures=7", "images=7"):
        assert Metrics(**{name: v for name, v in values.items() if name != "images"}, pictures=7) == metrics  # type: ignore
    with pytest.raises(FrozenInstanceError):
        metrics.pictures = 8  # type: ignore[attr-defined]
    summary = PredictionSummary(Path(), Path(), Path(), images=7, classes=2, uncertain=0, skipped=0, sorted_into=None)
    with warned("PredictionSummary.pictures", "images"):
        assert summary.pictures == 7  # type: ignore[attr-defined]
