"""`ltloss plan`: what it counts, what it advises, and how it answers mistakes."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import world
from helpers.cli_errors import fails
from helpers.refusals import refused, warned
from ltloss_kernels.config import tile_table

import ltloss
from ltloss.cli.command import main
from ltloss.cli.values import count
from ltloss.distributed import SampledAdamW, class_mesh, parallelize
from ltloss.optim import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD
from ltloss.tools.plan import DEVICES, Device, HeadConfig, make_plan
from ltloss.training.model.registry import LOSSES, build_loss

H200 = DEVICES["h200"]
LARGE = HeadConfig(classes=100_000_000, embedding_size=512, batch=8192, gpus=64)


def test_counts_of_a_plan_by_hand() -> None:
    plan = make_plan(LARGE, H200)
    assert plan.memory["prototypes (float32)"] == 3_200_000_000  # 1 562 500 classes of 2 KiB
    assert plan.wire["all-gather of features and labels"] == 8_322_048  # 8064 rows of others, 1032 bytes each
    assert plan.wire["reduce-scatter of the features' gradient"] == 8_257_536
    assert plan.wire["all-gather of two N-vectors"] == 4_128_768
    assert plan.seconds["forward pass"] == pytest.approx(0.02074, rel=1e-3)  # 13.1 TFLOP at 632 TFLOP/s
    assert plan.fits
    assert not plan.advice


def test_kept_exponentials_by_hand() -> None:
    usual, found = (make_plan(replace(LARGE, keep_exponentials=keep), H200) for keep in (False, True))
    kept = 2 * 8192 * 1_562_500 + 4 * 8192 * 12_208  # of class tiles: 1 562 500 / 128, rounded up
    assert found.memory["kept exponentials"] == kept
    assert usual.memory["kept exponentials"] == 0
    assert "kept" not in usual.to_text()
    products = 4 * 8192 * 1_562_500 * 512 / (790e12 * 0.75)
    assert found.seconds["backward pass"] == pytest.approx(products + 2 * kept / 4.3e12)
    assert usual.seconds["backward pass"] == pytest.approx(1.5 * products)
    assert found.seconds["forward pass"] == usual.seconds["forward pass"]


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_kept_exponentials_of_a_rank_are_those_that_the_kernels_take(rate: float) -> None:
    kernels = pytest.importorskip("ltloss_kernels", exc_type=ImportError)
    p = replace(LARGE, classes=3_200, batch=1000, gpus=4, data=2, sample_rate=rate, keep_exponentials=True)
    assert p.used_classes % 8 == 0  # rows are filled up to so many
    sizes = (500, 512), (p.used_classes, 512)
    features, prototypes = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes)
    with mock.patch.object(tile_table, "forward_tile", return_value=tile_table.Tile(128, 128, 64, 4, 3)):
        taken = sum(tensor.nbytes for tensor in kernels.new_exponentials(features, prototypes))
        assert taken <= kernels.exponentials_bytes(features, prototypes)
    assert make_plan(p, H200).memory["kept exponentials"] == taken


def test_what_does_not_fit_may_without_kept_exponentials(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--classes", "10M", "--embedding-size", "64", "--batch", "8192", "--gpus", "1"]
    assert main(arguments) == 0
    capsys.readouterr()
    main([*arguments, "--keep-exponentials"])
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown
    assert "without --keep-exponentials it would fit" in shown


OPTIMIZERS: dict[tuple[str, bool], Any] = {
    ("sgd", False): lambda m, _: torch.optim.SGD([m.weight], lr=0.1, momentum=0.9),
    ("adamw", False): lambda m, _: SampledAdamW(m) if hasattr(m, "sampler") else torch.optim.AdamW([m.weight]),
    ("sgd", True): lambda m, options: PrototypeSGD(m, lr=0.1, momentum=0.9, **options),
    ("adamw", True): lambda m, options: PrototypeAdamW(m, **options),
    ("adagrad", True): lambda m, options: PrototypeAdagrad(m, **options),
}


def _bytes_of_a_step(rank: int, p: HeadConfig) -> dict[str, int]:
    """What the tensors of a rank take after a step, by kind."""
    dtype = getattr(torch, p.prototype_dtype)
    module: Any = build_loss(
        p.loss, [3] * p.classes, p.embedding_size, {"min_angle_weight": 0.0} if p.loss == "long-tail" else {}
    )
    if dtype != torch.float32:
        module = ltloss.ArcFaceLoss(p.classes, p.embedding_size, dtype=dtype)
    module = parallelize(module, class_mesh() if p.gpus > 1 else None, sample_rate=p.sample_rate)
    options: dict[str, Any] = {"state_dtype": getattr(torch, p.state_dtype)}
    if p.prototype_dtype != "float32":
        options["rounding"] = "stochastic"
    optimizer = OPTIMIZERS[p.optimizer, p.fused_update](module, options)
    module(
        torch.randn(p.batch // p.gpus, p.embedding_size), torch.zeros(p.batch // p.gpus, dtype=torch.int64)
    ).backward()
    optimizer.step()
    exponent = module.weight_exponent
    parts: dict[str, list[Any]] = {
        "prototypes": [module.weight, *([] if exponent is None else [exponent])],
        "gradient": [parameter.grad for parameter in module.parameters() if parameter.grad is not None],
        "state": [t for t in optimizer.state[module.weight].values() if t.dim()],  # without the count of steps
        "buffers": [buffer for buffer in module.buffers() if buffer is not exponent],
    }
    own = {name: [t.to_local() if hasattr(t, "to_local") else t for t in tensors] for name, tensors in parts.items()}
    return {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in own.items()}


def _planned(p: HeadConfig) -> dict[str, float]:
    memory = make_plan(p, H200).memory
    return {
        "prototypes": memory[f"prototypes ({p.prototype_dtype})"],
        "gradient": memory["their gradient"],
        "state": memory[f"state of {p.optimizer}"],
        "buffers": memory["constants of the loss"] + memory["centres of the classes"],
    }


SMALL = HeadConfig(classes=60, embedding_size=8, batch=4, gpus=1, dtype="float32")


@pytest.mark.parametrize(("loss", "rate"), [*((name, 1.0) for name in LOSSES if name != "softmax"), ("long-tail", 0.5)])
def test_memory_is_that_of_the_module(loss: str, rate: float) -> None:
    p = replace(SMALL, loss=loss, sample_rate=rate)
    assert _planned(p) == _bytes_of_a_step(0, p)


STEPS = [
    *({"optimizer": name, "fused_update": fused} for name, fused in OPTIMIZERS),
    *({"optimizer": name, "fused_update": True, "state_dtype": "bfloat16"} for name in ("sgd", "adamw", "adagrad")),
    {"fused_update": True, "prototype_dtype": "bfloat16", "state_dtype": "bfloat16"},
    {"optimizer": "adagrad", "fused_update": True, "prototype_dtype": "bfloat16"},
    {"fused_update": True, "prototype_dtype": "float8_e4m3fn", "state_dtype": "bfloat16"},
]


@pytest.mark.parametrize("changes", STEPS, ids=lambda changes: " ".join(map(str, changes.values())))
def test_memory_and_traffic_of_the_step_are_those_of_its_tensors(changes: dict[str, Any]) -> None:
    p = replace(SMALL, loss="arcface", **changes)
    found = _bytes_of_a_step(0, p)
    assert _planned(p) == found
    touched = 2 * (found["prototypes"] + found["state"]) + found["gradient"]  # read and written; read
    assert make_plan(p, H200).seconds["optimizer"] * H200.copy == pytest.approx(touched)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(("loss", "terms"), [("long-tail", 1), ("long-tail-prior", 0), ("arcface", 0)])
def test_the_minimum_angle_of_a_fused_update_counts(loss: str, terms: int, dtype: str) -> None:
    """What the term makes of the prototypes' size: the gradient that joins, and a wide copy of float8 prototypes."""
    p = replace(SMALL, loss=loss, fused_update=True, prototype_dtype=dtype)
    module: Any = build_loss(loss, [3] * p.classes, p.embedding_size, {}, dtype)
    optimizer = PrototypeSGD(module, rounding=None if dtype == "float32" else "stochastic")
    made = []
    with (
        mock.patch.object(optimizer, "joined", lambda loss, of=optimizer.joined: made.append(of(loss)) or made[-1]),
        mock.patch.object(optimizer, "join", lambda gradient, of=optimizer.join: made.append(gradient) or of(gradient)),
    ):
        module(torch.randn(p.batch, p.embedding_size), torch.zeros(p.batch, dtype=torch.int64)).backward()
    assert len(made) == 2 * terms
    held = module.weight.untyped_storage().data_ptr()
    own = [tensor for tensor in made if tensor.untyped_storage().data_ptr() != held]
    assert len(own) == terms * (2 if dtype == "float8_e4m3fn" else 1)
    found = make_plan(p, H200).memory["minimum-angle term of the update"]
    assert found == sum(tensor.numel() * tensor.element_size() for tensor in own)


