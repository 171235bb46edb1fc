"""Every test here runs the kernels: compiled where there is a GPU, interpreted in tiny tiles where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers.kernel_problems import tiny_tiles

import ltloss

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """The triton backend. Interpreted tiles are tiny, so that small problems cross many boundaries of them."""
    tiles = nullcontext() if torch.cuda.is_available() else tiny_tiles()
    with tiles, ltloss.use_backend("triton"), np.errstate(all="ignore"):
        yield
