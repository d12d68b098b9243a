"""soft_target_forward; its statistics of the rows, where the pass leaves no mean keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..problem import SoftTarget, flat
from . import launch, soft_target_means
from .pairs import contiguous
from .soft_target_combine import combine
from .soft_target_slots import LEFT_OUT, Slots
from .soft_target_softmax import mean_keys
from .tiles import LOG2E, NOTHING, Matrix, dot, load_rows, product, scalar

# Tiles hold the whole width of up to so many features; anything wider has the widest row of the table.
WIDEST = 256
IN_CHUNKS = 1024


# A program owns BLOCK_M rows and one split of a segment's keys, and leaves its findings in a slot of its own;
# soft_target_combine.py puts the slots together. For each tile of keys
#
#     S = scale q k^T,  T = target_scale t u^T     in base 2
#     peak, sum     of S, and of T: the running maximum, and the sum of 2^(S - peak)
#     cross         sum of 2^(T - target_peak) (S - pivot): the teacher's mean of S, seen from the pivot, the
#                   student's first peak
#
# A row's positive is left out of all of them: its logit is noted, and the combination adds it in float64, so
# that no digit of the others is lost beside it.
@triton.jit
def _soft_target_kernel(
    q, k, target_q, target_k, scale, target_scale, positive, statistics, positive_logit,
    n, m, d, e, first, per_split, slot, slots, q_strides, k_strides, target_q_strides, target_k_strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_E: tl.constexpr, WHOLE: tl.constexpr, SAME_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    q, k = Matrix(q, *q_strides), Matrix(k, *k_strides)
    target_q, target_k = Matrix(target_q, *target_q_strides), Matrix(target_k, *target_k_strides)
    i_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = i_m < n
    i_d, i_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    scale2 = scalar(scale) * LOG2E
    target_scale2 = scalar(target_scale) * LOG2E
    if WHOLE:
        b_q = load_rows(q, i_m, m_m, i_d, i_d < d, EVEN_D)
        b_t = load_rows(target_q, i_m, m_m, i_e, i_e < e, EVEN_E)
    if positive is not None:
        b_own = tl.load(positive + i_m, mask=m_m, other=-1) - first
        b_own = tl.where((b_own >= 0) & (b_own < m), b_own, -1).to(tl.int32)
        lowest, highest = tl.min(tl.where(b_own >= 0, b_own, m), 0), tl.max(b_own, 0)
        b_logit = tl.zeros((BLOCK_M,), tl.float32)

    b_peak = tl.full((BLOCK_M,), NOTHING, tl.float32)
    b_target_peak = tl.full((BLOCK_M,), NOTHING, tl.float32)
    b_pivot = tl.full((BLOCK_M,), NOTHING, tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_target_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_cross = tl.zeros((BLOCK_M,), tl.float32)

    begin = tl.program_id(1) * per_split
    for start in range(begin, min(begin + per_split, m), BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        m_n = i_n < m
        if WHOLE:
            b_k = load_rows(k, i_n, m_n, i_d, i_d < d, EVEN_D)
            if SAME_KEYS:
                b_u = b_k
            else:
                b_u = load_rows(target_k, i_n, m_n, i_e, i_e < e, EVEN_E)
            b_nothing = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            b_s = dot(b_q, tl.trans(b_k), b_nothing, PRECISION)
            b_target = dot(b_t, tl.trans(b_u), b_nothing, PRECISION)
        else:
            b_s = product(q, k, i_m, m_m, i_n, m_n, d, BLOCK_D, EVEN_D, PRECISION)
            b_target = product(target_q, target_k, i_m, m_m, i_n, m_n, e, BLOCK_E, EVEN_E, PRECISION)
        b_s *= scale2
        b_target *= target_scale2
        if positive is not None and (lowest < start + BLOCK_N) & (highest >= start):
            m_own = i_n[None, :] == b_own[:, None]
            b_logit += tl.sum(tl.where(m_own, b_s, 0.0), 1)
            b_s = tl.where(m_own, LEFT_OUT, b_s)
            b_target = tl.where(m_own, LEFT_OUT, b_target)
        if start + BLOCK_N > m:
            b_s = tl.where(m_n[None, :], b_s, LEFT_OUT)
            b_target = tl.where(m_n[None, :], b_target, LEFT_OUT)

        b_new = tl.maximum(b_peak, tl.max(b_s, 1))
        b_target_new = tl.maximum(b_target_peak, tl.max(b_target, 1))
        b_pivot = tl.where(b_pivot == NOTHING, b_new, b_pivot)
        b_target_fade = tl.exp2(b_target_peak - b_target_new)
        b_weight = tl.exp2(b_target - b_target_new[:, None])
        b_sum = b_sum * tl.exp2(b_peak - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
        b_target_sum = b_target_sum * b_target_fade + tl.sum(b_weight, 1)
        b_cross = b_cross * b_target_fade + tl.sum(b_weight * (b_s - b_pivot[:, None]), 1)
        b_peak, b_target_peak = b_new, b_target_new

    at = statistics + i_m.to(tl.int64) * slots + slot + tl.program_id(1)
    plane = tl.cast(n, tl.int64) * slots
    tl.store(at, b_peak, mask=m_m)
    tl.store(at + plane, b_sum, mask=m_m)
    tl.store(at + 2 * plane, b_target_peak, mask=m_m)
    tl.store(at + 3 * plane, b_target_sum, mask=m_m)
    tl.store(at + 4 * plane, b_pivot, mask=m_m)
    tl.store(at + 5 * plane, b_cross, mask=m_m)
    if positive is not None:
        noted = m_m & (b_own >= begin) & (b_own < begin + per_split)
        tl.store(positive_logit + i_m, b_logit, mask=noted)


@flat(SoftTarget)
def soft_target_forward(
    problem: SoftTarget, save_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    launch.require_features(problem.q)
    launch.require_features(problem.target_q)
    problem = problem._replace(positive=contiguous(problem.positive))
    in_pass = save_gradient and soft_target_means.serves(problem)
    slots = soft_target_means.walk(problem) if in_pass else _walk(problem)
    lse, target_lse, cross, positive_sum, mean_key, mean_target_key = combine(problem, slots)
    if save_gradient and not in_pass:
        mean_key, mean_target_key = mean_keys(problem, (lse, target_lse, cross))
    return lse, target_lse, cross, positive_sum, mean_key, mean_target_key


def _width(problem: SoftTarget) -> int:
    """The width that the table of launch shapes knows a problem by: what whole tiles of keys would hold."""
    if max(problem.widths) > WIDEST:
        return IN_CHUNKS
    same_keys = all(map(problem.same_keys, range(len(problem.k))))
    return max(problem.widths) if same_keys else sum(problem.widths)


def _walk(problem: SoftTarget) -> Slots:
    shape = configs.shape("soft_target", problem.q, _width(problem))
    slots = Slots.of(problem, shape.block_m, shape.block_n, waves=4, means=False)
    q, target_q = problem.q, problem.target_q
    d, e = problem.widths
    width, target_width = configs.padded(d), configs.padded(e)
    whole = max(width, target_width) <= shape.block_d
    block_d, block_e = (width, target_width) if whole else (shape.block_d, shape.block_d)
    n = q.shape[0]
    for i, (slot, splits, per_split) in enumerate(slots.segments):
        k, target_k = problem.k[i], problem.target_k[i]
        if splits == 0:
            continue
        _soft_target_kernel[launch.cdiv(n, shape.block_m), splits](
            q, k, target_q, target_k, launch.scalar(problem.scale), launch.scalar(problem.target_scale),
            problem.positive, slots.statistics, slots.positive_logit,
            n, k.shape[0], d, e, problem.first(i), per_split, slot, slots.statistics.shape[2],
            q.stride(), k.stride(), target_q.stride(), target_k.stride(),
            BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, BLOCK_D=block_d, BLOCK_E=block_e,
            EVEN_D=d % block_d == 0, EVEN_E=e % block_e == 0, WHOLE=whole, SAME_KEYS=problem.same_keys(i),
            PRECISION=launch.precision(q), **launch.options(shape),
        )  # fmt: skip
    return slots
