"""Judgement of exactness: is our error at most twice that of plain torch in the same dtype?

A `Problem` is a call of a public function. It runs three times: by the reference in float64 (`exact`, the
truth), by our function (`run`), and by plain torch (`plain`), that is the reference with every product and
sum in the dtype of the inputs. `compared` holds the loss and every gradient against a limit, in the maximum
norm.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference

PACKAGE = importlib.import_module("..", __package__)
"""The package itself, by whatever name it was imported."""

NORMALISING = ("nt_xent_loss", "dimcl_loss", "stablerep_loss")
TEMPERATURES = ("temperature", "target_temperature", "sigma")
SCALES = ("logit_scale", "scale", "target_scale")
SOFT_TARGETS = ("sce_loss", "soft_target_cross_entropy")
NOT_REDUCED = ("similarity", "masked_log_softmax", "contrastive_lse")
NOT_DIFFERENTIABLE = ("labels", "key_labels", "mask", "positive_mask")


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
        """The inputs rounded to another dtype; learnable scalars, weights and biases stay what they are."""
        cast = {name: _map(lambda x: _to(x, dtype), x) for name, x in self.inputs.items()}
        return Problem(self.function, cast, self.options, self.frozen)

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.function}({', '.join(self.inputs)}, {options})"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every input by name; those of a list as name[i]."""
        found: dict[str, Tensor] = {}
        for name, value in self.inputs.items():
            parts = (
                {f"{name}[{i}]": x for i, x in enumerate(value)} if isinstance(value, list) else {name: value}
            )
            found |= {part: x for part, x in parts.items() if isinstance(x, Tensor)}
        return found

    @property
    def arguments(self) -> dict[str, Any]:
        parameters = inspect.signature(getattr(PACKAGE, self.function)).parameters
        return {**{name: p.default for name, p in parameters.items()}, **self.options, **self.inputs}

    @property
    def logits(self) -> float:
        """A bound of the largest |S|: with a logit known to eps |S|, so is everything made of it."""
        everything = self.arguments
        if "logits" in everything:
            return _largest(everything["logits"])
        differentiable = [x for name, x in self.tensors.items() if name not in NOT_DIFFERENTIABLE]
        features = [x.double() for x in differentiable if x.dim() > 1]
        norm = 1.0
        if self.function not in NORMALISING and not everything.get("normalize"):
            norm = max(float(x.flatten(min(2, x.dim() - 1)).norm(dim=-1).max()) for x in features)
        taus = [float(everything[name]) for name in TEMPERATURES if everything.get(name) is not None]
        scales = [abs(float(everything[name])) for name in SCALES if name in everything]
        bias = everything.get("key_bias")
        products = norm * norm * max(scales, default=1.0) / min(taus, default=1.0)
        return products if bias is None else products + _largest(bias)

    @property
    def factor(self) -> float:
        """The factor of a loss's difference of logarithms; over levels, their weights together."""
        everything = self.arguments
        factor = 1.0
        if "base_temperature" in everything:
            factor = float(everything["temperature"]) / float(everything["base_temperature"])
        if self.function != "multilevel_loss":
            return factor
        weights = everything["weights"]
        levels = len(everything["levels"]) if weights is None else sum(abs(float(w)) for w in weights)
        return factor * levels

    @property
    def averaged(self) -> bool:
        """Whether the result is a mean over rows."""
        return self.function not in NOT_REDUCED and self.options.get("reduction", "mean") == "mean"

    @property
    def summed(self) -> int:
        """The number of rows that a sum adds up, which is as many times the mean; 1 without a sum."""
        if self.options.get("reduction") != "sum":
            return 1
        x = next(iter(self.tensors.values()))
        if self.function == "dimcl_loss":
            return 2 * x.shape[1]
        rows = x.shape[:2].numel() if x.dim() > 2 else x.shape[0]
        return 2 * rows if self.function == "nt_xent_loss" else rows


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, list):
        return [function(x) for x in value]
    return function(value) if isinstance(value, Tensor) else value


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dim() > 1 else x


def _largest(x: Tensor) -> float:
    """The largest finite |element|, 0 if there is none."""
    sizes = x.detach().double().abs()
    return float(sizes.masked_fill(~sizes.isfinite(), 0.0).max()) if x.numel() else 0.0


