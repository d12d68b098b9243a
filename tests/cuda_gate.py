"""Compiles every CUDA C++ kernel without a GPU, for sm_80 and sm_90a, and holds the machine code to limits.

For each kernel: registers, static shared memory, spills and stack (none allowed), and how often its machine
code has tensor-core products (HGMMA of Hopper, HMMA), exponentials (MUFU.EX2) and accesses to local memory
(LDL, STL: none allowed). Warnings of the assembler, such as serialised wgmma or an ignored setmaxnreg, are
faults.

    python tests/cuda_gate.py                      all files, both architectures
    python tests/cuda_gate.py --match lse --arch 90a
    python tests/cuda_gate.py --markdown table.md  the report as a table
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from cl_kernels import cuda_build

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
ARCHITECTURES = ("80", "90a")
FLAGS = ["-std=c++17", *cuda_build.flags([])["nvcc"], "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
INSTRUCTIONS = ("HGMMA", "HMMA", "MUFU.EX2", "LDL", "STL", "BPT.TRAP")


@dataclass
class Kernel:
    name: str
    file: str
    architecture: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(INSTRUCTIONS, 0))

    def faults(self) -> list[str]:
        hopper = self.file.endswith("_sm90.cu")
        if hopper and self.architecture != "90a":
            return [] if self.counts["BPT.TRAP"] else ["no trap"]
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} bytes of spills, {self.stack} of stack")
        if self.counts["LDL"] or self.counts["STL"]:
            found.append(f"{self.counts['LDL']} LDL, {self.counts['STL']} STL")
        if hopper and not self.counts["HGMMA"]:
            found.append("no HGMMA")
        portable_product = "TileLoop" in self.name or self.file in ("gradient_rows.cu", "attention.cu")
        if not hopper and portable_product and not self.counts["HMMA"]:
            found.append("no HMMA")
        return found


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or the copy of it that Triton's package carries."""
    found = shutil.which(name)
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else None


def obstacle() -> str | None:
    """Why nothing can be compiled here, or None."""
    missing = [name for name in ("nvcc", "cuobjdump") if tool(name) is None]
    return f"there is no {' and no '.join(missing)}" if missing else None


def demangled(names: list[str]) -> list[str]:
    """Short names: without namespaces, parameters, and the unnamed namespace's mark."""
    if not names:
        return []
    filter_ = shutil.which("c++filt") or tool("cu++filt")
    if filter_ is None:
        return names
    output = subprocess.run(
        [filter_], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    short = []
    for name in output.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|cl_kernels::cuda::|^void ", "", name)
        depth, end = 0, len(name)
        for at, character in enumerate(name):  # the parameters start at the first parenthesis outside < >
            depth += (character == "<") - (character == ">")
            if character == "(" and depth == 0:
                end = at
                break
        short.append(re.sub(r"\((?:cl_kernels::cuda::)?\w+\)", "", name[:end]))
    return short


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_file(path: Path, architecture: str, folder: Path) -> tuple[list[Kernel], list[str]]:
    """The kernels of a file in the machine code of an architecture, and what the compiler warned of."""
    out = folder / f"{path.stem}_{architecture}.o"
    nvcc, cuobjdump = tool("nvcc"), tool("cuobjdump")
    assert nvcc is not None and cuobjdump is not None
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    log = run(nvcc, *FLAGS, target, f"-I{SOURCES}", "-c", str(path), "-o", str(out))
    warnings = [line for line in log.splitlines() if re.search(r"\bwarning\b", line)]
    kernels: dict[str, Kernel] = {}
    current = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            current = kernels[match[1]] = Kernel(match[1], path.name, architecture)
        if current is None:
            continue
        if match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            current.stack, current.spills = int(match[1]), int(match[2]) + int(match[3])
        if match := re.search(r"Used (\d+) registers", line):
            current.registers = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                current.shared = int(shared[1])
    current = None
    for line in run(cuobjdump, "--dump-sass", str(out)).splitlines() if kernels else ():
        if match := re.search(r"Function : (\S+)", line):
            current = kernels.get(match[1])
        elif current is not None and (match := INSTRUCTION.search(line)):
            for name in INSTRUCTIONS:
                current.counts[name] += match[1] == name or match[1].startswith(name + ".")
    found = list(kernels.values())
    for kernel, name in zip(found, demangled([kernel.name for kernel in found]), strict=True):
        kernel.name = name
    return found, warnings


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the CUDA C++ kernels and check their machine code.")
    parser.add_argument("--match", default="", help="only files whose name holds this")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), metavar="ARCH")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--markdown", type=Path, help="write the report to this file as a table")
    args = parser.parse_args()
    if reason := obstacle():
        print(f"cuda-gate: skipped: {reason}")
        return 0
    files = [path for path in sorted(SOURCES.glob("*.cu")) if args.match in path.name]
    kernels: list[Kernel] = []
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        tasks = [
            (path, architecture, pool.submit(compile_file, path, architecture, Path(folder)))
            for path in files
            for architecture in args.arch
        ]
        for path, architecture, task in tasks:
            try:
                found, warnings = task.result()
            except RuntimeError as error:
                faults.append(f"{path.name}, sm_{architecture}: does not compile\n{error}")
                continue
            faults += [f"{path.name}, sm_{architecture}: {warning}" for warning in warnings]
            faults += [f"{k.name}, sm_{k.architecture}: {fault}" for k in found for fault in k.faults()]
            # A kernel of Hopper's alone only traps elsewhere.
            kernels += [k for k in found if not path.name.endswith("_sm90.cu") or architecture == "90a"]
    header = ("kernel", "architecture", "registers", "static shared", *INSTRUCTIONS[:3])
    rows = [
        (
            k.name,
            f"sm_{k.architecture}",
            k.registers,
            k.shared,
            *(k.counts[name] for name in INSTRUCTIONS[:3]),
        )
        for k in kernels
    ]
    widths = [max(len(str(row[column])) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if args.markdown:
        lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)]
        lines.insert(1, "|---|" + "---|" * (len(header) - 1))
        args.markdown.write_text("\n".join(lines) + "\n")
    print(f"\n{len(kernels)} kernels of {len(files)} files, {len(faults)} faults")
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
