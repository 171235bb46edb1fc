"""What would make the host wait for a GPU: an operator whose result the host has to know."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Looks(TorchDispatchMode):
    """Writes down operators that look at the data. Ours are opaque, but for ``ltloss.testing.watching``."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "equal", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A mask as index: PyTorch asks how many of its entries are set.
        mask = func._opname.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for given in args[1:2]
            for index in (given if isinstance(given, list | tuple) else ())
        )
        if mask or any(name in func._opname for name in self.NAMES):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))
