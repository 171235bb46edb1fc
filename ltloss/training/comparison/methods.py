"""The methods that ``ltloss compare`` knows: the settings, source and search space of each, in one table.

A method's settings are the published ones, unless these depend on the data. Its search space is a small grid of the
values that matter most to it. ``climb.py`` tries some of its points, for all methods in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ltloss.errors import UserError, nearest
from ltloss.losses.defaults import LONG_TAIL_PRIOR
from ltloss.training.run.settings import SETTINGS, Settings

SecondStage = Literal["post-hoc", "tau-norm", "crt"]
Values = Mapping[str, Any]  # names of settings, or of options of the loss, with values


@dataclass(frozen=True)
class Factors:
    """Values of a search space, as multiples of the recipe's value."""

    values: tuple[float, ...]


Space = Mapping[str, tuple[Any, ...] | Factors]


@dataclass(frozen=True)
class Method:
    """One method of a comparison.

    Attributes:
        title: its name in tables.
        source: paper, and equation or section.
        settings: values that override the recipe: settings by name, all others options of the loss.
        space: what is tuned: name -> values in order. The search begins in the middle of every axis.
        base: the method whose trained network a second stage begins with; empty for a training.
        second_stage: the kind of second stage, or None.
    """

    title: str
    source: str
    settings: Values
    space: Space = field(default_factory=dict)
    base: str = ""
    second_stage: SecondStage | None = None


_TAUS = (0.25, 0.5, 1.0, 1.5, 2.0)
_COSINE_MARGINS = (0.1, 0.2, 0.35, 0.5, 0.7)
_ANGULAR_MARGINS = (0.1, 0.25, 0.5, 0.75, 1.0)
_LDAM_MARGINS = (0.2, 0.35, 0.5, 0.75, 1.0)
_LRS = Factors((0.25, 0.5, 1.0, 2.0, 4.0, 8.0))
_SOFTMAX_SPACE: Space = {"lr": _LRS, "weight_decay": Factors((0.16, 0.4, 1.0, 2.5, 6.25, 15.625))}
_COSINE_SPACE: Space = {"lr": _LRS, "scale": (4.0, 8.0, 16.0, 32.0, 64.0)}

_CUI = "Cui et al., Class-balanced loss based on effective number of samples, CVPR 2019"
_REN = "Ren et al., Balanced meta-softmax for long-tailed visual recognition, NeurIPS 2020"
_MENON = "Menon et al., Long-tail learning via logit adjustment, ICLR 2021"
_KANG = "Kang et al., Decoupling representation and classifier for long-tailed recognition, ICLR 2020"
_CAO = "Cao et al., Learning imbalanced datasets with label-distribution-aware margin loss, NeurIPS 2019"
_HARBIN = "source A, Harbin Institute of Technology, Shenzhen; λ1, λ2 and g are not published, and ours"
_SOUTHEAST = "source B, Southeast University; the weights are not published but for their order"
_OURS = "source A's angular margins per class, and the log prior of Menon et al., ICLR 2021, instead of L2 and L3"

