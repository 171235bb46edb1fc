"""The pass over all prototypes: two numbers per sample, and the gradients that follow from them.

A backend is a module with ``partials``, ``logsumexp``, ``margin_loss``, ``coefficients`` and ``gradients``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ltloss._types import Partials, TakeGradient
from ltloss.chunked import logsumexp as chunked
from ltloss.chunked.samples import columns
from ltloss.margins import Objective
from ltloss.numerics import add_rows_, compute_dtype, spans
from ltloss.ops._dispatch import Kernel, define, no_gradient
from ltloss.ops.protocols import Shard, Update
from ltloss.runtime import current_keep_exponentials, current_workspace

if TYPE_CHECKING:
    from ltloss_kernels import PrototypeUpdate

__all__ = ["BACKENDS", "LocalWork", "Shard", "Update", "gathered_stats", "propagate"]


Bend = tuple[Tensor | None, Tensor | None]  # threshold (N,) and polynomial (3,) of ltloss.extend.Bend, for logits
NO_BEND: Bend = (None, None)


def _kernels() -> Any:
    import ltloss_kernels  # on first use: `import ltloss` needs no Triton

    return ltloss_kernels


BACKENDS: dict[str, Callable[[], Any]] = {"torch": lambda: chunked, "triton": _kernels}


def _empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Replace None by an empty tensor (0,), because an operator returns tensors only."""
    return like.new_empty(0) if tensor is None else tensor


