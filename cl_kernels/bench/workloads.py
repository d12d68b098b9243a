"""The workloads: which loss, of which size, on which inputs, and what its work amounts to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import losses
from . import eager

LABELS = 10
COSINE = 0.99  # of converged positives
VIEWS = 10  # of multi-crop
LEVELS = (0.25, 0.5, 1.0)  # widths of the levels of the multi-level loss, of the widest

Implementation = Callable[..., Tensor]
"""Takes a temperature, the tensors that get a gradient, and those that do not; gives the mean loss."""


@dataclass(frozen=True)
class Inputs:
    leaves: tuple[Tensor, ...]  # what gets a gradient
    rest: tuple[Tensor, ...] = ()

    def requiring_gradients(self) -> Inputs:
        return Inputs(tuple(x.detach().clone().requires_grad_() for x in self.leaves), self.rest)

    def forward(self, implementation: Implementation, temperature: float) -> Tensor:
        """The loss, with no gradients from before."""
        for leaf in self.leaves:
            leaf.grad = None
        return implementation(temperature, *self.leaves, *self.rest)


@dataclass(frozen=True)
class Workload:
    """A loss and the size of its matrix of similarities, `rows` x `columns` over `width` features.

    DimCL's rows are the columns of both views and its width is the batch. The width of a multi-level loss is
    that of its widest level.
    """

    loss: str  # a key of LOSSES
    rows: int
    columns: int
    width: int
    dtype: str = "float32"
    temperature: float = 0.1
    headline: bool = True

    @property
    def spec(self) -> Loss:
        return LOSSES[self.loss]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def name(self) -> str:
        return f"{self.spec.title} {self.rows} × {self.columns} × {self.width} {self.dtype}"

    @property
    def widths(self) -> list[int]:
        """Features of each level."""
        shares = LEVELS if self.loss == "multilevel" else (1.0,)
        return [max(1, round(self.width * share)) for share in shares]

    @property
    def flops(self) -> float:
        """The fewest that loss and gradients can be had with, as docs/benchmarking.md counts them."""
        return 2.0 * self.spec.products * self.rows * self.columns * sum(self.widths)

    def inputs(self, device: str = "cpu", seed: int = 0, converged: bool = False) -> Inputs:
        """The same for the same seed and device."""
        generator = torch.Generator(device).manual_seed(seed)
        made = self.spec.inputs(self, Maker(generator, converged))

        def cast(x: Tensor) -> Tensor:  # the scale stays float32
            return x.to(device, self.torch_dtype if x.is_floating_point() and x.dim() else x.dtype)

        return Inputs(tuple(map(cast, made.leaves)), tuple(map(cast, made.rest)))


@dataclass(frozen=True)
class Maker:
    """Random unit vectors; `near` are their positives, at a cosine of 0.99 if the inputs are converged."""

    generator: torch.Generator
    converged: bool

    def unit(self, rows: int, width: int) -> Tensor:
        device = self.generator.device
        return F.normalize(torch.randn(rows, width, generator=self.generator, device=device), dim=1)

    def near(self, x: Tensor) -> Tensor:
        other = self.unit(*x.shape)
        if not self.converged:
            return other
        across = F.normalize(other - (other * x).sum(1, keepdim=True) * x, dim=1)
        return F.normalize(COSINE * x + math.sqrt(1 - COSINE**2) * across, dim=1)

    def pair(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        first = self.unit(rows, width)
        return first, self.near(first)


def _class_inputs(work: Workload, make: Maker) -> Inputs:
    """Two views [B, 2, D] of each level; converged ones are near the centre of their class."""
    generator = make.generator
    labels = torch.randint(LABELS, (work.rows // 2,), generator=generator, device=generator.device)
    centres = (make.unit(LABELS, width)[labels] for width in work.widths)
    return Inputs(tuple(torch.stack((make.near(x), make.near(x)), 1) for x in centres), (labels,))


def _pair_inputs(work: Workload, make: Maker, ways: int = 2) -> Inputs:
    return Inputs(make.pair(work.rows // ways, work.width))


def _dimcl_inputs(work: Workload, make: Maker) -> Inputs:
    views = make.pair(work.rows // 2, work.width)
    return Inputs(tuple(math.sqrt(work.width) * x.T.contiguous() for x in views))


def _queue_inputs(work: Workload, make: Maker) -> Inputs:
    """The own key of a row is one of its columns."""
    q, k = make.pair(work.rows, work.width)
    return Inputs((q,), (k, make.unit(work.columns - 1, work.width)))


def _multicrop_inputs(work: Workload, make: Maker) -> Inputs:
    """Student views of the same samples, which share the teacher's rows."""
    q = make.unit(work.rows, work.width)
    views = tuple(make.near(q) for _ in range(VIEWS))
    return Inputs(views, (q, make.unit(work.columns - 1, work.width)))


def _clip_inputs(work: Workload, make: Maker) -> Inputs:
    return Inputs((*make.pair(work.rows, work.width), torch.tensor(1 / work.temperature)))


# Ours, with the arguments of an Implementation.


def _ours(loss: Callable[..., Tensor]) -> Implementation:
    return lambda tau, *inputs: loss(*inputs, temperature=tau)


def _multilevel(*levels_and_labels: Tensor, temperature: float) -> Tensor:
    *levels, labels = levels_and_labels
    return losses.multilevel_loss(levels, labels, temperature=temperature)


def _sce(q: Tensor, k: Tensor, queue: Tensor, **options: Any) -> Tensor:
    fixed: dict[str, Any] = {"coeff": eager.COEFF, "target_temperature": eager.TARGET_TEMPERATURE}
    return losses.sce_loss(q, k, queue=queue, **fixed, **options)


