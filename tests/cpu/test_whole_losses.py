"""Whole losses in one op, with their gradients: what they keep changes nothing of what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from processes import run_python
from torch import Tensor

import cl_kernels as clk
from cl_kernels import dispatch, extension, reference

pytestmark = pytest.mark.skipif(
    not dispatch.makes_whole_losses(torch.empty(0)), reason="whole losses are made by the CPU extension"
)

Case = tuple[Callable[..., Tensor], Callable[[torch.dtype], list[Tensor]]]
N, D, QUEUE = 150, 75, 333


def unit(n: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(n, D, dtype=torch.float64), dim=1).to(dtype)


def pair(dtype: torch.dtype) -> list[Tensor]:
    return [unit(N, dtype).requires_grad_(), unit(N, dtype).requires_grad_()]


def frozen(dtype: torch.dtype) -> list[Tensor]:
    return [unit(N, dtype).requires_grad_(), unit(N, dtype), unit(QUEUE, dtype)]


def by_labels(api: object, x: Tensor, y: Tensor, **options: object) -> Tensor:
    """Some classes of one sample, which have positives among the views alone."""
    labels = torch.arange(N) % 100
    return api.supcon_loss(torch.stack([x, y], 1), labels, temperature=0.1, base_temperature=0.07, **options)


def dropped(api: object, x: Tensor, y: Tensor) -> Tensor:
    return api.supcon_loss(x[:, None], torch.arange(N) % 100, no_positive="drop") + 0 * y.sum()


def masked_dimcl(api: object, x: Tensor, y: Tensor) -> Tensor:
    return api.dimcl_loss(x, y, positive_mask=torch.ones(2 * D, 2 * D, dtype=torch.bool).tril())


CASES: dict[str, Case] = {
    "supcon": (by_labels, pair),
    "supcon, sum": (lambda api, x, y: by_labels(api, x, y, reduction="sum"), pair),
    "supcon, dropped": (dropped, pair),
    "supcon, large logits": (
        lambda api, x, y: api.supcon_loss(torch.stack([x, y], 1), torch.arange(N) % 9, temperature=0.004),
        pair,
    ),
    "supcon, one": (lambda api, x, y: by_labels(api, x, y, contrast_mode="one"), pair),
    "supcon, mask": (
        lambda api, x, y: api.supcon_loss(torch.stack([x, y], 1), mask=torch.eye(N, dtype=torch.bool)),
        pair,
    ),
    "simclr": (lambda api, x, y: api.supcon_loss(torch.stack([x, y], 1)), pair),
    "nt_xent": (lambda api, x, y: api.nt_xent_loss(3 * x, y, temperature=0.2), pair),
    "clip": (lambda api, x, y: api.clip_loss(x, y, 20.0), pair),
    "clip, large logits": (lambda api, x, y: api.clip_loss(x, y, 300.0), pair),
    "info_nce": (lambda api, x, y: api.info_nce_loss(x, y), pair),
    "info_nce, queue": (lambda api, q, k, queue: api.info_nce_loss(q, k, queue), frozen),
    "info_nce, both": (lambda api, q, k, queue: api.info_nce_loss(q, k, queue, in_batch=True), frozen),
    "sce, queue": (lambda api, q, k, queue: api.sce_loss(q, k, queue=queue, coeff=0.3), frozen),
    "sce, zero": (
        lambda api, q, k, queue: api.sce_loss(q, k, queue=queue, positive_in_target="zero"),
        frozen,
    ),
    "sce, both": (lambda api, q, k, queue: api.sce_loss(q, k, k, queue), frozen),
    "sce, large logits": (
        lambda api, q, k, queue: api.sce_loss(q, k, queue=queue, temperature=0.004, target_temperature=0.003),
        frozen,
    ),
    "dimcl": (lambda api, x, y: api.dimcl_loss(x, y), pair),
    "dimcl, mask": (masked_dimcl, pair),
}


def differentiated(name: str, dtype: torch.dtype, api: object = clk, wide: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    loss, make = CASES[name]
    inputs = make(dtype)
    if wide:
        inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    value = loss(api, *inputs)
    leaves = [x for x in inputs if x.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.fixture
def budget() -> Iterator[Callable[[int], None]]:
    """Sets the bytes of logits that a loss may keep."""
    module = extension.cpu.module
    before = module.keep_budget()
    yield module.set_keep_budget
    module.set_keep_budget(before)


@pytest.mark.parametrize("bytes_kept", [0, 60_000, 1 << 26])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_whatever_is_kept(
    name: str, dtype: torch.dtype, bytes_kept: int, budget: Callable[[int], None]
) -> None:
    """60 kB hold the logits of some queries over the queue, and of no other loss."""
    budget(bytes_kept)
    expected = differentiated(name, dtype, reference, wide=True)
    loss, *gradients = differentiated(name, dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    normalised = name.startswith(("nt_xent", "dimcl")) and dtype in (torch.bfloat16, torch.float16)
    torch.testing.assert_close(loss.double(), expected[0], rtol=tolerance if normalised else exact, atol=0)
    for gradient, right in zip(gradients, expected[1:], strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_threads(name: str) -> None:
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(differentiated(name, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        torch.testing.assert_close(one, three, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_alone_is_the_same(name: str) -> None:
    torch.manual_seed(0)
    loss, make = CASES[name]
    inputs = make(torch.float32)
    with torch.no_grad():
        alone = loss(clk, *inputs)
    assert alone == loss(clk, *inputs).detach() and not alone.requires_grad


@pytest.mark.parametrize("name", CASES)
def test_upstream_gradients_multiply(name: str) -> None:
    """Also what float16 could not hold before it is multiplied."""
    loss, make = CASES[name]
    inputs = make(torch.float16)
    leaves = [x for x in inputs if x.requires_grad]
    value = loss(clk, *inputs)
    small = torch.autograd.grad(value, leaves, torch.tensor(2.0**-20), retain_graph=True)
    back = torch.autograd.grad(value * 2.0**-20, leaves, torch.tensor(2.0**20), retain_graph=True)
    plain = torch.autograd.grad(value, leaves)
    for x, y, z in zip(small, back, plain, strict=True):
        torch.testing.assert_close(y, z, rtol=0, atol=0)
        assert x.abs().max() <= 2.0**-19 * z.abs().max()


def test_a_queue_may_change_before_the_backward() -> None:
    q, k, queue = frozen(torch.float32)
    for loss in (clk.info_nce_loss(q, k, queue), clk.sce_loss(q, k, queue=queue)):
        (before,) = torch.autograd.grad(loss, q, retain_graph=True)
        queue.normal_()
        k.zero_()
        (after,) = torch.autograd.grad(loss, q)
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_twice_through_a_kept_graph() -> None:
    """The second backward finds the gradients as the first did, whatever became of the first's result."""
    x, y = pair(torch.float32)
    loss = clk.clip_loss(x, y, 10.0)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * once, rtol=0, atol=0)


