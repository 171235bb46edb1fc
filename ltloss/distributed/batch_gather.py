"""The global batch: features and labels of all ranks, of whatever lengths, in one all-gather.

A message holds a header, the labels and the features of one rank as bytes, padded to a size that all ranks know. They
agree on it in a handshake of a few integers: at the first batch, and again when a rank announces in its header that
its batch does not fit (more rows, another width or dtype) or that something is wrong with it. So a mistake on one rank
is an error on all, and no rank waits for one that has already given up. But with a ``capacity`` on a GPU nobody reads
headers: a rank that finds its batch wrong raises alone, and the others wait until the timeout of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltloss._validation import check_label_range, check_supervised
from ltloss.distributed import collectives as comm
from ltloss.distributed.layout import Layout
from ltloss.errors import DistributedError
from ltloss.runtime import current_debug

__all__ = ["Batch", "BatchGather", "all_gather_metadata", "gather_supervised"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HEADER = 4  # int64: rows or -1, whether features ask for a gradient, tag, unused
_TEXT = 512  # bytes of an error message that travel
_ALIGN = 16


class Batch(NamedTuple):
    """The global batch: every rank contributes the same number of rows, the missing ones ignored.

    ``features`` (N, D); a gradient of them counts in this rank's own rows only. ``labels`` (N,) int64. ``own`` rows
    came from this rank, the first ``real`` of them being samples.
    """

    features: Tensor
    labels: Tensor
    own: slice
    real: int


class _Agreement(NamedTuple):
    """What all messages look like until the next handshake."""

    capacity: int
    width: int
    dtype: torch.dtype

    @property
    def offset(self) -> int:
        """Where the features start."""
        return 8 * (_HEADER + self.capacity + self.capacity % 2)

    @property
    def size(self) -> int:
        """Bytes of a message."""
        size = self.offset + self.capacity * self.width * self.dtype.itemsize
        return -(-size // _ALIGN) * _ALIGN


class BatchGather:
    """Gathers the batches of all ranks; see the module.

    Args:
        layout: of the prototypes.
        capacity: None reads the header of each step on the host: batches may have any lengths, at the price of one host
            synchronisation in the forward on a GPU. A number promises that no rank ever has more rows: messages have
            that many, and nothing is read on a GPU.
        gradient_factor: multiplies the gradient of the features.
    """

    def __init__(self, layout: Layout, capacity: int | None = None, gradient_factor: float = 1.0) -> None:
        self.layout, self.capacity, self.gradient_factor = layout, capacity, gradient_factor
        self._agreed: _Agreement | None = None

    def __call__(
        self, features: Any, labels: Any, check: Callable[[], None], *, padding: int = -1, tag: int = 0
    ) -> Batch:
        """Gather features (n, D) and labels (n,); ``check`` raises for what is wrong with them here.

        Rows that are missing get the label ``padding``. Ranks whose ``tag`` differs do different things: an error.
        """
        error = self._own_error(check, features)
        if self._agreed is None:
            self._handshake(features, error)
        looks = self.capacity is None or _looks(self.layout.device)
        while True:
            agreed = self._agreed
            assert agreed is not None
            fits = error is None and _fits(features, agreed)
            if self.capacity is not None and not fits:
                error = error or _beyond_capacity(features, agreed)
                if not looks:
                    raise error
            message = _pack(features, labels, agreed, fits, padding, tag, self.layout.device)
            gathered = comm.all_gather(message, self.layout.group)
            header = gathered[:, : 8 * _HEADER].view(torch.int64).tolist() if looks else []  # the one look at the data
            if all(row[0] >= 0 for row in header):
                _check_equal("the operation or its k", [row[2] for row in header])
                rows = self.capacity or max(row[0] for row in header)
                wanted = not looks or any(row[1] for row in header)
                return self._unpack(gathered, agreed, features, rows, wanted)
            self._handshake(features, error)

    @staticmethod
    def _own_error(check: Callable[[], None], features: Any) -> Exception | None:
        try:
            check()
            if features.dtype not in _DTYPES:
                raise TypeError(f"features must be one of {', '.join(map(str, _DTYPES))}; got {features.dtype}")
        except (TypeError, ValueError, IndexError) as error:
            return error
        return None

    def _handshake(self, features: Any, error: Exception | None) -> None:
        """Agree on capacity, width and dtype, or raise on all ranks."""
        shape = (0, 0, 0) if error else (features.shape[0], features.shape[1], _DTYPES.index(features.dtype))
        rows = all_gather_metadata(list(shape), error, self.layout.group, self.layout.device)
        _check_equal("the width D of features", [row[1] for row in rows])
        _check_equal("the dtype of features", [_DTYPES[row[2]] for row in rows])
        most = max(row[0] for row in rows)
        if self.capacity is not None and most > self.capacity:
            raise DistributedError(f"a rank has a batch of {most} rows, more than the capacity {self.capacity}")
        former = self._agreed.capacity if self._agreed else 0
        self._agreed = _Agreement(self.capacity or max(most, former), rows[0][1], _DTYPES[rows[0][2]])

    def _unpack(self, gathered: Tensor, agreed: _Agreement, features: Tensor, rows: int, wanted: bool) -> Batch:
        ranks, width = gathered.shape[0], agreed.width
        labels = gathered[:, 8 * _HEADER : 8 * (_HEADER + rows)].view(torch.int64).reshape(ranks * rows)
        wide = gathered[:, agreed.offset : agreed.offset + rows * width * agreed.dtype.itemsize]
        values = wide.view(agreed.dtype).reshape(ranks * rows, width)
        own = self.layout.own_rows(ranks * rows)
        if wanted and torch.is_grad_enabled():
            # Also where this rank's features ask for none: it has to take part in the others' backward.
            asks = features if features.requires_grad else features.detach().requires_grad_()
            values = _Gathered.apply(asks, values, own, self.gradient_factor)  # type: ignore[no-untyped-call]
        return Batch(values, labels, own, features.shape[0])


def gather_supervised(gather: BatchGather, features: Any, prototypes: Tensor, labels: Any, ignore_index: int) -> Batch:
    """The global batch of features (n, D) and labels (n,) that fit prototypes (C, D); rows that are missing ignored."""

    def check() -> None:
        check_supervised(features, prototypes, labels)
        if _looks(labels.device):
            check_label_range(labels, prototypes.shape[0], ignore_index)

    return gather(features, labels, check, padding=ignore_index)


def _looks(device: torch.device) -> bool:
    """Whether values may be read on the host: where it need not wait for a GPU, or the user asks for checks."""
    return (device.type == "cpu" or current_debug()) and not torch.compiler.is_compiling()


def _fits(features: Tensor, agreed: _Agreement) -> bool:
    same = features.shape[1] == agreed.width and features.dtype == agreed.dtype
    return same and features.shape[0] <= agreed.capacity


def _beyond_capacity(features: Tensor, agreed: _Agreement) -> Exception:
    return ValueError(
        f"features must have at most capacity={agreed.capacity} rows of width {agreed.width} in {agreed.dtype}; "
        f"got {tuple(features.shape)} in {features.dtype}. Give parallelize(..., capacity=None) for batches that change"
    )


def _pack(
    features: Any, labels: Any, agreed: _Agreement, fits: bool, padding: int, tag: int, device: torch.device
) -> Tensor:
    message = torch.zeros(agreed.size, dtype=torch.uint8, device=device)
    rows = features.shape[0] if fits else -1
    asks = int(fits and features.requires_grad and torch.is_grad_enabled())
    header = message[: 8 * _HEADER].view(torch.int64)
    for place, number in enumerate((rows, asks, tag)):
        header[place].fill_(number)  # a copy from the host would wait for the device
    target = message[8 * _HEADER : 8 * (_HEADER + agreed.capacity)].view(torch.int64).fill_(padding)
    if fits:
        target[:rows] = labels
        wide = message[agreed.offset :][: agreed.capacity * agreed.width * agreed.dtype.itemsize]
        wide.view(agreed.dtype).view(agreed.capacity, agreed.width)[:rows] = features.detach()
    return message


class _Gathered(torch.autograd.Function):
    """The gathered rows (N, D) as a function of this rank's features (n, D)."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, gathered: Tensor, own: slice, factor: float) -> Tensor:
        ctx.rows, ctx.factor = slice(own.start, own.start + features.shape[0]), factor
        return gathered.view_as(gathered)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        own = grad_outputs[0][ctx.rows]
        return (own * ctx.factor if ctx.factor != 1.0 else own.clone()), None, None, None


