"""Exported programs of every loss, and a compiled one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import Problem, unit
from loss_cases import problems
from torch.export import Dim

import cl_kernels as clk

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 6  # of the problems


class Loss(torch.nn.Module):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem

    def forward(self, *inputs: Any) -> torch.Tensor:
        given = dict(zip(self.problem.inputs, inputs, strict=True))
        return getattr(clk, self.problem.function)(**given, **self.problem.options)


def dynamic(x: Any) -> Any:
    """Every size that is the batch's."""
    if isinstance(x, list):
        return [dynamic(part) for part in x]
    return {i: Dim.DYNAMIC for i, size in enumerate(x.shape) if size == BATCH}


@pytest.mark.parametrize("case", problems())
def test_a_program_of_any_batch_size(case: str) -> None:
    problem, twice = problems()[case], {}
    loss, inputs = Loss(problem), tuple(problem.inputs.values())
    program = torch.export.export(loss, inputs, dynamic_shapes=((*map(dynamic, inputs),),))
    targets = [str(node.target) for node in program.graph.nodes]
    assert any(target.startswith("cl_kernels.") for target in targets)
    for name, x in problem.inputs.items():
        twice[name] = [torch.cat([y, y.flip(0)]) for y in x] if isinstance(x, list) else x
        if isinstance(x, torch.Tensor) and x.shape[:1] == (BATCH,):
            twice[name] = x.repeat(*(2 if size == BATCH else 1 for size in x.shape))
    for given in (problem.inputs, twice):
        torch.testing.assert_close(program.module()(*given.values()), loss(*given.values()))


@pytest.mark.slow
def test_ahead_of_time(tmp_path: Path) -> None:
    problem = Problem("supcon_loss", {"features": unit(6, 2, 4), "labels": torch.arange(6) % 3})
    inputs = tuple(problem.inputs.values())
    with torch.no_grad():
        program = torch.export.export(Loss(problem), inputs)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "loss.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    torch.testing.assert_close(loaded(*inputs), Loss(problem)(*inputs))
