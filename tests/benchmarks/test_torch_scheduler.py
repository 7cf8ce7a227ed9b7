"""PyTorch's overlap scheduler under our costs: its order is possible, it is timed fairly, and it says what it does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from benchmarks.parallel_dtensor import PlainDense, fully_sharded
from benchmarks.parallel_models import LLAMA_3_70B, DenseTensorParallel, tokens_of
from benchmarks.torch_scheduler import as_written, exposed_s, torch_schedule
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.fx.experimental.proxy_tensor import make_fx

from opweave.compiler.frontend.dynamo.operators import OperatorGraph, operator_graph
from opweave.compiler.frontend.ranks import captured, fake_ranks
from opweave.compiler.graph import Collective, CollectiveKind
from opweave.hw_models.registry import load
from opweave.passes.overlap.problem import Mode, Problem, Schedule, Task
from opweave.passes.overlap.simulate import given_modes, synchronous_waits, timed
from opweave.passes.overlap.tasks import problem_of

SIZES = LLAMA_3_70B.with_layers(1)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    with fake_ranks(8):
        yield init_device_mesh("cpu", (8,))


def captured_problem(module: torch.nn.Module) -> tuple[torch.fx.GraphModule, OperatorGraph, Problem]:
    graph = captured(module, (tokens_of(SIZES, 1, 4096),)).forward
    found = operator_graph(graph, int)
    return graph, found, problem_of(found.graph, load("8xh100-nvlink"))


def test_nothing_hides_dense_all_reduces(mesh: DeviceMesh) -> None:
    """What PyTorch expects, what we time, and the collectives' own time agree; the program itself is as slow."""
    with FakeTensorMode():
        module = DenseTensorParallel(SIZES)
        graph, found, problem = captured_problem(module)
    answer = torch_schedule(graph, found, problem)
    alone = sum(task.modes[task.given_mode].seconds for task in problem.tasks if task.collective is not None)
    assert alone > 0
    assert answer.claimed_exposed_s == pytest.approx(alone)
    assert exposed_s(answer.schedule) == pytest.approx(alone, rel=1e-6)
    assert exposed_s(as_written(graph, found, problem)) == pytest.approx(alone, rel=1e-6)


def test_a_wait_holds_back_what_stands_behind_it(mesh: DeviceMesh) -> None:
    """A product that reads nothing of the all-reduce hides it, unless the program waits before it."""
    operators = torch.ops._c10d_functional

    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        waited: torch.Tensor = operators.wait_tensor(operators.all_reduce(x, "sum", "0"))
        return waited + x @ weight

    with FakeTensorMode():
        inputs = torch.empty(4096, 8192, dtype=torch.bfloat16), torch.empty(8192, 8192, dtype=torch.bfloat16)
    graph = make_fx(call)(*inputs)
    found = operator_graph(graph, int)
    problem = problem_of(found.graph, load("8xh100-nvlink"))
    alone = next(task.modes[task.given_mode].seconds for task in problem.tasks if task.collective is not None)
    assert exposed_s(as_written(graph, found, problem)) == pytest.approx(alone)
    (wait,) = found.waits["all_reduce"]
    next(node for node in graph.graph.nodes if node.name == "mm").append(wait)
    assert exposed_s(as_written(graph, found, problem)) < 0.1 * alone


def test_gathers_of_parameters_are_hidden(mesh: DeviceMesh) -> None:
    """PyTorch starts the gathers early; the given graph stays as it is, and waits where it waits."""
    with FakeTensorMode():
        module = fully_sharded(PlainDense(SIZES), mesh)
        graph, found, problem = captured_problem(module)
    names = [node.name for node in graph.graph.nodes]
    program = as_written(graph, found, problem)
    answer = torch_schedule(graph, found, problem)
    assert [node.name for node in graph.graph.nodes] == names
    assert sorted(answer.schedule.order) == list(range(len(problem.tasks)))
    assert exposed_s(answer.schedule) < 0.5 * exposed_s(program)
    assert answer.schedule.makespan_s < program.makespan_s
    together = timed(
        problem,
        range(len(problem.tasks)),
        given_modes(problem),
        waits=synchronous_waits(problem, range(len(problem.tasks))),
    )
    assert exposed_s(program) == pytest.approx(exposed_s(together), rel=0.05)


def test_exposed_is_the_time_in_which_only_collectives_run() -> None:
    """Two in flight at once count once; what computes beside them hides them; gaps are no communication."""
    sends = Collective(CollectiveKind.ALL_REDUCE, "g", (0, 1), 8)
    spans = [
        (0.0, 2.0, None),
        (1.0, 4.0, sends),
        (3.0, 6.0, sends),
        (5.0, 7.0, None),
        (8.0, 8.0, None),
        (9.0, 10.0, sends),
    ]
    tasks = tuple(Task(str(i), "lane", (Mode("m", 1.0),), collective=c) for i, (_, _, c) in enumerate(spans))
    order = tuple(range(len(spans)))
    schedule = Schedule(
        Problem(tasks), order, (0,) * len(order), tuple(s for s, _, _ in spans), tuple(f for _, f, _ in spans)
    )
    assert exposed_s(schedule) == pytest.approx((5.0 - 2.0) + (10.0 - 9.0))
