"""soft_target_forward: student's and teacher's log-sum-exps, the cross term and the mean keys in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cl_kernels import configs
from cl_kernels.triton import launch
from cl_kernels.triton.soft_target_combine import combine
from cl_kernels.triton.soft_target_problem import LEFT_OUT, Problem
from cl_kernels.triton.soft_target_softmax import mean_keys
from cl_kernels.triton.tiles import LOG2E, NOTHING, dot, load_rows, product, scalar

# Mean keys come out of the pass itself where a row of them fits into registers, else from a second kernel.
WIDEST = 256


# A program owns BLOCK_M rows and one split of a segment's keys, and leaves what it saw in a slot of its own;
# soft_target_combine.py puts the slots together. For each tile of keys
#
#     S = scale q k^T,  T = target_scale t u^T            in base 2
#     peak, sum            of S, and of T: the running maximum and the sum of 2^(S - peak)
#     cross                sum of 2^(T - target_peak) (S - peak): what of the teacher's mean of S lies beside the
#                          student's peak; when that moves, cross moves by as much as the teacher has summed
#     mean, target_mean    sum of 2^(S - peak) k and of 2^(T - target_peak) k
#
# A row's positive is left out of all of them, so that the peaks are those of the other columns and no digit of
# these is lost beside it; its logit is noted, and the combination adds it.
#
# A peak lies HEADROOM below the maximum: in float16 the 2^(S - peak) then keep their digits down to 2^-29 of the
# largest.
@triton.jit
def _kernel(
    q, k, target_q, target_k, scale, target_scale, positive, statistics, means, positive_logit,
    n, m, d, e, first, per_split, slot, slots,
    stride_qn, stride_qd, stride_kn, stride_kd, stride_tn, stride_td, stride_un, stride_ud,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    WIDTH: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr, EVEN_WIDTH: tl.constexpr,
    WHOLE: tl.constexpr, SAME_KEYS: tl.constexpr, HEADROOM: tl.constexpr, PRECISION: tl.constexpr,
    SCALE_IS_TENSOR: tl.constexpr, TARGET_SCALE_IS_TENSOR: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = i_m < n
    i_d, i_e, i_w = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E), tl.arange(0, WIDTH)
    scale2 = scalar(scale, SCALE_IS_TENSOR) * LOG2E
    target_scale2 = scalar(target_scale, TARGET_SCALE_IS_TENSOR) * LOG2E
    if WHOLE:
        b_q = load_rows(q, i_m, m_m, i_d, i_d < d, stride_qn, stride_qd, EVEN_D)
        b_t = load_rows(target_q, i_m, m_m, i_e, i_e < e, stride_tn, stride_td, EVEN_E)
    if positive is not None:
        b_own = tl.load(positive + i_m, mask=m_m, other=-1) - first
        b_own = tl.where((b_own >= 0) & (b_own < m), b_own, -1).to(tl.int32)
        lowest = tl.min(tl.where(b_own >= 0, b_own, m), 0)
        highest = tl.max(b_own, 0)

    b_peak = tl.full((BLOCK_M,), NOTHING, tl.float32)
    b_target_peak = tl.full((BLOCK_M,), NOTHING, tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_target_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_cross = tl.zeros((BLOCK_M,), tl.float32)
    if means is not None:
        b_mean = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        b_target_mean = tl.zeros((BLOCK_M, WIDTH), tl.float32)

    begin = tl.program_id(1) * per_split
    for start in range(begin, min(begin + per_split, m), BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        m_n = i_n < m
        if WHOLE:
            b_k = load_rows(k, i_n, m_n, i_d, i_d < d, stride_kn, stride_kd, EVEN_D)
            if SAME_KEYS:
                b_u = b_k
            else:
                b_u = load_rows(target_k, i_n, m_n, i_e, i_e < e, stride_un, stride_ud, EVEN_E)
            nothing = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            b_s = dot(b_q, tl.trans(b_k), nothing, PRECISION)
            b_target = dot(b_t, tl.trans(b_u), nothing, PRECISION)
        else:
            b_s = product(
                q, k, i_m, m_m, i_n, m_n, d, stride_qn, stride_qd, stride_kn, stride_kd,
                BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, PRECISION,
            )  # fmt: skip
            b_target = product(
                target_q, target_k, i_m, m_m, i_n, m_n, e, stride_tn, stride_td, stride_un, stride_ud,
                BLOCK_M, BLOCK_N, BLOCK_E, EVEN_E, PRECISION,
            )  # fmt: skip
            if means is not None:
                b_k = load_rows(k, i_n, m_n, i_w, i_w < d, stride_kn, stride_kd, EVEN_WIDTH)
        b_s *= scale2
        b_target *= target_scale2

        if positive is not None:
            if (lowest < start + BLOCK_N) & (highest >= start):
                m_own = i_n[None, :] == b_own[:, None]
                noted = m_m & (b_own >= start) & (b_own < start + BLOCK_N)
                tl.store(positive_logit + i_m, tl.sum(tl.where(m_own, b_s, 0.0), 1), mask=noted)
                b_s = tl.where(m_own, LEFT_OUT, b_s)
                b_target = tl.where(m_own, LEFT_OUT, b_target)
        if start + BLOCK_N > m:
            b_s = tl.where(m_n[None, :], b_s, LEFT_OUT)
            b_target = tl.where(m_n[None, :], b_target, LEFT_OUT)

        b_new = tl.maximum(b_peak, tl.max(b_s, 1) - HEADROOM)
        b_target_new = tl.maximum(b_target_peak, tl.max(b_target, 1) - HEADROOM)
        b_fade = tl.exp2(b_peak - b_new)
        b_target_fade = tl.exp2(b_target_peak - b_target_new)
        b_s -= b_new[:, None]
        b_target = tl.exp2(b_target - b_target_new[:, None])
        b_moved = b_cross + b_target_sum * (b_peak - b_new)
        b_cross = b_moved * b_target_fade + tl.sum(b_target * b_s, 1)
        b_s = tl.exp2(b_s)
        b_sum = b_sum * b_fade + tl.sum(b_s, 1)
        b_target_sum = b_target_sum * b_target_fade + tl.sum(b_target, 1)
        b_peak, b_target_peak = b_new, b_target_new
        if means is not None:
            b_mean = dot(b_s.to(b_k.dtype), b_k, b_mean * b_fade[:, None], PRECISION)
            b_target_mean = dot(
                b_target.to(b_k.dtype), b_k, b_target_mean * b_target_fade[:, None], PRECISION
            )

    i_slot = i_m.to(tl.int64) * slots + slot + tl.program_id(1)
    plane = n.to(tl.int64) * slots
    tl.store(statistics + i_slot, b_peak, mask=m_m)
    tl.store(statistics + plane + i_slot, b_sum, mask=m_m)
    tl.store(statistics + 2 * plane + i_slot, b_target_peak, mask=m_m)
    tl.store(statistics + 3 * plane + i_slot, b_target_sum, mask=m_m)
    tl.store(statistics + 4 * plane + i_slot, b_cross, mask=m_m)
    if means is not None:
        at = means + i_slot[:, None] * d + i_w[None, :]
        m_w = m_m[:, None] & (i_w < d)[None, :]
        tl.store(at, b_mean, mask=m_w)
        tl.store(at + plane * d, b_target_mean, mask=m_w)


def soft_target_forward(
    q: Tensor,
    k: Sequence[Tensor],
    target_q: Tensor,
    target_k: Sequence[Tensor],
    scale: Tensor,
    target_scale: Tensor,
    positive: Tensor | None,
    positive_in_target: str,
    save_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(q, k, target_q, target_k, scale, target_scale, positive, positive_in_target)
    in_pass = save_gradient and max(problem.widths) <= WIDEST
    shape = _shape(problem, in_pass)
    tiles_m = launch.cdiv(problem.n, shape.block_m)
    tiles_n = [launch.cdiv(part.shape[0], shape.block_n) for part in k]
    splits = [launch.splits(tiles_m, tiles, q, waves=2) if tiles else 0 for tiles in tiles_n]

    slots = sum(splits)
    statistics = q.new_empty((5, problem.n, slots), dtype=torch.float32)
    means = q.new_empty((2, problem.n, slots, q.shape[1]), dtype=torch.float32) if in_pass else None
    positive_logit = None if positive is None else q.new_empty(problem.n, dtype=torch.float32)
    slot = 0
    for i, parts in enumerate(splits):
        if parts:
            per_split = launch.cdiv(tiles_n[i], parts) * shape.block_n
            _segment(problem, i, shape, parts, per_split, slot, statistics, means, positive_logit)
        slot += parts

    *rows, mean_key, mean_target_key = combine(problem, statistics, means, positive_logit)
    if save_gradient and not in_pass:
        mean_key, mean_target_key = mean_keys(problem, *rows[:3])
    lse, target_lse, cross, positive_sum = rows
    return lse, target_lse, cross, positive_sum, mean_key, mean_target_key


def _shape(problem: Problem, in_pass: bool) -> configs.Shape:
    """By what a tile of keys holds: keys of student and teacher, the same ones once."""
    name = "soft_target_means" if in_pass else "soft_target"
    distinct = any(not problem.same_keys(i) for i in range(len(problem.k)))
    width = sum(problem.widths) if distinct else max(problem.widths)
    return configs.shape(name, problem.q, width)


def _segment(
    problem: Problem,
    i: int,
    shape: configs.Shape,
    splits: int,
    per_split: int,
    slot: int,
    statistics: Tensor,
    means: Tensor | None,
    positive_logit: Tensor | None,
) -> None:
    """Segment i of the keys into `splits` slots from `slot` on."""
    q, k, target_q, target_k = problem.q, problem.k[i], problem.target_q, problem.target_k[i]
    d, e = problem.widths
    width, target_width = configs.padded(d), configs.padded(e)
    whole = max(width, target_width) <= shape.block_d
    block_d, block_e = (width, target_width) if whole else (shape.block_d, shape.block_d)
    scale, target_scale = launch.scalar(problem.scale), launch.scalar(problem.target_scale)
    _kernel[launch.cdiv(problem.n, shape.block_m), splits](
        q, k, target_q, target_k, scale, target_scale, problem.positive, statistics, means, positive_logit,
        problem.n, k.shape[0], d, e, problem.first(i), per_split, slot, statistics.shape[2],
        *q.stride(), *k.stride(), *target_q.stride(), *target_k.stride(),
        BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, BLOCK_D=block_d, BLOCK_E=block_e,
        WIDTH=width, EVEN_D=d % block_d == 0, EVEN_E=e % block_e == 0, EVEN_WIDTH=d == width,
        WHOLE=whole, SAME_KEYS=problem.same_keys(i), HEADROOM=15.0 if q.dtype == torch.float16 else 0.0,
        PRECISION=launch.precision(q),
        SCALE_IS_TENSOR=isinstance(scale, Tensor), TARGET_SCALE_IS_TENSOR=isinstance(target_scale, Tensor),
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
