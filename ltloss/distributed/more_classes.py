"""More classes for a trained head, a block at a time."""

from __future__ import annotations

import copy
import dataclasses
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ltloss._validation import check_count
from ltloss.distributed.centers import ShardedCenters
from ltloss.distributed.class_parallel import ClassParallel, shallow
from ltloss.distributed.layout import Layout, copy_rows
from ltloss.losses.class_centers import ClassCenters
from ltloss.losses.prototype_head import PrototypeHead

__all__ = ["add_classes"]

Head = TypeVar("Head", bound=PrototypeHead)


def add_classes(head: Head, count: int, **per_class: Tensor) -> Head:
    """Return a head with ``count`` more classes at the end.

    The rows of the old classes, (C, D), and their centres are copied. Those of the new classes are drawn, and their
    bias is 0. Running means and steps are copied too: the heads share no state. All ranks call it alike.

    Args:
        head: sharded or not; it is not changed. An optimizer of :mod:`ltloss.optim` continues with the larger head
            after ``optimizer.take_over(larger)``; any other optimizer must be made again.
        count: how many, >= 1.
        per_class: for every margin, prior, weight or count that is a vector, its new value (C + count,).

    Returns:
        The larger head.

    Raises:
        ValueError: a vector is missing, or has another length.

    See also: :meth:`ltloss.optim.PrototypeSGD.take_over`, to keep the optimizer.

    Example:
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.distributed import add_classes
        >>> add_classes(ArcFaceLoss(10, 4), 3).weight.shape
        torch.Size([13, 4])
    """
    count = check_count("count", count)
    classes = head.num_classes + count
    vectors = {name for name, buffer in head.named_buffers(recurse=False) if buffer.shape == (head.num_classes,)}
    vectors.discard("weight_exponent")
    if vectors != set(per_class):
        raise ValueError(
            f"add_classes needs the vectors {sorted(vectors)} for {classes} classes; got {sorted(per_class)}"
        )
    for name, vector in per_class.items():
        if vector.shape != (classes,):
            raise ValueError(f"{name} must have the shape ({classes},); got {tuple(vector.shape)}")
    layout = dataclasses.replace(Layout.of(head.weight), num_classes=classes)
    larger = shallow(head)
    larger.num_classes = classes
    if isinstance(larger, ClassParallel):
        larger.rearrange(layout)
        larger.sampler = copy.deepcopy(larger.sampler)
    larger.weight = nn.Parameter(
        layout.zeros(*head.weight.shape[1:], dtype=head.weight.dtype), requires_grad=head.weight.requires_grad
    )
    if head.weight_exponent is not None:
        larger.weight_exponent = layout.zeros(dtype=torch.int8)
    others = _other_parameters(head, count)
    for name in others:  # what is drawn anew must not be those of the former head
        del larger._parameters[name]
    _take_state(larger, head, layout)  # reset_parameters empties it in place: let it not be that of the former head
    larger.reset_parameters()
    _take_state(larger, head, layout)
    larger._parameters |= others
    copy_rows(head.weight, larger.weight)
    if head.weight_exponent is not None and larger.weight_exponent is not None:
        copy_rows(head.weight_exponent, larger.weight_exponent)
    for name, vector in per_class.items():
        larger._keep(name, vector.to(head.get_buffer(name).dtype))
    return larger


def _take_state(larger: PrototypeHead, head: PrototypeHead, layout: Layout) -> None:
    """Copy what a head has learned beside its parameters: moments, steps and class centres."""
    for name, buffer in head.named_buffers(recurse=False):
        if name != "weight_exponent":
            larger._buffers[name] = buffer.clone()
    for name, child in head.named_children():
        if isinstance(child, ClassCenters):
            setattr(larger, name, _more_centers(child, layout))


def _other_parameters(head: PrototypeHead, count: int) -> dict[str, nn.Parameter | None]:
    """Those that every rank holds alike: of a bias (C,) 0 for the new classes; any other, a learned scale, as it is."""
    others: dict[str, nn.Parameter | None] = {}
    for name, parameter in head.named_parameters(recurse=False):
        if name != "weight":
            own = parameter.detach()
            own = functional.pad(own, (0, count)) if own.shape == (head.num_classes,) else own.clone()
            others[name] = nn.Parameter(own, parameter.requires_grad)
    return others


def _more_centers(centers: ClassCenters, layout: Layout) -> ClassCenters:
    larger = shallow(centers)
    if isinstance(larger, ShardedCenters):
        larger.layout = layout
    for name in ("centers", "counts"):
        old = centers.get_buffer(name)
        larger._buffers[name] = new = layout.zeros(*old.shape[1:], dtype=old.dtype)
        copy_rows(old, new)
    return larger
