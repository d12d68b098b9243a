"""The primitives, forward and backward, are the formulas of `reference.py` on problems drawn at random."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from primitive_checks import (
    BACKENDS,
    assert_matches_reference,
    assert_same,
    contrastive_examples,
    few,
    inputs_of,
    may_save_gradient,
    over_inputs,
    problems,
    rand,
    soft_target_of,
    soft_targets,
    values_and_gradients,
)

import cl_kernels as clk
from cl_kernels import autograd, chunked, reference
from cl_kernels.problem import Contrast, SoftTarget

pytestmark = pytest.mark.usefixtures("small_chunks")


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
