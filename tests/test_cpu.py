"""The compiled CPU kernels: instruction sets, numbers of threads, bounded memory, and life without them."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cl_kernels as clk
from cl_kernels import extension

needs_extension = pytest.mark.skipif(
    not extension.is_loaded() and not os.environ.get("CL_KERNELS_REQUIRE_EXTENSION"),
    reason="the extension is not built",
)
CAPABILITIES = extension.module.cpu_capabilities() if extension.module else []


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    before = extension.module.cpu_capability()
    extension.module.set_cpu_capability(request.param)
    yield request.param
    extension.module.set_cpu_capability(before)


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
        extension.module.set_cpu_capability("avx1024")


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
    done = subprocess.run([sys.executable, "-c", PEAK, str(rows)], capture_output=True, text=True, check=True)
    features = 4 * rows * 32  # bytes, at the width that products are padded to
    assert int(done.stdout) < 64e6 + 12 * features  # one N x N matrix would be 2.4 GB


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
    environment = {**os.environ, "CL_KERNELS_NO_EXTENSION": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
