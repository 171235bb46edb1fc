"""Classified images from one .npz file, checked before anything uses them."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from pathlib import Path

import numpy as np

from ltloss.errors import UserError
from ltloss.training.data.images import ArrayImages, Split

_RENUMBER = "renumber the labels with numpy.unique(labels, return_inverse=True)"
_KEYS = ("x_train", "y_train", "x_test", "y_test")
# Damaged and foreign archives; RuntimeError is that of an encrypted one, MemoryError that of a size that is absurd.
_DAMAGE = (
    *(ValueError, OSError, EOFError, RuntimeError, MemoryError, OverflowError, SyntaxError, KeyError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)


def load_npz(path: Path, split: Split) -> ArrayImages:
    """The split of an .npz with x_train, y_train, x_test, y_test (images uint8, labels integers) and maybe class_names.

    Raises UserError naming the key that is missing or of the wrong shape, type or range. Nothing is unpickled.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(6)
        if start == b"\x93NUMPY":
            raise UserError(f"{path} holds one array; give an .npz with {', '.join(_KEYS)}")
        if not start.startswith(b"PK"):  # NumPy would take it for a pickle, and say how to run what is in it
            raise zipfile.BadZipFile("it is no .npz file")
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in _KEYS if key not in archive.files]
            if missing:
                raise UserError(f"{path} lacks {', '.join(missing)}; it needs {', '.join(_KEYS)}")
            splits = ("train", "test") if split == "all" else (split,)
            class_names = _class_names(path, archive)
            parts = [_part(path, archive, part, class_names) for part in splits]
    except _DAMAGE as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); write it with numpy.savez") from error
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    names = [f"{part}/{i:05d}" for part, (_, y) in zip(splits, parts, strict=True) for i in range(len(y))]
    return ArrayImages(images, labels, class_names, names)


def _class_names(path: Path, archive: np.lib.npyio.NpzFile) -> tuple[str, ...]:
    """The names given, or the numbers up to the largest training label; every class must have training images."""
    labels = _labels(path, archive, "y_train")
    if "class_names" in archive.files:
        given = _array(path, archive, "class_names")
        if given.ndim != 1 or given.dtype.kind != "U" or len(set(given.tolist())) != len(given):
            raise UserError(
                f"{path}: class_names must be a list of different strings, is {given.dtype} of shape {given.shape}"
            )
        names = tuple(str(name) for name in given)
    else:
        largest = int(labels.max(initial=-1))
        if largest >= len(labels) > 0:  # most classes would be empty, and their names alone could fill the memory
            raise UserError(
                f"{path}: y_train goes up to {largest} but has only {len(labels)} labels, so some classes have no "
                f"image; {_RENUMBER}"
            )
        names = tuple(str(c) for c in range(largest + 1))
    if len(names) < 2:
        raise UserError(f"{path} has {len(names)} classes, at least 2 are needed; check y_train")
    _check_range(path, "y_train", labels, len(names))
    empty = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if len(empty):
        raise UserError(
            f"{path}: {len(empty)} of {len(names)} classes have no training image, the first is {names[empty[0]]}; "
            "renumber the labels without them"
        )
    return names


def _part(
    path: Path, archive: np.lib.npyio.NpzFile, part: str, class_names: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = _array(path, archive, f"x_{part}"), _labels(path, archive, f"y_{part}")
    if images.dtype != np.uint8:
        raise UserError(f"{path}: x_{part} must be uint8 (0..255), is {images.dtype}; convert it")
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))):
        raise UserError(f"{path}: x_{part} must be (N, H, W) or (N, H, W, 1 or 3), is {images.shape}; transpose it")
    if len(images) != len(labels):
        raise UserError(f"{path}: x_{part} has {len(images)} images and y_{part} {len(labels)} labels; make them equal")
    if not images.size:
        raise UserError(f"{path}: x_{part} is empty, of shape {images.shape}; it needs images")
    _check_range(path, f"y_{part}", labels, len(class_names))
    return images, labels


def _labels(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    labels = _array(path, archive, key)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path}: {key} must be integers of shape (N,), is {labels.dtype} of shape {labels.shape}; convert it"
        )
    if labels.size and int(labels.max()) > np.iinfo(np.int64).max:
        raise UserError(f"{path}: {key} goes up to {labels.max()}, beyond every number of classes; {_RENUMBER}")
    return labels.astype(np.int64)


def _array(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    array = archive[key]
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: {key} is a file of another kind, not an array; write it with numpy.savez")
    return array


def _check_range(path: Path, key: str, labels: np.ndarray, classes: int) -> None:
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        raise UserError(f"{path}: {key}[{bad[0]}] is {labels[bad[0]]}, outside 0..{classes - 1}; correct the labels")
