"""Checks of user input. Every message names the argument, what was expected and what was given."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ltloss._transforms import transforming
from ltloss.float8 import FLOAT8
from ltloss.runtime import current_backend

__all__ = [
    "check_choice",
    "check_classes",
    "check_count",
    "check_dense",
    "check_features",
    "check_head_dtype",
    "check_label_range",
    "check_labels",
    "check_lengths",
    "check_matrices",
    "check_no_margin",
    "check_number",
    "check_offset",
    "check_pair",
    "check_per_class",
    "check_prior",
    "check_prototypes",
    "check_same_device",
    "check_scalar",
    "check_scale",
    "check_scales",
    "check_sub_centers",
    "check_supervised",
    "check_type",
    "check_values",
    "is_integer",
    "is_whole",
    "plain_number",
    "shown",
]

_T = TypeVar("_T", bound=int)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_SUB_CENTERS = _MOST_LABELS = 8
_MOST_SCALE = 1e30  # logits and their sums stay finite in float32
_PI = math.pi + 1e-6  # π rounded to float32 is larger than π in float64
_LARGEST = sys.float_info.max

MOST_COSINE_MARGIN = 2.0  # cosines span 2
# The range of the values of a per-class constant: lowest, highest, and in words.
_RANGES = {
    "angular_margin": (-_PI, _PI, "lie in [-π, π] radians, not degrees"),
    "cosine_margin": (-MOST_COSINE_MARGIN, MOST_COSINE_MARGIN, "lie in [-2, 2] in units of the cosine, not degrees"),
    "class_weight": (0.0, _LARGEST, "be finite and not negative"),
    "log_prior": (-math.inf, _LARGEST, "be finite, or -inf for a class without samples"),
}
_FINITE = (-_LARGEST, _LARGEST, "be finite")


def check_choice(name: str, given: Any, known: Sequence[str]) -> None:
    """Raise ValueError unless ``given`` is one of ``known``."""
    if given not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {given!r}")


def plain_number(given: Any, *, wait: bool = True) -> Any:
    """Convert a NumPy number, or a 0-d tensor without gradient and without ``wait`` for a GPU, to a Python number."""
    if isinstance(given, Tensor) and (given.dim() or given.requires_grad or not (wait or _readable(given))):
        return given
    return given.item() if isinstance(given, np.number | Tensor) else given


def check_number(
    name: str, given: Any, *, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf
) -> float:
    """Return a finite real number as a Python number. TypeError for anything else, ValueError outside the range."""
    given = plain_number(given)
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise TypeError(f"{name} must be a number; got {type(given).__name__} {given!r}")
    # Not math.isfinite: torch.compile cannot trace it for a number that it treats as dynamic.
    if not (-math.inf < given < math.inf and given > above and at_least <= given <= at_most):
        lower = f"> {above}" if above > at_least else f">= {at_least}"
        bounds = [bound for bound in (lower, f"<= {at_most}") if "inf" not in bound]
        raise ValueError(f"{name} must be finite{''.join(' and ' + bound for bound in bounds)}; got {given}")
    return given


def check_scale(given: Any) -> float:
    """Return a number > 0 as a float. TypeError for a learnable tensor, which only ``logsumexp_stats`` accepts."""
    if isinstance(given, Tensor) and given.requires_grad:
        raise TypeError(
            f"scale must be a number here; got a tensor {tuple(given.shape)} that requires a gradient. For a "
            "learnable scale use ltloss.extend.logsumexp_stats"
        )
    return float(check_number("scale", given, above=0.0, at_most=_MOST_SCALE))


def check_scalar(name: str, given: Any, like: Tensor, *, above: float = -math.inf) -> Tensor:
    """Return a number or a floating-point 0-d tensor as a 0-d tensor in ``like``'s dtype, gradient kept."""
    if not isinstance(given, Tensor):
        return like.new_full((), check_number(name, given, above=above))
    if given.dim() or not given.is_floating_point():
        raise ValueError(
            f"{name} must be a number or a floating-point tensor (); got {given.dtype} {tuple(given.shape)}"
        )
    check_same_device(features=like, **{name: given})
    if _readable(given):
        check_number(name, given.detach(), above=above)
    return given.to(like.dtype)


def is_integer(given: Any) -> bool:
    """Return whether ``given`` is an integer, of Python or NumPy (``labels.max() + 1``); bool is none."""
    return isinstance(given, numbers.Integral) and not isinstance(given, bool)


