"""Cuts chosen with the schedule: bounds against every cut and every schedule, ties, limits, unequal ranks, chunks."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from opweave.compiler.pipeline import Budget
from opweave.compiler.pipelining.placement import placed
from opweave.compiler.pipelining.problem import Vocabulary
from opweave.compiler.pipelining.simulate import timed
from opweave.errors import Infeasible, OptionError
from opweave.passes.pipeline_parallel.partition import LayerCost, partition
from opweave.passes.pipeline_parallel.partition_bounds import NEVER, Chain
from opweave.passes.pipeline_parallel.partition_chunks import balanced_chunks
from opweave.passes.pipeline_parallel.partition_layers import Cuts, Line
from opweave.passes.pipeline_parallel.solution import Objective, within_limit
from tests.passes.pipeline_parallel.every_order import best_of_all


def quick() -> Budget:
    return Budget.of_seconds(60.0, deterministic=True, workers=1)


def model(blocks: int = 12, *, embedding: int = 4, head: int = 40) -> list[LayerCost]:
    """Blocks that are alike between an embedding and a head that is as large as several of them."""
    block = LayerCost("block", 10, 10, 8, None, 2, 4, 0, 5, 1, 1)
    first = LayerCost("embedding", embedding, 0, embedding, None, 0, 1, 0, 20)
    return [first, *([block] * blocks), LayerCost("head", head, head, head, None, 3, 2, 0, 20)]


@st.composite
def lines(draw: st.DrawFn) -> Line:
    """Two stages of a few layers, on two ranks or on one, with every field that may matter."""
    times, sizes = st.integers(1, 6), st.integers(0, 3)

    def layer(index: int) -> LayerCost:
        halves = draw(times), draw(times)
        return LayerCost(
            f"layer {index}",
            draw(times),
            *halves,
            backward_ns=draw(st.none() | st.integers(1, 2 * sum(halves))),
            until_input_gradient_bytes=draw(sizes),
            until_weight_gradient_bytes=draw(sizes),
            between_gradients_bytes=draw(sizes),
            parameter_bytes=draw(sizes),
            forward_send_ns=draw(sizes),
            backward_send_ns=draw(sizes),
            reduce_ns=draw(sizes),
        )

    layers = tuple(layer(index) for index in range(draw(st.integers(2, 4))))
    limit = draw(st.none() | st.tuples(st.integers(4, 30), st.integers(4, 30)))
    slowness = draw(st.just(()) | st.tuples(st.sampled_from((0.5, 1.0)), st.sampled_from((1.0, 1.5))))
    return Line(layers, (0, 1), draw(st.integers(1, 2)), limit, slowness)


def all_cuts(line: Line) -> list[Cuts]:
    cuts = combinations(range(1, len(line.layers)), len(line.placement) - 1)
    return [found for found in cuts if line.is_legal(found)]


@settings(max_examples=12, deadline=None)
@given(line=lines(), objective=st.sampled_from(("makespan", "span")))
def test_no_schedule_of_any_cuts_is_below_the_bounds(line: Line, objective: Objective) -> None:
    """The chain's bound, and each stage's, against every schedule of all cuts; ``NEVER`` only where none exists."""
    chain = Chain(line, objective)
    ordered = list(chain.best_first())
    assert [worst for worst, _ in ordered] == sorted(worst for worst, _ in ordered)
    bounds = {cuts: worst for worst, cuts in ordered}
    for cuts in all_cuts(line):
        best = best_of_all(line.problem(cuts), objective)
        if best is not None and best >= 0:
            assert bounds.get(cuts, NEVER) <= best, cuts
            assert chain.bound <= best


@settings(max_examples=8, deadline=None)
@given(line=lines())
def test_answers_are_judged_and_between_bound_and_optimum(line: Line) -> None:
    """What is returned is a schedule of its cuts within the limit; its bound is one of all cuts and schedules."""
    every = [best_of_all(line.problem(cuts), "makespan") for cuts in all_cuts(line)]
    found = [best for best in every if best is not None and best >= 0]
    assume(found)
    assume(None not in every)
    budget = Budget.of_seconds(0.3, workers=1)
    answer = partition(
        line.layers, 2, line.microbatches, budget, memory_limit=line.memory_limit, slowness=line.slowness
    )
    assert answer.bound.value <= min(found) <= answer.value
    assert answer.problem == line.problem(answer.cuts) == answer.solution.timed.schedule.problem
    again = timed(answer.solution.timed.schedule)
    assert again.makespan_ns == answer.value
    assert within_limit(again)
    assert answer.cuts in dict(answer.tried)


def test_a_large_head_is_left_alone_on_its_rank() -> None:
    """Equal numbers of layers leave most ranks idle; the cuts chosen are proved best, and as short as the head."""
    layers = model()
    even = Line(tuple(layers), placed("loop", 4), 16).problem((4, 7, 10))
    answer = partition(layers, 4, 16, quick())
    assert answer.gap == 0
    assert answer.cuts[-1] == len(layers) - 1
    assert answer.value < 0.8 * (max(even.work_ns) + even.stages[0].forward_ns)
    head = 16 * layers[-1].work_ns
    assert head < answer.value <= head + sum(layer.forward_ns for layer in layers[:-1])


def test_chunks_are_balanced_over_ranks_not_stages() -> None:
    """With a V the rank of the head gives its other chunk's layers away; the bound is that of all cuts."""
    layers = model(blocks=14, embedding=8, head=20)
    answer = partition(layers, 2, 6, quick(), chunks=2, placement="v")
    loads = answer.problem.work_ns
    total = 6 * sum(layer.work_ns for layer in layers)
    assert sum(loads) == total
    assert max(loads) - min(loads) <= 2 * 6 * 28
    line = Line(tuple(layers), placed("v", 2, 2), 6)
    best = min(
        max(loads[rank] + (0 if rank == 0 else sum(layer.forward_ns for layer in layers[: cuts[0]])) for rank in (0, 1))
        for cuts in all_cuts(line)
        for loads in (line.problem(cuts).work_ns,)
    )
    cuts, bound = balanced_chunks(line, "makespan", quick())
    assert bound == best <= answer.bound.value <= answer.value
    assert cuts is not None
    assert line.is_legal(cuts)


