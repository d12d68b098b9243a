"""The engine with keys that travel: each rank holds its own rows and one visiting block, O(N_local D).

The keys of a rank go round the ring in two halves, one each way, so that both directions of every link are
used. While a block is worked on, the next one is on its way. What the ranks add up for the rows of a block
(the gradients of keys, the log-sum-exps of columns) follows it one step behind, and comes home after the last
stop.

Log-sum-exps of blocks are merged in float64, and a backward op is given the merged ones: its share of the
gradient is then exact. Every sum has a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import autograd, dispatch, dtypes
from ..autograd import ContrastiveStats, SoftTargetStats
from ..problem import Contrast, SoftTarget
from .collectives import gets_gradient
from .ranks import Ranks, mask_columns

Tensors = Sequence[Tensor]
_WAYS = (1, -1)  # of the halves
_KEYS, _SUMS = 0, 1  # what a message carries


def circulate(
    ranks: Ranks,
    payload: Tensors,
    at_home: Callable[[], None],
    visit: Callable[..., Tensors],
    merge: Callable[[Tensor, Tensor], Tensor] = torch.add,
) -> list[Tensor]:
    """Carry every rank's payload to every other rank.

    Args:
        payload: tensors with the same rows.
        at_home: called once, while the first blocks are on their way.
        visit: called as visit(owner, rows, *tensors) for each half of each other rank's payload, `rows` the
            slice of the owner's; returns what is to be merged with what other ranks return for these rows.

    Returns:
        For this rank's rows, what the others returned.
    """
    sizes = ranks.rows(payload[0].shape[0])
    halves = [(slice(0, n // 2), slice(n // 2, n)) for n in sizes]

    def post(parts: Sequence[Tensors], step: int, kind: int) -> tuple[list[list[Tensor]], list[Any]]:
        """Send each half on its way, and receive those that arrive at this step."""
        arriving, messages = [], []
        for half, way in enumerate(_WAYS):
            owner = (ranks.rank - way * step) % ranks.world
            rows = halves[owner][half]
            received = [x.new_empty(rows.stop - rows.start, *x.shape[1:]) for x in parts[half]]
            for i, (out, into) in enumerate(zip(parts[half], received, strict=True)):
                tag = (2 * i + half) * 2 + kind
                messages += _message(dist.isend, out, way, ranks, tag)
                messages += _message(dist.irecv, into, -way, ranks, tag)
            arriving.append(received)
        return arriving, dist.batch_isend_irecv(messages) if messages else []

    held: Sequence[Tensors] = [[x[rows].contiguous() for x in payload] for rows in halves[ranks.rank]]
    coming, requests = post(held, 1, _KEYS)
    at_home()
    sums: list[list[Tensor]] = []
    sum_requests: list[Any] = []
    for step in range(1, ranks.world):
        _wait(requests)
        held = coming
        if step + 1 < ranks.world:
            coming, requests = post(held, step + 1, _KEYS)
        found = []
        for half, way in enumerate(_WAYS):
            owner = (ranks.rank - way * step) % ranks.world
            found.append(visit(owner, halves[owner][half], *held[half]))
        _wait(sum_requests)
        if step > 1:
            found = [
                [merge(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(sums, found, strict=True)
            ]
        sums, sum_requests = post([[x.contiguous() for x in part] for part in found], step + 1, _SUMS)
    _wait(sum_requests)
    return [torch.cat(parts) for parts in zip(*sums, strict=True)]


def _message(kind: Any, x: Tensor, way: int, ranks: Ranks, tag: int) -> list[dist.P2POp]:
    """To, or from, the neighbour on this side; nothing where there is nothing to send."""
    if x.numel() == 0:
        return []
    neighbour = dist.get_global_rank(ranks.group, (ranks.rank + way) % ranks.world)
    return [dist.P2POp(kind, x, neighbour, ranks.group, tag)]


def _wait(requests: Sequence[Any]) -> None:
    for request in requests:
        request.wait()


def contrastive(problem: Contrast, ranks: Ranks) -> ContrastiveStats:
    """See `engine.contrastive`."""
    acc = dtypes.accumulate_dtype(problem.q.dtype)
    mask, bias = problem.positive_mask, problem.key_bias
    problem = problem._replace(
        scale=dtypes.scalar_tensor(problem.scale, acc), positive_mask=None if mask is None else mask.to(acc),
        key_bias=None if bias is None else bias.to(acc),
    )  # fmt: skip
    backend = dispatch.select("contrastive_forward", problem.q)
    outputs = _RingContrast.apply(ranks, problem.options(), backend, *problem.tensors())
    return ContrastiveStats(*outputs)


def _at_home(problem: Contrast, ranks: Ranks) -> Contrast:
    """The problem over this rank's own keys."""
    mask, keys = problem.positive_mask, slice(0, problem.keys.shape[0])
    if mask is None:
        return problem
    return problem._replace(positive_mask=mask_columns(mask, ranks, ranks.rank, keys))


