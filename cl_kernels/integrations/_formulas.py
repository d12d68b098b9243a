"""Losses that several repositories have, over the engine; each adapter adds a library's own conventions."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import autograd, dtypes, reference, validation
from ..distributed import ProcessGroup, gather_rows
from ..losses import info_nce_loss
from ..losses._common import beside, cross_entropy, inverse, over_segments, wide
from ..losses._views import Anchors, outside_rows, view_major
from ..problem import Contrast, SoftTarget
from ._dtypes import cross_entropy_dtype
from ._registry import digest

Scalar = float | Tensor

GATHERS_ALL = "016d219801a11f7f"  # GatherLayer.backward: sums the gradients of all processes
GATHERS_OWN = "a00b07c56deca144"  # takes those of this process's loss


class SupervisedModule(nn.Module):
    """The constructor and the attributes that SupCon has in several repositories."""

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float | Tensor = 0.07,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature


@dtypes.full_precision
def supervised(
    features: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    views: int,
    *,
    temperature: Scalar,
    base_temperature: Scalar,
    augmentations: int = 1,
    drop: bool = False,
) -> Tensor:
    """SupCon's mean over anchors, NaN where the weights of an anchor's positives sum to 0.

    Args:
        features: [A*B, V, ...], A augmentations of B samples one after the other.
        labels, mask: [B] and [B, B], on the device of the features.
        views: how many of the V are anchors.
        drop: leave out the anchors whose weights sum to 0.
    """
    x = validation.views("features", features)
    batch = validation.split("features", x, augmentations)
    labels, mask = validation.supervision(labels, mask, batch, x)
    tau = validation.temperature("temperature", temperature, x)
    base = validation.temperature("base_temperature", base_temperature, x)
    given = Anchors(view_major(x), views * x.shape[0], batch, inverse(tau, x), labels, mask)
    loss, count = outside_rows(given)
    if count is None:
        loss = loss.mean()
    else:  # not divided by it where it is so small
        divisor, counted = count.masked_fill(count >= reference.EMPTY_COUNT, 1.0), count != 0
        if drop:
            loss = (loss / divisor.masked_fill(~counted, 1.0)).masked_fill(
                ~counted, 0.0
            ).sum() / counted.sum()
        else:
            loss = (loss / divisor).mean()
    return (loss * (wide(tau, loss) / wide(base, loss))).to(dtypes.accumulate_dtype(x.dtype))


def anchor_views(features: Tensor, contrast_mode: str) -> int:
    """How many of the views of features [B, V, ...] are anchors."""
    validation.option("contrast_mode", contrast_mode, ("all", "one"))
    return features.shape[1] if contrast_mode == "all" else 1


def plain_cross_entropy(loss: nn.Module) -> bool:
    """Whether it is what `nn.CrossEntropyLoss()` makes, over classes from 0 on."""
    return (
        type(loss) is nn.CrossEntropyLoss
        and loss.weight is None
        and loss.reduction == "mean"
        and loss.label_smoothing == 0
        and loss.ignore_index < 0
    )


def supervision(
    features: Tensor, labels: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Labels [B] and a mask, which is float32 for them, on the device of the features."""
    if labels is not None:
        labels = labels.to(features.device).reshape(-1)
    if mask is not None and not mask.requires_grad:
        mask = mask.to(features.device, torch.float32)
    return labels, mask


