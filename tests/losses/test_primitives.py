"""The public primitives: edges, agreement with the reference, and the arguments that they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from primitive_checks import assert_matches_reference, assert_same, few, rand, soft_targets
from torch import Tensor

import cl_kernels as clk
from cl_kernels import reference
from cl_kernels.problem import SoftTarget

pytestmark = pytest.mark.usefixtures("small_chunks")


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