def _away(problem: Contrast, ranks: Ranks, owner: int, rows: slice, block: Tensors) -> Contrast:
    """The problem over a block of another rank's keys, as they travel."""
    mask, parts = problem.positive_mask, iter(block)
    return problem._replace(
        k=next(parts),
        exclude=None,
        col_labels=None if problem.col_labels is None else next(parts),
        key_bias=None if problem.key_bias is None else next(parts),
        positive_index=None,
        positive_mask=None if mask is None else mask_columns(mask, ranks, owner, rows),
    )


def _has_pairs(problem: Contrast) -> bool:
    return problem.q.shape[0] > 0 and problem.keys.shape[0] > 0


def _travelling(problem: Contrast) -> list[Tensor]:
    return [x for x in (problem.keys, problem.col_labels, problem.key_bias) if x is not None]


class _RingContrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, bare: Contrast, backend: str, *tensors: Tensor | None) -> Any:
        problem = bare.with_tensors(tensors)
        n, m, dtype = problem.q.shape[0], problem.keys.shape[0], dtypes.statistics_dtype(problem.q)
        has_positives = problem.positives != "none"
        lse = problem.q.new_full((n,), -torch.inf, dtype=dtype)
        total, count = (lse.new_zeros(n if has_positives else 0) for _ in range(2))
        lse_cols = lse.new_full((m if bare.both_axes else 0,), -torch.inf)

        def add(block: Contrast) -> Tensor:
            """Take up a block's statistics; returns those of its columns."""
            nonlocal lse
            if not _has_pairs(block):
                return lse.new_full((block.keys.shape[0] if bare.both_axes else 0,), -torch.inf)
            rows, cols, summed, counted, _ = dispatch.call("contrastive_forward", backend, *block, False)
            lse = torch.logaddexp(lse, rows)
            if block.positives != "none":
                total.add_(summed)
                count.add_(counted)
            return cols

        def at_home() -> None:
            nonlocal lse_cols
            lse_cols = add(_at_home(problem, ranks))

        def visit(owner: int, rows: slice, *block: Tensor) -> Tensors:
            cols = add(_away(problem, ranks, owner, rows, block))
            return [cols] if bare.both_axes else []

        for cols in circulate(ranks, _travelling(problem), at_home, visit, torch.logaddexp):
            lse_cols = torch.logaddexp(lse_cols, cols)
        kept = list(tensors)
        if problem.k is not None and any(ctx.needs_input_grad) and not ctx.needs_input_grad[4]:
            kept[1] = problem.k.clone()  # frozen keys may be changed in place, as a queue is
        ctx.save_for_backward(*kept, lse, lse_cols)
        ctx.call = (ranks, bare, backend)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(count)
        return lse, lse_cols, total, count

    @staticmethod
    def backward(
        ctx: Any, grad_lse: Tensor | None, grad_cols: Tensor | None, grad_positive: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        ranks, bare, backend = ctx.call
        *tensors, lse, lse_cols = ctx.saved_tensors
        needs_q, needs_k, needs_scale = ctx.needs_input_grad[3:6]
        if grad_lse is None and grad_cols is None and grad_positive is None:
            return (None,) * len(ctx.needs_input_grad)
        problem = bare.with_tensors(tensors)
        itself = problem.k is None
        acc = dtypes.accumulate_dtype(problem.q.dtype)
        grad_q, grad_k = (torch.zeros_like(x, dtype=acc) for x in (problem.q, problem.keys))
        grad_scale = grad_q.new_zeros(())
        if bare.both_axes and grad_cols is None:
            grad_cols = torch.zeros_like(lse_cols)

        def add(block: Contrast, cols: Sequence[Any], needs: tuple[bool, bool]) -> Tensor:
            """Add up a block's gradients; returns that of its keys."""
            if not _has_pairs(block):
                return torch.zeros_like(block.keys, dtype=acc)
            own_cols, own_grad_cols = cols if bare.both_axes else (lse_cols, None)
            found_q, found_k, found_scale, _ = dispatch.call(
                "contrastive_backward", backend, grad_lse, own_grad_cols,
                None if block.positives == "none" else grad_positive,
                *block, lse, own_cols, lse.new_empty(0, dtype=acc), (*needs, needs_scale, False),
            )  # fmt: skip
            if needs[0]:
                grad_q.add_(found_q)
            if needs_scale:
                grad_scale.add_(found_scale.to(grad_scale.device))
            return found_k.to(acc)

        def at_home() -> None:
            block = _at_home(problem, ranks)
            found = add(block, (lse_cols, grad_cols), (needs_q, needs_k and not itself))
            if needs_k:
                grad_k.add_(found)

        def visit(owner: int, rows: slice, *block: Tensor) -> Tensors:
            keys, cols = (block[:-2], block[-2:]) if bare.both_axes else (block, ())
            away = _away(problem, ranks, owner, rows, keys)
            wanted = needs_q if itself else needs_k
            found = add(away, cols, (needs_q, wanted))
            return [found] if wanted else []

        payload = [*_travelling(problem), *((lse_cols, grad_cols) if bare.both_axes else ())]
        for found in circulate(ranks, payload, at_home, visit):
            (grad_q if itself else grad_k).add_(found)
        grads = (
            grad_q.to(problem.q.dtype) if needs_q else None,
            grad_k.to(problem.q.dtype) if needs_k else None,
            grad_scale.to(problem.scale) if needs_scale else None,
        )
        return None, None, None, *_once(grads, tensors), *[None] * 5


def soft_target(problem: SoftTarget, ranks: Ranks) -> SoftTargetStats:
    """See `engine.soft_target`."""
    options, tensors = _soft_target_call(problem)
    needs = [x is not None and gets_gradient(x) for x in tensors]
    frozen = not (needs[1] or any(needs[3:]))
    return SoftTargetStats(*_RingSoftTarget.apply(ranks, frozen and any(needs), *options, *tensors))


def soft_target_means(problem: SoftTarget, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """See `engine.soft_target_means`."""
    (bare, backend), tensors = _soft_target_call(problem)
    with torch.no_grad():
        _, target_lse, _, _, _, mean = _merged_targets(bare.with_tensors(tensors), ranks, backend, True)
    return target_lse, mean


def _soft_target_call(problem: SoftTarget) -> tuple[tuple[SoftTarget, str], tuple[Tensor | None, ...]]:
    acc = dtypes.accumulate_dtype(problem.q.dtype)
    scale, target_scale = (dtypes.scalar_tensor(x, acc) for x in (problem.scale, problem.target_scale))
    problem = problem._replace(scale=scale, target_scale=target_scale)
    return (problem.options(), dispatch.select("soft_target_forward", problem.q)), problem.tensors()


def _segments(problem: SoftTarget) -> SoftTarget:
    """The problem over what all ranks have alike, without this rank's keys and their positives."""
    return problem._replace(k=problem.k[1:], target_k=problem.target_k[1:], positive=None)


def _one_segment(problem: SoftTarget, k: Tensor, target_k: Tensor, positive: Tensor | None) -> SoftTarget:
    return problem._replace(k=[k], target_k=[target_k], positive=positive)


def _keys_to_send(problem: SoftTarget) -> list[Tensor]:
    return [problem.k[0]] if problem.same_keys(0) else [problem.k[0], problem.target_k[0]]


def _merged_targets(problem: SoftTarget, ranks: Ranks, backend: str, with_means: bool) -> tuple[Tensor, ...]:
    """The outputs of the op over the keys of all ranks."""
    q, dtype = problem.q, dtypes.statistics_dtype(problem.q)
    lse, target_lse = (q.new_full((q.shape[0],), -torch.inf, dtype=dtype) for _ in range(2))
    cross = torch.zeros_like(lse)
    positive_sum = lse.new_empty(0)
    means = [
        q.new_zeros(q.shape if with_means else (0,), dtype=dtypes.accumulate_dtype(q.dtype)) for _ in range(2)
    ]

    def add(block: SoftTarget) -> None:
        nonlocal lse, target_lse, cross, positive_sum
        if block.columns == 0:
            return
        found = dispatch.call("soft_target_forward", backend, *block, with_means)
        (lse, kept, share), (target_lse, target_kept, target_share) = (
            _merged(lse, found[0]), _merged(target_lse, found[1])
        )  # fmt: skip
        cross = target_kept * cross + target_share * found[2]
        if block.positive is not None:
            positive_sum = found[3]
        if with_means:
            for mean, block_mean, a, b in zip(
                means, found[4:], (kept, target_kept), (share, target_share), strict=True
            ):
                mean.mul_(a[:, None]).add_(block_mean * b[:, None])

    def at_home() -> None:
        add(_one_segment(problem, problem.k[0], problem.target_k[0], problem.positive))
        add(_segments(problem))

    def visit(owner: int, rows: slice, *block: Tensor) -> Tensors:
        add(_one_segment(problem, block[0], block[-1], None))
        return []

    circulate(ranks, _keys_to_send(problem), at_home, visit)
    return lse, target_lse, cross, positive_sum, *means


def _merged(lse: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The log-sum-exp of both, and the share of each in the sum; 0 where both are empty."""
    both = torch.logaddexp(lse, block)
    shift = both.masked_fill(both == -torch.inf, 0)
    return both, (lse - shift).exp(), (block - shift).exp()


class _RingSoftTarget(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, frozen: bool, bare: SoftTarget, backend: str, *tensors: Tensor | None
    ) -> Any:
        outputs = _merged_targets(bare.with_tensors(tensors), ranks, backend, frozen)
        ctx.frozen, ctx.call = frozen, (ranks, bare, backend)
        op, options = autograd.OPS["soft_target"], (bare, frozen, 0, backend)
        ctx.save_for_backward(
            *(op.saved(tensors, options, outputs, True) if frozen else (*tensors, *outputs))
        )
        ctx.set_materialize_grads(False)
        return outputs[:4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ranks, bare, backend = ctx.call
        needs, saved = ctx.needs_input_grad[4:], ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if ctx.frozen:
            options = (bare, True, 0, backend)
            found = autograd.OPS["soft_target"].gradient(saved, options, grads, needs, True)
        else:
            problem = bare.with_tensors(saved[: len(needs)])
            found = _soft_target_gradients(problem, ranks, backend, saved[len(needs) :], grads, needs)
        return None, None, None, None, *_once(found, saved)


def _soft_target_gradients(
    problem: SoftTarget,
    ranks: Ranks,
    backend: str,
    stats: Tensors,
    grads: Sequence[Any],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `problem.tensors()`."""
    lse, target_lse, cross, positive_sum, *means = stats
    grad_lse, grad_target_lse, grad_cross, grad_positive = grads
    needed = problem.with_tensors(needs)
    needs_target_q = needed.target_q or needed.target_scale
    wanted = (needed.q, any(needed.k), needs_target_q, any(needed.target_k))
    acc = dtypes.accumulate_dtype(problem.q.dtype)
    grad_q, grad_target_q = (torch.zeros_like(x, dtype=acc) for x in (problem.q, problem.target_q))
    scales = [grad_q.new_zeros(()) for _ in range(2)]

    def add(block: SoftTarget) -> tuple[Tensors, Tensors]:
        """Add up a block's gradients; returns those of its keys and of the target's."""
        own = block.positive is not None
        found_q, found_k, found_target_q, found_target_k, *found_scales = dispatch.call(
            "soft_target_backward", backend, grad_lse, grad_target_lse, grad_cross,
            grad_positive if own else None, *block, lse, target_lse, cross,
            positive_sum if own else positive_sum[:0], *means, wanted,
        )  # fmt: skip
        for total, found, want in (
            (grad_q, found_q, wanted[0]),
            (grad_target_q, found_target_q, wanted[2]),
            *((a, b, True) for a, b in zip(scales, found_scales, strict=True)),
        ):
            if want:
                total.add_(found.to(total.device))
        return found_k, found_target_k

    at_rest: list[tuple[Tensors, Tensors]] = []

    def at_home() -> None:
        at_rest.append(add(_one_segment(problem, problem.k[0], problem.target_k[0], problem.positive)))
        if len(problem.k) > 1:
            at_rest.append(add(_segments(problem)))

    def visit(owner: int, rows: slice, *block: Tensor) -> Tensors:
        keys = (block[0], block[-1])
        if block[0].shape[0] == 0:
            return [
                torch.zeros_like(x, dtype=acc) for x, want in zip(keys, wanted[1::2], strict=True) if want
            ]
        found = add(_one_segment(problem, *keys, None))
        return [x[0].to(acc) for x, want in zip(found, wanted[1::2], strict=True) if want]

    home = iter(circulate(ranks, _keys_to_send(problem), at_home, visit))
    found_k, found_target_k = (
        [x.to(acc) for part in at_rest for x in part[i]] if want else []
        for i, want in enumerate(wanted[1::2])
    )
    for found in (found_k, found_target_k):
        if found:
            found[0] = found[0] + next(home)
    absent = [None] * len(problem.k)
    gradients = (grad_q, grad_target_q, *scales, None, *(found_k or absent), *(found_target_k or absent))
    return [
        x.to(like) if want and x is not None else None
        for x, like, want in zip(gradients, problem.tensors(), needs, strict=True)
    ]


def _once(grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients, of which a further derivative is refused."""
    if not torch.is_grad_enabled():
        return grads
    tracked = [x for x in inputs if x is not None and x.requires_grad]
    return _Once.apply(len(grads), *grads, *tracked)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x.view_as(x) for x in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(
            'no second derivative of a loss over a group with exchange="ring": take exchange="gather"'
        )
