"""Softmaxes of soft_target as matrices that GEMMs take, those of some rows and one segment of the keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..problem import SoftTarget
from . import launch
from .soft_target_slots import LEFT_OUT
from .tiles import LN2, LOG2E, Matrix, product, scalar

# Two matrices of so many bytes are held at a time.
MATRIX_BYTES = 1 << 29


@triton.jit
def optional(x, i_x, m_x):
    """x[i_x] in float64; 0 outside and where x is None."""
    if x is None:
        b_x = tl.zeros(i_x.shape, tl.float64)
    else:
        b_x = tl.load(x + i_x, mask=m_x, other=0.0)
    return b_x


@triton.jit
def _rounded(b_statistic):
    """A float64 statistic in base 2 and float32, 0 for the -inf of an empty row."""
    return tl.where(b_statistic == -float("inf"), 0.0, b_statistic * LOG2E).to(tl.float32)


@triton.jit
def _coefficient(b_grad, b_lse, b_shift):
    """c with c 2^(S2 - shift) = grad exp(S - lse), 0 for an empty row."""
    b_rest = tl.exp2(b_shift.to(tl.float64) - b_lse * LOG2E)
    return tl.where(b_lse == -float("inf"), 0.0, b_grad * b_rest)


# A program makes one tile of each matrix, in float32 until it is stored:
#
#     G = g_lse softmax(S) + g_cross softmax(T) + g_positive [j = positive]
#     H = softmax(T) (g_target_lse + g_cross (S - cross)), 0 at the positive
#
# times the `factors`, powers of two that keep float16 from underflow. With REST_ONLY G is 0 at the positive,
# too. Each row of a tile has a place for its sum of G o (q k^T), and of H o (t u^T).
#
# Logits are in base 2. A log-sum-exp is split into a float32 shift and a float64 rest: the difference of a
# logit and the shift is as exact as the logit, and the rest goes into the row's coefficient.
@triton.jit
def _soft_target_softmax_kernel(
    q, k, target_q, target_k, scale, target_scale, positive, statistics, weights, factors,
    g, h, sums, target_sums, begin, end, m, d, e, first, pitch,
    q_strides, k_strides, target_q_strides, target_k_strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    EVEN_E: tl.constexpr, PRECISION: tl.constexpr, ZERO: tl.constexpr, REST_ONLY: tl.constexpr,
):  # fmt: skip
    q, k = Matrix(q, *q_strides), Matrix(k, *k_strides)
    target_q, target_k = Matrix(target_q, *target_q_strides), Matrix(target_k, *target_k_strides)
    i_m = begin + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = i_m < end, i_n < m
    b_dots = product(q, k, i_m, m_m, i_n, m_n, d, BLOCK_D, EVEN_D, PRECISION)
    b_target_dots = product(target_q, target_k, i_m, m_m, i_n, m_n, e, BLOCK_D, EVEN_E, PRECISION)
    b_s = b_dots * (scalar(scale) * LOG2E)
    b_target = b_target_dots * (scalar(target_scale) * LOG2E)
    b_s = tl.where(m_n[None, :], b_s, LEFT_OUT)
    b_target = tl.where(m_n[None, :], b_target, LEFT_OUT)
    if positive is not None:
        b_own = tl.load(positive + i_m, mask=m_m, other=-1) - first
        m_own = i_n.to(tl.int64)[None, :] == b_own[:, None]
        b_target = tl.where(m_own, 0.0 if ZERO else LEFT_OUT, b_target)

    lse, target_lse, cross = statistics
    b_lse = tl.load(lse + i_m, mask=m_m, other=0.0)
    b_target_lse = tl.load(target_lse + i_m, mask=m_m, other=0.0)
    b_shift, b_target_shift = _rounded(b_lse), _rounded(b_target_lse)
    b_target = tl.exp2(b_target - b_target_shift[:, None])
    b_cross = _coefficient(optional(weights.cross, i_m, m_m), b_target_lse, b_target_shift)
    at_row = tl.program_id(0).to(tl.int64) * (end - begin) + i_m - begin
    at = (i_m - begin).to(tl.int64)[:, None] * pitch + i_n[None, :]
    m_g = m_m[:, None] & m_n[None, :]

    times = scalar(factors.g)
    b_of_s = (_coefficient(optional(weights.lse, i_m, m_m), b_lse, b_shift) * times).to(tl.float32)
    b_g = (
        b_of_s[:, None] * tl.exp2(b_s - b_shift[:, None])
        + (b_cross * times).to(tl.float32)[:, None] * b_target
    )
    if positive is not None:
        if REST_ONLY:
            b_g = tl.where(m_own, 0.0, b_g)
        else:
            b_at_own = (optional(weights.positive, i_m, m_m) * times).to(tl.float32)
            b_g += tl.where(m_own, b_at_own[:, None], 0.0)
    if sums is not None:
        tl.store(sums + at_row, tl.sum(b_g * b_dots, 1) / times, mask=m_m)
    if g is not None:
        tl.store(g + at, b_g.to(g.dtype.element_ty), mask=m_g)

    if h is not None:
        times = scalar(factors.h)
        b_mean = tl.load(cross + i_m, mask=m_m, other=0.0) * LOG2E
        b_rounded = b_mean.to(tl.float32)
        b_centred = (b_s - b_rounded[:, None]) - (b_mean - b_rounded.to(tl.float64)).to(tl.float32)[:, None]
        b_plain = _coefficient(optional(weights.target_lse, i_m, m_m), b_target_lse, b_target_shift) * times
        b_slope = (b_cross * times * LN2).to(tl.float32)
        b_h = b_target * (b_plain.to(tl.float32)[:, None] + b_slope[:, None] * b_centred)
        if positive is not None:
            b_h = tl.where(m_own, 0.0, b_h)
        tl.store(h + at, b_h.to(h.dtype.element_ty), mask=m_g)
        if target_sums is not None:
            tl.store(target_sums + at_row, tl.sum(b_h * b_target_dots, 1) / times, mask=m_m)


Statistics = tuple[Tensor, Tensor, Tensor]  # lse, target_lse, cross


class Weights(NamedTuple):
    """Factors of the softmaxes, the incoming gradients: [N] in float64, None for zeros."""

    lse: Tensor | None
    target_lse: Tensor | None
    cross: Tensor | None
    positive: Tensor | None


class Factors(NamedTuple):
    """Powers of two on top, for G and for H."""

    g: float | Tensor = 1.0
    h: float | Tensor = 1.0


class Wanted(NamedTuple):
    """The results that are asked for: G, H, and with `sums` sum G o (q k^T) and sum H o (t u^T)."""

    g: bool
    h: bool
    sums: bool
    rest_only: bool = False


class Block(NamedTuple):
    """G and H of `rows` and segment `i`, and their partial sums; empty where not wanted."""

    i: int
    rows: slice
    g: Tensor  # [rows, M_i]
    h: Tensor
    sums: Tensor  # [tiles of columns, rows], flat
    target_sums: Tensor


def blocks(
    problem: SoftTarget, statistics: Statistics, weights: Weights, factors: Factors, wanted: Wanted
) -> Iterator[Block]:
    """Walk the rows, and for each some of them the segments."""
    shape = configs.shape("soft_target_softmax", problem.q, max(problem.widths))
    longest = max(part.shape[0] for part in problem.k)
    most = MATRIX_BYTES // (problem.q.element_size() * max(longest, 1))
    step = max(1, min(most // shape.block_m, 65535)) * shape.block_m
    n = problem.q.shape[0]
    for begin in range(0, n, step):
        rows = slice(begin, min(begin + step, n))
        for i, part in enumerate(problem.k):
            if part.shape[0] > 0:
                yield _block(problem, i, rows, shape, statistics, weights, factors, wanted)


def _block(
    problem: SoftTarget,
    i: int,
    rows: slice,
    shape: configs.Shape,
    statistics: Statistics,
    weights: Weights,
    factors: Factors,
    wanted: Wanted,
) -> Block:
    q, k, target_q, target_k = problem.q, problem.k[i], problem.target_q, problem.target_k[i]
    d, e = problem.widths
    n, m = rows.stop - rows.start, k.shape[0]
    grid = launch.cdiv(m, shape.block_n), launch.cdiv(n, shape.block_m)
    pitch = launch.cdiv(m, 16) * 16  # rows start where GEMMs load fastest

    def matrix(needed: bool) -> Tensor | None:
        return q.new_empty(n, pitch) if needed else None

    def partial(needed: bool) -> Tensor | None:
        return q.new_empty(grid[0] * n, dtype=torch.float32) if needed else None

    g, h = matrix(wanted.g), matrix(wanted.h)
    sums, target_sums = partial(wanted.sums), partial(wanted.sums and wanted.h)
    _soft_target_softmax_kernel[grid](
        q, k, target_q, target_k, launch.scalar(problem.scale), launch.scalar(problem.target_scale),
        problem.positive, statistics, weights, factors,
        g, h, sums, target_sums, rows.start, rows.stop, m, d, e, problem.first(i), pitch,
        q.stride(), k.stride(), target_q.stride(), target_k.stride(),
        BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, BLOCK_D=shape.block_d,
        EVEN_D=d % shape.block_d == 0, EVEN_E=e % shape.block_d == 0, PRECISION=launch.precision(q),
        ZERO=problem.positive_in_target == "zero", REST_ONLY=wanted.rest_only,
        **launch.options(shape),
    )  # fmt: skip
    nothing = q.new_empty(0, dtype=torch.float32)
    g, h = (nothing if x is None else x[:, :m] for x in (g, h))
    sums, target_sums = (nothing if x is None else x for x in (sums, target_sums))
    return Block(i, rows, g, h, sums, target_sums)


def mean_keys(problem: SoftTarget, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """mean_key and mean_target_key [N, D]: both softmaxes, without the positive, times the keys."""
    factor = 2.0**15 if problem.q.dtype == torch.float16 else 1.0  # a softmax is at most 1
    ones = torch.ones_like(statistics[0])
    weights, factors = Weights(ones, ones, None, None), Factors(factor, factor)
    wanted = Wanted(g=True, h=True, sums=False, rest_only=True)
    means, target_means = (problem.q.new_zeros(problem.q.shape, dtype=torch.float32) for _ in range(2))
    for block in blocks(problem, statistics, weights, factors, wanted):
        for out, matrix in ((means, block.g), (target_means, block.h)):
            out[block.rows] += launch.mm_float32(matrix, problem.k[block.i])
    return means.div_(factor), target_means.div_(factor)
