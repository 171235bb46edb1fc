from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from ltloss.training.data.batches import augment, batches
from ltloss.training.data.images import ArrayImages


def numbered(count: int) -> ArrayImages:
    """Images whose every pixel is their number."""
    images = np.repeat(np.arange(count, dtype=np.uint8), 16).reshape(count, 4, 4)
    return ArrayImages(images, np.arange(count), ("a", "b"), [str(i) for i in range(count)])


def test_every_image_once_in_the_given_order_with_its_label() -> None:
    order = np.random.default_rng(0).permutation(23)
    found = list(batches(numbered(23), 5, order))
    assert torch.cat([batch.labels for batch in found]).tolist() == order.tolist()
    assert torch.cat([batch.images[:, 0, 0, 0] for batch in found]).tolist() == order.tolist()


def test_no_batch_of_one_is_left_over() -> None:
    assert [len(batch.labels) for batch in batches(numbered(17), 16)] == [9, 8]
    assert [len(batch.labels) for batch in batches(numbered(3), 2)] == [3]
    assert list(batches(numbered(0), 16)) == []


def test_an_error_while_reading_is_raised_to_the_caller() -> None:
    with pytest.raises(IndexError):
        list(batches(numbered(3), 2, np.array([0, 99])))


def test_the_reading_thread_ends_when_the_caller_stops_early() -> None:
    running = batches(numbered(200), 1)
    next(running)
    readers = [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
    assert readers
    running.close()  # type: ignore[attr-defined]
    for thread in readers:
        thread.join(timeout=5)
        assert not thread.is_alive()


@pytest.mark.parametrize("kind", ["crop", "crop-flip"])
@pytest.mark.parametrize("side", [8, 32])
def test_augmented_images_are_shifted_and_mirrored_originals(kind: str, side: int) -> None:
    images = torch.randint(1, 256, (40, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(0))
    result = augment(images, kind, torch.Generator().manual_seed(1))
    pad = side // 8
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    shifts, mirrored = set(), 0
    for i in range(len(images)):
        candidates = {
            (top, left, flip): padded[i, :, top : top + side, left : left + side].flip(2 if flip else ())
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            for flip in (False, True)
        }
        (match,) = (key for key, candidate in candidates.items() if torch.equal(candidate, result[i]))
        shifts.add(match[:2])
        mirrored += match[2]
    assert len(shifts) > 5
    assert 8 < mirrored < 32 if kind == "crop-flip" else mirrored == 0


def test_augmentation_repeats_with_its_generator_and_none_changes_nothing() -> None:
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    first, again = (augment(images, "crop-flip", torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert augment(images, "none", torch.Generator()) is images
