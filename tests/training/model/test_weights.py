"""Weights of other networks: where they are read from, and which of them are taken."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.refusals import missing, refused
from helpers.small_run import make_run
from torch import nn

from ltloss.errors import UserError
from ltloss.training.model.classifier import Classifier
from ltloss.training.model.weights import load_fitting, read_weights
from ltloss.training.run.trainer import TrainingResult, train


def test_three_kinds_of_files_are_read(tmp_path: Path) -> None:
    weights = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.pt")
    torch.save({"epoch": 3, "model": weights}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pt", "w.pth"):
        found = read_weights(tmp_path / name)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_a_run_gives_its_newest_checkpoint(toy_run: TrainingResult) -> None:
    wanted = Classifier.load(toy_run.run, "cpu").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in read_weights(toy_run.run).items())


class Trap:
    """Unpickling it would leave a file behind."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("sprung"),)  # type: ignore[return-value]


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("trap.pt").write_bytes(pickle.dumps(Trap(), protocol=2))
    for name in ("text.safetensors", "text.pt"):
        Path(name).write_text("no weights")
    torch.save([1, 2], "list.pt")
    torch.save({"lr": 0.1}, "numbers.pt")
    Path("folder").mkdir()
    for name in ("trap.pt", "text.safetensors", "text.pt", "list.pt", "numbers.pt", "folder", "absent.pt"):
        with refused(name, error=UserError):
            read_weights(Path(name))
    assert not Path("sprung").exists()


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.trunk."])
def test_names_of_the_backbone_alone_fit_too(prefix: str) -> None:
    network = nn.ModuleDict({"backbone": nn.ModuleDict({"trunk": nn.Linear(3, 2)}), "loss": nn.Linear(3, 2)})
    before = network["loss"].weight.clone()  # type: ignore[union-attr, operator]
    full = {"backbone.trunk.weight": torch.ones(2, 3), "backbone.trunk.bias": torch.ones(9), "loss.weight": before + 1}
    weights = {name.removeprefix(prefix): value for name, value in full.items()}
    taken, left = load_fitting(network, weights, Path("w"))
    assert (taken, left) == (["backbone.trunk.weight"], ["backbone.trunk.bias"])
    assert torch.equal(network.state_dict()["backbone.trunk.weight"], torch.ones(2, 3))
    assert torch.equal(network["loss"].weight, before)  # type: ignore[union-attr]
    with refused("w", "1", "2", "other", error=UserError):
        load_fitting(network, {"other": torch.ones(2)}, Path("w"))


def test_a_run_starts_with_the_backbone_of_another(
    toy_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = make_run(tmp_path / "other", ["a", "b"], shape=(1, 8, 8), embedding_size=8).state_dict()
    given = {"data": str(toy_npz), "embedding_size": 8, "device": "cpu", "epochs": 1, "init_from": "other", "lr": 1e-30}
    train(tmp_path / "run", given, quiet=True)
    (told,) = capsys.readouterr().err.splitlines()
    count = str(sum(not name.startswith("loss.") for name in other))
    assert not missing(told, count, count, str(tmp_path / "other"))
    found = Classifier.load(tmp_path / "run", "cpu").state_dict()
    weights = [name for name in found if name.startswith("backbone.") and name.endswith("weight")]
    assert all(torch.equal(found[name], other[name]) for name in weights)
    (tmp_path / "other" / "config.json").unlink()  # a resumed run needs it no more
    (tmp_path / "other").rename(tmp_path / "gone")
    train(tmp_path / "run", {"epochs": 2}, resume=True, quiet=True)
    assert capsys.readouterr().err == ""
    with refused(str(tmp_path / "other"), error=UserError):
        train(tmp_path / "second", given, quiet=True)
