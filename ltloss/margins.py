"""The margin on the target cosine: its value and its derivative, for vectors (N,).

A margin acts on one number per sample. This module is therefore all that distinguishes ArcFace from CosFace. The pass
over all classes, which is the same for every loss, is in :mod:`ltloss.ops`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ltloss._transforms import apply_of, transforming
from ltloss._types import Reduction
from ltloss._validation import (
    check_choice,
    check_dense,
    check_no_margin,
    check_number,
    check_offset,
    check_per_class,
    check_scale,
    check_type,
)

__all__ = [
    "ANGLE_FLOOR",
    "OBJECTIVE",
    "OPTION_NAMES",
    "BeyondPi",
    "Margin",
    "MarginGradient",
    "Objective",
    "arccos",
    "margin_cosine",
]

BeyondPi = Literal["monotone", "arcface", "cosine", "clip", "easy"]
MarginGradient = Literal["exact", "straight_through"]

# d arccos(c)/dc = -1/sin(theta) is unbounded near theta = 0 and pi, where a float32 cosine cannot resolve angles below
# 3.5e-4 anyway. Slopes are evaluated at the angle clamped to [ANGLE_FLOOR, pi - ANGLE_FLOOR], which bounds them by
# 2048. Nothing is lost: the gradient of a vector is the slope times sin(theta).
ANGLE_FLOOR = 2.0**-11


class Margin(NamedTuple):
    """The margin cos(m1·θ + m2) − m3 on the target cosine.

    Attributes:
        angular_margin: m2 in radians, a number or a vector.
        cosine_margin: m3, a number or a vector.
        angle_multiplier: m1.
        beyond_pi: what happens where the phase m1·θ + m2 exceeds π and its cosine would rise again. ``"monotone"``
            keeps falling, −2 − cos(m1·θ + m2); ``"arcface"`` takes cos θ − m2·sin m2, as the paper does; ``"cosine"``
            lets it rise (InsightFace's code); ``"clip"`` clamps the phase to [0, π] (AdaFace); ``"easy"`` applies the
            angular margin only where cos θ > 0 (MagFace).
        margin_gradient: ``"exact"``, or ``"straight_through"``, which takes d margin / d cos as 1 (InsightFace).

    Vectors hold one value per class, (C,), or after :meth:`of_samples` one per sample, (N,).

    Raises:
        ValueError, TypeError: from :meth:`checked`: an option of another type, shape or range.

    See also: :func:`margin_cosine`, which applies a margin with gradients; :func:`ltloss.extend.margin_losses`.

    Source: Deng et al., ArcFace, CVPR 2019, eq. 4.

    Example:
        >>> import torch
        >>> from ltloss.margins import Margin
        >>> Margin(cosine_margin=0.2).value(torch.tensor([0.5]))
        tensor([0.3000])
    """

    angular_margin: Tensor | float = 0.0
    cosine_margin: Tensor | float = 0.0
    angle_multiplier: float = 1.0
    beyond_pi: BeyondPi = "monotone"
    margin_gradient: MarginGradient = "exact"

    def checked(self, num_classes: int, like: Tensor) -> Margin:
        """Return the margin with vectors in the dtype of ``like``; raise an error that names an invalid option."""
        check_choice("beyond_pi", self.beyond_pi, get_args(BeyondPi))
        check_choice("margin_gradient", self.margin_gradient, get_args(MarginGradient))
        return self._replace(
            angular_margin=check_per_class("angular_margin", self.angular_margin, num_classes, like),
            cosine_margin=check_per_class("cosine_margin", self.cosine_margin, num_classes, like),
            angle_multiplier=check_number("angle_multiplier", self.angle_multiplier, above=0.0),
        )

    def in_words(self) -> str:
        """The first option that differs from no margin, with its value, for messages; empty if none does."""
        none = Margin()
        for name, given, nothing in zip(self._fields[:3], self, none, strict=False):
            if isinstance(given, Tensor) and given.dim():
                return f"{name} of {given.numel()} classes"
            if given != nothing:
                return f"{name}={float(given):g}"
        return ""

    @property
    def turns(self) -> bool:
        """Whether the margin acts on the angle. If not, the cosine is used as it is: arccos would cost digits."""
        return self.angle_multiplier != 1.0 or isinstance(self.angular_margin, Tensor) or self.angular_margin != 0.0

    def of_samples(self, classes: Tensor) -> Margin:
        """Return the margin of each sample (N,), given the class of each; anything for what is no class."""
        angle, cosine = (
            value[classes.clamp(0, len(value) - 1)] if isinstance(value, Tensor) and value.dim() else value
            for value in self[:2]
        )
        return self._replace(angular_margin=angle, cosine_margin=cosine)

    def to(self, dtype: torch.dtype) -> Margin:
        """Return the margin with its vectors in another dtype."""
        angle, cosine = (value.to(dtype) if isinstance(value, Tensor) else value for value in self[:2])
        return self._replace(angular_margin=angle, cosine_margin=cosine)

    def value(self, cosine: Tensor) -> Tensor:
        """cos(m1·θ + m2) − m3 of target cosines (N,), with ``beyond_pi`` applied."""
        return (self._turned(cosine) if self.turns else cosine) - self.cosine_margin

    def _turned(self, cosine: Tensor) -> Tensor:
        phase = self.angle_multiplier * cosine.clamp(-1.0, 1.0).acos() + self.angular_margin
        if self.beyond_pi == "arcface":
            return torch.where(phase > math.pi, cosine - self.angular_margin * _sin(self.angular_margin), phase.cos())
        if self.beyond_pi == "easy":
            return torch.where(cosine > 0.0, phase.cos(), cosine)
        if self.beyond_pi == "clip":
            return phase.clamp(0.0, math.pi).cos()
        if self.beyond_pi == "cosine":
            return phase.cos()
        # For a phase in [k·pi, (k+1)·pi): (-1)^k cos(phase) - 2k, continuous and falling. k = 1 is -2 - cos(theta + m);
        # k > 1 only occurs with an angle multiplier (SphereFace).
        stretch = torch.floor(phase / math.pi).clamp_min(0)
        return (1 - 2 * stretch.remainder(2)) * phase.cos() - 2 * stretch

    def slope(self, cosine: Tensor) -> Tensor:
        """d value / d cosine = m1·sin(m1·θ + m2)/sin(θ), with ``beyond_pi`` applied."""
        if not self.turns or self.margin_gradient == "straight_through":
            return torch.ones_like(cosine)
        # ANGLE_FLOOR as a literal: torch.compile(dynamic=True) would make the global an input of the graph.
        angle = arccos(cosine).clamp(2.0**-11, math.pi - 2.0**-11)
        phase = self.angle_multiplier * angle + self.angular_margin
        slope = self.angle_multiplier * phase.sin() / angle.sin()
        return self._continued(slope, phase, cosine, beyond=1.0, plain=1.0)

    def slope_by_angle(self, cosine: Tensor) -> Tensor:
        """d value / d m2 = −sin(m1·θ + m2), with ``beyond_pi`` applied."""
        phase = self.angle_multiplier * arccos(cosine) + self.angular_margin
        margin = torch.as_tensor(self.angular_margin)
        beyond = -margin.sin() - margin * margin.cos()
        return self._continued(-phase.sin(), phase, cosine, beyond=beyond, plain=0.0)

    def _continued(
        self, slope: Tensor, phase: Tensor, cosine: Tensor, *, beyond: Tensor | float, plain: float
    ) -> Tensor:
        """Turn the slope of cos(phase) into the slope of :meth:`_turned`.

        ``beyond``: the slope of cos θ − m2·sin m2; ``plain``: the slope of the cosine without an angular margin.
        """
        if self.beyond_pi == "arcface":
            return torch.where(phase > math.pi, beyond, slope)
        if self.beyond_pi == "easy":
            return torch.where(cosine > 0.0, slope, plain)
        if self.beyond_pi == "clip":
            return slope.masked_fill((phase < 0.0) | (phase > math.pi), 0.0)
        if self.beyond_pi == "cosine":
            return slope
        return (1 - 2 * torch.floor(phase / math.pi).clamp_min(0).remainder(2)) * slope


class Objective(NamedTuple):
    """All options of a loss in one object: everything but features, prototypes and labels.

    Attributes:
        margin: the margin on the target cosine.
        log_prior: (C,) added to the logits, or None. It gets a gradient if it requires one.
        class_weight: (C,) factor on the loss of each class, or None.
        scale, normalize_features, label_smoothing, reduction, normalize_prototypes, bias: see
            :func:`ltloss.functional.margin_cross_entropy`.
        ignore_index: the label of samples that do not count. None: a label outside [0, C) means that the target is
            not among these prototypes.

    See also: :func:`ltloss.functional.margin_cross_entropy`, which takes the same options by name.
    """

    margin: Margin = Margin()
    log_prior: Tensor | None = None
    class_weight: Tensor | None = None
    scale: float = 30.0
    normalize_features: bool = True
    label_smoothing: float = 0.0
    ignore_index: int | None = -100
    reduction: Reduction = "mean"
    normalize_prototypes: bool = True
    bias: Tensor | None = None

    def checked(self, num_classes: int, like: Tensor) -> Objective:
        """Return the options with vectors (C,) in the dtype of ``like``; raise an error that names an invalid option.

        The result has no ``bias``: it is added to the ``log_prior``.
        """
        ignore_index = check_type("ignore_index", self.ignore_index, int)
        check_type("normalize_features", self.normalize_features, bool)
        check_choice("reduction", self.reduction, get_args(Reduction))
        margin = self.margin.checked(num_classes, like)
        if not self.normalize_prototypes:
            check_no_margin(margin.in_words())
        angle, cosine = (v.expand(num_classes) if isinstance(v, Tensor) else v for v in margin[:2])
        weight = self.class_weight
        if weight is not None:
            checked = check_per_class("class_weight", weight, num_classes, like)
            weight = torch.as_tensor(checked, dtype=like.dtype, device=like.device).expand(num_classes)
        return self._replace(
            margin=margin._replace(angular_margin=angle, cosine_margin=cosine),
            log_prior=check_offset(self.log_prior, self.bias, num_classes, like, cancels=True),
            bias=None,
            class_weight=weight,
            scale=check_scale(self.scale),
            ignore_index=ignore_index,
            label_smoothing=float(check_number("label_smoothing", self.label_smoothing, at_least=0.0, at_most=1.0)),
        )

    @property
    def normalize(self) -> tuple[bool, bool]:
        """``normalize_features`` and ``normalize_prototypes``."""
        return self.normalize_features, self.normalize_prototypes

    @property
    def with_norm(self) -> bool:
        """Whether ‖x‖ multiplies the cosine. A product x·w contains it already."""
        return self.normalize_prototypes and not self.normalize_features

    def flat(self) -> tuple[list[Tensor | None], list[float], list[bool], int | None, list[str]]:
        """The options as lists of plain types, as the operator schema ``OBJECTIVE`` takes them."""
        given = (*self.margin[:2], self.log_prior, self.class_weight)
        vectors = [value if isinstance(value, Tensor) else None for value in given]
        margins = [0.0 if isinstance(value, Tensor) else float(value) for value in self.margin[:3]]
        words: list[str] = [self.margin.beyond_pi, self.margin.margin_gradient, self.reduction]
        return vectors, [*margins, self.scale, self.label_smoothing], [*self.normalize], self.ignore_index, words

    @classmethod
    def named(cls, **options: Any) -> Objective:
        """Build from all options by name, including those of the margin."""
        margin = Margin(**{name: options.pop(name) for name in Margin._fields if name in options})
        return cls(margin, **options)

    @classmethod
    def of(
        cls,
        vectors: list[Tensor | None],
        numbers: list[float],
        normalize: list[bool],
        ignore_index: int | None,
        words: list[Any],
    ) -> Objective:
        """The inverse of :meth:`flat`."""
        angle, cosine = (n if v is None else v for v, n in zip(vectors[:2], numbers, strict=False))
        margin = Margin(angle, cosine, numbers[2], *words[:2])
        prior, weight = vectors[2:]
        return cls(margin, prior, weight, numbers[3], normalize[0], numbers[4], ignore_index, words[2], normalize[1])


# The options that every loss module has.
OPTION_NAMES = (
    *Margin._fields,
    *(name for name in Objective._fields if name not in ("margin", "normalize_prototypes", "bias")),
)
OBJECTIVE = "Tensor?[] vectors, float[] numbers, bool[] normalize, int? ignore_index, str[] words"


def _sin(angle: Tensor | float) -> Tensor | float:
    return angle.sin() if isinstance(angle, Tensor) else math.sin(angle)


class _Arccos(torch.autograd.Function):
    """theta = arccos(c), dtheta/dc = -1/sin(theta), with the slope bounded (see ``ANGLE_FLOOR``)."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine)
        return cosine.clamp(-1.0, 1.0).acos()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (cosine,) = ctx.saved_tensors
        # Made of differentiable operations, so that it can be differentiated again.
        return grad_outputs[0] * (-1.0 / arccos(cosine).sin().clamp_min(math.sin(ANGLE_FLOOR)))


def _arccos_of_operations(cosine: Tensor) -> Tensor:
    """:func:`arccos` built from PyTorch's own operations, which the transforms of ``torch.func`` can differentiate."""
    value = cosine.detach().clamp(-1.0, 1.0).acos()
    least = math.sin(ANGLE_FLOOR)
    steep = value.sin() < least
    inside = torch.where(steep, 0.0, cosine).acos()
    return torch.where(steep, value - (cosine - cosine.detach()) / least, inside)


def arccos(cosine: Tensor) -> Tensor:
    """Angle in radians of a cosine: exact value, and a gradient that stays finite at ±1.

    Args:
        cosine: any shape. Values outside [-1, 1] are taken as ±1; NaN stays NaN.

    Returns:
        Angles in [0, π], same shape and dtype. The slope is bounded by 2048 (see ``ANGLE_FLOOR``). Differentiable any
        number of times.

    See also: ``torch.acos``, whose gradient at ±1 is infinite.

    Example:
        >>> import torch
        >>> from ltloss.margins import arccos
        >>> arccos(torch.tensor([1.0, 0.0]))
        tensor([0.0000, 1.5708])
    """
    if not (torch.is_grad_enabled() and cosine.requires_grad):
        return cosine.clamp(-1.0, 1.0).acos()
    if transforming():
        return _arccos_of_operations(cosine)
    return _Arccos.apply(cosine)  # type: ignore[no-any-return, no-untyped-call]


class _MarginCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cosine: Tensor, angular: Any, subtracted: Any, margin: Margin) -> Tensor:
        ctx.save_for_backward(cosine, *(one if isinstance(one, Tensor) else None for one in (angular, subtracted)))
        ctx.margin = margin
        return margin.value(cosine)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cosine, angular, subtracted = ctx.saved_tensors
        margin = ctx.margin if angular is None else ctx.margin._replace(angular_margin=angular)  # with its own graph
        (grad,), needs = grad_outputs, ctx.needs_input_grad
        return (
            grad * margin.slope(cosine) if needs[0] else None,
            (grad * margin.slope_by_angle(cosine)).sum_to_size(angular.shape) if needs[1] else None,
            -grad.sum_to_size(subtracted.shape) if needs[2] else None,
            None,
        )


