"""The autograd Functions: forward and backward of the engine and of each primitive, each a call of one op.

A derivative taken with `create_graph=True` does not use the backward op: it differentiates the plain formula
of `reference.py`, which holds whole matrices, and is right to any order. Under torch.compile it is always the
op, and PyTorch itself refuses a second derivative there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_kernels import dispatch, reference
from cl_kernels.validation import accumulate_dtype, full_precision


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which pairs (i, j) count: the denominator of row i and its positives (at most one kind of them)."""

    exclude: int | None = 0  # column i + exclude is left out of row i
    row_labels: Tensor | None = None  # int64 [N]
    col_labels: Tensor | None = None  # int64 [M]
    among: str = "all"  # "same", "different": restricts the denominator by label
    label_positives: bool = False  # positives: equal labels
    positive_index: Tensor | None = None  # int64 [N], -1: none
    positive_mask: Tensor | None = None  # [R, C], weight of (i, j) at [i % R, j % C]

    @property
    def has_positives(self) -> bool:
        return self.label_positives or self.positive_index is not None or self.positive_mask is not None


class ContrastiveStats(NamedTuple):
    """Statistics of rows, float64 (`validation.statistics_dtype`); what was not asked for is empty, [0]."""

    lse: Tensor  # [N]
    lse_cols: Tensor  # [M]
    positive_sum: Tensor  # [N]
    positive_count: Tensor  # [N], not differentiable


class SoftTargetStats(NamedTuple):
    """Statistics of rows, as above."""

    lse: Tensor  # [N]
    target_lse: Tensor  # [N]
    cross: Tensor  # [N]
    positive_sum: Tensor  # [N], or [0] without positives


def as_scale(scale: float | Tensor, like: Tensor) -> Tensor:
    """The 0-dim tensor that the ops take, in the accumulation dtype of `like`; a float goes to the CPU."""
    dtype = accumulate_dtype(like.dtype)
    if isinstance(scale, Tensor):
        return scale.to(dtype)
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype) * scale  # compiles once for all values
    return torch.scalar_tensor(scale, dtype=dtype)


def contrastive(
    q: Tensor,
    k: Tensor | None,
    scale: float | Tensor,
    pairs: Pairs,
    *,
    key_bias: Tensor | None = None,
    both_axes: bool = False,
) -> ContrastiveStats:
    """LSEs of S = scale q k^T + key_bias over the denominators, and sums over positives; k None: q with q."""
    acc = accumulate_dtype(q.dtype)
    mask = None if pairs.positive_mask is None else pairs.positive_mask.to(acc)
    bias = None if key_bias is None else key_bias.to(acc)
    backend = dispatch.select("contrastive_forward", q)
    tensors = _distinct(
        q, k, as_scale(scale, q), bias, pairs.row_labels, pairs.col_labels, pairs.positive_index, mask
    )
    # With frozen keys the gradient of q is one vector a row, and comes with the forward.
    summed = pairs.label_positives or mask is not None
    frozen = k is not None and not (both_axes or summed or _needs_gradient(k, bias))
    save_gradient = frozen and torch.is_grad_enabled() and _needs_gradient(q, tensors[2])
    options = (pairs.exclude, pairs.among, pairs.label_positives, both_axes, save_gradient, backend)
    return ContrastiveStats(*Contrastive.apply(*tensors, *options))


