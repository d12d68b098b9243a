"""PyTorch's ways with a loss in training: compiled steps, scaled losses, checkpoints, hooks, subclasses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from comparisons import unit
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import cl_kernels as clk

pytestmark = pytest.mark.usefixtures("one_thread")

# Of two views x and y [N, D], a temperature and a coefficient; the latter is the frozen part's in some.
LOSSES: dict[str, Callable[[Tensor, Tensor, Any, Any], Tensor]] = {
    "supcon": lambda x, y, t, c: clk.supcon_loss(torch.stack([x, y], 1), temperature=t, base_temperature=c),
    "supcon labels": lambda x, y, t, c: clk.supcon_loss(
        torch.stack([x, y], 1), torch.arange(len(x)) % 3, temperature=t
    ),
    "supcon capped": lambda x, y, t, c: clk.supcon_loss(
        torch.stack([x, y], 1), torch.arange(len(x)) % 3, temperature=t, positives_cap=2
    ),
    "selfcon": lambda x, y, t, c: clk.selfcon_loss(torch.stack([x, y], 1), temperature=t),
    "multilevel": lambda x, y, t, c: clk.multilevel_loss([torch.stack([x, y], 1)], temperature=t),
    "stablerep": lambda x, y, t, c: clk.stablerep_loss(x, torch.arange(len(x)) % 3, temperature=t),
    "nt_xent": lambda x, y, t, c: clk.nt_xent_loss(x, y, temperature=t),
    "info_nce": lambda x, y, t, c: clk.info_nce_loss(x, y, temperature=t),
    "info_nce queue": lambda x, y, t, c: clk.info_nce_loss(x, y.detach(), y.detach().flip(0), temperature=t),
    "clip": lambda x, y, t, c: clk.clip_loss(x, y, 1 / t),
    "dcl": lambda x, y, t, c: clk.dcl_loss(x, y, temperature=t, sigma=c),
    "sce": lambda x, y, t, c: clk.sce_loss(x, y, temperature=t, coeff=c),
    "sce queue": lambda x, y, t, c: clk.sce_loss(
        x, y.detach(), queue=y.detach().flip(0), temperature=t, target_temperature=c, coeff=c
    ),
    "dimcl": lambda x, y, t, c: clk.dimcl_loss(x, y, temperature=t),
}


def pair(n: int = 6) -> tuple[Tensor, Tensor]:
    x, y = unit(n, 4), unit(n, 4)
    return x.requires_grad_(), y.requires_grad_()


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [x for x in torch.autograd.grad(loss, inputs, allow_unused=True) if x is not None]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dynamic", [None, True])
def test_twenty_compiled_steps(name: str, dynamic: bool | None) -> None:
    """With a temperature, a coefficient and a learning rate that change: one graph, and one more for new
    batch sizes."""
    encoder = nn.Linear(5, 4)
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()

    def loss_of(x: Tensor, temperature: Tensor, coefficient: Tensor) -> Tensor:
        first, second = F.normalize(encoder(x), dim=-1).unbind(1)
        return LOSSES[name](first, second, temperature, coefficient)

    compiled = torch.compile(loss_of, fullgraph=True, backend=counter, dynamic=dynamic)

    def step(batch: int, share: float) -> None:
        compiled(torch.randn(batch, 2, 5), torch.tensor(0.1 + share), torch.tensor(0.5 - share)).backward()
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter -= (0.1 - share) * parameter.grad
                parameter.grad = None

    for i in range(20):
        step(6, 0.005 * i)
    assert counter.frame_count == 1
    for batch in (9, 7, 12, 6):
        step(batch, 0.0)
    assert counter.frame_count <= (1 if dynamic else 2)


@pytest.mark.parametrize("dynamic", [None, True])
def test_schedules_of_floats_in_compiled_modules(dynamic: bool | None) -> None:
    """Set on the module or given to a call: PyTorch takes the first for constants, and no other."""
    x, k = unit(6, 4).requires_grad_(), unit(6, 4)
    for on_module in (True, False):
        criterion, counter = clk.SCELoss(), CompileCounterWithBackend("eager")
        torch._dynamo.reset()
        compiled = torch.compile(criterion, fullgraph=True, backend=counter, dynamic=dynamic)
        for i in range(20):
            schedule = {"temperature": 0.1 + 0.01 * i, "coeff": 0.5 - 0.01 * i}
            if on_module:
                criterion.temperature, criterion.coeff = schedule.values()
            compiled(x, k, **({} if on_module else schedule)).backward()
        assert counter.frame_count <= (1 if dynamic else 2)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_scaler(name: str) -> None:
    """The scale comes out again, and a step with an infinite gradient is left out."""
    x, y = pair()
    wanted = gradients(LOSSES[name](x, y, 0.2, 0.4), x)[0]
    weight = nn.Parameter(x.detach().clone())
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    for factor in (1.0, torch.inf):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = LOSSES[name](weight, y.detach(), 0.2, 0.4)
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(weight.detach(), x.detach() - wanted)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_checkpointed(name: str, reentrant: bool) -> None:
    x, y = pair()
    t = torch.tensor([0.2], requires_grad=True)
    wanted = gradients(LOSSES[name](x * 1, y * 1, t, 0.4), x, y, t)

    def part(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return LOSSES[name](x * 1, y * 1, t, 0.4)

    checkpoint(part, x, y, t, use_reentrant=reentrant).backward()
    found = [z.grad for z in (x, y, t) if z.grad is not None]
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_two_backwards_hooks_and_packed_tensors(name: str) -> None:
    x, y = pair()
    seen: list[Tensor] = []
    loss = LOSSES[name](x, y, 0.2, 0.4)
    for _ in range(2):
        loss.backward(retain_graph=True)
    first = gradients(loss, x, y)
    assert torch.equal(x.grad, 2 * first[0])
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, x)
    x.register_hook(lambda grad: seen.append(grad) or grad * 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda z: z.clone(), lambda z: z):
        loss = LOSSES[name](x, y, 0.2, 0.4)
    doubled, *rest = gradients(loss, x, y)
    torch.testing.assert_close([seen[0], doubled, *rest], [first[0], 2 * first[0], *first[1:]])


@pytest.mark.parametrize("name", LOSSES)
def test_modes(name: str) -> None:
    """Without gradients, under inference mode, and with deterministic algorithms: the same bits."""
    x, y = pair()
    wanted = LOSSES[name](x, y, 0.2, 0.4)
    grads = gradients(wanted, x, y)
    with torch.no_grad():
        assert torch.equal(LOSSES[name](x, y, 0.2, 0.4), wanted)
    with torch.inference_mode():
        loss = LOSSES[name](x, y, 0.2, 0.4)
        assert loss.is_inference()
        assert torch.equal(loss, wanted)
    torch.use_deterministic_algorithms(True)
    try:
        again = gradients(LOSSES[name](x, y, 0.2, 0.4), x, y)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))


class Tagged(Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("name", LOSSES)
def test_subclasses(name: str) -> None:
    x, y = pair()
    wanted = gradients(LOSSES[name](x, y, 0.2, 0.4), x)[0]
    for kind in (nn.Parameter, lambda z: z.as_subclass(Tagged).requires_grad_()):
        z = kind(x.detach().clone())
        loss = LOSSES[name](z, y, 0.2, 0.4)
        loss.backward()
        torch.testing.assert_close(z.grad.as_subclass(Tensor), wanted)


MODULES: list[Callable[[Any], nn.Module]] = [
    clk.SupConLoss, clk.SelfConLoss, clk.StableRepLoss, clk.SCELoss, clk.DimCLLoss, clk.MultiLevelConLoss,
    clk.NTXentLoss, clk.InfoNCELoss, clk.DCLLoss,
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_copies_of_modules(module: Callable[[Any], nn.Module]) -> None:
    """By deepcopy and pickle, with a temperature that is learnt: a parameter of the copy's own."""
    criterion = module(nn.Parameter(torch.tensor([0.2])))
    assert [name for name, _ in criterion.named_parameters()] == ["temperature"]
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert copied.temperature is not criterion.temperature
        assert repr(copied) == repr(criterion)
        copied.load_state_dict({"temperature": torch.tensor([0.3])})
        assert criterion.temperature.item() == pytest.approx(0.2)


