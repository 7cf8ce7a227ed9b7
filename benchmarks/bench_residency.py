"""How much additional traffic does each order and residency method leave, and how much of it is unavoidable?

Operator graphs are planned at two budgets of COSMA (arXiv 2311.18246): ``M_R``, the largest working set of one
operator, and ``M_H``, midway from there to the peak of the model's own order. Activations only, as there: weights are
streamed. Alignment is 1 byte. Every plan is verified. Bounds are for the order they stand beside.

``python -m benchmarks.bench_residency [--quick] [--data DIR] [--json FILE]``. Without a folder of operator graphs, a
network made here is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opweave.api import streamable
from opweave.compiler.pipeline import Budget, run_pass
from opweave.compiler.plan import Plan
from opweave.compiler.verify import verify
from opweave.passes.registry import make, names
from opweave.passes.residency.workset import least_capacity

from .runner import Options, Row, operator_graphs, print_table, run, scratchpad_machine

RESIDENCIES = ("residency/belady", "residency/least_cost", "residency/ilp")
QUICK_OPERATORS = 800  # larger networks are left out of --quick, but for the one that shows most
QUICK_LARGE = "nasnetalarge"
ORDER_SECONDS = {True: 3.0, False: 20.0}  # by --quick
RESIDENCY_SECONDS = {True: 5.0, False: 60.0}

#: Additional KiB at M_R that a plain sketch reached: in the model's own order (its eviction), and after a beam search.
SKETCH_KIB = {
    ("nasnetalarge", "order/given"): 27_483,
    ("vit_b_16", "order/given"): 3_546,
    ("r2plus1d_18", "order/given"): 50_176,
    ("densenet121", "order/given"): 1_176,
    ("nn_transformer", "order/given"): 384,
    ("amoebanetd_12_128", "order/given"): 6_370,
    ("nasnetalarge", "order/beam"): 19_443,
    ("amoebanetd_12_128", "order/beam"): 2_107,
}


@dataclass(frozen=True)
class Case:
    """One network at one budget."""

    network: str
    budget: str
    plan: Plan

    @property
    def name(self) -> str:
        """Network and budget."""
        return f"{self.network}@{self.budget}"


def measure(options: Options) -> Iterator[Row]:
    """Plan every case by every order and residency method; prints the table."""
    rows: list[Row] = []
    lines: list[list[str | float | None]] = []
    for case in _cases(options):
        for order in (name for name in names() if name.startswith("order/")):
            found = list(_measure(case, order, options))
            rows += found
            lines.append(_line(case, order, found))
    methods = (f"{_short(residency)} KiB" for residency in RESIDENCIES)
    print_table(("network", "M", "KiB", "order", "s", *methods, "bound KiB", "gap %", "ilp s"), lines)
    print(_summary(rows))
    yield from rows


def _measure(case: Case, order: str, options: Options) -> Iterator[Row]:
    ordered = run_pass(make(order), case.plan, Budget.of_seconds(ORDER_SECONDS[options.quick]))
    yield Row(case.name, order, "seconds", round(ordered.passes[-1].seconds, 3), "s")
    for residency in RESIDENCIES:
        resident = run_pass(make(residency), ordered, Budget.of_seconds(RESIDENCY_SECONDS[options.quick]))
        record, provider = resident.passes[-1], f"{order} + {residency}"
        certificate = record.certificate
        assert certificate is not None
        value, bound = certificate.value, certificate.bound
        yield Row(case.name, provider, "additional_traffic", value, "B", bound, record.note)
        yield Row(case.name, provider, "seconds", round(record.seconds, 3), "s")
    sketch = SKETCH_KIB.get((case.network, order)) if case.budget == "M_R" else None
    if sketch is not None:
        yield Row(case.name, f"{order} + sketch", "additional_traffic", sketch * 1024, "B")


def _cases(options: Options) -> Iterator[Case]:
    for network, graph in operator_graphs(options):
        if options.quick and len(graph.ops) > QUICK_OPERATORS and network != QUICK_LARGE:
            continue
        ample = Plan.of_order(graph, scratchpad_machine(1 << 50), streamed=streamable(graph))
        least, peak = least_capacity(ample), verify(ample).peak_bytes
        for budget, capacity in {"M_R": least, "M_H": (least + peak) // 2}.items():
            if budget == "M_R" or capacity > least:
                yield Case(network, budget, Plan.of_order(graph, scratchpad_machine(capacity), streamed=ample.streamed))


def _line(case: Case, order: str, rows: list[Row]) -> list[str | float | None]:
    traffic = {row.provider.partition(" + ")[2]: row for row in rows if row.metric == "additional_traffic"}
    seconds = {row.provider: row.value for row in rows if row.metric == "seconds"}
    exact = traffic[RESIDENCIES[-1]]
    assert exact.value is not None
    assert exact.bound is not None
    gap = 100 * (exact.value - exact.bound) / exact.value if exact.value else 0.0
    capacity = case.plan.machine.scratchpad_memory.capacity_bytes
    values = [round((traffic[r].value or 0) / 1024) for r in RESIDENCIES]
    ilp_seconds = seconds[f"{order} + {RESIDENCIES[-1]}"]
    return [
        *(case.network, case.budget, round(capacity / 1024), _short(order), seconds[order], *values),
        *(round(exact.bound / 1024), gap, ilp_seconds),
    ]


def _short(name: str) -> str:
    return name.partition("/")[2]


def _summary(rows: list[Row]) -> str:
    exact = [r for r in rows if r.provider.endswith(RESIDENCIES[-1]) and r.metric == "additional_traffic"]
    proven = sum(row.value == row.bound for row in exact)
    value = {(row.case, row.provider): row.value or 0 for row in rows if row.metric == "additional_traffic"}
    sketches = [(case, provider) for case, provider in value if provider.endswith("sketch")]
    met = sum(
        value[case, provider.replace("sketch", RESIDENCIES[-1])] <= value[case, provider] + 1023  # whole KiB were noted
        for case, provider in sketches
    )
    return (
        f"bench_residency: {len(exact)} plans verified, {proven} proven optimal for their order; "
        f"{met} of {len(sketches)} sketched figures met or beaten"
    )


if __name__ == "__main__":
    sys.exit(
        run(
            "bench_residency",
            "How much additional traffic does each order and residency method leave?",
            measure,
            default_data=Path(__file__).parents[2] / "shared" / "data" / "opgraphs_int8",
        )
    )
