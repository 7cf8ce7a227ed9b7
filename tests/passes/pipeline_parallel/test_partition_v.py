"""Cuts for a V against all cuts: the least bound that every rank can keep to, with limits and unequal ranks."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.pipelining.placement import placed
from opweave.passes.pipeline_parallel.partition_even import Evenness, even, neighbours
from opweave.passes.pipeline_parallel.partition_layers import Cuts, LayerCost, Line
from opweave.passes.pipeline_parallel.partition_v import Nested


@st.composite
def lines(draw: st.DrawFn) -> Line:
    """A few layers in a V of one to three ranks."""
    ranks = draw(st.integers(1, 3))
    times, sizes = st.integers(0, 9), st.integers(0, 3)
    layers = tuple(
        LayerCost(
            str(index),
            *(draw(times), draw(times), draw(times)),
            until_weight_gradient_bytes=draw(sizes),
            parameter_bytes=draw(sizes),
        )
        for index in range(draw(st.integers(2 * ranks, 8)))
    )
    limit = draw(st.none() | st.tuples(*[st.integers(3, 30)] * ranks))
    slowness = draw(st.just(()) | st.tuples(*[st.sampled_from((0.5, 1.0, 1.3))] * ranks))
    return Line(layers, placed("v", ranks, 2), draw(st.integers(1, 4)), limit, slowness)


def rank_bound(line: Line, cuts: Cuts) -> int | None:
    """The largest rank bound, by the problem's own figures; ``None`` if a rank cannot hold one microbatch."""
    problem = line.problem(cuts)
    held = [
        sum(problem.stages[stage].until_weight_gradient_bytes for stage in own) + resident
        for own, resident in zip(problem.stages_of, problem.resident_bytes, strict=True)
    ]
    if any(own > limit for own, limit in zip(held, line.memory_limit or held, strict=True)):
        return None
    heads = [sum(stage.forward_ns for stage in problem.stages[:rank]) for rank in range(line.ranks)]
    return max(head + work for head, work in zip(heads, problem.work_ns, strict=True))


@settings(max_examples=60, deadline=None)
@given(line=lines())
def test_least_bound_is_that_of_all_cuts(line: Line) -> None:
    """Exact where ranks are alike; a bound in any case; cuts that are returned keep to it."""
    nested, stages = Nested(line), len(line.placement)
    assert nested.applies
    bounds = [rank_bound(line, cuts) for cuts in combinations(range(1, len(line.layers)), stages - 1)]
    found = min((bound for bound in bounds if bound is not None), default=None)
    relaxed, filled = nested.least(empty=True), nested.least(empty=False)
    if found is None:
        assert filled is None or line.slowness
        return
    assert relaxed is not None
    assert relaxed[0] <= found
    assert Evenness(line).bound <= found
    if filled is not None and not line.slowness:
        own = rank_bound(line, filled[1])
        assert own is not None
        assert found <= own <= filled[0]


@settings(max_examples=60, deadline=None)
@given(line=lines())
def test_moves_keep_stages_and_make_cuts_more_even(line: Line) -> None:
    """Every stage keeps a layer; what is even stays so, and no neighbour is better in the end."""
    evenness, start = Evenness(line), even(line)
    assert line.is_legal(start)
    cuts = evenness.evened(start)
    assert line.is_legal(cuts)
    assert evenness.key(cuts) <= evenness.key(start)
    near = list(neighbours(line, start))
    assert len(set(near)) == len(near)
    assert all(line.is_legal(moved) for moved in near)


def test_only_a_v_is_nested() -> None:
    """Loops and waves of more chunks are something else."""
    layers = tuple(LayerCost(str(index), 1, 1, 1) for index in range(8))
    assert not Nested(Line(layers, placed("loop", 2, 2), 2)).applies
    assert not Nested(Line(layers, placed("wave", 2, 3), 2)).applies
