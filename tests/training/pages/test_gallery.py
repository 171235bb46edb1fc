from __future__ import annotations

import base64
import csv
import io
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from helpers.browser import needs_chromium, render
from helpers.pages import Page
from helpers.small_run import HOSTILE, make_run
from PIL import Image

from ltloss.errors import ImageError
from ltloss.training.data.decode import open_image
from ltloss.training.data.images import ArrayImages
from ltloss.training.pages import gallery
from ltloss.training.pages.cards import THUMBNAIL_SIZE, percent, thumbnail
from ltloss.training.pages.gallery import Gallery, folder_address, write_gallery
from ltloss.training.pages.html import escape
from ltloss.training.predict.predict import Predictions, predict_folder

pytestmark = pytest.mark.slow


def make_images(folder: Path, count: int) -> Path:
    """Images in two folders, large and small ones, with names that would be markup, or an address, if not escaped."""
    rng = np.random.default_rng(0)
    for number in range(count):
        place = folder / ("a & b" if number % 2 else "plain")
        place.mkdir(parents=True, exist_ok=True)
        side = 12 if number % 3 else 300
        pixels = rng.integers(0, 256, (side, side + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"<i> {number} %2e #1'\".png")
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prediction of 30 images and a damaged one by a run whose class names are hostile."""
    base = tmp_path_factory.mktemp("gallery")
    make_run(base / "run", HOSTILE)
    images = make_images(base / "images", 30)
    (images / "<script>broken.png").write_bytes(b"")
    predict_folder(base / "run", images, base / "out", batch_size=8)
    return base / "out"


def by_hand(
    path: Path,
    probability: list[float],
    classes: list[int],
    labels: list[int] | None = None,
    class_names: tuple[str, ...] = ("one", "two", "three"),
) -> Page:
    """A gallery of the predictions given."""
    count = len(probability)
    images, names = np.zeros((count, 8, 8), dtype=np.uint8), [f"p{n}" for n in range(count)]
    source = ArrayImages(images, np.array(labels or [-1] * count), class_names, names)
    index = np.stack([np.array(classes), (np.array(classes) + 1) % len(class_names)], axis=1)
    ranked = np.stack([np.array(probability), 1 - np.array(probability)], axis=1)
    predictions = Predictions(index, ranked, np.linspace(0, 90, count))
    write_gallery(path, predictions, source, Gallery("T", "O", source.class_names), folder="previews")
    return Page(path)


def shown(page: Page) -> list[str]:
    return [image["alt"].partition(":")[0] for image in page.all("img")]


def test_page_is_well_formed_and_shows_every_image(results: Path) -> None:
    page = Page(results / "gallery.html")
    page.check()
    with (results / "predictions.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))[1:]
    assert len(rows) == 30
    descriptions = [image["alt"] for image in page.all("img")]
    for name, predicted, probability, *_ in rows:
        wanted = f"{name}: {predicted}, {percent(float(probability))}"
        uncertain = float(probability) < 0.5
        assert descriptions.count(wanted) == 1 + uncertain, wanted


def test_embedded_images_are_whole_and_small(results: Path) -> None:
    for image in Page(results / "gallery.html").all("img"):
        header, _, content = image["src"].partition(";base64,")
        assert header in {"data:image/png", "data:image/jpeg"}
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            image.load()
            assert max(image.size) <= THUMBNAIL_SIZE


def test_each_image_links_to_its_file(results: Path) -> None:
    links = [link["href"] for link in Page(results / "gallery.html").all("a") if not link["href"].startswith("#")]
    assert len({*links}) == 30
    assert all((results / unquote(link)).is_file() for link in links)


def test_hostile_names_are_text(results: Path, tmp_path: Path) -> None:
    page = by_hand(tmp_path / "g.html", [0.1, 0.9] * 7, [*range(7), *range(7)], class_names=HOSTILE)
    page.check()
    for name in HOSTILE:
        assert f"{name or '(no name)'} 2\n" in page.text  # the heading, with the number of images
    page = Page(results / "gallery.html")
    assert "<script>broken.png" in page.text
    assert "is empty (0 bytes)" in page.text


def test_least_certain_come_first_and_on_top(tmp_path: Path) -> None:
    page = by_hand(tmp_path / "g.html", [0.9, 0.3, 0.6, 0.2, 0.5], [0, 0, 2, 2, 0])
    assert shown(page) == ["p3", "p1", *("p1", "p4", "p0"), *("p3", "p2")]
    assert "class-1" not in {section.get("id") for section in page.all("section")}


def test_without_uncertain_images_the_page_says_so(tmp_path: Path) -> None:
    page = by_hand(tmp_path / "g.html", [0.9, 0.5], [0, 1])
    assert "None: every image has a probability of at least 50%" in page.text
    assert shown(page) == ["p0", "p1"]


def test_a_long_uncertain_section_says_what_it_leaves_to_the_classes(tmp_path: Path) -> None:
    page = by_hand(tmp_path / "g.html", [0.4] * 60, [0] * 60)
    assert "The 48 least certain of 60 images" in page.text
    assert len(shown(page)) == 48 + 60


def test_wrong_predictions_are_marked_where_labels_are_known(tmp_path: Path) -> None:
    page = by_hand(tmp_path / "g.html", [0.9, 0.9, 0.9], [0, 1, 1], [0, 2, 1])
    assert page.text.count("✗") == 1
    assert "✗ labelled three" in page.text
    assert "2 of 3" in page.text


def test_images_in_folders_named_like_the_classes_are_compared_with_them(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ["plain", "a & b"])
    images = make_images(tmp_path / "images", 8)
    table = predict_folder(tmp_path / "run", images, tmp_path / "out").table
    with table.open(encoding="utf-8", newline="") as stream:
        agreeing = sum(Path(row["image"]).parts[0] == row["class"] for row in csv.DictReader(stream))
    page = Page(tmp_path / "out" / "gallery.html")
    assert f"as labelled{agreeing} of 8" in page.text
    (images / "elsewhere.png").write_bytes((next(images.rglob("*.png"))).read_bytes())
    predict_folder(tmp_path / "run", images, tmp_path / "out", overwrite=True)
    assert "as labelled" not in Page(tmp_path / "out" / "gallery.html").text


def test_beyond_the_limit_previews_lie_beside_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "EMBEDDED_IMAGES", 5)
    make_run(tmp_path / "run", ["one", "two"])
    images = make_images(tmp_path / "images", 6)
    out = tmp_path / "out"
    predict_folder(tmp_path / "run", images, out)
    page = Page(out / "gallery.html")
    page.check()
    files = {image["src"] for image in page.all("img")}
    assert len(files) == 6
    assert all(image["loading"] == "lazy" for image in page.all("img"))
    (previews,) = [path for path in out.iterdir() if path.is_dir()]
    assert {f"{previews.name}/{path.name}" for path in previews.iterdir()} == files
    next(images.rglob("*.png")).unlink()
    predict_folder(tmp_path / "run", images, out, overwrite=True)
    assert not [path for path in out.iterdir() if path.is_dir()]  # five fit into the page again


def test_a_image_that_vanished_still_has_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", ["one", "two"])
    images = make_images(tmp_path / "images", 3)
    make, gone = gallery.write_gallery, next((images / "a & b").iterdir())

    def after_removal(*given: object, **named: object) -> None:
        gone.unlink()
        make(*given, **named)

    monkeypatch.setattr("ltloss.training.predict.predict.write_gallery", after_removal)
    predict_folder(tmp_path / "run", images, tmp_path / "out")
    page = Page(tmp_path / "out" / "gallery.html")
    page.check()
    with pytest.raises(ImageError) as reason:
        open_image(gone)
    assert str(reason.value) in page.text


@pytest.mark.parametrize(
    ("probability", "text"), [(1.0, "100.0%"), (0.99999, "> 99.9%"), (0.9994, "99.9%"), (0.123, "12.3%"), (0, "0.0%")]
)
def test_percent(probability: float, text: str) -> None:
    assert percent(probability) == text


def test_small_images_keep_their_pixels_and_large_ones_shrink() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    content, kind = thumbnail(Image.fromarray(pixels))
    assert kind == "png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), pixels)
    content, kind = thumbnail(Image.new("RGB", (640, 320), "teal"))
    assert (kind, Image.open(io.BytesIO(content)).size) == ("jpeg", (THUMBNAIL_SIZE, THUMBNAIL_SIZE // 2))


def test_addresses_of_folders_are_relative_and_quoted(tmp_path: Path) -> None:
    assert folder_address(tmp_path / "a b#", tmp_path / "out") == "./../a%20b%23"
    assert folder_address(tmp_path / "javascript:x", tmp_path).startswith("./javascript")


def test_escape() -> None:
    assert escape('<a href="x">\'&\x00\udcff') == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;��"


@pytest.mark.browser
@needs_chromium
def test_browser_shows_every_image_and_runs_nothing(results: Path, tmp_path: Path) -> None:
    page = Page(results / "gallery.html")
    rendered = render(results / "gallery.html", tmp_path)
    assert rendered.console == []
    assert len(rendered.found["images"]) == len(page.all("img")) >= 30
    assert all(image["width"] > 0 for image in rendered.found["images"])
    assert rendered.found["scripts"] == 0
    assert rendered.found["requests"] == []
    assert {image["from"] for image in rendered.found["images"]} == {"data"}
    assert rendered.found["overflow"] <= 0


@pytest.mark.browser
@needs_chromium
def test_browser_shows_hostile_class_names_as_text(tmp_path: Path) -> None:
    by_hand(tmp_path / "g.html", [0.1, 0.9] * 7, [*range(7), *range(7)], class_names=HOSTILE)
    rendered = render(tmp_path / "g.html", tmp_path / "profile")
    assert rendered.console == []
    assert rendered.found["scripts"] == 0
    assert rendered.found["requests"] == []
    text = " ".join(rendered.found["text"].split())
    for name in HOSTILE:
        assert f" {' '.join(name.split()) or '(no name)'} 2" in text


@pytest.mark.browser
@needs_chromium
def test_browser_shows_previews_beside_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "EMBEDDED_IMAGES", 5)
    make_run(tmp_path / "run", ["one", "two"])
    predict_folder(tmp_path / "run", make_images(tmp_path / "images", 20), tmp_path / "out")
    rendered = render(tmp_path / "out" / "gallery.html", tmp_path / "profile")
    assert rendered.console == []
    assert {image["from"] for image in rendered.found["images"]} == {"file"}
    assert all(image["width"] > 0 for image in rendered.found["images"])


@pytest.mark.browser
@needs_chromium
def test_browser_would_notice_a_bad_page(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    bad = "<img alt=a src=absent.png><img alt=b src=http://example.invalid/x.png><script>nowhere()</script>"
    page.write_text(f"<!DOCTYPE html><title>bad</title><body>{bad}</body>")
    rendered = render(page, tmp_path / "profile")
    assert [image["width"] for image in rendered.found["images"]] == [0, 0]
    assert rendered.found["scripts"] == 1
    assert rendered.found["requests"] == ["http://example.invalid/x.png"]
    assert any("nowhere is not defined" in line for line in rendered.console)
