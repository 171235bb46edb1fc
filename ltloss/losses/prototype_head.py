"""The base class of all loss modules: the prototypes, their logits and the prediction."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ltloss import functional as F
from ltloss._types import TopK
from ltloss._validation import (
    check_count,
    check_head_dtype,
    check_number,
    check_pair,
    check_per_class,
    check_scale,
    check_sub_centers,
    check_values,
    plain_number,
)
from ltloss.float8 import FLOAT8, decoded, write_rows
from ltloss.losses.defaults import default_scale
from ltloss.numerics import spans
from ltloss.ops.logsumexp import Update
from ltloss.reference import cosine_logits

__all__ = ["FRACTION", "NOT_NEGATIVE", "POSITIVE", "Checks", "Names", "PrototypeHead"]

Checks = Mapping[str, Callable[[str, Any], object]]  # name -> what raises unless an option may have the value
Names = Mapping[str, str]
POSITIVE, NOT_NEGATIVE = partial(check_number, above=0.0), partial(check_number, at_least=0.0)
FRACTION = partial(check_number, at_least=0.0, at_most=1.0)

_DRAWN_AT_ONCE = 1 << 14  # classes of a float8 head


def _describe(value: Any) -> str:
    """Format a hyper-parameter for ``repr``: numbers as they are, vectors by shape and range, functions by name."""
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    if not isinstance(value, Tensor):
        return f"{value:g}" if isinstance(value, float) else repr(value)
    if value.dim() == 0:
        return f"{value.item():g}"
    return f"({value.numel()},) in [{value.min().item():.4g}, {value.max().item():.4g}]"


class PrototypeHead(nn.Module):
    """Prototypes (C, D) of a cosine classifier: logits s·cos θ_c and prediction argmax_c cos θ_c, without a loss.

    Args:
        num_classes: C.
        embedding_size: D.
        scale: s, the inverse temperature. None: :func:`ltloss.default_scale` of C. With ``normalize_features=False``
            that is divided by √D, the length of a feature after batch normalisation.
        normalize_features: False keeps the length of the features: the logits are s·‖x‖·cos θ_c.
        sub_centers: K, 1 to 8 prototypes per class. The nearest one determines the cosine of the class.
        device, dtype: device and dtype of the weight. Keep the weight in float32, whatever the dtype of the features:
            most updates of a half-precision weight would round to nothing. ``torch.bfloat16`` and
            ``torch.float8_e4m3fn`` are for the optimizers of :mod:`ltloss.optim`, whose rounding keeps them.

    Attributes:
        weight: parameter (C, D), or (C, K, D) with sub-centres, drawn with length ≈ 1. Pass it to the optimizer with
            ``loss.parameters()``, or pass this module to an optimizer of :mod:`ltloss.optim`.
        fused_update: that optimizer of :mod:`ltloss.optim`, or None.
        weight_exponent: (C,) int8 if the weight is float8, else None: prototype c is 2^weight_exponent[c] ·
            weight[c]. ``half()``, ``float()`` and ``to(dtype)`` leave such a weight as it is. ``load_state_dict``
            accepts float8 and wider prototypes, and converts them.

    Raises:
        ValueError, TypeError: sizes that are not integers >= 1, a scale that is not positive.

    See also: :class:`ltloss.CosineSoftmaxLoss`, the simplest loss on it;
    :meth:`ltloss.losses.count_losses.FromCounts.from_counts`, which builds a loss from class counts.

    Example:
        >>> import torch
        >>> from ltloss import PrototypeHead
        >>> head = PrototypeHead(num_classes=2, embedding_size=2, scale=10.0)
        >>> head.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 3.0]])})
        <All keys matched successfully>
        >>> head.predict(torch.tensor([[3.0, 4.0]]))
        TopK(cosine=tensor([[0.8000]]), index=tensor([[1]]))
    """

    fused_update: Update | None = None  # a copy of the module has none: the optimizer belongs to the original
    weight_exponent: Tensor | None
    _settled: tuple[str, ...] = ()  # hyper-parameters that cannot be set later: constants were computed from them
    _per_class: tuple[str, ...] = ()  # hyper-parameters that are a number or a constant vector (C,)
    _kinds: ClassVar[Names] = MappingProxyType({})  # of those, under which name their range is known
    _called: ClassVar[Names] = MappingProxyType({})  # and what messages call them: the argument
    _checks: ClassVar[Checks] = MappingProxyType({})  # of other hyper-parameters, wherever they are set

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        scale: float | None = None,
        normalize_features: bool = True,
        sub_centers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._sources: dict[str, Tensor] = {}
        num_classes = check_count("num_classes", num_classes)
        embedding_size = check_count("embedding_size", embedding_size)
        if scale is None:
            scale = default_scale(num_classes, 1.0 if normalize_features else embedding_size**0.5)
        self.num_classes, self.embedding_size = num_classes, embedding_size
        self.scale, self.normalize_features = scale, normalize_features
        self.sub_centers = check_sub_centers(sub_centers, dtype)
        check_head_dtype(dtype)
        shape = (num_classes, embedding_size) if sub_centers == 1 else (num_classes, self.sub_centers, embedding_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        exponent = torch.zeros(num_classes, device=device, dtype=torch.int8) if dtype == FLOAT8 else None
        self.register_buffer("weight_exponent", exponent)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new prototypes with uniform directions and length ≈ 1. The length sets the step size on the sphere."""
        self._draw_prototypes()
        self.replaced()

    def replaced(self) -> None:
        """Called after the prototypes were overwritten: what is known of the former ones is forgotten."""
        if self.fused_update is not None:
            self.fused_update.replaced()

    def _draw_prototypes(self) -> None:
        std, exponent = self.embedding_size**-0.5, self.weight_exponent
        if exponent is None:
            nn.init.normal_(self.weight, std=std)
        elif not self.weight.is_meta:
            for start, stop in spans(self.num_classes, _DRAWN_AT_ONCE):
                drawn = torch.randn(stop - start, self.embedding_size, device=self.weight.device)
                write_rows(self.weight, exponent, start, drawn.mul_(std))

    def _drawn_block(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """New prototypes of a few classes, where the classes are spread over ranks."""
        drawn: Tensor = torch.randn(shape, generator=generator) * self.embedding_size**-0.5
        return drawn

    @property
    def _constants_device(self) -> torch.device:
        """The device of the weight, or the CPU while the weight is on ``"meta"``: constants always hold values."""
        return torch.device("cpu") if self.weight.is_meta else self.weight.device

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._settled and (name in self.__dict__ or name in self._buffers):
            raise AttributeError(
                f"{name} of {type(self).__name__} cannot be changed: constants were computed from it. Build a new loss "
                "and load this one's state_dict into it"
            )
        if isinstance(value, np.number) or name in self._settled or name in self._checks or name == "scale":
            value = plain_number(value)
        if name in self._checks:
            self._check(name, value)
        if name == "scale":
            value = check_scale(value)
        if name in self._per_class:
            self._set_constant(name, value)
        else:
            super().__setattr__(name, value)

    def _check(self, name: str, value: Any) -> None:
        """Raise unless the option may have the value. A subclass adds what several options must satisfy together."""
        self._checks[name](name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the optimizer, which belongs to the original module."""
        return {**self.__dict__, "fused_update": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the constants with the weight, without rounding them or losing their values (``to_empty``)."""
        former = self.weight.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if FLOAT8 in (former.dtype, self.weight.dtype) and former.dtype != self.weight.dtype:
            self.weight.data = former.to(self.weight.device)
            if former.dtype != FLOAT8:
                raise TypeError(
                    f"prototypes in {former.dtype} cannot be cast to float8, which needs an exponent for each class; "
                    "build the loss with dtype=torch.float8_e4m3fn and load this one's state_dict into it"
                )
        for name, source in self._sources.items():
            self._buffers[name] = source.to(self._buffers[name].device)  # type: ignore[union-attr]
        return self

    def _keep(self, name: str, value: Tensor) -> None:
        """Register a constant (C,) as a buffer that is not in the state_dict and whose values survive ``to_empty``."""
        self._sources[name] = value.detach().to("cpu", copy=True)
        self.register_buffer(name, self._sources[name].to(self._constants_device), persistent=False)

    def _set_constant(self, name: str, value: Any) -> None:
        """Set a per-class hyper-parameter: a number as it is, a vector as a float32 constant."""
        called, kind = self._called.get(name, name), self._kinds.get(name, name)
        if isinstance(value, Tensor):
            value = value.detach().to("cpu", torch.float32)
        if value is not None or name not in ("log_prior", "class_weight"):
            value = check_per_class(called, value, self.num_classes, torch.empty(0, device="cpu"), kind=kind)
        if isinstance(value, Tensor):
            check_values(called, value, kind)  # once, here: in a training step on a GPU the check would cost time
        for former in (self.__dict__, self._buffers, self._sources):
            former.pop(name, None)
        if isinstance(value, Tensor) and value.dim():
            self._keep(name, value)
        else:
            super().__setattr__(name, plain_number(value))

    def logits(self, features: Tensor) -> Tensor:
        """Logits without margin and prior, as used for prediction.

        Args:
            features: (N, D).

        Returns:
            (N, C), dense. For large C use :meth:`predict`.
        """
        check_pair(features, self.weight)
        return self._dense_logits(features, self.weight)

    def _logit_options(self) -> dict[str, Any]:
        """Keyword arguments that tell a function of features and prototypes how this head makes its logits."""
        return {}

    def _dense_logits(self, features: Tensor, weight: Tensor) -> Tensor:
        weight = weight.detach() if weight.dtype == FLOAT8 else weight  # float8 cannot hold a gradient
        return cosine_logits(features, weight, self.scale, self.normalize_features)

    @torch.no_grad()
    def predict(self, features: Tensor, k: int = 1) -> TopK:
        """Find the k classes with the largest cosine to each feature, without the N×C logits.

        Args:
            features: (N, D).
            k: between 1 and C.

        Returns:
            ``TopK(cosine, index)``, (N, k) each, best first.

        Raises:
            ValueError, TypeError: features of another shape or dtype, a k outside [1, C].

        See also: :func:`ltloss.functional.top_k`.
        """
        return F.top_k(features, self.weight, k, **self._logit_options())

    def hyper_parameters(self) -> dict[str, Any]:
        """Return every hyper-parameter by name, in the order in which ``repr`` shows them."""
        several = {"sub_centers": self.sub_centers} if self.sub_centers > 1 else {}
        return {"scale": self.scale, "normalize_features": self.normalize_features, **several}

    def described(self) -> dict[str, str]:
        """Return every hyper-parameter as ``repr`` shows it. Vectors are read from their copy on the CPU."""
        return {name: _describe(self._sources.get(name, value)) for name, value in self.hyper_parameters().items()}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Store the hyper-parameters in the metadata. Among the tensors they would be a key that older files lack."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        getattr(destination, "_metadata", {}).setdefault(prefix[:-1], {})["hyper_parameters"] = self.described()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any) -> None:
        self._translate(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if self._other_centers(state_dict.get(prefix + "weight"), rest[-1]):
            return
        if prefix + "weight" in state_dict:
            self.replaced()
        self.warn_if_other(local_metadata.get("hyper_parameters") or {})

    def _other_centers(self, given: Any, errors: list[str]) -> bool:
        """Whether a state has another number of sub-centres than this head; if so, add an error that says it."""
        there = (given.shape[1] if given.dim() == 3 else 1) if isinstance(given, Tensor) else self.sub_centers
        if there != self.sub_centers:
            errors.append(
                f"weight holds sub_centers={there} prototypes per class, this {type(self).__name__} has "
                f"{self.sub_centers}: build it with sub_centers={there}"
            )
        return there != self.sub_centers

    def _translate(self, state_dict: Any, prefix: str) -> None:
        """Convert the prototypes of a state to float8, or from it, where this head has the other form."""
        given, key = state_dict.get(prefix + "weight"), prefix + "weight_exponent"
        if not isinstance(given, Tensor) or hasattr(given, "device_mesh") or given.is_meta or given.dim() != 2:
            return
        if self.weight_exponent is not None and given.dtype != FLOAT8:
            weight = torch.empty(given.shape, dtype=FLOAT8, device=given.device)
            exponent = torch.empty(given.shape[:1], dtype=torch.int8, device=given.device)
            write_rows(weight, exponent, 0, given)
            state_dict |= {prefix + "weight": weight, key: exponent}
        elif self.weight_exponent is None and given.dtype == FLOAT8 and key in state_dict:
            state_dict[prefix + "weight"] = decoded(given, state_dict.pop(key))

    def warn_if_other(self, saved: Mapping[str, str]) -> None:
        """Warn if a state was saved with other hyper-parameters. Class weights may differ: they follow a schedule."""
        here = self.described()
        names = [name for name in here if name != "class_weight" and saved.get(name, here[name]) != here[name]]
        if names:
            values = ", ".join(f"{name}={here[name]} (saved with {saved[name]})" for name in names)
            warnings.warn(
                f"{type(self).__name__} keeps hyper-parameters that differ from those of the loaded state: {values}",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        """Shape and hyper-parameters."""
        options = "".join(f", {name}={value}" for name, value in self.described().items())
        return f"{self.num_classes}, {self.embedding_size}{options}"
