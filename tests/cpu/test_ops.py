"""The registered ops and their autograd Functions against `reference.py`; opcheck; compilation; dispatch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import cl_kernels as clk
from cl_kernels import autograd, chunked, dispatch, extension, ops, reference
from cl_kernels.problem import Contrast, SoftTarget

BACKENDS = ["reference", "auto"]
DTYPES = [torch.float32, torch.bfloat16]
few = settings(max_examples=50, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """Several chunks even for tiny inputs, the last one shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK_ELEMENTS", 12)
        patch.setattr(chunked, "MIN_CHUNK_ROWS", 2)
        yield


def rand(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def grad_inputs(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


def values_and_gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients for every input of a fixed random cotangent."""
    leaves = grad_inputs(*inputs)
    outputs = list(function(*leaves))
    roots = [(out, rand(i, *out.shape).to(out.dtype)) for i, out in enumerate(outputs) if out.requires_grad]
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad([out for out, _ in roots], wanted, [g for _, g in roots], allow_unused=True)
    return outputs, [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], **tolerance: float) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e.reshape(a.shape).to(a), **tolerance)


def assert_matches_reference(
    ours: Callable[..., Sequence[Tensor]],
    formula: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
) -> None:
    expected, expected_grads = values_and_gradients(formula, inputs)
    for backend in BACKENDS:
        with clk.use_backend(backend):
            outputs, grads = values_and_gradients(ours, inputs)
        assert_same(outputs, expected, rtol=1e-9, atol=1e-10)
        assert_same(grads, expected_grads, rtol=1e-8, atol=1e-9)


def inputs_of(problem: Contrast) -> tuple[Tensor | None, ...]:
    """What is differentiable in it."""
    return problem.q, problem.k, problem.scale, problem.key_bias


def over_inputs(
    function: Callable[[Contrast], Sequence[Tensor]], problem: Contrast
) -> Callable[..., Sequence[Tensor]]:
    """`function` of the problem over its differentiable inputs."""
    return lambda q, k, scale, bias: function(problem._replace(q=q, k=k, scale=scale, key_bias=bias))


def in_dtype(problem: Contrast, dtype: torch.dtype) -> Contrast:
    """As the ops take it."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if x is None else x.to(dtype)

    return problem._replace(
        q=to(problem.q, dtype), k=to(problem.k, dtype), scale=to(problem.scale, acc),
        positive_mask=to(problem.positive_mask, acc), key_bias=to(problem.key_bias, acc),
    )  # fmt: skip


def may_save_gradient(problem: Contrast) -> bool:
    return problem.k is not None and not problem.both_axes and problem.positives in ("none", "index")


@st.composite
def problems(draw: Callable) -> Contrast:
    n, d, seed = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(0, 10**6))
    m = n if draw(st.booleans()) else draw(st.integers(1, 9))
    own_keys = m == n and draw(st.booleans())
    positives = draw(st.sampled_from(["none", "labels", "index", "mask"]))
    labels = positives == "labels" or draw(st.booleans())
    classes = draw(st.integers(1, 4))
    row_labels = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    col_labels = torch.randint(classes, (m,), generator=torch.Generator().manual_seed(seed + 1))
    if own_keys and draw(st.booleans()):
        col_labels = row_labels
    bias = None
    if positives == "none" and draw(st.booleans()):
        bias = rand(seed + 2, m).masked_fill(
            rand(seed + 3, m) > draw(st.sampled_from([0.5, 5.0, -5.0])), -torch.inf
        )
    index = mask = None
    if positives == "index":
        index = torch.randint(-1, m, (n,), generator=torch.Generator().manual_seed(seed + 4))
    if positives == "mask":
        mask = (rand(seed + 5, draw(st.integers(1, n)), draw(st.integers(1, m))) - 0.3).relu()
    return Contrast(
        rand(seed + 6, n, d), None if own_keys else rand(seed + 7, m, d),
        torch.tensor(draw(st.sampled_from([0.3, 1.0, 20.0])), dtype=torch.float64),
        draw(st.sampled_from([None, 0, 0, 1, -2, 40])), row_labels if labels else None,
        col_labels if labels else None,
        draw(st.sampled_from(["all", "same", "different"])) if labels else "all",
        positives == "labels", index, mask, bias, draw(st.booleans()),
    )  # fmt: skip


@few
@given(problems())
def test_contrastive_is_the_formula(problem: Contrast) -> None:
    assert_matches_reference(
        over_inputs(autograd.contrastive, problem), over_inputs(reference.contrastive_stats, problem),
        inputs_of(problem),
    )  # fmt: skip


@few
@given(problems())
def test_contrastive_with_frozen_keys_is_the_formula(problem: Contrast) -> None:
    assert_matches_reference(
        lambda q, scale: autograd.contrastive(problem._replace(q=q, scale=scale)),
        lambda q, scale: reference.contrastive_stats(problem._replace(q=q, scale=scale)),
        (problem.q, problem.scale),
    )


def contrastive_examples() -> list[Any]:
    q, k = rand(0, 5, 3), rand(1, 7, 3)
    rows, cols = torch.tensor([0, 1, 0, 2, 1]), torch.tensor([0, 1, 0, 2, 1, 1, 3])
    scale, bias = torch.tensor(2.0, dtype=torch.float64), rand(2, 7)
    bias[3] = -torch.inf
    examples = {
        "plain": Contrast(q, None, scale, 0),
        "keys-both-axes": Contrast(q, k, scale, key_bias=bias, both_axes=True),
        "labels": Contrast(q, None, scale, 0, rows, rows, "all", True),
        "same": Contrast(q, k, scale, 0, rows, cols, "same", True, both_axes=True),
        "different": Contrast(q, k, scale, None, rows, cols, "different", key_bias=bias),
        "index": Contrast(q, k, scale, 1, positive_index=torch.tensor([3, -1, 0, 6, 2]), both_axes=True),
        "mask": Contrast(q, None, scale, 0, positive_mask=rand(3, 2, 3).abs()),
    }
    return [pytest.param(problem, id=name) for name, problem in examples.items()]


def soft_target_example(positive_in_target: str = "exclude", own: bool = True) -> SoftTarget:
    """A batch and a transposed queue."""
    return SoftTarget(
        rand(0, 4, 3), [rand(1, 5, 3), rand(2, 3, 3).T], rand(3, 4, 2), [rand(4, 5, 2), rand(5, 2, 3).T],
        torch.tensor(3.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64),
        torch.tensor([2, 0, 7, -1]) if own else None, positive_in_target,
    )  # fmt: skip


@st.composite
def soft_targets(draw: Callable) -> SoftTarget:
    n, d, e, seed = (draw(st.integers(1, 6)) for _ in range(3)), None, None, draw(st.integers(0, 10**6))
    n, d, e = n
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    transposed = draw(st.booleans())

    def keys(seed: int, width: int) -> list[Tensor]:
        return [
            rand(seed + i, width, m).T if transposed else rand(seed + i, m, width)
            for i, m in enumerate(lengths)
        ]

    positive = None
    if draw(st.booleans()):
        positive = torch.randint(-1, sum(lengths), (n,), generator=torch.Generator().manual_seed(seed))
    return SoftTarget(
        rand(seed, n, d), keys(seed + 1, d), rand(seed + 4, n, e), keys(seed + 5, e),
        torch.tensor(draw(st.sampled_from([0.5, 10.0])), dtype=torch.float64),
        torch.tensor(draw(st.sampled_from([0.5, 14.0])), dtype=torch.float64),
        positive, draw(st.sampled_from(["exclude", "zero"])),
    )  # fmt: skip


def soft_target_of(
    function: Callable[[SoftTarget], Sequence[Tensor]], problem: SoftTarget, frozen: bool
) -> tuple[Callable[..., Sequence[Tensor]], list[Tensor]]:
    """`function` over a problem's differentiable inputs, flat; q and scale alone where the rest is frozen."""
    if frozen:
        return lambda q, s: function(problem._replace(q=q, scale=s)), [problem.q, problem.scale]

    def flat(q: Tensor, t: Tensor, s: Tensor, target_s: Tensor, *segments: Tensor) -> Sequence[Tensor]:
        return function(problem.with_tensors((q, t, s, target_s, problem.positive, *segments)))

    q, t, s, target_s, _, *segments = problem.tensors()
    return flat, [q, t, s, target_s, *segments]


@few
@given(soft_targets(), st.booleans())
def test_soft_target_is_the_formula(problem: SoftTarget, frozen: bool) -> None:
    ours, inputs = soft_target_of(autograd.soft_target, problem, frozen)
    formula, _ = soft_target_of(reference.soft_target_stats, problem, frozen)
    assert_matches_reference(ours, formula, inputs)


@few
@given(st.integers(2, 7), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_dimcl_is_the_formula(n: int, d: int, masked: bool, constant: bool, seed: int) -> None:
    z0, z1 = rand(seed, n, d), rand(seed + 1, n, d) + 3
    if constant:
        z1[:, 0] = 0.7
    mask = rand(seed + 2, 2 * d, 2 * d) > 0.5 if masked else None
    assert_matches_reference(
        lambda *inputs: autograd.dimcl(*inputs, mask),
        lambda *inputs: reference.dimcl_stats(*inputs, mask),
        (z0, z1, torch.tensor(4.0, dtype=torch.float64)),
    )


@few
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_similarity_is_the_formula(n: int, m: int, d: int, own: bool, normalize: bool, seed: int) -> None:
    q = rand(seed, n, d)
    q[n // 2] = 0
    assert_matches_reference(
        lambda *inputs: [autograd.similarity(*inputs, normalize)],
        lambda *inputs: [reference.similarity_matrix(*inputs, normalize)],
        (q, None if own else rand(seed + 1, m, d), torch.tensor(1.7, dtype=torch.float64)),
    )


@few
@given(st.integers(1, 7), st.integers(1, 7), st.booleans(), st.integers(0, 10**6))
def test_masked_log_softmax_is_the_formula(n: int, m: int, masked: bool, seed: int) -> None:
    mask = rand(seed + 1, n, m) > 0.3 if masked else None
    if mask is not None:
        mask[n // 2] = False
    assert_matches_reference(
        lambda x: [autograd.masked_log_softmax(x, mask)],
        lambda x: [reference.masked_log_softmax_matrix(x, mask)],
        (rand(seed, n, m) * 30,),
    )


# Gradients of first and second order in float64


def check_derivatives(function: Callable, inputs: Sequence[Tensor | None]) -> None:
    leaves = grad_inputs(*inputs)
    for backend in BACKENDS:
        with clk.use_backend(backend):
            assert gradcheck(function, leaves)
            assert gradgradcheck(function, leaves)


def finite_outputs(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(out[out.isfinite()] for out in outputs if out.requires_grad and out.numel() > 0)


@pytest.mark.parametrize("problem", contrastive_examples())
def test_contrastive_derivatives(problem: Contrast) -> None:
    q, k, scale, bias = inputs_of(problem)
    ours = over_inputs(autograd.contrastive, problem)
    if bias is not None:
        bias = bias.masked_fill(bias == -torch.inf, -1.0)  # finite differences of -inf are NaN
    check_derivatives(lambda *inputs: finite_outputs(ours(*inputs)), (q, k, scale, bias))


@pytest.mark.parametrize("how", ["exclude", "zero", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_soft_target_derivatives(how: str, frozen: bool) -> None:
    problem = soft_target_example("exclude" if how == "none" else how, own=how != "none")
    ours, inputs = soft_target_of(autograd.soft_target, problem, frozen)
    check_derivatives(lambda *leaves: finite_outputs(ours(*leaves)), inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_dimcl_derivatives(masked: bool) -> None:
    mask = rand(9, 6, 6) > 0 if masked else None
    scale = torch.tensor(2.0, dtype=torch.float64)
    check_derivatives(
        lambda *inputs: finite_outputs(autograd.dimcl(*inputs, mask)), (rand(0, 5, 3), rand(1, 5, 3), scale)
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_similarity_derivatives(normalize: bool, own: bool) -> None:
    inputs = (rand(0, 4, 3), None if own else rand(1, 5, 3), torch.tensor(2.0, dtype=torch.float64))
    check_derivatives(lambda *leaves: autograd.similarity(*leaves, normalize), inputs)


def test_masked_log_softmax_derivatives() -> None:
    mask = rand(1, 5, 6) > 0
    mask[2] = False
    check_derivatives(lambda x: autograd.masked_log_softmax(x, mask)[mask], (rand(0, 5, 6),))
    check_derivatives(lambda x: autograd.masked_log_softmax(x, None), (rand(0, 5, 6),))


def test_second_derivative_keeps_related_inputs_apart() -> None:
    """Keys computed from the queries: the recomputation must not differentiate through that."""

    def penalty(lse: Callable[[Tensor, Tensor], Tensor], q: Tensor) -> Tensor:
        k = q.flip(0) * 2
        (grad,) = torch.autograd.grad(lse(q, k).sum(), k, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), q)[0]

    (q,) = grad_inputs(rand(0, 5, 3))
    torch.testing.assert_close(
        penalty(lambda q, k: autograd.contrastive(Contrast(q, k, 1.5, 0)).lse, q),
        penalty(lambda q, k: reference.contrastive_stats(Contrast(q, k, 1.5, 0))[0], q),
    )


# Dtypes, scalars, autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_inputs_sum_in_float32(dtype: torch.dtype, backend: str) -> None:
    q, k = rand(0, 9, 4, dtype=dtype), rand(1, 6, 4, dtype=dtype)
    expected, expected_grads = values_and_gradients(
        lambda q, k: reference.contrastive_stats(Contrast(q, k, 2.0, 0))[:1], (q.double(), k.double())
    )
    with clk.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        outputs, grads = values_and_gradients(
            lambda q, k: [autograd.contrastive(Contrast(q, k, 2.0, 0)).lse], (q, k)
        )
    assert outputs[0].dtype == torch.float64  # a statistic
    assert [g.dtype for g in grads] == [dtype, dtype]
    assert_same(outputs, expected, rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    assert_same(grads, expected_grads, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scale_gets_its_gradient_in_its_own_dtype(dtype: torch.dtype) -> None:
    q = rand(0, 6, 3, dtype=torch.float32)
    scale = torch.tensor(1.5, dtype=dtype, requires_grad=True)
    autograd.contrastive(Contrast(q, None, scale, 0)).lse.sum().backward()
    step = 1e-2
    low, high = (
        autograd.contrastive(Contrast(q.double(), None, 1.5 + s, 0)).lse.sum() for s in (-step, step)
    )
    assert scale.grad.dtype == dtype
    assert scale.grad.item() == pytest.approx(((high - low) / (2 * step)).item(), rel=1e-2)


def test_frozen_keys_save_the_gradient_only_where_a_backward_can_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = []
    call = dispatch.call
    monkeypatch.setattr(
        dispatch,
        "call",
        lambda name, backend, *args: (saved.append((name, args[-1])), call(name, backend, *args))[1],
    )
    problem = soft_target_example()
    q, k, t = problem.q.requires_grad_(), problem.k, problem.target_q

    def run(q: Tensor, k: list[Tensor], t: Tensor) -> bool:
        autograd.soft_target(problem._replace(q=q, k=k, target_q=t))
        return saved[-1][1]

    assert run(q, k, t)
    assert not run(q, k, t.clone().requires_grad_())
    assert not run(q, [k[0].clone().requires_grad_(), k[1]], t)
    assert not run(q.detach(), k, t)
    with torch.no_grad():
        assert not run(q, k, t)


# opcheck


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


# torch.compile


def compiled_and_eager(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], backend: str = "aot_eager"
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected, expected_grads = values_and_gradients(lambda *leaves: [function(*leaves)], inputs)
    outputs, grads = values_and_gradients(lambda *leaves: [compiled(*leaves)], inputs)
    assert_same(outputs, expected)
    assert_same(grads, expected_grads)


@pytest.mark.parametrize(
    ("problem", "clk_backend"),
    [
        (*p.values, b)
        for b in BACKENDS
        for p in contrastive_examples()
        if b == "auto" or p.id in ("same", "mask")
    ],
)
def test_compile_contrastive(problem: Contrast, clk_backend: str) -> None:
    inputs = [x for x in inputs_of(problem) if x is not None]
    ours = over_inputs(autograd.contrastive, problem)

    def loss(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        stats = ours(*(None if x is None else next(given) for x in inputs_of(problem)))
        total = stats.lse.masked_fill(stats.lse == -torch.inf, 0).sin().sum() + 2 * stats.positive_sum.sum()
        return total + stats.lse_cols.masked_fill(stats.lse_cols == -torch.inf, 0).cos().sum()

    with clk.use_backend(clk_backend):
        compiled_and_eager(loss, inputs)


@pytest.mark.parametrize("clk_backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_compile_soft_target(frozen: bool, clk_backend: str) -> None:
    ours, inputs = soft_target_of(autograd.soft_target, soft_target_example(), frozen)
    with clk.use_backend(clk_backend):
        compiled_and_eager(lambda *leaves: sum(out.sin().sum() for out in ours(*leaves)), inputs)


@pytest.mark.parametrize("clk_backend", BACKENDS)
def test_compile_the_other_primitives(clk_backend: str) -> None:
    q, k, scale = rand(0, 6, 3), rand(1, 5, 3), torch.tensor(2.0, dtype=torch.float64)
    mask = rand(2, 6, 5) > 0
    with clk.use_backend(clk_backend):
        compiled_and_eager(
            lambda q, s: sum(x.sin().sum() for x in autograd.dimcl(q, q.flip(0) + q.sin(), s)), (q, scale)
        )
        compiled_and_eager(lambda q, k, s: autograd.similarity(q, k, s, True).sin().sum(), (q, k, scale))
        compiled_and_eager(
            lambda q, k: autograd.masked_log_softmax(q @ k.T, mask).masked_fill(~mask, 0).sin().sum(), (q, k)
        )


def test_compile_takes_one_tensor_in_several_places() -> None:
    scale = torch.tensor(2.0, dtype=torch.float64)
    compiled_and_eager(
        lambda q, s: sum(x.sum() for x in autograd.soft_target(SoftTarget(q, [q, q], q, [q, q], s, s))),
        (rand(0, 4, 3), scale),
    )
    compiled_and_eager(lambda q: autograd.contrastive(Contrast(q, q, 2.0, 0)).lse.sum(), (rand(0, 4, 3),))
    compiled_and_eager(lambda q: autograd.similarity(q, q, 2.0, True).sin().sum(), (rand(0, 4, 3),))
    compiled_and_eager(lambda q: autograd.dimcl(q, q, 2.0)[0].sin().sum(), (rand(0, 4, 3),))


def test_compile_for_any_batch_size() -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, labels: autograd.contrastive(Contrast(q, None, 2.0, 0, labels, labels, "same")).lse,
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for n in (4, 5, 9):
        q, labels = rand(n, n, 3).requires_grad_(), torch.arange(n) % 2
        with torch.compiler.set_stance("default" if n == 4 else "fail_on_recompile"):
            lse = compiled(q, labels)
        (grad,) = torch.autograd.grad(lse.sum(), q)
        expected = reference.contrastive_stats(Contrast(q, None, 2.0, 0, labels, labels, "same"))[0]
        torch.testing.assert_close(lse, expected)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), q)[0])


def test_compile_with_inductor() -> None:
    labels = torch.tensor([0, 1, 0, 1, 2, 2])

    def loss(q: Tensor) -> Tensor:
        stats = autograd.contrastive(Contrast(q * 2, None, 1.5, 0, labels, labels, "all", True))
        return (stats.lse - stats.positive_sum / stats.positive_count).mean()

    compiled_and_eager(loss, (rand(0, 6, 3),), backend="inductor")


def test_compile_under_autocast() -> None:
    def loss(q: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return clk.contrastive_lse(q, scale=1.5).sum()

    compiled_and_eager(loss, (rand(0, 6, 3, dtype=torch.float32),))


def test_compile_traces_again_for_another_backend_but_not_for_another_float() -> None:
    torch.compiler.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    q = rand(0, 6, 3)
    compiled = torch.compile(
        lambda q, s: autograd.contrastive(Contrast(q, None, s, 0)).lse, fullgraph=True, backend=counting
    )
    for scale in (0.5, 1.25, 2.5, 3.75, 4.5):
        torch.testing.assert_close(compiled(q, scale), autograd.contrastive(Contrast(q, None, scale, 0)).lse)
    assert len(graphs) <= 2
    assert any("contrastive_forward" in target for target in graphs[-1])
    with clk.use_backend("reference"):
        compiled(q, 2.5)
    assert not any("contrastive_forward" in target for target in graphs[-1])
    compiled(q, 2.5)
    assert len(graphs) <= 3


def test_double_backward_of_compiled_code_is_refused() -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q: autograd.contrastive(Contrast(q, None, 1.0, 0)).lse, fullgraph=True, backend="aot_eager"
    )
    (q,) = grad_inputs(rand(0, 5, 3))
    (grad,) = torch.autograd.grad(compiled(q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not currently support double backward"):
        torch.autograd.grad(grad.sum(), q)


# Public primitives


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("masked", [False, True])
def test_masked_log_softmax_of_minus_infinities(masked: bool) -> None:
    """A row of nothing but -inf is all -inf and gets no gradient, as a fully masked one; a -inf beside finite
    logits gets that of torch."""
    logits = torch.randn(4, 6, dtype=torch.float64)
    logits[1], logits[2, 3] = -torch.inf, -torch.inf
    mask = torch.ones(4, 6, dtype=torch.bool)
    if masked:
        mask[3], logits[3, :5], mask[1, 2] = torch.tensor([1, 1, 1, 1, 1, 0]), -torch.inf, False
    cotangent = torch.randn(4, 6, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for function in (clk.masked_log_softmax, clk.reference.masked_log_softmax):
            x = logits.to(dtype).requires_grad_()
            out = function(x, mask if masked else None)
            assert (out[1] == -torch.inf).all()
            (found,) = torch.autograd.grad(out, x, cotangent.to(dtype))
            assert (found[1] == 0).all()
            if masked:
                assert (found[3] == 0).all()
            plain = logits.to(dtype)[2].requires_grad_()
            (expected,) = torch.autograd.grad(plain.log_softmax(0), plain, cotangent.to(dtype)[2])
            tolerance = 1e-6 if dtype != torch.bfloat16 else 0.02
            torch.testing.assert_close(found[2], expected, rtol=tolerance, atol=tolerance)


def test_masked_log_softmax_takes_any_rank_and_broadcasts() -> None:
    logits, mask = rand(0, 2, 3, 4), rand(1, 3, 1) > 0
    mask[0], mask[1] = True, False
    out = clk.masked_log_softmax(logits, mask)
    torch.testing.assert_close(out[:, 0], logits[:, 0].log_softmax(-1))
    assert (out[:, 1] == -torch.inf).all()
    torch.testing.assert_close(clk.masked_log_softmax(logits[0, 0]), logits[0, 0].log_softmax(-1))


def test_soft_target_without_any_target() -> None:
    """One key, the positive, left out of the target: one-hot; a row without a positive keeps its target."""
    q, k = rand(0, 2, 3), rand(1, 1, 3)
    arguments = {"scale": 2.0, "target_scale": 3.0, "reduction": "none"}
    loss = clk.soft_target_cross_entropy(q, k, q, k, positive=torch.tensor([0, -1]), coeff=0.25, **arguments)
    torch.testing.assert_close(loss, torch.zeros(2, dtype=torch.float64))
    q.requires_grad_()
    keys = torch.cat([k, k * 2])
    clk.soft_target_cross_entropy(
        q, keys, q, keys, positive=torch.tensor([0, 1]), coeff=1, **arguments
    ).sum().backward()
    assert q.grad.isfinite().all()


@few
@given(soft_targets(), st.sampled_from([0.0, 0.4, 1.0]))
def test_soft_target_cross_entropy_is_the_reference(problem: SoftTarget, coeff: float) -> None:
    q, k, t, u, scale, target_scale, positive, how = problem
    options = {"positive": positive, "positive_in_target": how, "reduction": "none"}
    weight = torch.tensor(coeff, dtype=torch.float64) if positive is not None else 0.0

    def call(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        if positive is None:
            return lambda q, s: [function(q, k, t, u, scale=s, target_scale=target_scale, **options)]
        return lambda q, s, c: [function(q, k, t, u, scale=s, target_scale=target_scale, coeff=c, **options)]

    inputs = (q, scale) if positive is None else (q, scale, weight)
    assert_matches_reference(
        call(clk.soft_target_cross_entropy), call(reference.soft_target_cross_entropy), inputs
    )


@pytest.mark.parametrize("both_axes", [False, True])
@pytest.mark.parametrize("exclude", ["self", None, 2])
def test_contrastive_lse_is_the_reference(exclude: str | int | None, both_axes: bool) -> None:
    q, k, bias = rand(0, 5, 3, dtype=torch.float32), rand(1, 6, 3), rand(2, 6)
    options = {
        "scale": 2.0, "exclude": exclude, "row_labels": torch.tensor([0, 1, 1, 2, 0]),
        "col_labels": torch.tensor([0, 1, 1, 0, 2, 0]), "among": "different", "key_bias": bias,
        "both_axes": both_axes,
    }  # fmt: skip
    ours, expected = clk.contrastive_lse(q, k, **options), reference.contrastive_lse(q, k, **options)
    assert_same(ours if both_axes else [ours], expected if both_axes else [expected])


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "^q ", lambda q: clk.similarity(q.long())),
        (ValueError, "^k ", lambda q: clk.similarity(q, q[:, :1])),
        (ValueError, "^scale ", lambda q: clk.similarity(q, scale=float("nan"))),
        (TypeError, "^normalize ", lambda q: clk.similarity(q, normalize=1)),
        (ValueError, "^logits ", lambda q: clk.masked_log_softmax(q.sum())),
        (ValueError, "^mask ", lambda q: clk.masked_log_softmax(q, torch.ones(2, dtype=torch.bool))),
        (ValueError, "^mask ", lambda q: clk.masked_log_softmax(q, torch.ones(1, 5, 3, dtype=torch.bool))),
        (TypeError, "^mask ", lambda q: clk.masked_log_softmax(q, q)),
        (ValueError, "^exclude ", lambda q: clk.contrastive_lse(q, exclude="other")),
        (ValueError, "^row_labels ", lambda q: clk.contrastive_lse(q, among="same")),
        (ValueError, "^among ", lambda q: clk.contrastive_lse(q, among="equal")),
        (ValueError, "^key_bias ", lambda q: clk.contrastive_lse(q, key_bias=torch.ones(3))),
        (ValueError, "^positive ", lambda q: clk.soft_target_cross_entropy(
            q, q, q, q, scale=1.0, target_scale=1.0, coeff=0.5)),
        (ValueError, "^target_k ", lambda q: clk.soft_target_cross_entropy(
            q, [q, q], q, q, scale=1.0, target_scale=1.0)),
        (ValueError, "^coeff ", lambda q: clk.soft_target_cross_entropy(
            q, q, q, q, scale=1.0, target_scale=1.0, coeff=1.5)),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(error: type[Exception], match: str, call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(error, match=match):
        call(torch.ones(5, 3))


# Dispatch, extension, info


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
    for backend in ("triton", "cuda"):
        with clk.use_backend(backend), pytest.raises(clk.BackendError, match="a rare option"):
            dispatch.require_engine("a rare option")


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


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = os.path.dirname(os.path.dirname(os.path.abspath(clk.__file__)))
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


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


def test_a_wrong_backend_in_the_environment_is_refused() -> None:
    done = run_python("-c", "import cl_kernels", CL_KERNELS_BACKEND="gpu", CL_KERNELS_NO_EXTENSION="1")
    assert done.returncode != 0
    assert "CL_KERNELS_BACKEND must be one of" in done.stderr


@pytest.mark.parametrize("problem", contrastive_examples())
def test_results_do_not_depend_on_the_chunks(problem: Contrast, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*problem, may_save_gradient(problem))
    small = chunked.contrastive_forward(*arguments)
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1 << 22)
    assert_same(chunked.contrastive_forward(*arguments), small)


def test_problem_with_nothing_included() -> None:
    """A batch of one: empty denominators give -inf, and no gradient is NaN."""
    index = torch.tensor([-1])
    problem = Contrast(rand(0, 1, 3), None, torch.tensor(5.0), 0, positive_index=index, both_axes=True)
    ours = over_inputs(autograd.contrastive, problem)
    for backend in BACKENDS:
        with clk.use_backend(backend):
            outputs, grads = values_and_gradients(ours, inputs_of(problem))
        assert outputs[0].item() == outputs[1].item() == -torch.inf
        assert all((g == 0).all() for g in grads)