@dtypes.full_precision
def relational(
    q: Tensor,
    k: Tensor,
    keys: Sequence[Tensor],
    own: int | None,
    temperature: Scalar,
    target_temperature: Scalar,
) -> Tensor:
    """Cross-entropy [N] of the similarities of q with the keys against those of k, which get no gradient.

    `own`: column i + own of the first segment of keys is in neither distribution of row i.
    """
    q, k, *keys = _matrices(q, [k, *keys])
    validation.same_shape(q=q, k=k)
    scale = inverse(validation.temperature("temperature", temperature, q), q)
    target_scale = inverse(validation.temperature("target_temperature", target_temperature, q), q)
    if isinstance(target_scale, Tensor):
        target_scale = target_scale.detach()
    columns = sum(len(part) for part in keys)
    positive = None
    if own is not None:
        columns -= 1
        positive = torch.arange(own, own + q.shape[0], device=q.device)
        validation.index("own", positive, q.shape[0], keys[0].shape[0])
    teacher, fixed = k.detach(), [part.detach() for part in keys]
    if own is None or (torch.is_grad_enabled() and any(part.requires_grad for part in keys)):
        stats = autograd.soft_target(SoftTarget(q, keys, teacher, fixed, scale, target_scale, positive))
        lse, cross = stats.lse, stats.cross
    else:
        problem = SoftTarget(teacher, fixed, teacher, fixed, target_scale, target_scale, positive)
        _, mean = autograd.soft_target_means(problem)
        cross = (q.to(mean.dtype) * mean).sum(1) * scale
    if own is not None:
        if keys[0].shape[0] == 1:  # the positive alone
            keys, own = keys[1:], None
        lse = autograd.contrastive(Contrast(q, keys[0], scale, exclude=own)).lse
        lse = over_segments(lse, q, keys[1:], scale)
    return cross_entropy(lse, cross.to(lse), columns)


@dtypes.full_precision
def share_of_positives(
    z: Tensor,
    keys: Tensor | None,
    own: int,
    row_labels: Tensor,
    col_labels: Tensor,
    partner: Tensor | None,
    temperature: Scalar,
) -> Tensor:
    """-log(sum over positives / sum over all others) [N] of the exponentials of each row's similarities.

    Args:
        z, keys: [N, D] and [M, D], None: z itself.
        own: column i + own is row i itself.
        row_labels, col_labels: int64; equal ones are positives.
        partner: int64 [N], the column of the positive where every row has exactly one.
    """
    if keys is None:
        (z,) = _matrices(z, [])
    else:
        z, keys = _matrices(z, [keys])
    problem = Contrast(
        z, keys, inverse(validation.temperature("temperature", temperature, z), z), exclude=own
    )
    if partner is not None:
        stats = autograd.contrastive(problem._replace(positive_index=partner))
        return cross_entropy(stats.lse, stats.positive_sum, col_labels.shape[0] - 1)
    problem = problem._replace(row_labels=row_labels, col_labels=col_labels)
    positives, negatives = (
        autograd.contrastive(problem._replace(among=among)).lse for among in ("same", "different")
    )
    return beside(negatives, positives)


def bank(queue: Tensor) -> Tensor:
    """A queue [D, K] as rows."""
    return validation.features("queue", queue, shape="[D, K]").T


def beside_queue(query: Tensor, key: Tensor, queue: Tensor, temperature: float | Tensor) -> Tensor:
    """InfoNCE with the transpose of a queue [D, K], in the repositories' dtype."""
    loss = info_nce_loss(query, key, bank(queue), temperature=temperature)
    return loss.to(cross_entropy_dtype(query))


def gather_kind() -> str | None:
    """The digest of how the repository's gather differentiates; None where it is not loaded."""
    module = sys.modules.get("solo.utils.misc")
    layer = getattr(module, "GatherLayer", None)
    return None if layer is None else digest(layer.backward)


def world() -> ProcessGroup | None:
    """All processes, None where there is one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def with_others(x: Tensor) -> Tensor:
    """The rows of all processes in the order of their ranks, those of the others without a gradient."""
    group, rank, here = dist.group.WORLD, dist.get_rank(), x.shape[0]
    before = sum(gather_rows(torch.tensor([here], device=x.device), group).tolist()[:rank])
    rows = gather_rows(x.detach(), group)
    return torch.cat([rows[:before], x, rows[before + here :]])


def _matrices(q: Tensor, keys: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Matrices of one width, in their common dtype."""
    for x in (q, *keys):
        validation.features("features", x)
    validation.same_width(q=q, keys=list(keys))
    validation.same_device(q=q, keys=list(keys))
    return dtypes.promote(q, *keys)
