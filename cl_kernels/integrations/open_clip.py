"""open_clip's losses over images and texts: ClipLoss, and CoCaLoss and DistillClipLoss on top of it.

Classes are open_clip's with another forward. Features are gathered by open_clip's own function, so that what
its options say of gradients holds to the letter; only what follows, the logits, is never formed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import open_clip
import torch
from open_clip import loss as library
from torch import Tensor

from .. import autograd, dtypes, validation
from ..losses import clip_loss
from ..losses._common import own_similarity, settled, wide
from ..problem import Contrast, SoftTarget
from ._dtypes import cross_entropy_dtype, logsumexp_dtype, promoted, same_dtypes
from ._registry import passed_on
from ._swap import Unfused, fused

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss"]
__getattr__ = passed_on(open_clip)

PARTS = ("get_logits", "get_ground_truth")


class _Sides(NamedTuple):
    """Rows of images and of texts, and the keys that each are set against: the others' where a process takes
    all rows, else those of all processes, the row's own at `first` and on."""

    images: Tensor  # [N, D]
    texts: Tensor  # [N, D]
    image_keys: Tensor  # [M, D]
    text_keys: Tensor  # [M, D]
    scale: Any
    first: int

    @property
    def square(self) -> bool:
        return self.image_keys is self.images and self.text_keys is self.texts


def _sides(self: library.ClipLoss, images: Tensor, texts: Tensor, logit_scale: float | Tensor) -> _Sides:
    """Rows that the logits would be made of, on this process and with the gradients that its options say."""
    scale = wide(validation.scale("logit_scale", logit_scale, images), images)
    if self.world_size == 1:
        return _Sides(images, texts, images, texts, scale, 0)
    image_keys, text_keys = library.gather_features(
        images,
        texts,
        local_loss=self.local_loss,
        gather_with_grad=self.gather_with_grad,
        rank=self.rank,
        world_size=self.world_size,
    )
    if self.local_loss:
        return _Sides(images, texts, image_keys, text_keys, scale, images.shape[0] * self.rank)
    return _Sides(image_keys, text_keys, image_keys, text_keys, scale, 0)


def _refuse(self: library.ClipLoss, images: Tensor, texts: Tensor, logit_scale: float | Tensor) -> None:
    """Refuse what cannot be fused, before features are gathered."""
    if getattr(self, "use_horovod", False):
        raise Unfused("gathers by Horovod")
    if self.world_size > 1 and torch.compiler.is_compiling():
        raise Unfused("a graph that is compiled does not gather")
    validation.pair("image_features", images, "text_features", texts)
    same_dtypes("image_features", images, "text_features", texts)
    if isinstance(logit_scale, Tensor):
        scaled = images.new_empty(0, dtype=promoted(images.dtype, logit_scale))
        same_dtypes("scaled features", scaled, "features", texts)


@dtypes.full_precision
def _clip_mean(sides: _Sides) -> Tensor:
    """The mean of the cross-entropies both ways."""
    if sides.square:
        return clip_loss(sides.images, sides.texts, sides.scale)
    own = torch.arange(sides.images.shape[0], device=sides.images.device) + sides.first
    per_image, per_text = (
        autograd.contrastive(Contrast(q, k, sides.scale, positive_index=own), sides.first)
        for q, k in ((sides.images, sides.text_keys), (sides.texts, sides.image_keys))
    )
    loss = torch.lerp(per_image.lse - per_image.positive_sum, per_text.lse - per_text.positive_sum, 0.5)
    return settled(loss, sides.image_keys.shape[0]).mean()


def _clip(
    self: library.ClipLoss,
    images: Tensor,
    texts: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
) -> Tensor:
    """The contrastive loss of `ClipLoss`."""
    _refuse(self, images, texts, logit_scale)
    if isinstance(logit_bias, Tensor):
        if logit_bias.numel() != 1 or logit_bias.dim() > 2:
            raise Unfused("logit_bias has more than one element")
    elif not isinstance(logit_bias, int | float | None):
        raise Unfused("logit_bias is not a number")
    dtype = promoted(cross_entropy_dtype(images), logit_scale)
    sides = _sides(self, images, texts, logit_scale)
    loss = _clip_mean(sides).to(dtype)
    self.get_ground_truth(images.device, sides.images.shape[0])  # which may cache the labels
    if logit_bias is None:
        return loss
    without = logit_bias - logit_bias  # 0 in value and gradient, or NaN
    return loss + (without.sum().to(loss) if isinstance(without, Tensor) else without)


