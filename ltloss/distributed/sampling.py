"""A sample of the classes per step: the batch's own and random others. Gradients and optimizer touch those rows only.

Sources: An et al., Partial FC: training 10 million identities on a single machine, ICCV workshops 2021; An et al.,
Killing two birds with one stone: efficient and robust training of face recognition CNNs by partial FC, CVPR 2022.
The correction is that of sampled softmax: Jean et al., On using very large target vocabulary, ACL 2015, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ltloss.distributed.layout import Layout, local

__all__ = ["ClassSampler", "Sampled", "seeded"]


def seeded(seed: int, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on all of the numbers (splitmix64), for draws that any rank can repeat."""
    for number in numbers:
        seed = (seed ^ (number + 1) * 0x9E3779B97F4A7C15) & (1 << 64) - 1
        seed = ((seed ^ seed >> 30) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
        seed = ((seed ^ seed >> 27) * 0x94D049BB133111EB) & (1 << 64) - 1
    return torch.Generator(device).manual_seed(seed >> 1)


class Sampled(NamedTuple):
    """The classes of one step on this rank.

    ``index`` (K,) local class indices, ascending; ``rows`` (K, D) their prototypes, a leaf that collects the gradient;
    ``log_prior`` (K,) to add to their logits, or None.
    """

    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    rows: Tensor
    log_prior: Tensor | None


class ClassSampler:
    """Draws the classes of each step and keeps their gradients for the optimizer.

    Args:
        rate: share of each rank's classes, in (0, 1); the batch's own classes are taken even where they are more.
        seed: with the step and the rank it decides the draw.
        unbiased: add −log π to the logit of a class that was drawn with probability π, so that the expected sum of
            exponentials is that of all classes.
    """

    def __init__(self, rate: float, seed: int, unbiased: bool) -> None:
        self.rate, self.seed, self.unbiased = rate, seed, unbiased
        self.step = 0
        self.has_optimizer = False
        self._pending: list[Sampled] = []

    def fresh(self) -> ClassSampler:
        """The same sampler at the same step, without gradients and optimizer."""
        copied = ClassSampler(self.rate, self.seed, self.unbiased)
        copied.step = self.step
        return copied

    def draw(self, labels: Tensor, prototypes: Tensor, log_prior: Tensor | None, layout: Layout) -> Sampled:
        """The sample for a global batch with labels (N,); a prior (c,) of this rank's classes is passed on."""
        own = local(prototypes)
        count = own.shape[0]
        positive = torch.zeros(count + 1, dtype=torch.bool, device=own.device)
        positive[layout.local_index(labels)] = True  # those of other ranks mark the last entry
        positive = positive[:count]
        certain = int(positive.sum())
        chosen = max(math.ceil(self.rate * count), certain)
        generator = seeded(self.seed, self.step, layout.class_rank, device=own.device)
        chance = torch.rand(count, generator=generator, device=own.device).masked_fill_(positive, 2.0)
        index = chance.topk(chosen).indices.sort().values
        prior = None if log_prior is None else log_prior[index]
        if self.unbiased and certain < chosen < count:
            correction = -math.log((chosen - certain) / (count - certain))
            added = torch.where(positive[index], 0.0, correction).to(torch.float32)
            prior = added if prior is None else prior + added
        rows = own[index]
        sampled = Sampled(index, rows.requires_grad_(torch.is_grad_enabled()), prior)
        if rows.requires_grad:
            self._pending.append(sampled)
        return sampled

    def gradient(self) -> tuple[Tensor, Tensor] | None:
        """Local indices (K,), ascending, and their gradient (K, D), summed over the passes since the last step."""
        given = [(sampled.index, sampled.rows.grad) for sampled in self._pending if sampled.rows.grad is not None]
        if not given:
            return None
        if len(given) == 1:
            return given[0]
        index, place = torch.unique(torch.cat([pair[0] for pair in given]), return_inverse=True)
        rows = torch.cat([pair[1] for pair in given])
        return index, rows.new_zeros(index.numel(), rows.shape[1]).index_add_(0, place, rows)

    def clear(self) -> None:
        """Forget the gradients: an optimizer's ``zero_grad``."""
        self._pending.clear()

    @contextmanager
    def on(self, prototypes: Tensor) -> Iterator[None]:
        """Sample in the passes over these prototypes inside the block, which is one step."""
        if not self.has_optimizer and any(sampled.rows.grad is not None for sampled in self._pending):
            raise RuntimeError(
                "the gradients of sampled classes are not in weight.grad, and no optimizer has used those of the last "
                "step: train the weight with ltloss.distributed.SampledSGD or SampledAdamW"
            )
        prototypes.class_sample = self  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del prototypes.class_sample  # type: ignore[attr-defined]
        self.step += 1
