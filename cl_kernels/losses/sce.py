"""Similarity contrastive estimation (SCE): soft contrastive targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import autograd, dtypes, validation
from ..distributed import ProcessGroup, Ranks, engine, join, rows_of, total
from ..problem import Contrast, KeyLoss, SoftTarget
from ._common import (
    Grouped,
    at_least_zero,
    cross_entropy,
    inverse,
    keys_and_positives,
    log_add,
    loss_function,
    makes_whole_losses,
    nothing,
    over_frozen_keys,
    over_segments,
    own_similarity,
    reduced,
    shown,
    warn_of_empty_queue,
)

if TYPE_CHECKING:
    from ..queue import KeyQueue


class SCETargets(NamedTuple):
    """The teacher's part in the loss of every student view of a batch; made by `sce_targets`."""

    lse: Tensor  # [N], log-sum-exps of the target's logits
    mean: Tensor  # [N, D], A: the target's mean of the keys, without the positive
    positive_in_target: str
    columns: int  # how many keys, those of all ranks


@loss_function
def sce_loss(
    q: Tensor,
    k: Tensor,
    k_global: Tensor | None = None,
    queue: Tensor | KeyQueue | None = None,
    *,
    temperature: float | Tensor = 0.1,
    target_temperature: float | Tensor = 0.07,
    coeff: float | Tensor = 0.5,
    positive_in_target: str = "exclude",
    rank: int = 0,
    reduction: str = "mean",
    targets: SCETargets | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> Tensor:
    r"""Cross-entropy against a mix of the positive and the sharpened similarities of the momentum keys.

    .. math::
        \ell_i = -\sum_j W_{ij} \log \mathrm{softmax}_j(q_i \cdot u_j / \tau), \qquad
        W_i = \lambda\, \mathrm{onehot}_i + (1 - \lambda)\, \mathrm{softmax}_j(k_i \cdot u_j / \tau_m)

    The keys u are `[k_global; queue]`; `k_global` is the keys of all processes and row i's positive is its
    row :math:`i + N \cdot \mathrm{rank}`. Without either, :math:`u = k`. With a queue alone, u is the row's
    own key :math:`k_i` and the queue.

    Args:
        q: online queries, [N, D], float16, bfloat16, float32 or float64; used as they come, not normalised.
        k: their momentum keys, [N, D].
        k_global: the gathered keys [G, D] with :math:`G \ge N (\mathrm{rank} + 1)`, or None.
        queue: earlier keys, a `KeyQueue` or [K, D], which may be the transpose of a [D, K] buffer (it is not
            copied); None. Beside an empty queue, and without `k_global`, the own key is alone and the loss 0.
        temperature, target_temperature: :math:`\tau, \tau_m > 0`, floats or tensors of one element, which get
            their gradients.
        coeff: :math:`\lambda \in [0, 1]`, likewise.
        positive_in_target: what the target's softmax does with the positive's own column: "exclude" leaves it
            out (the paper), "zero" keeps it with similarity 0 (what the authors' queue mode computes).
        rank: which block of `k_global` holds the keys of this process.
        reduction: "mean" over the queries, "sum", or "none": [N].
        targets: of the same keys, from `sce_targets`, for several student views of one batch (multi-crop):
            the target is then not computed again, and `target_temperature` and `positive_in_target` are those
            of the targets. The keys must not require a gradient.
        group, exchange: the processes over whose rows the loss is taken, a `torch.distributed.ProcessGroup`,
            and how keys travel, "gather" or "ring" (docs/distributed.md); None: this process alone. With a
            group u is `[k of all ranks; queue]`.

    Returns:
        The loss in float32 (float64 for float64 inputs). A row whose target has no column left takes
        :math:`\lambda = 1`.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value; the message names it.

    With P the softmax of the online logits, T the target's, and A = T u (T without the positive):

    ==================  ===============================================================================
    input               gradient of row i
    ==================  ===============================================================================
    q                   :math:`g_i\,(P u - \lambda u_{pos} - (1 - \lambda) A)_i / \tau`
    k_global, queue     :math:`g_i\,(P - W)_{ij}\, q_i / \tau`, and through T
    k                   through T: :math:`-g_i (1 - \lambda) \sum_j T_{ij} (S_{ij} - \bar S_i)\, u_j / \tau_m`
    coeff               :math:`-g_i\,(S_{i,pos} - \bar S_i)`, :math:`\bar S_i = \sum_j T_{ij} S_{ij}`
    ==================  ===============================================================================

    The keys get a gradient only if they require one; momentum keys do not, and cost nothing then.

    Example:
        >>> import torch, cl_kernels as clk
        >>> q, k, queue = (torch.nn.functional.normalize(torch.randn(n, 16)) for n in (8, 8, 64))
        >>> clk.sce_loss(q.requires_grad_(), k, queue=queue, temperature=0.1, coeff=0.5).backward()

    Source: Denize et al., "Similarity Contrastive Estimation for Self-Supervised Soft Contrastive Learning",
    2023.
    """
    k_global = _global_keys(k, k_global, rank, group)
    q, k, k_global, queue = validation.keys_and_queue(q, k, k_global, queue, rank)
    tau = validation.temperature("temperature", temperature, q)
    target_tau = validation.temperature("target_temperature", target_temperature, q)
    weight = validation.coefficient("coeff", coeff, q)
    validation.option("positive_in_target", positive_in_target, validation.TARGET_POSITIVES)
    validation.option("reduction", reduction, validation.REDUCTIONS)

    ranks = join(
        group, exchange, q, "sce_loss", k=k, queue=queue, rows_of_queue=rows_of(queue),
        targets=targets is not None, temperature=tau, target_temperature=target_tau, coeff=weight,
        positive_in_target=positive_in_target, reduction=reduction,
    )  # fmt: skip
    if targets is None and ranks is None:
        loss = _whole(q, k, k_global, queue, rank, reduction, tau, target_tau, weight, positive_in_target)
        if loss is not None:
            return loss
    if targets is not None:
        keys, positive = keys_and_positives(k, k_global, queue, rank)
        _check_targets(targets, q, k, keys, _columns(keys, ranks))
        rows = _to_targets(q, k, keys, positive, q.shape[0] * rank, tau, weight, targets, ranks)
    elif k_global is None and queue is not None:
        rows = _beside_queue(q, k, queue, tau, target_tau, weight, positive_in_target)
    else:
        rows = _among_keys(
            q, k, k_global, queue, tau, target_tau, weight, positive_in_target, q.shape[0] * rank, ranks
        )
    return reduced(rows, reduction, q, ranks=ranks)


def _global_keys(k: Tensor, k_global: Tensor | None, rank: int, group: Any) -> Tensor | None:
    """With a group this rank's keys, to which the engine adds those of the others."""
    validation.no_group_beside(group, k_global, rank)
    return k_global if group is None else k


@loss_function
def sce_targets(
    k: Tensor,
    k_global: Tensor | None = None,
    queue: Tensor | KeyQueue | None = None,
    *,
    target_temperature: float | Tensor = 0.07,
    positive_in_target: str = "exclude",
    rank: int = 0,
    group: ProcessGroup | None = None,
    exchange: str = "gather",
) -> SCETargets:
    r"""The targets of `sce_loss`, to be shared by several student views of one batch.

    .. math:: A_i = \sum_j \mathrm{softmax}_j(k_i \cdot u_j / \tau_m)\, u_j

    With A known, a view's loss takes one softmax over the keys in place of two: four products of N, the
    number of keys, and D in place of eight.

    Args:
        k, k_global, queue, target_temperature, positive_in_target, rank, group, exchange: as for `sce_loss`;
            no gradient is taken for any of them.

    Returns:
        lse [N] float64, mean [N, D] float32 (float64 for float64 inputs), `positive_in_target` and the number
        of keys.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value; the message names it.

    Example:
        >>> import torch, cl_kernels as clk
        >>> k, queue, *crops = (torch.nn.functional.normalize(torch.randn(n, 16)) for n in (8, 64, 8, 8))
        >>> targets = clk.sce_targets(k, queue=queue, target_temperature=0.05)
        >>> views = [crop.requires_grad_() for crop in crops]
        >>> sum(clk.sce_loss(q, k, queue=queue, targets=targets) for q in views).backward()

    Source: Denize et al., "Similarity Contrastive Estimation for Self-Supervised Soft Contrastive Learning",
    2023; the multi-crop there calls the loss once for each crop.
    """
    k_global = _global_keys(k, k_global, rank, group)
    _, k, k_global, queue = validation.keys_and_queue(k, k, k_global, queue, rank)
    tau = validation.temperature("target_temperature", target_temperature, k)
    validation.option("positive_in_target", positive_in_target, validation.TARGET_POSITIVES)
    keys, positive = keys_and_positives(k, k_global, queue, rank)
    scale = inverse(tau, k)
    problem = SoftTarget(k, keys, k, keys, scale, scale, positive, positive_in_target)
    ranks = join(
        group, exchange, k.detach(), "sce_targets", rows_of_queue=rows_of(queue),
        positive_in_target=positive_in_target,
    )  # fmt: skip
    if keys[0].shape[0] == 0:
        lse = k.new_full(k.shape[:1], -torch.inf, dtype=dtypes.statistics_dtype(k))
        mean = torch.zeros_like(k, dtype=dtypes.accumulate_dtype(k.dtype))
    else:
        lse, mean = engine.soft_target_means(problem, ranks)
    return SCETargets(lse, mean, positive_in_target, _columns(keys, ranks))


def _columns(keys: list[Tensor], ranks: Ranks | None) -> int:
    """How many keys there are on all ranks, of which the first segment is split among them."""
    return total(keys[0].shape[0], ranks) + sum(x.shape[0] for x in keys[1:])


def _check_targets(targets: Any, q: Tensor, k: Tensor, keys: list[Tensor], columns: int) -> None:
    if not isinstance(targets, SCETargets):
        raise TypeError(f"targets must be made by sce_targets, got {type(targets).__name__}")
    if not validation.has_shape(targets.mean, *q.shape):
        raise ValueError(
            f"targets must be of queries {tuple(q.shape)}, got those of {tuple(targets.mean.shape)}"
        )
    if targets.columns != columns:
        raise ValueError(f"targets must be over the loss's {columns} keys, got those over {targets.columns}")
    validation.same_device(q=q, targets=targets.mean)
    if any(x.requires_grad for x in (k, *keys)):
        raise ValueError(
            "targets must not be given with keys that require a gradient: none is computed for them"
        )


def _whole(
    q: Tensor,
    k: Tensor,
    k_global: Tensor | None,
    queue: Tensor | None,
    rank: int,
    reduction: str,
    tau: float | Tensor,
    target_tau: float | Tensor,
    coeff: float | Tensor,
    positive_in_target: str,
) -> Tensor | None:
    """The reduced loss by one op, or None."""
    if not makes_whole_losses(q, reduction, by_rows=True):
        return None
    keys, positive = keys_and_positives(k, k_global, queue, rank)
    own = k if positive is None else None
    problem = KeyLoss(
        q, keys, k, inverse(tau, q), inverse(target_tau, q), coeff, own, positive,
        positive_in_target == "zero",
    )  # fmt: skip
    return over_frozen_keys(problem, reduction)


def _to_targets(
    q: Tensor,
    k: Tensor,
    keys: list[Tensor],
    positive: Tensor | None,
    start: int,
    tau: float | Tensor,
    coeff: float | Tensor,
    targets: SCETargets,
    ranks: Ranks | None,
) -> Tensor:
    """[N]: the losses by known targets."""
    scale = inverse(tau, q)
    if keys[0].shape[0] == 0:
        return _alone(q, k, scale, coeff)
    problem = Contrast(q, keys[0], scale, positive_index=positive)
    first = engine.contrastive(problem, ranks, first_positive=start)
    lse = over_segments(first.lse, q, keys[1:], scale)
    cross = ((q.to(targets.mean.dtype) * targets.mean).sum(1) * scale).to(lse)
    own = first.positive_sum if positive is not None else own_similarity(q, k, scale).to(lse)
    if positive is None:
        lse = log_add(lse, own)
        if targets.positive_in_target == "zero":
            cross = torch.lerp(own, cross, torch.sigmoid(targets.lse))
    elif targets.positive_in_target == "zero":
        cross = cross + (-targets.lse).exp() * own
    return cross_entropy(lse, _mix(cross, own, coeff), _columns(keys, ranks) + int(positive is None))


def _among_keys(
    q: Tensor,
    k: Tensor,
    k_global: Tensor | None,
    queue: Tensor | None,
    tau: float | Tensor,
    target_tau: float | Tensor,
    coeff: float | Tensor,
    positive_in_target: str,
    first: int,
    ranks: Ranks | None,
) -> Tensor:
    """[N]: the positive is one of the keys' columns."""
    keys = [x for x in (k if k_global is None else k_global, queue) if x is not None]
    positive = torch.arange(first, first + q.shape[0], device=q.device)
    problem = SoftTarget(
        q, keys, k, keys, inverse(tau, q), inverse(target_tau, q), positive, positive_in_target
    )
    stats = engine.soft_target(problem, ranks, first_positive=first)
    return cross_entropy(stats.lse, _mix(stats.cross, stats.positive_sum, coeff), _columns(keys, ranks))


def _beside_queue(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    tau: float | Tensor,
    target_tau: float | Tensor,
    coeff: float | Tensor,
    positive_in_target: str,
) -> Tensor:
    """[N]: the positive is a column of its own beside the queue's."""
    scale = inverse(tau, q)
    if queue.shape[0] == 0:
        return _alone(q, k, scale, coeff, inverse(target_tau, q))
    stats = autograd.soft_target(SoftTarget(q, [queue], k, [queue], scale, inverse(target_tau, q)))
    positive, cross = own_similarity(q, k, scale).to(stats.lse.dtype), stats.cross
    if positive_in_target == "zero":
        cross = torch.lerp(positive, cross, torch.sigmoid(stats.target_lse))
    return at_least_zero(log_add(stats.lse, positive) - _mix(cross, positive, coeff))


def _alone(q: Tensor, k: Tensor, scale: float | Tensor, *others: float | Tensor) -> Tensor:
    """[N]: 0, as the positive is the only key, in the graph of all that takes part."""
    warn_of_empty_queue()
    own = own_similarity(q, k, scale)
    for other in others:
        own = own + other
    return nothing(own)


def _mix(cross: Tensor, positive: Tensor, coeff: float | Tensor) -> Tensor:
    """(1 - coeff) * cross + coeff * positive."""
    if isinstance(coeff, Tensor) or torch.compiler.is_compiling():
        coeff = dtypes.scalar_tensor(coeff, cross.dtype, cross.device)
    return torch.lerp(cross, positive, coeff)


class SCELoss(Grouped):
    """`sce_loss` as a module: forward(q, k, k_global=None, queue=None).

    What changes from step to step (both temperatures, `coeff`) can be given to a call; None takes the
    module's.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        target_temperature: float | Tensor = 0.07,
        coeff: float | Tensor = 0.5,
        *,
        positive_in_target: str = "exclude",
        reduction: str = "mean",
        group: ProcessGroup | None = None,
        exchange: str = "gather",
    ) -> None:
        super().__init__(group, exchange)
        self.temperature = temperature
        self.target_temperature = target_temperature
        self.coeff = coeff
        self.positive_in_target = validation.option(
            "positive_in_target", positive_in_target, validation.TARGET_POSITIVES
        )
        self.reduction = validation.option("reduction", reduction, validation.REDUCTIONS)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        k_global: Tensor | None = None,
        queue: Tensor | KeyQueue | None = None,
        *,
        temperature: float | Tensor | None = None,
        target_temperature: float | Tensor | None = None,
        coeff: float | Tensor | None = None,
        rank: int = 0,
        targets: SCETargets | None = None,
    ) -> Tensor:
        return sce_loss(
            q,
            k,
            k_global,
            queue,
            temperature=self.temperature if temperature is None else temperature,
            target_temperature=self.target_temperature if target_temperature is None else target_temperature,
            coeff=self.coeff if coeff is None else coeff,
            positive_in_target=self.positive_in_target,
            rank=rank,
            reduction=self.reduction,
            targets=targets,
            group=self.group,
            exchange=self.exchange,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={shown(self.temperature)}, target_temperature={shown(self.target_temperature)}, "
            f"coeff={shown(self.coeff)}, positive_in_target={self.positive_in_target!r}, "
            f"reduction={self.reduction!r}{self.shown_group()}"
        )
