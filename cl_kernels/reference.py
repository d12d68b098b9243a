"""The definition of right: every loss in plain PyTorch, with whole matrices.

Any device, any float dtype (half inputs are summed in float32), differentiable any number of times. An empty
denominator or a row without positives gives loss 0 and gradient 0; NaN comes of nothing but NaN. The
`*_stats` functions say what the engine's operators return, `supcon_rows_of` the losses of some anchors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dtypes
from . import validation as check
from .dtypes import accumulate_dtype, full_precision
from .problem import Contrast, KeyLoss, SoftTarget

if TYPE_CHECKING:
    from .queue import KeyQueue

INF = float("inf")
EMPTY_COUNT = 1e-6  # positives of less weight are none
Scalar = float | Tensor

_sums: Callable[[torch.dtype], torch.dtype] = accumulate_dtype


@contextmanager
def plain_sums() -> Iterator[None]:
    """Inside, products and sums keep the dtype of the inputs, as plain PyTorch code would: what our errors
    are measured against (`parity.py`)."""
    global _sums
    _sums = _as_it_is
    try:
        yield
    finally:
        _sums = accumulate_dtype


def _as_it_is(dtype: torch.dtype) -> torch.dtype:
    return dtype


def _accumulate(x: Tensor) -> Tensor:
    return x.to(_sums(x.dtype))


def _scalar(value: Scalar, like: Tensor) -> Scalar:
    """A 0-dim tensor in the dtype and on the device of `like`; a float as it is."""
    return value.to(like) if isinstance(value, Tensor) else value


def _inverse(temperature: Scalar, like: Tensor) -> Scalar:
    return 1.0 / _scalar(temperature, like)


def _logsumexp(x: Tensor, included: Tensor | None = None) -> Tensor:
    """LSE of the included entries of each row; -inf, with gradient 0, where there is none."""
    if included is not None:
        x = x.masked_fill(~included, -INF)
    empty = (x == -INF).all(dim=1)
    return torch.logsumexp(x.masked_fill(empty[:, None], 0.0), dim=1).masked_fill(empty, -INF)


def _masked_softmax(x: Tensor, included: Tensor, lse: Tensor) -> Tensor:
    """softmax over the included entries of each row, given their LSE; 0 for the rest and for empty rows."""
    shifted = x - lse.masked_fill(lse == -INF, 0.0)[:, None]
    return shifted.masked_fill(~included, -INF).exp()


def _normalize(x: Tensor) -> Tensor:
    """Rows divided by their L2 norm; a zero row stays zero and gets no gradient."""
    squared = (x * x).sum(dim=1, keepdim=True)
    zero = squared == 0
    return x * squared.masked_fill(zero, 1.0).rsqrt().masked_fill(zero, 0.0)


def _zero_unless(valid: Tensor | None, x: Tensor) -> Tensor:
    """`x` [N, ...] with 0, and gradient 0, where `valid` [N] is False."""
    return x if valid is None else x.masked_fill(~valid.reshape(-1, *[1] * (x.dim() - 1)), 0.0)


def _columns(n: int, m: int, offset: int, device: torch.device) -> Tensor:
    """Bool [n, m], True at column i + offset of row i."""
    rows = torch.arange(n, device=device)[:, None]
    return torch.arange(m, device=device) == rows + offset


def _one_hot(column: Tensor, m: int) -> Tensor:
    """Bool [N, m], True at `column` [N] of each row; nothing for -1."""
    return column[:, None] == torch.arange(m, device=column.device)


def contrastive_stats(problem: Contrast) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(lse [N], lse_cols [M], positive_sum [N], positive_count [N])` of S = scale q kᵀ; [0] if unasked.

    lse_i = LSE_{j in Den(i)} (S_ij + key_bias_j), lse_cols_j = LSE_{i: j in Den(i)} (S_ij + key_bias_j),
    positive_sum_i = Σ_j w_ij S_ij, positive_count_i = Σ_j w_ij. Where the mask decides what is in Den(i),
    "same" adds log w_ij to S_ij.
    """
    q = _accumulate(problem.q)
    k = q if problem.k is None else _accumulate(problem.k)
    (n, _), (m, _) = q.shape, k.shape
    products = _scalar(problem.scale, q) * (q @ k.T)

    others = torch.ones(n, m, dtype=torch.bool, device=q.device)
    if problem.exclude is not None:
        others = ~_columns(n, m, problem.exclude, q.device)
    included = others
    if problem.row_labels is not None and problem.col_labels is not None:
        same = problem.row_labels[:, None] == problem.col_labels
        included = {"all": others, "same": others & same, "different": others & ~same}[problem.among]

    logits = products if problem.key_bias is None else products + problem.key_bias.to(q)
    weights = None
    if problem.label_positives:
        weights = (others & same).to(q)
    elif problem.positive_index is not None:
        weights = _one_hot(problem.positive_index, m).to(q)
    elif problem.positive_mask is not None:
        rows, cols = problem.positive_mask.shape
        row, col = torch.arange(n, device=q.device) % rows, torch.arange(m, device=q.device) % cols
        weights = problem.positive_mask.to(q)[row][:, col].masked_fill(~others, 0.0)
        if problem.by_mask:
            positive = weights != 0
            included = others & (positive if problem.among == "same" else ~positive)
            if problem.among == "same":
                logits = logits + weights.masked_fill(~positive, 1.0).log()

    lse = _logsumexp(logits, included)
    lse_cols = _logsumexp(logits.T, included.T) if problem.both_axes else q.new_zeros(0)
    if weights is None:
        return lse, lse_cols, q.new_zeros(0), q.new_zeros(0)
    return lse, lse_cols, _weighted_sum(weights, products), weights.sum(dim=1)


