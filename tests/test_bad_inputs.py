"""Bad inputs of the public Python API, one a line: the call, its error, and the facts that the message states.

Beside it stand the tables of `tests/ops/test_errors.py`, which hold every option against the function and the modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.refusals import refused

import ltloss
from ltloss import class_balance as balance
from ltloss import contrastive, export, extend, sub_centers
from ltloss.distributed import SampledAdamW, class_mesh, parallelize
from ltloss.extend import Bend, logsumexp_stats, margin_losses, reduce_losses
from ltloss.functional import (
    cosine_logsumexp,
    feature_norm_penalty,
    margin_cross_entropy,
    min_angle_regularizer,
    nearest_prototype,
    top_k,
)
from ltloss.interop import insightface
from ltloss.interop import pytorch_metric_learning as pml
from ltloss.margins import margin_cosine
from ltloss.optim import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD
from ltloss.soft_labels import soft_label_cross_entropy

X, W, Y = torch.randn(3, 5), torch.randn(4, 5), torch.tensor([0, 1, 2])
PAIRS, HALF = torch.tensor([[0, 1], [1, 2], [2, 3]]), torch.full((3, 2), 0.5)
SOFT = X, W, PAIRS, HALF
STATS = logsumexp_stats(X, W, Y, scale=3.0)
META, NAN, INF = "meta", float("nan"), float("inf")
ONES = torch.ones(4)
BOOL, COMPLEX, SPARSE = ONES > 0, ONES + 0j, ONES.to_sparse()
LINEAR = torch.nn.Linear(2, 2)

Row = tuple[Callable[[], Any], type[Exception], tuple[str, ...]]


def arcface(**options: Any) -> ltloss.ArcFaceLoss:
    return ltloss.ArcFaceLoss(4, 5, **options)


def long_tail(**options: Any) -> ltloss.LongTailLoss:
    return ltloss.LongTailLoss.from_counts([2, 1], 5, **options)


def cosface(dtype: torch.dtype | None = None) -> ltloss.CosFaceLoss:
    return ltloss.CosFaceLoss(4, 5, dtype=dtype)


def estimator(**options: Any) -> Any:
    pytest.importorskip("sklearn")
    from ltloss.sklearn import LongTailClassifier

    return LongTailClassifier(**{"loss": "linear", "max_iter": 1, **options})


def fitted(**options: Any) -> Any:
    return estimator(**options).fit(np.arange(24.0).reshape(12, 2) % 5, np.arange(12) % 3)


FUNCTIONS: list[Row] = [
    (lambda: cosine_logsumexp(X, W, Y, scale=0.0), ValueError, ("scale", "0.0", "0.0")),
    (lambda: cosine_logsumexp(X, W, Y, scale=1e300), ValueError, ("scale", "1e+30", "1e+300")),
    (lambda: cosine_logsumexp(X, W, Y, scale=1, log_prior=W[0, :3]), ValueError, ("log_prior", "(4,)", "(3,)")),
    (lambda: top_k(X, W, 0), ValueError, ("k", "4", "0")),
    (lambda: top_k(X, W, 5), ValueError, ("k", "4", "5")),
    (lambda: top_k(X, W, 1.0), ValueError, ("k", "1.0")),
    (lambda: top_k(X, W, True), ValueError, ("k", "True")),
    (lambda: nearest_prototype(W, [0]), TypeError, ("classes", "torch.Tensor", "(R,)", "list")),
    (lambda: nearest_prototype(W, torch.ones(2)), ValueError, ("classes", "(R,)", "torch.float32")),
    (lambda: nearest_prototype(W, torch.ones(2).bool()), ValueError, ("classes", "torch.bool")),
    (lambda: nearest_prototype(W, Y[None]), ValueError, ("classes", "(R,)", "(1, 3)")),
    (lambda: nearest_prototype(W, Y.to(META)), ValueError, ("prototypes", "cpu", "classes", "meta")),
    (lambda: min_angle_regularizer(W, classes=[0]), TypeError, ("classes", "torch.Tensor", "(R,)", "list")),
    (lambda: min_angle_regularizer(W, torch.ones(3)), ValueError, ("class_counts", "(4,)", "(3,)")),
    (lambda: min_angle_regularizer(W, [1, 1, 1, 1]), ValueError, ("class_counts", "(4,)", "list")),
    (lambda: min_angle_regularizer(W, torch.ones(4, device=META)), ValueError, ("class_counts", "meta")),
    (lambda: min_angle_regularizer(W, count_exponent=-1.0), ValueError, ("count_exponent", "0.0", "-1.0")),
    (lambda: feature_norm_penalty(X, "cube"), ValueError, ("kind", "inverse", "magface", "ring", "'cube'")),
    (lambda: feature_norm_penalty(X, lambda r: r.sum()), ValueError, ("kind", "(3,)", "()")),
    (lambda: feature_norm_penalty(X, lambda r: 1.0), ValueError, ("kind", "(3,)", "float")),
    (lambda: feature_norm_penalty(X, radius=0.0), ValueError, ("radius", "0.0", "0.0")),
    (lambda: margin_cosine(X[0], beyond_pi="x"), ValueError, ("beyond_pi", "monotone", "arcface", "'x'")),
    (lambda: margin_cosine(X[0], margin_gradient="x"), ValueError, ("margin_gradient", "exact", "'x'")),
    (lambda: margin_cross_entropy(X, W, Y.to_sparse()), TypeError, ("labels", "torch.strided", "torch.sparse_coo")),
    (lambda: margin_cross_entropy(X, W, 7 * Y.to(torch.uint16)), IndexError, ("labels", "[0, 4)", "7", "1")),
    (lambda: margin_cross_entropy(X, W, Y, ignore_index=1 << 70), ValueError, ("ignore_index", "64", str(1 << 70))),
    (lambda: margin_cross_entropy(X, W, Y, class_weight=COMPLEX), TypeError, ("class_weight", "torch.complex64")),
    (lambda: margin_cross_entropy(X, W, Y, bias=COMPLEX), TypeError, ("bias", "torch.complex64")),
    (lambda: margin_cross_entropy(X, W, Y, cosine_margin=BOOL), TypeError, ("cosine_margin", "torch.bool")),
    (lambda: margin_cross_entropy(X, W, Y, log_prior=SPARSE), TypeError, ("log_prior", "torch.sparse_coo")),
    (lambda: nearest_prototype(W, COMPLEX), ValueError, ("classes", "(R,)", "torch.complex64")),
    (lambda: nearest_prototype(W, torch.tensor([0, 4])), IndexError, ("classes", "[0, 4)", "4", "1")),
    (lambda: min_angle_regularizer(W, COMPLEX), TypeError, ("class_counts", "torch.complex64")),
    (lambda: min_angle_regularizer(W, BOOL), TypeError, ("class_counts", "torch.bool")),
    (lambda: feature_norm_penalty(X, lambda r: r > 1), TypeError, ("kind", "torch.bool")),
    (lambda: margin_cosine([0.5]), TypeError, ("cosine", "torch.Tensor", "(N,)", "list")),
    (lambda: margin_cosine(X), ValueError, ("cosine", "(N,)", "(3, 5)")),
    (lambda: margin_cosine(Y), TypeError, ("cosine", "torch.int64")),
    (lambda: logsumexp_stats(X, W, Y, scale=torch.tensor([1.0, -2.0, 1.0])), ValueError, ("scale", "0.0", "-2", "1")),
    (lambda: logsumexp_stats(X, W, Y, scale=torch.tensor([1.0, 1.0, NAN])), ValueError, ("scale", "nan", "2")),
    (lambda: logsumexp_stats(X, W, Y, scale=Y), TypeError, ("scale", "torch.int64")),
    (lambda: logsumexp_stats(X, W, Y, scale=3.0, with_logit_sum="no"), TypeError, ("with_logit_sum", "bool", "'no'")),
    (lambda: logsumexp_stats(X, W, Y, scale=3.0, bend=3), ValueError, ("bend", "function", "int")),
    (lambda: logsumexp_stats(X, W, Y, scale=3.0, bend=lambda c, y: [c]), ValueError, ("bend", "Bend", "(3,)", "list")),
    (lambda: logsumexp_stats(X, W, Y, scale=3.0, bend=lambda c, y: Bend(c[:2])), ValueError, ("bend", "(3,)", "(2,)")),
    (lambda: margin_losses(STATS, sample_cosine_margin=BOOL[:3]), TypeError, ("sample_cosine_margin", "torch.bool")),
    (lambda: reduce_losses(X[:, 0], Y[:2]), ValueError, ("labels", "losses", "(3,)", "(2,)")),
    (lambda: reduce_losses(X[:, 0], Y, class_weight=torch.ones(2)), IndexError, ("labels", "[0, 2)", "2")),
    (lambda: extend.focal_losses(X[:, 0], gamma=NAN), ValueError, ("gamma", "0.0", "nan")),
    (lambda: extend.poly1_losses(X[:, 0], epsilon=-2.0), ValueError, ("epsilon", "-1.0", "-2.0")),
    (lambda: soft_label_cross_entropy(*SOFT, class_weight=ONES[:3]), ValueError, ("class_weight", "(4,)", "(3,)")),
    (lambda: soft_label_cross_entropy(*SOFT, class_weight=-ONES), ValueError, ("class_weight", "-1", "0")),
    (lambda: soft_label_cross_entropy(*SOFT, label_smoothing="a"), TypeError, ("label_smoothing", "str", "'a'")),
    (lambda: soft_label_cross_entropy(X, W, PAIRS, HALF + 0j), TypeError, ("label_weight", "torch.complex64")),
    (lambda: soft_label_cross_entropy(X, W, PAIRS + 1, HALF), IndexError, ("labels", "[0, 4)", "4", "2")),
    (lambda: contrastive.info_nce(X, W, scale=1.0), ValueError, ("a", "b", "(3, 5)", "(4, 5)")),
    (lambda: contrastive.info_nce(X, X, scale=X[:, 0]), ValueError, ("scale", "()", "(3,)")),
    (lambda: contrastive.info_nce(X, X, scale=1.0, symmetric="no"), TypeError, ("symmetric", "bool", "'no'")),
    (lambda: contrastive.siglip_loss(X, X, scale=1.0, bias=INF), ValueError, ("bias", "inf")),
    (lambda: contrastive.supervised_contrastive(X, Y, W, Y, scale=1.0), ValueError, ("queue_labels", "(4,)", "(3,)")),
    (lambda: sub_centers.nearest_of_target(X, W, Y, ignore_index=1.5), TypeError, ("ignore_index", "1.5")),
    (lambda: sub_centers.outliers(X, W, Y, max_angle=75), ValueError, ("max_angle", "3.1416", "75")),
    (lambda: sub_centers.dominant(Y, Y, 3, 2), IndexError, ("index", "[0, 2)", "2")),
    (lambda: sub_centers.dominant(Y, Y, 2, 3), IndexError, ("labels", "[0, 2)", "2")),
    (lambda: sub_centers.dominant(Y, Y[:2], 3, 3), ValueError, ("index", "labels", "(2,)", "(3,)")),
]  # fmt: skip

MODULES: list[Row] = [
    (lambda: ltloss.ArcFaceLoss(0, 5), ValueError, ("num_classes", "1", "0")),
    (lambda: ltloss.ArcFaceLoss(4, 5.0), ValueError, ("embedding_size", "5.0")),
    (lambda: ltloss.ArcFaceLoss(4, True), ValueError, ("embedding_size", "True")),
    (lambda: ltloss.ArcFaceLoss(np.float64(4), 5), ValueError, ("num_classes", "4.0")),
    (lambda: arcface(margin=torch.ones(3)), ValueError, ("angular_margin", "(4,)", "(3,)")),
    (lambda: ltloss.CosineSpaceLoss(4, 5, epsilon=-1.0), ValueError, ("epsilon", "0.0", "-1.0")),
    (lambda: ltloss.CosineSpaceLoss(4, 5, start_step=-1), ValueError, ("start_step", "0", "-1")),
    (lambda: ltloss.CosineSpaceLoss(4, 5, truncate="all"), ValueError, ("truncate", "batch", "sample", "'all'")),
    (lambda: ltloss.CosineSpaceLoss(4, 5, center_update="sum"), ValueError, ("center_update", "mean", "'sum'")),
    (lambda: ltloss.CosineSpaceLoss(4, 5, center_momentum=1.0), ValueError, ("center_momentum", "1", "1.0")),
    (lambda: ltloss.ClassCenters(4, 5, update="sum"), ValueError, ("update", "mean", "ema", "'sum'")),
    (lambda: ltloss.CosineSpaceLoss(4, 5, margin="a"), TypeError, ("margin", "str", "'a'")),
    (lambda: ltloss.CosineSpaceLoss(4, 5, ce_weight=-1.0), ValueError, ("ce_weight", "0.0", "-1.0")),
    (lambda: ltloss.ClassCenters(4, 5, momentum=1.0), ValueError, ("momentum", "1", "1.0")),
    (lambda: long_tail(feature_norm="x"), ValueError, ("feature_norm", "'x'")),
    (lambda: long_tail(min_angle_classes="x"), ValueError, ("min_angle_classes", "'x'")),
    (lambda: long_tail(min_angle_weight=-1), ValueError, ("min_angle_weight",)),
    (lambda: long_tail(margin=-1.0), ValueError, ("margin", "0.0", "-1.0")),
    (lambda: arcface().set_class_weight([1.0] * 4), TypeError, ("class_weight", "(4,)", "list")),
    (lambda: arcface()(X, 7 * Y), IndexError, ("labels", "[0, 4)", "7", "1")),
    (lambda: ltloss.ArcFaceLoss(4, 6)(X, Y), ValueError, ("features", "prototypes", "(3, 5)", "(4, 6)")),
    (lambda: arcface().predict(X, k=9), ValueError, ("k", "4", "9")),
    (lambda: ltloss.CosineSpaceLoss(4, 6)(X, Y), ValueError, ("features", "prototypes", "(3, 5)", "(4, 6)")),
    (lambda: ltloss.CosineSpaceLoss(4, 5)(X, 7 * Y), IndexError, ("labels", "[0, 4)", "7", "1")),
    (lambda: arcface(dtype=torch.int64), TypeError, ("dtype", "torch.float32", "torch.int64")),
    (lambda: arcface(dtype=torch.complex64), TypeError, ("dtype", "torch.float32", "torch.complex64")),
    (lambda: arcface(dtype="float32"), TypeError, ("dtype", "torch.float32", "'float32'")),
    (lambda: arcface(sub_centers=9), ValueError, ("sub_centers", "8", "9")),
    (lambda: arcface(margin=28.6), ValueError, ("angular_margin", "radians", "28.6")),
    (lambda: arcface().logits(X.long()), TypeError, ("features", "torch.int64")),
    (lambda: arcface().logits(X[:, :3]), ValueError, ("features", "prototypes", "(3, 3)", "(4, 5)")),
    (lambda: ltloss.LinearSoftmaxLoss(4, 5).logits(X[:, :3]), ValueError, ("features", "(3, 3)", "(4, 5)")),
    (lambda: setattr(arcface(), "scale", NAN), ValueError, ("scale", "0.0", "nan")),
    (lambda: ltloss.CosineSpaceLoss(4, 5)(X, PAIRS), ValueError, ("labels", "(3,)", "(3, 2)")),
    (lambda: ltloss.AdaFaceLoss(4, 5)(X, PAIRS), ValueError, ("labels", "(3,)", "(3, 2)")),
    (lambda: ltloss.CosineSpaceLoss(4, 5, start_step=1.5), TypeError, ("start_step", "1.5")),
    (lambda: ltloss.CosineSpaceLoss(4, 5, ignore_index=1.5), TypeError, ("ignore_index", "1.5")),
    (lambda: ltloss.CosineSpaceLoss(4, 5, strict="no"), TypeError, ("strict", "bool", "'no'")),
    (lambda: ltloss.ClassCenters(0, 5), ValueError, ("num_classes", "1", "0")),
    (lambda: ltloss.ClassCenters(4, -5), ValueError, ("embedding_size", "1", "-5")),
    (lambda: long_tail(min_angle_power=NAN), ValueError, ("min_angle_power", "nan")),
    (lambda: ltloss.LongTailLoss(3, 5, class_counts=[2, 1]), ValueError, ("class_counts", "3", "2")),
    (lambda: ltloss.MagFaceLoss(4, 5, min_margin=0.9, max_margin=0.1), ValueError, ("max_margin", "0.9", "0.1")),
    (lambda: ltloss.InterclassFilterLoss(4, 5, filter_threshold=2.0), ValueError, ("filter_threshold", "1.0", "2.0")),
    (lambda: ltloss.ElasticFaceLoss(4, 5, std=-1.0), ValueError, ("std", "0.0", "-1.0")),
]  # fmt: skip

ELSEWHERE: list[Row] = [
    (lambda: balance.counts_from_labels([True, False], 2), TypeError, ("labels", "bool")),
    (lambda: balance.counts_from_labels(["a"], 2), TypeError, ("labels", "list")),
    (lambda: balance.counts_from_labels([0], 1.5), ValueError, ("num_classes", "1.5")),
    (lambda: balance.counts_from_labels([0], 2, ignore_index=1.5), TypeError, ("ignore_index", "1.5")),
    (lambda: balance.counts_from_labels([0, 5], 2), IndexError, ("labels", "[0, 2)", "5", "1")),
    (lambda: balance.margins_from_counts(COMPLEX), TypeError, ("class_counts", "torch.complex64")),
    (lambda: balance.log_prior_from_counts([1, 2], tau=NAN), ValueError, ("tau", "0.0", "nan")),
    (lambda: balance.log_prior_from_counts([1, 2], tau=True), TypeError, ("tau", "bool", "True")),
    (lambda: balance.inverse_frequency_weights([1, 2], -1e4), ValueError, ("count_exponent", "-10000", "nan")),
    (lambda: balance.DeferredWeights([1.0, 2.0], 3), TypeError, ("weights", "(C,)", "list")),
    (lambda: balance.DeferredWeights(torch.ones(2), 1.5), TypeError, ("start_epoch", "1.5")),
    (lambda: ltloss.default_scale(0), ValueError, ("num_classes", "1", "0")),
    (lambda: ltloss.default_scale(3, -1.0), ValueError, ("feature_length", "0", "-1.0")),
    (lambda: ltloss.use_backend("cuda"), ValueError, ("backend", "triton", "torch", "'cuda'")),
    (lambda: ltloss.use_workspace(0), ValueError, ("limit", "0")),
    (lambda: ltloss.use_workspace(1 << 20, keep_exponentials="no"), TypeError, ("keep_exponentials", "bool", "'no'")),
    (lambda: ltloss.set_debug("no"), TypeError, ("on", "bool", "'no'")),
    (lambda: parallelize(LINEAR, None), TypeError, ("module", "Linear")),
    (lambda: class_mesh(0), ValueError, ("data", "1", "0")),
    (lambda: export.InferenceHead(LINEAR), TypeError, ("head", "logits", "Linear")),
    (lambda: export.InferenceHead(arcface(), k=5), ValueError, ("k", "4", "5")),
    (lambda: export.export_head(arcface(), "head", to="tf"), ValueError, ("to", "onnx", "torch", "'tf'")),
    (lambda: insightface.ArcFace(margin=40.0), ValueError, ("margin", "40.0")),
    (lambda: insightface.CosFace(m=28.6), ValueError, ("m", "2.0", "28.6")),
    (lambda: insightface.CombinedMarginLoss(64, 1, 0, 28.6), ValueError, ("m3", "2.0", "28.6")),
    (lambda: insightface.PartialFC_V2(insightface.ArcFace(), 5, 4, 0.0), ValueError, ("sample_rate", "0.0", "0.0")),
    (lambda: pml.ArcFaceLoss(4, 5, margin=400), ValueError, ("margin", "degrees", "400")),
    (lambda: pml.CosFaceLoss(4, 5, margin=28.6), ValueError, ("margin", "2.0", "28.6")),
    (lambda: pml.NormalizedSoftmaxLoss(4, 5, temperature=0), ValueError, ("temperature", "0.0", "0")),
    (lambda: fitted(loss="x"), ValueError, ("loss", "auto", "linear", "cosine", "'x'")),
    (lambda: fitted(max_iter=0), ValueError, ("max_iter", "1", "0")),
    (lambda: fitted(lr=NAN), ValueError, ("lr", "0.0", "nan")),
    (lambda: fitted(loss="cosine", scales=(NAN,)), ValueError, ("scales", "0.0", "nan")),
    (lambda: fitted(n_iter_no_change=0), ValueError, ("n_iter_no_change", "1", "0")),
    (lambda: fitted(early_stopping="no"), TypeError, ("early_stopping", "bool", "'no'")),
    (lambda: fitted(class_weight={0: -1.0}), ValueError, ("class_weight", "-1.0")),
    (lambda: fitted().top_k(np.ones((1, 2)), 4), ValueError, ("k", "3", "4")),
    (lambda: PrototypeSGD(LINEAR), TypeError, ("module", "Linear")),
    (lambda: PrototypeSGD(cosface(), lr=-1.0), ValueError, ("lr", "-1.0")),
    (lambda: PrototypeSGD(cosface(), momentum=NAN), ValueError, ("momentum", "nan")),
    (lambda: PrototypeSGD(cosface(), nesterov=True), ValueError, ("nesterov", "momentum")),
    (lambda: PrototypeAdamW(cosface(), betas=(0.9, 1.5)), ValueError, ("betas", "1.5")),
    (lambda: PrototypeAdamW(cosface(), eps=-1e-8), ValueError, ("eps",)),
    (lambda: PrototypeAdagrad(cosface(), initial_accumulator_value=-1.0), ValueError, ("initial_accumulator_value",)),
    (lambda: PrototypeSGD(cosface(), rounding="up"), ValueError, ("rounding", "stochastic", "'up'")),
    (lambda: PrototypeSGD(cosface(), rounding="kahan"), ValueError, ("kahan", "torch.float32")),
    (lambda: PrototypeSGD(cosface(torch.bfloat16)), ValueError, ("rounding", "stochastic", "kahan", "nearest")),
    (lambda: PrototypeSGD(cosface(torch.float16)), ValueError, ("float32", "bfloat16", "torch.float16")),
    (lambda: PrototypeSGD(cosface(), state_dtype=torch.float16), ValueError, ("state_dtype", "torch.float16")),
    (lambda: PrototypeSGD(cosface(), seed=-1), ValueError, ("seed", "-1")),
    (lambda: PrototypeSGD(cosface(), max_class_norm=0.0), ValueError, ("max_class_norm",)),
    (lambda: PrototypeSGD(ltloss.CosFaceLoss(3, 2, device="meta")), ValueError, ("module", "meta")),
    (lambda: PrototypeAdamW(cosface(), betas=(0.9,)), ValueError, ("betas", "0.9")),
    (lambda: PrototypeAdamW(cosface(), betas=(0.9, 1.0)), ValueError, ("betas", "1.0")),
    (lambda: SampledAdamW(cosface(), betas=0.9), ValueError, ("betas", "0.9")),
    (lambda: SampledAdamW(cosface(), betas=(0.9, 1.0)), ValueError, ("betas", "1.0")),
]  # fmt: skip


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("call", "error", "facts"), [*FUNCTIONS, *MODULES])
def test_on_either_backend(call: Callable[[], Any], error: type[Exception], facts: tuple[str, ...]) -> None:
    with refused(*facts, error=error):
        call()


@pytest.mark.parametrize(("call", "error", "facts"), ELSEWHERE)
def test_of_no_backend(call: Callable[[], Any], error: type[Exception], facts: tuple[str, ...]) -> None:
    with refused(*facts, error=error):
        call()
