"""Estimate what training a head takes, class-parallel or on one device: memory, bytes sent, seconds per step.

The estimate is arithmetic on stored rates and uses no device. ``docs/distributed.md`` says what is sent, and
``benchmarks/scaling.py`` compares the estimate with runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["DEVICES", "Device", "HeadConfig", "Plan", "make_plan", "read_device"]

GIB = 1 << 30

# Bytes of an element. Statistics and the gradient of the prototypes are float32.
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}  # of features
KEPT_WIDTHS = {  # of prototypes, and of the optimizer's state
    "prototype_dtype": {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1},
    "state_dtype": {"float32": 4, "bfloat16": 2},
}
# State of an optimizer: how many tensors of the prototypes' shape, and how many numbers per class.
OPTIMIZERS = {"sgd": (1, 0), "adamw": (2, 0), "adagrad": (0, 1)}
WORKSPACE = 256 << 20  # bytes, of the backward
TILE_CLASSES = 128  # classes that share a shift of the kept exponentials in the kernels


@dataclass(frozen=True)
class Device:
    """Memory and rates of one device; ``sources`` says where each number is from."""

    name: str
    memory: float  # bytes
    product: float  # operations per second of a large matrix product in the dtype of the features
    copy: float  # bytes per second, read and written
    link: float  # bytes per second that a device sends to devices of the same node
    network: float  # bytes per second that a device sends to other nodes
    per_node: int  # devices of a node
    latency: float  # seconds of an empty collective between two ranks; more ranks take ⌈log2 ranks⌉ times as long
    forward_share: float  # fraction of ``product`` that the forward reaches, counted as 2·N·C·D operations
    backward_share: float  # fraction of ``product`` that the backward reaches, counted as 6·N·C·D operations
    together: int | None = None  # cores that the ranks of one machine share; None: every rank has a device
    shared: float = 1.0  # fraction of ``product`` and ``copy`` that a core keeps when all cores work
    sources: Mapping[str, str] = field(default_factory=dict)


DEVICES = {
    "h200": Device(
        name="NVIDIA H200 SXM",
        memory=141e9,
        product=790e12,
        copy=4.3e12,
        link=450e9,
        network=50e9,
        per_node=8,
        latency=20e-6,
        forward_share=0.80,
        backward_share=0.75,
        sources={
            "memory, link": "NVIDIA H200 datasheet: 141 GB; NVLink 900 GB/s, both directions together",
            "network": "NVIDIA DGX H200 datasheet: one 400 Gb/s ConnectX-7 per GPU",
            "product, copy": "bfloat16 torch.mm and a large copy on one H200",
            "latency": "assumed",
            "forward_share, backward_share": "goals of the kernels (docs/performance-kernels.md), not measured",
        },
    ),
}


@dataclass(frozen=True)
class HeadConfig:
    """A head, and how it is to be trained."""

    classes: int
    embedding_size: int
    batch: int  # samples of all ranks together
    gpus: int  # devices, one for each rank
    data: int = 1  # data-parallel groups; the ranks of a group share the classes
    dtype: str = "bfloat16"  # of the features
    optimizer: str = "sgd"
    sample_rate: float = 1.0  # fraction of its classes that a rank uses in a step
    loss: str = "long-tail"  # a name that `ltloss train --loss` takes
    fused_update: bool = False  # an optimizer of ltloss.optim instead of torch.optim
    prototype_dtype: str = "float32"
    state_dtype: str = "float32"
    keep_exponentials: bool = False  # see ltloss.use_workspace

    def __post_init__(self) -> None:
        for name in ("classes", "embedding_size", "batch", "gpus", "data"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.gpus % self.data:
            raise ValueError(f"data (--data-groups) must divide gpus; got data={self.data} and gpus={self.gpus}")
        if not 0.0 < self.sample_rate <= 1.0:
            raise ValueError(f"sample_rate must be in (0, 1]; got {self.sample_rate}")
        known: dict[str, Collection[str]] = {"dtype": WIDTHS, "optimizer": OPTIMIZERS, **KEPT_WIDTHS}
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{name} must be one of {', '.join(names)}; got {getattr(self, name)!r}")
        for name in ("optimizer", "prototype_dtype", "state_dtype"):
            if not self.fused_update and getattr(self, name) not in ("sgd", "adamw", "float32"):
                raise ValueError(
                    f"{name}={getattr(self, name)} needs fused_update (--fused-update); torch.optim has no such thing"
                )

    @property
    def class_ranks(self) -> int:
        """Ranks that share the classes."""
        return self.gpus // self.data

    @property
    def own_classes(self) -> int:
        """Classes of one rank."""
        return -(-self.classes // self.class_ranks)

    @property
    def used_classes(self) -> int:
        """Classes of one rank that a step uses."""
        return min(self.own_classes, max(1, round(self.own_classes * self.sample_rate)))

    def prototypes(self, classes: int) -> float:
        """Bytes of the prototypes of ``classes`` classes; in float8 each also has an exponent of one byte."""
        width = KEPT_WIDTHS["prototype_dtype"][self.prototype_dtype]
        return float(classes * (width * self.embedding_size + (width == 1)))

    def state(self, classes: int) -> float:
        """Bytes of the optimizer's state for ``classes`` classes."""
        matrices, numbers = OPTIMIZERS[self.optimizer]
        if self.optimizer == "adamw" and self.sample_rate < 1.0:
            numbers += 1  # how often a class was drawn
        width = KEPT_WIDTHS["state_dtype"][self.state_dtype]
        return float(width * classes * (matrices * self.embedding_size + numbers))


