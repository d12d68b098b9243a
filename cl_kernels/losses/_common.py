"""Pieces that several losses share."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_kernels import validation


def wide(scalar: float | Tensor, like: Tensor) -> float | Tensor:
    """A float as it is, a tensor in the accumulation dtype of `like`."""
    return scalar.to(validation.accumulate_dtype(like.dtype)) if isinstance(scalar, Tensor) else scalar


def inverse(temperature: float | Tensor, like: Tensor) -> float | Tensor:
    """1 / temperature, a tensor in the accumulation dtype of `like`."""
    temperature = wide(temperature, like)
    return temperature.reciprocal() if isinstance(temperature, Tensor) else 1.0 / temperature


def unit_rows(x: Tensor) -> Tensor:
    """Rows over their L2 norm, computed in at least float32; a zero row stays zero and gets no gradient."""
    rows = x.to(validation.accumulate_dtype(x.dtype))
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return (rows / norm.masked_fill(norm == 0, torch.inf)).to(x.dtype)


def own_similarity(q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
    """[N]: scale * q_i . k_i, summed in float32 (float64 for float64 inputs)."""
    dtype = validation.accumulate_dtype(q.dtype)
    return (q.to(dtype) * k.to(dtype)).sum(1) * scale


def reduced(rows: Tensor, how: str, like: Tensor, weight: Tensor | None = None) -> Tensor:
    """`validation.reduction` of losses made of statistics, in the accumulation dtype of `like`."""
    return validation.reduction(rows, how, weight).to(validation.accumulate_dtype(like.dtype))


def shown(value: float | Tensor | None) -> str:
    """A temperature or coefficient as `extra_repr` prints it."""
    return "None" if value is None else f"{value.item() if isinstance(value, Tensor) else value:g}"
