"""The losses by name, as ``ltloss train --loss NAME`` builds them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ltloss.errors import UserError, in_one_line, nearest
from ltloss.losses.defaults import FORMER_OPTIONS, LONG_TAIL_PRIOR, RENAMED_OPTIONS

if TYPE_CHECKING:
    from ltloss.losses.prototype_head import PrototypeHead
    from ltloss.training.model.softmax_loss import SoftmaxLoss

    LossHead = PrototypeHead | SoftmaxLoss


@dataclass(frozen=True)
class LossKind:
    """How a name on the command line becomes a loss module."""

    class_name: str
    takes_counts: bool = False
    tau_as_prior: bool = False  # the class has no argument tau, but takes the log prior that tau gives
    aliases: Mapping[str, str] = field(default_factory=dict)  # option -> argument of the class, where names differ
    sets: Mapping[str, Any] = field(default_factory=dict)  # arguments that the name stands for


LOSSES: dict[str, LossKind] = {
    "softmax": LossKind("SoftmaxLoss", takes_counts=True),
    "cosine": LossKind("CosineSoftmaxLoss", tau_as_prior=True),
    "cosface": LossKind("CosFaceLoss", tau_as_prior=True),
    "arcface": LossKind("ArcFaceLoss", tau_as_prior=True),
    "adaface": LossKind("AdaFaceLoss", tau_as_prior=True),
    "magface": LossKind("MagFaceLoss", tau_as_prior=True),
    "elasticface": LossKind("ElasticFaceLoss", tau_as_prior=True),
    "curricularface": LossKind("CurricularFaceLoss", tau_as_prior=True),
    "interclass-filter": LossKind("InterclassFilterLoss", tau_as_prior=True, aliases={"margin": "angular_margin"}),
    "combined": LossKind("CombinedMarginLoss", tau_as_prior=True, aliases={"margin": "angular_margin"}),
    "ldam": LossKind("LDAMLoss", takes_counts=True, tau_as_prior=True, aliases={"margin": "max_margin"}),
    "logit-adjusted": LossKind("LogitAdjustedLoss", takes_counts=True),
    "long-tail": LossKind("LongTailLoss", takes_counts=True),
    "long-tail-prior": LossKind("LongTailLoss", takes_counts=True, sets=LONG_TAIL_PRIOR),
    "cosine-space": LossKind("CosineSpaceLoss"),
}

# Decided by the data, the model and the training loop, so never an option of a run.
_DECIDED_ELSEWHERE = {
    *("self", "num_classes", "embedding_size", "class_counts"),
    *("log_prior", "class_weight", "ignore_index", "reduction", "device", "dtype"),
}


def _loss_class(name: str) -> tuple[LossKind, Any]:
    if name not in LOSSES:
        raise UserError(f"--loss {name} is unknown; {nearest(name, LOSSES)}")
    kind = LOSSES[name]
    if name == "softmax":
        from ltloss.training.model.softmax_loss import SoftmaxLoss

        return kind, SoftmaxLoss
    import ltloss

    return kind, getattr(ltloss, kind.class_name)


def _option_names(kind: LossKind, loss_class: Any) -> set[str]:
    """The options that the constructor takes; ``**options`` are those that all losses of the family share."""
    from ltloss.losses.margin_losses import LossOptions

    parameters = inspect.signature(loss_class.__init__).parameters
    shared = set(LossOptions.__annotations__) if "options" in parameters else set()
    taken = (set(parameters) - {"options"} | shared) - _DECIDED_ELSEWHERE
    if kind is LOSSES["long-tail"]:
        taken |= FORMER_OPTIONS
    elif "min_angle_allow_tf32" in taken:
        taken |= RENAMED_OPTIONS.keys()
    return taken | {"tau"} if kind.tau_as_prior else taken


def option_names(name: str) -> list[str]:
    """The options of the loss ``name``, without those of version 0.1 that it still takes."""
    return sorted(_option_names(*_loss_class(name)) - FORMER_OPTIONS)


def loss_arguments(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the loss ``name`` for ``options`` (``scale``, ``margin``, anything its class documents).

    Raises UserError for an option that this loss does not take, naming those it takes.
    """
    kind, loss_class = _loss_class(name)
    valid = _option_names(kind, loss_class)
    arguments = dict(kind.sets)
    for option, value in options.items():
        argument = kind.aliases.get(option, option)
        if argument not in valid:
            takes = ", ".join(option_names(name)) or "none"
            raise UserError(f"loss {name} has no option {option} (given: {value}); remove it. Its options are: {takes}")
        arguments[argument] = value
    return arguments


def takes_option(name: str, option: str) -> bool:
    """Whether the loss ``name`` has that option."""
    kind, loss_class = _loss_class(name)
    return kind.aliases.get(option, option) in _option_names(kind, loss_class)


def build_loss(
    name: str,
    class_counts: Sequence[int],
    embedding_size: int,
    options: Mapping[str, Any],
    prototype_dtype: str = "float32",
) -> LossHead:
    """The loss module ``name`` for len(class_counts) classes; ``options`` as in ``loss_arguments``."""
    kind, loss_class = _loss_class(name)
    arguments = loss_arguments(name, options)
    if prototype_dtype != "float32":
        import torch

        arguments["dtype"] = getattr(torch, prototype_dtype)
    try:
        if kind.tau_as_prior and (tau := arguments.pop("tau", 0.0)):
            from ltloss.class_balance import log_prior_from_counts

            arguments["log_prior"] = log_prior_from_counts(class_counts, tau)
        if kind.takes_counts:
            module = loss_class.from_counts(class_counts, embedding_size, **arguments)
        else:
            module = loss_class(len(class_counts), embedding_size, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"loss {name} with {dict(options)}: {in_one_line(error)}") from error
    return cast("LossHead", module)


def options_in_force(
    name: str, class_counts: Sequence[int], embedding_size: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Every option of the loss ``name``, with the value that ``build_loss`` gives it for these ``options``."""
    import torch

    from ltloss.losses.margin_losses import CombinedMarginLoss

    kind, loss_class = _loss_class(name)
    with torch.device("meta"):  # only the attributes of the module are needed
        module = build_loss(name, class_counts, embedding_size, options)
    given = loss_arguments(name, options)
    defaults: dict[str, Any] = {"tau": 0.0}  # of a loss that takes a tau as prior
    for owner in (CombinedMarginLoss, loss_class):
        defaults |= {key: item.default for key, item in inspect.signature(owner.__init__).parameters.items()}
    called = {argument: option for option, argument in kind.aliases.items()}
    found = {}
    for argument in sorted(_option_names(kind, loss_class) - FORMER_OPTIONS):
        value = getattr(module, argument, None)
        if value is None or isinstance(value, torch.Tensor):
            value = given.get(argument, defaults[argument])
        found[called.get(argument, argument)] = value
    return found
