"""The joint search is exact over every order, honest when cut short, and its bounds stay below the optimum."""

from __future__ import annotations

import random
import threading

import msgspec
import pytest
from benchmarks.networks import layered
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opweave.compiler.pipeline import Budget, Decision, Progress, confirm
from opweave.compiler.plan import Certificate, Pin, Plan
from opweave.compiler.verify import verify
from opweave.errors import Infeasible, OptionError
from opweave.hw_models.model import aligned_bytes
from opweave.passes.joint.best_first import BestFirstJoint
from opweave.passes.joint.milestones import milestones, prefixes
from opweave.passes.joint.search import BestFirst, Milestone
from opweave.passes.joint.states import StateSpace, order_of
from opweave.passes.order.problem import OrderProblem
from opweave.passes.registry import make
from opweave.passes.residency.gaps import base_bytes
from opweave.passes.residency.ilp import IlpResidency
from opweave.passes.residency.workset import least_capacity
from tests.graphs.build import all_graphs, machine
from tests.passes.joint.exhaustive import least_placeable_traffic, least_traffic, topological_orders
from tests.passes.joint.tight_plans import tight_plans


def budget(seconds: float = 60.0) -> Budget:
    return Budget.of_seconds(seconds, workers=1, deterministic=True)


def decided(plan: Plan, **options: int) -> tuple[Decision, Certificate]:
    """The decision and its certificate, once the verifier has recounted it."""
    decision = BestFirstJoint(**options).apply(plan, budget())
    confirm("joint/best_first", decision.plan, decision.certificate)
    assert decision.certificate is not None
    return decision, decision.certificate


def space_of(plan: Plan) -> StateSpace:
    problem = OrderProblem.of(plan)
    return StateSpace(problem, problem.capacity)


def least(plan: Plan, *, known: tuple[Milestone, ...] = ()) -> BestFirst:
    """The search of ``plan``, complete."""
    space = space_of(plan)
    search = BestFirst(space, space.root(), 1 << 60, known)
    search.run(lambda: False)
    assert search.found is not None
    return search


def check_exact(plan: Plan) -> None:
    """The search, the pass and its order agree with a walk over every order and every choice of what to keep."""
    expected = least_traffic(plan)
    search = least(plan)
    assert base_bytes(plan) + search.bound == expected
    assert search.found is not None
    ordered = plan.with_order(order_of(search.found))
    certificate = IlpResidency().apply(ordered, budget()).certificate
    assert certificate is not None
    assert certificate.value == expected
    _, joint = decided(plan)
    assert (joint.value, joint.bound) == (expected, expected)


@given(tight_plans(max_ops=7))
@settings(max_examples=60, deadline=None)
def test_exact_over_every_order(plan: Plan) -> None:
    check_exact(plan)


@pytest.mark.slow
@given(tight_plans(max_ops=8))
@settings(max_examples=4000, deadline=None)
def test_exact_over_every_order_of_thousands(plan: Plan) -> None:
    check_exact(plan)


