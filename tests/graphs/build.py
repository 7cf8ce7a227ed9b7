"""Small graphs that each show one thing a planner can get wrong, and a machine to plan them on.

Import as ``from tests.graphs.build import all_graphs, machine``. Every body can be executed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.hw_models.model import Engine, EngineKind, HardwareModel, Memory

if TYPE_CHECKING:
    import torch

__all__ = ["GraphBuilder", "all_graphs", "machine", "random_sources"]


class GraphBuilder:
    """Collects tensors and operators; every method that makes a tensor returns its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: dict[str, Tensor] = {}
        self.ops: list[Op] = []

    def tensor(self, name: str, *shape: int, role: Role, dtype: str = "float32") -> str:
        """Add the base tensor of a new buffer."""
        self.tensors[name] = Tensor(name, shape, dtype, role)
        return name

    def input(self, name: str, *shape: int, dtype: str = "float32") -> str:
        """Add a graph input."""
        return self.tensor(name, *shape, role=Role.INPUT, dtype=dtype)

    def weight(self, name: str, *shape: int, dtype: str = "float32") -> str:
        """Add a weight."""
        return self.tensor(name, *shape, role=Role.WEIGHT, dtype=dtype)

    def view(
        self, name: str, base: str, *shape: int, strides: tuple[int, ...] | None = None, offset_bytes: int = 0
    ) -> str:
        """Add an alias of ``base``'s buffer."""
        of = self.tensors[base]
        self.tensors[name] = Tensor(name, shape, of.dtype, Role.ACTIVATION, of.buffer, strides, offset_bytes)
        return name

    def op(self, body: str, *inputs: str, outputs: Mapping[str, tuple[int, ...]], flops: int = 0) -> None:
        """Add an operator that creates ``outputs``, float32 tensors by name and shape."""
        for name, shape in outputs.items():
            self.tensor(name, *shape, role=Role.ACTIVATION)
        self.call(body, *inputs, outputs=tuple(outputs), flops=flops)

    def unary(self, function: str, operand: str, name: str) -> str:
        """Add ``name = aten.<function>.default(operand)``."""
        shape = self.tensors[operand].shape
        self.op(f"aten.{function}.default(%0)", operand, outputs={name: shape}, flops=self.tensors[operand].nbytes // 4)
        return name

    def binary(self, function: str, left: str, right: str, name: str) -> str:
        """Add ``name = aten.<function>.Tensor(left, right)``; the result has the shape of ``left``."""
        body, shape = f"aten.{function}.Tensor(%0, %1)", self.tensors[left].shape
        self.op(body, left, right, outputs={name: shape}, flops=self.tensors[left].nbytes // 4)
        return name

    def matmul(self, left: str, right: str, name: str) -> str:
        """Add the matrix product of two 2-D tensors."""
        (rows, inner), (_, columns) = self.tensors[left].shape, self.tensors[right].shape
        outputs = {name: (rows, columns)}
        self.op("aten.mm.default(%0, %1)", left, right, outputs=outputs, flops=2 * rows * inner * columns)
        return name

    def update(self, function: str, target: str, operand: str, name: str) -> str:
        """Add ``name``, the version of ``target`` after ``target = aten.<function>.Tensor(target, operand)``."""
        of = self.tensors[target]
        self.tensors[name] = Tensor(name, of.shape, of.dtype, Role.ACTIVATION, of.buffer, of.strides, of.offset_bytes)
        self.call(f"aten.{function}.Tensor(%0, %1)", target, operand, outputs=(name,), flops=of.nbytes // 4)
        return name

    def call(self, body: str, *inputs: str, outputs: tuple[str, ...], flops: int = 0) -> None:
        """Add an operator over tensors that are all there."""
        self.ops.append(Op(f"op{len(self.ops)}", inputs, outputs, flops=flops, body=body))

    def build(self, *outputs: str) -> Graph:
        """Make the graph that returns ``outputs``."""
        return Graph(self.name, tuple(self.tensors.values()), tuple(self.ops), outputs)


def machine(capacity_bytes: int = 1 << 20, alignment_bytes: int = 16) -> HardwareModel:
    """A machine with one compute and one copy engine and round figures."""
    return HardwareModel(
        name="test",
        description="round figures for tests",
        sources=("none: made for tests",),
        scratchpad="sram",
        backing="dram",
        memories=(
            Memory("sram", capacity_bytes, alignment_bytes, 64e9),
            Memory("dram", 1 << 34, 64, 8e9),
        ),
        engines=(
            Engine("core", EngineKind.COMPUTE, flops_per_s={"default": 1e12}, launch_s=1e-6),
            Engine("dma", EngineKind.COPY, bandwidth_bytes_per_s=4e9, latency_s=1e-6),
        ),
    )


def chain() -> Graph:
    """Each value is used once, by the next operator."""
    g = GraphBuilder("chain")
    y = g.matmul(g.input("x", 8, 16), g.weight("w", 16, 32), "a")
    y = g.unary("relu", y, "b")
    y = g.matmul(y, g.weight("v", 32, 8), "c")
    return g.build(g.unary("tanh", y, "y"))


def diamond() -> Graph:
    """One value feeds two branches that meet again."""
    g = GraphBuilder("diamond")
    a = g.unary("relu", g.input("x", 8, 16), "a")
    left = g.unary("tanh", a, "left")
    right = g.unary("sigmoid", a, "right")
    return g.build(g.binary("add", left, right, "y"))


def residual() -> Graph:
    """Three blocks ``y = x + relu(x w)``: the shortcut stays live across each block."""
    g = GraphBuilder("residual")
    y = g.input("x", 8, 16)
    for block in range(3):
        inner = g.matmul(y, g.weight(f"w{block}", 16, 16), f"m{block}")
        y = g.binary("add", g.unary("relu", inner, f"r{block}"), y, f"s{block}")
    return g.build(y)


def fan_out() -> Graph:
    """Eight branches of unequal sizes from one value, joined in reverse: tight scratchpads have to spill."""
    g = GraphBuilder("fan_out")
    x = g.input("x", 8, 32)
    branches = [g.matmul(x, g.weight(f"w{i}", 32, 8 * (1 + i % 3)), f"b{i}") for i in range(8)]
    total = ""
    for i, branch in reversed(list(enumerate(branches))):
        narrow = g.matmul(branch, g.weight(f"v{i}", 8 * (1 + i % 3), 16), f"n{i}")
        total = g.binary("add", narrow, total, f"t{i}") if total else narrow
    return g.build(total)


def multi_output() -> Graph:
    """An operator with three results, one of them unused, one of another size."""
    g = GraphBuilder("multi_output")
    x = g.input("x", 8, 16)
    pieces: dict[str, tuple[int, ...]] = {"p": (2, 16), "q": (5, 16), "unused": (1, 16)}
    g.op("aten.split_with_sizes.default(%0, [2, 5, 1], 0)", x, outputs=pieces)
    g.op("aten.cat.default([%0, %1], 0)", "q", "p", outputs={"c": (7, 16)})
    return g.build(g.unary("relu", "c", "y"), "p")


def views() -> Graph:
    """Aliases by offset, by strides and of an alias; a view is read after the base's last own use."""
    g = GraphBuilder("views")
    a = g.unary("relu", g.input("x", 6, 16), "a")
    rows = g.view("rows", a, 3, 16, offset_bytes=3 * 16 * 4)
    columns = g.view("columns", a, 16, 6, strides=(1, 16))
    evens = g.view("evens", rows, 3, 8, strides=(16, 2), offset_bytes=3 * 16 * 4)
    b = g.unary("tanh", a, "b")
    c = g.matmul(columns, b, "c")
    d = g.matmul(rows, c, "d")
    g.op("aten.cat.default([%0, %1], 1)", evens, d, outputs={"y": (3, 24)})
    return g.build("y", g.view("y_transposed", "y", 24, 3, strides=(1, 24)))


def in_place() -> Graph:
    """An activation and an optimizer state are updated in place, read before and after; half a value is overwritten."""
    g = GraphBuilder("in_place")
    x = g.input("x", 4, 16)
    state = g.tensor("state", 4, 16, role=Role.OPTIMIZER_STATE)
    before = g.binary("mul", state, x, "before")
    g.update("add", state, x, "state_1")
    a = g.unary("relu", before, "a")
    g.update("mul", "state_1", a, "state_2")
    lower = g.view("lower", a, 2, 16, offset_bytes=2 * 16 * 4)
    upper = g.view("upper", x, 2, 16)
    g.update("add", lower, upper, "lower_1")
    return g.build(g.binary("add", a, "state_2", "y"))


def shared_weight() -> Graph:
    """One weight at the beginning and at the end, others between: keep it, or fetch it twice."""
    g = GraphBuilder("shared_weight")
    y, shared = g.input("x", 8, 32), g.weight("shared", 32, 32)
    y = g.matmul(y, shared, "a")
    for i in range(2):
        y = g.matmul(y, g.weight(f"w{i}", 32, 32), f"b{i}")
    return g.build(g.matmul(y, shared, "y"))


def zero_bytes() -> Graph:
    """Tensors without elements: as an input, between operators and as an output."""
    g = GraphBuilder("zero_bytes")
    x, empty = g.input("x", 4, 16), g.input("empty", 0, 16)
    none = g.unary("relu", empty, "none")
    g.op("aten.cat.default([%0, %1, %2], 0)", x, none, empty, outputs={"y": (4, 16)})
    return g.build("y", g.unary("tanh", none, "still_none"))


def output_aliases_input() -> Graph:
    """A returned view of an input needs nothing; another output is computed."""
    g = GraphBuilder("output_aliases_input")
    x = g.input("x", 4, 16)
    flat = g.view("flat", x, 64)
    return g.build(flat, g.unary("relu", x, "y"))


def output_consumed() -> Graph:
    """A value is returned and also read again, late."""
    g = GraphBuilder("output_consumed")
    a = g.unary("relu", g.input("x", 8, 16), "a")
    b = g.matmul(a, g.weight("w", 16, 32), "b")
    c = g.matmul(b, g.weight("v", 32, 16), "c")
    return g.build(a, g.binary("add", c, a, "y"))


def unused_input() -> Graph:
    """An input and a weight that nobody reads; a result that nobody reads."""
    g = GraphBuilder("unused_input")
    x, _, _ = g.input("x", 4, 16), g.input("ignored", 64, 64), g.weight("stale", 64, 64)
    g.unary("sigmoid", x, "dead")
    return g.build(g.unary("relu", x, "y"))


def no_operators() -> Graph:
    """Returns its input; there is nothing to do."""
    g = GraphBuilder("no_operators")
    return g.build(g.input("x", 4, 16))


_BUILDERS: tuple[Callable[[], Graph], ...] = (
    chain,
    diamond,
    residual,
    fan_out,
    multi_output,
    views,
    in_place,
    shared_weight,
    zero_bytes,
    output_aliases_input,
    output_consumed,
    unused_input,
    no_operators,
)


def all_graphs() -> Mapping[str, Graph]:
    """Every small graph, by its name."""
    return MappingProxyType({builder.__name__: builder() for builder in _BUILDERS})


def random_sources(graph: Graph, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float32 values for every input, weight, constant and optimizer state, by buffer."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(base.shape, generator=generator)
        for name, base in graph.buffers.items()
        if base.role.is_source
    }
