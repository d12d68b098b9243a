"""Compiles every kernel in every row of configs.TABLE ahead of time, without a GPU, and holds it to limits
and to the figures recorded in gates/triton.tsv. `make compile-gate` runs it.

The ops run on small CPU tensors as if on a device of each architecture, with Triton's launch replaced by a
recorder: it takes signature, constants and specialisation from Triton's own binder, so what is compiled is
what a GPU would compile for such tensors. The main case of each op in tests/op_cases.py is recorded in every
row of the table; the others, in half precision at one width, sizes that are odd or 1, float16 and lower
precisions of float32, on sm_90.

Compiled is what the file does not have: a launch that is new, or whose kernel's text, or a function's or
constant's that the text reaches, is not the one recorded. With another Triton than the file's everything is
compiled and held to the limits alone.

One line a compiled kernel:

    architecture, row of the table (name, kind of dtype, width), kernel, tile, warps x stages, flags, case
    registers a thread, bytes spilled to memory (+ scalar registers to vector registers, AMD), shared memory
    matrix   matrix instructions in the assembly: wgmma, mma (mma.sync), tcgen05 and mfma
    exp      exponential instructions (ex2.approx, v_exp_f32) in the assembly times threads, over the elements
             of a tile: exponentials an element where each branch of the assembly is taken once a tile
    hot      instructions on the hot path of the loop over tiles, of those in a loop inside, and in the whole
             loop (machine_code.py), of the kernels that issue_slots.counted names

It exits with 1 if a kernel spills more than a few bytes to memory (where wide loads are aligned), takes more
registers or shared memory than the chip has, lacks the matrix instructions of its architecture, or has a loop
over tiles of more issue slots or instructions than issue_slots.py allows, recorded figures or new ones; if
labels take more issue slots than it allows; if a kernel does not compile; if the file is not what was found;
if no op uses a row of the table; or if an op has no Triton implementation.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import issue_slots
import machine_code
import op_cases
import recorded
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from cl_kernels import chunked, configs, ops
from cl_kernels.problem import KeyLoss, KeyStats
from cl_kernels.triton import class_sums, launch


@dataclass(frozen=True)
class Chip:
    target: GPUTarget
    processors: int
    shared: int  # bytes a program may take
    registers: int  # a thread


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 108, 99 << 10, 255),  # the shared memory of sm_86 and sm_89
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 132, 227 << 10, 255),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 148, 227 << 10, 255),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 304, 64 << 10, 512),
}
OPTIONS_AT = 128  # the width at which options are varied
OPTIONS_ON = "sm_90"  # the architecture, which stands for all
ROWS, KEYS = 256, 512
ROWS_CASE = "rows"  # of key_losses.py, row_losses.py and unit_rows.py
ATOMICS = "atomics"
BY_CLASS, FEW_ROWS = "self, labels", ", few rows"  # the case that class_sums.FEWEST_ROWS is about
ODD_ROWS, ODD_WIDTH = "odd rows", "odd width"
# Sizes of 1, which Triton makes constants.
ONES = {
    "one row": op_cases.Sizes(1, KEYS, OPTIONS_AT),
    "one key": op_cases.Sizes(ROWS, 1, OPTIONS_AT),
    "one feature": op_cases.Sizes(ROWS, KEYS, 1),
    "ones": op_cases.Sizes(1, 1, 1),
}
# Features that no wide load is aligned to: must compile, and may spill. DimCL's are columns of so many rows.
UNALIGNED = (ODD_WIDTH, f"dimcl two views {ODD_ROWS}", "dimcl two views one row", "one feature", "ones")
HALF, SINGLE = torch.bfloat16, torch.float32

RECORDED = recorded.FOLDER / "triton.tsv"
COLUMNS = (
    "architecture", "row", "kernel", "tile", "launch", "flags", "case", "digest",
    "registers", "spilled", "scalars", "shared", "matrix", "exponentials", "hot", "inner", "loop",
)  # fmt: skip
WHAT = COLUMNS.index("digest") + 1


def new_record() -> recorded.Record:
    return recorded.Record(COLUMNS, WHAT, f"triton {triton.__version__}")


@dataclass(frozen=True)
class Launch:
    """A kernel as a launcher would have it compiled."""

    architecture: str
    row: tuple[str, str, int]  # of the table: name, kind of dtype, width
    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any  # CUDAOptions, HIPOptions
    asked: dict[str, Any]  # options that are not the backend's defaults
    case: str  # that asked for it first

    def arguments(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, type and path of each argument; of a tuple's items, a tuple's in it too: `q.stride_row`,
        `k_strides.1`."""
        for i, name in enumerate(self.kernel.arg_names):
            yield from _items(name, self.signature[name], (i,))

    @property
    def key(self) -> str:
        """The compiled code's inputs, but for numbers that are neither constants nor strides: whether a count
        of rows or groups is a multiple of 16 makes no other kernel."""
        types = {}
        for name, kind, path in self.arguments():
            if kind == "constexpr" or "stride" in name or kind[0] == "*":
                constant = self.constants.get(path, "variable")
                types[name] = (kind, constant, str(self.attributes.get(path)))
        code = (self.kernel.fn.__module__, self.kernel.fn.__qualname__)
        return repr((self.architecture, code, types, self.options))

    @property
    def digest(self) -> str:
        """Digest of the compiled code's inputs but its texts, in any order of arguments and options."""
        arguments = [
            f"{name}: {kind} {_written(self.constants.get(path, ''))} {self.attributes.get(path, '')}"
            for name, kind, path in self.arguments()
        ]
        asked = [f"{name}={value}" for name, value in self.asked.items()]
        return recorded.digest(
            [self.architecture, _full_name(self.kernel), *sorted(arguments), *sorted(asked)]
        )

    @property
    def source(self) -> str:
        return _full_name(self.kernel)

    @property
    def what(self) -> recorded.Cells:
        """The cells that say what is compiled."""
        options = self.options
        launch = f"{options.num_warps}x{options.num_stages}"
        if limit := self.asked.get("maxnreg"):
            launch += f" {limit}"
        row, tile = " ".join(map(str, self.row)), "x".join(map(str, self.tile))
        return (self.architecture, row, self.source, tile, launch, self.flags, self.case, self.digest)

    def named_constants(self) -> dict[str, Any]:
        """Constants by name; those in a named tuple by the names of its fields, in capitals."""
        found = {}
        for name, _, path in self.arguments():
            value = self.constants.get(path)
            if hasattr(value, "_asdict"):
                found |= {key.upper(): item for key, item in value._asdict().items()}
            elif path in self.constants:
                found[name] = value
        return found

    @property
    def tile(self) -> list[int]:
        sizes = self.named_constants()
        return [sizes[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D") if name in sizes]

    @property
    def flags(self) -> str:
        """Constants in capitals, but for tile sizes and what is off."""
        shown = []
        for name, value in self.named_constants().items():
            if (
                name.isupper()
                and not name.startswith("BLOCK")
                and value not in (False, None, "none", "all", "")
            ):
                shown.append(name.lower() if value is True else f"{name.lower()}={value}")
        return " ".join(shown)


@dataclass(frozen=True)
class Figures:
    registers: int
    spilled: int  # bytes of memory a thread
    scalars_spilled: int  # AMD: scalar registers kept in lanes of vector registers, not in memory
    shared: int
    matrix: dict[str, int]
    exponentials: int  # instructions
    multiplies: bool  # whether the kernel has products of tiles
    tiles: machine_code.Loop | None = None  # where the machine code is known and has such a loop

    @property
    def instructions(self) -> str:
        found = " ".join(f"{count} {name}" for name, count in self.matrix.items() if count)
        return found or ("none" if self.multiplies else "-")

    @property
    def cells(self) -> recorded.Cells:
        numbers = (self.registers, self.spilled, self.scalars_spilled, self.shared)
        tiles = machine_code.cells(self.tiles)
        return (*map(str, numbers), self.instructions, str(self.exponentials), *tiles)

    @staticmethod
    def of(cells: recorded.Cells) -> Figures:
        *numbers, instructions, exponentials, hot, inner, loop = cells
        words = instructions.split()
        matrix = {name: int(count) for count, name in zip(words[::2], words[1::2], strict=False)}
        tiles = None if loop == "-" else machine_code.Loop(int(hot), int(inner), int(loop))
        return Figures(*map(int, numbers), matrix, int(exponentials), instructions != "-", tiles)


# What a kernel's code is made from.


def _items(name: str, kind: Any, path: tuple[int, ...]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    if not isinstance(kind, tuple):
        yield name, kind, path
        return
    fields = getattr(kind, "_fields", range(len(kind)))
    for i, (field_name, item) in enumerate(zip(fields, kind, strict=True)):
        yield from _items(f"{name}.{field_name}", item, (*path, i))


def _full_name(function: Any) -> str:
    return f"{function.fn.__module__.rpartition('.')[2]}.{function.fn.__qualname__}"


def _written(value: Any) -> str:
    """A constant as text, the same in every process."""
    if isinstance(value, tl.constexpr):
        value = value.value
    if hasattr(value, "fn"):
        return _full_name(value)
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _reached(function: FunctionType, found: dict[str, str]) -> None:
    """Adds by name the texts of our functions, the fields of our named tuples and the constants that a
    kernel's names lead to, through our modules too; what a name of Triton's does is its version's."""
    names = set(function.__code__.co_names)
    values = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for module_name, module in list(values.items()):
        if isinstance(module, ModuleType) and not module.__name__.startswith("triton"):
            values |= {f"{module_name}.{name}": vars(module)[name] for name in names if name in vars(module)}
    for name, value in values.items():
        inner = getattr(value, "fn", None)
        if isinstance(inner, FunctionType):
            if not inner.__module__.startswith("triton."):
                _add(value, found)
        elif hasattr(value, "_fields"):
            found[f"{value.__module__}.{name}"] = repr(value._fields)
        elif isinstance(value, (tl.constexpr, bool, int, float, str)):
            found[f"{function.__module__}.{name}"] = _written(value)


def _add(function: Any, found: dict[str, str]) -> None:
    name = f"{function.fn.__module__}.{function.fn.__qualname__}"
    if name not in found:
        found[name] = recorded.code(textwrap.dedent(inspect.getsource(function.fn)), "#")
        _reached(function.fn, found)


@functools.cache
def source_digest(kernel: JITFunction) -> str:
    """Digest of a kernel's text, without comments' lines, and of all that it reaches."""
    found: dict[str, str] = {}
    _add(kernel, found)
    return recorded.digest(part for name in sorted(found) for part in (name, found[name]))


@dataclass
class Recorder:
    architecture: str
    launches: dict[str, Launch] = field(default_factory=dict)
    used: set[tuple[str, str, int]] = field(default_factory=set)
    missing: set[tuple[str, str, str]] = field(default_factory=set)  # keys that the table lacks
    row: tuple[str, str, int] = ("", "", 0)
    case: str = ""

    def record(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        backend = _backend(self.architecture)
        binder = _binder(kernel, backend)
        kwargs = {"debug": False, **kwargs}
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attributes = kernel._pack_args(
            backend, kwargs, bound, specialization, options
        )
        asked = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        found = Launch(
            self.architecture, self.row, kernel, signature, constants, attributes, options, asked, self.case
        )  # fmt: skip
        self.launches.setdefault(found.key, found)

    def shape(self, kernel: str, x: torch.Tensor, width: int, variant: str = "") -> configs.Shape:
        name, _, kind = key = configs.key(kernel, x, variant)
        rows = configs.TABLE[key]
        self.row = (name, kind, configs.wide_enough(rows, width))
        self.used.add(self.row)
        return rows[self.row[2]]


@functools.cache
def _backend(architecture: str) -> Any:
    return make_backend(CHIPS[architecture].target)


@functools.cache
def _binder(kernel: JITFunction, backend: Any) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, backend)


@contextmanager
def recording(architecture: str) -> Iterator[Recorder]:
    """Kernels are recorded instead of launched, as on a device of this architecture."""
    recorder = Recorder(architecture)
    device = configs.Device(architecture, CHIPS[architecture].processors, architecture)

    def run(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        recorder.record(kernel, *args, **kwargs)

    def product(a: torch.Tensor, b: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32) if onto is None else onto

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(launch, "mm_float32", product),
        mock.patch.object(configs, "device_of", lambda x: device),
        mock.patch.object(configs, "shape", recorder.shape),
    ):
        yield recorder


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    yield
    torch.set_float32_matmul_precision(before)


def _run(case: op_cases.Case, implementation: ModuleType) -> None:
    """The forward and the backward of a case; a backward without kernels yet is left to the reference."""

    def call(name: str, *args: Any) -> Any:
        return getattr(implementation, name, getattr(chunked, name))(*args)

    # A scale on the device is an argument as it is; one on the CPU is a number.
    as_on_device = mock.patch.object(launch, "scalar", lambda x: x)
    if case.device_scale:
        with as_on_device:
            case.run(call)
    else:
        case.run(call)


@dataclass(frozen=True)
class Problem:
    sizes: op_cases.Sizes
    dtype: torch.dtype
    rank: int  # up to which cases are compiled
    special: str = ""
    precision: str = "highest"  # of float32


def problems(architecture: str) -> Iterator[Problem]:
    known = {
        width for (_, where, _), rows in configs.TABLE.items() if where == architecture for width in rows
    }
    varied = architecture == OPTIONS_ON
    for width in sorted(known | {OPTIONS_AT}):
        sizes = op_cases.Sizes(ROWS, KEYS, width) if width <= 512 else op_cases.Sizes(64, 128, width)
        yield Problem(sizes, HALF, 2 if varied and width == OPTIONS_AT else 0)
        yield Problem(sizes, SINGLE, 0)
        yield Problem(sizes, HALF, 0, ATOMICS)
        yield Problem(sizes, SINGLE, 0, ATOMICS)
    yield Problem(ONES["ones"], HALF, 2 if varied else 0, "ones")
    if not varied:
        return
    for name, sizes in ONES.items():
        yield Problem(sizes, HALF, 1, name)
    yield Problem(ONES["ones"], SINGLE, 1, "ones")
    even = op_cases.Sizes(ROWS, KEYS, OPTIONS_AT)
    yield Problem(op_cases.Sizes(ROWS - 3, KEYS - 5, OPTIONS_AT), HALF, 0, ODD_ROWS)
    yield Problem(op_cases.Sizes(ROWS - 3, KEYS - 5, OPTIONS_AT - 1), HALF, 0, ODD_WIDTH)
    yield Problem(even, torch.float16, 0, "float16")
    yield Problem(even, SINGLE, 0, "tf32", "high")
    yield Problem(even, SINGLE, 0, "bfloat16 products", "medium")


def record(architecture: str, implementation: ModuleType, match: str = "") -> Recorder:
    """All launches of all ops on an architecture, in every row of the table."""
    with recording(architecture) as recorder:
        for problem in problems(architecture):
            atomics = {"CL_KERNELS_ATOMICS": "1" if problem.special == ATOMICS else "0"}
            with matmul_precision(problem.precision), mock.patch.dict(os.environ, atomics):
                for case in op_cases.cases(problem.sizes, problem.dtype):
                    there = hasattr(implementation, f"{case.op}_forward")
                    if there and match in case.op and case.rank <= problem.rank:
                        _record(recorder, case, problem.special, implementation)
            if hasattr(implementation, "row_losses") and match in ROWS_CASE:
                _record_rows(recorder, problem, implementation)
    return recorder


def _record(recorder: Recorder, case: op_cases.Case, special: str, implementation: ModuleType) -> None:
    """The launches of a case as of many rows, and where it differs, of as few as it has."""
    for few, fewest in (("", 1), (FEW_ROWS, class_sums.FEWEST_ROWS)):
        recorder.case = f"{case.op} {case.variant}{few} {special}".strip()
        try:
            with mock.patch.object(class_sums, "FEWEST_ROWS", fewest):
                _run(case, implementation)
        except KeyError as error:
            recorder.missing.add(error.args[0])
        if case.variant != BY_CLASS:
            return


def _record_rows(recorder: Recorder, problem: Problem, implementation: ModuleType) -> None:
    """The launches around the engine, of no row of the table: rows brought to unit length, and losses made of
    their statistics."""
    sizes, varied = problem.sizes, problem.rank == 2
    recorder.row = (ROWS_CASE, configs.dtype_kind(problem.dtype), sizes.d)
    recorder.case = f"{ROWS_CASE} {problem.special}".strip()
    x = torch.randn(sizes.n, sizes.d).to(problem.dtype)
    for rows in (x, x.T.contiguous().T) if varied else (x,):
        _, rnorm = implementation.unit_rows(rows)
        implementation.unit_rows_gradient(x, rows, rnorm)
    lse = torch.zeros(sizes.n, dtype=torch.float64)
    either = (False, True)
    for axes, positives, mean, drop, at_least_zero in itertools.product(either, repeat=5):
        if varied or (positives and mean and at_least_zero and not drop):
            of_positives = lse if positives else lse[:0]
            given = (lse, lse if axes else lse[:0], of_positives, of_positives)
            implementation.row_losses(*given, 1.0, mean, mean and drop, at_least_zero)
    for beside, target, zero, needs_q, needs_scale in itertools.product(either, repeat=5):
        usual = beside and needs_q and not (zero or needs_scale)
        if not (usual or (varied and target >= zero)):
            continue
        loss, stats = _keys_and_statistics(x, lse, beside, target, needs_q or needs_scale)
        loss = loss._replace(positive_is_zero=zero)
        implementation.key_losses(loss, stats, True, (needs_q, needs_scale))
        if needs_scale:  # as where it is learned on the device
            with mock.patch.object(launch, "scalar", lambda x: x):
                implementation.key_losses(loss, stats, True, (needs_q, needs_scale))


def _keys_and_statistics(
    x: torch.Tensor, lse: torch.Tensor, beside: bool, target: bool, gradient: bool
) -> tuple[KeyLoss, KeyStats]:
    """A loss over keys and statistics of its rows."""
    scale, index = torch.tensor(2.0), torch.arange(x.shape[0])
    own, positive = (x, None) if beside else (None, index)
    problem = KeyLoss(x, [x], x if target else None, scale, own=own, positive=positive)
    mean = torch.zeros(x.shape) if gradient else torch.zeros(0)
    stats = KeyStats(lse, lse[:0] if beside else lse, mean)
    if not target:
        return problem, stats
    stats = stats._replace(target_lse=lse, cross=lse, target_mean=mean)
    return problem._replace(target_scale=scale, coeff=torch.tensor(0.5)), stats


# Figures of a compiled kernel


def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _dump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), f"--dump-{what}", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and local memory by cuobjdump: REG, STACK, LOCAL and more."""
    text = _dump(cubin, "resource-usage")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def _tile_loop(cubin: bytes) -> machine_code.Loop | None:
    ((_, code),) = machine_code.functions(_dump(cubin, "sass"))
    return machine_code.tile_loop(code)


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def figures(compiled: Any, counted: bool) -> Figures:
    assembly, shared = compiled.asm, compiled.metadata.shared
    multiplies = "tt.dot" in assembly["ttir"]
    if "cubin" in assembly:
        ptx, resources = assembly["ptx"], _resources(assembly["cubin"])
        matrix = {
            "wgmma": _count(r"\bwgmma\.mma_async", ptx),
            "mma": _count(r"\bmma\.sync", ptx),
            "tcgen05": _count(r"\btcgen05\.mma", ptx),
        }
        spilled = resources["STACK"] + resources["LOCAL"]
        exponentials = _count(r"\bex2\.approx", ptx)
        tiles = _tile_loop(assembly["cubin"]) if counted else None
        return Figures(resources["REG"], spilled, 0, shared, matrix, exponentials, multiplies, tiles)
    amdgcn = assembly["amdgcn"]

    def metadata(name: str) -> int:
        return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", amdgcn))

    spilled = max(4 * metadata("vgpr_spill_count"), metadata("private_segment_fixed_size"))
    matrix = {"mfma": _count(r"\bv_mfma", amdgcn)}
    exponentials = _count(r"\bv_exp_f32", amdgcn)
    registers, scalars = metadata("vgpr_count"), metadata("sgpr_spill_count")
    return Figures(registers, spilled, scalars, shared, matrix, exponentials, multiplies)


def wanted_instructions(found: Launch) -> tuple[str, ...]:
    """Instructions of which a kernel with products has one at least: half tiles of the 64 rows that the
    widest instruction of their chip takes must use it."""
    if found.architecture == "gfx942":
        return ("mfma",)
    widest = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(found.architecture)
    if widest is None or found.row[1] != "half" or min(found.tile[:1], default=0) < 64:
        return ("wgmma", "mma", "tcgen05")
    return (widest,)


def faults(found: Launch, measured: Figures) -> list[str]:
    chip, reasons = CHIPS[found.architecture], []
    if measured.spilled > recorded.SPILLS_ALLOWED and not found.case.endswith(UNALIGNED):
        reasons.append("spills")
    if measured.registers > chip.registers:
        reasons.append(f"registers over {chip.registers}")
    if measured.shared > chip.shared:
        reasons.append(f"shared memory over {chip.shared}")
    wanted = wanted_instructions(found)
    if measured.multiplies and not any(measured.matrix.get(name) for name in wanted):
        reasons.append(f"no {' or '.join(wanted)}")
    row = dict(zip(COLUMNS, (*found.what, *measured.cells), strict=True))
    return reasons + issue_slots.faults(row)


def _name(found: Launch) -> str:
    name, kind, width = found.row
    tile, options = "x".join(map(str, found.tile)), found.options
    return " | ".join(
        [
            f"{found.architecture:<6} {name} {kind} {width}",
            found.kernel.fn.__name__.strip("_"),
            f"{tile} {options.num_warps}x{options.num_stages} {found.flags} ({found.case})",
        ]
    )


def _message(error: BaseException) -> str:
    """The innermost error's, which tells most."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


def line(found: Launch, measured: Figures, reasons: list[str]) -> str:
    exponentials = []
    if measured.exponentials and len(found.tile) > 1:
        threads = found.options.num_warps * CHIPS[found.architecture].target.warp_size
        exponentials = [f"exp {measured.exponentials * threads / (found.tile[0] * found.tile[1]):.2f}"]
    scalars = f"+{measured.scalars_spilled}s" if measured.scalars_spilled else ""
    figure = f"reg {measured.registers} spill {measured.spilled}{scalars} shared {measured.shared}"
    hot = [f"hot {' '.join(machine_code.cells(measured.tiles))}"] if measured.tiles else []
    shown = " | ".join([_name(found), figure, f"matrix {measured.instructions}", *exponentials, *hot])
    return shown + (f"   <-- FAIL: {', '.join(reasons)}" if reasons else "")


# The pool: workers are forked, so that kernels need not be pickled.

_work: list[Launch] = []


def _compile(index: int) -> Figures | str:
    """The figures, or why there are none."""
    found = _work[index]
    source = ASTSource(found.kernel, found.signature, found.constants, found.attributes)
    try:
        target = CHIPS[found.architecture].target
        compiled = triton.compile(source, target=target, options=found.options.__dict__)
        return figures(compiled, issue_slots.counted(found.architecture, found.row[1], found.source))
    except Exception as error:
        return _message(error)


def compile_all(launches: list[Launch], jobs: int) -> Iterator[tuple[Launch, Figures | str]]:
    if not launches:
        return
    _work[:] = launches
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from zip(launches, pool.map(_compile, range(len(launches))), strict=True)


@dataclass
class Gate:
    """Prints what it finds, and counts the faults."""

    failed: int = 0

    def fail(self, text: str, because: str) -> None:
        self.failed += 1
        print(f"{text}   <-- FAIL: {because}", flush=True)

    def measured(self, launches: list[Launch], known: recorded.Record, jobs: int) -> recorded.Record:
        """The figures of all launches, from the file where it has them; compiles the others."""
        by_digest = {what[-1]: figures for what, figures in known.figures.items()}
        now, new = new_record(), []
        for found in launches:
            now.sources[found.source] = source_digest(found.kernel)
            cells = by_digest.get(found.digest)
            if cells is None or known.sources.get(found.source) != now.sources[found.source]:
                new.append(found)
                continue
            now.figures[found.what] = cells
            measured = Figures.of(cells)
            if reasons := faults(found, measured):
                self.fail(line(found, measured, []), ", ".join(reasons))
        print(
            f"{len(launches)} kernels, {len(launches) - len(new)} as recorded, {len(new)} to compile",
            flush=True,
        )
        for found, made in compile_all(new, jobs):
            if isinstance(made, str):
                self.fail(_name(found), f"does not compile: {made}")
                continue
            now.figures[found.what] = made.cells
            reasons = faults(found, made)
            self.failed += bool(reasons)
            print(line(found, made, reasons), flush=True)
        return now


def within(
    record: recorded.Record, architectures: list[str], only: recorded.Record | None
) -> recorded.Record:
    """The part of a file that a run over these architectures can judge; with `only`, what that has."""
    part = new_record()
    for what, made in record.figures.items():
        if what[0] in architectures and (only is None or what in only.figures):
            part.figures[what] = made
            part.sources[what[2]] = record.sources.get(what[2], "")
    if only is not None:
        part.sources = {name: made for name, made in part.sources.items() if name in only.sources}
    return part


def merged(record: recorded.Record, part: recorded.Record, now: recorded.Record) -> recorded.Record:
    """The file with `now` in place of `part`; what else there is of a kernel whose source changed goes, since
    nothing was compiled from the new one."""
    out = new_record()
    changed = {name for name, made in now.sources.items() if record.sources.get(name, made) != made}
    for what, made in record.figures.items():
        if what not in part.figures and what[2] not in changed:
            out.figures[what] = made
    out.figures |= now.figures
    sources = {**record.sources, **now.sources}
    out.sources = {what[2]: sources[what[2]] for what in out.figures}
    return out


def check(
    architectures: list[str], implementation: ModuleType, match: str = "", jobs: int = 2,
    path: Path = RECORDED, everything: bool = False, update: bool = False,
) -> int:  # fmt: skip
    """Records, compiles, compares and prints; returns the number of faults."""
    gate = Gate()
    recorders = {name: record(name, implementation, match) for name in architectures}
    launches = [found for recorder in recorders.values() for found in recorder.launches.values()]
    before = new_record().load(path)
    comparable = before.compiler == new_record().compiler
    known = before if comparable and not everything else new_record()
    now = gate.measured(launches, known, jobs)
    part = within(before, architectures, now if match else None)
    if update:
        whole = not match and set(architectures) == set(CHIPS)
        if not (comparable or whole):
            gate.fail(path.name, f"is of {before.compiler}; only the whole of it can be made by another")
        else:
            (merged(before, part, now) if comparable else now).save(path)
            print(f"{path.name}: {len(part.differences(now))} lines changed")
    elif comparable:
        for difference in part.differences(now):
            gate.fail(difference, "not as recorded (--update writes what was found)")
    else:
        print(
            f"{path.name} is of {before.compiler}, this is {new_record().compiler}: figures are not compared"
        )
    for row in now.rows():
        if int(row["spilled"]):
            print(
                f"spills {row['spilled']:>4} bytes: " + " | ".join(row[name] for name in COLUMNS[: WHAT - 1])
            )
    labels = issue_slots.of_labels(now.rows())
    if labels is not None and labels > issue_slots.LABELS_WANTED:
        gate.fail("gradient_rows", f"labels {labels:.2f} times an index, over {issue_slots.LABELS_WANTED}")
    if labels is None and not match and issue_slots.BOUND_AT[0] in architectures:
        gate.fail("gradient_rows", "labels are not held to an index, as a case of either is not there")
    for name in ops.SCHEMAS:
        if match in name and not hasattr(implementation, name):
            gate.fail(name, "has no Triton implementation")
    for key in sorted({key for recorder in recorders.values() for key in recorder.missing}):
        gate.fail(" ".join(key), "the table has no such row")
    if not match:
        for (kernel, architecture, kind), rows in configs.TABLE.items():
            for width in rows if architecture in recorders else ():
                if (kernel, kind, width) not in recorders[architecture].used:
                    gate.fail(f"{architecture:<6} {kernel} {kind} {width}", "no op uses this row")
    print(f"{gate.failed} faults in {len(launches)} kernels")
    return gate.failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architectures", nargs="*", metavar="architecture", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--match", default="", help="only ops with this in their name")
    parser.add_argument("--all", action="store_true", help="compile what is recorded too, and compare")
    parser.add_argument("--update", action="store_true", help=f"write the figures into {RECORDED.name}")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time (default 2)")
    args = parser.parse_args()
    unknown = set(args.architectures) - set(CHIPS)
    if unknown:
        parser.error(f"no architecture {', '.join(sorted(unknown))}; there are {', '.join(CHIPS)}")
    torch.set_num_threads(1)
    print(f"triton {triton.__version__}, torch {torch.__version__}, python {sys.version.split()[0]}")
    started = time.monotonic()
    failed = check(
        args.architectures or list(CHIPS),
        importlib.import_module("cl_kernels.triton.entry_points"),
        args.match,
        args.jobs,
        everything=args.all,
        update=args.update,
    )
    processor = sum(os.times()[:4])
    print(f"in {time.monotonic() - started:.0f} s, {processor:.0f} s of processor time")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
