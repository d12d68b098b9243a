"""Self-contrastive learning (Bae et al., 2023).

A network has exits after inner stages. Each exit, a small sub-network, gives features as wide as the
backbone's and has a projection head of its own; the loss contrasts the rows of exits and backbone by their
labels, as SupCon does those of two views. So one view of an image is enough, and a step costs about half
of SupCon's.

    python -m examples.selfcon [--preset cpu | paper | paper-imagenet] [--methods selfcon-s supcon] [--help]
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cl_kernels as clk

from ..common import processes
from ..common.augment import Draw, supervised
from ..common.data import Data
from ..common.encoders import BLOCKS, Block, ResNet, initialise, mlp, pool
from ..common.evaluate import Evaluation, Probe, accuracy, classification, features
from ..common.loop import Method
from ..common.run import Recipe
from ..supcon.__main__ import CrossEntropy, SimCLR, SupCon
from .formula import Loss, augmentations, eager_loss
from .presets import PRESETS, SelfConSettings

MEASURED = 250  # images of the step whose memory is measured


class Exit(nn.Sequential):
    """Sub-network: maps of a stage to features [B, width of the last stage]."""

    def __init__(self, encoder: ResNet, stage: int, settings: SelfConSettings) -> None:
        super().__init__()
        inputs, bottleneck = encoder.widths[stage - 1], settings.depth >= 50
        if settings.exit == "fc":
            self.extend([Pool(), nn.Linear(inputs, encoder.widths[-1])])
            return
        for i in range(stage, len(encoder.widths)):
            blocks = BLOCKS[settings.depth][i]
            if settings.exit == "small":
                blocks = max(blocks // 2, 1)
            for j in range(blocks):
                self.append(Block(inputs, settings.width << i, 1 if j else 2, bottleneck))
                inputs = encoder.widths[i]
        self.append(Pool())
        initialise(self)


class Pool(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return pool(maps)


class SelfCon(Method):
    """Backbone and exits, a projection head each, under a loss over all of their rows."""

    def __init__(self, settings: SelfConSettings, name: str, data: Data) -> None:
        super().__init__()
        stages = settings.exits
        if not stages or len({*stages}) < len(stages) or not {*stages} <= {1, 2, 3}:
            raise ValueError(f"exits must be different stages of 1, 2, 3, got {list(stages)}")
        self.encoder = ResNet(data.channels, settings)
        self.stages = [stage - 1 for stage in stages]
        self.exits = nn.ModuleList(Exit(self.encoder, stage, settings) for stage in stages)
        width = self.encoder.widths[-1]
        head = partial(mlp, width, width, settings.projection, norm=settings.norm, last_norm=settings.norm)
        self.heads = nn.ModuleList(head() for _ in range(len(stages) + 1))
        self.augment = supervised(data.shape)
        self.views = augmentations(name)
        self.criterion = (eager_loss if settings.formula == "eager" else loss)(settings, name)

    def forward(self, images: Tensor, labels: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        views = torch.cat([self.augment(images, draw) for _ in range(self.views)])
        z = [head(x) for head, x in zip(self.heads, self.outputs(views), strict=True)]
        return self.criterion(F.normalize(torch.stack(z, 1).float(), dim=2), labels), {}

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Features [B, width] of the exits and, last, of the backbone."""
        maps = self.encoder(images)
        exits = [leave(maps[stage]) for leave, stage in zip(self.exits, self.stages, strict=True)]
        return [*exits, pool(maps[-1])]

    def encode(self, images: Tensor) -> Tensor:
        return pool(self.encoder(images)[-1])


def loss(settings: SelfConSettings, name: str) -> Loss:
    """S, M: SupCon over all rows; SU, MU: without labels; S*, M*: over the backbone's rows alone, and α times
    of the exits' anchors."""
    selfcon = partial(
        clk.selfcon_loss,
        temperature=settings.temperature,
        augmentations=augmentations(name),
        group=processes.group(),
        exchange=settings.exchange,
    )
    if name.endswith("u"):
        return lambda features, labels: selfcon(features)
    if not name.endswith("a"):
        return selfcon

    def weighted(features: Tensor, labels: Tensor) -> Tensor:
        backbone = selfcon(features[:, -1:], labels, no_positive="drop")
        return backbone + settings.alpha * selfcon(features, labels, anchors="exits")

    return weighted


BASELINES = {"supcon": SupCon, "simclr": SimCLR, "cross-entropy": CrossEntropy}


def build(settings: SelfConSettings, name: str, data: Data) -> Method:
    return BASELINES.get(name, SelfCon)(settings, name, data)


def evaluate(method: Method, data: Data) -> Evaluation:
    """The backbone as for SupCon; a probe on each exit, the mean of all probabilities; memory of a step."""
    found = classification(method, data, corruptions=True)
    if isinstance(method, SelfCon):
        found.figures.update(ensemble(method, data))
    if processes.count() == 1:
        found.figures["saved MB"] = saved_bytes(method, data) / 1e6
    return found


def ensemble(method: SelfCon, data: Data) -> dict[str, float]:
    def encode(images: Tensor) -> Tensor:
        return torch.stack(method.outputs(images), 1)

    train, test = (features(encode, x, method.device).unbind(1) for x in (data.train, data.test))
    probes = [Probe(x, data.train.labels, data.classes) for x in train]
    probabilities = [probe.probabilities(x) for probe, x in zip(probes, test, strict=True)]
    figures = {
        f"exit {stage + 1}": accuracy(p, data.test.labels)
        for stage, p in zip(method.stages, probabilities, strict=False)
    }
    return figures | {"ensemble": accuracy(torch.stack(probabilities).mean(0), data.test.labels)}


def saved_bytes(method: Method, data: Data) -> int:
    """Bytes that a step of MEASURED images keeps for its backward pass, in float32, without the weights."""
    rows = torch.arange(min(MEASURED, len(data.train)))
    images, labels = data.train[rows].to(method.device), data.train.labels[rows].to(method.device)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    method.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step = method(images, labels, Draw(0, 0, len(rows), device=method.device))  # keeps what is counted
    method.eval()
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
    assert step[0].requires_grad
    return sum(size for storage, size in kept.items() if storage not in weights)


RECIPE = Recipe("selfcon", __doc__, PRESETS, build, evaluate)

if __name__ == "__main__":
    RECIPE.main()
