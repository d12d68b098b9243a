"""Cases computed by the authors' own published code, and the calls of this package that must reproduce them.

An oracle file is a .npz with `cases` (names) and, for each, `<case>/meta` (JSON), inputs, `<case>/loss` and
`<case>/grad_<input>`. A case is dispatched by its family (the part of its name before a slash, else the
file) and its meta, never by its exact name. `call(case, api)` runs it with `api`, a module that has the
package's functions.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {
    "torch.float64": torch.float64,
    "torch.float32": torch.float32,
    "torch.bfloat16": torch.bfloat16,
    "torch.float16": torch.float16,
}


# The runs over processes do not store these; with them the stored losses come out to the last digit.
UNSTATED_TEMPERATURE = 0.2
UNSTATED_SCALE = 10.0


@dataclass(frozen=True, eq=False)
class Case:
    file: str
    name: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    siblings: dict[str, Case] = field(default_factory=dict, repr=False)

    @property
    def id(self) -> str:
        return f"{self.file}:{self.name}"

    @property
    def family(self) -> str:
        """`ez_sce` of `ez_sce/keys_...`; the file's name for files without families."""
        return self.name.rsplit("/", 1)[0] if "/" in self.name else self.file

    @property
    def dtype(self) -> torch.dtype:
        if "dtype" in self.meta:
            return DTYPES[self.meta["dtype"]]
        return torch.float64 if self.meta.get("f64", True) else torch.float32

    @property
    def world(self) -> int:
        return self.meta.get("world", 1)

    @property
    def rank(self) -> int:
        return self.meta.get("rank", 0)

    def has(self, name: str) -> bool:
        return name in self.arrays

    def constant(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def optional(self, name: str) -> Tensor | None:
        return self.constant(name) if self.has(name) else None

    def leaf(self, name: str, requires_grad: bool = True) -> Tensor:
        return torch.from_numpy(self.arrays[name]).to(self.dtype).requires_grad_(requires_grad)

    def expected(self) -> dict[str, np.ndarray]:
        """The loss, the gradients (`grad_<input>`) and the losses of samples that the oracle stores."""
        wanted = ("loss", "loss_per_sample")
        return {k: v for k, v in self.arrays.items() if k in wanted or k.startswith("grad_")}

    def ranks(self) -> list[Case]:
        """The cases of the processes of this run whose inputs are stored, by rank."""
        found = {other.rank: other for other in self.siblings.values() if _same_run(self, other)}
        found[self.rank] = self
        return [found[rank] for rank in sorted(found)]


def _same_run(case: Case, other: Case) -> bool:
    """Whether two cases are processes of one run; the options of CLIP's gather do not change the inputs."""
    options = ("kind", "fn", "world", "N", "D", "tau_decor", "temp", "seed")
    if other.family != case.family or any(other.meta.get(key) != case.meta.get(key) for key in options):
        return False
    if case.meta.get("kind") == "clip" and _whole_batch(case) and _whole_batch(other):
        return math.isclose(float(case.arrays["loss"]), float(other.arrays["loss"]), rel_tol=1e-12)
    return True


def _whole_batch(case: Case) -> bool:
    return not case.meta.get("local_loss", False)


@dataclass
class Outcome:
    """A loss, the differentiated inputs, and what is differentiated where it is not the loss itself."""

    loss: Tensor
    inputs: dict[str, Tensor]
    objective: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)


DATA = Path(__file__).resolve().parent / "data"  # the compact set, which comes with the tests


def whole() -> Path:
    """Where the whole set is, if it is there."""
    default = Path(__file__).resolve().parents[2] / "shared" / "oracles"
    return Path(os.environ.get("CL_KERNELS_ORACLES", default))


@functools.lru_cache
def load(path: Path) -> tuple[Case, ...]:
    with np.load(path) as archive:
        entries = {key: archive[key] for key in archive.files}
    grouped: dict[str, dict[str, np.ndarray]] = {str(name): {} for name in entries["cases"]}
    for key, value in entries.items():
        owner, _, leaf = key.rpartition("/")
        if owner in grouped:
            grouped[owner][leaf] = value
    siblings: dict[str, Case] = {}
    for name, arrays in grouped.items():
        meta = json.loads(str(arrays.pop("meta")))
        siblings[name] = Case(path.stem, name, meta, arrays, siblings)
    return tuple(siblings.values())


