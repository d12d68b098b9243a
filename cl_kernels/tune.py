"""`python -m cl_kernels tune`: times launch shapes around those of configs.TABLE on this machine's GPU.

A workload runs a public loss forward and backward once, to see which rows of the table it uses. Each of them
is then replaced by its neighbours, one row at a time, and the whole step is timed; what does not compile,
does not fit, or gives another answer is passed over. The best shapes are printed as rows of the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

import cl_kernels
from cl_kernels import configs
from cl_kernels.configs import Shape

Key = configs.Key
Step = Callable[[], list[Tensor]]
"""Forward and backward: a loss and its gradients."""

TOLERANCE = 2e-2  # between the answers of two launch shapes, relative


def unit(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(rows, width, device="cuda"), dim=1).to(dtype)


def step_of(loss: Callable[..., Tensor], *inputs: Tensor) -> Step:
    leaves = [x.requires_grad_() for x in inputs]

    def step() -> list[Tensor]:
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return step


def _supcon(rows: int, width: int, dtype: torch.dtype) -> Step:
    features = unit(rows, width, dtype).view(-1, 2, width)
    labels = torch.randint(10, (rows // 2,), device="cuda")
    return step_of(lambda x: cl_kernels.supcon_loss(x, labels, temperature=0.1), features)


def _nt_xent(rows: int, width: int, dtype: torch.dtype) -> Step:
    return step_of(cl_kernels.nt_xent_loss, unit(rows // 2, width, dtype), unit(rows // 2, width, dtype))


def _info_nce(rows: int, width: int, dtype: torch.dtype) -> Step:
    return step_of(cl_kernels.info_nce_loss, unit(rows, width, dtype), unit(rows, width, dtype))


def _clip(rows: int, width: int, dtype: torch.dtype) -> Step:
    scale = torch.tensor(20.0, device="cuda")
    return step_of(cl_kernels.clip_loss, unit(rows, width, dtype), unit(rows, width, dtype), scale)


def _sce(rows: int, width: int, dtype: torch.dtype) -> Step:
    """A sixteenth of the rows against a queue of eight times as many."""
    q, k, queue = (unit(n, width, dtype) for n in (rows // 16, rows // 16, 8 * rows))
    return step_of(lambda x: cl_kernels.sce_loss(x, k, queue=queue), q)


def _dimcl(rows: int, width: int, dtype: torch.dtype) -> Step:
    """`width` is the batch, over which the correlations run; `rows` are the columns of both views."""
    views = (torch.randn(width, rows // 2, device="cuda").to(dtype) for _ in range(2))
    return step_of(cl_kernels.dimcl_loss, *views)


def _similarity(rows: int, width: int, dtype: torch.dtype) -> Step:
    pair = unit(rows, width, dtype), unit(rows, width, dtype)
    return step_of(lambda q, k: cl_kernels.similarity(q, k).float().mean(), *pair)


WORKLOADS: dict[str, Callable[[int, int, torch.dtype], Step]] = {
    "supcon": _supcon,
    "nt_xent": _nt_xent,
    "info_nce": _info_nce,
    "clip": _clip,
    "sce": _sce,
    "dimcl": _dimcl,
    "similarity": _similarity,
}


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
    """At least 16 each; a size of 0 or below 16 in the row is not the kernel's to vary."""
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


def rows_used(step: Step) -> list[tuple[Key, int]]:
    """The rows of the table that a step looks up."""
    used: dict[tuple[Key, int], None] = {}
    original = configs.shape

    def shape(kernel: str, x: Tensor, width: int, variant: str = "") -> Shape:
        key = configs.key(kernel, x, variant)
        used[key, configs.serving(configs.TABLE[key], width)] = None
        return original(kernel, x, width, variant)

    configs.shape = shape
    try:
        step()
    finally:
        configs.shape = original
    return list(used)


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
                results = step()
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workloads", nargs="+", choices=WORKLOADS, metavar="workload", help=", ".join(WORKLOADS)
    )
    parser.add_argument("--kernel", default="", help="only rows of kernels with this in their name")
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--width", nargs="+", type=int, default=[128], help="features (dimcl: the batch)")
    parser.add_argument("--rows", type=int, default=8192)


def main(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("tune: there is no GPU here; shapes are timed on the GPU that they are for", file=sys.stderr)
        return 2
    tuned: dict[Key, dict[int, tuple[Shape, str]]] = {}
    for name in options.workloads:
        for dtype in options.dtype:
            for width in options.width:
                step = WORKLOADS[name](options.rows, width, getattr(torch, dtype))
                for key, row in rows_used(step):
                    if options.kernel in key[0]:
                        found = best(step, key, row)
                        if found is not None:
                            shape, note = found
                            tuned.setdefault(key, {})[row] = shape, f"{note}, {name} {options.rows} x {width}"
    print(f"# {torch.cuda.get_device_name()}\n{rows_text(tuned)}")
    return 0
