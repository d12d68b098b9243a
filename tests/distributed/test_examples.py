"""The examples over processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="not a source checkout")


SCRIPT = """
import distributed_clip, distributed_sce, distributed_supcon

for example in (distributed_clip, distributed_sce, distributed_supcon):
    example.main(steps=2, batch=33)
"""


def test_two_steps_of_each() -> None:
    pytest.importorskip("sklearn")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--no-python", sys.executable, "-c", SCRIPT],
        cwd=EXAMPLES,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("last loss ") == 3, done.stdout
