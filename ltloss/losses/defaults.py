"""What the modules take where a call does not say: the scale, and the two forms of :class:`ltloss.LongTailLoss`.

A module of its own, without torch, so that the `ltloss` command can list methods before torch is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

__all__ = ["FORMS", "LongTailForm", "default_scale"]

LongTailForm = Literal["recommended", "published"]

# "recommended" follows docs/evidence.md: tuned, the loss without margin is as accurate or up to a point more, but this
# one bears a rate or a scale that does not fit better by far. The source leaves λ1, λ2 and g open; see
# docs/mathematics.md.
FORMS: Mapping[LongTailForm, Mapping[str, Any]] = MappingProxyType(
    {
        "recommended": {
            "margin": 0.5,
            "margin_normalize": "max",
            "tau": 1.0,
            "min_angle_weight": 0.0,
            "feature_norm_weight": 0.0,
        },
        "published": {
            "margin": 0.5,
            "margin_normalize": "none",
            "tau": 0.0,
            "min_angle_weight": 0.1,
            "feature_norm_weight": 0.1,
        },
    }
)

_LEAST_SCALE = 8.0


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
