"""The names that stood in ``ltloss.distributed`` in 0.1."""

from __future__ import annotations

import pytest

from ltloss import distributed, interop


@pytest.mark.parametrize("name", interop.__all__)
def test_the_former_place_warns_and_works(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"ltloss\.interop\.{name}") as caught:
        assert getattr(distributed, name) is getattr(interop, name)
    assert caught[0].filename == __file__


def test_other_names_are_still_missing() -> None:
    with pytest.raises(AttributeError, match="import_caffe"):
        distributed.import_caffe  # noqa: B018