@dataclass(frozen=True)
class Plan:
    """The estimate by parts: ``memory`` in bytes per device, ``wire`` in bytes sent per rank and step, ``seconds`` per
    step. ``advice`` names changes with which it would fit, if it does not.
    """

    problem: HeadConfig
    device: Device
    memory: Mapping[str, float]
    wire: Mapping[str, float]
    seconds: Mapping[str, float]
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the head takes at most 90 % of the device's memory; the backbone is not counted."""
        return sum(self.memory.values()) <= 0.9 * self.device.memory

    def to_json(self) -> str:
        """The whole plan as JSON."""
        content: dict[str, Any] = asdict(self)
        return json.dumps({**content, "fits": self.fits}, indent=2)

    def to_text(self) -> str:
        """The whole plan as text."""
        p = self.problem
        lines = [
            f"{p.classes:,} classes x {p.embedding_size}, {p.batch:,} samples a step, {p.gpus} x {self.device.name}"
            f"{f' as {p.data} x {p.class_ranks}' if p.data > 1 else ''}: {p.own_classes:,} classes a device",
            *_table("memory per device", self.memory, lambda value: f"{value / GIB:10.3f} GiB"),
            *_table("bytes sent per device and step", self.wire, lambda value: f"{value / 1e6:10.3f} MB"),
            *_table("time of a step (head only)", self.seconds, lambda value: f"{value * 1e3:10.3f} ms"),
            f"memory of the device {self.device.memory / GIB:.1f} GiB: {'fits' if self.fits else 'DOES NOT FIT'}",
            *(f"  {advice}" for advice in self.advice),
            "rates from:",
            *(f"  {name}: {source}" for name, source in self.device.sources.items()),
        ]
        return "\n".join(lines)


def _table(title: str, parts: Mapping[str, float], show: Any) -> list[str]:
    rows = [f"  {show(value)}  {name}" for name, value in parts.items() if value]
    return [f"{title}:", *rows, f"  {show(sum(parts.values()))}  together"]


