"""Prototypes to and from other files, and more classes for a trained head.

Nothing here puts all classes into one memory: each rank reads its own block, and blocks are written one by one.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor, nn

from ltloss._validation import check_count
from ltloss.distributed import collectives as comm
from ltloss.distributed.batch_gather import agree
from ltloss.distributed.centers import ShardedCenters
from ltloss.distributed.class_parallel import ClassParallel
from ltloss.distributed.layout import Layout, local
from ltloss.losses.class_centers import ClassCenters
from ltloss.losses.prototype_head import PrototypeHead

__all__ = [
    "add_classes",
    "export_safetensors",
    "import_insightface",
    "import_pytorch_metric_learning",
    "import_safetensors",
]

Head = TypeVar("Head", bound=PrototypeHead)
Module = TypeVar("Module", bound=nn.Module)

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def _layout(head: PrototypeHead) -> Layout:
    return Layout.of(head.weight)


def _blocks(tensor: Tensor, layout: Layout) -> Iterator[Tensor]:
    """The blocks of a tensor one after the other, on every rank; an ordinary tensor is one block."""
    if not hasattr(tensor, "device_mesh"):
        yield tensor.detach()
        return
    own = local(tensor)
    for class_rank in range(layout.class_ranks):
        mine = class_rank == layout.class_rank
        block = own if mine else own.new_empty(layout.size(class_rank), *own.shape[1:])
        yield comm.broadcast(block, class_rank, layout.class_group)


def export_safetensors(head: PrototypeHead, path: str | Path) -> None:
    """Write the state_dict of a head into one safetensors file; all ranks call it, rank 0 writes.

    Args:
        head: sharded or not.
        path: of the file, which either keeps its former content or gets all of the new one.

    Raises:
        OSError: rank 0 cannot write (elsewhere :class:`DistributedError`).

    Example:
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.distributed import export_safetensors, import_safetensors
        >>> trained, fresh = ArcFaceLoss(10, 4), ArcFaceLoss(10, 4)
        >>> export_safetensors(trained, "head.safetensors")
        >>> import_safetensors(fresh, "head.safetensors")
        >>> bool((trained.weight == fresh.weight).all())
        True
    """
    layout, target = _layout(head), Path(path)
    temporary = target.with_name(target.name + ".tmp")
    error: Exception | None = None
    file: BinaryIO | None = None
    try:
        if layout.rank == 0:
            file = temporary.open("wb")
            file.write(_safetensors_header(head.state_dict()))
    except OSError as failure:
        error = failure
    for tensor in head.state_dict().values():
        for block in _blocks(tensor, layout):  # all of them, even after an error: the other ranks take part
            if file is not None and error is None:
                try:
                    file.write(block.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
                except OSError as failure:
                    error = failure
    error = _closed(file, temporary, target, error)
    agree([], error, layout.group, layout.device)


def _safetensors_header(tensors: Mapping[str, Tensor]) -> bytes:
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.element_size()
        place = [offset, offset + size]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _closed(file: BinaryIO | None, temporary: Path, target: Path, error: Exception | None) -> Exception | None:
    """Flush and rename, or remove what was begun; the error of either."""
    if file is None:
        return error
    try:
        with file:
            if error is None:
                file.flush()
                os.fsync(file.fileno())
        if error is None:
            os.replace(temporary, target)
    except OSError as failure:
        error = failure
    if error is not None:
        temporary.unlink(missing_ok=True)
    return error


def import_safetensors(head: PrototypeHead, path: str | Path) -> None:
    """Fill a head with the tensors of a safetensors file, each rank reading its own classes.

    Args:
        head: sharded or not; every tensor of its state_dict must be in the file, in the same shape.
        path: of the file.

    Raises:
        ValueError: the file is damaged, or a tensor is missing or has another shape; nothing was changed then.

    Example:
        >>> from ltloss import ArcFaceLoss, CosFaceLoss
        >>> from ltloss.distributed import export_safetensors, import_safetensors
        >>> export_safetensors(ArcFaceLoss(10, 4), "head.safetensors")
        >>> import_safetensors(CosFaceLoss(10, 4), "head.safetensors")
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        try:
            entries: dict[str, Any] = json.loads(file.read(min(length, size)))
            places = {name: _place(entry, 8 + length, size) for name, entry in entries.items() if name[:2] != "__"}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no safetensors file, or damaged ({error})") from error
        wanted = head.state_dict()
        for name, tensor in wanted.items():
            there = places[name][1] if name in places else "missing"
            if there != tuple(tensor.shape):
                raise ValueError(f"{path}: tensor {name} is {there} there and {tuple(tensor.shape)} in the head")
        for name, tensor in wanted.items():
            dtype, shape, offset = places[name]
            own = local(tensor)
            start = _layout(head).span()[0] if hasattr(tensor, "device_mesh") else 0
            row = math.prod(shape[1:]) * dtype.itemsize
            file.seek(offset + start * row)
            content = bytearray(file.read(own.numel() * dtype.itemsize))
            if content:
                own.copy_(torch.frombuffer(content, dtype=dtype).view(own.shape))


