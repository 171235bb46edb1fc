"""InsightFace's margins and PartialFC computed by ltloss, and a reader for the class centres that InsightFace saves.

In ``recognition/arcface_torch/train_v2.py`` only the imports change, to ``from ltloss.interop.insightface import
CombinedMarginLoss, PartialFC_V2``. InsightFace itself is not needed. ``docs/coming-from.md`` says what differs.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltloss import functional as F
from ltloss._validation import MOST_COSINE_MARGIN, check_count, check_number, check_type
from ltloss.distributed import collectives as comm
from ltloss.distributed.batch_gather import BatchGather, gather_supervised
from ltloss.distributed.layout import Layout, class_mesh, mesh_device
from ltloss.distributed.logsumexp import ClassShard
from ltloss.distributed.sampling import ClassSampler, seeded
from ltloss.extend import Bend, logsumexp_stats, margin_losses, reduce_losses
from ltloss.interop._fill import check_shape, fill
from ltloss.losses.prototype_head import PrototypeHead

__all__ = ["ArcFace", "CombinedMarginLoss", "CosFace", "PartialFC_V2", "import_insightface"]

# Names of the files that hold class centres, N being the rank, from the newest arcface_torch to the oldest.
_KINDS = ("checkpoint_gpu_N.pt", "softmax_fc_gpu_N.pt", "rank_N_softmax_weight.pt")


@dataclasses.dataclass(frozen=True)
class ArcFace:
    """ArcFace as InsightFace computes it: the target logit is s·cos(θ + margin), also where θ + margin exceeds π.

    The gradient takes d cos(θ + margin) / d cos θ as 1.

    Args:
        s: scale, positive.
        margin: in radians, in [-π, π].

    Raises:
        ValueError, TypeError: a scale or a margin out of range, or no number.

    See also: :class:`ltloss.ArcFaceLoss`, which holds the prototypes too; :class:`PartialFC_V2`, which takes this
    object.

    Example:
        >>> from ltloss.interop.insightface import ArcFace, PartialFC_V2
        >>> head = PartialFC_V2(ArcFace(s=64.0, margin=0.5), embedding_size=16, num_classes=100)
    """

    s: float = 64.0
    margin: float = 0.5

    def __post_init__(self) -> None:
        check_number("s", self.s, above=0.0)
        check_number("margin", self.margin, at_least=-math.pi, at_most=math.pi)

    def options(self) -> dict[str, Any]:
        """The options for :func:`ltloss.functional.margin_cross_entropy`."""
        straight = {"beyond_pi": "cosine", "margin_gradient": "straight_through"}
        return {"scale": self.s, "angular_margin": self.margin, **straight}


@dataclasses.dataclass(frozen=True)
class CosFace:
    """CosFace: the target logit is s·(cos θ − m).

    Args:
        s: scale, positive.
        m: margin in [-2, 2], subtracted from the cosine.

    Raises:
        ValueError, TypeError: a scale or a margin out of range, or no number.

    See also: :class:`ltloss.CosFaceLoss`, which holds the prototypes too; :class:`PartialFC_V2`, which takes this
    object.

    Example:
        >>> from ltloss.interop.insightface import CosFace, PartialFC_V2
        >>> head = PartialFC_V2(CosFace(s=64.0, m=0.4), embedding_size=16, num_classes=100)
    """

    s: float = 64.0
    m: float = 0.40

    def __post_init__(self) -> None:
        check_number("s", self.s, above=0.0)
        check_number("m", self.m, at_least=-MOST_COSINE_MARGIN, at_most=MOST_COSINE_MARGIN)

    def options(self) -> dict[str, Any]:
        """The options for :func:`ltloss.functional.margin_cross_entropy`."""
        return {"scale": self.s, "cosine_margin": self.m}


@dataclasses.dataclass(frozen=True)
class CombinedMarginLoss:
    """:class:`ArcFace` with margin m2 for margins (1, m2, 0); :class:`CosFace` with margin m3 for margins (1, 0, m3).

    Args:
        s: scale, positive.
        m1, m2, m3: the margins, m2 in radians.
        interclass_filtering_threshold: the cosine of another class above it counts as 0; 0 turns the filter off.

    Raises:
        ValueError, TypeError: margins of another form, which InsightFace does not compute, or values out of range.

    See also: :class:`ltloss.CombinedMarginLoss`, which holds the prototypes too; :class:`PartialFC_V2`, which takes
    this object.

    Example:
        >>> from ltloss.interop.insightface import CombinedMarginLoss, PartialFC_V2
        >>> margin_loss = CombinedMarginLoss(64, 1.0, 0.5, 0.0, interclass_filtering_threshold=0)
        >>> head = PartialFC_V2(margin_loss, embedding_size=16, num_classes=100)
    """

    s: float
    m1: float
    m2: float
    m3: float
    interclass_filtering_threshold: float = 0

    def __post_init__(self) -> None:
        check_number("interclass_filtering_threshold", self.interclass_filtering_threshold)
        m1, m2, m3 = (
            check_number(name, getattr(self, name), at_least=-most, at_most=most)
            for name, most in (("m1", math.inf), ("m2", math.pi), ("m3", MOST_COSINE_MARGIN))
        )
        if m1 != 1.0 or m3 < 0.0 or (m2 != 0.0 and m3 != 0.0):
            raise ValueError(
                "m1, m2 and m3 must be 1, m2 and 0 (ArcFace) or 1, 0 and m3 > 0 (CosFace), for InsightFace computes no "
                f"other margin; got m1={m1}, m2={m2} and m3={m3}. ltloss.CombinedMarginLoss has all three at once"
            )
        self._margin()

    def _margin(self) -> ArcFace | CosFace:
        return CosFace(self.s, self.m3) if self.m3 > 0.0 else ArcFace(self.s, self.m2)

    def options(self) -> dict[str, Any]:
        """The options for :func:`ltloss.functional.margin_cross_entropy`."""
        return self._margin().options()


class _FirstRanksHoldMore(Layout):
    """InsightFace's blocks of consecutive classes: 10 classes on four ranks are 3, 3, 2, 2 (a DTensor: 3, 3, 3, 1)."""

    def span(self, class_rank: int | None = None) -> tuple[int, int]:
        """(start, stop) of the classes of a class rank, by default this one."""
        rank = self.class_rank if class_rank is None else class_rank
        size, more = divmod(self.num_classes, self.class_ranks)
        start = rank * size + min(rank, more)
        return start, start + size + (rank < more)


