"""The methods that ``ltloss compare`` knows: what each one sets, where it is from, and what is tuned.

One table. A method's settings are the published ones where they do not depend on the data; its search space is a small
grid of the values that matter most to it, of which ``search.py`` tries some, for all methods in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ltloss.errors import UserError, nearest
from ltloss.losses.defaults import LONG_TAIL_PRIOR
from ltloss.training.run.settings import SETTINGS

StageTwo = Literal["post-hoc", "tau-norm", "crt"]
Values = Mapping[str, Any]  # names of settings, or of options of the loss, with values


@dataclass(frozen=True)
class Factors:
    """Values of a search space that are multiples of the recipe's own."""

    values: tuple[float, ...]


@dataclass(frozen=True)
class Method:
    """One method of a comparison.

    Attributes:
        title: what it is called in tables.
        source: paper, and equation or section.
        settings: what it sets beside the recipe; names of settings, else options of the loss.
        space: what is tuned: name -> values in order; the search begins with the middle one of the first name.
        base: the method whose trained network a second stage begins with.
        stage_two: what that second stage does; its own settings are in ``space`` under the names of ``stage_two.py``.
    """

    title: str
    source: str
    settings: Values
    space: Mapping[str, tuple[Any, ...] | Factors] = field(default_factory=dict)
    base: str = ""
    stage_two: StageTwo | None = None


_SCALES = (4.0, 8.0, 16.0, 32.0, 64.0)
_TAUS = (0.25, 0.5, 1.0, 1.5, 2.0)
_COSINE_MARGINS = (0.1, 0.2, 0.35, 0.5, 0.7)
_ANGULAR_MARGINS = (0.1, 0.25, 0.5, 0.75, 1.0)
_LRS = Factors((0.25, 0.5, 1.0, 2.0, 4.0, 8.0))
_SOFTMAX_SPACE = {"lr": _LRS, "weight_decay": Factors((0.16, 0.4, 1.0, 2.5, 6.25, 15.625))}

