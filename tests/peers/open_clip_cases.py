"""open_clip's losses over images and texts, in one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peers.cases import Loss, PeerCase, features
from torch import Tensor, nn
from torch.nn.functional import normalize

NEEDS = ("open_clip",)

WIDTH, TEACHER = 16, 24
LENGTH, TOKENS = 5, 11


def cases() -> list[PeerCase]:
    return _clip() + _coca() + _distill()


def _clip() -> list[PeerCase]:
    frozen = partial(_pairs, needs=(True, False))
    return [
        _case("ClipLoss", "defaults", width=128, measured=4096),
        _case("ClipLoss", "width of 512", width=512, measured=4096),
        _case("ClipLoss", "cache_labels", {"cache_labels": True}, twice=True),
        _case("ClipLoss", "local_loss, gather_with_grad", {"local_loss": True, "gather_with_grad": True}),
        _case("ClipLoss", "rank 1 of 1", {"rank": 1}),
        _case("ClipLoss", "scale of 100", inputs=partial(_pairs, scale=100.0)),
        _case("ClipLoss", "negative scale", inputs=partial(_pairs, scale=-3.0)),
        _case("ClipLoss", "scale of shape [1]", inputs=partial(_pairs, scale_shape=(1,))),
        _case("ClipLoss", "scale a float", fixed_scale=10.0, inputs=partial(_pairs, scale=None)),
        _case("ClipLoss", "features not normalised", inputs=partial(_pairs, unit=False, scale=1.0)),
        # A loss of 5e-4 between logits of 20, of which both round away as much.
        _case("ClipLoss", "converged", inputs=partial(_pairs, noise=0.1, scale=20.0), close=(5e-12, 2e-4)),
        _case("ClipLoss", "one pair", rows=1),
        _case("ClipLoss", "frozen texts", inputs=frozen),
        _case("ClipLoss", "logit_bias", biased=True, inputs=partial(_pairs, bias=True)),
        _case("ClipLoss", "logit_bias of shape [1]", biased=True,
              inputs=partial(_pairs, bias=True, scale_shape=(1,))),
        _case("ClipLoss", "output_dict", output_dict=True),
    ]  # fmt: skip


def _coca() -> list[PeerCase]:
    weights = {"caption_loss_weight": 2.0, "clip_loss_weight": 1.0}
    return [
        _case("CoCaLoss", "weights 2 and 1", weights, captions=True, measured=4096, width=128),
        _case("CoCaLoss", "pad_id=3", {**weights, "pad_id": 3}, captions=True),
        _case("CoCaLoss", "contrastive weight 0.3", {**weights, "clip_loss_weight": 0.3}, captions=True),
        _case("CoCaLoss", "contrastive weight 0", {**weights, "clip_loss_weight": 0}, captions=True),
        _case("CoCaLoss", "output_dict", weights, captions=True, output_dict=True),
    ]


def _distill() -> list[PeerCase]:
    return [
        _case("DistillClipLoss", "defaults", teacher=True, measured=4096, width=128),
        _case(
            "DistillClipLoss", "teacher gets a gradient", teacher=True, inputs=partial(_pairs, taught=True)
        ),
        _case("DistillClipLoss", "scales of 100", teacher=True, inputs=partial(_pairs, scale=100.0)),
        _case("DistillClipLoss", "converged", teacher=True, inputs=partial(_pairs, noise=0.1, scale=20.0)),
        _case("DistillClipLoss", "one pair", teacher=True, rows=1),
        _case("DistillClipLoss", "output_dict", teacher=True, output_dict=True),
    ]


def _case(
    loss: str,
    options: str,
    arguments: dict[str, Any] | None = None,
    *,
    inputs: Any = None,
    width: int = WIDTH,
    rows: int = 24,
    measured: int | None = None,
    close: tuple[float, float] = (1e-12, 5e-6),
    **call: Any,
) -> PeerCase:
    from open_clip import loss as theirs

    from cl_kernels.integrations import open_clip as ours

    made = [partial(_loss, getattr(place, loss), arguments or {}, call) for place in (theirs, ours)]
    extra = {name: call[name] for name in ("captions", "teacher") if name in call}
    given = partial(inputs or _pairs, width, **extra)
    return PeerCase(
        f"open_clip.{loss}", options, *made, inputs=given, rows=rows, measured=measured, close=close
    )


def _loss(kind: type[nn.Module], arguments: dict[str, Any], call: dict[str, Any]) -> Loss:
    criterion = kind(**arguments)
    as_dict = call.get("output_dict", False)

    def loss(images: Tensor, texts: Tensor, *rest: Tensor) -> Tensor:
        scale, rest = (call["fixed_scale"], rest) if "fixed_scale" in call else (rest[0], rest[1:])
        if call.get("captions"):
            found = criterion(images, texts, rest[0], _labels(images.shape[0]), scale, output_dict=as_dict)
        elif call.get("teacher"):
            found = criterion(images, texts, scale, *rest, output_dict=as_dict)
        else:
            bias = rest[0] if call.get("biased") else None
            if call.get("twice"):
                criterion(images, texts, scale)
            found = criterion(images, texts, scale, bias, as_dict)
        values = tuple(found.values()) if as_dict else found
        return values if isinstance(values, Tensor) else sum(values[1:], values[0])

    return loss


def _labels(rows: int) -> Tensor:
    """Tokens, of which some pad."""
    return torch.arange(rows * LENGTH).view(rows, LENGTH) * 7 % TOKENS


def _pairs(
    width: int,
    rows: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    needs: tuple[bool, bool] = (True, True),
    unit: bool = True,
    noise: float | None = None,
    scale: float | None = 10.0,
    scale_shape: tuple[int, ...] = (),
    **beside: bool,
) -> list[Tensor]:
    """Images, texts, the scale, and what is asked for beside them: a `bias`, the logits of `captions`, what a
    `teacher` has, which is `taught` where it gets a gradient."""
    taught = beside.get("taught", False)

    def some(wide: int, *, close_to: Tensor | None = None) -> Tensor:
        x = features(rows, wide, torch.float64, generator, requires_grad=False)
        x = x if close_to is None or noise is None else close_to + noise * x
        return normalize(x, dim=1) if unit else x

    def number(value: float) -> Tensor:
        return torch.full(scale_shape, value, dtype=torch.float64)

    images = some(width)
    found = [(images, needs[0]), (some(width, close_to=images), needs[1])]
    if scale is not None:
        found.append((number(scale), True))
    if beside.get("bias"):
        found.append((number(-10.0), True))
    if beside.get("captions"):
        x = features(rows * LENGTH, TOKENS, torch.float64, generator, requires_grad=False)
        found.append((x.view(rows, LENGTH, TOKENS), True))
    if beside.get("teacher"):
        found += [(some(TEACHER), taught), (some(TEACHER), taught), (number(15.0), taught)]
    return [x.to(dtype).requires_grad_(needed) for x, needed in found]
