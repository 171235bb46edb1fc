from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ltloss.training.data.randaugment import LEVEL, OPERATIONS, rand_augment


def _after(name: str, pixels: np.ndarray, level: float = LEVEL) -> np.ndarray:
    return np.asarray(OPERATIONS[name](Image.fromarray(pixels.astype(np.uint8)), level))


def _generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


GREYS = np.array([[0, 100, 178], [179, 180, 255]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("identity", GREYS),
        ("solarize", [[0, 100, 178], [76, 75, 0]]),  # from 256·(1 − 0.3) = 179 on: 255 − v
        ("posterize", [[0, 100, 178], [178, 180, 254]]),  # 8 − 4·0.3, rounded: 7 bits
        ("color", GREYS),  # grey has none
        ("autocontrast", GREYS),  # reaches from 0 to 255 already
    ],
)
def test_what_becomes_of_greys(name: str, expected: list[list[int]]) -> None:
    assert _after(name, GREYS).tolist() == np.asarray(expected).tolist()


def test_brightness_and_contrast_take_either_direction() -> None:
    plain = np.array([[100, 200]])
    assert _after("brightness", plain, -LEVEL).tolist() == [[73, 146]]  # times 1 − 0.9·0.3
    assert _after("brightness", plain).tolist() == [[127, 254]]
    assert _after("contrast", plain, -LEVEL).tolist() == [[113, 186]]  # about the mean, 150


def test_moves_are_moves() -> None:
    """150/331 of 20 pixels times 0.3: three; 0.3 · 0.3 of a side: a pixel for every eleven rows from the middle."""
    image = np.arange(400).reshape(20, 20) % 251
    for name, axis in (("translate-x", 1), ("translate-y", 0)):
        for sign in (1, -1):
            expected = np.roll(image, -3 * sign, axis)
            at = np.arange(17, 20) if sign > 0 else np.arange(3)
            expected[(slice(None), at) if axis else at] = 0
            assert np.array_equal(_after(name, image, sign * LEVEL), expected), (name, sign)
    line = np.zeros((21, 21))
    line[:, 10] = 255
    tops = {sign: _after("shear-x", line, sign * LEVEL)[0].argmax() for sign in (1, -1)}
    assert tops == {1: 11, -1: 9}
    assert _after("shear-x", line)[20].argmax() == 9
    assert np.array_equal(_after("shear-y", line.T), _after("shear-x", line).T)
    turned = _after("rotate", line)  # 9°: 1.6 pixels at the ends
    assert {int(turned[1].argmax()), int(turned[19].argmax())} == {9, 11}


@pytest.mark.parametrize("channels", [1, 3])
def test_its_generator_decides_everything(channels: int) -> None:
    images = torch.randint(0, 256, (64, channels, 12, 10), dtype=torch.uint8)
    first, again = rand_augment(images, _generator()), rand_augment(images, _generator(), workers=4)
    assert torch.equal(first, again)
    assert (first.shape, first.dtype) == (images.shape, torch.uint8)
    assert not torch.equal(first, rand_augment(images, _generator(8)))
    untouched = sum(torch.equal(a, b) for a, b in zip(first, images, strict=True))
    assert untouched < 32


def test_every_operation_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, float]] = []
    for name in list(OPERATIONS):
        monkeypatch.setitem(OPERATIONS, name, lambda image, level, name=name: drawn.append((name, level)) or image)
    rand_augment(torch.zeros(200, 1, 4, 4, dtype=torch.uint8), _generator())
    assert len(drawn) == 400
    assert {name for name, _ in drawn} == set(OPERATIONS)
    assert {round(level, 6) for _, level in drawn} == {-0.3, 0.3}
    most = max(sum(name == other for other, _ in drawn) for name in OPERATIONS)
    assert most < 60
