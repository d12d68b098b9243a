"""The ops of the CUDA C++ library under `torch.library.opcheck`, on the emulator."""

from __future__ import annotations

import op_calls
import op_checks
import pytest

from cl_kernels import ops


@pytest.mark.parametrize("op", op_calls.OPS)
def test_opcheck(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op_checks.prepare_cuda("80", monkeypatch)
    for call in op_calls.for_gpus(op):
        op_calls.check(ops.CUDA_NAMESPACE, call, op_calls.SCHEMA_TESTS)
