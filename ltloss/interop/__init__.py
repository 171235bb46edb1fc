"""Prototypes to and from the files of other libraries.

The modules :mod:`ltloss.interop.pytorch_metric_learning` and :mod:`ltloss.interop.insightface` also offer the losses of
these libraries under their own names, computed by ltloss.

No function here holds all classes in the memory of one rank: each rank reads its own block, and blocks are written one
by one.
"""

from __future__ import annotations

from ltloss.interop.insightface import import_insightface
from ltloss.interop.pytorch_metric_learning import import_pytorch_metric_learning
from ltloss.interop.safetensors import export_safetensors, import_safetensors

__all__ = ["export_safetensors", "import_insightface", "import_pytorch_metric_learning", "import_safetensors"]
