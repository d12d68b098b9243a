"""A whole loss over keys that get no gradient, from the statistics of its rows (`ops.key_loss`), and its
gradient: linear in the means of the keys that the forward left, so that no pass over the pairs is needed."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..problem import KeyLoss, KeyStats
from . import launch
from .pairs import contiguous
from .tiles import load_rows, scalar

_ROWS = 8
_PARTS = 1024


@triton.jit
def _log1p(x):
    """log(1 + x) of x in [0, 1], with the digits of x."""
    more = 1.0 + x
    return tl.where(more == 1.0, x, tl.log(more) * (x / tl.where(more == 1.0, 1.0, more - 1.0)))


# With s the positive's logit, L the log-sum-exp of the others, or for a positive among the keys of all, C the
# target's mean of the logits and p = sigmoid(L - s), or 1:
#
#     loss = log(1 + exp(L - s)), or L - s; + (1 - coeff) share (s - C)
#     gradient of q = scale (p mean - (1 - coeff) share target_mean + own of_own)
#
# share is what of the target is not the positive's logit of 0 beside the keys. The means leave the positive
# out, but for that of keys without a target, which has it.
@triton.jit(do_not_specialize=["n", "divisor"])
def _key_losses_kernel(
    q, own, index, scale, coeff, stats, losses, along, n, d, divisor,
    ZERO: tl.constexpr, WRITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    BESIDE: tl.constexpr = stats.positive_sum is None
    TARGET: tl.constexpr = stats.cross is not None
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_i = i < n
    s = scalar(scale)
    i_own = i
    if index is not None:
        i_own = tl.load(index + i, mask=m_i, other=0)
    lse = tl.load(stats.lse + i, mask=m_i, other=0.0)
    if BESIDE:
        dots = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for first in range(0, d, BLOCK_D):
            i_d = first + tl.arange(0, BLOCK_D)
            b_own = load_rows(own, i_own, m_i, i_d, i_d < d, False).to(tl.float32)
            dots += load_rows(q, i, m_i, i_d, i_d < d, False).to(tl.float32) * b_own
        positive = (tl.sum(dots, 1) * s).to(tl.float64)
        gap = lse - positive
        loss = tl.where(gap > 0, gap, 0.0) + _log1p(tl.exp(-tl.abs(gap)))
        of_mean = 1.0 / (1.0 + tl.exp(-gap))
        of_own = -of_mean
    else:
        positive = tl.load(stats.positive_sum + i, mask=m_i, other=0.0)
        loss = lse - positive
        of_mean = tl.full((BLOCK_M,), 1.0, tl.float64)
        of_own = tl.zeros((BLOCK_M,), tl.float64)
    of_target = tl.zeros((BLOCK_M,), tl.float64)
    if TARGET:
        share = 1.0 - scalar(coeff)
        of_target -= share
        target_lse = tl.load(stats.target_lse + i, mask=m_i, other=0.0)
        if BESIDE:
            if ZERO:
                of_target /= 1.0 + tl.exp(-target_lse)
            of_own -= of_target
        else:
            of_own += tl.exp(-loss) - (1.0 - share)
            if ZERO:
                of_own -= share * tl.exp(-target_lse)
        loss -= of_target * (positive - tl.load(stats.cross + i, mask=m_i, other=0.0))
    loss = tl.where(m_i & ~(loss < 0), loss, 0.0)
    by = tl.full((BLOCK_M,), 1.0, tl.float64) / divisor
    tl.store(losses + tl.program_id(0), tl.sum(loss * by, 0))
    if stats.mean is not None:
        of_mean, of_target, of_own = of_mean * by, of_target * by, of_own * by
        products = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for first in range(0, d, BLOCK_D):
            i_d = first + tl.arange(0, BLOCK_D)
            m_at = m_i[:, None] & (i_d < d)[None, :]
            at = i.to(tl.int64)[:, None] * d + i_d[None, :]
            grad = of_mean.to(tl.float32)[:, None] * tl.load(stats.mean + at, mask=m_at, other=0.0)
            if TARGET:
                b_target = tl.load(stats.target_mean + at, mask=m_at, other=0.0)
                grad += of_target.to(tl.float32)[:, None] * b_target
            if BESIDE or TARGET:
                b_own = load_rows(own, i_own, m_i, i_d, i_d < d, False).to(tl.float32)
                grad += of_own.to(tl.float32)[:, None] * b_own
            if along is not None:
                products += load_rows(q, i, m_i, i_d, i_d < d, False).to(tl.float32) * grad
            if WRITE:
                tl.store(stats.mean + at, grad * s, mask=m_at)
        if along is not None:
            tl.store(along + tl.program_id(0), tl.sum(tl.sum(products, 1), 0))


# One program, for one order of the sums.
@triton.jit(do_not_specialize=["parts"])
def _key_totals_kernel(losses, along, loss, grad_scale, parts, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    along_total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, parts, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(losses + i, mask=i < parts, other=0.0)
        if along is not None:
            along_total += tl.load(along + i, mask=i < parts, other=0.0)
    tl.store(loss, tl.sum(total, 0).to(tl.float32))
    if along is not None:
        tl.store(grad_scale, tl.sum(along_total, 0).to(tl.float32))


def key_losses(
    problem: KeyLoss, stats: KeyStats, mean: bool, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """loss [] and the gradients of q [N, D], in place of `stats.mean`, and of the scale []: float32, [0] what
    is not needed."""
    q, (n, d), (needs_q, needs_scale) = problem.q, problem.q.shape, needs
    own = problem.k[0] if problem.own is None else problem.own
    programs = launch.cdiv(n, _ROWS)
    losses, loss = stats.lse.new_empty(programs), stats.mean.new_empty(())
    along = stats.mean.new_empty(programs) if needs_scale else None
    grad_scale = stats.mean.new_empty(() if needs_scale else 0)
    lse, *rest = stats
    given = KeyStats(lse, *(None if x is None or x.numel() == 0 else x for x in rest))
    _key_losses_kernel[(programs,)](
        launch.matrix(q), launch.matrix(own), contiguous(problem.positive), launch.scalar(problem.scale),
        None if problem.coeff is None else launch.scalar(problem.coeff), given, losses, along, n, d,
        n if mean else 1, ZERO=problem.positive_is_zero, WRITE=needs_q, BLOCK_M=_ROWS, BLOCK_D=128,
    )  # fmt: skip
    _key_totals_kernel[(1,)](losses, along, loss, grad_scale, programs, BLOCK=_PARTS)
    return loss, stats.mean if needs_q else stats.mean.new_empty(0), grad_scale
