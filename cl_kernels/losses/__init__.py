"""The contrastive losses, each as a function and as a module."""

from ._common import EmptyContrastWarning
from .clip import ClipLoss, clip_loss
from .dcl import DCLLoss, dcl_loss
from .dimcl import DimCLLoss, dimcl_loss
from .info_nce import InfoNCELoss, info_nce_loss
from .multilevel import MultiLevelConLoss, multilevel_loss
from .nt_xent import NTXentLoss, nt_xent_loss
from .sce import SCELoss, SCETargets, sce_loss, sce_targets
from .selfcon import SelfConLoss, selfcon_loss
from .stablerep import StableRepLoss, stablerep_loss
from .supcon import SupConLoss, supcon_loss

__all__ = [
    "ClipLoss",
    "DCLLoss",
    "DimCLLoss",
    "EmptyContrastWarning",
    "InfoNCELoss",
    "MultiLevelConLoss",
    "NTXentLoss",
    "SCELoss",
    "SCETargets",
    "SelfConLoss",
    "StableRepLoss",
    "SupConLoss",
    "clip_loss",
    "dcl_loss",
    "dimcl_loss",
    "info_nce_loss",
    "multilevel_loss",
    "nt_xent_loss",
    "sce_loss",
    "sce_targets",
    "selfcon_loss",
    "stablerep_loss",
    "supcon_loss",
]
