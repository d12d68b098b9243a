"""The dtypes that PyTorch's own operations would have made of the inputs, and a loss must have."""

from __future__ import annotations

import torch
from torch import Tensor

from ._swap import Unfused


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """That in which autocast multiplies `x`; None: as it comes."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def product_dtype(x: Tensor) -> torch.dtype:
    """That of products of `x`."""
    return autocast_dtype(x) or x.dtype


def cross_entropy_dtype(x: Tensor) -> torch.dtype:
    """That of a cross-entropy over products of `x`, which autocast takes in float32."""
    return x.dtype if autocast_dtype(x) is None else torch.float32


def logsumexp_dtype(x: Tensor) -> torch.dtype:
    """That of a log-sum-exp of products of `x`, which autocast takes in float32 but for CPUs."""
    lower = autocast_dtype(x)
    if lower is None:
        return x.dtype
    return lower if x.device.type == "cpu" else torch.float32


def promoted(dtype: torch.dtype, *others: float | Tensor) -> torch.dtype:
    """That of rows of `dtype` after arithmetic with `others`: numbers and 0-dim tensors do not change it."""
    for other in others:
        if isinstance(other, Tensor) and other.dim() > 0:
            dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def same_dtypes(first: str, x: Tensor, second: str, y: Tensor) -> None:
    """Refuse what PyTorch does not multiply: two dtypes, unless autocast makes one of them."""
    if x.dtype != y.dtype and (autocast_dtype(x) is None or autocast_dtype(y) is None):
        raise Unfused(f"{first} and {second} are of different dtypes")
