"""The registered ops under `torch.library.opcheck`."""

from __future__ import annotations

import op_calls
import pytest
import torch

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", op_calls.OPS)
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    for call in op_calls.OPS[op](dtype):
        op_calls.check("cl_kernels", call)
