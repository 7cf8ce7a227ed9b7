"""How much of the time for transfers does computing hide, once loads and stores are issued where there is room?

Networks are planned in their own order, with weights streamed by operators, with weights loaded into the scratchpad
right before their operators, and with these loads moved ahead (``latency/prefetch``). Times are the simulator's; bounds
hold for every residency, placement and issue of the order. A scratchpad too small for the network is enlarged to a
quarter above the least that works.

``python -m benchmarks.bench_latency [--quick] [--data DIR] [--json FILE]``. ``DIR`` holds ``.onnx`` models and operator
graphs, also in folders; without one, a network made here is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from opweave.api import read_model, streamable
from opweave.compiler.graph import Graph
from opweave.compiler.pipeline import Budget, run_pass
from opweave.compiler.plan import Plan
from opweave.compiler.simulate import latency_ns, simulate
from opweave.compiler.verify import verify
from opweave.errors import ModelError
from opweave.hw_models.registry import load
from opweave.passes.latency.bound import latency_bound_of_order_s
from opweave.passes.latency.prefetch import Prefetch
from opweave.passes.planner import Planner
from opweave.passes.residency.workset import least_capacity

from .runner import Options, Row, operator_graphs, print_table, run

MACHINES = ("edge-npu", "ethos-u65-like", "microcontroller", "tpuv4i-like")
LARGEST = {True: 200, False: 1500}  # operators, by --quick
SECONDS = {True: 4.0, False: 20.0}
PLANNER = Planner("order/given", "residency/least_cost", "address/exact")


@dataclass(frozen=True)
class Measured:
    """Latency and bound of one plan, in nanoseconds."""

    latency: int
    bound: float
    seconds: float = 0.0

    @property
    def exposed(self) -> float:
        """Nanoseconds above the bound."""
        return self.latency - self.bound


def measure(options: Options) -> Iterator[Row]:
    """Plan every network on every machine; prints the table."""
    lines: list[list[str | float | None]] = []
    hidden: list[float] = []
    for network, graph in _graphs(options):
        for machine in MACHINES:
            case = f"{network}@{machine}"
            streamed = _measured(_plan(graph, machine, "streamed"))
            before = _plan(graph, machine, "resident")
            loaded = _measured(before)
            after = run_pass(Prefetch(), before, Budget.of_seconds(SECONDS[options.quick]))
            moved = _measured(after, after.passes[-1].seconds)
            share = (loaded.latency - moved.latency) / loaded.exposed if loaded.exposed >= 1 else 1.0
            hidden.append(share)
            for provider, found in (("streamed", streamed), ("loaded", loaded), ("prefetched", moved)):
                yield Row(case, provider, "latency", found.latency / 1e9, "s", found.bound / 1e9)
            yield Row(case, "prefetched", "hidden_share", share, "1")
            yield Row(case, "prefetched", "seconds", round(moved.seconds, 3), "s")
            times = [round(found.latency / 1e3, 1) for found in (streamed, loaded, moved)]
            ratio = moved.latency / moved.bound if moved.bound else 1.0
            lines.append([network, machine, *times, round(moved.bound / 1e3, 1), ratio, 100 * share, moved.seconds])
    head = ("network", "machine", "streamed us", "loaded us", "prefetched us", "bound us", "x bound", "hidden %", "s")
    print_table(head, lines)
    if hidden:
        print(
            f"bench_latency: {len(hidden)} plans verified, {100 * median(hidden):.0f} % of exposed time hidden (median)"
        )


def _plan(graph: Graph, machine: str, weights: Literal["streamed", "resident"]) -> Plan:
    plan = Plan.of_order(graph, load(machine), streamed=streamable(graph) if weights == "streamed" else ())
    least = least_capacity(plan)
    memory = plan.machine.scratchpad_memory
    if least > memory.capacity_bytes:
        room = least * 5 // 4 // memory.alignment_bytes * memory.alignment_bytes
        plan = Plan.of_order(graph, plan.machine.with_scratchpad(room), streamed=plan.streamed)
    return PLANNER.plan(plan, Budget.of_seconds(30))


def _measured(plan: Plan, seconds: float = 0.0) -> Measured:
    assert not verify(simulate(plan)).faults
    return Measured(latency_ns(plan), latency_bound_of_order_s(plan) * 1e9, seconds)


def _graphs(options: Options) -> Iterator[tuple[str, Graph]]:
    if options.data is None:
        yield from operator_graphs(options)
        return
    for path in sorted((*options.data.rglob("*.onnx"), *options.data.rglob("*.json"))):
        try:
            graph = read_model(path)[0].graph
        except ModelError as error:
            print(f"left out {path.name}: {error.message}")
            continue
        if len(graph.ops) <= LARGEST[options.quick]:
            yield f"{path.parent.name}/{path.name.partition('.')[0]}", graph


if __name__ == "__main__":
    sys.exit(
        run(
            "bench_latency",
            "How much of the time for transfers does computing hide?",
            measure,
            default_data=Path(__file__).parents[2] / "shared" / "data",
        )
    )
