"""SupCon on handwritten digits, a batch over all processes:

torchrun --nproc-per-node 2 examples/distributed_supcon.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from processes import join, leave, parts
from torch.nn.parallel import DistributedDataParallel
from training import WIDTH, Encoder, accuracy, augment, load_digits

import cl_kernels as clk


def main(steps: int = 40, batch: int = 256) -> None:
    device = join()
    data = load_digits()
    torch.manual_seed(0)
    encoder = Encoder().to(device)
    model = DistributedDataParallel(encoder)
    criterion = clk.SupConLoss(temperature=0.1, group=dist.group.WORLD)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for chosen in parts(len(data.train_images), batch, steps):
        images, labels = data.train_images[chosen].to(device), data.train_labels[chosen].to(device)
        z = model(torch.cat((augment(images), augment(images))))
        loss = criterion(z.view(2, -1, WIDTH).transpose(0, 1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    nearest, _ = accuracy(encoder.cpu(), data)
    leave(f"last loss {loss.item():.3f}, nearest neighbours {nearest:.1%}")


if __name__ == "__main__":
    main()
