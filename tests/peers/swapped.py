"""A pytest plugin: run a library's own tests on our losses, and count the calls that ran fused.

    CL_KERNELS_SWAP=lightly python -m pytest -p peers.swapped ...

with this folder's parent on the path. The last lines tell how often each loss ran fused.
"""

from __future__ import annotations

import os
from typing import Any

import cl_kernels
from cl_kernels import integrations


def pytest_configure(config: Any) -> None:
    for name in os.environ["CL_KERNELS_SWAP"].split(","):
        cl_kernels.patch(name)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, calls in integrations.calls().items():
        terminalreporter.write_line(f"{name}: {calls.fused} fused, {calls.fallback} as the library has it")
