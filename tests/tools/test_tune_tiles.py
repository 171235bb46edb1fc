"""Tuned tiles: kept in a file of the user's, used when they are there, left alone when they do not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.refusals import missing, warned

pytest.importorskip("triton")

from ltloss_kernels import exponentials
from ltloss_kernels.config import tile_cache
from ltloss_kernels.config import tile_table as tiles

import ltloss
from ltloss.cli.command import main
from ltloss.tools import tune_tiles

BF16 = torch.bfloat16
NAME = "forward/90/bfloat16/ieee"


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv("LTLOSS_TILES", str(path))
    tile_cache.forget()
    yield path
    tile_cache.forget()


def entry(**changed: object) -> dict[str, object]:
    return {"tile": [64, 32, 16, 4, 2], "triton": tile_cache.triton_version(), **changed}


def test_a_stored_tile_is_used_and_only_where_it_was_measured(file: Path) -> None:
    usual = tiles.forward_tile(90, BF16, "ieee", 4096, 512)
    tile_cache.store({NAME: entry()}, file)
    assert tiles.forward_tile(90, BF16, "ieee", 4096, 512) == tiles.Tile(64, 32, 16, 4, 2)
    assert tiles.forward_tile(90, BF16, "tf32", 4096, 512) == tiles.Tile(64, 32, 16, 4, 2), (
        "precision is for float32 only"
    )
    assert tiles.forward_tile(90, torch.float16, "ieee", 4096, 512) == usual
    assert tiles.forward_tile(80, BF16, "ieee", 4096, 512) != tiles.Tile(64, 32, 16, 4, 2)
    assert tiles.gradient_tile(90, BF16, "ieee", 4096, 512) != tiles.Tile(64, 32, 16, 4, 2)


def test_the_version_of_triton_is_looked_up_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes half a millisecond, in every step of a training with tuned tiles."""
    tile_cache.store({NAME: entry()}, file)

    def version(name: str) -> str:
        raise AssertionError(f"looked up {name} again")

    monkeypatch.setattr(tile_cache.importlib.metadata, "version", version)
    assert tiles.forward_tile(90, BF16, "ieee", 4096, 512).rows == 64


