"""Every test here runs the kernels: compiled where there is a GPU, interpreted in tiny tiles where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import ltloss

pytest.importorskip("triton")

FORWARD_TILE = (16, 32, 16)
GRADIENT_TILE = (16, 16, 16)
SEARCH_TILE = (16, 16, 16)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The triton backend. Interpreted tiles are tiny, so that small problems cross many boundaries of them."""
    if not torch.cuda.is_available():
        from ltloss_kernels import prototype_search
        from ltloss_kernels.config import tile_table as tiles

        monkeypatch.setattr(tiles, "forward_tile", lambda *_: tiles.Tile(*FORWARD_TILE, 4, 2))
        monkeypatch.setattr(tiles, "gradient_tile", lambda *_: tiles.Tile(*GRADIENT_TILE, 4, 2))
        monkeypatch.setattr(tiles, "search_tile", lambda *_: tiles.Tile(*SEARCH_TILE, 4, 2))
        monkeypatch.setattr(tiles, "SAMPLE_ROWS", 16)
        monkeypatch.setattr(prototype_search, "GROUP", 2)
    with ltloss.use_backend("triton"), np.errstate(all="ignore"):
        yield
