"""The PyTorch backend: bounded memory, any device, no Triton.

Classes are processed in chunks, so that the logits of a chunk stay in the cache: they are written, reduced and dropped.
The backward recomputes them. That is one matrix product per chunk forward and three backward. The rest touches only
data in the cache, so these four products are faster than the three of a dense implementation, which streams its N×C
logits through memory several times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ltloss._types import MarginLoss, Partials, TakeGradient
from ltloss.chunked.samples import NOT_HERE, columns, counted, length, scaled_features, target_cosine, target_labels
from ltloss.chunked.tiles import Exponentials, TargetColumn, Tiles, block_sizes, in_huge_pages
from ltloss.margins import Objective
from ltloss.numerics import compute_dtype, inverse_norm, project_, spans

__all__ = [
    "SMALLEST_EXPONENT",
    "Exponentials",
    "SampleGradients",
    "accumulate_exp",
    "coefficients",
    "exponentials_bytes",
    "gradients",
    "logsumexp",
    "margin_loss",
    "new_exponentials",
    "of_ranks",
    "partials",
]

# exp() below this is set to zero. e^-80 is far below float32's resolution of a probability, yet far enough above its
# smallest normal number for products with it to stay normal too: denormals slow a matrix product tenfold and more.
# In float64 the bound lies as far above its own smallest normal, so that confident samples keep their tiny gradient.
SMALLEST_EXPONENT = {torch.float32: -80.0, torch.float64: -700.0}


def exponentials_bytes(features: Tensor, prototypes: Tensor) -> int:
    """The bytes that :func:`new_exponentials` allocates."""
    entries, chunks = _exponentials(features, prototypes)
    return 2 * entries + 4 * chunks * features.shape[0]


def new_exponentials(features: Tensor, prototypes: Tensor, fake: bool = False) -> Exponentials:
    """Allocate the exponentials that :func:`partials` fills and :func:`gradients` reads. Float32 only."""
    entries, chunks = _exponentials(features, prototypes)
    if fake or features.device.type != "cpu":
        values = features.new_empty(entries, dtype=torch.bfloat16)
    else:
        values = in_huge_pages(entries)
    return Exponentials(values, features.new_empty(chunks, features.shape[0], dtype=torch.float32))


def _exponentials(features: Tensor, prototypes: Tensor) -> tuple[int, int]:
    """Number of values, number of chunks."""
    n, (c, d) = features.shape[0], prototypes.shape
    return n * c, -(-c // block_sizes(n, c, d, features.device).classes)


def partials(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    scale: float,
    normalize_features: bool,
    normalize_prototypes: bool,
    with_logit_sum: bool,
    ignore_index: int | None,
    threshold: Tensor | None = None,
    polynomial: Tensor | None = None,
    kept: Exponentials | None = None,
) -> Partials:
    """One pass of features (N, D) over prototypes (C, D) or (C, K, D): one split, natural logarithms.

    Labels (N,) or (N, k) equal ``ignore_index`` for ignored samples. With ``ignore_index=None`` a label outside [0, C)
    means that the target is not among these prototypes. ``threshold`` (N,) and ``polynomial`` (3,) are a
    :class:`ltloss.extend.Bend` in units of logits. ``kept`` is filled for :func:`gradients`.
    """
    dtype = compute_dtype(features, prototypes)
    n, c, d = features.shape[0], prototypes.shape[0], features.shape[1]
    labels = target_labels(labels, c, ignore_index)
    u = scaled_features(features, labels, scale, normalize_features, ignore_index, dtype)
    blocks = block_sizes(n, c, prototypes[0].numel(), features.device)
    inverse = u.new_empty(prototypes.shape[:-1]) if normalize_prototypes else None
    tiles = Tiles(u, prototypes, inverse, log_prior, blocks, False, threshold, polynomial)
    maximum = u.new_full((n,), -math.inf)
    total = u.new_zeros(n)
    unit_sum, logit_sum = u.new_zeros(d), u.new_zeros(n) if with_logit_sum and tiles.several else None
    for number, (start, stop) in enumerate(spans(c, blocks.classes)):
        if inverse is not None:
            found = inverse_norm(prototypes[start:stop].flatten(0, -2), dtype)
            inverse[start:stop] = found.view(stop - start, *inverse.shape[1:])
        unit = tiles.unit_prototypes(start, stop)
        if with_logit_sum and logit_sum is None:
            unit_sum += unit.sum(0)
        for row in spans(n, blocks.rows):
            rows = slice(*row)
            tile = tiles.logits(unit, rows, start, stop, logit_sum)
            for one in columns(labels[rows]):
                TargetColumn(one, start, stop - start).fill(tile, -math.inf)
            shift = accumulate_exp(tile, maximum[rows], total[rows])
            if kept is not None:
                values, shifts = kept.of(number, rows, start, stop)
                values.copy_(tile)
                shifts.copy_(shift)
    return Partials(
        sum=total[None],
        max=maximum[None],
        logit_sum=(u @ unit_sum if logit_sum is None else logit_sum)[None] if with_logit_sum else None,
        target_cosine=target_cosine(features, prototypes, inverse, labels, normalize_features, ignore_index),
        norm=None if normalize_features or inverse is None else length(features, labels, ignore_index, dtype),
        class_scale=u.new_ones(prototypes.shape[:-1]) if inverse is None else inverse,
    )


def accumulate_exp(tile: Tensor, maximum: Tensor, total: Tensor) -> Tensor:
    """One step of the running log-sum-exp: log Σ exp = maximum + log(total). The tile becomes exp(tile - result)."""
    new = torch.maximum(maximum, tile.amax(1))
    # A row without any other class so far has maximum -inf, and -inf - (-inf) would be NaN.
    shift = torch.where(new == -math.inf, 0.0, new)
    total.mul_((maximum - shift).exp_()).add_(tile.sub_(shift[:, None]).exp_().sum(1))
    maximum.copy_(new)
    return shift


def margin_loss(partials: Partials, labels: Tensor, objective: Objective, num_classes: int) -> MarginLoss:
    """Margin, loss and coefficients, on vectors (N,), in float64, whose cost is negligible here.

    With ℓ = s, or s·‖x‖ where features keep their length, z' = ℓ·margin(cos_y), z = z' + b_y and p = σ(r − z):

        loss = softplus(r − z) + ε·(z − mean),   mean = (Σ_c l_c − l_y + z')/C
        ∂loss/∂r = p,   ∂loss/∂z' = −p + ε − ε/C,   ∂loss/∂(Σ_c l_c) = −ε/C,   d_target = ∂loss/∂z'·slope
    """
    log_prior, scale, label_smoothing = objective.log_prior, objective.scale, objective.label_smoothing
    labels = target_labels(labels, num_classes, objective.ignore_index)
    counted, target = labels != NOT_HERE, labels.clamp_min(0)
    r, cosine = logsumexp(partials), partials.target_cosine.double()
    of_samples = objective.margin.of_samples(target).to(torch.float64)
    turned, slope = of_samples.value(cosine), of_samples.slope(cosine)
    logit_scale = scale if partials.norm is None else scale * partials.norm.double()
    target_logit = logit_scale * turned
    z = target_logit if log_prior is None else target_logit + log_prior.double()[target]
    loss, d_lse = -F.logsigmoid(z - r), torch.sigmoid(r - z)
    d_turned, d_all = -d_lse, torch.zeros_like(d_lse)
    if partials.logit_sum is not None:
        share = label_smoothing / num_classes
        whole = partials.logit_sum.double().sum(0)
        if log_prior is not None:
            whole = whole + log_prior.double().sum()
        loss = loss + label_smoothing * (z - (whole - logit_scale * cosine + target_logit) / num_classes)
        d_turned, d_all = d_turned + (label_smoothing - share), d_all - share
    rows = [d_lse, d_turned * slope, d_all]
    if partials.norm is not None:
        rows.append(d_turned * (turned - cosine * slope) * scale)
    weight = counted.double()
    if objective.class_weight is not None:
        weight = weight * objective.class_weight.double()[target]
    rows = [r, *(torch.where(counted, weight * row, 0.0) for row in rows)]
    loss = torch.where(counted, loss * weight, 0.0)
    divisor = weight.new_ones(())
    if objective.reduction == "mean":
        divisor = torch.where(weight.sum() == 0, 1.0, weight.sum())
    if objective.reduction != "none":
        loss = loss.sum() / divisor
    dtype = partials.sum.dtype
    coefficients = torch.stack(rows).to(dtype)
    return MarginLoss(loss.to(dtype), coefficients, divisor.reciprocal().to(dtype), coefficients.new_zeros(()))


def logsumexp(partials: Partials) -> Tensor:
    """log Σ exp over the other classes, (N,) in float64; -inf where there is no other."""
    total, maximum = partials.sum.double(), partials.max.double()
    largest = maximum.amax(0)
    base = torch.where(largest == -math.inf, 0.0, largest)
    return base + (total * (maximum - base).exp()).sum(0).log()


def of_ranks(logsumexp: Tensor) -> Partials:
    """Log-sum-exps (S, N) of parts of the classes, as partial sums."""
    return Partials(torch.ones_like(logsumexp), logsumexp, None, logsumexp[0], None, logsumexp[0])


def coefficients(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (4 or 5, N) of :class:`ltloss._types.MarginLoss` as :func:`gradients` takes them: they are that already."""
    return rows, rows.new_zeros(())


class SampleGradients(NamedTuple):
    """The gradients of each sample, in the form that the tiles use them."""

    shift: Tensor  # (N,) r - log|a|
    factor: Tensor  # (N,) sign of a, corrected for the rounding of the shift
    target: Tensor  # (k, N) what the entries of the targets of a tile get, over factor

    @classmethod
    def of(cls, r: Tensor, a: Tensor, target: Tensor) -> SampleGradients:
        """Fold |a| into the exponent, |a|·exp(l - r) = exp(l - shift), and its sign into u and d.

        That saves one pass over every tile. Without a gradient (a = 0, or no other class) the shift is +inf. For a
        large scale the rounding of r - log|a| would be the largest error. It is equal for a whole row, so ``factor``
        corrects it.
        """
        nothing = (a == 0) | (r == -math.inf)
        log_a = a.abs().log()
        shift = r - log_a
        lost = torch.where(nothing, 0.0, (shift - r) + log_a)
        factor = torch.where(a < 0, -1.0, 1.0).to(r.dtype) * lost.exp()
        return cls(torch.where(nothing, math.inf, shift), factor, target / factor)


def gradients(
    grad_loss: Tensor,
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    coefficients: Tensor,
    class_scale: Tensor,
    inverse_weight_sum: Tensor,
    max_coefficient: Tensor,
    scale: float,
    smooth: bool,
    normalize_features: bool,
    normalize_prototypes: bool,
    ignore_index: int | None,
    threshold: Tensor | None,
    polynomial: Tensor | None,
    needs: list[bool],
    take: TakeGradient | None = None,
    kept: Exponentials | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features (N, D) and of prototypes, each in its dtype, and the gradient (C,) that flows through r.

    The last is Σ_i a_i·exp(l_ic - r_i) over the samples of other classes. Each is (0,) where ``needs`` is False.
    ``coefficients`` come from :func:`margin_loss`; ``grad_loss`` is a scalar or (N,); ``smooth``: use row 3. ``take``
    receives the gradients of the prototypes chunk by chunk, after these were read for the last time. With ``kept``,
    the logits are not recomputed.
    """
    dtype = compute_dtype(features, prototypes)
    n, c, d = features.shape[0], prototypes.shape[0], features.shape[1]
    through_r = features.new_zeros(c if needs[2] else 0, dtype=dtype)
    if n == 0:
        zero = prototypes.new_zeros(prototypes.shape if needs[1] else 0)
        return features.new_empty((0, d) if needs[0] else 0), zero, through_r
    labels = target_labels(labels, c, ignore_index)
    u = scaled_features(features, labels, scale, normalize_features, ignore_index, dtype)
    blocks = block_sizes(n, c, prototypes[0].numel(), features.device)
    inverse = class_scale if normalize_prototypes else None
    tiles = Tiles(u, prototypes, inverse, log_prior, blocks, True, threshold, polynomial)
    d_lse, d_target, d_all, *rest = coefficients[1:] * (grad_loss.to(dtype) * inverse_weight_sum)
    with_norm = normalize_prototypes and not normalize_features
    d_norm, targets = rest[:with_norm], torch.stack([d_target, *rest[with_norm:]])
    in_tiles = smooth and tiles.several  # else what every class gets needs no tile
    of_samples = SampleGradients.of(coefficients[0], d_lse, targets - d_all if smooth and not in_tiles else targets)
    every = d_all / of_samples.factor if in_tiles else None
    smooth = smooth and not in_tiles
    grad_u = torch.zeros_like(u) if needs[0] else None
    grad_w = prototypes.new_empty(prototypes.shape) if needs[1] else None
    if take is None and grad_w is not None:
        take = functools.partial(_keep, grad_w)
    in_place = grad_w is not None and grad_w.dtype == dtype
    buffer = None if take is None or in_place else u.new_empty(blocks.classes, *prototypes.shape[1:])
    signed_u = u * of_samples.factor[:, None]
    sum_row = d_all @ u if smooth else None
    unit_sum = u.new_zeros(d)
    for number, (start, stop) in enumerate(spans(c, blocks.classes)):
        unit = tiles.unit_prototypes(start, stop)
        if smooth:
            unit_sum += unit.sum(0)
        chunk = None
        if take is not None:
            chunk = grad_w[start:stop] if buffer is None else buffer[: stop - start]  # type: ignore[index]
        for row in spans(n, blocks.rows):
            rows = slice(*row)
            found = None if kept is None else kept.of(number, rows, start, stop)
            sums = through_r[start:stop]
            tile = _gradient_tile(tiles, unit, rows, (start, stop), labels[rows], of_samples, found, sums, every)
            _add_products(tiles.of_centers(tile, unit, chunk), grad_u, signed_u, rows)
        if chunk is not None and take is not None:
            take(start, stop, _of_prototypes(chunk, unit, sum_row, None if inverse is None else inverse[start:stop]))
    if grad_u is not None:
        grad_u *= of_samples.factor[:, None]
        if smooth:
            grad_u.addr_(d_all, unit_sum)
        grad_u *= scale  # u = s·x̂, or s·x
        _through_length(grad_u, counted(features, labels, ignore_index), normalize_features, *d_norm)
    return (
        features.new_empty(0) if grad_u is None else grad_u.to(features.dtype),
        prototypes.new_empty(0) if grad_w is None else grad_w,
        through_r,
    )


def _add_products(parts: Iterator[tuple[Any, ...]], grad_u: Tensor | None, signed_u: Tensor, rows: slice) -> None:
    """The two products of a tile of dZ: onto the gradients of these rows, and onto those of the chunk."""
    for tile, unit, chunk in parts:
        if grad_u is not None:
            grad_u[rows].addmm_(tile, unit)
        if chunk is not None:
            chunk.addmm_(tile.t(), signed_u[rows], beta=0 if rows.start == 0 else 1)


def _keep(whole: Tensor, start: int, stop: int, chunk: Tensor) -> None:
    """Round a chunk of the gradient; in its own dtype it was made in its place."""
    if whole.dtype != chunk.dtype:
        whole[start:stop] = chunk


def _of_prototypes(chunk: Tensor, unit: Tensor, sum_row: Tensor | None, inverse: Tensor | None) -> Tensor:
    """From Gᵀ·u of some classes to their gradient, in place; ``inverse`` is None where they keep their length."""
    chunk = chunk if sum_row is None else chunk.add_(sum_row)
    if inverse is not None:
        project_(chunk.flatten(0, -2), unit.flatten(0, -2), inverse.flatten())
    return chunk


def _through_length(grad: Tensor, features: Tensor, normalized: bool, d_norm: Tensor | None = None) -> None:
    """From the gradient for x̂, or for x with d_norm (N,) beside it, to that for x, in place."""
    if not normalized and d_norm is None:
        return
    inverse = inverse_norm(features, grad.dtype)
    x_hat = features.to(grad.dtype) * inverse[:, None]
    if d_norm is None:
        project_(grad, x_hat, inverse)
    else:  # a zero feature has no direction: no gradient
        grad.addcmul_(x_hat, d_norm[:, None]).masked_fill_((inverse == 0)[:, None], 0.0)


def _gradient_tile(
    tiles: Tiles,
    unit: Tensor,
    rows: slice,
    classes: tuple[int, int],
    labels: Tensor,
    of_samples: SampleGradients,
    kept: tuple[Tensor, Tensor] | None,
    sums: Tensor,
    every: Tensor | None,
) -> Tensor:
    """G with the factor of the row still to come: |a|·exp(l - r), and target / factor at the target class.

    ``sums``: where to add those of the columns, without the targets; (0,) if nowhere. ``every``: (n,) what each class
    gets besides, over factor.
    """
    shift, smallest = of_samples.shift[rows], SMALLEST_EXPONENT[unit.dtype]
    if kept is None:
        tile = tiles.logits(unit, rows, *classes).sub_(shift[:, None])
        torch.threshold_(tile, smallest, -math.inf).exp_()
    else:
        exponentials, shift_then = kept
        tile = tiles.empty(rows, *classes).copy_(exponentials).mul_((shift_then - shift).exp_()[:, None])
        torch.threshold_(tile, math.exp(smallest), 0.0)
    targets = [TargetColumn(one, classes[0], tile.shape[1]) for one in columns(labels)]
    if len(sums):
        for target in targets:
            target.fill(tile, 0.0)
        sums.addmv_(tile.t(), of_samples.factor[rows])
    if tiles.threshold is not None:
        tile.mul_(tiles.slope)
    if every is not None:
        tile.add_(every[rows, None])
    for target, gradient in zip(targets, of_samples.target, strict=True):
        target.fill(tile, gradient[rows])
    return tile
