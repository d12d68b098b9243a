"""The problems that the engine and the soft targets solve: one object each, in the order of the ops' schemas.

`ops.py` has the formulas. An op is called with `*problem`; what implements it takes the problem back whole,
by `flat`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Contrast(NamedTuple):
    """Denominators over S = scale q k^T + key_bias, and positives of at most one kind."""

    q: Tensor  # [N, D]
    k: Tensor | None  # [M, D], None: q
    scale: Any  # [], a float until the op takes it
    exclude: int | None = None  # column i + exclude is left out of row i
    row_labels: Tensor | None = None  # int64 [N]
    col_labels: Tensor | None = None  # int64 [M]
    among: str = "all"  # "same", "different": restricts the denominator by label, else by mask
    label_positives: bool = False  # positives: equal labels
    positive_index: Tensor | None = None  # int64 [N], -1: none
    positive_mask: Tensor | None = None  # [R, C], weight of (i, j) at [i % R, j % C]
    key_bias: Tensor | None = None  # [M]
    both_axes: bool = False  # LSEs of the columns too

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Its tensors, flat, as an autograd Function takes them."""
        return (
            self.q, self.k, self.scale, self.row_labels, self.col_labels, self.positive_index,
            self.positive_mask, self.key_bias,
        )  # fmt: skip

    def with_tensors(self, tensors: Sequence[Any]) -> Contrast:
        q, k, scale, rows, cols, index, mask, bias = tensors
        return Contrast(
            q, k, scale, self.exclude, rows, cols, self.among, self.label_positives, index, mask, bias,
            self.both_axes,
        )  # fmt: skip

    def options(self) -> Contrast:
        """The rest, without tensors."""
        return self.with_tensors((None,) * 8)

    @property
    def keys(self) -> Tensor:
        return self.q if self.k is None else self.k

    @property
    def positives(self) -> str:
        """Their kind: "labels", "index", "mask" or "none"."""
        if self.label_positives:
            return "labels"
        if self.positive_index is not None:
            return "index"
        return "none" if self.positive_mask is None else "mask"

    @property
    def by_mask(self) -> bool:
        """Whether the weights of positives, not labels, restrict the denominators."""
        return self.among != "all" and self.row_labels is None and self.positive_mask is not None

    @property
    def offset(self) -> int | None:
        """The excluded offset, None where no pair lies on it."""
        n, m = self.q.shape[0], self.keys.shape[0]
        return self.exclude if self.exclude is not None and -n < self.exclude < m else None

    @property
    def mirrored(self) -> bool:
        """Whether S and the denominators are symmetric."""
        return (
            self.k is None
            and not self.both_axes
            and self.exclude in (None, 0)
            and self.key_bias is None
            and same_memory(self.row_labels, self.col_labels)
        )


class SoftTarget(NamedTuple):
    """Logits S = scale q k^T against the softmax of T = target_scale t u^T; keys as segments of one list."""

    q: Tensor  # [N, D]
    k: Sequence[Tensor]  # [M_s, D] each
    target_q: Tensor  # [N, E]
    target_k: Sequence[Tensor]  # [M_s, E] each
    scale: Any  # [], as above
    target_scale: Any
    positive: Tensor | None = None  # int64 [N], a column, -1: none
    positive_in_target: str = "exclude"  # or "zero"

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Its tensors, flat, as an autograd Function takes them."""
        return (
            self.q, self.target_q, self.scale, self.target_scale, self.positive, *self.k, *self.target_k
        )  # fmt: skip

    def with_tensors(self, tensors: Sequence[Any]) -> SoftTarget:
        q, target_q, scale, target_scale, positive, *segments = tensors
        half = len(segments) // 2
        k, target_k = segments[:half], segments[half:]
        return SoftTarget(q, k, target_q, target_k, scale, target_scale, positive, self.positive_in_target)

    def options(self) -> SoftTarget:
        """The rest, without tensors."""
        return self.with_tensors((None,) * 5)

    @property
    def columns(self) -> int:
        return sum(part.shape[0] for part in self.k)

    def first(self, i: int) -> int:
        """The column that segment i starts at."""
        return sum(part.shape[0] for part in self.k[:i])

    def same_keys(self, i: int) -> bool:
        """Whether student and teacher read the same memory in segment i."""
        return same_memory(self.k[i], self.target_k[i])

    @property
    def widths(self) -> tuple[int, int]:
        """D and E."""
        return self.q.shape[1], self.target_q.shape[1]


class KeyLoss(NamedTuple):
    """A cross-entropy over keys that get no gradient, to a target that the keys' similarities make."""

    q: Tensor  # [N, D]
    k: list[Tensor]  # segments [M_s, D]
    target_q: Tensor | None  # [N, D], None: no target
    scale: Any  # [], a float until the op takes it
    target_scale: Any = None
    coeff: Any = None
    own: Tensor | None = None  # [N, D], positives beside the keys
    positive: Tensor | None = None  # int64 [N], or the columns that they are
    positive_is_zero: bool = False  # in the target, in place of left out

    def tensors(self) -> tuple[Tensor | None, ...]:
        """As above."""
        q, k, *rest, _ = self
        return (q, *rest, *k)

    def with_tensors(self, tensors: Sequence[Any]) -> KeyLoss:
        q, target_q, scale, target_scale, coeff, own, positive, *k = tensors
        return KeyLoss(q, k, target_q, scale, target_scale, coeff, own, positive, self.positive_is_zero)

    def options(self) -> KeyLoss:
        return self.with_tensors((None,) * 7)


class KeyStats(NamedTuple):
    """The statistics of a key loss's rows: float64 [N], and means of keys [N, D], float32."""

    lse: Tensor
    positive_sum: Any  # the positive's logit; [0]: it stands beside the keys
    mean: Any  # by the softmax, [0] where no gradient is needed
    target_lse: Any = None
    cross: Any = None  # the target's mean of the logits
    target_mean: Any = None  # as `mean`, by the target's


def same_memory(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def flat(kind: type[Contrast] | type[SoftTarget], gradients: int = 0) -> Callable[[Callable[..., Any]], Any]:
    """An entry point of an op, with the schema's arguments one by one, from a function of what they make up.

    A forward is function(problem, save_gradient). A backward, of so many incoming gradients, is
    function(gradients, problem, saved, needs), `saved` being what the forward left for it.
    """
    last = gradients + len(kind._fields)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def entry(*args: Any) -> Any:
            if len(args) <= last:
                raise TypeError(f"{function.__name__} takes the arguments of its schema, got {len(args)}")
            whole = kind(*args[gradients:last])
            if not gradients:
                return function(whole, *args[last:])
            return function(args[:gradients], whole, args[last:-1], args[-1])

        del entry.__wrapped__  # whose signature is another
        return entry

    return decorate
