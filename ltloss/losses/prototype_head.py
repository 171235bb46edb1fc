"""What all losses have in common: the prototypes, their logits and the prediction."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ltloss import functional as F
from ltloss._types import TopK
from ltloss._validation import check_count, check_per_class, check_scale, check_sub_centers, check_values, plain_number
from ltloss.float8 import FLOAT8, decoded, write_rows
from ltloss.losses.defaults import default_scale
from ltloss.numerics import spans
from ltloss.ops.logsumexp import Update
from ltloss.reference import cosine_logits

__all__ = ["PrototypeHead"]

_DRAWN_AT_ONCE = 1 << 14  # classes of a float8 head


def _describe(value: Any) -> str:
    """A hyper-parameter for ``repr``: numbers as they are, vectors by shape and range, functions by name."""
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    if not isinstance(value, Tensor):
        return f"{value:g}" if isinstance(value, float) else repr(value)
    if value.dim() == 0:
        return f"{value.item():g}"
    return f"({value.numel()},) in [{value.min().item():.4g}, {value.max().item():.4g}]"


class PrototypeHead(nn.Module):
    """Prototypes (C, D) of a cosine classifier: logits and prediction, no loss yet.

    Args:
        num_classes: C.
        embedding_size: D.
        scale: s, the inverse temperature. None: :func:`ltloss.default_scale` of C, which without
            ``normalize_features`` is divided by √D, the length that batch normalisation gives.
        normalize_features: False keeps the length of the features: logits are s·‖x‖·cos.
        sub_centers: K, 1 to 8 prototypes a class, of which the nearest counts.
        device, dtype: of the weight. Keep it float32 whatever the dtype of the features: updates of a half-precision
            weight are lost. ``torch.bfloat16`` and ``torch.float8_e4m3fn`` are for the optimizers of
            :mod:`ltloss.optim`, which round so that none is.

    Attributes:
        weight: (C, D) parameter, with sub-centres (C, K, D), drawn with length ≈ 1. Give it to the optimizer:
            ``loss.parameters()``; or give this module to an optimizer of :mod:`ltloss.optim`, which is then in
            ``fused_update``.
        weight_exponent: (C,) int8 where the weight is float8, else None: prototype c is 2^weight_exponent[c] ·
            weight[c]. ``half()``, ``float()`` and ``to(dtype)`` leave such a weight as it is; ``load_state_dict`` takes
            either form.

    Raises:
        ValueError, TypeError: sizes that are no whole numbers from 1, a scale that is not positive.

    Example:
        >>> import torch
        >>> from ltloss import PrototypeHead
        >>> head = PrototypeHead(num_classes=2, embedding_size=2, scale=10.0)
        >>> head.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 3.0]])})
        <All keys matched successfully>
        >>> head.predict(torch.tensor([[3.0, 4.0]]))
        TopK(cosine=tensor([[0.8000]]), index=tensor([[1]]))
    """

    fused_update: Update | None = None  # the optimizer of ltloss.optim that was made for this module; a copy has none
    weight_exponent: Tensor | None
    _settled: tuple[str, ...] = ()  # hyper-parameters from which constants are made
    _per_class: tuple[str, ...] = ()  # hyper-parameters that are a number or a constant (C,)

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
        shape = (num_classes, embedding_size) if sub_centers == 1 else (num_classes, self.sub_centers, embedding_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        exponent = torch.zeros(num_classes, device=device, dtype=torch.int8) if dtype == FLOAT8 else None
        self.register_buffer("weight_exponent", exponent)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the prototypes anew: uniform directions, length ≈ 1 (the length sets the step size on the sphere)."""
        std, exponent = self.embedding_size**-0.5, self.weight_exponent
        if exponent is None:
            nn.init.normal_(self.weight, std=std)
        elif not self.weight.is_meta:
            for start, stop in spans(self.num_classes, _DRAWN_AT_ONCE):
                drawn = torch.randn(stop - start, self.embedding_size, device=self.weight.device)
                write_rows(self.weight, exponent, start, drawn.mul_(std))
        if self.fused_update is not None:
            self.fused_update.replaced()

    @property
    def _constants_device(self) -> torch.device:
        """The weight's; the CPU while the weight has no memory yet (``device="meta"``), for these hold values."""
        return torch.device("cpu") if self.weight.is_meta else self.weight.device

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._settled and (name in self.__dict__ or name in self._buffers):
            raise AttributeError(
                f"{name} of {type(self).__name__} cannot be set: constants were made from it. Build a new loss, and "
                "load this one's state_dict into it"
            )
        if isinstance(value, np.number) or name in self._settled or name == "scale":
            value = plain_number(value)
        if name == "scale":
            value = check_scale(value)
        if name in self._per_class:
            self._set_constant(name, value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: an optimizer belongs to the module that it was made for."""
        return {**self.__dict__, "fused_update": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves constants with the weight, but never rounds them, and never leaves them without their values."""
        former = self.weight.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if FLOAT8 in (former.dtype, self.weight.dtype) and former.dtype != self.weight.dtype:
            self.weight.data = former.to(self.weight.device)
            if former.dtype != FLOAT8:
                raise TypeError(
                    f"prototypes in {former.dtype} cannot be cast to float8, which needs an exponent for each class: "
                    "build the loss with dtype=torch.float8_e4m3fn and load this one's state_dict into it"
                )
        for name, source in self._sources.items():
            self._buffers[name] = source.to(self._buffers[name].device)  # type: ignore[union-attr]
        return self

    def _keep(self, name: str, value: Tensor) -> None:
        """A constant (C,), as a buffer that the state_dict leaves out, and whose values outlive ``to_empty``."""
        self._sources[name] = value.detach().to("cpu", copy=True)
        self.register_buffer(name, self._sources[name].to(self._constants_device), persistent=False)

    def _set_constant(self, name: str, value: Any) -> None:
        """Keep a number as it is, a vector as a constant in float32, in the place of whatever was there."""
        if isinstance(value, Tensor):
            value = value.detach().to("cpu", torch.float32)
        if value is not None or name not in ("log_prior", "class_weight"):
            value = check_per_class(name, value, self.num_classes, torch.empty(0, device="cpu"))
        if isinstance(value, Tensor):
            check_values(name, value)  # once, here, whatever reads them: in a training step on a GPU it would cost time
        for former in (self.__dict__, self._buffers, self._sources):
            former.pop(name, None)
        if isinstance(value, Tensor) and value.dim():
            self._keep(name, value)
        else:
            super().__setattr__(name, plain_number(value))

    def logits(self, features: Tensor) -> Tensor:
        """Logits without margin or prior, as prediction uses them: (N, D) -> (N, C).

        Dense: for large C use :meth:`predict`.
        """
        return self._dense_logits(features, self.weight)

    def _logit_options(self) -> dict[str, Any]:
        """What tells the logits of this head from cosines, for functions that take prototypes."""
        return {}

    def _dense_logits(self, features: Tensor, weight: Tensor) -> Tensor:
        weight = weight.detach() if weight.dtype == FLOAT8 else weight  # which cannot hold a gradient
        return cosine_logits(features, weight, self.scale, self.normalize_features)

    @torch.no_grad()
    def predict(self, features: Tensor, k: int = 1) -> TopK:
        """The k classes with the largest cosine: (N, D) -> ``TopK(cosine (N, k), index (N, k))``, without N×C."""
        return F.top_k(features, self.weight, k, **self._logit_options())

    def hyper_parameters(self) -> dict[str, Any]:
        """Every hyper-parameter by name, in the order in which ``repr`` shows them."""
        several = {"sub_centers": self.sub_centers} if self.sub_centers > 1 else {}
        return {"scale": self.scale, "normalize_features": self.normalize_features, **several}

    def described(self) -> dict[str, str]:
        """Every hyper-parameter in words; vectors by their values on the CPU, for which nothing waits."""
        return {name: _describe(self._sources.get(name, value)) for name, value in self.hyper_parameters().items()}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Note the hyper-parameters in the metadata: among the tensors they would be a key that older files lack."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        getattr(destination, "_metadata", {}).setdefault(prefix[:-1], {})["hyper_parameters"] = self.described()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any) -> None:
        self._translate(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if self._other_centers(state_dict.get(prefix + "weight"), rest[-1]):
            return
        if self.fused_update is not None and prefix + "weight" in state_dict:
            self.fused_update.replaced()
        self.warn_if_other(local_metadata.get("hyper_parameters") or {})

    def _other_centers(self, given: Any, errors: list[str]) -> bool:
        """Whether a state has other sub-centres than this head, which is then said in words beside the shapes."""
        there = (given.shape[1] if given.dim() == 3 else 1) if isinstance(given, Tensor) else self.sub_centers
        if there != self.sub_centers:
            errors.append(
                f"weight holds sub_centers={there} prototypes a class, this {type(self).__name__} {self.sub_centers}: "
                f"build it with sub_centers={there}"
            )
        return there != self.sub_centers

    def _translate(self, state_dict: Any, prefix: str) -> None:
        """Prototypes of a state that were kept in float8, or were not, in the form of this head's."""
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
        """Warn where a state was saved under other hyper-parameters; class weights may follow a schedule."""
        here = self.described()
        names = [name for name in here if name != "class_weight" and saved.get(name, here[name]) != here[name]]
        if names:
            values = ", ".join(f"{name}={here[name]} (saved with {saved[name]})" for name in names)
            warnings.warn(
                f"{type(self).__name__} keeps hyper-parameters that are not those of the loaded state: {values}",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        """Shape and hyper-parameters."""
        options = "".join(f", {name}={value}" for name, value in self.described().items())
        return f"{self.num_classes}, {self.embedding_size}{options}"
