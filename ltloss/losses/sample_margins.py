"""Losses with a margin per sample: a function of the feature's length, or random."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ltloss._validation import check_choice, check_number, check_per_class, check_supervised, check_type
from ltloss.extend import Bend, LogSumExpStats, logsumexp_stats, margin_losses, reduce_losses
from ltloss.losses.margin_losses import CombinedMarginLoss, PriorOptions
from ltloss.losses.prototype_head import FRACTION, NOT_NEGATIVE, POSITIVE, Checks
from ltloss.margins import Margin
from ltloss.numerics import compute_dtype
from ltloss.ops.logsumexp import Shard

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdaFaceLoss", "ElasticFaceLoss", "MagFaceLoss"]


class SampleMarginLoss(CombinedMarginLoss):
    """Cross-entropy with a margin per sample. A subclass defines the margin, and a term to add to each loss."""

    _shown: tuple[str, ...] = ()  # hyper-parameters of the subclass
    _bend: Callable[[Tensor, Tensor], Bend] | None = None  # how the cosines of other classes change

    def forward(  # type: ignore[override]  # no label_weight: the margin of a sample is defined for one label
        self, features: Tensor, labels: Tensor, *, shard: Shard | None = None
    ) -> Tensor:
        """Compute the loss of features (N, D) with labels (N,): a scalar, or (N,) for ``reduction="none"``."""
        check_supervised(features, self.weight, labels)
        stats = logsumexp_stats(
            features,
            self.weight,
            labels,
            scale=self.scale,
            log_prior=self.log_prior,
            normalize_features=self.normalize_features,
            ignore_index=self.ignore_index,
            with_logit_sum=self.label_smoothing > 0.0,
            bend=self._bend,
            shard=shard,
            update=self.fused_update,
        )
        of_samples, penalty = self._of_samples(features, stats)
        margins = {name: getattr(self, name) for name in Margin._fields} | of_samples
        losses = margin_losses(stats, **margins, label_smoothing=self.label_smoothing) + penalty
        return reduce_losses(losses, stats.labels, class_weight=self.class_weight, reduction=self.reduction)

    def _lengths(self, features: Tensor, stats: LogSumExpStats) -> Tensor:
        """‖x‖ (N,); 0 for ignored samples and for NaN, whose loss is NaN by the cosine."""
        features = features.masked_fill((stats.labels < 0)[:, None], 0.0)
        lengths: Tensor = torch.linalg.vector_norm(features, dim=1, dtype=compute_dtype(features, self.weight))
        return lengths.nan_to_num(0.0)

    def _of_samples(self, features: Tensor, stats: LogSumExpStats) -> tuple[dict[str, Any], Tensor | float]:
        """Return options of :func:`ltloss.extend.margin_losses`, and a term to add to the losses (N,)."""
        return {}, 0.0

    def hyper_parameters(self) -> dict[str, Any]:
        """Return every hyper-parameter by name."""
        return super().hyper_parameters() | {name: getattr(self, name) for name in self._shown}


class AdaFaceLoss(SampleMarginLoss):
    """Margins that adapt to image quality: hard samples weigh less where the feature is short.

    The length of a feature stands for the quality of its image. With the running mean μ and standard deviation σ of the
    lengths, ẑ = clip(h·(‖x‖ − μ)/σ, −1, 1), and the target logit is s·(cos(θ_y − m·ẑ) − m·ẑ − m). No gradient flows
    through the length.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: m in [0, 1], in radians within the cosine and in units of the cosine outside it.
        concentration: h. ẑ is clipped for lengths more than σ/h away from μ.
        momentum: momentum of μ and σ, in [0, 1]. They start at 20 and 100 and are updated in ``train()`` mode.
        options: see :class:`CombinedMarginLoss`; the default of ``beyond_pi`` is "clip". The scale of the paper is 64.

    Attributes:
        length_moments: buffer (2,): μ and σ.

    Raises:
        ValueError, TypeError: an option of another type or out of range.

    See also: :class:`MagFaceLoss`, whose gradient flows through the length.

    Source: Kim et al., AdaFace, CVPR 2022, eq. 6 to 8.

    Example:
        >>> import torch
        >>> from ltloss import AdaFaceLoss
        >>> loss_fn = AdaFaceLoss(100, 16)
        >>> loss_fn(torch.randn(4, 16), torch.tensor([0, 7, 99, 3])).shape
        torch.Size([])
    """

    length_moments: Tensor
    _shown = ("margin", "concentration", "momentum")
    _checks: ClassVar[Checks] = {"margin": FRACTION, "concentration": POSITIVE, "momentum": FRACTION}

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        margin: float = 0.4,
        concentration: float = 0.333,
        momentum: float = 0.99,
        **options: Unpack[PriorOptions],
    ) -> None:
        options.setdefault("beyond_pi", "clip")
        super().__init__(num_classes, embedding_size, **options)
        self.margin, self.concentration, self.momentum = margin, concentration, momentum
        self.register_buffer("length_moments", torch.tensor(_FIRST_MOMENTS, device=self._constants_device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new prototypes and reset the running mean and standard deviation."""
        super().reset_parameters()
        if "length_moments" in self._buffers:  # not yet in the first call, by the constructor of the base class
            self.length_moments.copy_(torch.tensor(_FIRST_MOMENTS))

    @torch.no_grad()
    def _of_samples(self, features: Tensor, stats: LogSumExpStats) -> tuple[dict[str, Any], Tensor | float]:
        lengths = self._lengths(features, stats).clamp(1e-3, 100.0)
        if self.training:  # what is not finite would stay, though its step is skipped
            self._follow(lengths, (stats.labels >= 0) & stats.target_logit.isfinite())
        mean, deviation = self.length_moments.to(lengths.dtype)
        quality = (self.concentration * (lengths - mean) / (deviation + 1e-3)).clamp(-1.0, 1.0)
        angle, cosine = -self.margin * quality, self.margin * (1.0 + quality)
        return {"sample_angular_margin": angle, "sample_cosine_margin": cosine}, 0.0

    def _follow(self, lengths: Tensor, counted: Tensor) -> None:
        """Update the running mean and standard deviation with the samples that count, if they are at least two."""
        count, lengths = counted.sum(), lengths.double()
        mean = (lengths * counted).sum() / count
        deviation = (((lengths - mean) ** 2 * counted).sum() / (count - 1)).sqrt()
        here = torch.stack([mean, deviation]).to(self.length_moments.dtype)
        moved = self.length_moments.lerp(here, 1.0 - self.momentum)
        self.length_moments.copy_(torch.where(count > 1, moved, self.length_moments))


