"""The losses that the estimator chooses from, their initial prototypes, and the classifier that they leave."""

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

_UNSEEN = -1e30  # offset of a class without samples: its probability is 0
_SURE = 32.0  # scale of a linear layer's initial logits
_GAIN = 16.0  # factor on the features of a linear layer; it sets how far one step of AdamW moves the logits


def log_prior(counts: Tensor) -> Tensor:
    """log π (C,) for training; a class without samples counts as the rarest class with some."""
    return log_prior_from_counts(counts.clamp(min=float(counts[counts > 0].min())))


def offset_of(counts: Tensor, uniform: bool) -> Tensor:
    """The offset (C,) that prediction adds to the logits: 0 if ``uniform``, else log π.

    A class without samples gets an offset that makes its probability 0.
    """
    return torch.where(counts > 0, 0.0 if uniform else log_prior(counts), _UNSEEN)


class Classifier(NamedTuple):
    """A linear classifier: logits (z·prototype_c + intercept_c)/temperature; with ``unit`` z is normalised first."""

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
        """The classes (n, k) of the k largest logits, best first, without storing n×C logits."""
        options: Any = {"normalize_prototypes": False, "bias": self.intercept}
        return F.top_k(self._features(z), self.prototypes, k, **options).index

    def expecting(self, offset: Tensor, temperature: float) -> Classifier:
        """The classifier whose logits are divided by ``temperature``, after which ``offset`` (C,) is added."""
        return self._replace(intercept=self.intercept + temperature * offset, temperature=temperature)

    def to(self, device: torch.device) -> Classifier:
        """The same on that device."""
        return self._replace(prototypes=self.prototypes.to(device), intercept=self.intercept.to(device))


class Candidate(NamedTuple):
    """A loss to try, with the log prior: softmax of a linear layer if ``scale`` is None, else of s·cos."""

    scale: float | None

    @classmethod
    def named(cls, name: str) -> Candidate:
        """The candidate with that :attr:`name`."""
        return cls(None if name == "linear" else float(name.removeprefix("cosine-")))

    @property
    def name(self) -> str:
        """The name: "linear", or for instance "cosine-16"."""
        return "linear" if self.scale is None else f"cosine-{str(float(self.scale)).removesuffix('.0')}"

    @property
    def gain(self) -> float:
        """Factor on the features in training."""
        return _GAIN if self.scale is None else 1.0

    def of_means(self, means: Tensor) -> Classifier:
        """The nearest-mean classifier of means (C, D): by distance for the linear layer, by angle for a cosine.

        By distance it is linear discriminant analysis.
        """
        if self.scale is None:  # the exact factor would be D, which makes the probabilities far too sharp
            return Classifier(_SURE * means, -0.5 * _SURE * means.square().sum(1), False)
        return Classifier(self.scale * direction(means), means.new_zeros(len(means)), True)

    def head(self, shape: tuple[int, int], counts: Tensor, device: torch.device) -> CombinedMarginLoss:
        """The loss module for ``shape`` = (C, D), with uninitialised prototypes."""
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
        """Set the prototypes of the classes in the mask ``which`` (C,) to those of ``start``.

        For a cosine, a prototype of length 0 gets a random direction instead.
        """
        if isinstance(head, LinearSoftmaxLoss) and head.bias is not None:
            head.weight[which] = start.prototypes[which].to(head.weight) / self.gain
            head.bias[which] = start.intercept[which].to(head.bias)
            return
        rows = direction(start.prototypes[which])
        lost = (rows == 0).all(1)
        rows[lost] = direction(torch.randn(int(lost.sum()), rows.shape[1], generator=generator)).to(rows)
        head.weight[which] = rows.to(head.weight)

    def classifier(self, head: CombinedMarginLoss) -> Classifier:
        """The classifier that the head has learned, as a copy, without the log prior."""
        weight = head.weight.detach()
        if isinstance(head, LinearSoftmaxLoss) and head.bias is not None:
            return Classifier(self.gain * weight, head.bias.detach().clone(), False)
        return Classifier(head.scale * direction(weight), weight.new_zeros(len(weight)), True)