def cases(folder: Path) -> Iterator[Case]:
    for path in sorted(folder.glob("*.npz")):
        yield from load(path)


def _features(case: Case) -> dict[str, Tensor]:
    return {"features": case.leaf("features")}


def _supcontrast(case: Case, api: ModuleType) -> Outcome:
    """HobbitLong/SupContrast: the constructor's options carry the same names."""
    inputs = _features(case)
    loss = api.supcon_loss(
        inputs["features"], case.optional("labels"), case.optional("mask"), **case.meta["ctor"]
    )
    return Outcome(loss, inputs)


GOOGLE_DENOMINATORS = {"all": "all", "one": "one_positive", "neg": "only_negatives"}


def _google(case: Case, api: ModuleType) -> Outcome:
    """google-research/supcon: base_temperature 1 scales by the temperature; views of a sample are averaged.

    With one view upstream divides once more by the number of positives: it is done here.
    """
    inputs, meta = _features(case), case.meta
    batch, views, _ = inputs["features"].shape
    onehot = case.optional("labels_onehot")
    labels = None if onehot is None else onehot.argmax(dim=1)
    options = {
        "temperature": meta["temperature"],
        "base_temperature": 1.0 if meta["scale_by_temperature"] else meta["temperature"],
        "contrast_mode": meta["contrast_mode"],
        "summation": meta["summation_location"],
        "denominator": GOOGLE_DENOMINATORS[meta["denominator_mode"]],
        "positives_cap": meta["positives_cap"] if meta["positives_cap"] >= 0 else None,
    }
    rows = api.supcon_loss(inputs["features"], labels, **options, reduction="none")
    if views > 1:
        loss = api.supcon_loss(inputs["features"], labels, **options)
    else:
        labels = torch.arange(batch) if labels is None else labels
        positives = (labels[:, None] == labels).sum(dim=1) - 1
        if meta["positives_cap"] >= 0:
            positives = positives.clamp(max=meta["positives_cap"])
        rows = rows / positives.clamp(min=1)
        loss = rows.mean()
    per_sample = rows.reshape(-1, batch).mean(dim=0).detach()
    return Outcome(loss, inputs, extra={"loss_per_sample": per_sample})


def _selfcon(case: Case, api: ModuleType) -> Outcome:
    """raymin0223/self-contrastive-learning: ConLoss and its flags."""
    inputs, flags = _features(case), dict(case.meta["flags"])
    options = dict(case.meta["ctor"])
    mode = options.pop("contrast_mode", "all")
    labels, mask = case.optional("labels"), case.optional("mask")
    if flags.get("supcon_s"):
        return Outcome(
            api.supcon_loss(
                inputs["features"], labels, mask, contrast_mode=mode, no_positive="drop", **options
            ),
            inputs,
        )
    if flags.get("selfcon_m_FG"):
        options |= {"anchors": "exits", "augmentations": 2}
    elif flags.get("selfcon_s_FG"):
        options |= {"anchors": "exits"}
    else:
        options |= {"anchors": "first" if mode == "one" else "all"}
    return Outcome(api.selfcon_loss(inputs["features"], labels, mask, **options), inputs)


def _selfcon_training(case: Case, api: ModuleType) -> Outcome:
    """The losses that the training script of self-contrastive-learning sums."""
    meta, names = case.meta, [f"sub{i}" for i in range(case.meta.get("exits", 0))]
    inputs = {name: case.leaf(name) for name in ["main", *names]}
    main, subs = inputs["main"], [inputs[name] for name in names]
    labels = case.constant("labels") if meta["label"] and meta["method"] != "Con" else None
    tau = {"temperature": meta["temp"]}
    multiview, alpha = meta["multiview"], meta.get("alpha", 0.0)
    backbone = torch.stack(main.chunk(2), dim=1) if multiview else main[:, None]

    if meta["method"] != "SelfCon":
        drop = "zero" if multiview else "drop"
        return Outcome(api.supcon_loss(backbone, labels, no_positive=drop, **tau), inputs)

    exits = torch.stack([*subs, main], dim=1)
    if not alpha:
        repeated = torch.cat([labels, labels]) if multiview and labels is not None else labels
        return Outcome(api.selfcon_loss(exits, repeated, **tau), inputs)
    loss = alpha * api.selfcon_loss(
        exits, labels, anchors="exits", augmentations=2 if multiview else 1, **tau
    )
    if multiview or labels is not None:
        loss = loss + api.supcon_loss(backbone, labels, no_positive="zero" if multiview else "drop", **tau)
    return Outcome(loss, inputs)


