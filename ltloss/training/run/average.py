"""A moving average of the weights of a training, which then replaces the weights for measuring, storing and use."""

from __future__ import annotations

import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ltloss.distributed.layout import local
from ltloss.training.model.classifier import Classifier


class WeightAverage:
    """The exponential moving average a ← d·a + (1 − d)·w of a classifier's weights w, one update a step.

    d is min(decay, (1 + t) / (10 + t)) at step t (from 1), so that a short run does not keep its initial weights. The
    running statistics of batch normalisation are averaged in the same way. Integers and the loss's own buffers
    (centres, counts), which are means already, are copied.

    Source: ``tf.train.ExponentialMovingAverage`` with ``num_updates``; the idea: Polyak and Juditsky, Acceleration of
    stochastic approximation by averaging, SIAM J. Control Optim. 1992.
    """

    def __init__(self, trained: Classifier, decay: float) -> None:
        self._trained, self._decay = trained, decay
        self.classifier = copy.deepcopy(trained).requires_grad_(False)
        self._averaged = {name for name, _ in trained.named_parameters()}
        self._averaged |= {
            name
            for name, buffer in trained.named_buffers()
            if buffer.is_floating_point() and not name.startswith("loss.")
        }
        # In lists, for one operator in place of several for each tensor, each of which a GPU would wait for. Training
        # changes these tensors in place. What is copied it may replace, so that is looked up in every step.
        self._now, self._averages = (
            [local(tensor) for name, tensor in model.state_dict().items() if name in self._averaged]
            for model in (trained, self.classifier)
        )

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after step number ``step`` (from 1) to the average."""
        decay = min(self._decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self._averages, self._now, step)  # type: ignore[no-untyped-call]
        now = self._trained.state_dict(keep_vars=True)
        for name, average in self.classifier.state_dict(keep_vars=True).items():
            if name not in self._averaged:
                local(average).copy_(local(now[name]))
