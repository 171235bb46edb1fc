"""The training loop: AdamW over minibatches drawn by one generator, so that a seed always gives the same classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ltloss._estimator.heads import Candidate, Classifier, log_prior
from ltloss._estimator.space import Batches, Part, sent_to
from ltloss.numerics import spans
from ltloss.runtime import use_workspace

__all__ = ["Training", "progress"]

_KEPT = 1 << 24  # bytes of exponentials that the forward may keep for the backward


def progress(steps: int, verbose: bool, what: str) -> AbstractContextManager[Any]:
    """A tqdm bar of ``steps`` steps as a context manager; it gives None unless ``verbose``."""
    if not verbose:
        return nullcontext()
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("verbose needs tqdm: pip install 'ltloss[sklearn]'") from error
    bar: AbstractContextManager[Any] = tqdm(total=steps, unit="step", desc=what)
    return bar


class _KeptExponentials:
    """Keeps the exponentials of a step. The switch is the process's: of fits in several threads, the first that is in a
    step sets it, and the last one sets it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._switch = use_workspace(_KEPT, keep_exponentials=True)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._switch.__exit__(None, None, None)


_kept_exponentials = _KeptExponentials()


class Training:
    """The candidate's loss with prototypes set to ``start`` and the log prior of ``counts`` (C,), and its AdamW."""

    def __init__(
        self, candidate: Candidate, start: Classifier, counts: Tensor, lr: float, generator: torch.Generator
    ) -> None:
        classes, width = start.prototypes.shape
        self.candidate = candidate
        self.head = candidate.head((classes, width), counts, start.prototypes.device)
        candidate.place(self.head, start, torch.ones(classes, dtype=torch.bool), generator)
        self.lr = lr
        self._optimizer = torch.optim.AdamW(self.head.parameters(), lr=lr, fused=True)  # run sets the rate of each step

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
        """Train for ``steps`` steps, and return the number of passes over ``part``, the last one maybe incomplete.

        ``annealed``: the learning rate falls to 0 along a cosine. ``after_pass`` returns True to stop training.
        """
        # A coordinate of a unit vector is about 1/√D, so this step turns a prototype by the same angle for every D.
        step, passes, lr = 0, 0, self.lr / self.head.weight.shape[1] ** 0.5
        while step < steps:
            order, losses = torch.randperm(len(part.rows), generator=generator), []
            for start, stop in spans(len(order), batch_size):
                for group in self._optimizer.param_groups:
                    group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * step / steps) if annealed else 1.0)
                losses.append(self._step(batches, part.take(order[start:stop])))
                step += 1
                if bar is not None:
                    bar.update()
                if step == steps:
                    break
            passes += 1
            total = sum(torch.stack(losses).tolist())  # once a pass: each look makes a GPU wait
            if not math.isfinite(total):
                raise ValueError(
                    f"the loss became {total:g} in pass {passes}: features too large for float32, or lr too high"
                )
            if after_pass is not None and after_pass():
                break
        return passes

    def _step(self, batches: Batches, batch: Part) -> Tensor:
        self._optimizer.zero_grad()
        with _kept_exponentials:
            labels, weights = (sent_to(batches.device, values) for values in (batch.labels, batch.weights))
            losses: Tensor = self.head(batches[batch.rows] * self.candidate.gain, labels)
            loss = (losses * weights).mean()
            torch.autograd.backward(loss)
        self._optimizer.step()
        return loss.detach()

    def meet(self, start: Classifier, new: Tensor, counts: Tensor, generator: torch.Generator) -> None:
        """Set the prototypes of the classes in the mask ``new`` (C,) to ``start``, and the log prior to ``counts``."""
        self.candidate.place(self.head, start, new, generator)
        self.head.log_prior = log_prior(counts)

    def classifier(self) -> Classifier:
        """A copy of what is learned so far."""
        return self.candidate.classifier(self.head)
