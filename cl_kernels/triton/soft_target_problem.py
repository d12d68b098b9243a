"""What the soft-target kernels share: their arguments, and what stands for a logit left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

# A logit left out. Below tiles.NOTHING, so that its exponential is 0 even where nothing else was seen, and finite,
# so that 0 times it is 0.
LEFT_OUT = tl.constexpr(-2e30)


@dataclass(frozen=True)
class Problem:
    """Student and teacher features; keys as segments of one long list."""

    q: Tensor  # [N, D]
    k: Sequence[Tensor]  # [M_s, D] each
    target_q: Tensor  # [N, E]
    target_k: Sequence[Tensor]  # [M_s, E] each
    scale: Tensor  # []
    target_scale: Tensor  # []
    positive: Tensor | None  # [N]
    positive_in_target: str

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