def second_derivatives(name: str, api: object, after_a_first: bool = False) -> list[Tensor]:
    """Gradients of the squared gradients; `after_a_first`: of inputs held by nobody, after a backward."""
    torch.manual_seed(0)
    loss, make = CASES[name]
    inputs = make(torch.float64)
    leaves = [x for x in inputs if x.requires_grad]
    if after_a_first:
        value = loss(api, *(F.normalize(x * 1.5, dim=1) if x.requires_grad else x for x in inputs))
        value.backward(retain_graph=True)
    else:
        value = loss(api, *inputs)
    grads = torch.autograd.grad(value, leaves, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))


@pytest.mark.parametrize("name", ["supcon", "clip", "nt_xent", "info_nce, queue", "sce, queue", "dimcl"])
def test_second_derivatives(name: str) -> None:
    pairs = zip(second_derivatives(name, clk), second_derivatives(name, reference), strict=True)
    for found, right in pairs:
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["supcon", "clip", "nt_xent", "info_nce, queue", "sce, queue", "dimcl"])
def test_second_derivatives_after_a_first_backward(name: str) -> None:
    """All of it, or an error: never a part."""
    try:
        found = second_derivatives(name, clk, after_a_first=True)
    except RuntimeError as error:
        assert "second derivative" in str(error) and "queue" in name
        return
    for gradient, right in zip(found, second_derivatives(name, reference, after_a_first=True), strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-8, atol=1e-12)


def test_a_converged_query_beside_a_queue_keeps_its_digits() -> None:
    """A loss of e^-36, which no difference of logits holds."""
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    queue = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    loss = clk.info_nce_loss(q, q.detach(), queue, temperature=1 / 36)
    small = torch.tensor(-36.0, dtype=torch.float64).exp()
    torch.testing.assert_close(loss.detach(), small, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss, q)
    torch.testing.assert_close(
        gradient, 36 * small * torch.tensor([[-1.0, 1.0]]).double(), rtol=1e-12, atol=0
    )


