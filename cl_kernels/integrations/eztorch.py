"""The contrastive losses of juliendenize/eztorch, fused: SCE, over tokens too, MoCo, MoCo v3, ReSSL, SimCLR.

The masks that eztorch's losses take say where the positives are. A mask is looked at once, as long as it is
the same tensor; one that is not as eztorch makes it falls back.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from .. import autograd, dtypes, validation
from ..losses import info_nce_loss, sce_loss
from ..losses._common import in_chunks
from ._dtypes import cross_entropy_dtype, logsumexp_dtype, promoted
from ._formulas import bank, relational, share_of_positives
from ._swap import Unfused, fused

CHUNK = 2**18  # entries of a mask, or logits, at a time
NORM_EPS = 1e-12  # that of torch.nn.functional.normalize
LARGE = 1e6  # what is subtracted from a similarity of unit rows leaves nothing of it from here on


@fused("eztorch.losses.sce_loss:compute_sce_loss", known=("e244e3e8fc766313",))
def compute_sce_loss(
    q: Tensor,
    k: Tensor,
    k_global: Tensor,
    use_keys: bool,
    queue: Tensor | None,
    mask: Tensor,
    coeff: float | Tensor,
    temp: float | Tensor = 0.1,
    temp_m: float | Tensor = 0.07,
    LARGE_NUM: float = 1e9,
) -> Tensor:
    """`cl_kernels.sce_loss` over gathered keys [G, D] and a queue [D, K], or (`use_keys` False) over each
    row's own key and the queue; there the target has the own key with similarity 0.

    `mask`: that of `compute_sce_mask`, [N, G + K] or [N, 1 + K].
    """
    _refuse_small(LARGE_NUM)
    keys, bank, rank = _keys(q, k_global, use_keys, queue, mask)
    loss = sce_loss(
        q,
        k,
        keys,
        bank,
        temperature=temp,
        target_temperature=temp_m,
        coeff=coeff,
        positive_in_target="exclude" if use_keys else "zero",
        rank=rank,
    )
    return loss.to(torch.promote_types((coeff * mask[:0]).dtype, q.dtype))


@fused("eztorch.losses.moco_loss:compute_moco_loss", known=("f21cae576adabf34",))
def compute_moco_loss(
    q: Tensor,
    k: Tensor,
    k_global: Tensor | None,
    use_keys: bool,
    queue: Tensor | None,
    temp: float | Tensor = 0.2,
    rank: int = 0,
) -> Tensor:
    """InfoNCE over gathered keys [G, D] and a queue [D, K], or over the row's own key and the queue."""
    bank = _bank(queue)
    if not use_keys:
        if bank is None:
            raise Unfused("there are neither keys nor a queue")
        k_global, rank = None, 0
    loss = info_nce_loss(q, k, bank, k_global=k_global, rank=rank, temperature=temp)
    return loss.to(cross_entropy_dtype(q))


@fused("eztorch.losses.mocov3_loss:compute_mocov3_loss", known=("a5a4bc41f6c7535d",))
def compute_mocov3_loss(q: Tensor, k: Tensor, temp: float | Tensor = 1.0, rank: int = 0) -> Tensor:
    r""":math:`2 \tau` times InfoNCE of queries [N, D] over gathered keys [G, D]."""
    loss = info_nce_loss(q, q, k_global=k, rank=rank, temperature=temp)
    return loss.to(cross_entropy_dtype(q)) * (2 * temp)


@fused("eztorch.losses.ressl_loss:compute_ressl_loss", known=("a47c3d64b36e5ac9",))
def compute_ressl_loss(
    q: Tensor,
    k: Tensor,
    k_global: Tensor,
    use_keys: bool,
    queue: Tensor | None,
    mask: Tensor | None,
    temp: float | Tensor = 0.1,
    temp_m: float | Tensor = 0.04,
    LARGE_NUM: float = 1e9,
) -> Tensor:
    """Cross-entropy of the similarities of q with the keys of others against those of k.

    The keys are the gathered ones [G, D], without the row's own, and a queue [D, K], or (`use_keys` False)
    the queue alone. `mask`: that of `compute_ressl_mask`, [N, G + K].
    """
    _refuse_small(LARGE_NUM)
    bank, own = _bank(queue), None
    if use_keys:
        if mask is None:
            raise Unfused("use_keys without a mask")
        _, _, rank = _keys(q, k_global, use_keys, queue, mask)
        own = rank * q.shape[0]
        if k_global.shape[0] == 1 and bank is None:
            raise Unfused("there is no key but the row's own")
    elif bank is None:
        raise Unfused("there are neither keys nor a queue")
    segments = _segments(k_global if use_keys else None, bank)
    return relational(q, k, segments, own, temp, temp_m).mean().to(logsumexp_dtype(q))


