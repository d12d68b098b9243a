"""The gradient of the engine: which kernels give it."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from .. import configs
from ..problem import Contrast
from .gradient_chunks import chunk_gradients
from .gradient_combine import combine
from .gradient_rows import Owners, row_gradients
from .gradient_terms import terms


def atomics_allowed() -> bool:
    """CL_KERNELS_ATOMICS=1: gradients of q with itself in fewer operations, by additions in any order; not
    under `torch.use_deterministic_algorithms(True)`."""
    if torch.are_deterministic_algorithms_enabled():
        return False
    return os.environ.get("CL_KERNELS_ATOMICS", "0") not in ("", "0")


class Incoming(NamedTuple):
    """The gradients of a forward's results, [N] or [M] float64, None for zeros."""

    lse: Tensor | None
    lse_cols: Tensor | None
    positive_sum: Tensor | None


class Needs(NamedTuple):
    """The gradients that are asked for."""

    q: bool
    k: bool
    scale: bool
    bias: bool


def gradient(
    incoming: Incoming,
    problem: Contrast,
    lse: Tensor,
    lse_cols: Tensor,
    needs: Needs,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_q, grad_k, grad_scale, grad_key_bias of the `contrastive_backward` op (ops.py); the first two
    in `dtype`, by default that of q."""
    q, k, scale = problem.q, problem.keys, problem.scale
    width = q.shape[1]
    fused = width <= configs.widest("gradient_rows", q)
    self_keys = problem.k is None
    # G + G^T in one pass; a bias or both axes make the two differ by more than their labels and positives.
    mirrored = self_keys and problem.mirrored and not needs.bias

    if not fused:
        kernel = "gradient_tiles"
    elif mirrored and atomics_allowed() and width <= configs.widest("gradient_triangle", q):
        kernel = "gradient_triangle"
    else:
        kernel = "gradient_rows"

    bound = largest = None
    if q.dtype == torch.float16:
        bound = q.new_zeros(1, dtype=torch.float32)
        if problem.positive_mask is not None:
            largest = _largest(problem.positive_mask)
    unit = None if fused else bound  # of parts; the fused kernel takes it off itself
    block = configs.shape(kernel, q, width, problem.positives).block_n
    rows = terms(problem, lse, incoming.lse, incoming.positive_sum, block, bound, largest)
    if mirrored:
        both = Owners(problem, rows, rows, bound)
        if fused:
            parts = row_gradients(both, triangle=kernel == "gradient_triangle")[0]
        else:
            parts = chunk_gradients(both, into_rows=True, into_columns=False, bias=False)[0]
        grad, along = combine(parts, q, scale, (needs.q, needs.scale), unit, dtype, share=0.5)
        return grad, _nothing(q), along, _nothing(q)
    cols = terms(problem, lse_cols, incoming.lse_cols, None, block, bound, columns=True)
    owners = Owners(problem, rows, cols, bound)
    into_q = needs.q or (needs.scale and not needs.k)  # one of them, for the gradient of the scale
    into_k = needs.q if self_keys else needs.k
    if fused:
        by_rows = row_gradients(owners)[0] if into_q else _nothing(q)
        by_cols, bias = _nothing(q), _nothing(q)
        if into_k or needs.bias:
            by_cols, bias = row_gradients(owners.transposed(), features=into_k, bias=needs.bias)
            bias = bias.sum(0) if needs.bias else bias
    else:
        by_rows, by_cols, bias = chunk_gradients(
            owners, into_rows=into_q, into_columns=into_k, bias=needs.bias
        )
    if self_keys and into_q and into_k:
        parts = torch.cat([by_rows, by_cols])
        grad, along = combine(parts, q, scale, (needs.q, needs.scale), unit, dtype, share=0.5)
        return grad, _nothing(q), along, bias
    grad_q, grad_k, along = _nothing(q), _nothing(q), _nothing(q)
    if into_k:
        grad_k, along = combine(by_cols, k, scale, (needs.k, needs.scale and not into_q), unit, dtype)
    if into_q:
        grad_q, along = combine(by_rows, q, scale, (needs.q, needs.scale), unit, dtype)
    return grad_q, grad_k, along, bias


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)


def residual(problem: Contrast, lse: Tensor) -> Tensor:
    """(P - W) k [N, D], float32, of features too wide for `lse_frozen`."""
    ones = torch.ones_like(lse)
    q = problem.q
    bound = q.new_zeros(1, dtype=torch.float32) if q.dtype == torch.float16 else None
    weights = None if problem.positive_index is None else -ones
    block = configs.shape("gradient_tiles", q, q.shape[1], problem.positives).block_n
    rows = terms(problem, lse, ones, weights, block, bound)
    owners = Owners(problem, rows, terms(problem, lse, None, None, block, None, columns=True), bound)
    parts, _, _ = chunk_gradients(owners, into_rows=True, into_columns=False, bias=False)
    return combine(parts, q, lse.new_ones((), device="cpu"), (True, False), bound, torch.float32)[0]


def _largest(mask: Tensor) -> Tensor:
    """The largest magnitude of a mask's weights, [] float32, on its device."""
    if mask.dtype == torch.bool:
        return mask.new_ones((), dtype=torch.float32)
    low, high = mask.aminmax()
    return torch.maximum(high.float(), -low.float())
