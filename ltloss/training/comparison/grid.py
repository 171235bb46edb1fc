"""``ltloss compare``: train many methods and seeds on the same images, tuned alike; an interrupted run continues."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ltloss._deprecation import renamed_keys, warn_deprecated
from ltloss._files import remove_leftovers, write_file
from ltloss.errors import UserError, nearest
from ltloss.training.comparison.climb import edges, next_points
from ltloss.training.comparison.jobs import MAY_DIFFER, Job, default_validation, fingerprint, validate_job
from ltloss.training.comparison.methods import (
    RENAMED,
    SECOND_STAGE_SETTINGS,
    Method,
    described,
    method,
    search_space,
    with_values,
)
from ltloss.training.comparison.recipes import cpu_has_bfloat16
from ltloss.training.comparison.recipes import recipe as recipe_settings
from ltloss.training.comparison.tables import Comparison, FinalRun, Trial, write_tables
from ltloss.training.comparison.workers import Workers
from ltloss.training.data.sources import ACCEPTED, absolute_paths
from ltloss.training.model.classifier import choose_device
from ltloss.training.model.registry import option_names, takes_option
from ltloss.training.pages.comparison import write_page
from ltloss.training.run.lock import owned, refuse_if_written
from ltloss.training.run.prepare import apply_limits, check_applies, load_split, with_frozen_scale
from ltloss.training.run.run_folder import refuse_foreign_files
from ltloss.training.run.settings import FUSED_SETTINGS, OF_A_RUN, SETTINGS, Settings
from ltloss.training.stored_keys import FORMER_SETTINGS, stored

MANIFEST = "compare.json"
# Settings that the comparison itself determines, or cannot use: each of its trainings is one process.
NOT_GIVEN = {
    "loss": "it has --losses",
    "seed": "it has --seeds",
    "parallel": "it has --jobs",
    **dict.fromkeys(FUSED_SETTINGS, "softmax cannot have it"),
    **dict.fromkeys(OF_A_RUN, "its trainings are all of --epochs, and --tune holds images out"),
}
_Chosen = Mapping[str, Mapping[str, Any]]


def compare(
    out: str | Path,
    given: Mapping[str, Any],
    methods: Sequence[str],
    *,
    recipe: str | None = None,
    seeds: int = 3,
    vary: Mapping[str, Sequence[Any]] | None = None,
    tune: bool = False,
    tune_seeds: int = 1,
    validation_per_class: int | None = None,
    jobs: int = 1,
    quiet: bool = False,
) -> Comparison:
    """Train every method with every seed and compare them: what ``ltloss compare`` does.

    The folder ``out`` receives results.csv, comparison.html and, with ``tune``, tuning.csv. Each finished training is
    one file. A call with the same ``out`` therefore continues a comparison that was killed, or adds methods and seeds.

    Args:
        out: folder for the results; a new one, or that of an earlier comparison.
        given: settings as for ``ltloss train``, at least ``data``. They override the recipe and the methods, and are
            not tuned. Options of losses (``scale``, ``margin``, ``tau``, ``loss_options``) apply to the losses that
            have them.
        methods: names in ``ltloss.training.comparison.methods.METHODS``.
        recipe: a name in ``ltloss.training.comparison.recipes.RECIPES``, or None for the defaults of ``ltloss train``.
        seeds: the number of trainings of each method, with seeds 0, 1, ..., on the same images.
        vary: maps a setting or an option of the losses to values. Every combination becomes a variant of every method,
            on top of its chosen values.
        tune: choose values from each method's search space by the balanced accuracy of the last epoch on a validation
            split, climbing along each axis (``ltloss.training.comparison.climb.next_points``).
        tune_seeds: the number of trainings of each trial; their mean decides.
        validation_per_class: images of each class to hold out of the training file before the long tail is cut. None:
            a fifth of the smallest class. The test split is not read before tuning is finished.
        jobs: the number of parallel trainings, in processes of one thread each. More than one needs
            ``if __name__ == "__main__":`` in a script.
        quiet: show no progress bar.

    Returns:
        The results; ``print(comparison.to_text())`` shows the table.

    Raises:
        UserError: settings, methods, data or ``out`` cannot be used. Raised before anything is trained.

    See also: :class:`ltloss.sklearn.LongTailClassifier`, which tunes a classifier over embeddings.

    Example:
        >>> from ltloss.training import compare
        >>> settings = {"data": "digits", "imbalance": 10, "epochs": 1, "batch_size": 128, "device": "cpu"}
        >>> found = compare("comparison", settings, ["ce", "cosine"], seeds=1, quiet=True)
        >>> [(run.method, run.seed) for run in found.runs]
        [('ce', 0), ('cosine', 0)]
    """
    check_whole_number("jobs", jobs)
    for name in RENAMED.keys() & set(methods):
        warn_deprecated(f"the method {name} is called {RENAMED[name]} now")
    names = tuple(dict.fromkeys(RENAMED.get(name, name) for name in methods))
    given, vary = renamed_keys(given, FORMER_SETTINGS), renamed_keys(vary or {}, FORMER_SETTINGS)
    plan = ComparisonSpec(given, names, recipe, seeds, vary, tune, tune_seeds, validation_per_class)
    settings = Settings(**plan.settings)
    train = load_split(settings, "train")
    check_applies(settings, train.shape)
    for limits in _limits(plan):
        apply_limits(train, replace(settings, **limits), "train")  # which refuses what the data does not allow
    plan = replace(plan, embeddings=len(train.shape) == 1)
    if tune and validation_per_class is None:
        plan = replace(plan, validation_per_class=default_validation(train.labels))
    refuse_if_written(Path(out))
    refuse_foreign_files(Path(out), MANIFEST, " than a comparison")
    with owned(Path(out)), Workers(_open_folder(Path(out), plan), jobs, quiet=quiet) as workers:
        grid = _Grid(plan, Path(out), workers, fingerprint(train))
        trials = list(grid.tune()) if tune else []
        runs = list(grid.final({trial.method: trial.values for trial in trials if trial.chosen}))
    found = Comparison(Path(out), plan.settings, settings.thresholds, tuple(runs), tuple(trials))
    write_tables(found)
    write_page(found)
    return found


def _limits(plan: ComparisonSpec) -> list[dict[str, Any]]:
    """The varied limits of the long tail, each combination once, after those of the tuning, which are none."""
    found: list[dict[str, Any]] = [{}]
    for variant in plan.variants:
        limits = {name: value for name, value in variant.items() if name in ("imbalance", "limit_per_class")}
        found += [limits] if limits not in found else []
    return found


def _open_folder(out: Path, plan: ComparisonSpec) -> Path:
    """Write the manifest, remove unfinished files of a killed comparison, and return the folder."""
    remove_leftovers(out, MANIFEST)
    for folder in (out / "runs", out / "models"):
        remove_leftovers(folder, "")
    record = {name: getattr(plan, name) for name in ("recipe", "settings", "methods", "seeds", "vary", "tune")}
    record |= {name: stored(record[name]) for name in ("settings", "vary")}
    write_file(out / MANIFEST, (json.dumps(record, indent=2) + "\n").encode())
    return out


@dataclass(frozen=True)
class ComparisonSpec:
    """The arguments of ``compare``, checked, and the jobs that follow from them; UserError for bad arguments."""

    given: Mapping[str, Any]
    methods: tuple[str, ...]
    recipe: str | None
    seeds: int
    vary: Mapping[str, Sequence[Any]]
    tune: bool
    tune_seeds: int
    validation_per_class: int | None
    embeddings: bool = False  # what the data are, once they are read

    def __post_init__(self) -> None:
        """Check everything now, rather than fail after hours of training."""
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
            if name in MAY_DIFFER:  # its values would share one training, as the key of a job does not tell them apart
                raise UserError(f"--vary {name} cannot be varied: all trainings have it in common; give it once")
        self._check_loss_options()
        for name in self.needed:
            for values in [
                {},
                *([{key: value} for key, axis in self.space(name).items() for value in axis] if self.tune else []),
                *(self.variants if name in self.methods else []),
            ]:
                validate_job(self.job(name, {}, values, 0, ""))

    def _check_loss_options(self) -> None:
        losses = [method(name).settings["loss"] for name in self.needed if method(name).second_stage is None]
        for name, value in _loss_options(self.given).items():
            if not any(takes_option(loss, name) for loss in losses):
                known = sorted({option for loss in losses for option in option_names(loss)})
                raise UserError(
                    f"none of the losses {', '.join(losses)} has an option {name} (given: {value}); remove it. Their "
                    f"options are: {', '.join(known)}"
                )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings common to all trainings: the recipe, overridden by what was given."""
        chosen = recipe_settings(self.recipe, self.given.get("optimizer", "sgd")) if self.recipe else {}
        settings = {**chosen, **self.given}
        if not settings.get("data"):
            raise UserError(f"--data is missing; give {ACCEPTED}")
        settings = absolute_paths(settings)
        settings.setdefault("data_seed", 0)
        device = choose_device(settings.get("device"))
        settings["device"] = str(device)
        if settings.get("amp") is None:
            settings["amp"] = device.type == "cuda" or (self.recipe is not None and cpu_has_bfloat16())
        Settings(**settings)  # which checks them
        return settings

    @cached_property
    def needed(self) -> tuple[str, ...]:
        """The methods, after those whose networks their second stages begin with."""
        bases = [method(name).base for name in self.methods if method(name).base]
        return tuple(dict.fromkeys([*bases, *self.methods]))

    @cached_property
    def variants(self) -> list[dict[str, Any]]:
        """Every combination of the varied values; one empty combination where nothing is varied."""
        return [dict(zip(self.vary, values, strict=True)) for values in itertools.product(*self.vary.values())]

    def space(self, name: str) -> dict[str, list[Any]]:
        """The axes of a method's search space, without settings and options that were given."""
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
        """The job of one training of method ``name``: its ``chosen`` values, overridden by ``values``.

        ``fingerprint`` is the checksum of the images. The job of a second stage holds that of its first stage. With
        ``validation_per_class`` the job is a trial, of which only the last epoch is measured.
        """
        kind = method(name)
        values = {**chosen.get(name, {}), **values}
        if kind.second_stage is None:
            settings = with_values(self._method_settings(kind), values) | {"seed": seed}
            if validation_per_class is not None:
                settings["evaluate_every"] = Settings(**settings).epochs
            if self.embeddings:  # here, so that the scale in force is in the key
                settings["scale"] = with_frozen_scale(Settings(**settings)).scale
            return Job(settings, fingerprint, validation_per_class, keep_model=name in self._bases)
        known = {**kind.settings, **values}
        second_stage = {key: known[key] for key in SECOND_STAGE_SETTINGS if key in known}
        below = {key: value for key, value in values.items() if key not in second_stage}
        base = self.job(kind.base, chosen, below, seed, fingerprint, validation_per_class)
        return Job(base.settings, fingerprint, validation_per_class, second_stage, base)

    @cached_property
    def _bases(self) -> set[str]:
        return {method(name).base for name in self.methods}

    def _method_settings(self, kind: Method) -> dict[str, Any]:
        """Recipe, method and what was given, each overriding the former; given options only if the loss has them."""
        loss, options = kind.settings["loss"], _loss_options(self.given)
        others = {
            name: value for name, value in self.settings.items() if name not in options and name != "loss_options"
        }
        known = {name: value for name, value in options.items() if takes_option(loss, name)}
        given = {name: value for name, value in others.items() if name in self.given}
        return with_values(with_values(others, kind.settings), {**given, **known})