@fused("eztorch.losses.simclr_loss:compute_simclr_loss", known=("2c684679a23f00b9",))
def compute_simclr_loss(
    z: Tensor, z_global: Tensor, pos_mask: Tensor, neg_mask: Tensor, temp: float | Tensor
) -> Tensor:
    r"""SimCLR of several crops, over the rows [G, D] of all processes.

    .. math:: -\frac{1}{N} \sum_i \log \frac{\sum_{p \in P(i)} e^{z_i \cdot z_p / \tau}}
        {\sum_{j \ne i} e^{z_i \cdot z_j / \tau}}

    `pos_mask`, `neg_mask`: those of `compute_simclr_masks`, [N, G].
    """
    validation.features("z", z)
    validation.features("z_global", z_global)
    first, samples = _crops(pos_mask, neg_mask, z.shape[0], z_global.shape[0])
    rows = torch.arange(z.shape[0], device=z.device)
    keys = None if z_global is z else z_global
    labels = rows % samples
    columns, partner = labels, None
    if keys is not None:
        columns = labels.new_full((keys.shape[0],), -1)
        columns[first : first + z.shape[0]] = labels
    if z.shape[0] == 2 * samples:
        partner = rows.roll(samples) + first
    loss = share_of_positives(z, keys, first, labels, columns, partner, temp).mean()
    return loss.to(promoted(z.dtype, pos_mask))


@fused("eztorch.losses.sce_token_loss:compute_sce_token_loss", known=("0ff75856be2dd5c0",))
def compute_sce_token_loss(
    q: Tensor,
    k: Tensor,
    k_global: Tensor,
    queue: Tensor | None,
    mask_sim_q: Tensor | None,
    mask_sim_k: Tensor,
    mask_prob_q: Tensor,
    mask_log_q: Tensor | None,
    coeff: float | Tensor,
    temp: float | Tensor = 0.1,
    temp_m: float | Tensor = 0.07,
    LARGE_NUM: float = 1e9,
) -> Tensor:
    r"""SCE of tokens [N, D] over gathered tokens [G, D] and a queue [D, K], with any masks.

    .. math:: -\frac{1}{N} \sum_{ij} C_{ij} \frac{W_{ij}}{|W_i|_1} \log \mathrm{softmax}_j \frac{q_i \cdot u_j
        - L M^q_{ij}}{\tau}, \qquad
        W_i = \lambda P_i + (1 - \lambda) \mathrm{softmax}_j \frac{k_i \cdot u_j - L M^k_{ij}}{\tau_m}

    `mask_sim_q`, `mask_sim_k`: M, [N, G]; `mask_prob_q`: P, [N, G + K]; `mask_log_q`: C, bool [N, G + K],
    None for 1 everywhere. Rows are walked in chunks: once where only q requires a gradient, which has no
    second derivative then, else once more in the backward.
    """
    return _over_tokens(
        (q, k, k_global, _bank(queue)),
        (mask_sim_q, mask_sim_k, mask_prob_q, mask_log_q),
        (coeff, temp, temp_m),
        float(LARGE_NUM),
    )


