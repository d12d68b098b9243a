"""Small inputs of every loss and its main options, for tests of what PyTorch does with them."""

from __future__ import annotations

import torch
from comparisons import Problem, unit


def problems() -> dict[str, Problem]:
    labels = {"labels": torch.arange(6) % 3}
    pair = {"z0": unit(6, 4), "z1": unit(6, 4)}
    keys = {"q": unit(6, 4), "k": unit(6, 4)}
    queue = {"queue": unit(4, 9).T}
    tau = {"temperature": torch.tensor(0.2)}
    images = {"image_features": unit(6, 4), "text_features": unit(6, 4), "logit_scale": torch.tensor(10.0)}
    against = {"keys": unit(5, 4), "key_labels": torch.arange(5) % 4}
    valid = {"valid": torch.arange(6) % 4 != 1}
    return {
        "supcon": Problem("supcon_loss", {"features": unit(6, 2, 4)}),
        "supcon labels": Problem("supcon_loss", {"features": unit(6, 2, 4), **labels, **tau}),
        "supcon one": Problem("supcon_loss", {"features": unit(6, 2, 4), **labels}, {"contrast_mode": "one"}),
        "supcon in": Problem("supcon_loss", {"features": unit(6, 2, 4), **labels}, {"summation": "in"}),
        "supcon negatives": Problem(
            "supcon_loss", {"features": unit(6, 1, 4), **labels}, {"denominator": "only_negatives"}
        ),
        "supcon mask": Problem("supcon_loss", {"features": unit(6, 2, 4), "mask": torch.rand(6, 6)}),
        "supcon mask, capped": Problem(
            "supcon_loss", {"features": unit(6, 2, 4), "mask": torch.rand(6, 6).round(decimals=1)},
            {"positives_cap": 4, "denominator": "only_negatives", "summation": "in"},
        ),
        "supcon capped": Problem("supcon_loss", {"features": unit(6, 2, 4), **labels}, {"positives_cap": 2}),
        "supcon keys": Problem("supcon_loss", {"features": unit(6, 2, 4), **labels, **against, **tau}),
        "supcon keys, mask": Problem(
            "supcon_loss", {"features": unit(6, 2, 4), "keys": unit(5, 4), "mask": torch.rand(6, 5)},
            {"summation": "in"}, ("keys",),
        ),
        "supcon padded": Problem("supcon_loss", {"features": unit(6, 2, 4), **valid}),
        "supcon padded labels": Problem(
            "supcon_loss", {"features": unit(6, 2, 4), **labels, **valid, **tau}, {"no_positive": "drop"}
        ),
        "supcon padded, one positive": Problem(
            "supcon_loss", {"features": unit(6, 2, 4), **labels, **valid}, {"denominator": "one_positive"}
        ),
        "nt_xent padded": Problem("nt_xent_loss", {**pair, **valid, **tau}),
        "selfcon": Problem("selfcon_loss", {"features": unit(6, 3, 4), **labels}, {"anchors": "exits"}),
        "multilevel": Problem(
            "multilevel_loss", {"levels": [unit(6, 2, 4), unit(6, 2, 7)], **labels}, {"weights": [1.0, 0.2]}
        ),
        "stablerep": Problem("stablerep_loss", {"features": unit(6, 4), **labels, **tau}),
        "nt_xent": Problem("nt_xent_loss", {**pair, **tau}),
        "info_nce": Problem("info_nce_loss", keys),
        "info_nce queue": Problem("info_nce_loss", {**keys, **queue, **tau}),
        "info_nce in batch": Problem("info_nce_loss", {**keys, **queue, **tau}, {"in_batch": True}),
        "info_nce gathered": Problem(
            "info_nce_loss", {**keys, "k_global": keys["k"], **queue}, frozen=("k", "k_global", "queue")
        ),
        "info_nce valid": Problem("info_nce_loss", {**keys, **valid, **tau}),
        "info_nce queue valid": Problem("info_nce_loss", {**keys, **queue, **valid}),
        "clip": Problem("clip_loss", images),
        "clip labels": Problem("clip_loss", {**images, **labels}),
        "clip labels apart": Problem("clip_loss", {**images, **labels}, {"reduction": "none"}),
        "clip valid": Problem("clip_loss", {**images, **valid}),
        "clip labels valid": Problem("clip_loss", {**images, **labels, **valid}),
        "dcl": Problem("dcl_loss", pair),
        "dclw": Problem("dcl_loss", pair, {"sigma": 0.5}),
        "dclw valid": Problem("dcl_loss", {**pair, **valid}, {"sigma": 0.5}),
        "dimcl": Problem("dimcl_loss", pair),
        "sce": Problem("sce_loss", {**keys, "coeff": torch.tensor(0.3)}),
        "sce queue": Problem("sce_loss", {**keys, **queue}, {"positive_in_target": "zero"}),
        "sce momentum": Problem(
            "sce_loss", {**keys, "k_global": keys["k"], **queue}, frozen=("k", "k_global", "queue")
        ),
    }  # fmt: skip