def run(
    function: Callable[..., Any],
    problem: Problem,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """The loss (whatever the function returns) and the gradients, by name, of every floating-point input;
    with `dtype`, all in that dtype."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, x: Any, frozen: bool) -> Any:
        if isinstance(x, list):
            return [leaf(f"{name}[{i}]", part, frozen) for i, part in enumerate(x)]
        if not isinstance(x, Tensor):
            return x
        x = x.to(device)
        if not x.is_floating_point() or name in NOT_DIFFERENTIABLE:
            return x
        x = x.detach() if dtype is None else x.detach().to(dtype)
        if frozen:
            return x
        leaves[name] = x.requires_grad_()
        return leaves[name]

    inputs = {name: leaf(name, x, name in problem.frozen) for name, x in problem.inputs.items()}
    result = function(**inputs, **problem.options)
    loss = torch.cat(result) if isinstance(result, tuple) else result
    grads = torch.autograd.grad(loss, list(leaves.values()), _upstream(loss))
    results = {"loss": loss.detach(), **{f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}}
    return {name: x.cpu() for name, x in results.items()}


def _upstream(loss: Tensor) -> Tensor:
    """The gradient of a loss: 1, or for several elements numbers in [0.5, 1.5] that every dtype holds."""
    if loss.dim() == 0:
        return torch.ones_like(loss)
    eighths = torch.arange(loss.numel(), device=loss.device) % 9 + 4
    return (eighths / 8).to(loss.dtype).view(loss.shape)


def exact(problem: Problem, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    return run(getattr(reference, problem.function), problem, torch.float64, device)


def plain(problem: Problem, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    with reference.plain_sums():
        return run(getattr(reference, problem.function), problem, device=device)


def error(result: Tensor, truth: Tensor) -> float:
    """The largest difference; an infinity differs by 0 from itself, NaN by infinity from everything."""
    difference = (result.double() - truth.double()).abs().masked_fill(result == truth, 0.0)
    return float(difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) if difference.numel() else 0.0


def floor(name: str, problem: Problem, truth: Tensor, dtype: torch.dtype) -> float:
    """The error that rounding the logits to eps |S| makes in a result: a lucky plain torch does not matter.

    A loss is a difference of logarithms as large as |S|, a sum has one for each row. A gradient is a
    difference of terms as large as 1 / |x|, over the rows that a mean divides by; those of a scalar or of a
    soft target are as large as |S| / |x|, and a correlation's have the spread of a column for |x|.
    """
    eps, logits = torch.finfo(dtype).eps, problem.logits
    if name == "loss":
        return 2 * eps * (problem.summed * problem.factor * (1 + logits) + _largest(truth))
    x = problem.tensors[name.removeprefix("gradient of ")]
    terms = problem.factor * (2 * logits if problem.function in SOFT_TARGETS else 1.0)
    if problem.function == "dimcl_loss":
        spread = (x.double() - x.double().mean(0)).norm(dim=0)
        terms /= float(spread[spread > 1e-9].min()) if (spread > 1e-9).any() else 1.0
    else:
        terms /= _largest(x) or 1.0
    if x.dim() == 0:
        terms *= logits * problem.summed
    elif problem.averaged:
        valid = problem.inputs.get("valid")
        terms /= x.shape[0] if valid is None else max(1, int(valid.sum()))
    return 2 * eps * (1 + logits) * (_largest(truth) + terms)


class Compared(NamedTuple):
    """A loss or a gradient beside the truth."""

    name: str
    error: float
    limit: float
    size: float  # of the truth's largest element
    fault: str | None  # why it fails

    @property
    def relative(self) -> float:
        """The error over the truth's largest element; as it is where the truth is 0."""
        return self.error / self.size if self.size else self.error

    @property
    def share(self) -> float:
        """The error over the limit."""
        return self.error / self.limit if self.limit else float("inf" if self.error else 0.0)


def compared(
    problem: Problem, truth: dict[str, Tensor], ours: dict[str, Tensor], theirs: dict[str, Tensor]
) -> list[Compared]:
    """Errors of the loss and of all gradients: at most twice those of plain torch in the same dtype
    (`theirs`), plus `floor`."""

    def limit(name: str) -> float:
        dtypes = theirs[name].dtype, theirs["loss"].dtype  # of the result, and of the logits
        coarser = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        return 2 * error(theirs[name], truth[name]) + floor(name, problem, truth[name], coarser)

    return [_compared(name, truth[name], ours[name], limit(name)) for name in truth]


def compared_in_float64(
    problem: Problem, truth: dict[str, Tensor], ours: dict[str, Tensor], rtol: float = 1e-9
) -> list[Compared]:
    """Errors in float64, where the truth has no digits to spare: relative to the largest element."""

    def limit(name: str) -> float:
        return rtol * (1 + problem.logits) * max(_largest(truth[name]), 1.0)

    return [_compared(name, truth[name], ours[name], limit(name)) for name in truth]


def _compared(name: str, truth: Tensor, ours: Tensor, limit: float) -> Compared:
    size = _largest(truth)
    if ours.shape != truth.shape:
        fault = f"{name} has shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
        return Compared(name, float("inf"), limit, size, fault)
    found = error(ours, truth)
    if not torch.equal(ours.isfinite(), truth.isfinite()):
        return Compared(name, found, limit, size, f"{name} is not finite where the truth is, or the reverse")
    excess = None if found <= limit else f"{name} is off by {found:.3g}, allowed {limit:.3g}"
    return Compared(name, found, limit, size, excess)


def unit(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random unit vectors along the last dimension."""
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def near(x: Tensor, cosine: float = 0.99) -> Tensor:
    """Unit vectors at about this cosine from those of x; x itself where there is one dimension only."""
    noise = torch.randn_like(x)
    noise = noise - (noise * x).sum(-1, keepdim=True) * x
    return F.normalize(cosine * x + (1 - cosine**2) ** 0.5 * F.normalize(noise, dim=-1), dim=-1)


def clustered(labels: Tensor, views: int, width: int) -> Tensor:
    """Features [B, views, width] of a converged model: unit vectors near one centre for each label."""
    centres = unit(int(labels.max()) + 1, width)
    return near(centres[labels][:, None].expand(-1, views, -1).contiguous())
