"""LARS, stochastic gradient descent for large batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017, algorithm 1).

    A weight w with gradient g and momentum buffer v takes the step w' = w - v', where

        v' = m v + lr · trust · ‖w‖ / (‖g‖ + β ‖w‖) · (g + β w)

    with momentum m and weight decay β; the ratio is 1 where either norm is 0. Parameters of fewer than two
    dimensions (biases, norms) are neither adapted nor decayed, as in SimCLR and BYOL: v' = m v + lr · g.
    SimCLR's code divides by ‖g + β w‖.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        for name, value in defaults.items():
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            decay = group["weight_decay"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                g = w.grad
                if w.ndim > 1:
                    size, slope = w.norm(), g.norm()
                    ratio = group["trust"] * size / (slope + decay * size)
                    g = g.add(w, alpha=decay) * torch.where((size > 0) & (slope > 0), ratio, 1.0)
                if "momentum" not in self.state[w]:
                    self.state[w]["momentum"] = torch.zeros_like(w)
                v = self.state[w]["momentum"]
                v.mul_(group["momentum"]).add_(g, alpha=group["lr"])
                w.sub_(v)
        return loss
