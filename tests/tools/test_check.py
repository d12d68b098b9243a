"""`python -m cl_kernels check`: what it covers, what it says, and that it finds what is wrong."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cl_kernels as clk
from cl_kernels import __main__, extension, reference, validation
from cl_kernels.losses import selfcon, supcon
from cl_kernels.tools import check, check_cases, parity
from cl_kernels.tools.check_cases import CASES, Data

SMALL = ["--rows", "7", "--width", "5"]
NO_LOSSES = ("sce_targets", "accelerate", "patch", "unpatch")  # `shared_targets` calls the first
FUNCTIONS = sorted(
    name for name in clk.__all__ if inspect.isfunction(getattr(clk, name)) and name not in NO_LOSSES
)
CHOICES = {
    "contrast_mode": supcon.CONTRAST_MODES,
    "summation": supcon.SUMMATIONS,
    "denominator": supcon.DENOMINATORS,
    "no_positive": supcon.NO_POSITIVE,
    "anchors": selfcon.ANCHORS,
    "positive_in_target": validation.TARGET_POSITIVES,
    "reduction": validation.REDUCTIONS,
    "among": ("all", "same", "different"),
    "exclude": ("self", None, 1),
    "normalize": (False, True),
    "in_batch": (False, True),
    "both_axes": (False, True),
}

pytestmark = pytest.mark.usefixtures("one_thread")


needs_cpu_kernels = pytest.mark.skipif(
    extension.cpu.module is None, reason=f"no CPU kernels: {extension.cpu.missing_because}"
)


def parameters(function: str) -> dict[str, inspect.Parameter]:
    """Those of one process: tests/distributed has cases of groups."""
    found = inspect.signature(getattr(clk, function)).parameters
    return {name: x for name, x in found.items() if name not in ("group", "exchange")}


def run(*arguments: str) -> int:
    return __main__.main(["check", *SMALL, *arguments])


def raising(error: Exception, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def replacement(*args: Any, **options: Any) -> Tensor:
        raise error

    return replacement


def scaled(factor: float, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def replacement(*args: Any, **options: Any) -> Tensor:
        return factor * function(*args, **options)

    return replacement


# The cases


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_argument_has_a_case(function: str) -> None:
    given = {name for case in CASES if case.function == function for name in case.arguments}
    scalars = Data(2, 1, "random", 0.1).scalars
    missing = set(parameters(function)) - given - set(scalars)
    assert not missing, f"no case gives {function} {missing}"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_choice_has_a_case(function: str) -> None:
    for name, parameter in parameters(function).items():
        if isinstance(parameter.default, str | bool):
            assert name in CHOICES, f"which values does {name} of {function} take?"
        given = [case.options.get(name, parameter.default) for case in CASES if case.function == function]
        assert set(CHOICES.get(name, ())) <= {x for x in given if not isinstance(x, list)}, name


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_learnable_scalar_has_a_case(function: str) -> None:
    learnt = {name for case in CASES if case.function == function for name in case.named_inputs}
    assert set(check_cases.LEARNT) & set(parameters(function)) <= learnt


def test_cases_are_distinct_and_named() -> None:
    assert {case.function for case in CASES} == set(FUNCTIONS)
    assert len({(case.loss, str(case)) for case in CASES}) == len(CASES)


def test_data_depend_on_the_seed_alone() -> None:
    one, other = (Data(9, 4, "converged", 0.1) for _ in range(2))
    queue = other.queue  # before what it is made of
    assert torch.equal(one.second, other.second)
    assert torch.equal(one.queue, queue)
    assert not torch.equal(one.queue, Data(9, 4, "converged", 0.1, seed=1).queue)
    assert ((one.first * one.second).sum(1) > 0.9).all()


# The judgement


def test_plain_sums_end_with_their_block() -> None:
    x = torch.eye(4, dtype=torch.bfloat16)
    assert reference.contrastive_lse(x).dtype == torch.float32
    with pytest.raises(KeyError), reference.plain_sums():
        assert reference.contrastive_lse(x).dtype == torch.bfloat16
        raise KeyError
    assert reference.contrastive_lse(x).dtype == torch.float32


def test_errors_of_infinities() -> None:
    infinite, one = torch.tensor([-torch.inf]), torch.tensor([1.0])
    assert parity.error(infinite, infinite) == 0
    assert parity.error(one, infinite) == parity.error(one * torch.nan, one) == torch.inf


def test_a_sum_may_be_off_by_its_rows() -> None:
    problem = parity.Problem("nt_xent_loss", {"z0": parity.unit(6, 3), "z1": parity.unit(6, 3)})
    zero = torch.zeros(())
    mean, total = (
        parity.floor("loss", problem.with_options(reduction=how), zero, torch.float32)
        for how in ("mean", "sum")
    )
    assert total == pytest.approx(12 * mean)


def test_a_learnt_scalar_is_as_exact_as_the_features() -> None:
    """Its gradient is float32, and made of logits of which the features' dtype has few digits."""
    inputs = {"z0": parity.unit(6, 3), "z1": parity.unit(6, 3), "temperature": torch.tensor(0.5)}
    problem = parity.Problem("nt_xent_loss", inputs).to(torch.bfloat16)
    truth, plain = parity.exact(problem), parity.plain(problem)
    lucky = {**plain, "gradient of temperature": truth["gradient of temperature"].float()}
    limits = {result.name: result.limit for result in parity.compared(problem, truth, plain, lucky)}
    assert limits["gradient of temperature"] > torch.finfo(torch.bfloat16).eps * float(
        truth["gradient of temperature"].abs()
    )


