"""Running class centres in feature space, for losses that pull the samples of a class together."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ltloss._validation import check_choice, check_count, check_number
from ltloss.numerics import add_rows_, compute_dtype
from ltloss.reference import direction

__all__ = ["CenterUpdate", "ClassCenters"]

CenterUpdate = Literal["mean", "ema"]


def _group_by_label(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Group samples by label: return per sample (N,) the number of its group, and whether it is the first of it.

    By a sort, because the shape of torch.unique's result depends on the data: the host would have to wait for a GPU.
    """
    ordered, order = labels.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    group = torch.empty_like(order).scatter_(0, order, first.cumsum(0) - 1)
    return group, torch.empty_like(first).scatter_(0, order, first)


def check_update(update: str, momentum: float, prefix: str = "") -> None:
    """Raise the errors of :class:`ClassCenters`; ``prefix``: what precedes the names of its arguments elsewhere."""
    check_choice(f"{prefix}update", update, get_args(CenterUpdate))
    check_number(f"{prefix}momentum", momentum, at_least=0.0)
    if momentum >= 1.0:
        raise ValueError(f"{prefix}momentum must be < 1, for at 1 the centres never move; got {momentum}")


def check_not_inside_ddp() -> None:
    """Raise RuntimeError inside DistributedDataParallel, which would copy rank 0's centres to all ranks."""
    wrapper: Any = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    if wrapper is not None and wrapper.process_group.size() > 1:
        raise RuntimeError(
            "a loss with class centres was called inside DistributedDataParallel, which would keep only the centres of "
            "rank 0's samples. Wrap the backbone alone, and pass the loss to ltloss.distributed: loss_fn = "
            "parallelize(loss_fn, class_mesh(), averaged_backbone=True); class_mesh(data=ranks) keeps all classes on "
            "each rank"
        )


class ClassCenters(nn.Module):
    """Running centres of the unit features of each class. No gradient flows through them.

    With u the unit features of class c: ``"mean"`` keeps c_c = (1/n_c)·Σ u over all samples seen. ``"ema"`` moves c_c
    to momentum·c_c + (1 − momentum)·(mean of u over the batch). The first batch with a class sets its centre; a class
    absent from a batch keeps it.

    Args:
        num_classes: C.
        embedding_size: D.
        update: ``"mean"`` or ``"ema"``.
        momentum: momentum of ``"ema"``, in [0, 1).
        device: device of the buffers.

    Attributes:
        centers: buffer (C, D), float32; zero for a class that was never seen. In the state_dict.
        counts: buffer (C,), int64, the samples seen. In the state_dict.

    Raises:
        ValueError, TypeError: an unknown ``update``, a momentum outside [0, 1).

    See also: :class:`ltloss.CosineSpaceLoss`, which uses it.

    Source: source B of ``docs/mathematics.md``, which leaves the update open.

    Example:
        >>> import torch
        >>> from ltloss.losses.class_centers import ClassCenters
        >>> centers = ClassCenters(2, 2)
        >>> centers.update(torch.tensor([[5.0, 0.0], [0.0, 0.1]]), torch.tensor([0, 0]))
        >>> centers.centers[0], centers.cosine(torch.tensor([[1.0, 1.0]]), torch.tensor([0]))
        (tensor([0.5000, 0.5000]), tensor([1.0000]))
    """

    centers: Tensor
    counts: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        update: CenterUpdate = "mean",
        momentum: float = 0.9,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        num_classes = check_count("num_classes", num_classes)
        embedding_size = check_count("embedding_size", embedding_size)
        check_update(update, momentum)
        self.update_rule, self.momentum = update, momentum
        self.register_buffer("centers", torch.zeros(num_classes, embedding_size, device=device))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64, device=device))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "update_rule":
            check_choice(name, value, get_args(CenterUpdate))
        elif name == "momentum":
            check_update("ema", value)
        super().__setattr__(name, value)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset all centres and counts to zero."""
        self.centers.zero_(), self.counts.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Keep the dtype of the centres when the module is cast: sums over a training need float32."""
        centers = self.centers
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.centers.dtype != centers.dtype:
            self.centers = centers.to(self.centers.device)
        return self

    def _at_hand(self) -> tuple[Tensor, Tensor]:
        """Return the centres and counts that labels index; those of this rank if the module is sharded."""
        return self.centers, self.counts

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Update the centres with a batch, in O(N·D).

        Args:
            features: (N, D), any length.
            labels: (N,) int64; -1 for samples to leave out. Features that are not finite are left out too.
        """
        if features.shape[0] == 0:
            return
        dtype = compute_dtype(features, self.centers)
        unit = direction(features.to(dtype))
        centers, counts = self._at_hand()
        counted = (labels >= 0) & (labels < len(centers))
        counted &= unit.isfinite().all(1)  # NaN would stay, though its step is skipped
        labels, unit = labels.masked_fill(~counted, -1), torch.where(counted[:, None], unit, 0.0)
        group, first = _group_by_label(labels)
        # Sums per group of the batch, then gathered per sample: nothing of size C is allocated.
        batch_sum = add_rows_(torch.zeros_like(unit), group, unit)[group]
        batch_count = add_rows_(torch.zeros_like(group), group, torch.ones_like(group))[group]
        rows = torch.where(counted, labels, 0)
        old, seen = centers[rows].to(dtype), counts[rows]
        if self.update_rule == "mean":
            step = (batch_sum - batch_count[:, None] * old) / (seen + batch_count)[:, None]
        else:
            rate = torch.where(seen == 0, 1.0, 1.0 - self.momentum)
            step = rate[:, None] * (batch_sum / batch_count[:, None] - old)
        # Only the first sample of each class moves its centre. The others add zero, so their order does not matter.
        moves = first & counted
        add_rows_(centers, rows, torch.where(moves[:, None], step, 0.0).to(centers.dtype))
        add_rows_(counts, rows, torch.where(moves, batch_count, 0))

    def cosine(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cosine of each feature to the centre of its class, cos(x_i, c_{y_i}).

        Args:
            features: (N, D), any length.
            labels: (N,) int64; -1 counts as class 0, C and more as the last one.

        Returns:
            (N,); 1 where the class was never seen, so that 1 − cos contributes nothing.
        """
        dtype = compute_dtype(features, self.centers)
        centers, counts = self._at_hand()
        rows = labels.clamp(0, len(centers) - 1)
        # Not vecdot, which autocast would run in half precision.
        cosine = (direction(features.to(dtype)) * direction(centers[rows].to(dtype))).sum(1)
        return torch.where(counts[rows] == 0, 1.0, cosine)

    def extra_repr(self) -> str:
        """Shape and hyper-parameters."""
        momentum = f", momentum={self.momentum}" if self.update_rule == "ema" else ""
        return f"{self.centers.shape[0]}, {self.centers.shape[1]}, update={self.update_rule!r}{momentum}"
