"""Every kernel in every configuration that a training step can launch, described for ahead-of-time compilation.

The kernel report compiles these for GPUs that need not be there. Shapes, dtypes and constants come from
:mod:`ltloss_kernels.config.tile_table`, as they do in the launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.device.logsumexp_backward import gradient_tile_kernel, projection_kernel, sample_gradient_kernel
from ltloss_kernels.device.logsumexp_forward import cosine_logsumexp_kernel, sample_kernel
from ltloss_kernels.device.margin_loss import margin_loss_kernel, reduce_kernel
from ltloss_kernels.device.rows import row_norm_kernel
from ltloss_kernels.device.search_backward import nearest_gradient_kernel
from ltloss_kernels.device.search_first_pass import best_tile_kernel, nearest_prototype_kernel
from ltloss_kernels.device.search_second_pass import (
    arrange_pairs_kernel,
    count_tiles_kernel,
    pair_cosine_kernel,
    tile_candidates_kernel,
)
from ltloss_kernels.prototype_search import GROUP, PAIRS_PER_PROGRAM

__all__ = ["KernelCase", "production_kernels"]

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_PRODUCTS = ((torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32"))
# Multiples of 16 for every usual width, which a launch specialises on.
_ALIGNED_SIZES = ("width", "features_stride", "rows_stride", "prototypes_stride", "slab_stride")
_WIDTHS = (128, 512, 4096, 8192)


@dataclass(frozen=True)
class KernelCase:
    """One specialisation of a kernel, as ``triton.compiler.ASTSource`` and ``triton.compile`` take it.

    ``elements`` is the size of the accumulator tile, to which instruction counts are put in relation; 0 for a kernel
    without a matrix product, or whose epilogue does not matter. ``maxima`` per element is what the epilogue of a search
    cannot do without; that of the others is an exponential. ``matrix_instruction`` tells whether the tensor core is
    expected.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    elements: int = 0
    maxima: int = 0
    matrix_instruction: bool = False
    attrs: dict[tuple[int, ...], list[list[Any]]] = field(default_factory=dict)


def _case(name: str, fn: Any, types: dict[str, str], constants: dict[str, Any], warps: int, **more: Any) -> KernelCase:
    """Complete a case: arguments without a type are int32; pointers and aligned sizes are declared as such.

    What a launch passes as None, or as a 1 that is specialised on, is a constant here too.
    """
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}
    signature = {arg: types.get(arg, "constexpr" if arg in constants else "i32") for arg in fn.arg_names}
    aligned = [i for i, (arg, kind) in enumerate(signature.items()) if kind.startswith("*") or arg in _ALIGNED_SIZES]
    return KernelCase(
        name,
        fn,
        signature,
        constants,
        warps,
        more.pop("num_stages", 3),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        **more,
    )


def _pointers(fn: Any, default: str = "*fp32", **others: str) -> dict[str, str]:
    return {arg: others.get(arg, default) for arg in fn.arg_names if arg.endswith("_ptr")}


def _block(arch: int, dtype: torch.dtype, rows: int, columns: int) -> str:
    """The type of a matrix that is taken block by block."""
    if tiles.has_copy_engine(arch):
        return f"tensordesc<{_NAMES[dtype]}[{rows},{columns}]>"
    return f"*{_NAMES[dtype]}"


def _product_name(dtype: torch.dtype, precision: str) -> str:
    return _NAMES[dtype] + " tf32" * (precision == "tf32")


