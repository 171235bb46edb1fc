"""ltloss as a kernel of Hugging Face's hub: functions, and layers that take the place of another layer's forward."""

from ltloss.functional import (
    cosine_logsumexp,
    feature_norm_penalty,
    margin_cross_entropy,
    min_angle_regularizer,
    nearest_prototype,
    top_k,
)
from ltloss.runtime import debug_labels, use_backend, use_workspace

from . import layers

__all__ = [
    "cosine_logsumexp",
    "debug_labels",
    "feature_norm_penalty",
    "layers",
    "margin_cross_entropy",
    "min_angle_regularizer",
    "nearest_prototype",
    "top_k",
    "use_backend",
    "use_workspace",
]
