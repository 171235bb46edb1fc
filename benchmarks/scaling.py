"""Scaling of class-parallel training over ranks, its traffic against the least possible, and `ltloss plan`'s error.

    python -m benchmarks.scaling                                   # 1, 2 and 4 ranks on this machine's cores
    torchrun --nproc-per-node 8 -m benchmarks.scaling --dtype bfloat16 --classes 1000000   # one GPU per rank

Without torchrun it first measures this machine's rates (product, copy, gloo) and writes them for
`ltloss plan --device benchmarks/results/scaling-rates.json`. Then it measures each case in fresh processes and writes
benchmarks/results/scaling.csv: seconds of a step (forward, backward, SGD with momentum), bytes that a rank sends by the
collectives that were called, the least that any method would send, and the seconds that the plan predicts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import RESULTS, cpu_name, interleaved, stamp, write_rows
from ltloss import ArcFaceLoss
from ltloss._files import write_file
from ltloss.distributed import class_mesh, parallelize
from ltloss.tools.plan import DEVICES, Device, HeadConfig, make_plan

RATES = RESULTS / "scaling-rates.json"
ROUNDS, WARM_UP = 7, 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# On two cores: what one rank alone does in about a second.
BATCH, DIM, STRONG, WEAK = 256, 256, 40_000, 20_000
MESHES = ((1, 1), (2, 1), (4, 1), (4, 2))  # ranks, and of them data-parallel ones
CALIBRATION = HeadConfig(30_000, DIM, BATCH, 1, dtype="float32")


class Traffic(TorchDispatchMode):
    """Counts the bytes that a rank sends, if each c10d collective that is called sends as little as it can (a ring)."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.sent = ranks, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name, others = func._opname, self.ranks - 1
            first = args[1] if "base" in name else args[0]
            size = sum(t.numel() * t.element_size() for t in (first if isinstance(first, Sequence) else [first]))
            if "allgather" in name or "all_gather" in name:
                self.sent += others * size
            elif "reduce_scatter" in name:
                self.sent += others / self.ranks * size
            elif "allreduce" in name:
                self.sent += 2 * others / self.ranks * size
            else:
                raise RuntimeError(f"how many bytes does {name} send?")
        return func(*args, **(kwargs or {}))


def least_bytes(p: HeadConfig, width: int) -> float:
    """The least bytes that a rank sends in a step: rows to all ranks, gradients back, and two N-vectors reduced.

    ``width``: bytes of a feature's entry.
    """
    share = (p.gpus - 1) / p.gpus
    return share * p.batch * (2 * p.embedding_size * width + 8) + 2 * share * p.batch * 8


def step_of(p: HeadConfig, device: torch.device) -> Callable[[], None]:
    """A training step of the head on this rank, as a function."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    generator = torch.Generator().manual_seed(rank)
    rows = p.batch // ranks
    features = torch.randn(rows, p.embedding_size, generator=generator).to(device, DTYPES[p.dtype]).requires_grad_()
    labels = torch.randint(p.classes, (rows,), generator=generator).to(device)
    head = parallelize(ArcFaceLoss(p.classes, p.embedding_size, device="meta"), class_mesh(p.data), capacity=rows)
    optimizer = torch.optim.SGD([head.weight], lr=0.1, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        features.grad = None
        torch.autograd.backward(head(features, labels))
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def measured(p: HeadConfig, device: torch.device) -> dict[str, float]:
    """Median seconds of a step, and the bytes that this rank sends in one."""
    step = step_of(p, device)
    seconds = []
    for number in range(WARM_UP + ROUNDS):
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        step()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    with Traffic(p.gpus) as traffic:
        step()
    return {"seconds": statistics.median(seconds), "sent": traffic.sent}


def row(kind: str, p: HeadConfig, found: Mapping[str, float], device: Device | None) -> dict[str, Any]:
    """One line of the table."""
    least = least_bytes(p, DTYPES[p.dtype].itemsize)
    values: dict[str, Any] = {"kind": kind, "ranks": p.gpus}
    values |= {name: getattr(p, name) for name in ("data", "batch", "classes")}
    values |= {
        "dim": p.embedding_size,
        "dtype": p.dtype,
        "seconds": f"{found['seconds']:.5f}",
        "sent_bytes": round(found["sent"]),
        "least_bytes": round(least),
    }
    values["sent_over_least"] = f"{found['sent'] / least:.3f}" if least else ""
    if device is not None:
        predicted = sum(make_plan(p, device).seconds.values())
        error = predicted / found["seconds"] - 1
        values |= {"predicted_seconds": f"{predicted:.5f}", "plan_error_percent": f"{100 * error:+.0f}"}
    return {**values, **stamp()}


def _rank_main(rank: int, ranks: int, store: str, function: Callable[..., Any], args: Any, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=ranks)
    value = function(*args)
    if rank == 0:
        results.put(value)
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> Any:
    """Run a function on ``ranks`` fresh processes with gloo, and return the result of rank 0."""
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as store:
        mp.spawn(_rank_main, (ranks, store, function, args, results), nprocs=ranks)
    return results.get()


def _best(action: Callable[[], Any], rounds: int = 5) -> float:
    return statistics.median(interleaved({"": action}, rounds)[""])


def _single_rates() -> dict[str, float]:
    left, right = torch.randn(1024, DIM), torch.randn(DIM, 8192)
    out, long = torch.empty(1024, 8192), torch.randn(1 << 25)
    into = torch.empty_like(long)
    return {
        "product": 2.0 * left.shape[0] * right.numel() / _best(lambda: torch.mm(left, right, out=out)),
        "copy": 2.0 * 4.0 * long.numel() / _best(lambda: into.copy_(long)),
    }


def _gloo_rates() -> dict[str, float]:
    small, large = torch.zeros(16, dtype=torch.uint8), torch.zeros(1 << 22, dtype=torch.uint8)
    seconds = []
    for message in (small, large):
        into = [torch.empty_like(message) for _ in range(dist.get_world_size())]
        seconds.append(_best(lambda into=into, message=message: dist.all_gather(into, message), 28))  # type: ignore[misc]
    return {"latency": seconds[0], "link": large.numel() / (seconds[1] - seconds[0])}


def _pass_rates(product: float) -> dict[str, float]:
    """The fractions of the product's rate that forward and backward reach, at a shape that no case has."""
    p = CALIBRATION
    features = torch.randn(p.batch, p.embedding_size, requires_grad=True)
    labels = torch.randint(p.classes, (p.batch,))
    head = ArcFaceLoss(p.classes, p.embedding_size)
    forward = _best(lambda: head(features, labels))
    both = _best(lambda: head(features, labels).backward())
    operations = 2.0 * p.batch * p.classes * p.embedding_size
    return {
        "forward_share": operations / forward / product,
        "backward_share": 3 * operations / (both - forward) / product,
    }


