"""Tile shapes, warps and pipeline stages per architecture, dtype and kernel.

Plain Python: nothing here imports Triton or touches a device, except :func:`architecture`, which asks for the
capability of a CUDA device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ltloss_kernels.config.chunking import FEW_SAMPLES
from ltloss_kernels.config.tile_cache import tuned_tile

__all__ = [
    "ARCHITECTURES",
    "SAMPLE_ROWS",
    "Tile",
    "architecture",
    "cache_bytes",
    "candidate_tile",
    "forward_tile",
    "gradient_tile",
    "has_copy_engine",
    "keeping",
    "multiprocessors",
    "norms_in_tiles",
    "of_kept",
    "of_sub_centers",
    "prototype_gradient_tile",
    "row_block_stays",
    "row_tile",
    "sample_rows",
    "search_tile",
    "size_name",
]

# Compute capabilities that the ahead-of-time report compiles for: A100, H100/H200, B200.
ARCHITECTURES = (80, 90, 100)

# Samples of one program of the margin loss: the first number that holds all samples, which saves the launch that adds
# the programs' sums; if none does, the first.
SAMPLE_ROWS = (128, 256)


class Tile(NamedTuple):
    """``rows`` samples by ``classes`` prototypes, the product taken ``depth`` columns at a time."""

    rows: int
    classes: int
    depth: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """The constants that a launch of a kernel on such tiles takes."""
        rows, classes, depth, warps, stages = self
        blocks = {"BLOCK_ROWS": rows, "BLOCK_CLASSES": classes, "BLOCK_DEPTH": depth}
        return {**blocks, "num_warps": warps, "num_stages": stages}


class RowTile(NamedTuple):
    """``rows`` whole rows of ``width`` >= D columns (a power of two) in registers; ``unit`` divides D and strides."""

    rows: int
    width: int
    warps: int
    unit: int


# Two 128x128 blocks fit on a multiprocessor, so that the exponentials of one run under the matrix products of the
# other. Registers and shared memory of each are in the kernel report.
_FORWARD_HALF = {80: Tile(128, 128, 32, 8, 4), 90: Tile(128, 128, 64, 4, 3), 100: Tile(128, 128, 64, 8, 3)}
# The staging of the result for the store (32 KB) reuses the pipeline buffers, so three stages still leave room for two.
_GRADIENT_HALF = {80: Tile(128, 64, 32, 8, 4), 90: Tile(128, 128, 64, 4, 3), 100: Tile(128, 128, 64, 8, 3)}
_TF32 = {80: Tile(128, 128, 16, 8, 4), 90: Tile(128, 128, 32, 8, 3), 100: Tile(128, 128, 32, 8, 3)}
# With four warps two blocks of the gradient fit a Hopper multiprocessor, with eight only one: the staging of the store
# takes shared memory too.
_GRADIENT_TF32 = {**_TF32, 90: Tile(128, 128, 32, 4, 3)}
# The most samples that count as few. Their passes are bound by memory, so what counts is loads in flight; with 64 or
# fewer, half of a tile of 128 rows would be padding. The gradient's tile then also sums over its rows, for which
# registers spill with 128 rows.
_MOST_FEW = {"forward": 64, "gradient": FEW_SAMPLES}
# Widths whose columns fit one tile: the row block is loaded once and stays, which halves what is read through the
# cache.
_NARROW = range(65, 129)  # for less than 65, tiles of 64 columns do the same
_FORWARD_NARROW = {**_FORWARD_HALF, 90: Tile(128, 128, 128, 4, 2)}
_FORWARD_FEW = {80: Tile(64, 128, 32, 4, 4), 90: Tile(64, 128, 64, 4, 4), 100: Tile(64, 64, 64, 4, 4)}
_FORWARD_SOME = {**_FORWARD_HALF}  # up to FEW_SAMPLES
_GRADIENT_FEW = {80: Tile(64, 64, 32, 4, 4), 90: Tile(64, 128, 64, 4, 3), 100: Tile(64, 128, 64, 4, 3)}
_HALF = {
    "forward": _FORWARD_HALF,
    "forward_few": _FORWARD_FEW,
    "forward_some": _FORWARD_SOME,
    "forward_narrow": _FORWARD_NARROW,
    "gradient": _GRADIENT_HALF,
    "gradient_few": _GRADIENT_FEW,
}
# The product for the prototypes with their projection: samples at a time, classes by columns of the result.
_PROTOTYPES_HALF = {80: Tile(32, 64, 128, 8, 3), 90: Tile(64, 128, 128, 8, 3), 100: Tile(64, 128, 128, 8, 3)}
_PROTOTYPES_FLOAT32 = Tile(16, 64, 64, 8, 3)
# The same product where it also updates the prototypes. The optimizer's state is in registers too, so larger tiles
# spill, or leave room for one block only.
_UPDATE_HALF = {80: Tile(32, 64, 64, 8, 3), 90: Tile(64, 64, 64, 8, 3), 100: Tile(64, 64, 64, 8, 3)}
# Exact float32 products run on the ordinary units and not on tensor cores. They are fed from shared memory, so tiles
# are smaller.
_FLOAT32 = {80: Tile(64, 64, 16, 8, 3), 90: Tile(64, 64, 16, 8, 3), 100: Tile(64, 64, 16, 8, 3)}
# The nearest prototype takes square tiles. Four warps on Hopper: the maxima over columns go through shared memory once
# per warp.
_SEARCH_HALF = {**_FORWARD_HALF}
_SEARCH_TF32 = {**_TF32, 90: Tile(128, 128, 32, 4, 3)}
_SEARCH_FLOAT32 = {**_FLOAT32, 100: Tile(64, 64, 16, 8, 2)}
_CANDIDATE_ROWS = 64


def architecture(device: torch.device) -> int:
    """The newest known compute capability at or below the device's: 90 for 9.0. 90 without a GPU (interpreter)."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in ARCHITECTURES if known <= 10 * major + minor), default=ARCHITECTURES[0])


def has_copy_engine(arch: int) -> bool:
    """Whether blocks are fetched by TMA, described by the host; otherwise the kernels compute addresses."""
    return arch >= 90


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; 2 without a GPU, so that the interpreter sees splits too."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def size_name(kernel: str, dtype: torch.dtype, samples: int, width: int) -> str:
    """The name of a tile: "forward" or "gradient", with "_few", "_some" or "_narrow" for a size with its own tile."""
    if dtype == torch.float32:
        return kernel
    if samples <= _MOST_FEW[kernel]:
        return f"{kernel}_few"
    if kernel == "gradient":
        return kernel
    if samples <= FEW_SAMPLES:
        return "forward_some"
    return "forward_narrow" if width in _NARROW else kernel


def _tile(kernel: str, arch: int, dtype: torch.dtype, precision: str, samples: int, width: int) -> Tile:
    name = size_name(kernel, dtype, samples, width)
    if (tuned := tuned_tile(name, arch, dtype, precision)) is not None:
        return Tile(*tuned)
    if dtype != torch.float32:
        return _HALF[name][arch]
    return (_FLOAT32 if precision == "ieee" else _GRADIENT_TF32 if kernel == "gradient" else _TF32)[arch]


def forward_tile(arch: int, dtype: torch.dtype, precision: str, samples: int, width: int) -> Tile:
    """Tile of the log-sum-exp kernel for operands of ``dtype`` (``precision`` is "ieee" or "tf32" for float32)."""
    return _tile("forward", arch, dtype, precision, samples, width)


def keeping(arch: int, tile: Tile) -> Tile:
    """The forward's ``tile`` where its exponentials are stored as well.

    They are staged in shared memory in place of a stage of operands, so that two blocks still fit a multiprocessor.
    """
    if tile.rows * tile.classes == 64 * 64 and tile.warps == 8:  # exact float32, whose registers would spill
        return tile._replace(rows=32)
    return tile._replace(depth=min(tile.depth, 64), stages=min(tile.stages, 2)) if has_copy_engine(arch) else tile


def of_kept(tile: Tile, dtype: torch.dtype) -> Tile:
    """The gradient's ``tile`` where it is made from kept exponentials: smaller in float32, where registers spill."""
    return tile._replace(rows=min(tile.rows, 64), classes=min(tile.classes, 64)) if dtype == torch.float32 else tile


_SMALLER = {(128, 128): (64, 128), (64, 128): (64, 64)}


def summing(arch: int, tile: Tile, sums: bool, bent: bool) -> Tile:
    """The gradient's ``tile`` where it also sums over rows for a prior that learns (``sums``), or bends logits.

    Registers spill with larger tiles; for the sums on sm_100 only.
    """
    if not (bent or (sums and arch >= 100)) or tile[:2] not in _SMALLER:
        return tile
    rows, classes = _SMALLER[tile[:2]]
    return tile._replace(rows=rows, classes=classes, warps=8 if arch >= 100 and classes == 128 else 4)


def of_sub_centers(tile: Tile, centers: int) -> Tile:
    """``tile`` for so many sub-centres: smaller, because the largest of several products takes two or three tiles."""
    if centers == 1:
        return tile
    return tile._replace(rows=min(tile.rows, 64), classes=min(tile.classes, 64 if centers <= 4 else 32))


def gradient_tile(arch: int, dtype: torch.dtype, precision: str, samples: int, width: int) -> Tile:
    """Tile of the kernel that writes dZ; arguments as for :func:`forward_tile`."""
    return _tile("gradient", arch, dtype, precision, samples, width)


def prototype_gradient_tile(
    arch: int, dtype: torch.dtype, precision: str, samples: int, updated: bool = False
) -> Tile | None:
    """Tile of the kernel that multiplies and projects the prototypes' gradient, or None where a library product serves.

    Its ``rows`` are samples at a time; a program makes ``classes`` by ``depth`` columns of the gradient. ``updated``:
    the kernel also updates the prototypes.

    The library serves for many samples, where storing and reading the float32 product costs little beside the rest, and
    in TF32, whose matrix instructions take no transposed operand.
    """
    if samples > FEW_SAMPLES or (dtype == torch.float32 and precision == "tf32"):
        return None
    if dtype == torch.float32:
        return _PROTOTYPES_FLOAT32
    return (_UPDATE_HALF if updated else _PROTOTYPES_HALF)[arch]


def sample_rows(samples: int) -> int:
    """Samples of one program of the margin loss, a power of two."""
    return next((rows for rows in SAMPLE_ROWS if samples <= rows), SAMPLE_ROWS[0])


def row_block_stays(arch: int, tile: Tile, width: int) -> bool:
    """Whether the forward loads a row block once for all class tiles; not on sm_100, where only one block would fit."""
    return width <= tile.depth and arch < 100


def cache_bytes(device: torch.device) -> int:
    """Half of the second-level cache in bytes, as its two halves may hold the same; half of an H100's without a GPU."""
    if device.type != "cuda":
        return 25 << 20
    return int(torch.cuda.get_device_properties(device).L2_cache_size) // 2


def norms_in_tiles(arch: int, dtype: torch.dtype, precision: str, samples: int) -> bool:
    """Whether the forward's tiles compute the lengths of the prototypes, which saves a pass over them.

    It pays while reading the prototypes takes longer than the products: not in exact float32, nor for many samples. On
    sm_100 registers spill for it in tiles of 128 rows.
    """
    if precision == "ieee" and dtype == torch.float32:
        return False
    if arch == 100:
        return dtype != torch.float32 and samples <= _MOST_FEW["forward"]
    return samples <= FEW_SAMPLES


def search_tile(arch: int, dtype: torch.dtype, precision: str) -> Tile:
    """Square tile of the searches' first pass; arguments as for :func:`forward_tile`."""
    if dtype != torch.float32:
        return _SEARCH_HALF[arch]
    return (_SEARCH_TF32 if precision == "tf32" else _SEARCH_FLOAT32)[arch]


def candidate_tile(arch: int, dtype: torch.dtype, precision: str) -> Tile:
    """Tile of the searches' second pass: ``rows`` gathered rows by the ``classes`` of a tile of the first pass."""
    tile = search_tile(arch, dtype, precision)
    return Tile(min(_CANDIDATE_ROWS, tile.rows), tile.classes, tile.depth, 8, min(3, tile.stages))


def row_tile(width: int, *strides: int) -> RowTile:
    """Tile of the kernels that work on whole rows: about 2048 elements a program, and at least one row.

    ``strides``: of the matrices whose rows are read. Without any, rows may begin anywhere, and ``unit`` is 1.
    """
    padded = max(16, 1 << (width - 1).bit_length())
    unit = math.gcd(16, width, *strides) if strides else 1
    return RowTile(max(1, 2048 // padded), padded, 4 if padded <= 4096 else 8, unit)
