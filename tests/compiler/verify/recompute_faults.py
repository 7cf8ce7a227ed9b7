"""Plans that recompute something, each wrong in one way."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from opweave.compiler.graph import OpKind
from opweave.compiler.plan import Instruction, Plan, Recompute, Residence, Run
from opweave.compiler.simulate import simulate
from opweave.compiler.verify import Fault
from tests.graphs.build import GraphBuilder, machine
from tests.graphs.edits import with_instruction, with_more, with_residence, with_times
from tests.graphs.plans import keep_everything
from tests.graphs.recomputed import recomputable, recomputing

__all__ = ["RECOMPUTE_FAULTS"]

AGAIN = 4  # the step that recomputes op0
FAR = 1 << 16


def inserted(plan: Plan, step: int, instruction: Instruction) -> Plan:
    """``instruction`` comes at ``step``; residences that begin or end at or behind it move with their instructions."""
    residences = tuple(
        msgspec.structs.replace(r, begin=r.begin + (r.begin >= step), end=r.end + (r.end > step))
        for r in plan.residences or ()
    )
    instructions = (*plan.instructions[:step], instruction, *plan.instructions[step:])
    return msgspec.structs.replace(plan, instructions=instructions, residences=residences)


def roomy(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, machine=machine())


def before_its_run() -> Plan:
    """``a`` is 'recomputed' first; then op0 runs for the first time while ``a`` has another residence."""
    plan = with_residence(roomy(recomputing()), "a", begin=1, end=2, offset=FAR)
    early = inserted(plan, 1, Recompute("op0"))
    more = with_more(early, Residence("a", "sram", 2, 4, FAR))
    return with_residence(more, "a", begin=1, end=2)


def random() -> Plan:
    op = recomputable().ops[0]
    return recomputing(graph=recomputable(msgspec.structs.replace(op, body="aten.rand_like.default(%0)")))


def collective() -> Plan:
    op = recomputable().ops[0]
    return recomputing(graph=recomputable(msgspec.structs.replace(op, kind=OpKind.COPY)))


def updating(*, target: str) -> Plan:
    """Three operators: ``a = relu(x)``, ``target`` updated in place, ``y = tanh(a)``; ``a`` is recomputed before that.

    Nothing is dropped but ``a``, which after an update of its own would come back without it.
    """
    g = GraphBuilder("updating")
    x, z = g.input("x", 8, 16), g.input("z", 8, 16)
    a = g.unary("relu", x, "a")
    updated = g.update("add", a if target == "a" else x, z, "updated")
    g.unary("tanh", updated if target == "a" else a, "y")
    base = keep_everything(g.build("y"), machine())
    return with_more(
        inserted(with_residence(base, "a", end=4), 4, Recompute("op0")), Residence("a", "sram", 4, 6, 2 * FAR)
    )


def without_residence() -> Plan:
    plan = recomputing()
    kept = tuple(r for r in plan.residences or () if (r.buffer, r.begin) != ("a", AGAIN))
    return msgspec.structs.replace(plan, residences=kept)


def on_another_engine() -> Plan:
    """On a second compute engine, the operator that reads ``a`` starts when its recomputation does."""
    one = machine()
    core2 = msgspec.structs.replace(one.engines[0], name="core2")
    plan = with_residence(roomy(recomputing()), "y", offset=FAR)
    plan = msgspec.structs.replace(simulate(plan), machine=msgspec.structs.replace(one, engines=(*one.engines, core2)))
    start_s, finish_s = plan.instructions[AGAIN].start_s, plan.instructions[AGAIN + 1].finish_s
    return with_instruction(plan, AGAIN + 1, Run("op3", "core2", start_s, finish_s))


def hurried(plan: Plan) -> Plan:
    start_s, finish_s = plan.instructions[AGAIN].start_s, plan.instructions[AGAIN].finish_s
    assert start_s is not None
    assert finish_s is not None
    return with_times(plan, AGAIN, start_s + (finish_s - start_s) * 1e-3, finish_s)


RECOMPUTE_FAULTS: tuple[tuple[Fault, Callable[[], Plan]], ...] = (
    (Fault.OPERATOR_UNKNOWN, lambda: with_more(recomputing(), Recompute("nobody"))),
    (Fault.ENGINE_OF_WRONG_KIND, lambda: with_instruction(recomputing(), AGAIN, Recompute("op0", engine="dma"))),
    (Fault.PARTLY_DECIDED, lambda: with_more(Plan.of_order(recomputable(), machine()), Recompute("op0"))),
    (Fault.OPERATOR_REPEATED, lambda: with_instruction(recomputing(), AGAIN, Run("op0"))),
    (Fault.RECOMPUTED_BEFORE_RUN, before_its_run),
    (Fault.RECOMPUTED_ILLEGALLY, random),
    (Fault.RECOMPUTED_ILLEGALLY, collective),
    (Fault.RECOMPUTED_ILLEGALLY, lambda: updating(target="a")),
    (Fault.OPERAND_UPDATED, lambda: updating(target="x")),
    (Fault.RECOMPUTE_OF_RESIDENT, lambda: inserted(roomy(recomputing()), 2, Recompute("op0"))),
    (Fault.NOT_RESIDENT_WHEN_WRITTEN, without_residence),
    (Fault.NOT_RESIDENT_WHEN_READ, lambda: with_residence(recomputing(), "x", end=AGAIN)),
    (Fault.STARTS_BEFORE_OPERANDS, on_another_engine),
    (Fault.FASTER_THAN_MACHINE, lambda: hurried(simulate(recomputing()))),
)
