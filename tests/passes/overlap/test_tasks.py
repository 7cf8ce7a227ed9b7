"""Tasks of a graph: what is fused, what it costs and holds, and that every schedule of them is one of the graph."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opweave.compiler.graph import Collective, CollectiveKind, Graph, Op, OpKind, Role, Tensor
from opweave.errors import MachineError, OptionError
from opweave.hw_models import load
from opweave.hw_models.collectives import collective_modes
from opweave.hw_models.matmul import attention, matmul_seconds
from opweave.passes.overlap.problem import Problem, Task
from opweave.passes.overlap.tasks import problem_of
from tests.graphs.strategies import graphs

H100 = load("8xh100-nvlink")
ROWS, WIDTH = 2048, 8192


@dataclass
class Writer:
    """Writes small graphs: every value is ``[ROWS, WIDTH]`` in bfloat16."""

    tensors: list[Tensor] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    def source(self, name: str, *shape: int, role: Role = Role.INPUT) -> str:
        self.tensors.append(Tensor(name, shape or (ROWS, WIDTH), "bfloat16", role))
        return name

    def op(self, name: str, call: str, *inputs: str, flops: int = 0, shape: tuple[int, ...] = (ROWS, WIDTH)) -> str:
        self.tensors.append(Tensor(name, shape, "bfloat16"))
        arguments = ", ".join(f"%{i}" for i in range(len(inputs)))
        self.ops.append(Op(name, inputs, (name,), flops=flops, body=f"aten.{call}.default({arguments})"))
        return name

    def product(self, name: str, x: str) -> str:
        weight = self.source(f"{name}_weight", WIDTH, WIDTH, role=Role.WEIGHT)
        return self.op(name, "mm", x, weight, flops=2 * ROWS * WIDTH * WIDTH)

    def all_reduce(self, name: str, x: str) -> str:
        self.tensors.append(Tensor(name, (ROWS, WIDTH), "bfloat16"))
        message = Collective(CollectiveKind.ALL_REDUCE, "tp", tuple(range(8)), 2 * ROWS * WIDTH)
        body = "_c10d_functional.all_reduce.default(%0, 'sum', 'tp')"
        self.ops.append(Op(name, (x,), (name,), OpKind.COLLECTIVE, 0, body, collective=message))
        return name

    def norm(self, name: str, x: str, residual: str) -> tuple[str, str]:
        total = self.op(f"{name}_sum", "add", x, residual)
        squares = self.op(f"{name}_squares", "pow", total)
        mean = self.op(f"{name}_mean", "mean", squares, shape=(ROWS, 1))
        root = self.op(f"{name}_root", "rsqrt", mean, shape=(ROWS, 1))
        return self.op(name, "mul", total, root), total

    def graph(self, *outputs: str) -> Graph:
        return Graph("small", tuple(self.tensors), tuple(self.ops), outputs)


def _layer() -> Graph:
    """A product, its all-reduce, the residual's addition and normalisation, and a product of it that is returned."""
    w = Writer()
    partial = w.product("first", w.source("x"))
    normed, total = w.norm("norm", w.all_reduce("reduced", partial), w.source("residual"))
    return w.graph(w.product("second", normed), total)


def _tasks(problem: Problem) -> dict[str, Task]:
    return {task.name: task for task in problem.tasks}


def test_a_layer_becomes_four_tasks() -> None:
    """Five operators of a normalisation are one task; products and the collective stand alone; names map back."""
    problem = problem_of(_layer(), H100)
    assert [task.name for task in problem.tasks] == ["first", "reduced", "norm", "second"]
    assert [task.before for task in problem.tasks] == [(), (0,), (1,), (2,)]
    assert problem.tasks[2].ops == ("norm_sum", "norm_squares", "norm_mean", "norm_root", "norm")
    assert [task.lane for task in problem.tasks] == ["sm", "nvlink", "sm", "sm"]
    assert [task.launches for task in problem.tasks] == [1, 1, 1, 1]
    assert problem.issue_s == H100.concurrency.issue_s if H100.concurrency else False


def test_costs_are_those_of_the_machine() -> None:
    """Products by tiles and waves; the normalisation reads two tensors and writes two, in 0.9 of the bandwidth."""
    tasks = _tasks(problem_of(_layer(), H100))
    assert tasks["first"].modes[0].seconds == matmul_seconds(ROWS, WIDTH, WIDTH, "bfloat16", H100)
    expected = 5e-6 + 4 * 2 * ROWS * WIDTH / (0.9 * 3.35e12)
    assert tasks["norm"].modes[0].seconds == pytest.approx(expected)
    assert tasks["norm"].modes[0].needs["hbm"] == pytest.approx(0.9)
    ways = collective_modes("all_reduce", 2 * ROWS * WIDTH, range(8), H100)
    assert [mode.seconds for mode in tasks["reduced"].modes[: len(ways)]] == [way.seconds for way in ways]
    assert all(mode.fixed for mode in tasks["reduced"].modes)
    assert tasks["reduced"].modes[tasks["reduced"].given_mode].name.startswith("nccl")


