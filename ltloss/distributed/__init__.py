"""Class-parallel training: the prototypes of one head spread over the ranks of a ``torch.distributed`` group.

:func:`parallelize` turns any loss module of this package into one whose classes are sharded; the rest is about saving
it, more classes for it, and training a sample of the classes. ``docs/distributed.md`` shows the flow.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from ltloss.distributed.checkpoint import load_checkpoint, save_checkpoint
from ltloss.distributed.class_parallel import ClassParallel, in_one_piece, parallelize
from ltloss.distributed.clipping import clip_grad_norm_
from ltloss.distributed.layout import class_mesh
from ltloss.distributed.more_classes import add_classes
from ltloss.distributed.sampled_optimizers import SampledAdamW, SampledSGD
from ltloss.errors import DistributedError

__all__ = [
    "ClassParallel",
    "DistributedError",
    "SampledAdamW",
    "SampledSGD",
    "add_classes",
    "class_mesh",
    "clip_grad_norm_",
    "in_one_piece",
    "load_checkpoint",
    "parallelize",
    "save_checkpoint",
]

# The names of 0.1 that moved; they go in 0.3.
_MOVED = {"export_safetensors", "import_insightface", "import_pytorch_metric_learning", "import_safetensors"}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    text = f"ltloss.distributed.{name} is ltloss.interop.{name} now; the former name ends with version 0.3"
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module("ltloss.interop"), name)
