"""What a launch replaces and where it may stand, on graphs of a few operators; fused graphs compute the same."""

from __future__ import annotations

import pytest

from opweave.compiler.fusion import Cost, Match, Uses, fused, is_row_major
from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.errors import ModelError

COST = Cost(0, 0)


def graph(*ops: Op, outputs: tuple[str, ...], more: tuple[Tensor, ...] = ()) -> Graph:
    """Operators over tensors of four elements; what none of them writes is an input."""
    known = {t.name for t in more}
    written = dict.fromkeys(name for op in ops for name in op.outputs)
    read = dict.fromkeys(name for op in ops for name in op.inputs if name not in written)
    tensors = [Tensor(name, (4,), "float32", Role.INPUT) for name in read if name not in known]
    tensors += [Tensor(name, (4,), "float32") for name in written if name not in known]
    return Graph("g", (*tensors, *more), ops, outputs)


def op(name: str, *inputs: str, out: str = "", repeatable: bool = True) -> Op:
    return Op(name, inputs, (out or name,), body=f"aten.{name}.default(%0)", repeatable=repeatable)


def match(g: Graph, operands: tuple[str, ...], outputs: tuple[str, ...]) -> Match | None:
    uses, written = Uses(g), [g.tensor[name] for name in outputs]
    read = [g.tensor[name] for name in operands]
    gone = uses.replaced(written, read)
    before = uses.place(gone, read, written) if gone else None
    if before is None:
        return None
    named = {name: g.tensor[name] for name in operands}
    return Match("k", tuple(g.ops[i].name for i in gone), before, named, tuple(written), COST)


def names(g: Graph) -> list[str]:
    return [o.name for o in g.ops]


def test_what_only_the_replaced_read_vanishes_with_them() -> None:
    g = graph(op("a", "x"), op("b", "a"), op("c", "b"), outputs=("c",))
    found = match(g, ("x",), ("c",))
    assert found is not None
    assert found.ops == ("a", "b", "c")
    assert names(fused(g, [found])) == ["k_c"]


def test_what_somebody_else_reads_stays() -> None:
    g = graph(op("a", "x"), op("b", "a"), op("c", "b"), op("d", "b"), outputs=("c", "d"))
    found = match(g, ("x",), ("c",))
    assert found is not None
    assert found.ops == ("c",)
    assert names(fused(g, [found])) == ["a", "b", "k_c", "d"]


def test_what_the_caller_gets_stays() -> None:
    g = graph(op("a", "x"), op("b", "a"), outputs=("a", "b"))
    found = match(g, ("x",), ("b",))
    assert found is not None
    assert found.ops == ("b",)


def test_an_operator_with_an_effect_stays() -> None:
    g = graph(op("a", "x", repeatable=False), op("b", "a"), outputs=("b",))
    found = match(g, ("x",), ("b",))
    assert found is not None
    assert found.ops == ("b",)


def test_a_second_result_that_is_needed_prevents_it() -> None:
    pair = Op("a", ("x",), ("a", "a2"), body="aten.a.default(%0)")
    g = graph(pair, op("b", "a2"), outputs=("a", "b"))
    assert match(g, ("x",), ("a",)) is None
    assert match(g, ("x",), ("a", "a2")) is not None


def test_a_launch_waits_for_an_operand_that_comes_late() -> None:
    g = graph(op("a", "x"), op("late", "y"), op("b", "a", "late"), outputs=("b",))
    found = match(g, ("x", "late"), ("b",))
    assert found is not None
    assert names(fused(g, [found])) == ["late", "k_b"]


def test_a_result_that_is_read_before_an_operand_exists_prevents_it() -> None:
    """`a` is a result of the launch and is needed to make its operand `late`."""
    g = graph(op("a", "x"), op("late", "a"), op("b", "a", "late"), outputs=("a", "b"))
    assert match(g, ("x", "late"), ("a", "b")) is None


