"""Labels: an operator, so that torch.compile does not have to look into a check that depends on the data."""

from __future__ import annotations

import torch
from torch import Tensor

from ltloss._validation import check_label_range
from ltloss.ops._dispatch import define
from ltloss.runtime import debug

__all__ = ["checked_labels"]

# An index vector has nothing to ignore.
NOTHING = -(1 << 62)


def _checked(labels: Tensor, num_classes: int, ignore_index: int, name: str) -> Tensor:
    if labels.device.type == "cpu" or debug:
        check_label_range(labels, num_classes, ignore_index, name)
    return labels.to(torch.int64, copy=True)


checked_labels = define(
    "checked_labels(Tensor labels, int num_classes, int ignore_index, str name) -> Tensor",
    lambda labels, num_classes, ignore_index, name: labels.new_empty(labels.shape, dtype=torch.int64),
    any=_checked,
)["any"]
"""Labels (N,) as int64. On the CPU (on a GPU under ``ltloss.debug``) a label that is neither in [0, C) nor
``ignore_index`` raises IndexError, naming the argument ``name``."""
