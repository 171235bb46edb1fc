"""Every loss module: it computes the function it documents, predicts, saves, moves, repeats itself and learns."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from helpers.refusals import refused, warned
from torch import Tensor

import ltloss
from ltloss import functional
from ltloss.class_balance import DeferredWeights, counts_from_labels, margins_from_counts
from ltloss.distributed import parallelize
from ltloss.export import InferenceHead
from ltloss.extend import logsumexp_stats
from ltloss.optim import PrototypeSGD
from ltloss.sub_centers import nearest_of_target
from ltloss.testing import MODULES, long_tail_counts, problem

C, D = 9, 5
STATE = {
    "CosineSpaceLoss": {"step", "centers.centers", "centers.counts"},
    "AdaFaceLoss": {"length_moments"},
    "ElasticFaceLoss": {"step"},
    "CurricularFaceLoss": {"mean_cosine"},
}
CROSS_ENTROPIES = [  # with the options of the family
    name for name in MODULES if name not in (*STATE, "MagFaceLoss", "InterclassFilterLoss")
]


def batch(n: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    features, _, labels = problem(n, C, D, dtype=dtype)
    return features, labels


def expected_margins() -> dict[str, dict[str, object]]:
    counts = long_tail_counts(C)
    prior = (counts / counts.sum()).log()
    return {
        "CosineSoftmaxLoss": {},
        "CosFaceLoss": {"cosine_margin": 0.35},
        "ArcFaceLoss": {"angular_margin": 0.5},
        "CombinedMarginLoss": {
            "angular_margin": margins_from_counts(counts, 0.8),
            "cosine_margin": 0.1,
            "angle_multiplier": 1.1,
        },
        "LDAMLoss": {"cosine_margin": margins_from_counts(counts, 0.5, normalize="max")},
        "LogitAdjustedLoss": {"log_prior": prior},
        "LongTailLoss": {"angular_margin": margins_from_counts(counts, 0.5)},
        "LongTailLoss with prior": {
            "angular_margin": margins_from_counts(counts, 0.5, normalize="max"),
            "log_prior": prior,
        },
    }


SHARED_OPTIONS = [
    {},
    {"scale": 12.0, "label_smoothing": 0.1, "reduction": "sum"},
    {"normalize_features": False, "scale": 2.0, "ignore_index": 3},
    {"class_weight": torch.linspace(1, 2, C), "reduction": "none"},
    {"beyond_pi": "arcface", "margin_gradient": "straight_through"},
]


@pytest.mark.parametrize("options", SHARED_OPTIONS, ids=lambda o: "-".join(o) or "defaults")
@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_forward_is_the_function(name: str, options: dict[str, object], backend: str) -> None:
    extra = {"min_angle_weight": 0.0, "feature_norm_weight": 0.0} if name == "LongTailLoss" else {}
    module = MODULES[name](C, D, **options, **extra)
    features, labels = batch()
    labels = labels.masked_fill(labels < 0, int(options.get("ignore_index", -100)))
    expected = functional.margin_cross_entropy(
        features, module.weight, labels, **{"scale": ltloss.default_scale(C), **expected_margins()[name], **options}
    )
    torch.testing.assert_close(module(features, labels), expected)


@pytest.mark.parametrize("classes", [1, 2, 54, 55, 1623, 10**7])
def test_default_scale_leaves_a_well_placed_sample_little_to_gain(classes: int) -> None:
    """Its cross-entropy among prototypes at right angles is at most 1/C."""
    scale = ltloss.default_scale(classes)
    loss = np.log1p((classes - 1) * np.exp(-scale))
    assert loss <= 1 / classes
    assert scale == max(8.0, 2 * np.log(classes))


@pytest.mark.parametrize(
    ("classes", "length", "facts"), [(0, 1.0, ("num_classes", "0")), (9, -2.0, ("feature_length", "-2.0"))]
)
def test_default_scale_refuses(classes: int, length: float, facts: tuple[str, ...]) -> None:
    with refused(*facts):
        ltloss.default_scale(classes, length)


@pytest.mark.parametrize("name", MODULES)
def test_scale_follows_the_number_of_classes_unless_given(name: str) -> None:
    assert MODULES[name](300, D).scale == ltloss.default_scale(300)
    assert MODULES[name](300, D, scale=3).scale == 3.0
    if name in CROSS_ENTROPIES:
        assert MODULES[name](300, D, normalize_features=False).scale == ltloss.default_scale(300, D**0.5)


def test_sizes_may_be_numbers_of_numpy() -> None:
    labels = np.array([0, 3, 1])
    module = ltloss.ArcFaceLoss(labels.max() + 1, np.int32(5))
    assert (module.num_classes, type(module.num_classes), module.weight.shape) == (4, int, (4, 5))


def test_integers_may_be_numbers_of_numpy() -> None:
    features, labels = batch()
    number = np.int64(3)
    module = ltloss.ArcFaceLoss(C, D, ignore_index=3)
    assert torch.equal(module.predict(features, k=number).index, module.predict(features, k=3).index)
    assert InferenceHead(module, k=number).k == 3
    expected = functional.margin_cross_entropy(features, module.weight, labels.clamp_min(0), ignore_index=3)
    found = functional.margin_cross_entropy(features, module.weight, labels.clamp_min(0), ignore_index=number)
    assert torch.equal(found, expected)
    stats = logsumexp_stats(features, module.weight, labels.clamp_min(0), scale=2.0, ignore_index=number)
    assert torch.equal(stats.labels, labels.clamp_min(0).masked_fill(labels == 3, -1))
    nearest, _ = nearest_of_target(features, module.weight[:, None], labels, ignore_index=np.int64(-100))
    assert torch.equal(nearest < 0, labels < 0)
    assert counts_from_labels([3, 0], 4, ignore_index=number).tolist() == [1, 0, 0, 0]
    assert DeferredWeights(torch.ones(2), start_epoch=number)(2) is None
    for made in (ltloss.CosineSpaceLoss(C, D, start_step=number), ltloss.ElasticFaceLoss(C, D, seed=number)):
        assert "=3" in repr(made)
    assert PrototypeSGD(module, seed=number).param_groups[0]["seed"] == 3
    assert type(parallelize(ltloss.ArcFaceLoss(C, D, device="meta"), None, capacity=number).capacity) is int


@pytest.mark.parametrize("name", MODULES)
class TestEveryModule:
    def test_logits_and_prediction(self, name: str) -> None:
        module = MODULES[name](C, D, scale=7.0)
        features, _ = batch()
        unit = torch.nn.functional.normalize
        expected = 7.0 * unit(features) @ unit(module.weight).t()
        torch.testing.assert_close(module.logits(features), expected)
        found = module.predict(features, k=3)
        assert torch.equal(found.index, expected.topk(3).indices)
        torch.testing.assert_close(found.cosine * 7.0, expected.topk(3).values)
        assert not found.cosine.requires_grad
        assert module.predict(features).index.shape == (7, 1)

    def test_weight(self, name: str) -> None:
        torch.manual_seed(1)
        module = MODULES[name](400, 64)
        assert module.weight.shape == (400, 64)
        assert float(module.weight.detach().norm(dim=1).mean()) == pytest.approx(1.0, abs=0.02)  # 400 draws
        assert [key for key, _ in module.named_parameters()] == ["weight"]
        before = module.weight.detach().clone()
        module.reset_parameters()
        assert not torch.equal(before, module.weight)

    def test_repr_has_every_hyper_parameter(self, name: str) -> None:
        module = MODULES[name](C, D)
        text = repr(module)
        assert text.startswith(f"{name.partition(' ')[0]}(")
        assert f"{C}, {D}" in text
        cls, names = type(module), set()
        for base in cls.__mro__:
            if base is not object and "__init__" in vars(base) and issubclass(base, ltloss.PrototypeHead):
                names |= set(inspect.signature(base.__init__).parameters)
            if base is ltloss.CosineSpaceLoss:
                break
        names -= {"self", "num_classes", "embedding_size", "device", "dtype", "options", "class_counts"}
        names -= {"sub_centers"}  # shown where there are several
        known_as = {"ArcFaceLoss": "angular_margin", "CosFaceLoss": "cosine_margin"}
        if name in known_as:
            names.discard("margin")
            assert known_as[name] in text
        for parameter in names:
            assert f"{parameter}=" in text, parameter

    def test_state_dict_round_trip(self, name: str) -> None:
        module, other = MODULES[name](C, D), MODULES[name](C, D)
        features, labels = batch()
        module(features, labels)
        module(features.flip(0), labels)
        state = copy.deepcopy(module.state_dict())
        assert set(state) == {"weight"} | STATE.get(name, set())
        other.load_state_dict(state)
        assert torch.equal(other(features, labels), module(features, labels))

    def test_deepcopy_and_pickle(self, name: str) -> None:
        module = MODULES[name](C, D)
        features, labels = batch()
        module(features, labels)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other.weight is not module.weight
            assert torch.equal(copy.deepcopy(module)(features, labels), other(features, labels))
            assert repr(other) == repr(module)

    def test_optimizer_moves_the_weight(self, name: str) -> None:
        module = MODULES[name](C, D)
        before = module.weight.detach().clone()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module(*batch()).backward()
        optimizer.step()
        assert not torch.equal(before, module.weight)

    @pytest.mark.parametrize("value", [torch.inf, torch.nan])
    def test_what_is_not_finite_leaves_nothing_behind(self, name: str, value: float, backend: str) -> None:
        """Whoever scales gradients skips such a step; the state is that of a batch without the sample."""
        module = MODULES[name](C, D)
        without = copy.deepcopy(module)
        features, labels = batch()
        bad = features.clone()
        bad[0, 0] = value
        module(bad, labels)
        without(features, labels.index_fill(0, torch.tensor([0]), -100))
        torch.testing.assert_close(module.state_dict(), without.state_dict())

    def test_learns_a_tiny_problem(self, name: str) -> None:
        """Four clusters and an embedding matrix: to 100 %."""
        torch.manual_seed(3)
        centres = torch.nn.functional.normalize(torch.randn(4, 10)) * 4.0
        labels = torch.arange(80) % 4
        inputs = centres[labels] + 0.3 * torch.randn(80, 10)
        embed, head = torch.nn.Linear(10, 6), MODULES[name](4, 6, scale=10.0)
        optimizer = torch.optim.Adam([*embed.parameters(), *head.parameters()], lr=0.03)
        for _ in range(60):
            optimizer.zero_grad()
            head(embed(inputs), labels).backward()
            optimizer.step()
        assert head.predict(embed(inputs)).index[:, 0].tolist() == labels.tolist()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_moves_to_another_dtype(self, name: str, dtype: torch.dtype) -> None:
        module = MODULES[name](C, D).to(dtype)
        assert module.weight.dtype == dtype
        features, labels = batch(dtype=dtype)
        features.requires_grad_()
        for _ in range(2):
            loss = module(features, labels)
        assert bool(torch.isfinite(loss))
        loss.backward()
        assert features.grad.dtype == module.weight.grad.dtype == dtype

    def test_moves_to_another_device(self, name: str) -> None:
        module = MODULES[name](C, D).to("meta")
        assert all(t.device.type == "meta" for t in (*module.parameters(), *module.buffers()))

    def test_made_in_another_dtype(self, name: str) -> None:
        module = MODULES[name](C, D, dtype=torch.float64)
        features, labels = batch(dtype=torch.float64)
        assert module(features, labels).dtype == torch.float64

    def test_half_precision_features(self, name: str) -> None:
        """bf16 features with a float32 weight: a float32 loss close to that of the same numbers in float32."""
        module = MODULES[name](C, D)
        features, labels = batch(dtype=torch.bfloat16)
        twin = copy.deepcopy(module)
        loss, exact = module(features.requires_grad_(), labels), twin(features.detach().float(), labels)
        loss.backward()
        assert loss.dtype == module.weight.grad.dtype == torch.float32
        assert features.grad.dtype == torch.bfloat16
        torch.testing.assert_close(loss, exact)

    def test_autocast(self, name: str) -> None:
        """Under autocast the features come in bfloat16, and the loss does not lose digits of its own."""
        module, embed = MODULES[name](C, D), torch.nn.Linear(4, D)
        twin, inputs = copy.deepcopy(module), torch.randn(7, 4)
        _, labels = batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = embed(inputs)
            loss = module(features, labels)
        assert features.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, twin(features.detach(), labels))
        loss.backward()
        assert embed.weight.grad.dtype == torch.float32
        assert bool(torch.isfinite(embed.weight.grad).all())


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_class_weights_can_be_set_and_removed(name: str) -> None:
    module = MODULES[name](C, D, reduction="none")
    features, labels = batch(ignored_free := 7)
    assert ignored_free == 7
    if name == "LongTailLoss":
        module.min_angle_weight = module.feature_norm_weight = 0.0
    plain = module(features, labels)
    weights = torch.linspace(1, 3, C)
    schedule = DeferredWeights(weights, start_epoch=2)
    for epoch in (0, 2, 3, 0):
        module.set_class_weight(schedule(epoch))
        factor = weights[labels.clamp_min(0)] if epoch >= 2 else torch.ones(7)
        torch.testing.assert_close(module(features, labels), plain * factor)
    module.set_class_weight(weights)
    assert "class_weight=(9,) in [1, 3]" in repr(module)
    assert "class_weight" not in module.state_dict()
    with refused("class_weight", "(9,)", "(8,)"):
        module.set_class_weight(torch.ones(8))


@pytest.mark.parametrize("name", [name for name in MODULES if name != "CosineSpaceLoss"])
def test_a_number_as_class_weight_is_that_of_every_class(name: str, backend: str) -> None:
    module = MODULES[name](C, D, reduction="sum", class_weight=2.0).eval()
    found = module(*batch())
    module.class_weight = torch.full((C,), 2.0)
    torch.testing.assert_close(found, module(*batch()))


@pytest.mark.parametrize("cls", [ltloss.LDAMLoss, ltloss.LogitAdjustedLoss, ltloss.LongTailLoss])
def test_from_counts(cls: type[ltloss.CombinedMarginLoss]) -> None:
    counts = [50, 7, 1]
    modules = [cls.from_counts(counts, D, scale=5.0), cls(3, D, class_counts=torch.tensor(counts), scale=5.0)]
    assert [(m.num_classes, m.embedding_size, m.scale) for m in modules] == [(3, D, 5.0)] * 2
    modules[1].load_state_dict(modules[0].state_dict())
    features, labels = torch.randn(4, D), torch.tensor([0, 1, 2, 2])
    assert torch.equal(modules[0](features, labels), modules[1](features, labels))
    with refused("class_counts", "4", "3"):
        cls(4, D, class_counts=counts)
    for number in (5, torch.tensor(5)):
        with refused("class_counts", "(C,)", "5"):
            cls.from_counts(number, D)


def test_tau_and_max_margin() -> None:
    prior = ltloss.LogitAdjustedLoss.from_counts([3, 1], D).log_prior
    torch.testing.assert_close(ltloss.LogitAdjustedLoss.from_counts([3, 1], D, tau=2.0).log_prior, 2.0 * prior)
    assert float(ltloss.LDAMLoss.from_counts([30, 10], D, max_margin=0.3).cosine_margin.max()) == pytest.approx(0.3)


def test_state_moves_between_the_losses_of_the_family() -> None:
    source = ltloss.ArcFaceLoss(C, D, class_weight=torch.ones(C))
    target = ltloss.LogitAdjustedLoss.from_counts(long_tail_counts(C), D)
    with warned("angular_margin=0", "0.5", "log_prior", kind=UserWarning):
        target.load_state_dict(source.state_dict())
    assert torch.equal(source.weight, target.weight)


def test_constants_are_copies() -> None:
    margin = torch.full((C,), 0.3)
    module = ltloss.ArcFaceLoss(C, D, margin=margin)
    margin.fill_(9.0)
    assert float(module.angular_margin.max()) == pytest.approx(0.3)


def test_head_without_a_loss() -> None:
    head = ltloss.PrototypeHead(C, D, scale=4.0, normalize_features=False)
    features = torch.randn(3, D)
    lengths = features.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        head.logits(features), 4.0 * features @ torch.nn.functional.normalize(head.weight).t(), rtol=1e-5, atol=1e-5
    )
    assert float(lengths.min()) > 0
    assert "normalize_features=False" in repr(head)


def test_cosine_space_loss_takes_a_margin_per_class() -> None:
    features, labels = batch()
    margins = torch.linspace(0.1, 0.5, 5)
    module = ltloss.CosineSpaceLoss(5, features.shape[1], margin=margins, scale=30.0)
    module(features, labels % 5)
    expected = functional.margin_cross_entropy(features, module.weight, labels % 5, cosine_margin=margins)
    torch.testing.assert_close(module.terms["inter"], expected.detach(), rtol=1e-6, atol=0.0)
    assert "margin" not in module.state_dict()


def test_ignored_samples_get_no_regulariser_either() -> None:
    features, _ = batch(3)
    module = ltloss.LongTailLoss.from_counts([5, 1], features.shape[1], reduction="none")
    losses = module(features, torch.tensor([0, -100, 1]))
    assert losses[1] == 0
    assert losses[0] != 0
