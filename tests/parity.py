"""Is our error at most twice that of plain torch in the same dtype?

A `Problem` is a call of a public function. `assert_parity` runs it three times: the reference in float64 (the
truth), our function, and plain torch, that is the reference with every product and sum in the dtype of the
inputs. It compares the loss and every gradient, in the maximum norm.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import cl_kernels as clk
from cl_kernels import dispatch

NORMALISING = ("nt_xent_loss", "dimcl_loss")
TEMPERATURES = ("temperature", "target_temperature", "sigma")
NOT_DIFFERENTIABLE = ("labels", "mask", "positive_mask")


@dataclass(frozen=True)
class Problem:
    """A public function by name, its tensors (with gradients unless frozen) and its other arguments."""

    function: str
    inputs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    frozen: Sequence[str] = ()

    def with_options(self, **options: Any) -> Problem:
        return Problem(self.function, self.inputs, {**self.options, **options}, self.frozen)

    def to(self, dtype: torch.dtype) -> Problem:
        """The inputs rounded to another dtype; learnable scalars and weights stay what they are."""
        cast = {name: _map(lambda x: _to(x, dtype), x) for name, x in self.inputs.items()}
        return Problem(self.function, cast, self.options, self.frozen)

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.function}({', '.join(self.inputs)}, {options})"

    @property
    def arguments(self) -> dict[str, Any]:
        parameters = inspect.signature(getattr(clk, self.function)).parameters
        return {**{name: p.default for name, p in parameters.items()}, **self.options, **self.inputs}

    @property
    def logits(self) -> float:
        """A bound of the largest |S|: with a logit known to eps |S|, so is everything made of it."""
        values = [value for name, value in self.inputs.items() if name not in NOT_DIFFERENTIABLE]
        features = [x.double() for value in values for x in _tensors(value) if x.dim() > 1]
        norm = 1.0
        if self.function not in NORMALISING:
            norm = max(float(x.flatten(min(2, x.dim() - 1)).norm(dim=-1).max()) for x in features)
        everything = self.arguments
        taus = [float(everything[name]) for name in TEMPERATURES if everything.get(name) is not None]
        return norm * norm * float(everything.get("logit_scale", 1.0)) / min(taus, default=1.0)

    @property
    def factor(self) -> float:
        """What a loss multiplies its difference of logarithms by."""
        everything = self.arguments
        if "base_temperature" not in everything:
            return 1.0
        return float(everything["temperature"]) / float(everything["base_temperature"])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list):
        yield from value


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, list):
        return [function(x) for x in value]
    return function(value) if isinstance(value, Tensor) else value


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dim() > 1 else x


def run(
    function: Callable[..., Tensor], problem: Problem, dtype: torch.dtype | None = None, device: str = "cpu"
) -> dict[str, Tensor]:
    """The loss and the gradients, by name, of every floating-point input; with `dtype`, all in that dtype."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, x: Any) -> Any:
        if isinstance(x, list):
            return [leaf(f"{name}[{i}]", part) for i, part in enumerate(x)]
        if not isinstance(x, Tensor):
            return x
        x = x.to(device)
        if not x.is_floating_point() or name in NOT_DIFFERENTIABLE:
            return x
        x = x.detach() if dtype is None else x.detach().to(dtype)
        if name in problem.frozen:
            return x
        leaves[name] = x.requires_grad_()
        return leaves[name]

    loss = function(**{name: leaf(name, x) for name, x in problem.inputs.items()}, **problem.options)
    rows = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype) if loss.dim() else torch.ones_like(loss)
    grads = torch.autograd.grad(loss, list(leaves.values()), rows.to(device))
    results = {"loss": loss.detach(), **{f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}}
    return {name: x.cpu() for name, x in results.items()}


@contextmanager
def plain_sums() -> Iterator[None]:
    """The reference without its wider sums."""
    with mock.patch.object(clk.reference, "accumulate_dtype", lambda dtype: dtype):
        yield


