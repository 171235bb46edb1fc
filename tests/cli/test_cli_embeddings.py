"""The command line over embeddings: train, predict, export, report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cli_errors import contents, fails
from helpers.toys import CLASS_NAMES, toy_embeddings, write_embeddings

from ltloss.cli.command import main

pytestmark = pytest.mark.usefixtures("in_empty_folder")


@pytest.fixture(params=["linear", "mlp"])
def trained(request: pytest.FixtureRequest, in_empty_folder: None) -> str:
    data = str(write_embeddings(Path("own.npz")))
    line = ["train", "--data", data, "--loss", "cosine", "--head", request.param, "--epochs", "3", "--batch-size", "16"]
    assert main([*line, "--device", "cpu", "--out", "run", "--quiet"]) == 0
    return "run"


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def test_predictions_are_those_of_an_exported_file(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = toy_embeddings(5, seed=1)
    np.save("new.npy", x)
    assert main(["predict", trained, "--data", "new.npy", "--out", "out", "--device", "cpu", "--top", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"table: {Path('out/predictions.csv')}"
    assert set(contents(Path("out"))) == {"predictions.csv", "prediction.json"}
    assert json.loads(Path("out/prediction.json").read_text()) == {"run": "run", "data": "new.npy", "embeddings": 15}
    found = rows("out/predictions.csv")
    assert [row["embedding"] for row in found] == [f"new/{i:05d}" for i in range(15)]
    assert [row["class"] for row in found] == [CLASS_NAMES[c] for c in y]

    assert main(["export", trained, "--to", "torch", "--top", "2"]) == 0
    served = torch.export.load(f"{trained}/model.pt2").module()(torch.from_numpy(x))
    assert set(served) == {"logits", "index", "cosine", "probability"}
    assert [CLASS_NAMES[c] for c in served["index"][:, 1]] == [row["runner_up"] for row in found]
    stated = [float(row["probability"]) for row in found]
    np.testing.assert_allclose(served["probability"][:, 0], stated, rtol=1e-4, atol=1e-6)


def test_what_prediction_refuses(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("wide.npy", np.zeros((3, 7), np.float32))
    images = "images"
    Path(images).mkdir()
    out = ["--out", "out", "--device", "cpu"]
    fails(["predict", trained, "--data", "wide.npy", *out], capsys, "wide.npy", "7", "6")
    fails(["predict", trained, "--data", "own.npz", *out, "--sort-into", "s"], capsys, "--sort-into", "--data")
    fails(["predict", trained, "--data", "own.npz", *out, "--top", "0"], capsys, "--top", "0")
    fails(["predict", trained, "--data", "own.npz", "--images", images, *out], capsys, "--images", "--data")
    fails(["predict", trained, *out], capsys, "--images", "--data")
    fails(["predict", trained, "--images", images, *out], capsys, "--data", "6")
    fails(["export", trained, "--to", "torch", "--input", "images"], capsys, "--input", "6")
    assert not Path("out").exists()


def test_a_run_of_images_takes_no_embeddings(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_embeddings(Path("own.npz"))
    fails(["predict", str(run), "--data", "own.npz", "--out", "out"], capsys, "--images", "(1, 8, 8)")
    fails(["evaluate", str(run), "--data", "own.npz"], capsys, "own.npz", "6", "(1, 8, 8)")


def test_a_run_embeds_and_its_features_are_trained_on(run: Path, toy_folder: Path) -> None:
    assert main(["embed", "--run", str(run), "--images", str(toy_folder), "--out", "f.npz", "--device", "cpu"]) == 0
    line = ["--loss", "cosine", "--epochs", "1", "--device", "cpu", "--quiet", "--batch-size", "16"]
    assert main(["train", "--data", "f.npz", "--out", "second", *line]) == 0
    assert main(["embed", "--run", "second", "--data", "f.npz", "--out", "white.npz", "--device", "cpu"]) == 0
    assert np.load("white.npz")["x"].shape == np.load("f.npz")["x"].shape == (30, 8)


def test_what_embedding_refuses(run: Path, toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["embed", "--images", str(toy_folder), "--out", "f.npz"]
    fails(line, capsys, "--backbone", "--run")
    fails([*line, "--run", str(run), "--weights", "w.pt"], capsys, "--weights", "--backbone")
    fails([*line, "--run", str(run), "--image-size", "9"], capsys, "--image-size", "--backbone")
    fails([*line, "--run", str(run), "--image-root", "nowhere"], capsys, "--image-root nowhere", "--images")
    fails([*line, "--run", str(run), "--workers", "0"], capsys, "--workers", "0")
    fails(["embed", "--run", str(run), "--out", "f.npz"], capsys, "--images", "--data")
    fails(["embed", "--run", str(run), "--data", "digits", "--out", "f.txt"], capsys, "--out", ".npz")
    assert not Path("f.npz").exists()
