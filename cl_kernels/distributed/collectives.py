"""Collectives over the rows of a group, with gradients.

Differentiated are the losses of all ranks together: a row's gradient is the sum of what every rank's loss
gives it. The mean over the processes, which DDP and FSDP take, is then the gradient of the mean loss.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import validation

if TYPE_CHECKING or dist.is_available():
    from torch.distributed import ProcessGroup as ProcessGroup
else:
    ProcessGroup = None


def rank_in(group: Any) -> int:
    """This process's rank in the group."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be None or a torch.distributed.ProcessGroup that this process belongs to, "
            f"got {type(group).__name__}"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group must be one that this process belongs to, got another one")
    return rank


def gets_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def checksum(x: Any) -> int:
    """A number that ranks tell each other to see whether they mean the same."""
    return zlib.crc32(repr(x).encode())


def exchange_cards(own: Sequence[int], group: ProcessGroup, device: torch.device) -> list[list[int]]:
    """The cards of all ranks; over the CPU if the group has a backend for it, which waits for no kernel."""
    if "cpu:" in dist.get_backend_config(group):
        device = torch.device("cpu")
    return all_gather(torch.tensor([own], device=device), group).tolist()


def gather_rows(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows of every process, in the order of the ranks, with the gradient of all their losses.

    Args:
        x: [N, ...], of any dtype that the group's backend carries; N may differ from rank to rank, and be 0.
        group: a `torch.distributed.ProcessGroup`; None: this process alone.

    Returns:
        [sum of all N, ...]. A row's gradient is the sum of the gradients that it gets on every rank: what DDP
        and FSDP average is then the gradient of the mean of the ranks' losses. Every rank must take part in
        the backward as in the forward.

    Raises:
        TypeError, ValueError: for a wrong type or shape; on every rank where trailing sizes differ.

    Example:
        >>> import torch, cl_kernels as clk
        >>> clk.distributed.gather_rows(torch.ones(2, 3), group=None).shape
        torch.Size([2, 3])
    """
    validation.tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape [N, ...], got ()")
    if group is None or (rank_in(group) == 0 and dist.get_world_size(group) == 1):
        return x
    if torch.compiler.is_compiling():  # the sizes of the others are not known to a graph
        return torch.compiler.disable(_gather_any)(x, group)
    return _gather_any(x, group)


def _gather_any(x: Tensor, group: ProcessGroup) -> Tensor:
    """The rows of every process, whatever their sizes."""
    kind = checksum((x.shape[1:], x.dtype, gets_gradient(x)))
    sizes, kinds = zip(*exchange_cards((x.shape[0], kind), group, x.device), strict=True)
    if len(set(kinds)) > 1:
        raise ValueError(
            "x must have the same dtype, sizes but the first and need of a gradient on every rank of the "
            f"group, got {x.dtype} {tuple(x.shape)}, requires_grad={x.requires_grad} on this one and others "
            "elsewhere"
        )
    return gather(x, sizes, group)


def all_to_all(x: Tensor, sizes: Sequence[int], received: Sequence[int], group: ProcessGroup) -> Tensor:
    """The rows received, so many from each rank in turn, of `x`, sent so many to each in turn."""
    return _AllToAll.apply(x, tuple(sizes), tuple(received), group)


def gather(x: Tensor, sizes: tuple[int, ...], group: ProcessGroup) -> Tensor:
    return _Gather.apply(x, sizes, group)


class _Gather(torch.autograd.Function):
    """Rows of all ranks, of known sizes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], group: ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        most = max(sizes)
        everyone = all_gather(_padded(x, most), group)
        if min(sizes) == most:
            return everyone
        blocks = everyone.view(len(sizes), most, *x.shape[1:])
        return torch.cat([block[:n] for block, n in zip(blocks, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Scatter.apply(grad, ctx.sizes, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    """Sums over the ranks of what each has for a rank's rows; half precision is summed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], group: ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        most, own = max(sizes), sizes[dist.get_rank(group)]
        parts = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if min(sizes) < most:
            parts = torch.cat([_padded(block, most) for block in parts.split(sizes)])
        return _reduce_scatter(parts.contiguous(), most, group)[:own].to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(grad, ctx.sizes, ctx.group), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: tuple[int, ...], received: tuple[int, ...], group: ProcessGroup
    ) -> Tensor:
        ctx.call = (received, sizes, group)
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(received), list(sizes), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad, *ctx.call), None, None, None


def _padded(x: Tensor, rows: int) -> Tensor:
    if x.shape[0] == rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """As many rows of every rank."""
    out = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
    _collective("all_gather_single", "all_gather_into_tensor")(out, x, group=group)
    return out


def _reduce_scatter(x: Tensor, rows: int, group: ProcessGroup) -> Tensor:
    """Sums over the ranks, of which each keeps so many rows."""
    if x.is_complex():
        return torch.view_as_complex(_reduce_scatter(torch.view_as_real(x), rows, group))
    out = x.new_empty(rows, *x.shape[1:])
    _collective("reduce_scatter_single", "reduce_scatter_tensor")(out, x, group=group)
    return out


def _collective(name: str, before: str) -> Any:
    """A collective by its name since torch 2.14, or by the one `before`."""
    return getattr(dist, name, None) or getattr(dist, before)
