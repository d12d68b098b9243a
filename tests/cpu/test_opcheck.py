"""The registered ops under `torch.library.opcheck`: schemas, fake kernels, dispatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from primitive_checks import contrastive_examples, in_dtype, may_save_gradient, rand, soft_target_example

from cl_kernels.problem import Contrast

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("small_chunks")


def check_op(name: str, *arguments: Any) -> Any:
    torch.library.opcheck(getattr(torch.ops.cl_kernels, name).default, arguments)
    return getattr(torch.ops.cl_kernels, name)(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", contrastive_examples())
def test_opcheck_contrastive(problem: Contrast, dtype: torch.dtype) -> None:
    arguments = in_dtype(problem, dtype)
    lse, lse_cols, positive_sum, _, residual = check_op("contrastive_forward", *arguments, False)
    grads = (
        torch.ones_like(lse),
        torch.ones_like(lse_cols) if problem.both_axes else None,
        torch.ones_like(positive_sum) if problem.positives != "none" else None,
    )
    own_keys, biased = problem.k is None, problem.key_bias is not None
    for needs in [(True, not own_keys, biased), (False, False, False)]:
        check_op("contrastive_backward", *grads, *arguments, lse, lse_cols, residual, needs)
    only_q = (True, False, False)
    check_op("contrastive_backward", None, *grads[1:], *arguments, lse, lse_cols, residual, only_q)
    if may_save_gradient(problem):
        residual = check_op("contrastive_forward", *arguments, True)[-1]
        check_op("contrastive_backward", *grads, *arguments, lse, lse_cols, residual, only_q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["exclude", "zero", "none"])
def test_opcheck_soft_target(how: str, dtype: torch.dtype) -> None:
    q, k, t, u, scale, target_scale, positive, how = soft_target_example(
        "exclude" if how == "none" else how, own=how != "none"
    )
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = (
        q.to(dtype), [x.to(dtype) for x in k], t.to(dtype), [x.to(dtype) for x in u], scale.to(acc),
        target_scale.to(acc), positive, how,
    )  # fmt: skip
    for save_gradient in (False, True):
        lse, *saved = check_op("soft_target_forward", *arguments, save_gradient)
        ones = torch.ones_like(lse)
        grads = (ones, None, -ones, None if positive is None else ones)
        for needs in [(True, False, False, False), (not save_gradient,) * 4]:
            check_op("soft_target_backward", *grads, *arguments, lse, *saved, needs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_dimcl(masked: bool, dtype: torch.dtype) -> None:
    scale = torch.tensor(4.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    arguments = (
        rand(0, 5, 3, dtype=dtype),
        rand(1, 5, 3, dtype=dtype),
        scale,
        rand(2, 6, 6) > 0 if masked else None,
    )
    lse, positive_sum, _, mean, rnorm = check_op("dimcl_forward", *arguments)
    check_op("dimcl_backward", lse, positive_sum, *arguments, lse, mean, rnorm)
    check_op("dimcl_backward", None, positive_sum, *arguments, lse, mean, rnorm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_opcheck_similarity(own: bool, normalize: bool, dtype: torch.dtype) -> None:
    scale = torch.tensor(4.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    arguments = (rand(0, 5, 3, dtype=dtype), None if own else rand(1, 4, 3, dtype=dtype), scale, normalize)
    out, *rnorms = check_op("similarity_forward", *arguments)
    for needs in [(True, not own), (False, False)]:
        check_op("similarity_backward", out, *arguments, *rnorms, needs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_masked_log_softmax(masked: bool, dtype: torch.dtype) -> None:
    mask = rand(1, 5, 6) > 0 if masked else None
    out = check_op("masked_log_softmax_forward", rand(0, 6, 5, dtype=dtype).T, mask)
    check_op("masked_log_softmax_backward", rand(2, 6, 5, dtype=dtype).T, out, mask)
