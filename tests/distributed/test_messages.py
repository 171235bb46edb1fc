"""What is sent in a step, counted by PyTorch's own operators; batches of changing lengths; mistakes on one rank."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import world
from helpers.cases import BUILD, DIM, Case, batch, build, part, trace
from helpers.looks import Looks
from helpers.refusals import missing, refused
from torch.distributed.device_mesh import DeviceMesh

import ltloss
from ltloss.distributed import DistributedError, class_mesh, parallelize
from ltloss.distributed.layout import Layout, local
from ltloss.testing import relative_error

pytestmark = pytest.mark.slow

# What c10d calls the three messages of a step; reduce-scatter may be named after its renamed function.
STEP = ["allgather_base", "allgather_base", "reduce_scatter_base"]


def _normal(calls: list[str]) -> list[str]:
    names = {"all_gather_into_tensor": "allgather_base", "reduce_scatter_tensor": "reduce_scatter_base"}
    return [names.get(call, call) for call in calls]


def _counted(rank: int, name: str, data: int) -> tuple[list[str], list[str]]:
    case = Case(name, 12, ((4, 4),) * 3)
    module = parallelize(build(case), class_mesh(data))
    calls: list[list[str]] = [[], []]
    for step in range(2):  # the first one agrees on sizes
        features, labels = (tensor[part(case, step, rank)] for tensor in batch(case, step))
        features.requires_grad_()
        with world.Collectives() as forward:
            loss = module(features, labels)
        with world.Collectives() as backward:
            torch.autograd.backward(loss.sum())
        calls = [_normal(forward.calls), _normal(backward.calls)]
    return calls[0], calls[1]


def _all_counted(rank: int) -> dict[str, Any]:
    return {name: _counted(rank, name, 1) for name in BUILD} | {"two by one": _counted(rank, "ArcFaceLoss", 2)}


def test_messages_of_a_step() -> None:
    for found in world.run(_all_counted, 2):
        for name, (forward, backward) in found.items():
            if name.startswith("family") or name in ("CosFaceLoss", "ArcFaceLoss", "LDAMLoss", "CombinedMarginLoss"):
                upstream = ["allgather_base"] if name == "family per_sample" else []
                assert (forward + backward) == [*STEP[:2], *upstream, *STEP[2:]], name
            elif name.startswith(("CosineSpace", "cosine-space")):
                assert sorted(forward + backward) == sorted([*STEP, "allreduce", "reduce_scatter_base"]), name
            elif name == "LinearSoftmaxLoss":  # the gradient of the bias
                assert forward + backward == [*STEP, "allreduce"]
            elif name == "two by one":
                # One class rank per data group: nothing to reduce over classes, and the weight's gradient over data.
                assert forward + backward == [*STEP[:2], "allreduce"], name


def _looks(rank: int) -> dict[str, tuple[list[str], list[str]]]:
    """What a warm step looks at: the forward with a capacity, and the backward."""
    seen = {}
    for name in ("family everything", "family per_sample", "CosineSpaceLoss"):
        case = Case(name, 12, ((4, 4),) * 2)
        module = parallelize(build(case), class_mesh(), capacity=4)
        features, labels = (tensor[part(case, 0, rank)] for tensor in batch(case, 0))
        features.requires_grad_()
        module(features, labels)
        with Looks() as forward:
            batch_of = module.batch(features, labels, lambda: None, padding=-100)  # type: ignore[attr-defined]
        loss = module(features, labels)
        with Looks() as backward:
            torch.autograd.backward(loss.sum())
        assert batch_of.features.shape == (8, DIM)
        seen[name] = forward.found, backward.found
    return seen


def test_no_look_at_the_data_in_the_backward_nor_with_a_capacity() -> None:
    for seen in world.run(_looks, 2):
        assert all(found == ([], []) for found in seen.values()), seen


def _no_grad(rank: int) -> list[str]:
    case = Case("ArcFaceLoss", 12, ((4, 4),) * 2)
    module = parallelize(build(case), class_mesh(), capacity=4)
    features, labels = (tensor[part(case, 0, rank)] for tensor in batch(case, 0))
    with torch.no_grad():
        module(features, labels)
        with world.Collectives() as counted:
            module(features, labels)
    return _normal(counted.calls)


def test_without_gradients_only_the_two_forward_messages() -> None:
    assert world.run(_no_grad, 2) == [STEP[:2]] * 2


def _frozen(rank: int) -> list[list[str]]:
    calls = []
    for capacity in (None, 4):
        module = parallelize(build(Case("ArcFaceLoss", 12, ((4, 4),))), class_mesh(), capacity=capacity)
        for _ in range(2):
            with world.Collectives() as counted:
                module(torch.randn(4, DIM), torch.arange(4)).backward()
        calls.append(_normal(counted.calls))
    return calls


def test_features_without_a_gradient_on_any_rank_get_none() -> None:
    assert world.run(_frozen, 2) == [[STEP[:2]] * 2] * 2


def _lengths(rank: int) -> list[float]:
    """Growing batches, another dtype, frozen features on one rank: against one process, one after the other."""
    errors = []
    module = parallelize(build(Case("LongTailLoss", 9, ((1, 1),))), class_mesh())
    one = build(Case("LongTailLoss", 9, ((1, 1),)))
    for step, sizes in enumerate(((3, 0), (0, 40), (0, 0), (5, 2))):
        for dtype in (torch.float32, torch.bfloat16):
            case = Case("LongTailLoss", 9, (sizes,) * 4)
            features, labels = batch(case, step)
            features = features.to(dtype)
            whole = features.clone().requires_grad_()
            expected = one(whole, labels)
            rows = part(case, 0, rank)
            mine = features[rows].clone().requires_grad_(rank == 1)  # rank 0's backbone is frozen
            loss = module(mine, labels[rows])
            torch.autograd.backward(loss)
            torch.autograd.backward(expected)
            errors.append(relative_error(loss, expected, 1e-3))
            assert whole.grad is not None
            if rank == 1:
                assert mine.grad is not None
                errors.append(
                    relative_error(mine.grad, whole.grad[rows], 1e-2) / (1e3 if dtype != torch.float32 else 1)
                )
    return errors


def test_batches_of_any_lengths_and_dtypes() -> None:
    for errors in world.run(_lengths, 2):
        assert max(errors) <= 2e-5


def _fixed(rank: int) -> Any:
    case = Case("CosineSpaceLoss", 9, ((3, 1), (2, 3), (0, 2)))
    return trace(case, rank, capacity=3), trace(case)


def test_capacity_needs_no_look_at_the_data() -> None:
    found = world.run(_fixed, 2)
    for mine, one in found:
        assert relative_error(mine.weight, one.weight) <= 2e-5
    for step in range(3):
        grads = torch.cat([mine.feature_grads[step] for mine, _ in found])
        assert relative_error(grads, found[0][1].feature_grads[step], 1e-2) <= 2e-5


def _scaled(rank: int) -> Any:
    case = Case("ArcFaceLoss", 9, ((3, 1),))
    return trace(case, rank, averaged_backbone=True).feature_grads[0], trace(case, rank).feature_grads[0]


def test_gradients_for_a_backbone_that_averages() -> None:
    for averaged, plain in world.run(_scaled, 2):
        assert torch.allclose(averaged, 2 * plain)


def _from_meta(rank: int, data: int) -> Any:
    torch.manual_seed(5 + rank)  # rank 0's decides
    with torch.device("cpu"):
        counts = torch.arange(1, 10_001)
    module = ltloss.LongTailLoss.from_counts(counts, 3, device="meta")
    module = parallelize(module, class_mesh(data))
    space = parallelize(ltloss.CosineSpaceLoss(7, 3, device="meta"), class_mesh(data))
    space(torch.randn(2, 3), torch.tensor([1, 2]))
    return module.weight.detach().full_tensor(), local(module.weight).shape, int(space.step), module.angular_margin


def test_built_without_memory() -> None:
    two, four = world.run(_from_meta, 2, 1), world.run(_from_meta, 4, 1)
    for found in (*two, *four):
        assert torch.equal(found[0], two[0][0])
        assert found[2] == 1
        assert torch.equal(found[3], ltloss.class_balance.margins_from_counts(torch.arange(1, 10_001), 0.5))
    assert abs(float(two[0][0].norm(dim=1).square().mean()) - 1.0) < 0.05
    assert four[3][1] == (2500, 3)


MISTAKES: dict[str, tuple[type[Exception], tuple[str, ...]]] = {
    "label": (IndexError, ("labels", "[0, 9)", "9", "2")),
    "label count": (ValueError, ("labels", "(4,)", "(3,)")),
    "width": (ValueError, ("features", "prototypes", "(4, 5)", f"(9, {DIM})")),
    "not a tensor": (TypeError, ("features", "torch.Tensor", "str")),
    "dtype": (DistributedError, ("features", "float32", "float64")),
}


def _mistake(rank: int, kind: str, warm: bool) -> tuple[type[Exception] | None, str, float]:
    """One rank is wrong; what every rank gets, and how long that takes."""
    module = parallelize(ltloss.ArcFaceLoss(9, DIM), class_mesh())
    features: Any = torch.randn(4, DIM)
    labels = torch.tensor([0, 1, 2, 3])
    if warm:
        module(features, labels)
    if rank == 1:
        labels = {"label": torch.tensor([0, 1, 9, 3]), "label count": labels[:3]}.get(kind, labels)
        features = {"width": torch.randn(4, 5), "not a tensor": "x", "dtype": features.double()}.get(kind, features)
    start = time.perf_counter()
    try:
        module(features, labels)
    except Exception as error:
        said = type(error), str(error), time.perf_counter() - start
        # The group still works, for all took part in everything.
        module(torch.randn(2, DIM), torch.tensor([4, 5]))
        return said
    return None, "", 0.0


def _mistakes(rank: int) -> dict[tuple[str, bool], tuple[type[Exception] | None, str, float]]:
    return {(kind, warm): _mistake(rank, kind, warm) for kind in MISTAKES for warm in (False, True)}


def test_a_mistake_on_one_rank_is_an_error_on_all() -> None:
    found = world.run(_mistakes, 3)
    for rank, errors in enumerate(found):
        for (kind, warm), (raised, text, seconds) in errors.items():
            own, facts = MISTAKES[kind]
            expected = own if rank == 1 else DistributedError
            assert (raised, seconds < 5) == (expected, True), (rank, kind, warm, raised, text)
            who = ("1", "3") if rank != 1 and own is not DistributedError else ()  # rank 1 of 3
            assert not missing(text, *facts, *who), (rank, kind, warm, text)


def _bad_query(rank: int) -> list[str]:
    """In every other call rank 1 is wrong."""
    head, said = parallelize(ltloss.ArcFaceLoss(9, DIM), class_mesh()), []
    good: Any = torch.randn(4, DIM), 2
    for warm in (False, True):
        for bad in ((None, 2), ([1.0], 2), (good[0][0], 2), (good[0], "a"), (good[0], 0), (good[0], 10)):
            if not warm:
                head.rearrange(head.layout)  # type: ignore[attr-defined]
            with pytest.raises((TypeError, ValueError, DistributedError)) as caught:
                head.predict(*(bad if rank == 1 else good))
            said.append(f"{caught.type.__name__}: {caught.value}")
            assert head.predict(*good).index.shape == (4, 2)
    return said


def test_a_bad_query_on_one_rank_is_an_error_on_all() -> None:
    for first, second in zip(*world.run(_bad_query, 2), strict=True):
        assert second.startswith(("TypeError", "ValueError")), second
        assert not missing(first, "DistributedError", second), first


def _mistake_with_capacity(rank: int) -> list[str]:
    """In the second step rank 1 is wrong; the third works."""
    said = []
    for features, labels in ((4, [0, 1, 9, 3]), (5, [0, 1, 2, 3, 4])):  # no class, and a row too many
        module = parallelize(ltloss.ArcFaceLoss(9, DIM), class_mesh(), capacity=4)
        good = torch.randn(4, DIM), torch.tensor([0, 1, 2, 3])
        module(*good)
        with pytest.raises((IndexError, ValueError, DistributedError)) as caught:
            module(*((torch.randn(features, DIM), torch.tensor(labels)) if rank == 1 else good))
        module(*good)
        said.append(f"{caught.type.__name__}: {caught.value}")
    return said


def test_with_a_capacity_too_it_is_an_error_on_all() -> None:
    first, second = world.run(_mistake_with_capacity, 2)
    for text, error, facts in zip(second, ("IndexError", "ValueError"), ("[0, 9)", "capacity=4"), strict=True):
        assert not missing(text, error, facts), text
    for text, own in zip(first, second, strict=True):
        assert not missing(text, "DistributedError", own), text


def _other_modules(rank: int) -> None:
    dtype, device = (torch.float32, torch.bfloat16)[rank], ("cpu", "meta")[rank]
    frozen = ltloss.ArcFaceLoss(9, DIM).requires_grad_(rank == 0)
    for make, given in (
        (lambda: parallelize(ltloss.ArcFaceLoss(9 + rank, DIM), class_mesh()), 9 + rank),
        (lambda: parallelize(ltloss.ArcFaceLoss(9, DIM, scale=30.0 + rank), class_mesh()), f"scale={30 + rank}"),
        (lambda: parallelize(ltloss.ArcFaceLoss(9, DIM), class_mesh(), capacity=4 + rank), 4 + rank),
        (lambda: parallelize(ltloss.ArcFaceLoss(9, DIM), class_mesh(), averaged_backbone=bool(rank)), rank),
        (lambda: parallelize(ltloss.ArcFaceLoss(9, DIM, dtype=dtype), class_mesh()), dtype),
        (lambda: parallelize(ltloss.ArcFaceLoss(9, DIM, device=device), class_mesh()), f"is_meta={rank == 1}"),
        (lambda: parallelize(frozen, class_mesh()), f"requires_grad={rank == 0}"),
        (lambda: parallelize(ltloss.ArcFaceLoss(9, DIM), class_mesh()).predict(torch.randn(2, DIM), k=1 + rank), "k"),
    ):
        with refused(str(given), error=DistributedError):
            make()


def test_modules_that_differ_between_ranks() -> None:
    world.run(_other_modules, 2)


def _other_order(rank: int) -> None:
    for order, names in (([[0, 2], [1, 3]], ("data", "class")), ([1, 0, 2, 3], ("class",))):
        with refused("mesh", str(order).replace(" ", "")):
            parallelize(ltloss.ArcFaceLoss(9, DIM), DeviceMesh("cpu", order, mesh_dim_names=names))
    parallelize(ltloss.ArcFaceLoss(9, DIM), DeviceMesh("cpu", [[0, 1], [2, 3]]))


def test_a_mesh_in_another_order_is_refused() -> None:
    world.run(_other_order, 4)


def _bound(rank: int) -> None:
    """Of such a group NCCL splits every other, which all ranks must do; here the mesh alone says that it is of GPUs."""
    mesh = DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("data", "class"))
    if rank < 2:
        dist.group.WORLD.bound_device_id = torch.device("cuda", rank)  # type: ignore[union-attr]
        mesh._device_type = "cuda"
        with refused("device_id", "[0, 1]", "3"):
            Layout(mesh, 9, torch.device("cpu"))
        dist.group.WORLD.bound_device_id = None  # type: ignore[union-attr]
        Layout(mesh, 9, torch.device("cpu"))


def test_a_part_of_a_world_that_is_bound_to_devices_is_refused() -> None:
    world.run(_bound, 3)


def test_a_mesh_before_the_group_is_an_error_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("init_process_group", error=DistributedError):
        class_mesh()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert class_mesh() is None


@pytest.mark.parametrize(
    ("backend", "config", "kind"),
    [
        (None, "cuda:nccl", "cuda"),  # of a machine with GPUs
        ("cpu:gloo,cuda:nccl", "cpu:gloo,cuda:nccl", "cuda"),
        ("gloo", "cpu:gloo,cuda:gloo", "cpu"),
        (None, "cpu:gloo", "cpu"),
    ],
)
def test_a_mesh_is_where_the_group_sends(backend: str | None, config: str, kind: str, monkeypatch: Any) -> None:
    meshes: list[Any] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: backend or "undefined")
    monkeypatch.setattr(dist, "get_backend_config", lambda: config)
    monkeypatch.setattr(torch.distributed.device_mesh, "init_device_mesh", lambda kind, *_, **__: meshes.append(kind))
    class_mesh()
    assert meshes == [kind]


def test_bad_arguments() -> None:
    with refused("module", "Linear", error=TypeError):
        parallelize(torch.nn.Linear(2, 2), None)  # type: ignore[type-var]
    for rate in (0.0, 1.5):
        with refused("sample_rate", str(rate)):
            parallelize(ltloss.ArcFaceLoss(4, 2), None, sample_rate=rate)
    with refused("capacity", "None", "1", "0"):
        parallelize(ltloss.ArcFaceLoss(4, 2), None, capacity=0)
    with refused("label_smoothing=0", "0.1"):
        parallelize(ltloss.ArcFaceLoss(4, 2, label_smoothing=0.1), None, sample_rate=0.5)
    module = ltloss.ArcFaceLoss(4, 2)
    assert parallelize(module, None) is module
    assert not dist.is_initialized()


def _lost(rank: int) -> str:
    module = parallelize(ltloss.ArcFaceLoss(9, DIM), class_mesh())
    for step in range(50):
        if rank == 1 and step == 3:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)
        loss = module(torch.randn(4, DIM, requires_grad=True), torch.tensor([0, 1, 2, 3]))
        torch.autograd.backward(loss)
    return "done"


def test_a_rank_that_dies_ends_the_others_within_the_timeout() -> None:
    start = time.perf_counter()
    results = world.finish(world.start(_lost, 3, timeout=20.0), patience=40.0)
    assert time.perf_counter() - start < 40.0
    assert isinstance(results[1], world.Lost)
    for rank in (0, 2):
        assert isinstance(results[rank], DistributedError), results[rank]