@dtypes.full_precision
def _over_tokens(
    features: tuple[Tensor, Tensor, Tensor, Tensor | None],
    masks: tuple[Tensor | None, Tensor, Tensor, Tensor | None],
    scalars: tuple[Any, Any, Any],
    large: float,
) -> Tensor:
    q, k, k_global, bank = features
    keys = _segments(k_global, bank)
    for x in (q, k, *keys):
        validation.features("features", x)
    validation.same_width(q=q, k=k, keys=keys)
    validation.same_shape(q=q, k=k)
    n, gathered = q.shape[0], k_global.shape[0]
    columns = sum(len(part) for part in keys)
    widths = (gathered, gathered, columns, columns)
    for mask, width in zip(masks, widths, strict=True):
        if mask is not None and not (validation.has_shape(mask, n, width) and not mask.requires_grad):
            raise Unfused(f"a mask is not of shape [{n}, {width}], or requires a gradient")
    coeff = validation.coefficient("coeff", scalars[0], q)
    temperatures = [validation.temperature("temp", value, q) for value in scalars[1:]]
    dtype = dtypes.accumulate_dtype(q.dtype)
    student, teacher = q.to(dtype), k.to(dtype)
    together = torch.cat([x.to(dtype) for x in keys]) if len(keys) > 1 else k_global.to(dtype)
    scales = [dtypes.scalar_tensor(value, dtype, q.device) for value in (coeff, *temperatures)]
    step = max(1, CHUNK // columns)
    fixed = (teacher, together, *scales, *masks)
    if not any(x is not None and x.requires_grad for x in fixed) or not torch.is_grad_enabled():
        losses: Tensor = _FixedTargets.apply(student, large, step, *fixed)
        return losses.mean()

    def chunk(first: int, last: int, *tensors: Any) -> tuple[Tensor]:
        part = slice(first, last)
        own = [None if mask is None else mask[part] for mask in tensors[6:]]
        return (_token_rows((tensors[0][part], tensors[1][part]), tensors[2], tensors[3:6], own, large),)

    (rows,) = in_chunks(n, columns, chunk, student, teacher, together, *scales, *masks)
    return rows.mean()


def _token_rows(
    rows: tuple[Tensor, Tensor],
    keys: Tensor,
    scalars: Sequence[Tensor],
    masks: Sequence[Any],
    large: float,
) -> Tensor:
    """The losses of some of the rows of q and k."""
    (q, k), (coeff, temperature, target_temperature) = rows, scalars
    ignored, target_ignored, positives, counted = masks
    weights = F.softmax(_logits(k, keys, target_ignored, large) / target_temperature, 1)
    weights = F.normalize(torch.lerp(weights, positives.to(weights), coeff), p=1.0, dim=1)
    logs = F.log_softmax(_logits(q, keys, ignored, large) / temperature, 1)
    if counted is not None:
        logs = logs.masked_fill(~counted, 0.0)
    return -(weights * logs).sum(1)


def _logits(rows: Tensor, keys: Tensor, ignored: Tensor | None, large: float) -> Tensor:
    """Similarities, those of the first keys less `large` where they are ignored."""
    logits = autograd.similarity(rows, keys, 1.0, normalize=False)
    if ignored is not None:
        logits[:, : ignored.shape[1]].sub_(ignored.to(logits), alpha=large)
    return logits


class _FixedTargets(torch.autograd.Function):
    """The losses of all rows where only the queries get a gradient, which comes with them: one walk.
    4096 tokens take 0.3 s on one core of a CPU; in chunks that are computed again, 0.6 s."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, large: float, step: int, *fixed: Any) -> Tensor:
        k, keys, coeff, temperature, target_temperature, *masks = fixed
        losses, gradient = q.new_empty(q.shape[0]), torch.empty_like(q)
        for first in range(0, q.shape[0], step):
            part = slice(first, first + step)
            own: list[Any] = [None if mask is None else mask[part] for mask in masks]
            ignored, target_ignored, positives, counted = own
            weights = F.softmax(_logits(k[part], keys, target_ignored, large).div_(target_temperature), 1)
            weights.lerp_(positives.to(weights), coeff)
            weights.div_(weights.sum(1, keepdim=True).clamp_(min=NORM_EPS))
            logs = F.log_softmax(_logits(q[part], keys, ignored, large).div_(temperature), 1)
            if counted is not None:
                weights.mul_(counted)
            losses[part] = -torch.linalg.vecdot(weights, logs)
            if ctx.needs_input_grad[0]:
                slope = logs.exp_().mul_(weights.sum(1, keepdim=True)).sub_(weights)
                torch.mm(slope, keys, out=gradient[part])
        ctx.save_for_backward(gradient.div_(temperature))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None], *[None] * (len(ctx.needs_input_grad) - 1)


def compute_sce_mask(
    batch_size: int,
    num_negatives: int,
    use_keys: bool = True,
    rank: int = 0,
    world_size: int = 1,
    device: Any = "cpu",
) -> Tensor:
    """int64 [batch_size, keys + num_negatives], 1 at each row's positive: among the keys of all processes, or
    in the first column."""
    keys = batch_size * world_size if use_keys else 1
    own = torch.arange(batch_size, device=device) + batch_size * rank
    mask = own.new_zeros(batch_size, keys + num_negatives)
    return mask.scatter_(1, (own if use_keys else torch.zeros_like(own))[:, None], 1)


def compute_ressl_mask(
    batch_size: int,
    num_negatives: int,
    use_keys: bool = True,
    rank: int = 0,
    world_size: int = 1,
    device: Any = "cpu",
) -> Tensor | None:
    """As `compute_sce_mask`; None without keys."""
    if not use_keys:
        return None
    return compute_sce_mask(batch_size, num_negatives, use_keys, rank, world_size, device)


def compute_simclr_masks(
    batch_size: int, num_crops: int = 2, rank: int = 0, world_size: int = 1, device: Any = "cpu"
) -> tuple[Tensor, Tensor]:
    """float32 [rows, rows of all processes], for crops one after the other: 1 at the other crops of a row's
    sample, and 1 at the rows of other samples."""
    rows = batch_size * num_crops
    masks = _crop_masks(torch.arange(rows, device=device), rank * rows, batch_size, rows, rows * world_size)
    positive, negative = (mask.float() for mask in masks)
    return positive, negative


def _crop_masks(rows: Tensor, first: int, samples: int, own_rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Bool masks of positives and of negatives of some of the rows."""
    column = torch.arange(columns, device=rows.device) - first
    here = (column >= 0) & (column < own_rows)
    positive = here & ((column - rows[:, None]) % samples == 0)
    other = column != rows[:, None]
    return positive & other, ~positive


def _refuse_small(large: float) -> None:
    if not large >= LARGE:
        raise Unfused(f"LARGE_NUM is below {LARGE:g}")


def _bank(queue: Tensor | None) -> Tensor | None:
    return None if queue is None else bank(queue)


def _segments(*keys: Tensor | None) -> list[Tensor]:
    return [part for part in keys if part is not None]


def _keys(
    q: Tensor, k_global: Tensor, use_keys: bool, queue: Tensor | None, mask: Tensor
) -> tuple[Tensor | None, Tensor | None, int]:
    """The gathered keys if they are used, the queue, and which block of the keys has the mask's positives."""
    bank = _bank(queue)
    rows = validation.features("q", q).shape[0]
    negatives = 0 if bank is None else bank.shape[0]
    if not use_keys:
        if bank is None:
            raise Unfused("there are neither keys nor a queue")
        _first_positive(mask, rows, 1 + negatives, step=0)
        return None, bank, 0
    keys = validation.features("k_global", k_global)
    first = _first_positive(mask, rows, keys.shape[0] + negatives, step=1)
    if first % rows or first + rows > keys.shape[0]:
        raise Unfused("the mask's positives are not one process's rows of the keys")
    return keys, bank, first // rows


_seen: MutableMapping[Any, tuple[Any, Any]] = WeakIdKeyDictionary()


def _look_once(mask: Tensor, at: Any, look: Callable[[], Any]) -> Any:
    """The finding of `look`, of the kind `at`, in a mask; again only after an in-place change."""
    if mask.is_inference():  # has no count of changes
        return look()
    key = (mask._version, at)
    found = _seen.get(mask)
    if found is None or found[0] != key:
        found = _seen[mask] = (key, look())
    return found[1]


def _first_positive(mask: Any, rows: int, columns: int, step: int) -> int:
    """The column of the first row's 1, where row i has its own i * `step` further on and nothing else."""
    _check_shape("mask", mask, rows, columns)

    def look() -> int | None:
        first = int(mask[0].argmax())
        own = torch.arange(rows, device=mask.device) * step + first
        if int(own[-1]) >= columns:
            return None
        for part in _chunks(mask):
            one = mask[part].gather(1, own[part, None]) == 1
            if not bool(one.all() & (mask[part].count_nonzero(1) == 1).all()):
                return None
        return first

    first = _look_once(mask, step, look)
    if first is None or (step == 0 and first != 0):
        raise Unfused("the mask does not have one positive a row, as eztorch's masks do")
    return int(first)


def _crops(pos_mask: Any, neg_mask: Any, rows: int, columns: int) -> tuple[int, int]:
    """Where this process's rows stand among the columns, and how many samples they are crops of."""
    found = [_crops_of(pos_mask, 0, rows, columns), _crops_of(neg_mask, 1, rows, columns)]
    if found[0] is None or found[0] != found[1]:
        raise Unfused("the masks are not those of crops of samples, as eztorch makes them")
    return found[0]


def _crops_of(mask: Any, which: int, rows: int, columns: int) -> tuple[int, int] | None:
    """As above by one of the masks, 0 that of positives, 1 that of negatives; None where it is another."""
    _check_shape(("pos_mask", "neg_mask")[which], mask, rows, columns)

    def look() -> tuple[int, int] | None:
        same = ((mask[0] == 0) if which else (mask[0] != 0)).nonzero().flatten()
        crops = same.shape[0] if which else same.shape[0] + 1  # the row is not its own positive
        if crops < 2 or rows % crops:
            return None
        samples = rows // crops
        first = int(same[0]) if which else int(same[0]) - samples
        if not 0 <= first <= columns - rows:
            return None
        for part in _chunks(mask):
            right = _crop_masks(part, first, samples, rows, columns)[which]
            if not torch.equal(mask[part], right.to(mask.dtype)):
                return None
        return first, samples

    found: tuple[int, int] | None = _look_once(mask, which, look)
    return found


def _check_shape(name: str, mask: Any, rows: int, columns: int) -> None:
    validation.tensor(name, mask)
    if not validation.has_shape(mask, rows, columns) or mask.requires_grad:
        raise Unfused(f"{name} is not of shape [{rows}, {columns}], or requires a gradient")


def _chunks(mask: Tensor) -> Sequence[Tensor]:
    """The numbers of the rows of a mask, so many at a time."""
    rows, columns = mask.shape
    return torch.arange(rows, device=mask.device).split(max(1, CHUNK // columns))