def this_machine() -> Device:
    """Measure the rates of one core of this machine, and of gloo between two of its processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates = _single_rates()
    rates |= _pass_rates(rates["product"])
    torch.set_num_threads(threads)
    rates |= on_ranks(2, _gloo_rates)
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    rates["shared"] = min(1.0, on_ranks(cores, _single_rates)["product"] / rates["product"])
    return Device(
        name=f"one core of {cpu_name()}",
        memory=pages / cores,
        network=rates["link"],
        per_node=cores,
        together=cores,
        sources={"all": f"benchmarks/scaling.py, {datetime.date.today()}, float32, gloo"},
        **rates,
    )


def here(most: int) -> Iterator[dict[str, Any]]:
    """Rows of strong and weak scaling on this machine's cores, up to ``most`` ranks."""
    device = this_machine()
    write_file(RATES, (json.dumps(asdict(device), indent=2) + "\n").encode())
    print(f"rates of this machine: {RATES}")
    for kind, ranks, data in (*(("strong", *mesh) for mesh in MESHES), *(("weak", ranks, 1) for ranks in (1, 2, 4))):
        if ranks <= most:
            classes = STRONG if kind == "strong" else WEAK * ranks
            p = HeadConfig(classes, DIM, BATCH, ranks, data=data, dtype="float32")
            yield row(kind, p, on_ranks(ranks, measured, p, torch.device("cpu")), device)


def under_torchrun(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure strong and weak scaling on the ranks that torchrun started; only rank 0 yields the rows."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    ranks = dist.get_world_size()
    known = DEVICES["h200"] if cuda and "H200" in torch.cuda.get_device_name() else None
    for kind, classes in (("strong", options.classes), ("weak", options.classes * ranks)):
        p = HeadConfig(classes, options.embedding_size, options.batch, ranks, data=options.data, dtype=options.dtype)
        found = measured(p, device)
        if dist.get_rank() == 0:
            yield {**row(kind, p, found, known), **({"device": torch.cuda.get_device_name()} if cuda else {})}
    dist.destroy_process_group()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--most", type=int, default=4, help="most ranks on this machine")
    for name, default in (("classes", STRONG), ("embedding-size", DIM), ("batch", BATCH), ("data", 1)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"under torchrun (default: {default})")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="under torchrun (default: float32)")
    parser.add_argument("--output", type=Path, help="CSV to write (default: results/scaling….csv)")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print and write the table."""
    options = parse()
    launched = "RANK" in os.environ
    rows = []
    for line in under_torchrun(options) if launched else here(options.most):
        rows.append(line)
        hidden = {"batch", "dim", "dtype", "least_bytes", *stamp()}
        print("  ".join(f"{name}={value}" for name, value in line.items() if name not in hidden), flush=True)
    if rows:
        name = f"scaling-{rows[0]['device'].split()[-1].lower()}-{rows[0]['ranks']}" if launched else "scaling"
        write_rows(rows, options.output or RESULTS / f"{name}.csv")


if __name__ == "__main__":
    main()
