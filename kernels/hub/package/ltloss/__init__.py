"""The package of the folder above, for versions of ``kernels`` that look for it here."""

import importlib.util
import json
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[1]
_NAME = json.loads((_FOLDER / "metadata.json").read_text())["id"]
if _NAME not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_NAME, _FOLDER / "__init__.py")
    sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_NAME])

__all__ = sys.modules[_NAME].__all__
globals().update({name: getattr(sys.modules[_NAME], name) for name in __all__})
