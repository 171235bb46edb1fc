"""Every reader of files, given what is no longer the file that it was: it is read rightly, or refused by its name.

`make test` damages each kind of file in 50 ways, always the same ones; `pytest --hypothesis-profile nightly` in 2,000.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.damaged import STEPS, Damage, Step, Trap, npy, of_archive, of_bytes, of_json, of_safetensors
from helpers.embeddings import quick, tail
from helpers.profiles import cases
from helpers.small_run import make_run
from helpers.toys import CLASS_NAMES, toy_embeddings, write_embeddings, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ltloss
from ltloss.errors import ImageError, UserError
from ltloss.interop import export_safetensors, import_insightface, import_safetensors
from ltloss.sklearn import LongTailClassifier
from ltloss.training.data.decode import FORMATS, open_image, to_pixels
from ltloss.training.data.embeddings import load_rows
from ltloss.training.data.lists import read_list
from ltloss.training.data.sources import load_data
from ltloss.training.model.classifier import Classifier
from ltloss.training.model.weights import read_weights
from ltloss.training.pages.run_files import read_measured, read_run
from ltloss.training.run.checkpoint import load_checkpoint
from ltloss.training.run.run_config import RunConfig, read_settings_file
from ltloss.training.run.settings import Settings


@dataclass(frozen=True)
class Reader:
    """How a file is made, what reads it and looks at what was read, and what it may raise."""

    file: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    error: type[Exception] = UserError
    inside: Damage = of_bytes  # how its content is damaged, apart from its bytes


def _read_data(path: Path) -> None:
    source = load_data(str(path), split="all")
    assert len(source) == len(source.labels) == len(source.names) > 0
    batch = source.batch(np.arange(min(3, len(source))))
    assert batch.shape[1:] == source.shape
    assert batch.isfinite().all()
    assert source.labels.dtype == np.int64
    assert set(np.unique(source.labels)) <= set(range(len(source.class_names)))


def _safetensors(path: Path) -> None:
    import safetensors.numpy

    x, y = toy_embeddings(4)
    text = {"class_names": json.dumps(CLASS_NAMES), "names": json.dumps([str(i) for i in range(12)])}
    safetensors.numpy.save_file({"x": x, "y": y}, path, text)


def _npy(path: Path) -> None:
    x, y = toy_embeddings(4)
    np.save(path, x)
    np.save(path.with_suffix(".labels.npy"), y)


def _read_npy(path: Path) -> None:
    _read_data(path)
    load_rows(path)


def _parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    x, y = toy_embeddings(4)
    pq.write_table(pa.table({"embedding": list(x), "label": y}), path)


def _list(path: Path) -> None:
    path.write_text("".join(f"{name}/{i}.png {label}\n" for label, name in enumerate(CLASS_NAMES) for i in range(3)))


def _json_list(path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(6)]
    marks = [{"image_id": i, "category_id": 7 * (i % 3)} for i in range(6)]
    kinds = [{"id": 7 * c, "name": name} for c, name in enumerate(CLASS_NAMES)]
    path.write_text(json.dumps({"images": images, "annotations": marks, "categories": kinds}))


def _read_list(path: Path) -> None:
    found = read_list({"train": path, "test": path}, "all")
    assert len(found.names) == len(found.labels) > 0
    assert 0 <= found.labels.min() <= found.labels.max() < len(found.class_names)


def _settings(path: Path) -> None:
    path.write_text(json.dumps({"data": "digits", "epochs": 3, "lr": 0.1, "loss-options": {"k": 4}, "amp": None}))


def _toml(path: Path) -> None:
    path.write_text('data = "digits"\nepochs = 3\nlr = 0.1\nbatch-size = 8\n[loss_options]\nk = 4\nform = "plain"\n')


def _read_settings(path: Path) -> None:
    found = read_settings_file(path)
    json.dumps(found)
    Settings(**found)


def _run(path: Path) -> None:
    run = next(folder for folder in path.parents if folder.name == "run")
    shutil.rmtree(run)
    make_run(run, CLASS_NAMES, shape=(1, 8, 8))


def _read_config(path: Path) -> None:
    config = RunConfig.read(path.parent)
    assert RunConfig.read(path.parent) == config
    config.to_json()


def _read_model(path: Path) -> None:
    classifier = Classifier.load(path.parents[2], "cpu")
    assert {tensor.dtype for tensor in classifier.state_dict().values()} == {torch.float32, torch.int64}


def _report_files(path: Path) -> None:
    _run(path)
    run = path.parent
    (run / "evaluation.json").write_text(
        json.dumps({"accuracy": 0.53, "pictures": 3, "per_class": dict.fromkeys(CLASS_NAMES, 0.5)})
    )


def _read_report(path: Path) -> None:
    run = read_run(path.parent)
    run.last("test_accuracy")
    read_measured(run)


def _head(path: Path) -> None:
    torch.manual_seed(0)
    export_safetensors(ltloss.CosineSpaceLoss(5, 4), path)


def _read_head(path: Path) -> None:
    head = ltloss.CosineSpaceLoss(5, 4)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    try:
        import_safetensors(head, path)
    except ValueError:
        assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
        raise


def _float8_head(path: Path) -> None:
    torch.manual_seed(0)
    export_safetensors(ltloss.ArcFaceLoss(5, 4, dtype=torch.float8_e4m3fn), path)


def _read_float8_head(path: Path) -> None:
    for dtype in (torch.float32, torch.float8_e4m3fn):
        import_safetensors(ltloss.ArcFaceLoss(5, 4, dtype=dtype), path)


def _estimator(path: Path) -> None:
    quick().fit(*tail()).save(path)


def _read_estimator(path: Path) -> None:
    loaded = LongTailClassifier.load(path)
    probabilities = loaded.predict_proba(tail()[0][:3])
    assert probabilities.shape == (3, 6)
    loaded.top_k(tail()[0][:3], 2)
    loaded.get_params()
    repr(loaded)


def _weights(path: Path) -> None:
    torch.manual_seed(0)
    torch.save({"state_dict": torch.nn.Linear(3, 2).state_dict(), "epoch": 1}, path)


def _read_weights(path: Path) -> None:
    assert all(isinstance(tensor, torch.Tensor) for tensor in read_weights(path).values())


def _insightface(path: Path) -> None:
    torch.save({"weight": torch.randn(5, 4)}, path)


def _read_insightface(path: Path) -> None:
    import_insightface(ltloss.ArcFaceLoss(5, 4), path)


def _image(path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    if path.suffix == ".gif":
        image = image.convert("P")
    exif = image.getexif()
    exif[0x0112] = 6
    options: dict[str, Any] = {} if path.suffix in (".bmp", ".gif", ".ppm") else {"exif": exif}
    image.save(path, **options)


def _read_image(path: Path) -> None:
    image = open_image(path)
    assert image.mode in ("L", "RGB")
    assert to_pixels(image, (3, 8, 8)).shape == (3, 8, 8)


READERS = [
    Reader("images.npz", partial(write_images, train=4, test=2), _read_data, inside=of_archive),
    Reader("embeddings.npz", write_embeddings, _read_data, inside=of_archive),
    Reader("x.safetensors", _safetensors, _read_data, inside=of_safetensors),
    Reader("x.npy", _npy, _read_npy),
    Reader("x.parquet", _parquet, _read_data),
    Reader("train.txt", _list, _read_list),
    Reader("train.json", _json_list, _read_list, inside=of_json),
    Reader("settings.json", _settings, _read_settings, inside=of_json),
    Reader("settings.toml", _toml, _read_settings),
    Reader("run/config.json", _run, _read_config, inside=of_json),
    Reader("run/checkpoints/epoch-0003/model.safetensors", _run, _read_model, inside=of_safetensors),
    Reader("run/checkpoints/epoch-0003/state.json", _run, lambda path: load_checkpoint(path.parent), inside=of_json),
    Reader("run/evaluation.json", _report_files, _read_report, inside=of_json),
    Reader("run/metrics.csv", _report_files, _read_report),
    Reader("head.safetensors", _head, _read_head, ValueError, inside=of_safetensors),
    Reader("float8.safetensors", _float8_head, _read_float8_head, ValueError, inside=of_safetensors),
    Reader("estimator.npz", _estimator, _read_estimator, ValueError, inside=of_archive),
    Reader("weights.pt", _weights, _read_weights, inside=of_archive),
    Reader("weights.safetensors", _head, _read_weights, inside=of_safetensors),
    Reader("rank.pt", _insightface, _read_insightface, ValueError, inside=of_archive),
    *(Reader(f"image.{kind.lower()}", _image, _read_image, ImageError) for kind in FORMATS),
]


Written = Callable[[Reader], tuple[Path, bytes]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A file as its reader wants it, and its content; made once."""
    made: dict[str, tuple[Path, bytes]] = {}

    def find(reader: Reader) -> tuple[Path, bytes]:
        if reader.file not in made:
            path = tmp_path_factory.mktemp("readers") / reader.file
            path.parent.mkdir(parents=True, exist_ok=True)
            reader.make(path)
            made[reader.file] = path, path.read_bytes()
        return made[reader.file]

    return find


every_reader = pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.file)


@every_reader
def test_what_is_whole_is_read(reader: Reader, written: Written) -> None:
    path, content = written(reader)
    path.write_bytes(content)
    reader.read(path)


@every_reader
@settings(max_examples=cases(50))
@given(steps=STEPS, deep=st.booleans())
def test_what_is_damaged_is_read_rightly_or_refused_by_its_name(
    reader: Reader, written: Written, steps: list[Step], deep: bool
) -> None:
    path, content = written(reader)
    path.write_bytes((reader.inside if deep else of_bytes)(content, steps))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal: Exception | None = None
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            reader.read(path)
    except reader.error as error:
        refusal = error
    if refusal is not None:
        assert isinstance(refusal, ImageError) or str(path.parent) in str(refusal)  # the former is the reason alone
        assert "\n" not in str(refusal)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 19, f"{grown} KiB of memory for a file of {path.stat().st_size} bytes"
    assert not Trap.sprung


def test_a_pickle_that_is_loaded_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trap, "sprung", 0)
    np.load(io.BytesIO(npy(np.array([Trap()], dtype=object))), allow_pickle=True)
    assert Trap.sprung == 1
