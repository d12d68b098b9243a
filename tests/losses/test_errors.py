"""Wrong arguments raise an error of the right type that names the argument, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparisons import unit

import cl_kernels as clk


def views() -> dict[str, Any]:
    return {"features": unit(4, 2, 3), "labels": torch.tensor([0, 1, 0, 1])}


def pair(first: str, second: str) -> Callable[[], dict[str, Any]]:
    return lambda: {first: unit(4, 3), second: unit(4, 3)}


def soft_target() -> dict[str, Any]:
    q, k = unit(4, 3), [unit(4, 3), unit(5, 3)]
    t, u = unit(4, 2), [unit(4, 2), unit(5, 2)]
    return {"q": q, "k": k, "target_q": t, "target_k": u, "scale": 5.0, "target_scale": 9.0}


CORRECT: dict[str, Callable[[], dict[str, Any]]] = {
    "supcon_loss": views,
    "selfcon_loss": views,
    "multilevel_loss": lambda: {
        "levels": [unit(4, 2, 3), unit(4, 2, 5)],
        "labels": torch.tensor([0, 1, 0, 1]),
    },
    "stablerep_loss": lambda: {"features": unit(4, 3), "labels": torch.tensor([0, 1, 0, 1])},
    "sce_loss": lambda: {**pair("q", "k")(), "k_global": unit(8, 3), "queue": unit(6, 3)},
    "info_nce_loss": lambda: {**pair("q", "k")(), "k_global": unit(8, 3), "queue": unit(6, 3)},
    "nt_xent_loss": pair("z0", "z1"),
    "dcl_loss": pair("z0", "z1"),
    "dimcl_loss": pair("z0", "z1"),
    "clip_loss": lambda: {**pair("image_features", "text_features")(), "logit_scale": 10.0},
    "similarity": pair("q", "k"),
    "masked_log_softmax": lambda: {"logits": unit(4, 3), "mask": torch.ones(4, 3, dtype=torch.bool)},
    "contrastive_lse": lambda: {
        **pair("q", "k")(),
        "row_labels": torch.arange(4),
        "col_labels": torch.arange(4),
    },
    "soft_target_cross_entropy": soft_target,
}

MATRICES = {
    "supcon_loss": ["features"],
    "selfcon_loss": ["features"],
    "stablerep_loss": ["features"],
    "sce_loss": ["q", "k", "k_global", "queue"],
    "info_nce_loss": ["q", "k", "k_global", "queue"],
    "nt_xent_loss": ["z0", "z1"],
    "dcl_loss": ["z0", "z1"],
    "dimcl_loss": ["z0", "z1"],
    "clip_loss": ["image_features", "text_features"],
    "similarity": ["q", "k"],
    "contrastive_lse": ["q", "k"],
    "soft_target_cross_entropy": ["q", "target_q"],
}

TEMPERATURES = {
    "supcon_loss": ["temperature", "base_temperature"],
    "selfcon_loss": ["temperature", "base_temperature"],
    "multilevel_loss": ["temperature", "base_temperature"],
    "stablerep_loss": ["temperature"],
    "sce_loss": ["temperature", "target_temperature"],
    "info_nce_loss": ["temperature"],
    "nt_xent_loss": ["temperature"],
    "dcl_loss": ["temperature", "sigma"],
    "dimcl_loss": ["temperature"],
}

SCALES = {
    "clip_loss": ["logit_scale"],
    "similarity": ["scale"],
    "contrastive_lse": ["scale"],
    "soft_target_cross_entropy": ["scale", "target_scale"],
}

OPTIONS = {
    "supcon_loss": ["contrast_mode", "summation", "denominator", "no_positive", "reduction"],
    "selfcon_loss": ["anchors", "no_positive", "reduction"],
    "multilevel_loss": ["reduction"],
    "stablerep_loss": ["reduction"],
    "sce_loss": ["positive_in_target", "reduction"],
    "info_nce_loss": ["reduction"],
    "nt_xent_loss": ["reduction"],
    "dcl_loss": ["reduction"],
    "dimcl_loss": ["reduction"],
    "clip_loss": ["reduction"],
    "contrastive_lse": ["among"],
    "soft_target_cross_entropy": ["positive_in_target", "reduction"],
}


def flat(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(function, name) for function, names in table.items() for name in names]


def refused(function: str, error: type[Exception], match: str, **changes: Any) -> None:
    """Both the public function and its reference refuse the changed arguments, in the same words."""
    arguments = {**CORRECT[function](), **changes}
    messages = []
    for module in (clk, clk.reference):
        with pytest.raises(error, match=match) as caught:
            getattr(module, function)(**arguments)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("function", CORRECT)
def test_the_rest_is_right(function: str) -> None:
    getattr(clk, function)(**CORRECT[function]())


@pytest.mark.parametrize(("function", "name"), flat(MATRICES))
def test_matrices(function: str, name: str) -> None:
    good = CORRECT[function]()[name]
    refused(function, TypeError, f"{name} must be a torch.Tensor, got list", **{name: good.tolist()})
    refused(function, TypeError, f"{name} must be float16, .* got torch.int64", **{name: good.long()})
    refused(function, TypeError, f"{name} must be .* got torch.complex64", **{name: good.to(torch.complex64)})
    refused(function, ValueError, rf"{name} must have shape .* got \(\d+,\)", **{name: good.flatten()})
    refused(function, ValueError, f"{name} must not be empty", **{name: good[:0]})


@pytest.mark.parametrize(("function", "name"), flat(MATRICES))
def test_matching_matrices(function: str, name: str) -> None:
    if function in ("supcon_loss", "selfcon_loss", "stablerep_loss"):
        return
    good = CORRECT[function]()[name]
    refused(function, ValueError, r"must|shape", **{name: torch.cat([good, good], 1)})
    refused(function, ValueError, "must be on the device of", **{name: good.to("meta")})


@pytest.mark.parametrize(("function", "name"), flat(TEMPERATURES))
def test_temperatures(function: str, name: str) -> None:
    for value in (0.0, -0.1, float("inf"), float("nan"), torch.tensor(-1.0), torch.tensor(0.0)):
        refused(function, ValueError, f"{name} must be positive and finite", **{name: value})
    for value in ("0.1", True, torch.tensor(1)):
        refused(function, TypeError, f"{name} must be a float or a", **{name: value})
    refused(function, ValueError, f"{name} must be a float or a tensor of one", **{name: torch.ones(2)})


@pytest.mark.parametrize(("function", "name"), flat(SCALES))
def test_scales(function: str, name: str) -> None:
    for value in (float("inf"), float("nan"), torch.tensor(float("inf"))):
        refused(function, ValueError, f"{name} must be finite", **{name: value})
    refused(function, TypeError, f"{name} must be a float", **{name: "big"})
    refused(function, ValueError, f"{name} must be a float or a tensor of one", **{name: torch.ones(1, 2)})


@pytest.mark.parametrize(("function", "name"), flat(OPTIONS))
def test_options(function: str, name: str) -> None:
    refused(function, ValueError, f"{name} must be one of .* got 'other'", **{name: "other"})
    refused(function, TypeError, f"{name} must be one of .* got .*int", **{name: 3})


@pytest.mark.parametrize("function", ["supcon_loss", "selfcon_loss"])
def test_labels_and_masks(function: str) -> None:
    refused(function, ValueError, "labels and mask must not be given together", mask=torch.ones(4, 4))
    refused(function, TypeError, "labels must be a torch.Tensor", labels=[0, 1, 0, 1])
    refused(
        function,
        TypeError,
        "labels must be .* got torch.complex64",
        labels=torch.zeros(4, dtype=torch.complex64),
    )
    refused(
        function, ValueError, r"labels must have shape \[4\] or \[4, 1\], got \(3,\)", labels=torch.arange(3)
    )
    refused(function, ValueError, "labels must have shape", labels=torch.zeros(4, 2))
    refused(function, ValueError, "labels must be on the device", labels=torch.zeros(4, device="meta"))
    refused(function, TypeError, "mask must be a torch.Tensor", labels=None, mask="eye")
    refused(function, ValueError, r"mask must have shape \[4, 4\]", labels=None, mask=torch.ones(8, 8))
    refused(
        function, ValueError, "mask must not require", labels=None, mask=torch.ones(4, 4, requires_grad=True)
    )
    refused(
        function, ValueError, "mask must be on the device", labels=None, mask=torch.ones(4, 4, device="meta")
    )


def test_supcon() -> None:
    refused(
        "supcon_loss", ValueError, "positives_cap must be None or a multiple of the 2 views", positives_cap=3
    )
    refused("supcon_loss", ValueError, "positives_cap must be an integer of at least 0", positives_cap=-2)
    refused("supcon_loss", TypeError, "positives_cap must be an integer", positives_cap=2.0)


def test_selfcon() -> None:
    refused("selfcon_loss", ValueError, "features must have a multiple of augmentations", augmentations=3)
    refused("selfcon_loss", ValueError, "augmentations must be an integer of at least 1", augmentations=0)
    refused("selfcon_loss", TypeError, "augmentations must be an integer", augmentations=True)
    refused(
        "selfcon_loss",
        ValueError,
        "features must have a view besides",
        features=unit(4, 1, 3),
        anchors="exits",
    )
    refused("selfcon_loss", ValueError, r"labels must have shape \[2\]", augmentations=2)


def test_multilevel() -> None:
    level = unit(4, 2, 3)
    refused("multilevel_loss", TypeError, "levels must be a list", levels=level)
    refused("multilevel_loss", ValueError, "levels must hold at least one", levels=[])
    refused("multilevel_loss", TypeError, r"levels\[1\] must be a torch.Tensor", levels=[level, None])
    refused("multilevel_loss", ValueError, r"levels\[1\] must have", levels=[level, unit(4, 3)])
    refused("multilevel_loss", ValueError, r"levels\[1\] must have the batch", levels=[level, unit(3, 2, 3)])
    refused("multilevel_loss", ValueError, "weights must have one entry", weights=[1.0])
    refused("multilevel_loss", ValueError, r"weights must have shape \[2\]", weights=torch.ones(3))
    refused("multilevel_loss", TypeError, "weights must be a sequence", weights=1.0)
    refused("multilevel_loss", TypeError, r"weights\[0\] must be a float", weights=["one", 1.0])
    refused("multilevel_loss", ValueError, "labels must have shape", labels=torch.arange(5))


def test_sce() -> None:
    for value in (-0.1, 1.1, float("nan"), torch.tensor(2.0)):
        refused("sce_loss", ValueError, "coeff must be between 0 and 1", coeff=value)
    refused("sce_loss", TypeError, "coeff must be a float", coeff=None)


@pytest.mark.parametrize("function", ["sce_loss", "info_nce_loss"])
def test_gathered_keys(function: str) -> None:
    refused(function, TypeError, "rank must be an integer", rank=0.0)
    refused(function, ValueError, "rank must be an integer of at least 0", rank=-1)
    refused(function, ValueError, "k_global must have at least 12 rows", rank=2)
    refused(function, ValueError, "k_global must be given with a rank", rank=1, k_global=None)


def test_info_nce() -> None:
    refused("info_nce_loss", TypeError, "in_batch must be True or False", in_batch="yes")
    refused(
        "info_nce_loss",
        ValueError,
        "k_global and valid must not be given together",
        valid=torch.ones(4, dtype=torch.bool),
    )


def test_labels_of_clip() -> None:
    refused("clip_loss", TypeError, "labels must be a torch.Tensor", labels=[0, 1, 0, 1])
    refused("clip_loss", ValueError, r"labels must have shape \[4\] or \[4, 1\]", labels=torch.arange(3))
    refused("clip_loss", ValueError, "labels must be on the device", labels=torch.zeros(4, device="meta"))


def test_dimcl() -> None:
    refused("dimcl_loss", ValueError, "z0 must have at least 2 rows", z0=unit(1, 3), z1=unit(1, 3))
    refused("dimcl_loss", TypeError, "positive_mask must be a bool tensor", positive_mask=torch.ones(6, 6))
    refused(
        "dimcl_loss",
        ValueError,
        r"positive_mask must have shape \[6, 6\]",
        positive_mask=torch.ones(3, 3).bool(),
    )


def test_primitives() -> None:
    refused("similarity", TypeError, "normalize must be True or False", normalize=1)
    refused("masked_log_softmax", TypeError, "logits must be a torch.Tensor", logits=[[0.0]])
    refused(
        "masked_log_softmax",
        TypeError,
        "logits must be float16, .* got torch.int64",
        logits=torch.ones(4, 3).long(),
    )
    refused("masked_log_softmax", TypeError, "mask must be a bool tensor", mask=torch.ones(4, 3))
    with pytest.raises(ValueError, match="mask must"):
        clk.masked_log_softmax(unit(4, 3), torch.ones(3, 4).bool())
    refused("contrastive_lse", ValueError, "exclude must be 'self'", exclude="others")
    refused("contrastive_lse", TypeError, "exclude must be 'self'", exclude=1.5)
    refused(
        "contrastive_lse", ValueError, "row_labels and col_labels must be given together", col_labels=None
    )
    refused(
        "contrastive_lse",
        ValueError,
        "row_labels must be given",
        row_labels=None,
        col_labels=None,
        among="same",
    )
    refused("contrastive_lse", ValueError, "key_bias must have shape", key_bias=torch.zeros(5))
    refused("contrastive_lse", TypeError, "both_axes must be True or False", both_axes="yes")
    refused("soft_target_cross_entropy", ValueError, "k must hold at least one", k=[])
    refused("soft_target_cross_entropy", TypeError, "target_k must be", target_k=3)
    refused("soft_target_cross_entropy", ValueError, "target_k must have segments", target_k=[unit(9, 2)])
    refused("soft_target_cross_entropy", ValueError, "target_q must have as many rows", target_q=unit(5, 2))
    refused("soft_target_cross_entropy", ValueError, "positive must be given", coeff=0.5)
    refused(
        "soft_target_cross_entropy",
        ValueError,
        r"positive must lie in \[-1, 9\)",
        positive=torch.arange(4) + 6,
    )
    refused("soft_target_cross_entropy", TypeError, "positive must be int64", positive=torch.ones(4))
    refused(
        "soft_target_cross_entropy", ValueError, r"positive must have shape \[4\]", positive=torch.arange(3)
    )


def test_backend_names() -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        clk.use_backend("gpu")
    with clk.use_backend("cuda"), pytest.raises(clk.BackendError, match="cuda"):
        clk.nt_xent_loss(unit(4, 3).double(), unit(4, 3).double())
    with clk.use_backend("triton"), pytest.raises(clk.BackendError, match="triton"):
        clk.nt_xent_loss(unit(4, 3).double(), unit(4, 3).double())