def all_gather_metadata(
    numbers: list[int], error: Exception | None, group: Any, device: torch.device | str = "cpu"
) -> list[list[int]]:
    """The numbers of every rank; or, where a rank has an error, that error here and ``DistributedError`` elsewhere."""
    text = f"{type(error).__name__}: {error}".encode()[:_TEXT] if error else b""
    message = torch.zeros(8 * (len(numbers) + 1) + _TEXT, dtype=torch.uint8)
    message[: 8 * (len(numbers) + 1)].view(torch.int64).copy_(torch.tensor([*numbers, len(text)]))
    if text:
        message[-_TEXT:][: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    gathered = comm.all_gather(message.to(device), group).cpu()
    rows: list[list[int]] = gathered[:, :-_TEXT].contiguous().view(torch.int64).tolist()
    if error is not None:
        raise error
    for rank, row in enumerate(rows):
        if row[-1]:
            said = bytes(gathered[rank, -_TEXT:][: row[-1]].tolist()).decode(errors="replace")
            raise DistributedError(f"rank {rank} of {len(rows)} failed, so all do: {said}")
    return [row[:-1] for row in rows]


def _check_equal(what: str, values: list[Any]) -> None:
    if len(set(values)) > 1:
        listed = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values[:16]))
        raise DistributedError(f"{what} must be the same on all ranks; got {listed}")
