"""Record launches: the public entry points run on a CPU, and every launch is recorded instead of done."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import ltloss
from benchmarks.kernel_report.layouts import steps
from benchmarks.kernel_report.scenarios import scenarios

__all__ = [
    "KernelCase",
    "as_on_a_gpu",
    "recorded_kernels",
    "recorded_layouts",
    "specialiser",
]

_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class KernelCase:
    """One specialisation of a kernel, as ``triton.compiler.ASTSource`` and ``triton.compile`` take it."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    num_warps: int
    num_stages: int

    @property
    def dtype(self) -> str:
        """Dtype of the matrix product's operands (bf16, fp16, tf32 or fp32); empty for a kernel without a product."""
        if "BLOCK_DEPTH" not in self.constants:
            return ""
        if self.constants["PRECISION"] == "tf32":
            return "tf32"
        found = re.search(r"bf16|fp16|fp32", next(iter(self.signature.values())))
        return found.group() if found else ""

    @property
    def reads_float8(self) -> bool:
        """Whether an argument is float8."""
        return any("fp8" in kind for kind in self.signature.values())

    @property
    def elements(self) -> int:
        """Elements of the accumulator tile that the epilogue works on; 0 for a kernel without such an epilogue."""
        if not self.dtype or self.fn.__name__.startswith(("tile_candidates", "prototype_gradient")):
            return 0
        return int(self.constants["BLOCK_ROWS"] * self.constants["BLOCK_CLASSES"])

    @property
    def maxima(self) -> int:
        """Maxima per element that the epilogue of a search needs; 0 for other kernels, which need an exponential."""
        return {"nearest_prototype_kernel": 2, "best_tile_kernel": 1}.get(self.fn.__name__, 0)

    @property
    def constants(self) -> dict[str, Any]:
        """The constants by the names of their arguments."""
        return {self.fn.arg_names[path[0]]: value for path, value in self.constexprs.items() if len(path) == 1}


@contextmanager
def as_on_a_gpu(arch: int) -> Iterator[None]:
    """Within the block, the launchers take CPU tensors and work as on a GPU of compute capability ``arch``."""
    from ltloss_kernels import running
    from ltloss_kernels.config import tile_table

    with (
        mock.patch.object(running, "runnable", return_value=True),
        mock.patch.object(tile_table, "architecture", return_value=arch),
        mock.patch.object(tile_table, "multiprocessors", return_value=_MULTIPROCESSORS),
    ):
        yield


def specialiser(arch: int) -> Callable[..., KernelCase]:
    """A function of a kernel and the arguments and options of a launch: the case that Triton compiles for ``arch``.

    The case has no name yet.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    binders: dict[Any, Any] = {}  # by the Python function: a kernel of the interpreter's has no hash

    def specialised(fn: Any, args: Sequence[Any], options: dict[str, Any]) -> KernelCase:
        if fn.fn not in binders:
            binders[fn.fn] = create_function_from_signature(fn.signature, fn.params, backend)
        bound, specialization, rest = binders[fn.fn](*args, **options)
        found, signature, constants, attrs = fn._pack_args(backend, options, bound, specialization, rest)
        return KernelCase("", fn, signature, constants, attrs, found.num_warps, found.num_stages)

    return specialised


@contextmanager
def _taken_down(arch: int, name: Callable[[str], str]) -> Iterator[dict[str, KernelCase]]:
    """Within the block, launches are recorded as for a GPU of compute capability ``arch``, and not done.

    Nor are the library's products, which would multiply memory that no launch has written.
    """
    from ltloss_kernels import cosine_logsumexp_gradients
    from triton.runtime.jit import JITFunction

    specialised = specialiser(arch)
    cases: dict[str, KernelCase] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        case = specialised(self, args, options)
        if (key := str(case)) not in cases:
            cases[key] = replace(case, name=name(self.__name__.removesuffix("_kernel")))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(cosine_logsumexp_gradients, "multiply_add"),
        mock.patch.object(cosine_logsumexp_gradients, "multiply_add_in_parts"),
        as_on_a_gpu(arch),
    ):
        yield cases


def recorded_kernels(arch: int) -> list[KernelCase]:
    """Every distinct specialisation that losses and searches launch, for a compute capability; names are unique."""
    scenario = ""
    counts: dict[str, int] = {}

    def name(kernel: str) -> str:
        label = f"{kernel} {scenario}"
        counts[label] = counts.get(label, 0) + 1
        return label if counts[label] == 1 else f"{label} #{counts[label]}"

    with _taken_down(arch, name) as cases:
        for scenario, launch in scenarios(arch):  # noqa: B007 - ``name`` reads it
            launch()
    return list(cases.values())


def recorded_layouts(arch: int) -> list[KernelCase]:
    """Every distinct specialisation of the steps over the layouts of inputs."""
    counts: dict[str, int] = {}

    def name(kernel: str) -> str:
        counts[kernel] = counts.get(kernel, 0) + 1
        return f"{kernel} layout {counts[kernel]}"

    with _taken_down(arch, name) as cases, ltloss.use_backend("triton"):
        for step in steps():
            step()
    return list(cases.values())