_FIRST_MOMENTS = (20.0, 100.0)


class MagFaceLoss(SampleMarginLoss):
    """Margins that grow with the length of the feature, and a penalty on short features.

    With a = clip(‖x‖, l_a, u_a) and m(a) = l_m + (u_m − l_m)·(a − l_a)/(u_a − l_a), the target logit is
    s·cos(θ_y + m(a)) where cos θ_y > 0, and s·cos θ_y elsewhere. λ·(1/a + a/u_a²) is added to the loss of each sample.
    The gradient flows through the length.

    Args:
        num_classes: C.
        embedding_size: D.
        min_length, max_length: l_a and u_a, in units of the feature's length.
        min_margin, max_margin: l_m and u_m, in radians.
        penalty_weight: λ.
        options: see :class:`CombinedMarginLoss`; the default of ``beyond_pi`` is "easy". The scale of the paper is 64.

    Raises:
        ValueError, TypeError: an option of another type or out of range.

    See also: :class:`AdaFaceLoss`, whose margin is a constant for the gradient.

    Source: Meng et al., MagFace, CVPR 2021, eq. 2 and 3.

    Example:
        >>> import torch
        >>> from ltloss import MagFaceLoss
        >>> loss_fn = MagFaceLoss(100, 16)
        >>> loss_fn(12 * torch.randn(4, 16), torch.tensor([0, 7, 99, 3])).shape
        torch.Size([])
    """

    _shown = ("min_length", "max_length", "min_margin", "max_margin", "penalty_weight")
    _checks: ClassVar[Checks] = {
        **dict.fromkeys(("min_length", "max_length"), POSITIVE),
        **dict.fromkeys(("min_margin", "max_margin"), partial(check_number, at_least=0.0, at_most=3.1)),
        "penalty_weight": NOT_NEGATIVE,
    }

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        min_length: float = 10.0,
        max_length: float = 110.0,
        min_margin: float = 0.45,
        max_margin: float = 0.8,
        penalty_weight: float = 35.0,
        **options: Unpack[PriorOptions],
    ) -> None:
        options.setdefault("beyond_pi", "easy")
        super().__init__(num_classes, embedding_size, **options)
        self.min_length, self.max_length = min_length, max_length
        self.min_margin, self.max_margin, self.penalty_weight = min_margin, max_margin, penalty_weight

    def _check(self, name: str, value: Any) -> None:
        super()._check(name, value)
        ends = {**self.__dict__, name: value}
        if "max_margin" in ends and not (
            ends["min_length"] < ends["max_length"] and ends["min_margin"] <= ends["max_margin"]
        ):
            given = ", ".join(f"{end}={ends[end]}" for end in self._shown[:4])
            raise ValueError(f"min_length must be < max_length, and min_margin <= max_margin; got {given}")

    def _of_samples(self, features: Tensor, stats: LogSumExpStats) -> tuple[dict[str, Any], Tensor | float]:
        lengths = self._lengths(features, stats).clamp(self.min_length, self.max_length)
        rise = (self.max_margin - self.min_margin) / (self.max_length - self.min_length)
        margins = self.min_margin + rise * (lengths - self.min_length)
        penalty = self.penalty_weight * (lengths.reciprocal() + lengths / self.max_length**2)
        return {"sample_angular_margin": margins}, penalty


