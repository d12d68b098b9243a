"""The compile gate finds what it looks for, and knows what it need not compile. The whole of it is
`make compile-gate`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]

OPS = """
import triton
import triton.language as tl

from cl_kernels import configs
from cl_kernels.configs import Shape
from cl_kernels.triton.launch import matrix
from cl_kernels.triton.tiles import dot

configs.TABLE["product", "sm_90", "half"] = {64: Shape(64, 64, 64, 4, 1), 128: Shape(64, 64, 128, 4, 1)}
configs.TABLE["product", "sm_90", "float32"] = {64: Shape(16, 16, 64, 1, 1)}
configs.TABLE["forgotten", "sm_90", "half"] = {64: Shape(64, 64, 64, 4, 1)}


@triton.jit
def _product_kernel(x, out, d, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    i = tl.arange(0, BLOCK_M)
    f = tl.arange(0, BLOCK_D)
    at = x.at + i[:, None] * x.stride_row + f[None, :] * x.stride_col
    rows = tl.load(at, mask=f[None, :] < d, other=0.0)
    s = dot(rows, tl.trans(rows), tl.zeros((BLOCK_M, BLOCK_M), tl.float32), "ieee")
    tl.store(out + i, tl.sum(tl.exp2(s), 1))


def similarity_forward(q, k, scale, normalize):
    tile = configs.shape("product", q, q.shape[1])
    out = q.new_empty(q.shape[0], q.shape[0] if k is None else k.shape[0])
    _product_kernel[(1,)](
        matrix(q), out, q.shape[1], tile.block_m, tile.block_n, tile.block_d,
        num_warps=tile.warps, num_stages=tile.stages,
    )
    empty = q.new_empty(q.shape[0]).float()
    return out, empty, q.new_empty(0 if k is None else k.shape[0]).float()
"""

# Each argument is a check: a file and what to do with it.
RUN = """
import sys
from pathlib import Path
import triton_gate, toy_ops
for argument in sys.argv[1:]:
    name, *flags = argument.split()
    print("==", argument)
    triton_gate.check(
        ["sm_90"], toy_ops, "similarity", path=Path(name), everything="all" in flags, update="update" in flags
    )
if not sys.argv[1:]:
    stale = triton_gate.new_record()
    stale.figures = {("sm_90", "product half 64", *"ABCDEF"): ("32", "0", "0", "0", "-", "0", "-", "-", "-")}
    stale.save(path := Path(__file__).with_name("stale.tsv"))
    sys.exit(min(triton_gate.check(["sm_90"], toy_ops, path=path), 1))
"""

HELPER = """
import triton
from toy_more import SIZE, added


@triton.jit
def used(x):
    return added(x) * SIZE
"""

MORE = """
from typing import NamedTuple

import triton
import triton.language as tl

SIZE = tl.constexpr(2)
OTHER = tl.constexpr(3)


class Pair(NamedTuple):
    one: object
    two: object


@triton.jit
def added(x):
    return Pair(x + 1, x).one


@triton.jit
def unused(x):
    return x
"""

KERNEL = """
import triton
import toy_used


@triton.jit
def kernel(x, N):
    toy_used.used(x)


@triton.jit
def other(x):
    return x
"""

# Each argument is a folder with modules of these names.
DIGESTS = """
import sys
import triton_gate
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    import toy_kernel
    print(*map(triton_gate.source_digest, (toy_kernel.kernel, toy_kernel.other)))
    sys.path.remove(folder)
    for name in ("toy_kernel", "toy_used", "toy_more"):
        del sys.modules[name]
"""

STRIDES = """
import torch
import triton
import triton_gate
from cl_kernels.triton.launch import matrix


@triton.jit
def of_strides(x, n, x_strides):
    pass


@triton.jit
def of_matrix(x, n):
    pass


x = torch.zeros(64, 64)
with triton_gate.recording("sm_90") as recorder:
    for n, y in ((64, x), (63, x), (64, x.T), (64, x[:, :63].contiguous()), (63, x[::2])):
        of_strides[(1,)](y, n, y.stride())
        of_matrix[(1,)](matrix(y), n)
print(sorted(found.kernel.__name__ for found in recorder.launches.values()))
"""


def _python(*arguments: str, path: Path = ROOT / "tests") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (path, ROOT / "gates", ROOT)))
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    (tmp_path / "toy_ops.py").write_text(OPS)
    (tmp_path / "run.py").write_text(RUN)
    return tmp_path


def _gate(toy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return _python(str(toy / "run.py"), *arguments, path=toy)


def _steps(toy: Path, *arguments: str) -> list[str]:
    """The print of each check of one process."""
    result = _gate(toy, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout.split("== ")[1:]


def test_measures_and_finds_faults(toy: Path) -> None:
    result = _gate(toy)
    lines = result.stdout.splitlines()
    assert result.returncode == 1, result.stderr
    half = [line for line in lines if line.startswith("sm_90  product half 64 ")]
    assert half and all(" wgmma" in line and "spill 0" in line and "exp 1.00" in line for line in half)
    assert not any("FAIL" in line for line in half)
    spilling = [line for line in lines if line.startswith("sm_90  product float32 64 ")]
    assert all("1x1" in line for line in spilling)
    assert any("(similarity self ones)" in line for line in lines)
    assert any("A | B | C | D | E | F: is recorded, and there is no such kernel" in line for line in lines)
    assert "sm_90  forgotten half 64   <-- FAIL: no op uses this row" in lines
    assert "contrastive_forward   <-- FAIL: has no Triton implementation" in lines


def test_only_what_is_not_recorded_is_compiled(toy: Path) -> None:
    """Recorded once; then a figure that changed, a launch that went and a kernel that changed are faults."""
    file = toy / "toy.tsv"
    unrecorded, updated, again = _steps(toy, f"{file}", f"{file} update", f"{file}")
    assert "is not recorded   <-- FAIL: not as recorded" in unrecorded
    assert ", 0 as recorded" in updated and "not as recorded" not in updated
    assert ", 0 to compile" in again and "not as recorded" not in again

    written = file.read_text()
    line = next(line for line in written.splitlines() if "\tproduct half 64\t" in line and "self\t" in line)
    cells = line.split("\t")
    cells[-8] = "200"
    spilling = "\t".join(cells)
    texts = {"spilling": (line, spilling), "other": ("triton ", "triton 0")}
    for name, (old, new) in texts.items():
        (toy / name).write_text(written.replace(old, new, 1))
    spilling, everything, other = _steps(
        toy, f"{toy / 'spilling'}", f"{toy / 'spilling'} all", f"{toy / 'other'}"
    )
    assert "spill 200" in spilling and "FAIL: spills" in spilling and ", 0 to compile" in spilling
    assert "spilled 200 -> 0   <-- FAIL: not as recorded" in everything and ", 0 as recorded" in everything
    assert everything.count("not as recorded") == 1
    assert "other is of triton 0" in other and "not as recorded" not in other and ", 0 as recorded" in other

    (toy / "toy_ops.py").write_text(OPS.replace("tl.exp2(s)", "2 * tl.exp2(s)"))
    (changed,) = _steps(toy, f"{file}")
    assert "_product_kernel: its source is not that recorded   <-- FAIL" in changed
    assert ", 0 as recorded" in changed


CHANGES = [
    ("toy_more.py", "x + 1", "x + 2", True),
    ("toy_more.py", "    one: object\n    two: object", "    two: object\n    one: object", True),
    ("toy_more.py", "SIZE = tl.constexpr(2)", "SIZE = tl.constexpr(4)", True),
    ("toy_used.py", "* SIZE", "- SIZE", True),
    ("toy_kernel.py", "used(x)", "used(x + 1)", True),
    ("toy_more.py", "OTHER = tl.constexpr(3)", "OTHER = tl.constexpr(4)", False),
    ("toy_more.py", "def unused(x):\n    return x", "def unused(x):\n    return x + 1", False),
    ("toy_more.py", "import triton\n", "# moved by a line\n\nimport triton\n", False),
    ("toy_kernel.py", "    toy_used", "    # why\n    toy_used", False),
]


def test_a_source_is_all_that_it_reaches(tmp_path: Path) -> None:
    """A kernel is another one with another function, constant or line that it leads to, wherever it lies."""
    texts = {"toy_used.py": HELPER, "toy_more.py": MORE, "toy_kernel.py": KERNEL}
    for i, (file, old, new, _) in enumerate([("toy_used.py", "", "", False), *CHANGES]):
        (tmp_path / str(i)).mkdir()
        assert old in texts[file]
        for name, text in texts.items():
            (tmp_path / str(i) / name).write_text(text.replace(old, new) if name == file and old else text)
    (tmp_path / "digests.py").write_text(DIGESTS)
    folders = [str(tmp_path / str(i)) for i in range(len(CHANGES) + 1)]
    result = _python(str(tmp_path / "digests.py"), *folders)
    assert result.returncode == 0, result.stderr
    (kernel, other), *found = [line.split() for line in result.stdout.splitlines()]
    assert [made != kernel for made, _ in found] == [changes for *_, changes in CHANGES]
    assert all(same == other for _, same in found)


def test_strides_make_kernels_and_sizes_do_not(tmp_path: Path) -> None:
    """Whether a stride is 1 or a multiple of 16 does, in a tuple or a matrix; whether a size is does not."""
    (tmp_path / "strides.py").write_text(STRIDES)
    result = _python(str(tmp_path / "strides.py"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("'")[1::2] == ["of_matrix"] * 3 + ["of_strides"] * 3


def test_an_unknown_architecture_is_refused() -> None:
    result = _python(str(ROOT / "gates" / "triton_gate.py"), "sm_13")
    assert result.returncode == 2 and "no architecture sm_13" in result.stderr
