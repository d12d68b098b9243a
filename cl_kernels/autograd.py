"""The autograd Functions: forward and backward of the engine and of each primitive, each a call of one op.

What there is to know of each op stands in a class of its own; two Functions make use of it. `_Value` is the
forward op, and its backward the backward op, in torch.func's transforms (grad, vjp, jacrev, vmap) as well.
Where that backward must itself be differentiable it is `_Gradient`: the same op, whose own backward
differentiates the plain formula of `reference.py`. Only a second derivative pays for that: it holds whole
matrices, and is right to any order. Under torch.compile the backward is the op alone, and PyTorch itself
refuses a second derivative there.

With frozen keys the gradient comes with the forward. Nothing as large as the keys is saved then, and they may
be changed in place before the backward, as a queue is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch, dtypes, ops, reference
from .dtypes import full_precision, scalar_for
from .problem import Contrast, KeyLoss, KeyStats, SoftTarget

Tensors = Sequence[Any]  # of tensors and None
Options = tuple[Any, ...]


class ContrastiveStats(NamedTuple):
    """Statistics of rows, float64 (`dtypes.statistics_dtype`); what was not asked for is empty, [0]."""

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


def contrastive(problem: Contrast, first_positive: int | None = None) -> ContrastiveStats:
    """LSEs over the denominators, and sums over positives.

    `first_positive`: where `positive_index` is known to count up from there, row by row."""
    q, acc = problem.q, dtypes.accumulate_dtype(problem.q.dtype)
    mask, bias = problem.positive_mask, problem.key_bias
    problem = problem._replace(
        scale=scalar_for(problem.scale, q), positive_mask=None if mask is None else mask.to(acc),
        key_bias=None if bias is None else bias.to(acc),
    )  # fmt: skip
    backend = dispatch.select("contrastive_forward", q)
    # With frozen keys the gradient of q is one vector a row, and comes with the forward.
    summed = problem.positives in ("labels", "mask")
    frozen = problem.k is not None and not (
        problem.both_axes or summed or _needs_gradient(problem.k, problem.key_bias)
    )
    save_gradient = frozen and torch.is_grad_enabled() and _needs_gradient(q, problem.scale)
    options = (problem.options(), save_gradient, first_positive, backend)
    return ContrastiveStats(*_run("contrastive", options, problem.tensors()))


def contrastive_loss(problem: Contrast, how: LossOptions) -> Tensor:
    """The loss [] of all rows, in the accumulation dtype, where `dispatch.makes_whole_losses`."""
    q, scale = problem.q, scalar_for(problem.scale, problem.q)
    needs = _gradients_needed(q, problem.k, scale)
    tensors = problem._replace(scale=scale).tensors()
    return _run_whole("contrastive_loss", (problem.options(), how, needs, q.dtype), tensors)


def loss_of_rows(problem: Contrast, how: LossOptions) -> Tensor:
    """The loss [] of all rows, in float32, where `dispatch.makes_losses_of_rows`."""
    backend = dispatch.select("contrastive_forward", problem.q)
    problem = problem._replace(scale=scalar_for(problem.scale, problem.q))
    return _run("loss_of_rows", (problem.options(), False, None, backend, how), problem.tensors())[0]


def dimcl_loss(
    z0: Tensor, z1: Tensor, scale: float | Tensor, positive_mask: Tensor | None, mean: bool
) -> Tensor:
    """The loss [] of all columns, where there is an op for it or kernels for its rows."""
    scale = scalar_for(scale, z0)
    tensors = (z0, z1, scale, positive_mask)
    if not dispatch.makes_whole_losses(z0):
        return _run("dimcl_loss_of_rows", (mean, dispatch.select("dimcl_forward", z0)), tensors)[0]
    return _run_whole("dimcl_loss", (mean, _gradients_needed(z0, z1, scale), z0.dtype), tensors)


def key_loss(problem: KeyLoss, mean: bool) -> Tensor | None:
    """The loss [] of all rows, as above; None where more than queries and scale needs a gradient, and by
    kernels for rows of several segments of keys without a target."""
    q, target_q, scale = problem.q, problem.target_q, scalar_for(problem.scale, problem.q)
    of_target = (x for x in (problem.target_scale, problem.coeff) if isinstance(x, Tensor))
    if torch.is_grad_enabled() and _needs_gradient(*problem.k, target_q, problem.own, *of_target):
        return None
    if target_q is not None:
        target_scale, coeff = scalar_for(problem.target_scale, q), scalar_for(problem.coeff, q)
        problem = problem._replace(target_scale=target_scale, coeff=coeff)
    needs = _gradients_needed(q, scale)
    problem = problem._replace(scale=scale)
    bare, tensors = problem.options(), problem.tensors()
    if dispatch.makes_whole_losses(q):
        return _run_whole("key_loss", (bare, mean, needs, q.dtype), tensors)
    if target_q is None and len(problem.k) > 1:
        return None
    op = "contrastive_forward" if target_q is None else "soft_target_forward"
    return _run_whole("key_loss_of_rows", (bare, mean, dispatch.select(op, q), needs, q.dtype), tensors)


def _gradients_needed(*tensors: Tensor | None) -> list[bool]:
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in tensors]


def soft_target(problem: SoftTarget, first_positive: int | None = None) -> SoftTargetStats:
    """LSEs of the student's and the target's logits, the target's mean of the student's, the positives'.

    `first_positive`: as for `contrastive`."""
    q = problem.q
    problem = problem._replace(
        scale=scalar_for(problem.scale, q), target_scale=scalar_for(problem.target_scale, q)
    )
    target = (problem.target_q, *problem.target_k, problem.target_scale)
    frozen = not _needs_gradient(*problem.k, *target)
    save_gradient = frozen and torch.is_grad_enabled() and _needs_gradient(q, problem.scale)
    backend = dispatch.select("soft_target_forward", q)
    options = (problem.options(), save_gradient, first_positive, backend)
    return SoftTargetStats(*_run("soft_target", options, problem.tensors()))


def soft_target_means(problem: SoftTarget) -> tuple[Tensor, Tensor]:
    """target_lse [N] and softmax(T) keys [N, D] without the positive, of a problem whose student is its
    target: what students share. Not differentiable."""
    scale = scalar_for(problem.scale, problem.q)  # the target's as well
    problem = problem._replace(scale=scale, target_scale=scale)
    options = (problem.options(), True, None, dispatch.select("soft_target_forward", problem.q))
    with torch.no_grad():
        if in_transform():
            outputs = _TransformedValue.apply("soft_target", options, *problem.tensors())
        else:
            outputs = _SoftTarget.forward(problem.tensors(), options)
    _, target_lse, _, _, _, mean = outputs
    return target_lse, mean


def dimcl(
    z0: Tensor, z1: Tensor, scale: float | Tensor, positive_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, positive_sum, positive_count [2D] of the columns' Pearson correlations, z0 and z1 [N, D]."""
    backend = dispatch.select("dimcl_forward", z0)
    outputs = _run("dimcl", (backend,), (z0, z1, scalar_for(scale, z0), positive_mask))
    lse, positive_sum, positive_count = outputs
    return lse, positive_sum, positive_count


