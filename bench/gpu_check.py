"""Everything that needs a GPU, in one run of under ten minutes: `make gpu-check`.

Steps run one after the other, each with a limit of its own and a log in the output folder ($OUT, else
gpu_check_output/); one that fails or runs out of time does not stop the rest, and the exit code is 1.

    environment   nvidia-smi, nvcc, versions, which backend serves which op
    build         the extensions in place, where they are not built: CUDA C++ for this GPU
    cases         tests/sanitizer_cases.py: every op in every variant, by Triton and by CUDA C++
    parity        the tests of both with real kernels (CL_KERNELS_TEST_DEVICE=cuda)
    memcheck, racecheck, initcheck      compute-sanitizer over the cases
    ncu           counters of the two main CUDA C++ kernels
    timings       bench/gpu_timings.py

The results are bench/results/<device>-<date>.json and a table in Markdown, printed last. With --rehearse the
same steps run on tiny sizes on the CPU, by Triton's interpreter, and results go to the output folder only.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    limit: int  # seconds
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None  # a program; without it the step is a failure


@dataclass(frozen=True)
class Outcome:
    step: str
    status: str  # ok, failed, out of time, or what is missing
    seconds: float


def steps(out: Path, rehearse: bool) -> list[Step]:
    """The limits together stay under ten minutes."""
    jobs = max(1, (os.cpu_count() or 1) // 2)
    found = [Step("environment", [PYTHON, "bench/gpu_check.py", "--environment"], 20)]
    built = [any((ROOT / "cl_kernels").glob(f"{name}*.so")) for name in ("_C", "_cuda")]
    if not all(built) and not (rehearse and built[0]):
        build = {"MAX_JOBS": str(os.cpu_count() or 1), "CL_KERNELS_FORCE_CUDA_BUILD": "" if rehearse else "1"}
        found.append(Step("build", [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"], 140, build))

    cases = [PYTHON, "tests/sanitizer_cases.py", "--jobs", str(jobs)]
    by_cuda = [PYTHON, "tests/sanitizer_cases.py", "--backend", "cuda"]
    few = ["--dtypes", "float32", "--match", "softmax"] if rehearse else []
    # Without a checker first: it fills Triton's cache, so that the checkers do not watch compilers.
    found += [
        Step("cases", [*cases, *few], 50),
        Step("cases by cuda", [*by_cuda, *few], 600 if rehearse else 25),
    ]
    tests = ("tests/triton", "tests/cuda", "tests/losses/test_gpu_losses.py")
    command = [PYTHON, "-m", "pytest", "-q", "--maxfail=20", *tests]
    command += ["-n", str(jobs)] if importlib.util.find_spec("xdist") else []
    command += ["-k", "log_softmax"] if rehearse else []
    found.append(Step("parity", command, 110, {"CL_KERNELS_TEST_DEVICE": "cpu" if rehearse else "cuda"}))
    if not rehearse:
        # Each tensor its own allocation, so that the checkers know its end.
        plain_memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        checker = ["compute-sanitizer", "--target-processes", "all", "--error-exitcode", "9", "--tool"]
        for tool, limit, watched in (
            ("memcheck", 45, cases),
            ("memcheck by cuda", 25, by_cuda),
            ("racecheck", 20, [*cases, "--dtypes", "bfloat16"]),
            ("racecheck by cuda", 20, [*by_cuda, "--dtypes", "bfloat16"]),
            ("initcheck by cuda", 15, [*by_cuda, "--dtypes", "float16"]),
        ):
            command = [*checker, tool.split()[0], *watched]
            found.append(Step(tool, command, limit, plain_memory, needs="compute-sanitizer"))
        counters = ["ncu", "--clock-control", "none", "--section", "SpeedOfLight", "--section", "Occupancy",
                    "--section", "WarpStateStats", "--kernel-name", "regex:lse_sm90|gradient_rows_sm90",
                    "--launch-count", "4", PYTHON, "bench/gpu_timings.py", "--out", str(out)]  # fmt: skip
        found.append(Step("ncu", [*counters, "--one-step", "E"], 25, needs="ncu"))
    timings = [PYTHON, "bench/gpu_timings.py", "--out", str(out), "--budget", "75"]
    found.append(Step("timings", timings + ["--rehearse"] * rehearse, 600 if rehearse else 90))
    return found


def run(step: Step, out: Path) -> Outcome:
    """Its output goes to a log; at its limit the step and all that it started are ended."""
    log = out / f"{step.name.replace(' ', '_')}.log"
    if step.needs and not shutil.which(step.needs):
        return Outcome(step.name, f"there is no {step.needs}", 0.0)
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **step.environment}
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(step.limit)
            status = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"out of time ({step.limit} s)"
    return Outcome(step.name, status, round(time.monotonic() - started, 1))


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def environment() -> dict[str, str]:
    import triton

    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
    }


def print_environment() -> None:
    print(_output("nvidia-smi"), _output("nvcc", "--version"), sep="\n")
    print(json.dumps(environment(), indent=1))
    print(_output(PYTHON, "-m", "cl_kernels", "info"))


def save(outcomes: list[Outcome], out: Path, rehearse: bool) -> Path:
    timings = out / "timings.json"
    measured = json.loads(timings.read_text()) if timings.exists() else {}  # as `python -m cl_kernels bench`
    here, today = environment(), datetime.date.today().isoformat()
    device = "rehearsal" if rehearse else "-".join(here["device"].lower().split())
    folder = out if rehearse else ROOT / "bench" / "results"
    path = folder / f"{device}-{today}.json"
    steps = [outcome.__dict__ for outcome in outcomes]
    command = " ".join(["python", *sys.argv])
    sys.path.insert(0, str(ROOT))  # the package is not installed
    from cl_kernels.bench import results

    found = {"date": today, "command": command, **measured, "environment": here, "steps": steps}
    results.write(found, path)
    if path.parent != out:
        shutil.copy(path, out)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests, memory checkers and timings on this machine's GPU.")
    parser.add_argument("--rehearse", action="store_true", help="the same steps, tiny, on the CPU")
    parser.add_argument("--only", nargs="+", metavar="STEP")
    parser.add_argument("--environment", action="store_true", help="print what this machine is, and stop")
    args = parser.parse_args()
    if args.environment:
        print_environment()
        return 0
    if not args.rehearse and not torch.cuda.is_available():
        print("gpu-check: there is no GPU here; --rehearse runs its steps on the CPU", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or ROOT / "gpu_check_output").resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "timings.json").unlink(missing_ok=True)
    outcomes = []
    for step in steps(out, args.rehearse):
        if not args.only or step.name in args.only:
            outcomes.append(run(step, out))
            print(f"{step.name}: {outcomes[-1].status}, {outcomes[-1].seconds} s", flush=True)
    path = save(outcomes, out, args.rehearse)
    failed = [outcome for outcome in outcomes if outcome.status != "ok"]
    for outcome in failed:
        log = out / f"{outcome.step.replace(' ', '_')}.log"
        tail = log.read_text(errors="replace").splitlines()[-15:] if log.exists() else []
        print("\n".join([f"\n{outcome.step}: {outcome.status}", *tail]))
    table = out / "timings.md"
    print(f"\n{path}\n{len(failed)} of {len(outcomes)} steps failed")
    if (out / "timings.json").exists() and table.exists():
        print("\n" + table.read_text())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
