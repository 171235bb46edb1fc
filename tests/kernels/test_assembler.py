"""Which assembler serves which GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from ltloss_kernels.config.assembler import assembler, assemblers, risk, variable


@pytest.mark.parametrize(("arch", "name"), [(80, "TRITON_PTXAS_PATH"), (90, "TRITON_PTXAS_PATH")])
def test_triton_takes_the_assembler_that_the_variable_names(
    arch: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = assemblers()
    if len(known) < 2:
        pytest.skip("this Triton brings one assembler")
    assert variable(arch) == name
    for one in known:
        monkeypatch.setenv(variable(arch), one.path)
        assert assembler(arch) == one


def test_those_that_triton_brings_are_there() -> None:
    assert all(Path(one.path).exists() and one.version.count(".") == 1 for one in assemblers())


def test_only_hopper_is_warned_of_an_old_one() -> None:
    assert risk(90, "12.8")
    assert risk(90, "13.0")
    assert not any(risk(arch, "12.8") for arch in (80, 100))
    assert not risk(90, "13.1")
