"""The training loops of the examples learn the rare classes too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
from examples import plain_loop
from ltloss.class_balance import counts_from_labels

pytestmark = pytest.mark.slow


def test_the_data_has_a_long_tail() -> None:
    train, test = plain_loop.data()
    counts = counts_from_labels(train.tensors[1], num_classes=10).tolist()
    assert (counts[0], counts[-1]) == (120, 3)
    assert counts == sorted(counts, reverse=True)
    assert counts_from_labels(test.tensors[1], num_classes=10).tolist() == [50] * 10


def test_the_plain_loop_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plain_loop, "EPOCHS", 8)
    found = plain_loop.main()
    assert capsys.readouterr().out.count("\n") == 8
    assert float(found.mean()) > 0.75
    assert float(found[-1]) > 0.3  # three training images


def test_the_lightning_module_learns_and_is_loaded_again(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="needs pip install 'ltloss[lightning]'")
    from examples.lightning_module import LongTailed, main

    trainer = main(tmp_path, epochs=8)
    assert float(trainer.callback_metrics["accuracy"]) > 0.75
    train, test = plain_loop.data()
    model = LongTailed(counts_from_labels(train.tensors[1], num_classes=10), epochs=8)
    start = model.loss_fn.weight.detach().clone()
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    model.load_state_dict(state)
    assert not torch.allclose(model.loss_fn.weight, start)
    correct = (model.eval()(test.tensors[0]) == test.tensors[1]).double().mean()
    assert float(correct) == pytest.approx(float(trainer.callback_metrics["accuracy"]))
