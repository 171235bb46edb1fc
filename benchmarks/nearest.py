"""Providers of the nearest-prototype search: for every class the largest cosine to another one, and its index."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import ltloss.functional as ltloss_functional

Search = Callable[[Tensor], tuple[Tensor, Tensor]]


def _ours(prototypes: Tensor) -> tuple[Tensor, Tensor]:
    return ltloss_functional.nearest_prototype(prototypes)


def _dense(prototypes: Tensor) -> tuple[Tensor, Tensor]:
    unit = torch_functional.normalize(prototypes)
    cosine = unit @ unit.t()
    cosine.fill_diagonal_(-2.0)
    found = cosine.max(dim=1)
    return found.values, found.indices


def _chunked(prototypes: Tensor, rows: int = 1024) -> tuple[Tensor, Tensor]:
    unit = torch_functional.normalize(prototypes)
    values, indices = [], []
    for start in range(0, unit.shape[0], rows):
        cosine = unit[start : start + rows] @ unit.t()
        cosine.diagonal(offset=start).fill_(-2.0)
        found = cosine.max(dim=1)
        values.append(found.values)
        indices.append(found.indices)
    return torch.cat(values), torch.cat(indices)


def _faiss(prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """The two best of a flat index, of which one is the prototype itself."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    unit = torch_functional.normalize(prototypes).numpy()
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    cosine, found = (torch.from_numpy(array) for array in index.search(unit, 2))
    other = (found[:, :1] == torch.arange(unit.shape[0])[:, None]).to(torch.int64)
    return cosine.gather(1, other)[:, 0], found.gather(1, other)[:, 0]


def nearest_providers() -> dict[str, Search]:
    """Ours, the dense product and maximum, the same in blocks of rows, and faiss where it can be imported."""
    providers: dict[str, Search] = {"ltloss": _ours, "dense": _dense, "row blocks": _chunked}
    try:
        import faiss  # noqa: F401
    except ImportError:
        print("faiss is not installed: left out (pip install 'ltloss[bench]')")
    else:
        providers["faiss IndexFlatIP"] = _faiss
    return providers


def check_search(search: Search, prototypes: Tensor) -> float:
    """Largest error of the found cosines, recomputed in float64 against the true maximum; raises beyond rounding."""
    _, index = search(prototypes)
    unit = torch_functional.normalize(prototypes.double())
    sample = torch.randperm(prototypes.shape[0], generator=torch.Generator().manual_seed(1))[:512]
    cosine = unit[sample] @ unit.t()
    cosine[torch.arange(sample.numel()), sample] = -2.0
    found = cosine.gather(1, index[sample][:, None])[:, 0]
    error = float((cosine.amax(1) - found).max())
    if not error < 1e-6:
        raise RuntimeError(f"the nearest prototype is off by a cosine of {error}; not timed")
    return error
