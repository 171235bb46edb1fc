from __future__ import annotations

import csv
import math
import os
import shutil
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from helpers.small_run import HOSTILE, make_run
from PIL import Image

from ltloss.errors import UserError
from ltloss.training.data.images import ArrayImages
from ltloss.training.data.sources import load_images
from ltloss.training.model.classifier import Classifier
from ltloss.training.predict import output_folder as folders
from ltloss.training.predict import predict
from ltloss.training.predict.predict import classify, predict_folder
from ltloss.training.predict.sort_images import Sorter, folder_names
from ltloss.training.run.lock import LOCK

pytestmark = pytest.mark.slow

CLASSES = ("cat", "dog", "bird", "fish")
HEADER = ["image", "class", "probability", "angle_degrees", "runner_up", "runner_up_probability"]


def read(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        return list(csv.reader(stream))


def make_image(seed: int, size: tuple[int, int] = (24, 18)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_images(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for number in range(count):
        make_image(number).save(folder / f"{number}.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder, CLASSES)
    return folder


def test_table_holds_what_the_model_says(run: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "in")
    summary = predict_folder(run, images, tmp_path / "out", device="cpu", top=3, batch_size=4)
    classifier = Classifier.load(run, "cpu")
    source = load_images(images, classifier.config.image_shape)
    features = classifier.features(source.batch(np.arange(6))).double()
    cosine = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(classifier.loss.weight.double()).T
    cosine = cosine.detach()
    probability = (classifier.loss.scale * cosine).softmax(1)
    rows = read(summary.table)
    assert rows[0] == [*HEADER, "class_3", "probability_3"]
    assert [row[0] for row in rows[1:]] == [f"{n}.png" for n in range(6)]
    for number, row in enumerate(rows[1:]):
        ranked = cosine[number].argsort(descending=True)
        assert [row[1], row[4], row[6]] == [CLASSES[c] for c in ranked[:3]]
        found = [float(cell) for cell in (row[2], row[5], row[7])]
        assert found == pytest.approx(probability[number, ranked[:3]].tolist(), rel=1e-3)
        assert float(row[3]) == pytest.approx(math.degrees(math.acos(cosine[number, ranked[0]])), abs=0.01)
    assert (summary.images, summary.skipped) == (6, 0)


@pytest.mark.parametrize("loss", ["softmax", "cosine", "long-tail", "logit-adjusted"])
def test_every_kind_of_loss_gives_probabilities(loss: str, tmp_path: Path) -> None:
    make_run(tmp_path / "run", CLASSES, loss=loss)
    summary = predict_folder(tmp_path / "run", write_images(tmp_path / "in"), tmp_path / "out", top=9)
    rows = read(summary.table)[1:]
    assert {len(row) for row in rows} == {10}  # --top 9 of four classes
    for row in rows:
        probabilities = [float(row[i]) for i in (2, 5, 7, 9)]
        assert sum(probabilities) == pytest.approx(1, abs=1e-4)
        assert 0 <= float(row[3]) <= 180


def test_one_class_has_no_runner_up(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ["only"])
    summary = predict_folder(tmp_path / "run", write_images(tmp_path / "in", 1), tmp_path / "out")
    assert read(summary.table)[1][:3] == ["0.png", "only", "1"]
    assert read(summary.table)[1][4:] == ["", ""]


def test_many_classes_never_get_all_their_logits_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = make_run(tmp_path / "run", [f"c{n}" for n in range(1000)])
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    source = ArrayImages(images, np.full(20, -1), (), [str(n) for n in range(20)])
    whole = classify(classifier, source, batch_size=20)
    logits, sizes = classifier.loss.logits, []

    def watched(features: torch.Tensor) -> torch.Tensor:
        result = logits(features)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(classifier.loss, "logits", watched)
    pieces = classify(classifier, source, batch_size=8, logits_at_once=3500)
    assert max(sizes) == 3000
    assert sum(sizes) == 20_000
    assert pieces.index.shape == (20, 2)
    assert np.array_equal(pieces.index, whole.index)
    assert pieces.probability == pytest.approx(whole.probability, rel=1e-4)


def odd_images(folder: Path) -> set[str]:
    """Write an image of every kind that has to work, and return their names."""
    folder.mkdir()
    grey = np.linspace(0, 65535, 24 * 18).reshape(18, 24).astype(np.uint16)
    base = make_image(1)
    saved = {
        "grey.png": base.convert("L"),
        "palette.png": base.quantize(16),
        "alpha.png": base.convert("RGBA"),
        "sixteen.png": Image.fromarray(grey),
        "cmyk.jpg": base.convert("CMYK"),
        "bilevel.tif": base.convert("1"),
    }
    for name, image in saved.items():
        image.save(folder / name)
    frames = [make_image(n) for n in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return {*saved, "moving.gif"}


def test_unusual_images_work_and_damaged_ones_are_listed(run: Path, tmp_path: Path) -> None:
    images = tmp_path / "in"
    good = odd_images(images)
    (images / "empty.png").write_bytes(b"")
    (images / "noise.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing of an image")
    half = (images / "cmyk.jpg").read_bytes()
    (images / "half.jpg").write_bytes(half[: len(half) // 2])
    (images / "notes.txt").write_text("not an image, and not listed")
    summary = predict_folder(run, images, tmp_path / "out")
    assert {row[0] for row in read(summary.table)[1:]} == good
    skipped = dict(read(tmp_path / "out" / "skipped.csv")[1:])
    assert set(skipped) == {"empty.png", "noise.jpg", "half.jpg"}
    assert "0 bytes" in skipped["empty.png"]
    assert summary.skipped == 3
    assert "3 files could not be read" in str(summary)


def test_exif_orientation_is_respected(run: Path, tmp_path: Path) -> None:
    images = tmp_path / "in"
    images.mkdir()
    upright = make_image(5, (40, 40)).resize((40, 40))
    upright.save(images / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90° clockwise to view"
    upright.rotate(90).save(images / "turned.png", exif=exif)
    rows = read(predict_folder(run, images, tmp_path / "out").table)
    assert rows[1][1:] == rows[2][1:]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux file names are arbitrary bytes")
def test_any_file_name_survives_the_table(run: Path, tmp_path: Path) -> None:
    names = [b"a,b.png", b'say "hi".png', b"two\nlines.png", b"caf\xe9.png", "猫.png".encode(), b"=1+1.png", b"%2e.png"]
    images = tmp_path / "in"
    images.mkdir()
    for number, name in enumerate(names):
        make_image(number).save(images / "x.png")
        os.rename(images / "x.png", os.fsencode(images) + b"/" + name)
    summary = predict_folder(run, images, tmp_path / "out", sort_into=tmp_path / "sorted")
    assert {os.fsencode(row[0]) for row in read(summary.table)[1:]} == set(names)
    copies = [tmp_path / "sorted" / row[2] for row in read(tmp_path / "out" / "sorted.csv")[1:]]
    assert {os.fsencode(copy.name) for copy in copies} == set(names)
    assert all(copy.is_file() for copy in copies)


def test_sorting_never_overwrites(run: Path, tmp_path: Path) -> None:
    images = tmp_path / "in"
    for number in range(3):  # the same image under the same name: the same class, three times
        (images / str(number)).mkdir(parents=True)
        make_image(7).save(images / str(number) / "same.png")
    sorted_into = tmp_path / "sorted"
    rows = read(predict_folder(run, images, tmp_path / "out", sort_into=sorted_into).table)
    folder = sorted_into / rows[1][1]
    assert {p.name for p in folder.iterdir()} == {"same.png", "same-2.png", "same-3.png"}
    before = contents(sorted_into)
    (folder / "same.png").write_bytes(b"mine")
    predict_folder(run, images, tmp_path / "out", sort_into=sorted_into, overwrite=True)
    after = contents(sorted_into)
    assert after[f"{rows[1][1]}/same.png"] == b"mine"
    assert len(after) == len(before) + 1
    record = read(tmp_path / "out" / "sorted.csv")
    assert record[0] == ["image", "class", "copy"]
    assert [row[2] for row in record[1:]] == [f"{rows[1][1]}/same-{n}.png" for n in (2, 3, 4)]


def test_sorting_again_gives_one_copy_of_each(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, out, sorted_into = write_images(tmp_path / "in"), tmp_path / "out", tmp_path / "sorted"
    copy, copied = shutil.copy2, []

    def interrupted(source: Path, target: Path) -> object:
        copied.append(source)
        if len(copied) == 4:
            raise KeyboardInterrupt
        return copy(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copy2", interrupted)
        with pytest.raises(KeyboardInterrupt):
            predict_folder(run, images, out, sort_into=sorted_into)
    assert not out.exists()
    assert not sorted_into.exists()
    records = []
    for _ in range(2):
        predict_folder(run, images, out, sort_into=sorted_into, overwrite=True)
        records.append(contents(out)["sorted.csv"])
        assert sorted(contents(sorted_into).values()) == sorted(contents(images).values())
    assert records[0] == records[1]


def test_folder_names_are_safe_and_distinct() -> None:
    names = [
        *HOSTILE,
        "a_b",
        "A_B",
        "a?b",
        ".",
        "..",
        ".hidden",
        "nul.txt",
        "x" * 500,
        "x" * 501,
        "é" * 200,
        "\udcff",
        " end. ",
    ]
    folders = folder_names(names)
    assert len({folder.casefold() for folder in folders}) == len(names)
    for folder in folders:
        assert 0 < len(folder.encode()) <= 120
        assert not set(folder) & set('<>:"/\\|?*\n')
        assert not folder.startswith(".")
        assert folder == folder.strip(" .")
        assert folder.partition(".")[0].lower() not in {"con", "nul"}
    assert folders[names.index("a_b")] == "a_b"
    assert folder_names(CLASSES) == list(CLASSES)


def test_hostile_class_names_stay_inside_the_sorted_folder(tmp_path: Path) -> None:
    make_run(tmp_path / "run", HOSTILE)
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    sorter = Sorter(tmp_path / "sorted", HOSTILE)
    for copy in sorter.sort([tmp_path / "p.png"] * len(HOSTILE), range(len(HOSTILE))):
        assert copy.resolve().parent.parent == (tmp_path / "sorted").resolve()
    assert len(list((tmp_path / "sorted").iterdir())) == len(HOSTILE)
    predict_folder(tmp_path / "run", write_images(tmp_path / "in"), tmp_path / "out", sort_into=tmp_path / "again")
    assert sum(1 for p in (tmp_path / "again").glob("*/*.png")) == 6


def test_earlier_results_are_replaced_and_foreign_files_are_not(run: Path, tmp_path: Path) -> None:
    images, out = write_images(tmp_path / "in"), tmp_path / "out"
    predict_folder(run, images, out, sort_into=tmp_path / "sorted")
    first = contents(out)
    assert set(first) == {"predictions.csv", "gallery.html", "skipped.csv", "sorted.csv", "prediction.json"}
    (images / "5.png").unlink()
    with refused(str(out), error=UserError):
        predict_folder(run, images, out)
    assert contents(out) == first
    predict_folder(run, images, out, overwrite=True)
    assert len(read(out / "predictions.csv")) == 6
    assert set(contents(out)) == set(first) - {"sorted.csv"}
    (out / "thesis.doc").write_text("years of work")
    before = contents(out)
    with refused(str(out), "'thesis.doc'", error=UserError):
        predict_folder(run, images, out)
    assert contents(out) == before


def test_a_table_that_is_not_ours_is_not_replaced(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.csv").write_text("mine")
    with refused(str(out), "predictions.csv", error=UserError):
        predict_folder(run, write_images(tmp_path / "in"), out)
    assert contents(out) == {"predictions.csv": b"mine"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_breaks_off_leaves_the_old_results_untouched(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    images, out = write_images(tmp_path / "in"), tmp_path / "out"
    predict_folder(run, images, out)
    before = contents(out)

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(predict, "write_gallery", fails)
    (images / "0.png").unlink()
    for folder in (out, tmp_path / "new"):
        with pytest.raises(type(error)):
            predict_folder(run, images, folder, overwrite=True)
    assert contents(out) == before
    assert not (tmp_path / "new").exists()


def test_leftovers_of_a_killed_prediction_do_not_matter(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for process in (1, os.getpid()):
        (out / f".unfinished-{process}").mkdir(parents=True)
        (out / f".unfinished-{process}" / "sorted.csv").write_text("half")
    (out / LOCK).write_text("process 1")
    predict_folder(run, write_images(tmp_path / "in"), out)
    assert set(contents(out)) == {"predictions.csv", "gallery.html", "skipped.csv", "prediction.json"}
    assert not [p for p in out.iterdir() if p.is_dir()]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such lock")
def test_a_second_prediction_into_the_folder_leaves_the_first_alone(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with folders.output_folder(out, "prediction.json", ()) as staging:
        (staging / "prediction.json").write_text("{}")
        with refused(f"process {os.getpid()}", "--out", str(out), error=UserError):
            predict_folder(run, write_images(tmp_path / "in"), out, overwrite=True)
    assert contents(out) == {"prediction.json": b"{}"}


def test_results_that_another_prediction_wrote_meanwhile_are_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, owned = tmp_path / "out", folders.owned

    def owned_later(folder: Path) -> AbstractContextManager[None]:
        folder.mkdir()
        (folder / "prediction.json").write_text("{}")
        return owned(folder)

    monkeypatch.setattr(folders, "owned", owned_later)
    with refused("--overwrite", error=UserError):
        predict_folder(run, write_images(tmp_path / "in"), out)
    assert contents(out) == {"prediction.json": b"{}"}


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"run": "nowhere"}, ["{}/nowhere"]),
        ({"images": "nowhere"}, ["{}/nowhere"]),
        ({"images": "file"}, ["{}/file"]),
        ({"images": "empty"}, ["{}/empty"]),
        ({"images": "damaged"}, ["{}/damaged"]),
        ({"out": "file"}, ["--out", "{}/file"]),
        ({"out": "file/below"}, ["{}/file"]),
        ({"out": "in/results"}, ["--out", "{}/in/results", "{}/in"]),
        ({"sort_into": "in/sorted"}, ["--sort-into", "{}/in/sorted", "{}/in"]),
        ({"sort_into": "out/sorted"}, ["--sort-into", "{}/out/sorted", "--out", "{}/out"]),
        ({"images": "in/a", "sort_into": "in"}, ["--images", "{}/in/a", "--sort-into", "{}/in"]),
        ({"sort_into": "file"}, ["{}/file"]),
        ({"top": 0}, ["--top", "1", "0"]),
        ({"batch_size": 0}, ["--batch-size", "1", "0"]),
        ({"device": "gpu!"}, ["gpu!"]),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    run: Path, tmp_path: Path, change: dict[str, object], facts: list[str]
) -> None:
    write_images(tmp_path / "in", 2)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "x.png").write_bytes(b"")
    paths = {
        name: tmp_path / str(value) for name, value in change.items() if name not in ("top", "batch_size", "device")
    }
    given = {"run": run, "images": tmp_path / "in", "out": tmp_path / "out", **change, **paths}
    before = contents(tmp_path)
    with refused(*(fact.format(tmp_path) for fact in facts), error=UserError):
        predict_folder(**given)
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_diverged_model_is_reported(tmp_path: Path) -> None:
    classifier = make_run(tmp_path / "run", CLASSES)
    with torch.no_grad():
        next(classifier.backbone.parameters()).fill_(math.nan)
    images = np.zeros((3, 16, 16, 3), dtype=np.uint8)
    with refused("'first'", error=UserError):
        classify(classifier, ArrayImages(images, np.full(3, -1), (), ["first", "b", "c"]))
