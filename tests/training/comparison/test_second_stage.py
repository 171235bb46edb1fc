from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from helpers.toys import toy_settings

from ltloss.errors import UserError
from ltloss.training.comparison.second_stage import (
    ClassifierRetraining,
    class_balanced_order,
    normalize_weights,
    post_hoc_offset,
)
from ltloss.training.data.batches import batches
from ltloss.training.measure.evaluate import measure
from ltloss.training.model.classifier import Classifier
from ltloss.training.model.softmax_loss import SoftmaxLoss
from ltloss.training.run.prepare import TrainingData, prepare_data
from ltloss.training.run.run_config import RunConfig
from ltloss.training.run.settings import Settings
from ltloss.training.run.trainer import Trainer
from ltloss.training.seeds import numpy_generator

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def data_of(npz: Path, **changes: object) -> TrainingData:
    return prepare_data(Settings(**toy_settings(npz, loss="softmax", imbalance=5.0, **changes)))  # type: ignore[arg-type]


def test_tau_normalisation_divides_each_weight_by_its_length_to_that_power(toy_npz: Path) -> None:
    classifier = Classifier(data_of(toy_npz).config)
    head = classifier.loss
    assert isinstance(head, SoftmaxLoss)
    before = head.weight.detach().clone()
    normalize_weights(classifier, 0.5)
    expected = torch.stack([w / math.sqrt(math.sqrt(float((w * w).sum()))) for w in before])
    torch.testing.assert_close(head.weight.detach(), expected)
    assert not head.linear.bias.any()
    normalize_weights(classifier, 1.0)
    torch.testing.assert_close(head.weight.detach().norm(dim=1), torch.ones(3))


def test_tau_normalisation_of_a_cosine_classifier_is_refused(toy_npz: Path) -> None:
    settings = Settings(**toy_settings(toy_npz, loss="cosine"))  # type: ignore[arg-type]
    with refused("softmax", "cosine", error=UserError):
        normalize_weights(Classifier(prepare_data(settings).config), 1.0)


def test_post_hoc_adjustment_moves_the_predictions_to_the_rare_classes(toy_npz: Path) -> None:
    data = data_of(toy_npz)
    counts = data.config.class_counts
    offset = post_hoc_offset(counts, 2.0)
    torch.testing.assert_close(offset, torch.tensor([-2 * math.log(n / sum(counts)) for n in counts]))
    classifier = Classifier(data.config)
    huge = measure(classifier, data.test, data.config.settings.thresholds, logit_offset=1000 * offset)
    assert huge.per_class == (0.0, 0.0, 1.0)  # the rarest class is the last


def test_class_balanced_order_draws_every_class_evenly_and_every_image_of_a_class() -> None:
    labels = np.repeat([0, 2, 1], [900, 90, 10])  # not sorted by class
    order = class_balanced_order(labels, np.random.default_rng(0))
    assert order.shape == labels.shape
    drawn = np.bincount(labels[order], minlength=3)
    assert (abs(drawn - 1000 / 3) < 4 * math.sqrt(1000 * 2 / 9)).all()  # four standard deviations
    assert set(order[labels[order] == 1]) == set(np.flatnonzero(labels == 1))


def test_retraining_freezes_the_backbone_and_starts_a_new_classifier(
    toy_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(toy_npz)
    first = Trainer(data.config, data.train, CPU)
    first.run_epoch(1, data.test)
    stored = {name: tensor.clone() for name, tensor in first.classifier.state_dict().items()}
    second = ClassifierRetraining(data.config, data.train, CPU, stored)
    fresh = second.classifier.loss.weight.detach().clone()
    assert not torch.equal(fresh, stored["loss.linear.weight"])
    orders = []

    def watched(source: object, batch_size: int, order: np.ndarray, **options: object) -> object:
        orders.append(order)
        return batches(source, batch_size, order, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("ltloss.training.run.trainer.batches", watched)
    second.run_epoch(1, data.test)
    now = second.classifier.state_dict()
    changed = {name for name, tensor in now.items() if not torch.equal(tensor, stored[name])}
    assert changed == {"loss.linear.weight", "loss.linear.bias"}  # no weight and no statistic of the backbone
    assert not torch.equal(now["loss.linear.weight"], fresh)
    seen = class_balanced_order(data.train.labels, numpy_generator(0, "class-balanced order", 1))
    assert len(orders) == 1
    assert np.array_equal(orders[0], seen)


def test_class_weights_begin_at_their_epoch(toy_npz: Path) -> None:
    data = data_of(toy_npz, epochs=4, drw_start=0.5, beta=0.9)
    trainer = Trainer(data.config, data.train, CPU)
    head = trainer.classifier.loss
    assert isinstance(head, SoftmaxLoss)
    found = []
    for epoch in range(1, 5):
        trainer.run_epoch(epoch, data.test)
        found.append(None if head.class_weight is None else head.class_weight.tolist())
    effective = np.array([(1 - 0.9) / (1 - 0.9**n) for n in data.config.class_counts])
    assert found[:2] == [None, None]
    assert found[2] == found[3] == pytest.approx(effective / effective.mean())


def test_weights_from_the_start_differ_from_none_and_a_loss_without_them_is_refused(toy_npz: Path) -> None:
    losses = []
    for drw_start in (None, 0.0):
        data = data_of(toy_npz, epochs=1, drw_start=drw_start)
        losses.append(Trainer(data.config, data.train, CPU).run_epoch(1, data.test)["train_loss"])
    assert losses[0] != losses[1]
    settings = dataclasses.replace(data.config.settings, loss="cosine-space")
    with refused("cosine-space", error=UserError):
        Trainer(dataclasses.replace(data.config, settings=settings), data.train, CPU)


def test_a_softmax_prior_is_added_in_training_alone() -> None:
    torch.manual_seed(0)
    plain = SoftmaxLoss(3, 4)
    balanced = SoftmaxLoss.from_counts([60, 30, 10], 4, tau=1.5)
    balanced.load_state_dict(plain.state_dict())
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 2, 0])
    torch.testing.assert_close(balanced.logits(x), plain.logits(x))
    shifted = plain.logits(x) + 1.5 * torch.tensor([0.6, 0.3, 0.1]).log()
    torch.testing.assert_close(balanced(x, y), torch.nn.functional.cross_entropy(shifted, y))
    with refused("class_counts"):
        SoftmaxLoss(3, 4, tau=1.0)


def test_a_classifier_config_of_before_can_still_be_read(toy_npz: Path, tmp_path: Path) -> None:
    data = data_of(toy_npz)
    text = data.config.to_json()
    for name in ("schedule", "drw_start", "beta", "mixup", "tau", "crop_pad", "data_seed", "evaluate_every"):
        text = "\n".join(line for line in text.splitlines() if f'"{name}"' not in line)
    (tmp_path / "config.json").write_text(text)
    assert RunConfig.read(tmp_path).settings == data.config.settings