def similarity(q: Tensor, k: Tensor | None, scale: float | Tensor, normalize: bool) -> Tensor:
    """scale q k^T [N, M], of unit rows with `normalize`."""
    backend = dispatch.select("similarity_forward", q)
    return _run("similarity", (normalize, backend), (q, k, scalar_for(scale, q)))[0]


def masked_log_softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Log-softmax of [N, M] over what the bool mask [N, M] includes; -inf elsewhere."""
    backend = dispatch.select("masked_log_softmax_forward", logits)
    return _run("masked_log_softmax", (backend,), (logits, mask))[0]


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)


def _distinct(tensors: Tensors) -> list[Tensor | None]:
    """The tensors, repeated ones as views of themselves: dynamo takes no tensor twice in one Function."""
    distinct: list[Tensor | None] = []
    for x in tensors:
        repeated = x is not None and any(x is other for other in distinct)
        distinct.append(x.view_as(x) if repeated and x is not None else x)
    return distinct


class _Op:
    """An op, its backward op, and the plain formula that a second derivative differentiates.

    `tensors` are those of the forward. `saved` is what the backward op reads: one for each of the tensors,
    then what the forward left for it; with `frozen` keys, compact arguments in place of the tensors.
    """

    users: str  # as a message names them
    outputs: int  # how many of what the op returns, the first ones; the rest is for the backward
    differentiable: int  # how many of the outputs

    @staticmethod
    def forward(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        raise NotImplementedError

    @staticmethod
    def frozen(options: Options, needs: Sequence[bool]) -> bool:
        return False

    @staticmethod
    def saved(tensors: Tensors, options: Options, outputs: Tensors, frozen: bool) -> Tensors:
        raise NotImplementedError

    @staticmethod
    def gradient(
        saved: Tensors, options: Options, grads: Tensors, needs: Sequence[bool], frozen: bool
    ) -> Tensors:
        """By the backward op; None where no gradient is needed."""
        raise NotImplementedError

    @staticmethod
    def formula(tensors: Tensors, options: Options) -> Sequence[Tensor]:
        """The differentiable outputs, first of all."""
        raise NotImplementedError

    @classmethod
    def plain_gradient(
        cls, tensors: Tensors, options: Options, grads: Tensors, needs: Sequence[bool]
    ) -> Tensors:
        """The gradient in differentiable PyTorch."""
        return _pull_back(
            lambda given: cls.formula(given, options)[: cls.differentiable], tensors, needs, grads
        )


class _Contrastive(_Op):
    users = "the contrastive losses and contrastive_lse"
    outputs = 4
    differentiable = 3

    @staticmethod
    def forward(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        bare, save_gradient, _, backend = options
        return dispatch.call("contrastive_forward", backend, *bare.with_tensors(tensors), save_gradient)

    @staticmethod
    def frozen(options: Options, needs: Sequence[bool]) -> bool:
        _, needs_k, *_, needs_bias = needs
        save_gradient = options[1]
        return save_gradient and not (needs_k or needs_bias)

    @staticmethod
    def saved(tensors: Tensors, options: Options, outputs: Tensors, frozen: bool) -> Tensors:
        lse, lse_cols, _, _, residual = outputs
        if frozen:
            bare, _, first_positive, _ = options
            problem = bare.with_tensors(tensors)
            keys, own = _positive_keys([problem.k], problem.positive_index, first_positive)
            tensors = bare._replace(q=problem.q, k=keys, scale=problem.scale, positive_index=own).tensors()
        return *tensors, lse, lse_cols, residual

    @staticmethod
    def gradient(
        saved: Tensors, options: Options, grads: Tensors, needs: Sequence[bool], frozen: bool
    ) -> Tensors:
        bare, _, _, backend = options
        problem = bare.with_tensors(saved[: len(needs)])
        if frozen:
            problem = problem._replace(k=problem.keys, exclude=None, among="all")
        grad_lse, grad_cols, grad_positive = grads
        needs_q, needs_k, needs_scale, *_, needs_bias = needs
        grad_q, grad_k, grad_scale, grad_bias = dispatch.call(
            "contrastive_backward", backend,
            grad_lse, grad_cols if problem.both_axes else None,
            None if problem.positives == "none" else grad_positive,
            *problem, *saved[len(needs) :], (needs_q, needs_k, needs_scale, needs_bias),
        )  # fmt: skip
        return (
            _if(needs_q, grad_q), _if(needs_k, grad_k), _like(grad_scale, problem.scale, needs_scale),
            None, None, None, None, _if(needs_bias, grad_bias),
        )  # fmt: skip

    @staticmethod
    def formula(tensors: Tensors, options: Options) -> Sequence[Tensor]:
        return reference.contrastive_stats(options[0].with_tensors(tensors))


class LossOptions(NamedTuple):
    """How a whole loss is made of its rows, in the order of the op's arguments."""

    unit: bool  # over rows at unit length
    factor: float
    mean: bool  # over the rows, in place of their sum
    drop: bool  # rows without positives are not counted by the mean
    at_least_zero: bool  # a row below 0 is rounding


