"""``python -m benchmarks.host_time``: the host time of a training step, measured on a CPU; needs no GPU.

Triton runs as it would for a GPU, but nothing is compiled, its driver launches nothing, and the library's products are
left out. What remains is the time until a GPU has all of its work: Python, PyTorch's dispatcher, and Triton's own path
from a call to a launch. The driver's time for a launch is not included.

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

import ltloss
from benchmarks.kernel_report.layouts import steps
from benchmarks.kernel_report.record import as_on_a_gpu

Launch = tuple[Any, ...]  # the specialisation, the grid, and all arguments but tensors

_DESCRIPTOR = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [128, 64], "fp4_padded": False}


class _Driver:
    """A Triton driver for a GPU of compute capability 9.0 that does nothing."""

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
        """Replaces a compiled kernel: it makes the descriptors of its matrices as a real one does, and nothing else."""

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
    """Within the block, kernels take CPU tensors and every launch ends before the device; ``told`` receives each."""
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


def differences() -> list[str]:
    """Descriptions of the kept launches that differ from Triton's choice for the same arguments."""
    from ltloss_kernels import launching

    launches: list[Launch] = []

    def launched(step: Callable[[], None]) -> list[Launch]:
        launches.clear()
        step()
        return list(launches)

    tried = list(steps())
    with no_device(launches.append):
        chosen = []
        for step in tried:
            launching.forget()
            chosen.append(launched(step))
        launching.forget()
        for step in tried:
            step()
        kept = [launched(step) for step in tried]
    return [
        f"problem {number}: {there} instead of {here}"
        for number, (one, other) in enumerate(zip(chosen, kept, strict=True))
        for here, there in zip(one, other, strict=True)
        if here != there
    ]


def microseconds(n: int, c: int, d: int, *, keep: bool = True, rounds: int = 21, calls: int = 20) -> float:
    """Median host time of a step with bfloat16 features and prototypes, in microseconds.

    ``keep`` False: every launch goes through Triton.
    """
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
