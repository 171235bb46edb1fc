"""``ltloss export``: what the file answers is what ``ltloss predict`` writes."""

from __future__ import annotations

import csv
import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli_errors import contents, fails
from helpers.small_run import make_run
from helpers.toys import CLASS_NAMES

from ltloss.cli.command import main
from ltloss.training.data.sources import load_images
from ltloss.training.model.classifier import Classifier
from ltloss.training.run.run_config import RunConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_empty_folder")]

OUTPUTS = ["embeddings", "logits", "index", "cosine", "probability"]
BATCHES = (1, 7)


def predicted(run: Path, images: Path) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Pixels (N, 1, 8, 8), and the rows that ``ltloss predict`` writes of them."""
    assert main(["predict", str(run), "--images", str(images), "--out", "out", "--device", "cpu"]) == 0
    source = load_images(images, RunConfig.read(run).image_shape)
    rows = list(csv.DictReader(Path("out/predictions.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == list(source.names)
    return source.batch(np.arange(len(source))).numpy(), rows


def agree(found: dict[str, Any], rows: list[dict[str, str]], class_names: Sequence[str]) -> None:
    """Classes, probabilities and angles of a batch are those of the table."""
    for rank, (name, probability) in enumerate([("class", "probability"), ("runner_up", "runner_up_probability")]):
        assert [class_names[index] for index in found["index"][:, rank]] == [row[name] for row in rows]
        wanted = [float(row[probability]) for row in rows]
        np.testing.assert_allclose(found["probability"][:, rank], wanted, rtol=1e-4, atol=1e-6)
    angles = np.rad2deg(np.arccos(found["cosine"][:, 0].astype(float)))
    np.testing.assert_allclose(angles, [float(row["angle_degrees"]) for row in rows], atol=2e-2)
    np.testing.assert_array_equal(found["logits"].argmax(1), found["index"][:, 0])


def test_both_formats_answer_as_predict(run: Path, toy_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runtime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    pixels, rows = predicted(run, toy_folder)
    capfd.readouterr()
    assert main(["export", str(run), "--to", "onnx", "--top", "2"]) == 0
    assert main(["export", str(run), "--to", "torch", "--out", "served.pt2"]) == 0
    assert capfd.readouterr() == (f"wrote {run / 'model.onnx'}\nwrote served.pt2\n", "")

    session = runtime.InferenceSession(str(run / "model.onnx"), providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    assert (taken.name, taken.shape, taken.type) == ("images", ["N", 1, 8, 8], "tensor(uint8)")
    facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    extra = {"metadata.json": ""}
    program = torch.export.load("served.pt2", extra_files=extra)
    assert json.loads(extra["metadata.json"]) == facts
    assert facts["class_names"] == list(CLASS_NAMES)
    assert facts["image_shape"] == [1, 8, 8]
    assert [item.name for item in session.get_outputs()] == OUTPUTS
    for samples in BATCHES:
        batch = pixels[:samples]
        agree(dict(zip(OUTPUTS, session.run(OUTPUTS, {"images": batch}), strict=True)), rows[:samples], CLASS_NAMES)
        found = program.module()(torch.from_numpy(batch))
        assert list(found) == OUTPUTS
        agree({name: tensor.numpy() for name, tensor in found.items()}, rows[:samples], CLASS_NAMES)


def test_embeddings_go_in(run: Path, toy_folder: Path) -> None:
    pixels, rows = predicted(run, toy_folder)
    assert main(["export", str(run), "--to", "torch", "--input", "embeddings"]) == 0
    program = torch.export.load(run / "model.pt2").module()
    with torch.no_grad():
        embeddings = Classifier.load(run, "cpu").features(torch.from_numpy(pixels))
    for samples in BATCHES:
        found = program(embeddings[:samples])
        assert list(found) == OUTPUTS[1:]
        agree({name: tensor.numpy() for name, tensor in found.items()}, rows[:samples], CLASS_NAMES)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "softmax"},
        {"loss": "arcface", "loss_options": {"sub_centers": 3}},
        {"fused_update": True, "prototype_dtype": "float8_e4m3fn"},
    ],
    ids=str,
)
def test_heads_that_are_kept_otherwise_answer_as_the_classifier(settings: dict[str, Any]) -> None:
    classifier = make_run(Path("run"), "abcde", **settings)
    assert main(["export", "run", "--to", "torch", "--top", "3"]) == 0
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        logits, wanted = classifier(images), classifier.loss.predict(classifier.features(images), 3)
    found = torch.export.load("run/model.pt2").module()(images)
    torch.testing.assert_close(found["logits"], logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(found["index"], wanted.index)
    torch.testing.assert_close(found["cosine"], wanted.cosine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["nowhere", "--to", "torch"], ("nowhere",)),
        (["run"], ("--to",)),
        (["run", "--to", "tflite"], ("--to", "'tflite'")),
        (["run", "--to", "torch", "--input", "pixels"], ("--input", "'pixels'")),
        (["run", "--to", "torch", "--top", "0"], ("--top", "1", "0")),
        (["run", "--to", "torch", "--out", "a.onnx"], ("--out", "a.onnx", ".pt2")),
        (["run", "--to", "torch", "--out", "there.pt2"], ("--out", "there.pt2", "--overwrite")),
        (["run", "--to", "torch", "--out", "folder.pt2"], ("--out", "folder.pt2")),
        (["run", "--to", "torch", "--out", "no/a.pt2"], ("--out", "no/a.pt2", "no")),
        (["run", "--to", "torch", "--out", ""], ("--out",)),
    ],
    ids=" ".join,
)
def test_mistakes_leave_everything_as_it_was(
    arguments: list[str], facts: tuple[str, ...], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there.pt2").write_text("mine")
    Path("folder.pt2").mkdir()
    before = contents(Path())
    fails(["export", *arguments], capsys, *facts)
    assert contents(Path()) == before


def test_missing_onnx_is_named_with_its_extra(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    monkeypatch.setitem(sys.modules, "onnx", None)
    fails(["export", str(run), "--to", "onnx"], capsys, "onnx", "ltloss[export]")
    assert contents(run) == before


def test_what_breaks_off_leaves_the_former_file(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    line = ["export", str(run), "--to", "torch", "--out", "a.pt2", "--overwrite"]
    Path("a.pt2").write_bytes(b"former")
    before = contents(Path())
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        fails(line, capsys, "a.pt2")
    assert contents(Path()) == before
    assert main(line) == 0
    assert torch.export.load("a.pt2").module()(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))["index"].shape == (2, 3)
