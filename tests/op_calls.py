"""Calls of every registered op, for `torch.library.opcheck`: schemas, fake kernels, dispatch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from primitive_checks import contrastive_examples, in_dtype, may_save_gradient, rand, soft_target_example

from cl_kernels.dtypes import accumulate_dtype

Call = tuple[str, tuple[Any, ...]]  # an op's name, its arguments
SCHEMA_TESTS = ("test_schema", "test_faketensor", "test_autograd_registration")


def check(namespace: str, call: Call, tests: Any = None) -> None:
    name, arguments = call
    options = {} if tests is None else {"test_utils": tests}
    torch.library.opcheck(getattr(getattr(torch.ops, namespace), name).default, arguments, **options)


def _made(name: str, *arguments: Any) -> tuple[Call, Any]:
    return (name, arguments), getattr(torch.ops.cl_kernels, name)(*arguments)


def contrastive(dtype: torch.dtype, by_mask: bool = True) -> Iterator[Call]:
    for example in contrastive_examples():
        problem = example.values[0]
        if problem.by_mask and not by_mask:
            continue
        arguments = in_dtype(problem, dtype)
        call, (lse, lse_cols, positive_sum, _, residual) = _made("contrastive_forward", *arguments, False)
        yield call
        grads = (
            torch.ones_like(lse),
            torch.ones_like(lse_cols) if problem.both_axes else None,
            torch.ones_like(positive_sum) if problem.positives != "none" else None,
        )
        own_keys, biased = problem.k is None, problem.key_bias is not None
        saved, only_q = (*arguments, lse, lse_cols), (True, False, False, False)
        for needs in [(True, not own_keys, True, biased), (False, False, False, False)]:
            yield "contrastive_backward", (*grads, *saved, residual, needs)
        yield "contrastive_backward", (None, *grads[1:], *saved, residual, only_q)
        if may_save_gradient(problem):
            call, (*_, residual) = _made("contrastive_forward", *arguments, True)
            yield call
            yield "contrastive_backward", (*grads, *saved, residual, only_q)


def soft_target(dtype: torch.dtype) -> Iterator[Call]:
    acc = accumulate_dtype(dtype)
    for how in ("exclude", "zero", "none"):
        q, k, t, u, scale, target_scale, positive, how = soft_target_example(
            "exclude" if how == "none" else how, own=how != "none"
        )
        arguments = (
            q.to(dtype), [x.to(dtype) for x in k], t.to(dtype), [x.to(dtype) for x in u], scale.to(acc),
            target_scale.to(acc), positive, how,
        )  # fmt: skip
        for save_gradient in (False, True):
            call, (lse, *saved) = _made("soft_target_forward", *arguments, save_gradient)
            yield call
            ones = torch.ones_like(lse)
            grads = (ones, None, -ones, None if positive is None else ones)
            for needs in [(True, False, False, False), (not save_gradient,) * 4]:
                yield "soft_target_backward", (*grads, *arguments, lse, *saved, needs)


def dimcl(dtype: torch.dtype) -> Iterator[Call]:
    scale = torch.tensor(4.0, dtype=accumulate_dtype(dtype))
    for mask in (None, rand(2, 6, 6) > 0):
        arguments = (rand(0, 5, 3, dtype=dtype), rand(1, 5, 3, dtype=dtype), scale, mask)
        call, (lse, positive_sum, _, mean, rnorm) = _made("dimcl_forward", *arguments)
        yield call
        for grad, needs_scale in ((lse, True), (None, False)):
            yield "dimcl_backward", (grad, positive_sum, *arguments, lse, mean, rnorm, needs_scale)


def similarity(dtype: torch.dtype) -> Iterator[Call]:
    scale = torch.tensor(4.0, dtype=accumulate_dtype(dtype))
    for k in (None, rand(1, 4, 3, dtype=dtype)):
        for normalize in (False, True):
            arguments = (rand(0, 5, 3, dtype=dtype), k, scale, normalize)
            call, (out, *rnorms) = _made("similarity_forward", *arguments)
            yield call
            for needs in [(True, k is not None), (False, False)]:
                yield "similarity_backward", (out, *arguments, *rnorms, needs)


def masked_log_softmax(dtype: torch.dtype) -> Iterator[Call]:
    for mask in (None, rand(1, 5, 6) > 0):
        call, out = _made("masked_log_softmax_forward", rand(0, 6, 5, dtype=dtype).T, mask)
        yield call
        yield "masked_log_softmax_backward", (rand(2, 6, 5, dtype=dtype).T, out, mask)


OPS: dict[str, Callable[[torch.dtype], Iterator[Call]]] = {
    function.__name__: function
    for function in (contrastive, soft_target, dimcl, similarity, masked_log_softmax)
}


def for_gpus(op: str) -> Iterator[Call]:
    """The calls that the kernels for GPUs serve, in float32."""
    return contrastive(torch.float32, by_mask=False) if op == "contrastive" else OPS[op](torch.float32)
