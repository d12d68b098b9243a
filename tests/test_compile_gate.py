"""The compile gate finds what it looks for, and knows what it need not compile. The whole of it is
`make compile-gate`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parent

OPS = """
import triton
import triton.language as tl

from cl_kernels import configs
from cl_kernels.configs import Shape
from cl_kernels.triton.tiles import dot

configs.TABLE["product", "sm_90", "half"] = {64: Shape(64, 64, 64, 4, 1), 128: Shape(64, 64, 128, 4, 1)}
configs.TABLE["product", "sm_90", "float32"] = {64: Shape(16, 16, 64, 1, 1)}
configs.TABLE["forgotten", "sm_90", "half"] = {64: Shape(64, 64, 64, 4, 1)}


@triton.jit
def _product_kernel(
    x, out, d, stride_n, stride_d, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    i = tl.arange(0, BLOCK_M)
    f = tl.arange(0, BLOCK_D)
    rows = tl.load(x + i[:, None] * stride_n + f[None, :] * stride_d, mask=f[None, :] < d, other=0.0)
    s = dot(rows, tl.trans(rows), tl.zeros((BLOCK_M, BLOCK_M), tl.float32), "ieee")
    tl.store(out + i, tl.sum(tl.exp2(s), 1))


def similarity_forward(q, k, scale, normalize):
    tile = configs.shape("product", q, q.shape[1])
    out = q.new_empty(q.shape[0], q.shape[0] if k is None else k.shape[0])
    _product_kernel[(1,)](
        q, out, q.shape[1], *q.stride(), tile.block_m, tile.block_n, tile.block_d,
        num_warps=tile.warps, num_stages=tile.stages,
    )
    empty = q.new_empty(q.shape[0]).float()
    return out, empty, q.new_empty(0 if k is None else k.shape[0]).float()
"""

RUN = """
import sys
from pathlib import Path
import compile_gate, toy_ops
path, *flags = sys.argv[1:]
path = Path(path) if path else None
options = {"everything": "all" in flags, "update": "update" in flags}
sys.exit(min(compile_gate.check(["sm_90"], toy_ops, "similarity" if path else "", path=path, **options), 1))
"""

HELPER = """
import triton
from toy_more import SIZE, added


@triton.jit
def used(x):
    return added(x) * SIZE
"""

MORE = """
import triton
import triton.language as tl

SIZE = tl.constexpr(2)
OTHER = tl.constexpr(3)


@triton.jit
def added(x):
    return x + 1


@triton.jit
def unused(x):
    return x
"""

DIGEST = """
import triton, toy_more, toy_used
import compile_gate


@triton.jit
def kernel(x, N):
    toy_used.used(x)


@triton.jit
def other(x):
    return x


print(compile_gate.source_digest(kernel), compile_gate.source_digest(other))
"""


def _python(*arguments: str, path: Path = TESTS) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (path, TESTS, TESTS.parent)))
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


def test_measures_and_finds_faults(toy: Path) -> None:
    result = _gate(toy, "")
    lines = result.stdout.splitlines()
    assert result.returncode == 1, result.stderr
    half = [line for line in lines if line.startswith("sm_90  product half 64 ")]
    assert half and all(" wgmma" in line and "spill 0" in line and "exp 1.00" in line for line in half)
    assert not any("FAIL" in line for line in half)
    spilling = [line for line in lines if line.startswith("sm_90  product float32 64 ")]
    assert all("1x1" in line for line in spilling)
    assert any("(similarity self ones)" in line for line in lines)
    assert "sm_90  forgotten half 64   <-- FAIL: no op uses this row" in lines
    assert "contrastive_forward   <-- FAIL: has no Triton implementation" in lines


def test_only_what_is_not_recorded_is_compiled(toy: Path) -> None:
    """Recorded once; then a figure that changed, a launch that went and a kernel that changed are faults."""
    file = toy / "toy.tsv"
    result = _gate(toy, str(file))
    assert result.returncode == 1 and "is not recorded   <-- FAIL: not as recorded" in result.stdout
    assert not file.exists()
    _gate(toy, str(file), "update")
    result = _gate(toy, str(file))
    assert ", 0 to compile" in result.stdout and "not as recorded" not in result.stdout
    written = file.read_text()

    *lines, last = written.splitlines(keepends=True)
    cells = last.split("\t")
    registers, spilled = -6, -5
    was, cells[registers] = cells[registers], "9"
    file.write_text("".join(lines) + "\t".join(cells))
    result = _gate(toy, str(file), "all")
    assert f"registers 9 -> {was}   <-- FAIL" in result.stdout
    assert result.stdout.count("not as recorded") == 1
    cells[spilled] = "200"
    file.write_text("".join(lines) + "\t".join(cells))
    assert "spill 200" in _gate(toy, str(file)).stdout

    file.write_text(written.replace("triton ", "triton 0"))
    result = _gate(toy, str(file))
    assert "toy.tsv is of triton 0" in result.stdout and "not as recorded" not in result.stdout
    assert ", 0 as recorded" in result.stdout

    file.write_text(written)
    (toy / "toy_ops.py").write_text(OPS.replace("tl.exp2(s)", "2 * tl.exp2(s)"))
    result = _gate(toy, str(file))
    assert "_product_kernel: its source is not that recorded   <-- FAIL" in result.stdout
    assert ", 0 as recorded" in result.stdout


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("toy_more.py", "x + 1", "x + 2", True),
        ("toy_more.py", "SIZE = tl.constexpr(2)", "SIZE = tl.constexpr(4)", True),
        ("toy_used.py", "* SIZE", "- SIZE", True),
        ("digest.py", "used(x)", "used(x + 1)", True),
        ("toy_more.py", "OTHER = tl.constexpr(3)", "OTHER = tl.constexpr(4)", False),
        ("toy_more.py", "def unused(x):\n    return x", "def unused(x):\n    return x + 1", False),
        ("toy_more.py", "import triton\n", "# moved by a line\n\nimport triton\n", False),
        ("digest.py", "    toy_used", "    # why\n    toy_used", False),
    ],
)
def test_a_source_is_all_that_it_reaches(
    tmp_path: Path, file: str, old: str, new: str, changes: bool
) -> None:
    texts = {"toy_used.py": HELPER, "toy_more.py": MORE, "digest.py": DIGEST}
    found = []
    for replaced in (False, True):
        folder = tmp_path / str(replaced)  # another place
        folder.mkdir()
        for name, text in texts.items():
            assert name != file or old in text
            (folder / name).write_text(text.replace(old, new) if replaced and name == file else text)
        result = _python(str(folder / "digest.py"), path=folder)
        assert result.returncode == 0, result.stderr
        found.append(result.stdout.split())
    (kernel, other), (kernel_now, other_now) = found
    assert (kernel != kernel_now) == changes
    assert other == other_now


def test_an_unknown_architecture_is_refused() -> None:
    result = _python(str(TESTS / "compile_gate.py"), "sm_13")
    assert result.returncode == 2 and "no architecture sm_13" in result.stderr