def check_count(name: str, given: Any, at_most: float = math.inf, what: str = "") -> int:
    """Return an integer from 1 to ``at_most``, ``what`` that is in words, as an int. ValueError for anything else."""
    if not is_integer(given) or not 1 <= given <= at_most:
        expected = ">= 1" if at_most == math.inf else f"between 1 and {what}{at_most}"
        raise ValueError(f"{name} must be an integer {expected}; got {given!r}")
    return int(given)


def shown(given: Any) -> str:
    """Return the shape of a tensor, or the type of anything else, for a message."""
    return str(tuple(given.shape)) if isinstance(given, Tensor) else type(given).__name__


def is_whole(given: Tensor) -> bool:
    """Return whether the dtype of a tensor is one of integers; bool is none."""
    return not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)


def check_type(name: str, given: Any, expected: type[_T]) -> _T:
    """Return ``given`` as the ``expected`` type, int (of 64 bits, and no bool) or bool; TypeError if it is another."""
    if not (is_integer(given) if expected is int else isinstance(given, expected)):
        what = "an integer" if expected is int else "True or False (bool)"
        raise TypeError(f"{name} must be {what}; got {type(given).__name__} {given!r}")
    if expected is int and not -(1 << 63) <= given < 1 << 63:
        raise ValueError(f"{name} must be an integer of 64 bits; got {given}")
    return expected(given)


def check_dense(name: str, given: Tensor, *, integers: bool = True) -> None:
    """Raise TypeError unless a tensor is dense and of floating-point numbers, or, with ``integers``, of those."""
    if given.layout != torch.strided or not (given.is_floating_point() or (integers and is_whole(given))):
        what = "numbers" if integers else "floating-point numbers"
        raise TypeError(f"{name} must be a dense tensor of {what}; got {given.dtype}, {given.layout}")


def _check_matrix(
    name: str, given: Any, shape: str, dtypes: Sequence[torch.dtype] = _DTYPES, dims: Sequence[int] = (2,)
) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {shape}; got {type(given).__name__}")
    if given.layout != torch.strided:
        raise TypeError(f"{name} must be dense, with layout torch.strided; got {given.layout}")
    if given.dim() not in dims:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(given.shape)}")
    if given.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must have a floating-point dtype, one of {known}; got {given.dtype}")
    if given.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one column {shape}; got {tuple(given.shape)}")


def check_features(features: Any) -> None:
    """Raise unless ``features`` are a floating-point tensor (N, D)."""
    _check_matrix("features", features, "(N, D)")


def check_prototypes(prototypes: Any) -> None:
    """Raise unless ``prototypes`` are a floating-point tensor (C, D), or (C, K, D) with sub-centres, with C >= 1."""
    _check_matrix("prototypes", prototypes, "(C, D) or (C, K, D)", (*_DTYPES, FLOAT8), (2, 3))
    if prototypes.shape[0] == 0:
        raise ValueError(f"prototypes must hold at least one class (C, D); got {tuple(prototypes.shape)}")
    if prototypes.dim() == 3:
        check_sub_centers(prototypes.shape[1], prototypes.dtype)


def check_head_dtype(dtype: Any) -> None:
    """A dtype that prototypes may have; None stands for PyTorch's default."""
    if dtype not in (None, *_DTYPES, FLOAT8):
        known = ", ".join(str(one) for one in (*_DTYPES, FLOAT8))
        raise TypeError(f"dtype of prototypes must be one of {known}; got {dtype!r}")


def check_sub_centers(given: Any, dtype: torch.dtype | None = None) -> int:
    """Return K, the sub-centres of a class, as an int: 1 to 8, and 1 for float8, whose exponent belongs to a class."""
    count = check_count("sub_centers, K of prototypes (C, K, D),", given, _MOST_SUB_CENTERS)
    if count > 1 and dtype == FLOAT8:
        raise TypeError(f"sub_centers={given} needs prototypes in half precision, float32 or float64; got {dtype}")
    return count


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors are on one device."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.device for tensor in given.values()}) > 1:
        where = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise ValueError(f"all tensors must be on one device; got {where}")


def check_pair(features: Any, prototypes: Any) -> None:
    """Raise unless features (N, D) and prototypes (C, D) have the same width and device."""
    check_features(features)
    check_prototypes(prototypes)
    _check_same_width(features=features, prototypes=prototypes)


def _check_same_width(**matrices: Tensor) -> None:
    if len({matrix.shape[-1] for matrix in matrices.values()}) > 1:
        given = " and ".join(f"{name} {tuple(matrix.shape)}" for name, matrix in matrices.items())
        raise ValueError(f"{' and '.join(matrices)} must have the same width D; got {given}")
    check_same_device(**matrices)


