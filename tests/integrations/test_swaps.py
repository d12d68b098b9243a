"""Swaps, patches and twins of a library made for these tests."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import pickle
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peers.side_by_side import ran
from torch import nn

import cl_kernels as clk
from cl_kernels import integrations
from cl_kernels.integrations import _patch, _registry, _swap
from cl_kernels.integrations._registry import Library

LIBRARY = """
import torch
from torch import nn

__version__ = "1.2"


def plain(x, power=1):
    '''A function.'''
    return x.sum() ** power


class Loss(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def weight(self):
        return self.scale

    def forward(self, x, power: int = 1):
        '''A loss.'''
        if power < 0:
            raise RuntimeError("no such power")
        return (self.weight() * x.sum()) ** power


class Child(Loss):
    pass


class Heavier(Loss):
    def weight(self):
        return 2 * self.scale


class Wrapper(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss
        self.more = nn.ModuleList([loss])

    def forward(self, x):
        return self.loss(x) + self.more[0](x)
"""

ADAPTER = """
import fakelib.losses as losses
from cl_kernels.integrations._swap import Unfused, fused


@fused("fakelib.losses:plain")
def plain(x, power=1):
    return x.sum() if power == 1 else _refuse(power)


class Loss(losses.Loss):
    @fused("fakelib.losses:Loss.forward", relies_on=("weight",))
    def forward(self, x, power=1):
        return self.scale * x.sum() if power == 1 else _refuse(power)


class Child(losses.Child):
    @fused("fakelib.losses:Child.forward")
    def forward(self, x, power=1):
        return self.scale * x.sum() if power == 1 else _refuse(power)


def _refuse(power):
    raise Unfused(f"power {power}")
"""


@pytest.fixture
def fakelib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A library `fakelib`, and `cl_kernels.integrations.fake` for it."""
    (tmp_path / "fakelib").mkdir()
    (tmp_path / "fakelib" / "__init__.py").write_text(
        "from .losses import *\nfrom .losses import __version__\n"
    )
    (tmp_path / "fakelib" / "losses.py").write_text(LIBRARY)
    (tmp_path / "adapter.py").write_text(ADAPTER)
    monkeypatch.syspath_prepend(str(tmp_path))
    for registry in (_registry, _patch):
        monkeypatch.setattr(registry, "LIBRARIES", {"fake": Library("fakelib", "fake", ("1.2",))})
    monkeypatch.setattr(_patch, "_PACKAGES", {"fakelib"})
    monkeypatch.setattr(_patch, "_patched", {})
    monkeypatch.setattr(_swap, "SWAPS", {})
    for name in ("_fused", "_fallback"):
        getattr(_swap, name).clear()
    _swap._said.clear()
    module = ModuleType("cl_kernels.integrations.fake")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(ADAPTER, str(tmp_path / "adapter.py"), "exec"), vars(module))
    yield sys.modules["fakelib"]
    clk.unpatch("fake")
    for name in [name for name in sys.modules if name.partition(".")[0] == "fakelib"]:
        del sys.modules[name]


X = torch.arange(3.0)


def test_an_adapter_is_a_subclass_that_runs_fused(fakelib: Any) -> None:
    adapter = sys.modules["cl_kernels.integrations.fake"].Loss(2.0)
    assert isinstance(adapter, fakelib.Loss) and adapter(X) == 6.0
    assert ran("fake.Loss") == (1, 0)


def test_what_cannot_be_fused_runs_as_the_library_has_it_and_says_so_once(
    fakelib: Any, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = sys.modules["cl_kernels.integrations.fake"].Loss(2.0)
    with caplog.at_level(logging.WARNING):
        assert adapter(X, power=2) == 36.0 and adapter(X, power=2) == 36.0
        adapter(X, power=3)
    assert [record.getMessage() for record in caplog.records] == [
        "fake.Loss runs as the library has it: power 2",  # and not again for another number
    ]
    assert ran("fake.Loss") == (0, 3)


def test_errors_are_the_library_s(fakelib: Any) -> None:
    adapter = sys.modules["cl_kernels.integrations.fake"].Loss()
    with pytest.raises(RuntimeError, match="no such power") as caught:
        adapter(X, power=-1)
    assert caught.value.__context__ is None
    with pytest.raises(TypeError, match="forward"):
        adapter()


def test_a_subclass_with_a_method_of_its_own_is_not_fused(fakelib: Any) -> None:
    with clk.patch("fake", verbose=False):
        assert fakelib.Heavier()(X) == 6.0
    assert ran("fake.Loss") == (0, 1)


def test_a_patch_of_what_is_inherited_keeps_the_order_of_classes(fakelib: Any) -> None:
    class Between(fakelib.Loss):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1000

    class Both(fakelib.Child, Between):  # type: ignore[misc]
        pass

    with clk.patch("fake", verbose=False):
        assert fakelib.Child()(X) == 3.0 and ran("fake.Child") == (1, 0)
        assert Both()(X) == 1003.0
    assert "forward" not in vars(fakelib.Child)


def test_patch_reaches_what_exists(fakelib: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before, function = fakelib.Loss(), fakelib.plain
    signatures = [inspect.signature(x) for x in (fakelib.Loss.forward, fakelib.Loss, fakelib.plain)]
    patched = clk.patch("fake")
    assert capsys.readouterr().out.split() == [
        word for target in _swap.SWAPS for word in ("cl_kernels", "serves", target)
    ]  # fmt: skip
    assert before(X) == 3.0 and ran("fake.Loss") == (1, 0)
    assert fakelib.plain(X) == 3.0 and fakelib.losses.plain is fakelib.plain is not function
    assert ran("fake.plain") == (1, 0)
    assert [inspect.signature(x) for x in (fakelib.Loss.forward, fakelib.Loss, fakelib.plain)] == signatures
    assert fakelib.Loss.forward.__doc__ == "A loss." and fakelib.plain.__name__ == "plain"
    assert fakelib.plain(X, power=2) == 9.0 and before(X, 2) == 9.0  # as the library has it
    assert patched.swapped == list(_swap.SWAPS)
    clk.unpatch("fake")
    assert fakelib.plain is fakelib.losses.plain is function
    before(X)
    assert ran("fake.Loss") == (1, 1)


def test_patch_as_a_context_manager(fakelib: Any) -> None:
    original = fakelib.Loss.forward
    with pytest.raises(KeyError), clk.patch("fake", verbose=False):
        with clk.patch("fake") as inner:  # is patched: leaves it so
            assert inner.swapped == []
        assert fakelib.Loss.forward is not original
        raise KeyError
    assert fakelib.Loss.forward is original


def test_patch_refuses_versions_that_it_does_not_know(
    fakelib: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fakelib, "__version__", "2.0")
    with pytest.raises(RuntimeError, match=r"fake 2\.0 is not one that was compared: 1\.2"):
        clk.patch("fake")
    loss = fakelib.Loss()
    assert clk.accelerate(loss) is loss
    assert "fake 2.0 is not one that was compared" in caplog.text


def test_patch_refuses_sources_that_it_does_not_know(fakelib: Any) -> None:
    swap = _swap.SWAPS["fakelib.losses:plain"]
    swap.known = (_registry.digest(fakelib.plain),)
    with clk.patch("fake", verbose=False):
        pass
    swap.known = ("0" * 16,)
    original = fakelib.Loss.forward
    with pytest.raises(RuntimeError, match="plain has another source"):
        clk.patch("fake")
    assert fakelib.Loss.forward is original


def test_unknown_libraries_are_refused() -> None:
    for function in (clk.patch, clk.unpatch):
        with pytest.raises(ValueError, match=r"must be one of pytorch_metric_learning, .*, got 'lihgtly'"):
            function("lihgtly")
    assert not hasattr(integrations, "lihgtly")


def test_accelerate_shares_parameters_and_keeps_the_original(fakelib: Any) -> None:
    loss = fakelib.Loss(3.0)
    twin = clk.accelerate(loss)
    assert isinstance(twin, fakelib.Loss) and type(loss) is fakelib.Loss
    twin(X).backward()
    assert ran("fake.Loss") == (1, 0) and loss.scale.grad == 3.0 and twin.scale is loss.scale
    loss(X)
    assert ran("fake.Loss") == (1, 0)
    assert clk.accelerate(twin) is twin
    assert copy.deepcopy(twin)(X) == 9.0 and ran("fake.Loss") == (2, 0)
    assert twin.state_dict().keys() == loss.state_dict().keys()
    assert clk.accelerate(fakelib.plain)(X) == 3.0 and ran("fake.plain") == (1, 0)


def test_accelerate_reaches_into_wrappers(fakelib: Any) -> None:
    wrapper = fakelib.Wrapper(fakelib.Loss())
    twin = clk.accelerate(wrapper)
    assert twin is not wrapper and twin(X) == 6.0
    assert ran("fake.Loss") == (2, 0)
    wrapper(X)
    assert ran("fake.Loss") == (2, 0)


def test_a_twin_outlives_a_patch(fakelib: Any) -> None:
    with clk.patch("fake", verbose=False):
        twin = clk.accelerate(fakelib.Loss())
    twin(X)
    assert ran("fake.Loss") == (1, 0)


def test_a_twin_has_methods_and_hooks_of_its_own(fakelib: Any) -> None:
    loss = fakelib.Loss(3.0)
    loss.chosen = loss.weight
    twin = clk.accelerate(loss)
    assert twin.chosen.__self__ is twin
    twin.register_forward_hook(lambda *_: pytest.fail("the original calls the twin's hook"))
    twin.more = nn.Identity()
    loss(X)
    assert not hasattr(loss, "more")


def test_a_twin_is_pickled(fakelib: Any) -> None:
    twin = pickle.loads(pickle.dumps(clk.accelerate(fakelib.Loss(3.0))))
    assert isinstance(twin, fakelib.Loss) and twin(X) == 9.0 and ran("fake.Loss") == (1, 0)


def test_accelerate_leaves_an_instance_with_a_method_of_its_own(fakelib: Any) -> None:
    loss = fakelib.Loss()
    loss.forward = lambda x: 7.0
    assert clk.accelerate(loss) is loss
    compiled = fakelib.Loss()
    compiled.compile()
    assert clk.accelerate(compiled) is compiled


def test_methods_in_the_place_of_the_library_s_are_not_passed_over(
    fakelib: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = clk.accelerate(fakelib.Loss())
    twin.weight = lambda: 5.0
    assert twin(X) == 15.0
    monkeypatch.setattr(fakelib.Loss, "weight", lambda self: 4.0)
    assert clk.accelerate(fakelib.Loss())(X) == 12.0
    assert ran("fake.Loss") == (0, 2)
    monkeypatch.setattr(fakelib.Loss, "forward", lambda self, x: 3.0)
    with pytest.raises(RuntimeError, match=r"Loss\.forward has another source"):
        clk.patch("fake")


def test_errors_within_are_raised_at_once(fakelib: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours, or of a user's function, is neither hidden nor run into twice."""
    called = []

    def user(self: Any, x: torch.Tensor) -> None:
        called.append(x)
        raise ValueError("the user's own")

    swap = _swap.SWAPS["fakelib.losses:Loss.forward"]
    monkeypatch.setattr(swap, "ours", user)
    with pytest.raises(ValueError, match="the user's own"):
        clk.accelerate(fakelib.Loss())(X)
    assert len(called) == 1 and ran("fake.Loss") == (0, 0)


def test_a_fallback_holds_nothing(fakelib: Any) -> None:
    x = torch.zeros(3)
    held = weakref.ref(x)
    gc.disable()
    try:
        clk.accelerate(fakelib.Loss())(x, power=2)
        del x
        assert held() is None
    finally:
        gc.enable()


def test_forward_mode_runs_as_the_library_has_it(fakelib: Any) -> None:
    _, tangent = torch.func.jvp(clk.accelerate(fakelib.plain), (X,), (torch.ones(3),))
    assert tangent == 3.0 and ran("fake.plain") == (0, 1)


def test_a_patch_that_fails_is_taken_back(fakelib: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = fakelib.plain
    swap = _swap.SWAPS["fakelib.losses:Loss.forward"]
    with monkeypatch.context() as faulty, pytest.raises(ZeroDivisionError):
        faulty.setattr(swap, "over", lambda *_: 1 / 0)
        clk.patch("fake")
    assert fakelib.plain is original


def test_unpatch_reaches_names_that_were_imported_since(fakelib: Any) -> None:
    original = fakelib.plain
    with clk.patch("fake", verbose=False):
        fakelib.late = fakelib.losses.plain
        assert fakelib.late is not original
    assert fakelib.late is original


def test_accelerate_leaves_what_it_does_not_know(fakelib: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Mine(fakelib.Loss):  # type: ignore[misc]
        pass

    for criterion in (Mine(), nn.CrossEntropyLoss(), fakelib.Wrapper(nn.Identity()), len, 3):
        assert clk.accelerate(criterion) is criterion
    assert len(caplog.records) == 5
    assert "CrossEntropyLoss is left as it is: no adapter here knows torch.nn" in caplog.text


def test_a_hook_serves_the_library_that_asks(fakelib: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = fakelib.losses.plain
    for asked, fused in {"": 0, "lightly": 0, "1": 1, "lightly, fake": 1, "all": 1}.items():
        monkeypatch.setenv("CL_KERNELS_SERVE", asked)
        before = ran("fake.plain")[0]
        hooked = integrations.served("fake", "fakelib.losses:plain")(original)
        assert hooked(X, power=1) == 3.0 and hooked(X, 2) == 9.0
        assert ran("fake.plain")[0] - before == fused, asked
        assert inspect.signature(hooked) == inspect.signature(original)


def test_a_hook_without_an_adapter_leaves_the_library_alone(
    fakelib: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CL_KERNELS_SERVE", "1")
    for library, target in (("fake", "fakelib.losses:gone"), ("gone", "fakelib.losses:plain")):
        hooked = integrations.served(library, target)(fakelib.losses.plain)
        assert hooked(X) == hooked(X) == 3.0
    assert len(caplog.records) == 2 and ran("fake.plain") == (0, 0)


def test_a_module_s_hook_keeps_subclasses(fakelib: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CL_KERNELS_SERVE", "fake")
    hook = integrations.served("fake", "fakelib.losses:Loss.forward")
    monkeypatch.setattr(fakelib.Loss, "forward", hook(fakelib.Loss.forward))
    assert fakelib.Loss()(X) == 3.0 and fakelib.Heavier()(X) == 6.0
    assert ran("fake.Loss") == (1, 1)


def test_adapters_are_imported_when_they_are_used() -> None:
    code = """
        import sys, cl_kernels
        here = {x.rpartition(".")[2] for x in sys.modules if x.startswith("cl_kernels.integrations.")}
        assert here == {"_patch", "_registry", "_swap"}, here
        assert "lightly" in dir(cl_kernels.integrations)
        import cl_kernels.integrations.supcontrast
        assert "cl_kernels.integrations.supcontrast" in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_twins_are_pickled_by_their_adapter(fakelib: Any) -> None:
    twin = clk.accelerate(fakelib.Loss(2.0))
    loss = pickle.loads(pickle.dumps(twin))
    assert type(loss) is type(twin) is not fakelib.Loss
    assert loss(X) == 6.0 and ran("fake.Loss") == (1, 0)
