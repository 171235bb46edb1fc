from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.refusals import missing, refused
from helpers.toys import CLASS_NAMES, toy_images
from PIL import Image

from ltloss.errors import ImageError, UserError
from ltloss.training.data.decode import open_image, to_pixels
from ltloss.training.data.images import FolderImages
from ltloss.training.data.npz import load_npz
from ltloss.training.data.sources import load_data, load_images


def huge_png(side: int) -> bytes:
    """A valid header for side x side pixels, with next to no data behind it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_folders_of_one_image_leave_nothing_to_test(tmp_path: Path) -> None:
    for name in CLASS_NAMES:
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    assert len(load_data(str(tmp_path), split="train")) == 3
    with refused(str(tmp_path), "second", "test", error=UserError):
        load_data(str(tmp_path), split="test")


def test_digits_are_split_by_class_without_overlap() -> None:
    train, test = (load_data("digits", split=split, seed=1) for split in ("train", "test"))
    assert (len(train), len(test)) == (1438, 359)
    assert not set(train.names) & set(test.names)
    assert np.bincount(test.labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert train.shape == (1, 8, 8)
    assert int(train.batch(np.arange(100)).max()) == 255
    other = load_data("digits", split="test", seed=2)
    assert other.names != test.names


def test_npz_keeps_its_own_splits_and_names(toy_npz: Path) -> None:
    train, test, both = (load_data(str(toy_npz), split=split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(both)) == (60, 15, 75)
    assert train.class_names == CLASS_NAMES
    assert test.names[4] == "test/00004"
    assert torch.equal(both.batch(np.array([60])), test.batch(np.array([0])))


def test_colour_npz_is_channels_first_and_can_be_resized(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 10, 12, 3)).astype(np.uint8)
    labels = np.array([0, 1, 0, 1, 0, 1])
    np.savez(tmp_path / "colour.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    source = load_data(str(tmp_path / "colour.npz"), split="train")
    assert source.shape == (3, 10, 12)
    assert np.array_equal(source.batch(np.array([2]))[0].permute(1, 2, 0), images[2])
    assert source.class_names == ("0", "1")
    small = load_data(str(tmp_path / "colour.npz"), split="train", image_size=8, channels=1)
    assert small.shape == (1, 8, 8)
    assert small.batch(np.arange(6)).shape == (6, 1, 8, 8)


@pytest.mark.parametrize("shape", [(1, 12, 3), (12, 1, 3), (1, 12), (12, 1), (1, 12, 1), (12, 1, 1), (1, 3, 1)])
def test_images_one_pixel_high_or_wide_keep_their_sides(shape: tuple[int, ...], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, *shape)).astype(np.uint8)
    np.savez(tmp_path / "thin.npz", x_train=images, y_train=[0, 1, 0, 1], x_test=images, y_test=[0, 1, 0, 1])
    picture = load_npz(tmp_path / "thin.npz", "train").image(1)
    assert (picture.height, picture.width, len(picture.getbands())) == (*shape, 1)[:3]
    assert np.array_equal(np.asarray(picture).reshape(shape), images[1])
    assert load_data(str(tmp_path / "thin.npz"), split="train", image_size=16).shape == ((*shape, 1)[2], 16, 16)


def test_folder_without_splits_keeps_a_fifth_for_the_test(toy_folder: Path) -> None:
    train, test = (load_data(str(toy_folder), split=split, seed=0) for split in ("train", "test"))
    assert (len(train), len(test)) == (24, 6)
    assert sorted([*train.names, *test.names]) == sorted(load_data(str(toy_folder), split="all").names)
    assert train.class_names == CLASS_NAMES
    assert train.shape == (1, 8, 8)


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder_with_splits_uses_them(toy_folder: Path, tmp_path: Path, test_name: str) -> None:
    root = tmp_path / "split"
    shutil.copytree(toy_folder, root / "train")
    for name in CLASS_NAMES:
        (root / test_name / name).mkdir(parents=True)
        shutil.copy(toy_folder / name / next((toy_folder / name).iterdir()).name, root / test_name / name)
    train, test = (load_data(str(root), split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (30, 3)
    assert test.names[0].startswith(f"{test_name}/apple/")


def test_folder_and_array_give_the_same_pixels(toy_folder: Path) -> None:
    images, labels = toy_images(10)
    source = load_data(str(toy_folder), split="all")
    assert source.labels.tolist() == labels.tolist()
    assert np.array_equal(source.batch(np.arange(30))[:, 0], images)
    assert np.array_equal(np.asarray(source.image(7)), images[7])
    chosen = source.subset(np.array([4, 25]))
    assert np.array_equal(chosen.batch(np.array([1]))[0, 0], images[25])


def test_linked_folders_hold_images_as_others_do(toy_folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    (linked / "bean").mkdir(parents=True)
    shutil.copytree(toy_folder / "corn", linked / "corn")
    (linked / "apple").symlink_to(toy_folder / "apple")
    (linked / "bean" / "more").symlink_to(toy_folder / "bean")
    (linked / "corn" / "again").symlink_to(linked / "corn")
    plain = [path.relative_to(toy_folder).as_posix() for path in sorted(toy_folder.rglob("*.png"))]
    expected = [name.replace("bean/", "bean/more/") for name in plain]
    source = load_data(str(linked), split="all")
    assert list(source.names) == expected
    assert np.bincount(source.labels).tolist() == [10, 10, 10]
    (linked / "corn" / "all").symlink_to(linked)
    assert load_images(linked, image_shape=(1, 12, 12)).names == expected


def test_bad_images_are_reported_once_and_left_out(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (toy_folder / "apple" / "000.png").read_bytes()
    bad = {"cut.png": good[: len(good) // 2], "empty.png": b"", "text.jpg": b"hello", "huge.png": huge_png(50_000)}
    for name, content in bad.items():
        (toy_folder / "apple" / name).write_bytes(content)
    source = load_data(str(toy_folder), split="all")
    assert isinstance(source, FolderImages)
    assert len(source) == 30
    reasons = {Path(name).name: reason for name, reason in source.skipped}
    assert reasons.keys() == bad.keys()
    assert all(reasons.values())
    assert len(set(reasons.values())) == 4  # each of its own
    reported = capsys.readouterr().err.splitlines()
    assert len(reported) == 4
    assert all(str(toy_folder) in line for line in reported)


def test_a_bad_image_does_not_move_others_between_the_splits(toy_folder: Path) -> None:
    before = {split: set(load_data(str(toy_folder), split=split).names) for split in ("train", "test")}
    (toy_folder / "bean" / "013.png").write_bytes(b"")
    for split in ("train", "test"):
        assert before[split] - set(load_data(str(toy_folder), split=split).names) <= {"bean/013.png"}


def test_images_of_different_sizes_become_one_size(toy_folder: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(toy_folder / "corn" / "wide.png")
    assert load_data(str(toy_folder), split="all").shape == (3, 64, 64)
    assert load_data(str(toy_folder), split="all", image_size=16, channels=1).shape == (1, 16, 16)


def test_photos_of_one_size_are_not_used_at_full_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (160, 120), "red").save(tmp_path / name)
    assert load_data(str(tmp_path), split="train").shape == (3, 64, 64)
    (told,) = capsys.readouterr().err.splitlines()
    assert not missing(told, str(tmp_path), "160 x 120", "64 x 64", "--image-size")
    assert load_data(str(tmp_path), split="train", image_size=(120, 160)).shape == (3, 120, 160)
    assert capsys.readouterr().err == ""
    for path in tmp_path.rglob("*.png"):
        Image.new("RGB", (128, 100), "red").save(path)
    assert load_data(str(tmp_path), split="train").shape == (3, 100, 128)


def test_images_too_small_to_train_on_are_refused(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (tmp_path / "folder" / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("L", (5, 3)).save(tmp_path / "folder" / name)
    images, labels = np.zeros((4, 3, 5), np.uint8), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    for data in ("folder", "data.npz"):
        with refused("5 x 3", "4", "--image-size", error=UserError):
            load_data(str(tmp_path / data), split="train")
        assert load_data(str(tmp_path / data), split="train", image_size=4).shape == (1, 4, 4)


def test_images_to_classify_have_no_label(toy_folder: Path) -> None:
    (toy_folder / "loose.PNG").write_bytes((toy_folder / "apple" / "000.png").read_bytes())
    source = load_images(toy_folder, image_shape=(3, 12, 12))
    assert len(source) == 31
    assert set(source.labels) == {-1}
    assert source.batch(np.array([0, 30])).shape == (2, 3, 12, 12)


def test_modes_are_brought_to_grey_or_colour(tmp_path: Path) -> None:
    def saved(image: Image.Image, name: str = "image.png") -> np.ndarray:
        image.save(tmp_path / name)
        return np.asarray(open_image(tmp_path / name))

    assert saved(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))[0, 0].tolist() == [255, 255, 255]
    assert saved(Image.fromarray(np.full((4, 4), 0x8080, np.uint16)))[0, 0] == 0x80
    assert saved(Image.new("1", (4, 4), 1))[0, 0] == 255
    assert saved(Image.new("P", (4, 4)), "image.gif").shape == (4, 4, 3)
    turned = Image.new("L", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # stored lying on its side
    turned.save(tmp_path / "turned.png", exif=exif)
    assert open_image(tmp_path / "turned.png").size == (4, 8)


@pytest.mark.parametrize("name", ["image.png", "image.pgm", "image.tif"])
def test_dark_images_of_16_bits_are_as_dark_as_their_neighbours(name: str, tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / name)
    assert np.asarray(open_image(tmp_path / name)).max() == 0
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / name)
    assert np.asarray(open_image(tmp_path / name)).max() == 1


@pytest.mark.parametrize(
    ("pixels", "facts"),
    [
        (np.full((4, 4), 0.5, np.float32), ("floating point", "8 or 16 bits")),
        (np.full((4, 4), 70_000, np.int32), ("70000", "0..65535", "8 or 16 bits")),
        (np.full((4, 4), -1, np.int32), ("-1", "0..65535", "8 or 16 bits")),
    ],
    ids=["float", "large", "negative"],
)
def test_pixels_without_a_known_white_are_refused(pixels: np.ndarray, facts: tuple[str, ...], tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "image.tif")
    with refused(*facts, error=ImageError):
        open_image(tmp_path / "image.tif")


def test_resizing_keeps_the_aspect_ratio() -> None:
    wide = np.zeros((10, 40), np.uint8)
    wide[:, 12:28] = 200
    assert to_pixels(Image.fromarray(wide), (1, 5, 5)).tolist() == np.full((1, 5, 5), 200).tolist()


def test_a_tiff_with_one_bit_wrong_is_read_or_refused(tmp_path: Path) -> None:
    """Among other errors, Pillow raises TypeError for one of them."""
    path = tmp_path / "image.tiff"
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(path, exif={0x0112: 6})
    content = path.read_bytes()
    refused_at = set()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            open_image(path)
        except ImageError:
            refused_at.add(bit // 8)
    assert {0, 1} < refused_at < set(range(len(content)))


def test_a_missing_image_is_a_image_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        open_image(tmp_path / "none.png")


def test_hidden_class_folders_are_left_out_with_a_word(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy_folder / ".net").mkdir()
    for split in ("test", "train"):  # told once, whichever comes first
        assert ".net" not in load_data(str(toy_folder), split=split).class_names
    (told,) = capsys.readouterr().err.splitlines()
    assert not missing(told, str(toy_folder), ".net")


def _with_splits(toy_folder: Path, tmp_path: Path) -> Path:
    data = tmp_path / "split"
    for split in ("train", "test"):
        shutil.copytree(toy_folder, data / split)
    return data


@pytest.mark.parametrize("place", [".", "train", "test"])
def test_hidden_folders_of_own_splits_are_left_out_with_a_word(
    toy_folder: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _with_splits(toy_folder, tmp_path)
    shutil.copytree(toy_folder / "bean", data / place / ".net")
    for split in ("train", "test"):
        load_data(str(data), split=split)
    (told,) = capsys.readouterr().err.splitlines()
    assert not missing(told, str(data / place), ".net")


def test_what_is_hidden_inside_of_a_class_is_left_out_with_a_word(
    toy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (".ipynb_checkpoints", "deep/.thumbs/small"):
        shutil.copytree(toy_folder / "bean", toy_folder / "apple" / place)
    for split in ("train", "test", "all"):
        source = load_data(str(toy_folder), split=split)
    assert np.bincount(source.labels).tolist() == [10, 10, 10]
    (told,) = capsys.readouterr().err.splitlines()
    assert not missing(told, str(toy_folder / "apple"), ".ipynb_checkpoints", "deep/.thumbs")
    assert len(load_images(toy_folder, image_shape=(3, 12, 12))) == 30
    (told,) = capsys.readouterr().err.splitlines()
    assert not missing(told, str(toy_folder), "apple/.ipynb_checkpoints", "apple/deep/.thumbs")


@pytest.mark.parametrize("place", [".", "train", "test"])
def test_images_beside_the_class_folders_are_left_out_with_a_word(
    toy_folder: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _with_splits(toy_folder, tmp_path)
    for name in ("0.png", "1.png"):
        shutil.copy(toy_folder / "apple" / "000.png", data / place / name)
    for split in ("train", "test", "all"):
        load_data(str(data), split=split)
    (told,) = capsys.readouterr().err.splitlines()
    assert not missing(told, str(data / place), "2 images", "class folders")
