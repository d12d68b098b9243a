"""lightly's losses over pairs of views: NTXentLoss and DirectCLRLoss, DCLLoss and DCLWLoss, MACLLoss.

Classes are lightly's with another forward. Both views go through the engine as one matrix against itself;
whether a row's positive is in its denominator is what tells NT-Xent and DCL apart.
"""

from __future__ import annotations

from typing import NamedTuple

import lightly.loss
import torch
import torch.distributed
import torch.nn.functional as F
from lightly.loss import dcl_loss, directclr_loss, macl_loss, ntx_ent_loss
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.utils import dist
from torch import Tensor

from .. import autograd, dtypes, validation
from ..distributed import gather
from ..losses._common import beside, cross_entropy, inverse, own_similarity
from ..problem import Contrast
from ._dtypes import cross_entropy_dtype, logsumexp_dtype, promoted, same_dtypes
from ._formulas import plain_cross_entropy
from ._registry import passed_on
from ._swap import Unfused, fused

__all__ = ["DCLLoss", "DCLWLoss", "DirectCLRLoss", "MACLLoss", "NTXentLoss"]
__getattr__ = passed_on(lightly.loss)


class _Others(NamedTuple):
    """Statistics of the rows of both views over the rows of all processes but themselves."""

    lse: Tensor  # [2N]
    positive: Tensor  # [2N]
    columns: int  # of each denominator


@dtypes.full_precision
def _against_others(
    out0: Tensor, out1: Tensor, scale: float | Tensor, gathered: bool = False, decoupled: bool = False
) -> _Others:
    """Those of unit rows; `decoupled` denominators lack the positive, which has its row's label."""
    z = torch.cat([out0, out1])
    n, world, first, keys = out0.shape[0], 1, 0, None
    if gathered:
        group = torch.distributed.group.WORLD
        if group is None or torch.compiler.is_compiling():
            raise Unfused("a graph that is compiled does not gather")
        world = dist.world_size()
        first = dist.rank() * 2 * n
        keys = gather(z, (2 * n,) * world, group)
    partner = torch.arange(2 * n, device=z.device).roll(n) + first
    problem = Contrast(z, keys, scale, exclude=first, positive_index=partner)
    if decoupled:
        labels = torch.arange(n * world, device=z.device).view(world, 1, n).expand(-1, 2, -1).reshape(-1)
        problem = problem._replace(
            row_labels=labels[first : first + 2 * n] if gathered else labels,
            col_labels=labels,
            among="different",
        )
    stats = autograd.contrastive(problem)
    return _Others(stats.lse, stats.positive_sum, 2 * n * world - 1 - decoupled)


def _cross_entropy(others: _Others) -> Tensor:
    """That of finding the positives, [2N]."""
    return cross_entropy(others.lse, others.positive, others.columns)


def _scale(temperature: float | Tensor, like: Tensor) -> float | Tensor:
    """1 / temperature, which lightly lets be negative."""
    temperature = validation.scale("temperature", temperature, like)
    if not isinstance(temperature, Tensor) and temperature == 0:
        raise Unfused("the temperature is 0")
    return inverse(temperature, like)


def _views(first: str, x: Tensor, second: str, y: Tensor) -> None:
    """Refuse other than two matrices of one shape and dtype."""
    validation.pair(first, x, second, y)
    same_dtypes(first, x, second, y)


def _gathers(self: ntx_ent_loss.NTXentLoss | dcl_loss.DCLLoss) -> bool:
    return bool(self.gather_distributed) and dist.world_size() > 1


def _nt_xent(self: ntx_ent_loss.NTXentLoss, out0: Tensor, out1: Tensor) -> Tensor:
    """NT-Xent over the batch, or InfoNCE against a memory bank."""
    _views("out0", out0, "out1", out1)
    scale = _scale(self.temperature, out0)
    if not plain_cross_entropy(self.cross_entropy):
        raise Unfused("its cross_entropy is not the one that its constructor makes")
    _refuse_other_bank(self.memory_bank, out0)
    dtype = promoted(cross_entropy_dtype(out0), self.temperature)
    out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
    out1, negatives = self.memory_bank.forward(out1, update=out0.requires_grad)
    if negatives is None:
        rows = _cross_entropy(_against_others(out0, out1, scale, _gathers(self)))
    else:
        rows = _against_bank(out0, out1, negatives.to(out0.device).T, scale)
    return rows.mean().to(dtype)


@dtypes.full_precision
def _against_bank(out0: Tensor, out1: Tensor, bank: Tensor, scale: float | Tensor) -> Tensor:
    """Cross-entropies [N] of finding the row of out1 among rows [K, D] that get no gradient."""
    out0, out1, bank = dtypes.promote(out0, out1, bank)
    positive = own_similarity(out0, out1, scale)
    return beside(autograd.contrastive(Contrast(out0, bank, scale)).lse, positive)


def _refuse_other_bank(bank: MemoryBankModule, like: Tensor) -> None:
    """Refuse what could not be read once the bank has moved on."""
    if type(bank).forward is not MemoryBankModule.forward or not bank.feature_dim_first:
        raise Unfused("its memory_bank is not the one that its constructor makes")
    if bank.size[0] == 0:
        return
    same_dtypes("the views", like, "the memory bank", bank.bank)
    if bank.bank.dim() > 1 and bank.bank.shape[1:] != like.shape[1:]:
        raise Unfused("the memory bank has rows of another width")