def test_a_module_of_a_group_that_is_gone() -> None:
    """As a checkpoint of many processes is loaded by one."""
    criterion = clk.SupConLoss(0.2)
    state = {**criterion.__getstate__(), "group": "world"}
    loaded = clk.SupConLoss.__new__(clk.SupConLoss)
    with pytest.warns(UserWarning, match="this process alone"):
        loaded.__setstate__(state)
    features = unit(4, 2, 3)
    assert torch.equal(loaded(features), criterion(features))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors_are_refused(mesh: Any) -> None:
    from torch.distributed.tensor import distribute_tensor

    x, y = pair()
    spread, t = distribute_tensor(x.detach(), mesh), distribute_tensor(torch.tensor([0.2]), mesh)
    views = distribute_tensor(torch.stack([x, y], 1).detach(), mesh)
    for name, loss in LOSSES.items():
        with pytest.raises(TypeError, match=r"DTensor: give .*to_local\(\)"):
            if "con" in name or name == "multilevel":
                clk.multilevel_loss([views])
            else:
                loss(spread, y, 0.2, 0.4)
    with pytest.raises(TypeError, match=r"full_tensor\(\)"):
        clk.nt_xent_loss(x, y, temperature=t)
    assert clk.nt_xent_loss(spread.to_local(), y, temperature=t.full_tensor()).isfinite()
    # A group of one process is that process.
    whole = clk.supcon_loss(torch.stack([x, y], 1), group=dist.group.WORLD, exchange="ring")
    assert torch.equal(whole, clk.supcon_loss(torch.stack([x, y], 1)))
    assert torch.equal(clk.distributed.gather_rows(x, dist.group.WORLD), x)
