"""Write a head into one safetensors file, and read it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltloss._files import write_file
from ltloss.distributed.batch_gather import all_gather_metadata
from ltloss.distributed.layout import Layout, blocks, local
from ltloss.float8 import FLOAT8, decoded
from ltloss.interop._fill import write_prototypes
from ltloss.losses.prototype_head import PrototypeHead

__all__ = ["export_safetensors", "import_safetensors"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    FLOAT8: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def export_safetensors(head: PrototypeHead, path: str | Path) -> None:
    """Write the state_dict of a head into one safetensors file; all ranks call it, rank 0 writes.

    Args:
        head: sharded or not.
        path: the file to write. It either keeps its former content or gets all of the new one.

    Raises:
        OSError: rank 0 cannot write; the other ranks raise :class:`ltloss.distributed.DistributedError`.

    See also: :func:`import_safetensors`, which reads the file; :func:`ltloss.export.export_head`, for a model that runs
    without this package.

    Example:
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.interop import export_safetensors, import_safetensors
        >>> trained, fresh = ArcFaceLoss(10, 4), ArcFaceLoss(10, 4)
        >>> export_safetensors(trained, "head.safetensors")
        >>> import_safetensors(fresh, "head.safetensors")
        >>> bool((trained.weight == fresh.weight).all())
        True
    """
    layout, state = Layout.of(head.weight), head.state_dict()
    rows = (block for tensor in state.values() for block in blocks(tensor))  # each block is a collective of all ranks
    error: Exception | None = None
    try:
        if layout.rank == 0:
            content = map(_bytes, rows)
            write_file(Path(path), chain([_safetensors_header(state, head.described())], content))
    except OSError as failure:
        error = failure
    for _ in rows:  # other ranks, and rank 0 after an error, must take part in the blocks that are left
        pass
    all_gather_metadata([], error, layout.group, layout.device)


def _bytes(block: Tensor) -> memoryview:
    return block.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _safetensors_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    # The library's own writer needs all tensors whole in memory.
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.element_size()
        place = [offset, offset + size]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _rows(weight: Tensor, exponent: Tensor | None) -> Tensor:
    return weight if exponent is None else decoded(weight, exponent)


def import_safetensors(head: PrototypeHead, path: str | Path) -> None:
    """Fill a head with the tensors of a safetensors file; each rank reads its own classes.

    Float8 prototypes can be read into a head of any dtype, and prototypes of any dtype into a float8 head.

    Args:
        head: sharded or not. Every tensor of its state_dict must be in the file, in the same shape.
        path: the file to read.

    Raises:
        ImportError: the safetensors package is not installed.
        ValueError: the file is damaged, or a tensor is missing or has another shape. The head is then unchanged.

    See also: :func:`export_safetensors`, which writes the file.

    Example:
        >>> from ltloss import ArcFaceLoss, CosFaceLoss
        >>> from ltloss.interop import export_safetensors, import_safetensors
        >>> export_safetensors(ArcFaceLoss(10, 4), "head.safetensors")
        >>> import_safetensors(CosFaceLoss(10, 4), "head.safetensors")
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("import_safetensors needs the safetensors package: pip install safetensors") from error
    wanted = head.state_dict()
    start, stop = Layout.of(head.weight).span()
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or damaged ({error})") from error
    with opened as file:
        names = set(file.keys())
        as_kept = (head.weight_exponent is None) == ("weight_exponent" not in names)
        if not as_kept:
            wanted.pop("weight_exponent", None)
        for name, tensor in wanted.items():
            there = tuple(file.get_slice(name).get_shape()) if name in names else "missing"
            if there != tuple(tensor.shape):
                raise ValueError(f"{path}: tensor {name} is {there} there and {tuple(tensor.shape)} in the head")
        for name, tensor in wanted.items():
            sharded = hasattr(tensor, "device_mesh")
            if name == "weight" and not as_kept:
                exponent = file.get_slice("weight_exponent")[start:stop] if "weight_exponent" in names else None
                write_prototypes(head, _rows(file.get_slice(name)[start:stop], exponent))
            else:
                local(tensor).copy_(file.get_slice(name)[start:stop] if sharded else file.get_tensor(name))
        metadata = file.metadata()
    head.replaced()
    head.warn_if_other(metadata or {})
