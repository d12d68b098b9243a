"""The supervised contrastive loss as its paper states it, in plain eager PyTorch.

For N = views * batch rows z_i with positives P(i), the other rows of the same label:

    loss_i = -(temperature / base_temperature) / |P(i)|
             * sum_{p in P(i)} log( exp(z_i.z_p / temperature) / sum_{a != i} exp(z_i.z_a / temperature) )

Every step works on all pairs at once, so every intermediate is N x N, and autograd keeps most of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EagerSupConLoss(nn.Module):
    """Constructor and forward as in the published implementation, and so as in `cl_kernels.SupConLoss`."""

    def __init__(self, temperature: float = 0.07, base_temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = temperature
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:  # features [B, V, D], labels [B]
        views = features.shape[1]
        rows = features.transpose(0, 1).flatten(0, 1)  # [N, D]
        same = torch.eq(labels[:, None], labels[None, :]).to(rows.dtype).repeat(views, views)  # [N, N]
        others = 1 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)  # [N, N]
        positives = same * others

        logits = torch.div(torch.matmul(rows, rows.T), self.temperature)  # [N, N]
        logits = logits - logits.max(dim=1, keepdim=True).values.detach()
        denominator = (torch.exp(logits) * others).sum(1, keepdim=True)
        log_prob = logits - torch.log(denominator)  # [N, N]

        mean_log_prob = (positives * log_prob).sum(1) / positives.sum(1).clamp(min=1)
        return -(self.temperature / self.base_temperature) * mean_log_prob.mean()
