from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
from helpers.refusals import missing
from ltloss_kernels.config.precision import float32_products, product_precision

import ltloss
from ltloss import functional
from ltloss.tools import doctor


def test_a_sound_installation_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    for part in ("python", "torch", "numpy", "safetensors", "CPU tensors", "CUDA tensors", "All is well"):
        assert part in printed
    assert printed.count("relative error") == 4 * (1 + torch.cuda.device_count())


@pytest.mark.parametrize(("threads", "words"), [(1, "1 thread"), (2, "2 threads")])
def test_the_threads_are_counted(threads: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ((name, value), *_) = doctor._devices()
    assert name == "CPU"
    assert not missing(value, words)


@pytest.mark.parametrize(
    ("version", "old"), [("12.8", True), ("13.0", True), ("13.1", False), ("14.0", False)], ids=lambda given: str(given)
)
@pytest.mark.parametrize(("gpus", "word"), [(1, "WARNING"), (0, "remark")], ids=["Hopper", "no GPU"])
def test_the_assembler_is_named_and_an_old_one_warned_of_where_a_gpu_needs_it(
    gpus: int, word: str, version: str, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from ltloss_kernels.config.assembler import Assembler

    monkeypatch.setattr(doctor, "assembler", lambda arch: Assembler("/usr/bin/ptxas", version))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    printed = "\n".join(map(" ".join, doctor._assemblers()))
    assert not missing(printed, "sm_90", version, "/usr/bin/ptxas")
    said = [word for word in ("WARNING", "remark", "TRITON_PTXAS_PATH=") if word in printed]
    assert said == ([word, "TRITON_PTXAS_PATH="] if old else [])


def test_the_self_check_compares_with_float64() -> None:
    errors = doctor.self_check("cpu")
    assert set(errors) == {"loss", "gradient of the features", "gradient of the prototypes", "nearest prototype"}
    assert all(0 < error < 2e-5 for error in errors.values())


def test_the_self_check_forms_float32_products_whatever_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may allow TF32, in which a sound GPU is off by more than rounding."""
    seen = []

    def noted(*given: Any, **named: Any) -> torch.Tensor:
        seen.append(product_precision())
        return margin_cross_entropy(*given, **named)

    margin_cross_entropy = functional.margin_cross_entropy
    monkeypatch.setattr(functional, "margin_cross_entropy", noted)
    with float32_products("high"):
        assert doctor.main() == 0
        assert product_precision() == "tf32"
    assert set(seen) == {"ieee"}


def distorted(function: Callable[..., torch.Tensor], by: float) -> Callable[..., torch.Tensor]:
    return lambda *given, **named: function(*given, **named) * by


@pytest.mark.parametrize("by", [1.001, float("nan")])
def test_a_wrong_loss_fails(by: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(functional, "margin_cross_entropy", distorted(functional.margin_cross_entropy, by))
    assert doctor.main() == 2
    printed = capsys.readouterr().out
    assert printed.count("FAILED") >= 3
    assert "The self-check failed on cpu" in printed


def test_an_error_in_the_self_check_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("the kernel\ndid not compile")

    monkeypatch.setattr(functional, "margin_cross_entropy", breaks)
    assert doctor.main() == 2
    assert "RuntimeError: the kernel did not compile" in capsys.readouterr().out


def without(monkeypatch: pytest.MonkeyPatch, *absent: str) -> None:
    """The doctor does not find these distributions."""
    installed = doctor.version

    def version(name: str) -> str:
        if name in absent:
            raise PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(doctor, "version", version)


def test_what_is_not_installed_says_what_it_is_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "triton", "matplotlib", "safetensors")
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert "not installed: needed for the report page, pip install 'ltloss[train]'" in printed
    assert "not installed: needed for the GPU kernels" in printed


def test_without_triton_cuda_tensors_take_the_chunked_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "triton")
    assert doctor.main() == 0
    assert "chunked PyTorch: triton is not installed" in capsys.readouterr().out


def test_the_backend_in_force_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with ltloss.use_backend("reference"):
        assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert "backend 'reference'" in printed
    assert printed.count("the dense reference") == 2


def test_it_needs_no_extras() -> None:
    """Neither Triton nor anything of the train extra is imported, directly or indirectly."""
    program = (
        "import sys\n"
        "for name in ('triton', 'matplotlib', 'PIL', 'safetensors', 'sklearn', 'tqdm'):\n"
        "    sys.modules[name] = None\n"
        "from ltloss.tools import doctor\n"
        "sys.exit(doctor.main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert "All is well" in result.stdout
