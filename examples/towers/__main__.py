"""Two towers (CLIP: Radford et al., 2021), on names in two languages in the place of images and texts.

One tower reads the English name of an emoji, the other its name in another language, each from n-grams of its
characters; the loss tells, in a batch, which names belong together, and the scale of its logits is learnt.
Then names are looked up that were held out, with all that differ from them in skin tones only.

    python -m examples.towers [--preset cpu | paper] [--language es fr de] [--methods clip supcon] [--help]
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cl_kernels as clk
from cl_kernels.bench import eager

from ..common import processes
from ..common.augment import Draw
from ..common.data import Data
from ..common.encoders import Encoder
from ..common.evaluate import Evaluation, features
from ..common.loop import Method
from ..common.run import Recipe
from .names import TONED, load
from .presets import PRESETS, TowersSettings

LARGEST = 100.0  # scale


class Tower(Encoder):
    """Linear projection of the mean embedding of a name's n-grams: code points int64 [B, L] to [B, D]."""

    def __init__(self, settings: TowersSettings) -> None:
        super().__init__()
        self.grams, self.buckets = settings.grams, settings.buckets
        self.embedding = nn.EmbeddingBag(settings.buckets, settings.width, mode="mean", padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.norm = nn.LayerNorm(settings.width)
        self.head = nn.Linear(settings.width, settings.projection)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(hashes(codes, self.grams, self.buckets))))


def hashes(codes: Tensor, grams: int, buckets: int) -> Tensor:
    """Numbers in [1, buckets) of the n-grams of 1 to `grams` code points, 0 for those with a 0 among them."""
    found, start = [], torch.zeros_like(codes)
    whole = torch.ones_like(codes, dtype=torch.bool)
    for n in range(min(grams, codes.shape[1])):
        last = codes[:, n:]
        start, whole = start[:, : last.shape[1]], whole[:, : last.shape[1]] & (last > 0)
        start = (start * 1_000_003 + last + 1) % (2**31 - 1)
        found.append(torch.where(whole, 1 + start % (buckets - 1), 0))
    return torch.cat(found, 1)


class TwoTowers(Method):
    """A tower for the first language, and one for the others."""

    def __init__(self, settings: TowersSettings, data: Data) -> None:
        super().__init__()
        self.columns = data.train.columns(settings.language)
        self.towers = nn.ModuleList(Tower(settings) for _ in range(2))
        self.dropout = settings.dropout

    def decayed(self, parameter: nn.Parameter) -> bool:
        return parameter.ndim > 1  # not gains, biases and the scale

    def views(self, names: Tensor, draw: Draw) -> Tensor:
        """Unit rows [B, 1 + languages, D] of code points [B, V, L] without a random part of them."""
        names = names[:, self.columns]
        return self.embed(names * (draw.uniform(0, 1, *names.shape[1:]) >= self.dropout))

    def encode(self, names: Tensor) -> Tensor:
        """Unit rows [B, 1 + languages, D] of code points [B, V, L]."""
        return self.embed(names[:, self.columns])

    def embed(self, names: Tensor) -> Tensor:
        first, others = self.towers[0](names[:, 0]), self.towers[1](names[:, 1:].flatten(0, 1))
        z = torch.cat([first[:, None], others.unflatten(0, (len(names), -1))], 1)
        return F.normalize(z.float(), dim=2)


class CLIP(TwoTowers):
    """Paper's loss, figure 3: cross-entropy both ways with a learnt scale, the mean over other languages."""

    def __init__(self, settings: TowersSettings, data: Data) -> None:
        super().__init__(settings, data)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if settings.formula == "eager":
            self.criterion = partial(eager.clip, 1.0)
        else:
            self.criterion = clk.ClipLoss(group=processes.group(), exchange=settings.exchange)

    def forward(self, names: Tensor, labels: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        first, *others = self.views(names, draw).unbind(1)
        scale = self.log_scale.exp()
        losses = [self.criterion(first, other, scale) for other in others]
        return torch.stack(losses).mean(), {"scale": scale}

    def after_step(self, progress: float) -> None:
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(LARGEST))


class SupCon(TwoTowers):
    """A relative of fixed temperature: all names of an emoji are positives of each other, as views are."""

    def __init__(self, settings: TowersSettings, data: Data) -> None:
        super().__init__(settings, data)
        if settings.formula == "eager":
            self.criterion = partial(eager.supcon, settings.temperature)
        else:
            group, exchange = processes.group(), settings.exchange
            self.criterion = clk.SupConLoss(settings.temperature, group=group, exchange=exchange)

    def forward(self, names: Tensor, labels: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.views(names, draw)
        own = torch.arange(len(z), device=z.device) + len(z) * processes.rank()
        return self.criterion(z, own), {}


METHODS = {"clip": CLIP, "supcon": SupCon}


def build(settings: TowersSettings, name: str, data: Data) -> Method:
    return METHODS[name](settings, data)


def ranks(x: Tensor, x_names: Tensor, y: Tensor, y_names: Tensor) -> Tensor:
    """Place, from 0, of the best right answer among the different y for each different x.

    Rows of x, y [N, D] embed the names [N, L] of N things; right for a name is each name of a thing that
    bears it. A wrong answer that is as near as the best right one comes before it.
    """
    (_, own_x), (_, own_y) = (names.unique(dim=0, return_inverse=True) for names in (x_names, y_names))
    size = int(own_x.max()) + 1, int(own_y.max()) + 1
    right = torch.zeros(size, dtype=torch.bool).index_put_((own_x, own_y), torch.tensor(True))
    near = torch.zeros(size).index_put_((own_x[:, None], own_y), x @ y.T)
    best = near.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((near >= best) & ~right).sum(1)


def recall(x: list[Tensor], y: list[Tensor], k: int) -> float:
    """Part of the names x (rows and names) that have a right answer among the k nearest names y."""
    return float((ranks(*x, *y) < k).double().mean())


def evaluate(method: TwoTowers, data: Data) -> Evaluation:
    """Recall at 1 and 5 among the names held out, both ways, at 1 among those without a skin tone too."""
    names, labels = data.test[torch.arange(len(data.test))], data.test.labels
    z, plain = features(method.encode, data.test, method.device), labels != TONED
    languages = [(data.test.languages[c], z[:, i], names[:, c]) for i, c in enumerate(method.columns)]
    first = languages[0]
    figures: dict[str, float] = {}
    for other in languages[1:]:
        for (a, *x), (b, *y) in ((first, other), (other, first)):
            figures |= {f"{a} to {b} at {k}": recall(x, y, k) for k in (1, 5)}
            if not plain.all():
                figures[f"{a} to {b} at 1, no tones"] = recall(
                    [t[plain] for t in x], [t[plain] for t in y], 1
                )
    if isinstance(method, CLIP):
        figures["temperature"] = math.exp(-method.log_scale.item())
    return Evaluation(figures, z[:, 0], labels)


RECIPE = Recipe("towers", __doc__, PRESETS, build, evaluate, load)

if __name__ == "__main__":
    RECIPE.main()
