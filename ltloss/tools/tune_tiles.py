"""Find the fastest tile on this GPU: time the candidates, and store the winners where later runs find them.

A training step never does this. ``ltloss tune`` does, and ``python -m benchmarks.loss_gpu --stage tiles`` shows the
ranking.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from ltloss_kernels.config import tile_cache
from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.config.precision import product_precision
from torch import Tensor

from ltloss.errors import in_one_line
from ltloss.functional import margin_cross_entropy

__all__ = ["CANDIDATES", "Kernel", "Timing", "candidates", "rank", "remember", "show", "table_line"]

Kernel = Literal["forward", "gradient"]

# For half precision; float32 operands take half the depth. A tile that does not fit the device fails and ranks last.
CANDIDATES = (
    tiles.Tile(128, 128, 64, 4, 3),
    tiles.Tile(128, 128, 64, 4, 2),
    tiles.Tile(128, 128, 128, 4, 2),
    tiles.Tile(128, 128, 64, 8, 3),
    tiles.Tile(128, 128, 64, 8, 4),
    tiles.Tile(128, 128, 32, 8, 4),
    tiles.Tile(128, 256, 64, 8, 3),
    tiles.Tile(128, 256, 64, 8, 4),
    tiles.Tile(256, 128, 64, 8, 3),
    tiles.Tile(64, 256, 64, 4, 3),
    tiles.Tile(64, 128, 64, 4, 3),
    tiles.Tile(64, 128, 64, 4, 4),
    tiles.Tile(64, 64, 64, 4, 4),
    tiles.Tile(128, 64, 64, 4, 4),
)


class Timing(NamedTuple):
    """A tile and its median time. ``problem`` says why there is no time, which is then infinite."""

    tile: tiles.Tile
    milliseconds: float
    problem: str = ""
    today: bool = False  # whether this tile is the one in use


def candidates(
    kernel: Kernel, arch: int, dtype: torch.dtype, precision: str, samples: int, width: int
) -> list[tiles.Tile]:
    """The tiles to time: the one in use first, then the candidates."""
    choose = tiles.forward_tile if kernel == "forward" else tiles.gradient_tile
    shrink = 2 if dtype == torch.float32 else 1
    tried = (tile._replace(depth=tile.depth // shrink) for tile in CANDIDATES)
    return list(dict.fromkeys([choose(arch, dtype, precision, samples, width), *tried]))


def rank(
    kernel: Kernel,
    samples: int,
    classes: int,
    embedding_size: int,
    dtype: torch.dtype,
    device: str = "cuda",
    repeats: int = 20,
) -> list[Timing]:
    """Time every candidate on random inputs, fastest first; tiles that fail or give a wrong result come last.

    A "forward" is timed alone, a "gradient" with its forward.
    """
    generator = torch.Generator(device).manual_seed(0)
    features = torch.randn(samples, embedding_size, generator=generator, device=device, dtype=dtype).requires_grad_()
    prototypes = torch.randn(classes, embedding_size, generator=generator, device=device, dtype=dtype).requires_grad_()
    labels = torch.randint(classes, (samples,), generator=generator, device=device)

    def loss() -> Tensor:
        return margin_cross_entropy(features, prototypes, labels, angular_margin=0.3)

    def forward() -> tuple[Tensor, ...]:
        return (loss().detach(),)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(), (features, prototypes))

    run = forward if kernel == "forward" else step
    expected = run()
    arch, precision = tiles.architecture(features.device), product_precision()
    tried = candidates(kernel, arch, dtype, precision, samples, embedding_size)
    timings = [_time(kernel, tile, run, expected, repeats) for tile in tried]
    timings[0] = timings[0]._replace(today=True)
    return sorted(timings, key=lambda timing: timing.milliseconds)


def _time(
    kernel: Kernel, tile: tiles.Tile, run: Callable[[], tuple[Tensor, ...]], expected: tuple[Tensor, ...], repeats: int
) -> Timing:
    with tile_cache.trying(kernel, tile):
        try:
            found = run()
        except Exception as error:  # for instance too much shared memory: not possible on this device
            return Timing(tile, float("inf"), f"{type(error).__name__}: {in_one_line(error, 100)}")
        for one, other in zip(found, expected, strict=True):
            if not float((one.double() - other.double()).norm()) <= 1e-2 * float(other.double().norm()):
                return Timing(tile, float("inf"), "wrong result")
        return Timing(tile, statistics.median(_milliseconds(run, expected[0].device) for _ in range(repeats)))


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":  # the interpreter, in tests
        before = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - before)
    event: Any = torch.cuda.Event  # untyped in some versions of PyTorch
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def remember(kernel: Kernel, fastest: Timing, dtype: torch.dtype, shape: tuple[int, int, int], file: Path) -> None:
    """Store a winner in the file that ``ltloss_kernels.config.tile_table`` reads first; ``shape`` is (N, C, D)."""
    arch = tiles.architecture(torch.device("cuda"))
    entry = {
        "tile": list(fastest.tile),
        "milliseconds": fastest.milliseconds,
        "shape": "x".join(str(size) for size in shape),
        "device": torch.cuda.get_device_name(),
        "triton": tile_cache.triton_version(),
    }
    name = tiles.size_name(kernel, dtype, shape[0], shape[2])
    tile_cache.store({tile_cache.entry_name(name, arch, dtype, product_precision()): entry}, file)


def tune(shape: tuple[int, int, int], dtype: torch.dtype, repeats: int = 20) -> int:
    """Run ``ltloss tune`` at ``shape`` (N, C, D): rank, print and store. Returns the exit code."""
    file = tile_cache.cache_file()
    if file is None:
        print("LTLOSS_TILES is empty, which switches tuned tiles off: nothing to do")
        return 2
    for kernel in get_args(Kernel):
        ranking = rank(kernel, *shape, dtype, repeats=repeats)
        print(show(kernel, shape, ranking))
        if ranking[0].problem:
            print(f"no tile works for {kernel}; nothing is stored")
            return 1
        remember(kernel, ranking[0], dtype, shape, file)
    print(f"stored in {file}; later runs on this machine use it")
    return 0


def table_line(kernel: Kernel, fastest: Timing, dtype: torch.dtype, samples: int, width: int) -> str:
    """The winner as a line of ``ltloss_kernels/config/tile_table.py``."""
    if dtype != torch.float32:
        size = tiles.size_name(kernel, dtype, samples, width).removeprefix(kernel) or "_half"
        table = f"_{kernel.upper()}{size.upper()}"
    elif product_precision() == "tf32":
        table = "_GRADIENT_TF32" if kernel == "gradient" else "_TF32"
    else:
        table = "_FLOAT32"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return f"{table}[{tiles.architecture(device)}] = Tile{tuple(fastest.tile)}"


def show(kernel: Kernel, shape: tuple[int, int, int], ranking: list[Timing]) -> str:
    """A ranking as text."""
    lines = [f"{kernel} at {'x'.join(str(size) for size in shape)}: rows x classes x depth, warps, stages"]
    for timing in ranking:
        rows, classes, depth, warps, stages = timing.tile
        result = timing.problem or f"{timing.milliseconds:.3f} ms"
        lines.append(f"  {rows:>4} x {classes:>3} x {depth:<3} {warps:>2} {stages:>2}   {result}")
    return "\n".join(lines)