def soft_target(
    q: Tensor,
    k: Sequence[Tensor],
    target_q: Tensor,
    target_k: Sequence[Tensor],
    scale: float | Tensor,
    target_scale: float | Tensor,
    *,
    positive: Tensor | None = None,
    positive_in_target: str = "exclude",
) -> SoftTargetStats:
    """LSEs of the student's and the target's logits, the target's mean of the student's, the positives'."""
    s, target_s = as_scale(scale, q), as_scale(target_scale, q)
    frozen = not _needs_gradient(*k, target_q, *target_k, target_s)
    save_gradient = frozen and torch.is_grad_enabled() and _needs_gradient(q, s)
    backend = dispatch.select("soft_target_forward", q)
    tensors = _distinct(q, target_q, s, target_s, positive, *k, *target_k)
    options = (positive_in_target, save_gradient, backend)
    if torch.compiler.is_compiling() and not (torch.is_grad_enabled() and _needs_gradient(*tensors)):
        # Dynamo inlines a Function then, and counts arguments to tell whether its forward takes a context:
        # with segments in any number it mistakes one for the other.
        half = 5 + len(k)
        problem = (tensors[0], tensors[5:half], tensors[1], tensors[half:], *tensors[2:5], *options[:2])
        return SoftTargetStats(*dispatch.call("soft_target_forward", backend, *problem)[:4])
    return SoftTargetStats(*SoftTarget.apply(*tensors[:5], *options, *tensors[5:]))


def soft_target_means(
    target_q: Tensor,
    keys: Sequence[Tensor],
    target_scale: float | Tensor,
    positive: Tensor | None,
    positive_in_target: str,
) -> tuple[Tensor, Tensor]:
    """target_lse [N] and softmax(T) keys [N, D] without the positive, T = target_scale target_q keys^T: what
    students share. Not differentiable."""
    scale = as_scale(target_scale, target_q)
    segments = list(keys)
    with torch.no_grad():
        _, target_lse, _, _, _, mean = dispatch.call(
            "soft_target_forward", dispatch.select("soft_target_forward", target_q), target_q, segments,
            target_q, segments, scale, scale, positive, positive_in_target, True,
        )  # fmt: skip
    return target_lse, mean


