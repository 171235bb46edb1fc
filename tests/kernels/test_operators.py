"""The operators as PyTorch sees them: compiled, under autocast, repeated, limited in memory, and what they refuse."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from helpers.interpreter import opaque_launches
from helpers.kernel_problems import DEVICE, kernel_problem
from helpers.refusals import refused
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import ltloss
from ltloss import functional
from ltloss.errors import BackendError
from ltloss.margins import Margin, Objective
from ltloss.ops import labels as labels_operator
from ltloss.ops import logsumexp, margin_cross_entropy
from ltloss.ops._dispatch import choose_backend
from ltloss.testing import FAMILY, MODULES, WITH_LENGTHS, outcome

pytestmark = pytest.mark.slow

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
INTERPRETED = DEVICE == "cpu"
OPERATORS = {**margin_cross_entropy.OPERATORS, **logsumexp.OPERATORS}
STATS = (9.0, True, True, True, -100, None, None)


def _loss_arguments(reduction: str = "mean", normalize: bool = True, n: int = 20) -> tuple[Any, ...]:
    given = kernel_problem(n, 40, 8)
    vector = torch.linspace(0.1, 0.4, 40, device=DEVICE)
    objective = Objective(
        Margin(vector, 0.2, 1.1), -vector, vector + 1, 9.0, normalize, label_smoothing=0.1, reduction=reduction
    )
    return (*given, *objective.flat())


def _margin_arguments() -> tuple[Any, ...]:
    labels = kernel_problem(20, 40, 8).labels
    vectors = [torch.rand(shape, device=DEVICE) for shape in ((3, 20), (3, 20), (20,))]
    objective = Objective(Margin(0.3, beyond_pi="arcface"), scale=9.0, label_smoothing=0.1, reduction="sum")
    return (*vectors, torch.empty(0, device=DEVICE), labels, *objective.flat(), 40)


def _gradient_arguments(needs: list[bool]) -> tuple[Any, ...]:
    arguments = _loss_arguments()
    _, coefficients, inverse, bound, factor = OPERATORS["margin_cross_entropy"]["triton"](*arguments)
    given = (torch.tensor(0.7, device=DEVICE), *arguments[:3], arguments[3][2])
    return (*given, coefficients, factor, inverse, bound, *STATS, needs)


CASES: dict[str, Any] = {
    "margin_cross_entropy": _loss_arguments,
    "margin_cross_entropy none": lambda: _loss_arguments("none", False),
    "margin_cross_entropy empty": lambda: _loss_arguments("sum", n=0),
    "margin_loss": _margin_arguments,
    "logsumexp_gradients": lambda: _gradient_arguments([True, True, True]),
    "logsumexp_gradients features": lambda: _gradient_arguments([True, False, False]),
    "logsumexp_stats": lambda: (*kernel_problem(20, 40, 8), None, *STATS),
    "logsumexp_stats labels": lambda: (*_loss_arguments()[:2], kernel_problem(40, 40)[2].view(-1, 2), None, *STATS),
}


@pytest.mark.parametrize("case", CASES)
def test_operator(case: str) -> None:
    """Schema, fake tensors, and tracing with dynamic shapes."""
    torch.library.opcheck(OPERATORS[case.split()[0]]["triton"], CASES[case]())


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("ArcFaceLoss", False), ("CosineSpaceLoss", False), *((name, True) for name in MODULES | WITH_LENGTHS)],
)
def test_module_is_one_graph(name: str, dynamic: bool) -> None:
    """With sizes that may change, every module; with fixed ones, a module for each way to call the operators."""
    torch.compiler.reset()
    eager = (MODULES | WITH_LENGTHS)[name](40, 8).to(DEVICE)
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (20, 25) if dynamic else (20,):
        given = kernel_problem(n, 40, 8)
        results = []
        for module, call in ((eager, eager), (compiled, run)):
            module.zero_grad()
            leaf = given.features.clone().requires_grad_()
            loss = call(leaf, given.labels)
            loss.backward()
            results.append((loss.detach(), leaf.grad, module.weight.grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_autocast_changes_nothing() -> None:
    given = kernel_problem(dtypes=(BF16, F32))
    expected = outcome(given, angular_margin=0.3)
    with torch.autocast(DEVICE, dtype=BF16):
        got = outcome(given, angular_margin=0.3)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["arcface", "everything"])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F32)])
def test_results_repeat_bit_for_bit(
    dtypes: tuple[torch.dtype, torch.dtype], name: str, default_algorithms: None
) -> None:
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in FAMILY[name](70).items()}
    first, second = (outcome(kernel_problem(dtypes=dtypes), **options) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


class TestMemory:
    @pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F32)])
    @pytest.mark.parametrize("width", [16, 19])  # prototypes read in place, and copied
    @pytest.mark.parametrize("name", ["arcface", "everything", "feature_length_smoothed"])
    @pytest.mark.parametrize("few", [True, False])
    def test_slabs_and_chunks_change_nothing(
        self,
        few: bool,
        name: str,
        width: int,
        dtypes: tuple[torch.dtype, torch.dtype],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Classes in several slabs, samples in several chunks unless they are few, in both directions."""
        from ltloss_kernels import backward_pass, cosine_logsumexp
        from ltloss_kernels.config import chunking, tile_table

        options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in FAMILY[name](70).items()}
        whole = outcome(kernel_problem(d=width, dtypes=dtypes), **options)
        rows, classes = (16, 32) if INTERPRETED else (128, 128)
        if few:
            rows = 37
        else:
            monkeypatch.setattr(tile_table, "prototype_gradient_tile", lambda *_: None)
            monkeypatch.setattr(tile_table, "norms_in_tiles", lambda *_: False)
        forward = chunking.ForwardPlan(rows, classes, 2)
        backward = chunking.BackwardPlan(rows, classes)
        monkeypatch.setattr(cosine_logsumexp, "forward_plan", lambda *_, **__: forward)
        monkeypatch.setattr(backward_pass, "backward_plan", lambda *_, **__: backward)
        parts = outcome(kernel_problem(d=width, dtypes=dtypes), **options)
        tolerance = 1e-5 if dtypes[0] == F32 else 2.0**-9
        for one, other in zip(parts, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))

    @pytest.mark.parametrize(
        ("samples", "classes", "width", "limit"),
        [
            (8192, 131072, 512, 256),
            (4096, 1 << 20, 512, 256),
            (8192, 131072, 4096, 256),
            (256, 1000, 512, 256),
            (64, 10**7, 64, 32),
        ],
    )
    def test_the_limit_is_kept(self, samples: int, classes: int, width: int, limit: int) -> None:
        from ltloss_kernels.config.chunking import backward_plan

        limit <<= 20
        for per_class in (0, 4 * width, 6 * width):
            plan = backward_plan(samples, classes, 6 * width, per_class, 2, 128, limit)
            taken = samples * 6 * width + plan.classes * (2 * plan.rows + per_class)
            assert taken <= limit
            assert plan.classes == classes or plan.classes % 128 == 0

    def test_a_batch_beyond_the_limit_is_still_computed(self) -> None:
        from ltloss_kernels.config.chunking import backward_plan

        assert backward_plan(1 << 20, 1 << 20, 2048, 2048, 2, 128, 1 << 20) == (32768, 1024)

    def test_extra_memory_of_the_forward(self) -> None:
        """Unit features, flags, partial sums and N-vectors of the shapes that we make promises about."""
        from ltloss_kernels.config.chunking import forward_plan

        shapes = ((8192, 131072, 512, 8), (4096, 1 << 20, 512, 32), (8192, 131072, 4096, 8), (8192, 131072, 128, 8))
        for samples, classes, width, promised in shapes:
            plan = forward_plan(samples, classes, width, 128, 128, 264, 0, 2)
            unit_features = 2 * plan.rows * width
            flags = -(-plan.rows // 128) * (classes // 128)
            factors_and_partials = 4 * (classes + samples * (plan.splits + 1))
            tiles = factors_and_partials + unit_features + flags + 4 * plan.rows
            epilogue = factors_and_partials + 4 * 5 * samples  # losses and coefficients; the others are gone by then
            assert max(tiles, epilogue) <= promised << 20

    @pytest.mark.parametrize("width", [16, 512, 4096, 8192])
    @pytest.mark.parametrize("copied", [0, 2])
    def test_chunks_of_samples_are_whole_tiles_and_not_too_small(self, width: int, copied: int) -> None:
        from ltloss_kernels.config.chunking import forward_plan

        for samples in (1, 100, 600, 8192, 8193, 100_000):
            plan = forward_plan(samples, 10_000, width, 128, 128, 264, copied, 2)
            assert plan.rows == samples or (plan.rows % 128 == 0 and plan.rows >= 256)

    @pytest.mark.parametrize(
        ("row_blocks", "tiles", "slots"), [(64, 1024, 264), (32, 8192, 264), (2, 8, 264), (1, 1, 264), (1000, 3, 264)]
    )
    def test_splits_fill_the_device(self, row_blocks: int, tiles: int, slots: int) -> None:
        from ltloss_kernels.config.chunking import splits_for

        splits = splits_for(row_blocks, tiles, slots)
        assert 1 <= splits <= tiles
        time = -(-row_blocks * splits // slots) * -(-tiles // splits)
        assert time <= max(1.1 * row_blocks * tiles / slots, 1) + 1

    def test_use_workspace(self) -> None:
        before = ltloss.current_workspace()
        with ltloss.use_workspace(1 << 20):
            assert ltloss.current_workspace() == 1 << 20
        assert ltloss.current_workspace() == before == 256 << 20
        for bad in (0, -1, True, 1.5):
            with refused("limit", repr(bad)):
                ltloss.use_workspace(bad)


class _Computations(TorchDispatchMode):
    """Counts the operators that would launch something on a GPU: all but allocations and views."""

    FREE = (
        "empty",
        "new_empty",
        "empty_like",
        "view",
        "slice",
        "select",
        "as_strided",
        "t",
        "detach",
        "expand",
        "alias",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        space, _, name = func.name().partition("::")
        if space == "aten" and name.partition(".")[0] not in self.FREE and not any(result is arg for arg in args):
            self.found[name] += 1
        return result


@pytest.mark.skipif(not INTERPRETED, reason="counts launches of the interpreter")
class TestLaunches:
    """How many launches a small problem costs: it is bound by them, not by arithmetic."""

    # forward, backward. Prototypes of another dtype, and float16 operands, are copied by one more launch; the forward's
    # tiles find the lengths of half-precision prototypes that are not. More than 256 samples: one more forward.
    EXPECTED: ClassVar = {(F32, F32): (4, 5), (F16, F32): (4, 6), (F16, F16): (3, 6)}

    @staticmethod
    def _counted(monkeypatch: pytest.MonkeyPatch, run: Any) -> Counter[str]:
        from ltloss_kernels import cosine_logsumexp_gradients

        from ltloss.testing import watching

        launches: Counter[str] = Counter()

        def count(kernel: str) -> None:
            launches[kernel] += 1

        def product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, overwrite: bool) -> None:
            launches["library product"] += 1  # its emulation for half precision on a CPU takes more
            with _disable_current_modes():
                target.copy_(left.float() @ right.float() + (0 if overwrite else target))

        with monkeypatch.context() as patch, opaque_launches(count), watching(_Computations()) as mode:
            patch.setattr(cosine_logsumexp_gradients, "multiply_add", product)
            run()
        return launches + mode.found

    @pytest.mark.parametrize("dtypes", EXPECTED)
    @pytest.mark.parametrize("name", ["cosine_softmax", "arcface", "long_tail", "class_weighted", "sum"])
    def test_number(self, name: str, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:

        monkeypatch.setattr(labels_operator, "check_label_range", lambda *_: None)  # not done on a GPU
        leaves = kernel_problem(20, 40, 8, dtypes=dtypes).leaves()
        loss: list[torch.Tensor] = []
        options = FAMILY[name](40)
        options = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        forward = self._counted(monkeypatch, lambda: loss.append(functional.margin_cross_entropy(*leaves, **options)))
        seed = torch.ones(())
        backward = self._counted(monkeypatch, lambda: torch.autograd.grad(loss[0], leaves[:2], seed))
        assert (forward.total(), backward.total()) == self.EXPECTED[dtypes], (forward, backward)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
class TestOnTheDevice:
    """A training step never waits for the GPU, so it can be captured."""

    OPTIONS: ClassVar = {"angular_margin": 0.3, "label_smoothing": 0.1}

    @pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, F32), (F16, F32), (F32, F32)])
    def test_nothing_synchronises_with_the_host(self, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        given = kernel_problem(dtypes=dtypes)
        outcome(given, torch.ones((), device=DEVICE), **self.OPTIONS)  # compiles
        leaves = given.leaves()
        sum(functional.cosine_logsumexp(*leaves, scale=9.0)).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            functional.margin_cross_entropy(*leaves, **self.OPTIONS).backward()
            sum(functional.cosine_logsumexp(*leaves, scale=9.0)).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @staticmethod
    def _searches(given: Any) -> tuple[torch.Tensor, ...]:
        rows = torch.arange(0, 70, 3, device=DEVICE)
        values = [functional.min_angle_regularizer(given.prototypes, classes=chosen) for chosen in (None, rows)]
        gradient = torch.autograd.grad(values[0] + values[1], given.prototypes)[0]
        return (*(value.detach() for value in values), gradient, *functional.top_k(given.features, given.prototypes, 5))

    @pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32)])
    def test_searches_do_not_synchronise_and_can_be_captured(self, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        leaves, others = kernel_problem(dtypes=dtypes).leaves(), kernel_problem(dtypes=dtypes, seed=1)
        with ltloss.debug_labels(False):
            self._searches(leaves)  # compiles
            torch.cuda.set_sync_debug_mode("error")
            try:
                self._searches(leaves)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._searches(leaves)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = self._searches(leaves)
            with torch.no_grad():
                leaves.prototypes.copy_(others.prototypes)
            graph.replay()
            for one, other in zip(captured, self._searches(leaves), strict=True):
                assert torch.equal(one, other)

    @pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F32)])
    def test_cuda_graph(self, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        leaves = kernel_problem(dtypes=dtypes).leaves()

        def step() -> tuple[torch.Tensor, ...]:
            loss = functional.margin_cross_entropy(*leaves, **self.OPTIONS)
            return (loss.detach(), *torch.autograd.grad(loss, leaves[:2]))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():  # other numbers at the same addresses
            leaves.features.copy_(kernel_problem(dtypes=dtypes, seed=1).features)
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(captured, step(), strict=True))


