"""Which backend serves an op: the choice by name, the reasons why one cannot serve, and the call itself.

Under "auto" PyTorch's dispatcher picks: a compiled kernel where there is one, else the chunked reference.
"""

from __future__ import annotations

import os
import typing
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cl_kernels import chunked, extension, ops
from cl_kernels.validation import full_precision

Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]
BACKENDS: tuple[str, ...] = typing.get_args(Backend)

_NOT_BUILT = "not part of this build of cl_kernels yet"
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot serve; the message says why."""


def _checked(name: object, source: str) -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_backend = _checked(os.environ.get("CL_KERNELS_BACKEND") or "auto", "CL_KERNELS_BACKEND")


class use_backend:
    """Choose the backend of all losses, from now on or for a `with` block.

        cl_kernels.use_backend("reference")            # from now on
        with cl_kernels.use_backend("cpu"): ...        # inside, then back to what it was

    "auto" takes the fastest backend that can serve; "reference" is plain PyTorch in row chunks; "cpu" is the
    compiled extension; "triton" runs on GPUs (and under Triton's interpreter, with TRITON_INTERPRET=1, on the
    CPU, for tests); "cuda" is reserved. A backend asked for by name that cannot serve a call
    raises `BackendError` there. The choice is the whole process's, and a backward keeps the backend of its
    forward. The environment variable CL_KERNELS_BACKEND sets the initial choice. Raises `ValueError` for an
    unknown name.
    """

    def __init__(self, name: Backend) -> None:
        global _backend
        self._previous = _backend
        _backend = _checked(name, "backend")

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        global _backend
        _backend = self._previous


def requested() -> str:
    """The backend that is asked for now."""
    return _backend


def obstacle(
    backend: str, device_type: str, op_name: str | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """Why `backend` cannot serve tensors of this device type (and this op and dtype), or None."""
    if backend == "cuda":
        return _NOT_BUILT
    if backend == "triton":
        if not ops.has_triton():
            return "the package triton is not installed"
        if device_type != "cuda" and not (device_type == "cpu" and interpreted()):
            return f"takes GPU tensors, not {device_type} tensors"
        if dtype is not None and dtype not in _TRITON_DTYPES:
            return f"takes float16, bfloat16 and float32, not {dtype}"
    if backend == "cpu":
        if not extension.is_loaded():
            return extension.missing_because
        if device_type != "cpu":
            return f"takes CPU tensors only, not {device_type} tensors"
        if op_name is not None and op_name not in extension.compiled_ops:
            return f"the compiled extension has no kernel for {op_name}"
    return None


def interpreted() -> bool:
    """Whether Triton kernels run under its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def select(op_name: str, tensor: Tensor) -> str:
    """The backend for an op on tensors like this one: the one asked for, or `BackendError`."""
    reason = obstacle(_backend, tensor.device.type, op_name, tensor.dtype)
    if reason is not None:
        raise BackendError(f"backend {_backend!r} cannot serve {op_name} here: {reason}")
    return "interpreter" if _backend == "triton" and tensor.device.type == "cpu" else _backend


@full_precision
def call(op_name: str, backend: str, *args: Any) -> Any:
    """Run an op on a selected backend. The backward passes on the backend that its forward selected."""
    if backend == "reference":
        return getattr(chunked, op_name)(*args)
    if backend == "interpreter":
        return ops.triton_op(op_name)(*args)
    return getattr(torch.ops.cl_kernels, op_name)(*args)


def require_engine(what: str) -> None:
    """Raise `BackendError` when a backend is asked for by name, for an option that only the reference has."""
    if _backend not in ("auto", "reference"):
        raise BackendError(
            f"backend {_backend!r} cannot serve {what}: it runs on the chunked reference only "
            "(backend 'auto' or 'reference')"
        )


class Row(NamedTuple):
    """One line of `python -m cl_kernels info`."""

    op: str
    device: str
    backend: str
    reason: str


def table() -> list[Row]:
    """Who serves which op on the devices of this machine, and why the other backends do not."""
    devices = ["cpu"]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        devices += [accelerator.type] if accelerator is not None else []
    return [_row(op, device) for op in ops.SCHEMAS for device in devices]


def _row(op: str, device: str) -> Row:
    compiled = ("cpu", "triton", "cuda")
    obstacles = {backend: obstacle(backend, device, op) for backend in compiled}
    if device == "cpu" and obstacles["triton"] is None:
        obstacles["triton"] = "serves CPU tensors by name only, under Triton's interpreter"
    serving = next((backend for backend in compiled if obstacles[backend] is None), "reference")
    reasons: dict[str, list[str]] = {}
    for backend, reason in obstacles.items():
        if reason is not None:
            reasons.setdefault(reason, []).append(backend)
    return Row(op, device, serving, "; ".join(f"{', '.join(who)}: {why}" for why, who in reasons.items()))
