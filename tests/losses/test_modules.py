"""The modules: the same as the functions, with the constructors and forwards of what they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparisons import unit
from torch import Tensor, nn

import cl_kernels as clk

pytestmark = pytest.mark.usefixtures("backend", "one_thread")


def pair() -> tuple[Tensor, Tensor]:
    return unit(6, 5), unit(6, 5)


def views() -> tuple[Tensor, Tensor]:
    return unit(6, 3, 5), torch.tensor([0, 1, 1, 2, 0, 3])


SAME: list[tuple[str, Callable[[], tuple[Any, ...]], dict[str, Any], str]] = [
    ("SupConLoss", views, {}, "supcon_loss"),
    (
        "SupConLoss",
        views,
        {"temperature": 0.2, "contrast_mode": "one", "base_temperature": 1.0, "summation": "in"},
        "supcon_loss",
    ),
    (
        "SupConLoss",
        views,
        {"denominator": "one_positive", "positives_cap": 3, "no_positive": "drop", "reduction": "none"},
        "supcon_loss",
    ),
    ("SelfConLoss", views, {}, "selfcon_loss"),
    ("SelfConLoss", views, {"temperature": 0.2, "anchors": "exits", "reduction": "sum"}, "selfcon_loss"),
    ("SelfConLoss", lambda: (unit(6, 2, 5),), {"augmentations": 2, "anchors": "first"}, "selfcon_loss"),
    ("StableRepLoss", lambda: (unit(6, 5), views()[1]), {"temperature": 0.2}, "stablerep_loss"),
    ("SCELoss", pair, {}, "sce_loss"),
    (
        "SCELoss",
        lambda: (*pair(), None, unit(9, 5)),
        {"coeff": 0.2, "target_temperature": 0.05, "positive_in_target": "zero", "reduction": "none"},
        "sce_loss",
    ),
    ("DimCLLoss", pair, {}, "dimcl_loss"),
    ("DimCLLoss", pair, {"temperature": 0.5, "positive_mask": torch.eye(10).roll(1, 0).bool()}, "dimcl_loss"),
    ("MultiLevelConLoss", lambda: ([unit(6, 2, 4), unit(6, 2, 7)], views()[1]), {}, "multilevel_loss"),
    (
        "MultiLevelConLoss",
        lambda: ([unit(6, 2, 4), unit(6, 2, 7)],),
        {"weights": [1.0, 0.1]},
        "multilevel_loss",
    ),
    ("NTXentLoss", pair, {}, "nt_xent_loss"),
    ("NTXentLoss", pair, {"temperature": 0.1, "reduction": "none"}, "nt_xent_loss"),
    ("InfoNCELoss", pair, {}, "info_nce_loss"),
    ("InfoNCELoss", lambda: (*pair(), unit(9, 5)), {"temperature": 0.2, "reduction": "sum"}, "info_nce_loss"),
    (
        "InfoNCELoss",
        lambda: (*pair(), unit(9, 5)),
        {"in_batch": True, "temperature": 0.2},
        "info_nce_loss",
    ),
    ("DCLLoss", pair, {}, "dcl_loss"),
    ("DCLLoss", pair, {"temperature": 0.5, "sigma": 0.5}, "dcl_loss"),
]


@pytest.mark.parametrize(("module", "inputs", "options", "function"), SAME)
def test_module_is_the_function(
    module: str, inputs: Callable[[], tuple[Any, ...]], options: dict[str, Any], function: str
) -> None:
    args = inputs()
    made = getattr(clk, module)(**options)
    assert torch.equal(made(*args), getattr(clk, function)(*args, **options))
    shown = repr(made)
    assert shown.startswith(f"{module}(")
    for name, value in options.items():
        if isinstance(value, str):
            assert f"{name}={value!r}" in shown
        elif isinstance(value, float):
            assert f"{name}={value:g}" in shown


def test_supcon_as_supcontrast() -> None:
    features, labels = views()
    criterion = clk.SupConLoss(0.1, "one", 0.07)
    expected = clk.supcon_loss(features, labels, temperature=0.1, contrast_mode="one")
    assert torch.equal(criterion(features, labels), expected)
    mask = labels[:, None] == labels
    torch.testing.assert_close(criterion(features, mask=mask), expected)
    torch.testing.assert_close(criterion(features, None, mask.float()), expected)


def test_selfcon_as_conloss() -> None:
    features, labels = views()
    criterion = clk.SelfConLoss(temperature=0.1, contrast_mode="all", base_temperature=0.07)
    options = {"temperature": 0.1}
    for flags, expected in (
        ({}, {}),
        ({"supcon_s": True}, {"no_positive": "drop"}),
        ({"selfcon_s_FG": True}, {"anchors": "exits"}),
    ):
        assert torch.equal(
            criterion(features, labels, **flags), clk.selfcon_loss(features, labels, **options, **expected)
        )
    assert torch.equal(
        criterion(features, labels[:3], selfcon_m_FG=True),
        clk.selfcon_loss(features, labels[:3], anchors="exits", augmentations=2, **options),
    )
    one = clk.SelfConLoss(0.1, "one")
    assert torch.equal(one(features), clk.selfcon_loss(features, anchors="first", **options))
    assert torch.equal(one(features, None, torch.eye(6), False, True), criterion(features, selfcon_s_FG=True))
    with pytest.raises(ValueError, match="selfcon_m_FG"):
        criterion(features, selfcon_s_FG=True, selfcon_m_FG=True)
    with pytest.raises(ValueError, match="anchors"):
        clk.SelfConLoss(contrast_mode="one", anchors="exits")


def test_clip_as_open_clip() -> None:
    image, text = pair()
    criterion = clk.ClipLoss(
        local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1, use_horovod=False
    )
    scale = torch.tensor(14.0)
    loss = criterion(image, text, scale)
    assert torch.equal(loss, clk.clip_loss(image, text, scale))
    assert torch.equal(criterion(image, text, scale, output_dict=True)["contrastive_loss"], loss)
    bias = torch.tensor(-10.0, requires_grad=True)
    biased = criterion(image, text, scale, bias)
    biased.backward()
    assert torch.equal(biased, loss)
    assert bias.grad == 0
    assert "world_size=1" in repr(criterion)
    rows = clk.ClipLoss(reduction="none")(image, text, scale)
    assert torch.equal(rows, clk.clip_loss(image, text, scale, reduction="none"))
    torch.testing.assert_close(rows.mean(), loss)


def test_arguments_by_name() -> None:
    """Forwards take more than those of the implementations that they replace."""
    x, y = pair()
    queue, everyone, labels = unit(9, 5), unit(12, 5), views()[1]
    valid = torch.tensor([True, True, False, True, False, True])
    scale = torch.tensor(14.0)
    supervised = {"labels": labels, "valid": valid}
    found = clk.ClipLoss()(x, y, scale, output_dict=True, **supervised)
    assert torch.equal(found["contrastive_loss"], clk.clip_loss(x, y, scale, **supervised))
    assert torch.equal(
        clk.InfoNCELoss(0.2)(x, y, queue, k_global=everyone, rank=1),
        clk.info_nce_loss(x, y, queue, temperature=0.2, k_global=everyone, rank=1),
    )
    assert torch.equal(clk.InfoNCELoss()(x, y, valid=valid), clk.info_nce_loss(x, y, valid=valid))
    both = torch.stack([x, y], dim=1)
    assert torch.equal(clk.SupConLoss()(both, **supervised), clk.supcon_loss(both, **supervised))
    assert torch.equal(clk.SelfConLoss()(both, **supervised), clk.selfcon_loss(both, **supervised))
    assert torch.equal(clk.NTXentLoss()(x, y, valid=valid), clk.nt_xent_loss(x, y, valid=valid))
    assert torch.equal(clk.DCLLoss()(x, y, valid), clk.dcl_loss(x, y, valid=valid))
    padded = x.masked_fill(~valid[:, None], torch.nan)
    symmetric = clk.DCLLoss(normalize=True, symmetric=True)
    torch.testing.assert_close(symmetric(padded, y, valid), symmetric(x[valid], y[valid]))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -10.0])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_bias_of_clip_only_stays_in_the_graph(shape: tuple[int, ...], value: float) -> None:
    image, text = pair()
    bias = torch.full(shape, value, dtype=torch.float64, requires_grad=True)
    scale = torch.full(shape, 14.0, requires_grad=True)
    expected = clk.clip_loss(image, text, 14.0)

    def loss(bias: Tensor) -> Tensor:
        return clk.ClipLoss()(image, text, scale, bias)

    torch._dynamo.reset()
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        found = function(bias)
        assert torch.equal(found, expected)
        assert found.dtype == torch.float32
        grads = torch.autograd.grad(found, (bias, scale))
        assert (grads[0] == 0).all()
        assert grads[0].shape == grads[1].shape == shape


def test_sce_takes_what_changes_every_step() -> None:
    q, k = pair()
    everything = unit(18, 5)
    criterion = clk.SCELoss(0.1, 0.05, 0.5)
    changed = {"temperature": 0.2, "target_temperature": 0.07, "coeff": 0.1}
    assert torch.equal(criterion(q, k, **changed), clk.sce_loss(q, k, **changed))
    assert torch.equal(
        criterion(q, k, everything, rank=2, coeff=0.0),
        clk.sce_loss(q, k, everything, rank=2, coeff=0.0, target_temperature=0.05),
    )


def test_dcl_as_lightly() -> None:
    z0, z1 = 3 * unit(6, 5), 2 * unit(6, 5)
    both = clk.DCLLoss(0.2, normalize=True, symmetric=True)(z0, z1)
    unit0, unit1 = z0 / z0.norm(dim=1, keepdim=True), z1 / z1.norm(dim=1, keepdim=True)
    expected = (clk.dcl_loss(unit0, unit1, temperature=0.2) + clk.dcl_loss(unit1, unit0, temperature=0.2)) / 2
    torch.testing.assert_close(both, expected)
    rows = clk.DCLLoss(0.2, normalize=True, symmetric=True, reduction="none")(z0, z1)
    assert rows.shape == (6,)
    torch.testing.assert_close(rows.mean(), expected)


def test_temperatures_can_be_parameters() -> None:
    features, labels = views()
    criterion = clk.SupConLoss(temperature=nn.Parameter(torch.tensor(0.1)))
    criterion(features, labels).backward()
    (temperature,) = criterion.parameters()
    assert temperature.grad.isfinite()
    assert "temperature=0.1" in repr(criterion)


def test_positive_mask_follows_the_module() -> None:
    criterion = clk.DimCLLoss(positive_mask=torch.zeros(10, 10, dtype=torch.bool))
    assert criterion.to("meta").positive_mask.device.type == "meta"
    assert not criterion.state_dict()


@pytest.mark.parametrize(
    ("module", "options", "error", "match"),
    [
        ("SupConLoss", {"contrast_mode": "some"}, ValueError, "contrast_mode"),
        ("SupConLoss", {"summation": "up"}, ValueError, "summation"),
        ("SupConLoss", {"denominator": "none"}, ValueError, "denominator"),
        ("SupConLoss", {"no_positive": 0}, TypeError, "no_positive"),
        ("SupConLoss", {"reduction": "average"}, ValueError, "reduction"),
        ("SelfConLoss", {"contrast_mode": "two"}, ValueError, "contrast_mode"),
        ("SelfConLoss", {"anchors": "last"}, ValueError, "anchors"),
        ("SelfConLoss", {"augmentations": 0}, ValueError, "augmentations"),
        ("SCELoss", {"positive_in_target": "keep"}, ValueError, "positive_in_target"),
        ("SCELoss", {"reduction": "average"}, ValueError, "reduction"),
        ("DimCLLoss", {"reduction": None}, TypeError, "reduction"),
        ("MultiLevelConLoss", {"reduction": "average"}, ValueError, "reduction"),
        ("InfoNCELoss", {"reduction": "average"}, ValueError, "reduction"),
        ("InfoNCELoss", {"in_batch": 1}, TypeError, "in_batch"),
        ("NTXentLoss", {"memory_bank_size": 64}, ValueError, "memory_bank_size"),
        ("NTXentLoss", {"gather_distributed": True}, ValueError, "gather_distributed"),
        ("NTXentLoss", {"reduction": "average"}, ValueError, "reduction"),
        ("ClipLoss", {"world_size": 2}, ValueError, "world_size"),
        ("ClipLoss", {"world_size": 1.5}, TypeError, "world_size"),
        ("ClipLoss", {"use_horovod": True}, ValueError, "use_horovod"),
        ("ClipLoss", {"reduction": "average"}, ValueError, "reduction"),
        ("DCLLoss", {"reduction": "average"}, ValueError, "reduction"),
        ("DCLLoss", {"normalize": 1}, TypeError, "normalize"),
        ("DCLLoss", {"symmetric": "yes"}, TypeError, "symmetric"),
    ],
)
def test_constructors_check(module: str, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        getattr(clk, module)(**options)