def _sce_tensors(case: Case) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inputs, and the queue [K, D] as a view of the stored [D, K]."""
    names = [name for name in ("q", "k", "k_global", "queue") if case.has(name)]
    inputs = {name: case.leaf(name) for name in names}
    return inputs, inputs["queue"].T if "queue" in inputs else None


def _sce(case: Case, api: ModuleType) -> Outcome:
    """eztorch and CEA SCE. With the queue alone the positive stays in the target with similarity 0."""
    inputs, queue = _sce_tensors(case)
    options = {
        "temperature": case.meta["temp"],
        "target_temperature": case.meta["temp_m"],
        "coeff": case.meta["coeff"],
        "rank": case.rank if "k_global" in inputs else 0,
        "positive_in_target": "exclude" if "k_global" in inputs else "zero",
    }
    loss = api.sce_loss(inputs["q"], inputs["k"], inputs.get("k_global"), queue, **options)
    return Outcome(loss, inputs)


def _moco(case: Case, api: ModuleType) -> Outcome:
    """eztorch MoCo: with gathered keys it is SCE with coeff 1, with the queue alone InfoNCE."""
    inputs, queue = _sce_tensors(case)
    tau = case.meta["temp"]
    if case.meta.get("use_keys", "k_global" in inputs):
        loss = api.sce_loss(
            inputs["q"], inputs["k"], inputs["k_global"], queue,
            temperature=tau, coeff=1.0, rank=case.rank,
        )  # fmt: skip
    else:
        loss = api.info_nce_loss(inputs["q"], inputs["k"], queue, temperature=tau)
    return Outcome(loss, inputs)


def _relational(case: Case, api: ModuleType) -> Outcome:
    """eztorch ReSSL, from the primitives: no positive in either distribution, the target detached."""
    inputs, queue = _sce_tensors(case)
    use_keys = case.meta.get("use_keys", "k_global" in inputs)
    keys = [x for x in (inputs.get("k_global") if use_keys else None, queue) if x is not None]
    bank, included = torch.cat(keys), None
    if use_keys:
        rows = inputs["q"].shape[0]
        included = torch.arange(bank.shape[0]) != (torch.arange(rows) + rows * case.rank)[:, None]
    student = api.similarity(inputs["q"], bank, scale=1 / case.meta["temp"])
    teacher = api.similarity(inputs["k"].detach(), bank.detach(), scale=1 / case.meta["temp_m"])
    log_p = api.masked_log_softmax(student, included)
    target = api.masked_log_softmax(teacher, included).exp()
    if included is not None:
        log_p = log_p.masked_fill(~included, 0.0)
    return Outcome(-(target * log_p).sum(dim=1).mean(), inputs)


def _sce_token(case: Case, api: ModuleType) -> Outcome:
    """eztorch SCE over tokens, from the primitives: masks say which similarities count, and where."""
    inputs, queue = _sce_tensors(case)
    bank = inputs["k_global"] if queue is None else torch.cat([inputs["k_global"], queue])
    widened = {}
    for name in ("mask_sim_q", "mask_sim_k"):
        ignored = case.optional(name)
        if ignored is None:
            ignored = torch.zeros(inputs["q"].shape[0], inputs["k_global"].shape[0])
        widened[name] = F.pad(ignored == 0, (0, bank.shape[0] - ignored.shape[1]), value=True)
    student = api.similarity(inputs["q"], bank, scale=1 / case.meta["temp"])
    teacher = api.similarity(inputs["k"], bank, scale=1 / case.meta["temp_m"])
    log_p = api.masked_log_softmax(student, widened["mask_sim_q"])
    target = api.masked_log_softmax(teacher, widened["mask_sim_k"]).exp()
    positives = case.constant("mask_prob_q").to(target)
    weights = case.meta["coeff"] * positives + (1 - case.meta["coeff"]) * target
    weights = weights / weights.sum(dim=1, keepdim=True)
    counted = widened["mask_sim_q"]
    if case.has("mask_log_q"):
        counted = counted & case.constant("mask_log_q")
    loss = -(weights * log_p.masked_fill(~counted, 0.0)).sum(dim=1).mean()
    return Outcome(loss, inputs)


def _crops(case: Case, api: ModuleType) -> Outcome:
    """eztorch SimCLR: -log of the sum over positives; the log of their number is not in it.

    One process: z_global holds the same rows as z, which get the gradient as anchors and as keys apart.
    """
    inputs = {"z": case.leaf("z"), "z_global": case.leaf("z_global")}
    crops, tau = case.meta["crops"], case.meta["temp"]
    samples, width = case.meta["N"], inputs["z"].shape[1]
    offset = case.rank * inputs["z"].shape[0]
    own = torch.arange(inputs["z"].shape[0]) % samples
    owners = torch.full((inputs["z_global"].shape[0],), -1)
    owners[offset : offset + own.shape[0]] = own
    arguments = {"scale": 1 / tau, "exclude": offset}
    over_all = api.contrastive_lse(inputs["z"], inputs["z_global"], **arguments)
    over_positives = api.contrastive_lse(
        inputs["z"], inputs["z_global"], row_labels=own, col_labels=owners, among="same", **arguments
    )
    outcome = Outcome((over_all - over_positives).mean(), inputs)
    if inputs["z"].shape == inputs["z_global"].shape:
        views = case.leaf("z", requires_grad=False).reshape(crops, samples, width).transpose(0, 1)
        together = api.supcon_loss(views, temperature=tau, base_temperature=tau, summation="in")
        outcome.extra["loss"] = together - math.log(max(crops - 1, 1))
    return outcome


def _normalised(*tensors: Tensor) -> list[Tensor]:
    return [F.normalize(x, dim=-1) for x in tensors]


def _nnclr(case: Case, api: ModuleType) -> Outcome:
    """solo-learn NNCLR: InfoNCE of normalised rows."""
    inputs = {"nn": case.leaf("nn"), "p": case.leaf("p")}
    loss = api.info_nce_loss(*_normalised(*inputs.values()), temperature=case.meta["temp"])
    return Outcome(loss, inputs)


def _mocov3(case: Case, api: ModuleType) -> Outcome:
    """solo-learn MoCo v3: InfoNCE of normalised rows times 2τ."""
    inputs, tau = {"query": case.leaf("query"), "key": case.leaf("key")}, case.meta["temp"]
    return Outcome(2 * tau * api.info_nce_loss(*_normalised(*inputs.values()), temperature=tau), inputs)


def _solo_moco(case: Case, api: ModuleType) -> Outcome:
    """solo-learn MoCo: own key and queue [D, K], normalised by the caller."""
    inputs = {name: case.leaf(name) for name in ("query", "key", "queue")}
    tau = case.meta["temp"]
    loss = api.info_nce_loss(inputs["query"], inputs["key"], inputs["queue"].T, temperature=tau)
    return Outcome(loss, inputs)


def _solo(case: Case, api: ModuleType) -> Outcome:
    if case.has("nn"):
        return _nnclr(case, api)
    if case.has("z"):
        return _gathered_simclr(case, api)
    return _solo_moco(case, api) if case.has("queue") else _mocov3(case, api)


def _lightly(case: Case, api: ModuleType) -> Outcome:
    inputs = {"out0": case.leaf("out0"), "out1": case.leaf("out1")}
    if "dcl" in case.name.rsplit("/", 1)[-1]:
        return Outcome(_lightly_dcl(case, api, *_normalised(*inputs.values())), inputs)
    return Outcome(api.nt_xent_loss(*inputs.values(), temperature=case.meta["temp"]), inputs)


def _lightly_dcl(case: Case, api: ModuleType, first: Tensor, second: Tensor) -> Tensor:
    """lightly's DCL adds the LSE of each view's negatives, both ways; DCLW's weight is detached."""
    tau = case.meta["temp"]
    products = (first * second).sum(dim=1)
    weight = torch.ones_like(products)
    if "sigma" in case.meta:
        weight = 2 - first.shape[0] * torch.softmax(products.detach() / case.meta["sigma"], dim=0)
    lses = [api.contrastive_lse(q, k, scale=1 / tau) for q, k in
            ((first, first), (first, second), (second, second), (second, first))]  # fmt: skip
    return (sum(lses) / 2 - weight * products / tau).mean()


