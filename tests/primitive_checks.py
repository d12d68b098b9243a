"""The problems that tests of the primitives take, and whether outputs and gradients are the formula's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import cl_kernels as clk
from cl_kernels.problem import Contrast, SoftTarget

BACKENDS = ["reference", "auto"]
few = settings(max_examples=50, deadline=None)


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


# Contrastive problems


def inputs_of(problem: Contrast) -> tuple[Tensor | None, ...]:
    """The inputs that may get a gradient."""
    return problem.q, problem.k, problem.scale, problem.key_bias


def over_inputs(
    function: Callable[[Contrast], Sequence[Tensor]], problem: Contrast
) -> Callable[..., Sequence[Tensor]]:
    """`function` of the problem over its differentiable inputs."""
    return lambda q, k, scale, bias: function(problem._replace(q=q, k=k, scale=scale, key_bias=bias))


def in_dtype(problem: Contrast, dtype: torch.dtype) -> Contrast:
    """The problem as the ops take it."""
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
    restricts = labels or positives == "mask"
    among = draw(st.sampled_from(["all", "same", "different"])) if restricts else "all"
    both_axes = draw(st.booleans()) and (labels or among == "all")
    return Contrast(
        rand(seed + 6, n, d), None if own_keys else rand(seed + 7, m, d),
        torch.tensor(draw(st.sampled_from([0.3, 1.0, 20.0])), dtype=torch.float64),
        draw(st.sampled_from([None, 0, 0, 1, -2, 40])), row_labels if labels else None,
        col_labels if labels else None, among, positives == "labels", index, mask, bias, both_axes,
    )  # fmt: skip


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
        "mask-same": Contrast(q, k, scale, 0, among="same", positive_mask=rand(3, 2, 3).relu()),
        "mask-different": Contrast(q, None, scale, 0, among="different", positive_mask=rand(4, 2, 3).relu()),
    }
    return [pytest.param(problem, id=name) for name, problem in examples.items()]


# Soft targets


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