def test_slow_ranks_get_fewer_layers() -> None:
    """A rank that takes twice as long gets about half of the layers."""
    layers = [LayerCost(str(index), 10, 10, 10) for index in range(15)]
    answer = partition(layers, 3, 12, quick(), slowness=(1.0, 2.0, 1.0))
    assert answer.cuts == (6, 9)
    assert answer.problem.stages[1].forward_ns == 60


def test_what_layers_share_is_on_one_rank() -> None:
    """Tied weights of embedding and head: impossible with one stage a rank, kept on the rank of both ends of a V."""
    layers = model(blocks=6)
    tied = [replace(layer, shared=("weight",)) for layer in (layers[0], layers[-1])]
    layers = [tied[0], *layers[1:-1], tied[1]]
    with pytest.raises(OptionError, match="embedding, head share 'weight'"):
        partition(layers, 2, 4, quick())
    answer = partition(layers, 2, 4, quick(), chunks=2, placement="v")
    assert len(answer.cuts) == 3
    neighbours = [replace(layer, shared=("weight",)) for layer in model(blocks=2)[1:3]]
    answer = partition([*neighbours, *model(blocks=2)], 2, 4, quick())
    assert answer.cuts[0] >= 2
    wanted = partition(layers, 2, 4, quick(), placement=(0, 1, 0))
    assert wanted.problem.stages_of[0] == (0, 2)


