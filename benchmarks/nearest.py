"""Dense implementations of the searches, and the check of a search: how far its results are below the best."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import ltloss.functional as ltloss_functional
from ltloss import reference

Found = tuple[Tensor, Tensor]
Search = Callable[[Tensor], Found]


def dense_top(features: Tensor, prototypes: Tensor, k: int, rows: int, own: bool) -> Found:
    """Cosines and indices (n, k) of the k best classes, from products in the inputs' dtype, ``rows`` rows at a time.

    ``own``: the features are the prototypes, and each finds others only.
    """
    unit = torch_functional.normalize(prototypes)
    left = unit if own else torch_functional.normalize(features)
    found = []
    for start in range(0, left.shape[0], rows):
        cosine = left[start : start + rows] @ unit.t()
        if own:
            cosine.diagonal(offset=start).fill_(-2.0)
        found.append(tuple(cosine.max(dim=1, keepdim=True) if k == 1 else cosine.topk(k, dim=1)))
    values, indices = zip(*found, strict=True)
    return torch.cat(values), torch.cat(indices)


def shortfall(found: Found, features: Tensor, prototypes: Tensor, own: Tensor | None = None) -> float:
    """The largest error of a search: found cosines (n, k) below the k best, or different from their true values.

    A NaN among the values gives NaN, a class found twice in a row gives 2. ``own``: the class that each row may not
    find.
    """
    cosine = reference.direction(features.double()) @ reference.direction(prototypes.double()).t()
    if own is not None:
        cosine.scatter_(1, own[:, None], -2.0)
    best = cosine.topk(found[1].shape[1], dim=1).values
    true = cosine.gather(1, found[1])
    repeated = (found[1].sort(dim=1).values.diff(dim=1) == 0).any()
    errors = torch.stack([(best - true).max(), (true - found[0].double()).abs().max(), 2.0 * repeated.double()])
    return float(errors.max())


def check_found(
    found: Found, allowed: float, features: Tensor, prototypes: Tensor, own: Tensor | None = None, sample: int = 256
) -> float:
    """The shortfall of about ``sample`` of the rows; raises RuntimeError if it exceeds ``allowed``."""
    some = torch.arange(features.shape[0], device=features.device)[:: -(-features.shape[0] // sample)]
    cosine, index = (tensor[some].view(some.numel(), -1) for tensor in found)
    error = shortfall((cosine, index), features[some], prototypes, None if own is None else own[some])
    if not error <= allowed:
        raise RuntimeError(f"the cosines found are off by {error:.1e}; not timed")
    return error


def _faiss(prototypes: Tensor) -> Found:
    """Nearest prototypes by a flat index: of the two best of each, the one that is not the prototype itself."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    unit = torch_functional.normalize(prototypes).numpy()
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    cosine, found = (torch.from_numpy(array) for array in index.search(unit, 2))
    other = (found[:, :1] == torch.arange(unit.shape[0])[:, None]).to(torch.int64)
    return cosine.gather(1, other)[:, 0], found.gather(1, other)[:, 0]


def _dense(prototypes: Tensor, rows: int) -> Found:
    return dense_top(prototypes, prototypes, 1, rows, own=True)


# Each gives for every class the largest cosine to another class, and its index; it raises ImportError when it is called
# if its library is not installed.
SEARCHES: dict[str, Search] = {
    "ltloss": ltloss_functional.nearest_prototype,
    "dense": partial(_dense, rows=1 << 40),
    "row blocks": partial(_dense, rows=1024),
    "faiss IndexFlatIP": _faiss,
}