class TestRefusals:
    def test_float64(self) -> None:
        given = kernel_problem(dtypes=(torch.float64, torch.float64))
        for call in (
            lambda: functional.margin_cross_entropy(*given),
            lambda: functional.nearest_prototype(given.prototypes),
            lambda: functional.top_k(given.features, given.prototypes),
        ):
            with refused("'triton'", "torch.float64", error=BackendError):
                call()
        with ltloss.use_backend("auto"):
            assert functional.margin_cross_entropy(*given).dtype == torch.float64

    def test_too_wide(self) -> None:
        given = kernel_problem(3, 4, 8193)
        with refused("'triton'", "8192", "8193", error=BackendError):
            functional.margin_cross_entropy(*given)
        with refused("'triton'", "8192", "8193", error=BackendError):
            functional.cosine_logsumexp(*given, scale=1.0)

    def test_cpu_tensors_without_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ltloss_kernels import running

        monkeypatch.setattr(running, "interpreting", lambda: False)
        given = kernel_problem()
        with refused("'triton'", "cpu", "TRITON_INTERPRET=1", error=BackendError):
            functional.margin_cross_entropy(*(t.cpu() for t in given))

    def test_auto_takes_the_kernels_on_a_gpu(self) -> None:
        given = kernel_problem()
        with ltloss.use_backend("auto"):
            assert (choose_backend(*given[:2]) == "triton") == (DEVICE == "cuda")
        with ltloss.use_backend("torch"):
            assert choose_backend(*given[:2]) == "torch"
