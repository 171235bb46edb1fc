"""The contrastive losses: numbers by hand, their dense twins, derivatives, edges, memory, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.memory import LargestTensor
from helpers.refusals import refused
from torch import Tensor

import ltloss
from ltloss import contrastive, reference
from ltloss.contrastive import info_nce, siglip_loss, supervised_contrastive
from ltloss.errors import BackendError
from ltloss.ops import in_batch
from ltloss.testing import relative_error, watching

EXACT = 1e-11
SINGLE, SHIFTED = 6.0, 90.0  # scales on both sides of where a float32 holds exp(2s); in float64 all of them are below
FLOAT64_SHIFTED = 360.0


def rows(n: int, seed: int = 0, dtype: torch.dtype = torch.float64, d: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = 0.2 + 3.0 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    drawn: Tensor = lengths * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return drawn.to(dtype)


def labels(n: int, seed: int = 0, most: int = 4) -> Tensor:
    return (torch.arange(n) * 5 // 3 + seed).remainder(most)


def loss_of(name: str, module: Any, **options: Any) -> Callable[..., Tensor]:
    """(a, b, scale, bias) -> the loss. Of the labels of the queue, some are of no sample, and the other way round."""
    if name == "siglip":
        return lambda a, b, scale, bias: module.siglip_loss(a, b, scale=scale, bias=bias)
    if name == "supervised":
        return lambda a, b, scale, bias: module.supervised_contrastive(
            a, labels(len(a)), b, labels(len(b), 1, 6) + 1, scale=scale, **options
        )
    return lambda a, b, scale, bias: module.info_nce(a, b, scale=scale, symmetric=name == "symmetric", **options)


NAMES = ("symmetric", "one way", "siglip", "supervised")
REDUCED = [(name, {"reduction": how}) for name in NAMES for how in ("mean", "sum", "none") if name != "siglip"]
REDUCED += [("siglip", {})]


def found(loss: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
    """The loss and the gradients of a, b, scale and bias; per-sample losses get upstream gradients of both signs."""
    leaves = [one.detach().clone().requires_grad_() for one in given]
    value = loss(*leaves)
    upstream = torch.linspace(-1.0, 2.0, max(1, value.numel()), dtype=value.dtype)[: value.numel()].view(value.shape)
    grads = torch.autograd.grad((value * (upstream if value.dim() else 1.7)).sum(), leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]


@pytest.mark.parametrize("scale", [SINGLE, FLOAT64_SHIFTED])
@pytest.mark.parametrize("n", [1, 13])
@pytest.mark.parametrize(("name", "options"), REDUCED)
def test_tiles_equal_the_dense_twin(
    name: str, options: dict[str, str], n: int, scale: float, tiny_blocks: object
) -> None:
    numbers = torch.tensor([scale, -0.7], dtype=torch.float64)
    given = rows(n), rows(n + 4 * (name == "supervised"), 1), *numbers
    ours, law = (found(loss_of(name, module, **options), *given) for module in (contrastive, reference))
    for one, other in zip(ours, law, strict=True):
        assert relative_error(one, other, smallest_size=1e-3 * scale) <= EXACT


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_derivatives(name: str, backend: str, tiny_blocks: object) -> None:
    given = [rows(5, 2), rows(5, 3), torch.tensor(4.0).double(), torch.tensor(-1.0).double()]
    loss = loss_of(name, contrastive)
    used = slice(None) if name == "siglip" else slice(3)
    leaves = [one.requires_grad_() for one in given[used]]
    rest = [] if name == "siglip" else given[3:]
    assert torch.autograd.gradcheck(lambda *some: loss(*some, *rest), leaves)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(lambda *some: loss(*some, *rest), leaves)
    else:
        (grad,) = torch.autograd.grad(loss(*given), given[0], create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(grad.sum(), given[0])


def on_circle(*angles: float, length: float = 1.0) -> Tensor:
    return length * torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.float64)


class TestByHand:
    """Rows at angles, so that cosines are those of differences; everything else is ``math``."""

    A, B, S = (0.3, 1.4, 2.9), (0.0, 1.0, 2.5), 3.0

    def softmax_loss(self, own: float, others: tuple[float, ...], at: int) -> float:
        logits = [self.S * math.cos(own - other) for other in others]
        return math.log(sum(map(math.exp, logits))) - logits[at]

    def test_info_nce(self, backend: str) -> None:
        a, b = on_circle(*self.A, length=2.0), on_circle(*self.B, length=0.4)
        of_a = [self.softmax_loss(self.A[i], self.B, i) for i in range(3)]
        of_b = [self.softmax_loss(self.B[i], self.A, i) for i in range(3)]
        one_way = info_nce(a, b, scale=self.S, symmetric=False, reduction="none")
        assert one_way.tolist() == pytest.approx(of_a, rel=1e-13)
        assert info_nce(a, b, scale=self.S).item() == pytest.approx((sum(of_a) + sum(of_b)) / 6, rel=1e-13)
        assert info_nce(a, b, scale=self.S, reduction="sum").item() == pytest.approx(
            (sum(of_a) + sum(of_b)) / 2, rel=1e-13
        )

    def test_siglip(self, backend: str) -> None:
        expected = 0.0
        for i, x in enumerate(self.A):
            for j, y in enumerate(self.B):
                z = 1.0 if i == j else -1.0
                expected += math.log1p(math.exp(-z * (self.S * math.cos(x - y) - 1.2))) / 3
        got = siglip_loss(on_circle(*self.A, length=2.0), on_circle(*self.B, length=0.4), scale=self.S, bias=-1.2)
        assert got.item() == pytest.approx(expected, rel=1e-13)

    def test_supervised(self, backend: str) -> None:
        """Sample 0 has the entries 0 and 2 as positives, sample 1 entry 1, and sample 2 none."""
        first = [self.softmax_loss(self.A[0], self.B, at) for at in (0, 2)]
        each = [sum(first) / 2, self.softmax_loss(self.A[1], self.B, 1), 0.0]
        given = on_circle(*self.A, length=2.0), torch.tensor([7, -3, 5]), on_circle(*self.B), torch.tensor([7, -3, 7])
        got = supervised_contrastive(*given, scale=self.S, reduction="none")
        assert got.tolist() == pytest.approx(each, rel=1e-13)
        assert supervised_contrastive(*given, scale=self.S).item() == pytest.approx(sum(each) / 2, rel=1e-13)

    @pytest.mark.parametrize("exponent", [60.0, 400.0])
    def test_no_floor_under_confident_pairs(self, exponent: float, backend: str) -> None:
        """Two pairs half a turn apart: log(1 + e^−2s), on both sides of the largest scale with one exponential."""
        a = on_circle(0.0, math.pi)
        assert info_nce(a, a, scale=exponent / 2).item() == pytest.approx(math.exp(-exponent), rel=1e-11)
        assert info_nce(a, a.flip(0), scale=exponent / 2).item() == pytest.approx(exponent, rel=1e-13)


@pytest.mark.parametrize("scale", [SINGLE, SHIFTED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_sums_are_float32_at_least(name: str, dtype: torch.dtype, scale: float) -> None:
    """Half precision costs the rounding of what comes in and of the gradients that go out, and no more."""
    given = rows(50, 4, dtype, 16), rows(50, 5, dtype, 16), torch.tensor(scale), torch.tensor(-2.0)
    ours = found(loss_of(name, contrastive), *given)
    law = found(loss_of(name, reference), *(one.double() for one in given))
    assert ours[0].dtype == torch.float32
    assert [grad.dtype for grad in ours[1:3]] == [dtype, dtype]
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11 if dtype == torch.float16 else 0.0
    for one, other in zip(ours[1:3], law[1:3], strict=True):
        assert relative_error(one, other) <= rounding + 2e-7 * scale
    for one, other in zip([ours[0], *ours[3:]], [law[0], *law[3:]], strict=True):
        assert relative_error(one, other, smallest_size=0.1) <= 1e-6


def test_a_large_scale_in_float32() -> None:
    """Rows whose largest logits are e^200 apart: no sum is lost to the shift of another row or column."""
    a, b = on_circle(0.0, 0.1, 3.1, 3.2).float(), on_circle(0.2, 3.0, 0.1, 3.3).float()
    ours, law = (
        found(loss_of("symmetric", module, reduction="none"), *pair, torch.tensor(100.0), torch.tensor(0.0))
        for module, pair in ((contrastive, (a, b)), (reference, (a.double(), b.double())))
    )
    for one, other in zip(ours, law, strict=True):
        assert relative_error(one, other) <= 2 * 100 * 2.0**-24  # a logit of size 100 and the sum over it, rounded


@pytest.mark.parametrize("name", NAMES)
def test_a_learned_scale_may_be_in_half_precision(name: str) -> None:
    parameters = [torch.tensor(value, dtype=torch.bfloat16, requires_grad=True) for value in (8.0, -2.0)]
    loss_of(name, contrastive)(rows(9).float(), rows(9, 1).float(), *parameters).backward()
    grad = parameters[0].grad
    assert grad is not None
    assert grad.dtype == torch.bfloat16
    assert grad.isfinite()


class TestEdges:
    def test_a_batch_of_one(self, backend: str) -> None:
        a, b = on_circle(0.3).requires_grad_(), on_circle(1.4).requires_grad_()
        for symmetric in (True, False):
            loss = info_nce(a, b, scale=9.0, symmetric=symmetric)
            grads = torch.autograd.grad(loss, (a, b))
            assert loss.item() == 0.0
            assert not any(bool(grad.any()) for grad in grads)
        logit = 9.0 * math.cos(1.1) - 2.0
        assert siglip_loss(a, b, scale=9.0, bias=-2.0).item() == pytest.approx(math.log1p(math.exp(-logit)), rel=1e-13)

    @pytest.mark.parametrize("name", NAMES)
    def test_an_empty_batch(self, name: str, backend: str) -> None:
        a, b = (torch.empty(0, 3).requires_grad_() for _ in range(2))
        loss = loss_of(name, contrastive)(a, b, 9.0, 0.0)
        loss.backward()
        assert loss.item() == 0.0
        assert a.grad is not None
        assert a.grad.shape == (0, 3)

    @pytest.mark.parametrize("queue", [0, 2])
    def test_no_positives(self, queue: int, backend: str) -> None:
        a, b = rows(3).requires_grad_(), rows(queue, 1).requires_grad_()
        given = a, torch.tensor([1, 2, 3]), b, torch.zeros(queue, dtype=torch.int32)
        assert supervised_contrastive(*given, scale=4.0, reduction="none").tolist() == [0.0] * 3
        loss = supervised_contrastive(*given, scale=4.0)
        grads = torch.autograd.grad(loss, (a, b), allow_unused=True)
        assert loss.item() == 0.0
        assert not any(bool(grad.any()) for grad in grads if grad is not None)

    @pytest.mark.parametrize("name", NAMES)
    def test_a_row_of_zeros_has_direction_zero(self, name: str, backend: str) -> None:
        a, b = rows(4), rows(4, 1)
        a[1] = 0.0
        b[2] = 0.0
        ours = found(loss_of(name, contrastive), a, b, torch.tensor(4.0).double(), torch.tensor(0.5).double())
        assert all(bool(one.isfinite().all()) for one in ours)
        assert not ours[1][1].any()
        assert not ours[2][2].any()

    @pytest.mark.parametrize("scale", [SINGLE, SHIFTED])
    @pytest.mark.parametrize("name", NAMES)
    def test_not_a_number_is_never_dropped(self, name: str, scale: float, backend: str) -> None:
        a = rows(4, dtype=torch.float32)
        a[1, 2] = math.nan
        assert loss_of(name, contrastive)(a, rows(4, 1, torch.float32), scale, 0.0).isnan()


@pytest.mark.parametrize("name", NAMES)
def test_only_what_asks_for_a_gradient_gets_one(name: str) -> None:
    """A locked tower, a queue, a fixed temperature; and under no_grad nothing is differentiated at all."""
    a, b = rows(6), rows(6, 1)
    numbers = torch.tensor(4.0).double(), torch.tensor(-1.0).double()
    law = found(loss_of(name, reference), a, b, *numbers)
    for asked in range(4):
        leaves = [one.clone().requires_grad_(asked == number) for number, one in enumerate((a, b, *numbers))]
        loss = loss_of(name, contrastive)(*leaves)
        if loss.requires_grad:
            (grad,) = torch.autograd.grad(1.7 * loss, leaves[asked])
            assert relative_error(grad, law[1 + asked]) <= EXACT
        with torch.no_grad():
            assert torch.equal(loss_of(name, contrastive)(*leaves), loss.detach())


@pytest.mark.parametrize("scale", [SINGLE, SHIFTED])
@pytest.mark.parametrize("name", NAMES)
def test_memory_grows_with_the_batch_alone(name: str, scale: float) -> None:
    n = 3000  # 9 million logits
    a, b = (rows(n, seed, torch.float32, 4).requires_grad_() for seed in (0, 1))
    with watching(LargestTensor()) as seen:
        loss_of(name, contrastive)(a, b, torch.tensor(scale, requires_grad=True), 0.0).backward()
    assert seen.largest <= 1 << 20  # a tile


OPERATORS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "in_batch_logsumexp": lambda: (rows(4), rows(4, 1), torch.tensor(3.0).double()),
    "in_batch_logsumexp_gradients": lambda: (
        *(torch.rand(4).double() for _ in range(3)),
        rows(4),
        rows(4, 1),
        torch.tensor(3.0).double(),
        *(torch.rand(4).double() for _ in range(2)),
        [True, False, True],
    ),
    "in_batch_sigmoid_loss": lambda: (
        rows(4),
        rows(4, 1),
        *torch.tensor([3.0, -1.0]).double(),
        [True, False, True, True],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str) -> None:
    torch.library.opcheck(in_batch.OPERATORS[name]["torch"], OPERATORS[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["symmetric", "siglip", "supervised"])
def test_one_graph(name: str) -> None:
    torch.compiler.reset()
    given = rows(7, dtype=torch.float32), rows(7, 1, torch.float32), torch.tensor(3.0), torch.tensor(-1.0)
    plain = loss_of(name, contrastive)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for one, other in zip(found(compiled, *given), found(plain, *given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


A, B, Y = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("call", "facts", "error"),
    [
        (lambda: info_nce(A, B[:2], scale=1.0), ("a", "b", "(3, 5)", "(2, 5)"), ValueError),
        (lambda: siglip_loss(A, B[:, :4], scale=1.0, bias=0.0), ("a", "b", "(3, 5)", "(3, 4)"), ValueError),
        (lambda: info_nce(A, B.long(), scale=1.0), ("b", "torch.int64"), TypeError),
        (lambda: info_nce(A[0], B, scale=1.0), ("a", "(N, D)", "(5,)"), ValueError),
        (lambda: info_nce(A, B.to("meta"), scale=1.0), ("a on cpu", "b on meta"), ValueError),
        (lambda: info_nce(A, B, scale=0.0), ("scale", "0.0"), ValueError),
        (lambda: info_nce(A, B, scale=torch.tensor(-2.0, requires_grad=True)), ("scale", "-2.0"), ValueError),
        (lambda: info_nce(A, B, scale=torch.ones(3)), ("scale", "()", "(3,)"), ValueError),
        (lambda: info_nce(A, B, scale="1"), ("scale", "str"), TypeError),  # type: ignore[arg-type]
        (lambda: info_nce(A, B, scale=1.0, symmetric=1), ("symmetric", "bool"), TypeError),  # type: ignore[arg-type]
        (lambda: info_nce(A, B, scale=1.0, reduction="max"), ("reduction", "max"), ValueError),  # type: ignore[arg-type]
        (lambda: siglip_loss(A, B, scale=1.0, bias=math.nan), ("bias", "nan"), ValueError),
        (lambda: siglip_loss(A, B, scale=1.0, bias=torch.tensor(1)), ("bias", "torch.int64"), ValueError),
        (lambda: supervised_contrastive(A, Y[:2], B, Y, scale=1.0), ("labels", "features", "(2,)"), ValueError),
        (lambda: supervised_contrastive(A, Y, B, Y[:2], scale=1.0), ("queue_labels", "queue_features"), ValueError),
        (lambda: supervised_contrastive(A, Y, B, Y.float(), scale=1.0), ("queue_labels", "float32"), TypeError),
        (lambda: supervised_contrastive(A, Y, B[:, :2], Y, scale=1.0), ("queue_features", "(3, 2)"), ValueError),
    ],
)
def test_what_is_refused(call: Callable[[], Tensor], facts: tuple[str, ...], error: type[Exception]) -> None:
    with refused(*facts, error=error):
        call()


def test_kernels_that_do_not_exist_are_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "choose_backend", lambda *given: "triton")
    with ltloss.use_backend("triton"), refused("triton", "siglip_loss", error=BackendError):
        siglip_loss(A, B, scale=1.0, bias=0.0)
