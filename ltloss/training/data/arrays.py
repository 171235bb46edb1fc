"""Named arrays in files of several formats, memory-mapped if the format allows it. Nothing is unpickled."""

from __future__ import annotations

import json
import lzma
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from ltloss.errors import UserError, in_one_line

Arrays = Mapping[str, Callable[[], np.ndarray]]  # name -> function that reads the array

# Errors for damaged and foreign files: RuntimeError for an encrypted archive, MemoryError for an absurd size,
# TokenError from NumPy for a header that ends too soon.
_DAMAGE = (
    *(ValueError, OSError, EOFError, RuntimeError, MemoryError, OverflowError, SyntaxError, KeyError, TypeError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError),
)
MAGIC = b"\x93NUMPY"  # the first bytes of one array
_SAFETENSORS_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1"}
_LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors within the block into a UserError that ``path`` cannot be read."""
    try:
        yield
    except PermissionError:  # the file may be sound
        raise
    except _DAMAGE as error:
        raise UserError(f"{path} cannot be read ({in_one_line(error)}); write it anew") from error


def npz_arrays(path: Path) -> Arrays:
    """The members of an .npz; an uncompressed matrix is memory-mapped, all else is read."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    return {name: partial(_npz_member, path, info) for name, info in members.items()}


def npz_header(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype] | None:
    """Shape and dtype of a member of an .npz; None if there is no such array."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            shape, _, dtype = _npy_header(member)
            return shape, dtype
    except PermissionError:
        raise
    except _DAMAGE:
        return None


def refuse_objects(path: Path, name: str, dtype: np.dtype) -> None:
    """Raise UserError if an array holds Python objects, as labels of a pandas column do: they would be unpickled."""
    if dtype.hasobject:
        raise UserError(
            f"{path}: {name} holds Python objects; write it as numbers or, with {name}.astype(str), strings"
        )


def npy_arrays(path: Path) -> Arrays:
    """A matrix in FILE.npy as ``x``; the labels in FILE.labels.npy or FILE.labels.txt, one a line, as ``y``."""
    # Not numpy.load, which also accepts an .npz, and takes an unknown file for a pickle.
    found: dict[str, Callable[[], np.ndarray]] = {"x": lambda: np.lib.format.open_memmap(path, mode="r")}
    array, text = path.with_suffix(".labels.npy"), path.with_suffix(".labels.txt")
    if array.is_file():
        found["y"] = lambda: _npy(array)
    elif text.is_file():
        found["y"] = lambda: _text_labels(text)
    return found


def safetensors_arrays(path: Path) -> Arrays:
    """The tensors of a safetensors file, mapped; ``class_names`` and ``names`` are JSON lists of its metadata."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_LONGEST_HEADER, path.stat().st_size):
            raise ValueError("it is no safetensors file")
        header = json.loads(file.read(length))
    texts = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(texts, dict):
        raise ValueError("it is no safetensors file")
    found: dict[str, Callable[[], np.ndarray]] = {
        name: partial(_safetensors_member, path, 8 + length, name, about) for name, about in header.items()
    }
    for name in texts.keys() & {"class_names", "names"}:
        found[name] = partial(np.array, json.loads(texts[name]), dtype=str)
    return found


def parquet_arrays(path: Path) -> Arrays:
    """A column of lists of floats (``embedding``, or the only such one) as ``x``, and the column ``label`` as ``y``."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("files .parquet need pyarrow: pip install 'ltloss[parquet]'", name=error.name) from error
    try:
        schema = pq.read_schema(path)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    lists = [field.name for field in schema if hasattr(field.type, "value_type") and _is_float(field.type.value_type)]
    name = "embedding" if "embedding" in lists or len(lists) != 1 else lists[0]
    if name not in lists:
        columns = ", ".join(schema.names)
        raise UserError(f"{path} has no column 'embedding' of lists of floats; its columns are {columns}")
    found: dict[str, Callable[[], np.ndarray]] = {"x": partial(_parquet_matrix, path, name)}
    if "label" in schema.names:
        found["y"] = lambda: np.array(pq.read_table(path, columns=["label"])["label"].to_pylist())
    return found


READERS: dict[str, Callable[[Path], Arrays]] = {
    ".npz": npz_arrays,
    ".npy": npy_arrays,
    ".safetensors": safetensors_arrays,
    ".parquet": parquet_arrays,
}


def _npy_header(file: object) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the order is Fortran's, and dtype; the file is then at the first number."""
    version = np.lib.format.read_magic(file)  # type: ignore[arg-type]
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)  # type: ignore[arg-type]
    return shape, fortran, dtype


def _npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        refuse_objects(path, "y", _npy_header(file)[2])
        file.seek(0)
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _npz_member(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    name = info.filename.removesuffix(".npy")
    if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
        with path.open("rb") as file:
            file.seek(info.header_offset + 26)
            start = file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
            if file.read(len(MAGIC)) == MAGIC:
                file.seek(start)
                shape, fortran, dtype = _npy_header(file)
                # A shape that reaches into the next member is left to numpy, which raises an error.
                whole = file.tell() - start + dtype.itemsize * math.prod(shape) == info.file_size
                if whole and len(shape) == 2 and all(shape) and not dtype.hasobject:
                    return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
    if (header := npz_header(path, name)) is not None:
        refuse_objects(path, name, header[1])
    with np.load(path, allow_pickle=False) as archive:
        array: np.ndarray = archive[name]
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{info.filename} is a file of another kind, not an array")
    return array


def _safetensors_member(path: Path, start: int, name: str, about: Mapping[str, list[int]]) -> np.ndarray:
    kind, shape, (first, last) = str(about["dtype"]), tuple(about["shape"]), about["data_offsets"]
    if kind not in _SAFETENSORS_DTYPES:
        raise UserError(f"{path}: {name} is {kind}, which numpy does not know; write it as float32 or float16")
    dtype = np.dtype(_SAFETENSORS_DTYPES[kind])
    whole = all(type(number) is int and number >= 0 for number in (*shape, first, last))
    if not whole or last - first != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{name} of shape {shape} does not fill the bytes from {first} to {last}")
    return np.memmap(path, dtype, "r", start + first, shape) if last > first else np.empty(shape, dtype)


def _is_float(kind: object) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_floating(kind))


def _parquet_matrix(path: Path, name: str) -> np.ndarray:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    column = pq.read_table(path, columns=[name])[name]
    lengths = set(pc.list_value_length(column).unique().to_pylist())
    if len(lengths) != 1 or None in lengths:
        raise UserError(f"{path}: column {name} has lists of lengths {sorted(map(str, lengths))[:5]}; one was expected")
    blocks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(blocks).reshape(len(column), -1)


def _text_labels(path: Path) -> np.ndarray:
    """One label a line: whole numbers if all are, else names."""
    words = np.array([line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()])
    try:
        return words.astype(np.int64)
    except ValueError:
        return words