def test_limits_move_cuts_and_name_what_is_missing() -> None:
    """Weights count: a limit below the balanced cuts' need gives others; below all cuts' an error with the least."""
    layers = [LayerCost(str(i), 4, 4, 4, until_weight_gradient_bytes=1, parameter_bytes=10 - i) for i in range(8)]
    free = partition(layers, 2, 4, quick())
    assert free.cuts == (4,)
    assert max(free.solution.timed.peak_bytes) > 32
    tight = partition(layers, 2, 4, quick(), memory_limit=33)
    assert tight.cuts == (3,)
    assert max(tight.solution.timed.peak_bytes) <= 33
    with pytest.raises(Infeasible) as refused:
        partition(layers, 2, 4, quick(), memory_limit=20)
    needed = refused.value.required_bytes
    partition(layers, 2, 4, quick(), memory_limit=needed)
    with pytest.raises(Infeasible):
        partition(layers, 2, 4, quick(), memory_limit=needed - 1)


def test_shards_of_the_vocabulary_take_the_place_of_the_head() -> None:
    """The head in shards over all ranks leaves nothing for which cuts would have to make up."""
    layers = model()
    whole = partition(layers, 4, 16, quick())
    shards = Vocabulary((20,) * 4, (10,) * 4)
    answer = partition(layers[:-1], 4, 16, quick(), vocabulary=shards)
    assert answer.value < whole.value
    assert answer.bound.value <= answer.value


def test_arguments_that_do_not_fit_are_refused() -> None:
    """Fewer layers than stages, limits and slownesses for other ranks, placements that leave ranks out."""
    layers = model(blocks=2)
    with pytest.raises(OptionError, match="4 layers are to be cut into 5"):
        partition(layers, 5, 4, quick())
    with pytest.raises(OptionError, match="2 slownesses for 3 ranks"):
        partition(layers, 3, 4, quick(), slowness=(1.0, 1.0))
    with pytest.raises(OptionError, match="1 memory limits"):
        partition(layers, 3, 4, quick(), memory_limit=(5,))
    with pytest.raises(OptionError, match="each rank from 0 on"):
        partition(layers, 2, 4, quick(), placement=(1, 1))
    with pytest.raises(OptionError, match="is for 2 ranks"):
        partition(layers, 3, 4, quick(), placement=(0, 1))
    with pytest.raises(OptionError, match="above 0"):
        partition(layers, 2, 4, quick(), slowness=(1.0, 0.0))
    with pytest.raises(OptionError, match="0 microbatches"):
        partition(layers, 2, 0, quick())


@pytest.mark.parametrize("options", [{}, {"chunks": 2, "placement": "v"}, {"chunks": 2}], ids=["one", "v", "loop"])
def test_a_deterministic_budget_gives_one_answer(options: dict[str, Any]) -> None:
    """Cuts, value and bound do not depend on the clock."""
    layers = [replace(layer, name=str(index)) for index, layer in enumerate(model(blocks=10, head=17))]
    first, second = (partition(layers, 2, 5, quick(), **options) for _ in range(2))
    assert (first.cuts, first.value, first.bound, first.tried) == (
        second.cuts,
        second.value,
        second.bound,
        second.tried,
    )


def test_a_stopped_budget_still_gives_cuts() -> None:
    """Ctrl-C before anything was found: the first cuts, scheduled."""
    budget = quick()
    budget.stop.set()
    answer = partition(model(), 4, 16, budget)
    assert len(answer.cuts) == 3
    assert answer.bound.value <= answer.value


def test_room_for_one_microbatch_makes_them_wait_for_each_other() -> None:
    """Rank 0 holds one microbatch at a time, from its F through the other rank and back to its W: 5 units each."""
    layers = [LayerCost(str(index), 1, 1, 1, until_weight_gradient_bytes=1) for index in range(2)]
    answer = partition(layers, 2, 6, quick(), memory_limit=(1, 6))
    assert answer.value == answer.bound.value == 6 * 5
    assert Chain(Line(tuple(layers), (0, 1), 6, (1, 6))).bound == 6 * 5
