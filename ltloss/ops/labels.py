"""Labels: the check of their range, and the operator that hides it from torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from ltloss._validation import check_label_range
from ltloss.ops._dispatch import define
from ltloss.runtime import current_debug

__all__ = ["NOTHING", "OPERATOR", "checked_labels", "each_once"]

# ``ignore_index`` of a vector of class indices, in which nothing is ignored.
NOTHING = -(1 << 62)


def _checked(labels: Tensor, num_classes: int, ignore_index: int, name: str) -> Tensor:
    _check(labels, num_classes, ignore_index, name)
    return labels.clone()


def _check(labels: Tensor, num_classes: int, ignore_index: int, name: str) -> None:
    if labels.device.type == "cpu" or current_debug():
        check_label_range(labels, num_classes, ignore_index, name)


# An operator, because torch.compile cannot trace a check that depends on the data.
OPERATOR = define(
    "checked_labels(Tensor labels, int num_classes, int ignore_index, str name) -> Tensor",
    lambda labels, num_classes, ignore_index, name: torch.empty_like(labels),
    any=_checked,
)["any"]


def checked_labels(labels: Tensor, num_classes: int, ignore_index: int, name: str) -> Tensor:
    """Return the labels (N,) as int64, after a check of their range on the CPU (on a GPU under ``debug_labels``).

    Raises:
        IndexError: a label that is neither in [0, C) nor ``ignore_index``, naming the argument ``name``.
    """
    labels = labels.to(torch.int64)  # in others C or ignore_index may wrap: in uint8 300 is 44
    if torch.compiler.is_compiling():
        checked: Tensor = OPERATOR(labels, num_classes, ignore_index, name)
        return checked
    _check(labels, num_classes, ignore_index, name)
    return labels


def each_once(labels: Tensor, ignore_index: int) -> Tensor:
    """Replace labels (N, k) that repeat a class, and all labels of an ignored sample, by ``ignore_index``."""
    again = labels[:, :, None] == labels[:, None, :]
    again = again.tril(-1).any(2) | (labels[:, :1] == ignore_index)
    return labels.masked_fill(again, ignore_index)