def exact(problem: Problem) -> dict[str, Tensor]:
    return run(getattr(clk.reference, problem.function), problem, torch.float64)


def ours(problem: Problem) -> dict[str, Tensor]:
    """On CL_KERNELS_TEST_DEVICE where kernels for GPUs serve."""
    on_gpu = dispatch.requested() in ("triton", "cuda")
    device = os.environ.get("CL_KERNELS_TEST_DEVICE", "cpu") if on_gpu else "cpu"
    return run(getattr(clk, problem.function), problem, device=device)


def plain(problem: Problem) -> dict[str, Tensor]:
    with plain_sums():
        return run(getattr(clk.reference, problem.function), problem)


def error(result: Tensor, truth: Tensor) -> float:
    difference = (result.double() - truth.double()).abs()
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


def floor(name: str, problem: Problem, truth: Tensor, dtype: torch.dtype) -> float:
    """What rounding the logits to eps |S| does to a result, so that a lucky plain torch does not matter.

    A loss is a difference of logarithms as large as |S|. A gradient is a difference of terms as large as
    1 / |x|, over the rows that a mean divides by; those of a scalar or of a soft target are as large as
    |S| / |x|, and a correlation's have the spread of a column for |x|.
    """
    eps, logits = torch.finfo(dtype).eps, problem.logits
    if name == "loss":
        return 2 * eps * (problem.factor * (1 + logits) + float(truth.abs().max()))
    x = next(
        x
        for key, value in problem.inputs.items()
        for i, x in _named(key, value)
        if f"gradient of {i}" == name
    )
    terms = problem.factor * (2 * logits if problem.function == "sce_loss" else 1.0)
    if problem.function == "dimcl_loss":
        spread = (x.double() - x.double().mean(0)).norm(dim=0)
        terms /= float(spread[spread > 1e-9].min()) if (spread > 1e-9).any() else 1.0
    else:
        terms /= float(x.double().abs().max()) or 1.0
    if x.dim() == 0:
        terms *= logits
    elif problem.options.get("reduction", "mean") == "mean":
        terms /= x.shape[0]
    return 2 * eps * (1 + logits) * (float(truth.abs().max()) + terms)


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, list):
        yield from ((f"{name}[{i}]", x) for i, x in enumerate(value))
    elif isinstance(value, Tensor):
        yield name, value


def assert_parity(problem: Problem) -> None:
    """Errors of the loss and of all gradients: at most twice those of plain torch in the same dtype, plus
    `floor`."""
    truth, mine, theirs = exact(problem), ours(problem), plain(problem)
    for name, expected in truth.items():
        result = mine[name]
        assert result.isfinite().all(), f"{problem}: {name} is not finite"
        assert result.shape == expected.shape, f"{problem}: {name} has shape {tuple(result.shape)}"
        limit = 2 * error(theirs[name], expected) + floor(name, problem, expected, theirs[name].dtype)
        found = error(result, expected)
        assert found <= limit, f"{problem}: {name} is off by {found:.3g}, allowed {limit:.3g}"


def assert_close(problem: Problem, rtol: float = 1e-9) -> None:
    """In float64: loss and gradients as the reference has them, relative to the largest element."""
    truth, mine = exact(problem), run(getattr(clk, problem.function), problem, torch.float64)
    for name, expected in truth.items():
        assert mine[name].dtype == torch.float64
        limit = rtol * (1 + problem.logits) * max(float(expected.abs().max()), 1.0)
        assert error(mine[name], expected) <= limit, (
            f"{problem}: {name} is off by {error(mine[name], expected):.3g}"
        )


# Inputs


