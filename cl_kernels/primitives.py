"""What lies below the losses: similarities, masked log-softmax, soft-target cross-entropy, the LSE engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import autograd, dtypes, validation
from .losses._common import settled


@dtypes.full_precision
def similarity(
    q: Tensor, k: Tensor | None = None, *, scale: float | Tensor = 1.0, normalize: bool = False
) -> Tensor:
    r"""Scaled dot products, or cosines, of all pairs of rows.

    .. math:: S_{ij} = s\, q_i \cdot k_j, \qquad
        \text{or } s\, \frac{q_i \cdot k_j}{\lVert q_i \rVert \lVert k_j \rVert} \text{ with normalize}

    Args:
        q: [N, D], float16, bfloat16, float32 or float64.
        k: [M, D], or None for `q` with itself.
        scale: s, a float or a tensor of one element, which gets its gradient.
        normalize: bring the rows to unit length first; a zero row stays zero and gets no gradient.

    Returns:
        [N, M] in the common dtype of `q` and `k`; products and norms are summed in at least float32. This
        is the whole matrix: the losses do without it.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value, named in the message.

    With G the gradient of S:

    ==========  ===================================================================
    input       gradient
    ==========  ===================================================================
    q           :math:`s\, G k`; normalised: its part orthogonal to q, over :math:`\lVert q \rVert`
    k           :math:`s\, G^\top q`, likewise
    scale       :math:`\sum_{ij} G_{ij} S_{ij} / s`
    ==========  ===================================================================

    Example:
        >>> import torch, cl_kernels as clk
        >>> clk.similarity(torch.eye(2), scale=3.0)
        tensor([[3., 0.],
                [0., 3.]])

    Source: the similarity matrix of Chen et al., "A Simple Framework for Contrastive Learning of Visual
    Representations", 2020, section 2.1.
    """
    validation.features("q", q)
    validation.flag("normalize", normalize)
    scale = validation.scale("scale", scale, q)
    if k is not None:
        validation.features("k", k, shape="[M, D]")
        validation.same_device(q=q, k=k)
        validation.same_width(q=q, k=k)
        q, k = dtypes.promote(q, k)
    return autograd.similarity(q, k, scale, normalize)


@dtypes.full_precision
def masked_log_softmax(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Log-softmax over the last dimension, restricted to the entries that a mask includes.

    .. math::
        o_{ij} = x_{ij} - \log \sum_{l:\, m_{il}} e^{x_{il}} \text{ where } m_{ij}, \text{ else } -\infty

    Args:
        logits: x, [..., M] with at least one dimension, float16, bfloat16, float32 or float64.
        mask: m, bool, broadcastable to the shape of `logits`; True is included. None includes everything.

    Returns:
        The shape and dtype of `logits`; sums are taken in at least float32. A row with nothing included, or
        with nothing but -inf, is all -inf, with gradient 0: never NaN.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape or device, named in the message.

    With g the gradient of o, 0 where excluded, x gets :math:`g_{ij} - e^{o_{ij}} \sum_l g_{il}`.

    Example:
        >>> import torch, cl_kernels as clk
        >>> clk.masked_log_softmax(torch.zeros(4), torch.tensor([True, True, False, False])).exp()
        tensor([0.5000, 0.5000, 0.0000, 0.0000])

    Source: the softmax over A(i) of Khosla et al., "Supervised Contrastive Learning", 2020, equation 2.
    """
    validation.features("logits", logits, ranks=range(1, 65), shape="[..., M]")
    if mask is not None:
        mask = _broadcast_mask(mask, logits).reshape(-1, logits.shape[-1])
    rows = logits.reshape(-1, logits.shape[-1])
    return autograd.masked_log_softmax(rows, mask).reshape(logits.shape)


def _broadcast_mask(mask: Tensor, logits: Tensor) -> Tensor:
    validation.tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
    validation.same_device(logits=logits, mask=mask)
    missing = logits.dim() - mask.dim()
    if missing < 0 or any(m != 1 and m != n for m, n in zip(mask.shape, logits.shape[missing:], strict=True)):
        raise ValueError(
            f"mask must broadcast to the shape of logits {tuple(logits.shape)}, got {tuple(mask.shape)}"
        )
    return mask.expand(logits.shape)


