"""``python -m benchmarks.host_time``: what a training step costs the host, measured on a CPU; needs no GPU.

Triton runs as it would for a GPU, but its driver launches nothing, nothing is compiled, and the library's products are
left out. What remains is the time until a GPU has all of its work: Python, PyTorch's dispatcher, and Triton's own path
from a call to a launch. A driver's own time for a launch is not in it.

``--check`` compares, for many layouts of the inputs, the launches that are kept (``ltloss_kernels.launching``) with
those that Triton chooses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ltloss
from benchmarks.kernel_report.record import as_on_a_gpu
from ltloss import functional
from ltloss.optim import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD

Launch = tuple[Any, ...]  # the specialisation, the grid, and all arguments but tensors

_DESCRIPTOR = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [128, 64], "fp4_padded": False}


class _Driver:
    """A GPU of compute capability 9.0 that does nothing."""

    def __init__(self) -> None:
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def fill_tma_descriptor_tiled(self, *arguments: Any) -> int:
        return 0


def _kernel_class(told: Callable[[Launch], None] | None) -> Any:
    from triton.backends.nvidia.driver import wrap_handle_tensordesc
    from triton.compiler import CompiledKernel

    class Kernel(CompiledKernel):  # type: ignore[misc, no-any-unimported]
        """Stands for a compiled kernel: it describes its matrices as a real one does, and ends there."""

        def __init__(self, fn: Any, key: Any, signature: dict[str, str]) -> None:
            self.key, self.function, self.packed_metadata = (fn.__name__, key), None, None
            descriptors = [one for one in signature.values() if str(one).startswith("tensordesc")]
            self._launch = wrap_handle_tensordesc(lambda *_: None, signature, [_DESCRIPTOR] * len(descriptors))

        def _init_handles(self) -> None: ...

        def launch_metadata(self, *_: Any) -> None: ...

        @property
        def run(self) -> Callable[..., None]:
            return self._start

        def _start(self, x: int, y: int, z: int, *arguments: Any) -> None:
            values = arguments[6:]  # behind the stream, the function and what hooks are told
            self._launch(*arguments[:6], values)
            if told is not None:
                told((self.key, (x, y, z), tuple(one for one in values if isinstance(one, int | float | str | None))))

    return Kernel


@contextmanager
def no_device(told: Callable[[Launch], None] | None = None) -> Iterator[None]:
    """Within the block kernels take CPU tensors, and every launch ends before the device; ``told`` gets each."""
    import triton
    from ltloss_kernels import cosine_logsumexp_gradients, launching
    from triton.runtime.jit import JITFunction

    kernel_class = _kernel_class(told)

    def compiled(self: Any, key: Any, signature: Any, device: int, *_: Any) -> Any:
        kernel = self.device_caches[device][0][key] = kernel_class(self, key, signature)
        return kernel

    launching.forget()
    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver()),
        mock.patch.object(JITFunction, "_do_compile", compiled),
        as_on_a_gpu(90),
        mock.patch.object(cosine_logsumexp_gradients, "multiply_add"),
        ltloss.use_backend("triton"),
    ):
        yield
    launching.forget()


def _matrix(rows: int, width: int, dtype: torch.dtype, layout: str) -> Tensor:
    if layout == "offset":  # rows that start at no multiple of 16 bytes
        return torch.ones(rows * width + 1, dtype=dtype)[1:].view(rows, width)
    if layout == "strided":
        return torch.ones(rows, 2 * width, dtype=dtype)[:, ::2]
    return torch.ones(rows, width, dtype=dtype)


def _labels(n: int, dtype: torch.dtype, layout: str) -> Tensor:
    return {"": torch.zeros(n, dtype=dtype), "strided": torch.zeros(2 * n, dtype=dtype)[::2]}[layout]


def problems() -> Iterator[Callable[[], None]]:
    """Steps that differ in one thing each: what Triton specialises a kernel for, and what the launchers decide on."""
    half, single = torch.bfloat16, torch.float32
    usual: dict[str, Any] = {"n": 40, "c": 300, "d": 64, "x": (half, ""), "w": (half, ""), "y": (torch.int64, "")}
    changes: list[dict[str, Any]] = [{}, *({size: value} for size in "ncd" for value in (1, 16, 17, 48, 129))]
    changes += [{"x": (dtype, kind)} for dtype in (half, single, torch.float16) for kind in ("", "offset", "strided")]
    changes += [{"w": (dtype, kind)} for dtype in (half, single, torch.float16) for kind in ("", "offset", "strided")]
    changes += [{"x": (kind, ""), "w": (kind, "")} for kind in (single, torch.float16)]
    changes += [{"y": (dtype, kind)} for dtype in (torch.int32, torch.int64) for kind in ("", "strided")]
    vector = torch.linspace(0.1, 0.5, 300)
    options: list[dict[str, Any]] = [
        {"ignore_index": 1},
        {"ignore_index": 16},
        {"scale": 512.0},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"normalize_features": False},
        {"angular_margin": 0.3},
        {"angular_margin": vector},
        {"cosine_margin": torch.linspace(0, 1, 301)[1:]},
        {"log_prior": vector},
        {"log_prior": vector, "label_smoothing": 0.1},
        {"class_weight": vector},
        {"angular_margin": 0.3, "beyond_pi": "arcface"},
        {"angular_margin": 0.3, "margin_gradient": "straight_through"},
    ]
    for change in changes:
        yield lambda given={**usual, **change}: _step(**given)  # type: ignore[misc]
    for chosen in options:
        yield lambda chosen=chosen: _step(**usual, options=chosen)  # type: ignore[misc]
    for needs in ((True, False), (False, True)):
        yield lambda needs=needs: _step(**usual, needs=needs)  # type: ignore[misc]
    yield lambda: _step(**usual, options={"reduction": "none"}, upstream=torch.ones(80)[::2])
    yield from _updates()


def _updates() -> Iterator[Callable[[], None]]:
    """Steps that move the prototypes, which differ in one thing each."""
    half: dict[str, Any] = {"rounding": "stochastic"}
    rate = torch.full((), 0.1)
    changes: list[dict[str, Any]] = [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"max_class_norm": 1.0},
    ]
    changes += [
        {"max_class_norm": 1.0},
        {"seed": 1 << 40},
        {"seed": 1},
        {"lr": rate},
        {"rounding": "kahan"},
        {"rounding": "nearest"},
    ]
    changes += [{"momentum": 0.9, "state_dtype": torch.bfloat16}]
    for change in changes:
        yield lambda change=change: _moving(PrototypeSGD, torch.bfloat16, {**half, **change})  # type: ignore[misc]
    for kind in (PrototypeSGD, PrototypeAdamW, PrototypeAdagrad):
        for dtype, options in ((torch.bfloat16, half), (torch.float32, {})):
            for sizes in ((40, 300, 64), (600, 300, 64), (40, 17, 20), (40, 300, 19)):
                yield lambda args=(kind, dtype, options, *sizes): _moving(*args)  # type: ignore[misc]


def _moving(
    kind: Callable[..., Any], dtype: torch.dtype, options: dict[str, Any], n: int = 40, c: int = 300, d: int = 64
) -> None:
    head = ltloss.ArcFaceLoss(c, d).to(dtype)
    optimizer = kind(head, **options)
    head(_matrix(n, d, torch.bfloat16, "").requires_grad_(), _labels(n, torch.int64, "")).backward()
    optimizer.step()


def _step(
    n: int,
    c: int,
    d: int,
    x: tuple[torch.dtype, str],
    w: tuple[torch.dtype, str],
    y: tuple[torch.dtype, str],
    options: dict[str, Any] | None = None,
    needs: tuple[bool, bool] = (True, True),
    upstream: Tensor | None = None,
) -> None:
    features, prototypes = _matrix(n, d, *x).requires_grad_(needs[0]), _matrix(c, d, *w).requires_grad_(needs[1])
    loss = functional.margin_cross_entropy(features, prototypes, _labels(n, *y), **(options or {}))
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)


def differences() -> list[str]:
    """Where a kept launch is not the one that Triton chooses for these arguments; empty if all are."""
    from ltloss_kernels import launching

    launches: list[Launch] = []

    def launched(step: Callable[[], None]) -> list[Launch]:
        launches.clear()
        step()
        return list(launches)

    steps = list(problems())
    with no_device(launches.append):
        chosen = []
        for step in steps:
            launching.forget()
            chosen.append(launched(step))
        launching.forget()
        for step in steps:
            step()
        kept = [launched(step) for step in steps]
    return [
        f"problem {number}: {there} instead of {here}"
        for number, (one, other) in enumerate(zip(chosen, kept, strict=True))
        for here, there in zip(one, other, strict=True)
        if here != there
    ]


def microseconds(n: int, c: int, d: int, *, keep: bool = True, rounds: int = 21, calls: int = 20) -> float:
    """Median host time of a step with bfloat16 features and prototypes; ``keep`` False: every launch through Triton."""
    from ltloss_kernels import launching

    features = torch.randn(n, d, dtype=torch.bfloat16, requires_grad=True)
    head, labels = ltloss.ArcFaceLoss(c, d).to(torch.bfloat16), torch.randint(c, (n,))

    def step() -> None:
        features.grad = head.weight.grad = None
        head(features, labels).backward()
        if not keep:
            launching.forget()

    times = []
    with no_device():
        step()
        for _ in range(rounds):
            start = time.perf_counter()
            for _ in range(calls):
                step()
            times.append((time.perf_counter() - start) / calls)
    return 1e6 * statistics.median(times)


def main() -> int:
    """Print the host time of small and large heads, or check the kept launches; 1 if one differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare kept launches with those that Triton chooses")
    if parser.parse_args().check:
        found = differences()
        print(*found, f"{len(found)} kept launches differ from Triton's choice", sep="\n")
        return 1 if found else 0
    torch.set_num_threads(1)
    for shape in ((256, 1000, 512), (256, 100_000, 512)):
        kept, fresh = microseconds(*shape), microseconds(*shape, keep=False)
        print(f"{'x'.join(map(str, shape))}: {kept:.0f} us a step; {fresh:.0f} us with every launch through Triton")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
