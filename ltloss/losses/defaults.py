"""The scale that the modules take where a call gives none, and the values of the long-tail margins with log prior.

A module of its own, without torch, so that the ``ltloss`` command can list methods before torch is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["FORMER_OPTIONS", "FROZEN_SCALE", "LONG_TAIL_PRIOR", "RENAMED_OPTIONS", "default_scale", "of_form"]

# What docs/evidence.md measures as `long-tail-prior`: the margins of source A, with a log prior instead of L2 and L3.
LONG_TAIL_PRIOR: Mapping[str, Any] = MappingProxyType(
    {"tau": 1.0, "margin_normalize": "max", "min_angle_weight": 0.0, "feature_norm_weight": 0.0}
)

# Of LongTailLoss in version 0.1, for one version more.
RENAMED_OPTIONS = {"min_angle_exact": "not min_angle_allow_tf32", "min_angle_rows": "min_angle_classes"}
FORMER_OPTIONS = {"form", *RENAMED_OPTIONS}


def of_form(form: object, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the ``form`` of version 0.1, "recommended" or "published", sets of a LongTailLoss beside what is given."""
    if form not in ("recommended", "published"):
        raise ValueError(f"form must be one of recommended, published; got {form!r}")
    if form == "published":
        return {}
    values = {name: value for name, value in LONG_TAIL_PRIOR.items() if name not in given}
    if not given.get("normalize_features", True):
        values.pop("feature_norm_weight", None)  # features that kept their length had L3 in either form
    if given.get("log_prior") is not None:
        values.pop("tau", None)
    return values


_LEAST_SCALE = 8.0
# s of prototypes over features that do not learn: 32 was best, or within 0.3 points of it, with 104 and 1,655 classes,
# where default_scale loses 7 and more (docs/evidence-embeddings.md). Such features cannot turn towards a prototype.
FROZEN_SCALE = 32.0


def default_scale(num_classes: int, feature_length: float = 1.0) -> float:
    """The scale s of the modules where a call gives none: 2·ln C, at least 8.

    A feature in line with its prototype and at right angles to all others has the cross-entropy ln(1 + (C − 1)·e^(−s)):
    ln 2 at s = ln C, 1/C at twice that. So at 2·ln C a margin, a prior and prototypes that are not at right angles have
    room, and no more is left unused. The floor, and what other scales do, was measured with 10 and with 1623 classes
    (docs/evidence.md); beyond that it follows from the formula alone.

    Args:
        num_classes: C.
        feature_length: ‖x‖ to expect where features keep their length: s·‖x‖ is what counts.

    Returns:
        s > 0.

    Source: ours; the lower bound on s of Wang et al., CosFace, CVPR 2018, and the fixed scale √2·ln(C − 1) of Zhang et
    al., AdaCos, CVPR 2019, grow with ln C likewise.

    Example:
        >>> from ltloss import default_scale
        >>> [round(default_scale(c), 1) for c in (10, 1000, 1_000_000)]
        [8.0, 13.8, 27.6]
    """
    return max(_LEAST_SCALE, 2.0 * math.log(num_classes)) / feature_length
