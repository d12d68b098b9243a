"""One call of every op in each of its variants, for checks that go over all kernels.

The same cases are compiled ahead of time (gates/triton_gate.py), run under memory checkers
(sanitizer_cases.py), and differ only in sizes, dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[..., Any]
"""call(op name, *arguments): runs an op by some implementation."""


@dataclass(frozen=True)
class Case:
    """`run(call)` calls an op's forward and its backward, and returns the outputs of both."""

    op: str
    variant: str
    run: Callable[[Call], list[Tensor]]
    rank: int  # 0: the op as it is mostly used; 1: other common uses; 2: the options
    device_scale: bool = False  # the scale is a tensor on the device rather than on the CPU


@dataclass(frozen=True)
class Sizes:
    """N rows, M keys and D features; a DimCL of batch D has N columns, and M of a log-softmax is D."""

    n: int
    m: int
    d: int


def cases(sizes: Sizes, dtype: torch.dtype, device: str = "cpu") -> list[Case]:
    make = _Maker(sizes, dtype, device)
    return [*make.contrastive(), *make.soft_target(), *make.dimcl(), *make.similarity(), *make.log_softmax()]


def _flat(*outputs: Any) -> list[Tensor]:
    return [x for out in outputs for x in (out if isinstance(out, (list, tuple)) else [out])]


