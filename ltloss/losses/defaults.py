"""The default scale of the modules, and the options of the long-tail loss with a log prior.

This module does not import torch, so that the ``ltloss`` command can list methods without waiting for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["FORMER_OPTIONS", "FROZEN_SCALE", "LONG_TAIL_PRIOR", "RENAMED_OPTIONS", "default_scale", "of_form"]

# The method `long-tail-prior` of docs/evidence.md: the margins of source A, with a log prior instead of L2 and L3.
LONG_TAIL_PRIOR: Mapping[str, Any] = MappingProxyType(
    {"tau": 1.0, "margin_normalize": "max", "min_angle_weight": 0.0, "feature_norm_weight": 0.0}
)

# Options of LongTailLoss in version 0.1, accepted for one more version.
RENAMED_OPTIONS = {"min_angle_exact": "not min_angle_allow_tf32", "min_angle_rows": "min_angle_classes"}
FORMER_OPTIONS = {"form", *RENAMED_OPTIONS}


def of_form(form: object, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of LongTailLoss that ``form`` of version 0.1, "recommended" or "published", sets if not given."""
    if form not in ("recommended", "published"):
        raise ValueError(f"form must be one of recommended, published; got {form!r}")
    if form == "published":
        return {}
    values = {name: value for name, value in LONG_TAIL_PRIOR.items() if name not in given}
    if not given.get("normalize_features", True):
        values.pop("feature_norm_weight", None)  # with features that keep their length, both forms had L3
    if given.get("log_prior") is not None:
        values.pop("tau", None)
    return values


_LEAST_SCALE = 8.0
# The scale for frozen features, which cannot turn towards a prototype. With 104 and 1,655 classes 32 was the best scale
# or within 0.3 points of it; default_scale lost 7 points and more (docs/evidence-embeddings.md).
FROZEN_SCALE = 32.0


def default_scale(num_classes: int, feature_length: float = 1.0) -> float:
    """The default scale s of the loss modules: 2·ln C, at least 8, divided by the expected feature length.

    Take a feature with cosine 1 to its prototype and 0 to all others. Its cross-entropy is ln(1 + (C − 1)·e^(−s)):
    ln 2 at s = ln C, and 1/C at s = 2·ln C. The larger of the two leaves room for a margin, for a prior and for
    prototypes that are not orthogonal. It was measured beside other scales with 10 to 3,957 classes, for networks that
    learn with the head. Frozen features of a network that never saw the samples want 32
    (docs/evidence-embeddings.md).

    Args:
        num_classes: C.
        feature_length: the expected ‖x‖ with ``normalize_features=False``, where s·‖x‖ takes the place of s. 1
            otherwise.

    Returns:
        s > 0.

    Raises:
        ValueError: ``num_classes`` below 1, or a ``feature_length`` that is not positive.

    See also: :class:`ltloss.PrototypeHead`, which takes it when ``scale`` is None.

    Source: ours. The lower bound on s of Wang et al., CosFace, CVPR 2018, and the fixed scale √2·ln(C − 1) of Zhang et
    al., AdaCos, CVPR 2019, also grow with ln C.

    Example:
        >>> from ltloss import default_scale
        >>> [round(default_scale(c), 1) for c in (10, 1000, 1_000_000)]
        [8.0, 13.8, 27.6]
    """
    if not num_classes >= 1:
        raise ValueError(f"num_classes must be >= 1; got {num_classes!r}")
    if not feature_length > 0.0:
        raise ValueError(f"feature_length must be > 0; got {feature_length!r}")
    return max(_LEAST_SCALE, 2.0 * math.log(num_classes)) / feature_length
