"""What a comparison makes of its data."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.cli_errors import fails
from helpers.refusals import refused
from helpers.toys import toy_images, toy_settings, write_embeddings
from PIL import Image

from ltloss.errors import UserError
from ltloss.training import compare
from ltloss.training.comparison.jobs import fingerprint
from ltloss.training.data.images import ArrayImages
from ltloss.training.data.sources import load_data
from ltloss.training.run.trainer import train


def test_the_checksum_is_that_of_the_images_not_of_how_they_lie_in_memory() -> None:
    images, labels = toy_images(4)
    found = set()
    for pixels in (images, np.asfortranarray(images), images[::-1][::-1]):
        found.add(fingerprint(ArrayImages(pixels, labels, ("a", "b", "c"), [""] * 12)))
    assert len(found) == 1
    assert found != {fingerprint(ArrayImages(images ^ 1, labels, ("a", "b", "c"), [""] * 12))}
    assert found != {fingerprint(ArrayImages(images, labels[::-1], ("a", "b", "c"), [""] * 12))}


def test_images_in_files_are_known_by_their_bytes(toy_folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(toy_folder, moved)
    before = fingerprint(load_data(str(toy_folder), split="train"))
    assert before == fingerprint(load_data(str(moved), split="train", workers=1))
    first = load_data(str(moved), split="train").image(0)
    first.transpose(Image.Transpose.ROTATE_180).save(moved / load_data(str(moved), split="train").names[0])
    assert before != fingerprint(load_data(str(moved), split="train"))


@pytest.mark.parametrize(
    ("varied", "facts"),
    [({"imbalance": [2.0, 1000.0]}, ["imbalance 1000"]), ({"limit_per_class": [8, 4], "imbalance": [6.0]}, ["most 4"])],
)
def test_a_limit_that_the_data_do_not_allow_is_refused_before_anything_is_trained(
    varied: dict[str, list[float]], facts: list[str], toy_npz: Path, tmp_path: Path
) -> None:
    with refused(*facts, error=UserError):
        compare(tmp_path / "out", toy_settings(toy_npz), ["ce"], seeds=1, vary=varied, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_setting_is_varied_once(toy_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["compare", "--data", str(toy_npz), "--out", str(tmp_path / "out"), "--losses", "ce"]
    fails([*line, "--vary", "mixup=0.4", "--vary", "lr=0.1", "--vary", "lr=0.2"], capsys, "--vary lr", "twice")


def test_a_linear_head_over_embeddings_has_the_default_scale_of_a_run(tmp_path: Path) -> None:
    given = toy_settings(write_embeddings(tmp_path / "embeddings.npz"), embedding_size=6)
    found = compare(tmp_path / "out", given, ["cosine", "ce"], seeds=1, vary={"head": ["linear", "mlp"]}, quiet=True)
    scales = [(run.result["settings"]["loss"], run.result["settings"]["scale"]) for run in found.runs]
    assert scales == [("cosine", 32.0), ("cosine", None), ("softmax", None), ("softmax", None)]
    alone = train(tmp_path / "alone", {**given, "loss": "cosine", "data_seed": 0}, quiet=True)
    assert found.runs[0].result["last"]["loss"] == alone.evaluation.metrics.loss
    fewer = compare(tmp_path / "out", {**given, "scale": 32.0}, ["cosine"], seeds=1, quiet=True)
    assert fewer.runs[0].result == found.runs[0].result  # the key is that of the scale given