@dataclass(frozen=True)
class _Maker:
    sizes: Sizes
    dtype: torch.dtype
    device: str

    def unit(self, rows: int, width: int, transposed: bool = False) -> Tensor:
        """Unit rows; `transposed`: a view whose stride along the rows is 1."""
        x = F.normalize(torch.randn(rows, width, device=self.device), dim=1).to(self.dtype)
        return x.T.contiguous().T if transposed else x

    def scale(self, on_device: bool) -> Tensor:
        return torch.tensor(10.0, device=self.device if on_device else "cpu")

    def indices(self, rows: int, bound: int) -> Tensor:
        """int64 in [-1, bound)."""
        return torch.randint(-1, bound, (rows,), device=self.device)

    def per_row(self, rows: int) -> Tensor:
        return torch.rand(rows, dtype=torch.float64, device=self.device) / rows

    def of_mean(self, rows: int) -> Tensor:
        """The gradient of a mean over rows: one number in memory, stride 0."""
        return torch.rand((), dtype=torch.float64, device=self.device).div(rows).expand(rows)

    def contrastive(self) -> list[Case]:
        n, m = self.sizes.n, self.sizes.m
        rows = {"exclude": 0}
        index, keys_index = {"positives": "index"}, {"keys": "learnt", "positives": "index"}
        frozen_keys, labels = {"keys": "frozen"}, {"positives": "labels"}
        variants: dict[str, dict[str, Any]] = {
            "self": {**rows, **index},
            "keys": keys_index,
            "both axes": {**keys_index, "both_axes": True},
            "self, labels": {**rows, **labels},
            "self, mask": {**rows, "positives": "mask"},
            "self, among same": {**rows, **labels, "among": "same"},
            "self, among different": {**rows, **labels, "among": "different"},
            "self, no positives": rows,
            "self, fixed scale": {**rows, **index, "needs": (True, False, False, False)},
            "self, device scale": {**rows, **index, "device_scale": True},
            "self, transposed": {**rows, **index, "transposed": True},
            "keys, frozen": {**frozen_keys, **index},
            "keys, frozen, fixed scale": {**frozen_keys, **index, "needs": (True, False, False, False)},
            "keys, frozen, transposed": {**frozen_keys, **index, "transposed": True},
            "keys, frozen, offset, among different": {
                **frozen_keys, **index, "exclude": 1, "among": "different", "device_scale": True,
            },
            "keys, frozen, bias": {**frozen_keys, "bias": True},
            "keys, of queries only": {**keys_index, "needs": (True, False, False, False)},
            "keys, of keys only": {**keys_index, "needs": (False, True, False, False)},
            "keys, bias": {"keys": "learnt", "bias": True},
            "keys, transposed": {**keys_index, "transposed": True},
            "keys, offset, labels": {"keys": "learnt", "exclude": -2, **labels},
            "keys, mask": {"keys": "learnt", "positives": "mask"},
            "both axes, offset, among different, bias": {
                "keys": "learnt", "exclude": 1, "among": "different", "bias": True, "both_axes": True,
                "device_scale": True,
            },
        }  # fmt: skip
        # Each kind of positives: some have launch shapes of their own.
        main = ("self", "self, labels", "self, mask", "self, no positives", "keys, frozen")
        main += ("self, fixed scale", "keys, frozen, fixed scale")
        common = ("keys", "both axes")

        def run(
            call: Call,
            keys: str = "",
            exclude: int | None = None,
            positives: str = "",
            among: str = "all",
            bias: bool = False,
            both_axes: bool = False,
            needs: Sequence[bool] | None = None,
            transposed: bool = False,
            device_scale: bool = False,
        ) -> list[Tensor]:
            q = self.unit(n, self.sizes.d, transposed)
            k = self.unit(m, self.sizes.d, transposed) if keys else None
            columns = m if keys else n
            labelled = positives == "labels" or among != "all"
            row_labels = self.indices(n, 5) if labelled else None
            col_labels = row_labels if k is None or row_labels is None else self.indices(m, 5)
            positive_mask = None
            if positives == "mask":
                shape = ((n + 1) // 2, (columns + 1) // 2)
                weights = torch.rand(shape, device=self.device)
                positive_mask = weights * (torch.rand(shape, device=self.device) > 0.6)
            problem = (
                q, k, self.scale(device_scale), exclude, row_labels, col_labels, among, positives == "labels",
                self.indices(n, columns) if positives == "index" else None, positive_mask,
                torch.randn(columns, device=self.device) if bias else None, both_axes,
            )  # fmt: skip
            frozen = keys == "frozen"
            lse, lse_cols, *sums, residual = call("contrastive_forward", *problem, frozen)
            needs = needs or (True, bool(keys) and not frozen, True, bias and not frozen)
            grads = call(
                "contrastive_backward", self.of_mean(n), self.per_row(columns) if both_axes else None,
                self.per_row(n) if positives else None, *problem, lse, lse_cols, residual, needs,
            )  # fmt: skip
            return _flat(lse, lse_cols, *sums, residual, grads)

        return self._of("contrastive", run, variants, main, common)

    def soft_target(self) -> list[Case]:
        n, m, d = self.sizes.n, self.sizes.m, self.sizes.d
        variants: dict[str, dict[str, Any]] = {
            "shared keys, frozen": {"frozen": True, "shared": True},
            "shared keys, transposed, frozen": {"frozen": True, "shared": True, "transposed": True},
            "frozen": {"frozen": True},
            "frozen, queue": {"frozen": True, "queue": True},
            "all gradients": {},
            "forward only": {"backward": False},
            "frozen, no positive": {"frozen": True, "positive": False},
            "frozen, zero": {"frozen": True, "in_target": "zero"},
            "frozen, transposed queue": {"frozen": True, "queue": True, "transposed": True},
            "all gradients, transposed queue": {"queue": True, "transposed": True, "device_scale": True},
            "all gradients, zero": {"in_target": "zero"},
            "of queries, not frozen": {"needs": (True, False, False, False)},
            "of keys": {"needs": (True, True, False, False)},
        }
        main, common = ("shared keys, frozen", "frozen"), ("frozen, queue", "all gradients")

        def run(
            call: Call,
            frozen: bool = False,
            queue: bool = False,
            shared: bool = False,
            backward: bool = True,
            positive: bool = True,
            in_target: str = "exclude",
            transposed: bool = False,
            needs: Sequence[bool] = (True, True, True, True),
            device_scale: bool = False,
        ) -> list[Tensor]:
            q, target_q = self.unit(n, d), self.unit(n, d)
            k = [self.unit(m, d, transposed and shared)]
            target_k = [k[0] if shared else self.unit(m, d)]
            if queue:
                k.append(self.unit(m, d, transposed))
                target_k.append(k[1])
            scales = (self.scale(device_scale), self.scale(device_scale))
            found = self.indices(n, m) if positive else None
            problem = (q, k, target_q, target_k, *scales, found, in_target)
            stats = call("soft_target_forward", *problem, frozen)
            if not backward:
                return _flat(stats)
            per_row = [self.of_mean(n), *(self.per_row(n) for _ in range(3))]
            if not positive:
                per_row[3] = None
            needs = (True, False, False, False) if frozen else needs
            return _flat(stats, *call("soft_target_backward", *per_row, *problem, *stats, needs))

        return self._of("soft_target", run, variants, main, common)

    def dimcl(self) -> list[Case]:
        batch, features = self.sizes.d, (self.sizes.n + 1) // 2
        variants: dict[str, dict[str, Any]] = {
            "two views": {},
            "wide": {"wide": True},
            "mask": {"mask": True},
            "device scale": {"device_scale": True},
            "transposed": {"transposed": True},
        }

        def run(
            call: Call,
            wide: bool = False,
            mask: bool = False,
            transposed: bool = False,
            device_scale: bool = False,
        ) -> list[Tensor]:
            shape = (16, batch) if wide else (batch, features)  # wide: the many columns, over a short batch
            z0, z1 = (self.unit(*shape, transposed) for _ in range(2))
            rows = 2 * shape[1]
            positive_mask = torch.rand(rows, rows, device=self.device) > 0.9 if mask else None
            problem = (z0, z1, self.scale(device_scale), positive_mask)
            lse, positive_sum, count, mean, rnorm = call("dimcl_forward", *problem)
            grads = call(
                "dimcl_backward", self.of_mean(rows), self.per_row(rows), *problem, lse, mean, rnorm, True
            )
            return _flat(lse, positive_sum, count, mean, rnorm, grads)

        return self._of("dimcl", run, variants, ("two views", "wide"))

    def similarity(self) -> list[Case]:
        n, m, d = self.sizes.n, self.sizes.m, self.sizes.d
        variants: dict[str, dict[str, Any]] = {
            "self": {},
            "keys": {"keys": True},
            "keys, normalize": {"keys": True, "normalize": True},
            "self, normalize": {"normalize": True, "device_scale": True},
            "keys, transposed": {"keys": True, "transposed": True},
            "keys, of keys only": {"keys": True, "needs": (False, True)},
        }

        def run(
            call: Call,
            keys: bool = False,
            normalize: bool = False,
            transposed: bool = False,
            needs: Sequence[bool] | None = None,
            device_scale: bool = False,
        ) -> list[Tensor]:
            q = self.unit(n, d, transposed)
            k = self.unit(m, d, transposed) if keys else None
            problem = (q, k, self.scale(device_scale), normalize)
            out, *norms = call("similarity_forward", *problem)
            grad = torch.randn(n, m if keys else n, device=self.device).to(self.dtype)
            return _flat(
                out, *norms, call("similarity_backward", grad, *problem, *norms, needs or (True, keys))
            )

        return self._of("similarity", run, variants, ("self", "keys, normalize"), ("keys",))

    def log_softmax(self) -> list[Case]:
        n, m = self.sizes.n, self.sizes.d
        variants: dict[str, dict[str, Any]] = {
            "mask": {"masked": True},
            "plain": {},
            "transposed": {"masked": True, "transposed": True},
        }

        def run(call: Call, masked: bool = False, transposed: bool = False) -> list[Tensor]:
            logits, grad = self.unit(n, m, transposed), self.unit(n, m, transposed)
            mask = torch.rand(n, m, device=self.device) > 0.3 if masked else None
            out = call("masked_log_softmax_forward", logits, mask)
            return _flat(out, call("masked_log_softmax_backward", grad, out, mask))

        return self._of("masked_log_softmax", run, variants, ("mask",))

    def _of(
        self,
        op: str,
        run: Callable[..., list[Tensor]],
        variants: dict[str, dict[str, Any]],
        main: Sequence[str],
        common: Sequence[str] = (),
    ) -> list[Case]:
        def case(variant: str, options: dict[str, Any]) -> Case:
            rank = 0 if variant in main else 1 if variant in common else 2
            on_device = options.get("device_scale", False)
            return Case(op, variant, lambda call: run(call, **options), rank, on_device)

        return [case(variant, options) for variant, options in variants.items()]
