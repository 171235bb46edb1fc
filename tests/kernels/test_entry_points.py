"""The entry points by themselves: what they promise to whoever puts partial sums together in another way."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import ltloss_kernels
import pytest
import torch
from helpers.kernel_problems import DEVICE, assert_close, exact_outcome, kernel_problem
from helpers.refusals import refused
from ltloss_kernels import Partials, gradients, margin_loss, partials

from ltloss.margins import Margin, Objective
from ltloss.testing import Outcome, Problem, relative_error

F16, F32 = torch.float16, torch.float32
C, IGNORED = 70, -100
CUTS = ((0, 23), (23, 70))


def partials_of(given: Problem, labels: torch.Tensor, ignore_index: int | None, **options: Any) -> Partials:
    defaults = {"scale": 9.0, "normalize_features": True, "normalize_prototypes": True, "with_logit_sum": True}
    return partials(given[0], given[1], labels, None, **{**defaults, **options}, ignore_index=ignore_index)


def concatenated(parts: list[Partials]) -> Partials:
    """As ranks would: parts of different shifts are told apart by a maximum of each."""
    maxima = [torch.full_like(part.sum, part.shift) if part.max is None else part.max for part in parts]
    return parts[0]._replace(
        sum=torch.cat([part.sum for part in parts]),
        max=torch.cat(maxima),
        logit_sum=torch.cat([part.logit_sum for part in parts if part.logit_sum is not None]),
        target_cosine=torch.stack([part.target_cosine for part in parts]).sum(0),
    )


@pytest.mark.parametrize("scale", [9.0, 82.5, 200.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_shards_of_the_classes_concatenate(normalize: bool, scale: float) -> None:
    given = kernel_problem()
    scale = scale if normalize else scale / 9
    options = {"scale": scale, "normalize_features": normalize}
    margin = Margin(angular_margin=0.2, cosine_margin=torch.linspace(0.0, 0.3, C, device=DEVICE))
    weight = torch.full((C,), 0.5, device=DEVICE)
    parts = []
    for first, end in CUTS:
        local = torch.where((given.labels >= first) & (given.labels < end), given.labels - first, -1)
        shard = Problem(given.features, given.prototypes[first:end], local)
        parts.append(partials_of(shard, local, None, **options))
    objective = Objective(margin, None, weight, scale, normalize, label_smoothing=0.1, reduction="sum")
    loss, *_ = margin_loss(concatenated(parts), given.labels, objective, C)
    exact = exact_outcome(
        given, angular_margin=0.2, cosine_margin=torch.linspace(0.0, 0.3, C).double(), class_weight=0.5,
        label_smoothing=0.1, scale=scale, normalize_features=normalize, reduction="sum",
    )  # fmt: skip
    assert relative_error(loss.cpu(), exact.loss) <= 5e-6


@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F32), (F16, F16)])
@pytest.mark.parametrize("width", [16, 19])  # prototypes read in place, and copied
def test_the_scale_of_the_logits_is_that_of_the_prototypes_themselves(
    width: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    given = kernel_problem(d=width, dtypes=dtypes)
    factor = partials_of(given, given.labels, IGNORED).class_scale
    exact = 9.0 / torch.log(torch.tensor(2.0, dtype=torch.float64)) / given.prototypes.double().norm(dim=1).cpu()
    assert relative_error(factor.cpu(), exact) <= 5e-7


def test_a_backward_may_read_in_place_what_the_forward_copied() -> None:
    """The saved prototypes may lie elsewhere than the original ones did."""
    given = kernel_problem(d=16)
    misaligned = torch.zeros(C * 16 + 1, device=DEVICE)[1:].view(C, 16).copy_(given.prototypes)
    found = partials_of(given._replace(prototypes=misaligned), given.labels, IGNORED)
    objective = Objective(Margin(cosine_margin=0.1), scale=9.0)
    loss, coefficients, inverse, largest = margin_loss(found, given.labels, objective, C)
    grads = gradients(
        torch.ones((), device=DEVICE), *given, None, coefficients, found.class_scale, inverse, largest,
        9.0, smooth=False, normalize_features=True, normalize_prototypes=True, ignore_index=IGNORED,
        threshold=None, polynomial=None, needs=(True, True, False), limit=lambda: 1 << 20,
    )  # fmt: skip
    assert_close(Outcome(loss, *grads[:2]), exact_outcome(given, cosine_margin=0.1, scale=9.0))


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("width", [64, 300])
def test_the_target_cosine_is_rounded_once(width: int, dtype: torch.dtype) -> None:
    """Near ±1 an angular margin magnifies its error by 1/sin θ."""
    generator = torch.Generator().manual_seed(width)
    prototypes = (3.0 * torch.randn(C, width, generator=generator)).to(dtype)
    direction = torch.linspace(-1, 1, C)[:, None] * prototypes.float()
    features = (direction + 0.003 * torch.randn(C, width, generator=generator)).to(dtype)
    labels = torch.arange(C, device=DEVICE)
    given = Problem(features.to(DEVICE), prototypes.to(DEVICE), labels)
    exact = torch.cosine_similarity(features.double(), prototypes.double(), eps=0.0)
    cosine = partials_of(given, labels, IGNORED).target_cosine.cpu().double()
    assert float((cosine - exact).abs().max()) <= 2.0**-25 * 1.001


def test_smoothing_without_the_sum_of_logits_is_refused() -> None:
    given = kernel_problem()
    found = partials_of(given, given.labels, IGNORED, with_logit_sum=False)
    with refused("label_smoothing=0.1", "logit_sum", "None"):
        margin_loss(found, given.labels, Objective(scale=9.0, label_smoothing=0.1), C)


def test_a_file_does_not_hide_the_entry_point_of_its_name() -> None:
    import ltloss_kernels.margin_loss

    assert all(hasattr(ltloss_kernels, name) for name in ltloss_kernels.__all__)
    assert ltloss_kernels.margin_loss is margin_loss
    with refused("'nothing_of_that_name'", error=AttributeError):
        ltloss_kernels.nothing_of_that_name  # noqa: B018


def test_device_code_only_knows_triton_and_itself() -> None:
    """It neither allocates nor launches, and no choice of a tile is made there."""
    files = sorted((Path(ltloss_kernels.__file__).parent / "device").glob("*.py"))
    assert len(files) > 8
    for file in files:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        allowed = ("__future__", "triton", "ltloss_kernels.device")
        assert all(name.startswith(allowed) for name in imported), (file.name, imported)