class PartialFC_V2(nn.Module):
    """``PartialFC_V2`` of ``arcface_torch``: the class centres spread over the ranks, without N×C logits.

    Without ``torch.distributed`` it holds all classes. With it, every rank builds and calls the module.

    Args:
        margin_loss: :class:`CombinedMarginLoss`, :class:`ArcFace` or :class:`CosFace` of this module.
        embedding_size: D.
        num_classes: C.
        sample_rate: below 1, a training step uses the classes of the batch and random others, up to this fraction of
            each rank's classes. The logits are not corrected for it.
        fp16: pass embeddings on in float16. Their gradient is float16 too, so scale the loss.

    Attributes:
        weight: (num_local, D) float32 parameter, the centres of this rank's classes. It is an ordinary tensor and the
            only entry of the state_dict. On the same number of ranks, it loads what InsightFace saves as
            ``state_dict_softmax_fc``, with the state of the optimizer, and InsightFace loads what it saves. For
            another number of ranks :func:`import_insightface` reads the centres.
        num_local, class_start: how many classes this rank has, and the first of them.

    Raises:
        ValueError, TypeError: another margin, sizes that are no whole numbers from 1, a rate outside (0, 1].

    See also: :func:`ltloss.distributed.parallelize`, for any loss of this package; :func:`import_insightface`, to load
    its checkpoints.

    Source: An et al., Killing two birds with one stone: efficient and robust training of face recognition CNNs by
    partial FC, CVPR 2022.

    Example:
        >>> import torch
        >>> from ltloss.interop.insightface import CombinedMarginLoss, PartialFC_V2
        >>> head = PartialFC_V2(CombinedMarginLoss(64, 1.0, 0.5, 0.0), embedding_size=16, num_classes=100)
        >>> optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        >>> head(torch.randn(4, 16, requires_grad=True), torch.tensor([0, 7, 99, 3])).backward()
        >>> optimizer.step()
        >>> head.state_dict()["weight"].shape
        torch.Size([100, 16])
    """

    def __init__(
        self,
        margin_loss: ArcFace | CombinedMarginLoss | CosFace,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(margin_loss, ArcFace | CombinedMarginLoss | CosFace):
            raise TypeError(
                "margin_loss must be a CombinedMarginLoss, ArcFace or CosFace of ltloss.interop.insightface; got "
                f"{type(margin_loss).__name__}"
            )
        check_type("fp16", fp16, bool)
        self.margin_softmax, self.fp16 = margin_loss, fp16
        self.embedding_size = check_count("embedding_size", embedding_size)
        self.num_classes = check_count("num_classes", num_classes)
        self.sample_rate = check_number("sample_rate", sample_rate, above=0.0, at_most=1.0)
        self.sampler = ClassSampler(sample_rate, seed=0, unbiased=False) if sample_rate < 1.0 else None
        mesh = class_mesh()
        self._arrange(
            _FirstRanksHoldMore(mesh, num_classes, torch.device("cpu") if mesh is None else mesh_device(mesh))
        )
        self.class_start, stop = self.layout.span()
        self.num_local = stop - self.class_start
        self.weight = nn.Parameter(torch.empty(self.num_local, embedding_size))
        self.reset_parameters()

    def _arrange(self, layout: Layout) -> None:
        self.layout = layout
        # DDP divides the backbone's gradients by the number of ranks. Those of the embeddings are multiplied by it.
        self.batch = BatchGather(layout, gradient_factor=float(layout.ranks))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the centres anew from N(0, 0.01²). Each rank draws different numbers, also where all have one seed."""
        layout = self.layout
        seed = comm.broadcast(torch.randint(1 << 62, (1,)).to(layout.device), 0, layout.group)
        drawn = torch.empty(self.weight.shape)
        self.weight.copy_(drawn.normal_(std=0.01, generator=seeded(int(seed), layout.rank)))

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """Loss of the global batch, a scalar, from this rank's embeddings (n, D) and labels (n,) or (n, 1).

        The gradient of the embeddings is multiplied by the number of ranks, by which DDP divides it again.
        """
        if self.layout.mesh is None and self.layout.device != self.weight.device:  # the module was moved
            self._arrange(dataclasses.replace(self.layout, device=self.weight.device))
        embeddings = local_embeddings.half() if self.fp16 else local_embeddings
        weight = self.layout.place(self.weight)
        batch = gather_supervised(self.batch, embeddings, weight, local_labels.reshape(-1), -100)
        shard = ClassShard(self.layout) if self.layout.mesh is not None else None
        if self.sampler is not None and self.training:
            shard = self.sampler.draw(batch.labels, self.weight, self.layout)
        given, options = (batch.features, weight, batch.labels), self.margin_softmax.options()
        threshold = getattr(self.margin_softmax, "interclass_filtering_threshold", 0)
        if threshold <= 0:
            return F.margin_cross_entropy(*given, shard=shard, **options)

        def filtered(cosine: Tensor, labels: Tensor) -> Bend:
            return Bend(torch.full_like(cosine, threshold))

        stats = logsumexp_stats(*given, scale=options.pop("scale"), bend=filtered, shard=shard)
        return reduce_losses(margin_losses(stats, **options), stats.labels)

    def extra_repr(self) -> str:
        """Shape and margin."""
        return f"{self.margin_softmax}, {self.embedding_size}, {self.num_classes}, sample_rate={self.sample_rate:g}"


def import_insightface(head: PrototypeHead | PartialFC_V2, files: str | Path | Sequence[str | Path]) -> None:
    """Fill a head with the class centres that InsightFace's PartialFC saved, one file per rank N of its job.

    Args:
        head: sharded or not, over any number of ranks; or a :class:`PartialFC_V2`.
        files: a folder with ``checkpoint_gpu_N.pt``, ``softmax_fc_gpu_N.pt`` or ``rank_N_softmax_weight.pt``; or one
            file, or several. Files of these names are sorted by N, files of other names stay in the order given. Each
            holds the tensor ``weight`` (classes of rank N, D) or is that tensor. Files are read one at a time with
            ``weights_only=True``; PyTorch before 1.6 may have written them.

    Raises:
        FileNotFoundError: no such files, or the file of a rank is missing.
        ValueError: files of several kinds, or two of one rank; a file that is damaged or holds code; files with
            different D; centres that together do not have the head's shape. The head is then unchanged.

    See also: :func:`ltloss.interop.import_pytorch_metric_learning`; :func:`ltloss.interop.import_safetensors`.

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
    layout = head.layout if isinstance(head, PartialFC_V2) else Layout.of(head.weight)
    start, stop = layout.span()
    first, width, rows = 0, 0, []
    for path in paths:
        shard = _weight(path)
        width = width or shard.shape[1]
        if shard.shape[1] != width:
            raise ValueError(f"{paths[0]} holds prototypes with D = {width}, {path} with D = {shard.shape[1]}")
        rows.append(shard[max(start - first, 0) : max(stop - first, 0)].clone())  # so that the file can be released
        first += shard.shape[0]
    origin = f"{paths[0]} to {paths[-1].name}" if len(paths) > 1 else str(paths[0])
    if isinstance(head, PartialFC_V2):
        check_shape((first, width), (head.num_classes, head.embedding_size), origin)
        head.weight.data.copy_(torch.cat(rows))
    else:
        fill(head, (first, width), origin, torch.cat(rows))


def _kind(path: Path) -> str:
    return re.sub(r"\d+", "N", path.name)


def _rank(path: Path) -> int:
    return int("".join(filter(str.isdecimal, path.name)))


def _paths(files: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files, sorted by rank if their names have one."""
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
