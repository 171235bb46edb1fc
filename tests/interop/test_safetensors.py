"""One safetensors file for a head: written by all ranks, read by any number of them and by the safetensors library."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import world
from helpers.cases import DIM, whole
from helpers.refusals import refused

import ltloss
from ltloss.distributed import DistributedError, class_mesh, parallelize
from ltloss.interop import export_safetensors, import_safetensors

library = pytest.importorskip("safetensors.torch")

CLASSES = 11


def _exported(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    head = parallelize(ltloss.CosineSpaceLoss(CLASSES, DIM), class_mesh())
    head(torch.randn(4, DIM), torch.tensor([0, 3, 5, 9]))  # the centres are no longer zero
    export_safetensors(head, folder / "head.safetensors")
    other = parallelize(ltloss.CosineSpaceLoss(CLASSES, DIM), class_mesh())
    import_safetensors(other, folder / "head.safetensors")
    for name, tensor in other.state_dict().items():
        assert torch.equal(whole(tensor), whole(head.state_dict()[name]))
    with pytest.raises((OSError, DistributedError)):
        export_safetensors(head, folder / "no such folder" / "head.safetensors")
    return {name: whole(tensor) for name, tensor in head.state_dict().items()}


@pytest.mark.slow
def test_written_by_three_ranks(tmp_path: Path) -> None:
    expected = world.run(_exported, 3, tmp_path)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]
    one = ltloss.CosineSpaceLoss(CLASSES, DIM)
    import_safetensors(one, tmp_path / "head.safetensors")
    theirs = library.load_file(tmp_path / "head.safetensors")
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, expected[name])
        assert torch.equal(theirs[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    head = ltloss.CosineSpaceLoss(CLASSES, DIM).to(dtype)
    export_safetensors(head, tmp_path / "head.safetensors")
    theirs = library.load_file(tmp_path / "head.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in theirs.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in head.state_dict().items()
    }
    float32 = ltloss.CosineSpaceLoss(CLASSES, DIM)
    import_safetensors(float32, tmp_path / "head.safetensors")
    assert torch.equal(float32.weight, head.weight.float())


def test_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    head = ltloss.CosineSpaceLoss(CLASSES, DIM)
    export_safetensors(head, tmp_path / "head.safetensors")
    before, content = head.weight.detach().clone(), (tmp_path / "head.safetensors").read_bytes()
    for damaged in (content[:40], content[:-5], b"", b"x" * 100):
        (tmp_path / "damaged").write_bytes(damaged)
        with refused(str(tmp_path / "damaged")):
            import_safetensors(head, tmp_path / "damaged")
    library.save_file({"weight": torch.zeros(CLASSES, DIM)}, tmp_path / "no centres")
    with refused("no centres"):
        import_safetensors(head, tmp_path / "no centres")
    assert torch.equal(head.weight, before)
    with refused("weight", "(11, 6)", "(5, 6)"):
        import_safetensors(ltloss.ArcFaceLoss(5, DIM), tmp_path / "head.safetensors")
    with refused("nowhere", error=FileNotFoundError):
        import_safetensors(head, tmp_path / "nowhere")


def test_without_the_library_it_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = ltloss.ArcFaceLoss(CLASSES, DIM)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    export_safetensors(head, tmp_path / "head.safetensors")
    with refused("safetensors", error=ImportError):
        import_safetensors(head, tmp_path / "head.safetensors")
