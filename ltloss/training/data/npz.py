"""Labelled images from one .npz file, checked before use."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ltloss.errors import UserError
from ltloss.training.data.arrays import MAGIC, Arrays, explained, npz_arrays, npz_header
from ltloss.training.data.images import ArrayImages, Split
from ltloss.training.data.labels import check_range, names_of_classes, whole_labels

_KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(path: Path, split: Split) -> ArrayImages:
    """A split of an .npz with x_train, y_train, x_test, y_test (images uint8, labels integers) and maybe class_names.

    Raises UserError for a key that is missing or of a wrong shape, type or range. Nothing is unpickled.
    """
    with explained(path):
        with path.open("rb") as stream:
            if stream.read(len(MAGIC)) == MAGIC:
                raise UserError(f"{path} holds one array; give an .npz with {', '.join(_KEYS)}")
        arrays = npz_arrays(path)
        missing = [key for key in _KEYS if key not in arrays]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}; it needs {', '.join(_KEYS)}")
        splits = ("train", "test") if split == "all" else (split,)
        given = arrays["class_names"]() if "class_names" in arrays else None
        class_names = names_of_classes(path, "y_train", whole_labels(path, "y_train", arrays["y_train"]()), given)
        parts = [_part(path, arrays, part, class_names) for part in splits]
    # The headers, as one split alone is not to read the other.
    train, test = (header[0][1:] if (header := npz_header(path, key)) else () for key in ("x_train", "x_test"))
    if train != test:
        raise UserError(f"{path}: x_train has images of shape {train} and x_test of {test}; make them equal")
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    names = [f"{part}/{i:05d}" for part, (_, y) in zip(splits, parts, strict=True) for i in range(len(y))]
    return ArrayImages(images, labels, class_names, names)


def _part(path: Path, arrays: Arrays, part: str, class_names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = arrays[f"x_{part}"](), whole_labels(path, f"y_{part}", arrays[f"y_{part}"]())
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
