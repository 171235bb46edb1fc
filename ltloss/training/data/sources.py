"""Load images and embeddings: the digits, files and folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ltloss.errors import ImageError, UserError, printable
from ltloss.training.data.decode import SUFFIXES, open_image
from ltloss.training.data.embeddings import Source, holds_embeddings, load_embeddings, own_splits
from ltloss.training.data.images import ArrayImages, FolderImages, Size, Split, target_shape
from ltloss.training.data.lists import find_lists, read_list
from ltloss.training.data.npz import load_npz
from ltloss.training.data.splits import split_indices

ACCEPTED = (
    "digits, a folder of class folders, a list of images, a FILE.npz, or embeddings in .npz, .npy, .safetensors or "
    ".parquet"
)
DEFAULT_FOLDER_SIZE = 64
DECODED_AT_ONCE = 64  # images of a folder, when their mean is computed
LARGEST_DEFAULT_SIZE = 128  # larger images are used at DEFAULT_FOLDER_SIZE by default, as photos need too much memory


def load_data(
    spec: str,
    *,
    split: Split,
    image_size: Size = None,
    channels: int | None = None,
    image_root: str | None = None,
    seed: int = 0,
    workers: int = 4,
) -> Source:
    """One split of ``digits``, of a folder, of lists of images, of images in a FILE.npz or of a file of embeddings.

    A folder with exactly ``train/`` and ``test/`` (or ``val/``) has its splits there. The test list of a training list
    is found by its name. For data without splits, a seeded 20 % of each class is the test split. ``all`` is every
    sample. ``image_root`` is the folder in which the paths of a list begin, by default the folder of the list.

    Raises UserError for anything that cannot be used as labelled images or embeddings.
    """
    path = Path(spec)
    if spec != "digits" and (lists := find_lists(path)) is not None:
        return _load_lists(lists, image_root, split, image_size, channels, seed, workers)
    if image_root is not None:
        raise UserError(f"--image-root {image_root} goes with a list of images, and {spec} is none; leave it out")
    if spec == "digits":
        return _digits(split, seed).reshaped(image_size, channels)
    if path.is_dir():
        return _load_folder(path, split, image_size, channels, seed, workers)
    if not path.exists():
        raise UserError(f"data {spec!r} does not exist; give {ACCEPTED}")
    if holds_embeddings(path):
        return load_embeddings(path, split, seed)
    if path.suffix != ".npz":
        raise UserError(f"data {spec} is a {path.suffix or 'plain'} file; give {ACCEPTED}")
    return load_npz(path, split).reshaped(image_size, channels)


def absolute_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a run stores them, with absolute paths."""
    paths = {name: settings[name] for name in ("data", "image_root", "init_from") if settings.get(name)}
    return {**settings, **{name: absolute(path, f"--{name.replace('_', '-')}") for name, path in paths.items()}}


def absolute(spec: str, flag: str = "--data") -> str:
    """The data as a run stores it, an absolute path; ``digits`` stays."""
    if spec == "digits":
        return spec
    try:
        return str(Path(spec).expanduser().resolve())
    except RuntimeError:
        raise UserError(f"{flag} {spec} begins with ~ and a user who is unknown here; write the path in full") from None
    except ValueError:
        raise UserError(f"{flag} {spec!r} holds a NUL byte, which no path can; remove it") from None


def has_own_splits(spec: str) -> bool:
    """Whether the data has training and test splits of its own; else ``load_data`` draws them."""
    path = Path(spec)
    if spec == "digits":
        return False
    if (lists := find_lists(path)) is not None:
        return "test" in lists
    if path.is_dir():
        return _split_folders(path) is not None
    return not path.is_file() or not holds_embeddings(path) or own_splits(path)