METHODS: dict[str, Method] = {
    "ce": Method("cross-entropy", "", {"loss": "softmax"}, _SOFTMAX_SPACE),
    "class-balanced": Method(
        "class-balanced weights",
        "Cui et al., Class-balanced loss based on effective number of samples, CVPR 2019, eq. 7",
        {"loss": "softmax", "drw_from": 0.0},
        {"lr": _LRS, "beta": (0.9, 0.99, 0.999, 0.9999)},
    ),
    "balanced": Method(
        "balanced softmax",
        "Ren et al., Balanced meta-softmax for long-tailed visual recognition, NeurIPS 2020, eq. 4",
        {"loss": "softmax", "tau": 1.0},
        _SOFTMAX_SPACE,
    ),
    "logit-adjusted-linear": Method(
        "logit adjustment, linear",
        "Menon et al., Long-tail learning via logit adjustment, ICLR 2021, eq. 10",
        {"loss": "softmax", "tau": 1.0},
        {"lr": _LRS, "tau": _TAUS},
    ),
    "post-hoc": Method(
        "logit adjustment, post hoc",
        "Menon et al., Long-tail learning via logit adjustment, ICLR 2021, eq. 9",
        {"post_hoc_tau": 1.0},
        {"post_hoc_tau": (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5)},
        base="ce",
        stage_two="post-hoc",
    ),
    "tau-norm": Method(
        "τ-normalisation",
        "Kang et al., Decoupling representation and classifier for long-tailed recognition, ICLR 2020, eq. 3",
        {"norm_power": 1.0},
        {"norm_power": (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0, 1.25)},
        base="ce",
        stage_two="tau-norm",
    ),
    "crt": Method(
        "classifier retraining (cRT)",
        "Kang et al., Decoupling representation and classifier for long-tailed recognition, ICLR 2020, section 4.1",
        {"crt_epochs": 10, "crt_lr": 0.1},
        {"crt_epochs": (5, 10, 20), "crt_lr": (0.02, 0.1, 0.5)},
        base="ce",
        stage_two="crt",
    ),
    "cosine": Method(
        "cosine softmax",
        "Wang et al., NormFace, ACM MM 2017",
        {"loss": "cosine"},
        {"lr": _LRS, "scale": _SCALES},
    ),
    "logit-adjusted": Method(
        "cosine softmax with log prior",
        "Menon et al., Long-tail learning via logit adjustment, ICLR 2021, eq. 10, on cosine logits",
        {"loss": "logit-adjusted", "tau": 1.0},
        {"lr": _LRS, "scale": _SCALES, "tau": _TAUS},
    ),
    "ldam": Method(
        "LDAM",
        "Cao et al., Learning imbalanced datasets with label-distribution-aware margin loss, NeurIPS 2019, eq. 13",
        {"loss": "ldam"},
        {"lr": _LRS, "scale": _SCALES, "margin": (0.2, 0.35, 0.5, 0.75, 1.0)},
    ),
    "ldam-drw": Method(
        "LDAM-DRW",
        "Cao et al., Learning imbalanced datasets with label-distribution-aware margin loss, NeurIPS 2019, algorithm 1",
        {"loss": "ldam", "drw_from": 0.8},
        {"lr": _LRS, "scale": _SCALES, "margin": (0.2, 0.35, 0.5, 0.75, 1.0)},
    ),
    "arcface": Method(
        "ArcFace",
        "Deng et al., ArcFace, CVPR 2019, eq. 3",
        {"loss": "arcface"},
        {"lr": _LRS, "scale": _SCALES, "margin": _ANGULAR_MARGINS},
    ),
    "cosface": Method(
        "CosFace",
        "Wang et al., CosFace, CVPR 2018, eq. 4",
        {"loss": "cosface"},
        {"lr": _LRS, "scale": _SCALES, "margin": _COSINE_MARGINS},
    ),
    "long-tail": Method(
        "long-tail loss",
        "source A, Harbin Institute of Technology, Shenzhen; λ1, λ2 and g are not published, and ours",
        {"loss": "long-tail"},
        {"lr": _LRS, "scale": _SCALES, "margin": (0.125, 0.25, 0.5, 1.0, 2.0)},
    ),
    "cosine-space": Method(
        "cosine-space loss",
        "source B, Southeast University; the weights are not published but for their order",
        {"loss": "cosine-space"},
        {"lr": _LRS, "scale": _SCALES, "margin": _COSINE_MARGINS},
    ),
    "long-tail-prior": Method(
        "long-tail margins with log prior",
        "source A's angular margins per class, and the log prior of Menon et al., ICLR 2021, instead of L2 and L3",
        {"loss": "long-tail-prior", **LONG_TAIL_PRIOR},
        {"lr": _LRS, "scale": _SCALES, "margin": _ANGULAR_MARGINS},
    ),
}
RENAMED = {"recommended": "long-tail-prior"}  # what version 0.1 called it; taken for one version more

STAGE_TWO_SETTINGS = ("post_hoc_tau", "norm_power", "crt_epochs", "crt_lr")


def method(name: str) -> Method:
    """The method ``name``; UserError for an unknown one."""
    if name not in METHODS:
        raise UserError(f"--losses {name} is unknown; {nearest(name, METHODS)}")
    return METHODS[name]


def search_space(name: str, settings: Values) -> dict[str, list[Any]]:
    """The values of each axis of a method's search space; factors multiply what ``settings``, the recipe's, say."""
    return {
        key: [settings.get(key, SETTINGS[key].default) * factor for factor in choice.values]
        if isinstance(choice, Factors)
        else list(choice)
        for key, choice in method(name).space.items()
    }


def with_values(settings: Values, values: Values) -> dict[str, Any]:
    """Settings with ``values`` on top: those of settings by name, all others into the options of the loss."""
    merged = dict(settings)
    merged["loss_options"] = dict(settings.get("loss_options", {}))
    for name, value in values.items():
        if name == "loss_options":
            merged["loss_options"].update(value)
        elif name in SETTINGS or name in STAGE_TWO_SETTINGS:
            merged[name] = value
        else:
            merged["loss_options"][name] = value
    return merged


def variants(varied: Sequence[tuple[str, Sequence[Any]]]) -> list[dict[str, Any]]:
    """Every combination of the varied values, in order; one empty variant where nothing is varied."""
    names = [name for name, _ in varied]
    return [dict(zip(names, combination, strict=True)) for combination in itertools.product(*(v for _, v in varied))]


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
