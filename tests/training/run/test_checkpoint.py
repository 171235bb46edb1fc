from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.refusals import refused

from ltloss._files import remove_leftovers
from ltloss.errors import UserError
from ltloss.training.run.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


def example(epoch: int) -> Checkpoint:
    tensors = {"weight": torch.full((3, 2), float(epoch)), "steps": torch.tensor(epoch)}
    return Checkpoint(tensors, {"weight": torch.zeros(3, 2)}, {"epoch": epoch, "history": []})


class Killed(BaseException):
    """The process ends here."""


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, example(7))
    assert path == tmp_path / "checkpoints" / "epoch-0007"
    found = load_checkpoint(path)
    assert torch.equal(found.model["weight"], torch.full((3, 2), 7.0))
    assert found.model["steps"].shape == ()
    assert found.state == {"epoch": 7, "history": []}


def test_the_newest_two_are_kept_beyond_four_digits(tmp_path: Path) -> None:
    for epoch in (9998, 9999, 10000):
        save_checkpoint(tmp_path, epoch, example(epoch))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["epoch-10000", "epoch-9999"]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "epoch-10000"


# Each of these is called on the way; dying in any of them, at any call, must leave a whole checkpoint.
@pytest.mark.parametrize("function", ["fsync", "replace", "open", "rmtree"])
@pytest.mark.parametrize("call", range(16))
def test_death_at_any_step_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int
) -> None:
    for epoch in (1, 2):
        save_checkpoint(tmp_path, epoch, example(epoch))
    calls = 0

    def dying(original):  # type: ignore[no-untyped-def]
        def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls > call:  # a dead process does not tidy up either
                raise Killed
            return original(*args, **kwargs)

        return wrapper

    owner = shutil if function == "rmtree" else os
    with monkeypatch.context() as patched:
        patched.setattr(owner, function, dying(getattr(owner, function)))
        if function != "rmtree":
            patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        try:
            save_checkpoint(tmp_path, 3, example(3))
        except Killed:
            pass
        else:
            assert calls <= call
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    found = load_checkpoint(latest)
    assert found.state["epoch"] in (2, 3)
    assert float(found.model["weight"][0, 0]) == found.state["epoch"]
    remove_leftovers(tmp_path / "checkpoints", "epoch-")
    assert not list(tmp_path.rglob(".*"))
    save_checkpoint(tmp_path, 4, example(4))
    assert load_checkpoint(tmp_path / "checkpoints" / "epoch-0004").state["epoch"] == 4


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_part_is_named(tmp_path: Path, part: str) -> None:
    path = save_checkpoint(tmp_path, 1, example(1))
    content = (path / part).read_bytes()
    (path / part).write_bytes(content[: len(content) // 2])
    with refused(str(path), error=UserError):
        load_checkpoint(path)
