"""The supervised contrastive loss as its paper states it, in plain eager PyTorch, as a module.

For N = views * batch rows z_i with positives P(i), the other rows of the same label:

    loss_i = -(temperature / base_temperature) / |P(i)|
             * sum_{p in P(i)} log( exp(z_i.z_p / temperature) / sum_{a != i} exp(z_i.z_a / temperature) )

Every step works on all pairs at once, so every intermediate is N x N, and autograd keeps most of them.
"""

from __future__ import annotations

from torch import Tensor, nn

from cl_kernels.bench import eager


class EagerSupConLoss(nn.Module):
    """Used as the published implementation is, and so as `cl_kernels.SupConLoss`."""

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:  # features [B, V, D], labels [B]
        return eager.supcon(self.temperature, features, labels)