@given(tight_plans(max_ops=7), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_bounds_from_points_along_an_order(plan: Plan, draw: random.Random) -> None:
    """What is to go from a prefix is never overstated, whichever order it is of and however short its search."""
    best = least(plan)
    space, orders = space_of(plan), list(topological_orders(plan))
    order = draw.choice(orders[:200])
    cuts = prefixes(space.problem, order, draw.randint(1, 3))
    tails: list[tuple[int, list[int]]] = []
    effort = draw.choice((1, 5, 10_000))
    known = milestones(space, cuts, (), effort, lambda: False, lambda done, tail: tails.append((done, tail)))
    assert [milestone.done for milestone in known] == cuts
    assert least(plan, known=tuple(known)).bound == best.bound
    assert all(milestone.to_go <= best.bound for milestone in known)
    for done, tail in tails:
        assert sorted(tail) == [op for op in range(len(order)) if not done >> op & 1]


@given(tight_plans(max_ops=7), st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_more_room_never_moves_more(plan: Plan, more: int) -> None:
    capacity = plan.machine.scratchpad_memory.capacity_bytes
    roomier = msgspec.structs.replace(plan, machine=plan.machine.with_scratchpad(capacity + more))
    assert decided(roomier)[1].value <= decided(plan)[1].value


@given(tight_plans(max_ops=5), st.data())
@settings(max_examples=40, deadline=None)
def test_pinned_buffers_stay(plan: Plan, data: st.DataObject) -> None:
    """What is pinned as resident has one residence in the best order that allows it."""
    names = sorted(name for name, base in plan.graph.buffers.items() if base.nbytes and name not in plan.streamed)
    assume(names)
    pinned = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    plan = msgspec.structs.replace(plan, pins=tuple(Pin(name, resident=True) for name in pinned))
    try:
        expected = least_placeable_traffic(plan, placed=False)
    except AssertionError:
        with pytest.raises(Infeasible):
            BestFirstJoint().apply(plan, budget())
        return
    decision, certificate = decided(plan)
    assert (certificate.value, certificate.bound) == (expected, expected)
    for name in pinned:
        assert sum(residence.buffer == name for residence in decision.plan.residences or ()) <= 1


@pytest.mark.parametrize("name", all_graphs())
def test_never_worse_than_the_given_order(name: str) -> None:
    graph = all_graphs()[name]
    plan = Plan.of_order(graph, machine(1))
    plan = msgspec.structs.replace(plan, machine=machine(max(16, aligned_bytes(least_capacity(plan), 16))))
    given_order = IlpResidency().apply(plan, budget()).certificate
    assert given_order is not None
    assert decided(plan)[1].value <= given_order.value


def crowded_layers() -> Plan:
    """Stacked cells in the least scratchpad: too much for a short search."""
    graph = layered(160, 6, 1)
    plan = Plan.of_order(graph, machine(1))
    return msgspec.structs.replace(plan, machine=machine(aligned_bytes(least_capacity(plan), 16)))


@pytest.mark.parametrize("seconds", [0.0, 0.1, 1.0])
def test_short_of_time(seconds: float) -> None:
    """However early the end: a verified plan, a bound no plan can be below, and a gap."""
    plan = crowded_layers()
    heard: list[Progress] = []
    decision = BestFirstJoint().apply(plan, Budget.of_seconds(seconds, workers=1, listen=heard.append))
    confirm("joint/best_first", decision.plan, decision.certificate)
    certificate = decision.certificate
    assert certificate is not None
    assert base_bytes(plan) <= certificate.bound <= certificate.value
    assert certificate.scope == "order"
    assert heard
    assert all(p.bound is not None and p.incumbent is not None and p.bound <= p.incumbent for p in heard)
    assert [p.incumbent for p in heard] == sorted((p.incumbent or 0 for p in heard), reverse=True)


def test_told_to_stop() -> None:
    """A stop in the middle of the search ends it with the best plan so far."""
    stop = threading.Event()

    def listen(progress: Progress) -> None:
        if progress.bound:
            stop.set()

    plan = crowded_layers()
    decision = BestFirstJoint().apply(plan, Budget.of_seconds(600.0, workers=1, listen=listen, stop=stop))
    assert stop.is_set()
    assert verify(decision.plan).faults == ()


def test_little_memory() -> None:
    """A limit on states ends the search with a bound, not with an error."""
    decision, certificate = decided(crowded_layers(), max_states=10, max_expanded=10)
    assert certificate.bound <= certificate.value
    assert "before the search limit" in decision.note


def test_reserve_proves_nothing() -> None:
    """What holds with some of the capacity in reserve says nothing about all of it."""
    plan = crowded_layers()
    capacity = plan.machine.scratchpad_memory.capacity_bytes
    _, certificate = decided(plan, reserve_bytes=capacity // 8, max_expanded=1)
    assert certificate.bound == base_bytes(plan)


@pytest.mark.parametrize("option", ["max_states", "max_expanded"])
def test_options_out_of_range(option: str) -> None:
    with pytest.raises(OptionError, match=option):
        make(f"joint/best_first({option}=0)")
