"""What training a head takes, class-parallel or on one device: memory, bytes on the wire, seconds a step.

Arithmetic on stored rates, no device touched. ``docs/distributed.md`` says what is sent, ``benchmarks/scaling.py``
compares the plan with runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["DEVICES", "Device", "HeadConfig", "Plan", "make_plan", "read_device"]

GIB = 1 << 30

# Bytes of an element; statistics and gradients are float32.
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}  # of features
KEPT_WIDTHS = {  # of prototypes and state
    "prototype_dtype": {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1},
    "state_dtype": {"float32": 4, "bfloat16": 2},
}
# What an optimizer keeps: tensors of the prototypes' shape, and numbers of each class.
OPTIMIZERS = {"sgd": (1, 0), "adamw": (2, 0), "adagrad": (0, 1)}
WORKSPACE = 256 << 20  # of the backward
TILE_CLASSES = 128  # that share a shift of the kept exponentials, in the kernels


@dataclass(frozen=True)
class Device:
    """Rates of one device. Bytes and operations per second; ``sources`` says where each number is from."""

    name: str
    memory: float
    product: float  # operations of a large matrix product in the dtype of the features
    copy: float  # bytes read and written
    link: float  # bytes sent per device, to devices of the same node
    network: float  # bytes sent per device, to other nodes
    per_node: int
    latency: float  # seconds of a collective of no bytes, between two ranks; more ranks, more rounds
    forward_share: float  # of ``product``, at 2·N·C·D operations
    backward_share: float  # of ``product``, at 6·N·C·D operations
    together: int | None = None  # ranks of one machine share its cores: from so many on each gets less; None: never
    shared: float = 1.0  # what is left of ``product`` and ``copy`` when all cores work
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
    """A head and how it is to be trained. ``batch`` counts the samples of all ranks together."""

    classes: int
    embedding_size: int
    batch: int
    gpus: int
    data: int = 1
    dtype: str = "bfloat16"
    optimizer: str = "sgd"
    sample_rate: float = 1.0
    loss: str = "long-tail"  # by the name that `ltloss train --loss` takes
    fused_update: bool = False  # an optimizer of ltloss.optim instead of torch.optim
    prototype_dtype: str = "float32"
    state_dtype: str = "float32"
    keep_exponentials: bool = False  # see ltloss.use_workspace

    def __post_init__(self) -> None:
        for name in ("classes", "embedding_size", "batch", "gpus", "data"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.gpus % self.data:
            raise ValueError(f"data must divide gpus; got data={self.data} and gpus={self.gpus}")
        if not 0.0 < self.sample_rate <= 1.0:
            raise ValueError(f"sample_rate must be in (0, 1]; got {self.sample_rate}")
        for name, widths in KEPT_WIDTHS.items():
            if getattr(self, name) not in widths:
                raise ValueError(f"{name} must be one of {', '.join(widths)}; got {getattr(self, name)!r}")
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
        """Of these, the ones in a step."""
        return min(self.own_classes, max(1, round(self.own_classes * self.sample_rate)))

    def prototypes(self, classes: int) -> float:
        """Bytes of so many prototypes; in float8 each has an exponent."""
        width = KEPT_WIDTHS["prototype_dtype"][self.prototype_dtype]
        return float(classes * (width * self.embedding_size + (width == 1)))

    def state(self, classes: int) -> float:
        """Bytes of what the optimizer keeps about so many classes."""
        matrices, numbers = OPTIMIZERS[self.optimizer]
        if self.optimizer == "adamw" and self.sample_rate < 1.0:
            numbers += 1  # how often a class was drawn
        width = KEPT_WIDTHS["state_dtype"][self.state_dtype]
        return float(width * classes * (matrices * self.embedding_size + numbers))


@dataclass(frozen=True)
class Plan:
    """The answer, by part: bytes of memory, bytes sent per rank and step, seconds. ``advice`` if it does not fit."""

    problem: HeadConfig
    device: Device
    memory: Mapping[str, float]
    wire: Mapping[str, float]
    seconds: Mapping[str, float]
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the memory suffices, a tenth left for the rest (the backbone's share is not counted)."""
        return sum(self.memory.values()) <= 0.9 * self.device.memory

    def to_json(self) -> str:
        """Everything for machine reading."""
        content: dict[str, Any] = asdict(self)
        return json.dumps({**content, "fits": self.fits}, indent=2)

    def to_text(self) -> str:
        """Everything for reading."""
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
    """A stored device by name, or one whose rates ``benchmarks/scaling.py`` measured and wrote into a JSON file.

    Raises:
        ValueError: neither, or the file holds something else.
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
    """Memory, traffic and time of one training step of the head.

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
    gradient = 0.0 if p.fused_update else 4.0  # then it has a slab of the workspace
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
    """Bytes of the exponentials between forward and backward: two each, and a shift for every row and class tile."""
    if not p.keep_exponentials:
        return 0.0
    return p.batch / p.data * (2.0 * p.used_classes + 4.0 * math.ceil(p.used_classes / TILE_CLASSES))


