"""What a fit does: weights, prior, temperature, early stopping, going on; and what it refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from helpers.refusals import refused

pytest.importorskip("sklearn", "1.6")

from helpers.embeddings import quick, same, tail
from scipy import sparse
from sklearn.metrics import log_loss

from ltloss import current_keep_exponentials, current_workspace
from ltloss._estimator.heads import Classifier
from ltloss._estimator.space import sent_to
from ltloss._estimator.training import Training
from ltloss.sklearn import LongTailClassifier


def test_rows_of_weight_zero_are_not_there() -> None:
    X, y = tail()
    weights = np.random.default_rng(1).integers(0, 2, len(y)).astype(float)
    weights[[0, -1]] = 1.0
    X[weights == 0] = 1e6
    kept = weights > 0
    assert same(quick().fit(X, y, sample_weight=3 * weights), quick().fit(X[kept], y[kept], 3 * weights[kept]))


def test_weights_are_the_counts() -> None:
    X, y = tail()
    weights = np.where(y == 5, 8.0, 1.0)
    found = quick().fit(X, y, weights).partial_fit(X[-1:], y[-1:], sample_weight=[2.0])
    assert found.class_counts_.tolist() == [200, 100, 50, 25, 12, 6 * 8 + 2]


@pytest.mark.parametrize("loss", ["linear", "cosine"])
def test_class_weights_move_the_border(loss: str) -> None:
    X, y = tail(spread=2.5)
    held, _ = tail(seed=1, spread=2.5)
    plain = quick(loss=loss, scales=[8], max_iter=20).fit(X, y)
    towards = quick(loss=loss, scales=[8], max_iter=20, class_weight={3: 20.0}).fit(X, y)
    assert np.mean(towards.predict(held) == 3) > 1.5 * np.mean(plain.predict(held) == 3)


def test_the_prior_of_the_data_to_come() -> None:
    X, y = tail(spread=2.5)
    held, truth = tail(seed=1, spread=2.5)
    uniform, counts = (quick(class_prior=prior).fit(X, y) for prior in ("uniform", "counts"))

    def recall(found: LongTailClassifier) -> float:
        right = found.predict(held) == truth
        return float(np.mean([right[truth == label].mean() for label in range(6)]))

    assert counts.score(held, truth) > uniform.score(held, truth) + 0.02
    assert recall(uniform) > recall(counts) + 0.02
    assert np.array_equal(uniform.set_params(class_prior="counts").prototypes_, counts.prototypes_)


def test_the_temperature_improves_probabilities_elsewhere() -> None:
    X, y = tail(width=32, spread=4.0)
    held, truth = tail(seed=1, width=32, spread=4.0)
    found = quick(class_prior="counts", validation_fraction=0.3, max_iter=40).fit(X, y)
    assert found.temperature_ > 1.2
    calibrated = log_loss(truth, found.predict_proba(held))
    error = found.calibration_error_
    found.temperature_ = 1.0
    assert calibrated < 0.95 * log_loss(truth, found.predict_proba(held))
    assert error is not None
    assert 0.0 < error < 0.2


def test_without_a_validation_part_there_is_no_temperature() -> None:
    X, y = tail()
    found = quick(validation_fraction=None).fit(X, y)
    assert (found.temperature_, found.validation_score_, found.calibration_error_) == (1.0, None, None)


def test_early_stopping_takes_the_best_pass() -> None:
    X, y = tail(spread=3.0)
    stopped = quick(early_stopping=True, max_iter=60, n_iter_no_change=3).fit(X, y)
    assert stopped.n_iter_ < 60
    assert stopped.validation_score_ is not None
    ended = quick(max_iter=60).fit(X, y)
    assert ended.n_iter_ == 60
    assert stopped.validation_score_ >= ended.validation_score_


def test_warm_start_goes_on() -> None:
    X, y = tail()
    found = quick(warm_start=True).fit(X, y)
    before, space = found.prototypes_.copy(), found.whitening_.copy()
    found.set_params(lr=1e-9, loss="auto").fit(X, y)
    np.testing.assert_allclose(found.prototypes_, before, atol=1e-4)
    assert np.array_equal(found.whitening_, space)
    assert found.loss_ == "linear"
    with refused("warm_start"):
        found.fit(X, y + 1)


def test_partial_fit_learns_from_one_part_after_another() -> None:
    X, y = tail()
    held, truth = tail(seed=1)
    found = quick(loss="auto", lr=0.03)
    assert found.partial_fit(X[::2], y[::2], classes=range(6)).loss_ == "cosine-32"
    for _ in range(3):
        found.partial_fit(X[1::2], y[1::2])
    assert found.n_iter_ == 4
    assert found.score(held, truth) > 0.85
    assert found.class_counts_.sum() == pytest.approx(len(y[::2]) + 3 * len(y[1::2]))


def test_a_class_that_comes_later() -> None:
    X, y = tail()
    found = quick(lr=0.03).partial_fit(X[y < 5], y[y < 5], classes=range(6))
    assert not (found.predict(X) == 5).any()
    assert (found.predict_proba(X)[:, 5] == 0).all()
    found.partial_fit(X[y > 2], y[y > 2])
    assert np.mean(found.predict(X[y == 5]) == 5) > 0.8
    before = found.predict_proba(X)
    with refused("7", "classes"):
        found.partial_fit(X[:3], [0, 1, 7])
    assert np.array_equal(found.predict_proba(X), before)


def test_a_step_leaves_its_loss_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read it makes the host wait for a GPU; that is done once a pass."""
    losses: list[Any] = []
    whole = Training._step
    monkeypatch.setattr(Training, "_step", lambda *given: losses.append(whole(*given)) or losses[-1])
    quick(validation_fraction=None, scales=[16]).fit(X, Y)
    assert {type(loss) for loss in losses} == {torch.Tensor}
    assert not any(loss.requires_grad for loss in losses)


