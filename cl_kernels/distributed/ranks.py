"""The processes that take part in a loss, and the samples of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import autograd, dtypes, validation
from .collectives import ProcessGroup, checksum, exchange_cards, gets_gradient, rank_in

EXCHANGES = ("gather", "ring")


class Ranks(NamedTuple):
    """The processes of a group and the samples of each, of which the tensors of a loss hold one or more rows
    each, view by view."""

    group: ProcessGroup
    exchange: str
    rank: int
    sizes: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.sizes)

    @property
    def first(self) -> int:
        """The samples of the ranks before."""
        return sum(self.sizes[: self.rank])

    def views(self, rows: int) -> int:
        """How many rows a sample has, where this rank has so many."""
        own = self.sizes[self.rank]
        return rows // own if own else 1

    def rows(self, own: int) -> tuple[int, ...]:
        """The rows of every rank, where this one has so many."""
        return tuple(self.views(own) * size for size in self.sizes)


def rows_of(x: Tensor | None) -> int | None:
    """How many rows a queue has, if there is one: the same on all ranks."""
    return None if x is None else x.shape[0]


def total(own: int, ranks: Ranks | None) -> int:
    """The rows of all ranks, where this one has so many."""
    return own if ranks is None else sum(ranks.rows(own))


def join(
    group: Any, exchange: Any, features: Tensor, loss: str, samples: int | None = None, **agreed: Any
) -> Ranks | None:
    """The ranks that take part in a loss; None for one process.

    Args:
        group: a `torch.distributed.ProcessGroup`, or None.
        exchange: "gather" or "ring".
        features: what is exchanged; of one width, dtype and need of a gradient on all ranks.
        loss: the name of the function.
        samples: how many this rank holds; None: the rows of `features`.
        agreed: arguments that must be the same on all ranks; of tensors and floats, whether they are there
            and get a gradient.

    Raises:
        TypeError, ValueError: for a wrong group or exchange; on every rank if what must be the same is not.
        NotImplementedError: in transforms of torch.func.
    """
    validation.option("exchange", exchange, EXCHANGES)
    if group is None:
        return None
    rank = rank_in(group)
    if dist.get_world_size(group) == 1:
        return None
    if autograd.in_transform():
        raise NotImplementedError("a loss over a group of processes does not run in torch.func's transforms")
    told = {name: _told(x) for name, x in agreed.items()} | {"exchange": exchange}
    own = _Card(
        features.shape[0] if samples is None else samples,
        features.shape[-1],
        dtypes.FLOAT_DTYPES.index(features.dtype),
        int(gets_gradient(features)),
        checksum((loss, told)),
    )
    cards = [_Card(*card) for card in exchange_cards(own, group, features.device)]
    _check_agreement(cards, loss, told)
    return Ranks(group, exchange, rank, tuple(card.samples for card in cards))


def _told(x: Any) -> Any:
    if isinstance(x, Tensor | float):
        return "with gradient" if isinstance(x, Tensor) and gets_gradient(x) else "no gradient"
    return x


class _Card(NamedTuple):
    """A rank's part in a loss, told to the others before rows are exchanged."""

    samples: int
    width: int
    dtype: int  # of dtypes.FLOAT_DTYPES
    needs_gradient: int
    agreed: int  # a checksum


def _check_agreement(cards: Sequence[_Card], loss: str, agreed: dict[str, Any]) -> None:
    told: dict[str, list[Any]] = {
        "features of the same width": [card.width for card in cards],
        "features of the same dtype": [dtypes.FLOAT_DTYPES[card.dtype] for card in cards],
        "features that all require a gradient, or none": [bool(card.needs_gradient) for card in cards],
    }
    for wanted, values in told.items():
        if len(set(values)) > 1:
            raise ValueError(f"{loss} must get {wanted} on every rank of the group, got {values}")
    if len({card.agreed for card in cards}) > 1:
        here = ", ".join(f"{name}: {x}" for name, x in agreed.items())
        raise ValueError(
            "every rank of the group must call the same loss with the same options and kinds of arguments, "
            f"but another one's differ from {loss} with {here} on this one"
        )


def mask_columns(mask: Tensor, ranks: Ranks, owner: int, rows: slice) -> Tensor:
    """The columns of a mask [R, samples of all ranks] that belong to rows of one rank."""
    own = torch.arange(rows.start, rows.stop, device=mask.device) % max(ranks.sizes[owner], 1)
    return mask.index_select(1, own + sum(ranks.sizes[:owner]))
