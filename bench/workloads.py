"""The workloads: inputs, the variants that do the same work on them, and what each should return."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import peers
import torch
import torch.nn.functional as F
from peers import Result
from torch import Tensor

import cl_kernels

TEMPERATURE = 0.1


@dataclass(frozen=True)
class Variant:
    """One way to do the work: `step()` runs forward and backward; `expected()` is its float64 result."""

    step: Callable[[], Result | None]
    expected: Callable[[], Result] | None = None


@dataclass
class Workload:
    name: str
    dtype: torch.dtype
    variants: dict[str, Variant] = field(default_factory=dict)

    def problem(self, variant: str) -> str | None:
        """What is wrong with the variant's answer, or None. The reference takes the same (rounded) inputs."""
        chosen = self.variants[variant]
        try:
            result = chosen.step()
        except Exception as error:
            return f"does not run: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if chosen.expected is None or result is None:
            return None
        half = self.dtype in (torch.bfloat16, torch.float16)
        for_loss, for_gradients = (1e-3, 1e-2) if half else (1e-5, 1e-4)
        loss, gradients = result
        true_loss, true_gradients = chosen.expected()
        checks = [("loss", relative_error(loss, true_loss), for_loss)]
        for gradient, truth in zip(gradients, true_gradients, strict=True):
            checks.append(("gradient", relative_error(gradient, truth), for_gradients))
        for what, error, allowed in checks:
            if not error <= allowed:
                return f"wrong answer: relative error of the {what} is {error:.1e}"
        return None


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp(min=1e-300))


def differentiate(loss_of: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Result]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def step() -> Result:
        for leaf in leaves:
            leaf.grad = None
        loss = loss_of(*leaves)
        loss.backward()
        return loss.detach(), [leaf.grad for leaf in leaves]

    return step


def products(count: int, left: Tensor, right: Tensor, out: Tensor | None = None) -> Callable[[], None]:
    """`count` plain matrix products left @ right.T, into `out` or into fresh memory."""

    def step() -> None:
        for _ in range(count):
            torch.mm(left, right.T, out=out)

    return step


def unit(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator), dim=1).to(dtype)


def supcon(rows: int, width: int = 128, dtype: torch.dtype = torch.float32) -> Workload:
    """Workloads A, C, E: two views, 10 labels. The floor is 4 N^2 D: two products."""
    batch = rows // 2
    z = unit(rows, width, dtype, seed=rows)
    features = z.view(2, batch, width).transpose(0, 1).contiguous()
    labels = torch.randint(10, (batch,), generator=torch.Generator().manual_seed(1))
    partner = torch.arange(rows).roll(batch)
    expected = functools.cache(lambda: peers.exact_supcon(features, labels, TEMPERATURE, 0.07))
    ours, eager = cl_kernels.SupConLoss(TEMPERATURE), peers.EagerSupConLoss(TEMPERATURE)
    compiled = torch.compile(eager, dynamic=False)

    workload = Workload(f"SupCon {rows} x {rows} x {width}", dtype)
    add = workload.variants
    add["cl_kernels"] = Variant(differentiate(lambda x: ours(x, labels), features), expected)
    add["eager"] = Variant(differentiate(lambda x: eager(x, labels), features), expected)
    add["torch.compile"] = Variant(differentiate(lambda x: compiled(x, labels), features), expected)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        add["linear_cross_entropy"] = Variant(
            differentiate(lambda x: F.linear_cross_entropy(x / TEMPERATURE, x, partner, options=options), z),
            functools.cache(lambda: peers.exact_cross_entropy(z, partner, TEMPERATURE)),
        )
    add["floor"] = Variant(products(2, z, z, torch.empty(rows, rows, dtype=dtype)))
    add["floor, allocating"] = Variant(products(2, z, z))
    return workload


def sce(rows: int = 512, keys: int = 65536, width: int = 256, dtype: torch.dtype = torch.float32) -> Workload:
    """Workload G: a queue beside each query's own key, frozen. The floor is 8 NMD: four products."""
    q, k, queue = (unit(n, width, dtype, seed) for n, seed in ((rows, 1), (rows, 2), (keys, 3)))
    all_keys = torch.cat((k[:1], queue))
    settings = (TEMPERATURE, 0.07, 0.5)
    expected = functools.cache(lambda: peers.exact_sce(q, k, queue, *settings))
    ours = cl_kernels.SCELoss(temperature=TEMPERATURE, target_temperature=0.07, coeff=0.5)

    workload = Workload(f"SCE {rows} x {keys + 1} x {width}", dtype)
    add = workload.variants
    add["cl_kernels"] = Variant(differentiate(lambda x: ours(x, k, queue=queue), q), expected)
    add["eager"] = Variant(differentiate(lambda x: peers.eager_sce(x, k, queue, *settings), q), expected)
    add["floor"] = Variant(products(4, q, all_keys, torch.empty(rows, keys + 1, dtype=dtype)))
    add["floor, allocating"] = Variant(products(4, q, all_keys))
    return workload


def clip(rows: int = 4096, width: int = 512, dtype: torch.dtype = torch.float32) -> Workload:
    """Both axes, with the gradient of the scale. The floor is 8 N^2 D: four products."""
    image, text = unit(rows, width, dtype, 1), unit(rows, width, dtype, 2)
    scale = torch.tensor(20.0)
    expected = functools.cache(lambda: peers.exact_clip(image, text, scale))

    workload = Workload(f"CLIP {rows} x {rows} x {width}", dtype)
    add = workload.variants
    add["cl_kernels"] = Variant(differentiate(cl_kernels.clip_loss, image, text, scale), expected)
    add["eager"] = Variant(differentiate(peers.eager_clip, image, text, scale), expected)
    add["floor"] = Variant(products(4, image, text, torch.empty(rows, rows, dtype=dtype)))
    add["floor, allocating"] = Variant(products(4, image, text))
    return workload
