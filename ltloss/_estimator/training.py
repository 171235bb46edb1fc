"""The loop: AdamW over minibatches drawn from one generator, so the same seed gives the same classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ltloss._estimator.heads import Candidate, Classifier, log_prior
from ltloss._estimator.space import Batches, Part
from ltloss.numerics import spans
from ltloss.runtime import use_workspace

__all__ = ["Training", "progress"]

_KEPT = 1 << 24  # bytes of exponentials that the forward may leave to the backward


def progress(steps: int, verbose: bool, what: str) -> AbstractContextManager[Any]:
    """A tqdm bar of that many steps, or None."""
    if not verbose:
        return nullcontext()
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("verbose needs tqdm: pip install 'ltloss[sklearn]'") from error
    bar: AbstractContextManager[Any] = tqdm(total=steps, unit="step", desc=what)
    return bar


class Training:
    """A loss of the candidate, its prototypes at ``start``, and AdamW; ``counts`` (C,) make the log prior."""

    def __init__(
        self, candidate: Candidate, start: Classifier, counts: Tensor, lr: float, generator: torch.Generator
    ) -> None:
        classes, width = start.prototypes.shape
        self.candidate = candidate
        self.head = candidate.head((classes, width), counts, start.prototypes.device)
        candidate.place(self.head, start, torch.ones(classes, dtype=torch.bool), generator)
        # A coordinate of a unit vector is about 1/√D: so a step turns a prototype as far whatever D is.
        self._lr = lr / width**0.5
        self._optimizer = torch.optim.AdamW(self.head.parameters(), lr=self._lr, fused=True)

    def run(
        self,
        batches: Batches,
        part: Part,
        steps: int,
        batch_size: int,
        generator: torch.Generator,
        *,
        annealed: bool = True,
        after_pass: Callable[[], bool] | None = None,
        bar: Any = None,
    ) -> int:
        """Train; returns the passes over ``part``, ended or not.

        ``annealed``: the rate falls to 0 along a cosine. ``after_pass`` says whether to stop there.
        """
        step = passes = 0
        while step < steps:
            order, total = torch.randperm(len(part.rows), generator=generator), 0.0
            for start, stop in spans(len(order), batch_size):
                for group in self._optimizer.param_groups:
                    group["lr"] = self._lr * (0.5 + 0.5 * math.cos(math.pi * step / steps) if annealed else 1.0)
                total += self._step(batches, part.take(order[start:stop]))
                step += 1
                if bar is not None:
                    bar.update()
                if step == steps:
                    break
            passes += 1
            if not math.isfinite(total):
                raise ValueError(
                    f"the loss became {total:g} in pass {passes}: features too large for float32, or lr too high"
                )
            if after_pass is not None and after_pass():
                break
        return passes

    def _step(self, batches: Batches, batch: Part) -> float:
        device = batches.device
        self._optimizer.zero_grad()
        with use_workspace(_KEPT, keep_exponentials=True):
            losses = self.head(batches[batch.rows] * self.candidate.gain, batch.labels.to(device))
            loss = (losses * batch.weights.to(device)).mean()
            loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    def meet(self, start: Classifier, new: Tensor, counts: Tensor, generator: torch.Generator) -> None:
        """Put the prototypes of the classes ``new`` (C,) at ``start``; from now on ``counts`` make the log prior."""
        self.candidate.place(self.head, start, new, generator)
        self.head.log_prior = log_prior(counts)

    def classifier(self) -> Classifier:
        """What is learned so far, in memory of its own."""
        return self.candidate.classifier(self.head)
