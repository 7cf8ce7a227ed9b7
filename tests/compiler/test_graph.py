"""The graph's derived facts, and every contradiction it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opweave.compiler.graph import (
    DTYPE_BYTES,
    Collective,
    CollectiveKind,
    Graph,
    Op,
    OpKind,
    Role,
    Tensor,
    contiguous_strides,
)
from opweave.errors import ModelError
from tests.graphs.build import all_graphs
from tests.graphs.odd import odd_graphs
from tests.graphs.strategies import graphs

SMALL = all_graphs()


def tensor(name: str, *shape: int, role: Role = Role.ACTIVATION, **fields: Any) -> Tensor:
    return Tensor(name, shape or (4,), "float32", role, **fields)


def graph(tensors: list[Tensor], ops: list[Op], *outputs: str) -> Graph:
    return Graph("g", tuple(tensors), tuple(ops), outputs)


X = tensor("x", role=Role.INPUT)


def test_sizes_and_strides() -> None:
    plain = tensor("t", 2, 3, 4)
    assert (plain.nbytes, plain.end_bytes, plain.element_strides) == (96, 96, (12, 4, 1))
    assert plain.buffer == "t"
    column = tensor("c", 3, buffer="t", strides=(4,), offset_bytes=8)
    assert (column.nbytes, column.end_bytes) == (12, 8 + 2 * 16 + 4)
    assert tensor("scalar").nbytes == 16
    assert Tensor("scalar", (), "float64").nbytes == 8
    empty = tensor("e", 0, 7, buffer="t", offset_bytes=96)
    assert (empty.nbytes, empty.end_bytes) == (0, 96)
    assert contiguous_strides((3, 0, 2)) == (2, 2, 1)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_dtype_has_the_size_pytorch_gives_it(dtype: str) -> None:
    import torch

    assert getattr(torch, dtype).itemsize == DTYPE_BYTES[dtype]
    assert Tensor("t", (3,), dtype).nbytes == 3 * DTYPE_BYTES[dtype]


@given(st.lists(st.integers(0, 5), max_size=4))
def test_row_major_strides_are_those_of_pytorch(shape: list[int]) -> None:
    import torch

    assert contiguous_strides(tuple(shape)) == torch.empty(shape).stride()


def test_sources_are_what_exists_before_the_first_operator() -> None:
    assert {role for role in Role if role.is_source} == {
        Role.INPUT,
        Role.WEIGHT,
        Role.CONSTANT,
        Role.OPTIMIZER_STATE,
    }


def test_targets() -> None:
    assert Op("a", (), (), body="aten.full.default([2, 2], 1)").target == "aten.full.default"
    assert Op("a", (), ()).target == ""


def test_buffers_read_written_and_touched() -> None:
    g = SMALL["in_place"]
    assert g.reads == (("state", "x"), ("state", "x"), ("before",), ("state", "a"), ("a", "x"), ("a", "state"))
    assert g.writes == (("before",), ("state",), ("a",), ("state",), ("a",), ("y",))
    assert g.touches[0] == ("state", "x", "before")
    assert g.output_buffers == {"y", "state"}
    assert set(g.buffers) == {"x", "state", "before", "a", "y"}


def test_dependencies_by_reads_and_writes_of_buffers() -> None:
    g = SMALL["in_place"]
    assert g.predecessors == ((), (0,), (0,), (1, 2), (2, 3), (3, 4))
    assert g.successors == ((1, 2), (3,), (3, 4), (4, 5), (5,), ())
    diamond = SMALL["diamond"]
    assert diamond.predecessors == ((), (0,), (0,), (1, 2))


@given(graphs())
def test_dependencies_are_those_of_the_definition(g: Graph) -> None:
    """Every pair of which one writes what the other touches is ordered, by some path; nothing else is an edge."""
    touched = [set(t) for t in g.touches]
    written = [set(w) for w in g.writes]
    before: list[set[int]] = []
    for i, predecessors in enumerate(g.predecessors):
        before.append(set(predecessors).union(*(before[p] for p in predecessors)))
        for j in range(i):
            conflict = bool(written[i] & touched[j] or written[j] & touched[i])
            assert not conflict or j in before[i]
            assert conflict or j not in predecessors


@pytest.mark.parametrize("name", ["output_aliases_input", "no_operators"])
def test_outputs_that_nobody_writes_are_not_output_buffers(name: str) -> None:
    assert "x" not in SMALL[name].output_buffers


@given(odd_graphs())
def test_graphs_survive_json(g: Graph) -> None:
    assert msgspec.json.decode(msgspec.json.encode(g), type=Graph) == g


def alias_of_x(**fields: Any) -> Graph:
    return graph([X, tensor("v", 2, buffer="x", **fields)], [], "v")


RELU = Op("relu", ("x",), ("y",), body="aten.relu.default(%0)")

CONTRADICTIONS: dict[str, Callable[[], object]] = {
    "names a tensor twice: x": lambda: graph([X, X], [], "x"),
    "names an operator twice: relu": lambda: graph([X, tensor("y")], [RELU, RELU], "y"),
    "process group 'g' has ranks [0, 0]": lambda: Collective(CollectiveKind.BROADCAST, "g", (0, 0), 1),
    "a collective of group 'g' moves -1 bytes": lambda: Collective(CollectiveKind.BROADCAST, "g", (0,), -1),
    "operator 'o' is of kind collective, its collective is None": lambda: graph(
        [X], [Op("o", ("x",), (), OpKind.COLLECTIVE)], "x"
    ),
    "operator 'o' is of kind compute, its collective is Collective": lambda: graph(
        [X], [Op("o", ("x",), (), collective=Collective(CollectiveKind.BROADCAST, "g", (0,), 1))], "x"
    ),
    "operator 'o' has -1 flops": lambda: graph([X], [Op("o", ("x",), (), flops=-1)], "x"),
    "both take 0 to 2**63 - 1": lambda: graph([X], [Op("o", ("x",), (), flops=1 << 63)], "x"),
    "tensor 'd' has 100000 dimensions": lambda: tensor("d", *[1 << 60] * 100_000),
    "tensor 'v' lies in buffer 'gone'": lambda: graph([X, tensor("v", buffer="gone")], [], "v"),
    "tensor 'u' lies in buffer 'v'": lambda: graph([X, tensor("v", buffer="x"), tensor("u", buffer="v")], [], "u"),
    "tensor 'v' covers bytes [12, 20) of buffer 'x', which has 16": lambda: alias_of_x(offset_bytes=12),
    "tensor 'v' covers bytes [-4, 4) of buffer 'x'": lambda: alias_of_x(offset_bytes=-4),
    "tensor 'v' covers bytes [0, 24) of buffer 'x'": lambda: alias_of_x(strides=(5,)),
    "tensor 'v' has strides (-1,) for shape [2]": lambda: alias_of_x(strides=(-1,)),
    "tensor 'v' has strides (1, 1) for shape [2]": lambda: alias_of_x(strides=(1, 1)),
    "operator 'relu' names tensor 'y', which graph 'g' does not have": lambda: graph([X], [RELU], "x"),
    "operator 'relu' names tensor 'x', which": lambda: graph([tensor("y")], [RELU], "y"),
    "the list of outputs names tensor 'z'": lambda: graph([X], [], "z"),
    "operator 'relu' reads 'x' before it exists": lambda: graph([tensor("x"), tensor("y")], [RELU], "y"),
    "operator 'a' reads 'x' before it exists": lambda: graph(
        [tensor("x"), tensor("y")], [Op("a", ("x",), ("y",)), Op("b", ("y",), ("x",))], "y"
    ),
    "tensor 'y' is written by operator 'again' but already exists": lambda: graph(
        [X, tensor("y")], [RELU, Op("again", ("x",), ("y",))], "y"
    ),
    "tensor 'x' is written by operator 'b' but already exists": lambda: graph([X], [Op("b", (), ("x",))], "x"),
    "operator 'b' updates 'y' in place before it exists": lambda: graph(
        [X, tensor("y"), tensor("y1", buffer="y")], [Op("b", ("x",), ("y1",))], "y1"
    ),
    "operator 'c' reads 'x1' before it exists": lambda: graph(
        [X, tensor("x1", buffer="x"), tensor("y")], [Op("c", ("x1",), ("y",)), Op("b", ("x",), ("x1",))], "y"
    ),
    "the body of operator 'b' uses %1 but it has 1 inputs": lambda: graph(
        [X, tensor("y")], [Op("b", ("x",), ("y",), body="aten.add.Tensor(%0, %1)")], "y"
    ),
    "output 'y' of graph 'g' is never produced": lambda: graph([X, tensor("y")], [], "y"),
    "tensor 't' has dtype 'float33'; known are bool": lambda: Tensor("t", (1,), "float33"),
    "tensor 't' has shape [-1], outside 0 to 2**50 bytes": lambda: tensor("t", -1),
    "tensor 't' has shape [1125899906842625], outside": lambda: tensor("t", 2**50 + 1),
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_contradictions_are_refused_by_name(message: str) -> None:
    with pytest.raises(ModelError) as caught:
        CONTRADICTIONS[message]()
    assert message in str(caught.value)


def test_kinds_of_operators_are_closed() -> None:
    assert [kind.value for kind in OpKind] == ["compute", "collective", "copy", "boundary"]
