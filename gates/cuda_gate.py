"""Compiles every CUDA C++ kernel without a GPU, for sm_80 and sm_90a, and holds the machine code to limits
and to the figures recorded in gates/cuda.tsv.

For each kernel: registers, static shared memory, spills and stack (a few bytes at most), and how often its
machine code has tensor-core products (HGMMA of Hopper, HMMA), exponentials (MUFU.EX2) and accesses to local
memory (LDL, STL); and the instructions of its loop over tiles: on the hot path, of those in a loop inside,
and in all (machine_code.py). Warnings of the assembler, such as serialised wgmma or an ignored setmaxnreg,
are faults.

Compiled are the files whose text, or a header's, is not that recorded. Without nvcc, or with another than the
file's, texts are compared; figures only where nvcc is the same. `make compile-gate` runs it.
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

import issue_slots
import machine_code
import recorded

from cl_kernels import cuda_build

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
ARCHITECTURES = ("80", "90a")
FLAGS = ["-std=c++20", *cuda_build.flags([])["nvcc"], "-Xptxas", "-v"]
INSTRUCTIONS = ("HGMMA", "HMMA", "MUFU.EX2", "LDL", "STL", "BPT.TRAP")
LOOP = ("hot", "inner", "loop")
RECORDED = recorded.FOLDER / "cuda.tsv"
COLUMNS = ("file", "architecture", "kernel", "registers", "shared", "stack", "spills", *INSTRUCTIONS, *LOOP)
WHAT = COLUMNS.index("kernel") + 1


def new_record(compiler: str = "") -> recorded.Record:
    return recorded.Record(COLUMNS, WHAT, compiler)


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
    loop: tuple[str, str, str] = machine_code.cells(None)

    def faults(self) -> list[str]:
        hopper = self.file.endswith("_sm90.cu")
        if hopper and self.architecture != "90a":
            return [] if self.counts["BPT.TRAP"] else ["no trap"]
        found = []
        if max(self.spills, self.stack) > recorded.SPILLS_ALLOWED:
            found.append(f"{self.spills} bytes of spills, {self.stack} of stack")
            found.append(f"{self.counts['LDL']} LDL, {self.counts['STL']} STL")
        size = self.loop[LOOP.index("loop")]
        if size != "-" and int(size) > issue_slots.LONGEST_LOOP:
            found.append(f"a loop of {size} instructions, over {issue_slots.LONGEST_LOOP}")
        if hopper and not self.counts["HGMMA"]:
            found.append("no HGMMA")
        if not hopper and "TileLoop" in self.name and not self.counts["HMMA"]:
            found.append("no HMMA")
        return found

    @property
    def what(self) -> recorded.Cells:
        return (self.file, f"sm_{self.architecture}", self.name)

    @property
    def cells(self) -> recorded.Cells:
        numbers = (self.registers, self.shared, self.stack, self.spills)
        return (*map(str, (*numbers, *(self.counts[name] for name in INSTRUCTIONS))), *self.loop)

    @staticmethod
    def of(what: recorded.Cells, cells: recorded.Cells) -> Kernel:
        file, architecture, name = what
        *numbers, hot, inner, loop = cells
        registers, shared, stack, spills, *counts = map(int, numbers)
        by_name, where = dict(zip(INSTRUCTIONS, counts, strict=True)), architecture.removeprefix("sm_")
        return Kernel(
            name, file, where, registers, shared, stack, spills, by_name, (hot, inner, loop)
        )  # fmt: skip


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
    for mangled, code in machine_code.functions(run(cuobjdump, "--dump-sass", str(out)) if kernels else ""):
        if kernel := kernels.get(mangled):
            for name in INSTRUCTIONS:
                kernel.counts[name] = sum(f"{one.name}.".startswith(f"{name}.") for one in code)
            kernel.loop = machine_code.cells(machine_code.tile_loop(code))
    found = list(kernels.values())
    for kernel, name in zip(found, demangled([kernel.name for kernel in found]), strict=True):
        kernel.name = name
    return found, warnings


def compiler() -> str:
    """nvcc and its version, or nothing."""
    nvcc = tool("nvcc")
    found = re.search(r"V(\d+\.\d+\.\d+)", run(nvcc, "--version")) if nvcc else None
    return f"nvcc {found[1]}" if found else ""


def texts(path: Path, found: dict[str, str] | None = None) -> dict[str, str]:
    """The text of a file and of each of ours that it includes, without comments' lines, by name."""
    found = {} if found is None else found
    if path.name not in found and path.exists():
        text = path.read_text(encoding="utf-8")
        found[path.name] = recorded.code(text, "//")
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
            texts(path.parent / name, found)
    return found


def source_digest(path: Path) -> str:
    """A digest of what a file is compiled from: texts in any order of inclusion, and flags."""
    found = texts(path)
    return recorded.digest([*FLAGS, *(part for name in sorted(found) for part in (name, found[name]))])


