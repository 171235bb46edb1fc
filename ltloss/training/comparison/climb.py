"""The search of ``ltloss compare --tune``: hill climbing along the axes of a small grid, the same for every method."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

Point = Mapping[str, Any]  # name -> value


def next_points(
    space: Mapping[str, Sequence[Any]], tried: Sequence[tuple[Point, float | None]]
) -> list[dict[str, Any]]:
    """The points of a grid that the climb needs next; empty when the climb is over.

    The climb begins in the middle of every axis. It takes one axis after the other, and moves along it to the better
    neighbour as long as that is better than the present point. It repeats this over all axes until no neighbour along
    any axis is better. One round would not do, because values can make up for each other (a large margin, a large lr).

    Args:
        space: name of an axis -> its values in order; the first axis is climbed first.
        tried: points with their scores, the higher the better; None or NaN is worse than every number.

    Returns:
        Points that ``tried`` lacks, each a value for every axis.

    Example:
        >>> from ltloss.training.comparison.climb import next_points
        >>> next_points({"scale": [8, 16, 32, 64]}, [])
        [{'scale': 16}, {'scale': 8}, {'scale': 32}]
        >>> next_points({"scale": [8, 16, 32, 64]}, [({"scale": 8}, 0.5), ({"scale": 16}, 0.6), ({"scale": 32}, 0.7)])
        [{'scale': 64}]
    """

    def score(point: dict[str, Any]) -> float:
        found = next(score for known, score in tried if known == point)
        return -math.inf if found is None or math.isnan(found) else found

    at = {name: values[(len(values) - 1) // 2] for name, values in space.items()}
    axes, left = itertools.cycle(space), len(space)  # the climb is over after so many axes without a move
    while left:
        name = next(axes)
        while True:
            values = space[name]
            here = values.index(at[name])
            near = [at, *({**at, name: values[i]} for i in (here - 1, here + 1) if 0 <= i < len(values))]
            unknown = [point for point in near if all(point != known for known, _ in tried)]
            if unknown:
                return unknown
            best = max(near, key=score)  # of equal ones the first: it stays
            if best is at:
                break
            at, left = best, len(space)
        left -= 1
    return [] if space or tried else [{}]


def edges(space: Mapping[str, Sequence[Any]], point: Point) -> dict[str, str]:
    """The axes on which a point lies at an end, where the climb could not go on: name -> "first" or "last".

    An axis with a single value has no ends.

    Example:
        >>> from ltloss.training.comparison.climb import edges
        >>> edges({"lr": [0.1, 0.2, 0.4], "scale": [8, 16, 32]}, {"lr": 0.4, "scale": 16})
        {'lr': 'last'}
    """
    ends = {name: {values[-1]: "last", values[0]: "first"} for name, values in space.items() if len(values) > 1}
    return {name: end[point[name]] for name, end in ends.items() if point[name] in end}
