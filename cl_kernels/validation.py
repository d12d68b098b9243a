"""Checks of the arguments of public functions.

Every check raises before any kernel runs: `TypeError` for a wrong type or dtype, `ValueError` for a wrong
shape, device, value or option. The message names the argument, what is wanted and what came.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dtypes
from .problem import Contrast, SoftTarget

REDUCTIONS = ("mean", "sum", "none")
TARGET_POSITIVES = ("exclude", "zero")


def tensor(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    _of_this_process(name, x, "to_local(), this process's part, and the processes as group=")
    return x


def _of_this_process(name: str, x: Tensor, instead: str) -> None:
    """Refuse a DTensor, and name a method that gives what can be used."""
    if type(x) is not Tensor and hasattr(x, "to_local"):
        raise TypeError(f"{name} must not be a DTensor: give {name}.{instead}")


def float_dtype(name: str, dtype: Any) -> torch.dtype:
    if dtype not in dtypes.FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {dtype}")
    return dtype


def features(
    name: str, x: Any, ranks: Container[int] = (2,), shape: str = "[N, D]", empty: bool = False
) -> Tensor:
    """A floating-point tensor of one of the given ranks, not empty unless it may be; `shape` describes it in
    the message."""
    tensor(name, x)
    float_dtype(name, x.dtype)
    if x.dim() not in ranks:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if x.numel() == 0 and not empty:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    return x


def views(name: str, x: Any) -> Tensor:
    """Multi-view features [B, V, ...] as [B, V, D], trailing dimensions flattened."""
    features(name, x, ranks=range(3, 65), shape="[B, V, D] (or [B, V, ...])")
    return x if x.dim() == 3 else x.flatten(2)


def segments(name: str, x: Any) -> list[Tensor]:
    """A tensor [M, D] or a non-empty sequence of them, as a list."""
    if isinstance(x, Tensor):
        return [features(name, x, shape="[M, D]")]
    if not isinstance(x, list | tuple):
        raise TypeError(f"{name} must be a torch.Tensor or a list of them, got {type(x).__name__}")
    if len(x) == 0:
        raise ValueError(f"{name} must hold at least one tensor, got an empty {type(x).__name__}")
    return [features(f"{name}[{i}]", part, shape="[M, D]") for i, part in enumerate(x)]


def _named(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the arguments, also those in lists, by name; what is no tensor has its own check."""
    for name, x in arguments.items():
        parts = (
            {f"{name}[{i}]": part for i, part in enumerate(x)} if isinstance(x, list | tuple) else {name: x}
        )
        yield from ((part, y) for part, y in parts.items() if isinstance(y, Tensor))


def same_device(**tensors: Tensor | Sequence[Tensor] | None) -> None:
    """All tensors (also inside lists; None is passed over) on one device."""
    (first, head), *rest = _named(tensors)
    for name, x in rest:
        if x.device != head.device:
            raise ValueError(f"{name} must be on the device of {first} ({head.device}), got {x.device}")


def same_width(**tensors: Tensor | Sequence[Tensor] | None) -> None:
    """All tensors with the same last dimension."""
    (first, head), *rest = _named(tensors)
    for name, x in rest:
        if x.shape[-1] != head.shape[-1]:
            raise ValueError(
                f"{name} must have as many features as {first} ({head.shape[-1]}), "
                f"got {x.shape[-1]} (shape {tuple(x.shape)})"
            )


def same_length(**tensors: Tensor | Sequence[Tensor] | None) -> None:
    """All tensors with the same first dimension."""
    (first, head), *rest = _named(tensors)
    for name, x in rest:
        if x.shape[0] != head.shape[0]:
            raise ValueError(
                f"{name} must have as many rows as {first} ({head.shape[0]}), "
                f"got {x.shape[0]} (shape {tuple(x.shape)})"
            )


def same_shape(**tensors: Tensor | Sequence[Tensor] | None) -> None:
    (first, head), *rest = _named(tensors)
    for name, x in rest:
        if not has_shape(x, *head.shape):
            raise ValueError(
                f"{name} must have the shape {tuple(head.shape)} of {first}, got {tuple(x.shape)}"
            )


