"""ltloss: long-tail, large-class cosine losses for PyTorch that never store the N×C logits.

Functions are in :mod:`ltloss.functional`, contrastive losses over a batch or a queue in :mod:`ltloss.contrastive`, the
dense float64 twins of both in :mod:`ltloss.reference`, the helpers that turn class counts into margins, priors and
weights in :mod:`ltloss.class_balance`. The loss modules are here. A loss of your own starts from :mod:`ltloss.extend`
and is tried with :mod:`ltloss.testing`. Optimizers that move the prototypes inside the backward are in
:mod:`ltloss.optim`, files for serving in :mod:`ltloss.export`, errors in :mod:`ltloss.errors`. A classifier over
embeddings for scikit-learn is :class:`ltloss.sklearn.LongTailClassifier`, which needs the extra ``sklearn``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltloss import (
        class_balance,
        contrastive,
        distributed,
        errors,
        export,
        extend,
        functional,
        interop,
        optim,
        reference,
        soft_labels,
        sub_centers,
        testing,
        training,
    )
    from ltloss._types import NearestPrototype, TopK
    from ltloss.losses.class_centers import ClassCenters
    from ltloss.losses.cosine_space import CosineSpaceLoss
    from ltloss.losses.count_losses import LDAMLoss, LogitAdjustedLoss
    from ltloss.losses.defaults import default_scale
    from ltloss.losses.linear_softmax import LinearSoftmaxLoss
    from ltloss.losses.long_tail import LongTailLoss
    from ltloss.losses.margin_losses import ArcFaceLoss, CombinedMarginLoss, CosFaceLoss, CosineSoftmaxLoss
    from ltloss.losses.other_classes import CurricularFaceLoss, InterclassFilterLoss
    from ltloss.losses.prototype_head import PrototypeHead
    from ltloss.losses.sample_margins import AdaFaceLoss, ElasticFaceLoss, MagFaceLoss
    from ltloss.runtime import (
        current_backend,
        current_debug,
        current_keep_exponentials,
        current_workspace,
        debug_labels,
        set_debug,
        use_backend,
        use_workspace,
    )
    from ltloss.runtime import debug as debug  # of 0.1

__version__ = "0.2.0"

__all__ = [
    "AdaFaceLoss",
    "ArcFaceLoss",
    "ClassCenters",
    "CombinedMarginLoss",
    "CosFaceLoss",
    "CosineSoftmaxLoss",
    "CosineSpaceLoss",
    "CurricularFaceLoss",
    "ElasticFaceLoss",
    "InterclassFilterLoss",
    "LDAMLoss",
    "LinearSoftmaxLoss",
    "LogitAdjustedLoss",
    "LongTailLoss",
    "MagFaceLoss",
    "NearestPrototype",
    "PrototypeHead",
    "TopK",
    "class_balance",
    "contrastive",
    "current_backend",
    "current_debug",
    "current_keep_exponentials",
    "current_workspace",
    "debug_labels",
    "default_scale",
    "distributed",
    "errors",
    "export",
    "extend",
    "functional",
    "interop",
    "optim",
    "reference",
    "set_debug",
    "soft_labels",
    "sub_centers",
    "testing",
    "training",
    "use_backend",
    "use_workspace",
]

# Imported on first use: the `ltloss` command starts, and reports what goes wrong, before torch is there.
_HOMES = {
    "runtime": (
        *("current_backend", "current_debug", "current_keep_exponentials", "current_workspace"),
        *("debug_labels", "set_debug"),
        *("use_backend", "use_workspace", "debug"),  # the last of 0.1
    ),
    "losses.class_centers": ("ClassCenters",),
    "losses.cosine_space": ("CosineSpaceLoss",),
    "losses.defaults": ("default_scale",),
    "losses.count_losses": ("LDAMLoss", "LogitAdjustedLoss"),
    "losses.margin_losses": ("ArcFaceLoss", "CombinedMarginLoss", "CosFaceLoss", "CosineSoftmaxLoss"),
    "losses.linear_softmax": ("LinearSoftmaxLoss",),
    "losses.long_tail": ("LongTailLoss",),
    "losses.other_classes": ("CurricularFaceLoss", "InterclassFilterLoss"),
    "losses.prototype_head": ("PrototypeHead",),
    "losses.sample_margins": ("AdaFaceLoss", "ElasticFaceLoss", "MagFaceLoss"),
    "_types": ("NearestPrototype", "TopK"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"ltloss.{_HOME[name]}"), name)
    elif name in __all__:
        value = importlib.import_module(f"ltloss.{name}")
    else:
        raise AttributeError(f"module 'ltloss' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
