"""A whole fit: hold out, find the space, choose a loss, train, calibrate. Also one more pass for ``partial_fit``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ltloss._estimator.calibration import calibration_error, share_right, temperature, validation_mask
from ltloss._estimator.heads import Candidate, Classifier, offset_of
from ltloss._estimator.space import Array, Batches, Part, Space, class_means, of_class_means
from ltloss._estimator.training import Training, progress

__all__ = ["Fitted", "Options", "Task", "fit", "fit_more"]

_PASSES, _LEAST_STEPS = 4, 100  # with max_iter=None: passes, but at least so many steps
_TRIAL, _LEAST_TRIAL = 0.1, 50  # steps of a candidate's trial: this share of all steps, but at least so many


class Options(NamedTuple):
    """Options of a fit; see the arguments of the estimator."""

    candidates: tuple[Candidate, ...]
    uniform: bool
    max_iter: int | None
    batch_size: int
    lr: float
    patience: int | None  # passes without a better score before training stops; None: no early stopping
    fraction: float | None  # of each class to hold out; None: no validation part
    refit: bool
    device: torch.device
    verbose: bool

    def steps(self, rows: int) -> int:
        """Steps of a training on ``rows`` rows."""
        each = -(-rows // self.batch_size)
        return max(_PASSES * each, _LEAST_STEPS) if self.max_iter is None else self.max_iter * each


class Task(NamedTuple):
    """The data of a fit: all rows with their sample weights, and a factor (C,) on the loss of each class."""

    X: Array
    every: Part
    class_weight: Tensor
    generator: torch.Generator

    def weighted(self, part: Part) -> Part:
        """The part with its weights multiplied by those of the classes, and scaled to mean 1."""
        weights = part.weights * self.class_weight[part.labels]
        return part._replace(weights=weights / weights.mean())


class Fitted(NamedTuple):
    """The result of a fit; all tensors are on the CPU."""

    space: Space
    candidate: Candidate
    classifier: Classifier  # without temperature and prior
    counts: Tensor  # (C,) summed sample weights
    passes: int
    temperature: float = 1.0
    score: float | None = None  # accuracy on the validation part
    error: float | None = None  # calibration error on the validation part
    scores: dict[str, float] | None = None  # accuracy of each candidate in its trial, where there was a choice


def fit(task: Task, options: Options, former: Fitted | None = None) -> Fitted:
    """Fit anew, or continue from ``former`` with its space and its loss."""
    counts = task.every.mass(len(task.class_weight))
    part, held = task.every, None
    if options.fraction is not None:
        mask = validation_mask(part.labels, len(counts), options.fraction, task.generator)
        part, held = part.take(~mask), task.weighted(part.take(mask))
        if options.uniform:  # on average over the draw all classes count alike: how many rows of one it takes is chance
            held = held._replace(weights=held.weights / counts[held.labels])
    scores = None
    if former is None:
        space, means = of_class_means(task.X, part, len(counts))
        work = _Work(task, options, space, part, held, offset_of(counts, options.uniform))
        candidate = options.candidates[0]
        if len(options.candidates) > 1:
            scores = {each.name: work.tried(each, means) for each in options.candidates}
            candidate = Candidate.named(max(scores, key=scores.__getitem__))
        start = candidate.of_means(means)
    else:
        space, candidate, start = former.space, former.candidate, former.classifier
        work = _Work(task, options, space, part, held, offset_of(counts, options.uniform))
    classifier, passes = work.trained(candidate, start)
    found = Fitted(space, candidate, classifier, counts, passes, scores=scores)
    if held is not None:
        found = work.calibrated(found, held)
        if options.refit:
            again = options._replace(candidates=(candidate,), fraction=None, patience=None, max_iter=passes)
            anew = fit(task, again, former)
            found = found._replace(space=anew.space, classifier=anew.classifier)
    return found._replace(classifier=found.classifier.to(torch.device("cpu")))


class _Work:
    """The trainings of one fit on its device, and their scores on the validation part."""

    def __init__(
        self, task: Task, options: Options, space: Space, part: Part, held: Part | None, offset: Tensor
    ) -> None:
        self._options, self._generator = options, task.generator
        self._batches = Batches(task.X, space.to(options.device), options.device)
        self._part, self._held, self._offset = task.weighted(part), held, offset.to(options.device)
        self._counts = part.mass(len(offset))
        self._steps = options.steps(len(part.rows))

    def _training(self, candidate: Candidate, start: Classifier) -> Training:
        start = start.to(self._options.device)
        return Training(candidate, start, self._counts, self._options.lr, self._generator)

    def _run(self, training: Training, steps: int, after_pass: Callable[[], bool] | None = None) -> int:
        given = self._batches, self._part, steps, self._options.batch_size, self._generator
        with progress(steps, self._options.verbose, training.candidate.name) as bar:
            return training.run(*given, after_pass=after_pass, bar=bar)

    def _score(self, classifier: Classifier) -> float:
        assert self._held is not None
        return share_right(classifier.expecting(self._offset, 1.0), self._batches, self._held)

    def tried(self, candidate: Candidate, means: Tensor) -> float:
        """Accuracy of a candidate on the validation part after a short training."""
        training = self._training(candidate, candidate.of_means(means))
        self._run(training, max(int(_TRIAL * self._steps), min(self._steps, _LEAST_TRIAL)))
        return self._score(training.classifier())

    def trained(self, candidate: Candidate, start: Classifier) -> tuple[Classifier, int]:
        """The classifier after all steps, or the best one with early stopping, and how many passes it was trained."""
        training, patience = self._training(candidate, start), self._options.patience
        if patience is None:
            passes = self._run(training, self._steps)
            return training.classifier(), passes
        best, since, kept = -1.0, 0, training.classifier()

        def after_pass() -> bool:
            nonlocal best, since, kept
            now = training.classifier()
            score = self._score(now)
            since += 1
            if score > best:
                best, since, kept = score, 0, now
            return since >= patience

        passes = self._run(training, self._steps, after_pass)
        return kept, passes - since

    def calibrated(self, fitted: Fitted, held: Part) -> Fitted:
        """``fitted`` with temperature, score and calibration error from the held-out part."""
        found = temperature(fitted.classifier, self._offset, self._batches, held)
        classifier = fitted.classifier.expecting(self._offset, found)
        error = calibration_error(classifier, self._batches, held)
        return fitted._replace(temperature=found, score=share_right(classifier, self._batches, held), error=error)


def fit_more(task: Task, options: Options, former: Fitted | None, training: Training | None) -> tuple[Fitted, Training]:
    """One pass at a constant learning rate over all rows of the task, continuing from ``former``.

    Without ``former`` the space comes from these rows, and the loss is the middle candidate. ``training`` is that of
    the call before, or None; it begins anew on another device. Classes that appear for the first time start at their
    means.
    """
    classes, device = len(task.class_weight), options.device
    mass = task.every.mass(classes)
    if former is None:
        space, means = of_class_means(task.X, task.every, classes)
        cosines = [each for each in options.candidates if each.scale is not None] or options.candidates
        candidate = cosines[len(cosines) // 2]
        former = Fitted(space, candidate, candidate.of_means(means), torch.zeros(classes), 0)
    candidate, counts = former.candidate, former.counts + mass
    if training is None or training.head.weight.device != torch.empty(0, device=device).device:  # "cuda" is "cuda:0"
        training = Training(candidate, former.classifier.to(device), counts, options.lr, task.generator)
    training.lr = options.lr
    new = (former.counts == 0) & (mass > 0)
    start = former.classifier
    if new.any():
        start = candidate.of_means(class_means(task.X, task.every, classes, former.space))
    training.meet(start.to(device), new, counts, task.generator)
    part = task.weighted(task.every)
    steps = -(-len(part.rows) // options.batch_size)
    batches = Batches(task.X, former.space.to(device), device)
    with progress(steps, options.verbose, candidate.name) as bar:
        training.run(batches, part, steps, options.batch_size, task.generator, annealed=False, bar=bar)
    classifier = training.classifier().to(torch.device("cpu"))
    return former._replace(classifier=classifier, counts=counts, passes=former.passes + 1), training