def minimum_rows(name: str, x: Tensor, rows: int) -> Tensor:
    if x.shape[0] < rows:
        raise ValueError(f"{name} must have at least {rows} rows, got shape {tuple(x.shape)}")
    return x


def option(name: str, value: Any, allowed: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be one of {_listed(allowed)}, got a value of type {type(value).__name__}"
        )
    if value not in allowed:
        raise ValueError(f"{name} must be one of {_listed(allowed)}, got {value!r}")
    return value


def _listed(allowed: Sequence[str]) -> str:
    return ", ".join(repr(a) for a in allowed)


def integer(name: str, value: Any, minimum: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")
    return value


def _scalar(
    name: str, value: Any, like: Tensor, accepts: Callable[[float], bool], wanted: str
) -> float | Tensor:
    if isinstance(value, Tensor):
        _of_this_process(name, value, "full_tensor(), or what a module under FSDP returns of it in forward")
        if value.dtype not in dtypes.FLOAT_DTYPES:
            raise TypeError(
                f"{name} must be a float or a float tensor of one element, got a tensor of {value.dtype}"
            )
        if value.numel() != 1:
            raise ValueError(
                f"{name} must be a float or a tensor of one element, got shape {tuple(value.shape)}"
            )
        if value.device != like.device and value.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU or on {like.device}, got a tensor on {value.device}")
        if readable(value) and not accepts(value.item()):
            raise ValueError(f"{name} must be {wanted}, got {value.item()}")
        return value if value.dim() == 0 else value.reshape(())
    if isinstance(value, bool) or not isinstance(value, int | float | numbers.Real):
        raise TypeError(f"{name} must be a float or a tensor of one element, got {type(value).__name__}")
    number = float(value)
    if not accepts(number):
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return number


def has_shape(x: Tensor, *sizes: int) -> bool:
    """Whether x has these sizes; also in a graph of dynamic shapes, where tuples of sizes do not compare."""
    return x.dim() == len(sizes) and all(a == b for a, b in zip(x.shape, sizes, strict=True))


def readable(x: Tensor) -> bool:
    """Whether the values of `x` can be looked at now, without a synchronisation: eagerly, on the CPU."""
    return x.device.type == "cpu" and eager(x)


def eager(x: Tensor) -> bool:
    """Whether `x` has values now, though a device may have to be waited for."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def temperature(name: str, value: Any, like: Tensor) -> float | Tensor:
    """A positive finite float, or as 0-dim a tensor of one element on the CPU or on the device of `like`."""
    return _scalar(name, value, like, lambda v: 0 < v < math.inf, "positive and finite")


def scale(name: str, value: Any, like: Tensor) -> float | Tensor:
    """A finite float, or as 0-dim a tensor of one element on the CPU or on the device of `like`."""
    return _scalar(name, value, like, lambda v: -math.inf < v < math.inf, "finite")


def coefficient(name: str, value: Any, like: Tensor) -> float | Tensor:
    """A float in [0, 1], or as 0-dim such a tensor of one element."""
    return _scalar(name, value, like, lambda v: 0 <= v <= 1, "between 0 and 1")


def labels(name: str, x: Any, n: int) -> Tensor:
    """Labels [n] or [n, 1] of any real dtype as [n], int64 unless they are of a floating-point dtype."""
    tensor(name, x)
    if x.is_complex():
        raise TypeError(f"{name} must be integers, booleans or floats, got {x.dtype}")
    if not (has_shape(x, n) or has_shape(x, n, 1)):
        raise ValueError(f"{name} must have shape [{n}] or [{n}, 1], got {tuple(x.shape)}")
    x = _saveable(x.reshape(n))
    return x.detach() if x.is_floating_point() else x.to(torch.int64)


def kind(x: Any) -> str:
    """The kind of dtype of labels or of a mask; "none" if there are none."""
    if not isinstance(x, Tensor):
        return "none"
    return str(x.dtype) if x.is_floating_point() else "integers"


def label_ids(x: Tensor, columns: bool = False, before: int = 0) -> Tensor:
    """int64 [n] that are equal where the labels [n] are: 0.0 and -0.0 are, a NaN is equal to nothing.

    A NaN gets an id of its own among the bits of NaNs, one for its row and another as a column; `before`: the
    rows of other processes before these.
    """
    if not x.is_floating_point():
        return x
    exact = (x if x.dtype == torch.float64 else x.float()) + 0.0  # -0.0 becomes 0.0
    bits = exact.view(torch.int64 if exact.dtype == torch.float64 else torch.int32).to(torch.int64)
    first = (0x7FFC if columns else 0x7FF8) << 48
    own = torch.arange(x.shape[0], device=x.device) + (first + before)
    return torch.where(exact.isnan(), own, bits)


def mask(name: str, x: Any, n: int, m: int) -> Tensor:
    """A matrix [n, m] of bool, integer or float weights, without gradient."""
    tensor(name, x)
    if x.is_complex():
        raise TypeError(f"{name} must be bool, integer or float, got {x.dtype}")
    if not has_shape(x, n, m):
        raise ValueError(f"{name} must have shape [{n}, {m}], got {tuple(x.shape)}")
    if x.requires_grad:
        raise ValueError(f"{name} must not require a gradient: none is computed for it")
    return x


def boolean_mask(name: str, x: Any, shape: Sequence[int]) -> Tensor:
    """A bool tensor of exactly this shape."""
    tensor(name, x)
    if x.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {x.dtype}")
    if not has_shape(x, *shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {tuple(x.shape)}")
    return x


def valid_rows(x: Any, n: int, like: Tensor) -> Tensor | None:
    """A copy of the argument `valid`, a bool tensor [n] on the device of `like`, or None."""
    if x is None:
        return None
    boolean_mask("valid", x, [n])
    if x.device != like.device:
        raise ValueError(f"valid must be on {like.device}, got a tensor on {x.device}")
    return x.clone()  # the backward reads it


def not_both(first: str, x: Any, second: str, y: Any) -> None:
    if x is not None and y is not None:
        raise ValueError(f"{first} and {second} must not be given together, got both")


def both_or_none(first: str, x: Any, second: str, y: Any) -> None:
    if (x is None) != (y is None):
        given, missing = (second, first) if x is None else (first, second)
        raise ValueError(f"{first} and {second} must be given together, got {given} without {missing}")


def index(name: str, x: Any, n: int, size: int) -> Tensor:
    """Indices int64 [n] in [-1, size): one column a row, -1 for none."""
    tensor(name, x)
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64, got {x.dtype}")
    if not has_shape(x, n):
        raise ValueError(f"{name} must have shape [{n}], got {tuple(x.shape)}")
    if readable(x) and bool(((x < -1) | (x >= size)).any()):
        raise ValueError(f"{name} must lie in [-1, {size}), got {x.min().item()} to {x.max().item()}")
    return _saveable(x).to(torch.int64)


def _saveable(x: Tensor) -> Tensor:
    """A copy of what was made in inference mode, which autograd does not save."""
    made_there = not torch.compiler.is_compiling() and x.is_inference()
    return x.clone() if made_there and not torch.is_inference_mode_enabled() else x


def key_bias(name: str, x: Any, m: int) -> Tensor:
    """A floating-point bias [m], one for each key."""
    tensor(name, x)
    float_dtype(name, x.dtype)
    if not has_shape(x, m):
        raise ValueError(f"{name} must have shape [{m}], got {tuple(x.shape)}")
    return x


def exclude(name: str, value: Any) -> int | None:
    """`"self"` -> 0, None -> None, an integer offset as it is: column i + offset is left out of row i."""
    if value is None:
        return None
    if isinstance(value, str):
        if value != "self":
            raise ValueError(f"{name} must be 'self', None or an integer offset, got {value!r}")
        return 0
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be 'self', None or an integer offset, got {type(value).__name__}")
    return int(value)


def reduction(loss: Tensor, how: str, weight: Tensor | None = None) -> Tensor:
    """Reduce the losses of rows [n]; `weight` [n] (bool or 0/1) marks the rows that the mean counts."""
    option("reduction", how, REDUCTIONS)
    if how == "none":
        return loss
    if how == "sum":
        return loss.sum()
    if weight is None:
        return loss.mean()
    return (loss * weight).sum() / weight.sum().clamp(min=1)


def supervision(
    x: Any, weights: Any, n: int, like: Tensor, columns: int | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """The arguments `labels` and `mask` of a loss over n samples, of `columns` in all: at most one, on the
    device of `like`."""
    not_both("labels", x, "mask", weights)
    if x is not None:
        x = labels("labels", x, n)
        same_device(features=like, labels=x)
    if weights is not None:
        mask("mask", weights, n, n if columns is None else columns)
        same_device(features=like, mask=weights)
    return x, weights


def same_segments(first: str, x: Sequence[Tensor], second: str, y: Sequence[Tensor]) -> None:
    """Two lists of segments of equal lengths."""
    lengths, wanted = [part.shape[0] for part in y], [part.shape[0] for part in x]
    if len(lengths) != len(wanted) or any(a != b for a, b in zip(lengths, wanted, strict=True)):
        raise ValueError(f"{second} must have segments as long as those of {first} {wanted}, got {lengths}")


def pair(first: str, x: Any, second: str, y: Any) -> tuple[Tensor, Tensor]:
    """Two matrices of one shape and device, in their common dtype."""
    features(first, x)
    features(second, y)
    if torch.compiler.is_compiling() or x.shape != y.shape or x.device != y.device:
        same_device(**{first: x, second: y})
        same_shape(**{first: x, second: y})
    if x.dtype != y.dtype:
        x, y = dtypes.promote(x, y)
    return x, y


def is_key_queue(x: Any) -> bool:
    """Whether x is a `KeyQueue`, whose rows that count, maybe none, are `x.filled`."""
    return isinstance(getattr(x, "filled", None), Tensor)


def memory(
    x: Any, like: Tensor, supervised: Any, weights: Any
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Features [B, V, D], their labels, and the keys [K, D] and labels [K] of the argument `memory`, features
    and keys in one dtype, and so the labels; None for an empty KeyQueue as for None."""
    if x is None:
        return like, supervised, None
    not_both("mask", weights, "memory", x)
    if supervised is None:
        raise ValueError("labels must be given with memory, got None")
    if is_key_queue(x):
        keys, marks = x.filled, x.filled_labels
        if marks is None:
            raise ValueError("memory must be a KeyQueue with labels=True, got one without labels")
    else:
        if not isinstance(x, list | tuple) or len(x) != 2:
            got = type(x).__name__
            raise TypeError(f"memory must be a KeyQueue or a pair of keys [K, D] and labels [K], got {got}")
        keys = features("memory[0]", x[0], shape="[K, D]")
        marks = labels("memory[1]", x[1], keys.shape[0])
    same_device(features=like, memory=[keys, marks])
    same_width(features=like, memory=keys)
    if keys.shape[0] == 0:
        return like, supervised, None
    like, keys = dtypes.promote(like, keys)
    supervised, marks = comparable(labels("labels", supervised, like.shape[0]), marks)
    return like, supervised, (keys, marks)


def own_keys(
    x: Any, marks: Any, like: Tensor, supervised: Any, weights: Any
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor | None] | None]:
    """Features [B, V, D], their labels, and the keys [M, D] and labels [M] of the arguments `keys` and
    `key_labels`, features and keys in one dtype, and so the labels; no labels where a mask says what is
    positive."""
    if x is None:
        if marks is not None:
            raise ValueError("keys must be given with key_labels, got None")
        return like, supervised, None
    features("keys", x, shape="[M, D]")
    same_device(features=like, keys=x, key_labels=marks)
    same_width(features=like, keys=x)
    not_both("mask", weights, "key_labels", marks)
    both_or_none("labels", supervised, "key_labels", marks)
    like, x = dtypes.promote(like, x)
    if weights is None and marks is None:
        raise ValueError("labels and key_labels, or mask, must be given with keys, got none of them")
    if marks is None:
        return like, supervised, (x, None)
    supervised, marks = comparable(
        labels("labels", supervised, like.shape[0]), labels("key_labels", marks, x.shape[0])
    )
    return like, supervised, (x, marks)


