"""The slots of soft_target.py, each one split's view of a row, as the row's statistics and mean keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..problem import SoftTarget
from .soft_target_slots import Slots
from .tiles import LN2, NOTHING

SLOTS_AT_A_TIME = 16


# One program a row: statistics in float64, of all slots at once, and with the positive's logit, which no slot
# counts; then the float32 sums of keys, SOME slots at a time.
@triton.jit
def _soft_target_combine_kernel(
    statistics, means, positive, positive_logit,
    lse, target_lse, cross, positive_sum, mean_key, mean_target_key,
    n, total, slots, d,
    SLOTS: tl.constexpr, SOME: tl.constexpr, WIDTH: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_s = tl.arange(0, SLOTS)
    m_s = i_s < slots
    row, plane = i_row * slots, tl.cast(n, tl.int64) * slots
    b_peak = tl.load(statistics + row + i_s, mask=m_s, other=NOTHING).to(tl.float64)
    b_sum = tl.load(statistics + plane + row + i_s, mask=m_s, other=0.0).to(tl.float64)
    b_target_peak = tl.load(statistics + 2 * plane + row + i_s, mask=m_s, other=NOTHING).to(tl.float64)
    b_target_sum = tl.load(statistics + 3 * plane + row + i_s, mask=m_s, other=0.0).to(tl.float64)
    b_pivot = tl.load(statistics + 4 * plane + row + i_s, mask=m_s, other=0.0).to(tl.float64)
    b_cross = tl.load(statistics + 5 * plane + row + i_s, mask=m_s, other=0.0).to(tl.float64)

    top = tl.max(b_peak, 0)
    target_top = tl.max(b_target_peak, 0)
    has_own = False
    logit = top
    if positive is not None:
        own = tl.load(positive + i_row)
        has_own = (own >= 0) & (own < total)
        logit = tl.load(positive_logit + i_row, mask=has_own, other=NOTHING).to(tl.float64)
        top = tl.maximum(top, logit)
        if ZERO:
            target_top = tl.where(has_own, tl.maximum(target_top, 0.0), target_top)

    b_weight = tl.exp2(b_target_peak - target_top)
    row_sum = tl.sum(b_sum * tl.exp2(b_peak - top), 0)
    target_sum = tl.sum(b_target_sum * b_weight, 0)
    beside = tl.sum((b_cross + b_target_sum * (b_pivot - top)) * b_weight, 0)
    if positive is not None:
        row_sum += tl.where(has_own, tl.exp2(logit - top), 0.0)
        if ZERO:
            weight = tl.where(has_own, tl.exp2(-target_top), 0.0)
            target_sum += weight
            beside += weight * (logit - top)
        tl.store(positive_sum + i_row, tl.where(has_own, logit, 0.0) * LN2)
    has_target = target_sum != 0  # also where it is NaN
    lse2 = top + tl.log2(row_sum)
    divisor = tl.where(has_target, target_sum, 1.0)
    target_lse2 = tl.where(has_target, target_top + tl.log2(divisor), -float("inf"))
    mean_logit2 = tl.where(has_target, top + beside / divisor, 0.0)
    tl.store(lse + i_row, lse2 * LN2)
    tl.store(target_lse + i_row, target_lse2 * LN2)
    tl.store(cross + i_row, mean_logit2 * LN2)

    if means is not None:
        finite_lse2 = tl.where(has_target, target_lse2, 0.0)
        i_d = tl.arange(0, WIDTH)
        m_d = i_d < d
        b_mean = tl.zeros((WIDTH,), tl.float32)
        b_target_mean = tl.zeros((WIDTH,), tl.float32)
        for start in range(0, slots, SOME):
            i_some = start + tl.arange(0, SOME)
            m_some = i_some < slots
            b_some = tl.load(statistics + row + i_some, mask=m_some, other=NOTHING).to(tl.float64)
            b_factor = tl.exp2(b_some - lse2).to(tl.float32)
            b_some = tl.load(statistics + 2 * plane + row + i_some, mask=m_some, other=NOTHING).to(tl.float64)
            b_target_factor = tl.exp2(b_some - finite_lse2).to(tl.float32)
            at = means + (row + i_some)[:, None] * d + i_d[None, :]
            m_part = m_some[:, None] & m_d[None, :]
            b_mean += tl.sum(tl.load(at, mask=m_part, other=0.0) * b_factor[:, None], 0)
            b_part = tl.load(at + plane * d, mask=m_part, other=0.0)
            b_target_mean += tl.sum(b_part * b_target_factor[:, None], 0)
        tl.store(mean_key + i_row * d + i_d, b_mean, mask=m_d)
        tl.store(mean_target_key + i_row * d + i_d, b_target_mean, mask=m_d)


def combine(problem: SoftTarget, slots: Slots) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lse, target_lse, cross, positive_sum [N]; mean_key, mean_target_key [N, D] if the slots hold means."""
    q, n = problem.q, problem.q.shape[0]
    statistics, means, positive_logit, _ = slots
    lse, target_lse, cross = (q.new_empty(n, dtype=torch.float64) for _ in range(3))
    positive_sum = q.new_empty(0 if problem.positive is None else n, dtype=torch.float64)
    shape = (0,) if means is None else q.shape
    mean_key, mean_target_key = (q.new_empty(shape, dtype=torch.float32) for _ in range(2))
    _soft_target_combine_kernel[(n,)](
        statistics, means, problem.positive, positive_logit,
        lse, target_lse, cross, positive_sum, mean_key, mean_target_key,
        n, problem.columns, statistics.shape[2], q.shape[1],
        SLOTS=configs.padded(statistics.shape[2]), SOME=SLOTS_AT_A_TIME, WIDTH=configs.padded(q.shape[1]),
        ZERO=problem.positive_in_target == "zero", num_warps=4,
    )  # fmt: skip
    return lse, target_lse, cross, positive_sum, mean_key, mean_target_key
