"""Every op in pure PyTorch, on any device, walking the rows in chunks so that no N x M matrix is held.

The formulas stand in `ops.py`. A chunk's logits hold about 2^22 elements. Products, sums and maxima are
float32 (float64 for float64 inputs), and nothing depends on the order of execution. What is excluded from a
row is a logit of -inf; a row or column with nothing included has an LSE of -inf and adds to no gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .dtypes import accumulate_dtype, full_precision, statistics_dtype
from .problem import Contrast, KeyLoss, KeyStats, SoftTarget, flat
from .reference import EMPTY_COUNT

P = ParamSpec("P")
R = TypeVar("R")
Gradients = Sequence[Tensor | None]  # those that came in

CHUNK_ELEMENTS = 1 << 22
MIN_CHUNK_ROWS = 16


def _op(function: Callable[P, R]) -> Callable[P, R]:
    return torch.no_grad()(full_precision(_traced_in_full_precision(function)))


def _traced_in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with autocast off in a graph too: PyTorch runs a traced backward under the autocast of its
    caller, which is not on yet where the backward is traced."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        device = next(x.device for x in args if isinstance(x, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _log_sum_exp(logits: Tensor, dim: int) -> Tensor:
    """LSEs of the rows (1) or columns (0) of a chunk, with the digits of a statistic."""
    dtype = statistics_dtype(logits)
    top = logits.amax(dim, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    return (logits - top).exp_().sum(dim).to(dtype).log() + top.squeeze(dim).to(dtype)


def _weighted_sum(weights: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over the rows; a NaN of weight 0 does not count."""
    return (weights * x).masked_fill_(weights == 0, 0).sum(1, dtype=dtype)