def test_fused_modes_absorb_the_normalisation() -> None:
    """The machine's kernels that normalise as well are further modes, unless they are not wanted."""
    task = _tasks(problem_of(_layer(), H100))["reduced"]
    fused = [mode for mode in task.modes if mode.absorbs]
    assert fused
    assert all(mode.absorbs == (2,) and mode.name.startswith("fused_rms_norm") for mode in fused)
    assert not any(mode.absorbs for mode in _tasks(problem_of(_layer(), H100, fuse_norms=False))["reduced"].modes)
    assert not any(mode.absorbs for mode in _tasks(problem_of(_layer(), load("8xa100-nvlink")))["reduced"].modes)


@pytest.mark.parametrize("spoiler", ["tanh", "second mean", "late residual"])
def test_other_regions_are_not_absorbed(spoiler: str) -> None:
    """More than an addition and one normalisation, or a residual that waits for the collective, is left alone."""
    w = Writer()
    reduced = w.all_reduce("reduced", w.product("first", w.source("x")))
    residual = w.product("late", reduced) if spoiler == "late residual" else w.source("residual")
    normed, _ = w.norm("norm", reduced, residual)
    if spoiler == "tanh":
        normed = w.op("after", "tanh", normed)
    elif spoiler == "second mean":
        normed = w.op("after", "mean", normed)
    task = _tasks(problem_of(w.graph(normed), H100))["reduced"]
    assert not any(mode.absorbs for mode in task.modes)


def test_parts_are_never_fused() -> None:
    """Two halves that one kernel could do are two tasks, each of its part; without parts they are one."""
    w = Writer()
    first, second = (w.op(f"half{i}", "relu", w.source(f"x{i}")) for i in range(2))
    graph = w.graph(w.op("joined", "cat", first, second, shape=(2 * ROWS, WIDTH)))
    assert [task.ops for task in problem_of(graph, H100).tasks] == [("half0", "half1", "joined")]
    split = problem_of(graph, H100, parts={"half0": 0, "half1": 1})
    assert [(task.name, task.part, task.before) for task in split.tasks] == [
        ("half0", 0, ()),
        ("half1", 1, ()),
        ("joined", -1, (0, 1)),
    ]


def test_nothing_is_fused_around_a_product() -> None:
    """The sum reads what the product reads, and the product: in one kernel with that, it would wait in a circle."""
    w = Writer()
    early = w.op("early", "relu", w.source("x"))
    graph = w.graph(w.op("sum", "add", early, w.product("middle", early)))
    assert [task.ops for task in problem_of(graph, H100).tasks] == [("early",), ("middle",), ("sum",)]


def test_bytes_live_from_their_maker_to_their_last_reader() -> None:
    """The normalisation's two results are one unit, returned with the residual; values within a kernel have none."""
    tasks = problem_of(_layer(), H100).tasks
    whole = 2 * ROWS * WIDTH
    assert [task.allocates_bytes for task in tasks] == [whole, whole, 2 * whole, whole]
    assert [task.frees for task in tasks] == [(), (0,), (1,), ()]


def test_a_lookup_reads_what_it_returns() -> None:
    w = Writer()
    table = w.source("table", 1 << 20, WIDTH, role=Role.WEIGHT)
    w.tensors.append(Tensor("ids", (16,), "int64", Role.INPUT))
    graph = w.graph(w.op("found", "embedding", table, "ids", shape=(16, WIDTH)))
    mode = problem_of(graph, H100).tasks[0].modes[0]
    assert mode.seconds == pytest.approx(5e-6 + (2 * 2 * 16 * WIDTH + 128) / (0.9 * 3.35e12))


@pytest.mark.parametrize(("causal", "call"), [(True, ", 0.0, True"), (False, "")])
def test_attention_costs_what_it_sees(causal: bool, call: str) -> None:
    shape = (2, 8, 4096, 128)
    tensors = [Tensor(n, shape, "bfloat16", Role.INPUT) for n in "qkv"] + [Tensor("out", shape, "bfloat16")]
    body = f"aten._scaled_dot_product_flash_attention.default(%0, %1, %2{call})"
    op = Op("mix", ("q", "k", "v"), ("out",), flops=4 * 16 * 4096 * 4096 * 128, body=body)
    task = problem_of(Graph("mix", tuple(tensors), (op,), ("out",)), H100).tasks[0]
    expected = attention(16, 4096, 4096, 128, "bfloat16", H100, causal=causal)
    assert task.modes[0].seconds == expected.seconds


