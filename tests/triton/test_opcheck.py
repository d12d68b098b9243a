"""The ops of Triton's library under `torch.library.opcheck`, on the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import op_calls
import pytest
import torch

from cl_kernels import ops
from cl_kernels.triton import entry_points


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Iterator[None]:
    library = torch.library.Library(ops.TRITON_NAMESPACE, "IMPL")
    for name in ops.SCHEMAS:
        library.impl(name, getattr(entry_points, name), "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("op", op_calls.OPS)
def test_opcheck(op: str) -> None:
    for call in op_calls.for_gpus(op):
        op_calls.check(ops.TRITON_NAMESPACE, call, op_calls.SCHEMA_TESTS)
