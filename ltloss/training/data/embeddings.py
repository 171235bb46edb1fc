"""Labelled embeddings: rows of a matrix in memory or on disk, which is read batch by batch."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ltloss.errors import UserError
from ltloss.numerics import spans
from ltloss.training.data.arrays import READERS, Arrays, explained, npz_header
from ltloss.training.data.images import ImageSource, Split
from ltloss.training.data.labels import names_of_classes, numbered, whole_labels
from ltloss.training.data.splits import split_indices

if TYPE_CHECKING:
    from typing_extensions import Self

_BLOCK = 1 << 20  # numbers that are converted at a time


@dataclass(frozen=True)
class ArrayEmbeddings:
    """Rows of a matrix of embeddings; a subset shares the matrix, so nothing is copied.

    Args:
        array: (M, D) float16, float32 or float64; may be memory-mapped.
        rows: (N,) int64, indices of the rows.
        labels: (N,) int64; -1 where unknown.
        class_names: names (C,) by label.
        row_names: display names (M,) of all rows of ``array``, or a prefix for their numbers.
    """

    array: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    row_names: np.ndarray | str

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,)."""
        return (self.array.shape[1],)

    @cached_property
    def names(self) -> list[str]:
        """Display names of the N embeddings."""
        if isinstance(self.row_names, str):
            return [f"{self.row_names}/{row:05d}" for row in self.rows.tolist()]
        return [str(name) for name in self.row_names[self.rows]]

    def __len__(self) -> int:
        """Embeddings in the source."""
        return len(self.rows)

    def batch(self, indices: np.ndarray) -> Tensor:
        """Embeddings (B, D) at indices (B,), float32, or float16 where they are kept so."""
        rows = self.array[self.rows[indices]]
        return torch.from_numpy(rows if rows.dtype == np.float16 else rows.astype(np.float32, copy=False))

    def subset(self, indices: np.ndarray) -> Self:
        """The embeddings at indices."""
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])

    def blocks(self) -> Iterator[np.ndarray]:
        """All embeddings (n, D) in order, as they are kept, a bounded number at a time."""
        for start, stop in spans(len(self), max(1, _BLOCK // self.array.shape[1])):
            yield np.ascontiguousarray(self.array[self.rows[start:stop]])

    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation (D,) of each feature; the deviation of a constant feature is 1.

        Sums are float64 and row by row, so that every machine finds the same values and can resume the run of another.
        """
        mean = np.zeros(self.shape)
        for block in self.blocks():
            mean += block.sum(0, dtype=np.float64)
        mean, squares = mean / len(self), np.zeros(self.shape)
        for block in self.blocks():
            squares += np.square(block - mean).sum(0)
        return tuple(mean.tolist()), tuple(math.sqrt(v / len(self)) or 1.0 for v in squares.tolist())

    def checksum(self, start: int = 0) -> int:
        """CRC-32 of the embeddings as they are stored, continued from ``start``."""
        for block in self.blocks():
            start = zlib.crc32(block.data, start)
        return start


Source = ImageSource | ArrayEmbeddings  # the samples that training and evaluation read


def holds_embeddings(path: Path) -> bool:
    """Whether a file holds embeddings, by its ending; for an .npz by its arrays."""
    if path.suffix != ".npz":
        return path.suffix in READERS
    train = npz_header(path, "x_train")
    if train is None:
        return npz_header(path, "x") is not None
    shape, dtype = train
    return len(shape) == 2 and dtype.kind == "f"


def own_splits(path: Path) -> bool:
    """Whether a file of embeddings has training and test splits of its own."""
    with explained(path):
        return "x_train" in READERS[path.suffix](path)


def load_embeddings(path: Path, split: Split, seed: int = 0) -> ArrayEmbeddings:
    """One split of a file of labelled embeddings.

    For a file with ``x`` and ``y`` only, a seeded 20 % of each class is the test split. Raises UserError for an array
    that is missing or of a wrong shape, type or range, and for the first row that is not finite.
    """
    with explained(path):
        arrays = READERS[path.suffix](path)
        if "x_train" not in arrays:
            source = _labelled(path, arrays, "")
            return source.subset(split_indices(source.labels, split, seed))
        if split == "all":
            return _joined(path, *(_labelled(path, arrays, part) for part in ("_train", "_test")))
        return _labelled(path, arrays, f"_{split}")


def load_rows(path: Path) -> ArrayEmbeddings:
    """Every embedding of a file with label -1, for prediction. Raises UserError as :func:`load_embeddings` does."""
    if not path.is_file() or not holds_embeddings(path):
        raise UserError(f"--data {path} is no file of embeddings; give one of {', '.join(READERS)}")
    with explained(path):
        arrays = READERS[path.suffix](path)
        parts = [_part(path, arrays, part) for part in (("_train", "_test") if "x_train" in arrays else ("",))]
        return parts[0] if len(parts) == 1 else _joined(path, *parts)


def _array(path: Path, arrays: Arrays, key: str) -> np.ndarray:
    if key not in arrays and path.suffix == ".npy":
        array, text = (path.with_suffix(f".labels{kind}").name for kind in (".npy", ".txt"))
        raise UserError(f"{path} has no labels y; write them into {array}, or one a line into {text}, beside it")
    if key not in arrays:
        raise UserError(f"{path} lacks {key}; it needs x_train, y_train, x_test, y_test, or x and y")
    return arrays[key]()


def _part(path: Path, arrays: Arrays, part: str) -> ArrayEmbeddings:
    """The embeddings ``x{part}`` without labels."""
    key = f"x{part}"
    array = _array(path, arrays, key)
    if array.ndim != 2 or array.dtype not in (np.float16, np.float32, np.float64):
        raise UserError(
            f"{path}: {key} must be float16, float32 or float64 of shape (N, D), but is {array.dtype} of shape "
            f"{array.shape}; convert it"
        )
    if not array.size:
        raise UserError(f"{path}: {key} is empty, of shape {array.shape}; it needs embeddings")
    names: np.ndarray | str = part[1:] or path.stem
    if f"names{part}" in arrays:
        names = arrays[f"names{part}"]()
        if names.shape != (len(array),):
            raise UserError(
                f"{path}: names{part} is of shape {names.shape}, {key} has {len(array)} rows; make them equal"
            )
    source = ArrayEmbeddings(array, np.arange(len(array)), np.full(len(array), -1), (), names)
    _check_finite(path, key, source)
    return source


def _check_finite(path: Path, key: str, source: ArrayEmbeddings) -> None:
    start = 0
    for block in source.blocks():
        with np.errstate(over="ignore"):
            finite = np.isfinite(block.astype(np.float32, copy=False))
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise UserError(
                f"{path}: {key}[{start + row}] holds {block[row, column]}, which is not a finite float32 number; "
                "remove the row"
            )
        start += len(block)


def _labelled(path: Path, arrays: Arrays, part: str) -> ArrayEmbeddings:
    """The embeddings ``x{part}`` with the labels ``y{part}``; the classes are those of the training labels."""
    first = "_train" if part else ""
    training = _array(path, arrays, f"y{first}")
    given = arrays["class_names"]() if "class_names" in arrays else None
    if training.dtype.kind == "U" and training.ndim == 1 and (given is None or given.ndim == 1):
        class_names = tuple(np.unique(training).tolist() if given is None else given.tolist())
        training = numbered(path, f"y{first}", training, class_names)
        given = np.array(class_names)
    training = whole_labels(path, f"y{first}", training)
    class_names = names_of_classes(path, f"y{first}", training, given)
    source = _part(path, arrays, part)
    labels = training if part == first else numbered(path, f"y{part}", _array(path, arrays, f"y{part}"), class_names)
    if len(labels) != len(source):
        raise UserError(f"{path}: x{part} has {len(source)} rows and y{part} {len(labels)} labels; make them equal")
    return replace(source, labels=labels, class_names=class_names)


def _joined(path: Path, *parts: ArrayEmbeddings) -> ArrayEmbeddings:
    """All rows of the parts, copied into one array in memory."""
    train, test = (part.shape[0] for part in parts)
    if train != test:
        raise UserError(f"{path}: x_train has {train} features and x_test {test}; make them equal")
    array, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("array", "labels"))
    names = np.array([name for part in parts for name in part.names])
    return ArrayEmbeddings(array, np.arange(len(array)), labels, parts[0].class_names, names)
