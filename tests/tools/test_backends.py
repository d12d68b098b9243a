"""The choice of a backend by name: `use_backend`, CL_KERNELS_BACKEND, and why one cannot serve."""

from __future__ import annotations

import pytest
import torch
from primitive_checks import grad_inputs, rand
from processes import run_python

import cl_kernels as clk
from cl_kernels import dispatch, extension


def test_use_backend_is_setter_and_context_manager() -> None:
    q = rand(0, 4, 3)
    with clk.use_backend("auto"):
        clk.use_backend("reference")
        assert dispatch.select("contrastive_forward", q) == "reference"
        with clk.use_backend("auto"):
            assert dispatch.select("contrastive_forward", q) == "auto"
        assert dispatch.select("contrastive_forward", q) == "reference"
    with pytest.raises(ValueError, match="'gpu'"):
        clk.use_backend("gpu")


def test_backends_that_cannot_serve_say_why() -> None:
    with clk.use_backend("cuda"), pytest.raises(clk.BackendError, match="GPU tensors, not meta tensors"):
        clk.contrastive_lse(rand(0, 4, 3).to("meta"))


def test_cpu_backend_by_name() -> None:
    q = rand(0, 4, 3)
    with clk.use_backend("cpu"):
        if extension.cpu.module is None:
            with pytest.raises(clk.BackendError, match="compiled extension"):
                clk.contrastive_lse(q)
        else:
            with clk.use_backend("reference"):
                expected = clk.contrastive_lse(q)
            torch.testing.assert_close(clk.contrastive_lse(q), expected)
            with pytest.raises(clk.BackendError, match="CPU tensors"):
                clk.contrastive_lse(q.to("meta"))


def test_backward_keeps_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    call = dispatch.call
    monkeypatch.setattr(
        dispatch,
        "call",
        lambda name, backend, *args: (served.append((name, backend)), call(name, backend, *args))[1],
    )
    (q,) = grad_inputs(rand(0, 4, 3))
    with clk.use_backend("reference"):
        loss = clk.contrastive_lse(q).sum()
    loss.backward()
    assert served == [("contrastive_forward", "reference"), ("contrastive_backward", "reference")]


def test_a_wrong_backend_in_the_environment_is_refused() -> None:
    done = run_python("-c", "import cl_kernels", CL_KERNELS_BACKEND="gpu", CL_KERNELS_NO_EXTENSION="1")
    assert done.returncode != 0
    assert "CL_KERNELS_BACKEND must be one of" in done.stderr
