"""Plans with collectives, each wrong in one way; and plans of two ranks that do not go together."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from opweave.compiler.graph import Collective, CollectiveKind, Graph, OpKind
from opweave.compiler.plan import CollectiveStart, CollectiveWait, Instruction, Plan, Residence, Run
from opweave.compiler.verify import Fault
from opweave.hw_models.model import Link
from tests.graphs.build import GraphBuilder, machine

__all__ = ["COLLECTIVE_FAULTS", "RANK_FAULTS", "communicating", "on_ranks", "resident", "timed", "twice"]

LINKED = msgspec.structs.replace(machine(), links=(Link("net", 1e9, 1e-6),))


def reduced(group: str = "0", nbytes: int = 512) -> Graph:
    """``a = relu(x)``, ``r`` is the sum of ``a`` over two ranks, ``b = tanh(x)`` can hide it, ``y = r + b``."""
    g = GraphBuilder("reduced")
    x = g.input("x", 8, 16)
    a = g.unary("relu", x, "a")
    g.op(f"_c10d_functional.all_reduce.default(%0, 'sum', '{group}')", a, outputs={"r": (8, 16)})
    g.unary("tanh", x, "b")
    g.op("aten.add.Tensor(%0, %1)", "r", "b", outputs={"y": (8, 16)})
    what = Collective(CollectiveKind.ALL_REDUCE, group, (0, 1), nbytes)
    g.ops[1] = msgspec.structs.replace(g.ops[1], kind=OpKind.COLLECTIVE, collective=what, repeatable=False)
    return g.build("y")


def communicating(*instructions: Instruction, graph: Graph | None = None) -> Plan:
    """The collective is hidden behind ``b``, unless other instructions are given."""
    steps = instructions or (Run("op0"), CollectiveStart("op1"), Run("op2"), CollectiveWait("op1"), Run("op3"))
    return Plan(graph or reduced(), LINKED, steps)


def timed(*, wait_s: float = 2.0, engine: str = "net", start_s: float = 1.0) -> Plan:
    """The same with times."""
    return communicating(
        Run("op0", "core", 0.0, 1.0),
        CollectiveStart("op1", engine, start_s, 2.0),
        Run("op2", "core", 1.0, 2.0),
        CollectiveWait("op1", "", wait_s, wait_s),
        Run("op3", "core", 2.0, 3.0),
    )


def with_moment(plan: Plan, finish_s: float) -> Plan:
    """The wait lasts until ``finish_s``."""
    steps = list(plan.instructions)
    steps[3] = msgspec.structs.replace(steps[3], finish_s=finish_s)
    return msgspec.structs.replace(plan, instructions=tuple(steps))


def resident(*, a_until: int = 4) -> Plan:
    """The same, planned in memory; ``a`` has to stay until the wait at step 3 is over."""
    from opweave.compiler.plan import Load, Store

    plan = communicating()
    steps = (Load("x"), *plan.instructions, Store("y"))
    residences = (
        Residence("x", "sram", 0, 4),
        Residence("a", "sram", 1, a_until + 1),
        Residence("r", "sram", 2, 6),
        Residence("b", "sram", 3, 6),
        Residence("y", "sram", 5, 7),
    )
    return msgspec.structs.replace(plan, instructions=steps, residences=residences)


COLLECTIVE_FAULTS: tuple[tuple[Fault, Callable[[], Plan]], ...] = (
    (
        Fault.COLLECTIVE_NOT_STARTED,
        lambda: communicating(Run("op0"), Run("op1"), Run("op2"), CollectiveWait("op1"), Run("op3")),
    ),
    (
        Fault.COLLECTIVE_NOT_STARTED,  # a start of what is none
        lambda: communicating(Run("op0"), Run("op1"), CollectiveStart("op2"), CollectiveWait("op2"), Run("op3")),
    ),
    (
        Fault.COLLECTIVE_NOT_WAITED,
        lambda: communicating(Run("op0"), CollectiveStart("op1"), Run("op2"), Run("op3")),
    ),
    (
        Fault.DEPENDENCY_VIOLATED,  # it is read in flight
        lambda: communicating(Run("op0"), CollectiveStart("op1"), Run("op2"), Run("op3"), CollectiveWait("op1")),
    ),
    (
        Fault.DEPENDENCY_VIOLATED,  # started before its operand
        lambda: communicating(CollectiveStart("op1"), Run("op0"), Run("op2"), CollectiveWait("op1"), Run("op3")),
    ),
    (
        Fault.OPERATOR_REPEATED,
        lambda: communicating(*communicating().instructions[:4], CollectiveWait("op1"), Run("op3")),
    ),
    (
        Fault.OPERATOR_REPEATED,
        lambda: communicating(*communicating().instructions[:4], CollectiveStart("op1"), Run("op3")),
    ),
    (Fault.OPERATOR_UNKNOWN, lambda: communicating(*communicating().instructions, CollectiveWait("nobody"))),
    (Fault.ENGINE_OF_WRONG_KIND, lambda: timed(engine="dma")),
    (Fault.ENGINE_OF_WRONG_KIND, lambda: communicating(Run("op0", "net"), *communicating().instructions[1:])),
    (Fault.STARTS_BEFORE_OPERANDS, lambda: timed(wait_s=1.5)),  # the wait is over before the collective is
    (Fault.STARTS_BEFORE_OPERANDS, lambda: timed(start_s=0.5)),
    (Fault.TIME_MALFORMED, lambda: with_moment(timed(), 2.5)),
    (Fault.NOT_RESIDENT_WHEN_READ, lambda: resident(a_until=3)),
)


def on_ranks(first: Plan, second: Plan) -> dict[int, Plan]:
    """Plans of ranks 0 and 1."""
    return {0: first, 1: second}


def twice(*, swapped: bool = False, groups: tuple[str, str] = ("0", "0"), waits_at_once: bool = False) -> Plan:
    """Two collectives of different sizes; ``swapped`` issues the second one first."""
    g = GraphBuilder("twice")
    x = g.input("x", 8, 16)
    for number, group in enumerate(groups):
        g.op(f"_c10d_functional.all_reduce.default(%0, 'sum', '{group}')", x, outputs={f"r{number}": (8, 16)})
        what = Collective(CollectiveKind.ALL_REDUCE, group, (0, 1), 512 * (number + 1))
        g.ops[-1] = msgspec.structs.replace(g.ops[-1], kind=OpKind.COLLECTIVE, collective=what, repeatable=False)
    names = ("op1", "op0") if swapped else ("op0", "op1")
    starts, waits = [CollectiveStart(n) for n in names], [CollectiveWait(n) for n in names]
    steps: list[Instruction] = [*starts, *waits]
    if waits_at_once:
        steps = [starts[0], waits[0], starts[1], waits[1]]
    return Plan(g.build("r0", "r1"), LINKED, tuple(steps))


def late(plan: Plan) -> Plan:
    """The same plan, 10 seconds later."""
    moved = (
        msgspec.structs.replace(i, start_s=(i.start_s or 0.0) + 10, finish_s=(i.finish_s or 0.0) + 10)
        for i in plan.instructions
    )
    return msgspec.structs.replace(plan, instructions=tuple(moved))


RANK_FAULTS: tuple[tuple[Fault, Callable[[], dict[int, Plan]]], ...] = (
    (Fault.COLLECTIVE_ORDER_DIFFERS, lambda: on_ranks(twice(), twice(swapped=True))),
    (Fault.COLLECTIVE_ORDER_DIFFERS, lambda: on_ranks(communicating(), communicating(graph=reduced(nbytes=516)))),
    (
        Fault.RANKS_WAIT_FOR_EACH_OTHER,  # of two groups: each group has one order, and yet nobody can go on
        lambda: on_ranks(
            twice(groups=("0", "1"), waits_at_once=True), twice(groups=("0", "1"), swapped=True, waits_at_once=True)
        ),
    ),
    (Fault.ENDS_BEFORE_RANKS_START, lambda: on_ranks(timed(), late(timed()))),
)