class _WholeLoss(_Op):
    """A loss whose gradients come with the forward: the backward multiplies them.

    The last options are which gradients the op is to give, and the dtype of the features. The tensors are
    saved for a second derivative alone; frozen keys stand beside, and may be changed before the backward.
    """

    outputs = 1
    differentiable = 1
    given: tuple[int, ...]  # of which of the tensors the op gives gradients, the scale last

    @staticmethod
    def keys(options: Options, count: int) -> Sequence[int]:
        """Which of so many tensors are frozen keys."""
        return ()

    @staticmethod
    def frozen(options: Options, needs: Sequence[bool]) -> bool:
        return True

    @classmethod
    def saved(cls, tensors: Tensors, options: Options, outputs: Tensors, frozen: bool) -> Tensors:
        if torch.compiler.is_compiling():  # there is no second derivative
            return *[None] * len(tensors), *outputs[1:]
        beside = cls.keys(options, len(tensors))
        if beside:
            tensors = [None if i in beside else x for i, x in enumerate(tensors)]
        return *tensors, *outputs[1:]

    @classmethod
    def gradient(
        cls, saved: Tensors, options: Options, grads: Tensors, needs: Sequence[bool], frozen: bool
    ) -> Tensors:
        found: list[Tensor | None] = [None] * len(needs)
        for i, x in zip(cls.given, saved[len(needs) :], strict=True):
            if needs[i]:
                grad = x * grads[0]
                found[i] = grad if i == cls.given[-1] else grad.to(options[-1])
        return found


