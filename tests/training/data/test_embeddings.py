"""Files of embeddings: what each format says, that they are mapped, and what is refused."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from helpers.toys import CLASS_NAMES, toy_embeddings, write_embeddings

from ltloss.errors import UserError
from ltloss.training.data.batches import batches
from ltloss.training.data.embeddings import ArrayEmbeddings, load_rows
from ltloss.training.data.sources import has_own_splits, load_data

NAMES = np.array(CLASS_NAMES)


def embeddings(path: Path, split: str = "all", seed: int = 0) -> ArrayEmbeddings:
    source = load_data(str(path), split=split, seed=seed)  # type: ignore[arg-type]
    assert isinstance(source, ArrayEmbeddings)
    return source


def _npz(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    np.savez(folder / "f.npz", x=x, y=y, class_names=NAMES)
    return folder / "f.npz"


def _compressed(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    np.savez_compressed(folder / "f.npz", x=x, y=NAMES[y])
    return folder / "f.npz"


def _npy(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    np.save(folder / "f.npy", x)
    np.save(folder / "f.labels.npy", NAMES[y])
    return folder / "f.npy"


def _npy_with_text(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    np.save(folder / "f.npy", x)
    (folder / "f.labels.txt").write_text("\n".join(NAMES[y]) + "\n")
    return folder / "f.npy"


def _safetensors(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    save_file({"x": x, "y": y}, folder / "f.safetensors", metadata={"class_names": json.dumps(CLASS_NAMES)})
    return folder / "f.safetensors"


def _parquet(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"id": np.arange(len(y)), "label": NAMES[y], "vector": list(x)})
    pq.write_table(table, folder / "f.parquet", row_group_size=7)
    return folder / "f.parquet"


FORMATS = [_npz, _compressed, _npy, _npy_with_text, _safetensors, _parquet]
MAPPED = [_npz, _npy, _npy_with_text, _safetensors]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_says_the_same(write: Callable[..., Path], tmp_path: Path) -> None:
    x, y = toy_embeddings(10)
    path = write(tmp_path, x, y)
    source = embeddings(path)
    assert (source.shape, source.class_names) == ((6,), CLASS_NAMES)
    assert source.labels.tolist() == y.tolist()
    assert torch.equal(source.batch(np.arange(30)), torch.from_numpy(x))
    assert isinstance(source.array, np.memmap) == (write in MAPPED)
    assert not has_own_splits(str(path))
    train, test = embeddings(path, "train"), embeddings(path, "test")
    assert (len(train), len(test)) == (24, 6)
    assert np.bincount(test.labels).tolist() == [2, 2, 2]
    assert sorted([*train.names, *test.names]) == sorted(source.names)
    assert source.names[7] == "f/00007"
    assert embeddings(path, "test", seed=1).names != test.names
    assert torch.equal(test.batch(np.array([3])), torch.from_numpy(x[test.rows[3:4]]))


def test_own_splits_are_used(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "own.npz", names_test=np.array([f"n{i}" for i in range(15)]))
    train, test, both = (embeddings(path, split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(both)) == (60, 15, 75)
    assert has_own_splits(str(path))
    assert torch.equal(both.batch(np.array([61])), test.batch(np.array([1])))
    assert (both.names[59], both.names[61], test.names[1]) == ("train/00059", "n1", "n1")


def test_numbers_without_names_are_the_names(tmp_path: Path) -> None:
    assert embeddings(write_embeddings(tmp_path / "f.npz", class_names=None), "test").class_names == ("0", "1", "2")
    x, y = toy_embeddings(2)
    np.save(tmp_path / "f.npy", x)
    (tmp_path / "f.labels.txt").write_text("\n".join(map(str, y)))
    assert embeddings(tmp_path / "f.npy").class_names == ("0", "1", "2")


@pytest.mark.parametrize("labels", [["0", "1", "0", "1"], ["owl", "jay", "owl", "jay"]], ids=["numbers", "names"])
def test_a_byte_order_mark_is_no_part_of_the_first_label(labels: list[str], tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", toy_embeddings(2)[0][:4])
    (tmp_path / "f.labels.txt").write_text("\n".join(labels), encoding="utf-8-sig")
    assert embeddings(tmp_path / "f.npy").class_names == tuple(sorted(set(labels)))


@pytest.mark.parametrize(("dtype", "read"), [("f2", torch.float16), ("f4", torch.float32), ("f8", torch.float32)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_of_any_float_and_order(dtype: str, read: torch.dtype, order: str, tmp_path: Path) -> None:
    x, y = toy_embeddings(4)
    x = np.asarray(x / 32, dtype=dtype, order=order)  # type: ignore[call-overload]
    source = embeddings(_npz(tmp_path, x, y))
    (batch,) = batches(source, 100)
    assert batch.images.dtype == read
    assert torch.equal(batch.images, torch.from_numpy(np.ascontiguousarray(x)).to(read))


def test_a_subset_shares_the_matrix(tmp_path: Path) -> None:
    source = embeddings(_npz(tmp_path, *toy_embeddings(10)))
    part = source.subset(np.array([4, 25])).subset(np.array([1]))
    assert part.array is source.array
    assert (part.names, part.labels.tolist()) == (["f/00025"], [2])
    assert torch.equal(part.batch(np.array([0])), source.batch(np.array([25])))


def test_moments_by_hand() -> None:
    array = np.array([[1, 5, 0], [9, 9, 9], [3, 5, -4]], dtype=np.float16)
    source = ArrayEmbeddings(array, np.array([0, 2]), np.array([0, 1]), ("a", "b"), "x")
    assert source.moments() == ((2.0, 5.0, -2.0), (1.0, 1.0, 2.0))  # the feature that does not vary keeps a 1


def test_the_checksum_is_of_the_rows_in_order(tmp_path: Path) -> None:
    source = embeddings(_npz(tmp_path, *toy_embeddings(10)))
    other = embeddings(_npy(tmp_path, *toy_embeddings(10)))
    assert source.checksum() == other.checksum()
    assert len({source.checksum(), source.checksum(1), source.subset(np.arange(29, -1, -1)).checksum()}) == 3


def test_rows_to_predict_need_no_labels(tmp_path: Path) -> None:
    x, _ = toy_embeddings(2)
    np.savez(tmp_path / "x.npz", x=x, names=np.array(list("abcdef")))
    np.save(tmp_path / "x.npy", x)
    for path, names in ((tmp_path / "x.npz", list("abcdef")), (tmp_path / "x.npy", [f"x/{i:05d}" for i in range(6)])):
        source = load_rows(path)
        assert set(source.labels) == {-1}
        assert source.names == names
        assert torch.equal(source.batch(np.arange(6)), torch.from_numpy(x))
    assert len(load_rows(write_embeddings(tmp_path / "own.npz"))) == 75
    (tmp_path / "x.txt").write_text("")
    for name in ("x.txt", "none.npz"):
        with refused("--data", name, ".safetensors", error=UserError):
            load_rows(tmp_path / name)


def _with(value: float, row: int = 3) -> np.ndarray:
    x = toy_embeddings(20)[0].astype(np.float64)
    x[row, 2] = value
    return x


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"x_train": _with(np.nan)}, ("x_train[3]", "nan")),
        ({"x_train": _with(-np.inf)}, ("x_train[3]", "-inf")),
        ({"x_train": _with(1e39)}, ("x_train[3]", "1e+39", "float32")),
        ({"x_test": np.zeros((15, 5), np.float32)}, ("x_test", "5", "x_train", "6")),
        ({"x_test": np.zeros((15, 6), np.int32)}, ("x_test", "int32", "float32", "(N, D)")),
        ({"x_test": np.zeros(15, np.float32)}, ("x_test", "(15,)", "(N, D)")),
        ({"x_test": np.zeros((14, 6), np.float32)}, ("x_test", "14", "y_test", "15")),
        ({"x_test": np.zeros((0, 6), np.float32)}, ("x_test", "(0, 6)")),
        ({"y_train": np.zeros(60)}, ("y_train", "float64", "(60,)")),
        ({"y_test": np.full(15, 3)}, ("y_test[0]", "3", "0..2")),
        ({"y_test": np.array(["apple"] * 14 + ["plum"])}, ("y_test[14]", "'plum'", "3")),
        ({"y_train": np.array([0, 1] * 30)}, ("corn",)),
        ({"x_test": None}, ("x_test",)),
        ({"y_train": None}, ("y_train",)),
        ({"names_train": np.array(["a"])}, ("names_train", "(1,)", "60")),
    ],
    ids=lambda value: "" if isinstance(value, dict) else " ".join(value),
)
def test_what_is_refused(changes: dict[str, np.ndarray | None], facts: tuple[str, ...], tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "data.npz", **changes)
    with refused(str(path), *facts, error=UserError):
        for split in ("train", "test", "all"):
            load_data(str(path), split=split)  # type: ignore[arg-type]


def test_features_without_labels_say_where_labels_are_looked_for(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", toy_embeddings(2)[0])
    with refused("y", "f.labels.npy", "f.labels.txt", error=UserError):
        embeddings(tmp_path / "f.npy")


@pytest.mark.parametrize("write", [_npz, _compressed, _npy])
def test_labels_out_of_a_table_say_how_they_become_strings(write: Callable[..., Path], tmp_path: Path) -> None:
    """pandas keeps strings as Python objects, which NumPy pickles."""
    path = write(tmp_path, *toy_embeddings(5))
    labels = path.with_suffix(".labels.npy") if path.suffix == ".npy" else path
    if labels != path:
        np.save(labels, NAMES.astype(object))
    else:
        (np.savez_compressed if write is _compressed else np.savez)(path, x=np.eye(3), y=NAMES.astype(object))
    with refused(str(labels), "y.astype(str)", error=UserError):
        embeddings(path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for suffix in (".npy", ".npz", ".safetensors", ".parquet"):
        path = tmp_path / f"data{suffix}"
        for content in (b"", b"\x10" * 40):
            path.write_bytes(content)
            with refused(str(path), error=UserError):
                embeddings(path)
    for write in (_npz, _npy, _safetensors):
        path = write(tmp_path, *toy_embeddings(10))
        path.write_bytes(path.read_bytes()[:400])
        with refused(str(path), error=UserError):
            embeddings(path)


@pytest.mark.parametrize("write", [_npz, _npy])
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, *toy_embeddings(5))

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("zipfile.ZipFile", forbidden)
    monkeypatch.setattr("numpy.lib.format.open_memmap", forbidden)
    for read in (embeddings, load_rows):
        with pytest.raises(PermissionError):
            read(path)


def test_a_shape_that_goes_on_into_the_next_member_is_refused(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "f.npz")
    content, former = path.read_bytes(), b"'shape': (60, 6)"
    assert content.count(former) == 1
    path.write_bytes(content.replace(former, b"'shape': (62, 6)"))
    with refused(str(path), error=UserError):
        load_rows(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"__metadata__": []}',
        b'{"x": {"dtype": "U8", "shape": [1, 4], "data_offsets": [-4, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
    ],
)
def test_headers_of_safetensors_that_cannot_be(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "f.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with refused(str(tmp_path / "f.safetensors"), error=UserError):
        load_rows(tmp_path / "f.safetensors")


def test_an_npz_that_is_called_npy_is_refused(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "f.npz").rename(tmp_path / "f.npy")
    with refused(str(tmp_path / "f.npy"), error=UserError):
        load_rows(tmp_path / "f.npy")


def test_tensors_that_numpy_does_not_know(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"x": torch.zeros(2, 3, dtype=torch.bfloat16), "y": torch.arange(2)}, tmp_path / "b.safetensors")
    with refused("x", "BF16", "float32", error=UserError):
        embeddings(tmp_path / "b.safetensors")


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for columns, facts in (
        ({"label": [0, 1]}, ("embedding", "label")),
        ({"embedding": [[1.0], [1.0, 2.0]], "label": [0, 1]}, ("embedding", "1", "2")),
        ({"embedding": [[1.0], None], "label": [0, 1]}, ("embedding", "None")),
    ):
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
        with refused(str(tmp_path / "t.parquet"), *facts, error=UserError):
            embeddings(tmp_path / "t.parquet")
