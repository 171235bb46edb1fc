"""LongTailClassifier as scikit-learn uses it: its own checks, pipelines, searches, copies; and files without pickle."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.memory import LargestTensor
from helpers.refusals import refused

from ltloss.testing import watching

pytest.importorskip("sklearn", "1.6")

import joblib
from helpers.embeddings import quick, same, tail
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from ltloss import sklearn
from ltloss._estimator.fitting import fit
from ltloss._estimator.heads import Classifier
from ltloss.sklearn import LongTailClassifier

BY_LOT = "which rows share a minibatch, and which are held out, is drawn; a row given twice is not a row of weight 2"


@parametrize_with_checks(
    [LongTailClassifier(max_iter=10)],
    expected_failed_checks=lambda estimator: {"check_sample_weight_equivalence_on_dense_data": BY_LOT},
)
def test_the_checks_of_scikit_learn(estimator: LongTailClassifier, check: Callable[[object], None]) -> None:
    check(estimator)


def test_a_long_tail_is_learned() -> None:
    X, y = tail()
    held, truth = tail(seed=1)
    found = quick(loss="auto").fit(X, y)
    assert set(found.validation_scores_) == {"linear", "cosine-16", "cosine-32"}
    assert found.loss_ == max(found.validation_scores_, key=found.validation_scores_.__getitem__)
    recalls = [np.mean(found.predict(held)[truth == label] == label) for label in range(6)]
    assert np.mean(recalls) > 0.85
    assert found.score(held, truth) > 0.95


def test_what_was_chosen_can_be_named() -> None:
    X, y = tail()
    assert quick(loss="cosine", scales=[20]).fit(X, y).loss_ == "cosine-20"
    assert quick(loss="cosine", scales=[1e2 / 3]).fit(X, y).validation_scores_ == {}


def test_in_a_pipeline_a_search_and_cross_validation() -> None:
    X, y = tail()
    pipeline = make_pipeline(StandardScaler(), quick())
    search = GridSearchCV(pipeline, {"longtailclassifier__class_prior": ["uniform", "counts"]}, cv=3).fit(X, y)
    assert search.best_score_ > 0.9
    assert cross_val_score(quick(), X, y, cv=3, n_jobs=1).min() > 0.85


def test_copies_predict_alike(tmp_path: Path) -> None:
    X, y = tail()
    found = quick().fit(X, y)
    assert not hasattr(clone(found), "loss_")
    joblib.dump(found, tmp_path / "found.joblib")
    mapped = joblib.load(tmp_path / "found.joblib", mmap_mode="r")  # its arrays are read-only
    for copied in (pickle.loads(pickle.dumps(found)), mapped):
        assert np.array_equal(copied.predict_proba(X), found.predict_proba(X))


@pytest.mark.parametrize("loss", ["auto", "cosine", "linear"])
def test_a_seed_gives_the_same_classifier(loss: str) -> None:
    X, y = tail()
    before = torch.random.get_rng_state()
    found = quick(loss=loss).fit(X, y)
    assert same(found, quick(loss=loss).fit(X, y))
    assert not same(found, quick(loss=loss, random_state=1).fit(X, y))
    assert torch.equal(before, torch.random.get_rng_state())  # of torch's own generator nothing was drawn


@pytest.mark.parametrize("labels", ["strings", "objects", "booleans"])
def test_labels_of_any_type_come_back(labels: str, tmp_path: Path) -> None:
    X, y = tail()
    names = {
        "strings": np.array(["f", "a", "z", "b", "q", "c"])[y],
        "objects": np.array(["f", "a", "z", "b", "q", "c"], dtype=object)[y],
        "booleans": y > 0,
    }[labels]
    found = quick().fit(X, names)
    assert found.predict(X).dtype == names.dtype
    assert np.mean(found.predict(X) == names) > 0.9
    found.save(tmp_path / "found.npz")
    loaded = LongTailClassifier.load(tmp_path / "found.npz")
    assert loaded.predict(X).dtype == names.dtype
    assert np.array_equal(loaded.predict(X), found.predict(X))


def test_saved_and_loaded(tmp_path: Path) -> None:
    X, y = tail()
    found = quick(
        loss="cosine", class_prior="counts", class_weight={np.int64(0): np.float32(2.0)}, max_iter=np.int64(4)
    ).fit(X, y)
    found.save(tmp_path / "found.npz")
    loaded = LongTailClassifier.load(tmp_path / "found.npz")
    assert loaded.get_params() == {**found.get_params(), "scales": [16.0, 32.0]}
    assert same(found, loaded)
    assert loaded.validation_scores_ == found.validation_scores_
    assert np.array_equal(found.predict_proba(X), loaded.predict_proba(X))
    assert loaded.partial_fit(X[:9], y[:9]).n_iter_ == found.n_iter_ + 1


def test_nothing_but_arrays_without_objects_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy 1 takes every keyword of savez for an array, ``allow_pickle`` too."""
    saved: dict[str, object] = {}
    monkeypatch.setattr(np, "savez", lambda file, **arrays: saved.update(arrays))
    X, y = tail()
    quick().fit(X, np.array(list("abcdef"), dtype=object)[y]).save(tmp_path / "found.npz")
    assert len(saved) > 5
    assert all(isinstance(array, np.ndarray) and not array.dtype.hasobject for array in saved.values())


