"""Options of the trainer: AdamW, clipping, accumulation, a moving average of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.refusals import refused
from helpers.toys import toy_settings
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ltloss.errors import UserError
from ltloss.testing import relative_error
from ltloss.training.comparison.recipes import recipe
from ltloss.training.measure.evaluate import evaluate_run
from ltloss.training.model.classifier import Classifier
from ltloss.training.run.average import WeightAverage
from ltloss.training.run.optimizers import build_optimizers
from ltloss.training.run.prepare import prepare_data
from ltloss.training.run.run_config import RunConfig
from ltloss.training.run.settings import Settings
from ltloss.training.run.trainer import Trainer, train


def _config(**given: Any) -> RunConfig:
    return RunConfig(Settings(data="digits", **given), ("a", "b"), (3, 3), (1, 8, 8), (0.5,), (0.5,), {})


def _trainer(data: Path, **given: Any) -> Trainer:
    prepared = prepare_data(Settings(**toy_settings(data, **given)))
    return Trainer(prepared.config, prepared.train, torch.device("cpu"))


def _flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def _epoch(trainer: Trainer) -> dict[str, Any]:
    return trainer.run_epoch(1, trainer.source)


@pytest.fixture
def plain_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network without batch normalisation, which sees the size of a batch."""

    def build(name: str, image_shape: tuple[int, int, int], embedding_size: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, embedding_size))

    monkeypatch.setattr("ltloss.training.model.classifier.build_backbone", build)


@pytest.mark.parametrize(
    ("given", "lr", "decay"),
    [
        ({}, 0.05, 5e-4),
        ({"optimizer": "adamw"}, 0.002, 0.05),
        ({"optimizer": "adamw", "lr": 0.1, "weight_decay": 0.0}, 0.1, 0.0),
    ],
)
def test_rate_and_decay_are_those_of_the_optimizer(given: dict[str, Any], lr: float, decay: float) -> None:
    config = _config(**given)
    assert (config.settings.lr, config.settings.weight_decay) == (lr, decay)
    classifier = Classifier(config)
    (optimizer,) = build_optimizers(classifier, config.settings)
    assert type(optimizer) is (torch.optim.AdamW if given else torch.optim.SGD)
    found = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert found.keys() == set(classifier.parameters())
    assert (found[classifier.loss.weight], found[classifier.norm.bias]) == (decay, 0.0)


def test_a_recipe_lends_its_rate_to_sgd_alone() -> None:
    assert recipe("small")["lr"] == 0.1
    other = recipe("small", "adamw")
    assert other == {name: value for name, value in recipe("small").items() if name not in ("lr", "weight_decay")}


