"""What a comparison takes for the same data."""

import numpy as np
from helpers.toys import toy_images

from ltloss.training.comparison.jobs import fingerprint
from ltloss.training.data.images import ArrayImages


def test_the_checksum_is_that_of_the_images_not_of_how_they_lie_in_memory() -> None:
    images, labels = toy_images(4)
    found = set()
    for pixels in (images, np.asfortranarray(images), images[::-1][::-1]):
        found.add(fingerprint(ArrayImages(pixels, labels, ("a", "b", "c"), [""] * 12)))
    assert len(found) == 1
    assert found != {fingerprint(ArrayImages(images ^ 1, labels, ("a", "b", "c"), [""] * 12))}
    assert found != {fingerprint(ArrayImages(images, labels[::-1], ("a", "b", "c"), [""] * 12))}