class _ContrastiveLoss(_WholeLoss):
    users = "the contrastive losses"
    given = (0, 1, 2)

    @staticmethod
    def keys(options: Options, count: int) -> Sequence[int]:
        _, needs_k, _ = options[-2]
        return () if needs_k else (1,)

    @staticmethod
    def forward(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        bare, how, needs, dtype = options
        problem = bare.with_tensors(tensors)
        if problem.positive_mask is not None:
            acc = dtypes.accumulate_dtype(dtype)
            problem = problem._replace(positive_mask=problem.positive_mask.to(acc))
        return torch.ops.cl_kernels.contrastive_loss.default(*problem, *how, needs)

    @staticmethod
    def formula(tensors: Tensors, options: Options) -> Sequence[Tensor]:
        bare, how, *_ = options
        return [reference.whole_loss(bare.with_tensors(tensors), *how)]


class _LossOfRows(_Contrastive):
    """The same by the engine's ops and the arithmetic of rows, written down with its derivatives."""

    users = "the contrastive losses"
    outputs = 1
    differentiable = 1

    @staticmethod
    def forward(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        *_, backend, how = options
        unit, *reduction = how
        q, *others = tensors
        norms: Tensors = ()
        if unit:
            q, *norms = dispatch.of_rows("unit_rows", backend, q)
        lse, lse_cols, *rest, residual = _Contrastive.forward((q, *others), options[:-1])
        loss, coefs = dispatch.of_rows("row_losses", backend, lse, lse_cols, *rest, *reduction)
        return loss, coefs, *norms, *((q,) if unit else ()), lse, lse_cols, residual

    @staticmethod
    def saved(tensors: Tensors, options: Options, outputs: Tensors, frozen: bool) -> Tensors:
        return *tensors, *outputs[1:]

    @staticmethod
    def gradient(
        saved: Tensors, options: Options, grads: Tensors, needs: Sequence[bool], frozen: bool
    ) -> Tensors:
        *_, backend, how = options
        (q, *others), (coefs, *of_unit) = saved[: len(needs)], saved[len(needs) : -3]
        of_lse, of_positives = (coefs * grads[0]).unbind()
        given = (of_unit[-1] if how.unit else q, *others, *saved[-3:])
        found = _Contrastive.gradient(given, options[:-1], (of_lse, of_lse, of_positives), needs, frozen)
        if not (how.unit and needs[0]):
            return found
        return dispatch.of_rows("unit_rows_gradient", backend, found[0], q, of_unit[0]), *found[1:]

    @staticmethod
    def formula(tensors: Tensors, options: Options) -> Sequence[Tensor]:
        return [reference.whole_loss(options[0].with_tensors(tensors), *options[-1])]


class _DimCLLoss(_WholeLoss):
    users = "dimcl_loss"
    given = (0, 1, 2)

    @staticmethod
    def forward(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        mean, needs, _ = options
        return torch.ops.cl_kernels.dimcl_loss.default(*tensors, mean, needs)

    @staticmethod
    def formula(tensors: Tensors, options: Options) -> Sequence[Tensor]:
        lse, positive_sum, positive_count = reference.dimcl_stats(*tensors)
        rows = lse - positive_sum / positive_count
        return [rows.mean() if options[0] else rows.sum()]


class _KeyLoss(_WholeLoss):
    users = "info_nce_loss and sce_loss"
    given = (0, 2)

    @staticmethod
    def keys(options: Options, count: int) -> Sequence[int]:
        return 1, 5, *range(7, count)  # the target's queries, the positives, the segments

    @staticmethod
    def forward(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        bare, mean, needs, _ = options
        return torch.ops.cl_kernels.key_loss.default(*bare.with_tensors(tensors), mean, needs)

    @staticmethod
    def formula(tensors: Tensors, options: Options) -> Sequence[Tensor]:
        bare, mean, *_ = options
        return [reference.key_loss(bare.with_tensors(tensors), mean)]


class _KeyLossOfRows(_KeyLoss):
    """The same by the ops of statistics and the arithmetic of rows."""

    @staticmethod
    def forward(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        bare, mean, backend, needs, _ = options
        problem = bare.with_tensors(tensors)
        q, k, target_q, scale, target_scale, *_, positive, zero = problem
        if target_q is None:
            contrast = Contrast(q, k[0], scale, positive_index=positive)
            lse, _, total, _, mean_key = dispatch.call("contrastive_forward", backend, *contrast, any(needs))
            stats = KeyStats(lse, total, mean_key)
        else:
            target = SoftTarget(
                q, k, target_q, k, scale, target_scale, positive, "zero" if zero else "exclude"
            )
            lse, target_lse, cross, total, *means = dispatch.call(
                "soft_target_forward", backend, *target, any(needs)
            )
            stats = KeyStats(lse, total, means[0], target_lse, cross, means[1])
        return dispatch.of_rows("key_losses", backend, problem, stats, mean, needs)

    @classmethod
    def gradient(
        cls, saved: Tensors, options: Options, grads: Tensors, needs: Sequence[bool], frozen: bool
    ) -> Tensors:
        grad_q, *others, grad_scale = super().gradient(saved, options, grads, needs, frozen)[:3]
        absent = [None] * (len(needs) - 3)
        return grad_q, *others, None if grad_scale is None else grad_scale.to(saved[2].device), *absent


class _SoftTarget(_Op):
    users = "sce_loss and soft_target_cross_entropy"
    outputs = 4
    differentiable = 4

    @staticmethod
    def forward(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        bare, save_gradient, _, backend = options
        return dispatch.call("soft_target_forward", backend, *bare.with_tensors(tensors), save_gradient)

    @staticmethod
    def frozen(options: Options, needs: Sequence[bool]) -> bool:
        save_gradient = options[1]
        return save_gradient and not (needs[1] or any(needs[3:]))

    @staticmethod
    def saved(tensors: Tensors, options: Options, outputs: Tensors, frozen: bool) -> Tensors:
        if frozen:
            bare, _, first_positive, _ = options
            problem = bare.with_tensors(tensors)
            keys, own = _positive_keys(problem.k, problem.positive, first_positive)
            absent = [None] * (len(problem.k) - 1)
            tensors = bare._replace(
                q=problem.q, k=[keys, *absent], target_k=[None, *absent], scale=problem.scale, positive=own
            ).tensors()
        return *tensors, *outputs

    @staticmethod
    def gradient(
        saved: Tensors, options: Options, grads: Tensors, needs: Sequence[bool], frozen: bool
    ) -> Tensors:
        bare, _, _, backend = options
        problem = bare.with_tensors(saved[: len(needs)])
        if frozen:
            keys = [problem.q if problem.k[0] is None else problem.k[0]]
            problem = problem._replace(k=keys, target_q=problem.q, target_k=keys, target_scale=problem.scale)
        needed = bare.with_tensors(needs)
        needs_target_q = needed.target_q or needed.target_scale
        grad_lse, grad_target_lse, grad_cross, grad_positive = grads
        grad_q, grad_k, grad_target_q, grad_target_k, grad_scale, grad_target_scale = dispatch.call(
            "soft_target_backward", backend,
            grad_lse, grad_target_lse, grad_cross, None if problem.positive is None else grad_positive,
            *problem, *saved[len(needs) :],
            (needed.q, any(needed.k), needs_target_q, any(needed.target_k)),
        )  # fmt: skip
        if frozen:
            grad_k, grad_target_k = needed.k, needed.target_k  # none of them is
        return (
            _if(needed.q, grad_q), _if(needed.target_q, grad_target_q),
            _like(grad_scale, problem.scale, needed.scale),
            _like(grad_target_scale, problem.target_scale, needed.target_scale), None,
            *map(_if, needed.k, grad_k), *map(_if, needed.target_k, grad_target_k),
        )  # fmt: skip

    @staticmethod
    def formula(tensors: Tensors, options: Options) -> Sequence[Tensor]:
        return reference.soft_target_stats(options[0].with_tensors(tensors))


class _DimCL(_Op):
    users = "dimcl_loss"
    outputs = 3
    differentiable = 2

    @staticmethod
    def forward(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        (backend,) = options
        return dispatch.call("dimcl_forward", backend, *tensors)

    @staticmethod
    def saved(tensors: Tensors, options: Options, outputs: Tensors, frozen: bool) -> Tensors:
        lse, _, _, mean, rnorm = outputs
        return *tensors, lse, mean, rnorm

    @staticmethod
    def gradient(
        saved: Tensors, options: Options, grads: Tensors, needs: Sequence[bool], frozen: bool
    ) -> Tensors:
        (backend,) = options
        needs_z0, needs_z1, needs_scale, _ = needs
        grad_z0, grad_z1, grad_scale = dispatch.call("dimcl_backward", backend, *grads, *saved, needs_scale)
        return (
            _if(needs_z0, grad_z0), _if(needs_z1, grad_z1), _like(grad_scale, saved[2], needs_scale), None
        )  # fmt: skip

    @staticmethod
    def formula(tensors: Tensors, options: Options) -> Sequence[Tensor]:
        return reference.dimcl_stats(*tensors)


class _DimCLLossOfRows(_DimCL):
    """The loss by the ops above and the arithmetic of rows, as `_LossOfRows`."""

    outputs = 1
    differentiable = 1
    saved = staticmethod(_LossOfRows.saved)
    formula = staticmethod(_DimCLLoss.formula)

    @staticmethod
    def forward(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        mean, backend = options
        lse, total, count, *rest = _DimCL.forward(tensors, (backend,))
        statistics = (lse, lse.new_empty(0), total, count)
        loss, coefs = dispatch.of_rows("row_losses", backend, *statistics, 1.0, mean, False, True)
        return loss, coefs, lse, *rest

    @staticmethod
    def gradient(
        saved: Tensors, options: Options, grads: Tensors, needs: Sequence[bool], frozen: bool
    ) -> Tensors:
        *tensors, coefs, lse, mean, rnorm = saved
        of_rows = (coefs * grads[0]).unbind()
        return _DimCL.gradient((*tensors, lse, mean, rnorm), options[1:], of_rows, needs, frozen)


class _Similarity(_Op):
    users = "similarity"
    outputs = 1
    differentiable = 1

    @staticmethod
    def forward(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        normalize, backend = options
        return dispatch.call("similarity_forward", backend, *tensors, normalize)

    @staticmethod
    def saved(tensors: Tensors, options: Options, outputs: Tensors, frozen: bool) -> Tensors:
        return *tensors, *outputs[1:]

    @staticmethod
    def gradient(
        saved: Tensors, options: Options, grads: Tensors, needs: Sequence[bool], frozen: bool
    ) -> Tensors:
        normalize, backend = options
        q, k, scale, q_rnorm, k_rnorm = saved
        needs_q, needs_k, needs_scale = needs
        grad_q, grad_k, grad_scale = dispatch.call(
            "similarity_backward", backend, *grads, q, k, scale, normalize, q_rnorm, k_rnorm,
            (needs_q, needs_k),
        )  # fmt: skip
        return _if(needs_q, grad_q), _if(needs_k, grad_k), _like(grad_scale, scale, needs_scale)

    @staticmethod
    def formula(tensors: Tensors, options: Options) -> Sequence[Tensor]:
        q, k, scale = tensors
        return [reference.similarity_matrix(q, k, scale, options[0])]


class _MaskedLogSoftmax(_Op):
    users = "masked_log_softmax"
    outputs = 1
    differentiable = 1

    @staticmethod
    def forward(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        (backend,) = options
        return (dispatch.call("masked_log_softmax_forward", backend, *tensors),)

    @staticmethod
    def saved(tensors: Tensors, options: Options, outputs: Tensors, frozen: bool) -> Tensors:
        return outputs[0], tensors[1]

    @staticmethod
    def gradient(
        saved: Tensors, options: Options, grads: Tensors, needs: Sequence[bool], frozen: bool
    ) -> Tensors:
        (backend,) = options
        return dispatch.call("masked_log_softmax_backward", backend, *grads, *saved), None

    @classmethod
    def plain_gradient(
        cls, tensors: Tensors, options: Options, grads: Tensors, needs: Sequence[bool]
    ) -> Tensors:
        (out, mask), (grad,) = tensors, grads
        left_out = (out == -torch.inf).all(1, keepdim=True)
        if mask is not None:
            left_out = left_out | ~mask
        grad = grad.masked_fill(left_out, 0)
        return grad - out.exp() * grad.sum(1, keepdim=True), None


OPS: dict[str, type[_Op]] = {
    "contrastive": _Contrastive,
    "contrastive_loss": _ContrastiveLoss,
    "loss_of_rows": _LossOfRows,
    "dimcl_loss": _DimCLLoss,
    "dimcl_loss_of_rows": _DimCLLossOfRows,
    "key_loss": _KeyLoss,
    "key_loss_of_rows": _KeyLossOfRows,
    "soft_target": _SoftTarget,
    "dimcl": _DimCL,
    "similarity": _Similarity,
    "masked_log_softmax": _MaskedLogSoftmax,
}


def _if(needed: bool, grad: Tensor | None) -> Tensor | None:
    return grad if needed else None


def _like(grad: Tensor, scalar: Tensor, needed: bool) -> Tensor | None:
    return grad.to(scalar.device) if needed else None


def _positive_keys(
    keys: Sequence[Tensor], index: Tensor | None, first: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Copies of the rows' positives among the concatenated keys, [N, D], and the index into these."""
    if index is None:
        return None, None
    n = index.shape[0]
    if first is not None and first + n <= keys[0].shape[0]:
        own = ops.snapshot(keys[0][first : first + n])
        return own, index - first if first else index
    found, start = None, 0
    for part in keys:
        here = part.index_select(0, (index - start).clamp(0, part.shape[0] - 1))
        found = here if found is None else torch.where((index >= start)[:, None], here, found)
        start += part.shape[0]
    if found is not None and torch.compiler.is_compiling():  # else it might be selected in the backward
        found = ops.snapshot(found)
    return found, torch.where(index >= 0, torch.arange(n, device=index.device), -1)


class _Kept:
    """Tensors that only a second derivative reads. Unlike what autograd saves they may be changed in place
    before the first; then it is the second that is refused."""

    def __init__(self, tensors: Tensors) -> None:
        self.places: list[int] = []
        self._held: list[Tensor] = []
        self._refs: list[weakref.ref[Tensor]] = []
        self._versions: list[int | None] = []
        for i, x in enumerate(tensors):
            if x is not None:
                self.places.append(i)
                self._held.append(x)
                self._refs.append(weakref.ref(x))
                self._versions.append(_version(x))

    def let_go(self) -> None:
        """After a backward that is not differentiated, as autograd frees what it saved: the keys of a step do
        not live on with its loss."""
        self._held.clear()

    @property
    def tensors(self) -> list[Tensor | None]:
        """None for those that are gone."""
        return [ref() for ref in self._refs]

    @property
    def as_they_were(self) -> bool:
        """No: one is gone, changed, or made in inference mode, which counts no changes."""
        now = [None if x is None else _version(x) for x in self.tensors]
        return None not in now and now == self._versions


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


_NOTHING = _Kept(())


def in_transform() -> bool:
    """Whether torch.func's transforms are at work, or forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _run(name: str, options: Options, tensors: Tensors) -> tuple[Tensor, ...]:
    """The outputs of an op, differentiable."""
    if torch.compiler.is_compiling():
        if not (torch.is_grad_enabled() and _needs_gradient(*tensors)):
            # Dynamo inlines a Function then, and guesses by the number of arguments if it takes a context.
            return OPS[name].forward(tensors, options)[: OPS[name].outputs]
        return _Value.apply(name, options, *_distinct(tensors))
    if in_transform():
        return _TransformedValue.apply(name, options, *tensors)[: OPS[name].outputs]
    if not (torch.is_grad_enabled() and _needs_gradient(*tensors)):
        return OPS[name].forward(tensors, options)[: OPS[name].outputs]
    return _Value.apply(name, options, *tensors)


def _run_whole(name: str, options: Options, tensors: Tensors) -> Tensor:
    """The loss of `_WholeLoss`, differentiable; not in torch.func's transforms."""
    if torch.compiler.is_compiling() or not any(options[-2]):
        return _run(name, options, tensors)[0]
    return _WholeValue.apply(name, options, *tensors)


def _set_up(ctx: Any, name: str, options: Options, tensors: Tensors, outputs: Sequence[Tensor]) -> None:
    """The context of a forward whose outputs, and what is for the backward, are `outputs`."""
    op = OPS[name]
    frozen = op.frozen(options, ctx.needs_input_grad[2:])
    saved = op.saved(tensors, options, outputs, frozen)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved)
    ctx.call = (name, options, frozen)
    if frozen and not torch.compiler.is_compiling():
        ctx.kept = _Kept([None if x is y else x for x, y in zip(tensors, saved, strict=False)])


class _Value(torch.autograd.Function):
    """An op, in the form that costs least and that torch.compile takes."""

    @staticmethod
    def forward(ctx: Any, name: str, options: Options, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        op = OPS[name]
        outputs = op.forward(tensors, options)
        _set_up(ctx, name, options, tensors, outputs)
        if op.outputs > op.differentiable:
            ctx.mark_non_differentiable(*outputs[op.differentiable : op.outputs])
        return outputs[: op.outputs]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        name, options, frozen = ctx.call
        op, needs, saved = OPS[name], ctx.needs_input_grad[2:], ctx.saved_tensors
        grads = grads[: op.differentiable]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or in_transform()):
            if frozen and not torch.compiler.is_compiling():
                ctx.kept.let_go()
            return None, None, *op.gradient(saved, options, grads, needs, frozen)
        tensors, usable = list(saved[: len(needs)]), True
        if frozen:
            usable = ctx.kept.as_they_were
            for i, x in zip(ctx.kept.places, ctx.kept.tensors, strict=True):
                tensors[i] = x
        call = (name, options, frozen, needs, usable)
        found = iter(_Gradient.apply(call, *grads, *tensors, *saved))
        return None, None, *(next(found) if needed else None for needed in needs)


class _WholeValue(_Value):
    """The same for a whole loss, with less around it."""

    @staticmethod
    def forward(ctx: Any, name: str, options: Options, *tensors: Tensor | None) -> Tensor:  # type: ignore[override]
        op = OPS[name]
        outputs = op.forward(tensors, options)
        saved = op.saved(tensors, options, outputs, True)
        ctx.save_for_backward(*saved)
        beside = [None if x is y else x for x, y in zip(tensors, saved, strict=False)]
        ctx.kept = _Kept(beside) if any(x is not None for x in beside) else _NOTHING
        ctx.call = (name, options, True)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or in_transform():
            return _Value.backward(ctx, *grads)
        name, options, _ = ctx.call
        ctx.kept.let_go()
        needs = ctx.needs_input_grad[2:]
        return None, None, *OPS[name].gradient(ctx.saved_tensors, options, grads, needs, True)


class _TransformedValue(_Value):
    """The same in the form that torch.func's transforms want."""

    @staticmethod
    def forward(  # type: ignore[override]
        name: str, options: Options, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        return OPS[name].forward(tensors, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        name, options, *tensors = inputs
        _set_up(ctx, name, options, tensors, output)
        ctx.mark_non_differentiable(*output[OPS[name].differentiable :])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _one_by_one(_TransformedValue.apply, info, in_dims, args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        _refuse_forward_mode(OPS[ctx.call[0]].users)


class _Gradient(torch.autograd.Function):
    """A backward op, differentiable: in the gradients that come in and in the tensors of the forward."""

    @staticmethod
    def forward(call: tuple[Any, ...], *args: Tensor | None) -> tuple[Tensor, ...]:
        name, options, frozen, needs, _ = call
        op = OPS[name]
        first = op.differentiable
        found = op.gradient(args[first + len(needs) :], options, args[:first], needs, frozen)
        return tuple(grad for grad, needed in zip(found, needs, strict=True) if needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *args = inputs
        name, _, _, needs, _ = call
        first = OPS[name].differentiable
        last = first + len(needs)
        tracked = [i < first or needed for i, needed in enumerate(ctx.needs_input_grad[1 : last + 1])]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(_if(saved, x) for x, saved in zip(args, tracked, strict=False)))
        ctx.kept = _Kept([_if(not saved, x) for x, saved in zip(args, tracked, strict=False)])
        ctx.call = call

    @staticmethod
    @full_precision
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        name, options, _, needs, usable = ctx.call
        if not (usable and ctx.kept.as_they_were):
            raise RuntimeError(
                f"a second derivative of {OPS[name].users} needs the keys, the labels and the scale as the "
                "forward saw them, but one of them has since been modified in place, was made in inference "
                "mode, or went with an earlier backward: clone it before the forward, or take the derivative "
                "before that"
            )
        tensors = list(ctx.saved_tensors)
        for i, x in zip(ctx.kept.places, ctx.kept.tensors, strict=True):
            tensors[i] = x
        first = OPS[name].differentiable

        def gradient(tensors: Tensors) -> Tensors:
            found = OPS[name].plain_gradient(tensors[first:], options, tensors[:first], needs)
            return [grad for grad, needed in zip(found, needs, strict=True) if needed]

        wanted = ctx.needs_input_grad[1 : len(tensors) + 1]
        second = _pull_back(gradient, tensors, wanted, grads)
        return None, *second, *[None] * (len(ctx.needs_input_grad) - 1 - len(second))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _one_by_one(_Gradient.apply, info, in_dims, args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        _refuse_forward_mode(OPS[ctx.call[0]].users)


def _pull_back(
    function: Callable[[Tensors], Tensors], inputs: Tensors, needs: Sequence[bool], grads: Tensors
) -> Tensors:
    """Differentiable gradients of `function(inputs)` from those of its outputs; None where there is none."""
    gradients: list[Tensor | None] = [None] * len(inputs)
    places = [i for i, needed in enumerate(needs) if needed and inputs[i] is not None]
    cotangents = [grad for grad in grads if grad is not None]
    if not places or not cotangents:
        return gradients

    def of_needed(*values: Tensor) -> tuple[Tensor, ...]:
        given = list(inputs)
        for i, value in zip(places, values, strict=True):
            given[i] = value
        return tuple(x for x, grad in zip(function(given), grads, strict=True) if grad is not None)

    values = [inputs[i] for i in places]
    # torch.func's pull-backs run outside of their transforms, on what those had wrapped.
    wrapped = in_transform() or any(map(torch._C._functorch.is_functorch_wrapped_tensor, values))
    if wrapped or not all(x.requires_grad for x in values):
        outputs, pull_back, *_ = torch.func.vjp(of_needed, *values)
        found = pull_back(tuple(grad.to(x.dtype) for x, grad in zip(outputs, cotangents, strict=True)))
    else:  # without torch.func, which takes no hooks on saved tensors
        found = _plain_vjp(of_needed, values, cotangents)
    for i, gradient in zip(places, found, strict=True):
        gradients[i] = gradient
    return gradients


def _plain_vjp(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Tensors:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [x.view_as(x) for x in inputs]  # an input computed from another stays independent
        pairs = [
            (out, grad.to(out.dtype))
            for out, grad in zip(function(*views), grads, strict=True)
            if out.requires_grad
        ]
        if not pairs:
            return [None] * len(inputs)
        outputs, cotangents = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, views, cotangents, create_graph=create_graph, allow_unused=True)


def recomputed(function: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
    """`function(*args)`, plain PyTorch of which no intermediate result is kept: what
    torch.utils.checkpoint does, in torch.func's transforms. The function holds no tensors of its own."""
    return _Recomputed.apply(function, *args)


class _Recomputed(torch.autograd.Function):
    """A function, computed again in the backward, which is such a function itself."""

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
        return function(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, *args = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in args))
        ctx.rest = [None if isinstance(x, Tensor) else x for x in args]

    @staticmethod
    @full_precision
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        function, needs = ctx.function, ctx.needs_input_grad[1:]
        args = [x if x is not None else other for x, other in zip(ctx.saved_tensors, ctx.rest, strict=True)]
        places = [i for i, grad in enumerate(grads) if grad is not None]
        if not places:
            return (None,) * (1 + len(needs))

        def gradient(*args: Any) -> tuple[Tensor, ...]:
            inputs, cotangents = args[: len(needs)], args[len(needs) :]
            found = _pull_back(lambda given: [function(*given)[i] for i in places], inputs, needs, cotangents)
            return tuple(grad for grad in found if grad is not None)

        found = iter(_Recomputed.apply(gradient, *args, *(grads[i] for i in places)))
        return None, *(next(found) if needed else None for needed in needs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _one_by_one(_Recomputed.apply, info, in_dims, args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        _refuse_forward_mode("rows that are computed again in the backward")


def _one_by_one(
    function: Callable[..., tuple[Tensor, ...]], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The rule of vmap: the problems of a batch in turn, and their outputs stacked."""

    def problem(i: int) -> tuple[Tensor, ...]:
        pairs = zip(args, in_dims, strict=True)
        return function(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in pairs))

    if info.batch_size == 0:
        raise ValueError("torch.vmap over a batch of no problems")
    outputs = [torch.stack(parts) for parts in zip(*map(problem, range(info.batch_size)), strict=True)]
    return tuple(outputs), (0,) * len(outputs)


def _refuse_forward_mode(users: str) -> None:
    raise NotImplementedError(
        f"{users}: no derivative in forward mode (jvp, jacfwd, hessian, autograd.forward_ad); "
        "take torch.func.grad, vjp or jacrev, also of one another, or the function of the same name in "
        "cl_kernels.reference, plain PyTorch with whole matrices"
    )
