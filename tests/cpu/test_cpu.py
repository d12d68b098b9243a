"""The compiled CPU kernels: instruction sets, numbers of threads, bounded memory, and life without them."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from op_checks import assert_features_are_needed
from processes import run_python
from torch import Tensor

import cl_kernels as clk
from cl_kernels import extension
from cl_kernels.problem import Contrast

needs_extension = pytest.mark.skipif(
    extension.cpu.module is None and not os.environ.get("CL_KERNELS_REQUIRE_EXTENSION"),
    reason="the extension is not built",
)
CAPABILITIES = extension.cpu.module.cpu_capabilities() if extension.cpu.module else []


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    before = extension.cpu.module.cpu_capability()
    extension.cpu.module.set_cpu_capability(request.param)
    yield request.param
    extension.cpu.module.set_cpu_capability(before)


def unit(n: int, d: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1).to(dtype).requires_grad_()


def losses_and_gradients(api: object, dtype: torch.dtype, wide: bool) -> list[Tensor]:
    """A loss for each kernel, on sizes with tails in every direction, and all gradients."""
    torch.manual_seed(0)
    q, k, text, queue = (unit(n, 75, dtype) for n in (151, 151, 151, 333))
    inputs = [x.detach().double().requires_grad_() if wide else x for x in (q, k, text, queue)]
    q, k, text, queue = inputs
    labels = torch.arange(151) % 17
    mask = torch.rand(151, 151, generator=torch.Generator().manual_seed(1)) * (labels[:, None] == labels)
    views = torch.stack([q, k], 1)
    losses = [
        api.supcon_loss(views, labels, temperature=0.1),
        api.supcon_loss(views, labels, temperature=0.004),  # a range that needs running maxima
        api.supcon_loss(views, mask=mask, temperature=0.1),
        api.supcon_loss(views, mask=mask, temperature=0.1, summation="in", denominator="only_negatives"),
        api.supcon_loss(views, labels, denominator="only_negatives"),
        api.nt_xent_loss(q, k),
        api.info_nce_loss(q, k, queue),
        api.clip_loss(q, text, 20.0),
        api.clip_loss(q, text, 300.0),
        api.sce_loss(q, k.detach(), None, queue.detach()),
        api.sce_loss(q, k, text, queue.T.contiguous().T, coeff=0.3),
        api.dimcl_loss(q, k),
        api.similarity(q, text, normalize=True).square().sum(),
        api.masked_log_softmax(q @ text.T, mask > 0).masked_fill(mask == 0, 0).sum(),
    ]
    return [
        part
        for loss in losses
        for part in (loss, *torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True))
        if part is not None
    ]


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set(capability: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}[dtype]
    found = losses_and_gradients(clk, dtype, wide=False)
    expected = losses_and_gradients(clk.reference, dtype, wide=True)
    for ours, truth in zip(found, expected, strict=True):
        assert (ours.double() - truth).abs().max() <= tolerance * truth.abs().max().clamp(min=1e-9)


@needs_extension
def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match=r"must be one of baseline.*'avx1024'"):
        extension.cpu.module.set_cpu_capability("avx1024")


@needs_extension
@pytest.mark.parametrize("rows", [40, 700, 1500])
def test_results_do_not_depend_on_the_number_of_threads(rows: int) -> None:
    torch.manual_seed(0)
    features, text = unit(rows, 48, torch.float32), unit(rows, 48, torch.float32)
    labels = torch.arange(rows) % 7
    before = torch.get_num_threads()

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        losses = [
            clk.supcon_loss(features[:, None], labels),
            clk.clip_loss(features, text, 10.0),
            clk.sce_loss(features, text),
        ]
        return [
            x for loss in losses for x in (loss, *torch.autograd.grad(loss, [features], retain_graph=True))
        ]

    try:
        one, three = run(1), run(3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


PEAK = """
import resource, sys, torch
import cl_kernels as clk
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def step(rows):
    features = torch.nn.functional.normalize(torch.randn(rows // 2, 2, 16), dim=-1).requires_grad_()
    clk.supcon_loss(features, torch.arange(rows // 2) % 10).backward()
step(256)
before = peak()
step(int(sys.argv[1]))
print(peak() - before)
"""


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_grows_with_rows_only() -> None:
    rows = 24576
    done = run_python("-c", PEAK, str(rows))
    features = 4 * rows * 32  # bytes, at the width that products are padded to
    assert int(done.stdout) < 64e6 + 12 * features  # one N x N matrix would be 2.4 GB


@needs_extension
def test_no_features() -> None:
    def call(name: str, *arguments: object) -> object:
        return getattr(torch.ops.cl_kernels, name)(*arguments)

    assert_features_are_needed(call, "contrastive", "soft_target", "dimcl", "similarity")


def test_without_the_extension() -> None:
    code = (
        "import sys, warnings; sys.modules['cl_kernels._C'] = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import torch, cl_kernels as clk\n"
        "assert len(caught) == 1 and 'pip install' in str(caught[0].message), caught\n"
        "x = torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True)\n"
        "a, b = clk.supcon_loss(x), clk.reference.supcon_loss(x)\n"
        "assert torch.allclose(a, b) and torch.autograd.gradcheck(clk.supcon_loss, x)\n"
    )
    done = run_python("-c", code, CL_KERNELS_NO_EXTENSION="0")
    assert done.returncode == 0, done.stderr


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backward_of_frozen_keys_reads_the_positives_only(dtype: torch.dtype) -> None:
    """With what the forward left for it, the backward takes the rows' own positives in place of the keys."""
    ops = torch.ops.cl_kernels
    q, k, u, t = (unit(n, 19, dtype).detach() for n in (33, 70, 70, 33))
    scale, target_scale = torch.tensor(10.0), torch.tensor(20.0)
    positive = torch.randint(-1, 70, (33,))
    own = torch.where(positive >= 0, torch.arange(33), -1)
    near = k[positive.clamp(min=0)]
    grads = [torch.rand(33, dtype=torch.float64) for _ in range(4)]

    for index, compact, keys in ((positive, own, near), (None, None, k[:0]), (None, None, k[:1])):
        options = (None, None, None, "all", False)
        lse, cols, _, _, residual = ops.contrastive_forward(
            q, k, scale, *options, index, None, None, False, True
        )
        incoming = (grads[0], None, None if index is None else grads[1])
        stats = (None, None, False, lse, cols, residual, (True, False, True, False))
        full = ops.contrastive_backward(*incoming, q, k, scale, *options, index, *stats)
        ours = ops.contrastive_backward(*incoming, q, keys, scale, *options, compact, *stats)
        assert torch.equal(ours[0], full[0]) and torch.equal(ours[2], full[2])

    for mode in ("exclude", "zero"):
        stats = ops.soft_target_forward(q, [k[:30], k[30:]], t, [u[:30], u[30:]], scale, target_scale,
                                        positive, mode, True)  # fmt: skip
        needs = (True, False, False, False)
        full = ops.soft_target_backward(*grads, q, [k[:30], k[30:]], t, [u[:30], u[30:]], scale, target_scale,
                                        positive, mode, *stats, needs)  # fmt: skip
        ours = ops.soft_target_backward(*grads, q, [near], q, [near], scale, scale, own, mode, *stats, needs)
        assert torch.equal(ours[0], full[0]) and torch.equal(ours[4], full[4])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_log_softmax_of_a_row_of_minus_infinity(masked: bool, dtype: torch.dtype, backend: str) -> None:
    """Gradient 0, as of a fully masked row; beside finite logits a -inf has the gradient that torch gives."""
    logits = torch.randn(4, 21).to(dtype)
    logits[1] = logits[2, 5] = logits[3, :20] = -torch.inf
    mask = torch.ones(4, 21, dtype=torch.bool) if masked else None
    if mask is not None:
        mask[3, 20] = False  # the only finite one
    ours = logits.clone().requires_grad_()
    incoming = torch.rand(4, 21).to(dtype)
    torch.autograd.backward(clk.masked_log_softmax(ours, mask), incoming)
    empty = [1, 3] if masked else [1]
    assert (ours.grad[empty] == 0).all()
    plain = logits[[0, 2]].float().requires_grad_()
    torch.autograd.backward(plain.log_softmax(1), incoming[[0, 2]].float())
    assert torch.allclose(ours.grad[[0, 2]].float(), plain.grad, atol=4 * torch.finfo(dtype).eps + 1e-6)


@needs_extension
def test_denominators_by_mask_are_those_of_rows() -> None:
    q, mask = torch.randn(4, 3), torch.ones(4, 4)
    problem = Contrast(q, None, torch.tensor(1.0), among="different", positive_mask=mask, both_axes=True)
    with pytest.raises(ValueError, match="denominators by positive_mask are those of rows"):
        torch.ops.cl_kernels.contrastive_forward(*problem, False)