def _softmax_of(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), 0 where the LSE is -inf. `lse`, a statistic, broadcasts against the logits."""
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    rounded = lse.to(logits.dtype)
    rest = (rounded.to(lse.dtype) - lse).masked_fill(lse == math.inf, 0).exp()  # what rounding takes off
    return (logits - rounded).exp_().mul_(rest.to(logits.dtype))


def _gradient(total: Tensor, scale: Tensor, like: Tensor, needed: bool) -> Tensor:
    """scale * total in the dtype of `like`; [0] where it is not needed."""
    return (total * scale).to(like.dtype) if needed else total.new_empty(0)


def _where_finite(grad: Tensor, lse: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.to(dtype).masked_fill(lse == -math.inf, 0)


def _accumulated(problem: Contrast) -> Contrast:
    """The problem with its keys spelt out, in the accumulation dtype."""
    q = problem.q.to(accumulate_dtype(problem.q.dtype))
    return problem._replace(q=q, k=q if problem.k is None else problem.k.to(q.dtype))


def _columns(problem: Contrast) -> Tensor:
    return torch.arange(problem.keys.shape[0], device=problem.q.device)


def _excluded(problem: Contrast, rows: slice) -> Tensor:
    own = torch.arange(rows.start, rows.stop, device=problem.q.device) + (problem.exclude or 0)
    return own[:, None] == _columns(problem)


def _same_label(problem: Contrast, rows: slice) -> Tensor:
    if problem.row_labels is None or problem.col_labels is None:
        raise ValueError("row_labels and col_labels must be given when labels decide which pairs count")
    return problem.row_labels[rows, None] == problem.col_labels


def _denominator(problem: Contrast, rows: slice, similarities: Tensor) -> Tensor:
    """S of these rows from scale q k^T, -inf outside of the denominator."""
    logits = similarities.clone()
    if problem.key_bias is not None:
        logits += problem.key_bias
    if problem.exclude is not None:
        logits.masked_fill_(_excluded(problem, rows), -math.inf)
    if problem.by_mask:
        weights = _weights(problem, rows)
        if problem.among == "different":
            return logits.masked_fill_(weights != 0, -math.inf)
        return logits.add_(weights.to(logits.dtype).log()).masked_fill_(weights == 0, -math.inf)
    if problem.among != "all":
        same = _same_label(problem, rows)
        logits.masked_fill_(same if problem.among == "different" else ~same, -math.inf)
    return logits


def _weights(problem: Contrast, rows: slice) -> Tensor:
    """w of these rows, [n, M], bool or in the accumulation dtype."""
    if problem.positive_index is not None:
        return problem.positive_index[rows, None] == _columns(problem)
    if problem.positive_mask is not None:
        period, width = problem.positive_mask.shape
        index = torch.arange(rows.start, rows.stop, device=problem.q.device) % period
        weights = problem.positive_mask[index][:, _columns(problem) % width]
    else:
        weights = _same_label(problem, rows)
    return weights if problem.exclude is None else weights.masked_fill(_excluded(problem, rows), 0)


@_op
@flat(Contrast)
def contrastive_forward(
    given: Contrast, save_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = _accumulated(given)
    q, k = problem.q, problem.keys
    n, m = q.shape[0], k.shape[0]
    dtype = statistics_dtype(q)
    has_positives = problem.positives != "none"
    lse = q.new_empty(n, dtype=dtype)
    lse_cols = q.new_full((m if problem.both_axes else 0,), -math.inf, dtype=dtype)
    positive_sum = q.new_empty(n if has_positives else 0, dtype=dtype)
    positive_count = torch.empty_like(positive_sum)
    residual = q.new_empty(q.shape if save_gradient else (0,))
    for rows in _chunks(n, m):
        similarities = (q[rows] @ k.T) * problem.scale
        if has_positives:
            weights = _weights(problem, rows)
            positive_sum[rows] = _weighted_sum(weights, similarities, dtype)
            positive_count[rows] = weights.sum(1, dtype=dtype)
        logits = _denominator(problem, rows, similarities)
        lse[rows] = _log_sum_exp(logits, 1)
        if problem.both_axes:
            lse_cols = torch.logaddexp(lse_cols, _log_sum_exp(logits, 0))
        if save_gradient:
            softmax = _softmax_of(logits, lse[rows, None])
            residual[rows] = (softmax - weights.to(softmax) if has_positives else softmax) @ k
    return lse, lse_cols, positive_sum, positive_count, residual


@_op
@flat(Contrast, gradients=3)
def contrastive_backward(
    grads: Gradients, given: Contrast, saved: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_lse, grad_lse_cols, grad_positive_sum = grads
    lse, lse_cols, residual = saved
    needs_q, needs_k, needs_scale, needs_bias = needs
    problem = _accumulated(given)
    q, k, scale = problem.q, problem.keys, problem.scale
    acc, like = q.dtype, given.q
    into_columns = needs_k or (needs_q and given.k is None)
    grad_q = q.new_empty(q.shape if needs_q else (0,))
    grad_k = q.new_zeros(k.shape if into_columns else (0,))
    grad_bias = q.new_zeros(k.shape[0] if needs_bias else 0)
    grad_scale = q.new_zeros(() if needs_scale else 0)
    if grad_lse is not None:
        grad_lse = _where_finite(grad_lse, lse, acc)
    if grad_lse_cols is not None:
        grad_lse_cols = _where_finite(grad_lse_cols, lse_cols, acc)

    if residual.numel() > 0 and not (needs_k or needs_bias):
        grad = _or_zeros(grad_lse, lse).to(acc)[:, None] * residual
        if problem.positive_index is not None:
            weight = _or_zeros(grad_lse, lse) + _or_zeros(grad_positive_sum, lse)
            grad += weight[:, None].to(acc) * _at([k], problem.positive_index, acc)
        if needs_scale:
            grad_scale = (q * grad).sum()
        return _gradient(grad, scale, like, needs_q), grad_k, grad_scale, grad_bias

    for rows in _chunks(q.shape[0], k.shape[0]):
        dots = q[rows] @ k.T
        logits = _denominator(problem, rows, dots * scale)
        grad = torch.zeros_like(dots)
        if grad_lse is not None:
            grad += grad_lse[rows, None] * _softmax_of(logits, lse[rows, None])
        if grad_lse_cols is not None:
            grad += grad_lse_cols * _softmax_of(logits, lse_cols)
        if needs_bias:
            grad_bias += grad.sum(0)
        if grad_positive_sum is not None:
            grad += grad_positive_sum[rows, None].to(acc) * _weights(problem, rows)
        if needs_scale:
            grad_scale += (grad * dots).sum()
        if needs_q:
            grad_q[rows] = grad @ k
        if into_columns:
            grad_k += grad.T @ q[rows]

    if needs_q and given.k is None:
        grad_q += grad_k
    grad_q, grad_k = _gradient(grad_q, scale, like, needs_q), _gradient(grad_k, scale, like, needs_k)
    return grad_q, grad_k, grad_scale, grad_bias


def _at(segments: Sequence[Tensor], index: Tensor, acc: torch.dtype) -> Tensor:
    """Row index[i] of the concatenated segments, [N, D]; 0 where the index is none of theirs."""
    found = segments[0].new_zeros((index.shape[0], segments[0].shape[1]), dtype=acc)
    for part in segments:
        if part.shape[0] > 0:
            inside = (index >= 0) & (index < part.shape[0])
            row = part[index.clamp(0, part.shape[0] - 1)].to(acc)
            found = torch.where(inside[:, None], row, found)
        index = index - part.shape[0]
    return found


def _accumulated_segments(problem: SoftTarget) -> SoftTarget:
    """The problem with its features in the accumulation dtype."""
    acc = accumulate_dtype(problem.q.dtype)
    return problem._replace(
        q=problem.q.to(acc), k=[part.to(acc) for part in problem.k],
        target_q=problem.target_q.to(acc), target_k=[part.to(acc) for part in problem.target_k],
    )  # fmt: skip


def _is_positive(problem: SoftTarget, rows: slice) -> Tensor | None:
    if problem.positive is None:
        return None
    return problem.positive[rows, None] == torch.arange(problem.columns, device=problem.q.device)


def _dots(q: Tensor, segments: Sequence[Tensor]) -> Tensor:
    return torch.cat([q @ part.T for part in segments], 1)


def _target_logits(problem: SoftTarget, dots: Tensor, positive: Tensor | None) -> Tensor:
    logits = dots * problem.target_scale
    if positive is not None:
        logits.masked_fill_(positive, -math.inf if problem.positive_in_target == "exclude" else 0.0)
    return logits


def _times_segments(matrix: Tensor, segments: Sequence[Tensor]) -> Tensor:
    """matrix [n, M] @ the concatenated segments [M, D]."""
    out = matrix.new_zeros((matrix.shape[0], segments[0].shape[1]))
    start = 0
    for part in segments:
        out += matrix[:, start : start + part.shape[0]] @ part
        start += part.shape[0]
    return out


def _add_transposed(grads: Sequence[Tensor], matrix: Tensor, rows: Tensor) -> None:
    """Add matrix.T [M, n] @ rows [n, D] to the gradients of the segments."""
    start = 0
    for grad in grads:
        grad += matrix[:, start : start + grad.shape[0]].T @ rows
        start += grad.shape[0]


@_op
@flat(SoftTarget)
def soft_target_forward(
    given: SoftTarget, save_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = _accumulated_segments(given)
    q, n = problem.q, problem.q.shape[0]
    dtype = statistics_dtype(q)
    lse, target_lse, cross = (q.new_empty(n, dtype=dtype) for _ in range(3))
    positive_sum = q.new_empty(0 if problem.positive is None else n, dtype=dtype)
    mean_key, mean_target_key = (q.new_empty(q.shape if save_gradient else (0,)) for _ in range(2))
    for rows in _chunks(n, problem.columns):
        own = _is_positive(problem, rows)
        logits = _dots(q[rows], problem.k) * problem.scale
        target_logits = _target_logits(problem, _dots(problem.target_q[rows], problem.target_k), own)
        lse[rows] = _log_sum_exp(logits, 1)
        target_lse[rows] = _log_sum_exp(target_logits, 1)
        target = _softmax_of(target_logits, target_lse[rows, None])
        pivot = logits.gather(1, target.argmax(1, keepdim=True))  # near the mean where the target is sharp
        total = target.sum(1, dtype=dtype)
        cross[rows] = (target * (logits - pivot)).sum(1, dtype=dtype) + total.sign() * pivot[:, 0].to(dtype)
        if own is not None:
            positive_sum[rows] = _weighted_sum(own, logits, dtype)
        if save_gradient:
            softmax = _softmax_of(logits, lse[rows, None])
            if own is not None:
                softmax.masked_fill_(own, 0)
                target.masked_fill_(own, 0)
            mean_key[rows] = _times_segments(softmax, problem.k)
            mean_target_key[rows] = _times_segments(target, problem.k)
    return lse, target_lse, cross, positive_sum, mean_key, mean_target_key


@_op
@flat(SoftTarget, gradients=4)
def soft_target_backward(
    grads: Gradients, given: SoftTarget, saved: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor], Tensor, Tensor]:
    grad_lse, grad_target_lse, grad_cross, grad_positive_sum = grads
    lse, target_lse, cross, positive_sum, mean_key, mean_target_key = saved
    needs_q, needs_k, needs_target_q, needs_target_k = needs
    needs_target = needs_target_q or needs_target_k
    problem = _accumulated_segments(given)
    q, target_q, scale, target_scale = problem.q, problem.target_q, problem.scale, problem.target_scale
    acc, like = q.dtype, given.q
    g_positive = _or_zeros(grad_positive_sum, lse).to(acc)
    g_lse = _where_finite(_or_zeros(grad_lse, lse), lse, acc)
    g_cross = _where_finite(_or_zeros(grad_cross, lse), target_lse, acc)
    g_target_lse = _where_finite(_or_zeros(grad_target_lse, lse), target_lse, acc)

    def zeros(like: Tensor, needed: bool) -> Tensor:
        return like.new_zeros(like.shape if needed else (0,))

    grad_q, grad_target_q = zeros(q, needs_q), zeros(target_q, needs_target_q)
    grad_k = [zeros(part, needs_k) for part in problem.k]
    grad_target_k = [zeros(part, needs_target_k) for part in problem.target_k]
    grad_scale, grad_target_scale = (q.new_zeros(()) for _ in range(2))

    if mean_key.numel() > 0 and not (needs_k or needs_target):
        grad = g_lse[:, None] * mean_key + g_cross[:, None] * mean_target_key
        if problem.positive is not None:
            weight = g_lse * torch.expm1(positive_sum - lse) + (g_lse + g_positive)
            if problem.positive_in_target == "zero":
                weight += g_cross * (-target_lse).exp()
            grad += weight[:, None].to(acc) * _at(problem.k, problem.positive, acc)
        grad_scale = (q * grad).sum()
        if needs_q:
            grad_q = grad
    else:
        for rows in _chunks(q.shape[0], problem.columns):
            own = _is_positive(problem, rows)
            dots, target_dots = _dots(q[rows], problem.k), _dots(target_q[rows], problem.target_k)
            logits = dots * scale
            target = _softmax_of(_target_logits(problem, target_dots, own), target_lse[rows, None])
            grad = g_lse[rows, None] * _softmax_of(logits, lse[rows, None]) + g_cross[rows, None] * target
            if own is not None:
                grad += g_positive[rows, None] * own
            grad_scale += (grad * dots).sum()
            if needs_q:
                grad_q[rows] = _times_segments(grad, problem.k)
            if needs_k:
                _add_transposed(grad_k, grad, q[rows])
            if not needs_target:
                continue
            rounded = cross[rows, None].to(acc)
            centred = (logits - rounded) - (cross[rows, None] - rounded).to(acc)
            grad = target * (g_target_lse[rows, None] + g_cross[rows, None] * centred)
            if own is not None:
                grad.masked_fill_(own, 0)
            grad_target_scale += (grad * target_dots).sum()
            if needs_target_q:
                grad_target_q[rows] = _times_segments(grad, problem.target_k)
            if needs_target_k:
                _add_transposed(grad_target_k, grad, target_q[rows])

    return (
        _gradient(grad_q, scale, like, needs_q),
        [_gradient(part, scale, like, needs_k) for part in grad_k],
        _gradient(grad_target_q, target_scale, like, needs_target_q),
        [_gradient(part, target_scale, like, needs_target_k) for part in grad_target_k],
        grad_scale,
        grad_target_scale,
    )


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _standardised(z: Tensor, mean: Tensor, rnorm: Tensor) -> Tensor:
    """The centred columns of z [N, D] at unit length, as rows [D, N]."""
    return ((z.to(mean.dtype) - mean) * rnorm).T.contiguous()


def _column_statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / norm of the centred columns of z [N, D], the latter 0 for a constant column."""
    z = z.to(accumulate_dtype(z.dtype))
    mean = z.mean(0)
    norm = torch.linalg.vector_norm(z - mean, dim=0)
    rounding = 4 * torch.finfo(z.dtype).eps * math.sqrt(z.shape[0])
    return mean, torch.where(norm > rounding * mean.abs(), norm.reciprocal(), 0)