def _buffers(p: HeadConfig, *, centres: bool) -> float:
    """Bytes of what the loss keeps on every rank, or of the ``centres`` that each keeps for its classes."""
    classes = p.own_classes if centres else p.classes
    found = (size * classes**c * p.embedding_size**d for size, c, d, own in _shapes(p.loss) if own == centres)
    return float(sum(found))


def _minimum_angle(p: HeadConfig) -> float:
    """Bytes of that term where a fused update takes it: its gradient (C, D), and float8 prototypes made wide."""
    if not p.fused_update or p.gpus > 1 or p.sample_rate < 1.0 or not getattr(_module(p.loss), "min_angle_weight", 0):
        return 0.0
    width = KEPT_WIDTHS["prototype_dtype"][p.prototype_dtype]
    return (2 * 4.0 if width == 1 else width) * p.classes * p.embedding_size


@cache
def _shapes(loss: str) -> tuple[tuple[int, int, int, bool], ...]:
    """Every buffer of a loss: bytes without the axes C and D, how many of each, whether it is of class centres."""
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
    """A loss by its name, with two sizes that nothing else has."""
    import torch

    from ltloss.training.model.registry import build_loss

    with torch.random.fork_rng(devices=[]):
        return build_loss(loss, [1] * 5, 7, {})


def _wire(p: HeadConfig) -> dict[str, float]:
    """What a rank sends if every collective sends as little as it can (a ring)."""
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
        + crowd * 2.0 * _kept(p) / device.copy,  # written by the forward, and read
        "optimizer": crowd * _touched(p) / device.copy,
        "messages": turns * (sum(_wire(p).values()) / rate + messages * rounds * device.latency),
    }


def _backward_products(p: HeadConfig) -> float:
    """Of 2·N·C·D operations each: for the logits again unless their exponentials are kept, and for both gradients."""
    return 2.0 if p.keep_exponentials else 3.0


def _touched(p: HeadConfig) -> float:
    """Bytes that the optimizer reads or writes: prototypes and state both; a gradient in memory, which it reads."""
    entries = p.used_classes * p.embedding_size
    gradient = 0.0 if p.fused_update else 4.0 * entries
    return 2.0 * (p.prototypes(p.used_classes) + p.state(p.used_classes)) + gradient


def _slabs(p: HeadConfig) -> int:
    """In how many messages the data groups add the gradient of the prototypes, at least."""
    a_class = p.batch / p.data * WIDTHS[p.dtype] + 4.0 * p.embedding_size
    return math.ceil(p.used_classes * a_class / WORKSPACE) if p.fused_update else 1


def _advice(p: HeadConfig, device: Device) -> tuple[str, ...]:
    """Single changes with which it would fit."""

    def fits(changed: HeadConfig) -> bool:
        return sum(_memory(changed).values()) <= 0.9 * device.memory

    gpus = next((n for n in (p.gpus * 2**i for i in range(1, 13)) if fits(replace(p, gpus=n))), None)
    changes = [
        (p.data > 1, replace(p, data=1), "--data 1 would fit: all devices share the classes instead of repeating them"),
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
