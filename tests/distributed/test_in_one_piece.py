"""Parallel heads as one process has them, and dense logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import world
from helpers.cases import Case, batch, build, part, whole
from helpers.small_run import make_run
from helpers.toys import CLASS_NAMES, toy_images

from ltloss import ArcFaceLoss
from ltloss.distributed import class_mesh, in_one_piece, parallelize
from ltloss.testing import relative_error
from ltloss.training.data.sources import ArrayImages
from ltloss.training.measure import evaluate

pytestmark = pytest.mark.slow

CASES = [Case(name, 7, ((3, 3),) * 2) for name in ("CosineSpaceLoss", "LongTailLoss", "cosine-space ema")]


def _gathered(rank: int | None, data: int = 1) -> list[dict[str, torch.Tensor]]:
    """Two steps on ranks and a third in one piece."""
    found = []
    for case in CASES:
        parallel = build(case) if rank is None else parallelize(build(case), class_mesh(data))
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        features, labels = batch(case, 0)
        rows = slice(None) if rank is None else part(case, 0, rank)
        torch.autograd.backward(parallel(features[rows], labels[rows]))
        optimizer.step()
        optimizer.zero_grad()
        head = in_one_piece(parallel)
        assert type(head) is type(build(case))
        before = whole(parallel.weight)
        with world.Collectives() as counted:
            loss = head(features, labels)
            torch.autograd.backward(loss)
            torch.optim.SGD(head.parameters(), lr=0.1).step()
            logits = head.logits(features)
        assert counted.calls == []
        if rank is not None:
            assert torch.equal(whole(parallel.weight), before)
        found.append({**head.state_dict(), "loss": loss.detach(), "logits": logits.detach()})
    return found


def test_in_one_piece_it_goes_on_like_one_process() -> None:
    for ranks, data in ((2, 1), (2, 2)):
        for found in world.run(_gathered, ranks, data):
            for ours, theirs in zip(found, _gathered(None), strict=True):
                assert ours.keys() == theirs.keys()
                for name, value in theirs.items():
                    assert relative_error(ours[name].double(), value.double()) <= 2e-5, name


def test_what_is_not_parallel_is_in_one_piece() -> None:
    head, sampled = build(CASES[0]), parallelize(ArcFaceLoss(7, 6), None, sample_rate=0.5)
    assert in_one_piece(head) is head
    assert type(in_one_piece(sampled)) is ArcFaceLoss
    assert not hasattr(in_one_piece(sampled), "sampler")
    assert sampled.sampler is not None


def test_its_constants_are_its_own() -> None:
    sampled = parallelize(ArcFaceLoss(7, 6), None, sample_rate=0.5)
    head = in_one_piece(sampled)
    head.log_prior = torch.zeros(7)
    assert sampled.double().log_prior is None
    sampled.log_prior = torch.ones(7)
    assert torch.equal(head.float().log_prior, torch.zeros(7))


def _logits(rank: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    head = parallelize(build(CASES[0]), class_mesh())
    features, _ = batch(CASES[0], 0)
    with world.Collectives() as counted:
        logits = head.logits(features[part(CASES[0], 0, rank)])
    torch.autograd.backward(logits.square().sum())
    return logits.detach(), whole(head.weight.grad), counted.calls


def test_logits_and_their_gradient_are_those_of_one_process() -> None:
    head = build(CASES[0])
    logits = head.logits(batch(CASES[0], 0)[0])
    logits.square().sum().backward()
    found = world.run(_logits, 2)
    assert relative_error(torch.cat([ours for ours, _, _ in found]), logits) <= 2e-5
    for _, gradient, calls in found:
        assert relative_error(gradient, head.weight.grad) <= 2e-5
        assert calls == ["all_gather_into_tensor"]


def _without_gradients(rank: int) -> list[bool]:
    same = []
    for case in CASES:
        head = parallelize(build(case), class_mesh()).eval()
        features, labels = (tensor[part(case, 0, rank)] for tensor in batch(case, 0))
        expected = head(features, labels), head.predict(features).cosine, head.logits(features)
        with torch.inference_mode():
            found = head(features, labels), head.predict(features).cosine, head.logits(features)
            whole_head = in_one_piece(head)
        same += [torch.equal(one, other) for one, other in zip(found, expected, strict=True)]
        same.append(torch.equal(whole_head.logits(features), expected[2]))
        torch.autograd.backward(whole_head(features, labels))  # an ordinary parameter, made where it may be
    return same


def test_a_parallel_head_answers_in_inference_mode() -> None:
    assert all(all(same) for same in world.run(_without_gradients, 2))


def _measured(rank: int, folder: Path) -> tuple[float, list[str]]:
    images, labels = toy_images(8)
    classifier = make_run(folder / str(rank), CLASS_NAMES, shape=(1, 8, 8), backbone="small-cnn")
    parallelize(classifier.loss, class_mesh())
    source = ArrayImages(images, labels, CLASS_NAMES, [str(number) for number in range(len(images))])
    with pytest.MonkeyPatch.context() as patch, world.Collectives() as counted:
        patch.setattr(evaluate, "_LOGITS_AT_ONCE", 12)  # four rows at a time
        metrics = evaluate.measure(classifier, source, classifier.config.settings.thresholds)
    return metrics.accuracy, counted.calls


def test_an_evaluation_gathers_the_weight_once(tmp_path: Path) -> None:
    first, second = world.run(_measured, 2, tmp_path)
    assert first == second
    assert first[1] == ["all_gather_into_tensor"]
