"""What a comparison is asked to do, checked before anything is trained, and the jobs that it consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ltloss.errors import UserError, nearest
from ltloss.training.comparison.jobs import Job, checked
from ltloss.training.comparison.methods import STAGE_TWO_SETTINGS, Method, method, search_space, variants, with_values
from ltloss.training.comparison.recipes import cpu_has_bfloat16
from ltloss.training.comparison.recipes import recipe as recipe_settings
from ltloss.training.data.sources import absolute
from ltloss.training.model.classifier import choose_device
from ltloss.training.model.registry import takes_option
from ltloss.training.run.settings import SETTINGS, Settings

# What the grid itself decides, or has no use for: each of its trainings is one process.
NOT_GIVEN = {"loss": "it has --losses", "seed": "it has --seeds", "parallel": "it has --jobs"}


@dataclass(frozen=True)
class Plan:
    """The arguments of ``compare``, checked, and the jobs that follow from them; UserError where they cannot work."""

    given: Mapping[str, Any]
    methods: tuple[str, ...]
    recipe: str | None
    seeds: int
    vary: Mapping[str, Sequence[Any]]
    tune: bool
    tune_seeds: int
    validation_per_class: int | None

    def __post_init__(self) -> None:
        """Everything that can be wrong is found here, rather than after hours of training."""
        for name in self.given:
            if name in NOT_GIVEN:
                raise UserError(f"{name} cannot be given to a comparison: {NOT_GIVEN[name]}; leave it out")
            if name not in SETTINGS:
                raise UserError(f"unknown setting {name}; {nearest(name, SETTINGS)}")
        for name in ("seeds", "tune_seeds", "validation_per_class"):
            check_whole_number(name, getattr(self, name))
        if not self.methods:
            raise UserError("--losses names no method; give some, as ce,cosine,long-tail")
        for name, varied in self.vary.items():
            if name in NOT_GIVEN or not varied:
                raise UserError(f"--vary {name} cannot be varied, or has no values; give NAME=VALUE,VALUE")
        self._check_loss_options()
        for name in self.needed:
            for values in [
                {},
                *([{key: value} for key, axis in self.space(name).items() for value in axis] if self.tune else []),
                *(self.variants if name in self.methods else []),
            ]:
                checked(self.job(name, {}, values, 0, ""))

    def _check_loss_options(self) -> None:
        losses = [method(name).settings["loss"] for name in self.needed if method(name).stage_two is None]
        for name, value in _loss_options(self.given).items():
            if not any(takes_option(loss, name) for loss in losses):
                raise UserError(
                    f"none of the losses {', '.join(losses)} has an option {name} (given: {value}); remove it"
                )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings of every training but for what its method sets: the recipe, and on top of it what was given."""
        settings = {**(recipe_settings(self.recipe) if self.recipe else {}), **self.given}
        if not settings.get("data"):
            raise UserError("--data is missing; give digits, a folder of class folders, or a FILE.npz")
        settings["data"] = absolute(settings["data"])
        settings.setdefault("data_seed", 0)
        device = choose_device(settings.get("device"))
        settings["device"] = str(device)
        if settings.get("amp") is None:
            settings["amp"] = device.type == "cuda" or (self.recipe is not None and cpu_has_bfloat16())
        Settings(**settings)  # which checks them
        return settings

    @cached_property
    def needed(self) -> tuple[str, ...]:
        """The methods, and in front of them those whose networks their second stages begin with."""
        bases = [method(name).base for name in self.methods if method(name).base]
        return tuple(dict.fromkeys([*bases, *self.methods]))

    @cached_property
    def variants(self) -> list[dict[str, Any]]:
        """Every combination of the varied values; an empty one where nothing is varied."""
        return variants(list(self.vary.items()))

    def space(self, name: str) -> dict[str, list[Any]]:
        """The axes of a method's search space, without those that were given."""
        fixed = {*self.given, *_loss_options(self.given)}
        return {key: values for key, values in search_space(name, self.settings).items() if key not in fixed}

    def job(
        self,
        name: str,
        chosen: Mapping[str, Mapping[str, Any]],
        values: Mapping[str, Any],
        seed: int,
        fingerprint: str,
        validation_per_class: int | None = None,
    ) -> Job:
        """One training of a method, on the images with that checksum, with ``values`` on top of what was ``chosen``.

        A second stage brings the job of its first stage along. With ``validation_per_class`` only the last epoch is
        measured, which is what a trial is judged by.
        """
        kind = method(name)
        values = {**chosen.get(name, {}), **values}
        if kind.stage_two is None:
            settings = with_values(self._method_settings(kind), values) | {"seed": seed}
            if validation_per_class is not None:
                settings["evaluate_every"] = Settings(**settings).epochs
            return Job(settings, fingerprint, validation_per_class, keep_model=name in self._bases)
        known = {**kind.settings, **values}
        stage_two = {key: known[key] for key in STAGE_TWO_SETTINGS if key in known}
        below = {key: value for key, value in values.items() if key not in stage_two}
        base = self.job(kind.base, chosen, below, seed, fingerprint, validation_per_class)
        return Job(base.settings, fingerprint, validation_per_class, stage_two, base)

    @cached_property
    def _bases(self) -> set[str]:
        return {method(name).base for name in self.methods}

    def _method_settings(self, kind: Method) -> dict[str, Any]:
        """Recipe, method and what was given, the later over the earlier; only the loss's own options of the last."""
        loss, options = kind.settings["loss"], _loss_options(self.given)
        others = {
            name: value for name, value in self.settings.items() if name not in options and name != "loss_options"
        }
        known = {name: value for name, value in options.items() if takes_option(loss, name)}
        given = {name: value for name, value in others.items() if name in self.given}
        return with_values(with_values(others, kind.settings), {**given, **known})


def check_whole_number(name: str, value: Any) -> None:
    """UserError unless ``value`` is None or a whole number from 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(f"{name} must be a whole number from 1, is {value!r}; correct it")


def _loss_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of losses among what was given."""
    common = {name: given[name] for name in ("scale", "margin", "tau") if given.get(name) is not None}
    return {**common, **given.get("loss_options", {})}
