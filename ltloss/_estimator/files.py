"""A fitted estimator as one .npz: arrays and one line of JSON, no pickle."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ltloss._estimator.space import Array
from ltloss._files import write_file

__all__ = ["read", "write"]

_FORMAT = "ltloss.sklearn.LongTailClassifier 1"


def _plain(value: Any) -> Any:
    """A number of numpy as one of Python."""
    if not isinstance(value, np.generic):
        raise TypeError(f"{type(value).__name__} {value!r} cannot be saved without pickle")
    return value.item()


def write(path: Path, arrays: Mapping[str, Array], values: Mapping[str, Any]) -> None:
    """Write arrays and values; the file holds either its former content or all of this."""
    listed = {name: array.tolist() for name, array in arrays.items() if array.dtype == object}
    text = json.dumps({"format": _FORMAT, "objects": listed, "values": values}, default=_plain)
    whole = {name: array for name, array in arrays.items() if name not in listed}
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, _json=np.array(text), **whole)
    write_file(path, content.getvalue())


def read(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays and values of a file of :func:`write`; ValueError where it is none or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        about = json.loads(str(found.pop("_json")))
        if about["format"] != _FORMAT:
            raise ValueError(f"its format is {about['format']!r}")
        objects = {name: np.array(items, dtype=object) for name, items in about["objects"].items()}
        return {**found, **objects}, about["values"]
    except (ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no saved LongTailClassifier of this version, or damaged ({error})") from error
