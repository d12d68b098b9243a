"""The gradient of the engine: which kernels give it."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor

from .. import configs
from .gradient_chunks import chunk_gradients
from .gradient_combine import combine
from .gradient_rows import Owners, row_gradients
from .gradient_terms import Terms, terms
from .pairs import Contrast


def atomics_allowed() -> bool:
    """CL_KERNELS_ATOMICS=1: gradients of q with itself in fewer operations, by additions in any order; not
    under `torch.use_deterministic_algorithms(True)`."""
    if torch.are_deterministic_algorithms_enabled():
        return False
    return os.environ.get("CL_KERNELS_ATOMICS", "0") not in ("", "0")


def gradient(
    problem: Contrast,
    grad_lse: Tensor | None,
    grad_cols: Tensor | None,
    grad_positive: Tensor | None,
    lse: Tensor,
    lse_cols: Tensor,
    needs_q: bool,
    needs_k: bool,
    needs_bias: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_q, grad_k, grad_scale [], grad_key_bias of the `contrastive_backward` op (ops.py); the first two
    in `dtype`, by default that of q."""
    q, k, scale = problem.q, problem.keys, problem.scale
    width = q.shape[1]
    fused = width <= configs.widest("gradient_rows", q)
    self_keys = problem.k is None
    # G + G^T in one pass; a bias or both axes make the two differ by more than their labels and positives.
    mirrored = self_keys and problem.mirrored and not needs_bias

    if not fused:
        kernel = "gradient_tiles"
    elif mirrored and atomics_allowed() and width <= configs.widest("gradient_triangle", q):
        kernel = "gradient_triangle"
    else:
        kernel = "gradient_rows"

    bound = largest = None
    if q.dtype == torch.float16:
        bound = q.new_zeros(1, dtype=torch.float32)
        if problem.positive_mask is not None:
            largest = _largest(problem.positive_mask)
    unit = None if fused else bound  # of parts; the fused kernel takes it off itself
    block = configs.shape(kernel, q, width, problem.positives).block_n
    rows = terms(lse, grad_lse, grad_positive, problem.positive_index, block, bound, largest)
    if mirrored:
        both = replace(_rows_as_owners(problem, rows, rows, bound), other_index=problem.positive_index)
        if fused:
            parts = row_gradients(both, triangle=kernel == "gradient_triangle")[0]
        else:
            parts = chunk_gradients(both, into_rows=True, into_columns=False, bias=False)[0]
        grad, along = combine(parts, q, scale, needs_q, unit, dtype, share=0.5)
        return grad, _nothing(q), along, _nothing(q)
    if grad_cols is None:
        cols = _absent(rows, k)
    else:
        cols = terms(lse_cols, grad_cols, None, None, block, bound, None)
    side = _rows_as_owners(problem, rows, cols, bound)
    into_q = needs_q or not needs_k  # one of them, for the gradient of the scale
    into_k = needs_q if self_keys else needs_k
    if fused:
        by_rows = row_gradients(side)[0] if into_q else _nothing(q)
        by_cols, bias = _nothing(q), _nothing(q)
        if into_k or needs_bias:
            by_cols, bias = row_gradients(_transposed(side), features=into_k, bias=needs_bias)
            bias = bias.sum(0) if needs_bias else bias
    else:
        by_rows, by_cols, bias = chunk_gradients(side, into_rows=into_q, into_columns=into_k, bias=needs_bias)
    if self_keys and into_q and into_k:
        grad, along = combine(torch.cat([by_rows, by_cols]), q, scale, needs_q, unit, dtype, share=0.5)
        return grad, _nothing(q), along, bias
    grad_q, grad_k, along = _nothing(q), _nothing(q), _nothing(q)
    if into_k:
        grad_k, along = combine(by_cols, k, scale, needs_k, unit, dtype)
    if into_q:
        grad_q, along = combine(by_rows, q, scale, needs_q, unit, dtype)
    return grad_q, grad_k, along, bias


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)


def residual(problem: Contrast, lse: Tensor) -> Tensor:
    """(P - W) k [N, D], float32, of features too wide for `lse_frozen`."""
    ones = torch.ones_like(lse)
    q, k = problem.q, problem.keys
    bound = q.new_zeros(1, dtype=torch.float32) if q.dtype == torch.float16 else None
    index = problem.positive_index
    block = configs.shape("gradient_tiles", q, q.shape[1], problem.positives).block_n
    rows = terms(lse, ones, None if index is None else -ones, index, block, bound, None)
    parts, _, _ = chunk_gradients(
        _rows_as_owners(problem, rows, _absent(rows, k), bound),
        into_rows=True, into_columns=False, bias=False,
    )  # fmt: skip
    return combine(parts, q, lse.new_ones((), device="cpu"), True, bound, torch.float32)[0]


def _rows_as_owners(problem: Contrast, rows: Terms, cols: Terms, bound: Tensor | None) -> Owners:
    return Owners(
        problem.q, problem.keys, problem.scale, problem.offset, problem.row_labels, problem.col_labels,
        problem.among, problem.positives, problem.positive_index, None, problem.positive_mask,
        problem.key_bias, "none" if problem.key_bias is None else "other", rows, cols, bound,
    )  # fmt: skip


def _absent(rows: Terms, k: Tensor) -> Terms:
    """Terms of columns that add nothing; the memory is only there to be addressed."""
    zeros = rows.planes.new_zeros((4, k.shape[0]))
    return Terms(zeros, zeros, zeros.to(torch.int32), False, False)


def _largest(mask: Tensor) -> Tensor:
    """The largest magnitude of a mask's weights, [] float32, on its device."""
    if mask.dtype == torch.bool:
        return mask.new_ones((), dtype=torch.float32)
    low, high = mask.aminmax()
    return torch.maximum(high.float(), -low.float())


def _transposed(side: Owners) -> Owners:
    """The columns as owners."""
    return replace(
        side, x=side.y, y=side.x, exclude=None if side.exclude is None else -side.exclude,
        own_labels=side.other_labels, other_labels=side.own_labels, own_index=side.other_index,
        other_index=side.own_index, bias_of="own" if side.bias is not None else "none",
        own=side.other, other=side.own,
    )  # fmt: skip