def pair_and_queue(q: Any, k: Any, queue: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, k [N, D] and the rows [K, D] of an optional queue, on one device and in their common dtype; K is 0
    for an empty KeyQueue only."""
    q, k = pair("q", q, "k", k)
    if queue is None:
        return q, k, None
    queue = queue.filled if is_key_queue(queue) else features("queue", queue, shape="[K, D]")
    same_device(q=q, queue=queue)
    same_width(q=q, queue=queue)
    q, k, queue = dtypes.promote(q, k, queue)
    return q, k, queue


def soft_target(
    q: Any, k: Any, target_q: Any, target_k: Any, factor: Any, target_factor: Any, positive: Any, coeff: Any,
    positive_in_target: Any,
) -> tuple[SoftTarget, float | Tensor]:  # fmt: skip
    """The arguments of `soft_target_cross_entropy`, checked: features of one dtype, and the coefficient."""
    keys, target_keys = segments("k", k), segments("target_k", target_k)
    features("q", q)
    features("target_q", target_q, shape="[N, E]")
    same_device(q=q, k=keys, target_q=target_q, target_k=target_keys, positive=positive)
    same_width(q=q, k=keys)
    same_width(target_q=target_q, target_k=target_keys)
    same_length(q=q, target_q=target_q)
    same_segments("k", keys, "target_k", target_keys)
    factor = scale("scale", factor, q)
    target_factor = scale("target_scale", target_factor, q)
    coeff = coefficient("coeff", coeff, q)
    if positive is not None:
        positive = index("positive", positive, q.shape[0], sum(part.shape[0] for part in keys))
    elif isinstance(coeff, Tensor) or coeff != 0:
        raise ValueError(f"positive must be given with a coeff other than 0, got None with coeff {coeff}")
    option("positive_in_target", positive_in_target, TARGET_POSITIVES)
    q, target_q, *parts = dtypes.promote(q, target_q, *keys, *target_keys)
    k, target_k = parts[: len(keys)], parts[len(keys) :]
    problem = SoftTarget(q, k, target_q, target_k, factor, target_factor, positive, positive_in_target)
    return problem, coeff


def contrast(
    q: Any, k: Any, factor: Any, left_out: Any, row_labels: Any, col_labels: Any, among: Any, bias: Any,
    both_axes: Any,
) -> Contrast:  # fmt: skip
    """The arguments of `contrastive_lse`, checked."""
    features("q", q)
    n = m = q.shape[0]
    if k is not None:
        features("k", k, shape="[M, D]")
        same_width(q=q, k=k)
        m = k.shape[0]
    same_device(q=q, k=k, row_labels=row_labels, col_labels=col_labels, key_bias=bias)
    option("among", among, ("all", "same", "different"))
    flag("both_axes", both_axes)
    factor = scale("scale", factor, q)
    offset = exclude("exclude", left_out)
    if k is None and col_labels is None:
        col_labels = row_labels
    both_or_none("row_labels", row_labels, "col_labels", col_labels)
    if row_labels is not None and col_labels is not None:
        own_excluded = k is None and col_labels is row_labels and offset == 0
        row_labels, col_labels = labels("row_labels", row_labels, n), labels("col_labels", col_labels, m)
        row_labels, col_labels = _label_pair(row_labels, col_labels, own_excluded)
    elif among != "all":
        raise ValueError(f"row_labels must be given with among={among!r}, got None")
    if bias is not None:
        key_bias("key_bias", bias, m)
    if k is not None:
        q, k = dtypes.promote(q, k)
    return Contrast(q, k, factor, offset, row_labels, col_labels, among, key_bias=bias, both_axes=both_axes)


def comparable(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of labels in one dtype."""
    if x.dtype == y.dtype:
        return x, y
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return x.to(wide), y.to(wide)


def _label_pair(row_labels: Tensor, col_labels: Tensor, own_excluded: bool) -> tuple[Tensor, Tensor]:
    """Ids of the labels of rows and of columns; one tensor for both where these are the same labels and a row
    leaves its own column out."""
    row_labels, col_labels = comparable(row_labels, col_labels)
    if own_excluded:
        ids = label_ids(row_labels)
        return ids, ids
    return label_ids(row_labels), label_ids(col_labels, columns=True)


def no_group_beside(group: Any, k_global: Any, rank: Any) -> None:
    if group is not None and (k_global is not None or rank != 0):
        raise ValueError("k_global and rank must not be given with a group, which gathers the keys itself")


def keys_and_queue(
    q: Any, k: Any, k_global: Any, queue: Any, rank: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`pair_and_queue` and the gathered keys [M, D], which must hold the N keys of `rank`; beside these an
    empty queue is none."""
    integer("rank", rank, 0)
    q, k, queue = pair_and_queue(q, k, queue)
    n = q.shape[0]
    if k_global is None:
        if rank != 0:
            raise ValueError(f"k_global must be given with a rank other than 0, got None with rank {rank}")
        return q, k, None, queue
    features("k_global", k_global, shape="[M, D]")
    same_device(q=q, k_global=k_global)
    same_width(q=q, k_global=k_global)
    minimum_rows("k_global", k_global, n * (rank + 1))
    if queue is not None and queue.shape[0] == 0:
        queue = None
    dtype = torch.promote_types(q.dtype, k_global.dtype)
    return q.to(dtype), k.to(dtype), k_global.to(dtype), None if queue is None else queue.to(dtype)


def positives_cap(name: str, value: Any, views: int) -> int | None:
    """A cap on positives, a multiple of the number of views, as a number of samples."""
    if value is None:
        return None
    if integer(name, value, 0) % views:
        raise ValueError(f"{name} must be None or a multiple of the {views} views, got {value}")
    return int(value) // views


def split(name: str, x: Tensor, augmentations: int) -> int:
    """The number of samples B of features [augmentations·B, ...]."""
    if x.shape[0] % augmentations:
        raise ValueError(
            f"{name} must have a multiple of augmentations={augmentations} rows, got shape {tuple(x.shape)}"
        )
    return x.shape[0] // augmentations


def levels(name: str, x: Any) -> list[Tensor]:
    """A non-empty list of features [B, V, D_l] with the same B and V, on one device."""
    if not isinstance(x, list | tuple):
        raise TypeError(f"{name} must be a list of tensors, got {type(x).__name__}")
    if len(x) == 0:
        raise ValueError(f"{name} must hold at least one tensor, got an empty {type(x).__name__}")
    parts = [views(f"{name}[{i}]", part) for i, part in enumerate(x)]
    for i, part in enumerate(parts):
        if part.shape[0] != parts[0].shape[0] or part.shape[1] != parts[0].shape[1]:
            raise ValueError(
                f"{name}[{i}] must have the batch and views of {name}[0] {tuple(parts[0].shape[:2])}, "
                f"got {tuple(part.shape[:2])}"
            )
    same_device(**{name: parts})
    return parts


def level_weights(name: str, x: Any, n: int, like: Tensor) -> list[float | Tensor]:
    """One factor for each of n levels: a sequence of floats or tensors of one element, or a tensor [n] (any
    shape for one level); None: 1."""
    if x is None:
        return [1.0] * n
    if isinstance(x, Tensor):
        if not has_shape(x, n) and (n > 1 or x.numel() != 1):
            raise ValueError(f"{name} must have shape [{n}], got {tuple(x.shape)}")
        x = list(x.flatten().unbind())
    if not isinstance(x, list | tuple):
        raise TypeError(f"{name} must be a sequence of floats or a tensor, got {type(x).__name__}")
    if len(x) != n:
        raise ValueError(f"{name} must have one entry for each of the {n} levels, got {len(x)}")
    return [scale(f"{name}[{i}]", value, like) for i, value in enumerate(x)]
