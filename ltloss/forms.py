"""The two forms of :class:`ltloss.LongTailLoss`: what its terms weigh where a call does not say.

A module of its own, without torch, so that the `ltloss` command can list methods before torch is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

__all__ = ["FORMS", "LongTailForm"]

LongTailForm = Literal["recommended", "published"]

# "recommended" follows docs/evidence.md: none was more accurate beyond the spread, and it bears a rate or a scale that
# does not fit better than the loss without margin. The source leaves λ1, λ2 and g open; see docs/mathematics.md.
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
