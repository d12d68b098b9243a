"""Exact contrastive losses for PyTorch that never hold the N x N matrix."""

from . import distributed, integrations, ops, reference
from .dispatch import BackendError, use_backend
from .integrations import accelerate, patch, unpatch
from .losses import (
    ClipLoss,
    DCLLoss,
    DimCLLoss,
    EmptyContrastWarning,
    InfoNCELoss,
    MultiLevelConLoss,
    NTXentLoss,
    SCELoss,
    SCETargets,
    SelfConLoss,
    StableRepLoss,
    SupConLoss,
    clip_loss,
    dcl_loss,
    dimcl_loss,
    info_nce_loss,
    multilevel_loss,
    nt_xent_loss,
    sce_loss,
    sce_targets,
    selfcon_loss,
    stablerep_loss,
    supcon_loss,
)
from .primitives import (
    contrastive_lse,
    masked_log_softmax,
    similarity,
    soft_target_cross_entropy,
)
from .queue import KeyQueue

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "ClipLoss",
    "DCLLoss",
    "DimCLLoss",
    "EmptyContrastWarning",
    "InfoNCELoss",
    "KeyQueue",
    "MultiLevelConLoss",
    "NTXentLoss",
    "SCELoss",
    "SCETargets",
    "SelfConLoss",
    "StableRepLoss",
    "SupConLoss",
    "accelerate",
    "clip_loss",
    "contrastive_lse",
    "dcl_loss",
    "dimcl_loss",
    "distributed",
    "info_nce_loss",
    "integrations",
    "masked_log_softmax",
    "multilevel_loss",
    "nt_xent_loss",
    "ops",
    "patch",
    "reference",
    "sce_loss",
    "sce_targets",
    "selfcon_loss",
    "similarity",
    "soft_target_cross_entropy",
    "stablerep_loss",
    "supcon_loss",
    "unpatch",
    "use_backend",
]
