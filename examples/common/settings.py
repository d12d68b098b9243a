"""Options that all recipes share, and their command line."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """Each recipe adds its own."""

    methods: tuple[str, ...] = ()
    """Methods that are trained, one after the other from the same seed."""
    data: str = "mnist"
    """mnist, digits, photographs, faces; on disk: cifar10, cifar100, stl10, miniimagenet, imagenet."""
    root: Path | None = None
    """Folder of the data that is on disk."""
    size: int | None = None
    """Side in pixels that images are resized to; None: the data's, 84 for miniimagenet, 256 for imagenet."""
    output: Path | None = None
    """Folder for logs, checkpoints, results and the plot, from which a run that was killed goes on; None:
    example_output/ and the system's name."""
    restart: bool = False
    """Begin anew where the output folder has another run, or a finished one."""
    quiet: bool = False
    """No progress bar, table or plot."""
    seed: int = 0

    epochs: int = 10
    batch: int = 256
    """Images a step, over all processes together."""
    lr: float = 0.1
    """Highest learning rate: of a linear warm-up, then half a cosine down to 0."""
    warmup: float = 0.0
    """Epochs of the warm-up."""
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"
    momentum: float = 0.9
    """Momentum of sgd and lars."""
    trust: float = 0.001
    """Trust coefficient of lars."""
    weight_decay: float = 1e-4
    steps: int | None = None
    """Stop after so many steps in all; None: after the epochs."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None: an epoch."""

    depth: Literal[10, 18, 34, 50] = 10
    """Layers of the residual network."""
    width: int = 16
    """Channels of its first stage; 64 in the papers."""
    stem: Literal["small", "cifar", "imagenet"] = "small"
    """First convolution: 3 × 3 of stride 2, 3 × 3 of stride 1, or 7 × 7 of stride 2 and max-pooling."""
    projection: int = 128
    """Width D of what is contrasted."""

    amp: Literal["no", "bfloat16", "float16"] = "no"
    """Automatic mixed precision."""
    compile: bool = False
    """Compile the encoders by torch.compile."""
    exchange: Literal["gather", "ring"] = "gather"
    """How processes exchange rows; ring holds least memory."""
    formula: Literal["cl_kernels", "eager"] = "cl_kernels"
    """Whose loss: ours, or the published formula in eager PyTorch, with the same value; one process only."""

    def record(self) -> dict[str, Any]:
        """Give the settings that have a part in the result, as JSON has them."""
        apart = {"output", "restart", "quiet", "methods", "steps", "checkpoint_every"}
        values = {k: v for k, v in asdict(self).items() if k not in apart}
        values["root"] = None if self.root is None else str(self.root.resolve())
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def parse(presets: Mapping[str, S], description: str, arguments: Sequence[str] | None = None) -> S:
    """Settings of the preset that `--preset` names, changed by the other options.

    Raises:
        SystemExit: for an unknown preset or option, after a message.
    """
    import argparse

    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=list(presets), default="cpu")
    chosen, rest = first.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    default = presets[chosen.preset]
    about = (
        f"{description}\n\n--preset {{{','.join(presets)}}} (here: {chosen.preset}) sets the defaults below."
    )
    return tyro.cli(type(default), default=default, args=rest, description=about)
