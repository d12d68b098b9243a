"""Which backend serves an op: the choice by name, the reasons why one cannot serve, and the call itself.

Under "auto" PyTorch's dispatcher picks: a compiled kernel where there is one, else the chunked reference. For
GPU tensors `serve` picks, and passes over what cannot be launched: by `SERVING`, read from the top, of which
the first row that fits decides. Triton serves by default; CUDA C++ only where a row says that both ran on a
GPU of that kind and it was faster: `python -m cl_kernels tune --serving` prints such rows.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import typing
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import chunked, configs, extension, ops
from .dtypes import full_precision

Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]
BACKENDS: tuple[str, ...] = typing.get_args(Backend)

_GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot serve; the message says why."""


@functools.lru_cache(1024)
def _decided(op_name: str, case: Case, device: torch.device, dtype: torch.dtype) -> str:
    for backend in dict.fromkeys((row_for(case).backend, "triton")):
        launches = (backend, case) not in _exhausted
        if launches and obstacle(backend, device, op_name, dtype) is None:
            return backend
    return "reference"


def forget_decisions() -> None:
    """Decide anew from now on: what can serve has changed."""
    _decided.cache_clear()


def _checked(name: object, source: str) -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


def _checked_and_ready(name: object, source: str) -> str:
    checked = _checked(name, source)
    if checked == "cuda":
        extension.cuda.require()
        forget_decisions()
    return checked


_unsuited: dict[int, str | None] = {}


def _triton_unsuited(index: int) -> str | None:
    """Why Triton's kernels do not run on this GPU, or None."""
    if index not in _unsuited:
        _unsuited[index] = configs.unsuited(configs.gpu(index).architecture)
    return _unsuited[index]


_backend = _checked_and_ready(os.environ.get("CL_KERNELS_BACKEND") or "auto", "CL_KERNELS_BACKEND")


class use_backend:
    """Choose the backend of all losses, from now on or for a `with` block.

        cl_kernels.use_backend("reference")            # from now on
        with cl_kernels.use_backend("cpu"): ...        # inside, then back to what it was

    "auto" takes the fastest backend that can serve; "reference" is plain PyTorch in row chunks; "cpu" is the
    compiled extension; "triton" and "cuda" run on GPUs, the former under Triton's interpreter
    (TRITON_INTERPRET=1) on the CPU as well, for tests. In a source checkout where the CUDA kernels were not
    built, "cuda" compiles them. A backend asked for by name that cannot serve a call raises `BackendError`
    there. The choice is the whole process's, and a backward keeps the backend of its forward. The environment
    variable CL_KERNELS_BACKEND sets the initial choice. Raises `ValueError` for an unknown name.
    """

    def __init__(self, name: Backend) -> None:
        global _backend
        self._previous = _backend
        _backend = _checked_and_ready(name, "backend")
        if name == "triton" and ops.has_triton() and torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):  # before a compiled graph asks about them
                _triton_unsuited(index)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        global _backend
        _backend = self._previous


def requested() -> str:
    """The backend that is asked for now."""
    return _backend


def restricts_by_mask(tensor: Tensor) -> bool:
    """Whether the engine on tensors like this one takes a mask for denominators: not on GPUs."""
    return _backend in ("cpu", "reference") or (_backend == "auto" and not tensor.is_cuda)