def load_images(folder: Path, image_shape: tuple[int, int, int], *, workers: int = 4) -> FolderImages:
    """Every image below a folder with label -1, for prediction; files that cannot be read are in ``skipped``."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a folder of images")
    names = [str(path.relative_to(folder)) for path in _images_below(folder)]
    source = _checked(folder, names, np.full(len(names), -1), (), lambda _: image_shape, workers)
    if not len(source):
        raise UserError(f"{folder} holds no image that can be read; accepted are {', '.join(sorted(SUFFIXES))}")
    return source


def _digits(split: Split, seed: int) -> ArrayImages:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    names = [f"digits/{i:05d}" for i in range(len(labels))]
    source = ArrayImages(images, labels, tuple("0123456789"), names)
    return source.subset(split_indices(labels, split, seed))


def _load_folder(folder: Path, split: Split, size: Size, channels: int | None, seed: int, workers: int) -> FolderImages:
    class_names, names, labels = _listing(folder, split)
    if split != "all" and _split_folders(folder) is None:
        names, labels = _split_of(names, labels, split, seed)
    return _readable(folder, names, labels, class_names, split, size, channels, workers)


def _load_lists(
    lists: dict[str, Path], root: str | None, split: Split, size: Size, channels: int | None, seed: int, workers: int
) -> FolderImages:
    found = read_list(lists, split)
    first = next(iter(lists.values()))
    folder = first.parent if root is None else Path(root)
    if not (folder / found.names[0]).is_file():
        raise UserError(
            f"{folder} has no {found.names[0]}, which {first} lists; give the folder in which its paths begin as "
            "--image-root"
        )
    names, labels = found.names, found.labels
    if "all" in lists:
        names, labels = _split_of(names, labels, split, seed)
    return _readable(folder, names, labels, found.class_names, split, size, channels, workers)


def _split_of(names: list[str], labels: np.ndarray, split: Split, seed: int) -> tuple[list[str], np.ndarray]:
    indices = split_indices(labels, split, seed)
    return [names[i] for i in indices], labels[indices]


def _readable(
    folder: Path,
    names: list[str],
    labels: np.ndarray,
    class_names: tuple[str, ...],
    split: Split,
    size: Size,
    channels: int | None,
    workers: int,
) -> FolderImages:
    """The readable images, at the wanted shape or at their common one."""

    def choose_shape(found: set[tuple[int, int, int]]) -> tuple[int, int, int]:
        grey = all(shape[0] == 1 for shape in found)
        sizes = {shape[1:] for shape in found}
        common = sizes.pop() if len(sizes) == 1 else (DEFAULT_FOLDER_SIZE, DEFAULT_FOLDER_SIZE)
        if size is None and max(common) > LARGEST_DEFAULT_SIZE:
            print(
                f"ltloss: the images of {folder} are {common[1]} x {common[0]} pixels, used at {DEFAULT_FOLDER_SIZE} "
                f"x {DEFAULT_FOLDER_SIZE}; choose another size with --image-size",
                file=sys.stderr,
            )
            common = (DEFAULT_FOLDER_SIZE, DEFAULT_FOLDER_SIZE)
        return target_shape((1 if grey else 3, *common), size, channels, min(len(names), DECODED_AT_ONCE))

    if not names:
        raise UserError(f"{folder}: no class has a second image, which the test split would be of; add images")
    source = _checked(folder, names, labels, class_names, choose_shape, workers)
    if split != "test":
        present = np.bincount(source.labels, minlength=len(class_names))
        empty = [name for name, count in zip(class_names, present, strict=True) if not count]
        if empty:
            raise UserError(f"{folder}: no readable image for class {_listed(empty)}; add images or remove the folder")
    elif not len(source):
        raise UserError(f"{folder}: no readable image in the test split; add images")
    return source


def _split_folders(folder: Path) -> dict[str, str] | None:
    """The folder's splits {"train": ..., "test": ...} if it has exactly two sub-folders of these names; else None."""
    present = set(_sub_folders(folder))
    for test in ("test", "val"):
        if present == {"train", test}:
            return {"train": "train", "test": test}
    return None


