"""The names that stood in ``ltloss.distributed`` in 0.1."""

from __future__ import annotations

import pytest
from helpers.refusals import refused, warned

from ltloss import distributed, interop


@pytest.mark.parametrize("name", interop.__all__)
def test_the_former_place_warns_and_works(name: str) -> None:
    with warned(f"ltloss.distributed.{name}", f"ltloss.interop.{name}") as caught:
        assert getattr(distributed, name) is getattr(interop, name)
    assert caught[0].filename == __file__


def test_other_names_are_still_missing() -> None:
    with refused("ltloss.distributed", "import_caffe", error=AttributeError):
        distributed.import_caffe  # noqa: B018