@dataclass
class Gate:
    """Compiles what is not recorded, and keeps the faults."""

    jobs: int
    faults: list[str] = field(default_factory=list)
    compiled: list[Kernel] = field(default_factory=list)

    def compile(self, tasks: list[tuple[Path, str]]) -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            concurrent.futures.ThreadPoolExecutor(self.jobs) as pool,
        ):
            started = [(*task, pool.submit(compile_file, *task, Path(folder))) for task in tasks]
            for path, architecture, task in started:
                try:
                    found, warnings = task.result()
                except RuntimeError as error:
                    self.faults.append(f"{path.name}, sm_{architecture}: does not compile\n{error}")
                    continue
                # A kernel of Hopper's alone traps elsewhere: no figure to keep.
                if path.name.endswith("_sm90.cu") and architecture != "90a":
                    self.faults += [
                        f"{kernel.name}, sm_{architecture}: {fault}"
                        for kernel in found
                        for fault in kernel.faults()
                    ]
                    found = []
                self.compiled += found
                self.faults += [f"{path.name}, sm_{architecture}: {warning}" for warning in warnings]

    def check(
        self, files: list[Path], architectures: list[str], path: Path, everything: bool, update: bool
    ) -> recorded.Record:
        """Compares the files' kernels with those recorded at `path`, or records them; returns what is so."""
        here, before = compiler(), new_record().load(path)
        reason = obstacle()
        names = {file.name for file in files}
        names |= {name for name in before.sources if not (SOURCES / name).exists()}
        marked = {f"sm_{architecture}" for architecture in architectures}
        part = new_record(before.compiler)
        part.sources = {name: made for name, made in before.sources.items() if name in names}
        part.figures = {
            what: made for what, made in before.figures.items() if what[0] in names and what[1] in marked
        }
        now = new_record(here)
        now.sources = {file.name: source_digest(file) for file in files}
        same = {name for name, made in now.sources.items() if part.sources.get(name) == made}
        comparable = here == before.compiler
        if reason is None:
            tasks = [
                (file, architecture)
                for file in files
                if everything or not comparable or file.name not in same
                for architecture in architectures
            ]
            print(f"{len(files)} files, {len({file for file, _ in tasks})} to compile by {here}", flush=True)
            self.compile(tasks)
        else:
            tasks = []
            print(f"cuda-gate: {reason}: texts are compared, nothing is compiled")
        made_here = {file.name for file, _ in tasks}
        now.figures = {kernel.what: kernel.cells for kernel in self.compiled}
        if comparable or reason is not None:
            there = now.sources.keys() - made_here
            kept = {what: made for what, made in part.figures.items() if what[0] in there}
            now.figures |= kept
        for what, made in sorted(now.figures.items()):
            kernel = Kernel.of(what, made)
            self.faults += [f"{kernel.name}, {what[1]}: {fault}" for fault in kernel.faults()]
            if kernel.spills or kernel.stack:
                print(f"spills {kernel.spills} bytes, stack {kernel.stack}: {' | '.join(what)}")
        if update and reason is None:
            self.faults += _write(before, part, now, same, path)
        elif reason is not None or comparable:
            self.faults += [f"{text} (--update records)" for text in part.differences(now)]
        else:
            print(f"{path.name} is of {before.compiler or 'nothing'}: figures are not compared, texts are")
            changed = sorted(names - same)
            self.faults += [f"{name}: its source is not that recorded" for name in changed]
        return now


def _write(
    before: recorded.Record, part: recorded.Record, now: recorded.Record, same: set[str], path: Path
) -> list[str]:
    """Puts `now` in the place of `part`; of a file that changed nothing else stays."""
    if before.figures and before.compiler != now.compiler and part.figures != before.figures:
        return [f"{path.name} is of {before.compiler}; only the whole of it can be made by another"]
    out = new_record(now.compiler)
    rest = {what: made for what, made in before.figures.items() if what not in part.figures}
    out.figures = {what: made for what, made in rest.items() if what[0] in same or what[0] not in now.sources}
    out.figures |= now.figures
    out.sources = {**before.sources, **now.sources}
    if not rest:
        out.sources = now.sources
    out.save(path)
    print(f"{path.name}: {len(part.differences(now))} lines changed")
    return []


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--match", default="", help="only files whose name holds this")
    parser.add_argument(
        "--arch",
        nargs="+",
        default=list(ARCHITECTURES),
        metavar="ARCH",
        help=f"of {', '.join(ARCHITECTURES)}; default: all",
    )
    parser.add_argument("--all", action="store_true", help="compile what is recorded too, and compare")
    parser.add_argument("--update", action="store_true", help=f"write the figures into {RECORDED.name}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="default: the CPU's cores")
    args = parser.parse_args()
    files = [path for path in sorted(SOURCES.glob("*.cu")) if args.match in path.name]
    gate = Gate(args.jobs)
    now = gate.check(files, args.arch, RECORDED, args.all, args.update)
    rows = [COLUMNS, *((*kernel.what, *kernel.cells) for kernel in gate.compiled)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows if len(rows) > 1 else ():
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(now.figures)} kernels of {len(files)} files, {len(gate.faults)} faults")
    print("\n".join(gate.faults))
    return 1 if gate.faults else 0


if __name__ == "__main__":
    sys.exit(main())
