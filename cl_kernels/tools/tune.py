"""`python -m cl_kernels tune`: launch shapes for this machine's GPU, and which backend serves, by timing.

A workload runs a public loss forward and backward once, to see which rows of configs.TABLE it uses. Each
is then replaced by its neighbours, one row at a time, and the whole step is timed; what does not compile,
does not fit, or gives another answer is passed over. The best shapes are printed as rows of the table. With
--serving, the step is timed by CUDA C++ and by Triton in turn instead, for rows of dispatch.SERVING.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import configs, dispatch
from ..bench import timing
from ..bench.results import median
from ..bench.variants import by_backend
from ..bench.workloads import LOSSES, Implementation, Workload, differentiate
from ..configs import Shape
from ..dispatch import Case, Serving
from ..primitives import similarity

Key = configs.Key
Step = Callable[[], tuple[Tensor, list[Tensor | None]]]
"""Forward and backward: a loss and its gradients."""

TOLERANCE = 2e-2  # between the answers of two launch shapes, relative

SIMILARITY = "similarity"
WORKLOADS = (*LOSSES, SIMILARITY)


def _mean_similarity(temperature: float, q: Tensor, k: Tensor) -> Tensor:
    return similarity(q, k).float().mean()


def work_of(name: str, rows: int, width: int, dtype: str) -> tuple[Workload, Implementation]:
    """A workload and our loss; with a queue, a sixteenth of the rows against eight times as many keys."""
    if name == SIMILARITY:
        return Workload("dcl", rows, rows, width, dtype), _mean_similarity
    loss = LOSSES[name]
    shape = loss.shape(rows, 0)
    if shape == (rows, 1):
        shape = loss.shape(rows // 16, 8 * rows)
    return Workload(name, *shape, width, dtype), loss.ours


def candidates(row: Shape) -> list[Shape]:
    """Shapes around a row, itself first: half and twice a side, 4 and 8 warps, a stage more and less."""
    sides = [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0)]
    found = [row]
    for by_m, by_n in sides:
        for warps in sorted({row.warps, 4, 8}):
            for stages in range(max(1, row.stages - 1), row.stages + 2):
                tile = {"block_m": int(row.block_m * by_m), "block_n": int(row.block_n * by_n)}
                found.append(row._replace(**tile, warps=warps, stages=stages))
    found += [row._replace(block_d=row.block_d * 2), row._replace(block_d=row.block_d // 2)]
    distinct = dict.fromkeys(found)
    return [shape for shape in distinct if _sizes_make_sense(shape, row)]


def _sizes_make_sense(shape: Shape, row: Shape) -> bool:
    """Sizes are at least 16 each; one of 0 or below 16 in the row is not the kernel's to vary."""
    pairs = zip(shape[:3], row[:3], strict=True)
    return all(size == given or (size >= 16 and given >= 16) for size, given in pairs)


def rows_text(tuned: dict[Key, dict[int, tuple[Shape, str]]]) -> str:
    """Lines to paste into configs.py: whole entries, the tuned rows among those that were there."""
    lines = []
    for key, new in tuned.items():
        merged = {**configs.TABLE.get(key, {}), **{width: shape for width, (shape, _) in new.items()}}
        rows = ", ".join(f"{width}: Shape{tuple(merged[width])}" for width in sorted(merged))
        names = ", ".join(f'"{name}"' for name in key)
        notes = "; ".join(f"{width}: {note}" for width, (_, note) in new.items())
        lines += [f"# {notes}", f"TABLE[{names}] = {{{rows}}}"]
    return "\n".join(lines)


@contextmanager
def _table_with(key: Key, width: int, shape: Shape) -> Iterator[None]:
    before = configs.TABLE[key]
    configs.TABLE[key] = {**before, width: shape}
    try:
        yield
    finally:
        configs.TABLE[key] = before


def rows_used(step: Callable[[], object]) -> list[tuple[Key, int]]:
    """The rows of the table that a step looks up."""
    used: dict[tuple[Key, int], None] = {}
    original = configs.shape

    def shape(kernel: str, x: Tensor, width: int, variant: str = "") -> Shape:
        key = configs.key(kernel, x, variant)
        used[key, configs.wide_enough(configs.TABLE[key], width)] = None
        return original(kernel, x, width, variant)

    configs.shape = shape
    try:
        step()
    finally:
        configs.shape = original
    return list(used)


def _flat(step: Step) -> list[Tensor]:
    loss, gradients = step()
    return [loss, *(x for x in gradients if x is not None)]


def _agree(results: list[Tensor], truth: list[Tensor]) -> bool:
    def error(x: Tensor, y: Tensor) -> float:
        return float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30))

    return all(error(x, y) <= TOLERANCE for x, y in zip(results, truth, strict=True))