METHODS: dict[str, Method] = {
    "ce": Method("cross-entropy", "", {"loss": "softmax"}, _SOFTMAX_SPACE),
    "class-balanced": Method(
        "class-balanced weights",
        f"{_CUI}, eq. 7",
        {"loss": "softmax", "drw_start": 0.0},
        {"lr": _LRS, "beta": (0.9, 0.99, 0.999, 0.9999)},
    ),
    "balanced": Method("balanced softmax", f"{_REN}, eq. 4", {"loss": "softmax", "tau": 1.0}, _SOFTMAX_SPACE),
    "logit-adjusted-linear": Method(
        "logit adjustment, linear", f"{_MENON}, eq. 10", {"loss": "softmax", "tau": 1.0}, {"lr": _LRS, "tau": _TAUS}
    ),
    "post-hoc": Method(
        "logit adjustment, post hoc",
        f"{_MENON}, eq. 9",
        {"post_hoc_tau": 1.0},
        {"post_hoc_tau": (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5)},
        base="ce",
        second_stage="post-hoc",
    ),
    "tau-norm": Method(
        "τ-normalisation",
        f"{_KANG}, eq. 3",
        {"norm_power": 1.0},
        {"norm_power": (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0, 1.25)},
        base="ce",
        second_stage="tau-norm",
    ),
    "crt": Method(
        "classifier retraining (cRT)",
        f"{_KANG}, section 4.1",
        {"crt_epochs": 10, "crt_lr": 0.1},
        {"crt_epochs": (5, 10, 20), "crt_lr": (0.02, 0.1, 0.5)},
        base="ce",
        second_stage="crt",
    ),
    "cosine": Method("cosine softmax", "Wang et al., NormFace, ACM MM 2017", {"loss": "cosine"}, _COSINE_SPACE),
    "logit-adjusted": Method(
        "cosine softmax with log prior",
        f"{_MENON}, eq. 10, on cosine logits",
        {"loss": "logit-adjusted", "tau": 1.0},
        {**_COSINE_SPACE, "tau": _TAUS},
    ),
    "ldam": Method("LDAM", f"{_CAO}, eq. 13", {"loss": "ldam"}, {**_COSINE_SPACE, "margin": _LDAM_MARGINS}),
    "ldam-drw": Method(
        "LDAM-DRW",
        f"{_CAO}, algorithm 1",
        {"loss": "ldam", "drw_start": 0.8},
        {**_COSINE_SPACE, "margin": _LDAM_MARGINS},
    ),
    "arcface": Method(
        "ArcFace",
        "Deng et al., ArcFace, CVPR 2019, eq. 3",
        {"loss": "arcface"},
        {**_COSINE_SPACE, "margin": _ANGULAR_MARGINS},
    ),
    "cosface": Method(
        "CosFace",
        "Wang et al., CosFace, CVPR 2018, eq. 4",
        {"loss": "cosface"},
        {**_COSINE_SPACE, "margin": _COSINE_MARGINS},
    ),
    "long-tail": Method(
        "long-tail loss", _HARBIN, {"loss": "long-tail"}, {**_COSINE_SPACE, "margin": (0.125, 0.25, 0.5, 1.0, 2.0)}
    ),
    "cosine-space": Method(
        "cosine-space loss", _SOUTHEAST, {"loss": "cosine-space"}, {**_COSINE_SPACE, "margin": _COSINE_MARGINS}
    ),
    "long-tail-prior": Method(
        "long-tail margins with log prior",
        _OURS,
        {"loss": "long-tail-prior", **LONG_TAIL_PRIOR},
        {**_COSINE_SPACE, "margin": _ANGULAR_MARGINS},
    ),
}
RENAMED = {"recommended": "long-tail-prior"}  # what version 0.1 called it; taken for one version more

SECOND_STAGE_SETTINGS = ("post_hoc_tau", "norm_power", "crt_epochs", "crt_lr")


def method(name: str) -> Method:
    """The method ``name``; UserError for an unknown one."""
    if name not in METHODS:
        raise UserError(f"--losses {name} is unknown; {nearest(name, METHODS)}")
    return METHODS[name]


def search_space(name: str, settings: Values) -> dict[str, list[Any]]:
    """The values of each axis of a method's search space; factors multiply the value in ``settings``."""
    return {
        key: [getattr(Settings(**settings), key) * factor for factor in choice.values]
        if isinstance(choice, Factors)
        else list(choice)
        for key, choice in method(name).space.items()
    }


def with_values(settings: Values, values: Values) -> dict[str, Any]:
    """Settings overridden by ``values``; names that are no settings go into the options of the loss."""
    merged = dict(settings)
    merged["loss_options"] = dict(settings.get("loss_options", {}))
    for name, value in values.items():
        if name == "loss_options":
            merged["loss_options"].update(value)
        elif name in SETTINGS or name in SECOND_STAGE_SETTINGS:
            merged[name] = value
        else:
            merged["loss_options"][name] = value
    return merged


def described(values: Values) -> str:
    """Values as 'scale=16, margin=0.5'."""
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def listing() -> str:
    """Every method with its source, its settings and its search space, for a terminal."""
    lines = []
    for name, kind in METHODS.items():
        lines.append(f"{name}: {kind.title}{f' ({kind.source})' if kind.source else ''}")
        lines.append(f"    sets   {described(kind.settings)}{f', after {kind.base}' if kind.base else ''}")
        lines += [
            f"    tunes  {key}: "
            + (
                f"the recipe's times {', '.join(map(str, v.values))}"
                if isinstance(v, Factors)
                else ", ".join(map(str, v))
            )
            for key, v in kind.space.items()
        ]
    return "\n".join(lines)