def test_rows_go_to_a_gpu_without_waiting_for_the_steps_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's copies wait unless they are told not to, and start from pinned memory."""
    sent: list[tuple[str, bool]] = []

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        sent.append((device.type, non_blocking))
        return tensor

    rows = torch.arange(3.0)
    with monkeypatch.context() as patched:  # a GPU need not be there
        patched.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
        patched.setattr(torch.Tensor, "to", to)
        found = sent_to(torch.device("cuda"), rows)
        assert sent_to(torch.device("cpu"), rows) is rows
    assert torch.equal(found, rows)
    assert found is not rows
    assert sent == [("cuda", True), ("cpu", False)]


def test_a_device_without_float64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses sum in float64, which Apple's devices lack."""

    def without_float64(*_: Any, dtype: torch.dtype = torch.float32, **__: Any) -> None:
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    with monkeypatch.context() as patched, refused("device", "'mps'", "float64"):
        patched.setattr(torch, "empty", without_float64)
        quick(device="mps").fit(X, Y)


def test_partial_fit_takes_the_rate_and_the_device_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = tail()
    found = quick(lr=0.03).partial_fit(X, y, classes=range(6))
    before = found.prototypes_.copy()
    found.set_params(lr=1e-12).partial_fit(X, y)
    np.testing.assert_allclose(found.prototypes_, before, atol=1e-5)
    places: list[str] = []

    def begun(candidate: object, start: Classifier, *given: object) -> Training:
        places.append(start.prototypes.device.type)
        return Training(candidate, start, *given)  # type: ignore[arg-type]

    monkeypatch.setattr("ltloss._estimator.fitting.Training", begun)
    found.partial_fit(X, y)
    assert places == []
    with pytest.raises(ValueError, match="meta"):  # where nothing is computed
        found.set_params(device="meta").partial_fit(X, y)
    assert places == ["meta"]


def test_partial_fit_goes_on_after_fit() -> None:
    X, y = tail()
    found = quick(loss="cosine", lr=1e-9).fit(X, y)
    before = found.predict_proba(X)
    np.testing.assert_allclose(found.partial_fit(X, y).predict_proba(X), before, atol=1e-4)