def test_infinite_logits_make_a_nan() -> None:
    x, y = pair(torch.float32)
    with torch.no_grad():
        x[3, 0] = torch.inf
        y[:, 0] = -y[:, 0].abs() - 0.1
    assert clk.clip_loss(x, y, 10.0).isnan()


@pytest.mark.parametrize("needs", [(False, False, False), (True, False, False), (True, True, True)], ids=str)
def test_opcheck(needs: tuple[bool, bool, bool]) -> None:
    torch.manual_seed(0)
    q, k, z, scale = unit(9, torch.float32), unit(9, torch.float32), torch.randn(5, 3), torch.tensor(4.0)
    index, how = torch.arange(9), (1.0, True, False, True)
    library = torch.ops.cl_kernels
    both = (q, k, scale, None, None, None, "all", False, index, None, None, True, False, *how, needs)
    one = (q, None, scale, 0, None, None, "all", False, index.roll(1), None, None, False, True, *how, needs)
    queue = (q, [k, k[:5]], k, scale, scale, scale / 8, None, index, False, True, needs[:2])
    beside = (q, [k], None, scale, None, None, k.flip(0), None, False, False, needs[:2])
    for op, arguments in (
        (library.contrastive_loss, both), (library.contrastive_loss, one), (library.key_loss, queue),
        (library.key_loss, beside), (library.dimcl_loss, (z, z.flip(0), scale, None, True, needs)),
    ):  # fmt: skip
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_wrong_arguments_of_the_ops_are_errors() -> None:
    q, scale, index = unit(4, torch.float32), torch.tensor(4.0), torch.arange(4)
    key_loss, contrastive_loss = torch.ops.cl_kernels.key_loss, torch.ops.cl_kernels.contrastive_loss
    for queries, positive in ((q[:0], index[:0]), (q, index - 1), (q, index + 1), (q.long(), index)):
        keys = q.to(queries.dtype)
        with pytest.raises((ValueError, IndexError, TypeError)):
            key_loss(queries, [keys], None, scale, None, None, None, positive, False, True, [True, True])
    for mask in (torch.empty(0, 0), torch.empty(5, 0)):
        problem = (q, None, scale, 0, None, None, "all", False, None, mask, None, False)
        with pytest.raises(ValueError, match="positive_mask"):
            contrastive_loss(*problem, False, 1.0, True, False, True, [True, False, False])


def test_the_environment_sets_the_budget() -> None:
    code = "from cl_kernels import _C; print(_C.keep_budget())"
    assert int(run_python("-c", code, CL_KERNELS_KEEP_MB="1.5").stdout) == 1_572_864
    assert int(run_python("-c", code, CL_KERNELS_KEEP_MB="").stdout) == 64 << 20
    for wrong in ("64MB", "-1", "nan"):
        failed = run_python("-c", code, CL_KERNELS_KEEP_MB=wrong)
        assert "CL_KERNELS_KEEP_MB must be a number of MB" in failed.stderr


def test_memory_beyond_the_budget_grows_with_the_rows_alone(budget: Callable[[int], None]) -> None:
    """4096 pairs would keep 64 MB; without, the op leaves nothing but gradients of 2 x 1 MB."""
    budget(0)
    x, y = (F.normalize(torch.randn(4096, 64), dim=1).requires_grad_() for _ in range(2))
    with torch.profiler.profile(profile_memory=True) as recorded:
        clk.clip_loss(x, y, 10.0).backward()
    largest = max(event.cpu_memory_usage for event in recorded.events())
    assert largest < 16e6


def test_memory_for_logits_goes_from_one_loss_to_the_next(budget: Callable[[int], None]) -> None:
    """16 MB, until the budget is set anew."""
    budget(1 << 26)
    x, y = (F.normalize(torch.randn(2048, 32), dim=1).requires_grad_() for _ in range(2))

    def allocated() -> int:
        with torch.profiler.profile(profile_memory=True) as recorded:
            clk.clip_loss(x, y, 10.0).backward()
        return max(event.cpu_memory_usage for event in recorded.events())

    assert allocated() > 16e6
    assert allocated() < 4e6
    budget(1 << 26)
    assert allocated() > 16e6
