"""A classifier over embeddings for scikit-learn, from ten classes to millions (``pip install 'ltloss[sklearn]'``)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import _check_partial_fit_first_call, check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from ltloss._estimator import files
from ltloss._estimator.calibration import block_rows
from ltloss._estimator.fitting import Fitted, Options, Task, fit, fit_more
from ltloss._estimator.heads import Candidate, Classifier, offset_of
from ltloss._estimator.space import Array, Batches, Part, Space
from ltloss._validation import check_choice, check_count, check_number, check_type

__all__ = ["LongTailClassifier", "TopClasses"]

_DTYPES = (np.float32, np.float64, np.float16)  # taken as they are; anything else becomes float32


class TopClasses(NamedTuple):
    """The k best classes of each sample, best first: their labels and their probabilities, (N, k) each.

    See also: :meth:`LongTailClassifier.top_k`, which returns it.
    """

    label: Array
    probability: Array


class LongTailClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    r"""Embeddings in, classifier out, for classes with very unequal numbers of samples; no N×C logits in ``fit``.

    Features are centred and whitened by their covariance within the classes, z = Wᵀ(x − x̄). A class has the logit
    s·cos(z, w_c), or z·w_c + b_c for ``"linear"``. Training adds log π_c to it, π the shares of the classes
    (balanced softmax), and starts with every w_c at the mean of its class. Prediction uses
    softmax(logit/T + log prior_c), with the ``class_prior`` and with a temperature T found on a validation part.

    Args:
        loss: ``"linear"``, ``"cosine"`` at the best of ``scales``, or ``"auto"``, the best of both. Where there is a
            choice each is trained for a tenth of the steps, and the validation part decides.
        scales: the s to try. One leaves ``"cosine"`` no choice.
        class_prior: what to expect of the data to predict: ``"uniform"``, all classes alike, or ``"counts"``, as in the
            training data. It also says what the validation part measures: the mean of the classes' recalls, or
            accuracy.
        class_weight: None, ``"balanced"`` or a dict from label to weight: a factor on the loss of its samples, and on
            what they count for in the validation part. It comes on top of the prior, which is of the counts alone.
        max_iter: passes over the training data. None: 4, and more where they would be fewer than 100 steps.
        batch_size: samples of a step.
        lr: learning rate of AdamW, divided by √D for the prototypes; it falls to 0 along a cosine.
        early_stopping: stop when ``n_iter_no_change`` passes brought nothing on the validation part, and take the best.
        n_iter_no_change: see there.
        validation_fraction: of the training data, by class, held out of training; the last sample of a class never is.
            None holds nothing out: then there is no choice, no early stopping and no temperature.
        refit: at the end train anew, as many passes, on everything, what was held out included; the temperature stays.
            False keeps the classifier that never saw the validation part, in little more than half the time.
        warm_start: ``fit`` goes on from the classifier that is there, with its loss and its space.
        random_state: seed, RandomState or None, as in scikit-learn. A seed gives the same classifier each time, with
            the same number of threads.
        device: ``"cpu"``, ``"cuda"``, ``"auto"`` or a torch.device. What is fitted is in arrays of numpy.
        verbose: show a progress bar.

    Attributes:
        classes_: (C,) labels, sorted.
        class_counts_: (C,) summed sample weights of the training samples, those held out included.
        loss_: what was chosen: ``"linear"``, or ``"cosine-32"`` for s = 32.
        validation_scores_: what each candidate reached while one was chosen, by name; empty where none was.
        validation_score_, calibration_error_: of the classifier before ``refit`` on the validation part: recall or
            accuracy, see ``class_prior``, and the expected calibration error in 15 bins; None without a validation
            part. T was chosen on the same rows, so the error elsewhere is a little larger. The mean recall is an
            estimate: a row counts by 1/n, n all samples of its class, because chance decides how many of a small class
            are held out.
        temperature_: T, 1 without a validation part.
        prototypes_, intercept_: (C, D) and (C,): the logits before T and prior are z·prototypes_ᵀ + intercept_, where
            cosines take z with its length divided out.
        mean_, whitening_: x̄ (D,) and W (D, D); (D,) for more than 4096 features, which are scaled only.
        n_iter_: passes that ``prototypes_`` took; with early stopping, up to the best one.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

    Raises:
        ValueError, TypeError: by ``fit``, as scikit-learn has it: NaN, one class, sparse X, another number of features,
            options out of range; a validation part where every class has one sample. A fit that fails leaves the
            estimator as it was.

    ``partial_fit`` makes one pass at a constant rate over the samples it is given. Space and start are those of its
    first call, which has to name all ``classes``; one that comes later starts at its mean then. It has no validation
    part: ``"auto"`` and ``"cosine"`` take the middle one of ``scales``, of two the second.

    See also: :class:`ltloss.LogitAdjustedLoss` and :class:`ltloss.LinearSoftmaxLoss`, the losses that it trains.

    Sources: Ren et al., Balanced meta-softmax, NeurIPS 2020, eq. 4; Menon et al., Logit adjustment, ICLR 2021, eq. 10;
    Guo et al., On calibration of modern neural networks, ICML 2017. Whitening within classes: Fisher's discriminant.

    Example:
        >>> import numpy as np
        >>> from ltloss.sklearn import LongTailClassifier
        >>> draw, y = np.random.default_rng(0), np.repeat(["common", "rare"], [90, 10])
        >>> X = draw.normal(size=(100, 8)) + 2 * (y == "rare")[:, None]
        >>> classifier = LongTailClassifier(random_state=0).fit(X, y)
        >>> classifier.predict(np.full((1, 8), 2.0))
        array(['rare'], dtype='<U6')
        >>> classifier.top_k(X[:3], k=2).label.shape
        (3, 2)
    """

    classes_: Array

    def __init__(
        self,
        loss: Literal["auto", "linear", "cosine"] = "auto",
        *,
        scales: Sequence[float] = (16.0, 32.0),
        class_prior: Literal["uniform", "counts"] = "uniform",
        class_weight: dict[Any, float] | Literal["balanced"] | None = None,
        max_iter: int | None = None,
        batch_size: int = 512,
        lr: float = 0.12,
        early_stopping: bool = False,
        n_iter_no_change: int = 2,
        validation_fraction: float | None = 0.1,
        refit: bool = True,
        warm_start: bool = False,
        random_state: int | np.random.RandomState | None = None,
        device: str | torch.device = "auto",
        verbose: bool | int = False,
    ) -> None:
        self.loss = loss
        self.scales = scales
        self.class_prior = class_prior
        self.class_weight = class_weight
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.lr = lr
        self.early_stopping = early_stopping
        self.n_iter_no_change = n_iter_no_change
        self.validation_fraction = validation_fraction
        self.refit = refit
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LongTailClassifier:
        """Fit the classifier.

        Args:
            X: embeddings (N, D), float16, float32 or float64; may be memory-mapped.
            y: labels (N,) of any type.
            sample_weight: (N,), or None for equal weights.

        Returns:
            The classifier itself.

        Raises:
            ValueError, TypeError: data or a parameter that cannot be used.
        """
        with self._whole_or_not_at_all():
            options, former = self._options(), self._fitted() if self.warm_start and hasattr(self, "loss_") else None
            X, y, weights = self._checked(X, y, sample_weight, reset=former is None)
            classes, labels = np.unique(y, return_inverse=True)
            if former is not None and not np.array_equal(classes, self.classes_):
                raise ValueError(f"warm_start needs the classes of the former fit, {self.classes_}; got {classes}")
            self.classes_ = classes
            task = self._task(X, y, labels, weights)
            if int((task.every.mass(len(classes)) > 0).sum()) < 2:
                raise ValueError("needs samples of at least 2 classes; with positive weight there is only one class")
            self.__dict__.pop("_training", None)
            self._learn(fit(task, options, former))
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> LongTailClassifier:
        """Train one pass over more samples, X (N, D) and y (N,), with ``sample_weight`` (N,) or None.

        The first call must name all ``classes`` to come, unless ``fit`` was called before. Returns the classifier.
        """
        with self._whole_or_not_at_all():
            options = self._options()
            first = _check_partial_fit_first_call(self, classes)
            X, y, weights = self._checked(X, y, sample_weight, reset=first)
            labels = np.searchsorted(self.classes_, y).clip(max=len(self.classes_) - 1)
            unknown = np.unique(y[self.classes_[labels] != y])
            if len(unknown):
                raise ValueError(f"y has labels that are not in classes: {unknown[:5]}; name them in the first call")
            if self.class_weight == "balanced":
                raise ValueError("class_weight 'balanced' needs all counts, which partial_fit has not; give a dict")
            task = self._task(X, y, labels, weights)
            if len(task.every.rows):
                former = self._fitted() if hasattr(self, "loss_") else None
                found, training = fit_more(task, options, former, self.__dict__.pop("_training", None))
                self._learn(found)
                self._training = training
        return self

    def decision_function(self, X: Any) -> Array:
        """Calibrated logits of X (N, D), with the log prior of ``class_prior``: (N, C).

        With two classes (N,), the logit of the second minus that of the first.
        """
        logits = self._by_blocks(X, lambda classifier, z: classifier.logits(z))
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, X: Any) -> Array:
        """Probabilities of the classes for X (N, D): (N, C) float32, computed block by block."""
        return self._by_blocks(X, lambda classifier, z: classifier.logits(z).softmax(1))

    def predict(self, X: Any) -> Array:
        """The most probable label (N,) of each sample of X (N, D), without the N×C logits."""
        index = self._by_blocks(X, lambda classifier, z: classifier.best(z)[:, 0], dense=False)
        return np.asarray(self.classes_[index])

    def top_k(self, X: Any, k: int = 5) -> TopClasses:
        """The k most probable labels of each sample of X (N, D), without the N×C logits.

        Returns ``TopClasses(label, probability)``, (N, k) each, best first. Raises ValueError for a k outside [1, C].
        """
        check_is_fitted(self, "prototypes_")
        if check_count("k", k) > len(self.classes_):
            raise ValueError(f"k must be at most the number of classes, {len(self.classes_)}; got {k}")

        def best(classifier: Classifier, z: Tensor) -> Tensor:
            index = classifier.best(z, k)
            chance = classifier.logits(z).softmax(1).gather(1, index)
            return torch.stack([index.double(), chance.double()], dim=1)

        index, chance = np.moveaxis(self._by_blocks(X, best), 1, 0)
        return TopClasses(self.classes_[index.astype(np.int64)], chance)

    def save(self, path: str | Path) -> None:
        """Write the fitted classifier into one .npz file, arrays and a line of JSON; no pickle.

        A RandomState is left out, and so is what the optimizer keeps between calls of ``partial_fit``.

        Raises:
            sklearn.exceptions.NotFittedError: there is nothing to save.
            OSError: the file cannot be written; a former one is as it was.
        """
        check_is_fitted(self, "prototypes_")
        params = self.get_params()
        weight = params.pop("class_weight")
        seed = self.random_state if isinstance(self.random_state, int | np.integer) else None
        params |= {"scales": list(self.scales), "device": str(self.device), "random_state": seed}
        if isinstance(weight, dict):  # keys of JSON are strings
            weight = list(weight.items())
        names = [name for name in vars(self) if name.endswith("_")]
        arrays = {name: getattr(self, name) for name in names if isinstance(getattr(self, name), np.ndarray)}
        values = {name: getattr(self, name) for name in names if name not in arrays}
        files.write(Path(path), arrays, {"params": params, "class_weight": weight, "values": values})

    @classmethod
    def load(cls, path: str | Path) -> LongTailClassifier:
        """Read a classifier from ``path``, a file of :meth:`save`. Raises ValueError for a damaged or other file."""
        with files.explained(Path(path)):
            arrays, about = files.read(Path(path))
            weight = about["class_weight"]
            loaded = cls(**about["params"], class_weight=dict(weight) if isinstance(weight, list) else weight)
            check_choice("class_prior", loaded.class_prior, ("uniform", "counts"))
            if loaded.device != "auto":
                torch.device(loaded.device)  # which need not be here: set_params takes another
            loaded.__dict__.update(arrays, **about["values"])
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and copies: without an optimizer on a GPU, which may be absent where they are read."""
        state = dict(super().__getstate__())
        if "_training" in state and state["_training"].head.weight.device.type != "cpu":
            del state["_training"]
        return state

    @contextmanager
    def _whole_or_not_at_all(self) -> Iterator[None]:
        """Restore all attributes after an error. What an optimizer has changed is then read from them again."""
        before = {name: value for name, value in vars(self).items() if name != "_training"}
        training = vars(self).get("_training")
        try:
            yield
        except BaseException:
            if "_training" in vars(self) and training is not None:  # refused before anything moved
                before["_training"] = training
            self.__dict__ = before
            raise

    def _options(self) -> Options:
        check_choice("loss", self.loss, ("auto", "linear", "cosine"))
        check_choice("class_prior", self.class_prior, ("uniform", "counts"))
        for name in ("early_stopping", "refit", "warm_start"):
            check_type(name, getattr(self, name), bool)
        if not isinstance(self.scales, Iterable):
            raise TypeError(f"scales must be a sequence of numbers, such as [{self.scales}]; got {self.scales!r}")
        scales = [check_number("scales", scale, above=0.0) for scale in self.scales] if self.loss != "linear" else []
        linear = [] if self.loss == "cosine" else [Candidate(None)]
        candidates = (*linear, *map(Candidate, scales))
        if not candidates:
            raise ValueError("scales must hold a number > 0 where loss is 'cosine'; got none")
        fraction = self.validation_fraction
        if fraction is not None:
            check_number("validation_fraction", fraction, above=0.0, at_most=0.5)
        elif len(candidates) > 1 or self.early_stopping:
            raise ValueError(
                "validation_fraction=None leaves nothing to choose a loss with or to stop by; give a fraction, or one "
                f"loss with one scale and early_stopping=False; got loss={self.loss!r}, scales={self.scales!r}"
            )
        patience = check_count("n_iter_no_change", self.n_iter_no_change)
        return Options(
            candidates,
            self.class_prior == "uniform",
            None if self.max_iter is None else check_count("max_iter", self.max_iter),
            check_count("batch_size", self.batch_size),
            check_number("lr", self.lr, above=0.0),
            patience if self.early_stopping else None,
            fraction,
            self.refit,
            self._device(),
            bool(self.verbose),
        )

    def _device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, dtype=torch.float64, device=self.device)  # in which the losses sum; Apple's devices lack it
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"device must be 'auto', or one that is here; got {self.device!r} ({reason})") from None
        return torch.device(self.device)

    def _checked(self, X: Any, y: Any, sample_weight: Any, *, reset: bool) -> tuple[Array, Array, Array]:
        X, y = validate_data(self, X, y, dtype=_DTYPES, reset=reset)
        with warnings.catch_warnings():  # few samples a class are no regression here
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
            check_classification_targets(y)
        return X, y, _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)

    def _task(self, X: Array, y: Array, labels: Array, weights: Array) -> Task:
        used = np.flatnonzero(weights > 0)
        part = Part(*map(torch.from_numpy, (used, labels[used], weights[used].astype(np.float32))))
        factors = compute_class_weight(self.class_weight, classes=self.classes_, y=y)
        if not bool(np.isfinite(factors).all()) or factors.min() < 0.0:
            raise ValueError(f"class_weight must be finite and not negative; got {self.class_weight!r}")
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        return Task(X, part, torch.from_numpy(factors).float(), torch.Generator().manual_seed(int(seed)))

    def _learn(self, found: Fitted) -> None:
        """Store the result of a fit in the attributes."""
        self.loss_, self.n_iter_, self.temperature_ = found.candidate.name, found.passes, found.temperature
        self.validation_score_, self.calibration_error_ = found.score, found.error
        self.validation_scores_ = found.scores or {}
        self.class_counts_ = found.counts.numpy()
        self.prototypes_, self.intercept_ = found.classifier.prototypes.numpy(), found.classifier.intercept.numpy()
        self.mean_, self.whitening_ = found.space.mean.numpy(), found.space.whitening.numpy()

    def _fitted(self) -> Fitted:
        """The inverse of :meth:`_learn`."""
        candidate = Candidate.named(self.loss_)
        return Fitted(
            Space(_tensor(self.mean_), _tensor(self.whitening_)),
            candidate,
            Classifier(_tensor(self.prototypes_), _tensor(self.intercept_), candidate.scale is not None),
            _tensor(self.class_counts_),
            self.n_iter_,
            self.temperature_,
            self.validation_score_,
            self.calibration_error_,
            self.validation_scores_,
        )

    def _by_blocks(self, X: Any, function: Callable[[Classifier, Tensor], Tensor], *, dense: bool = True) -> Array:
        """Apply a function of (classifier, features) to X block by block, and concatenate the results."""
        check_is_fitted(self, "prototypes_")
        X = validate_data(self, X, dtype=_DTYPES, reset=False)
        device, found = self._device(), self._fitted()
        offset = offset_of(found.counts, self.class_prior == "uniform")
        classifier = found.classifier.expecting(offset, found.temperature).to(device)
        whole: Array | None = None
        for rows, z in Batches(X, found.space.to(device), device).blocks(block_rows(classifier, dense=dense)):
            values = function(classifier, z).cpu().numpy()
            if whole is None:
                whole = np.empty((len(X), *values.shape[1:]), dtype=values.dtype)
            whole[rows] = values
        assert whole is not None  # scikit-learn refuses X without rows
        return whole


def _tensor(array: Array) -> Tensor:
    """As a tensor over the same memory, or a copy of a read-only array (joblib's)."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
