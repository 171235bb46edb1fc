"""The site's hooks lie beside the documentation, outside of any package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parents[2] / "docs" / "hooks"


def hook(name: str) -> Any:
    """A hook as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"hooks_{name}", _FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