def _place(entry: dict[str, Any], data: int, size: int) -> tuple[torch.dtype, tuple[int, ...], int]:
    dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if stop - start != math.prod(shape) * dtype.itemsize or data + stop > size:
        raise ValueError("a tensor does not fit the file")
    return dtype, shape, data + start


def _fill(head: PrototypeHead, found: tuple[int, int], origin: str, read: Callable[[int, int], Tensor]) -> None:
    """Put rows ``read(start, stop)`` into this rank's block."""
    wanted = tuple(head.weight.shape)
    if found != wanted:
        raise ValueError(f"{origin} holds prototypes {found} (C, D); the head has {wanted}")
    start, stop = _layout(head).span()
    with torch.no_grad():
        local(head.weight).copy_(read(start, stop))


def import_insightface(head: PrototypeHead, files: str | Path | Sequence[str | Path]) -> None:
    """Fill a head with the class centres that InsightFace's PartialFC saved, one file per rank of its job.

    Args:
        head: sharded or not, over any number of ranks.
        files: a folder with ``softmax_fc_gpu_0.pt``, ``softmax_fc_gpu_1.pt``, ... (or ``rank_0_softmax_weight.pt``,
            ...), or the files in the order of their ranks. Each holds the tensor ``weight`` or is that tensor. They are
            read with ``weights_only=True``.

    Raises:
        FileNotFoundError: no such files, or a rank's is missing.
        ValueError: the shards together do not have the head's shape.

    Example:
        >>> import torch
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.distributed import import_insightface
        >>> torch.save({"weight": torch.randn(6, 4)}, "softmax_fc_gpu_0.pt")
        >>> torch.save({"weight": torch.randn(4, 4)}, "softmax_fc_gpu_1.pt")
        >>> import_insightface(ArcFaceLoss(10, 4), ".")
    """
    paths = [Path(file) for file in files] if isinstance(files, Sequence) and not isinstance(files, str) else None
    if paths is None:
        assert isinstance(files, str | Path)
        paths = _shards_in(Path(files))
    shards = [_insightface_weight(path) for path in paths]
    starts = [0]
    for shard in shards:
        starts.append(starts[-1] + shard.shape[0])
    widths = {shard.shape[1] for shard in shards}
    if len(widths) != 1:
        raise ValueError(f"{paths[0].parent}: the shards have different widths {sorted(widths)}")

    def read(start: int, stop: int) -> Tensor:
        spans = zip(shards, starts, strict=False)
        return torch.cat([shard[max(start - first, 0) : max(stop - first, 0)] for shard, first in spans])

    _fill(head, (starts[-1], widths.pop()), str(paths[0].parent), read)


def _shards_in(folder: Path) -> list[Path]:
    pattern = re.compile(r"(?:softmax_fc_gpu_(\d+)|rank_(\d+)_softmax_weight)\.pt")
    found = {}
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match:
            found[int(match[1] or match[2])] = path
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise FileNotFoundError(f"{folder} lacks softmax_fc_gpu_N.pt for the ranks {missing}")
    return [found[rank] for rank in sorted(found)]


def _insightface_weight(path: Path) -> Tensor:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(content, dict):
        content = content.get("state_dict_softmax_fc", content)
        content = content.get("weight") if isinstance(content, dict) else None
    if not isinstance(content, Tensor) or content.dim() != 2:
        raise ValueError(f"{path} holds no tensor 'weight' (classes of the rank, D)")
    return content