def check_matrices(**given: Any) -> None:
    """Raise unless all are floating-point matrices (·, D) with the same width and device."""
    for name, matrix in given.items():
        _check_matrix(name, matrix, "(N, D)")
    _check_same_width(**given)


def check_lengths(prototypes: Tensor, normalize_prototypes: Any) -> None:
    """Raise unless ``normalize_prototypes`` is a bool that suits the prototypes.

    It must be True for sub-centres, and for float8: a row of float8 is the prototype only up to a power of two.
    """
    check_type("normalize_prototypes", normalize_prototypes, bool)
    if prototypes.dim() == 3 and not normalize_prototypes:
        raise ValueError(
            "normalize_prototypes=False needs one prototype per class, (C, D); got sub-centres of shape "
            f"{tuple(prototypes.shape)}"
        )
    if prototypes.dtype == FLOAT8 and not normalize_prototypes:
        raise TypeError(
            f"normalize_prototypes=False needs prototypes whose length is stored; got {FLOAT8}, which stores each "
            "prototype up to a power of two"
        )


def check_no_margin(margin: str) -> None:
    """Raise ValueError if there is a ``margin``, as :meth:`ltloss.margins.Margin.in_words` describes it."""
    if margin:
        raise ValueError(f"{margin} is a margin on a cosine and needs normalize_prototypes=True; got False")


def check_supervised(features: Any, prototypes: Any, labels: Any, *, several: bool = False) -> None:
    """Raise unless features (N, D), prototypes (C, D) and integer labels (N,), or (N, k) if ``several``, fit."""
    check_pair(features, prototypes)
    if several and isinstance(labels, Tensor) and labels.dim() == 2:
        if not 1 <= labels.shape[1] <= _MOST_LABELS:
            raise ValueError(f"labels (N, k) must name 1 to {_MOST_LABELS} classes per sample; got {shown(labels)}")
        check_labels(features, labels[:, 0])
    else:
        check_labels(features, labels)


