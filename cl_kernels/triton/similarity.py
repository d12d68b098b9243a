"""Similarity matrix: scale q k^T, of rows at unit length with `normalize`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from . import launch, tiles

GROUP = 8  # blocks of rows that walk the columns together, so that both stay in the cache


@triton.jit
def _reciprocal_norm_kernel(
    x, rnorm, n, d,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n = i_n < n
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, d, BLOCK_D):
        i_d = first + tl.arange(0, BLOCK_D)
        b_x = tiles.load_rows(x, i_n, m_n, i_d, i_d < d, EVEN_D).to(tl.float32)
        b_sum += b_x * b_x
    b_norm = tl.sqrt_rn(tl.sum(b_sum, 1))
    b_rnorm = tl.where(b_norm == 0, 0.0, tl.div_rn(1.0, tl.where(b_norm == 0, 1.0, b_norm)))
    tl.store(rnorm + i_n, b_rnorm, mask=m_n)


# A program forms one tile of the matrix from the rows as they are; the norms, known for whole rows only,
# come in at the end.
@triton.jit
def _similarity_kernel(
    q, k, q_rnorm, k_rnorm, scale, out, n, m, d,
    NORMALIZE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid, blocks_n, blocks_m = tl.program_id(0), tl.cdiv(n, BLOCK_M), tl.cdiv(m, BLOCK_N)
    block_n, block_m = tl.swizzle2d(pid // blocks_m, pid % blocks_m, blocks_n, blocks_m, GROUP)
    i_n = block_n * BLOCK_M + tl.arange(0, BLOCK_M)
    i_m = block_m * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n, m_m = i_n < n, i_m < m
    b_s = tiles.product(q, k, i_n, m_n, i_m, m_m, d, BLOCK_D, EVEN_D, PRECISION)
    if NORMALIZE:
        b_s *= tl.load(q_rnorm + i_n, mask=m_n, other=0.0)[:, None]
        b_s *= tl.load(k_rnorm + i_m, mask=m_m, other=0.0)[None, :]
    b_s *= tiles.scalar(scale)
    at = out + i_n.to(tl.int64)[:, None] * m + i_m[None, :]
    tl.store(at, b_s.to(out.dtype.element_ty), mask=m_n[:, None] & m_m[None, :])


def reciprocal_norm(x: Tensor) -> Tensor:
    """1 / ||row|| of x [N, D], float32 [N]; 0 for a zero row."""
    n, d = x.shape
    shape = configs.shape("reciprocal_norm", x, d)
    rnorm = x.new_empty(n, dtype=torch.float32)
    _reciprocal_norm_kernel[(launch.cdiv(n, shape.block_m),)](
        launch.matrix(x), rnorm, n, d,
        BLOCK_M=shape.block_m, BLOCK_D=shape.block_d, EVEN_D=d % shape.block_d == 0,
        **launch.options(shape),
    )  # fmt: skip
    return rnorm


def similarity_forward(
    q: Tensor,  # [N, D]
    k: Tensor | None,  # [M, D]
    scale: Tensor,  # []
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [N, M], q_rnorm [N], k_rnorm [M]), the norms [0] where they are not needed."""
    launch.require_features(q)
    keys = q if k is None else k
    (n, d), m = q.shape, keys.shape[0]
    q_rnorm, k_rnorm = (q.new_empty(0, dtype=torch.float32) for _ in range(2))
    if normalize:
        q_rnorm = reciprocal_norm(q)
        k_rnorm = k_rnorm if k is None else reciprocal_norm(k)
    shape = configs.shape("similarity", q, d)
    out = q.new_empty(n, m)
    _similarity_kernel[(launch.cdiv(n, shape.block_m) * launch.cdiv(m, shape.block_n),)](
        launch.matrix(q), launch.matrix(keys), q_rnorm, q_rnorm if k is None else k_rnorm,
        launch.scalar(scale), out, n, m, d, NORMALIZE=normalize, GROUP=GROUP,
        BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, BLOCK_D=shape.block_d,
        EVEN_D=d % shape.block_d == 0, PRECISION=launch.precision(q),
        **launch.options(shape),
    )  # fmt: skip
    return out, q_rnorm, k_rnorm