class ClipLoss(library.ClipLoss):
    r"""open_clip's ClipLoss: the mean over pairs i of

    .. math:: \frac{1}{2} \Big( \log\sum_j e^{s\, x_i \cdot y_j} + \log\sum_j e^{s\, x_j \cdot y_i} \Big)
        - s\, x_i \cdot y_i

    over the pairs of this process (`world_size` 1), of all processes, or with `local_loss` over those of this
    process against all. Without `gather_with_grad` the rows of other processes get no gradient: this one's
    are then, as in open_clip, those of one process's loss, 1 / world_size of the whole batch's after the
    averaging of DDP. `logit_bias` changes nothing and gets a gradient of 0.

    Not fused: `use_horovod`, gathers in a compiled graph, a `logit_bias` of more than one element, features
    of different dtypes (unless under autocast), subclasses with a `get_logits` or `get_ground_truth` of their
    own.
    """

    @fused("open_clip.loss:ClipLoss.forward", relies_on=PARTS)
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features [N, D], 0-dim, or {"contrastive_loss": it}."""
        loss = _clip(self, image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class CoCaLoss(library.CoCaLoss):
    """open_clip's CoCaLoss: `ClipLoss` and a cross-entropy of captions, which is open_clip's, each by its
    weight."""

    @fused("open_clip.loss:CoCaLoss.forward", relies_on=PARTS)
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """The losses of features [N, D] and of caption logits [N, L, tokens] for labels [N, L], 0-dim."""
        if self.clip_loss_weight:
            contrastive = self.clip_loss_weight * _clip(self, image_features, text_features, logit_scale)
        else:
            contrastive = torch.tensor(0, device=logits.device)
        caption = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption


@dtypes.full_precision
def _distill_rows(student: _Sides, teacher: _Sides) -> tuple[Tensor, Tensor]:
    """Cross-entropies [N] of pairs, and against the teacher's softmax, each the mean of both ways.

    One pass a way: the teacher's softmax comes without the positive, which is put back by its share.
    """
    n, first = student.images.shape[0], student.first
    own = torch.arange(n, device=student.images.device) + first

    def way(q: Tensor, k: Tensor, target_q: Tensor, target_k: Tensor) -> tuple[Tensor, Tensor]:
        q, k, target_q, target_k = dtypes.promote(q, k, target_q, target_k)
        problem = SoftTarget(q, [k], target_q, [target_k], student.scale, teacher.scale, own)
        stats = autograd.soft_target(problem, first)
        at_own = own_similarity(target_q, target_k[first : first + n], teacher.scale)
        share = torch.sigmoid(at_own - stats.target_lse)
        cross = torch.lerp(stats.cross, stats.positive_sum, share)
        return stats.lse - stats.positive_sum, stats.lse - cross

    per_image = way(student.images, student.text_keys, teacher.images, teacher.text_keys)
    per_text = way(student.texts, student.image_keys, teacher.texts, teacher.image_keys)
    clip, distill = (torch.lerp(x, y, 0.5) for x, y in zip(per_image, per_text, strict=True))
    columns = student.image_keys.shape[0]
    return settled(clip, columns), settled(distill, columns)


class DistillClipLoss(library.DistillClipLoss):
    r"""open_clip's DistillClipLoss: `ClipLoss`, and the mean over both ways of the cross-entropies of the
    student's softmax against the teacher's, :math:`-\sum_j Q_{ij} \log P_{ij}`.

    Not fused: what `ClipLoss` does not fuse, and subclasses with a `dist_loss` of their own.
    """

    @fused("open_clip.loss:DistillClipLoss.forward", relies_on=(*PARTS, "dist_loss"))
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """The losses of the student's features [N, D] and the teacher's [N, E], 0-dim."""
        student = (image_features, text_features, logit_scale)
        teacher = (dist_image_features, dist_text_features, dist_logit_scale)
        _refuse(self, *student)
        _refuse(self, *teacher)
        validation.same_length(image_features=image_features, dist_image_features=dist_image_features)
        dtype = promoted(cross_entropy_dtype(image_features), logit_scale)
        distilled = torch.promote_types(
            promoted(logsumexp_dtype(image_features), logit_scale),
            promoted(logsumexp_dtype(dist_image_features), dist_logit_scale),
        )
        own, others = _sides(self, *student), _sides(self, *teacher)
        clip_rows, distill_rows = _distill_rows(own, others)
        contrastive, distill = clip_rows.mean().to(dtype), distill_rows.mean().to(distilled)
        self.get_ground_truth(image_features.device, own.images.shape[0])
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill
