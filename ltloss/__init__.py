"""ltloss: long-tail, large-class cosine losses for PyTorch that never store the N×C logits.

The loss modules are in this namespace. The rest:

* :mod:`ltloss.functional`: the losses as functions; :mod:`ltloss.contrastive`: losses over a batch or a queue;
  :mod:`ltloss.reference`: dense float64 twins of both.
* :mod:`ltloss.class_balance`: margins, priors and weights from class counts.
* :mod:`ltloss.extend`: write a loss of your own; :mod:`ltloss.testing`: check it.
* :mod:`ltloss.optim`: optimizers that update the prototypes inside the backward pass.
* :mod:`ltloss.distributed`: spread the classes over several devices.
* :mod:`ltloss.export`: files for serving; :mod:`ltloss.errors`: the exceptions.
* :class:`ltloss.sklearn.LongTailClassifier`: a scikit-learn classifier over embeddings. It needs the extra ``sklearn``.
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
    from ltloss.runtime import debug as debug  # deprecated, of version 0.1

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

# Imported on first use, so that the `ltloss` command starts, and reports errors, without waiting for torch.
_HOMES = {
    "runtime": (
        *("current_backend", "current_debug", "current_keep_exponentials", "current_workspace"),
        *("debug_labels", "set_debug"),
        *("use_backend", "use_workspace", "debug"),  # debug: deprecated, of version 0.1
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