def whole_loss(
    problem: Contrast, unit: bool, factor: float, mean: bool, drop: bool, at_least_zero: bool
) -> Tensor:
    """factor Σ_i l_i [] with l_i = lse_i - positive_sum_i / positive_count_i, as `ops.contrastive_loss`."""
    if unit:
        problem = problem._replace(q=_normalize(_accumulate(problem.q)))
    lse, lse_cols, total, count = contrastive_stats(problem)
    if problem.both_axes:
        lse = torch.lerp(lse, lse_cols, 0.5)
    if problem.positives == "none":
        total, count = torch.zeros_like(lse), torch.ones_like(lse)
    divisor = count.masked_fill(count < EMPTY_COUNT, 1.0)
    empty = (lse == -INF) & total.isfinite()
    rows = lse.masked_fill(empty, 0.0) * (count / divisor) - total / divisor
    rows = rows.masked_fill(empty, 0.0)
    if at_least_zero:
        rows = torch.where(rows < 0, rows - rows.detach(), rows)
    counted = (count > 0).sum().clamp(min=1) if drop else rows.shape[0]
    return factor * rows.sum() / (counted if mean else 1)


def key_loss(problem: KeyLoss, mean: bool) -> Tensor:
    """The loss [] of `ops.key_loss`."""
    q, keys = _accumulate(problem.q), _accumulate(torch.cat(problem.k))
    scale, positive, beside = _scalar(problem.scale, q), problem.positive, problem.own is not None
    logits = scale * (q @ keys.T)
    if problem.own is not None:
        own = scale * (q * _accumulate(problem.own)).sum(1)
        logits = torch.cat([logits, own[:, None]], 1)
    if positive is None:
        positive = torch.full((q.shape[0],), keys.shape[0], device=q.device)
    chosen = _one_hot(positive, logits.shape[1])
    log_p = torch.log_softmax(logits, 1)
    rows = _weighted_sum(chosen.to(q), log_p)
    if problem.target_q is not None:
        target = _scalar(problem.target_scale, q) * (_accumulate(problem.target_q) @ keys.T)
        target = F.pad(target, (0, int(beside))).masked_fill(
            chosen, 0.0 if problem.positive_is_zero else -INF
        )
        empty = (target == -INF).all(1, keepdim=True)
        weights = torch.softmax(target.masked_fill(empty, 0.0), 1).masked_fill(empty, 0.0)
        rows = torch.lerp(_weighted_sum(weights, log_p), rows, _scalar(problem.coeff, q))
    return -(rows.mean() if mean else rows.sum())


def _weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """Σ_j w_ij x_ij; a NaN of weight 0 does not count."""
    return (weights * x).masked_fill(weights == 0, 0.0).sum(dim=1)


def _target_cross_entropy(logits: Tensor, weights: Tensor, included: Tensor) -> Tensor:
    """-Σ_j w_ij log softmax(S)_ij [N] over the included entries of each row, of which there are some."""
    log_p = torch.log_softmax(logits.masked_fill(~included, -INF), dim=1)
    return -_weighted_sum(weights, log_p.masked_fill(~included, 0.0))