def read_device(name: str) -> Device:
    """A device by its name in ``DEVICES``, or from a JSON file of rates that ``benchmarks/scaling.py`` wrote.

    Raises:
        ValueError: an unknown name, or a file that cannot be read as rates.
    """
    if name in DEVICES:
        return DEVICES[name]
    if not name.endswith(".json"):
        raise ValueError(f"device must be one of {', '.join(DEVICES)} or a JSON file of rates; got {name!r}")
    try:
        return Device(**json.loads(Path(name).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"device: {name} cannot be read as rates ({error})") from None


def make_plan(problem: HeadConfig, device: Device) -> Plan:
    """Estimate memory, traffic and time of one training step of the head.

    Example:
        >>> from ltloss.tools.plan import DEVICES, HeadConfig, make_plan
        >>> plan = make_plan(HeadConfig(classes=100_000_000, embedding_size=512, batch=8192, gpus=64), DEVICES["h200"])
        >>> plan.fits, round(plan.memory["prototypes (float32)"] / 2**30, 1)
        (True, 3.0)
    """
    memory = _memory(problem)
    plan = Plan(problem, device, memory, _wire(problem), _seconds(problem, device), ())
    return plan if plan.fits else replace(plan, advice=_advice(problem, device))


def _memory(p: HeadConfig) -> dict[str, float]:
    width = WIDTHS[p.dtype]
    own, used = (float(classes * p.embedding_size) for classes in (p.own_classes, p.used_classes))
    gradient = 0.0 if p.fused_update else 4.0  # with a fused update, a slab in the workspace is enough
    return {
        f"prototypes ({p.prototype_dtype})": p.prototypes(p.own_classes),
        "their gradient": gradient * own,
        "minimum-angle term of the update": _minimum_angle(p),
        "sampled prototypes" + " and their gradient" * (not p.fused_update): p.prototypes(p.used_classes)
        + gradient * used
        if p.sample_rate < 1.0
        else 0.0,
        f"state of {p.optimizer}": p.state(p.own_classes),
        "constants of the loss": _buffers(p, centres=False),
        "centres of the classes": _buffers(p, centres=True),
        "reciprocal lengths of the prototypes": 4.0 * p.own_classes,
        "gathered batch and its gradient": p.batch * p.embedding_size * (3.0 * width + 4.0)
        + 16.0 * p.batch * p.gpus / p.data,
        "workspace of the backward": float(WORKSPACE),
        "kept exponentials": _kept(p),
    }


def _kept(p: HeadConfig) -> float:
    """Bytes of the kept exponentials: two for each, and four for the shift of each row and class tile."""
    if not p.keep_exponentials:
        return 0.0
    return p.batch / p.data * (2.0 * p.used_classes + 4.0 * math.ceil(p.used_classes / TILE_CLASSES))


def _buffers(p: HeadConfig, *, centres: bool) -> float:
    """Bytes of the loss's buffers that every rank holds whole, or of the class ``centres``, which are sharded."""
    classes = p.own_classes if centres else p.classes
    found = (size * classes**c * p.embedding_size**d for size, c, d, own in _shapes(p.loss) if own == centres)
    return float(sum(found))


def _minimum_angle(p: HeadConfig) -> float:
    """Bytes of the minimum-angle term with a fused update: its gradient (C, D), and decoded float8 prototypes."""
    if not p.fused_update or p.gpus > 1 or p.sample_rate < 1.0 or not getattr(_module(p.loss), "min_angle_weight", 0):
        return 0.0
    width = KEPT_WIDTHS["prototype_dtype"][p.prototype_dtype]
    return (2 * 4.0 if width == 1 else width) * p.classes * p.embedding_size


@cache
def _shapes(loss: str) -> tuple[tuple[int, int, int, bool], ...]:
    """For each buffer: bytes without the axes C and D, how many axes C and D it has, whether it is of class centres."""
    from ltloss.losses.class_centers import ClassCenters

    module = _module(loss)
    classes, embedding_size = module.num_classes, module.embedding_size
    return tuple(
        (
            buffer.element_size() * math.prod(size for size in buffer.shape if size not in (classes, embedding_size)),
            buffer.shape.count(classes),
            buffer.shape.count(embedding_size),
            isinstance(part, ClassCenters),
        )
        for part in module.modules()
        for buffer in part.buffers(recurse=False)
    )


@cache
def _module(loss: str) -> Any:
    """A loss by its name, with 5 classes and embedding size 7, which no other axis of its buffers has."""
    import torch

    from ltloss.training.model.registry import build_loss

    with torch.random.fork_rng(devices=[]):
        return build_loss(loss, [1] * 5, 7, {})


def _wire(p: HeadConfig) -> dict[str, float]:
    """Bytes that a rank sends in a step if every collective sends as little as it can (a ring)."""
    ranks, width = p.gpus, WIDTHS[p.dtype]
    own_rows, group_rows = p.batch / ranks, p.batch / p.data
    within = (p.class_ranks - 1) / p.class_ranks
    return {
        "all-gather of features and labels": (ranks - 1) * own_rows * (p.embedding_size * width + 8.0),
        "all-gather of two N-vectors": (ranks - 1) * group_rows * 8.0,
        "reduce-scatter of the features' gradient": within * group_rows * p.embedding_size * width,
        "all-reduce of the prototypes' gradient": 2.0 * (p.data - 1) / p.data * 4.0 * p.used_classes * p.embedding_size,
    }


def _seconds(p: HeadConfig, device: Device) -> dict[str, float]:
    turns = 1.0 if device.together is None else max(1.0, p.gpus / device.together)
    crowd = turns / device.shared if device.together is not None and p.gpus > 1 else turns
    products = 2.0 * p.batch / p.data * p.used_classes * p.embedding_size
    whole = p.gpus <= device.per_node
    rate = device.link if whole else device.network
    messages = 0 if p.gpus == 1 else 3 + (p.data > 1) * _slabs(p)
    rounds = max(0, (p.gpus - 1).bit_length())
    return {
        "forward pass": crowd * products / (device.product * device.forward_share),
        "backward pass": crowd * _backward_products(p) * products / (device.product * device.backward_share)
        + crowd * 2.0 * _kept(p) / device.copy,  # the forward writes them, the backward reads them
        "optimizer": crowd * _touched(p) / device.copy,
        "messages": turns * (sum(_wire(p).values()) / rate + messages * rounds * device.latency),
    }


def _backward_products(p: HeadConfig) -> float:
    """Products of the backward, 2·N·C·D operations each: two for gradients, and one for logits that are not kept."""
    return 2.0 if p.keep_exponentials else 3.0


def _touched(p: HeadConfig) -> float:
    """Bytes that the optimizer moves: it reads and writes prototypes and state, and reads a gradient in memory."""
    entries = p.used_classes * p.embedding_size
    gradient = 0.0 if p.fused_update else 4.0 * entries
    return 2.0 * (p.prototypes(p.used_classes) + p.state(p.used_classes)) + gradient


def _slabs(p: HeadConfig) -> int:
    """The least number of messages in which the data groups add up the gradient of the prototypes."""
    a_class = p.batch / p.data * WIDTHS[p.dtype] + 4.0 * p.embedding_size
    return math.ceil(p.used_classes * a_class / WORKSPACE) if p.fused_update else 1


def _advice(p: HeadConfig, device: Device) -> tuple[str, ...]:
    """Single changes with which the head would fit."""

    def fits(changed: HeadConfig) -> bool:
        return sum(_memory(changed).values()) <= 0.9 * device.memory

    gpus = next((n for n in (p.gpus * 2**i for i in range(1, 13)) if fits(replace(p, gpus=n))), None)
    changes = [
        (p.data > 1, replace(p, data=1), "--data-groups 1 would fit: all devices share the classes, none repeats them"),
        (p.optimizer == "adamw", replace(p, optimizer="sgd"), "--optimizer sgd would fit: one state instead of two"),
        (p.keep_exponentials, replace(p, keep_exponentials=False), "without --keep-exponentials it would fit"),
        (True, replace(p, fused_update=True), "--fused-update would fit: no gradient of the prototypes in memory"),
    ]
    if p.fused_update:
        changes += [
            (True, replace(p, optimizer="adagrad"), "--optimizer adagrad would fit: a number a class is its state"),
            (True, replace(p, prototype_dtype="bfloat16"), "--prototype-dtype bfloat16 would fit"),
            (True, replace(p, prototype_dtype="float8_e4m3fn"), "--prototype-dtype float8_e4m3fn would fit"),
            (True, replace(p, state_dtype="bfloat16"), "--state-dtype bfloat16 would fit"),
        ]
    found = [f"--gpus {gpus} would fit: each holds fewer classes"] if gpus else []
    found += [words for possible, changed, words in changes if possible and fits(changed)]
    if not found:
        found.append("no single change is enough: combine more --gpus with a smaller --batch")
    return tuple(found)
