"""Rows whose denominators depend on pairs, which the engine does not know: a chunk of them at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import autograd

CHUNK_LOGITS = 2**20


def in_chunks(rows: int, columns: int, chunk: Callable[..., tuple[Tensor]], *args: Any) -> Tensor:
    """[rows]: `chunk(first, last, *args)` of slices of the rows, computed again in the backward.

    Args:
        rows, columns: those of the matrix that is not to be held.
        chunk: plain PyTorch, gives the losses of rows first to last; it holds no tensors of its own.
    """
    step = max(1, CHUNK_LOGITS // max(columns, 1))
    if step >= rows:
        return chunk(0, rows, *args)[0]
    again: Callable[..., tuple[Tensor]] = autograd.recomputed  # type: ignore[assignment]
    if torch.compiler.is_compiling():
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    parts = [again(chunk, first, min(first + step, rows), *args)[0] for first in range(0, rows, step)]
    return torch.cat(parts)
