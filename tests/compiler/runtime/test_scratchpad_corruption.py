"""What is wrong with a plan shows when it is executed: the machine raises, or the numbers are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import msgspec
import pytest

from opweave.compiler.graph import Role
from opweave.compiler.plan import Instruction, Load, Plan, Residence, Run, Store
from opweave.compiler.verify import verify
from opweave.errors import ExecutionError
from tests.compiler.runtime.eager import run, same
from tests.graphs.build import GraphBuilder, all_graphs, machine, random_sources
from tests.graphs.plans import keep_everything, keep_nothing


def spilling_plan() -> Plan:
    """``a`` is stored, dropped, overwritten by other values and fetched again; ``state`` is updated and stored."""
    g = GraphBuilder("spill")
    x = g.input("x", 4, 4)
    state = g.tensor("state", 4, 4, role=Role.OPTIMIZER_STATE)
    a = g.unary("tanh", x, "a")
    b = g.unary("exp", x, "b")
    g.update("add", state, b, "state_1")
    graph = g.build(g.binary("add", a, "state_1", "y"))
    instructions: tuple[Instruction, ...] = (
        *(Load("x"), Run("op0"), Store("a"), Run("op1"), Load("state"), Run("op2"), Store("state")),
        *(Load("a"), Run("op3"), Store("y")),
    )
    residences = (
        Residence("x", "sram", 0, 4, 0),
        Residence("a", "sram", 1, 3, 64),
        Residence("b", "sram", 3, 6, 64),
        Residence("state", "sram", 4, 9, 128),
        Residence("a", "sram", 7, 9, 0),
        Residence("y", "sram", 8, 10, 64),
    )
    return Plan(graph, machine(192), instructions, residences)


def changed(plan: Plan, residence: int, **fields: int) -> Plan:
    """The plan with fields of one residence replaced."""
    residences = list(plan.residences or ())
    residences[residence] = msgspec.structs.replace(residences[residence], **fields)
    return msgspec.structs.replace(plan, residences=tuple(residences))


def swapped(plan: Plan, first: int, second: int) -> Plan:
    """The plan with two instructions exchanged; residences stay at their steps."""
    instructions = list(plan.instructions)
    instructions[first], instructions[second] = instructions[second], instructions[first]
    return msgspec.structs.replace(plan, instructions=tuple(instructions))


def without(plan: Plan, step: int) -> Plan:
    """The plan without one instruction; steps of residences move up with what follows."""
    residences = tuple(
        msgspec.structs.replace(r, begin=r.begin - (r.begin > step), end=r.end - (r.end > step))
        for r in plan.residences or ()
    )
    instructions = plan.instructions[:step] + plan.instructions[step + 1 :]
    return msgspec.structs.replace(plan, instructions=instructions, residences=residences)


def test_the_spilling_plan_is_right() -> None:
    plan = spilling_plan()
    sources = random_sources(plan.graph)
    assert verify(plan).faults == ()
    assert same(run(plan, sources), plan.graph, sources)


WRONG_NUMBERS = {
    "regions overlap": changed(spilling_plan(), 3, offset=96),
    "regions overlap by one byte": changed(spilling_plan(), 2, offset=65),
    "a load is missing": without(spilling_plan(), 4),
    "a second load is missing": without(spilling_plan(), 7),
    "a stale copy is returned": without(spilling_plan(), 6),
    "a store before the update": changed(swapped(spilling_plan(), 5, 6), 2, end=7),
    "an output stored too early": changed(changed(swapped(spilling_plan(), 8, 9), 3, end=10), 4, end=10),
}

RAISES = {
    "a store is missing": (without(spilling_plan(), 2), "'a' is loaded but backing memory never got it"),
    "an output is not stored": (without(spilling_plan(), 9), "output 'y' was never stored"),
    "a residence ends too early": (changed(spilling_plan(), 0, end=3), "'op1' needs buffer 'x', which is not resident"),
    "a store after the residence": (changed(spilling_plan(), 1, end=2), "a store needs buffer 'a'"),
    "a residence begins too late": (changed(spilling_plan(), 3, begin=5), "a load needs buffer 'state'"),
    "a load into a residence": (changed(spilling_plan(), 4, begin=6), "'a' is loaded but already resident"),
    "two residences at once": (changed(spilling_plan(), 4, begin=2), "begins a residence but has one already"),
    "out of the scratchpad": (changed(spilling_plan(), 3, offset=129), "takes 64 bytes at 129, the scratchpad has 192"),
    "a negative address": (changed(spilling_plan(), 3, offset=-1), "takes 64 bytes at -1"),
    "an empty residence": (changed(spilling_plan(), 3, end=4), "from step 4 to 4 lies outside"),
    "a residence beyond the end": (changed(spilling_plan(), 5, end=11), "outside the plan's 10 steps"),
}


@pytest.mark.parametrize("what", WRONG_NUMBERS)
def test_a_corrupted_plan_is_caught_and_computes_wrong_numbers(what: str) -> None:
    plan = WRONG_NUMBERS[what]
    sources = random_sources(plan.graph)
    assert verify(plan).faults
    assert not same(run(plan, sources), plan.graph, sources)


@pytest.mark.parametrize("what", RAISES)
def test_a_corrupted_plan_is_caught_and_raises(what: str) -> None:
    plan, message = RAISES[what]
    assert verify(plan).faults
    with pytest.raises(ExecutionError, match=message):
        run(plan, random_sources(plan.graph))


def test_ended_residences_are_poisoned() -> None:
    """Reading a dead value gives NaN, not the old bytes: ``y`` begins where ``a`` was and is never written."""
    plan = spilling_plan()
    store_y = msgspec.structs.replace(plan, instructions=(*plan.instructions[:8], Run("op0"), Store("y")))
    with pytest.raises(ExecutionError, match="'op0' needs buffer 'x'"):
        run(store_y, random_sources(plan.graph))
    unwritten = msgspec.structs.replace(plan, instructions=(*plan.instructions[:8], Store("a"), Store("y")))
    assert run(unwritten, random_sources(plan.graph)).outputs[0].isnan().all()


def mutations(plan: Plan) -> Iterator[Plan]:
    """Every plan that differs by one dropped instruction, one exchange of neighbours, or one moved residence."""
    for step in range(len(plan.instructions)):
        yield without(plan, step)
        if step:
            yield swapped(plan, step - 1, step)
    for index, residence in enumerate(plan.residences or ()):
        for delta in (-32, -16, 16, 32):
            yield changed(plan, index, offset=(residence.offset or 0) + delta)
        yield changed(plan, index, end=residence.end - 1)
        yield changed(plan, index, begin=residence.begin + 1)


@pytest.mark.parametrize("name", all_graphs())
def test_no_mutation_verifies_and_computes_wrong_numbers(name: str) -> None:
    """The worst bug there can be: the verifier finds nothing, and the numbers are wrong. No other error escapes."""
    graph = all_graphs()[name]
    sources = random_sources(graph)
    for plan in (keep_everything(graph), keep_nothing(graph)):
        for mutated in mutations(plan):
            if not verify(mutated).faults:
                assert same(run(mutated, sources), graph, sources)
            else:
                with suppress(ExecutionError):
                    run(mutated, sources)
