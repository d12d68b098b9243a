"""Momentum encoders (He et al., 2020), and values that change along half a cosine."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def follower(online: M) -> M:
    """Copy of a module that gradients do not train."""
    return copy.deepcopy(online).requires_grad_(False)


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Move the target's parameters towards the online ones: w' = m w' + (1 - m) w; buffers are its own."""
    pairs = zip(target.parameters(), online.parameters(), strict=True)
    for old, new in pairs:
        old.lerp_(new, 1 - momentum)


def cosine(start: float, end: float, progress: float) -> float:
    """Value on half a cosine from `start` at progress 0 to `end` at 1, and `end` from there on."""
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
