"""`python -m cl_kernels info`, and what a command imports."""

from __future__ import annotations

import json

import pytest
import torch
from processes import run_python

from cl_kernels import __main__, ops


def test_info_without_the_extension() -> None:
    done = run_python("-W", "error", "-m", "cl_kernels", "info", "--json", CL_KERNELS_NO_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["versions"]["torch"] == torch.__version__
    rows = {(row["op"], row["device"]): row for row in info["ops"]}
    assert set(ops.SCHEMAS) == {op for op, _ in rows}
    row = rows["contrastive_forward", "cpu"]
    assert row["backend"] == "reference"
    assert "CL_KERNELS_NO_EXTENSION" in row["reason"]


def test_info_is_a_table() -> None:
    done = run_python("-m", "cl_kernels", "info")
    assert done.returncode == 0, done.stderr
    for word in ("torch", "float32 matmul precision", "contrastive_forward", "similarity_backward"):
        assert word in done.stdout


@pytest.mark.parametrize("command", __main__.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        __main__.main([command, "--help"])
    assert done.value.code == 0
    assert f"usage: python -m cl_kernels {command}" in capsys.readouterr().out


LISTED = """
import sys
from cl_kernels.__main__ import main
assert main(sys.argv[1:]) == 0
print("imported:", *sys.modules)
"""


@pytest.mark.parametrize("command", ["info", "check --losses clip --rows 3 --dtype float64", "estimate clip"])
def test_a_command_imports_no_benchmark(command: str) -> None:
    done = run_python("-c", LISTED, *command.split(), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    modules = done.stdout.partition("imported: ")[2].split()
    assert f"cl_kernels.tools.{command.split()[0]}" in modules
    assert not [name for name in modules if name.startswith(("cl_kernels.bench", "matplotlib", "pandas"))]
