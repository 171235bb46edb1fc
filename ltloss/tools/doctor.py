"""Report the installation, which implementation runs on which device, and whether the loss is right there.

``ltloss doctor`` and ``python -m ltloss.tools.doctor`` print the report. It needs only the core's requirements.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from ltloss_kernels.config.assembler import assembler, risk
from ltloss_kernels.config.precision import float32_products
from torch import Tensor

from ltloss import functional, reference
from ltloss.errors import in_one_line
from ltloss.runtime import current_backend

Row = tuple[str, str]

_TRAIN = "pip install 'ltloss[train]'"
_EXPORT = "pip install 'ltloss[export]'"
_OPTIONAL = (  # distribution, what it is for, how to get it
    ("triton", "the GPU kernels", "pip install triton (Linux)"),
    ("pillow", "reading images", _TRAIN),
    ("safetensors", "checkpoints", _TRAIN),
    ("matplotlib", "the report page", _TRAIN),
    ("scikit-learn", "the digits data set", _TRAIN),
    ("tqdm", "progress bars", _TRAIN),
    ("onnx", "files for ONNX", _EXPORT),
    ("onnxscript", "files for ONNX", _EXPORT),
    ("tensorboard", "--tensorboard", "pip install 'ltloss[tensorboard]'"),
    ("timm", "--backbone timm:NAME", "pip install timm"),
)

# Largest relative error of float32 against float64: some hundred roundings of 6e-8. A wrong formula is off by far more.
_TOLERANCE = 2e-5


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _versions() -> Iterator[Row]:
    yield "ltloss", _installed("ltloss") or "not installed as a package (running from its source)"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", platform.platform()
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'not built in'})"
    yield "numpy", _installed("numpy") or "not installed: needed always, pip install numpy"
    for name, purpose, remedy in _OPTIONAL:
        yield name, _installed(name) or f"not installed: needed for {purpose}, {remedy}"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine() or "unknown"


def _devices() -> Iterator[Row]:
    threads = torch.get_num_threads()
    using = f"PyTorch uses {threads} thread{'s' * (threads != 1)}"
    yield "CPU", f"{_cpu_model()}, {os.cpu_count()} logical cores, {using}"
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        memory = f"{device.total_memory / 2**30:.1f} GiB"
        yield f"cuda:{number}", f"{device.name}, compute capability {device.major}.{device.minor}, {memory}"
    if not torch.cuda.is_available():
        reason = "no usable device" if torch.version.cuda else "this PyTorch is built without CUDA"
        yield "CUDA", f"none: {reason}"


def _assemblers() -> Iterator[Row]:
    """The assembler of each GPU's architecture here; without a GPU, that of Hopper."""
    devices = range(torch.cuda.device_count())
    found = {10 * major + minor for major, minor in (torch.cuda.get_device_capability(device) for device in devices)}
    for arch in sorted(found) or [90]:
        one = assembler(arch)
        name = f"for sm_{arch}" + ("" if found else " (no GPU here)")
        if one is None:
            yield name, "none: Triton brings it (Linux)"
            continue
        yield name, f"ptxas {one.version}, {one.path}"
        if warning := risk(arch, one.version):
            yield "", f"{'WARNING' if found else 'remark'}: {warning}"


def _implementations() -> Iterator[Row]:
    backend, chunked = current_backend(), "chunked PyTorch"
    fixed = {"reference": "the dense reference", "triton": "the kernels, and an error where they cannot run"}
    yield "in force", f"backend {backend!r}" + (" (LTLOSS_BACKEND)" if "LTLOSS_BACKEND" in os.environ else "")
    yield "CPU tensors", fixed.get(backend, f"{chunked}: the kernels are for GPUs")
    if backend == "torch":
        cuda = f"{chunked}: the backend in force says so"
    elif _installed("triton") is None:
        cuda = f"{chunked}: triton is not installed"
    else:
        cuda = f"the kernels where they serve, else {chunked}"
    yield "CUDA tensors", fixed.get(backend, cuda)


def _relative_error(value: Tensor, expected: Tensor) -> float:
    difference = (value.detach().double().cpu() - expected.detach().double().cpu()).abs().max()
    return float(difference / expected.detach().double().abs().max().cpu())


def self_check(device: torch.device | str) -> dict[str, float]:
    """Errors of the margin loss, its gradients and the nearest-prototype search on ``device`` against float64.

    Each error is the largest difference, divided by the largest magnitude in the reference.
    """
    generator = torch.Generator().manual_seed(0)
    samples, classes, size = 96, 1500, 64
    features = torch.randn(samples, size, generator=generator)
    prototypes = torch.randn(classes, size, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator)
    margin = 0.2 + 0.5 * torch.rand(classes, generator=generator)
    prior = torch.rand(classes, generator=generator).log()

    x, w = features.to(device).requires_grad_(), prototypes.to(device).requires_grad_()
    value = functional.margin_cross_entropy(
        x, w, labels.to(device), angular_margin=margin.to(device), log_prior=prior.to(device)
    )
    gradients = torch.autograd.grad(value, (x, w))
    x64, w64 = features.detach().double().requires_grad_(), prototypes.detach().double().requires_grad_()
    expected = reference.margin_cross_entropy(
        x64, w64, labels, angular_margin=margin.double(), log_prior=prior.double()
    )
    gradients64 = torch.autograd.grad(expected, (x64, w64))
    nearest = functional.nearest_prototype(w.detach()).cosine, reference.nearest_prototype(w64.detach()).cosine
    return {
        "loss": _relative_error(value, expected),
        "gradient of the features": _relative_error(gradients[0], gradients64[0]),
        "gradient of the prototypes": _relative_error(gradients[1], gradients64[1]),
        "nearest prototype": _relative_error(*nearest),
    }


def _print_section(title: str, rows: Iterator[Row]) -> None:
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<28}{value}")


def _check_rows(device: str, failures: list[str]) -> Iterator[Row]:
    try:
        with float32_products("highest"):  # TF32, which some containers allow, is off by more than rounding
            errors = self_check(device)
    except Exception as broken:  # any failure is a finding of this report
        failures.append(device)
        yield "failed", f"{type(broken).__name__}: {in_one_line(broken)}"
        return
    for name, error in errors.items():
        good = error <= _TOLERANCE  # NaN is not
        failures += [] if good else [device]
        yield name, f"relative error {error:.1e}  {'ok' if good else f'FAILED, at most {_TOLERANCE:.0e} is rounding'}"


def main() -> int:
    """Print the report; return 0, or 2 if the loss differs from the reference on a device."""
    print("ltloss doctor")
    _print_section("Versions", _versions())
    _print_section("Devices", _devices())
    _print_section("Assembler of the kernels", _assemblers())
    _print_section("Implementation", _implementations())
    failures: list[str] = []
    for device in ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]:
        _print_section(f"Self-check on {device}, against the float64 reference", _check_rows(device, failures))
    if failures:
        print(f"\nThe self-check failed on {', '.join(dict.fromkeys(failures))}: do not trust results from there.")
        return 2
    print("\nAll is well.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
