"""The assembler (ptxas) behind Triton's compiler: which one is used, and which versions are known to be wrong."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Assembler", "assembler", "assemblers", "risk", "variable"]

_HOPPER, _BLACKWELL = 90, 100
_SOUND_ON_HOPPER = (13, 1)


class Assembler(NamedTuple):
    """The path of a ptxas program, and its version, for instance "12.8"."""

    path: str
    version: str


def variable(arch: int) -> str:
    """The environment variable that names another assembler for this compute capability (90 for 9.0)."""
    return "TRITON_PTXAS_BLACKWELL_PATH" if arch >= _BLACKWELL else "TRITON_PTXAS_PATH"


def assembler(arch: int) -> Assembler | None:
    """The assembler that Triton uses for this compute capability; None without Triton or without an assembler."""
    return _found("ptxas_blackwell" if arch >= _BLACKWELL else "ptxas")


def assemblers() -> list[Assembler]:
    """All assemblers that come with Triton, one of each version."""
    found = [one for name in ("ptxas", "ptxas_blackwell") if (one := _found(name)) is not None]
    return list({one.version: one for one in found}.values())


def _found(name: str) -> Assembler | None:
    try:
        from triton import knobs

        tool = getattr(knobs.nvidia, name)
        return Assembler(tool.path, tool.version)
    except (ImportError, AttributeError, RuntimeError):  # without Triton, without its NVIDIA part, without the program
        return None


def risk(arch: int, version: str) -> str:
    """A warning about this version on this compute capability, with a remedy; empty if nothing is known against it."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if arch != _HOPPER or numbers >= _SOUND_ON_HOPPER:
        return ""
    newer = [one for one in assemblers() if not risk(arch, one.version)]
    remedy = f"; set {variable(arch)}={newer[0].path} ({newer[0].version})" if newer else ""
    # flash-linear-attention, issue 1262: wrong results and an invalid shared write with 12.8, none with 13.1.
    return f"ptxas before 13.1 gave wrong results on Hopper in another project{remedy}"
