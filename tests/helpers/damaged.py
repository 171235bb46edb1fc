"""Damaged files: bytes changed anywhere, and contents that are packed well but are not what they should be."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

Step = tuple[int, int, int]  # what is done, where and with what: each counts modulo the choices that there are
Damage = Callable[[bytes, Sequence[Step]], bytes]

STEPS: st.SearchStrategy[list[Step]] = st.lists(
    st.tuples(st.integers(0, 255), st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4
)
_WORDS = [0, 1, 2**7, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
_TEXTS = [b"", b"-1", b"NaN", b"1e999", b"null", b"\xff\xfe", b"\0", b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"\n\n"]


def of_bytes(content: bytes, steps: Sequence[Step]) -> bytes:
    """Bits flipped, words of extreme values, pieces cut out, repeated, exchanged or put in."""
    found = bytearray(content)
    for kind, where, what in steps:
        at = where % (len(found) + 1)
        word = struct.pack("<Q", _WORDS[what % len(_WORDS)])[: (1, 2, 4, 8)[what // 64]]
        span = slice(at, at + 1 + what)
        match kind % 9:
            case 0:
                found[at : at + 1] = bytes(byte ^ 1 << what % 8 for byte in found[at : at + 1])
            case 1:
                found[at : at + 1] = bytes([what])
            case 2:
                found[at : at + len(word)] = word
            case 3:
                found[at : at + len(word)] = word[::-1]
            case 4:
                del found[at:]
            case 5:
                del found[span]
            case 6:
                found[at:at] = found[span]
            case 7:
                found[:16], found[at : at + 16] = found[at : at + 16], found[:16]
            case 8:
                found[at:at] = _TEXTS[what % len(_TEXTS)]
    return bytes(found)


class Trap:
    """An object whose pickle, when it is loaded, writes down that it was."""

    sprung = 0

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """What unpickling calls."""
        return _spring, ()


def _spring() -> None:
    Trap.sprung += 1


def npy(array: np.ndarray) -> bytes:
    """The content of an .npy file."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


def _declared(header: str, version: bytes = b"\1\0") -> bytes:
    """An .npy file of that header, with 64 bytes behind it."""
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header.encode("latin1") + bytes(64)


