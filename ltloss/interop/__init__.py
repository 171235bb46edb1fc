"""Prototypes to and from the files of others; and their losses over ours, in the modules that have their names.

Those are :mod:`ltloss.interop.pytorch_metric_learning` and :mod:`ltloss.interop.insightface`.

No function here puts all classes into one memory: each rank reads its own block, and blocks are written one by one.
"""

from __future__ import annotations

from ltloss.interop.insightface import import_insightface
from ltloss.interop.pytorch_metric_learning import import_pytorch_metric_learning
from ltloss.interop.safetensors import export_safetensors, import_safetensors

__all__ = ["export_safetensors", "import_insightface", "import_pytorch_metric_learning", "import_safetensors"]