def dimcl(
    z0: Tensor, z1: Tensor, scale: float | Tensor, positive_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, positive_sum, positive_count [2D] of the columns' Pearson correlations, z0 and z1 [N, D]."""
    backend = dispatch.select("dimcl_forward", z0)
    return DimCL.apply(*_distinct(z0, z1, as_scale(scale, z0), positive_mask), backend)


def similarity(q: Tensor, k: Tensor | None, scale: float | Tensor, normalize: bool) -> Tensor:
    """scale q k^T [N, M], of unit rows with `normalize`."""
    backend = dispatch.select("similarity_forward", q)
    return Similarity.apply(*_distinct(q, k, as_scale(scale, q)), normalize, backend)


def masked_log_softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Log-softmax of [N, M] over what the bool mask [N, M] includes; -inf elsewhere."""
    return MaskedLogSoftmax.apply(logits, mask, dispatch.select("masked_log_softmax_forward", logits))


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)


def _distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, repeated ones as views of themselves: dynamo takes no tensor twice in one Function."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    distinct: list[Tensor | None] = []
    for x in tensors:
        repeated = x is not None and any(x is other for other in distinct)
        distinct.append(x.view_as(x) if repeated and x is not None else x)
    return distinct


def _double_backward() -> bool:
    """Whether the running backward must itself be differentiable."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


@full_precision
def _differentiate(
    formula: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Differentiable gradients of `formula(*inputs)`; `needs` says which inputs get one."""
    views = [
        x if x is None else x.view_as(x) for x in inputs
    ]  # an input computed from another stays independent
    pairs = zip(formula(*views), grads, strict=False)
    outputs = [(out, grad.to(out.dtype)) for out, grad in pairs if grad is not None and out.requires_grad]
    wanted = [x for x, needed in zip(views, needs, strict=True) if needed and x is not None]
    if not outputs or not wanted:
        return [None] * len(views)
    values, cotangents = zip(*outputs, strict=True)
    found = iter(torch.autograd.grad(values, wanted, cotangents, create_graph=True, allow_unused=True))
    return [next(found) if needed else None for needed in needs]


def _if(needed: bool, grad: Tensor) -> Tensor | None:
    return grad if needed else None


class Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        scale: Tensor,
        key_bias: Tensor | None,
        row_labels: Tensor | None,
        col_labels: Tensor | None,
        positive_index: Tensor | None,
        positive_mask: Tensor | None,
        exclude: int | None,
        among: str,
        label_positives: bool,
        both_axes: bool,
        save_gradient: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        lse, lse_cols, positive_sum, positive_count, residual = dispatch.call(
            "contrastive_forward", backend, q, k, scale, exclude, row_labels, col_labels, among,
            label_positives, positive_index, positive_mask, key_bias, both_axes, save_gradient,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(positive_count)
        ctx.save_for_backward(
            q, k, scale, key_bias, row_labels, col_labels, positive_index, positive_mask,
            lse, lse_cols, residual,
        )  # fmt: skip
        ctx.options = (exclude, among, label_positives, both_axes, backend)
        return lse, lse_cols, positive_sum, positive_count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, scale, key_bias, row_labels, col_labels, positive_index, positive_mask, *stats = (
            ctx.saved_tensors
        )
        exclude, among, label_positives, both_axes, backend = ctx.options
        pairs = (exclude, row_labels, col_labels, among, label_positives, positive_index, positive_mask)
        needs_q, needs_k, needs_scale, needs_bias = ctx.needs_input_grad[:4]
        if _double_backward():

            def formula(
                q: Tensor, k: Tensor | None, scale: Tensor, key_bias: Tensor | None
            ) -> Sequence[Tensor]:
                return reference.contrastive_stats(q, k, scale, *pairs, key_bias, both_axes)

            inputs = _differentiate(formula, (q, k, scale, key_bias), ctx.needs_input_grad[:4], grads[:3])
            return *inputs, *([None] * 10)
        has_positives = label_positives or positive_index is not None or positive_mask is not None
        grad_lse, grad_cols, grad_positive = grads[:3]
        grad_q, grad_k, grad_scale, grad_bias = dispatch.call(
            "contrastive_backward", backend, grad_lse, grad_cols if both_axes else None,
            grad_positive if has_positives else None, q, k, scale, *pairs, key_bias, both_axes, *stats,
            (needs_q, needs_k, needs_bias),
        )  # fmt: skip
        return (
            _if(needs_q, grad_q), _if(needs_k, grad_k), grad_scale.to(scale.device) if needs_scale else None,
            _if(needs_bias, grad_bias), *([None] * 10),
        )  # fmt: skip


class SoftTarget(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        target_q: Tensor,
        scale: Tensor,
        target_scale: Tensor,
        positive: Tensor | None,
        positive_in_target: str,
        save_gradient: bool,
        backend: str,
        *segments: Tensor,
    ) -> tuple[Tensor, ...]:
        k, target_k = segments[: len(segments) // 2], segments[len(segments) // 2 :]
        lse, target_lse, cross, positive_sum, mean_key, mean_target_key = dispatch.call(
            "soft_target_forward", backend, q, k, target_q, target_k, scale, target_scale, positive,
            positive_in_target, save_gradient,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            q, target_q, scale, target_scale, positive,
            lse, target_lse, cross, positive_sum, mean_key, mean_target_key, *segments,
        )  # fmt: skip
        ctx.options = (positive_in_target, backend)
        return lse, target_lse, cross, positive_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, target_q, scale, target_scale, positive, *stats = ctx.saved_tensors[:11]
        segments = ctx.saved_tensors[11:]
        half = len(segments) // 2
        k, target_k = segments[:half], segments[half:]
        positive_in_target, backend = ctx.options
        needs_q, needs_target_q, needs_scale, needs_target_scale = ctx.needs_input_grad[:4]
        needs_segments = ctx.needs_input_grad[8:]
        if _double_backward():

            def formula(q: Tensor, t: Tensor, s: Tensor, target_s: Tensor, *keys: Tensor) -> Sequence[Tensor]:
                k, u = keys[:half], keys[half:]
                return reference.soft_target_stats(q, k, t, u, s, target_s, positive, positive_in_target)

            inputs = _differentiate(
                formula,
                (q, target_q, scale, target_scale, *segments),
                (*ctx.needs_input_grad[:4], *needs_segments),
                grads,
            )
            return *inputs[:4], *([None] * 4), *inputs[4:]
        grad_lse, grad_target_lse, grad_cross, grad_positive = grads
        needs = (
            needs_q,
            any(needs_segments[:half]),
            needs_target_q or needs_target_scale,
            any(needs_segments[half:]),
        )
        grad_q, grad_k, grad_target_q, grad_target_k, grad_scale, grad_target_scale = dispatch.call(
            "soft_target_backward", backend, grad_lse, grad_target_lse, grad_cross,
            None if positive is None else grad_positive,
            q, k, target_q, target_k, scale, target_scale, positive, positive_in_target, *stats, needs,
        )  # fmt: skip
        return (
            _if(needs_q, grad_q), _if(needs_target_q, grad_target_q),
            grad_scale.to(scale.device) if needs_scale else None,
            grad_target_scale.to(target_scale.device) if needs_target_scale else None, *([None] * 4),
            *(_if(n, g) for n, g in zip(needs_segments, (*grad_k, *grad_target_k), strict=True)),
        )  # fmt: skip


class DimCL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z0: Tensor, z1: Tensor, scale: Tensor, positive_mask: Tensor | None, backend: str
    ) -> tuple[Tensor, ...]:
        lse, positive_sum, positive_count, mean, rnorm = dispatch.call(
            "dimcl_forward", backend, z0, z1, scale, positive_mask
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(positive_count)
        ctx.save_for_backward(z0, z1, scale, positive_mask, lse, mean, rnorm)
        ctx.backend = backend
        return lse, positive_sum, positive_count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        z0, z1, scale, positive_mask, *stats = ctx.saved_tensors
        needs_z0, needs_z1, needs_scale = ctx.needs_input_grad[:3]
        if _double_backward():

            def formula(z0: Tensor, z1: Tensor, scale: Tensor) -> Sequence[Tensor]:
                return reference.dimcl_stats(z0, z1, scale, positive_mask)

            return *_differentiate(formula, (z0, z1, scale), ctx.needs_input_grad[:3], grads[:2]), None, None
        grad_z0, grad_z1, grad_scale = dispatch.call(
            "dimcl_backward", ctx.backend, *grads[:2], z0, z1, scale, positive_mask, *stats
        )
        grad_scale = grad_scale.to(scale.device) if needs_scale else None
        return _if(needs_z0, grad_z0), _if(needs_z1, grad_z1), grad_scale, None, None


class Similarity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor | None, scale: Tensor, normalize: bool, backend: str
    ) -> Tensor:
        out, q_rnorm, k_rnorm = dispatch.call("similarity_forward", backend, q, k, scale, normalize)
        ctx.save_for_backward(q, k, scale, q_rnorm, k_rnorm)
        ctx.options = (normalize, backend)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, scale, q_rnorm, k_rnorm = ctx.saved_tensors
        normalize, backend = ctx.options
        needs_q, needs_k, needs_scale = ctx.needs_input_grad[:3]
        if _double_backward():

            def formula(q: Tensor, k: Tensor | None, scale: Tensor) -> Sequence[Tensor]:
                return [reference.similarity_matrix(q, k, scale, normalize)]

            return *_differentiate(formula, (q, k, scale), ctx.needs_input_grad[:3], grads), None, None
        grad_q, grad_k, grad_scale = dispatch.call(
            "similarity_backward", backend, *grads, q, k, scale, normalize, q_rnorm, k_rnorm,
            (needs_q, needs_k),
        )  # fmt: skip
        grad_scale = grad_scale.to(scale.device) if needs_scale else None
        return _if(needs_q, grad_q), _if(needs_k, grad_k), grad_scale, None, None


class MaskedLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, mask: Tensor | None, backend: str) -> Tensor:
        out = dispatch.call("masked_log_softmax_forward", backend, logits, mask)
        ctx.save_for_backward(out, mask)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out, mask = ctx.saved_tensors
        if _double_backward():
            grad = grads[0] if mask is None else grads[0].masked_fill(~mask, 0)
            return grad - out.exp() * grad.sum(1, keepdim=True), None, None
        return dispatch.call("masked_log_softmax_backward", ctx.backend, *grads, out, mask), None, None
