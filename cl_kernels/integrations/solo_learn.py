"""The contrastive losses of vturrisi/solo-learn, fused: SimCLR, MoCo v2+, MoCo v3, NNCLR and ReSSL.

Over processes SimCLR and NNCLR gather with the gradients of all processes, as solo-learn does since 1.0.4.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import validation
from ..distributed import ProcessGroup, gather_rows
from ..losses import info_nce_loss
from ._dtypes import cross_entropy_dtype, logsumexp_dtype
from ._formulas import GATHERS_ALL, beside_queue, gather_kind, relational, share_of_positives, world
from ._swap import Unfused, fused


@fused("solo.losses.simclr:simclr_loss_func", known=("b8169f9bb8211e3d",))
def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    r"""SimCLR of rows [N, D], which are normalised, the rows of equal index being positives.

    .. math::
        -\frac{1}{N} \sum_i \log \frac{\sum_{p \in P(i)} e^{z_i \cdot z_p / \tau}}
            {\sum_{j \ne i} e^{z_i \cdot z_j / \tau}}

    That is SupCon's "in" form without the logarithm of the number of positives, over the rows of all
    processes. A row without positives makes it infinite.
    """
    validation.features("z", z)
    indexes = validation.labels("indexes", indexes, z.shape[0])
    validation.same_device(z=z, indexes=indexes)
    group, rank = _processes()
    first = rank * z.shape[0]
    rows = F.normalize(z, dim=-1)
    keys = None if group is None else gather_rows(rows, group)
    everyone = gather_rows(indexes, group)
    partner = _partner(everyone)
    if partner is not None:
        partner = partner[first : first + z.shape[0]]
    columns = validation.label_ids(everyone)
    own = columns if group is None else columns[first : first + z.shape[0]]
    loss = share_of_positives(rows, keys, first, own, columns, partner, temperature)
    return loss.mean().to(logsumexp_dtype(z))


@fused("solo.losses.mocov2plus:mocov2plus_loss_func", known=("b62551186338645b",))
def mocov2plus_loss_func(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float | Tensor = 0.1
) -> Tensor:
    """`cl_kernels.info_nce_loss` of queries and keys [N, D] and a queue [D, K], not normalised."""
    return beside_queue(query, key, queue, temperature)


@fused("solo.losses.mocov3:mocov3_loss_func", known=("0812223991df434a",))
def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float | Tensor = 0.2) -> Tensor:
    r""":math:`2 \tau` times InfoNCE of normalised rows [N, D] over the keys of all processes.

    Over processes no key gets a gradient, not even this one's; alone, they do.
    """
    validation.pair("query", query, "key", key)
    group = world()
    rank = 0 if group is None else dist.get_rank()
    keys = F.normalize(key, dim=1)
    if group is not None:
        keys = gather_rows(keys.detach(), group)
    rows = F.normalize(query, dim=1)
    loss = info_nce_loss(rows, rows, k_global=keys, rank=rank, temperature=temperature)
    return loss.to(cross_entropy_dtype(query)) * (2 * temperature)


@fused("solo.losses.nnclr:nnclr_loss_func", known=("48d9a5a09484a4c3",))
def nnclr_loss_func(nn: Tensor, p: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    """InfoNCE of normalised rows: neighbours [N, D] over the predictions [N, D] of all processes."""
    validation.pair("nn", nn, "p", p)
    group, rank = _processes()
    keys = gather_rows(F.normalize(p, dim=-1), group)
    rows = F.normalize(nn, dim=-1)
    loss = info_nce_loss(rows, rows, k_global=keys, rank=rank, temperature=temperature)
    return loss.to(cross_entropy_dtype(nn))


@fused("solo.losses.ressl:ressl_loss_func", known=("5f1e400e4064804a",))
def ressl_loss_func(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature_q: float | Tensor = 0.1,
    temperature_k: float | Tensor = 0.04,
) -> Tensor:
    """Cross-entropy of the similarities of q with a queue [K, D] against those of k, both [N, D]."""
    if isinstance(temperature_k, Tensor) and temperature_k.requires_grad:
        raise Unfused("temperature_k requires a gradient")
    return relational(q, k, [queue], None, temperature_q, temperature_k).mean().to(logsumexp_dtype(q))


def _processes() -> tuple[ProcessGroup | None, int]:
    """All processes, and which of them this one is."""
    group = world()
    if group is None:
        return None, 0
    if gather_kind() not in (None, GATHERS_ALL):
        raise Unfused("this repository's gather does not sum the gradients of all processes")
    return group, dist.get_rank()


def _partner(indexes: Tensor) -> Tensor | None:
    """The other row of its index for each row, if each index has two; None where that cannot be looked at."""
    if not validation.readable(indexes) or len(indexes) % 2 or len(indexes) == 0:
        return None
    found, order = indexes.sort()
    first, second = found[0::2], found[1::2]
    if not (torch.equal(first, second) and bool((first[1:] != second[:-1]).all())):
        return None
    partner = torch.empty_like(order)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return partner
