"""Two towers for the left and the right halves of handwritten digits, as CLIP's for images and texts:

torchrun --nproc-per-node 2 examples/distributed_clip.py
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import join, leave, parts
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import Encoder, augment, load_digits

import cl_kernels as clk


class Towers(nn.Module):
    """Both towers, and the scale of the logits, which is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Encoder(), Encoder()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left, right = (F.interpolate(half, (8, 8)) for half in images.split(4, dim=3))
        return self.left(left), self.right(right), self.log_scale.exp()


def main(steps: int = 200, batch: int = 256) -> None:
    device = join()
    data = load_digits()
    torch.manual_seed(0)
    towers = Towers().to(device)
    model = DistributedDataParallel(towers)
    criterion = clk.ClipLoss(group=dist.group.WORLD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for chosen in parts(len(data.train_images), batch, steps):
        loss = criterion(*model(augment(data.train_images[chosen].to(device))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        left, right, scale = towers.eval()(data.test_images.to(device))
    found = (left @ right.T).argmax(1) == torch.arange(len(left), device=device)
    leave(
        f"last loss {loss.item():.3f}, scale {scale.item():.1f}, the right half first of "
        f"{len(left)}: {found.float().mean().item():.1%}"
    )


if __name__ == "__main__":
    main()
