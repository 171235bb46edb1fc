"""Labels: the check of their range, and the operator that hides it from torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from ltloss._validation import check_label_range
from ltloss.ops._dispatch import define
from ltloss.runtime import current_debug

__all__ = ["NOTHING", "OPERATOR", "checked_labels"]

# An index vector has nothing to ignore.
NOTHING = -(1 << 62)


def _checked(labels: Tensor, num_classes: int, ignore_index: int, name: str) -> Tensor:
    _check(labels, num_classes, ignore_index, name)
    return labels.clone()


def _check(labels: Tensor, num_classes: int, ignore_index: int, name: str) -> None:
    if labels.device.type == "cpu" or current_debug():
        check_label_range(labels, num_classes, ignore_index, name)


# torch.compile cannot look into a check that depends on the data.
OPERATOR = define(
    "checked_labels(Tensor labels, int num_classes, int ignore_index, str name) -> Tensor",
    lambda labels, num_classes, ignore_index, name: torch.empty_like(labels),
    any=_checked,
)["any"]


def checked_labels(labels: Tensor, num_classes: int, ignore_index: int, name: str) -> Tensor:
    """Labels (N,) as they are; on the CPU (on a GPU under ``ltloss.debug_labels``) their range is checked.

    Raises:
        IndexError: a label that is neither in [0, C) nor ``ignore_index``, naming the argument ``name``.
    """
    if torch.compiler.is_compiling():
        checked: Tensor = OPERATOR(labels, num_classes, ignore_index, name)
        return checked
    _check(labels, num_classes, ignore_index, name)
    return labels