def soft_target_stats(problem: SoftTarget) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(lse [N], target_lse [N], cross [N], positive_sum [N])` of S = scale q kᵀ and T = target_scale t uᵀ.

    cross_i = Σ_j softmax(T)_ij S_ij; the positive's column of T is left out ("exclude") or 0 ("zero").
    """
    student, teacher, included = _soft_target_logits(problem)
    target_lse = _logsumexp(teacher, included)
    cross = (_masked_softmax(teacher, included, target_lse) * student).sum(dim=1)
    if problem.positive is None:
        return _logsumexp(student), target_lse, cross, student.new_zeros(0)
    at_positive = _one_hot(problem.positive, student.shape[1])
    return _logsumexp(student), target_lse, cross, _weighted_sum(at_positive.to(student), student)


def _soft_target_logits(problem: SoftTarget) -> tuple[Tensor, Tensor, Tensor]:
    """The student's and the target's logits [N, M], and which of the latter count."""
    q, k = _accumulate(problem.q), _accumulate(torch.cat(list(problem.k)))
    t, u = _accumulate(problem.target_q), _accumulate(torch.cat(list(problem.target_k)))
    student = _scalar(problem.scale, q) * (q @ k.T)
    teacher = _scalar(problem.target_scale, t) * (t @ u.T)
    everything = torch.ones_like(teacher, dtype=torch.bool)
    if problem.positive is None:
        return student, teacher, everything
    at_positive = _one_hot(problem.positive, teacher.shape[1])
    if problem.positive_in_target == "zero":
        return student, teacher.masked_fill(at_positive, 0.0), everything
    return student, teacher, ~at_positive


def dimcl_stats(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    scale: Scalar,
    positive_mask: Tensor | None = None,  # bool [2D, 2D]
) -> tuple[Tensor, Tensor, Tensor]:
    """`(lse, positive_sum, positive_count)`, each [2D], of scale times the columns' Pearson correlations."""
    columns = torch.cat([standardize(_accumulate(z0)), standardize(_accumulate(z1))], dim=1).T
    width = columns.shape[0]
    positives = _columns(width, width, width // 2, z0.device) | _columns(
        width, width, -(width // 2), z0.device
    )
    if positive_mask is not None:
        positives = positives | positive_mask
    lse, _, positive_sum, count = contrastive_stats(
        Contrast(columns, None, scale, exclude=0, positive_mask=positives)
    )
    return lse, positive_sum, count


def standardize(z: Tensor) -> Tensor:
    """Columns centred and divided by their norm; a constant column becomes 0 and gets no gradient."""
    n = z.shape[0]
    mean = z.mean(dim=0)
    centred = z - mean
    squared = (centred * centred).sum(dim=0)
    noise = 4 * torch.finfo(z.dtype).eps * n**0.5 * mean.abs()
    constant = (squared <= noise * noise) | (squared == 0)
    return centred * squared.masked_fill(constant, 1.0).rsqrt().masked_fill(constant, 0.0)


def similarity_matrix(q: Tensor, k: Tensor | None, scale: Scalar, normalize: bool) -> Tensor:
    """scale q kᵀ [N, M] in q's dtype, of unit rows with `normalize` (a zero row stays zero)."""
    dtype = q.dtype
    q = _accumulate(q)
    k = q if k is None else _accumulate(k)
    if normalize:
        q, k = _normalize(q), _normalize(k)
    return (_scalar(scale, q) * (q @ k.T)).to(dtype)


def masked_log_softmax_matrix(logits: Tensor, mask: Tensor | None) -> Tensor:
    """x - LSE(included) [N, M] in the dtype of `logits`; -inf, with gradient 0, where `mask` is False or the
    LSE is -inf."""
    x = _accumulate(logits)
    included = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    lse = _logsumexp(x, included)[:, None]
    empty = lse == -INF
    return (x - lse.masked_fill(empty, 0.0)).masked_fill(~included | empty, -INF).to(logits.dtype)


@full_precision
def similarity(q: Tensor, k: Tensor | None = None, *, scale: Scalar = 1.0, normalize: bool = False) -> Tensor:
    """[N, M]: scale q·k, of unit vectors with `normalize`; k None: q with itself."""
    check.features("q", q)
    check.flag("normalize", normalize)
    scale = check.scale("scale", scale, q)
    if k is not None:
        check.features("k", k, shape="[M, D]")
        check.same_device(q=q, k=k)
        check.same_width(q=q, k=k)
        q, k = dtypes.promote(q, k)
    return similarity_matrix(q, k, scale, normalize)


@full_precision
def masked_log_softmax(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """[N, M]: log-softmax over the entries where `mask` is True; the rest is -inf."""
    check.features("logits", logits, shape="[N, M]")
    if mask is not None:
        check.boolean_mask("mask", mask, logits.shape)
        check.same_device(logits=logits, mask=mask)
    return masked_log_softmax_matrix(logits, mask)


@full_precision
def soft_target_cross_entropy(
    q: Tensor,
    k: Tensor | Sequence[Tensor],
    target_q: Tensor,
    target_k: Tensor | Sequence[Tensor],
    *,
    scale: Scalar,
    target_scale: Scalar,
    positive: Tensor | None = None,
    coeff: Scalar = 0.0,
    positive_in_target: str = "exclude",
    reduction: str = "mean",
) -> Tensor:
    """-Σ_j W_ij log softmax(S)_ij [N], W = coeff onehot(positive) + (1 - coeff) softmax(T).

    S = scale q kᵀ, T = target_scale target_q target_kᵀ. A row whose target is empty has W = onehot.
    """
    problem, coeff = check.soft_target(
        q, k, target_q, target_k, scale, target_scale, positive, coeff, positive_in_target
    )
    check.option("reduction", reduction, check.REDUCTIONS)
    logits = _soft_target_logits(problem)
    return check.reduction(_soft_cross_entropy(*logits, problem.positive, coeff), reduction)


def _soft_cross_entropy(
    student: Tensor, teacher: Tensor, included: Tensor, positive: Tensor | None, coeff: Scalar
) -> Tensor:
    """Losses [N] of the logits S and T, both [N, M], with the target over the included entries of T."""
    log_p = student - _logsumexp(student)[:, None]
    target = _masked_softmax(teacher, included, _logsumexp(teacher, included))
    if positive is None:
        return -(target * log_p).sum(dim=1)
    onehot = _one_hot(positive, student.shape[1]).to(student)
    coeff = _scalar(coeff, student)
    weights = coeff * onehot + (1 - coeff) * target
    weights = torch.where(included.any(dim=1, keepdim=True), weights, onehot)
    return -(weights * log_p).sum(dim=1)


@full_precision
def contrastive_lse(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: Scalar = 1.0,
    exclude: str | int | None = "self",
    row_labels: Tensor | None = None,
    col_labels: Tensor | None = None,
    among: str = "all",
    key_bias: Tensor | None = None,
    both_axes: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LSE_{j in Den(i)} (scale q_i·k_j + key_bias_j) [N], with `both_axes` also over i [M]; -inf if empty."""
    lse, lse_cols, _, _ = contrastive_stats(
        check.contrast(q, k, scale, exclude, row_labels, col_labels, among, key_bias, both_axes)
    )
    return (lse, lse_cols) if both_axes else lse


def supcon_rows_of(
    logits: Tensor,  # [R, M], S
    weights: Tensor,  # [R, M]
    negatives: Tensor,  # bool [R, M]
    *,
    summation: str = "out",
    denominator: str = "all",
) -> tuple[Tensor, Tensor]:
    """Losses [R], without the factor τ/τ_base, and weights of positives [R] of some of the anchors.

    With w_ij the weight of a positive, |P_i| = Σ_j w_ij, S = scale q kᵀ and Den_ij the denominator:

        out: Σ_j w_ij (log Den_ij - S_ij) / |P_i|       in: -log (Σ_j w_ij exp(S_ij) / Den_ij) + log |P_i|

    Den_ij sums exp(S_ic) over positives and negatives ("all"), over negatives and j ("one_positive") or over
    negatives.
    A row without positives, or with an empty denominator, has loss 0; NaN if a logit that it looks at is.
    """
    positives = weights != 0
    total = weights.sum(dim=1)

    denominators = negatives | positives if denominator == "all" else negatives
    lse = _logsumexp(logits, denominators)
    valid = positives.any(dim=1)
    if denominator != "one_positive":
        valid = valid & (lse != -INF)
    alone = lse == -INF
    lse = lse.masked_fill(alone, 0.0)[:, None]

    if denominator == "one_positive":
        nothing_else = alone[:, None] & ~logits.isnan()
        log_ratio = F.logsigmoid(logits - lse).masked_fill(nothing_else, 0.0)  # S_ij - log Den_ij
    else:
        log_ratio = logits - lse
    if summation == "out":
        loss = -_weighted_sum(weights, log_ratio) / torch.where(total >= EMPTY_COUNT, total, 1.0)
    else:
        log_weights = torch.where(positives, weights, 1.0).log()
        loss = torch.where(valid, total, 1.0).log() - _logsumexp(log_ratio + log_weights, positives)
    looked_at = logits.masked_fill(~(negatives | positives), 0.0)
    return torch.where(valid, loss, (0.0 * looked_at).sum(dim=1)), total


def supcon_pairs(
    logits: Tensor,  # [R, M], for its shape
    rows: Tensor,  # int64 [R], which keys the anchors are
    samples: int,
    *,
    labels: Tensor | None = None,  # [samples], int64 or floating-point
    mask: Tensor | None = None,  # [samples, samples], or its rows of the samples from `before` on
    before: int = 0,
    memory_labels: Tensor | None = None,  # [K]
    kept_samples: int | None = None,
    valid: Tensor | None = None,  # bool [samples]
) -> tuple[Tensor, Tensor]:
    """Weights of the positives, and which pairs are negatives, of some of the anchors, [R, M] each.

    The M keys are view-major: row r is a view of sample r % samples; the last K are those of a memory.
    Negatives are pairs of weight 0; an anchor with itself is neither, and nor is a key that is not valid.
    `kept_samples` keeps the positives of so many other samples and drops the rest.
    """
    columns = logits.shape[1]
    left_out = _one_hot(rows, columns)
    per_sample = _sample_weights(rows % samples, samples, labels, mask, before, logits)
    stored = None
    if labels is not None and memory_labels is not None:
        stored = (labels[rows % samples][:, None] == memory_labels).to(logits)
    if valid is not None:
        per_sample = per_sample.masked_fill(~valid, 0.0)
        everywhere = None if stored is None else torch.ones_like(stored[:1], dtype=torch.bool)
        left_out = left_out | ~_column_weights(valid[None], everywhere, columns)
    weights = _column_weights(per_sample, stored, columns)
    negatives = (weights == 0) & ~left_out
    if kept_samples is not None:
        weights = _column_weights(cap_positives(per_sample, rows % samples, kept_samples), stored, columns)
    return weights.masked_fill(left_out, 0.0), negatives


def key_pairs(
    logits: Tensor,  # [R, M], for its dtype
    samples: Tensor,  # int64 [R], which samples the anchors are views of
    labels: Tensor | None,  # [B]
    key_labels: Tensor | None,  # [M]
    mask: Tensor | None,  # [B, M]
) -> tuple[Tensor, Tensor]:
    """The same for keys of their own, none of which is an anchor: by labels, or by a mask."""
    if labels is not None and key_labels is not None:
        weights = (labels[samples][:, None] == key_labels).to(logits)
    elif mask is not None:
        weights = mask[samples].to(logits)
    else:
        raise ValueError("labels and key_labels, or mask, must be given with keys, got none of them")
    return weights, weights == 0


def _sample_weights(
    anchor: Tensor, samples: int, labels: Tensor | None, mask: Tensor | None, before: int, like: Tensor
) -> Tensor:
    """Weights [R, samples] of the samples as positives of the sample `anchor` [R]."""
    if mask is not None:
        return mask[anchor - before].to(like)
    if labels is None:
        labels = torch.arange(samples, device=like.device)
    return (labels[anchor][:, None] == labels).to(like)


def _column_weights(per_sample: Tensor, stored: Tensor | None, columns: int) -> Tensor:
    """Weights [R, columns] of the views of each sample, then of the rows of a memory."""
    if stored is None:
        return per_sample.repeat(1, columns // per_sample.shape[1])
    copies = (columns - stored.shape[1]) // per_sample.shape[1]
    return torch.cat([per_sample.repeat(1, copies), stored], dim=1)


def cap_positives(per_sample: Tensor, anchor: Tensor, kept: int) -> Tensor:
    """Keep the anchor's own sample and the `kept` heaviest others, the first of equals; zero the rest."""
    own = _one_hot(anchor, per_sample.shape[1])
    order = per_sample.masked_fill(own, -INF).argsort(dim=1, descending=True, stable=True)
    first = torch.zeros_like(own).scatter(1, order[:, :kept], True)
    return per_sample.masked_fill(~(first | own), 0.0)


@full_precision
def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: Scalar = 0.07,
    base_temperature: Scalar = 0.07,
    contrast_mode: str = "all",
    summation: str = "out",
    denominator: str = "all",
    positives_cap: int | None = None,
    no_positive: str = "zero",
    memory: KeyQueue | Sequence[Tensor] | None = None,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """(τ/τ_base) L_i of `supcon_rows_of` for features [B, V, D]; anchors are all views, or view 0 ("one").

    The keys [K, D] of a memory are further columns, positives by its labels [K]; `keys` [M, D] with labels
    [M], or a mask [B, M], are all there are. Samples that are not `valid` [B] do not take part.
    Khosla et al., Supervised Contrastive Learning, the losses "out" and "in".
    """
    features = check.views("features", features)
    samples, views, _ = features.shape
    check.not_both("memory", memory, "positives_cap", positives_cap)
    check.not_both("keys", keys, "positives_cap", positives_cap)
    check.not_both("keys", keys, "memory", memory)
    features, labels, stored = check.memory(memory, features, labels, mask)
    features, labels, own_keys = check.own_keys(keys, key_labels, features, labels, mask)
    labels, mask = check.supervision(
        labels, mask, samples, features, None if own_keys is None else own_keys[0].shape[0]
    )
    valid = check.valid_rows(valid, samples, features)
    check.option("contrast_mode", contrast_mode, ("all", "one"))
    check.option("summation", summation, ("out", "in"))
    check.option("denominator", denominator, ("all", "one_positive", "only_negatives"))
    kept = check.positives_cap("positives_cap", positives_cap, views)
    scales = _supcon_scales(features, temperature, base_temperature)

    rows = _accumulate(_zero_unless(valid, features).transpose(0, 1).flatten(0, 1))
    queries = rows if contrast_mode == "all" else rows[:samples]
    anchors = torch.arange(queries.shape[0], device=rows.device)
    if own_keys is not None:
        logits = scales[0] * (queries @ _accumulate(own_keys[0]).T)
        if mask is not None:
            mask = _zero_unless(valid, mask)
        pairs = key_pairs(logits, anchors % samples, labels, own_keys[1], mask)
    else:
        columns = rows if stored is None else torch.cat([rows, _accumulate(stored[0])])
        logits = scales[0] * (queries @ columns.T)
        pairs = supcon_pairs(
            logits, anchors, samples, labels=labels, mask=_weights_of_valid(mask, valid),
            memory_labels=None if stored is None else stored[1], kept_samples=kept, valid=valid,
        )  # fmt: skip
    loss, total = supcon_rows_of(logits, *pairs, summation=summation, denominator=denominator)
    return _reduce_anchors(scales[1] * loss, total, valid, no_positive, reduction)


@full_precision
def selfcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: Scalar = 0.07,
    base_temperature: Scalar = 0.07,
    anchors: str = "all",
    augmentations: int = 1,
    no_positive: str = "zero",
    valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """SupCon ("out", "all") over the exits of a network, features [A·B, exits + 1, D], the backbone last.

    Anchors are all rows, those of the exits only, or those of view 0 ("first"). Samples that are not `valid`
    [B] do not take part. Bae et al., Self-Contrastive Learning.
    """
    features = check.views("features", features)
    check.option("anchors", anchors, ("all", "exits", "first"))
    samples = check.split("features", features, check.integer("augmentations", augmentations, 1))
    labels, mask = check.supervision(labels, mask, samples, features)
    rows, views, _ = features.shape
    count = rows * {"all": views, "exits": views - 1, "first": 1}[anchors]
    if count == 0:
        raise ValueError(f"features must have a view besides the backbone with anchors='exits', got {views}")
    valid = check.valid_rows(valid, samples, features)
    scale, factor = _supcon_scales(features, temperature, base_temperature)
    rows_valid = None if valid is None else valid.repeat(augmentations)
    keys = _accumulate(_zero_unless(rows_valid, features).transpose(0, 1).flatten(0, 1))
    logits = scale * (keys[:count] @ keys.T)
    pairs = supcon_pairs(
        logits, torch.arange(count, device=logits.device), samples,
        labels=labels, mask=_weights_of_valid(mask, valid), valid=valid,
    )  # fmt: skip
    loss, total = supcon_rows_of(logits, *pairs)
    return _reduce_anchors(factor * loss, total, valid, no_positive, reduction)


def _supcon_scales(features: Tensor, temperature: Scalar, base_temperature: Scalar) -> tuple[Scalar, Scalar]:
    """1 / τ and τ / τ_base."""
    temperature = check.temperature("temperature", temperature, features)
    base_temperature = check.temperature("base_temperature", base_temperature, features)
    like = _accumulate(features[:0])
    return _inverse(temperature, like), _scalar(temperature, like) * _inverse(base_temperature, like)


def _weights_of_valid(mask: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """The mask [B, B] with 0 in the rows and the columns of samples that are not valid."""
    return None if mask is None else _zero_unless(valid, _zero_unless(valid, mask).T).T


def _reduce_anchors(
    loss: Tensor, total: Tensor, valid: Tensor | None, no_positive: str, reduction: str
) -> Tensor:
    """The mean over the valid anchors, those without positives left out with "drop"."""
    check.option("no_positive", no_positive, ("zero", "drop"))
    rows_valid = None if valid is None else valid.repeat(loss.shape[0] // valid.shape[0])
    counted = None if no_positive == "zero" else total > 0
    if rows_valid is not None:
        counted = rows_valid if counted is None else rows_valid & counted
    return check.reduction(_zero_unless(rows_valid, loss), reduction, counted)


@full_precision
def stablerep_loss(
    features: Tensor, labels: Tensor, *, temperature: Scalar = 0.1, reduction: str = "mean"
) -> Tensor:
    """-Σ_{j≠i} p_ij log softmax_{k≠i}(z_i·z_k/τ)_j [N], p_i uniform over the others of label i, unit rows."""
    check.features("features", features)
    labels = check.labels("labels", labels, features.shape[0])
    check.same_device(features=features, labels=labels)
    temperature = check.temperature("temperature", temperature, features)
    check.option("reduction", reduction, check.REDUCTIONS)
    z = _normalize(_accumulate(features))
    n = z.shape[0]
    others = ~_columns(n, n, 0, z.device)
    logits = _inverse(temperature, z) * (z @ z.T)
    positive = others & (labels[:, None] == labels)
    lse = _logsumexp(logits, others)
    terms = (lse[:, None] - logits).masked_fill(~positive, 0.0)
    loss = terms.sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    return check.reduction(torch.where(lse.isnan(), lse, loss), reduction)


@full_precision
def multilevel_loss(
    levels: Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    weights: Sequence[float] | Tensor | None = None,
    temperature: Scalar = 0.07,
    base_temperature: Scalar = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """Σ_l weights_l · supcon_loss(levels_l), the levels [B, V, D_l] being layers of one encoder."""
    levels = check.levels("levels", levels)
    parts = [
        supcon_loss(
            level, labels, temperature=temperature, base_temperature=base_temperature, reduction=reduction
        )
        for level in levels
    ]
    factors = check.level_weights("weights", weights, len(levels), levels[0])
    total = factors[0] * parts[0]
    for factor, part in zip(factors[1:], parts[1:], strict=True):
        total = total + factor * part
    return total


@full_precision
def sce_loss(
    q: Tensor,
    k: Tensor,
    k_global: Tensor | None = None,
    queue: Tensor | KeyQueue | None = None,
    *,
    temperature: Scalar = 0.1,
    target_temperature: Scalar = 0.07,
    coeff: Scalar = 0.5,
    positive_in_target: str = "exclude",
    rank: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """-Σ_j W_ij log softmax(q·keys/τ)_ij, W = λ onehot + (1 - λ) softmax(k·keys/τ_m).

    The keys are k_global [M, D] (positive i + N·rank) and the queue [K, D]; without k_global, k; with the
    queue alone, the row's own key k_i and the queue. The positive is left out of the target, or has logit 0
    in it ("zero"). Denize et al., Similarity Contrastive Estimation.
    """
    q, k, k_global, queue = check.keys_and_queue(q, k, k_global, queue, rank)
    temperature = check.temperature("temperature", temperature, q)
    target_temperature = check.temperature("target_temperature", target_temperature, q)
    coeff = check.coefficient("coeff", coeff, q)
    check.option("positive_in_target", positive_in_target, check.TARGET_POSITIVES)
    check.option("reduction", reduction, check.REDUCTIONS)

    q, k = _accumulate(q), _accumulate(k)
    student, teacher = [], []
    positive = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
    if k_global is None and queue is not None:
        student.append((q * k).sum(dim=1, keepdim=True))
        teacher.append((k * k).sum(dim=1, keepdim=True))
    else:
        keys = k if k_global is None else _accumulate(k_global)
        student.append(q @ keys.T)
        teacher.append(k @ keys.T)
        positive = torch.arange(q.shape[0], device=q.device) + q.shape[0] * rank
    if queue is not None:
        student.append(q @ _accumulate(queue).T)
        teacher.append(k @ _accumulate(queue).T)
    s = _inverse(temperature, q) * torch.cat(student, dim=1)
    t = _inverse(target_temperature, q) * torch.cat(teacher, dim=1)

    included = torch.ones_like(t, dtype=torch.bool)
    if positive_in_target == "zero":
        t = t.masked_fill(_one_hot(positive, t.shape[1]), 0.0)
    else:
        included = ~_one_hot(positive, t.shape[1])
    return check.reduction(_soft_cross_entropy(s, t, included, positive, coeff), reduction)


@full_precision
def info_nce_loss(
    q: Tensor,
    k: Tensor,
    queue: Tensor | KeyQueue | None = None,
    *,
    temperature: Scalar = 0.07,
    in_batch: bool = False,
    k_global: Tensor | None = None,
    rank: int = 0,
    valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-log exp(q_i·k_i/τ) / Σ_j exp(q_i·key_j/τ): keys k, or k_i and the queue [K, D] (MoCo).

    `in_batch`: k and the queue. With k_global [G, D]: it (positive i + N·rank), and the queue.
    Pairs that are not `valid` [N] do not take part.
    """
    check.not_both("k_global", k_global, "valid", valid)
    q, k, k_global, queue = check.keys_and_queue(q, k, k_global, queue, rank)
    temperature = check.temperature("temperature", temperature, q)
    check.flag("in_batch", in_batch)
    n = q.shape[0]
    valid = check.valid_rows(valid, n, q)
    check.option("reduction", reduction, check.REDUCTIONS)
    q, k = _accumulate(_zero_unless(valid, q)), _accumulate(_zero_unless(valid, k))
    positive = torch.arange(n, device=q.device)
    if k_global is not None:
        logits = q @ _accumulate(k_global).T
        positive = positive + n * rank
    elif in_batch or queue is None:
        logits = q @ k.T
    else:
        logits = (q * k).sum(dim=1, keepdim=True)
        positive = torch.zeros_like(positive)
    included = torch.ones_like(logits, dtype=torch.bool)
    if valid is not None and logits.shape[1] == n:
        included = valid[:, None] == valid
    if queue is not None:
        logits = torch.cat([logits, q @ _accumulate(queue).T], dim=1)
        included = F.pad(included, (0, queue.shape[0]), value=True)
    weights = _one_hot(positive, logits.shape[1]).to(q)
    loss = _target_cross_entropy(_inverse(temperature, q) * logits, weights, included)
    return check.reduction(_zero_unless(valid, loss), reduction, valid)


@full_precision
def nt_xent_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: Scalar = 0.5,
    valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-log exp(S_i,pos) / Σ_{j≠i} exp(S_ij), S the cosines over τ of the 2N rows of z0, z1 (SimCLR) [2N].

    Pairs that are not `valid` [N] do not take part.
    """
    z0, z1 = check.pair("z0", z0, "z1", z1)
    valid = check.valid_rows(valid, z0.shape[0], z0)
    temperature = check.temperature("temperature", temperature, z0)
    check.option("reduction", reduction, check.REDUCTIONS)
    n = z0.shape[0]
    rows_valid = None if valid is None else valid.repeat(2)
    z = _normalize(_zero_unless(rows_valid, _accumulate(torch.cat([z0, z1]))))
    partner = (torch.arange(2 * n, device=z.device) + n) % (2 * n)
    problem = Contrast(z, None, _inverse(temperature, z), exclude=0, positive_index=partner)
    if rows_valid is not None:
        problem = problem._replace(row_labels=rows_valid, col_labels=rows_valid, among="same")
    lse, _, positive, _ = contrastive_stats(problem)
    return check.reduction(_zero_unless(rows_valid, lse - positive), reduction, rows_valid)


@full_precision
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Scalar,
    *,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Means of the cross-entropies of row i and of column i of logit_scale · image textᵀ [N] (CLIP).

    The target is uniform over the pairs of the label of pair i, without labels that pair. Pairs that are not
    `valid` [N] do not take part.
    """
    image, text = check.pair("image_features", image_features, "text_features", text_features)
    logit_scale = check.scale("logit_scale", logit_scale, image)
    n = image.shape[0]
    valid = check.valid_rows(valid, n, image)
    if labels is not None:
        labels = check.labels("labels", labels, n)
        check.same_device(image_features=image, labels=labels)
    check.option("reduction", reduction, check.REDUCTIONS)
    image, text = _accumulate(_zero_unless(valid, image)), _accumulate(_zero_unless(valid, text))
    logits = _scalar(logit_scale, image) * (image @ text.T)
    included, positives = torch.ones_like(logits, dtype=torch.bool), _columns(n, n, 0, logits.device)
    if valid is not None:
        included = valid[:, None] == valid
    if labels is not None:
        positives = positives | (included & (labels[:, None] == labels))
    weights = positives / positives.sum(dim=1).to(logits)  # symmetric
    rows = _target_cross_entropy(logits, weights, included)
    loss = (rows + _target_cross_entropy(logits.T, weights, included)) / 2
    return check.reduction(_zero_unless(valid, loss), reduction, valid)


@full_precision
def dcl_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: Scalar = 0.1,
    sigma: Scalar | None = None,
    valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """LSE_{j≠i} (z0_i·z0_j/τ, z0_i·z1_j/τ) - w_i z0_i·z1_i/τ [N], one way.

    w_i = 1, or 2 - N softmax_i(z0_i·z1_i/sigma) (DCLW). With N = 1 the denominator is empty and the loss 0.
    Pairs that are not `valid` [N] do not take part, nor in N. Yeh et al., Decoupled Contrastive Learning.
    """
    z0, z1 = check.pair("z0", z0, "z1", z1)
    temperature = check.temperature("temperature", temperature, z0)
    if sigma is not None:
        sigma = check.temperature("sigma", sigma, z0)
    check.option("reduction", reduction, check.REDUCTIONS)
    valid = check.valid_rows(valid, z0.shape[0], z0)
    z0, z1 = _accumulate(_zero_unless(valid, z0)), _accumulate(_zero_unless(valid, z1))
    n = z0.shape[0]
    others = ~_columns(n, n, 0, z0.device)
    if valid is not None:
        others = others & (valid[:, None] == valid)
    logits = torch.cat([z0 @ z0.T, z0 @ z1.T], dim=1) * _inverse(temperature, z0)
    lse = _logsumexp(logits, others.repeat(1, 2))
    products = (z0 * z1).sum(dim=1)
    weight: Scalar = 1.0
    if sigma is not None:
        counted = torch.ones_like(products, dtype=torch.bool) if valid is None else valid
        scores = (products * _inverse(sigma, z0))[None]
        shares = _masked_softmax(scores, counted, _logsumexp(scores, counted[None]))
        weight = 2 - counted.sum() * shares[0]
    positive = weight * (products * _inverse(temperature, z0))
    loss = torch.where(lse == -INF, 0.0 * positive, lse - positive)
    return check.reduction(_zero_unless(valid, loss), reduction, valid)


@full_precision
def dimcl_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: Scalar = 0.1,
    positive_mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """LSE_{c≠r} S_rc - mean over positives of S_rc [2D], S the Pearson correlations over τ of the 2D columns.

    Nguyen et al., DimCL: Dimensional Contrastive Learning for Improving Self-Supervised Learning.
    """
    z0, z1 = check.pair("z0", z0, "z1", z1)
    check.minimum_rows("z0", z0, 2)
    width = 2 * z0.shape[1]
    if positive_mask is not None:
        check.boolean_mask("positive_mask", positive_mask, (width, width))
        check.same_device(z0=z0, positive_mask=positive_mask)
    temperature = check.temperature("temperature", temperature, z0)
    check.option("reduction", reduction, check.REDUCTIONS)
    scale = _inverse(temperature, _accumulate(z0))
    lse, positive_sum, count = dimcl_stats(z0, z1, scale, positive_mask)
    return check.reduction(lse - positive_sum / count, reduction)
