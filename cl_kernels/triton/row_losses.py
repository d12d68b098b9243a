"""A whole loss from the statistics of its rows, and what its gradient is made of (`ops.contrastive_loss`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 1024
_EMPTY_COUNT = tl.constexpr(1e-6)  # reference.EMPTY_COUNT


# One program: the numbers are few, and their sum has one order.
@triton.jit(do_not_specialize=["n"])
def _row_losses_kernel(
    lse, lse_cols, total, count, loss, coefs, n, factor,
    MEAN: tl.constexpr, DROP: tl.constexpr, AT_LEAST_ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    own = tl.arange(0, BLOCK)
    by = factor
    if MEAN:
        rows = n
        if DROP:
            counted = tl.zeros((BLOCK,), tl.int32)
            for first in range(0, n, BLOCK):
                i = first + own
                counted += (tl.load(count + i, mask=i < n, other=0.0) > 0).to(tl.int32)
            rows = tl.maximum(tl.sum(counted, 0), 1)
        by = by / rows
    summed = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, n, BLOCK):
        i = first + own
        x = tl.load(lse + i, mask=i < n, other=0.0)
        half = 1.0
        if lse_cols is not None:
            x = 0.5 * (x + tl.load(lse_cols + i, mask=i < n, other=0.0))
            half = 0.5
        of_row = tl.zeros((BLOCK,), tl.float64)
        number = of_row + 1
        if total is not None:
            of_row = tl.load(total + i, mask=i < n, other=0.0)
            number = tl.load(count + i, mask=i < n, other=1.0)
        divisor = tl.where(number < _EMPTY_COUNT, 1.0, number)
        empty = (x == float("-inf")) & (tl.abs(of_row) < float("inf"))
        share = tl.where(empty, 0.0, number / divisor)
        value = tl.where(empty, 0.0, tl.where(empty, 0.0, x) * share - of_row / divisor)
        if AT_LEAST_ZERO:
            value = tl.where(value < 0, 0.0, value)
        summed += tl.where(i < n, value, 0.0)
        tl.store(coefs + i, share * (half * by), mask=i < n)
        tl.store(coefs + n + i, tl.where(empty, 0.0, -by / divisor), mask=i < n)
    tl.store(loss, (tl.sum(summed, 0) * by).to(tl.float32))


def row_losses(
    lse: Tensor,
    lse_cols: Tensor,
    total: Tensor,
    count: Tensor,
    factor: float,
    mean: bool,
    drop: bool,
    at_least_zero: bool,
) -> tuple[Tensor, Tensor]:
    """loss [] float32, and [2, N] float64: its derivatives by the log-sum-exps of rows (and of columns), and
    by the sums over positives. The statistics are those of an engine's forward, [0] what is not there."""
    n = lse.shape[0]
    loss, coefs = lse.new_empty((), dtype=torch.float32), lse.new_empty(2, n)

    def given(x: Tensor) -> Tensor | None:
        return x if x.numel() > 0 else None

    _row_losses_kernel[(1,)](
        lse, given(lse_cols), given(total), given(count), loss, coefs, n, factor,
        MEAN=mean, DROP=drop and total.numel() > 0, AT_LEAST_ZERO=at_least_zero, BLOCK=_ROWS, num_warps=8,
    )  # fmt: skip
    return loss, coefs