def check_whole_number(name: str, value: Any) -> None:
    """Raise UserError unless ``value`` is None or an integer >= 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(f"{name} must be an integer >= 1; got {value!r}")


def _loss_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of losses among the given settings."""
    common = {name: given[name] for name in ("scale", "margin", "tau") if given.get(name) is not None}
    return {**common, **given.get("loss_options", {})}


@dataclass(frozen=True)
class _Grid:
    """A plan with the folder that it fills, the workers, and the checksum of the training file."""

    plan: ComparisonSpec
    out: Path
    workers: Workers
    train: str

    def tune(self) -> Iterator[Trial]:
        """Run and yield every trial, the best of each method marked; first stages come first. Reads no test image."""
        plan = self.plan
        first = [name for name in plan.needed if method(name).second_stage is None]
        chosen: dict[str, Mapping[str, Any]] = {}
        for names in (first, [name for name in plan.needed if name not in first]):
            for name, found in self._climbed(names, chosen).items():
                best = _best(found)
                chosen[name] = best.values
                ends = edges(plan.space(name), best.values)
                yield from (replace(trial, chosen=True, edges=ends) if trial is best else trial for trial in found)

    def _climbed(self, names: Sequence[str], chosen: _Chosen) -> dict[str, list[Trial]]:
        """The trials of each method, in the order in which they ran; all methods climb side by side."""
        found: dict[str, list[Trial]] = {name: [] for name in names}
        while True:
            asked = [
                (name, values, self._trial_jobs(name, chosen, values))
                for name in names
                for values in next_points(self.plan.space(name), [(t.values, t.accuracy) for t in found[name]])
            ]
            if not asked:
                return found
            self._run([job for *_, jobs in asked for job in jobs], "trial")
            for name, values, jobs in asked:
                found[name].append(Trial(name, values, *self._judged(jobs)))

    def _trial_jobs(self, name: str, chosen: _Chosen, values: Mapping[str, Any]) -> list[Job]:
        held_out = self.plan.validation_per_class
        return [self.plan.job(name, chosen, values, seed, self.train, held_out) for seed in range(self.plan.tune_seeds)]

    def _judged(self, jobs: Sequence[Job]) -> tuple[float | None, float]:
        """Mean balanced accuracy of the last epoch over the seeds, None if one diverged; and the summed seconds."""
        results = [self._result(job) for job in jobs]
        seconds = sum(float(result["seconds"]) for result in results)
        if any(result["failed"] for result in results):
            return None, seconds
        return statistics.mean(float(result["last"]["balanced_accuracy"]) for result in results), seconds

    def final(self, chosen: _Chosen) -> Iterator[FinalRun]:
        """Train on the whole training file with the chosen values; yield the results on the test split."""
        plan = self.plan
        settings = Settings(**plan.settings)
        both = f"{self.train}-{fingerprint(load_split(settings, 'test'))}"
        planned = [
            (name, variant, seed, plan.job(name, chosen, variant, seed, both))
            for name in plan.methods
            for variant in plan.variants
            for seed in range(plan.seeds)
        ]
        self._run([job for *_, job in planned], "run")
        for name, variant, seed, job in planned:
            yield FinalRun(name, chosen.get(name, {}), variant, seed, self._result(job), settings.thresholds)

    def _run(self, jobs: Sequence[Job], what: str) -> None:
        """Run the jobs; first stages before second stages, which need their networks."""
        bases = [job.base for job in jobs if job.base is not None]
        first = [*bases, *(job for job in jobs if job.base is None)]
        for part in (first, [job for job in jobs if job.base is not None]):
            if part:
                self.workers.run(part, what)

    def _result(self, job: Job) -> dict[str, Any]:
        result = job.result(self.out)
        if result is None:
            raise UserError(f"{job.result_file(self.out)} is gone or damaged; run the command again")
        return result


def _best(found: Sequence[Trial]) -> Trial:
    worked = [trial for trial in found if trial.accuracy is not None and not math.isnan(trial.accuracy)]
    if not worked:
        raise UserError(
            f"every trial of {found[0].method} diverged, the first with {described(found[0].values)}; lower --lr"
        )
    return max(worked, key=lambda trial: trial.accuracy or 0.0)
