"""The training loop: steps, mixed precision, processes, a log and checkpoints."""

from __future__ import annotations

import inspect
import io
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import processes
from .augment import Draw
from .data import Images
from .encoders import Encoder
from .lars import LARS
from .log import Log, write
from .momentum import cosine
from .seeds import MODULES, ORDER, mixed
from .settings import Settings

# What keeps DistributedDataParallel from sending buffers at each step, before torch 2.14 and from then on.
BUFFERS = "broadcast_buffers"
if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
    BUFFERS = "forward_sync_buffers"


class Method(nn.Module):
    """Base of what a recipe trains: losses and the networks that they are made of."""

    def forward(self, images: Tensor, labels: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of images [B, C, H, W] in [0, 1] with labels [B], and figures for the log."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """Features [B, D] that are evaluated."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def decayed(self, parameter: nn.Parameter) -> bool:
        """Whether weight decay takes from a parameter."""
        return True

    def before_step(self, progress: float) -> None:
        """Set what follows a schedule; `progress` goes from 0 to 1."""

    def after_step(self, progress: float) -> None:
        """Update what is not trained by gradients: momentum encoders, queues."""


class Trainer:
    """Trains a method on images, step by step.

    What is random is a function of seed and step alone: the order of the images, the views, and, by PyTorch's
    own generators, what a module draws. With the weights, the optimiser, buffers (a queue's among them) and
    the scaler of mixed precision, the number of steps is all that a checkpoint needs: a run that goes on from
    one is, on CPUs bit for bit, the run that was not interrupted.
    """

    def __init__(self, settings: Settings, method: Method, images: Images, device: torch.device) -> None:
        world = processes.count()
        if settings.batch % world:
            raise ValueError(f"batch must be a multiple of the {world} processes, got {settings.batch}")
        if settings.checkpoint_every is not None and settings.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {settings.checkpoint_every}")
        if settings.epochs < 0 or (settings.steps is not None and settings.steps < 0):
            raise ValueError(
                f"epochs and steps must not be negative, got {settings.epochs}, {settings.steps}"
            )
        if not world <= settings.batch <= len(images):
            raise ValueError(f"batch must be from {world} to the {len(images)} images, got {settings.batch}")
        if settings.formula == "eager" and world > 1:
            raise ValueError("formula must be cl_kernels over several processes, got eager")
        self.settings, self.images, self.device = settings, images, device
        self.done = 0
        self.order = -1, torch.empty(0, dtype=torch.int64)  # of the images, in an epoch
        self.steps_per_epoch = len(images) // settings.batch
        planned = settings.epochs * self.steps_per_epoch
        self.total = planned if settings.steps is None else min(settings.steps, planned)
        self.planned = max(planned, 1)
        self.method = method.to(device=device, memory_format=torch.channels_last)
        if settings.compile:
            for module in self.method.modules():
                if isinstance(module, Encoder):
                    module.compile()
        self.parallel: nn.Module = self.method
        if world > 1:
            self.parallel = DistributedDataParallel(self.method, **{BUFFERS: False})
        parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for parameter in self.method.parameters():
            if parameter.requires_grad:
                parts[method.decayed(parameter)].append(parameter)
        weights = [{"params": parts[1]}, {"params": parts[0], "weight_decay": 0.0}]
        rate, momentum, decay = settings.lr, settings.momentum, settings.weight_decay
        if settings.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(weights, rate, momentum, weight_decay=decay)
        elif settings.optimizer == "lars":
            self.optimizer = LARS(weights, rate, momentum, decay, settings.trust)
        else:
            self.optimizer = torch.optim.AdamW(weights, rate, weight_decay=decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "float16")

    def learning_rate(self, step: int) -> float:
        warm = self.settings.warmup * self.steps_per_epoch
        if step < warm:
            return self.settings.lr * min((step + 1) / warm, 1.0)
        passed = (step - warm) / max(self.planned - warm, 1)
        return cosine(self.settings.lr, 0.0, passed)

    def chosen(self, step: int) -> Tensor:
        """This process's rows of the step's batch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self.order[0] != epoch:
            shuffle = torch.Generator().manual_seed(mixed(self.settings.seed, ORDER, epoch))
            self.order = epoch, torch.randperm(len(self.images), generator=shuffle)
        part = self.settings.batch // processes.count()
        first = place * self.settings.batch + processes.rank() * part
        return self.order[1][first : first + part]

    def step(self) -> dict[str, float]:
        """One step; the loss and the method's figures, means over the processes."""
        settings, step, method = self.settings, self.done, self.method
        started = time.perf_counter()
        chosen = self.chosen(step)
        images = self.images[chosen].to(self.device)
        labels = self.images.labels[chosen].to(self.device)
        if step + 1 < self.total:
            self.images.prefetch(self.chosen(step + 1))
        part, rank = len(chosen), processes.rank()
        rows = slice(rank * part, (rank + 1) * part)
        draw = Draw(settings.seed, step, settings.batch, rows, self.device)
        torch.manual_seed(mixed(settings.seed, MODULES, step, rank))
        rate = self.learning_rate(step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        method.train()
        method.before_step(step / self.planned)
        self.optimizer.zero_grad()
        with self.autocast():
            loss, figures = self.parallel(images, labels, draw)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        method.after_step(step / self.planned)
        self.done = step + 1
        means = torch.stack([x.detach().double().reshape(()) for x in (loss, *figures.values())])
        if processes.count() > 1:
            dist.all_reduce(means)
            means /= processes.count()
        record = dict(zip(("loss", *figures), means.tolist(), strict=True))
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(f"the loss of step {step} is {record['loss']}")
        return record | {"lr": rate, "ms": 1e3 * (time.perf_counter() - started)}

    def autocast(self) -> Any:
        if self.settings.amp == "no":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.settings.amp))

    def fit(self, folder: Path, title: str) -> list[dict[str, Any]]:
        """Train to the end, from the folder's checkpoint if there is one; the records of all steps."""
        checkpoint = folder / "checkpoint.pt"
        first = processes.rank() == 0
        if checkpoint.exists():
            self.load(torch.load(checkpoint, map_location="cpu", weights_only=True), checkpoint)
        elif (folder / "log.jsonl").exists():
            raise ValueError(f"{folder} has a log without its checkpoint; --restart loses it")
        if not processes.agree(self.done):
            raise ValueError(f"{checkpoint} must be the same for all processes")
        if first and not self.done:
            self.save(checkpoint)  # whose run the folder is
        every = self.settings.checkpoint_every or self.steps_per_epoch
        columns = TextColumn(f"{title:<16}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn()
        bar = Progress(*columns, TextColumn("{task.fields[note]}"), disable=self.settings.quiet or not first)
        with bar, Log(folder / "log.jsonl" if first else None, self.done) as log:
            task = bar.add_task(title, total=self.total, completed=self.done, note="")
            while self.done < self.total:
                step = self.done
                record = {"step": step, "epoch": step // self.steps_per_epoch} | self.step()
                log.append(record)
                bar.update(task, advance=1, note=f"loss {record['loss']:.4f}")
                if first and (self.done % every == 0 or self.done == self.total):
                    log.sync()
                    self.save(checkpoint)
        return log.records

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(
            {
                "steps": self.done,
                "settings": self.settings.record(),
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
            buffer,
        )
        write(path, buffer.getvalue())

    def load(self, state: dict[str, Any], path: Path) -> None:
        ours = self.settings.record()
        others = {k: v for k, v in state["settings"].items() if ours.get(k) != v}
        if others:
            differing = ", ".join(f"{k}={v} there, {ours.get(k)} here" for k, v in others.items())
            raise ValueError(
                f"{path.parent} has another run ({differing}); take another --output, or --restart to lose it"
            )
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.done = state["steps"]