def test_scales_do_not_set_the_rate_of_a_product() -> None:
    """A product of 8-bit floats with scales of 32 bits for each row runs at the rate of 8-bit floats."""
    rows = (2048, 2048)
    tensors = [
        Tensor("a", rows, "float8_e4m3fn", Role.INPUT),
        Tensor("b", rows, "float8_e4m3fn", Role.WEIGHT),
        Tensor("row_scale", (2048, 1), "float32", Role.INPUT),
        Tensor("column_scale", (1, 2048), "float32", Role.INPUT),
        Tensor("out", rows, "bfloat16"),
    ]
    body = "aten._scaled_mm.default(%0, %1, %2, %3)"
    op = Op("out", ("a", "b", "row_scale", "column_scale"), ("out",), flops=2 * 2048**3, body=body)
    task = problem_of(Graph("scaled", tuple(tensors), (op,), ("out",)), H100).tasks[0]
    assert task.modes[0].seconds < matmul_seconds(2048, 2048, 2048, "bfloat16", H100)


def test_attention_that_waits_for_memory_runs_near_memory() -> None:
    """On an NPU with units near memory, decode's attention leaves the arrays to products, as NeuPIMs does."""
    shapes = {"q": (64, 32, 1, 128), "k": (64, 32, 2048, 128), "v": (64, 32, 2048, 128), "out": (64, 32, 1, 128)}
    tensors = [Tensor(n, s, "float16", Role.ACTIVATION if n == "out" else Role.INPUT) for n, s in shapes.items()]
    body = "aten.scaled_dot_product_attention.default(%0, %1, %2)"
    op = Op("mix", ("q", "k", "v"), ("out",), flops=4 * 64 * 32 * 2048 * 128, body=body)
    task = problem_of(Graph("mix", tuple(tensors), (op,), ("out",)), load("npu-pim")).tasks[0]
    assert (task.lane, dict(task.modes[0].needs)) == ("pim", {})
    product = Writer()
    graph = product.graph(product.product("big", product.source("x")))
    assert problem_of(graph, load("npu-pim")).tasks[0].lane == "systolic_array"


def test_a_machine_without_a_fabric_refuses_collectives() -> None:
    with pytest.raises(MachineError, match="no fabric"):
        problem_of(_layer(), load("h100-sxm"))


def test_parts_of_unknown_operators_are_refused() -> None:
    with pytest.raises(OptionError, match="'third'"):
        problem_of(_layer(), H100, parts={"third": 0})
    with pytest.raises(OptionError, match="numbered"):
        problem_of(_layer(), H100, parts={"first": -2})


@st.composite
def parted(draw: st.DrawFn) -> tuple[Graph, dict[str, int]]:
    """Random graphs in which some operators are products, or belong to parts."""
    graph = draw(graphs(max_ops=14))
    ops = [
        Op(op.name, op.inputs, op.outputs, flops=64, body="aten.mm.default(%0, %0)") if draw(st.booleans()) else op
        for op in graph.ops
    ]
    parts = {op.name: draw(st.integers(-1, 2)) for op in ops}
    return Graph(graph.name, graph.tensors, tuple(ops), graph.outputs), parts


@given(parted())
def test_every_order_of_tasks_is_an_order_of_the_graph(case: tuple[Graph, dict[str, int]]) -> None:
    """Each operator is in one task; tasks in order, and the operators of each in order, keep every dependency."""
    graph, parts = case
    problem = problem_of(graph, H100, parts=parts)
    order = [name for task in problem.tasks for name in task.ops]
    assert sorted(order) == sorted(op.name for op in graph.ops)
    place = {name: i for i, name in enumerate(order)}
    task_of = {name: i for i, task in enumerate(problem.tasks) for name in task.ops}
    for index, before in enumerate(graph.predecessors):
        for other in before:
            first, then = graph.ops[other].name, graph.ops[index].name
            assert place[first] < place[then]
            assert task_of[first] == task_of[then] or task_of[first] in problem.tasks[task_of[then]].before
    for index, task in enumerate(problem.tasks):
        assert all(other < index for other in task.before)
        assert len({parts[name] for name in task.ops}) == 1
        assert math.isfinite(task.modes[0].seconds)


@given(parted())
def test_what_lives_is_never_counted_too_small(case: tuple[Graph, dict[str, int]]) -> None:
    """Task by task: the bytes counted alive are at least those that a later task touches or the caller gets."""
    graph, parts = case
    tasks = problem_of(graph, H100, parts=parts).tasks
    ops = {op.name: i for i, op in enumerate(graph.ops)}
    made = {
        graph.tensor[name].buffer: t
        for t, task in enumerate(tasks)
        for o in task.ops
        for name in graph.ops[ops[o]].outputs
        if graph.tensor[name].buffer == name
    }
    users = [0] * len(tasks)
    for task in tasks:
        for freed in task.frees:
            users[freed] += 1
    alive = 0
    for now, task in enumerate(tasks):
        alive += task.allocates_bytes
        for freed in task.frees:
            users[freed] -= 1
            alive -= tasks[freed].allocates_bytes if not users[freed] else 0
        later = {b for t in tasks[now + 1 :] for o in t.ops for b in graph.touches[ops[o]]} | graph.output_buffers
        needed = sum(graph.buffers[b].nbytes for b, maker in made.items() if maker <= now and b in later)
        assert alive >= needed
