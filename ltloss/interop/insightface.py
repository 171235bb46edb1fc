"""The class centres that InsightFace's PartialFC saves, one file a rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ltloss.interop._fill import fill
from ltloss.losses.prototype_head import PrototypeHead

__all__ = ["import_insightface"]


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
        >>> from ltloss.interop import import_insightface
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

    fill(head, (starts[-1], widths.pop()), str(paths[0].parent), read)


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
