"""SCE with a momentum encoder and a queue, which is the same on every process:

torchrun --nproc-per-node 2 examples/distributed_sce.py
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from processes import join, leave, parts
from torch.nn.parallel import DistributedDataParallel
from training import WIDTH, Encoder, accuracy, augment, load_digits

import cl_kernels as clk


def main(steps: int = 40, batch: int = 256, momentum: float = 0.99) -> None:
    device = join()
    data = load_digits()
    torch.manual_seed(0)
    online = Encoder().to(device)
    target = copy.deepcopy(online).requires_grad_(False)
    model = DistributedDataParallel(online)
    queue = clk.KeyQueue(1024, WIDTH, group=dist.group.WORLD).to(device)
    criterion = clk.SCELoss(temperature=0.1, target_temperature=0.05, group=dist.group.WORLD)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for chosen in parts(len(data.train_images), batch, steps):
        images = data.train_images[chosen].to(device)
        k = target(augment(images))
        loss = criterion(model(augment(images)), k, queue=queue)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue.enqueue(k)
        with torch.no_grad():
            for old, new in zip(target.parameters(), online.parameters(), strict=True):
                old.lerp_(new, 1 - momentum)
    nearest, _ = accuracy(online.cpu(), data)
    leave(f"last loss {loss.item():.3f}, queue of {len(queue)}, nearest neighbours {nearest:.1%}")


if __name__ == "__main__":
    main()
