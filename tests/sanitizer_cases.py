"""Every op in every variant once, small and odd, in each dtype: what the memory checkers watch.

    compute-sanitizer --tool memcheck python tests/sanitizer_cases.py            (on a GPU; `make gpu-check`)
    python tests/sanitizer_cases.py [--backend cuda]             (Triton's interpreter, the emulator; CPU)

Each result is also held loosely to the chunked reference. Exits with 1 if one is off. For the checkers set
PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.repair()

import op_cases
from emulator import build
from torch import Tensor

from cl_kernels import chunked, dispatch

SIZES = (op_cases.Sizes(37, 53, 19), op_cases.Sizes(1, 1, 1), op_cases.Sizes(50, 33, 300))
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def with_triton(name: str, *args: Any) -> Any:
    return dispatch.triton_op(name)(*args)


def with_cuda(name: str, *args: Any) -> Any:
    return getattr(torch.ops.cl_kernels_cuda, name)(*args)


def with_reference(name: str, *args: Any) -> Any:
    return getattr(chunked, name)(*args)


def is_off(result: Tensor, truth: Tensor, tolerance: float) -> str | None:
    if result.shape != truth.shape or result.dtype != truth.dtype:
        return f"{tuple(result.shape)} {result.dtype} for {tuple(truth.shape)} {truth.dtype}"
    result, truth = result.double(), truth.double()
    finite = truth.isfinite()
    if not torch.equal(result[~finite].nan_to_num(), truth[~finite].nan_to_num()):
        return "not -inf where it should be"
    size = float(truth[finite].abs().max()) if finite.any() else 0.0
    error = float((result - truth)[finite].nan_to_num(nan=torch.inf).abs().max()) if finite.any() else 0.0
    return f"off by {error:.2g} of {size:.2g}" if error > tolerance * max(size, 0.1) else None


def selected(match: str, dtypes: list[str]) -> Iterator[tuple[str, op_cases.Case, float]]:
    """Name, case and tolerance: all variants at the first size, what the losses use at the others."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (getattr(torch, name) for name in dtypes):
        for sizes in SIZES:
            for case in op_cases.cases(sizes, dtype, device):
                if match in case.op and (case.rank < 2 or sizes == SIZES[0]):
                    name = f"{case.op} ({case.variant}) {sizes.n} x {sizes.m} x {sizes.d} {dtype}"
                    yield name, case, TOLERANCE[dtype]


def main() -> int:
    parser = argparse.ArgumentParser(description="Every op in every variant once, small and odd.")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--match", default="", help="only ops with this in their name")
    parser.add_argument("--backend", choices=["triton", "cuda"], default="triton")
    parser.add_argument("--jobs", type=int, default=1, help="processes; compiling takes most of the time")
    parser.add_argument("--share", type=int, help="the cases of one of the processes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.jobs > 1 and args.share is None:
        command = [sys.executable, *sys.argv, "--share"]
        started = [subprocess.Popen([*command, str(share)]) for share in range(args.jobs)]
        return max(process.wait() for process in started)
    if args.backend == "cuda" and not torch.cuda.is_available():
        build.load()
    call = with_triton if args.backend == "triton" else with_cuda
    count, faults = 0, 0
    for number, (name, case, tolerance) in enumerate(selected(args.match, args.dtypes)):
        if args.share is None or number % args.jobs == args.share:
            count += 1
            problem = compare(case, call, number, tolerance)
            if problem:
                faults += 1
                print(f"{name}: {problem}", flush=True)
    print(f"{count} cases, {faults} faults", flush=True)
    return 1 if faults else 0


def compare(case: op_cases.Case, call: op_cases.Call, seed: int, tolerance: float) -> str | None:
    """The fault of a case, or None; its error where it does not run."""
    torch.manual_seed(seed)
    truth = case.run(with_reference)
    torch.manual_seed(seed)
    try:
        results = case.run(call)
    except Exception as error:
        return f"does not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for i, (result, expected) in enumerate(zip(results, truth, strict=True)):
        problem = is_off(result, expected, tolerance)
        if problem:
            return f"output {i} is {problem}"
    return None


if __name__ == "__main__":
    sys.exit(main())
