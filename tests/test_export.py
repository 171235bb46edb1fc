"""Exported heads answer as the heads do, and need nothing of this package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.refusals import refused
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.passes import move_to_device_pass

import ltloss
from ltloss import export
from ltloss.errors import UserError
from ltloss.export import METADATA, InferenceHead, export_head, export_module

C, D, K = 7, 5, 3
BATCHES = (1, 6)


class OwnLogits(ltloss.PrototypeHead):
    """A head with logits of its own: the scale rises with the class."""

    def logits(self, features: Tensor) -> Tensor:
        return super().logits(features) * torch.arange(1.0, self.num_classes + 1)


class SquaredLogits(ltloss.PrototypeHead):
    """A head with logits of its own, on any device."""

    def logits(self, features: Tensor) -> Tensor:
        return super().logits(features).square()


def heads() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "arcface": ltloss.ArcFaceLoss(C, D),
        "features keep their length": ltloss.CombinedMarginLoss(C, D, normalize_features=False, scale=2.0),
        "own logits": OwnLogits(C, D, scale=3.0),
        "sub-centres": ltloss.ArcFaceLoss(C, D, sub_centers=3),
        "bfloat16": ltloss.CosFaceLoss(C, D, dtype=torch.bfloat16),
        "float8": ltloss.CosineSpaceLoss(C, D, dtype=torch.float8_e4m3fn),
    }


def dense(head: Any, features: Tensor) -> dict[str, Tensor]:
    """The outputs, written out in float64."""
    features, weight = features.double(), head.weight.detach().float().double()
    rows = weight.flatten(0, -2)
    cosine = features @ rows.T / features.norm(dim=1)[:, None] / rows.norm(dim=1)
    cosine = cosine.view(-1, C, len(rows) // C).amax(2)
    logits = head.scale * cosine
    if not head.normalize_features:
        logits = logits * features.norm(dim=1)[:, None]
    if isinstance(head, OwnLogits):
        logits = logits * torch.arange(1, C + 1)
    index = logits.argsort(dim=1, descending=True)[:, :K]
    return {
        "logits": logits,
        "index": index,
        "cosine": cosine.gather(1, index),
        "probability": logits.softmax(1).gather(1, index),
    }


def agree(found: dict[str, Any], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(torch.as_tensor(found[name]).to(tensor.dtype), tensor, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", list(heads()))
def test_a_program_of_torch_export_answers_as_the_head(name: str, tmp_path: Path) -> None:
    head: Any = heads()[name]
    export_head(head, tmp_path / "head.pt2", to="torch", k=K, metadata={"class_names": ["né", "猫"]})
    extra = {METADATA: ""}
    program = torch.export.load(tmp_path / "head.pt2", extra_files=extra)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {call.namespace for call in calls if isinstance(call, torch._ops.OpOverload)} == {"aten"}
    for samples in BATCHES:
        features = torch.randn(samples, D)
        found = program.module()(features)
        agree(found, dense(head, features))
        torch.testing.assert_close(found["logits"], head.logits(features).detach(), rtol=0, atol=1e-5)
        if name != "own logits":
            assert torch.equal(found["index"], head.predict(features, K).index)
    facts = json.loads(extra[METADATA])
    assert facts["class_names"] == ["né", "猫"]
    assert facts["loss"] == type(head).__name__
    assert facts["scale"] == head.described()["scale"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["features keep their length", "own logits", "sub-centres"])
def test_onnxruntime_answers_as_the_head(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runtime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    head, path = heads()[name], tmp_path / "head.onnx"
    export_head(head, path, k=K, metadata={"class_names": ["né", "猫"]})
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == ["head.onnx"]
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(item.name, item.shape, item.type) for item in session.get_inputs()] == [
        ("embeddings", ["N", D], "tensor(float)")
    ]
    for samples in BATCHES:
        features = torch.randn(samples, D)
        names = [item.name for item in session.get_outputs()]
        found = session.run(names, {"embeddings": features.numpy()})
        agree(dict(zip(names, found, strict=True)), dense(head, features))
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == ["né", "猫"]


@pytest.mark.parametrize("call", ["logits", "predict"])
def test_a_module_that_calls_a_head_can_be_exported(call: str) -> None:
    """As part of a program that runs where this package is."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = ltloss.ArcFaceLoss(C, D)

        def forward(self, features: Tensor) -> Tensor:
            return self.loss.logits(features) if call == "logits" else self.loss.predict(features, K).index

    network, features = Network(), torch.randn(6, D)
    program = torch.export.export(network, (features[:2],), dynamic_shapes=({0: torch.export.Dim("N")},))
    assert torch.equal(program.module()(features), network(features))


def test_the_prototypes_are_those_of_the_moment_of_export() -> None:
    loss = ltloss.ArcFaceLoss(C, D)
    frozen, features = InferenceHead(loss), torch.randn(4, D)
    before = frozen(features)["logits"]
    loss.reset_parameters()
    assert torch.equal(frozen(features)["logits"], before)


def test_a_network_keeps_its_mode(tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(D)
    network = nn.Sequential(nn.Linear(D, D), norm, InferenceHead(ltloss.ArcFaceLoss(C, D)))
    norm.eval()
    export_module(network, "inputs", torch.zeros(2, D), tmp_path / "network.pt2", to="torch", metadata={})
    assert (network.training, network[0].training, norm.training) == (True, True, False)
    inputs = torch.randn(3, D)
    found = torch.export.load(tmp_path / "network.pt2").module()(inputs)
    assert torch.equal(found["index"], network.eval()(inputs)["index"])


def test_a_head_on_a_gpu_becomes_a_program_for_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program names the device on which it was traced, and runs on no other."""
    programs = []

    def traced(program: torch.export.ExportedProgram, *_: Any) -> bytes:
        programs.append(program)
        return b""

    monkeypatch.setattr(export, "_pt2", traced)
    with FakeTensorMode(allow_non_fake_inputs=True):  # CUDA tensors without values, and without a GPU
        for head in (ltloss.ArcFaceLoss(C, D, device="cuda"), SquaredLogits(C, D, device="cuda")):
            export_head(head, tmp_path / "head.pt2", to="torch", k=K)
            assert head.weight.device.type == "cuda"
    for program in programs:
        assert "cuda" not in str(program)
        moved = move_to_device_pass(program, "meta").module()
        assert moved(torch.empty(4, D, device="meta"))["logits"].device.type == "meta"


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, path = ltloss.ArcFaceLoss(C, D), tmp_path / "head.onnx"
    with refused("k", "1", "7", "0"):
        InferenceHead(head, k=0)
    with refused("k", "7", "8"):
        export_head(head, path, k=8)
    with refused("to", "onnx", "torch", "'tflite'"):
        export_head(head, path, to="tflite")  # type: ignore[arg-type]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "onnxscript", None)
        patched.setitem(sys.modules, "onnx", type(sys)("onnx"))
        with refused("onnx", "onnxscript", "ltloss[export]", error=ImportError):
            export_head(head, path)
        patched.setitem(sys.modules, "onnxscript", type(sys)("onnxscript"))
        patched.setattr(export, "_LARGEST_ONNX", 100)
        with refused("140", "100", "torch", error=UserError):
            export_head(head, path)
    head.weight.device_mesh = "of many ranks"
    with refused("head", "ArcFaceLoss", "ltloss.distributed.in_one_piece"):
        InferenceHead(head)
    assert not list(tmp_path.iterdir())