def test_a_bar_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    quick(refit=False).fit(*tail())
    assert capsys.readouterr().err == ""
    quick(refit=False, verbose=1).fit(*tail())
    assert "linear: 100%" in capsys.readouterr().err


X, Y = tail()
WITH_NAN = np.where(np.arange(len(X))[:, None] == 3, np.nan, X)
REFUSED: dict[str, tuple[dict[str, Any], Any, Any, type[Exception]]] = {
    "NaN": ({}, WITH_NAN, Y, ValueError),
    "infinite": ({}, np.where(np.isnan(WITH_NAN), np.inf, WITH_NAN), Y, ValueError),
    "one class": ({}, X, np.zeros(len(X)), ValueError),
    "sparse": ({}, sparse.csr_matrix(X), Y, TypeError),
    "other lengths": ({}, X, Y[1:], ValueError),
    "continuous": ({}, X, Y + 0.5, ValueError),
    "no class with two": ({}, X[:4], list("abcd"), ValueError),
    "beyond float32": ({}, X.astype(np.float64) * 1e200, Y, ValueError),
    "loss": ({"loss": "hinge"}, X, Y, ValueError),
    "no scale": ({"loss": "cosine", "scales": []}, X, Y, ValueError),
    "negative scale": ({"loss": "cosine", "scales": [-1.0]}, X, Y, ValueError),
    "one number for the scales": ({"scales": 16}, X, Y, TypeError),
    "device": ({"device": "gpu"}, X, Y, ValueError),
    "absent device": ({"device": "cuda:99"}, X, Y, ValueError),
    "nothing to choose by": ({"loss": "auto", "validation_fraction": None}, X, Y, ValueError),
    "fraction": ({"validation_fraction": 1.5}, X, Y, ValueError),
    "batch": ({"batch_size": 0}, X, Y, ValueError),
    "prior": ({"class_prior": "empirical"}, X, Y, ValueError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_left_as_it_was(case: str) -> None:
    options, features, labels, error = REFUSED[case]
    found = quick().fit(X[:, :7], np.array(list("abcdef"))[Y])
    before = dict(vars(found.set_params(**options)))
    with pytest.raises(error):
        found.fit(features, labels)
    assert vars(found).keys() == before.keys()
    assert all(vars(found)[name] is value for name, value in before.items())


def test_a_width_that_changes() -> None:
    found = quick().fit(X, Y)
    with pytest.raises(ValueError, match=r"7 features.*8 features"):
        found.predict(X[:, :7])
    with pytest.raises(ValueError, match=r"7 features.*8 features"):
        found.partial_fit(X[:, :7], Y)
    assert found.n_features_in_ == 8


def test_a_failed_part_changes_nothing() -> None:
    found = quick(loss="cosine").partial_fit(X, Y, classes=range(6))
    before = found.predict_proba(X)
    with pytest.raises(ValueError):
        found.partial_fit(WITH_NAN, Y)
    with pytest.raises(ValueError):
        found.partial_fit(X.astype(np.float64) * 1e200, Y)
    assert np.array_equal(found.predict_proba(X), before)


def test_classes_with_one_sample_stay_in_training() -> None:
    single = np.r_[Y, 6, 7]
    features = np.r_[X, 40.0 + np.zeros((1, 8), np.float32), -40.0 + np.zeros((1, 8), np.float32)]
    found = quick(validation_fraction=0.5).fit(features, single)
    assert found.predict(features[-2:]).tolist() == [6, 7]


def test_fits_in_threads_are_those_of_one_after_the_other() -> None:
    """The switch of their steps is the process's; it is left as it was."""
    before = current_workspace(), current_keep_exponentials()
    X, y = tail()
    alone = quick().fit(X, y)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: quick().fit(X, y), range(8)))
    assert (current_workspace(), current_keep_exponentials()) == before
    assert all(same(one, alone) for one in found)