@dtypes.full_precision
def soft_target_cross_entropy(
    q: Tensor,
    k: Tensor | Sequence[Tensor],
    target_q: Tensor,
    target_k: Tensor | Sequence[Tensor],
    *,
    scale: float | Tensor,
    target_scale: float | Tensor,
    positive: Tensor | None = None,
    coeff: float | Tensor = 0.0,
    positive_in_target: str = "exclude",
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy of the softmax over one similarity against a target made of a second one and a positive.

    .. math::
        \ell_i = -\sum_j W_{ij} \log \mathrm{softmax}_j(s\, q_i \cdot k_j), \qquad
        W_i = \lambda\, \mathrm{onehot}(p_i) + (1 - \lambda)\, \mathrm{softmax}_j(s'\, t_i \cdot u_j)

    Args:
        q: queries, [N, D], float16, bfloat16, float32 or float64; used as they come, not normalised.
        k: keys [M, D], or a list of segments [M_s, D] (say, batch and queue) that are read as one, without a
            copy; a segment may be the transpose of a [D, M_s] buffer.
        target_q: the target's queries t, [N, E].
        target_k: the target's keys u, [M, E], in segments as long as those of `k`.
        scale, target_scale: s and s', floats or tensors of one element, which get their gradients.
        positive: p, int64 [N], the column of each row's positive, -1 for none; None: no row has one.
        coeff: :math:`\lambda \in [0, 1]`, a float or a tensor of one element, which gets its gradient; 0
            without `positive`.
        positive_in_target: what the target's softmax does with the positive's column: "exclude" leaves it
            out, "zero" keeps it with logit 0.
        reduction: "mean" over the rows, "sum", or "none": [N].

    Returns:
        The loss in float32 (float64 for float64 inputs). Where the target has no column left, W is the
        one-hot, and without a positive either, the loss is 0.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value, named in the message.

    With P the softmax of :math:`S = s\, q k^\top`, T the target's, :math:`\bar S_i = \sum_j T_{ij} S_{ij}`:

    ==============  =========================================================================================
    input           gradient, for :math:`g_i` that of row i
    ==============  =========================================================================================
    q               :math:`s\, g_i\,((a P - W) k)_i` with :math:`a_i = \sum_j W_{ij}`
    k               :math:`s\,(a P - W)^\top (g q)`
    target_q        :math:`s'\,(H u)_i`, :math:`H_{ij} = -g_i (1 - \lambda)\, T_{ij} (S_{ij} - \bar S_i)`
    target_k        :math:`s'\, H^\top t`
    coeff           :math:`\sum_i g_i (\bar S_i - S_{i p_i})`
    ==============  =========================================================================================

    With keys and target frozen, the backward takes no pass over the pairs.

    Example:
        >>> import torch, cl_kernels as clk
        >>> q, t, k, queue = (torch.nn.functional.normalize(torch.randn(n, 16)) for n in (8, 8, 8, 64))
        >>> keys = [k, queue]  # read as one, without a copy
        >>> weights = {"positive": torch.arange(8), "coeff": 0.5}
        >>> loss = clk.soft_target_cross_entropy(
        ...     q.requires_grad_(), keys, t, keys, scale=10, target_scale=20, **weights
        ... )
        >>> loss.backward()

    Source: Denize et al., "Similarity Contrastive Estimation for Self-Supervised Soft Contrastive Learning",
    2023.
    """
    problem, coeff = validation.soft_target(
        q, k, target_q, target_k, scale, target_scale, positive, coeff, positive_in_target
    )
    validation.option("reduction", reduction, validation.REDUCTIONS)
    stats = autograd.soft_target(problem)
    empty = stats.target_lse == -math.inf
    if positive is None:
        loss = (stats.lse - stats.cross).masked_fill(empty & ~stats.lse.isnan(), 0)
    else:
        coeff = dtypes.scalar_tensor(coeff, stats.lse.dtype, stats.lse.device)
        weight = torch.where(empty, 1, coeff) * (positive >= 0)
        target_weight = torch.where(empty, 0, 1 - coeff)
        loss = weight * (stats.lse - stats.positive_sum) + target_weight * (stats.lse - stats.cross)
    loss = settled(loss, problem.columns)
    return validation.reduction(loss, reduction).to(dtypes.accumulate_dtype(problem.q.dtype))


@dtypes.full_precision
def contrastive_lse(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    exclude: str | int | None = "self",
    row_labels: Tensor | None = None,
    col_labels: Tensor | None = None,
    among: str = "all",
    key_bias: Tensor | None = None,
    both_axes: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The engine below the losses: log-sum-exp of scaled similarities over each row's denominator.

    .. math::
        \mathrm{LSE}_i = \log \sum_{j \in \mathrm{Den}(i)} e^{S_{ij}}, \qquad S_{ij} = s\, q_i \cdot k_j + b_j

    Args:
        q: [N, D], float16, bfloat16, float32 or float64; used as it comes, not normalised.
        k: [M, D], or None for `q` with itself.
        scale: s, a float or a tensor of one element, which gets its gradient.
        exclude: "self" leaves column i out of row i, an integer o column i + o; None leaves nothing out.
        row_labels, col_labels: [N] and [M] of any integer, bool or float dtype, compared by ==, where a NaN
            equals nothing; with `k` None, `col_labels` may be left out.
        among: Den(i) holds "all" columns, or those with the "same" or with a "different" label.
        key_bias: b, [M]: log-weights, or -inf to drop a key.
        both_axes: also the LSE of each column over the rows that count it.

    Returns:
        [N], with `both_axes` ([N], [M]), in float32 (float64 for float64 inputs); -inf where nothing is
        included, with gradient 0.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or value, named in the message.

    With :math:`G_{ij} = g_i e^{S_{ij} - \mathrm{LSE}_i}` over Den (and the columns' likewise):

    ==========  ================================
    input       gradient
    ==========  ================================
    q           :math:`s\, G k`
    k           :math:`s\, G^\top q`
    scale       :math:`\sum_{ij} G_{ij}\, q_i \cdot k_j`
    key_bias    :math:`\sum_i G_{ij}`
    ==========  ================================

    Example:
        >>> import torch, cl_kernels as clk
        >>> q = torch.nn.functional.normalize(torch.randn(8, 16))
        >>> labels = torch.arange(8) % 4
        >>> positives = clk.contrastive_lse(q, scale=10, row_labels=labels, among="same")
        >>> bool((positives < clk.contrastive_lse(q, scale=10)).all())
        True

    Source: the denominator of van den Oord et al., "Representation Learning with Contrastive Predictive
    Coding", 2018, equation 4.
    """
    problem = validation.contrast(q, k, scale, exclude, row_labels, col_labels, among, key_bias, both_axes)
    stats, dtype = autograd.contrastive(problem), dtypes.accumulate_dtype(problem.q.dtype)
    return (stats.lse.to(dtype), stats.lse_cols.to(dtype)) if both_axes else stats.lse.to(dtype)
