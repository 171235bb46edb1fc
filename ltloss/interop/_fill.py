"""Copy prototypes that were read into the block of this rank."""

from __future__ import annotations

from torch import Tensor

from ltloss.distributed.layout import local
from ltloss.float8 import write_rows
from ltloss.losses.prototype_head import PrototypeHead

__all__ = ["check_shape", "fill", "write_prototypes"]

_AXES = {2: "(C, D)", 3: "(C, K, D)"}


def fill(head: PrototypeHead, found: tuple[int, ...], origin: str, rows: Tensor) -> None:
    """Copy this rank's ``rows`` of prototypes of shape ``found`` into the head; ValueError if its shape differs."""
    check_shape(found, tuple(head.weight.shape), origin)
    write_prototypes(head, rows)


def check_shape(found: tuple[int, ...], wanted: tuple[int, ...], origin: str) -> None:
    """Raise ValueError unless the shape ``found`` in a file is that of the head's prototypes."""
    if found != wanted:
        raise ValueError(f"{origin} holds prototypes {found} {_AXES[len(found)]}; the head has {wanted}")


def write_prototypes(head: PrototypeHead, rows: Tensor) -> None:
    """Set this rank's prototypes to ``rows``, rounded to the nearest values that the head can hold."""
    exponent = None if head.weight_exponent is None else local(head.weight_exponent)
    write_rows(local(head.weight), exponent, 0, rows)
    head.replaced()
