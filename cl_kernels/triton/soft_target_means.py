"""The forward's attention-like pass: the statistics together with both softmaxes' means of the keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs
from ..problem import SoftTarget
from . import launch
from .soft_target_slots import LEFT_OUT, Slots
from .tiles import LOG2E, NOTHING, Matrix, dot, load_rows, scalar

# So many features of a mean key fit into registers beside what a product needs.
WIDEST = {"half": 256, "float32": 64}


@triton.jit
def _target_half(x, BLOCK_M: tl.constexpr):
    """The second half of x [2 BLOCK_M]."""
    halves = tl.split(tl.trans(tl.reshape(x, (2, BLOCK_M)), (1, 0)))
    return halves[1]


# As in soft_target.py, for a student and a teacher that share their keys: BLOCK_M rows of q stand on the same
# rows of t in one tile of 2 BLOCK_M, so that one product makes S and T, and another both sums of
#
#     mean     2^(S - peak) k, and 2^(T - target_peak) k
#
# while each row's reductions, and its exponentials on their way into that product, stay within a warp. Only
# the cross term, S times the teacher's weights, brings the halves together. The positive is left out of the
# means, too: rounded to half it would drown the others.
#
# A peak lies HEADROOM below the maximum: in float16 the 2^(S - peak) then keep their digits down to 2^-29 of
# the largest.
@triton.jit
def _soft_target_means_kernel(
    q, target_q, k, scale, target_scale, positive, statistics, means, positive_logit,
    n, m, d, first, per_split, slot, slots, q_strides, target_q_strides, k_strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, EVEN_D: tl.constexpr,
    HEADROOM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_x = tl.arange(0, 2 * BLOCK_M)
    m_student = i_x < BLOCK_M
    i_m = tl.program_id(0) * BLOCK_M + i_x % BLOCK_M
    m_m = i_m < n
    i_d = tl.arange(0, WIDTH)
    m_d = i_d < d
    i_row = i_m.to(tl.int64)
    at_q = q + (i_row * q_strides[0])[:, None] + i_d.to(tl.int64)[None, :] * q_strides[1]
    at_t = target_q + (i_row * target_q_strides[0])[:, None]
    at_t += i_d.to(tl.int64)[None, :] * target_q_strides[1]
    m_x = m_m[:, None] if EVEN_D else m_m[:, None] & m_d[None, :]
    b_x = tl.load(at_q, mask=m_x & m_student[:, None], other=0.0)
    b_x = tl.load(at_t, mask=m_x & ~m_student[:, None], other=b_x)
    b_scale2 = LOG2E * tl.where(m_student, scalar(scale), scalar(target_scale))
    if positive is not None:
        b_own = tl.load(positive + i_m, mask=m_m, other=-1) - first
        b_own = tl.where((b_own >= 0) & (b_own < m), b_own, -1).to(tl.int32)
        lowest, highest = tl.min(tl.where(b_own >= 0, b_own, m), 0), tl.max(b_own, 0)
        b_logit = tl.zeros((2 * BLOCK_M,), tl.float32)

    b_peak = tl.full((2 * BLOCK_M,), NOTHING, tl.float32)
    b_pivot = tl.full((2 * BLOCK_M,), NOTHING, tl.float32)
    b_sum = tl.zeros((2 * BLOCK_M,), tl.float32)
    b_cross = tl.zeros((BLOCK_M,), tl.float32)
    b_mean = tl.zeros((2 * BLOCK_M, WIDTH), tl.float32)

    begin = tl.program_id(1) * per_split
    for start in range(begin, min(begin + per_split, m), BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        m_n = i_n < m
        b_k = load_rows(Matrix(k, *k_strides), i_n, m_n, i_d, m_d, EVEN_D)
        b_s = dot(b_x, tl.trans(b_k), tl.zeros((2 * BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        b_s *= b_scale2[:, None]
        if positive is not None and (lowest < start + BLOCK_N) & (highest >= start):
            m_own = i_n[None, :] == b_own[:, None]
            b_logit += tl.sum(tl.where(m_own, b_s, 0.0), 1)
            b_s = tl.where(m_own, LEFT_OUT, b_s)
        if start + BLOCK_N > m:
            b_s = tl.where(m_n[None, :], b_s, LEFT_OUT)

        b_new = tl.maximum(b_peak, tl.max(b_s, 1) - HEADROOM)
        b_pivot = tl.where(b_pivot == NOTHING, b_new, b_pivot)
        b_fade = tl.exp2(b_peak - b_new)
        b_p = tl.exp2(b_s - b_new[:, None])
        b_sum = b_sum * b_fade + tl.sum(b_p, 1)
        b_peak = b_new
        b_pair = tl.where(m_student[:, None], b_s - b_pivot[:, None], b_p)
        b_pair = tl.permute(tl.reshape(b_pair, (2, BLOCK_M, BLOCK_N)), (1, 2, 0))
        b_beside, b_weight = tl.split(b_pair)
        b_cross = b_cross * _target_half(b_fade, BLOCK_M) + tl.sum(b_beside * b_weight, 1)
        b_mean = dot(b_p.to(b_k.dtype), b_k, b_mean * b_fade[:, None], PRECISION)

    place = slot + tl.program_id(1)
    i_slot = i_m.to(tl.int64) * slots + place
    plane = tl.cast(n, tl.int64) * slots
    at = statistics + i_slot + tl.where(m_student, 0, 2 * plane)
    tl.store(at, b_peak, mask=m_m)
    tl.store(at + plane, b_sum, mask=m_m)
    tl.store(statistics + 4 * plane + i_slot, b_pivot, mask=m_m & m_student)
    i_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(statistics + 5 * plane + i_row.to(tl.int64) * slots + place, b_cross, mask=i_row < n)
    if positive is not None:
        noted = m_m & m_student & (b_own >= begin) & (b_own < begin + per_split)
        tl.store(positive_logit + i_m, b_logit, mask=noted)
    at = means + (i_slot + tl.where(m_student, 0, plane))[:, None] * d + i_d[None, :]
    tl.store(at, b_mean, mask=m_m[:, None] & m_d[None, :])


def serves(problem: SoftTarget) -> bool:
    """Whether keys are shared and narrow enough."""
    widest = WIDEST[configs.dtype_kind(problem.q.dtype)]
    return problem.widths[0] <= widest and all(map(problem.same_keys, range(len(problem.k))))


def walk(problem: SoftTarget) -> Slots:
    q, target_q, (n, d) = problem.q, problem.target_q, problem.q.shape
    shape, width = configs.shape("soft_target_means", q, d), configs.padded(d)
    slots = Slots.of(problem, shape.block_m, shape.block_n, waves=2, means=True)
    for i, (slot, splits, per_split) in enumerate(slots.segments):
        k = problem.k[i]
        if splits == 0:
            continue
        _soft_target_means_kernel[launch.cdiv(n, shape.block_m), splits](
            q, target_q, k, launch.scalar(problem.scale), launch.scalar(problem.target_scale),
            problem.positive, slots.statistics, slots.means, slots.positive_logit,
            n, k.shape[0], d, problem.first(i), per_split, slot, slots.statistics.shape[2],
            q.stride(), target_q.stride(), k.stride(),
            BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, WIDTH=width, EVEN_D=d == width,
            HEADROOM=15.0 if q.dtype == torch.float16 else 0.0, PRECISION=launch.precision(q),
            **launch.options(shape),
        )  # fmt: skip
    return slots