def test_an_operand_that_is_written_in_between_prevents_it() -> None:
    version = Tensor("x2", (4,), "float32", Role.INPUT, "x")
    g = graph(op("a", "x"), op("write", "y", out="x2"), op("b", "a", "x2"), outputs=("b",), more=(version,))
    assert match(g, ("x",), ("b",)) is None


def test_a_launch_comes_before_what_writes_its_operand_later() -> None:
    version = Tensor("x2", (4,), "float32", Role.INPUT, "x")
    g = graph(op("a", "x"), op("b", "a"), op("write", "y", out="x2"), outputs=("b",), more=(version,))
    found = match(g, ("x",), ("b",))
    assert found is not None
    assert names(fused(g, [found])) == ["k_b", "write"]


def test_an_update_in_place_may_be_a_result() -> None:
    version = Tensor("cache2", (4,), "float32", Role.INPUT, "cache")
    cache = Tensor("cache", (4,), "float32", Role.INPUT)
    g = graph(op("a", "x"), op("store", "a", "cache", out="cache2"), outputs=(), more=(cache, version))
    found = match(g, ("x", "cache"), ("cache2",))
    assert found is not None
    launched = fused(g, [found])
    assert names(launched) == ["k_store"]
    assert launched.ops[0].outputs == ("cache2",)


def test_an_update_that_another_reads_meanwhile_prevents_it() -> None:
    version = Tensor("cache2", (4,), "float32", Role.INPUT, "cache")
    cache = Tensor("cache", (4,), "float32", Role.INPUT)
    g = graph(
        op("a", "x"),
        op("look", "cache"),
        op("store", "a", "cache", out="cache2"),
        outputs=("look",),
        more=(cache, version),
    )
    assert match(g, ("x", "cache"), ("cache2",)) is None


def test_two_launches_in_a_row_keep_their_order() -> None:
    g = graph(op("a", "x"), op("b", "a"), op("c", "b"), op("d", "c"), outputs=("d",))
    first, second = match(g, ("x",), ("b",)), match(g, ("b",), ("d",))
    assert first is not None
    assert second is not None
    assert names(fused(g, [second, first])) == ["k_b", "k_d"]


def test_two_launches_for_one_operator_are_refused() -> None:
    g = graph(op("a", "x"), op("b", "a"), outputs=("b",))
    one = match(g, ("x",), ("b",))
    assert one is not None
    with pytest.raises(ModelError, match="same operator"):
        fused(g, [one, one])


def test_launches_that_need_each_other_are_refused() -> None:
    """Each has a result that the other reads, though no single operator does."""
    g = graph(op("a", "x"), op("b", "a"), op("c", "y"), op("d", "c"), op("e", "b", "d"), outputs=("e",))
    left = Match("k", ("a", "b"), "a", {"d": g.tensor["d"]}, (g.tensor["b"],), COST)
    right = Match("k", ("c", "d"), "c", {"b": g.tensor["b"]}, (g.tensor["d"],), COST)
    with pytest.raises(ModelError, match="before it exists"):
        fused(g, [left, right])


def test_views_among_the_arguments_join_the_graph() -> None:
    g = graph(op("a", "x"), outputs=("a",))
    view = Tensor("x_t", (2, 2), "float32", Role.INPUT, "x", (1, 2))
    launched = fused(g, [Match("k", ("a",), "a", {"x": view, "scale": 2.0}, (g.tensor["a"],), COST)])
    assert launched.tensor["x_t"].strides == (1, 2)
    assert launched.ops[0].body == "opweave.k.default(%0, 2.0)"


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((2, 3), (3, 1), True),
        ((2, 3), (1, 2), False),
        ((1, 3), (7, 1), True),
        ((2, 1), (1, 9), True),
        ((0, 3), (1, 1), True),
    ],
)
def test_extents_of_one_have_any_stride(shape: tuple[int, ...], strides: tuple[int, ...], expected: bool) -> None:
    base = Tensor("x", shape, "float32", strides=strides)
    assert is_row_major(base) is expected