def test_ranks_and_samples_have_no_minimum_angle() -> None:
    """Which a fused update refuses there."""
    for changes in ({"gpus": 2}, {"sample_rate": 0.5}):
        p = replace(SMALL, loss="long-tail", fused_update=True, **changes)  # type: ignore[arg-type]
        assert not make_plan(p, H200).memory["minimum-angle term of the update"]


@pytest.mark.parametrize("fused", [False, True])
def test_the_state_of_sampled_classes_counts_their_draws(fused: bool) -> None:
    p = replace(SMALL, loss="arcface", optimizer="adamw", fused_update=fused, sample_rate=0.5)
    assert _planned(p) == _bytes_of_a_step(0, p)


@pytest.mark.parametrize(
    "p",
    [
        replace(SMALL, gpus=2, loss="long-tail"),
        replace(SMALL, gpus=2, loss="cosine-space"),
        replace(SMALL, gpus=2, loss="long-tail", fused_update=True, optimizer="adamw", state_dtype="bfloat16"),
    ],
)
def test_memory_is_that_of_the_module_on_each_rank(p: HeadConfig) -> None:
    assert world.run(_bytes_of_a_step, 2, p) == [_planned(p)] * 2


def test_a_fused_update_saves_the_gradient_and_its_traffic() -> None:
    p = replace(LARGE, data=2)
    ordinary, fused = make_plan(p, H200), make_plan(replace(p, fused_update=True), H200)
    assert sum(ordinary.memory.values()) - sum(fused.memory.values()) == 4 * 3_125_000 * 512
    assert fused.seconds["optimizer"] == pytest.approx(0.8 * ordinary.seconds["optimizer"])
    assert fused.wire == ordinary.wire
    assert fused.seconds["messages"] > ordinary.seconds["messages"]  # the groups add a slab at a time