def margin_cosine(cosine: Tensor, **margin: Any) -> Tensor:
    """The target cosine after its margin, cos(m1·θ + m2) − m3, per sample.

    Args:
        cosine: (N,) target cosines.
        margin: the fields of :class:`Margin` as keywords. Vectors are (N,), one value per sample.

    Returns:
        (N,) cosines after the margin, in the dtype of ``cosine``. Differentiable any number of times, with respect to
        margins (N,) too.

    Raises:
        ValueError, TypeError: a margin of another type, shape or range.

    See also: :func:`ltloss.extend.margin_losses`, the losses of these cosines.

    Sources: Deng et al., ArcFace, CVPR 2019, eq. 3 and 4 (combined margin); Liu et al., SphereFace, CVPR 2017, eq. 7
    (monotone).

    Example:
        >>> import torch
        >>> from ltloss.margins import margin_cosine
        >>> margin_cosine(torch.tensor([0.5]), cosine_margin=0.2)
        tensor([0.3000])
    """
    if not isinstance(cosine, Tensor):
        raise TypeError(f"cosine must be a torch.Tensor (N,); got {type(cosine).__name__}")
    check_dense("cosine", cosine, integers=False)
    if cosine.dim() != 1:
        raise ValueError(f"cosine must have the shape (N,); got {tuple(cosine.shape)}")
    given = Margin(**margin)
    angular, subtracted = (one.detach() if isinstance(one, Tensor) else one for one in given[:2])
    checked = given._replace(angular_margin=angular, cosine_margin=subtracted).checked(cosine.shape[0], cosine)
    with_gradient = (
        one.to(cosine.dtype) if isinstance(one, Tensor) else number
        for one, number in zip(given[:2], checked[:2], strict=True)
    )
    return apply_of(_MarginCosine)(cosine, *with_gradient, checked)  # type: ignore[no-any-return]
