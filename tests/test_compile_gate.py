"""The compile gate finds what it looks for. The whole of it is `make compile-gate`."""

from __future__ import annotations

import importlib.util
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
import compile_gate, toy_ops
sys.exit(min(compile_gate.check(["sm_90"], toy_ops, match), 1))
"""


def _python(*arguments: str, path: Path = TESTS) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (path, TESTS, TESTS.parent)))
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )


def test_measures_and_finds_faults(tmp_path: Path) -> None:
    (tmp_path / "toy_ops.py").write_text(OPS)
    (tmp_path / "run.py").write_text("match = ''\n" + RUN)
    result = _python(str(tmp_path / "run.py"), path=tmp_path)
    lines = result.stdout.splitlines()
    assert result.returncode == 1, result.stderr
    half = [line for line in lines if line.startswith("sm_90  product half 64 ")]
    assert half and all(" wgmma" in line and "spill 0" in line and "exp 1.00" in line for line in half)
    assert not any("FAIL" in line for line in half)
    spilling = [line for line in lines if line.startswith("sm_90  product float32 64 ")]
    assert all("1x1" in line for line in spilling)
    assert "sm_90  forgotten half 64   <-- FAIL: no op uses this row" in lines
    assert "contrastive_forward   <-- FAIL: has no Triton implementation" in lines


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
@pytest.mark.skipif(
    importlib.util.find_spec("cl_kernels.triton.ops") is None, reason="there are no Triton ops yet"
)
def test_log_softmax_passes(architecture: str) -> None:
    result = _python(str(TESTS / "compile_gate.py"), architecture, "--match", "masked_log_softmax")
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_unknown_architecture_is_refused() -> None:
    result = _python(str(TESTS / "compile_gate.py"), "sm_13")
    assert result.returncode == 2 and "no architecture sm_13" in result.stderr
