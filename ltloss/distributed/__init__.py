"""Class-parallel training: the prototypes of one head spread over the ranks of a ``torch.distributed`` group.

:func:`parallelize` turns any loss module of this package into one whose classes are sharded; the rest is about saving
it, reading what others saved, and training a sample of the classes. ``docs/distributed.md`` shows the flow.
"""

from __future__ import annotations

from ltloss.distributed.checkpoint import load_checkpoint, save_checkpoint
from ltloss.distributed.class_parallel import ClassParallel, parallelize
from ltloss.distributed.convert import (
    add_classes,
    export_safetensors,
    import_insightface,
    import_pytorch_metric_learning,
    import_safetensors,
)
from ltloss.distributed.errors import DistributedError
from ltloss.distributed.layout import class_mesh
from ltloss.distributed.sampled_optimizers import SampledAdamW, SampledSGD

__all__ = [
    "ClassParallel",
    "DistributedError",
    "SampledAdamW",
    "SampledSGD",
    "add_classes",
    "class_mesh",
    "export_safetensors",
    "import_insightface",
    "import_pytorch_metric_learning",
    "import_safetensors",
    "load_checkpoint",
    "parallelize",
    "save_checkpoint",
]
