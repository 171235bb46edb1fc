"""Whatever the kernels are asked for, they give what the float64 reference gives."""

from __future__ import annotations

from typing import Any, ClassVar, get_args

import pytest
import torch
from helpers.kernel_problems import DEVICE, assert_close, exact_outcome, kernel_problem, options_on_device
from helpers.refusals import refused

import ltloss
from ltloss import functional, reference
from ltloss.margins import BeyondPi
from ltloss.ops.logsumexp import OPERATORS
from ltloss.testing import FAMILY, Problem, outcome, relative_error

pytestmark = pytest.mark.slow

# (N, C, D): below, on and across the edges of tiles, rows of one element, a single class, a single sample.
SHAPES = [(1, 1, 1), (16, 32, 16), (17, 33, 17), (15, 31, 8), (40, 5, 40), (3, 200, 24), (16, 1, 8), (1, 64, 3)]

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def check(given: Problem, tolerance: float = 5e-6, smallest_size: float = 0.0, **options: Any) -> None:
    ours = outcome(given, **options_on_device(options))
    assert_close(ours, exact_outcome(given, **options), tolerance, smallest_size)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", FAMILY)
def test_every_loss(name: str, reduction: str) -> None:
    given = kernel_problem()
    options = {**FAMILY[name](70), "reduction": reduction}
    upstream = torch.linspace(-1.0, 2.0, 37, device=DEVICE) if reduction == "none" else None
    ours = outcome(given, upstream, **options_on_device(options))
    assert_close(ours, exact_outcome(given, upstream, **options))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["arcface", "everything", "feature_length_smoothed"])
def test_every_shape(name: str, shape: tuple[int, int, int]) -> None:
    options = FAMILY[name](shape[1])
    if shape[2] == 1:  # cosines are ±1, where the reading of an angle is luck; the cosine margin has none
        options = {**options, "angular_margin": 0.0, "angle_multiplier": 1.0}
    # Of a single class the loss is exactly 0: the difference of two equal logits, of size 8 and rounded each.
    check(kernel_problem(*shape), smallest_size=0.1 if shape[1] == 1 else 1e-2, **options)


