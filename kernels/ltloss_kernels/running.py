"""Where the kernels run: on the GPU of the tensors, or in Triton's interpreter."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from ltloss_kernels.device.rows import row_norm_kernel

__all__ = ["RUNNABLE", "interpreting", "on_device", "runnable", "widened"]


RUNNABLE = (
    "kernels run on a GPU, or interpreted (slowly) where the environment variable TRITON_INTERPRET=1 is set before the "
    "first use"
)


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter; TRITON_INTERPRET decides it when they are first imported."""
    return not isinstance(row_norm_kernel, triton.JITFunction)


def runnable(device: torch.device) -> bool:
    """Whether kernels run on tensors of this device."""
    return device.type == "cuda" or interpreting()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Within the block, launch on the device of this tensor.

    Raises:
        RuntimeError: kernels cannot run on that device.
    """
    if not runnable(tensor.device):
        raise RuntimeError(f"the tensors are on {tensor.device}, and {RUNNABLE}")
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def widened(tensor: Tensor) -> Tensor:
    """The tensor; in the interpreter float32 in place of bfloat16, which it multiplies wrongly."""
    return tensor.float() if tensor.dtype == torch.bfloat16 and interpreting() else tensor
