"""The margin on the own-class cosine: its value and its slope, on N-vectors.

Everything a margin does happens on one number per sample, so this file is all that tells ArcFace from CosFace. The
wide work, which is the same for every loss, is in :mod:`ltloss.ops`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = ["ANGLE_FLOOR", "BeyondPi", "MarginGradient", "arccos", "margin_cosine", "mean_angle"]

BeyondPi = Literal["monotone", "arcface"]
MarginGradient = Literal["exact", "straight_through"]

# d arccos(c)/dc = -1/sin(theta) grows without bound towards theta = 0 and pi, where a float32 cosine cannot resolve
# angles below 3.5e-4 anyway. Slopes are taken at the angle clamped into [ANGLE_FLOOR, pi - ANGLE_FLOOR], which bounds
# them by 2048. Nothing is lost: the gradient that reaches a vector is the slope times sin(theta).
ANGLE_FLOOR = 2.0**-11


def _clamped(angle: Tensor) -> Tensor:
    return angle.clamp(ANGLE_FLOOR, math.pi - ANGLE_FLOOR)


class _Arccos(torch.autograd.Function):
    """theta = arccos(c), dtheta/dc = -1/sin(theta), with the slope bounded (see ``ANGLE_FLOOR``)."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor) -> Tensor:
        angle = cosine.clamp(-1.0, 1.0).acos()
        ctx.save_for_backward(angle)
        return angle

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (angle,) = ctx.saved_tensors
        # ANGLE_FLOOR, which is its own sine, as a literal: torch.compile(dynamic=True) takes globals for inputs of the
        # graph and stumbles over their use in two autograd functions of one module.
        slope: Tensor = -1.0 / angle.sin().clamp_min(2.0**-11)
        return grad_outputs[0] * slope


def arccos(cosine: Tensor) -> Tensor:
    """Angle in radians of a cosine, exact in value, with a gradient that stays finite at ±1.

    Args:
        cosine: any shape; values a rounding error outside [-1, 1] are taken as ±1, NaN stays NaN.

    Returns:
        Angles in [0, π], same shape and dtype. The slope is bounded by 2048 (see ``ANGLE_FLOOR``).

    Example:
        >>> import torch
        >>> from ltloss.margins import arccos
        >>> arccos(torch.tensor([1.0, 0.0]))
        tensor([0.0000, 1.5708])
    """
    return _Arccos.apply(cosine)  # type: ignore[no-any-return, no-untyped-call]


def _value(cosine: Tensor, multiplier: float, angular: Tensor | float, beyond_pi: BeyondPi) -> Tensor:
    phase = multiplier * cosine.clamp(-1.0, 1.0).acos() + angular
    if beyond_pi == "arcface":
        return torch.where(phase > math.pi, cosine - angular * _sin(angular), phase.cos())
    # On the k-th stretch of length pi: (-1)^k cos(phase) - 2k. Continuous and falling everywhere; k = 1 is the
    # -2 - cos(theta + m) of the text, k > 1 only occurs with a multiplier (SphereFace).
    stretch = torch.floor(phase / math.pi).clamp_min(0)
    return (1 - 2 * stretch.remainder(2)) * phase.cos() - 2 * stretch


def _slope(cosine: Tensor, multiplier: float, angular: Tensor | float, beyond_pi: BeyondPi) -> Tensor:
    """d value / d cosine = m1·sin(m1·theta + m2)/sin(theta), with the sign of the stretch that the phase is on."""
    angle = _clamped(cosine.clamp(-1.0, 1.0).acos())
    phase = multiplier * angle + angular
    slope = multiplier * phase.sin() / angle.sin()
    if beyond_pi == "arcface":
        return torch.where(phase > math.pi, torch.ones_like(slope), slope)
    return (1 - 2 * torch.floor(phase / math.pi).clamp_min(0).remainder(2)) * slope


def _sin(angle: Tensor | float) -> Tensor | float:
    return angle.sin() if isinstance(angle, Tensor) else math.sin(angle)


class _MarginCosine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cosine: Tensor,
        multiplier: float,
        angular: Tensor | float,
        beyond_pi: BeyondPi,
        gradient: MarginGradient,
    ) -> Tensor:
        if gradient == "exact":
            ctx.save_for_backward(_slope(cosine, multiplier, angular, beyond_pi))
        return _value(cosine, multiplier, angular, beyond_pi)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad = grad_outputs[0]
        return (grad * ctx.saved_tensors[0] if ctx.saved_tensors else grad), None, None, None, None


def margin_cosine(
    cosine: Tensor,
    *,
    angular_margin: Tensor | float = 0.0,
    cosine_margin: Tensor | float = 0.0,
    angle_multiplier: float = 1.0,
    beyond_pi: BeyondPi = "monotone",
    margin_gradient: MarginGradient = "exact",
) -> Tensor:
    """The own-class cosine after its margin: cos(m1·θ + m2) − m3, per sample.

    Args:
        cosine: (N,) own-class cosines.
        angular_margin: m2 in radians, a number or (N,), already gathered per sample. Not differentiated.
        cosine_margin: m3, a number or (N,).
        angle_multiplier: m1.
        beyond_pi: what happens where m1·θ + m2 passes π and the cosine would rise again. ``"monotone"`` goes on falling
            with −2 − cos(·); ``"arcface"`` takes cos θ − m2·sin m2, as the original does.
        margin_gradient: ``"exact"``, or ``"straight_through"``, which takes d margin / d cos as 1 (InsightFace).

    Returns:
        (N,) cosines after the margin, in the dtype of ``cosine``.

    Sources: Deng et al., ArcFace, CVPR 2019, eq. 3 and 4 (combined margin); Liu et al., SphereFace, CVPR 2017, eq. 7
    (monotone).

    Example:
        >>> import torch
        >>> from ltloss.margins import margin_cosine
        >>> margin_cosine(torch.tensor([0.5]), cosine_margin=0.2)
        tensor([0.3000])
    """
    for name, given, known in (
        ("beyond_pi", beyond_pi, get_args(BeyondPi)),
        ("margin_gradient", margin_gradient, get_args(MarginGradient)),
    ):
        if given not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {given!r}")
    if angle_multiplier == 1.0 and isinstance(angular_margin, float | int) and angular_margin == 0:
        return cosine - cosine_margin  # no angle involved: exact, and no arccos to lose digits in
    with_angle: Tensor = _MarginCosine.apply(  # type: ignore[no-untyped-call]
        cosine, angle_multiplier, angular_margin, beyond_pi, margin_gradient
    )
    return with_angle - cosine_margin


def mean_angle(cosine: Tensor, weights: Tensor) -> Tensor:
    """Minus the mean angle of cosines (R,) with weights (R,) >= 0; 0 where no weight is positive.

    What both minimum-angle terms end with: least where the prototypes are far apart.

    Returns:
        A scalar in radians, in the dtype of `cosine`.

    Example:
        >>> import torch
        >>> from ltloss.margins import mean_angle
        >>> mean_angle(torch.zeros(2), torch.tensor([1.0, 3.0]))
        tensor(-1.5708)
    """
    total = weights.sum()
    return -(weights / torch.where(total == 0.0, 1.0, total) * arccos(cosine)).sum()