def best(step: Step, key: Key, width: int) -> tuple[Shape, str] | None:
    """The fastest shape for a row and what was measured; None where not even the row itself runs."""
    from triton.testing import do_bench

    times: dict[Shape, float] = {}
    truth: list[Tensor] | None = None
    row = configs.TABLE[key][width]
    for shape in candidates(row):
        with _table_with(key, width, shape):
            try:
                results = _flat(step)
                torch.cuda.synchronize()
                if truth is None:
                    truth = results
                if _agree(results, truth):
                    times[shape] = do_bench(step, return_mode="median")
                    note = f"{times[shape]:.4f} ms"
                else:
                    note = "another answer"
            except Exception as error:  # does not compile, or asks for more than the chip has
                note = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        print(f"  {key[0]} {width} {tuple(shape)}: {note}", file=sys.stderr, flush=True)
    if not times:
        return None
    fastest = min(times, key=lambda shape: times[shape])
    before = f", {times[row]:.4f} ms by {tuple(row)}" if row in times else ""
    return fastest, f"{times[fastest]:.4f} ms{before}"


def decisions(step: Callable[[], object]) -> list[Serving]:
    """The rows of SERVING that decide for a step under "auto", narrowed to what they decided for."""
    used: dict[Serving, None] = {}
    original = dispatch.row_for

    def row_for(case: Case) -> Serving:
        row = original(case)
        used[Serving(*case, row.backend, row.basis)] = None
        return row

    dispatch.row_for = row_for
    dispatch.forget_decisions()
    try:
        step()
    finally:
        dispatch.row_for = original
        dispatch.forget_decisions()
    return list(used)


def serving_rows(work: Workload, ours: Implementation) -> list[str]:
    """Lines to paste into SERVING, above its last: the faster backend of a whole step, with both times. Where
    one of the two cannot serve, nothing was compared, and there are comments only."""
    rows = decisions(differentiate(ours, work.temperature, work.inputs("cuda")))
    copies = [work.inputs("cuda", seed) for seed in range(4)]
    steps, lines = {}, []
    for backend in ("cuda", "triton"):
        try:
            implementation = by_backend(backend, ours)
            differentiate(implementation, work.temperature, copies[0])()
            steps[backend] = timing.steps(implementation, work.temperature, copies)
        except Exception as error:  # cannot serve; says why
            lines.append(f"# {backend}: {' '.join(str(error).split())[:100]}")
    times = {
        name: median([sum(y) for y in x]) for name, x in timing.interleaved(steps, "cuda", rounds=11).items()
    }
    if len(times) < 2:
        return lines
    fastest = min(times, key=lambda name: times[name])
    shown = ", ".join(f"{name} {1e3 * seconds:.4f} ms" for name, seconds in times.items())
    for row in rows:
        names = ", ".join(f'"{x}"' for x in row[:4])
        lines.append(f'Serving({names}, {row.widest}, "{fastest}", "measured"),  # {work.name}: {shown}')
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workloads", nargs="+", choices=WORKLOADS, metavar="workload", help=", ".join(WORKLOADS)
    )
    parser.add_argument("--kernel", default="", help="only rows of kernels with this in their name")
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--width", nargs="+", type=int, default=[128], help="features (DimCL: the batch)")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument(
        "--serving", action="store_true", help="which backend serves, in place of Triton's launch shapes"
    )


def main(options: argparse.Namespace) -> int:
    """0, or 2 without a GPU."""
    if not torch.cuda.is_available():
        print("tune: there is no GPU here; shapes are timed on the GPU that they are for", file=sys.stderr)
        return 2
    print(f"# {torch.cuda.get_device_name()}")
    if options.serving:
        print(f"# rows for SERVING in {configs.__file__}, above its last")
    cases = [(name, dtype, width) for name in options.workloads for dtype in options.dtype
             for width in options.width]  # fmt: skip
    tuned: dict[Key, dict[int, tuple[Shape, str]]] = {}
    for name, dtype, width in cases:
        work, ours = work_of(name, options.rows, width, dtype)
        if options.serving:
            print("\n".join(serving_rows(work, ours)), flush=True)
            continue
        step = differentiate(by_backend("triton", ours), work.temperature, work.inputs("cuda"))
        for key, row in rows_used(step):
            found = best(step, key, row) if options.kernel in key[0] else None
            if found is not None:
                shape, note = found
                tuned.setdefault(key, {})[row] = shape, f"{note}, {work.name}"
    if tuned:
        print(rows_text(tuned))
    return 0