def _stats(backend: Callable[[], Any], keep: bool = False) -> Callable[..., tuple[Tensor, ...]]:
    def run(features: Tensor, prototypes: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        implementation = backend()
        kept = [implementation.new_exponentials(features, prototypes)] if keep else []
        partials: Partials = implementation.partials(features, prototypes, *rest, *kept)
        like = features.new_empty(0, dtype=compute_dtype(features, prototypes))
        logit_sum = None if partials.logit_sum is None else partials.logit_sum.sum(0)
        return (
            implementation.logsumexp(partials).to(like.dtype),
            partials.target_cosine.to(like.dtype),
            _empty(logit_sum, like),
            _empty(partials.norm, like),
            partials.class_scale,
            *itertools.chain(*kept),
        )

    return run


def _fake_stats(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    scale: float,
    normalize_features: bool,
    normalize_prototypes: bool,
    with_logit_sum: bool,
    ignore_index: int | None,
    threshold: Tensor | None,
    polynomial: Tensor | None,
) -> tuple[Tensor, ...]:
    like = features.new_empty(0, dtype=compute_dtype(features, prototypes))
    n = features.shape[0]
    with_norm = normalize_prototypes and not normalize_features
    shapes = (n, labels.shape, n if with_logit_sum else 0, n if with_norm else 0, prototypes.shape[:-1])
    return tuple(like.new_empty(shape) for shape in shapes)


def define_keeping(
    schema: str,
    fake: Callable[..., tuple[Tensor, ...]],
    make: Callable[[Callable[[], Any], bool], Callable[..., Any]],
) -> dict[str, Any]:
    """Define an operator that also returns ``KEPT``, whose shapes differ by backend.

    ``make(backend, True)`` is its implementation; ``fake`` is the fake of the operator that keeps nothing.
    """

    def of(backend: Callable[[], Any]) -> Callable[..., tuple[Tensor, ...]]:
        def run(features: Tensor, prototypes: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            return (*fake(features, prototypes, *rest), *backend().new_exponentials(features, prototypes, fake=True))

        return run

    return {
        name: define(schema, of(backend), **{name: make(backend, True)})[name] for name, backend in BACKENDS.items()
    }


KEPT = "Tensor exponentials, Tensor shifts"
_STATS_OF = (
    "(Tensor features, Tensor prototypes, Tensor labels, Tensor? log_prior, float scale, bool normalize_features, "
    "bool normalize_prototypes, bool with_logit_sum, int? ignore_index, Tensor? threshold, Tensor? polynomial)"
)
_STATS = "Tensor logsumexp, Tensor target_cosine, Tensor logit_sum, Tensor norm, Tensor class_scale"
STATS = define(
    f"logsumexp_stats{_STATS_OF} -> ({_STATS})",
    _fake_stats,
    **{name: _stats(backend) for name, backend in BACKENDS.items()},
)
KEEPING_STATS = define_keeping(f"logsumexp_stats_keeping{_STATS_OF} -> ({_STATS}, {KEPT})", _fake_stats, _stats)


_Gradients = tuple[Tensor, Tensor, Tensor]


def _fake_gradients(grad_loss: Tensor, features: Tensor, prototypes: Tensor, *rest: Any) -> _Gradients:
    needs = rest[-1]
    return (
        features.new_empty(features.shape) if needs[0] else features.new_empty(0),
        prototypes.new_empty(prototypes.shape) if needs[1] else prototypes.new_empty(0),
        features.new_empty(prototypes.shape[0] if needs[2] else 0, dtype=compute_dtype(features, prototypes)),
    )


# Further arguments of the gradients of a backend, which the schema does not list.
_OPTIONS: dict[str, dict[str, Any]] = {"torch": {}, "triton": {"limit": current_workspace}}


def _kept_gradients(backend: str) -> Callable[..., _Gradients]:
    def run(exponentials: Tensor, shifts: Tensor, *given: Any) -> _Gradients:
        implementation = BACKENDS[backend]()
        kept = implementation.Exponentials(exponentials, shifts)
        found: _Gradients = implementation.gradients(*given, kept=kept, **_OPTIONS[backend])
        return found

    return run


_GRADIENTS_OF = (
    "Tensor grad_loss, Tensor features, Tensor prototypes, Tensor labels, Tensor? log_prior, Tensor coefficients, "
    "Tensor class_scale, Tensor inverse_weight_sum, Tensor max_coefficient, float scale, bool smooth, "
    "bool normalize_features, bool normalize_prototypes, int? ignore_index, Tensor? threshold, Tensor? polynomial, "
    "bool[] needs"
)
_FOUND = "(Tensor features, Tensor prototypes, Tensor through_r)"
_GRADIENTS = define(
    f"logsumexp_gradients({_GRADIENTS_OF}) -> {_FOUND}",
    _fake_gradients,
    torch=chunked.gradients,
    triton=Kernel("gradients", _OPTIONS["triton"]),
)
_KEPT_GRADIENTS = define(
    f"logsumexp_gradients_of_kept({KEPT}, {_GRADIENTS_OF}) -> {_FOUND}",
    lambda exponentials, shifts, *given: _fake_gradients(*given),
    **{name: _kept_gradients(name) for name in BACKENDS},
)
no_gradient(_GRADIENTS)
no_gradient(_KEPT_GRADIENTS)
OPERATORS = {
    "logsumexp_stats": STATS,
    "logsumexp_stats_keeping": KEEPING_STATS,
    "logsumexp_gradients": _GRADIENTS,
    "logsumexp_gradients_of_kept": _KEPT_GRADIENTS,
}


def may_keep() -> bool:
    """Whether a loss may keep its exponentials: the option is on, and gradients are enabled."""
    return current_keep_exponentials() and torch.is_grad_enabled()


def keeps(ctx: Any, features: Tensor, prototypes: Tensor, backend: str) -> bool:
    """Whether a step that may keep its exponentials does: a backward will need them, and they fit the workspace."""
    return (
        any(ctx.needs_input_grad)
        and prototypes.dim() == 2
        and compute_dtype(features, prototypes) == torch.float32
        and 0 < BACKENDS[backend]().exponentials_bytes(features, prototypes) <= current_workspace()
    )


class LocalWork(NamedTuple):
    """This rank's part of the work: its rows of the batch, and labels and prior of its classes."""

    features: Tensor
    labels: Tensor
    prior: Tensor | None

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, objective: Objective, shard: Shard) -> LocalWork:
        """Of the global batch; features that do not count become 0, since they may hold NaN."""
        rows = shard.rows(features.shape[0])
        ignored = torch.eq(labels[rows], -1 if objective.ignore_index is None else objective.ignore_index)
        return cls(
            features[rows].masked_fill(columns(ignored)[0][:, None], 0.0),
            shard.local_labels(torch.where(ignored, -1, labels[rows])),
            shard.local_prior(objective.log_prior),
        )


def gathered_stats(
    local: LocalWork,
    prototypes: Tensor,
    objective: Objective,
    smooth: bool,
    backend: str,
    shard: Shard,
    keep: bool,
    bend: Bend = NO_BEND,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, list[Tensor]]:
    """Run the local pass and gather the results of all ranks.

    Returns ``(logsumexp (S, N), logit_sum (S, N), target_cosine shaped as the labels, norm (N,))``, then
    ``class_scale`` and the kept exponentials of this rank.
    """
    with_norm = objective.with_norm
    kept: list[Tensor] = []
    if prototypes.shape[0]:
        r, cosine, logit_sum, norm, class_scale, *kept = (KEEPING_STATS if keep else STATS)[backend](
            local.features,
            prototypes,
            local.labels,
            local.prior,
            objective.scale,
            *objective.normalize,
            smooth,
            None,
            *bend,
        )
    else:  # a rank without classes
        like = local.features.new_zeros(local.features.shape[0], dtype=compute_dtype(local.features, prototypes))
        norm = torch.linalg.vector_norm(local.features, dim=1, dtype=like.dtype)
        r, cosine, logit_sum, class_scale = like - torch.inf, like, like[: len(like) * smooth], like[:0]
        cosine = like.new_zeros(local.labels.shape)
    cosines = columns(cosine)
    whole = shard.gather(torch.stack([r, *cosines] + [logit_sum] * smooth + [norm] * with_norm))
    none = whole.new_empty(0)
    targets = whole[:, 1 : 1 + len(cosines)].sum(0)  # a target has one owner, and the others have 0
    vectors = (
        whole[:, 0],
        whole[:, 1 + len(cosines)] if smooth else none,
        targets[0] if cosine.dim() == 1 else targets.t(),
        whole[0, -1] if with_norm else none,
    )
    return vectors, class_scale, kept


def remember(
    ctx: Any, backend: str, shard: Shard | None, update: Update | None, num_classes: int | None = None
) -> None:
    """Store on ``ctx`` what :func:`propagate` needs besides tensors; ``num_classes`` as in :func:`_of_prior`."""
    ctx.backend, ctx.shard, ctx.update, ctx.num_classes = backend, shard, update, num_classes
    if update is not None:
        update.watch(ctx)


def propagate(
    ctx: Any, grad_loss: Tensor, saved: tuple[Tensor, ...] | None = None, bend: Bend = NO_BEND
) -> tuple[Tensor | None, ...]:
    """The backward of the pass over all prototypes: the gradients of features, prototypes and prior, then Nones.

    They are summed over the ranks of a shard. ``saved`` defaults to what the forward saved: features, prototypes,
    labels and prior of this rank, then coefficients, ``class_scale``, 1/Σ weights and the largest coefficient, then
    the exponentials if :func:`keeps` said so.
    """
    features, prototypes, labels, prior, coefficients, *rest = ctx.saved_tensors if saved is None else saved
    rest, kept = rest[:3], rest[3:]
    shard, needs, samples = ctx.shard, list(ctx.needs_input_grad[:3]), coefficients.shape[1]
    take = None if ctx.update is None else ctx.update.begin(ctx, coefficients[1:] * grad_loss, shard)
    if shard is not None:
        rows = shard.rows(samples)
        coefficients = coefficients[:, rows].contiguous()
        _, _, *normalize, _ = ctx.options
        if normalize == [False, True] and not shard.is_first:  # the length of a feature is no rank's: count it once
            coefficients[4] = 0.0
        grad_loss = grad_loss[rows] if grad_loss.dim() else grad_loss
    if prototypes.shape[0]:
        if take is not None:
            gradients = _updating(ctx.backend, take, kept)
        else:
            gradients = functools.partial(_KEPT_GRADIENTS[ctx.backend], *kept) if kept else _GRADIENTS[ctx.backend]
        grad_features, grad_prototypes, through_r = gradients(
            grad_loss, features, prototypes, labels, prior, coefficients, *rest, *ctx.options, *bend, needs
        )
    else:  # a rank without classes
        grad_features, grad_prototypes = torch.zeros_like(features), torch.zeros_like(prototypes)
        through_r = coefficients.new_zeros(0)
    grad_prior = (
        _of_prior(through_r, labels, coefficients * (grad_loss * rest[1]), ctx.num_classes) if needs[2] else None
    )
    if shard is not None:
        grad_features = shard.reduce_features(grad_features, samples) if needs[0] else grad_features
        grad_prototypes = shard.reduce_prototypes(grad_prototypes) if needs[1] else grad_prototypes
        grad_prior = None if grad_prior is None else shard.reduce_prior(grad_prior)
    none = (None,) * (len(ctx.needs_input_grad) - 3)
    return grad_features if needs[0] else None, grad_prototypes if needs[1] else None, grad_prior, *none


def _of_prior(through_r: Tensor, labels: Tensor, coefficients: Tensor, num_classes: int | None) -> Tensor:
    """The gradient (K,) of the prior of this rank's classes, from ``through_r``, the part that flows through r.

    If ``num_classes`` (of all ranks) is given, the target logit and the sum of all logits contain the prior too. A
    constant added to all logits of a sample does not change its loss. The target therefore gets minus what all others
    get, whatever the slope of its margin.
    """
    if num_classes is None or not len(through_r):
        return through_r
    d_lse, d_all = coefficients[1], coefficients[3]
    here = (labels >= 0) & (labels < len(through_r))
    of_target = torch.where(here, -d_lse - num_classes * d_all, 0.0)
    return add_rows_(through_r + d_all.sum(), torch.where(here, labels, 0), of_target)


_SLAB_WITHOUT_SAMPLES = 1 << 14


def _updating(backend: str, take: TakeGradient | PrototypeUpdate, kept: Sequence[Tensor]) -> Callable[..., _Gradients]:
    """Make a function that returns the gradients of the features and passes those of the prototypes to ``take``.

    It is not an operator, because it changes its input.
    """

    def run(grad_loss: Tensor, features: Tensor, prototypes: Tensor, *rest: Any) -> _Gradients:
        if callable(take) and not features.shape[0]:  # an empty batch: weight decay and momentum still act
            dtype = compute_dtype(features, prototypes)
            for start, stop in spans(prototypes.shape[0], _SLAB_WITHOUT_SAMPLES):
                take(start, stop, torch.zeros_like(prototypes[start:stop], dtype=dtype))
            return torch.zeros_like(features), prototypes, features.new_zeros(len(prototypes), dtype=dtype)
        options: dict[str, Any] = {"take" if callable(take) else "update": take, **_OPTIONS[backend]}
        implementation = BACKENDS[backend]()
        if kept:
            options["kept"] = implementation.Exponentials(*kept)
        with torch.autocast(features.device.type, enabled=False):
            found: _Gradients = implementation.gradients(grad_loss, features, prototypes, *rest, **options)
        return found

    return run
