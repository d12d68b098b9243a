"""Dtypes of what is computed: features as they come, sums in float32 at least, statistics in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` with autocast off, so that a loss keeps the dtype of its inputs."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        for device_type in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device_type):
                with torch.autocast(device_type, enabled=False):
                    return wrapper(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, maxima and losses: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a row's log-sum-exp and sum over positives: float64, so that their difference in a
    converged row keeps its digits; float32 on a device without it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common floating-point dtype."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return tuple(x.to(dtype) for x in tensors)


def scalar_tensor(value: float | Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """A 0-dim tensor; a compiled graph serves every float."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype)
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.scalar_tensor(value, dtype=dtype, device=device)


def scalar_for(value: float | Tensor, features: Tensor) -> Tensor:
    """A 0-dim tensor in the accumulation dtype of `features`: a tensor where it is, a float on the CPU.

    In a compiled graph a float goes to the features' device: only what is all on a GPU is one CUDA graph."""
    beside = torch.compiler.is_compiling() and not isinstance(value, Tensor)
    return scalar_tensor(value, accumulate_dtype(features.dtype), features.device if beside else None)
