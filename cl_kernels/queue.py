"""A queue of keys: the memory of MoCo, of SCE and of SupCon with memory."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import validation
from .distributed import ProcessGroup, gather
from .distributed.collectives import checksum, exchange_cards, rank_in
from .losses._common import Grouped


class KeyQueue(Grouped):
    r"""First-in, first-out memory of keys, from which losses take negatives and, by label, positives.

    A batch takes the place of the oldest rows:

    .. math:: Q \leftarrow \text{the last } K \text{ rows of } [Q; k]

    `info_nce_loss`, `sce_loss` and `sce_targets` take it as `queue`, `supcon_loss` one with labels as
    `memory`. Rows that nothing was enqueued into do not count: an empty queue is one of no rows. Between the
    forward and the backward of a loss it may be enqueued into, where the keys of the batch are a momentum
    encoder's and get no gradient, nor the target's temperature of SCE. Enqueue a batch after its loss: a row
    that is in the queue already would meet itself.

    Args:
        size: K, the rows that it has room for.
        width: D, the features of a key.
        labels: whether each key has a label.
        group: a `torch.distributed.ProcessGroup`, whose processes all enqueue together: each queue then gets
            the keys of all ranks, in their order, and all are the same; None: this process alone.
        device, dtype: of the keys; float16, bfloat16, float32 or float64, by default PyTorch's own. Losses
            compute in the common dtype of features and keys: give the queue that of the features.

    Its state, with which a queue goes on as if it had not been interrupted:

    ============  ============================================================================
    buffer        content
    ============  ============================================================================
    keys          [K, D], the first `len(queue)` rows count
    labels        int64 [K]; None without labels
    position      int64 [], the row that is replaced next
    extra state   int64 [3]: K, D and the number of rows that count
    ============  ============================================================================

    Example:
        >>> import torch, cl_kernels as clk
        >>> queue = clk.KeyQueue(64, 16)
        >>> for _ in range(3):
        ...     q, k = (torch.nn.functional.normalize(torch.randn(8, 16)) for _ in range(2))
        ...     loss = clk.info_nce_loss(q.requires_grad_(), k, queue)
        ...     queue.enqueue(k)
        ...     loss.backward()
        >>> len(queue)
        24

    A memory of SupCon takes the views as rows of their own:

        >>> memory, labels = clk.KeyQueue(64, 16, labels=True), torch.arange(8) % 3
        >>> z = torch.nn.functional.normalize(torch.randn(8, 2, 16), dim=2)
        >>> loss = clk.supcon_loss(z, labels, memory=memory)
        >>> memory.enqueue(z.flatten(0, 1), labels.repeat_interleave(2))

    The number of rows that count is the host's, and no buffer: load a checkpoint on every process. In a
    module under DDP the buffers are broadcast at each forward; `broadcast_buffers=False`, or a queue outside
    of it, saves that, as a queue with a group is the same everywhere.

    Sources: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020, section
    3.2; Khosla et al., "Supervised Contrastive Learning", 2020, for the memory of SupCon.
    """

    keys: Tensor
    labels: Tensor | None
    position: Tensor

    def __init__(
        self,
        size: int,
        width: int,
        *,
        labels: bool = False,
        group: ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(group, "gather")
        validation.integer("size", size, 1)
        validation.integer("width", width, 1)
        validation.flag("labels", labels)
        if dtype is not None:
            validation.float_dtype("dtype", dtype)
        if group is not None:
            rank_in(group)
        self.register_buffer("keys", torch.zeros(size, width, device=device, dtype=dtype))
        self.register_buffer("labels", None)
        if labels:
            self.labels = torch.zeros(size, device=device, dtype=torch.int64)
        self.register_buffer("position", torch.zeros((), device=device, dtype=torch.int64))
        self._count(0)

    def _count(self, rows: int) -> None:
        # The size of an empty tensor: torch.compile would take an integer for a constant.
        self._counted = torch.empty(rows, 0, device="cpu")

    def __bool__(self) -> bool:
        return True  # also while it is empty, as any module

    def __len__(self) -> int:
        return self._counted.shape[0]

    @property
    def filled(self) -> Tensor:
        """The keys that count, [n, D], a view; in the order of the buffer, not of their age."""
        return self._that_count(self.keys)

    @property
    def filled_labels(self) -> Tensor | None:
        """Their labels [n]; None without labels."""
        return None if self.labels is None else self._that_count(self.labels)

    def _that_count(self, x: Tensor) -> Tensor:
        n = self._counted.shape[0]
        return x if n == x.shape[0] else x[:n]

    def reset(self) -> None:
        """Forget every row."""
        self.position.zero_()
        self._count(0)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Put keys in place of the oldest rows; over a group those of every rank, by each of them together.

        Args:
            keys: [N, D], of any floating-point dtype, copied without gradient in the queue's; N may be 0,
                differ from rank to rank, and exceed K: the last K rows of all ranks then count.
            labels: [N] or [N, 1], integers or booleans; for a queue with labels only.

        Raises:
            TypeError, ValueError: for a wrong type, dtype, shape or device; over a group on every rank.
                Nothing is enqueued then.
        """
        if self.group is None:
            rows = self._checked(keys, labels)
        else:  # outside of compiled graphs, as the losses over a group
            gathered = self._of_all_ranks
            if torch.compiler.is_compiling():
                gathered = torch.compiler.disable(gathered)
            rows = gathered(self.group, keys, labels)
        n, size, counted = rows[0].shape[0], self.keys.shape[0], self._counted.shape[0]
        if n == 0:
            return
        first = max(n - size, 0)
        places = torch.arange(first, n + 1, device=self.keys.device)
        places = (places + (self.position if counted == size else counted)) % size
        for buffer, new in zip((self.keys, self.labels), rows, strict=False):
            if buffer is not None:
                buffer.index_copy_(0, places[:-1], new[first:])
        self.position.copy_(places[-1])
        if counted < size:
            self._count(min(size, counted + n))

    def _checked(self, keys: Tensor, labels: Tensor | None) -> list[Tensor]:
        """The keys, and for a queue with labels the labels, as the buffers have them."""
        validation.features("keys", keys, shape="[N, D]", empty=True)
        validation.same_device(queue=self.keys, keys=keys)
        validation.same_width(queue=self.keys, keys=keys)
        keys = keys.to(self.keys.dtype)
        if self.labels is None:
            if labels is not None:
                raise ValueError("labels must be None for a KeyQueue without labels, got some")
            return [keys]
        if labels is None:
            raise ValueError("labels must be given for a KeyQueue with labels, got None")
        labels = validation.labels("labels", labels, keys.shape[0])
        if labels.is_floating_point():
            raise TypeError(f"labels must be integers or booleans, got {labels.dtype}")
        validation.same_device(queue=self.keys, labels=labels)
        return [keys, labels]

    def _of_all_ranks(self, group: ProcessGroup, keys: Tensor, labels: Tensor | None) -> list[Tensor]:
        """The same of all ranks. They first tell each other how many rows each has, or that its arguments are
        wrong, so that none waits for one that has raised."""
        rows: list[Tensor] = []
        fault = None
        try:
            rows = self._checked(keys, labels)
        except (TypeError, ValueError) as error:
            fault = error
        kind = *self.keys.shape, self.keys.dtype, self.labels is not None, len(self)
        card = rows[0].shape[0] if rows else -1, checksum(kind)
        device = keys.device if isinstance(keys, Tensor) else self.keys.device
        cards = exchange_cards(card, group, device)
        if fault is not None:
            raise fault
        sizes, kinds = zip(*cards, strict=True)
        if min(sizes) < 0:
            raise ValueError(f"enqueue got wrong arguments on rank {sizes.index(-1)} of the group")
        if len(set(kinds)) > 1:
            raise ValueError(
                "the queues of the ranks must have the same size, width, dtype, labels and number of rows, "
                f"but another one's differ from {', '.join(map(str, kind))} of this one"
            )
        return [gather(x, sizes, group) for x in rows]

    def get_extra_state(self) -> Tensor:
        return torch.tensor([*self.keys.shape, len(self)], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        *shape, rows = state.tolist()
        if shape != list(self.keys.shape):
            return  # load_state_dict says so of the keys
        if not 0 <= rows <= shape[0]:
            raise ValueError(f"a KeyQueue of {shape[0]} rows must count from 0 to {shape[0]}, got {rows}")
        self._count(rows)

    def extra_repr(self) -> str:
        size, width = self.keys.shape
        over = "" if self.group is None else f", group of {dist.get_world_size(self.group)}"
        return f"{size}, {width}, labels={self.labels is not None}, dtype={self.keys.dtype}{over}"