class NTXentLoss(ntx_ent_loss.NTXentLoss):
    r"""lightly's NTXentLoss: the mean over the rows z of both views, divided by their norms, of

    .. math:: \log \sum_{j \ne i} e^{z_i \cdot z_j / \tau} - z_i \cdot z_{p(i)} / \tau

    p(i) being the other view of row i; with `gather_distributed`, j runs over the rows of all processes.
    With a memory bank m, :math:`\log(e^{x_i \cdot y_i / \tau} + \sum_k e^{x_i \cdot m_k / \tau}) - x_i \cdot
    y_i / \tau` for the rows x of the first view alone, and then those of the second enter the bank.

    Not fused: a `cross_entropy` or `memory_bank` that the constructor did not make, views that differ in
    dtype from each other or from the bank (unless autocast unites them).
    """

    @fused("lightly.loss.ntx_ent_loss:NTXentLoss.forward")
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views [N, D], 0-dim."""
        return _nt_xent(self, out0, out1)


class DirectCLRLoss(directclr_loss.DirectCLRLoss):
    """lightly's DirectCLRLoss: `NTXentLoss` over the first `loss_dim` features of each flattened row."""

    @fused("lightly.loss.directclr_loss:DirectCLRLoss.forward")
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views [N, ...], 0-dim."""
        first, second = (x.flatten(start_dim=1)[:, : self.loss_dim] for x in (out0, out1))
        return _nt_xent(self, first, second)


def _dcl(self: dcl_loss.DCLLoss, out0: Tensor, out1: Tensor) -> Tensor:
    """DCL both ways, positives weighted by `weight_fn`."""
    _views("out0", out0, "out1", out1)
    scale = _scale(self.temperature, out0)
    dtype = promoted(logsumexp_dtype(out0), self.temperature)
    out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
    others = _against_others(out0, out1, scale, _gathers(self), decoupled=True)
    positives = others.positive.chunk(2)
    if self.weight_fn:
        weights = [self.weight_fn(out0, out1), self.weight_fn(out1, out0)]
        positives = tuple(x * weight for x, weight in zip(positives, weights, strict=True))
        dtype = promoted(dtype, *weights)
    ways = [(lse - x).mean() for lse, x in zip(others.lse.chunk(2), positives, strict=True)]
    return (0.5 * (ways[0] + ways[1])).to(dtype)


class DCLLoss(dcl_loss.DCLLoss):
    r"""lightly's DCLLoss: the mean over the rows z of both views, divided by their norms, of

    .. math:: \log \sum_{j \ne i, p(i)} e^{z_i \cdot z_j / \tau} - w_i\, z_i \cdot z_{p(i)} / \tau

    p(i) being the other view of row i and w the result of `weight_fn` (None: 1) for the row's view and the
    other; with `gather_distributed`, j runs over the rows of all processes.

    Not fused: subclasses with a `_loss` of their own, views of different dtypes (unless under autocast).
    """

    @fused("lightly.loss.dcl_loss:DCLLoss.forward", relies_on=("_loss",))
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views [N, D], 0-dim."""
        return _dcl(self, out0, out1)


class DCLWLoss(dcl_loss.DCLWLoss):
    r"""lightly's DCLWLoss: `DCLLoss` with :math:`w_i = 2 - N\, \mathrm{softmax}_i(z_i \cdot z_{p(i)} /
    \sigma)` over the rows of a view, not differentiated."""

    @fused("lightly.loss.dcl_loss:DCLWLoss.forward", relies_on=("_loss",))
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views [N, D], 0-dim."""
        return _dcl(self, out0, out1)


class MACLLoss(macl_loss.MACLLoss):
    r"""lightly's MACLLoss: the rows' NT-Xent :math:`\ell_i` at a temperature that depends on the mean cosine
    A of the positives, weighted by what they leave to be learnt.

    .. math::
        \frac{1}{2N} \sum_i V_i\, \ell_i, \qquad V_i = \frac{1}{1 - e^{-\ell_i} + \epsilon}, \qquad
        \tau = \tau_0\, (1 + \alpha (A - A_0))

    Neither V nor A is differentiated. Not fused: views of different dtypes (unless under autocast).
    """

    @fused("lightly.loss.macl_loss:MACLLoss.forward")
    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """The loss of two views [N, D], 0-dim."""
        _views("z0", z0, "z1", z1)
        base = validation.scale("temperature", self.temperature, z0)
        dtype = promoted(logsumexp_dtype(z0), self.temperature)
        z0, z1 = F.normalize(z0, dim=-1), F.normalize(z1, dim=-1)
        with torch.no_grad():
            alignment = own_similarity(z0, z1, 1.0).mean()
        temperature = base * (1 + self.alpha * (alignment - self.A_0))
        rows = _cross_entropy(_against_others(z0, z1, _scale(temperature, z0)))
        weights = 1.0 / (self.eps - torch.expm1(-rows.detach()))
        return (weights * rows).mean().to(dtype)