def _logsumexp_cases(arch: int) -> Iterator[KernelCase]:
    fn = cosine_logsumexp_kernel
    variants = {
        "fixed": (False, False, False),
        "online": (True, False, False),
        "prior": (True, True, False),
        "fixed, logit sum": (False, False, True),
        "prior, logit sum": (True, True, True),
    }
    for dtype, precision in _PRODUCTS:
        tile = tiles.forward_tile(arch, dtype, precision)
        for variant, (online, prior, with_sum) in variants.items():
            types = _pointers(fn, label_ptr="*i32", flags_ptr="*i8") | {
                "features": _block(arch, dtype, tile.rows, tile.depth),
                "prototypes": _block(arch, dtype, tile.classes, tile.depth),
                "shift": "fp32",
            }
            absent = {"partial_max_ptr": online, "prior_ptr": prior, "partial_logit_ptr": with_sum}
            yield _case(
                f"cosine_logsumexp {_product_name(dtype, precision)}, {variant}",
                fn,
                {name: kind for name, kind in types.items() if absent.get(name, True)},
                {
                    **{name: None for name, present in absent.items() if not present},
                    "DESCRIBED": tiles.has_copy_engine(arch),
                    "ONLINE": online,
                    "HAS_PRIOR": prior,
                    "WITH_LOGIT_SUM": with_sum,
                    "PRECISION": precision,
                    "BLOCK_ROWS": tile.rows,
                    "BLOCK_CLASSES": tile.classes,
                    "BLOCK_DEPTH": tile.depth,
                },
                tile.warps,
                num_stages=tile.stages,
                elements=tile.rows * tile.classes,
                matrix_instruction=dtype != torch.float32 or precision == "tf32",
            )


def _gradient_cases(arch: int) -> Iterator[KernelCase]:
    fn = gradient_tile_kernel
    for dtype, precision in _PRODUCTS:
        tile = tiles.gradient_tile(arch, dtype, precision)
        for variant, (prior, smooth) in {"plain": (False, False), "prior, smoothing": (True, True)}.items():
            types = _pointers(fn, label_ptr="*i32") | {
                "features": _block(arch, dtype, tile.rows, tile.depth),
                "prototypes": _block(arch, dtype, tile.classes, tile.depth),
                "slab": _block(arch, dtype, tile.rows, tile.classes),
            }
            if not prior:
                del types["prior_ptr"]
            yield _case(
                f"gradient_tile {_product_name(dtype, precision)}, {variant}",
                fn,
                types,
                {
                    **({} if prior else {"prior_ptr": None}),
                    "DESCRIBED": tiles.has_copy_engine(arch),
                    "HAS_PRIOR": prior,
                    "SMOOTH": smooth,
                    "FOLD": dtype != torch.float32,
                    "PRECISION": precision,
                    "GROUP": 8,
                    "BLOCK_ROWS": tile.rows,
                    "BLOCK_CLASSES": tile.classes,
                    "BLOCK_DEPTH": tile.depth,
                },
                tile.warps,
                num_stages=tile.stages,
                elements=tile.rows * tile.classes,
                matrix_instruction=dtype != torch.float32 or precision == "tf32",
            )


def _best_tile_cases(arch: int) -> Iterator[KernelCase]:
    """First pass of the searches: over the triangle, over some rows, and for the k best."""
    described = tiles.has_copy_engine(arch)
    for dtype, precision in _PRODUCTS:
        tile = tiles.search_tile(arch, dtype, precision)
        for variant in ("", ", rows", ", every tile"):
            fn = best_tile_kernel if variant else nearest_prototype_kernel
            types = _pointers(fn, best_ptr="*i64", own_ptr="*i64") | {
                "rows_source": _block(arch, dtype, tile.rows, tile.depth),
                "prototypes": _block(arch, dtype, tile.classes, tile.depth),
            }
            of_variant: dict[str, Any] = {"GROUP": GROUP}
            if variant:
                has_own = variant == ", rows"
                of_variant = {"HAS_OWN": has_own, "EVERY_TILE": not has_own, **({} if has_own else {"own_ptr": None})}
            yield _case(
                f"{'best_tile' if variant else 'nearest_prototype'} {_product_name(dtype, precision)}{variant}",
                fn,
                {name: kind for name, kind in types.items() if name not in of_variant},
                {
                    **of_variant,
                    "DESCRIBED": described,
                    "PRECISION": precision,
                    "BLOCK_ROWS": tile.rows,
                    "BLOCK_CLASSES": tile.classes,
                    "BLOCK_DEPTH": tile.depth,
                },
                tile.warps,
                num_stages=tile.stages,
                elements=tile.rows * tile.classes,
                maxima=1 if variant else 2,
                matrix_instruction=dtype != torch.float32 or precision == "tf32",
            )


def _candidate_cases(arch: int) -> Iterator[KernelCase]:
    """Second pass of the searches."""
    fn = tile_candidates_kernel
    for dtype, precision in _PRODUCTS:
        tile = tiles.candidate_tile(arch, dtype, precision)
        for nearest in (True, False):
            absent = ["own_ptr", "candidates_ptr" if nearest else "index_ptr"]
            operand = f"*{_NAMES[dtype]}"
            types = _pointers(
                fn, "*i64", rows_ptr=operand, prototypes_ptr=operand, class_factor_ptr="*fp32", order_ptr="*i32"
            )
            yield _case(
                f"tile_candidates {_product_name(dtype, precision)}, {'nearest' if nearest else 'all'}",
                fn,
                {name: kind for name, kind in types.items() if name not in absent},
                {
                    **dict.fromkeys(absent),
                    "NEAREST": nearest,
                    "HAS_OWN": False,
                    "PRECISION": precision,
                    "BLOCK_ROWS": tile.rows,
                    "BLOCK_CLASSES": tile.classes,
                    "BLOCK_DEPTH": tile.depth,
                },
                tile.warps,
                num_stages=tile.stages,
                matrix_instruction=dtype != torch.float32 or precision == "tf32",
            )


def _pair_cases() -> Iterator[KernelCase]:
    block = {"BLOCK": PAIRS_PER_PROGRAM}
    types = {"best_ptr": "*i64", "counts_ptr": "*i32", "next_ptr": "*i32", "order_ptr": "*i32"}
    yield _case("count_tiles", count_tiles_kernel, types, block, 4)
    yield _case("arrange_pairs", arrange_pairs_kernel, types, block, 4)
    for width in _WIDTHS:
        tile = tiles.row_tile(width)
        fn = pair_cosine_kernel
        types = _pointers(fn, left_ptr="*bf16", right_ptr="*bf16", index_ptr="*i64")
        del types["own_ptr"]
        constants = {"own_ptr": None, "left_column_stride": 1, "right_column_stride": 1, "HAS_OWN": False}
        yield _case(
            f"pair_cosine bf16, D = {width}",
            fn,
            types,
            {**constants, "ROWS": tile.rows, "WIDTH": tile.width},
            tile.warps,
        )
        fn = nearest_gradient_kernel
        types = _pointers(fn, "*i64", prototypes_ptr="*bf16", grad_ptr="*bf16", grad_cosine_ptr="*fp32")
        del types["own_ptr"]
        constants = {"own_ptr": None, "column_stride": 1, "grad_cosine_stride": 1, "HAS_OWN": False}
        yield _case(
            f"nearest_gradient bf16, D = {width}",
            fn,
            types,
            {**constants, "ENTRIES": tile.rows, "WIDTH": tile.width},
            tile.warps,
        )


def _row_cases() -> Iterator[KernelCase]:
    for width in _WIDTHS:
        tile = tiles.row_tile(width)
        rows = {"ROWS": tile.rows, "WIDTH": tile.width}
        yield from _row_norm_cases(width, rows, tile.warps)
        yield _sample_case(width, rows, tile.warps)
        yield _sample_gradient_case(width, rows, tile.warps)
        yield _projection_case(width, rows, tile.warps)


def _row_norm_cases(width: int, rows: dict[str, int], warps: int) -> Iterator[KernelCase]:
    for kind, copy in (("bf16", "none"), ("fp32 to bf16", "scaled")):
        types = _pointers(row_norm_kernel, flags_ptr="*i8", copy_ptr="*bf16", vectors_ptr=f"*{kind.split()[0]}")
        missing = ["prior_ptr", "prior_out_ptr"] + ["copy_ptr", "copy_factor_ptr"] * (copy == "none")
        yield _case(
            f"row_norm {kind}, D = {width}",
            row_norm_kernel,
            {name: kind for name, kind in types.items() if name not in missing} | {"factor_scale": "fp32"},
            {
                **dict.fromkeys(missing),
                "vectors_column_stride": 1,
                "COPY": copy,
                "HAS_FACTOR": True,
                "HAS_LABELS": False,
                "HAS_PRIOR": False,
                "CLEAR_FLAGS": True,
                **rows,
            },
            warps,
        )


def _sample_case(width: int, rows: dict[str, int], warps: int) -> KernelCase:
    flag_tile = tiles.forward_tile(90, torch.bfloat16, "ieee")
    halves = dict.fromkeys(("features_ptr", "prototypes_ptr", "copy_ptr"), "*bf16")
    types = _pointers(sample_kernel, labels_ptr="*i64", label_ptr="*i32", flags_ptr="*i8", **halves)
    del types["norm_ptr"]
    return _case(
        f"sample bf16, D = {width}",
        sample_kernel,
        types,
        {
            "norm_ptr": None,
            "features_column_stride": 1,
            "prototypes_column_stride": 1,
            "labels_stride": 1,
            "SUPERVISED": True,
            "NORMALIZE": True,
            "HAS_COPY": True,
            "RAGGED": True,
            "FLAG_ROWS": flag_tile.rows,
            "FLAG_CLASSES": flag_tile.classes,
            **rows,
        },
        warps,
    )


def _sample_gradient_case(width: int, rows: dict[str, int], warps: int) -> KernelCase:
    fn = sample_gradient_kernel
    types = _pointers(fn, features_ptr="*bf16", copy_ptr="*bf16", labels_ptr="*i64", label_ptr="*i32")
    return _case(
        f"sample_gradient bf16, D = {width}",
        fn,
        types | {"scale": "fp32"},
        {
            "features_column_stride": 1,
            "labels_stride": 1,
            "COPY": "unit",
            "SUPERVISED": True,
            "HAS_TOTAL": True,
            "SCALED": True,
            "FOLD": True,
            **rows,
        },
        warps,
    )


def _projection_case(width: int, rows: dict[str, int], warps: int) -> KernelCase:
    halves = ("features_ptr", "prototypes_ptr", "grad_features_ptr", "grad_prototypes_ptr")
    return _case(
        f"projection bf16, D = {width}",
        projection_kernel,
        _pointers(projection_kernel, labels_ptr="*i64", **dict.fromkeys(halves, "*bf16")) | {"scale": "fp32"},
        {
            "features_column_stride": 1,
            "prototypes_column_stride": 1,
            "labels_stride": 1,
            "FEATURES": True,
            "PROTOTYPES": True,
            "HAS_LABELS": True,
            "HAS_TOTAL": True,
            "FEATURE_COPY": "unit",
            "PROTOTYPE_COPY": "none",
            "LENGTH": False,
            "SCALED": False,
            **rows,
        },
        warps,
    )


def _sample_vector_cases() -> Iterator[KernelCase]:
    scalars = (
        "shift",
        "scale",
        "angle_margin",
        "cosine_margin",
        "class_weight",
        "angle_multiplier",
        "label_smoothing",
    )
    flags = (
        "HAS_ANGULAR_VECTOR",
        "HAS_COSINE_VECTOR",
        "HAS_PRIOR",
        "HAS_WEIGHT",
        "SMOOTH",
        "HAS_ANGLE",
        "EXACT_GRADIENT",
    )
    for arcface in (False, True):
        yield _case(
            f"margin_loss, everything, {'arcface' if arcface else 'monotone'}",
            margin_loss_kernel,
            _pointers(margin_loss_kernel, labels_ptr="*i64") | dict.fromkeys(scalars, "fp32"),
            {
                **dict.fromkeys(flags, True),
                "ONLINE": True,
                "NORMALIZE": False,
                "ARCFACE": arcface,
                "ROWS": tiles.SAMPLE_ROWS,
            },
            4,
        )
    yield _case("reduce", reduce_kernel, _pointers(reduce_kernel), {"MEAN": True, "BLOCK": 1024}, 4)


def production_kernels(arch: int) -> Iterator[KernelCase]:
    """Yield every production configuration for a compute capability of ``tile_table.ARCHITECTURES``."""
    yield from _logsumexp_cases(arch)
    yield from _gradient_cases(arch)
    yield from _best_tile_cases(arch)
    yield from _candidate_cases(arch)
    yield from _pair_cases()
    yield from _row_cases()
    yield from _sample_vector_cases()