def _dimcl_problem(x: Tensor, scale: Tensor, mask: Tensor | None) -> Contrast:
    """X with itself; positives are the other view's same dimension, and those of the mask."""
    own = torch.arange(x.shape[0], device=x.device)
    partner = own.roll(x.shape[0] // 2)
    problem = Contrast(x, None, scale, exclude=0)
    if mask is None:
        return problem._replace(positive_index=partner)
    return problem._replace(positive_mask=mask | (partner[:, None] == own))


@_op
def dimcl_forward(
    z0: Tensor, z1: Tensor, scale: Tensor, positive_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean0, rnorm0 = _column_statistics(z0)
    mean1, rnorm1 = _column_statistics(z1)
    x = torch.cat([_standardised(z0, mean0, rnorm0), _standardised(z1, mean1, rnorm1)])
    problem = _dimcl_problem(x, scale, positive_mask)
    lse, _, positive_sum, positive_count, _ = contrastive_forward(*problem, False)
    return lse, positive_sum, positive_count, torch.stack([mean0, mean1]), torch.stack([rnorm0, rnorm1])


@_op
def dimcl_backward(
    grad_lse: Tensor | None,
    grad_positive_sum: Tensor | None,
    z0: Tensor,
    z1: Tensor,
    scale: Tensor,
    positive_mask: Tensor | None,
    lse: Tensor,
    mean: Tensor,
    rnorm: Tensor,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.cat([_standardised(z0, mean[0], rnorm[0]), _standardised(z1, mean[1], rnorm[1])])
    grads, problem = (grad_lse, None, grad_positive_sum), _dimcl_problem(x, scale, positive_mask)
    saved, needs = (lse, lse.new_empty(0), x.new_empty(0)), (True, False, needs_scale, False)
    grad, _, grad_scale, _ = contrastive_backward(*grads, *problem, *saved, needs)
    grad = grad - x * (x * grad).sum(1, keepdim=True)
    # Last, as rounding leaves x itself a mean where it hardly varies.
    grad = grad - grad.mean(1, keepdim=True)
    grad_z = (grad * rnorm.flatten()[:, None]).T.to(z0.dtype)
    grad_z0, grad_z1 = (part.contiguous() for part in grad_z.split(z0.shape[1], 1))
    return grad_z0, grad_z1, grad_scale


def _reciprocal_norm(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1)
    return torch.where(norm > 0, norm.reciprocal(), 0)


@_op
def similarity_forward(
    q: Tensor, k: Tensor | None, scale: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(q.dtype)
    rows_q = q.to(acc)
    rows_k = rows_q if k is None else k.to(acc)
    q_rnorm, k_rnorm = rows_q.new_empty(0), rows_q.new_empty(0)
    if normalize:
        q_rnorm = _reciprocal_norm(rows_q)
        rows_q = rows_q * q_rnorm[:, None]
        if k is None:
            rows_k = rows_q
        else:
            k_rnorm = _reciprocal_norm(rows_k)
            rows_k = rows_k * k_rnorm[:, None]
    out = q.new_empty(rows_q.shape[0], rows_k.shape[0])
    for rows in _chunks(*out.shape):
        out[rows] = (rows_q[rows] @ rows_k.T) * scale
    return out, q_rnorm, k_rnorm


@_op
def similarity_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    normalize: bool,
    q_rnorm: Tensor,
    k_rnorm: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    needs_q, needs_k = needs
    acc = accumulate_dtype(q.dtype)
    rows_q = q.to(acc)
    rows_k = rows_q if k is None else k.to(acc)
    if normalize:
        rows_q = rows_q * q_rnorm[:, None]
        rows_k = rows_q if k is None else rows_k * k_rnorm[:, None]
    into_columns = needs_k or (needs_q and k is None)
    grad_q = q.new_empty(q.shape, dtype=acc)
    grad_k = q.new_zeros(rows_k.shape if into_columns else (0,), dtype=acc)
    for rows in _chunks(*grad.shape):
        part = grad[rows].to(acc)
        grad_q[rows] = part @ rows_k
        if into_columns:
            grad_k += part.T @ rows_q[rows]
    grad_scale = (grad_q * rows_q).sum()

    if needs_q and k is None:
        grad_q += grad_k
    if normalize and needs_q:
        grad_q = (grad_q - rows_q * (rows_q * grad_q).sum(1, keepdim=True)) * q_rnorm[:, None]
    if normalize and needs_k:
        grad_k = (grad_k - rows_k * (rows_k * grad_k).sum(1, keepdim=True)) * k_rnorm[:, None]
    return _gradient(grad_q, scale, q, needs_q), _gradient(grad_k, scale, q, needs_k), grad_scale


@_op
def masked_log_softmax_forward(logits: Tensor, mask: Tensor | None) -> Tensor:
    acc = accumulate_dtype(logits.dtype)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for rows in _chunks(*logits.shape):
        part = logits[rows].to(acc)
        if mask is not None:
            part = part.masked_fill(~mask[rows], -math.inf)
        lse = part.logsumexp(1, keepdim=True)
        out[rows] = part - lse.masked_fill(lse == -math.inf, math.inf)
    return out


@_op
def masked_log_softmax_backward(grad: Tensor, output: Tensor, mask: Tensor | None) -> Tensor:
    acc = accumulate_dtype(output.dtype)
    grad_logits = torch.empty_like(output, memory_format=torch.contiguous_format)
    for rows in _chunks(*output.shape):
        part = grad[rows].to(acc)
        if mask is not None:
            part = part.masked_fill(~mask[rows], 0)
        part = part.masked_fill((output[rows] == -math.inf).all(1, keepdim=True), 0)
        grad_logits[rows] = part - output[rows].to(acc).exp() * part.sum(1, keepdim=True)
    return grad_logits


def row_losses(
    lse: Tensor,
    lse_cols: Tensor,
    total: Tensor,
    count: Tensor,
    factor: float,
    mean: bool,
    drop: bool,
    at_least_zero: bool,
) -> tuple[Tensor, Tensor]:
    """As triton/row_losses.py has it."""
    if lse_cols.numel() > 0:
        lse = torch.lerp(lse, lse_cols, 0.5)
    if total.numel() == 0:
        total, count = torch.zeros_like(lse), torch.ones_like(lse)
    divisor = torch.where(count < EMPTY_COUNT, 1.0, count)
    empty = (lse == -math.inf) & total.isfinite()
    share = torch.where(empty, 0.0, count / divisor)
    rows = torch.where(empty, 0.0, lse * share - total / divisor)
    if at_least_zero:
        rows = rows.clamp(min=0)
    by = factor / ((count > 0).sum().clamp(min=1) if drop else lse.shape[0]) if mean else factor
    halved = 0.5 * share if lse_cols.numel() > 0 else share
    coefs = torch.stack([halved, torch.where(empty, 0.0, -1 / divisor)]) * by
    return (rows.sum() * by).to(torch.float32), coefs


def key_losses(
    problem: KeyLoss, stats: KeyStats, mean: bool, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """As triton/key_losses.py has it."""
    lse, positive, key_mean, target_lse, cross, target_mean = stats
    acc, (needs_q, needs_scale) = accumulate_dtype(problem.q.dtype), needs
    q, beside, scale = problem.q.to(acc), problem.own is not None, problem.scale
    own = q if problem.own is None else problem.own.to(acc)
    if problem.positive is not None:
        own = _at(problem.k, problem.positive, acc)
    if beside:
        positive = ((q * own).sum(1) * scale).to(lse.dtype)
        loss, of_mean = -logsigmoid(positive - lse), torch.sigmoid(lse - positive)
        of_own = -of_mean
    else:
        loss, of_mean, of_own = lse - positive, torch.ones_like(lse), torch.zeros_like(lse)
    of_target = torch.zeros_like(lse)
    if cross is not None:
        zero, share = problem.positive_is_zero, 1 - problem.coeff.to(lse.dtype)
        of_target = of_target - (share * torch.sigmoid(target_lse) if beside and zero else share)
        if beside:
            of_own = of_own - of_target
        else:
            of_own = torch.exp(-loss) - (1 - share) - (share * torch.exp(-target_lse) if zero else 0)
        loss = loss - of_target * (positive - cross)
    by = 1 / lse.shape[0] if mean else 1.0
    total = (loss.clamp(min=0).sum() * by).to(acc)
    grad, grad_scale = (key_mean.new_empty(0) for _ in needs)
    if needs_q or needs_scale:
        grad = (of_mean * by).to(acc)[:, None] * key_mean
        if cross is not None:
            grad += (of_target * by).to(acc)[:, None] * target_mean
        if beside or cross is not None:
            grad += (of_own * by).to(acc)[:, None] * own
        if needs_scale:
            grad_scale = (q * grad).sum()
        grad = grad * scale if needs_q else grad.new_empty(0)
    return total, grad, grad_scale


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """As triton/unit_rows.py has it, and below."""
    norm = x.to(accumulate_dtype(x.dtype)).norm(dim=1)
    rnorm = torch.where(norm == 0, 0.0, 1 / norm)
    return (x * rnorm[:, None]).to(x.dtype), rnorm


def unit_rows_gradient(grad: Tensor, x: Tensor, rnorm: Tensor) -> Tensor:
    unit = x * rnorm[:, None]
    return ((grad - unit * (unit * grad).sum(1, keepdim=True)) * rnorm[:, None]).to(x.dtype)
