"""Slots in which the soft-target kernels leave parts of a row, and the logit of a pair left out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..problem import SoftTarget
from . import launch

# A logit left out. Below tiles.NOTHING, so that its exponential is 0 even where nothing else was seen, and
# finite, so that 0 times it is 0.
LEFT_OUT = tl.constexpr(-2e30)


class Slots(NamedTuple):
    """Places of the parts of a row that programs leave which share it: the splits of each segment's keys."""

    statistics: Tensor  # [6, N, slots]: peak, sum; target_peak, target_sum; pivot, cross
    means: Tensor | None  # [2, N, slots, D]: sums of keys by student's and by teacher's weights
    positive_logit: Tensor | None  # [N], in base 2
    segments: list[tuple[int, int, int]]  # of each: first slot, number of splits, keys in a split

    @classmethod
    def of(cls, problem: SoftTarget, block_m: int, block_n: int, waves: int, means: bool) -> Slots:
        q, n = problem.q, problem.q.shape[0]
        segments, slots = [], 0
        for part in problem.k:
            tiles = launch.cdiv(part.shape[0], block_n)
            splits = launch.splits(launch.cdiv(n, block_m), tiles, q, waves) if tiles else 0
            segments.append((slots, splits, launch.cdiv(tiles, max(splits, 1)) * block_n))
            slots += splits

        def empty(*shape: int) -> Tensor:
            return q.new_empty(shape, dtype=torch.float32)

        return cls(
            empty(6, n, slots),
            empty(2, n, slots, q.shape[1]) if means else None,
            None if problem.positive is None else empty(n),
            segments,
        )
