"""soft_target_backward: from the mean keys where keys and target are frozen, else by matrices and GEMMs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..problem import SoftTarget, flat
from . import launch
from .pairs import contiguous
from .soft_target_softmax import Factors, Statistics, Wanted, Weights, blocks, optional
from .tiles import Matrix, load_rows, scalar


class Saved(NamedTuple):
    """The results of the forward."""

    lse: Tensor
    target_lse: Tensor
    cross: Tensor
    positive_sum: Tensor
    mean_key: Tensor
    mean_target_key: Tensor


# With keys and target frozen, for the rows whose positive lies in this segment (FIRST_SEGMENT: or in none),
#
#     grad = g_lse mean_key + g_cross mean_target_key + weight k[positive]
#     weight = g_lse exp(positive_sum - lse) + g_positive [+ g_cross exp(-target_lse): "zero"]
#
# where the weight, whose terms cancel in a converged row, is float64. Each segment's launch writes its rows.
@triton.jit
def _soft_target_gradient_kernel(
    q, k, scale, positive, saved, weights, grad_q, sums, n, m, d, first, total, q_strides, k_strides,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, FIRST_SEGMENT: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_m, m_d = i_m < n, i_d < d
    if positive is not None:
        b_own = tl.load(positive + i_m, mask=m_m, other=-1)
        m_own = m_m & (b_own >= first) & (b_own < first + m)
        if FIRST_SEGMENT:
            m_m &= m_own | (b_own < 0) | (b_own >= total)
        else:
            m_m = m_own
    b_g_lse = optional(weights.lse, i_m, m_m)
    b_target_lse = tl.load(saved.target_lse + i_m, mask=m_m, other=0.0)
    b_g_cross = tl.where(b_target_lse == -float("inf"), 0.0, optional(weights.cross, i_m, m_m))

    at = i_m.to(tl.int64)[:, None] * d + i_d[None, :]
    m_at = m_m[:, None] & m_d[None, :]
    b_grad = b_g_lse.to(tl.float32)[:, None] * tl.load(saved.mean_key + at, mask=m_at, other=0.0)
    b_grad += b_g_cross.to(tl.float32)[:, None] * tl.load(saved.mean_target_key + at, mask=m_at, other=0.0)
    if positive is not None:
        b_positive = tl.load(saved.positive_sum + i_m, mask=m_own, other=0.0)
        b_below = b_positive - tl.load(saved.lse + i_m, mask=m_own, other=0.0)
        b_weight = b_g_lse * tl.exp(b_below) + optional(weights.positive, i_m, m_m)
        if ZERO:
            b_weight += b_g_cross * tl.exp(-b_target_lse)
        b_k = load_rows(Matrix(k, *k_strides), b_own - first, m_own, i_d, m_d, False)
        b_grad += tl.where(m_own, b_weight, 0.0).to(tl.float32)[:, None] * b_k.to(tl.float32)

    b_q = load_rows(Matrix(q, *q_strides), i_m, m_m, i_d, m_d, False).to(tl.float32)
    i_program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + i_program, tl.sum(tl.sum(b_q * b_grad, 1), 0))
    if grad_q is not None:
        b_grad *= scalar(scale)
        tl.store(grad_q + at, b_grad.to(grad_q.dtype.element_ty), mask=m_at)


@flat(SoftTarget, gradients=4)
def soft_target_backward(
    gradients: Sequence[Tensor | None],
    problem: SoftTarget,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor], Tensor, Tensor]:
    problem = problem._replace(positive=contiguous(problem.positive))
    weights, left = Weights(*map(contiguous, gradients)), Saved(*saved)
    needs_q, *needs_rest = needs
    if left.mean_key.numel() > 0 and not any(needs_rest):
        q = problem.q
        grad_q, grad_scale = _from_means(problem, weights, left, needs_q)
        grad_k, grad_target_k = ([_nothing(q) for _ in problem.k] for _ in range(2))
        return grad_q, grad_k, _nothing(q), grad_target_k, grad_scale, q.new_zeros((), dtype=torch.float32)
    return _from_matrices(problem, weights, left[:3], needs)


def _nothing(like: Tensor) -> Tensor:
    """A gradient that is not needed."""
    return like.new_empty(0, dtype=torch.float32)


def _from_means(problem: SoftTarget, weights: Weights, saved: Saved, needs_q: bool) -> tuple[Tensor, Tensor]:
    """grad_q and grad_scale, keys and target frozen."""
    q, (n, d) = problem.q, problem.q.shape
    shape = configs.shape("soft_target_gradient", q, d)
    grid = launch.cdiv(n, shape.block_m), launch.cdiv(d, shape.block_d)
    segments = range(1 if problem.positive is None else len(problem.k))
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format) if needs_q else None
    sums = q.new_empty((len(segments), grid[0] * grid[1]), dtype=torch.float32)
    for i in segments:
        k = problem.k[i]
        _soft_target_gradient_kernel[grid](
            q, k, launch.scalar(problem.scale), problem.positive, saved, weights, grad_q, sums[i],
            n, k.shape[0], d, problem.first(i), problem.columns, q.stride(), k.stride(),
            BLOCK_M=shape.block_m, BLOCK_D=shape.block_d, FIRST_SEGMENT=i == 0,
            ZERO=problem.positive_in_target == "zero", num_warps=shape.warps,
        )  # fmt: skip
    return _nothing(q) if grad_q is None else grad_q, sums.sum()


def _from_matrices(
    problem: SoftTarget, weights: Weights, statistics: Statistics, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor], Tensor, Tensor]:
    needs_q, needs_k, needs_target_q, needs_target_k = needs
    needs_target = needs_target_q or needs_target_k
    factors = (
        _factors(weights, statistics[0], statistics[2]) if problem.q.dtype == torch.float16 else Factors()
    )
    of_rows, of_target_rows = (
        x.new_zeros(x.shape, dtype=torch.float32) if needed else None
        for x, needed in ((problem.q, needs_q), (problem.target_q, needs_target_q))
    )
    of_keys: list[Tensor | None] = [None for _ in problem.k]
    of_target_keys: list[Tensor | None] = [None for _ in problem.k]
    sums: list[Tensor] = []
    target_sums: list[Tensor] = []
    wanted = Wanted(g=needs_q or needs_k, h=needs_target, sums=True)
    for i, rows, g, h, block_sums, block_target_sums in blocks(problem, statistics, weights, factors, wanted):
        sums.append(block_sums)
        target_sums.append(block_target_sums)
        if of_rows is not None:
            of_rows[rows] += launch.mm_float32(g, problem.k[i])
        if needs_k:
            of_keys[i] = launch.mm_float32(g.T, problem.q[rows], of_keys[i])
        if of_target_rows is not None:
            of_target_rows[rows] += launch.mm_float32(h, problem.target_k[i])
        if needs_target_k:
            of_target_keys[i] = launch.mm_float32(h.T, problem.target_q[rows], of_target_keys[i])

    def gradient(
        total: Tensor | None, needed: bool, like: Tensor, scale: Tensor, factor: float | Tensor
    ) -> Tensor:
        if not needed:
            return _nothing(like)
        if total is None:  # of a segment without keys
            return like.new_zeros(like.shape)
        return total.mul_(scale).div_(factor).to(like.dtype)

    student, target = (problem.scale, factors.g), (problem.target_scale, factors.h)
    return (
        gradient(of_rows, needs_q, problem.q, *student),
        [gradient(x, needs_k, part, *student) for x, part in zip(of_keys, problem.k, strict=True)],
        gradient(of_target_rows, needs_target_q, problem.target_q, *target),
        [
            gradient(x, needs_target_k, part, *target)
            for x, part in zip(of_target_keys, problem.target_k, strict=True)
        ],
        torch.cat(sums).sum(),
        torch.cat(target_sums).sum(),
    )


def _factors(weights: Weights, lse: Tensor, cross: Tensor) -> Factors:
    """Powers of two that bring the largest possible element of G and of H near 2^14, the range of float16.

    The teacher's mean of S - cross is 0 and S is at most lse, so that no softmax(T)_j |S_j - cross| exceeds
    lse - cross.
    """
    of_lse, of_target_lse, of_cross, of_positive = (
        torch.zeros_like(lse) if g is None else g.abs() for g in weights
    )

    def factor(bound: Tensor) -> Tensor:
        exponent = torch.frexp(bound.amax()).exponent.clamp(min=-100)
        return torch.ldexp(bound.new_ones((), dtype=torch.float32), 14 - exponent)

    return Factors(factor(of_lse + of_cross + of_positive), factor(of_target_lse + of_cross * (lse - cross)))