def obstacle(
    backend: str,
    device: str | torch.device,
    op_name: str | None = None,
    dtype: torch.dtype | None = None,
) -> str | None:
    """Why `backend` cannot serve tensors of this device (and this op and dtype), or None."""
    device = torch.device(device)
    if backend == "cpu":
        return _cpu_obstacle(device, op_name)
    if backend not in ("triton", "cuda"):
        return None
    if backend == "triton" and not ops.has_triton():
        return "the package triton is not installed"
    on_cpu = interpreted() if backend == "triton" else bool(extension.cuda.emulated_ops)
    if device.type != "cuda" and not (device.type == "cpu" and on_cpu):
        return f"takes GPU tensors, not {device.type} tensors"
    if dtype is not None and dtype not in _GPU_DTYPES:
        return f"takes float16, bfloat16 and float32, not {dtype}"
    if backend == "cuda":
        return _cuda_obstacle(device, op_name)
    return _triton_unsuited(_index(device)) if device.type == "cuda" else None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _cpu_obstacle(device: torch.device, op_name: str | None) -> str | None:
    if extension.cpu.module is None:
        return extension.cpu.missing_because
    if device.type != "cpu":
        return f"takes CPU tensors only, not {device.type} tensors"
    if op_name is not None and op_name not in extension.cpu.ops:
        return f"the compiled extension has no kernel for {op_name}"
    return None


def _cuda_obstacle(device: torch.device, op_name: str | None) -> str | None:
    if device.type == "cuda" and torch.version.hip is not None:
        return "takes NVIDIA GPUs, not AMD GPUs"
    if device.type == "cuda" and extension.cuda.module is None:
        return extension.cuda.missing_because
    compiled = extension.cuda.emulated_ops if device.type == "cpu" else extension.cuda.ops
    if op_name is not None and op_name not in compiled:
        return f"the compiled extension has no kernel for {op_name}"
    if device.type == "cpu":
        return None
    return extension.cuda.unsuited(_index(device))


def makes_whole_losses(x: Tensor) -> bool:
    """Whether the CPU extension's ops of whole losses serve tensors like this one."""
    return x.device.type == "cpu" and _backend in ("auto", "cpu") and extension.cpu.module is not None


def makes_losses_of_rows(x: Tensor) -> bool:
    """Whether the kernels of a GPU serve tensors like this one, eagerly, and a loss of their statistics."""
    if torch.compiler.is_compiling():  # Inductor fuses the arithmetic of rows
        return False
    on_gpu = x.device.type == "cuda" and x.dtype in _GPU_DTYPES and _backend == "auto"
    return on_gpu or _backend in ("triton", "cuda")


def of_rows(name: str, backend: str, *args: Any) -> Any:
    """A function of rows by Triton's kernel, or where that cannot serve in plain PyTorch: `row_losses`,
    `key_losses`, `unit_rows`, `unit_rows_gradient`."""
    x = args[0] if isinstance(args[0], Tensor) else args[0].q
    suited = x.device.type == "cuda" and ops.has_triton() and _triton_unsuited(_index(x.device)) is None
    if backend == "interpreter" or suited:
        with torch.cuda.device_of(x):
            return triton_op(name)(*args)
    return getattr(chunked, name)(*args)


