"""The class centres that InsightFace's PartialFC saves, one file a rank."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ltloss.distributed.layout import Layout
from ltloss.interop._fill import fill
from ltloss.losses.prototype_head import PrototypeHead

__all__ = ["import_insightface"]

# N is the rank. From the newest arcface_torch to the oldest.
_KINDS = ("checkpoint_gpu_N.pt", "softmax_fc_gpu_N.pt", "rank_N_softmax_weight.pt")


def import_insightface(head: PrototypeHead, files: str | Path | Sequence[str | Path]) -> None:
    """Fill a head with the class centres that InsightFace's PartialFC saved, one file per rank N of its job.

    Args:
        head: sharded or not, over any number of ranks.
        files: a folder with ``checkpoint_gpu_N.pt``, ``softmax_fc_gpu_N.pt`` or ``rank_N_softmax_weight.pt``; or one
            file, or several. Files of these names are put in the order of N, files of other names stay in the order
            given. Each holds the tensor ``weight`` (classes of rank N, D) or is that tensor. They are read one at a
            time with ``weights_only=True``; those of PyTorch before 1.6 too.

    Raises:
        FileNotFoundError: no such files, or that of a rank is missing.
        ValueError: files of several kinds or of one rank; a damaged file or one that holds code; different D; together
            not the head's shape. Nothing was changed then.

    Example:
        >>> import torch
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.interop import import_insightface
        >>> torch.save({"weight": torch.randn(6, 4)}, "softmax_fc_gpu_0.pt")
        >>> torch.save({"weight": torch.randn(4, 4)}, "softmax_fc_gpu_1.pt")
        >>> import_insightface(ArcFaceLoss(10, 4), ".")

    Source: https://github.com/deepinsight/insightface, ``recognition/arcface_torch``.
    """
    paths = _paths(files)
    start, stop = Layout.of(head.weight).span()
    first, width, rows = 0, 0, []
    for path in paths:
        shard = _weight(path)
        width = width or shard.shape[1]
        if shard.shape[1] != width:
            raise ValueError(f"{paths[0]} holds prototypes with D = {width}, {path} with D = {shard.shape[1]}")
        rows.append(shard[max(start - first, 0) : max(stop - first, 0)].clone())  # the rest of the file is let go
        first += shard.shape[0]
    origin = f"{paths[0]} to {paths[-1].name}" if len(paths) > 1 else str(paths[0])
    fill(head, (first, width), origin, torch.cat(rows))


def _kind(path: Path) -> str:
    return re.sub(r"\d+", "N", path.name)


def _rank(path: Path) -> int:
    return int("".join(filter(str.isdecimal, path.name)))


def _paths(files: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files in the order of their ranks."""
    if isinstance(files, str | os.PathLike):
        given = Path(files)
        if not given.is_dir():
            return [given]
        paths = [path for path in given.iterdir() if _kind(path) in _KINDS]
    else:
        paths = [Path(file) for file in files]
    if not paths:
        raise FileNotFoundError(f"files must be or hold {', '.join(_KINDS)} of the ranks N; got none in {files}")
    kinds = sorted({_kind(path) for path in paths})
    if not set(kinds) <= set(_KINDS):
        return paths
    paths.sort(key=_rank)
    ranks = [_rank(path) for path in paths]
    if len(kinds) > 1 or len(set(ranks)) < len(ranks):
        raise ValueError(f"files must be of one kind and one per rank; got {', '.join(kinds)} of the ranks {ranks}")
    missing = sorted(set(range(ranks[-1])) - set(ranks))
    if missing:
        raise FileNotFoundError(f"{paths[0].parent} lacks the {kinds[0]} of the ranks {missing}")
    return paths


def _weight(path: Path) -> Tensor:
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # PyTorch cannot map the files that it wrote before 1.6
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever the bytes make of the reader
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values, which is not read"
        ) from error
    for key in ("state_dict_softmax_fc", "weight"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, Tensor) or content.dim() != 2:
        raise ValueError(f"{path} holds no tensor 'weight' (classes of the rank, D)")
    return content
