"""Plans at every level, right and wrong, with harmless and with hostile names, for the tests of the reports."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from opweave.compiler.graph import Graph
from opweave.compiler.plan import Certificate, PassRecord, Plan, Residence, Source
from opweave.compiler.simulate import simulate
from opweave.compiler.verify import verify
from tests.graphs.build import GraphBuilder, all_graphs, machine
from tests.graphs.plans import keep_everything, keep_nothing

__all__ = ["HOSTILE_NAME", "at_every_level", "decided", "dense", "faulty", "hostile", "recorded", "spilling"]

HOSTILE_NAME = '</script><img src=x onerror=alert(1)><!-- {{data}} \u2028 $x_1$ & "quoted" \u4e2d'


def spilling() -> Plan:
    """A timed plan with additional loads and stores and a streamed weight, in a scratchpad that it nearly fills."""
    graph = all_graphs()["fan_out"]
    plan = keep_nothing(graph, machine(), streamed=("w0", "v3"))
    ends = [(r.offset or 0) + graph.buffers[r.buffer].nbytes for r in plan.residences or ()]
    return simulate(msgspec.structs.replace(plan, machine=machine(max(ends) + 64)))


def decided(graph: Graph) -> Plan:
    """A timed plan of ``graph`` in which nothing is ever dropped."""
    return simulate(keep_everything(graph))


def dense() -> Plan:
    """A timed plan of 9,000 instructions, many to a pixel, one of which holds far more bytes than any other."""
    g = GraphBuilder("dense")
    y = g.input("x", 4, 16)
    for i in range(3000):
        y = g.unary("relu", y, f"a{i}")
        if i == 1700:
            g.op("aten.repeat.default(%0, [40, 1])", y, outputs={"wide": (160, 16)})
    return simulate(keep_nothing(g.build(y)))


def at_every_level(graph: Graph) -> Mapping[str, Plan]:
    """The same plan with only its order, with residences, with addresses and with times."""
    addressed = keep_everything(graph)
    floating = tuple(Residence(r.buffer, r.memory, r.begin, r.end) for r in addressed.residences or ())
    return {
        "order": Plan.of_order(graph, addressed.machine),
        "residency": msgspec.structs.replace(addressed, residences=floating),
        "address": addressed,
        "timed": simulate(addressed),
    }


def recorded() -> Plan:
    """A plan with passes, a certificate that stands, one that does not, and import counts."""
    plan = spilling()
    value = verify(plan).additional_bytes
    stands = Certificate("additional_traffic_bytes", value, value - value // 8, "ilp", "residency")
    superseded = Certificate("peak_bytes", 1 << 40, 1 << 40, "exhaustive", "order")
    return msgspec.structs.replace(
        plan,
        passes=(
            PassRecord("order/exact", 1.25, superseded, "searched everything"),
            PassRecord("residency/ilp", 2.5, stands),
            PassRecord("address/first_fit", 0.001),
        ),
        source=Source(operators={"native": {"Conv": 11, "Relu": 3}, "fallback": {"TopK": 2}, "opaque": {}}),
    )


def hostile() -> Plan:
    """Every name in sight tries to become markup."""
    g = GraphBuilder(HOSTILE_NAME)
    x = g.input(f"x{HOSTILE_NAME}", 8, 16)
    a = g.unary("relu", x, f"a{HOSTILE_NAME}")
    graph = g.build(g.binary("add", a, x, f"y{HOSTILE_NAME}"))
    ops = tuple(msgspec.structs.replace(op, name=op.name + HOSTILE_NAME, origin=HOSTILE_NAME) for op in graph.ops)
    plan = decided(msgspec.structs.replace(graph, ops=ops))
    return plan.with_record(PassRecord(HOSTILE_NAME, 0.5, None, HOSTILE_NAME))


def faulty() -> Plan:
    """A timed plan that loads a buffer and runs an operator the graph does not have, out of bounds and out of range."""
    plan = spilling()
    strange = Residence("ghost", "sram", 3, 10_000, 1 << 30)
    first = msgspec.structs.replace(plan.instructions[0], buffer="phantom")
    last = msgspec.structs.replace(plan.instructions[-2], engine="nowhere")
    instructions = (first, *plan.instructions[1:-2], last, plan.instructions[-1])
    return msgspec.structs.replace(plan, instructions=instructions, residences=(*(plan.residences or ()), strange))
