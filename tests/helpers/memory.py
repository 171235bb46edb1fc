"""What an operation allocates, seen from inside: a mode that PyTorch asks before every operator."""

from __future__ import annotations

from typing import Any

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