def import_pytorch_metric_learning(head: PrototypeHead, loss: nn.Module | Mapping[str, Tensor] | Tensor) -> None:
    """Fill a head with the ``W`` of a pytorch-metric-learning loss, which stands transposed, (D, C).

    Args:
        head: sharded or not.
        loss: the loss, its state_dict, or ``W`` itself; the same on all ranks.

    Raises:
        ValueError: no ``W`` there, or of another shape.

    Example:
        >>> import torch
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.distributed import import_pytorch_metric_learning
        >>> import_pytorch_metric_learning(ArcFaceLoss(10, 4), {"W": torch.randn(4, 10)})
    """
    given = loss.state_dict() if isinstance(loss, nn.Module) else loss
    matrix = given.get("W") if isinstance(given, Mapping) else given
    if not isinstance(matrix, Tensor) or matrix.dim() != 2:
        raise ValueError(
            "loss must be or hold a tensor W (D, C), as pytorch-metric-learning's classification losses do"
        )
    width, classes = matrix.shape
    _fill(head, (classes, width), "W of pytorch-metric-learning", lambda start, stop: matrix.t()[start:stop])


def add_classes(head: Head, count: int, **per_class: Tensor) -> Head:
    """A head with ``count`` more classes at the end: the old rows (and centres) as they are, the new ones drawn anew.

    Args:
        head: sharded or not; it stays as it is. All ranks call it alike. Optimizers do not know the new weight yet.
        count: how many, >= 1.
        per_class: the new (C + count,) value of every margin, prior, weight or count that is a vector.

    Raises:
        ValueError: a vector is missing, or has another length.

    Example:
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.distributed import add_classes
        >>> add_classes(ArcFaceLoss(10, 4), 3).weight.shape
        torch.Size([13, 4])
    """
    count = check_count("count", count)
    classes = head.num_classes + count
    vectors = {name for name, buffer in head.named_buffers(recurse=False) if buffer.shape == (head.num_classes,)}
    if vectors != set(per_class):
        raise ValueError(
            f"add_classes needs the vectors {sorted(vectors)} for {classes} classes; got {sorted(per_class)}"
        )
    for name, vector in per_class.items():
        if vector.shape != (classes,):
            raise ValueError(f"{name} must have the shape ({classes},); got {tuple(vector.shape)}")
    former = _layout(head)
    layout = dataclasses.replace(former, num_classes=classes)
    larger = _shallow(head)
    larger.num_classes = classes
    if isinstance(larger, ClassParallel):
        larger.rearrange(layout)
    larger.weight = nn.Parameter(_zeros(head.weight, layout), requires_grad=head.weight.requires_grad)
    larger.reset_parameters()
    _copy_rows(head.weight, former, larger.weight, layout)
    for name, vector in per_class.items():
        old = head.get_buffer(name)
        larger.register_buffer(name, vector.detach().to(old.device, old.dtype, copy=True), persistent=False)
    for name, child in head.named_children():
        if isinstance(child, ClassCenters):
            setattr(larger, name, _more_centers(child, former, layout))
    return larger


def _shallow(module: Module) -> Module:
    """A module of its own that shares every tensor."""
    copied = copy.copy(module)
    for part in ("_parameters", "_buffers", "_modules"):
        setattr(copied, part, dict(getattr(module, part)))
    return copied


def _zeros(like: Tensor, layout: Layout) -> Tensor:
    start, stop = layout.span()
    return layout.place(local(like).new_zeros(stop - start, *like.shape[1:]), *like.shape[1:])


def _copy_rows(old: Tensor, former: Layout, new: Tensor, layout: Layout) -> None:
    """The first rows of ``new`` become those of ``old``, a block at a time."""
    target, (start, stop), first = local(new), layout.span(), 0
    for block in _blocks(old, former):
        low, high = max(start, first), min(stop, first + block.shape[0])
        if low < high:
            target[low - start : high - start] = block[low - first : high - first]
        first += block.shape[0]


def _more_centers(centers: ClassCenters, former: Layout, layout: Layout) -> ClassCenters:
    larger = _shallow(centers)
    if isinstance(larger, ShardedCenters):
        larger.layout = layout
    for name in ("centers", "counts"):
        old = centers.get_buffer(name)
        larger._buffers[name] = new = _zeros(old, layout)
        _copy_rows(old, former, new, layout)
    return larger
