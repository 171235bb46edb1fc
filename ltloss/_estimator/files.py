"""A fitted estimator as one .npz: arrays and one line of JSON, no pickle."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ltloss._estimator.heads import Candidate
from ltloss._estimator.space import WIDEST, Array
from ltloss._files import write_file
from ltloss.errors import in_one_line

__all__ = ["explained", "read", "write"]

_FORMAT = "ltloss.sklearn.LongTailClassifier 1"


def _plain(value: Any) -> Any:
    """A NumPy scalar as a Python number; TypeError for anything else, which only a pickle could hold."""
    if not isinstance(value, np.generic):
        raise TypeError(f"{type(value).__name__} {value!r} cannot be saved without pickle")
    return value.item()


def write(path: Path, arrays: Mapping[str, Array], values: Mapping[str, Any]) -> None:
    """Write arrays and values; the file keeps its former content or gets all of the new one."""
    listed = {name: array.tolist() for name, array in arrays.items() if array.dtype == object}
    text = json.dumps({"format": _FORMAT, "objects": listed, "values": values}, default=_plain)
    whole = {name: array for name, array in arrays.items() if name not in listed}
    content = io.BytesIO()
    # Not allow_pickle=False: NumPy 1 stores every keyword as an array.
    np.savez(content, _json=np.array(text), **whole)  # type: ignore[arg-type]
    write_file(path, content.getvalue())


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors within the block into a ValueError about ``path``; a file that cannot be opened stays an OSError."""
    try:
        yield
    except Exception as error:  # whatever the bytes make of the readers
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = in_one_line(error)
        raise ValueError(f"{path} is no saved LongTailClassifier of this version, or damaged ({reason})") from error


def read(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays and values of a file that :func:`write` made; call it within :func:`explained`."""
    with path.open("rb") as stream:
        if stream.read(2) != b"PK":  # NumPy would take it for a pickle, and its error would tell how to run it
            raise ValueError("it is no .npz file")
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    about = json.loads(str(found.pop("_json")))
    if about["format"] != _FORMAT:
        raise ValueError(f"its format is {about['format']!r}")
    arrays = {**found, **{name: np.array(items, dtype=object) for name, items in about["objects"].items()}}
    _check(arrays, about["values"]["values"])
    return arrays, about["values"]


def _check(arrays: Mapping[str, Array], values: Mapping[str, Any]) -> None:
    """Raise an error where the fitted values contradict each other: they would fail, or predict nonsense, in use."""
    strange = [name for name in (*arrays, *values) if not name.endswith("_")]
    if strange:
        raise ValueError(f"it holds {strange[0]}")
    classes, width = arrays["prototypes_"].shape
    shapes: dict[str, tuple[int, ...]] = {
        "classes_": (classes,),
        "class_counts_": (classes,),
        "intercept_": (classes,),
        "mean_": (width,),
    }
    shapes |= {"prototypes_": (classes, width), "whitening_": (width, width) if width <= WIDEST else (width,)}
    for name, shape in shapes.items():
        array = arrays[name]
        if array.shape != shape or (name != "classes_" and array.dtype != np.float32):
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}, float32 of shape {shape} was expected")
        if name != "classes_" and not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinity")
    Candidate.named(values["loss_"])
    if values["n_features_in_"] != width:
        raise ValueError(f"n_features_in_ is {values['n_features_in_']}, mean_ has {width}")
    temperature = values["temperature_"]
    if not (isinstance(temperature, float | int) and temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature_ is {temperature}")
