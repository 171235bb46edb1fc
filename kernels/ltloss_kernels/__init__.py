"""Triton kernels for large-class margin softmax: tensors in, tensors out. ``__all__`` lists every public name.

Submodules are imported on first use, so that ``ltloss_kernels.config`` can be read where Triton is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltloss_kernels.cosine_logsumexp import Partials, logsumexp, of_ranks, partials
    from ltloss_kernels.cosine_logsumexp_gradients import gradients
    from ltloss_kernels.exponentials import Exponentials, exponentials_bytes, new_exponentials
    from ltloss_kernels.margin_loss import coefficients, margin_loss
    from ltloss_kernels.prototype_search import nearest_prototype, nearest_prototype_gradient, top_k
    from ltloss_kernels.prototype_update import PrototypeUpdate
    from ltloss_kernels.running import interpreting

__all__ = [
    "Exponentials",
    "Partials",
    "PrototypeUpdate",
    "coefficients",
    "exponentials_bytes",
    "gradients",
    "interpreting",
    "logsumexp",
    "margin_loss",
    "nearest_prototype",
    "nearest_prototype_gradient",
    "new_exponentials",
    "of_ranks",
    "partials",
    "top_k",
]

_FILES = (
    "cosine_logsumexp",
    "cosine_logsumexp_gradients",
    "exponentials",
    "margin_loss",
    "prototype_search",
    "prototype_update",
    "running",
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # All files at once: a later import of the file margin_loss would hide the function of that name.
    files = [importlib.import_module(f"{__name__}.{file}") for file in _FILES]
    globals().update({each: vars(file)[each] for file in files for each in file.__all__ if each in __all__})
    return globals()[name]