def test_clipping_bounds_the_way_of_a_step(toy_npz: Path) -> None:
    """One step of plain SGD goes as far as rate times norm, backbone and prototypes together."""
    given = {"batch_size": 60, "momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0, "lr": 2.0}
    free, clipped, far = (_trainer(toy_npz, clip_norm=norm, **given) for norm in (None, 0.01, 1e9))
    start = _flat(free.classifier)
    for trainer in (free, clipped, far):
        _epoch(trainer)
    assert float((_flat(free.classifier) - start).norm()) > 0.1
    assert float((_flat(clipped.classifier) - start).norm()) == pytest.approx(2.0 * 0.01, rel=1e-3)
    assert torch.equal(_flat(far.classifier), _flat(free.classifier))


@pytest.mark.parametrize(
    "given",
    [
        {"loss": "arcface", "accumulate": 2, "batch_size": 10},
        {"loss": "long-tail", "accumulate": 3, "batch_size": 7},  # parts of 7, 7 and 6
        {"loss": "softmax", "accumulate": 4, "batch_size": 5, "mixup": 0.5, "clip_norm": 0.1},
        {"loss": "cosface", "accumulate": 2, "batch_size": 10, "optimizer": "adamw"},
        {"loss": "arcface", "accumulate": 2, "batch_size": 10, "loss_options": {"sub_centers": 2}},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_accumulated_batches_are_one_large_batch(given: dict[str, Any], plain_backbone: None, toy_npz: Path) -> None:
    together = {**given, "accumulate": 1, "batch_size": given["batch_size"] * given["accumulate"]}
    apart, large = (_trainer(toy_npz, embedding_norm=False, **settings) for settings in (given, together))
    assert apart.parts == given["accumulate"]
    assert apart.steps == large.steps == 3
    start = _flat(large.classifier)
    rows = [_epoch(trainer) for trainer in (apart, large)]
    for name in ("train_loss", "train_accuracy"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5)
    assert relative_error(_flat(large.classifier), start) > 1e-3
    assert relative_error(_flat(apart.classifier), _flat(large.classifier)) < 1e-5


def test_no_part_of_a_step_holds_a_single_image(toy_npz: Path) -> None:
    trainer = _trainer(toy_npz, batch_size=2, accumulate=50)
    assert (trainer.steps, trainer.parts) == (1, 30)
    _epoch(trainer)


def test_the_average_of_the_weights_is_the_recursion() -> None:
    classifier = Classifier(_config(loss="cosine-space"))
    norm, centres = classifier.norm, classifier.loss.centers
    with torch.no_grad():
        norm.weight.fill_(0.0)
    average = WeightAverage(classifier, decay=0.25)
    kept = average.classifier
    with torch.no_grad():
        norm.weight.fill_(11.0)
        norm.running_mean.fill_(11.0)
        norm.num_batches_tracked.fill_(5)
        centres.counts.fill_(7)
    average.update(1)  # decay 2/11, below 0.25
    assert torch.allclose(kept.norm.weight, torch.tensor(9.0))
    assert torch.allclose(kept.norm.running_mean, torch.tensor(9.0))
    assert int(kept.norm.num_batches_tracked) == 5
    assert torch.equal(kept.loss.centers.counts, centres.counts)
    with torch.no_grad():
        norm.weight.fill_(1.0)
    average.update(50)
    assert torch.allclose(kept.norm.weight, torch.tensor(0.25 * 9 + 0.75))
    assert torch.equal(norm.weight.detach(), torch.ones(64))


@pytest.mark.slow
class Operators(TorchDispatchMode):
    """Counts the calls of operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_an_update_of_the_average_takes_few_operators_and_rounds_as_tensor_by_tensor() -> None:
    """A GPU waits for the host where each small tensor takes an operator of its own."""
    classifier = Classifier(_config(backbone="resnet32", loss="arcface"))
    average = WeightAverage(classifier, decay=0.9)
    expected = {name: tensor.clone() for name, tensor in average.classifier.state_dict().items()}
    with torch.no_grad():
        for tensor in classifier.state_dict().values():
            tensor.add_(torch.rand(tensor.shape).to(tensor.dtype))
    with Operators() as operators:
        average.update(7)
    assert operators.count < len(expected)
    for name, now in classifier.state_dict().items():
        wanted = expected[name].lerp_(now, 1 - 8 / 17) if now.is_floating_point() else now
        assert torch.equal(average.classifier.state_dict()[name], wanted), name


@pytest.mark.parametrize("fused", [False, True])
def test_the_average_is_what_a_run_measures_and_keeps(fused: bool, toy_npz: Path, tmp_path: Path) -> None:
    given = toy_settings(toy_npz, epochs=3, loss="arcface", fused_update=fused)
    plain = train(tmp_path / "plain", given, quiet=True).history
    result = train(tmp_path / "run", {**given, "ema": 0.9}, quiet=True)
    assert [row["train_loss"] for row in result.history] == [row["train_loss"] for row in plain]
    assert [row["test_loss"] for row in result.history] != [row["test_loss"] for row in plain]
    folder = tmp_path / "run" / "checkpoints" / "epoch-0003"
    trained, model = load_file(folder / "trained.safetensors"), load_file(folder / "model.safetensors")
    without = load_file(tmp_path / "plain" / "checkpoints" / "epoch-0003" / "model.safetensors")
    assert all(torch.equal(trained[name], without[name]) for name in without)
    assert not torch.equal(model["loss.weight"], trained["loss.weight"])
    assert torch.equal(Classifier.load(tmp_path / "run").loss.weight, model["loss.weight"])
    assert evaluate_run(tmp_path / "run").metrics.loss == result.history[-1]["test_loss"]


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ({"fused_update": True, "clip_norm": 1.0}, ("--fused-update", "--clip-norm")),
        ({"fused_update": True, "accumulate": 2}, ("--fused-update", "--accumulate", "--batch-size")),
        ({"fused_update": True, "prototype_dtype": "bfloat16", "ema": 0.9}, ("--ema", "--prototype-dtype bfloat16")),
        ({"optimizer": "adam"}, ("optimizer", "'adam'", "adamw")),
        ({"optimizer": "adamw", "momentum": 0.5}, ("momentum", "0.5", "SGD", "adamw")),
        ({"ema": 1.0}, ("ema", "1.0")),
        ({"clip_norm": 0.0}, ("clip_norm", "0.0")),
        ({"accumulate": 0}, ("accumulate", "0")),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], facts: tuple[str, ...]) -> None:
    with refused(*facts, error=UserError):
        Settings(data="digits", **given)
