"""Inputs in any layout and dtype, labels of any dtype; inputs are left as they were."""

from __future__ import annotations

import comparisons
import pytest
import torch
from comparisons import Problem, assert_parity, two_views, unit

import cl_kernels as clk

pytestmark = pytest.mark.usefixtures("backend", "poisoned", "one_thread")


def test_transposed_queue() -> None:
    q, k = two_views("random", 9, 12)
    stored = unit(12, 40).contiguous()
    queue = stored.T
    assert not queue.is_contiguous()
    for problem in (
        Problem("sce_loss", {"q": q, "k": k, "queue": queue}, {"coeff": 0.3}, frozen=("k", "queue")),
        Problem("sce_loss", {"q": q, "k": k, "k_global": k, "queue": queue}, {"coeff": 0.3}),
        Problem("info_nce_loss", {"q": q, "k": k, "queue": queue}),
    ):
        copied = Problem(
            problem.function, {**problem.inputs, "queue": queue.contiguous()}, problem.options, problem.frozen
        )
        assert_parity(problem)
        for name, result in comparisons.ours(problem).items():
            torch.testing.assert_close(result, comparisons.ours(copied)[name], rtol=1e-5, atol=1e-6, msg=name)


def test_non_contiguous_inputs() -> None:
    wide = unit(14, 3, 20)
    strided = {"features": wide[:, ::2, ::2], "labels": torch.arange(28)[::2] % 5}
    assert not strided["features"].is_contiguous()
    assert_parity(Problem("supcon_loss", strided))
    assert_parity(Problem("selfcon_loss", {"features": wide.transpose(0, 1).contiguous().transpose(0, 1)}))
    q, k = unit(20, 14).T, unit(14, 40)[:, 1::2]
    for function in ("nt_xent_loss", "dcl_loss", "dimcl_loss"):
        assert_parity(Problem(function, {"z0": q, "z1": k}))
    for function in ("info_nce_loss", "sce_loss"):
        assert_parity(Problem(function, {"q": q, "k": k}))
    assert_parity(Problem("clip_loss", {"image_features": q, "text_features": k}, {"logit_scale": 10.0}))
    expanded = unit(1, 20).expand(14, 20)
    assert_parity(Problem("info_nce_loss", {"q": q, "k": expanded}))


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float32), (torch.float16, torch.float64)], ids=str)
def test_mixed_dtypes(pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Inputs are promoted, gradients come back in each input's dtype."""
    narrow, wide = pair
    first, second = two_views("random", 12, 10)
    first, second, queue = first.to(narrow), second.to(wide), unit(7, 10).to(narrow)
    for problem in (
        Problem("nt_xent_loss", {"z0": first, "z1": second}),
        Problem("dcl_loss", {"z0": second, "z1": first}),
        Problem("dimcl_loss", {"z0": first, "z1": second}),
        Problem("info_nce_loss", {"q": second, "k": first, "queue": queue}),
        Problem("sce_loss", {"q": first, "k": second, "queue": queue}),
        Problem("clip_loss", {"image_features": first, "text_features": second}, {"logit_scale": 10.0}),
    ):
        results, truth = comparisons.ours(problem), comparisons.exact(problem)
        assert results["loss"].dtype == wide
        for name, expected in truth.items():
            if name != "loss":
                assert results[name].dtype == problem.inputs[name.removeprefix("gradient of ")].dtype
            bound = 4 * torch.finfo(results[name].dtype).eps * (1 + problem.logits)
            assert comparisons.error(results[name], expected) <= bound * max(
                1, float(expected.abs().max())
            ), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    for problem in [
        p.to(dtype)
        for p in [*comparisons.problems("random", 8, 6), comparisons.clip_problem("random", 8, 6, 9.0)]
    ]:
        expected = comparisons.ours(problem)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = comparisons.ours(problem)
        for name, result in results.items():
            assert result.dtype == expected[name].dtype
            assert torch.equal(result, expected[name]), f"{problem}: {name}"


@pytest.mark.parametrize(
    "labels", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.float16], ids=str
)
def test_label_dtypes(labels: torch.dtype) -> None:
    features, classes = unit(6, 2, 4), torch.tensor([0, 1, 0, 1, 1, 0])
    expected = clk.supcon_loss(features, classes)
    assert torch.equal(clk.supcon_loss(features, classes.to(labels)), expected)
    assert torch.equal(clk.supcon_loss(features, classes.to(labels)[:, None]), expected)


def test_negative_zero_and_fractions_are_labels() -> None:
    features = unit(4, 2, 4)
    expected = clk.supcon_loss(features, torch.tensor([0, 0, 1, 2]))
    assert torch.equal(clk.supcon_loss(features, torch.tensor([0.0, -0.0, 0.25, 0.5])), expected)


def test_trailing_dimensions_are_flattened() -> None:
    features = unit(5, 2, 12)
    assert torch.equal(clk.supcon_loss(features.view(5, 2, 3, 4)), clk.supcon_loss(features))
    assert torch.equal(clk.selfcon_loss(features.view(5, 2, 3, 2, 2)), clk.selfcon_loss(features))


def test_inputs_are_left_alone() -> None:
    for problem in comparisons.problems("random", 7, 5):
        before = [x.clone() for x in problem.tensors.values()]
        comparisons.ours(problem)
        assert all(torch.equal(x, y) for x, y in zip(before, problem.tensors.values(), strict=True))


def test_gradients_only_where_asked() -> None:
    q, k = two_views("random", 6, 4)
    queue = unit(9, 4)
    for call in (
        lambda: clk.info_nce_loss(q, k, queue),
        lambda: clk.sce_loss(q, k, queue=queue),
        lambda: clk.nt_xent_loss(q, k),
        lambda: clk.clip_loss(q, k, 10.0),
    ):
        assert not call().requires_grad
        q.requires_grad_()
        loss = call()
        with torch.no_grad():
            assert not call().requires_grad
        loss.backward()
        assert k.grad is None
        assert queue.grad is None
        assert q.grad is not None
        q.grad = None
        q.requires_grad_(False)
