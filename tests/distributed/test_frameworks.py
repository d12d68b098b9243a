"""Training loops of other libraries, as docs/distributed.md shows them: the weights are one process's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cl_kernels as clk

DATA = """
import sys
import torch
import cl_kernels as clk

STEPS = 3
torch.manual_seed(0)
images, labels = torch.randn(16, 2, 7, dtype=torch.float64), torch.arange(16) % 5
linear, norm = torch.nn.Linear(7, 6, dtype=torch.float64), torch.nn.RMSNorm(6, elementwise_affine=False)
model, weight = torch.nn.Sequential(linear, norm), linear.weight
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
"""

ACCELERATE = f"""{DATA}
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
criterion = clk.SupConLoss(temperature=0.1, group=group)
for epoch in range(STEPS):
    for images, labels in loader:
        accelerator.backward(criterion(model(images), labels))
        optimizer.step()
        optimizer.zero_grad()
torch.save((group is not None, weight.detach()), sys.argv[1])
accelerator.end_training()
"""

LIGHTNING = f"""{DATA}
import lightning


class Learner(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = model

    def setup(self, stage):
        group = torch.distributed.group.WORLD if self.trainer.world_size > 1 else None
        self.criterion = clk.SupConLoss(temperature=0.1, group=group)

    def training_step(self, batch, index):
        images, labels = batch
        return self.criterion(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


learner = Learner()
trainer = lightning.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=STEPS, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(learner, loader)
torch.save((learner.criterion.group is not None, weight.detach()), sys.argv[1])
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(("library", "script"), [("accelerate", ACCELERATE), ("lightning", LIGHTNING)])
def test_two_processes_train_as_one(library: str, script: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    (tmp_path / "train.py").write_text(script)
    processes = []
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    for rank in range(2):
        place = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "train.py", str(tmp_path / f"{rank}.pt")]
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=os.environ | place))
    assert [process.wait(timeout=120) for process in processes] == [0, 0]

    here: dict[str, Any] = {}
    exec(DATA, here)
    model, images, labels = here["model"], here["images"], here["labels"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        clk.reference.supcon_loss(model(images), labels, temperature=0.1).backward()
        optimizer.step()
    for rank in range(2):
        over_a_group, weight = torch.load(tmp_path / f"{rank}.pt")
        assert over_a_group
        torch.testing.assert_close(weight, here["weight"].detach(), rtol=1e-10, atol=1e-10)
