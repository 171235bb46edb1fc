"""ltloss: long-tail, large-class cosine losses for PyTorch that never store the N×C logits.

Functions are in :mod:`ltloss.functional`, their dense float64 twins in :mod:`ltloss.reference`, the helpers that turn
class counts into margins, priors and weights in :mod:`ltloss.class_balance`. The loss modules are here.
"""

from ltloss import class_balance, functional, reference
from ltloss.backend import current_backend, current_workspace, debug, use_backend, use_workspace
from ltloss.centers import ClassCenters
from ltloss.heads import (
    ArcFaceLoss,
    CombinedMarginLoss,
    CosFaceLoss,
    CosineSoftmaxLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    PrototypeHead,
)
from ltloss.long_tail import CosineSpaceLoss, LongTailLoss
from ltloss.types import NearestPrototype, TopK

__version__ = "0.1.0"

__all__ = [
    "ArcFaceLoss",
    "ClassCenters",
    "CombinedMarginLoss",
    "CosFaceLoss",
    "CosineSoftmaxLoss",
    "CosineSpaceLoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "LongTailLoss",
    "NearestPrototype",
    "PrototypeHead",
    "TopK",
    "class_balance",
    "current_backend",
    "current_workspace",
    "debug",
    "functional",
    "reference",
    "use_backend",
    "use_workspace",
]