def test_storing_keeps_the_other_entries(file: Path) -> None:
    tile_cache.store({NAME: entry()}, file)
    tile_cache.store({"gradient/90/bfloat16/ieee": entry(tile=[32, 32, 16, 4, 2])}, file)
    assert tiles.forward_tile(90, BF16, "ieee", 4096, 512).rows == 64
    assert tiles.gradient_tile(90, BF16, "ieee", 4096, 512).rows == 32
    assert [path.name for path in file.parent.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize(
    "bad",
    [entry(triton="0.1"), entry(tile=[64, 32]), entry(tile=[64, 32, 16, 4, "2"]), entry(tile=[64, 32, 16, 4, 0]), 7],
)
def test_an_entry_that_does_not_fit_is_not_used(file: Path, bad: object) -> None:
    usual = tiles.forward_tile(90, BF16, "ieee", 4096, 512)
    tile_cache.store({NAME: bad}, file)
    assert tiles.forward_tile(90, BF16, "ieee", 4096, 512) == usual


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_damaged_file_is_left_out_with_one_warning(file: Path, text: str) -> None:
    usual = tiles.forward_tile(90, BF16, "ieee", 4096, 512)
    tile_cache.forget()
    file.parent.mkdir()
    file.write_text(text)
    with warned(str(file), "ltloss tune", kind=UserWarning):
        assert tiles.forward_tile(90, BF16, "ieee", 4096, 512) == usual
    assert tiles.forward_tile(90, BF16, "ieee", 4096, 512) == usual  # no second warning, which would be an error here


def test_an_empty_setting_switches_stored_tiles_off(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = tiles.forward_tile(90, BF16, "ieee", 4096, 512)
    tile_cache.store({NAME: entry()}, file)
    monkeypatch.setenv("LTLOSS_TILES", "")
    assert tiles.forward_tile(90, BF16, "ieee", 4096, 512) == usual != tiles.Tile(*entry()["tile"])


def test_the_file_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LTLOSS_TILES")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tile_cache.cache_file() == Path("/somewhere/ltloss/tiles.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tile_cache.cache_file() == Path.home() / ".cache" / "ltloss" / "tiles.json"


@pytest.mark.parametrize("kernel", ["forward", "gradient"])
def test_every_candidate_is_timed_and_a_broken_one_comes_last(
    kernel: tune_tiles.Kernel, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, broken = tiles.Tile(16, 16, 16, 1, 1), tiles.Tile(16, 16, 12, 1, 1)  # a depth that is no power of two
    monkeypatch.setattr(tune_tiles, "CANDIDATES", (small, broken))
    usual = entry(tile=[32, 16, 16, 1, 1])
    tile_cache.store({f"{name}_few/90/float16/ieee": usual for name in ("forward", "gradient")}, file)
    with ltloss.use_backend("triton"):
        ranking = tune_tiles.rank(kernel, 20, 40, 24, torch.float16, device="cpu", repeats=1)
    assert [timing.tile for timing in ranking[-1:]] == [broken]
    assert ranking[-1].problem
    assert {timing.tile for timing in ranking[:2]} == {small, tiles.Tile(32, 16, 16, 1, 1)}
    assert all(0 < timing.milliseconds < float("inf") and not timing.problem for timing in ranking[:2])
    shown = tune_tiles.show(kernel, (20, 40, 24), ranking)
    assert len(shown.splitlines()) == 4
    assert ranking[-1].problem in shown


@pytest.mark.parametrize("by", [1.1, float("nan")])
def test_a_tile_that_computes_something_else_has_no_time(by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tiles.Tile(16, 16, 16, 1, 1)

    def loss(features: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return features.abs().sum() * (by if tiles.forward_tile(90, BF16, "ieee", 4096, 512) == wrong else 1.0)

    monkeypatch.setattr(tune_tiles, "CANDIDATES", (wrong,))
    monkeypatch.setattr(tune_tiles, "margin_cross_entropy", loss)
    good, bad = tune_tiles.rank("forward", 2, 3, 4, BF16, device="cpu", repeats=1)
    assert not good.problem
    assert (bad.tile, bad.milliseconds) == (wrong, float("inf"))
    assert bad.problem


def test_float32_operands_take_half_the_depth() -> None:
    half, full = (tune_tiles.candidates("forward", 90, dtype, "tf32", 4096, 512) for dtype in (BF16, torch.float32))
    assert half[0] == tiles.forward_tile(90, BF16, "tf32", 4096, 512)
    assert {tile.depth for tile in half[1:]} == {32, 64, 128}
    assert {tile.depth for tile in full[1:]} == {16, 32, 64}


def test_a_tried_tile_is_forgotten_afterwards() -> None:
    usual = tiles.gradient_tile(90, BF16, "ieee", 4096, 512)
    with tile_cache.trying("gradient", (16, 16, 16, 1, 1)):
        assert tiles.gradient_tile(90, BF16, "ieee", 4096, 512).rows == 16
    assert tiles.gradient_tile(90, BF16, "ieee", 4096, 512) == usual


def test_what_was_stored_says_where_it_comes_from(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    tune_tiles.remember("forward", tune_tiles.Timing(tiles.Tile(64, 32, 16, 4, 2), 1.5), BF16, (4096, 2, 3), file)
    stored = json.loads(file.read_text())[NAME]
    assert stored == {**entry(), "milliseconds": 1.5, "shape": "4096x2x3", "device": "a GPU"}
    assert tiles.forward_tile(90, BF16, "ieee", 4096, 512).rows == 64


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not missing(line, "tune", "CUDA")


def test_sizes_have_tiles_of_their_own() -> None:
    def forward(samples: int, width: int, dtype: torch.dtype = torch.bfloat16) -> tiles.Tile:
        return tiles.forward_tile(90, dtype, "ieee", samples, width)

    assert [forward(n, 512).rows for n in (1, 64, 65, 8192)] == [64, 64, 128, 128]
    stays = [width for width in (64, 65, 128, 129, 256) if tiles.row_block_stays(90, forward(8192, width), width)]
    assert stays == [64, 65, 128]
    assert not tiles.row_block_stays(100, tiles.forward_tile(100, torch.bfloat16, "ieee", 8192, 64), 64)
    assert forward(64, 128, torch.float32) == forward(8192, 512, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_no_tile_has_more_shifts_than_the_exponentials_are_counted_with(precision: str, dtype: torch.dtype) -> None:
    for arch in tiles.ARCHITECTURES:
        for samples, width in ((10, 512), (300, 512), (5000, 100), (5000, 512)):
            for tile in tune_tiles.candidates("forward", arch, dtype, precision, samples, width):
                assert tile.classes >= exponentials._LEAST_CLASSES
