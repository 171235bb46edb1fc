"""The dense reference is right (gradcheck), and the chunked implementation equals it."""

from __future__ import annotations

import pytest
import torch

from ltloss import functional, reference, use_backend
from ltloss.testing import FAMILY, NOT_A_DERIVATIVE, assert_same, outcome, problem, relative_error

# 1e-12: sums of some ten products in float64 (eps 2.2e-16), with a condition number of at most scale = 30.
EXACT = 1e-12

SHAPES = [
    (7, 9, 5),  # crosses tile edges of 3 rows and 4 classes, ragged at both
    (6, 8, 5),  # tiles filled exactly
    (7, 1, 5),
    (7, 2, 5),
    (7, 3, 5),
    (0, 9, 5),
    (1, 9, 5),
    (7, 9, 1),
    (7, 9, 2),
    (1, 1, 1),
]


@pytest.mark.parametrize("name", [name for name in FAMILY if name not in NOT_A_DERIVATIVE])
def test_gradient_is_the_derivative(name: str, backend: str, tiny_blocks: object) -> None:
    features, prototypes, labels = problem(4, 5, 2).leaves()

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional.margin_cross_entropy(x, w, labels, **FAMILY[name](5))

    # The own-class pass is a custom operator without forward-mode or second derivatives: first order is the law.
    assert torch.autograd.gradcheck(loss, (features, prototypes))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_chunked_equals_dense_across_chunk_edges(name: str, shape: tuple[int, int, int], tiny_blocks: object) -> None:
    given, options = problem(*shape), FAMILY[name](shape[1])
    # With D = 1 a direction is ±1 and the exact gradient 0; what is left is the rounding of terms of size s/‖v‖.
    shortest = float(torch.cat(given[:2]).norm(dim=1).min())
    size = options.get("scale", 30.0) / shortest if shape[2] == 1 else 0.0
    dense = outcome(given, loss=reference.margin_cross_entropy, **options)
    assert_same(outcome(given, **options), dense, EXACT, size)


@pytest.mark.parametrize("name", ["cosine_softmax", "everything", "feature_length_smoothed"])
def test_chunked_equals_dense_with_the_real_blocks(name: str) -> None:
    # 1030 rows and 1050 classes pass the row block of 1024 and, with it, the class block of 1024.
    given, options = problem(1030, 1050, 8), FAMILY[name](1050)
    assert_same(outcome(given, **options), outcome(given, loss=reference.margin_cross_entropy, **options), EXACT)


def test_real_blocks_are_crossed_by_the_shapes_above() -> None:
    from ltloss.chunked.tiles import block_sizes

    blocks = block_sizes(1030, 1050, 8, torch.device("cpu"))
    assert blocks.rows < 1030
    assert blocks.classes < 1050


@pytest.mark.parametrize("width", [1, 2, 64, 100_000, 10_000_000])
def test_blocks_stay_within_their_budget(width: int) -> None:
    from ltloss.chunked.tiles import block_sizes

    for rows in (0, 1, 7, 1024, 100_000):
        for classes in (1, 63, 64, 10**7):
            blocks = block_sizes(rows, classes, width, torch.device("cpu"))
            assert blocks.rows >= 1
            assert 1 <= blocks.classes <= classes
            assert blocks.rows * blocks.classes <= 1 << 20


@pytest.mark.parametrize("label", ["inside", "outside"])
@pytest.mark.parametrize("with_prior", [False, True])
def test_two_numbers_per_sample_and_their_gradients(label: str, with_prior: bool, tiny_blocks: object) -> None:
    """r_i and t_i equal the reference, for any mixture of upstream gradients, also of a label of another shard."""
    given = problem(7, 9, 5, ignored=False)
    if label == "outside":
        given = given._replace(labels=given.labels - 4)
        given.labels[0] = 9
    log_prior = torch.linspace(-1, 1, 9, dtype=torch.float64) if with_prior else None
    for a, d in ((1.0, 0.0), (0.0, 1.0), (-2.0, 0.5)):
        results = []
        for module in (functional, reference):
            leaves = given.leaves()
            r, t = module.cosine_logsumexp(*leaves, scale=9.0, log_prior=log_prior)
            weights = torch.linspace(-1, 1, 7, dtype=torch.float64)
            loss = (a * weights * r).sum() + (d * weights.flip(0) * t).sum()
            results.append((r, t, *torch.autograd.grad(loss, leaves[:2])))
        for ours, exact in zip(*results, strict=True):
            assert relative_error(ours, exact) <= EXACT


@pytest.mark.parametrize("normalize_features", [True, False])
def test_gradient_of_very_confident_samples(normalize_features: bool) -> None:
    """A probability of e^-100 is nothing special in float64; its gradient must not be cut off at float32's range."""
    given = problem(3, 4, 8, ignored=False)
    given = given._replace(features=given.prototypes[given.labels] * 3.0 + 0.1 * given.features)
    options = {"scale": 300.0 if normalize_features else 80.0, "normalize_features": normalize_features}
    ours = outcome(given, **options)
    exact = outcome(given, loss=reference.margin_cross_entropy, **options)
    assert 0 < float(exact.loss) < 1e-36  # below e^-80
    assert_same(ours, exact, 1e-11)  # exponents of size 100 to 1000 have an absolute rounding error of 1e-13


def test_reference_backend_is_the_reference() -> None:
    given = problem()
    with use_backend("reference"):
        ours = outcome(given, angular_margin=0.5)
    exact = outcome(given, loss=reference.margin_cross_entropy, angular_margin=0.5)
    assert_same(ours, exact, 0.0)
