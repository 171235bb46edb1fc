"""Classified images from one .npz file, checked before anything uses them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from ltloss.errors import UserError
from ltloss.training.data.arrays import DAMAGE
from ltloss.training.data.images import ArrayImages, Split
from ltloss.training.data.labels import check_range, names_of_classes, whole_labels

_KEYS = ("x_train", "y_train", "x_test", "y_test")


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
    except DAMAGE as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); write it with numpy.savez") from error
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    names = [f"{part}/{i:05d}" for part, (_, y) in zip(splits, parts, strict=True) for i in range(len(y))]
    return ArrayImages(images, labels, class_names, names)


def _class_names(path: Path, archive: np.lib.npyio.NpzFile) -> tuple[str, ...]:
    given = _array(path, archive, "class_names") if "class_names" in archive.files else None
    return names_of_classes(path, "y_train", _labels(path, archive, "y_train"), given)


def _part(
    path: Path, archive: np.lib.npyio.NpzFile, part: str, class_names: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = _array(path, archive, f"x_{part}"), _labels(path, archive, f"y_{part}")
    if images.dtype != np.uint8:
        raise UserError(
            f"{path}: x_{part} must be uint8 (0..255), or embeddings (N, D) of floats, but is {images.dtype} of shape "
            f"{images.shape}; convert it"
        )
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))):
        raise UserError(f"{path}: x_{part} must be (N, H, W) or (N, H, W, 1 or 3), but is {images.shape}; transpose it")
    if len(images) != len(labels):
        raise UserError(f"{path}: x_{part} has {len(images)} images and y_{part} {len(labels)} labels; make them equal")
    if not images.size:
        raise UserError(f"{path}: x_{part} is empty, of shape {images.shape}; it needs images")
    check_range(path, f"y_{part}", labels, len(class_names))
    return images, labels


def _labels(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    return whole_labels(path, key, _array(path, archive, key))


def _array(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    array = archive[key]
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: {key} is a file of another kind, not an array; write it with numpy.savez")
    return array