def unit(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def near(x: Tensor, cosine: float = 0.99) -> Tensor:
    """Unit vectors at about this cosine from those of x; x itself where there is one dimension only."""
    noise = torch.randn_like(x)
    noise = noise - (noise * x).sum(-1, keepdim=True) * x
    return F.normalize(cosine * x + (1 - cosine**2) ** 0.5 * F.normalize(noise, dim=-1), dim=-1)


def two_views(kind: str, n: int, d: int) -> tuple[Tensor, Tensor]:
    """A pair of [n, d], both with unit rows unless the kind says otherwise."""
    first = unit(n, d)
    second = near(first) if kind == "converged" else unit(n, d)
    if kind == "duplicates":
        first[n // 2 :] = first[: n - n // 2]
        second[n // 2 :] = first[: n - n // 2]
    elif kind == "zero rows":
        first[::3] = 0
        second[1::4] = 0
    elif kind == "norm 30":
        first, second = 30 * first, 30 * second
    elif kind == "identical":
        first[:] = first[0]
        second[:] = first[0]
    return first, second


KINDS = ("random", "converged", "duplicates", "zero rows", "norm 30", "identical")


def problems(kind: str, n: int, d: int) -> list[Problem]:
    """One problem for each loss and each way that it is served."""
    first, second = two_views(kind, n, d)
    features = torch.stack([first, second], dim=1)
    labels = torch.arange(n) % max(1, n // 3)
    if kind == "converged":
        features = near(unit(max(1, n // 3), d)[labels][:, None].expand(n, 2, d).contiguous())
    weights = torch.rand(n, n) * (torch.rand(n, n) > 0.6)
    queue = torch.cat(
        [
            unit(2 * n + 3, d) * float(first.norm(dim=1).max()),
            second if kind == "duplicates" else near(second, 0.8),
        ]
    )
    wider = torch.cat([features, features.flip(1)], dim=2)
    found = [
        Problem("supcon_loss", {"features": torch.stack([first, second], dim=1)}),
        Problem("supcon_loss", {"features": features, "labels": labels}),
        Problem("supcon_loss", {"features": features, "labels": labels}, {"contrast_mode": "one"}),
        Problem("supcon_loss", {"features": features, "labels": labels}, {"denominator": "only_negatives"}),
        Problem("supcon_loss", {"features": features, "labels": labels}, {"summation": "in"}),
        Problem("supcon_loss", {"features": features, "mask": weights}),
        Problem("selfcon_loss", {"features": features, "labels": labels}, {"anchors": "exits"}),
        Problem("multilevel_loss", {"levels": [features, wider], "labels": labels}, {"weights": [1.0, 0.5]}),
        Problem("nt_xent_loss", {"z0": first, "z1": second}),
        Problem("info_nce_loss", {"q": first, "k": second}),
        Problem("info_nce_loss", {"q": first, "k": second, "queue": queue}),
        Problem("dcl_loss", {"z0": first, "z1": second}),
        Problem("dcl_loss", {"z0": first, "z1": second}, {"sigma": 0.5}),
        Problem("sce_loss", {"q": first, "k": second}, {"coeff": 0.3}),
        Problem("sce_loss", {"q": first, "k": second, "k_global": queue.flip(0)}, {"coeff": 0.3, "rank": 1}),
        Problem("sce_loss", {"q": first, "k": second, "queue": queue}, {"coeff": 0.3}),
        Problem(
            "sce_loss",
            {"q": first, "k": second, "k_global": second, "queue": queue},
            {"coeff": 0.3},
            frozen=("k", "k_global", "queue"),
        ),
    ]
    if n > 1:
        found.append(Problem("dimcl_loss", {"z0": first, "z1": second}))
    return found


def tempered(problem: Problem, tau: float) -> Problem:
    """The problem at a temperature; for CLIP at its inverse."""
    extra = {"target_temperature": 0.7 * tau} if problem.function == "sce_loss" else {}
    return problem.with_options(temperature=tau, **extra)


def clip_problem(kind: str, n: int, d: int, scale: float) -> Problem:
    first, second = two_views(kind, n, d)
    return Problem(
        "clip_loss",
        {"image_features": first, "text_features": second, "logit_scale": torch.tensor(scale)},
    )
