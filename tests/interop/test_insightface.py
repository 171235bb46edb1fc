"""Class centres that InsightFace saved: every file it has written, in the order of the ranks, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import world
from helpers.cases import DIM, whole
from helpers.refusals import refused

import ltloss
from ltloss.distributed import class_mesh, parallelize
from ltloss.interop import import_insightface

CLASSES, RANKS = 25, 11


def _checkpoint(weight: torch.Tensor) -> dict[str, Any]:
    """What ``train_v2.py`` of arcface_torch saves on each rank."""
    backbone = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=5)
    backbone(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule.step()
    return {
        "epoch": 1,
        "global_step": 10,
        "state_dict_backbone": backbone.state_dict(),
        "state_dict_softmax_fc": {"weight": weight},
        "state_optimizer": optimizer.state_dict(),
        "state_lr_scheduler": schedule.state_dict(),
    }


KINDS = {
    "checkpoint_gpu_{}.pt": _checkpoint,
    "softmax_fc_gpu_{}.pt": lambda weight: {"weight": weight, "weight_mom": weight},
    "rank_{}_softmax_weight.pt": lambda weight: weight,
}


def _write(folder: Path, kind: str = "softmax_fc_gpu_{}.pt", ranks: int = RANKS, zipped: bool = True) -> torch.Tensor:
    """The files of a job; as InsightFace cuts, the first ranks have one class more."""
    weight = torch.randn(CLASSES, DIM)
    for rank, rows in enumerate(weight.tensor_split(ranks)):
        content = KINDS[kind](rows.clone())
        torch.save(content, folder / kind.format(rank), _use_new_zipfile_serialization=zipped)
    (folder / "model.pt").write_bytes(b"the backbone, which nobody opens")
    return weight


def _read(files: Any) -> torch.Tensor:
    head = ltloss.ArcFaceLoss(CLASSES, DIM)
    import_insightface(head, files)
    return head.weight.detach()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_that_insightface_writes(tmp_path: Path, kind: str, zipped: bool) -> None:
    weight = _write(tmp_path, kind, zipped=zipped)
    assert torch.equal(_read(tmp_path), weight)
    assert torch.equal(_read(str(tmp_path)), weight)


def test_ranks_count_and_not_the_order_of_a_list(tmp_path: Path) -> None:
    weight = _write(tmp_path)
    names = sorted(str(path) for path in tmp_path.glob("softmax_fc_gpu_*"))
    assert names[2].endswith("10.pt")
    assert torch.equal(_read(names), weight)


def test_names_without_ranks_stay_in_the_order_given(tmp_path: Path) -> None:
    weight = _write(tmp_path, ranks=2)
    (tmp_path / "softmax_fc_gpu_0.pt").rename(tmp_path / "z.pt")
    (tmp_path / "softmax_fc_gpu_1.pt").rename(tmp_path / "a.pt")
    assert torch.equal(_read((tmp_path / "z.pt", tmp_path / "a.pt")), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_one_file(tmp_path: Path, kind: str) -> None:
    weight = _write(tmp_path, kind, ranks=1)
    assert torch.equal(_read(tmp_path / kind.format(0)), weight)
    assert torch.equal(_read(str(tmp_path / kind.format(0))), weight)


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    _write(tmp_path, "checkpoint_gpu_{}.pt")
    for rank in (1, 9):
        (tmp_path / f"checkpoint_gpu_{rank}.pt").unlink()
    for files in (tmp_path, list(tmp_path.glob("check*"))):
        with refused("checkpoint_gpu_N.pt", "[1, 9]", error=FileNotFoundError):
            _read(files)


def test_files_that_are_none(tmp_path: Path) -> None:
    for files in (tmp_path, []):
        with refused("checkpoint_gpu_N.pt", error=FileNotFoundError):
            _read(files)
    with refused("nowhere", error=FileNotFoundError):
        _read(tmp_path / "nowhere")


def test_files_of_two_jobs_are_refused(tmp_path: Path) -> None:
    for kind in KINDS:
        _write(tmp_path, kind, ranks=1)
    with refused("checkpoint_gpu_N.pt", "rank_N_softmax_weight.pt"):
        _read(tmp_path)
    with refused("softmax_fc_gpu_N.pt", "[0, 0]"):
        _read([tmp_path / "softmax_fc_gpu_0.pt"] * 2)


def test_different_widths_name_both_files(tmp_path: Path) -> None:
    _write(tmp_path, ranks=3)
    torch.save(torch.randn(8, DIM + 1), tmp_path / "softmax_fc_gpu_2.pt")
    with refused("softmax_fc_gpu_0.pt", str(DIM), "softmax_fc_gpu_2.pt", str(DIM + 1)):
        _read(tmp_path)


class _Code:
    """Unpickled, it would write a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "ran")


def test_a_bad_file_changes_nothing_and_runs_nothing(tmp_path: Path) -> None:
    _write(tmp_path, ranks=2)
    last = tmp_path / "softmax_fc_gpu_1.pt"
    head = ltloss.ArcFaceLoss(CLASSES, DIM)
    before = head.weight.detach().clone()
    for content in (last.read_bytes()[:300], b"", b"no checkpoint"):
        last.write_bytes(content)
        with refused("softmax_fc_gpu_1.pt"):
            import_insightface(head, tmp_path)
    for zipped in (True, False):
        torch.save(_Code(tmp_path / "trace"), last, _use_new_zipfile_serialization=zipped)
        with refused("softmax_fc_gpu_1.pt"):
            import_insightface(head, tmp_path)
    for nothing in ({"weight": torch.zeros(DIM)}, {"state_dict_softmax_fc": {}}, [3]):
        torch.save(nothing, last)
        with refused("softmax_fc_gpu_1.pt", "'weight'"):
            import_insightface(head, tmp_path)
    assert torch.equal(head.weight, before)
    assert not (tmp_path / "trace").exists()


def test_another_number_of_classes(tmp_path: Path) -> None:
    _write(tmp_path)
    with refused(f"(25, {DIM})", f"(26, {DIM})"):
        import_insightface(ltloss.ArcFaceLoss(CLASSES + 1, DIM), tmp_path)


def _sharded(rank: int, folder: Path, weight: torch.Tensor) -> None:
    head = parallelize(ltloss.ArcFaceLoss(CLASSES, DIM), class_mesh())
    import_insightface(head, folder)
    assert torch.equal(whole(head.weight), weight)


@pytest.mark.slow
def test_saved_on_some_ranks_and_read_on_others(tmp_path: Path) -> None:
    weight = _write(tmp_path, "checkpoint_gpu_{}.pt")
    world.run(_sharded, 2, tmp_path, weight)
