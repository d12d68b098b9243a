"""Rows that are padding: out of denominators, of sums, and of what others have as positives."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dtypes
from ..autograd import ContrastiveStats
from ..distributed import Ranks, engine, gather
from ..problem import Contrast


def zero_unless(valid: Tensor | None, x: Tensor) -> Tensor:
    """`x` [N, ...] with 0, and gradient 0, where `valid` [N] is False, whatever stands there; None: as it
    is."""
    return x if valid is None else x.masked_fill(~valid.view(-1, *[1] * (x.dim() - 1)), 0)


def among_valid(valid: Tensor | None, problem: Contrast) -> Contrast:
    """`problem`, whose rows are its N keys or the first of them, with denominators over what is valid [N]: a
    row meets the keys that are as valid as itself."""
    if valid is None:
        return problem
    ids, n = valid.to(torch.int64), problem.q.shape[0]
    return problem._replace(row_labels=ids if n == ids.shape[0] else ids[:n], col_labels=ids, among="same")


def of_no_label(ids: Tensor, valid: Tensor | None, ranks: Ranks | None) -> Tensor:
    """The ids [n] of labels, where a row is not valid one that no valid row of any rank has."""
    if valid is None:
        return ids
    taken = rows_of_all(ids, ranks)
    n = taken.shape[0]  # of n + 1 numbers, n ids leave one
    small = torch.where((taken >= 0) & (taken < n), taken, n + 1)
    seen = taken.new_zeros(n + 2).scatter(0, small, 1)
    return torch.where(valid, ids, seen[: n + 1].argmin())


def rows_of_all(x: Tensor, ranks: Ranks | None) -> Tensor:
    """`x` [n, ...] of every rank."""
    if ranks is None:
        return x
    if x.dtype == torch.bool:  # which not every backend of torch.distributed sends
        return rows_of_all(x.to(torch.uint8), ranks) != 0
    return gather(x, ranks.rows(x.shape[0]), ranks.group)


def weights_of_valid(
    mask: Tensor | None, valid: Tensor | None, ranks: Ranks | None, square: bool
) -> Tensor | None:
    """The mask with 0 in the rows, and if it is `square` the columns, of samples that are not valid [B]."""
    if mask is None or valid is None:
        return mask
    mask = mask.masked_fill(~valid[:, None], 0)
    return mask.masked_fill(~rows_of_all(valid, ranks), 0) if square else mask


def of_other_labels(problem: Contrast, valid: Tensor, ranks: Ranks | None) -> ContrastiveStats:
    """The statistics over the valid keys whose label is not the row's, without positives."""
    zeros = torch.zeros_like(valid, dtype=dtypes.accumulate_dtype(problem.q.dtype))
    bias = zeros.masked_fill(~valid, -torch.inf)
    others = problem._replace(among="different", label_positives=False, key_bias=bias)
    return engine.contrastive(others, ranks)
