"""The losses that the estimator chooses from, where they start, and what is left of them to predict with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltloss import functional as F
from ltloss.class_balance import log_prior_from_counts
from ltloss.losses.linear_softmax import LinearSoftmaxLoss
from ltloss.losses.margin_losses import CombinedMarginLoss, CosineSoftmaxLoss
from ltloss.reference import direction

__all__ = ["Candidate", "Classifier", "log_prior", "offset_of"]

_UNSEEN = -1e30  # logit of a class without samples: its probability is 0
_SURE = 32.0  # how sharp the start of a linear layer is
_GAIN = 16.0  # features of a linear layer are multiplied by it: how far one step of AdamW moves its logits


def log_prior(counts: Tensor) -> Tensor:
    """log π (C,) for training; a class without samples so far counts as the rarest one."""
    return log_prior_from_counts(counts.clamp(min=float(counts[counts > 0].min())))


def offset_of(counts: Tensor, uniform: bool) -> Tensor:
    """What prediction adds to the logits (C,): nothing, or log π; a class without samples gets no probability."""
    return torch.where(counts > 0, 0.0 if uniform else log_prior(counts), _UNSEEN)


class Classifier(NamedTuple):
    """Logits (z·prototype_c + intercept_c)/temperature of features z, which ``unit`` divides by their lengths first."""

    prototypes: Tensor  # (C, D)
    intercept: Tensor  # (C,)
    unit: bool
    temperature: float = 1.0

    def _features(self, z: Tensor) -> Tensor:
        return direction(z) if self.unit else z

    def logits(self, z: Tensor) -> Tensor:
        """Dense logits (n, C) of a block."""
        return torch.addmm(self.intercept, self._features(z), self.prototypes.T).div_(self.temperature)

    def best(self, z: Tensor, k: int = 1) -> Tensor:
        """The classes (n, k) of the k largest logits, best first, without n×C."""
        options: Any = {"normalize_prototypes": False, "bias": self.intercept}
        return F.top_k(self._features(z), self.prototypes, k, **options).index

    def expecting(self, offset: Tensor, temperature: float) -> Classifier:
        """With the logits divided by a temperature, and ``offset`` (C,) added then."""
        return self._replace(intercept=self.intercept + temperature * offset, temperature=temperature)

    def to(self, device: torch.device) -> Classifier:
        """The same on that device."""
        return self._replace(prototypes=self.prototypes.to(device), intercept=self.intercept.to(device))


class Candidate(NamedTuple):
    """A loss to try: softmax of a linear layer, or with a ``scale`` of s·cos; with a log prior in training."""

    scale: float | None

    @classmethod
    def named(cls, name: str) -> Candidate:
        """The inverse of :attr:`name`."""
        return cls(None if name == "linear" else float(name.removeprefix("cosine-")))

    @property
    def name(self) -> str:
        """ "linear", or "cosine-" and the scale."""
        return "linear" if self.scale is None else f"cosine-{str(float(self.scale)).removesuffix('.0')}"

    @property
    def gain(self) -> float:
        """What features are multiplied by in training."""
        return _GAIN if self.scale is None else 1.0

    def of_means(self, means: Tensor) -> Classifier:
        """The classifier by the nearest class mean: in distance (linear discriminant analysis), or in angle."""
        if self.scale is None:  # s of a cosine, for of the features D is many times too sure
            return Classifier(_SURE * means, -0.5 * _SURE * means.square().sum(1), False)
        return Classifier(self.scale * direction(means), means.new_zeros(len(means)), True)

    def head(self, shape: tuple[int, int], counts: Tensor, device: torch.device) -> CombinedMarginLoss:
        """The loss module for C classes of D features, without values yet."""
        head: CombinedMarginLoss
        options: dict[str, Any] = {"log_prior": log_prior(counts), "reduction": "none", "device": "meta"}
        with torch.random.fork_rng(devices=[]):  # the bias is drawn also where the weight has no memory
            if self.scale is None:
                head = LinearSoftmaxLoss(*shape, **options)
            else:
                head = CosineSoftmaxLoss(*shape, scale=self.scale, **options)
        return head.to_empty(device=device)

    @torch.no_grad()
    def place(self, head: CombinedMarginLoss, start: Classifier, which: Tensor, generator: torch.Generator) -> None:
        """Put the prototypes of the classes ``which`` (C,) at ``start``; one of length 0 gets a drawn direction."""
        if isinstance(head, LinearSoftmaxLoss) and head.bias is not None:
            head.weight[which] = start.prototypes[which].to(head.weight) / self.gain
            head.bias[which] = start.intercept[which].to(head.bias)
            return
        rows = direction(start.prototypes[which])
        lost = (rows == 0).all(1)
        rows[lost] = direction(torch.randn(int(lost.sum()), rows.shape[1], generator=generator)).to(rows)
        head.weight[which] = rows.to(head.weight)

    def classifier(self, head: CombinedMarginLoss) -> Classifier:
        """What the head has learned, in memory of its own; the prior stays behind."""
        weight = head.weight.detach()
        if isinstance(head, LinearSoftmaxLoss) and head.bias is not None:
            return Classifier(self.gain * weight, head.bias.detach().clone(), False)
        return Classifier(head.scale * direction(weight), weight.new_zeros(len(weight)), True)