def test_saved_on_a_machine_with_another_device(tmp_path: Path) -> None:
    X, y = tail()
    quick(loss="linear").fit(X, y).set_params(device="cuda:99").save(tmp_path / "found.npz")
    loaded = LongTailClassifier.load(tmp_path / "found.npz")
    with pytest.raises(ValueError):
        loaded.predict(X)
    assert loaded.set_params(device="cpu").predict(X).shape == y.shape


def test_only_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "found.npz"
    with pytest.raises(NotFittedError):
        quick().save(path)
    X, y = tail()
    for wrong in (b"", b"no archive at all", pickle.dumps({})):
        path.write_bytes(wrong)
        with refused(str(path), "LongTailClassifier"):
            LongTailClassifier.load(path)
    np.savez(path, prototypes_=X)
    with refused(str(path), "LongTailClassifier"):
        LongTailClassifier.load(path)
    fitted = quick().fit(X, y)
    for name, wrong in (("mean_", fitted.mean_[:3]), ("intercept_", fitted.intercept_.astype(np.float64))):
        other = copy.copy(fitted)
        setattr(other, name, wrong)
        other.save(path)
        with refused(str(path), name):
            LongTailClassifier.load(path)
    former = path.read_bytes()
    with pytest.raises(OSError):
        fitted.save(path / "below a file.npz")
    assert path.read_bytes() == former
    assert [file.name for file in tmp_path.iterdir()] == ["found.npz"]


def test_a_pickle_leaves_an_optimizer_on_a_gpu_behind() -> None:
    """Where it is read there may be no GPU; one on the CPU goes along, and a copy takes the same steps."""
    X, y = tail()
    found = quick().partial_fit(X, y, classes=range(6))
    again = pickle.loads(pickle.dumps(found))
    assert same(found.partial_fit(X, y), again.partial_fit(X, y))
    found._training.head.to("meta")  # in place of a GPU
    there = pickle.loads(pickle.dumps(found))
    assert "_training" not in vars(there)
    assert np.array_equal(there.predict(X), again.predict(X))
    assert there.partial_fit(X, y).n_iter_ == 3


def test_probabilities_by_blocks_are_those_of_the_whole() -> None:
    X, y = tail()
    found = quick(loss="cosine", class_prior="counts").fit(X, y)
    z = (X.astype(np.float64) - found.mean_) @ found.whitening_.astype(np.float64)
    logits = z / np.linalg.norm(z, axis=1, keepdims=True) @ found.prototypes_.T.astype(np.float64)
    logits = logits / found.temperature_ + np.log(found.class_counts_ / found.class_counts_.sum())
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(found.predict_proba(X), expected, atol=1e-5)
    np.testing.assert_allclose(found.decision_function(X), logits, atol=1e-4)
    best = found.top_k(X, k=3)
    assert np.array_equal(best.label[:, 0], found.predict(X))
    np.testing.assert_allclose(best.probability, np.sort(expected, axis=1)[:, :-4:-1], atol=1e-5)


@pytest.mark.parametrize("loss", ["linear", "cosine"])
def test_no_matrix_of_samples_by_classes(loss: str) -> None:
    classes, each, width = 6000, 2, 4
    y = np.repeat(np.arange(classes), each)
    X = np.random.default_rng(0).normal(size=(len(y), width)).astype(np.float32)
    whole = len(y) * classes
    with watching(LargestTensor()) as seen:
        found = LongTailClassifier(loss, scales=[16], max_iter=1, batch_size=4096, random_state=0).fit(X, y)
        found.predict(X[:100]), found.top_k(X[:100])
    assert seen.operators > 0
    assert seen.largest <= 1 << 22 < whole / 16
    with watching(LargestTensor()) as seen:
        assert found.predict_proba(X).shape == (len(y), classes)
    assert seen.largest <= 1 << 22


def test_many_classes_do_not_make_blocks_to_predict_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """``predict`` makes no logits, so their number need not be bounded; few rows at a time take longer."""
    classes, blocks = 6000, []
    draw = np.random.default_rng(0)
    X, y = draw.normal(size=(classes, 4)).astype(np.float32), np.arange(classes)
    found = LongTailClassifier("cosine", scales=[16], validation_fraction=None, max_iter=1, random_state=0).fit(X, y)

    def best(classifier: Classifier, z: torch.Tensor, k: int = 1) -> torch.Tensor:
        blocks.append(len(z))
        return whole(classifier, z, k)

    whole = Classifier.best
    monkeypatch.setattr(Classifier, "best", best)
    predicted = found.predict(X)
    assert blocks == [3000, 3000]
    assert np.array_equal(predicted, found.top_k(X, 1).label[:, 0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_features_are_read_in_place(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = tail()
    given = X.astype(dtype)
    given.flags.writeable = False
    seen = []
    monkeypatch.setattr(sklearn, "fit", lambda task, *rest: seen.append(task) or fit(task, *rest))
    assert quick().fit(given, y).score(given, y) > 0.9
    assert np.shares_memory(seen[0].X, given)
