"""The losses of thanhkaist/DimCL, fused: those of its solo/losses/oursloss.py and its MoCo loss.

The repository is a fork of solo-learn, from before its gather summed the gradients of all processes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import dtypes, validation
from ..losses import dimcl_loss
from ._dtypes import logsumexp_dtype, product_dtype
from ._formulas import GATHERS_OWN, beside_queue, gather_kind, with_others, world
from ._swap import Unfused, fused


@fused("solo.losses.oursloss:ours_loss_func", known=("d1224f5b77ca6202",))
def ours_loss_func(
    z1: Tensor,
    z2: Tensor,
    indexes: Tensor,
    tau_decor: float | Tensor = 0.1,
    extra_pos_mask: Tensor | None = None,
) -> Tensor:
    """`cl_kernels.dimcl_loss` of two views [N, D]; `indexes` is not looked at, as there.

    `extra_pos_mask`: bool [2D, 2D] of further positives.
    """
    if extra_pos_mask is not None and bool(extra_pos_mask.diagonal().any()):
        raise Unfused("extra_pos_mask makes a column its own positive")
    loss = dimcl_loss(z1, z2, temperature=tau_decor, positive_mask=extra_pos_mask)
    return loss.to(logsumexp_dtype(z1))


@fused("solo.losses.oursloss:ours_loss_func_multigpu", known=("356660f11c6b0046",))
def ours_loss_func_multigpu(
    z1: Tensor, z2: Tensor, indexes: Tensor, tau_decor: float | Tensor = 0.1
) -> Tensor:
    """The same over the rows of all processes, which each normalises by its own statistics before.

    The gradient is that of this process's loss by its own rows, as the repository's gather gives it.
    """
    validation.pair("z1", z1, "z2", z2)
    validation.minimum_rows("z1", z1, 2)
    if world() is None:
        return dimcl_loss(z1, z2, temperature=tau_decor).to(logsumexp_dtype(z1))
    if gather_kind() not in (None, GATHERS_OWN):
        raise Unfused("this repository's gather sums the gradients of all processes")
    parts = [with_others(F.batch_norm(z, None, None, training=True)) for z in (z1, z2)]
    return dimcl_loss(*parts, temperature=tau_decor).to(logsumexp_dtype(z1))


@fused("solo.losses.oursloss:ours_simple_loss_func", known=("c3a1cbb538ef94f5",))
def ours_simple_loss_func(
    z1: Tensor,
    z2: Tensor,
    indexes: Tensor,
    tau_decor: float = 0.1,
    lam_simple: float | Tensor = 1.0,
    extra_pos_mask: Tensor | None = None,
) -> Tensor:
    r"""DimCL without a softmax, over the D x D products of batch-normalised columns.

    .. math:: -\frac{1}{D} \sum_d x_d \cdot y_d - \frac{\lambda}{D^2} \sum_{d \ne e} x_d \cdot y_e

    The second sum needs no matrix: it is that of the products of row sums, less the first one. `indexes`,
    `tau_decor` and `extra_pos_mask` are not looked at, as there.
    """
    z1, z2 = validation.pair("z1", z1, "z2", z2)
    validation.minimum_rows("z1", z1, 2)
    return _simple(z1, z2, lam_simple).to(product_dtype(z1))


@dtypes.full_precision
def _simple(z1: Tensor, z2: Tensor, weight: float | Tensor) -> Tensor:
    acc, width = dtypes.accumulate_dtype(z1.dtype), z1.shape[1]
    x, y = (F.batch_norm(z.to(acc), None, None, training=True) for z in (z1, z2))
    diagonal = (x * y).sum()
    rest = (x.sum(1) * y.sum(1)).sum() - diagonal
    return -(diagonal / width + weight * rest / width**2)


@fused("solo.losses.moco:moco_loss_func", known=("e08562a35f463ea5",))
def moco_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    """`cl_kernels.info_nce_loss` of queries and keys [N, D] and a queue [D, K]."""
    return beside_queue(query, key, queue, temperature)
