"""Bytes of a step with few samples, counted through a model of the cache; and the model itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from benchmarks.bytes_moved import _LINE, Moved, Operand, Traffic, as_for_many, slabs_of_the_cache, step
from benchmarks.timing import fresh_processes

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Executor]:
    """A process where kernels are not interpreted."""
    with fresh_processes(1) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            pool.submit(os.getpid).result()  # starts it
        yield pool


@pytest.fixture
def traffic() -> Traffic:
    """Of 16 lines."""
    return Traffic(16 * _LINE)


def lines(first: int, count: int, *, written: bool = False) -> Operand:
    return Operand(first * _LINE, count * _LINE, written)


class TestTheCache:
    def test_what_fits_is_read_once(self, traffic: Traffic) -> None:
        for _ in range(3):
            traffic.launch([lines(0, 16)])
        assert traffic.moved == 16 * _LINE

    def test_what_does_not_fit_is_read_again(self, traffic: Traffic) -> None:
        for _ in range(3):
            traffic.launch([lines(0, 17)])
        assert traffic.moved == 3 * 17 * _LINE

    def test_memory_that_is_written_again_and_again_moves_once(self, traffic: Traffic) -> None:
        for _ in range(5):
            traffic.launch([lines(0, 8, written=True)])
            traffic.launch([lines(0, 8)])
        assert traffic.moved == 0
        traffic.flush()
        assert traffic.moved == 8 * _LINE

    def test_what_was_written_leaves_for_the_memory_and_is_read_back(self, traffic: Traffic) -> None:
        traffic.launch([lines(0, 8, written=True)])
        traffic.launch([lines(100, 16)])
        assert traffic.moved == (8 + 16) * _LINE
        traffic.launch([lines(0, 8)])
        assert traffic.moved == (8 + 16 + 8) * _LINE

    def test_a_result_that_streams_by_does_not_take_the_place_of_what_is_read_with_it(self, traffic: Traffic) -> None:
        traffic.launch([lines(0, 8)])
        traffic.launch([lines(0, 8), lines(100, 8, written=True)])
        assert traffic.moved == 8 * _LINE

    def test_what_is_marked_to_leave_first_displaces_nothing(self, traffic: Traffic) -> None:
        traffic.launch([lines(0, 16)])
        stream = lines(100, 64)._replace(streamed=True)
        traffic.launch([stream, stream._replace(written=True)])
        assert traffic.moved == (16 + 64 + 64) * _LINE
        traffic.launch([lines(1, 15)])
        assert traffic.moved == (16 + 64 + 64) * _LINE


def counted(way: Callable[[], AbstractContextManager[None]], *sizes: Any) -> tuple[Moved, Moved]:
    with way():
        return step(*sizes)


# The library's float32 product in between costs float32 prototypes the rest.
@pytest.mark.parametrize(("prototypes", "backward_at_most"), [(torch.bfloat16, 1.1), (torch.float32, 1.6)])
@pytest.mark.parametrize("samples", [64, 512])
def test_few_samples_read_a_million_prototypes_once(
    samples: int, prototypes: torch.dtype, backward_at_most: float, elsewhere: Executor
) -> None:
    sizes = (samples, 10**6, 512, torch.bfloat16, prototypes)
    ways = (as_for_many, nullcontext, slabs_of_the_cache)
    many, few, graph = list(elsewhere.map(counted, ways, *([one] * 3 for one in sizes)))
    for forward, _ in (few, graph):
        assert 1.0 <= forward.ratio <= 1.05
    assert many[0].ratio > 1.9
    assert 1.0 <= graph[1].ratio <= backward_at_most
    assert graph[1].ratio < few[1].ratio <= 1.001 * many[1].ratio  # where memory begins moves a line or two


def test_kept_exponentials_move_twice(elsewhere: Executor) -> None:
    """For many samples nothing else changes but that the backward reads prototypes once less."""
    n, c, d = 1024, 10**5, 512
    given = (n, c, d, torch.bfloat16, torch.bfloat16, None)
    usual, kept = list(elsewhere.map(step, *([one] * 2 for one in given), (False, True)))
    exponentials = 2 * n * c
    assert kept[0].bytes - usual[0].bytes == pytest.approx(exponentials, rel=0.05)  # and shifts
    assert 0.0 < kept[1].bytes - usual[1].bytes <= 1.05 * exponentials


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("prototypes", [torch.bfloat16, torch.float32])
def test_a_step_that_moves_a_million_prototypes_moves_little_else(
    prototypes: torch.dtype, rule: str, elsewhere: Executor
) -> None:
    """Forward and backward together, in a CUDA graph."""
    given = (256, 10**6, 512, torch.bfloat16, prototypes, rule)
    forward, backward = elsewhere.submit(counted, slabs_of_the_cache, *given).result()
    assert backward.least > forward.least + 2 * 10**6 * 512 * 4  # float32 state is read and written
    assert 1.0 <= (forward.bytes + backward.bytes) / (forward.least + backward.least) <= 1.1