def _of_shape(shape: str, descr: str = "'<f4'") -> bytes:
    return _declared(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n")


_ARRAYS = [
    npy(np.array([Trap()], dtype=object)),
    npy(np.array(Trap(), dtype=object)),
    *(npy(np.array(value)) for value in (0, "", "name", np.nan, 2**63, -1, b"bytes", True, 1j)),
    *(
        npy(np.zeros(shape, kind))
        for shape in ((0,), (3,), (0, 3), (3, 0), (2, 2, 2, 2))
        for kind in ("f4", "i8", "U3")
    ),
    *(npy(np.full((60, 6), value, "f4")) for value in (np.nan, np.inf, 3e38)),
    *(npy(np.full(60, value)) for value in (-1, 2**62, 1.5)),
    npy(np.array([("a", 1)], dtype=[("name", "U1"), ("number", "i4")])),
    npy(np.array(["2001-01-01", "NaT"], dtype="M8[D]")),
    npy(np.zeros((3, 4), "f4", order="F")),
    npy(np.zeros((60, 6), ">f4")),
    _of_shape("(1 << 40, 1 << 40)"),
    *(_of_shape(s) for s in ("(1099511627776,)", "(4294967296, 4294967296)", "(9223372036854775807, 2)", "(-1, 6)")),
    *(_of_shape(s) for s in ("(60000000000, 6)", "(1e9, 6)", "(True, 6)", "6", "('a',)", "(" * 150, "(1,) * 3")),
    *(_of_shape("(3, 4)", d) for d in ("'|O'", "'<U99999999'", "'V0'", "[('a', '<f4', (100000, 100000))]", "'x'", "1")),
    _declared("{'descr': '<f4', \n"),
    _declared("{'descr': '''<f4\n"),
    _declared("{"),
    _declared("[]"),
    _declared("{}", b"\3\0"),
    _declared("{}", b"\7\0"),
    b"text",
    b"",
]


def of_archive(content: bytes, steps: Sequence[Step]) -> bytes:
    """Members of a zip left out, exchanged, written twice, renamed, damaged, or replaced by strange arrays."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    method = zipfile.ZIP_STORED
    for kind, where, what in steps:
        if not members:
            break
        at = where % len(members)
        name, held = members[at]
        other = what % len(members)
        match kind % 10:
            case 0:
                del members[at]
            case 1:
                members[at], members[other] = (name, members[other][1]), (members[other][0], held)
            case 2:
                members.append((name, members[other][1]))
            case 3:
                members[at] = (_NAMES[what % len(_NAMES)], held)
            case 4:
                members[at] = (name, of_bytes(held, [(what, where // len(members), what)]))
            case 5:  # the header of an array
                members[at] = (name, of_bytes(held[:128], [(what, where // len(members), what)]) + held[128:])
            case 6:
                method = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)[what % 3]
            case 7:
                members.append((_NAMES[what % len(_NAMES)], _ARRAYS[where % len(_ARRAYS)]))
            case _:
                members[at] = (name, _ARRAYS[what % len(_ARRAYS)])
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w", method) as archive, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate name")
        for name, held in members:
            archive.writestr(zipfile.ZipInfo(name), held, method)
    return found.getvalue()


_NAMES = ["", "x.npy", "y.npy", "names.npy", "class_names.npy", "x_train.npy", "../x.npy", "a/", "é.npy", "x_train"]


class _Text(str):
    """Written into JSON as it is."""


_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 60, 1.5, 1e-300, 1e300, -0.0, float("nan"), float("inf")),
    *(2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 10**400),
    *(
        "",
        "a",
        "0",
        "cpu",
        "F32",
        "BF16",
        "I64",
        "F8_E4M3",
        "F8_E5M2",
        "C64",
        "F4",
        "a\0b",
        "\ud800",
        "né, 猫",
        "x" * 5000,
    ),
    *([], {}, [[]], [0], [1, 2], [-1, -1], [0, 0], [0, 2**64], [2**32, 2**32], ["a"], [None], {"a": 1}, {"": []}),
    *([1, 2, 3, 4, 5, 6, 7, 8], [1.5], [float("nan")], [True], {"a": {"b": [1]}}),
    *(_Text("9" * 5000), _Text("[" * 3000 + "]" * 3000), _Text('{"a":' * 3000 + "1" + "}" * 3000), _Text("1e999")),
]


def of_json(content: bytes, steps: Sequence[Step]) -> bytes:
    """Values of a tree that are replaced, left out, renamed or written twice under one name; well-formed, mostly."""
    tree = _Node(json.loads(content))
    for kind, where, what in steps:
        tree.change(kind, where, what)
    return tree.text().encode("utf-8", "surrogatepass")


class _Node:
    """A value of JSON that may hold a name twice."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.items: list[tuple[str | None, _Node]] = []
        if isinstance(value, dict):
            self.items = [(name, _Node(item)) for name, item in value.items()]
        elif isinstance(value, list):
            self.items = [(None, _Node(item)) for item in value]

    def places(self) -> list[tuple[_Node, int]]:
        """Each item below, as its parent and its number there."""
        here = [(self, i) for i in range(len(self.items))]
        return here + [place for _, item in self.items for place in item.places()]

    def change(self, kind: int, where: int, what: int) -> None:
        """One step."""
        places = self.places()
        if not places or where == 1:
            self.__init__(_VALUES[what % len(_VALUES)])  # type: ignore[misc]
            return
        parent, i = places[where % len(places)]
        name, item = parent.items[i]
        new = _Node(_VALUES[what % len(_VALUES)])
        match kind % 8:
            case 0:
                del parent.items[i]
            case 1:
                parent.items.append((name, new))
            case 2:
                parent.items.insert(0, (name, new))
            case 3 if name is not None:
                parent.items[i] = (str(new.value), item)
            case 4 if name is not None:
                parent.items.append((str(new.value)[:20], new))
            case _:
                parent.items[i] = (name, new)

    def text(self) -> str:
        """The JSON."""
        if isinstance(self.value, _Text):
            return self.value
        if isinstance(self.value, dict):
            inside = (f"{json.dumps(name)}: {item.text()}" for name, item in self.items)
            return "{" + ", ".join(inside) + "}"
        if isinstance(self.value, list):
            return "[" + ", ".join(item.text() for _, item in self.items) + "]"
        return json.dumps(self.value)


def of_safetensors(content: bytes, steps: Sequence[Step]) -> bytes:
    """A header that says something else of the same bytes, and its length."""
    length = int.from_bytes(content[:8], "little")
    header = of_json(content[8 : 8 + length], steps)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]
