from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest

from ltloss.training.comparison.climb import Point, edges, next_points

GRID: dict[str, Sequence[float]] = {"a": [1, 2, 3, 4, 5], "b": [10, 20, 30]}


def climbed(
    space: Mapping[str, Sequence[float]], height: Callable[[Point], float | None]
) -> tuple[list[dict[str, float]], int]:
    """The points in the order in which they are tried, and in how many rounds."""
    tried: list[tuple[dict[str, float], float | None]] = []
    rounds = 0
    while points := next_points(space, tried):
        assert all(point not in [known for known, _ in tried] for point in points)
        tried += [(point, height(point)) for point in points]
        rounds += 1
    return [point for point, _ in tried], rounds


@pytest.mark.parametrize("top", [(a, b) for a in GRID["a"] for b in GRID["b"]])
def test_a_single_hill_is_climbed_to_its_top(top: tuple[float, float]) -> None:
    def height(point: Point) -> float:
        return -abs(point["a"] - top[0]) - abs(point["b"] - top[1]) / 10

    tried, _ = climbed(GRID, height)
    assert max(tried, key=height) == {"a": top[0], "b": top[1]}
    assert len(tried) <= 9


def test_it_stays_in_the_middle_where_no_neighbour_is_better() -> None:
    tried, rounds = climbed(GRID, lambda _: 0.5)
    assert tried == [{"a": a, "b": b} for a, b in ((3, 20), (2, 20), (4, 20), (3, 10), (3, 30))]
    assert rounds == 2


def test_it_goes_round_the_axes_until_no_neighbour_is_better() -> None:
    """Large a needs large b: going along each axis once ends at (4, 5)."""
    square = {"a": GRID["a"], "b": GRID["a"]}

    def height(point: Point) -> float:
        return point["a"] + point["b"] - 0.6 * (point["a"] - point["b"]) ** 2

    tried, _ = climbed(square, height)
    best = max(tried, key=height)
    assert best == {"a": 5, "b": 5}
    around = [{**best, name: best[name] + step} for name in best for step in (-1, 1)]
    assert all(point in tried for point in around if all(1 <= value <= 5 for value in point.values()))


def test_points_that_diverged_are_worse_than_all_others() -> None:
    heights = {2: None, 3: float("nan"), 4: -5.0, 5: -6.0}
    tried, _ = climbed({"a": GRID["a"]}, lambda point: heights[point["a"]])
    assert [point["a"] for point in tried] == [3, 2, 4, 5]
    assert climbed(GRID, lambda _: None)[1] == 2


def test_nothing_to_tune_is_one_trial() -> None:
    assert climbed({}, lambda _: 0.1) == ([{}], 1)


def test_edges_are_where_a_longer_list_might_have_been_better() -> None:
    assert edges(GRID, {"a": 1, "b": 30}) == {"a": "first", "b": "last"}
    assert edges(GRID, {"a": 2, "b": 20}) == {}
    assert edges({"a": [7]}, {"a": 7}) == {}
