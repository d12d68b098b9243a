"""Log-sum-exps with the gradient of the queries, in one attention-like pass: for keys that get none.

A program walks a share of the keys for a block of rows, as in attention with the keys for values: running
maximum, sum, and the sum of 2^(S - peak) k, so that each tile of S is computed once: 4 N M D operations in
all. A positive given by index is masked out of the product and comes back in float32, as (P - 1) k in the
residual (P - W) k: rounded to half precision, a P close to 1 would drown the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..problem import Contrast
from . import launch
from .lse import combine_parts
from .pairs import counted, index_range, on_edge
from .tiles import LN2, LOG2E, NOTHING, Matrix, dot, load_rows, scalar

_ROWS = 16


# In float16 the exponentials are scaled by 2^HEADROOM: they keep their digits down to 2^-29 of the largest.
@triton.jit(do_not_specialize=["n", "m", "d", "exclude", "splits", "blocks"])
def _frozen_kernel(
    q, k, scale, bias, row_labels, col_labels, index, rows, means, index_logit, own_logit,
    n, m, d, exclude, q_strides, k_strides, splits, blocks,
    EXCLUDE: tl.constexpr, AMONG: tl.constexpr, HEADROOM: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    q, k = Matrix(q, *q_strides), Matrix(k, *k_strides)
    sizes = (n, m, exclude if EXCLUDE else None)
    split = tl.program_id(0) % splits
    first_i = tl.program_id(0) // splits * BLOCK_M
    i = first_i + tl.arange(0, BLOCK_M)
    i_d = tl.arange(0, BLOCK_D)
    b_q = load_rows(q, i, i < n, i_d, i_d < d, EVEN_D)
    factor = scalar(scale) * LOG2E
    if AMONG != "all":
        b_row_label = tl.load(row_labels + i, mask=i < n, other=0)
    if index is not None:
        b_index = tl.load(index + i, mask=i < n, other=-1).to(tl.int32)
        first, last = index_range(b_index, True)
    peak = tl.full((BLOCK_M,), NOTHING, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    for block_j in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(m, BLOCK_N))):
        first_j = block_j * BLOCK_N
        j = first_j + tl.arange(0, BLOCK_N)
        b_k = load_rows(k, j, j < m, i_d, i_d < d, EVEN_D)
        s = factor * dot(b_q, tl.trans(b_k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        found = False
        if index is not None:
            found = (last >= first_j) & (first < first_j + BLOCK_N)
        if index_logit is not None:
            if found:
                own = tl.sum(tl.where(b_index[:, None] == j[None, :], s, 0.0), 1)
                tl.store(index_logit + i, own, mask=(b_index >= first_j) & (b_index < first_j + BLOCK_N))
        if bias is not None:
            s += tl.load(bias + j, mask=j < m, other=0.0)[None, :] * LOG2E
        if AMONG != "all":
            same = b_row_label[:, None] == tl.load(col_labels + j, mask=j < m, other=0)[None, :]
            s = tl.where(same if AMONG == "same" else ~same, s, float("-inf"))
        if on_edge(first_i, first_j, sizes, BLOCK_M, BLOCK_N):
            s = tl.where(counted(i, j, sizes), s, float("-inf"))
        new = tl.maximum(peak, tl.max(s, 1) - HEADROOM)
        fade = tl.exp2(peak - new)
        p = tl.exp2(s - new[:, None])
        total = total * fade + tl.sum(p, 1)
        peak = new
        if index is not None:
            if found:
                hit = b_index[:, None] == j[None, :]
                own = tl.sum(tl.where(hit, s, 0.0), 1)
                tl.store(own_logit + i, own, mask=(b_index >= first_j) & (b_index < first_j + BLOCK_N))
                p = tl.where(hit, 0.0, p)
        mean = dot(p.to(b_k.dtype), b_k, mean * fade[:, None], PRECISION)

    at = rows + split.to(tl.int64) * 2 * n + i
    tl.store(at, peak, mask=i < n)
    tl.store(at + n, total, mask=i < n)
    at = means + (split.to(tl.int64) * n + i)[:, None] * d + i_d[None, :]
    tl.store(at, mean, mask=(i < n)[:, None] & (i_d < d)[None, :])


@triton.jit(do_not_specialize=["n", "d", "splits"])
def _frozen_residual_kernel(
    rows, means, lse, index, index_logit, own_logit, k, residual, positive_sum, positive_count,
    n, d, splits, k_strides, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    exact = tl.load(lse + i, mask=i < n, other=0.0) / LN2
    exact = tl.where(exact == float("-inf"), 0.0, exact)
    if index is not None:
        b_index = tl.load(index + i, mask=i < n, other=-1)
        own = tl.load(own_logit + i, mask=(i < n) & (b_index >= 0), other=0.0).to(tl.float64)
        weight = (tl.exp((own - exact) * LN2) - 1.0).to(tl.float32)
        logit = own
        if index_logit is not None:
            logit = tl.load(index_logit + i, mask=(i < n) & (b_index >= 0), other=0.0).to(tl.float64)
        tl.store(positive_sum + i, logit * LN2, mask=i < n)
        tl.store(positive_count + i, tl.where(b_index >= 0, 1.0, 0.0).to(tl.float64), mask=i < n)
    for first in range(0, d, BLOCK_D):
        i_d = first + tl.arange(0, BLOCK_D)
        m_x = (i < n)[:, None] & (i_d < d)[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for split in range(splits):
            peak = tl.load(rows + split * 2 * n + i, mask=i < n, other=NOTHING)
            fade = tl.exp2((peak.to(tl.float64) - exact).to(tl.float32))
            part = tl.load(means + (split * n + i)[:, None] * d + i_d[None, :], mask=m_x, other=0.0)
            total += part * fade[:, None]
        if index is not None:
            m_own = m_x & (b_index >= 0)[:, None]
            at = k + b_index[:, None] * k_strides[0] + i_d[None, :] * k_strides[1]
            b_k = tl.load(at, mask=m_own, other=0.0)
            total += weight[:, None] * b_k.to(tl.float32)
        tl.store(residual + i[:, None] * d + i_d[None, :], total, mask=m_x)


def log_sum_exp_and_residual(problem: Contrast) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, positive_sum, positive_count as `lse.log_sum_exp` gives them, and (P - W) k [N, D] float32."""
    q, k, index = problem.q, problem.keys, problem.positive_index
    (n, d), m = q.shape, k.shape[0]
    shape = configs.shape("lse_frozen", q, d)
    row_blocks, col_blocks = launch.cdiv(n, shape.block_m), launch.cdiv(m, shape.block_n)
    splits = launch.splits(row_blocks, col_blocks, q)
    rows = q.new_empty((splits, 2, n), dtype=torch.float32)
    means = q.new_empty((splits, n, d), dtype=torch.float32)
    own_logit = index_logit = None
    if index is not None:
        own_logit = q.new_empty(n, dtype=torch.float32)
        # Elsewhere a logit is what its exponential is made of.
        if problem.among != "all" or problem.offset is not None:
            index_logit = torch.empty_like(own_logit)
    _frozen_kernel[(row_blocks * splits,)](
        q, k, launch.scalar(problem.scale), problem.key_bias,
        problem.row_labels, problem.col_labels, index, rows, means, index_logit, own_logit,
        n, m, d, problem.offset or 0, q.stride(), k.stride(), splits, launch.cdiv(col_blocks, splits),
        EXCLUDE=problem.offset is not None, AMONG=problem.among,
        HEADROOM=15.0 if q.dtype == torch.float16 else 0.0, PRECISION=launch.precision(q),
        EVEN_D=d == configs.padded(d), BLOCK_M=shape.block_m, BLOCK_N=shape.block_n,
        BLOCK_D=configs.padded(d), **launch.options(shape),
    )  # fmt: skip
    lse, _, _ = combine_parts(rows)
    positive_sum = q.new_empty(n if index is not None else 0, dtype=torch.float64)
    positive_count = torch.empty_like(positive_sum)
    residual = q.new_empty((n, d), dtype=torch.float32)
    _frozen_residual_kernel[(launch.cdiv(n, _ROWS),)](
        rows, means, lse, index, index_logit, own_logit, k, residual,
        positive_sum, positive_count, n, d, splits, k.stride(), BLOCK_M=_ROWS, BLOCK_D=128,
    )  # fmt: skip
    return lse, positive_sum, positive_count, residual