def _dcl(case: Case, api: ModuleType) -> Outcome:
    inputs = {"z1": case.leaf("z1"), "z2": case.leaf("z2")}
    loss = api.dcl_loss(*inputs.values(), temperature=case.meta["temp"], sigma=case.meta.get("sigma"))
    return Outcome(loss, inputs)


def _open_clip(case: Case, api: ModuleType) -> Outcome:
    """open_clip: CLIP, and SigLIP from the similarity primitive."""
    names = ["image", "text", "logit_scale", *(["logit_bias"] if case.has("logit_bias") else [])]
    inputs = {name: case.leaf(name) for name in names}
    image, text, scale = inputs["image"], inputs["text"], inputs["logit_scale"]
    if "logit_bias" not in inputs:
        return Outcome(api.clip_loss(image, text, scale), inputs)
    logits = api.similarity(image, text, scale=scale) + inputs["logit_bias"]
    signs = 2 * torch.eye(image.shape[0], dtype=logits.dtype) - 1
    return Outcome(-F.logsigmoid(signs * logits).sum() / image.shape[0], inputs)


def _pml_ntxent(case: Case, api: ModuleType) -> Outcome:
    """pytorch-metric-learning NT-Xent: the mean over pairs, a positive against the negatives each."""
    inputs, labels = _embedding(case), case.constant("labels")
    rows = _one_view(case, api, inputs, denominator="one_positive", reduction="none")
    pairs = _positives(labels).to(rows)
    return Outcome((rows * pairs).sum() / pairs.sum(), inputs)


