"""The examples over processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="not a source checkout")


@pytest.mark.parametrize("name", ["clip", "sce", "supcon"])
def test_two_steps(name: str) -> None:
    pytest.importorskip("sklearn")
    script = f"import distributed_{name}; distributed_{name}.main(steps=2, batch=33)"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--no-python", sys.executable, "-c", script],
        cwd=EXAMPLES,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("last loss "), done.stdout
