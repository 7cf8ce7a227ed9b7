"""From a program's graph to a plan for a device: an order of least peak, one arena, and what is allocated apart."""

from __future__ import annotations

import time

import msgspec

from ...compiler.graph import Graph
from ...compiler.pipeline import Budget, confirm
from ...compiler.plan import PassRecord, Plan
from ...compiler.runtime.device.layout import DevicePlan, lifetimes
from ...errors import OptionError
from ...hw_models.model import HardwareModel
from .ordering import ordering
from .placement import place

__all__ = ["plan_for_device"]

ORDER_SHARE = 0.75  # of the budget; placing has what is left


def plan_for_device(
    graph: Graph,
    apart: frozenset[str],
    machine: HardwareModel,
    budget: Budget,
    *,
    hosts: frozenset[str] = frozenset(),
    reorder: bool = True,
) -> DevicePlan:
    """Decide order, residences and places of ``graph`` (a program's planning graph) so that a process allocates least.

    ``apart`` are buffers that cannot lie in the arena: outputs, what calls make for themselves, inputs handed over.
    ``hosts`` are those of them whose memory may hold other buffers while they do not need it: before its first write
    if the caller allocates it, after its last use if it was handed over. ``machine`` gives the alignment; its capacity
    plays no part, and the plan's own is what arena and ranges take. Without ``reorder`` the order is the program's.

    The order is of least peak (``order/least_peak``), program order where that is as good, and buffers stay from first
    to last use. The plan's first record certifies the peak of live bytes over all orders, its note that of program
    order. No step allocates more than the peak, as ``allocated_bytes`` counts. Never fails because time ran out.

    Raises:
        OptionError: the graph has buffers that no operator makes.
    """
    sources = [name for name, base in graph.buffers.items() if base.role.is_source]
    if sources:
        raise OptionError(
            f"buffer {sources[0]!r} of graph {graph.name!r} exists before its first operator",
            hint="leave out what the caller keeps; let an operator of kind 'boundary' bring what it hands over",
        )
    begin = time.monotonic()
    start = Plan.of_order(graph, machine)
    found = ordering(start, budget.share(ORDER_SHARE), search=reorder)
    note = f"program order has {found.program_bytes:,}"
    record = PassRecord("order/least_peak", time.monotonic() - begin, found.certificate, note)
    ordered = start.with_order(found.order).with_record(record)
    resident = msgspec.structs.replace(ordered, residences=lifetimes(ordered, graph, graph.buffers))
    placed = place(resident, apart, hosts & apart, budget)
    confirm("device", placed.plan, found.certificate)
    return placed
