"""What an operation allocates, seen from inside by a mode that PyTorch asks before every operator, and what stays."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operator returned in memory of its own.

    Use it through ``losses.watching``, which lets it see into our operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operators = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                # The memory behind it, not the view: an expanded tensor has many elements and little memory.
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


class Held(NamedTuple):
    """What this process holds: tensors, open files, and bytes of memory in use; Linux alone tells the latter two."""

    tensors: int
    files: int
    resident: int

    @classmethod
    def now(cls) -> Held:
        """After what is in cycles has gone."""
        gc.collect()
        tensors = sum(issubclass(type(item), Tensor) for item in gc.get_objects())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(tensors, len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE"))

    def since(self, before: Held) -> Held:
        """What was added."""
        return Held(*(now - then for now, then in zip(self, before, strict=True)))
