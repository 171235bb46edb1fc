"""A sample of the classes per step: the batch's own, if wanted the nearest to them, and random others.

Only the prototypes in the sample get gradients.

Sources: An et al., Partial FC: training 10 million identities on a single machine, ICCV workshops 2021; An et al.,
Killing two birds with one stone: efficient and robust training of face recognition CNNs by partial FC, CVPR 2022.
The correction is that of sampled softmax: Jean et al., On using very large target vocabulary, ACL 2015, section 3.
"""

from __future__ import annotations

import math
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ltloss.distributed.layout import Layout
from ltloss.distributed.logsumexp import ClassShard
from ltloss.distributed.neighbours import Neighbours
from ltloss.numerics import compute_dtype

__all__ = ["ClassSampler", "seeded"]

_HARD_SHARE = 0.5  # of the places that the batch's own classes leave, at most: a broad rest keeps its weights 1/π small


def seeded(seed: int, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on all of the numbers (splitmix64), for draws that any rank can repeat."""
    for number in numbers:
        seed = (seed ^ (number + 1) * 0x9E3779B97F4A7C15) & (1 << 64) - 1
        seed = ((seed ^ seed >> 30) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
        seed = ((seed ^ seed >> 27) * 0x94D049BB133111EB) & (1 << 64) - 1
    return torch.Generator(device).manual_seed(seed >> 1)


class ClassSampler:
    """Draws the classes of each step.

    A draw is a function of the seed, the step, the labels of the global batch and the class rank. So ranks that hold
    the same classes draw alike, micro-batches of one step draw differently because their labels do, and what activation
    checkpointing computes again draws the same again. With hard negatives it is a function of their table too, whose
    rows are made once in ``refresh`` steps.

    ``step`` advances by one when a ``torch.optim`` optimizer (or a subclass) that owns the weight has stepped. It does
    not for optimizers over other tensors (a master copy of the weight too), nor for a weight that is changed by hand:
    count those with ``module.sampler.step += 1``, on all ranks. Of the steps that a GradScaler skips, those of fused
    optimizers count, for they skip inside; the others do not.

    Args:
        rate: fraction of each rank's classes, in (0, 1); the batch's own classes are taken even where they are more.
        seed: see above.
        unbiased: add −log π to the logit of a class that was drawn with probability π, so that the expected sum of
            exponentials is that of all classes.
        hard_negatives: K, the nearest other classes of each class of the batch, which are drawn with certainty. They
            take at most half of the places that the batch leaves, those with the largest cosine first.
        refresh: steps that a class keeps its neighbours for, see :class:`ltloss.distributed.neighbours.Neighbours`.
    """

    def __init__(self, rate: float, seed: int, unbiased: bool, hard_negatives: int = 0, refresh: int = 1) -> None:
        self.rate, self.seed, self.unbiased = rate, seed, unbiased
        self.neighbours = Neighbours(hard_negatives, refresh) if hard_negatives else None
        self.step = 0

    def draw(self, labels: Tensor, prototypes: Tensor, layout: Layout) -> ClassShard:
        """The sample of the prototypes (C, D) for a global batch with labels (N,)."""
        _watch_optimizers()
        _DRAWN_FROM[self] = weakref.ref(prototypes)
        start, stop = layout.span()
        count = stop - start
        sure = self._certain(labels, prototypes, layout)
        certain = int(sure.sum())
        chosen = max(math.ceil(self.rate * count), certain)
        generator = seeded(self.seed, self.step, layout.class_rank, _digest(labels), device=layout.device)
        chance = torch.rand(count, generator=generator, device=layout.device).masked_fill_(sure, 2.0)
        index = chance.topk(chosen).indices.sort().values
        correction = None
        if self.unbiased and certain < chosen < count:
            added = -math.log((chosen - certain) / (count - certain))
            correction = torch.full_like(index, added, dtype=compute_dtype(prototypes))
            correction = correction.masked_fill(sure[index], 0.0)
        return ClassShard(layout, index, correction)

    def _certain(self, labels: Tensor, prototypes: Tensor, layout: Layout) -> Tensor:
        """Which of this rank's classes are drawn with certainty, (own,): the batch's, and the nearest to them."""
        start, stop = layout.span()
        sure = torch.zeros(stop - start + 1, dtype=torch.bool, device=layout.device)
        sure[layout.local_index(labels)] = True  # those of other ranks mark the last entry
        sure = sure[:-1]
        if self.neighbours is not None:
            cosine = self.neighbours.cosines(labels, self.step, prototypes, layout).masked_fill_(sure, -torch.inf)
            places = max(0, math.ceil(self.rate * (stop - start)) - int(sure.sum()))
            hard = (cosine > -torch.inf).nonzero()[:, 0]
            hardest = cosine[hard].sort(descending=True, stable=True).indices  # of equal ones the lowest class
            sure[hard[hardest[: int(_HARD_SHARE * places)]]] = True
        return sure


# Kept here and not in the samplers, which are copied and pickled with their modules.
_DRAWN_FROM: weakref.WeakKeyDictionary[ClassSampler, weakref.ref[Tensor]] = weakref.WeakKeyDictionary()


@cache
def _watch_optimizers() -> None:
    """Let optimizers tell of their steps. A tensor's version would not: fused and foreach updates may leave it."""

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for sampler, weight in _DRAWN_FROM.items():
            sampler.step += id(weight()) in owned

    register_optimizer_step_post_hook(count)


def _digest(labels: Tensor) -> int:
    """A number that depends on every label and its place; samples that do not count are alike."""
    place = torch.arange(labels.numel(), device=labels.device) * 2 + 1
    return int(((labels.clamp_min(-1).to(torch.int64) + 2) * place * 0x5851F42D4C957F2D).sum()) & (1 << 62) - 1