def test_a_single_device_sends_nothing() -> None:
    plan = make_plan(replace(LARGE, classes=1_000_000, gpus=1), H200)
    assert sum(plan.wire.values()) == 0
    assert plan.seconds["messages"] == 0


def test_more_devices_take_less_each() -> None:
    sizes = [make_plan(replace(LARGE, gpus=n), H200) for n in (8, 16, 32, 64)]
    for name in ("prototypes (float32)", "their gradient"):
        assert [plan.memory[name] for plan in sizes] == sorted((plan.memory[name] for plan in sizes), reverse=True)
    times = [plan.seconds["backward pass"] for plan in sizes]
    assert times == sorted(times, reverse=True)


def test_data_groups_repeat_the_classes_and_reduce_their_gradient() -> None:
    one, two = (make_plan(replace(LARGE, data=data), H200) for data in (1, 2))
    assert two.memory["prototypes (float32)"] == 2 * one.memory["prototypes (float32)"]
    assert one.wire["all-reduce of the prototypes' gradient"] == 0
    assert two.wire["all-reduce of the prototypes' gradient"] == 4 * 3_125_000 * 512
    assert two.seconds["forward pass"] == pytest.approx(one.seconds["forward pass"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": 2}, "--gpus 8 would fit"),
        ({"gpus": 4, "optimizer": "adamw", "classes": 80_000_000}, "--optimizer sgd would fit"),
        ({"gpus": 8, "data": 8, "classes": 30_000_000}, "--data-groups 1 would fit"),
        ({"gpus": 1, "classes": 10**14}, "no single change is enough"),
        ({"gpus": 4}, "--fused-update would fit"),
        ({"gpus": 4, "classes": 150_000_000, "fused_update": True}, "--optimizer adagrad would fit"),
        ({"gpus": 4, "classes": 150_000_000, "fused_update": True}, "--state-dtype bfloat16 would fit"),
        ({"gpus": 4, "classes": 150_000_000, "fused_update": True}, "--prototype-dtype bfloat16 would fit"),
        ({"gpus": 4, "classes": 165_000_000, "fused_update": True}, "--prototype-dtype float8_e4m3fn would fit"),
    ],
)
def test_advice_names_what_would_fit(changes: dict[str, object], words: str) -> None:
    plan = make_plan(replace(LARGE, **changes), H200)  # type: ignore[arg-type]
    assert not plan.fits
    assert any(words in advice for advice in plan.advice), plan.advice
    assert "DOES NOT FIT" in plan.to_text()


def test_ranks_on_shared_cores_take_turns() -> None:
    device = Device("core", 1e12, 1e9, 1e9, 1e9, 1e9, 2, 0.0, 1.0, 1.0, together=2)
    alone, both, four = (make_plan(HeadConfig(1000, 8, 16, n), device).seconds["forward pass"] for n in (1, 2, 4))
    assert both == pytest.approx(alone / 2)
    assert four == pytest.approx(alone / 2)
    crowded = make_plan(HeadConfig(1000, 8, 16, 2), replace(device, shared=0.5)).seconds["forward pass"]
    assert crowded == pytest.approx(alone)


