"""The base of the losses of pytorch-metric-learning: their options, distances, miners and reducers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ltloss import functional as F
from ltloss._validation import check_count
from ltloss.reference import cosine_logits, cosines, direction

__all__ = ["ClassificationLoss", "SharedOptions", "found_cosines", "miner_weights", "unknown_distance"]

_OF_ALL = {"MultipleReducers", "DoNothingReducer"}  # reducers that take all parts of the loss in one call


def found_cosines(distance: Any, width: int) -> tuple[bool, bool]:
    """Whether a distance to unit prototypes is the cosine, and whether it is the cosine times the embedding's length.

    The distance is tried on a few rows of ``width`` columns, so distances of any origin are recognised.
    """
    rows = torch.arange(1.0, 5.0 * width + 1.0, dtype=torch.float64, device="cpu").sin().view(5, width)
    queries, prototypes = rows[:2], direction(rows[2:])
    expected = cosines(queries, prototypes)
    found = distance(queries, prototypes) if getattr(distance, "p", 2) == 2 else expected.new_full((), math.nan)
    lengths = torch.linalg.vector_norm(queries, dim=1, keepdim=True)
    same, scaled = (found.shape == e.shape and torch.allclose(found, e) for e in (expected, expected * lengths))
    return same, scaled


def unknown_distance(distance: Any, expected: str) -> ValueError:
    """The error for a distance that a loss does not compute."""
    options = [
        f"{name}={getattr(distance, name)}" for name in ("normalize_embeddings", "p", "power") if name in vars(distance)
    ]
    return ValueError(
        f"distance must be None or compute {expected}; got {type(distance).__name__}({', '.join(options)})"
    )


def miner_weights(indices_tuple: Sequence[Tensor] | None, losses: Tensor) -> Tensor | float:
    """Weights (N,): how often a miner names each sample, divided by the largest such number; 1 without a miner."""
    if indices_tuple is None or all(len(indices) == 0 for indices in indices_tuple):
        return 1.0
    chosen = torch.cat(tuple(indices_tuple)).to(losses.device)
    counts = torch.bincount(chosen, minlength=losses.shape[0]).to(losses.dtype)
    return counts / counts.max()


class SharedOptions(TypedDict, total=False):
    """Options that every loss takes besides its own numbers, as in pytorch-metric-learning."""

    weight_init_func: Callable[[Tensor], Any] | None
    weight_regularizer: Callable[[Tensor], Any] | None
    weight_reg_weight: float
    embedding_regularizer: Callable[[Tensor], Any] | None
    embedding_reg_weight: float
    reducer: Callable[..., Any] | None
    distance: Callable[..., Tensor] | None
    collect_stats: bool | None


class ClassificationLoss(nn.Module):
    """Base of the losses: ``W``, the weights of a miner, regularisers and the reducer."""

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        weight_init_func: Callable[[Tensor], Any] | None = None,
        weight_regularizer: Callable[[Tensor], Any] | None = None,
        weight_reg_weight: float = 1.0,
        embedding_regularizer: Callable[[Tensor], Any] | None = None,
        embedding_reg_weight: float = 1.0,
        reducer: Callable[..., Any] | None = None,
        distance: Callable[..., Tensor] | None = None,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__()
        if collect_stats:
            raise ValueError(f"collect_stats must be None or False, as no statistics are kept; got {collect_stats!r}")
        self.num_classes = check_count("num_classes", num_classes)
        self.embedding_size = check_count("embedding_size", embedding_size)
        self.distance, self._normalized = distance, self._normalizes(distance)
        self.weight_regularizer, self.weight_reg_weight = weight_regularizer, weight_reg_weight
        self.embedding_regularizer, self.embedding_reg_weight = embedding_regularizer, embedding_reg_weight
        self.reducer = reducer
        # W is (D, C) but stored as (C, D), so that the prototypes and their gradient are views of it.
        self.W = nn.Parameter(torch.empty(self.num_classes, self.embedding_size).t())
        drawn = torch.empty(self.W.shape)  # in the order of W, so that a seed gives the numbers of the original
        with torch.no_grad():
            (weight_init_func or nn.init.normal_)(drawn)
            self.W.copy_(drawn)

    @property
    def weight(self) -> Tensor:
        """The prototypes (C, D) for :mod:`ltloss.functional`: contiguous, a view of ``W``."""
        return self.W.t()

    def _normalizes(self, distance: Callable[..., Tensor] | None) -> bool:
        """Whether the embeddings are normalised; ValueError for a distance that the loss does not compute."""
        if distance is None or found_cosines(distance, self.embedding_size)[0]:
            return True
        raise unknown_distance(distance, "the cosines, as CosineSimilarity() does")

    def _options(self) -> dict[str, Any]:
        """The options of this loss for :func:`ltloss.functional.margin_cross_entropy`."""
        raise NotImplementedError

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """Loss of embeddings (N, D) with labels (N,): the mean, or what the reducer makes of the losses.

        Args:
            embeddings: (N, D).
            labels: (N,) integers in [0, C). A label of -100 gives loss 0, which counts in the mean, as the losses of
                ``F.cross_entropy(..., reduction="none")`` do.
            indices_tuple: the result of a miner. The loss of a sample is multiplied by the number of times it occurs
                there, divided by that of the most frequent sample.
            ref_emb, ref_labels: must be None, because embeddings are compared with prototypes.

        Returns:
            A scalar; with a reducer, the sum of its results.

        Raises:
            ValueError, TypeError, IndexError: no labels, ``ref_emb``, tensors that do not fit together.
        """
        if labels is None:
            raise ValueError(f"labels must be a tensor ({embeddings.shape[0]},) of classes; got None")
        if ref_emb is not None and (ref_emb is not embeddings or ref_labels is not labels):
            raise ValueError("ref_emb and ref_labels must be None: embeddings are compared with prototypes")
        if self.W.device != embeddings.device:  # in place, so that an optimizer keeps its parameter
            self.W.data = self.W.data.to(embeddings.device)
        labels = labels.to(embeddings.device)
        losses = self._losses(embeddings, labels)
        losses = losses * miner_weights(indices_tuple, losses)
        samples = torch.arange(losses.shape[0], device=losses.device)
        found: dict[str, dict[str, Any]] = {
            "loss": {"losses": losses, "indices": samples, "reduction_type": "element"},
        }
        for name, regularizer, factor, argument in (
            ("weight_reg_loss", self.weight_regularizer, self.weight_reg_weight, self.W.t()),
            ("embedding_reg_loss", self.embedding_regularizer, self.embedding_reg_weight, embeddings),
        ):
            if regularizer is not None:
                value = regularizer(argument) * factor
                found[name] = {"losses": value, "indices": None, "reduction_type": "already_reduced"}
        return self._reduced(found, embeddings, labels)

    def _losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Losses (N,) before the weights of a miner."""
        return F.margin_cross_entropy(embeddings, self.weight, labels, reduction="none", **self._options())

    def _reduced(self, found: dict[str, dict[str, Any]], embeddings: Tensor, labels: Tensor) -> Any:
        """The sum of the reducer's results for each part; a reducer that takes all parts is called once."""
        if self.reducer is None:
            losses = found.pop("loss")["losses"]
            mean = losses.sum() / max(len(losses), 1)
            return sum((part["losses"] for part in found.values()), start=mean)
        if not _OF_ALL.isdisjoint(kind.__name__ for kind in type(self.reducer).__mro__):
            return self.reducer(found, embeddings, labels)
        first, *others = (self.reducer({name: part}, embeddings, labels) for name, part in found.items())
        return sum(others, start=first)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Dense logits (N, C) without margin. For many classes use ``ltloss.functional.top_k(x, loss.weight, k)``."""
        options = self._options()
        normalize_features = options.get("normalize_features", True)
        return cosine_logits(embeddings, self.weight, options["scale"], normalize_features)

    def extra_repr(self) -> str:
        """Shape and options."""
        options = "".join(f", {name}={value}" for name, value in self._options().items())
        return f"{self.num_classes}, {self.embedding_size}{options}"
