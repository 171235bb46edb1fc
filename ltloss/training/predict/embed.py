"""Turn images into a file of embeddings, with a pretrained network or with a run."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ltloss._files import new_file
from ltloss.errors import UserError, check_counts
from ltloss.training.data.batches import batches
from ltloss.training.data.images import Split
from ltloss.training.data.sources import has_own_splits, load_images
from ltloss.training.predict.export import refuse_output
from ltloss.training.predict.predict import check_finite
from ltloss.training.run.prepare import load_split
from ltloss.training.run.progress import progress_bar
from ltloss.training.run.settings import Settings

if TYPE_CHECKING:
    from ltloss.training.data.embeddings import Source


class Network(Protocol):
    """A network that embeds: a pretrained backbone, or the classifier of a run."""

    def features(self, images: Tensor) -> Tensor:
        """Features (N, D) of images (N, channels, H, W) uint8, or of embeddings."""


@dataclass(frozen=True)
class EmbeddingFile:
    """The file that :func:`embed` wrote; the command line prints ``str()`` of it."""

    path: Path
    samples: int
    width: int  # features of an embedding
    classes: int  # 0 without labels

    def __str__(self) -> str:
        labels = f"labels of {self.classes:,} classes" if self.classes else "no labels: there are no class folders"
        return f"wrote {self.path}: {self.samples:,} embeddings of {self.width:,} features, {labels}"


def images_to_embed(folder: Path, shape: tuple[int, ...], *, workers: int = 4) -> dict[str, Source]:
    """The images of a folder at ``shape`` (channels, H, W), by the suffix of their arrays in the file.

    Images in class folders have labels. A folder with splits of its own keeps them.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder} is not a folder; give a folder of images")
    if sum(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir()) > 1:
        return data_to_embed(str(folder), shape, workers=workers)
    return {"": load_images(folder, _of_images(shape), workers=workers)}


def data_to_embed(
    data: str, shape: tuple[int, ...], *, image_root: str | None = None, workers: int = 4
) -> dict[str, Source]:
    """Data as for ``ltloss train`` at ``shape``, in its own splits, by the suffix of their arrays in the file."""
    settings = Settings(data=data, image_root=image_root, workers=workers)
    splits: dict[str, Split] = {"_train": "train", "_test": "test"} if has_own_splits(data) else {"": "all"}
    return {part: load_split(settings, split, shape) for part, split in splits.items()}


def _of_images(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise UserError(f"the run takes embeddings of {shape[0]} features; give --data FEATURES, not --images")
    return shape[0], shape[1], shape[2]


@torch.inference_mode()
def embed(
    network: Network,
    parts: Mapping[str, Source],
    out: Path,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: int = 256,
    overwrite: bool = False,
) -> EmbeddingFile:
    """Write the features of all sources into ``out``, an uncompressed .npz, a batch at a time.

    The source ``parts[part]`` becomes the arrays ``x{part}``, ``names{part}`` and, if its labels are known,
    ``y{part}``. ``class_names`` holds for all sources. The file is whole or absent.

    Args:
        network: computes features (N, D).
        parts: suffix of the arrays -> images or embeddings.
        out: the file to write, which must end in ``.npz``.
        dtype: of the features in the file.
        batch_size: samples at a time.
        overwrite: replace an existing file, which is refused otherwise.

    Raises:
        UserError: ``out`` exists, cannot be written to or has another ending; a feature is not finite, or exceeds the
            range of float16.
    """
    check_counts(batch_size=batch_size)
    refuse_output(out, ".npz", overwrite)
    class_names = next(iter(parts.values())).class_names
    width = 0
    with new_file(out) as file, zipfile.ZipFile(file, "w") as archive:
        for part, source in parts.items():
            width = _write_features(archive, f"x{part}.npy", network, source, np.dtype(dtype), batch_size)
            arrays = {f"names{part}": np.array(source.names)}
            if class_names:
                arrays |= {f"y{part}": source.labels, "class_names": np.array(class_names)}
            for name, array in arrays.items():
                if f"{name}.npy" not in archive.namelist():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
    return EmbeddingFile(out, sum(map(len, parts.values())), width, len(class_names))


def _write_features(
    archive: zipfile.ZipFile, name: str, network: Network, source: Source, dtype: np.dtype, batch_size: int
) -> int:
    """Write the features of a source as one member of the archive, and return their width D."""
    width = 0
    with archive.open(name, "w", force_zip64=True) as member:
        for rows in _features(network, source, dtype, batch_size):
            if not width:
                width = rows.shape[1]
                about = {"descr": dtype.str, "fortran_order": False, "shape": (len(source), width)}
                np.lib.format.write_array_header_1_0(member, about)
            member.write(rows.data)
    return width


def _features(network: Network, source: Source, dtype: np.dtype, batch_size: int) -> Iterator[np.ndarray]:
    done = 0
    with progress_bar(len(source), what="image") as progress:
        for batch in batches(source, batch_size):
            features, names = network.features(batch.images).float().cpu(), source.names[done : done + batch_size + 1]
            check_finite(features, names)
            largest = features.abs().max().item()
            if dtype == np.float16 and largest > float(np.finfo(np.float16).max):
                raise UserError(f"--dtype float16 cannot hold {largest:g}, which is a feature; take float32")
            yield features.contiguous().numpy().astype(dtype)
            done += len(features)
            progress.update(len(features))
