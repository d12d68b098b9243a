"""Residual networks that give every stage's output, projection heads, and a batch norm over processes."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives

from . import processes
from .settings import Settings

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with the statistics of all processes' rows, [N, C] or [N, C, H, W]; each has as many rows.

    torch's SyncBatchNorm does the same, on GPUs only.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"input must be [N, C] or [N, C, H, W], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        world = processes.count()
        if world == 1 or not self.training:
            return super().forward(input)
        x = input.float()
        axes = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        group = processes.group()
        mean = collectives.all_reduce(x.mean(axes), "sum", group) / world
        centred = x - mean.view(shape)
        variance = collectives.all_reduce(centred.square().mean(axes), "sum", group) / world
        n = world * x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_(variance.to(self.running_var) * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        x = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x.to(input.dtype)


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, BatchNorm(outputs))


class Block(nn.Module):
    """Basic block, or with `bottleneck` one whose output is four times as wide as its 3 × 3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            layers = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            layers = [(inputs, width, 3, stride), (width, width, 3, 1)]
        self.layers = nn.ModuleList(convolution(*layer) for layer in layers)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers[:-1]:
            y = F.relu(layer(y))
        return F.relu(self.layers[-1](y) + self.shortcut(x))


class Encoder(nn.Module):
    """Base of the networks that --compile compiles."""


class ResNet(Encoder):
    """Residual network of four stages (He et al., 2016): images [B, C, H, W] in [0, 1] to their feature maps.

    `widths` are the channels of the stages' outputs; `pool` makes features [B, width] of one.
    """

    def __init__(self, channels: int, settings: Settings) -> None:
        super().__init__()
        bottleneck = settings.depth >= 50
        widths = [settings.width << i for i in range(4)]
        self.widths = [4 * w if bottleneck else w for w in widths]
        kernel, stride = {"small": (3, 2), "cifar": (3, 1), "imagenet": (7, 2)}[settings.stem]
        self.stem = nn.Sequential(convolution(channels, widths[0], kernel, stride), nn.ReLU())
        if settings.stem == "imagenet":
            self.stem.append(nn.MaxPool2d(3, 2, 1))
        self.stages = nn.ModuleList()
        for i, (blocks, width) in enumerate(zip(BLOCKS[settings.depth], widths, strict=True)):
            inputs = self.widths[i - 1] if i else widths[0]
            first = Block(inputs, width, 2 if i else 1, bottleneck)
            rest = (Block(self.widths[i], width, 1, bottleneck) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(first, *rest))
        initialise(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(((images - 0.5) / 0.25).contiguous(memory_format=torch.channels_last))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def initialise(network: nn.Module) -> None:
    """Draw the weights of convolutions as He et al. (2015) do."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def pool(maps: Tensor) -> Tensor:
    """Mean over the places of feature maps [B, C, H, W]: [B, C]."""
    return maps.mean((2, 3))


def mlp(*widths: int, norm: bool = False, last_norm: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them; `norm`: batch norm before each; `last_norm`: one at the end."""
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(inputs, outputs, bias=not (norm and i < last)))
        if (norm and i < last) or (last_norm and i == last):
            layers.append(BatchNorm(outputs))
        if i < last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class Projected(nn.Module):
    """Encoder and projection head: images to projections [B, D]."""

    def __init__(self, encoder: ResNet, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def encode(self, images: Tensor) -> Tensor:
        """Features [B, width] of the last stage."""
        return pool(self.encoder(images)[-1])

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encode(images))