def _listing(folder: Path, split: Split) -> tuple[tuple[str, ...], list[str], np.ndarray]:
    """Class names, image names relative to ``folder``, and labels; no image is opened."""
    splits = _split_folders(folder)
    if splits is None:
        roots = [folder]
    else:
        by_split = {name: _class_names(folder / place) for name, place in splits.items()}
        check_same_classes(by_split["train"], by_split["test"], f"{folder}: train", f"{folder}: {splits['test']}")
        roots = [folder / place for name, place in splits.items() if split in (name, "all")]
    class_names = _class_names(roots[0])
    for place in dict.fromkeys([folder, *roots]):
        _report_hidden(place, tuple(_sub_folders(place, hidden=True)))
        _report_loose(place)
    names, labels = [], []
    for root in roots:
        for label, class_name in enumerate(class_names):
            found = [str(path.relative_to(folder)) for path in _images_below(root / class_name)]
            if not found:
                raise UserError(f"{root / class_name} holds no images; add some or remove the folder")
            names += found
            labels += [label] * len(found)
    return class_names, names, np.array(labels, dtype=np.int64)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = _sub_folders(folder)
    if len(names) < 2:
        raise UserError(
            f"{folder} has {len(names)} class sub-folders, at least 2 are needed; "
            "sort the images as FOLDER/<class>/*.png"
        )
    return tuple(names)


@cache
def _report_hidden(folder: Path, hidden: tuple[str, ...]) -> None:
    """Say what is left out because its name begins with a dot; once, as a training lists twice."""
    if hidden:
        left_out = f"ltloss: left out what is hidden in {folder}: {_listed(hidden)}; rename those to use"
        print(printable(left_out), file=sys.stderr)


@cache
def _report_loose(folder: Path) -> None:
    """Say how many images lie beside the class folders and so have no class; once."""
    loose = sum(path.suffix.lower() in SUFFIXES and path.is_file() for path in folder.iterdir())
    if loose:
        left_out = f"ltloss: left out {loose:,} image{'s' * (loose > 1)} beside the class folders of {folder}"
        print(printable(f"{left_out}; move those to use into one"), file=sys.stderr)


def _sub_folders(folder: Path, *, hidden: bool = False) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name.startswith(".") == hidden)


def check_same_classes(expected: Sequence[str], given: Sequence[str], expected_from: str, given_from: str) -> None:
    """Raise UserError that names the differing classes, unless both lists are equal."""
    if tuple(expected) == tuple(given):
        return
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    parts = [f"{expected_from} has {_listed(missing)} which {given_from} lacks"] if missing else []
    parts += [f"{given_from} has {_listed(extra)} which {expected_from} lacks"] if extra else []
    raise UserError(f"the classes differ: {'; '.join(parts) or 'their order'}. Use data with the same classes")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _images_below(folder: Path) -> list[Path]:
    """Image files at any depth, sorted. Hidden ones, or in hidden folders (.ipynb_checkpoints), are left out.

    Links to folders are followed, but no folder is entered twice.
    """
    files: list[Path] = []
    entered = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        files += [path for name in names if (path := Path(place, name)).suffix.lower() in SUFFIXES and path.is_file()]
    found, hidden = [], set()
    for path in sorted(files):
        parts = path.relative_to(folder).parts
        if first := next((i for i, part in enumerate(parts, 1) if part.startswith(".")), 0):
            hidden.add("/".join(parts[:first]))
        else:
            found.append(path)
    _report_hidden(folder, tuple(sorted(hidden)))
    return found


def _checked(
    folder: Path,
    names: Sequence[str],
    labels: np.ndarray,
    class_names: tuple[str, ...],
    choose_shape: Callable[[set[tuple[int, int, int]]], tuple[int, int, int]],
    workers: int,
) -> FolderImages:
    """Decode every file once; files that fail are reported on stderr and left out."""

    def look(name: str) -> tuple[int, int, int] | ImageError:
        try:
            image = open_image(folder / name)
        except ImageError as reason:
            return reason
        return len(image.getbands()), image.height, image.width

    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(look, names))
    skipped, kept, good, shapes = [], [], [], set()
    for i, (name, result) in enumerate(zip(names, results, strict=True)):
        if isinstance(result, ImageError):
            skipped.append((name, str(result)))
            print(printable(f"ltloss: left out {folder / name}: {result}"), file=sys.stderr)
        else:
            kept.append(name)
            good.append(i)
            shapes.add(result)
    return FolderImages(folder, kept, labels[good], class_names, choose_shape(shapes), skipped, workers)