def _sce_multicrop(*views_k_queue: Tensor, temperature: float) -> Tensor:
    *views, k, queue = views_k_queue
    targets = losses.sce_targets(k, queue=queue, target_temperature=eager.TARGET_TEMPERATURE)
    return torch.stack([_sce(q, k, queue, targets=targets, temperature=temperature) for q in views]).mean()


@dataclass(frozen=True)
class Loss:
    title: str
    ours: Implementation
    inputs: Callable[[Workload, Maker], Inputs]
    products: int  # the fewest N x M x D products that loss and gradients are worth, 2NMD operations each
    shape: Callable[[int, int], tuple[int, int]]  # rows and columns of the matrix, of rows and queue size


# Each row against each other; against its own key and those of the queue.
_square, _queued = (lambda rows, queue: (rows, rows)), (lambda rows, queue: (rows, queue + 1))

LOSSES: dict[str, Loss] = {
    "supcon": Loss("SupCon", _ours(losses.supcon_loss), _class_inputs, 2, _square),
    "nt_xent": Loss("NT-Xent", _ours(losses.nt_xent_loss), _pair_inputs, 2, _square),
    "sce": Loss("SCE", _ours(_sce), _queue_inputs, 4, _queued),
    "dimcl": Loss("DimCL", _ours(losses.dimcl_loss), _dimcl_inputs, 2, _square),
    "clip": Loss("CLIP", lambda _, *inputs: losses.clip_loss(*inputs), _clip_inputs, 4, _square),
    "sce_multicrop": Loss("SCE multi-crop", _ours(_sce_multicrop), _multicrop_inputs, 2 + 2 * VIEWS, _queued),
    "selfcon": Loss("SelfCon", _ours(losses.selfcon_loss), _class_inputs, 2, _square),
    "multilevel": Loss("Multi-level", _ours(_multilevel), _class_inputs, 2, _square),
    "info_nce": Loss("InfoNCE", _ours(losses.info_nce_loss), _queue_inputs, 2, _queued),
    "dcl": Loss("DCL", _ours(losses.dcl_loss), partial(_pair_inputs, ways=1), 3, lambda n, _: (n, 2 * n)),
}
"""The losses by name; the first five make the standard report."""

STANDARD = ("supcon", "nt_xent", "sce", "dimcl", "clip")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a loss on a kind of machine: `rows` of its curve, the last of which is the headline."""

    rows: Sequence[int]
    width: int
    queue: int = 0


_SIZES = {  # on a CPU, on a GPU
    "supcon": (Sizes((1024, 2048, 4096, 8192), 128), Sizes((2048, 4096, 8192, 12288, 32768), 128)),
    "nt_xent": (Sizes((1024, 2048, 4096, 8192), 128), Sizes((256, 1024, 4096, 16384, 65536, 131072), 128)),
    "sce": (Sizes((128, 256, 512), 256, 65536), Sizes((64, 256, 512), 256, 65536)),
    "dimcl": (Sizes((1024, 2048, 4096), 256), Sizes((512, 4096, 16384), 256)),
    "clip": (Sizes((1024, 2048, 4096), 512), Sizes((2048, 8192, 32768), 512)),
    "sce_multicrop": (Sizes((32, 64), 256, 16384), Sizes((64, 256), 256, 65536)),
    "selfcon": (Sizes((512, 1024, 2048, 4096), 128), Sizes((2048, 4096), 128)),
    "multilevel": (Sizes((512, 1024, 2048, 4096), 256), Sizes((2048, 8192), 256)),
    "info_nce": (Sizes((64, 128, 256), 128, 65536), Sizes((256, 1024), 128, 65536)),
    "dcl": (Sizes((512, 1024, 2048, 4096), 128), Sizes((2048, 8192), 128)),
}
SIZES = {kind: {loss: both[i] for loss, both in _SIZES.items()} for i, kind in enumerate(("cpu", "cuda"))}
"""The sizes by kind of machine: those of the papers (docs/benchmarking.md), as far as they take seconds."""


def planned(
    kind: str,
    losses: Sequence[str] = STANDARD,
    dtypes: Sequence[str] = ("float32",),
    rows: Sequence[int] | None = None,
    width: int | None = None,
    queue: int | None = None,
    temperature: float = 0.1,
) -> list[Workload]:
    """Headlines first, of every loss and dtype, then the rest of the curves; given sizes replace the standard
    ones. Raises ValueError where a size makes no sense."""
    found = []
    for dtype, loss in itertools.product(dtypes, losses):
        sizes, spec = SIZES[kind][loss], LOSSES[loss]
        chosen = sorted(rows or sizes.rows)
        for n in chosen:
            if n < 2 or n % 2:
                raise ValueError(f"rows must be even and at least 2 (two views), got {n}")
            shape = spec.shape(n, queue or sizes.queue)
            work = Workload(loss, *shape, width or sizes.width, dtype, temperature, n == chosen[-1])
            found.append(work)
    return sorted(found, key=lambda work: not work.headline)


def differentiate(
    implementation: Implementation, temperature: float, inputs: Inputs
) -> Callable[[], tuple[Tensor, list[Tensor | None]]]:
    """Forward and backward: a step that gives the loss and the gradients of the leaves."""
    own = inputs.requiring_gradients()

    def step() -> tuple[Tensor, list[Tensor | None]]:
        loss = own.forward(implementation, temperature)
        loss.backward()
        return loss.detach(), [leaf.grad for leaf in own.leaves]

    return step