# The command


@needs_cpu_kernels
def test_everything_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--backends", "reference", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"{len(CASES) * 12} of {len(CASES) * 12} agree with float64; worst: ")
    assert lines[0] == "7 samples of 5 features on reference, cpu"
    assert "supcon " in lines[3] and "agrees" in lines[3]


@needs_cpu_kernels
def test_float64_agrees() -> None:
    assert run("--backends", "cpu", "auto", "--dtype", "float64", "--inputs", "converged") == 0


def test_triton_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    if check.places(None, torch.device("cpu"))[-1].backend != "triton":
        pytest.skip("Triton's kernels run on the GPU here")
    chosen = ["--losses", "info_nce", "similarity", "--backends", "triton", "--inputs", "random"]
    assert run(*chosen, "--rows", "3", "--dtype", "float32", "bfloat16") == 0
    out = capsys.readouterr().out
    assert "triton on cpu" in out and "not served: Triton's interpreter" in out


def test_a_wrong_loss_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(clk, "nt_xent_loss", scaled(1.01, clk.nt_xent_loss))
    chosen = ["--losses", "nt_xent", "clip", "--backends", "reference", "--dtype", "float32"]
    assert run(*chosen, "--failed-only") == 1
    *_, last = lines = capsys.readouterr().out.splitlines()
    failed, right = (sum(case.loss == loss for case in CASES) * 2 for loss in ("nt_xent", "clip"))
    assert sum("FAILS: " in line for line in lines) == failed
    assert "clip" not in "".join(lines)
    assert (
        last.startswith(f"{right} of {failed + right} agree with float64; worst: ") and "of nt_xent (" in last
    )


def test_what_raises_is_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    no_memory = torch.OutOfMemoryError("tried to allocate\n 3 TiB")
    monkeypatch.setattr(clk, "clip_loss", raising(no_memory, clk.clip_loss))
    monkeypatch.setattr(reference, "dcl_loss", raising(no_memory, reference.dcl_loss))
    path = tmp_path / "rows.json"
    chosen = ["--losses", "clip_loss", "dcl", "nt_xent", "--backends", "reference", "--dtype", "float32"]
    assert run(*chosen, "--inputs", "random", "--json", str(path)) == 1
    written = json.loads(path.read_text())
    by_loss = {row["loss"]: row for row in written["results"]}
    assert by_loss["clip"]["detail"] == "OutOfMemoryError: tried to allocate 3 TiB"
    assert by_loss["dcl"]["detail"] == "in the reference: OutOfMemoryError: tried to allocate 3 TiB"
    assert by_loss["nt_xent"]["status"] == "agrees"
    assert written["summary"] == capsys.readouterr().out.splitlines()[-1]


def test_json_is_valid_where_results_are_not_finite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clk, "clip_loss", scaled(torch.nan, clk.clip_loss))
    path = tmp_path / "rows.json"
    assert run("--losses", "clip", "--backends", "reference", "--json", str(path)) == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    rows = json.loads(path.read_text(), parse_constant=refuse)["results"]
    assert all(row["loss_error"] is None and "not finite" in row["detail"] for row in rows)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--losses", "triplet"],
        ["--rows", "1"],
        ["--width", "0"],
        ["--temperature", "0"],
        ["--temperature", "nan"],
        ["--dtype", "int8"],
        ["--backends", "tpu"],
        ["--device", "nowhere"],
    ],
    ids=" ".join,
)
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    assert exit.value.code == 2
    assert f"argument {arguments[0]}: " in capsys.readouterr().err


def test_what_is_not_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = [
        ["--backends", "cpu", "--device", "meta"],
        ["--json", str(tmp_path / "no folder" / "rows.json")],
    ]
    if not torch.cuda.is_available():
        missing += [["--device", "cuda"], ["--backends", "cuda"]]
    for arguments in missing:
        assert run(*arguments) == 2
        # The last line: PyTorch notes above it, once a process, that there is no CUDA runtime.
        assert capsys.readouterr().err.splitlines()[-1].startswith("check: ")


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    assert run("--losses", "clip", "--backends", "reference", "--threads", str(before + 1)) == 0
    assert torch.get_num_threads() == before


def test_nothing_served_is_not_success(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = clk.BackendError("backend 'reference' cannot serve clip_loss here: for this test")
    monkeypatch.setattr(clk, "clip_loss", raising(refusal, clk.clip_loss))
    assert run("--losses", "clip", "--backends", "reference") == 2


def test_a_terminal_gets_the_same_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(check, "_rich", lambda stream: True)
    assert run("--losses", "clip", "--backends", "reference") == 0
    cases = sum(case.loss == "clip" for case in CASES)
    assert capsys.readouterr().out.count("agrees") == 6 * cases