@pytest.mark.parametrize("beyond_pi", get_args(BeyondPi))
@pytest.mark.parametrize("margin_gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("multiplier", [1.0, 1.5, 4.0])
def test_every_margin(multiplier: float, margin_gradient: str, beyond_pi: str) -> None:
    check(
        kernel_problem(),
        angle_multiplier=multiplier,
        angular_margin=torch.linspace(0.0, 3.0, 70, dtype=torch.float64),
        cosine_margin=torch.linspace(-0.2, 0.4, 70, dtype=torch.float64),
        beyond_pi=beyond_pi,
        margin_gradient=margin_gradient,
        scale=10.0,
    )


@pytest.mark.parametrize("scale", [1.0, 16.0, 64.0, 80.0, 128.0, 512.0])
@pytest.mark.parametrize("opposite", [False, True])
def test_every_scale(scale: float, opposite: bool) -> None:
    """The fixed shift up to 80, the running maximum beyond; also where every cosine is the worst possible."""
    given = kernel_problem()
    if opposite:
        given = given._replace(features=-given.prototypes[given.labels.clamp_min(0)])
    check(given, tolerance=5e-6 * max(1.0, scale / 30), scale=scale, cosine_margin=0.1)


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_fixed_shift_at_the_end_of_its_range(value: float) -> None:
    """All cosines 1 or all -1 at the largest scale that the fixed shift takes: neither overflow nor underflow."""
    from ltloss_kernels.cosine_logsumexp import fixed_shift

    c = 70
    scale = max(s for s in range(60, 100) if fixed_shift(float(s), c) is not None)
    direction = torch.ones(1, 16, device=DEVICE)
    given = Problem(value * direction.repeat(3, 1), direction.repeat(c, 1), torch.tensor([0, 5, 69], device=DEVICE))
    check(given, scale=float(scale), reduction="none", smallest_size=1.0)


@pytest.mark.parametrize("length", [1e-3, 1.0, 200.0])
def test_features_that_keep_their_length(length: float) -> None:
    given = kernel_problem()
    given = given._replace(features=given.features * length)
    check(given, tolerance=1e-5 * max(1.0, length / 10), normalize_features=False, angular_margin=0.3, scale=1.0)


@pytest.mark.parametrize("factors", [(1e-25, 1.0), (1e20, 1.0), (1.0, 1e-25), (1.0, 1e20), (1e-25, 1e20)])
def test_lengths_whose_squares_leave_float32(factors: tuple[float, float]) -> None:
    given = kernel_problem()
    check(Problem(given.features * factors[0], given.prototypes * factors[1], given.labels), angular_margin=0.4)


def test_priors_of_any_range() -> None:
    prior = torch.linspace(-300.0, 40.0, 70, dtype=torch.float64)
    prior[7] = -torch.inf
    given = kernel_problem()
    given = given._replace(labels=torch.where(given.labels == 7, 8, given.labels))
    check(given, log_prior=prior, reduction="sum", tolerance=2e-5)


def test_numbers_scalars_and_strided_vectors() -> None:
    """Margins and weights as numbers, as scalars on the device, and as vectors with strides."""
    wide = torch.linspace(0.1, 0.9, 140, dtype=torch.float64)
    given = kernel_problem()
    check(given, angular_margin=0.3, cosine_margin=torch.tensor(0.1), class_weight=torch.tensor(2.0), reduction="sum")
    check(given, angular_margin=wide[::2], class_weight=wide[1::2], log_prior=wide[::2], label_smoothing=0.1)
    check(given, angular_margin=torch.tensor(0.0), cosine_margin=1)


class TestDtypes:
    PAIRS: ClassVar = [
        (BF16, BF16),
        (F16, F16),
        (BF16, F32),
        (F16, F32),
        (F32, BF16),
        (F32, F16),
        (F16, BF16),
        (BF16, F16),
    ]

    @pytest.mark.parametrize("name", ["arcface", "everything", "feature_length_smoothed"])
    @pytest.mark.parametrize("dtypes", PAIRS)
    def test_pair(self, dtypes: tuple[torch.dtype, torch.dtype], name: str) -> None:
        given = kernel_problem(dtypes=dtypes)
        ours, exact = outcome(given, **options_on_device(FAMILY[name](70))), exact_outcome(given, **FAMILY[name](70))
        assert ours.loss.dtype == F32
        assert (ours.features.dtype, ours.prototypes.dtype) == dtypes
        # A rounding of each gradient entry (bfloat16: 2^-9), and of each entry of dZ.
        assert_close(ours, exact, 2.0**-7 if BF16 in dtypes else 2.0**-9)

    @pytest.mark.parametrize("upstream", [1e-20, 1.0, 65536.0, 1e20])
    def test_float16_neither_overflows_nor_vanishes(self, upstream: float) -> None:
        """Whatever a gradient scaler multiplies with, as long as the result itself fits."""
        given = kernel_problem(dtypes=(F16, F32))
        lengths = torch.logspace(-7, 4, 37, device=DEVICE)[:, None]
        features = torch.nn.functional.normalize(given.features.float()) * lengths
        given = Problem(features.to(F16), given.prototypes, given.labels)
        ours = outcome(given, torch.tensor(upstream, device=DEVICE), reduction="sum")
        exact = exact_outcome(given, torch.tensor(upstream), reduction="sum")
        assert relative_error(ours.prototypes.cpu(), exact.prototypes) <= 2.0**-9
        fits = (exact.features.abs().amax(1) < 6e4) & (exact.features.abs().amax(1) > 1e-3)
        assert relative_error(ours.features.cpu()[fits], exact.features[fits]) <= 2.0**-9


class TestLabels:
    def test_all_ignored(self) -> None:
        given = kernel_problem()
        result = outcome(given._replace(labels=torch.full_like(given.labels, -100)))
        assert float(result.loss) == 0.0
        assert not result.features.any()
        assert not result.prototypes.any()

    @pytest.mark.parametrize("ignore_index", [-1, 3, 10**9])
    def test_ignore_index_of_any_value(self, ignore_index: int) -> None:
        given = kernel_problem(ignored=False)
        labels = torch.where(given.labels == 3, 4, given.labels)
        labels[::3] = ignore_index
        check(given._replace(labels=labels), ignore_index=ignore_index, label_smoothing=0.1)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_ignored_rows_may_hold_nan(self, normalize: bool, reduction: str) -> None:
        given = kernel_problem()
        labels = given.labels.clone()
        labels[5:9] = -100
        clean = outcome(given._replace(labels=labels), normalize_features=normalize, scale=2.0, reduction=reduction)
        features = given.features.clone()
        features[labels == -100] = float("nan")
        dirty = outcome(
            given._replace(features=features, labels=labels),
            normalize_features=normalize,
            scale=2.0,
            reduction=reduction,
        )
        assert all(torch.equal(one, other) for one, other in zip(clean, dirty, strict=True))

    @pytest.mark.parametrize("bad", [70, 10**12, -1, -(10**12)])
    def test_unchecked_bad_label_is_nan_and_alone(self, bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """What happens on a GPU, where labels are not looked at: no read out of bounds, and no other sample suffers."""
        from ltloss.ops import labels as labels_operator

        monkeypatch.setattr(labels_operator, "check_label_range", lambda *_: None)
        given = kernel_problem(ignored=False)
        options = {
            "angular_margin": torch.full((70,), 0.2, device=DEVICE),
            "class_weight": torch.ones(70, device=DEVICE),
        }
        expected = functional.margin_cross_entropy(*given, **options, reduction="none")
        labels = given.labels.clone()
        labels[20] = bad
        got = functional.margin_cross_entropy(*given[:2], labels, **options, reduction="none")
        assert got[20].isnan()
        others = torch.arange(37, device=DEVICE) != 20
        assert torch.equal(got[others], expected[others])

    @pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU only under ltloss.debug_labels")
    def test_bad_label_on_the_cpu_is_an_error(self) -> None:
        given = kernel_problem()
        with refused("labels", "[0, 70)", "70", "2", "1", error=IndexError):
            functional.margin_cross_entropy(*given[:2], given.labels.index_fill(0, torch.tensor([2]), 70))

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
    def test_integer_types_and_strides(self, dtype: torch.dtype) -> None:
        given = kernel_problem(ignored=False)
        expected = outcome(given, angular_margin=0.2)
        wide = torch.zeros(37, 3, dtype=dtype, device=DEVICE)
        wide[:, 1] = given.labels.to(dtype)
        got = outcome(given._replace(labels=wide[:, 1]), angular_margin=0.2)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


class TestEdges:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_shows(self, value: float) -> None:
        given = kernel_problem(ignored=False)
        given.features[3, 2] = value
        losses = functional.margin_cross_entropy(*given, reduction="none")
        assert losses.isnan().nonzero().flatten().tolist() == [3]
        given = kernel_problem(ignored=False)
        given.prototypes[69, 1] = value
        assert functional.margin_cross_entropy(*given, reduction="none").isnan().all()

    @pytest.mark.parametrize("normalize", [True, False])
    def test_zero_rows_have_no_direction(self, normalize: bool) -> None:
        given = kernel_problem()
        given.features[4], given.prototypes[given.labels[6]] = 0.0, 0.0
        check(given, normalize_features=normalize, scale=3.0, angular_margin=0.3)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_no_samples(self, reduction: str) -> None:
        given = kernel_problem(0)
        result = outcome(given, torch.zeros(0) if reduction == "none" else None, reduction=reduction)
        assert result.loss.shape == ((0,) if reduction == "none" else ())
        assert float(result.loss.sum()) == 0.0
        assert result.features.shape == (0, 19)
        assert not result.prototypes.any()

    def test_equal_prototypes_and_features(self) -> None:
        given = kernel_problem()
        same = Problem(given.features[:1].repeat(37, 1), given.prototypes[:1].repeat(70, 1), given.labels)
        check(same, cosine_margin=0.2, smallest_size=1.0)


class TestLayouts:
    LAYOUTS: ClassVar = ["transposed", "every other column", "every other row", "misaligned", "expanded row"]

    @staticmethod
    def _laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
        rows, columns = values.shape
        if layout == "transposed":
            return values.t().contiguous().t()
        if layout == "every other column":
            return torch.stack([values, values + 1], 2).flatten(1)[:, ::2]
        if layout == "every other row":
            return torch.stack([values, values + 1], 1).flatten(0, 1)[::2]
        if layout == "expanded row":
            return values[:1].expand(rows, columns)
        flat = values.new_zeros(rows * columns + 1)
        flat[1:] = values.flatten()
        return flat[1:].view(rows, columns)

    @pytest.mark.parametrize("d", [16, 19])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_any(self, layout: str, d: int) -> None:
        given = kernel_problem(d=d)
        features, prototypes = self._laid_out(given.features, layout), self._laid_out(given.prototypes, layout)
        expected = exact_outcome(Problem(features.contiguous(), prototypes.contiguous(), given.labels))
        leaves = [features.detach().requires_grad_(), prototypes.detach().requires_grad_()]
        loss = functional.margin_cross_entropy(*leaves, given.labels)
        gradients = torch.autograd.grad(loss, leaves)
        for one, other in zip((loss, *gradients), expected, strict=True):
            assert relative_error(one.cpu(), other, 1e-2) <= 5e-6


class TestOnePass:
    """The operator that shards of the classes and several margins on one pass use."""

    @pytest.mark.parametrize("prior", [False, True])
    @pytest.mark.parametrize("scale", [20.0, 200.0])
    def test_labels_outside_the_shard(self, scale: float, prior: bool) -> None:
        given = kernel_problem()
        labels = given.labels + torch.where(torch.arange(37, device=DEVICE) % 3 == 0, 1000, 0)
        log_prior = torch.linspace(-5.0, 1.0, 70, device=DEVICE) if prior else None
        leaves = Problem(*given[:2], labels).leaves()
        got = functional.cosine_logsumexp(*leaves, scale=scale, log_prior=log_prior)
        wide = Problem(*(t.double().cpu() for t in given[:2]), labels.cpu()).leaves()
        exact = reference.cosine_logsumexp(
            *wide, scale=scale, log_prior=None if not prior else log_prior.double().cpu()
        )
        upstream = torch.linspace(-1.0, 2.0, 74)
        for one, other in zip(got, exact, strict=True):
            assert relative_error(one.cpu(), other) <= 1e-6
        ours = torch.autograd.grad((torch.cat(got) * upstream.to(DEVICE)).sum(), leaves[:2])
        law = torch.autograd.grad((torch.cat(exact) * upstream.double()).sum(), wide[:2])
        for one, other in zip(ours, law, strict=True):
            assert relative_error(one.cpu(), other) <= 1e-5 * max(1.0, scale / 30)

    @pytest.mark.parametrize("which", [0, 1])
    def test_only_one_of_the_two_gradients(self, which: int) -> None:
        given = kernel_problem().leaves()
        got = torch.autograd.grad(functional.cosine_logsumexp(*given, scale=9.0)[which].sum(), given[:2])
        wide = Problem(*(t.detach().double().cpu() for t in given[:2]), given.labels.cpu()).leaves()
        exact = torch.autograd.grad(reference.cosine_logsumexp(*wide, scale=9.0)[which].sum(), wide[:2])
        assert all(relative_error(one.cpu(), other) <= 5e-6 for one, other in zip(got, exact, strict=True))

    @pytest.mark.parametrize("normalize", [(True, True), (False, True), (True, False), (False, False)])
    def test_agrees_with_the_chunked_operator(self, normalize: tuple[bool, bool]) -> None:
        given = kernel_problem()
        scale = 3.0 if normalize[1] else 1.0  # logits of one size, so that their rounding is
        arguments = (*given, None, scale, *normalize, True, -100, None, None)
        ours, chunked = (OPERATORS["logsumexp_stats"][backend](*arguments)[:4] for backend in ("triton", "torch"))
        counted = given.labels != -100  # what is not counted may hold anything
        for one, other in zip(ours, chunked, strict=True):  # the scale is in the backend's own unit
            one, other = (vector[counted] if vector.numel() else vector for vector in (one, other))
            torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-5)  # a sum of 70 logits of either sign

    @pytest.mark.parametrize("dtype", [F32, F16])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    def test_cosine_space_loss(self, label_smoothing: float, dtype: torch.dtype) -> None:
        given = kernel_problem(dtypes=(dtype, F32))
        results = []
        for backend in ("triton", "reference"):
            torch.manual_seed(0)
            module = ltloss.CosineSpaceLoss(70, 19, label_smoothing=label_smoothing, device=DEVICE)
            leaf = given.features.clone().requires_grad_()
            with ltloss.use_backend(backend):
                loss = module(leaf, given.labels)
                loss.backward()
            results.append((loss.detach(), leaf.grad, module.weight.grad))
        for one, other in zip(*results, strict=True):
            assert relative_error(one, other) <= (5e-6 if dtype == F32 else 2.0**-8)


class TestGradients:
    @pytest.mark.parametrize("needs", [(True, False), (False, True)])
    @pytest.mark.parametrize("dtype", [F32, F16])
    def test_only_what_is_asked_for(self, dtype: torch.dtype, needs: tuple[bool, bool]) -> None:
        given = kernel_problem(dtypes=(dtype, dtype))
        both = outcome(given, angular_margin=0.3)
        features = given.features.clone().requires_grad_(needs[0])
        prototypes = given.prototypes.clone().requires_grad_(needs[1])
        functional.margin_cross_entropy(features, prototypes, given.labels, angular_margin=0.3).backward()
        for needed, leaf, gradient in zip(needs, (features, prototypes), both[1:], strict=True):
            assert (leaf.grad is not None) == needed
            assert leaf.grad is None or torch.equal(leaf.grad, gradient)

    def test_none_is_asked_for(self) -> None:
        with torch.no_grad():
            assert not functional.margin_cross_entropy(*kernel_problem().leaves()).requires_grad

    def test_repeated_backward(self) -> None:
        leaves = kernel_problem().leaves()
        loss = functional.margin_cross_entropy(*leaves, angular_margin=0.3)
        first = torch.autograd.grad(loss, leaves[:2], retain_graph=True)
        second = torch.autograd.grad(loss, leaves[:2])
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))

    @pytest.mark.parametrize("kind", ["scalar", "expanded", "strided", "flipped sign"])
    def test_every_upstream_gradient(self, kind: str) -> None:
        given = kernel_problem()
        upstream = {
            "scalar": torch.tensor(-3.0),
            "expanded": torch.tensor([0.7]).expand(37),
            "strided": torch.linspace(-1.0, 2.0, 74)[::2],
            "flipped sign": -torch.linspace(0.0, 1.0, 37),
        }[kind].to(DEVICE)
        reduction = "mean" if kind == "scalar" else "none"
        leaves = given.leaves()
        loss = functional.margin_cross_entropy(*leaves, reduction=reduction, angular_margin=0.2)
        ours = torch.autograd.grad(loss, leaves[:2], upstream)
        exact = exact_outcome(given, upstream, reduction=reduction, angular_margin=0.2)
        for one, other in zip(ours, exact[1:], strict=True):
            assert relative_error(one.cpu(), other) <= 5e-6

    def test_second_derivatives_are_refused(self) -> None:
        leaves = kernel_problem().leaves()
        (gradient,) = torch.autograd.grad(functional.margin_cross_entropy(*leaves), leaves[:1], create_graph=True)
        assert gradient.requires_grad
        with pytest.raises(RuntimeError):
            gradient.sum().backward()
