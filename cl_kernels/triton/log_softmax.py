"""Row-wise log-softmax over the included entries, and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from . import launch, tiles


@triton.jit
def _load(x, mask, i_n, m_n, i_m, m, OTHER: tl.constexpr):
    """Elements of a Matrix in float32 where they are included, OTHER elsewhere."""
    i_n = i_n.to(tl.int64)[:, None]
    i_m = i_m.to(tl.int64)[None, :]
    inside = m_n[:, None] & (i_m < m)
    b_x = tl.load(x.at + i_n * x.stride_row + i_m * x.stride_col, mask=inside, other=OTHER).to(tl.float32)
    if mask is not None:
        at = mask.at + i_n * mask.stride_row + i_m * mask.stride_col
        included = tl.load(at, mask=inside, other=0)
        b_x = tl.where(included, b_x, OTHER)
    return b_x


@triton.jit
def _fold(b_x, b_peak, b_sum):
    """The running maximum of the rows and sum of exp(x - maximum), with another block."""
    b_new = tl.maximum(b_peak, tl.max(b_x, 1))
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_sum *= tl.exp2((b_peak - b_shift) * tiles.LOG2E)
    b_sum += tl.sum(tl.exp2((b_x - b_shift[:, None]) * tiles.LOG2E), 1)
    return b_new, b_sum


@triton.jit
def _store(out, b_out, i_n, m_n, i_m, m):
    at = out + i_n.to(tl.int64)[:, None] * m + i_m[None, :]
    tl.store(at, b_out.to(out.dtype.element_ty), mask=m_n[:, None] & (i_m < m)[None, :])


@triton.jit
def _store_log_softmax(out, b_x, b_peak, b_sum, i_n, m_n, i_m, m):
    b_out = (b_x - b_peak[:, None]) - tl.log2(b_sum)[:, None] * tiles.LN2
    # Also where the row has nothing, or a NaN, among what it includes.
    b_out = tl.where(b_x == float("-inf"), float("-inf"), b_out)
    _store(out, b_out, i_n, m_n, i_m, m)


@triton.jit
def _softmax(output, i_n, m_n, i_m, m):
    """exp of the output, 0 outside."""
    b_log = _load(output, None, i_n, m_n, i_m, m, float("-inf"))
    return tl.exp2(b_log * tiles.LOG2E)


@triton.jit
def _store_gradient(out, b_g, b_softmax, b_sum, b_total, i_n, m_n, i_m, m):
    b_out = tl.where((b_total == 0)[:, None], 0.0, b_g - b_softmax * b_sum[:, None])
    _store(out, b_out, i_n, m_n, i_m, m)


# A program owns a few rows. Those that fit one block (WHOLE) are read once and stay in registers; longer ones
# are walked twice, for the maximum and the sum, then for the output.
@triton.jit
def _log_softmax_kernel(
    x, mask, out, n, m, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    i_n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n = i_n < n
    i_block = tl.arange(0, BLOCK_N)
    b_peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    if WHOLE:
        b_x = _load(x, mask, i_n, m_n, i_block, m, float("-inf"))
        b_peak, b_sum = _fold(b_x, b_peak, b_sum)
        _store_log_softmax(out, b_x, b_peak, b_sum, i_n, m_n, i_block, m)
    else:
        for first in range(0, m, BLOCK_N):
            b_x = _load(x, mask, i_n, m_n, first + i_block, m, float("-inf"))
            b_peak, b_sum = _fold(b_x, b_peak, b_sum)
        for first in range(0, m, BLOCK_N):
            b_x = _load(x, mask, i_n, m_n, first + i_block, m, float("-inf"))
            _store_log_softmax(out, b_x, b_peak, b_sum, i_n, m_n, first + i_block, m)


# grad - softmax sum(grad), the sum over what is included; the softmax is exp of the forward's output. It sums
# to 1, or to 0 where a row includes nothing but -inf: such a row is constant, and its gradient 0.
@triton.jit
def _log_softmax_gradient_kernel(
    grad, output, mask, out, n, m, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    i_n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n = i_n < n
    i_block = tl.arange(0, BLOCK_N)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_total = tl.zeros((BLOCK_M,), tl.float32)
    if WHOLE:
        b_g = _load(grad, mask, i_n, m_n, i_block, m, 0.0)
        b_softmax = _softmax(output, i_n, m_n, i_block, m)
        b_sum += tl.sum(b_g, 1)
        b_total += tl.sum(b_softmax, 1)
        _store_gradient(out, b_g, b_softmax, b_sum, b_total, i_n, m_n, i_block, m)
    else:
        for first in range(0, m, BLOCK_N):
            i_m = first + i_block
            b_g = _load(grad, mask, i_n, m_n, i_m, m, 0.0)
            b_sum += tl.sum(b_g, 1)
            if tl.min(b_total, 0) == 0:  # mostly read once
                b_total += tl.sum(_softmax(output, i_n, m_n, i_m, m), 1)
        for first in range(0, m, BLOCK_N):
            i_m = first + i_block
            b_g = _load(grad, mask, i_n, m_n, i_m, m, 0.0)
            b_softmax = _softmax(output, i_n, m_n, i_m, m)
            _store_gradient(out, b_g, b_softmax, b_sum, b_total, i_n, m_n, i_m, m)


def masked_log_softmax_forward(
    logits: Tensor,  # [N, M]
    mask: Tensor | None,  # bool [N, M]
) -> Tensor:
    n, m = logits.shape
    shape = configs.shape("log_softmax", logits, m)
    out = logits.new_empty(n, m)
    _log_softmax_kernel[(launch.cdiv(n, shape.block_m),)](
        launch.matrix(logits), launch.matrix(mask), out, n, m,
        WHOLE=m <= shape.block_n, BLOCK_M=shape.block_m, BLOCK_N=shape.block_n,
        **launch.options(shape),
    )  # fmt: skip
    return out


def masked_log_softmax_backward(
    grad: Tensor,  # [N, M]
    output: Tensor,  # [N, M]
    mask: Tensor | None,  # bool [N, M]
) -> Tensor:
    n, m = output.shape
    shape = configs.shape("log_softmax", output, m)
    out = output.new_empty(n, m)
    _log_softmax_gradient_kernel[(launch.cdiv(n, shape.block_m),)](
        launch.matrix(grad), launch.matrix(output), launch.matrix(mask), out, n, m,
        WHOLE=m <= shape.block_n, BLOCK_M=shape.block_m, BLOCK_N=shape.block_n,
        **launch.options(shape),
    )  # fmt: skip
    return out