def check_labels(features: Tensor, labels: Any, features_name: str = "features", name: str = "labels") -> None:
    """Raise unless labels are integers (N,), one for each row of features (N, D), on the same device."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor (N,); got {type(labels).__name__}")
    if labels.layout != torch.strided:
        raise TypeError(f"{name} must be dense, of the layout torch.strided; got {labels.layout}")
    if not is_whole(labels):
        raise TypeError(f"{name} must have an integer dtype; got {labels.dtype}")
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"{name} must have one entry per row of {features_name}, shape ({features.shape[0]},); got {shown(labels)}"
        )
    check_same_device(**{features_name: features, name: labels})


def check_per_class(
    name: str, given: Any, num_classes: int, like: Tensor, *, learnable: bool = False, kind: str = ""
) -> Tensor | float:
    """Return a number as a float, or a vector (C,) in ``like``'s dtype; raise for anything else or out of range.

    Margins and weights are constants of the training set. Unless ``learnable``, a tensor that requires a gradient is
    refused, because it would never receive one. ``kind``: the name under which its range is known, if another.
    """
    if isinstance(given, Tensor):
        check_dense(name, given)
        if given.requires_grad and not learnable:
            raise ValueError(f"{name} is treated as a constant and gets no gradient; pass {name}.detach()")
        if given.shape not in ((), (num_classes,)):
            raise ValueError(f"{name} must be a number or have shape ({num_classes},); got {tuple(given.shape)}")
        check_same_device(features=like, **{name: given})
        if given.numel() and not given.requires_grad and _readable(given):  # a NaN in a parameter makes the loss NaN
            check_values(name, given, kind)
        return given.to(like.dtype)
    given = plain_number(given)
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise TypeError(f"{name} must be a number or a tensor ({num_classes},); got {type(given).__name__} {given!r}")
    lowest, highest, expected = _RANGES.get(kind or name, _FINITE)
    if not lowest <= given <= highest:
        raise ValueError(f"{name} must {expected}, and not NaN; got {given:g}")
    return float(given)


def check_offset(log_prior: Any, bias: Any, num_classes: int, like: Tensor, *, cancels: bool = False) -> Tensor | None:
    """Return what is added to the logits, (C,) in ``like``'s dtype: prior plus bias, gradients kept; None without both.

    ``cancels``: ignore a prior that is one number, because adding it to every logit changes nothing.
    """
    if bias is not None and not (isinstance(bias, Tensor) and bias.dim()):
        raise TypeError(f"bias must be a tensor ({num_classes},) or None; got {type(bias).__name__} {bias!r}")
    offset = None
    for name, given in (("log_prior", log_prior), ("bias", bias)):
        if given is not None:
            checked = torch.as_tensor(
                check_per_class(name, given, num_classes, like, learnable=True), dtype=like.dtype, device=like.device
            )
            if checked.dim() or not cancels:
                offset = checked.expand(num_classes) if offset is None else offset + checked
    return offset


def _readable(given: Tensor) -> bool:
    """Whether reading the values costs nothing: not on a GPU, not while compiling, not with the Triton backend."""
    return given.device.type == "cpu" and not torch.compiler.is_compiling() and current_backend() != "triton"


def check_values(name: str, given: Tensor, kind: str = "") -> None:
    """Raise ValueError unless all values of a per-class constant lie in its range."""
    lowest, highest, expected = _RANGES.get(kind or name, _FINITE)
    least, most = (float(end) for end in given.detach().aminmax())  # both NaN where one value is
    if not (lowest <= least and most <= highest):
        values = given.reshape(-1).double()
        first = int((~((values >= lowest) & (values <= highest))).nonzero()[0, 0])
        raise ValueError(f"{name} must {expected}, and not NaN; got {values[first]:g} for class {first}")


def check_scales(scale: Tensor, counted: Tensor, like: Tensor, normalize_features: bool) -> Tensor:
    """Return a tensor as scale, () or (N,), in the shape of ``counted``; raise unless those that count are > 0."""
    check_dense("scale", scale, integers=False)
    check_same_device(features=like, scale=scale)
    scale = scale if scale.dim() else scale.expand(counted.shape)
    if scale.shape != counted.shape or not normalize_features:
        raise ValueError(
            "scale must be a number, or with normalize_features=True a tensor () or, for a scale per sample, "
            f"{tuple(counted.shape)}; got {tuple(scale.shape)} and normalize_features={normalize_features}"
        )
    if _readable(scale) and not transforming():
        values = scale.detach()
        bad = counted & ~((values > 0.0) & values.isfinite())
        if bool(bad.any()):
            first = int(bad.nonzero()[0, 0])
            raise ValueError(f"scale must be finite and > 0.0; got {float(values[first]):g} for sample {first}")
    return scale


def check_prior(log_prior: Tensor | None, labels: Tensor, ignore_index: int) -> None:
    """Raise ValueError if a sample belongs to a class whose log prior is -inf, where the values can be read."""
    if log_prior is None or not log_prior.dim() or not _readable(log_prior):
        return
    gone = (log_prior == -math.inf).nonzero()[:, 0]
    if gone.numel() and bool((bad := torch.isin(labels, gone) & (labels != ignore_index)).any()):
        first = int(bad.nonzero()[0, 0])
        raise ValueError(
            "log_prior must be finite for every class that has samples, or their loss is infinite; got -inf for class "
            f"{int(labels[bad][0])}, the label at position {first}"
        )


def check_classes(classes: Any, prototypes: Tensor) -> None:
    """Raise unless ``classes`` are integers (R,) on the prototypes' device. ``checked_labels`` checks their range."""
    if not isinstance(classes, Tensor):
        raise TypeError(f"classes must be a torch.Tensor (R,) of class indices; got {type(classes).__name__}")
    if classes.dim() != 1 or not is_whole(classes):
        raise ValueError(
            f"classes must be integer class indices of shape (R,); got {classes.dtype} {tuple(classes.shape)}"
        )
    check_same_device(prototypes=prototypes, classes=classes)


def check_label_range(labels: Tensor, num_classes: int, ignore_index: int, name: str = "labels") -> None:
    """Raise IndexError for a label that is neither in [0, C) nor ``ignore_index``. Reads the labels."""
    labels = labels.to(torch.int64)  # C and ignore_index would wrap to the dtype of the labels
    bad = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if bool(bad.any()):
        first = int(bad.nonzero()[0, 0])
        if labels.dim() > 1:
            labels = torch.where(bad, labels, 0).gather(1, bad.long().argmax(1)[:, None])[:, 0]
        allowed = f" or be ignore_index={ignore_index}" if name == "labels" else ""
        raise IndexError(
            f"{name} must lie in [0, {num_classes}){allowed}; "
            f"got {int(labels[first])} at position {first} ({int(bad.sum())} such {name} in all)"
        )
