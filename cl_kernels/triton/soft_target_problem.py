"""What the soft-target kernels share: their arguments, and the slots in which parts of a row are left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import launch

# A logit left out. Below tiles.NOTHING, so that its exponential is 0 even where nothing else was seen, and
# finite, so that 0 times it is 0.
LEFT_OUT = tl.constexpr(-2e30)


class Problem(NamedTuple):
    """Student and teacher features; keys as segments of one long list."""

    q: Tensor  # [N, D]
    k: Sequence[Tensor]  # [M_s, D] each
    target_q: Tensor  # [N, E]
    target_k: Sequence[Tensor]  # [M_s, E] each
    scale: Tensor  # []
    target_scale: Tensor  # []
    positive: Tensor | None  # [N]
    positive_in_target: str

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Sequence[Tensor],
        target_q: Tensor,
        target_k: Sequence[Tensor],
        scale: Tensor,
        target_scale: Tensor,
        positive: Tensor | None,
        positive_in_target: str,
    ) -> Problem:
        positive = None if positive is None else positive.contiguous()
        return cls(q, k, target_q, target_k, scale, target_scale, positive, positive_in_target)

    @property
    def n(self) -> int:
        return self.q.shape[0]

    @property
    def columns(self) -> int:
        return sum(part.shape[0] for part in self.k)

    @property
    def widths(self) -> tuple[int, int]:
        """D and E."""
        return self.q.shape[1], self.target_q.shape[1]

    def first(self, i: int) -> int:
        """The column that segment i starts at."""
        return sum(part.shape[0] for part in self.k[:i])

    def same_keys(self, i: int) -> bool:
        """Whether student and teacher read the same memory in segment i."""
        k, u = self.k[i], self.target_k[i]
        return k.data_ptr() == u.data_ptr() and k.shape == u.shape and k.stride() == u.stride()


class Slots(NamedTuple):
    """Where the programs that share a row leave their parts of it: the splits of each segment's keys."""

    statistics: Tensor  # [6, N, slots]: peak, sum; target_peak, target_sum; pivot, cross
    means: Tensor | None  # [2, N, slots, D]: sums of keys by student's and by teacher's weights
    positive_logit: Tensor | None  # [N], in base 2
    segments: list[tuple[int, int, int]]  # of each: first slot, number of splits, keys in a split

    @classmethod
    def of(cls, problem: Problem, block_m: int, block_n: int, waves: int, means: bool) -> Slots:
        q, n = problem.q, problem.n
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
