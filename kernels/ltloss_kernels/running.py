"""Where the kernels run: on the GPU of the tensors, or in Triton's interpreter."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from ltloss_kernels.device.rows import row_norm_kernel

__all__ = ["RUNNABLE", "interpreting", "on_device", "recording", "runnable", "widened"]


RUNNABLE = (
    "kernels run on a GPU, or interpreted (slowly) where the environment variable TRITON_INTERPRET=1 is set before the "
    "first use"
)


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter; settled when they were decorated, by TRITON_INTERPRET."""
    return not isinstance(row_norm_kernel, triton.JITFunction)


def runnable(device: torch.device) -> bool:
    """Whether kernels run on tensors of this device."""
    return device.type == "cuda" or interpreting()


def recording(device: torch.device) -> bool:
    """Whether launches go into a CUDA graph now, where they cost the host nothing."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the device of this tensor inside the block.

    Raises:
        RuntimeError: kernels cannot run there.
    """
    if not runnable(tensor.device):
        raise RuntimeError(f"the tensors are on {tensor.device}, and {RUNNABLE}")
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def widened(tensor: Tensor) -> Tensor:
    """As it is; float32 for bfloat16 in the interpreter, which multiplies bfloat16 wrongly."""
    return tensor.float() if tensor.dtype == torch.bfloat16 and interpreting() else tensor
