from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.refusals import refused

from ltloss.errors import UserError
from ltloss.training.comparison.recipes import RECIPES, recipe
from ltloss.training.data.batches import augment
from ltloss.training.data.mixup import mix
from ltloss.training.run.optimizers import build_optimizers
from ltloss.training.run.schedules import first_epoch, learning_rate
from ltloss.training.run.settings import Settings


def test_the_cifar_recipe_has_the_rates_of_the_field() -> None:
    settings = Settings(data="digits", **recipe("cifar-lt"))
    steps = 100  # an epoch
    by_epoch = [learning_rate(settings, epoch * steps, 200 * steps) for epoch in range(200)]
    assert by_epoch[0] == pytest.approx(0.1 / (5 * steps))
    assert by_epoch[4] < 0.1
    assert by_epoch[5:160] == [0.1] * 155
    assert by_epoch[160:180] == pytest.approx([0.001] * 20)
    assert by_epoch[180:] == pytest.approx([0.00001] * 20)
    assert learning_rate(settings, 160 * steps - 1, 200 * steps) == 0.1
    assert first_epoch(0.8, settings.epochs) == 160


def test_steps_may_be_epochs_and_scale_with_shares() -> None:
    absolute = Settings(data="digits", lr=1.0, warmup=0.0, epochs=10, schedule="2:0.5,6:0.25")
    fractions = Settings(data="digits", lr=1.0, warmup=0.0, epochs=10, schedule="0.2:0.5,0.6:0.25")
    rates = [learning_rate(absolute, step, 30) for step in range(30)]
    assert rates == [learning_rate(fractions, step, 30) for step in range(30)]
    assert rates == [1.0] * 6 + [0.5] * 12 + [0.25] * 12


@pytest.mark.parametrize(
    "text", ["linear", "", "160", "160:0.1,80:0.01", "160:0", "a:b", "160:-1", "5:nan", "5:0.1,5:0.2"]
)
def test_other_schedules_are_refused(text: str) -> None:
    with refused("schedule", "cosine", text, error=UserError):
        Settings(data="digits", schedule=text)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_settings(name: str) -> None:
    assert Settings(data="digits", **recipe(name)).batch_size == 128
    with refused("--recipe", "cifar", "cifar-lt", error=UserError):
        recipe("cifar")


def test_weight_decay_acts_on_everything_where_the_recipe_says_so() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    for name, biases in (("cifar-lt", 2e-4), ("small", 0.0)):
        (optimizer,) = build_optimizers(network, Settings(data="digits", **recipe(name)))
        assert [group["weight_decay"] for group in optimizer.param_groups] == [RECIPES[name]["weight_decay"], biases]


def test_mixup_is_the_weighted_mean_of_two_images() -> None:
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1) * 40
    labels = torch.arange(6)
    mixed, other_labels, fraction = mix(images, labels, 0.4, np.random.default_rng(3))
    assert 0 < fraction < 1
    other = images[other_labels].float()
    torch.testing.assert_close(mixed, fraction * images.float() + (1 - fraction) * other)
    assert sorted(other_labels.tolist()) == list(range(6))
    fractions = [mix(images, labels, 0.4, np.random.default_rng(seed))[2] for seed in range(2000)]
    assert np.mean(fractions) == pytest.approx(0.5, abs=0.04)
    assert np.var(fractions) == pytest.approx(0.25 / 1.8, abs=0.015)  # of Beta(a, a): 1 / (4 (2a + 1))


def test_the_shift_is_at_most_crop_pad() -> None:
    image = torch.zeros(200, 1, 9, 9, dtype=torch.uint8)
    image[:, :, 4, 4] = 1
    moved = augment(image, "crop", torch.Generator().manual_seed(0), pad=2)
    rows, columns = moved.nonzero()[:, 2], moved.nonzero()[:, 3]
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (2, 6, 2, 6)
    assert torch.equal(augment(image, "crop", torch.Generator().manual_seed(0), pad=0), image)
