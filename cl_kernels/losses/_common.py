"""Pieces that several losses share."""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import autograd, dispatch, dtypes, ops, validation
from ..distributed import EXCHANGES, ProcessGroup, Ranks, engine
from ..problem import Contrast, KeyLoss

P = ParamSpec("P")
R = TypeVar("R")

CHUNK_LOGITS = {"cpu": 2**20, "other": 2**22}


def loss_function(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` in full precision, and over a group of processes outside of compiled graphs: what ranks
    exchange depends on their batches, and each kernel is a call of its own anyway."""
    loss = dtypes.full_precision(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **options: P.kwargs) -> R:
        if options.get("group") is not None and torch.compiler.is_compiling():
            return torch.compiler.disable(loss)(*args, **options)
        return loss(*args, **options)

    return wrapper


class EmptyContrastWarning(UserWarning):
    """Rows have nothing to contrast with: their loss and gradient are 0, and nothing is learnt from them.

    Python shows it once for each line that calls a loss; compiled code says nothing, and where it depends on
    labels neither does a GPU, which would have to be waited for.
    """


def warn_of_nothing(why: str) -> None:
    """Warn on behalf of the caller of a loss or of its module; adapters warn no more than their libraries."""
    between = (__name__.partition(".")[0], "torch")
    frame, depth = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in between:
        if frame.f_globals["__name__"].startswith(f"{between[0]}.integrations."):
            return
        frame, depth = frame.f_back, depth + 1
    text = f"a row has nothing to contrast with, its loss and gradient are 0: {why}"
    warnings.warn(text, EmptyContrastWarning, stacklevel=depth)


def warn_if_alone(columns: int) -> None:
    """Warn of denominators over so many columns if they hold a positive at most."""
    if not torch.compiler.is_compiling() and columns <= 1:
        warn_of_nothing("there is no row beside its positive, nor a queue")


def warn_of_empty_queue() -> None:
    if not torch.compiler.is_compiling():
        warn_of_nothing("the queue is empty")


def wide(scalar: float | Tensor, like: Tensor) -> float | Tensor:
    """A float as it is, a tensor in the accumulation dtype of `like`."""
    # torch 2.11 compiles anew for each quotient of floats.
    if isinstance(scalar, Tensor) or torch.compiler.is_compiling():
        return dtypes.scalar_for(scalar, like)
    return scalar


def inverse(temperature: float | Tensor, like: Tensor) -> float | Tensor:
    """1 / temperature, a tensor in the accumulation dtype of `like`."""
    temperature = wide(temperature, like)
    return temperature.reciprocal() if isinstance(temperature, Tensor) else 1.0 / temperature


def unit_rows(x: Tensor) -> Tensor:
    """Rows over their L2 norm, computed in at least float32; a zero row stays zero and gets no gradient."""
    rows = x.to(dtypes.accumulate_dtype(x.dtype))
    squared = (rows * rows).sum(1, keepdim=True)  # the second derivative of a norm is NaN at 0
    return (rows / squared.masked_fill(squared == 0, torch.inf).sqrt()).to(x.dtype)


def own_similarity(q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
    """[N]: scale * q_i . k_i, summed in float32 (float64 for float64 inputs).

    Frozen keys are copied where the backward reads them: they may be changed in place before it.
    """
    dtype = dtypes.accumulate_dtype(q.dtype)
    copied = k.dtype != dtype and not torch.compiler.is_compiling()
    if not copied and q.requires_grad and not k.requires_grad and torch.is_grad_enabled():
        k = ops.snapshot(k)
    return (q.to(dtype) * k.to(dtype)).sum(1) * scale


def in_chunks(
    rows: int, columns: int, chunk: Callable[..., tuple[Tensor, ...]], *args: Any
) -> tuple[Tensor, ...]:
    """`chunk(first, last, *args)` of slices of the rows, joined; each is computed again in the backward.

    Args:
        rows, columns: those of the matrix that is not to be held.
        chunk: holds no tensors of its own, and multiplies matrices by `autograd.similarity` alone: in a
            backward inside of autocast, `@` is in half precision.
    """
    kind = next(x.device.type for x in args if isinstance(x, Tensor))
    step = max(1, CHUNK_LOGITS["cpu" if kind == "cpu" else "other"] // max(columns, 1))
    if step >= rows:
        return chunk(0, rows, *args)
    again: Callable[..., tuple[Tensor, ...]] = autograd.recomputed
    if torch.compiler.is_compiling():
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    parts = [again(chunk, first, min(first + step, rows), *args) for first in range(0, rows, step)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def log_add(x: Tensor, y: Tensor) -> Tensor:
    """log(e^x + e^y) of finite x and y; the second derivative of torch.logaddexp is NaN where they lie more
    than 709 apart."""
    return x + F.softplus(y - x, threshold=40.0)


def log_add_any(x: Tensor, y: Tensor) -> Tensor:
    """`log_add`, also where one or both are -inf."""
    no_x, no_y = x == -torch.inf, y == -torch.inf
    both = log_add(x.masked_fill(no_x, 0.0), y.masked_fill(no_y, 0.0))
    return torch.where(no_x, y, torch.where(no_y, x, both))


def over_segments(lse: Tensor, q: Tensor, keys: Sequence[Tensor], scale: float | Tensor) -> Tensor:
    """`lse` [N] over further keys too, [M, D] each."""
    for part in keys:
        lse = log_add(lse, autograd.contrastive(Contrast(q, part, scale)).lse)
    return lse


def nothing(x: Tensor) -> Tensor:
    """0 in the graph of x; NaN where x is not finite."""
    return x - x


def at_least_zero(loss: Tensor, weights: Tensor | None = None) -> Tensor:
    """`loss` [N], just computed, with 0 for what rounding put below; its gradient stays.

    Below 0 rightly are losses whose positives have negative `weights`.
    """
    if weights is None or weights.dtype in (torch.bool, torch.uint8):
        loss.detach().relu_()  # a view of the values alone
        return loss
    return torch.where((loss < 0) & (weights >= 0).all(), loss - loss.detach(), loss)


def cross_entropy(lse: Tensor, target: Tensor, columns: int) -> Tensor:
    """lse - target [N] for LSEs over so many columns and means of their logits."""
    return settled(lse - target, columns)


def beside(others: Tensor, positive: Tensor) -> Tensor:
    """The cross-entropy [N] of positives that the log-sum-exps of the others do not contain."""
    return -F.logsigmoid(positive - others)


def settled(loss: Tensor, columns: int, weights: Tensor | None = None) -> Tensor:
    """A cross-entropy [N], just computed, over so many columns: `at_least_zero`, and 0 for one column."""
    warn_if_alone(columns)
    return nothing(loss) if columns == 1 else at_least_zero(loss, weights)


def keys_and_positives(
    k: Tensor, k_global: Tensor | None, queue: Tensor | None, rank: int, in_batch: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    """The segments of keys, and each row's positive among them (None: it stands beside a queue)."""
    if not in_batch and k_global is None and queue is not None:
        return [queue], None
    first = k.shape[0] * rank
    keys = [x for x in (k if k_global is None else k_global, queue) if x is not None]
    return keys, torch.arange(first, first + k.shape[0], device=k.device)


def over_frozen_keys(problem: KeyLoss, reduction: str) -> Tensor | None:
    """The reduced loss by one op, where `makes_whole_losses`; None where a positive is the only key, or more
    than queries and scale needs a gradient."""
    if sum(part.shape[0] for part in problem.k) < 1 + int(problem.own is None):
        return None
    return autograd.key_loss(problem, reduction == "mean")


def makes_whole_losses(q: Tensor, reduction: str, by_rows: bool = False) -> bool:
    """Whether an op makes a loss of rows like these with its gradients; `by_rows`: or of their statistics."""
    if reduction == "none" or autograd.in_transform():
        return False
    return dispatch.makes_whole_losses(q) or (by_rows and dispatch.makes_losses_of_rows(q))


def whole(
    problem: Contrast,
    reduction: str,
    columns: int,
    factor: float | Tensor = 1.0,
    drop: bool = False,
    unit: bool = False,
) -> Tensor | None:
    """`factor` times the reduced loss of rows of lse - positive_sum / positive_count, over so many columns,
    by one op; None where there is none. `drop`: the mean counts rows with positives only; `unit`: q's rows
    are taken at unit length."""
    q, k = problem.q, problem.k
    if columns <= 1 or problem.key_bias is not None or not makes_whole_losses(q, reduction, by_rows=True):
        return None
    inside = 1.0 if isinstance(factor, Tensor) else factor
    how = autograd.LossOptions(unit, inside, reduction == "mean", drop, problem.among == "all")
    if dispatch.makes_whole_losses(q):
        loss = autograd.contrastive_loss(problem, how)
    elif k is None or problem.both_axes or k.requires_grad:
        loss = autograd.loss_of_rows(problem, how)
    else:  # frozen keys have their gradient in the forward
        return None
    return loss if isinstance(factor, float) else (loss * factor).to(loss.dtype)


def reduced(
    rows: Tensor, how: str, like: Tensor, weight: Tensor | None = None, ranks: Ranks | None = None
) -> Tensor:
    """`validation.reduction` of losses made of statistics, in the accumulation dtype of `like`; the mean over
    `ranks` is `engine.mean`."""
    if ranks is not None and how == "mean":
        loss = engine.mean(rows, ranks, weight)
    else:
        loss = validation.reduction(rows, how, weight)
    return loss.to(dtypes.accumulate_dtype(like.dtype))


def shown(value: float | Tensor | None) -> str:
    """A temperature or coefficient as `extra_repr` prints it."""
    if isinstance(value, Tensor):
        return "meta" if value.is_meta else f"{value.item():g}"
    return "None" if value is None else f"{value:g}"


class Grouped(nn.Module):
    """A loss module over the rows of a group of processes, `group` None: of this process.

    Copies share the group. A pickled module names the world's group only, and finds it again where it is
    loaded, or warns that there is none; one of another group is not pickled.
    """

    def __init__(self, group: ProcessGroup | None, exchange: str) -> None:
        super().__init__()
        self.group = group
        self.exchange = validation.option("exchange", exchange, EXCHANGES)

    def shown_group(self) -> str:
        """The end of an `extra_repr`."""
        if self.group is None:
            return ""
        return f", group of {dist.get_world_size(self.group)}, exchange={self.exchange!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Grouped:
        memo[id(self.group)] = self.group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __copy__(self) -> Grouped:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.group is not None:
            if self.group is not dist.group.WORLD:
                raise TypeError(f"a {type(self).__name__} over a group other than the world's is not pickled")
            state["group"] = "world"
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"group": None, "exchange": "gather", **state})
        if self.group == "world":
            self.group = dist.group.WORLD if dist.is_initialized() else None
            if self.group is None:
                warnings.warn(
                    f"a {type(self).__name__} over the world's group is one of this process alone: it was "
                    "loaded before torch.distributed.init_process_group",
                    stacklevel=2,
                )
