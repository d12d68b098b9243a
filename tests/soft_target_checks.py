"""Problems of odd sizes for tests of the soft-target kernels, and how near to the truth these come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from comparisons import unit
from torch import Tensor

FROZEN = (True, False, False, False)
EVERYTHING = (True, True, True, True)


class Case(NamedTuple):
    """Sizes and options of one problem; E None: the teacher has the student's very keys."""

    d: int
    e: int | None = None
    n: int = 20
    lengths: Sequence[int] = (37,)
    positive: str | None = "exclude"
    transposed: bool = False

    def arguments(self, dtype: torch.dtype, scale: float = 10.0, target_scale: float = 14.0) -> list[Any]:
        q, t = unit(self.n, self.d), unit(self.n, self.e or self.d)
        keys = self._keys(self.d, dtype)
        total = sum(self.lengths)
        positive = None if self.positive is None else torch.randint(-1, total, (self.n,))
        return [
            q.to(dtype), keys, t.to(dtype), self._keys(self.e, dtype) if self.e else keys,
            torch.tensor(scale), torch.tensor(target_scale), positive, self.positive or "exclude",
        ]  # fmt: skip

    def _keys(self, width: int, dtype: torch.dtype) -> list[Tensor]:
        keys = [unit(m, width).to(dtype) for m in self.lengths]
        return [x.T.contiguous().T for x in keys] if self.transposed else keys


CASES = [
    Case(1, n=37, lengths=(53,)),
    Case(3, lengths=(20, 0, 23), positive="zero", transposed=True),
    Case(16, lengths=(48,), n=16),
    Case(19, n=1, lengths=(1,)),
    Case(19, positive=None, lengths=(33, 17), transposed=True),
    Case(19, 5, positive="zero", lengths=(17, 20)),
    Case(64, 19, lengths=(20,), n=17, transposed=True),
    Case(64, n=5, lengths=(17, 18), positive="zero"),
    Case(130, n=5, lengths=(20,)),
    Case(260, n=5, lengths=(9, 8), positive="zero"),
]


def wide(x: Any) -> Any:
    """Tensors in float64, in lists too."""
    if isinstance(x, list | tuple):
        return [wide(part) for part in x]
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def flat(outputs: Sequence[Tensor | list[Tensor]]) -> Iterator[Tensor]:
    for x in outputs:
        yield from x if isinstance(x, list) else [x]


def error(result: Tensor, truth: Tensor) -> float:
    """The largest error relative to the largest element; infinities must agree."""
    assert result.shape == truth.shape
    finite = truth.isfinite()
    assert torch.equal(result.double()[~finite], truth[~finite])
    if not finite.any():
        return 0.0
    difference = (result.double() - truth)[finite].abs().nan_to_num(nan=float("inf"))
    return float(difference.max() / truth[finite].abs().max().clamp(min=0.1))


def assert_near(ours: Sequence, theirs: Sequence, truth: Sequence, floor: float) -> None:
    """Errors at most twice those of the chunked reference in the same dtype, plus a floor; same dtypes."""
    for i, (x, y, exact) in enumerate(zip(flat(ours), flat(theirs), flat(truth), strict=True)):
        assert x.dtype == y.dtype and x.is_contiguous()
        found, limit = error(x, exact), 2 * error(y, exact) + floor
        assert found <= limit, f"output {i} is off by {found:.2g}, allowed {limit:.2g}"


def rounding(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)
