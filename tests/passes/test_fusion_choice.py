"""Which matches are launched: the best set that goes together, by predicted time or because it is wanted."""

from __future__ import annotations

from itertools import combinations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from opweave.compiler.fusion import Cost, Match, Uses, fused
from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.pipeline import Budget
from opweave.errors import ModelError
from opweave.hw_models.registry import load
from opweave.passes.fusion.choice import EFFICIENCY, Prices, choose_matches

H100 = load("h100-sxm")
ENGINE = H100.engines[0]
BYTES_PER_S = H100.scratchpad_memory.bandwidth_bytes_per_s
ELEMENTS = 1 << 24


def chain(count: int, *, target: str = "aten.relu.default", flops: int = 0) -> Graph:
    """``count`` operators one behind the other, each over 32 MiB of bfloat16."""
    tensors = [Tensor("t0", (ELEMENTS,), "bfloat16", Role.INPUT)]
    tensors += [Tensor(f"t{i}", (ELEMENTS,), "bfloat16") for i in range(1, count + 1)]
    ops = [Op(f"op{i}", (f"t{i - 1}",), (f"t{i}",), flops=flops, body=f"{target}(%0)") for i in range(1, count + 1)]
    return Graph("chain", tuple(tensors), tuple(ops), (f"t{count}",))


def over(graph: Graph, first: int, last: int, cost: Cost) -> Match:
    """A match of the operators ``first`` to ``last``."""
    uses = Uses(graph)
    operands, outputs = [graph.tensor[f"t{first - 1}"]], [graph.tensor[f"t{last}"]]
    gone = uses.replaced(outputs, operands)
    before = uses.place(gone, operands, outputs)
    assert before is not None
    return Match("kernel", tuple(graph.ops[i].name for i in gone), before, {"x": operands[0]}, tuple(outputs), cost)


@given(
    spans=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 3), st.integers(0, 3)), max_size=7),
    required=st.booleans(),
)
def test_the_choice_is_the_best_of_all_sets_that_share_no_operator(
    spans: list[tuple[int, int, int]], required: bool
) -> None:
    graph = chain(8)
    matches = [over(graph, a, min(8, a + length), Cost(0, ELEMENTS << units)) for a, length, units in spans]
    prices = Prices(graph, H100, others_fuse=False)

    def value(match: Match) -> float:
        return len(match.ops) if required else prices.before_s(match) - prices.launch_s(match)

    def goes_together(some: tuple[Match, ...]) -> bool:
        names = [name for match in some for name in match.ops]
        return len(names) == len(set(names))

    allowed = [m for m in matches if required or value(m) > 0.05 * prices.before_s(m)]
    sets = [some for size in range(len(allowed) + 1) for some in combinations(allowed, size)]
    best = max(sum(map(value, some)) for some in sets if goes_together(some))
    choice = choose_matches(graph, matches, H100, Budget.of_seconds(10), others_fuse=False, required=required)
    assert goes_together(choice.matches)
    assert sum(map(value, choice.matches)) == pytest.approx(best, rel=1e-9, abs=1e-15)
    if not required:
        assert choice.gain_s == pytest.approx(best, rel=1e-9, abs=1e-15)
        assert choice.bound_s >= choice.gain_s
    fused(graph, choice.matches)


def test_what_inductor_would_fuse_anyway_gains_nothing() -> None:
    """Three elementwise operators are one kernel for Inductor, and three for an executor without fusion."""
    graph = chain(3)
    match = over(graph, 1, 3, Cost(0, 2 * 2 * ELEMENTS))
    budget = Budget.of_seconds(1)
    assert choose_matches(graph, [match], H100, budget, others_fuse=True).matches == ()
    assert choose_matches(graph, [match], H100, budget, others_fuse=True).refused == {"kernel": 1}
    assert choose_matches(graph, [match], H100, budget, others_fuse=False).matches == (match,)


def test_times_are_rooflines_with_the_assumed_efficiency_of_a_matrix_product() -> None:
    flops = 10**12
    graph = chain(2, target="aten.mm.default", flops=flops)
    match = over(graph, 1, 2, Cost(2 * flops, 4 * ELEMENTS))
    prices = Prices(graph, H100)
    rate = ENGINE.flops_per_s["bfloat16"]
    assert prices.before_s(match) == pytest.approx(2 * (ENGINE.launch_s + flops / rate))
    assert prices.launch_s(match) == pytest.approx(ENGINE.launch_s + 2 * flops / EFFICIENCY / rate)
    assert choose_matches(graph, [match], H100, Budget.of_seconds(1)).matches == ()
    small = chain(2)
    assert Prices(small, H100, others_fuse=False).before_s(over(small, 1, 1, Cost(0, 0))) == pytest.approx(
        ENGINE.launch_s + 4 * ELEMENTS / BYTES_PER_S
    )


def test_launches_that_need_each_other_are_not_both_chosen() -> None:
    tensors = [Tensor(name, (ELEMENTS,), "bfloat16", Role.INPUT) for name in ("x", "y")]
    tensors += [Tensor(name, (ELEMENTS,), "bfloat16") for name in "abcde"]
    ops = [
        *(Op(name, (read,), (name,), body="aten.relu.default(%0)") for name, read in zip("abcd", "xayc", strict=True)),
        Op("e", ("b", "d"), ("e",), body="aten.add.Tensor(%0, %1)"),
    ]
    graph = Graph("g", tuple(tensors), tuple(ops), ("e",))
    left = Match("k", ("a", "b"), "a", {"d": graph.tensor["d"]}, (graph.tensor["b"],), Cost(0, 0))
    right = Match("k", ("c", "d"), "c", {"b": graph.tensor["b"]}, (graph.tensor["d"],), Cost(0, 0))
    with pytest.raises(ModelError):
        fused(graph, [left, right])
    choice = choose_matches(graph, [left, right], H100, Budget.of_seconds(1), others_fuse=False)
    assert len(choice.matches) == 1


def test_without_time_the_answer_is_greedy_and_its_bound_holds() -> None:
    graph = chain(3)
    matches = [over(graph, 1, 2, Cost(0, 0)), over(graph, 2, 3, Cost(0, 0)), over(graph, 1, 1, Cost(0, 0))]
    choice = choose_matches(graph, matches, H100, Budget.of_seconds(0), others_fuse=False)
    assert choice.matches
    assert choice.bound_s >= choice.gain_s