class ElasticFaceLoss(SampleMarginLoss):
    """ArcFace or CosFace with a random margin for each sample and step, m ~ N(mean, std²).

    In ``eval()`` mode every margin is the mean.

    Args:
        num_classes: C.
        embedding_size: D.
        kind: ``"arc"``, target logit s·cos(θ + m), or ``"cos"``, target logit s·(cos θ − m).
        mean, std: mean and standard deviation of the margins, in radians for "arc". A ``mean`` of None is 0.5 for
            "arc" and 0.35 for "cos".
        sort: give the largest margins of a batch to the samples farthest from their prototype (ElasticFace+).
        seed: seed of the margins. Together with the step it determines them on every rank, and in a resumed run.
        options: see :class:`CombinedMarginLoss`. The scale of the paper is 64.

    Attributes:
        step: the number of batches seen in ``train()`` mode, a 0-d buffer.

    Raises:
        ValueError, TypeError: an option of another type or out of range.

    See also: :class:`ltloss.ArcFaceLoss` and :class:`ltloss.CosFaceLoss`, with a fixed margin.

    Source: Boutros et al., ElasticFace, CVPR Workshops 2022, eq. 4 to 6.

    Example:
        >>> import torch
        >>> from ltloss import ElasticFaceLoss
        >>> loss_fn = ElasticFaceLoss(100, 16, kind="cos")
        >>> loss_fn(torch.randn(4, 16), torch.tensor([0, 7, 99, 3])).shape
        torch.Size([])
    """

    step: Tensor
    _shown = ("kind", "mean", "std", "sort", "seed")
    _checks: ClassVar[Checks] = {
        "kind": partial(check_choice, known=("arc", "cos")),
        "mean": check_number,
        "std": NOT_NEGATIVE,
        "sort": partial(check_type, expected=bool),
        "seed": partial(check_type, expected=int),
    }

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        kind: Literal["arc", "cos"] = "arc",
        mean: float | None = None,
        std: float = 0.0125,
        sort: bool = False,
        seed: int = 0,
        **options: Unpack[PriorOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.kind, self.sort, self.seed, self.std = kind, sort, seed, std
        self.mean = (0.5 if kind == "arc" else 0.35) if mean is None else mean
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=self._constants_device))

    def _check(self, name: str, value: Any) -> None:
        super()._check(name, value)
        if name == "mean":
            kind = "angular_margin" if self.kind == "arc" else "cosine_margin"
            check_per_class(name, value, self.num_classes, torch.empty(0, device="cpu"), kind=kind)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new prototypes and reset the step."""
        super().reset_parameters()
        if "step" in self._buffers:
            self.step.zero_()

    @torch.no_grad()
    def _of_samples(self, features: Tensor, stats: LogSumExpStats) -> tuple[dict[str, Any], Tensor | float]:
        margins = torch.full_like(stats.logsumexp, self.mean)
        if self.training:
            margins += self.std * self._drawn(stats).to(margins)
            self.step += 1
        return {"sample_angular_margin" if self.kind == "arc" else "sample_cosine_margin": margins}, 0.0

    def _drawn(self, stats: LogSumExpStats) -> Tensor:
        """Draw from N(0, 1) for each sample (N,). Ignored samples in between do not change what the others draw."""
        counted = stats.labels >= 0
        number = torch.arange(len(counted), device=counted.device)
        # The seed in the upper bits, and what they cannot hold in all bits; 64 of them, as int64 counts.
        start = (self.seed << 40) + ((self.seed + (1 << 23)) >> 24) * _ODD
        start = (start + (1 << 63)) % (1 << 64) - (1 << 63)
        uniform = _uniform(number + start + (self.step << 20))
        drawn: Tensor = torch.erfinv(2.0 * uniform - 1.0) * 2.0**0.5
        place = counted.cumsum(0) - 1
        if self.sort:  # rank the counted samples by distance: the nearest gets the smallest
            drawn = drawn.masked_fill(number > place[-1:], torch.inf).sort()[0]
            distance = -stats.target_logit.nan_to_num(0.0).masked_fill(~counted, -torch.inf)
            place = distance.argsort(stable=True).argsort()
        return drawn[place.clamp_min(0)].masked_fill(~counted, 0.0)


_ODD = -7046029254386353131  # 2^64 divided by the golden ratio


def _uniform(counter: Tensor) -> Tensor:
    """Pseudo-random numbers in (0, 1) from int64 counters: splitmix64 (Steele et al., OOPSLA 2014), applied twice.

    It is plain arithmetic: equal on every device and rank, and it works under torch.compile and in CUDA graphs.
    """
    bits = counter
    for _ in range(2):
        bits = bits * _ODD + 1442695040888963407
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
            bits = (bits ^ (bits >> shift & (1 << (64 - shift)) - 1)) * factor
        bits = bits ^ (bits >> 31 & (1 << 33) - 1)
    return ((bits >> 12 & (1 << 52) - 1).double() + 0.5) * 2.0**-52