def interpreted() -> bool:
    """Whether Triton kernels run under its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def select(op_name: str, tensor: Tensor) -> str:
    """The backend for an op on tensors like this one: the one asked for, or `BackendError`."""
    reason = obstacle(_backend, tensor.device, op_name, tensor.dtype)
    if reason is not None:
        raise BackendError(f"backend {_backend!r} cannot serve {op_name} here: {reason}")
    return "interpreter" if _backend == "triton" and tensor.device.type == "cpu" else _backend


class Case(NamedTuple):
    """A kind of call, as far as the table of serving backends tells them apart."""

    op: str  # without forward or backward
    variant: str  # of VARIANTS
    kind: str  # of dtype: "half", "float32"
    chip: str  # sm_89, not the sm_80 whose launch shapes it has
    width: int


class Serving(NamedTuple):
    """Which backend serves an op; `ANY` fits all. A row for "cuda" counts only if its basis is "measured"."""

    op: str
    variant: str
    kind: str
    chip: str
    widest: int | None  # features, at most
    backend: str  # "cuda", "triton"
    basis: str  # "measured", "default"

    @property
    def counts(self) -> bool:
        return self.backend != "cuda" or self.basis == "measured"

    def fits(self, case: Case) -> bool:
        narrow_enough = case.width <= (self.widest or case.width)
        fixed = zip(self[:4], case[:4], strict=True)
        return self.counts and narrow_enough and all(wanted in (ANY, got) for wanted, got in fixed)


ANY = "any"
VARIANTS = {
    # One axis of q with itself, of unfrozen keys; both axes; keys that get no gradient.
    "contrastive": ("self", "keys", "both axes", "frozen keys", "transposed"),
    "soft_target": ("plain", "transposed"),
    "dimcl": ("plain", "transposed"),
    "similarity": ("plain", "transposed"),
    "masked_log_softmax": ("plain",),
}
"""Kinds of an op that backends run differently; transposed: the stride along the features is not 1."""

SERVING = (
    # op, variant, kind of dtype, chip, widest, backend, basis
    Serving(ANY, ANY, ANY, ANY, None, "triton", "default"),
)


def row_for(case: Case) -> Serving:
    """The row of SERVING that decides."""
    return next(row for row in SERVING if row.fits(case))


def rows_for(op: str, chip: str) -> list[Serving]:
    """The rows of SERVING that can decide for an op on a chip."""
    rows = []
    for row in SERVING:
        if row.counts and row.op in (ANY, op) and row.chip in (ANY, chip):
            rows.append(row)
            if (row.variant, row.kind, row.widest) == (ANY, ANY, None):
                break
    return rows


_exhausted: dict[tuple[str, Case], str] = {}
"""Why a backend that should have served a case could not be launched."""


@functools.cache
def _parameters(op_name: str) -> tuple[str, ...]:
    schema = getattr(getattr(torch.ops, ops.NAMESPACE), op_name).default._schema
    return tuple(argument.name for argument in schema.arguments)


def _case(op_name: str, args: Sequence[Any]) -> tuple[Case, Tensor]:
    """The case of a call, the same for an op's forward and backward, which must see the same logits; and the
    features that its work is sized by."""
    given = dict(zip(_parameters(op_name), args, strict=True))
    features = next(given[name] for name in ("q", "z0", "logits", "output") if name in given)
    op, kind, chip = _family(op_name), configs.dtype_kind(features.dtype), configs.device_of(features).chip
    return Case(op, _variant(op, given), kind, chip, features.shape[1]), features


def _family(op_name: str) -> str:
    return op_name.removesuffix("_forward").removesuffix("_backward")


def _variant(op: str, given: dict[str, Any]) -> str:
    """The kind of an op, by the arguments of its forward or backward."""
    matrices = [given.get(name) for name in ("q", "k", "z0", "z1")]
    tensors = [x for x in matrices if isinstance(x, Tensor)]
    if any(x.stride(1) != 1 and x.shape[1] > 1 for x in tensors):
        return "transposed"
    if op != "contrastive":
        return "plain"
    if given["both_axes"]:
        return "both axes"
    if given["k"] is None:
        return "self"
    saved = given["save_gradient"] if "save_gradient" in given else given["residual"].numel() > 0
    return "frozen keys" if saved else "keys"


def serving(op_name: str, args: Sequence[Any]) -> str:
    """The backend that serves an op on GPU tensors under "auto": the table's, else Triton, else the chunked
    reference."""
    case, features = _case(op_name, args)
    return _decided(op_name, case, features.device, features.dtype)


def serve(op_name: str, *args: Any) -> Any:
    """Run an op on GPU tensors under "auto".

    A backend that asks for more than the GPU has is passed over from then on, for the forward and the
    backward of such cases. Where it is the backward that does not launch, the next backend finishes it
    from the statistics that the forward saved, which mean the same to all; the logits that it recomputes
    differ from the forward's by their rounding, this once.
    """
    case, features = _case(op_name, args)
    while True:
        backend = _decided(op_name, case, features.device, features.dtype)
        try:
            return implementation(op_name, backend)(*args)
        except Exception as error:
            if backend == "reference" or not _lacks_resources(error):
                raise
            reason = " ".join(str(error).split())
            _exhausted[backend, case] = reason
            forget_decisions()
            warnings.warn(
                f"{backend} cannot launch {op_name} for {case.variant} {case.kind} features of width "
                f"{case.width} on {case.chip} ({reason}): "
                f"{serving(op_name, args)} serves them",
                RuntimeWarning,
                stacklevel=2,
            )


def _by_triton(op_name: str, *args: Any) -> Any:
    with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
        return triton_op(op_name)(*args)


ops.on_gpus(serve, _by_triton)


def _lacks_resources(error: Exception) -> bool:
    """Whether a kernel was not launched because it takes more registers, threads or shared memory than the
    GPU has: Triton's own error, CUDA's, or that of csrc/cuda/launch.h."""
    if type(error).__name__ == "OutOfResources":
        return True
    messages = ("too many resources requested for launch", "raising the limit of shared memory")
    return isinstance(error, RuntimeError) and any(message in str(error) for message in messages)


def triton_op(op_name: str) -> Callable[..., Any]:
    """The Triton implementation of an op, imported with Triton when first called."""
    return getattr(importlib.import_module(".triton.entry_points", __package__), op_name)


def implementation(op_name: str, backend: str) -> Callable[..., Any]:
    """An op by one backend: a registered op, or plain PyTorch."""
    if backend == "reference":
        return getattr(chunked, op_name)
    if backend == "interpreter":
        return triton_op(op_name)
    if backend == "triton":
        return getattr(torch.ops.cl_kernels_triton, op_name)
    if backend == "cuda":
        return getattr(torch.ops.cl_kernels_cuda, op_name)
    return getattr(torch.ops.cl_kernels, op_name)


@full_precision
def call(op_name: str, backend: str, *args: Any) -> Any:
    """Run an op on a selected backend. The backward passes on the backend that its forward selected."""
    run = implementation(op_name, backend)
    if backend in ("auto", "reference", "cpu") or torch.compiler.is_compiling():
        return run(*args)
    try:
        return run(*args)
    except Exception as error:
        if not _lacks_resources(error):
            raise
        reason = " ".join(str(error).split())
        raise BackendError(f"backend {backend!r} cannot serve {op_name} here: {reason}") from error


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
    if device == "cpu":
        for backend, tool in (("triton", "Triton's interpreter"), ("cuda", "the emulator")):
            if obstacles[backend] is None:
                obstacles[backend] = f"serves CPU tensors by name only, under {tool}"
    rows: list[Serving] = []
    if device == "cuda" and obstacles["cuda"] is None:
        rows = rows_for(_family(op), configs.gpu(torch.cuda.current_device()).chip)
        if all(row.backend != "cuda" for row in rows):
            obstacles["cuda"] = "serves by name only: no row of SERVING has measured it to be faster"
    able = [backend for backend in compiled if obstacles[backend] is None]
    reasons: dict[str, list[str]] = {}
    for backend, reason in obstacles.items():
        if reason is not None:
            reasons.setdefault(reason, []).append(backend)
    why = [f"{', '.join(who)}: {reason}" for reason, who in reasons.items()]
    if "cuda" in able:
        rows = [row for row in rows if obstacles[row.backend] is None]
        why = [_cases(list(part)) for _, part in itertools.groupby(rows, lambda row: row[-2:])] + why
        return Row(op, device, ", ".join(dict.fromkeys(row.backend for row in rows)), "; ".join(why))
    return Row(op, device, able[0] if able else "reference", "; ".join(why))


def _cases(rows: Sequence[Serving]) -> str:
    """Rows of one backend, in words."""
    cases = []
    for row in rows:
        words = [word for word in (row.kind, row.variant) if word != ANY]
        words += [] if row.widest is None else [f"up to {row.widest} features"]
        cases.append(" ".join(words) or "the rest")
    return f"{rows[0].backend} for {', '.join(cases)} ({rows[0].basis})"
