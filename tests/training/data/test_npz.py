from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.refusals import refused
from helpers.toys import toy_images

from ltloss.errors import UserError
from ltloss.training.data.images import Split
from ltloss.training.data.sources import load_data


def arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    images, labels = toy_images(4)
    return {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels, **changes}


def refuses(path: Path, *facts: str) -> None:
    with refused(str(path), *facts, error=UserError):
        load_data(str(path), split="all")


@pytest.mark.parametrize(
    ("labels", "largest"),
    [(np.arange(12) * 10**9, "11000000000"), (np.arange(12, dtype=np.uint64) + 2**63, "9223372036854775819")],
)
def test_large_labels_are_refused_before_their_classes_are_counted(
    labels: np.ndarray, largest: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", **arrays(y_train=labels))
    refuses(tmp_path / "data.npz", "y_train", largest)


@pytest.mark.parametrize("shape", [(12, 10, 9), (12, 12, 12, 3)], ids=["size", "channels"])
@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_training_and_test_images_have_one_shape(shape: tuple[int, ...], split: Split, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays(x_test=np.zeros(shape, np.uint8)))
    with refused("x_train", "x_test", str(arrays()["x_train"].shape[1:]), str(shape[1:]), error=UserError):
        load_data(str(tmp_path / "data.npz"), split=split)


def test_unsigned_labels_work(tmp_path: Path) -> None:
    labels = toy_images(4)[1].astype(np.uint64)
    np.savez(tmp_path / "data.npz", **arrays(y_train=labels, y_test=labels))
    assert load_data(str(tmp_path / "data.npz"), split="all").class_names == ("0", "1", "2")


def test_python_objects_are_refused_with_the_way_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays(class_names=np.array(["a", "b", "c"], dtype=object)))
    refuses(tmp_path / "data.npz", "class_names.astype(str)")


def test_one_array_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.zeros(3))
    (tmp_path / "data.npy").rename(tmp_path / "data.npz")
    refuses(tmp_path / "data.npz", "x_train")


def test_text_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_text("label,pixels\n")
    refuses(tmp_path / "data.npz")


def test_any_flipped_byte_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, **arrays())
    good, caught = path.read_bytes(), 0
    for position in range(0, len(good), 7):
        damaged = bytearray(good)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            load_data(str(path), split="all")
        except UserError:
            caught += 1
    assert caught > len(good) // 14


def test_an_encrypted_archive_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays())
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(mark)
        while at >= 0:
            (flags,) = struct.unpack_from("<H", content, at + offset)
            struct.pack_into("<H", content, at + offset, flags | 1)
            at = content.find(mark, at + 4)
    path.write_bytes(content)
    refuses(path)


def test_members_that_are_no_arrays_are_reported(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        for name in arrays():
            archive.writestr(name, "text")
    refuses(tmp_path / "data.npz", "y_train")


def test_a_header_that_ends_too_soon_is_reported(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        for name in arrays():
            archive.writestr(f"{name}.npy", b"\x93NUMPY\1\0\1\0{")
    refuses(tmp_path / "data.npz")