def _pml_supcon(case: Case, api: ModuleType) -> Outcome:
    """pytorch-metric-learning SupCon: the mean over anchors with a loss above 0: those with positives."""
    inputs = _embedding(case)
    return Outcome(_one_view(case, api, inputs, no_positive="drop"), inputs)


def _pml(case: Case, api: ModuleType) -> Outcome:
    kind = case.name.rsplit("/", 1)[-1].lower()
    return _pml_supcon(case, api) if kind.startswith("supcon") else _pml_ntxent(case, api)


def _stablerep(case: Case, api: ModuleType) -> Outcome:
    inputs = _embedding(case)
    options = {"labels": case.constant("labels"), "temperature": case.meta["temp"]}
    return Outcome(api.stablerep_loss(*inputs.values(), **options), inputs)


def _embedding(case: Case) -> dict[str, Tensor]:
    """The one differentiated input."""
    (name,) = (key.removeprefix("grad_") for key in case.arrays if key.startswith("grad_"))
    return {name: case.leaf(name)}


def _one_view(case: Case, api: ModuleType, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    tau = case.meta["temp"]
    (x,) = _normalised(*inputs.values())
    labels = case.constant("labels")
    return api.supcon_loss(x[:, None], labels, temperature=tau, base_temperature=tau, **options)


def _positives(labels: Tensor) -> Tensor:
    """How many other samples share the label of each."""
    return (labels[:, None] == labels).sum(dim=1) - 1


def _gathered_simclr(case: Case, api: ModuleType) -> Outcome:
    """solo-learn SimCLR of one process: its anchors against everybody's rows.

    The log of the number of positives is not in it. The gather hands each process the sum of all gradients.
    """
    ranks, own = case.ranks(), case.rank
    inputs = [other.leaf("z") for other in ranks]
    z = torch.cat(_normalised(*inputs))
    labels = torch.cat([other.constant("indexes") for other in ranks])
    tau = case.meta.get("temp", UNSTATED_TEMPERATURE)
    rows = api.supcon_loss(
        z[:, None], labels, temperature=tau, base_temperature=tau, summation="in", reduction="none"
    )
    rows = rows - _positives(labels).clamp(min=1).log().to(rows)
    count = inputs[own].shape[0]
    parts = [part.mean() for part in rows.split(count)]
    return Outcome(parts[own], {"z": inputs[own]}, objective=sum(parts))


def _gathered_clip(case: Case, api: ModuleType) -> Outcome:
    """open_clip over processes: the loss of the whole batch on each, or of the local rows (`local_loss`).

    Gathered with gradient, a process gets the sum of all gradients; without, that of its own loss only.
    """
    ranks, own = case.ranks(), case.rank
    images = [other.leaf("image") for other in ranks]
    texts = [other.leaf("text") for other in ranks]
    scale = torch.tensor(case.meta.get("scale", UNSTATED_SCALE), dtype=case.dtype, requires_grad=True)
    inputs = {"image": images[own], "text": texts[own], "logit_scale": scale}
    image, text = torch.cat(images), torch.cat(texts)
    if _whole_batch(case):
        loss = api.clip_loss(image, text, scale)
        objective = loss
        if case.meta.get("gather_with_grad"):
            objective = api.clip_loss(image, text, scale.detach()) * case.world
            objective = objective + api.clip_loss(image.detach(), text.detach(), scale)
        return Outcome(loss, inputs, objective)

    def local(rank: int, everybody: tuple[Tensor, Tensor], scale: Tensor) -> Tensor:
        start = rank * images[rank].shape[0]
        pairs = ((images[rank], everybody[1]), (texts[rank], everybody[0]))
        loss = torch.zeros((), dtype=case.dtype)
        for q, k in pairs:
            rows = torch.arange(start, start + q.shape[0])
            lse = api.contrastive_lse(q, k, scale=scale, exclude=None)
            loss = loss + (lse - scale * (q * k[rows]).sum(dim=1)).mean() / 2
        return loss

    loss = local(own, (image, text), scale)
    if not case.meta.get("gather_with_grad"):
        return Outcome(loss, inputs, local(own, (image.detach(), text.detach()), scale))
    objective = loss
    for rank in set(range(case.world)) - {own}:
        objective = objective + local(rank, (image, text), scale.detach())
    return Outcome(loss, inputs, objective)


def _distributed(case: Case, api: ModuleType) -> Outcome:
    return _gathered_clip(case, api) if case.meta["kind"] == "clip" else _gathered_simclr(case, api)


def _dimcl(case: Case, api: ModuleType) -> Outcome:
    inputs = {"z1": case.leaf("z1"), "z2": case.leaf("z2")}
    return Outcome(api.dimcl_loss(*inputs.values(), temperature=case.meta["tau_decor"]), inputs)


def _dimcl_simple(case: Case, api: ModuleType) -> Outcome:
    """DimCL without a softmax, from the similarity primitive: -(mean diagonal + λ mean of the rest)."""
    inputs = {"z1": case.leaf("z1"), "z2": case.leaf("z2")}
    first, second = (_batch_norm(x).T for x in inputs.values())
    similarity = api.similarity(first, second)
    diagonal = similarity.diagonal()
    rest = (similarity.sum() - diagonal.sum()) / similarity.numel()
    return Outcome(-(diagonal.mean() + case.meta["lam_simple"] * rest), inputs)


def _dimcl_gathered(case: Case, api: ModuleType) -> Outcome:
    """DimCL over processes: each normalises its own batch, then the batches are gathered.

    The gather hands each process its own slice of the gradient of the loss, which all of them compute.
    """
    ranks, own = case.ranks(), case.rank
    first = [other.leaf("z1") for other in ranks]
    second = [other.leaf("z2") for other in ranks]
    z1, z2 = (torch.cat([_batch_norm(x) for x in parts]) for parts in (first, second))
    loss = api.dimcl_loss(z1, z2, temperature=case.meta["tau_decor"])
    return Outcome(loss, {"z1": first[own], "z2": second[own]})


def _batch_norm(z: Tensor) -> Tensor:
    return F.batch_norm(z, None, None, training=True)


def _dimcl_file(case: Case, api: ModuleType) -> Outcome:
    if "simple" in case.meta["fn"]:
        return _dimcl_simple(case, api)
    return _dimcl_gathered(case, api) if case.world > 1 else _dimcl(case, api)


def _selfcon_file(case: Case, api: ModuleType) -> Outcome:
    return _selfcon_training(case, api) if "method" in case.meta else _selfcon(case, api)


FAMILIES: dict[str, Callable[[Case, ModuleType], Outcome]] = {
    "supcontrast": _supcontrast,
    "google_supcon": _google,
    "selfcon": _selfcon_file,
    "dimcl": _dimcl_file,
    "ez_sce": _sce,
    "cea_sce": _sce,
    "ez_moco": _moco,
    "ez_ressl": _relational,
    "ez_sce_token": _sce_token,
    "ez_simclr": _crops,
    "solo": _solo,
    "lightly": _lightly,
    "dcl_repo": _dcl,
    "open_clip": _open_clip,
    "pml": _pml,
    "stablerep": _stablerep,
    "dist2": _distributed,
}


def not_finite(case: Case) -> bool:
    return any(not np.isfinite(value).all() for value in case.expected().values())


def _incomplete(case: Case) -> bool:
    return case.world > 1 and case.family in ("dist2", "dimcl") and len(case.ranks()) < case.world


def _nothing_left(case: Case) -> bool:
    masked = case.optional("mask_sim_k")
    return masked is not None and not case.has("queue") and bool((masked != 0).all(dim=1).any())


SKIPPED: dict[str, Callable[[Case], bool]] = {
    "upstream refuses the input: ours must raise ValueError (test_refused_upstream)": (
        lambda case: "error" in case.meta
    ),
    "upstream is NaN: ours must be finite (test_finite_where_upstream_is_not)": not_finite,
    "inputs of another process are not stored, so the gathered batch is not known": _incomplete,
    "upstream masks by subtracting 1e9: a row with nothing left becomes a softmax of rounding": _nothing_left,
    "no function of this family in the package": lambda case: case.family not in FAMILIES,
}


def skip_reason(case: Case) -> str | None:
    """Why the case is not compared; None if it is."""
    return next((reason for reason, applies in SKIPPED.items() if applies(case)), None)


def tolerance(case: Case) -> float:
    """The accuracy of the oracle itself, relative to its largest entry."""
    if case.dtype == torch.float64:
        narrow_mask = case.file == "supcontrast" and case.has("mask")  # upstream rounds it to float32
        return 1e-7 if narrow_mask else 1e-10
    return {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}[case.dtype]


def call(case: Case, api: ModuleType) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient for each input that the oracle differentiates."""
    loss, gradients, _ = evaluate(case, api)
    return loss, gradients


def evaluate(case: Case, api: ModuleType) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """`call`, and further values by the oracle's names."""
    outcome = FAMILIES[case.family](case, api)
    objective = outcome.loss if outcome.objective is None else outcome.objective
    names = list(outcome.inputs)
    gradients = torch.autograd.grad(objective, [outcome.inputs[name] for name in names], allow_unused=True)
    filled = {
        name: torch.zeros_like(outcome.inputs[name]) if gradient is None else gradient
        for name, gradient in zip(names, gradients, strict=True)
    }
    return outcome.loss.detach(), filled, outcome.extra


def errors(case: Case, api: ModuleType) -> dict[str, float]:
    """Largest difference from each stored value, relative to its largest entry.

    A gradient of which upstream has only rounding left is 0: its difference is taken as it is.
    """
    loss, gradients, extra = evaluate(case, api)
    ours = {"loss": loss, **{f"grad_{name}": gradient for name, gradient in gradients.items()}}
    expected = case.expected()
    rounding = 10 * torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    found = {}
    for name, value in expected.items():
        candidates = [source[name] for source in (ours, extra) if name in source]
        if not candidates:
            raise KeyError(f"{case.id}: nothing to compare with {name}")
        scale = float(np.abs(value).max())
        scale = scale if scale > rounding else 1.0
        found[name] = max(
            float((x.double() - torch.from_numpy(value).double()).abs().max()) / scale for x in candidates
        )
    return found