@pytest.mark.parametrize(
    ("text", "n"),
    [("8192", 8192), ("100k", 100_000), ("1.5M", 1_500_000), ("2B", 2 * 10**9), ("1.005k", 1005), ("1e3k", 10**6)],
)
def test_counts_with_a_letter(text: str, n: int) -> None:
    assert count(text) == n


@pytest.mark.parametrize("text", ["", "k", "nan", "snan", "infk", "1e999", "1e999999999M", "1/2", "0.5"])
def test_what_is_no_count(text: str) -> None:
    with refused(repr(text), "1.5M", error=ArgumentTypeError):
        count(text)


def test_rates_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rates.json"
    file.write_text(json.dumps(asdict(replace(H200, name="mine", product=1e12))))
    assert (
        main(
            [
                *["plan", "--classes", "1M", "--embedding-size", "64", "--batch", "256", "--gpus", "4", "--device"],
                str(file),
            ]
        )
        == 0
    )
    assert "4 x mine" in capsys.readouterr().out


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "--classes", "100M", "--embedding-size", "512", "--batch", "8192", "--gpus", "64"]
    assert main(line) == 0
    text = capsys.readouterr().out
    assert "1,562,500 classes a device" in text
    assert "not measured" in text  # what the rates of the kernels are
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is True
    assert main([*line[:-1], "1"]) == 1
    capsys.readouterr()
    narrow = ["--optimizer", "adagrad", "--prototype-dtype", "bfloat16", "--state-dtype", "bfloat16"]
    assert main([*line, "--fused-update", *narrow, "--json"]) == 0
    problem = json.loads(capsys.readouterr().out)["problem"]
    assert (problem["fused_update"], problem["prototype_dtype"], problem["state_dtype"]) == (True, *["bfloat16"] * 2)


def test_the_name_of_version_0_1_warns(capsys: pytest.CaptureFixture[str]) -> None:
    with warned("--dim", "--embedding-size") as found:
        assert main(["plan", "--classes", "1M", "--dim", "64", "--batch", "256", "--gpus", "4"]) == 0
    assert found[0].filename == __file__  # Python shows it where its caller is __main__, not argparse
    assert "1,000,000 classes x 64" in capsys.readouterr().out


def test_data_groups_by_their_former_name(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "--classes", "1M", "--embedding-size", "64", "--batch", "256", "--gpus", "4"]
    assert main([*line, "--data-groups", "2"]) == 0
    expected = capsys.readouterr().out
    assert "as 2 x 2" in expected
    with warned("--data", "--data-groups"):
        assert main([*line, "--data", "2"]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("changed", "facts"),
    [
        (["--classes", "many"], ("--classes", "'many'")),
        (["--embedding-size", "1.5"], ("--embedding-size", "'1.5'")),
        (["--batch", "inf"], ("--batch", "'inf'")),
        (["--batch", ""], ("--batch", "''")),
        (["--classes", "-5"], ("classes", "1", "-5")),
        (["--gpus", "0"], ("gpus", "1", "0")),
        (["--data-groups", "3"], ("--data-groups", "data=3", "gpus=4")),
        (["--device", "h2000"], ("device", "h200", "'h2000'")),
        (["--device", "nowhere.json"], ("nowhere.json",)),
        (["--dtype", "int8"], ("--dtype", "int8")),
        (["--loss", "softmax"], ("--loss", "softmax", "cosface")),
        (["--optimizer", "adagrad"], ("optimizer", "adagrad", "fused_update")),
        (["--state-dtype", "bfloat16"], ("state_dtype", "bfloat16", "fused_update")),
        (["--prototype-dtype", "float8"], ("prototype_dtype", "float8_e4m3fn", "'float8'")),
        (["--state-dtype", "float8_e4m3fn"], ("state_dtype", "float32", "'float8_e4m3fn'")),
        (["--sample-rate", "0"], ("sample_rate", "(0, 1]", "0.0")),
    ],
)
def test_mistakes_end_in_one_line(
    changed: list[str], facts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["plan", "--classes", "1M", "--embedding-size", "64", "--batch", "256", "--gpus", "4"]
    fails([*line, *changed], capsys, *facts)


@pytest.mark.parametrize(
    "wrong", [{"optimizer": "lion"}, {"optimizer": "lion", "fused_update": True}, {"dtype": "int8"}]
)
def test_a_name_that_is_unknown(wrong: dict[str, Any]) -> None:
    (name, value), *_ = wrong.items()
    with refused(name, value, "one of"):
        HeadConfig(classes=100, embedding_size=8, batch=4, gpus=1, **wrong)
