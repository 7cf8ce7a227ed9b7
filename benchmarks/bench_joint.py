"""How little additional traffic can a network's operators cause at all, over every order and residency together?

Operator graphs are planned at COSMA's budgets (arXiv 2311.18246, 8 bit, batch 1, alignment 1 byte): ``M_R``, the
largest working set of one operator; ``M_P``, the least peak of any order; ``M_H``, midway between them. ``act`` plans
activations and streams the weights, ``all`` has the weights in the scratchpad as well, with budgets of their own.

Side by side in one run:

* ``default/least-peak + linear, belady/greedy``: COSMA's four baselines, allocation as in TensorFlow Lite;
* ``ideal belady``: the default order, furthest next use, no fragmentation at all: stronger than any of those;
* ``cosma FS`` and ``cosma``: its integer program, repaired, for the default order and for every order;
* ``opweave``: ``joint/best_first`` with addresses, what ``opweave compile`` does by default, bounded over every order.

Every plan is verified. ``python -m benchmarks.bench_joint [--quick] [--data DIR] [--json FILE]``. Without a folder of
operator graphs, a network made here is measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

import msgspec

from opweave.api import streamable
from opweave.compiler.pipeline import Budget, run_pass
from opweave.compiler.plan import Certificate, Plan
from opweave.errors import Infeasible
from opweave.passes.order.least_peak import least_peak_order
from opweave.passes.order.problem import OrderProblem
from opweave.passes.planner import Planner
from opweave.passes.registry import make
from opweave.passes.residency.workset import least_capacity

from .runner import Options, Row, operator_graphs, print_table, run, scratchpad_machine

SEARCHED = ("amoebanet", "darts", "nasnet", "pnas")  # networks found by search; the others were designed by hand
QUICK_OPERATORS = 250  # networks above are left out of --quick, but for the one that shows most
QUICK_LARGE = "amoebanetd_12_128"
SECONDS = {True: 20.0, False: 120.0}  # of opweave, by --quick; hardly any network takes as long
COSMA_SECONDS = {True: 1.0, False: 20.0}
COSMA = ("cosma FS", "cosma")
IDEAL, OURS = "ideal belady", "opweave"


@dataclass(frozen=True, eq=False)
class Case:
    """One network at one budget, in its default order and in one of least peak."""

    network: str
    budget: str
    default: Plan
    least_peak: Plan

    @property
    def name(self) -> str:
        """Network and budget."""
        return f"{self.network}@{self.budget}"

    @property
    def is_searched(self) -> bool:
        """Whether the network was found by architecture search."""
        return self.network.startswith(SEARCHED)


@dataclass(frozen=True)
class Figure:
    """What one provider reached: bytes, its own bound if any, seconds, and a remark; no bytes where it failed."""

    nbytes: int | None
    bound: int | None
    seconds: float
    note: str = ""


def measure(options: Options) -> Iterator[Row]:
    """Plan every case in every way; prints the table."""
    lines: list[list[str | float | None]] = []
    found: dict[Case, dict[str, Figure]] = {}
    for case in _cases(options):
        found[case] = dict(_figures(case, options))
        lines.append(_line(case, found[case]))
        for provider, figure in found[case].items():
            yield Row(case.name, provider, "additional_traffic", figure.nbytes, "B", figure.bound, figure.note)
            yield Row(case.name, provider, "seconds", round(figure.seconds, 3), "s")
    baselines = ("def+bel", "def+greedy", "peak+bel", "peak+greedy")
    ours = ("opweave", "bound", "gap %", "s", "order by")
    print_table(("network", "budget", "KiB", *baselines, "ideal", *COSMA, "bound", *ours), lines)
    print(_summary(found))


def _cases(options: Options) -> Iterator[Case]:
    for network, graph in operator_graphs(options):
        if options.quick and len(graph.ops) > QUICK_OPERATORS and network != QUICK_LARGE:
            continue
        for kind, streamed in (("act", streamable(graph)), ("all", ())):
            ample = Plan.of_order(graph, scratchpad_machine(1 << 50), streamed=streamed)
            least = least_capacity(ample)
            lowest = least_peak_order(OrderProblem.of(ample), Budget.of_seconds(30.0))
            budgets = {"M_R": least, "M_H": (least + lowest.peak) // 2, "M_P": lowest.peak}
            for budget, capacity in budgets.items():
                if budget == "M_R" or capacity > least:
                    plan = msgspec.structs.replace(ample, machine=scratchpad_machine(capacity))
                    yield Case(network, f"{budget} {kind}", plan, plan.with_order(lowest.order))


def _figures(case: Case, options: Options) -> Iterator[tuple[str, Figure]]:
    for order, rule in product(("default", "least-peak"), ("belady", "greedy")):
        plan = case.default if order == "default" else case.least_peak
        yield f"{order} + linear, {rule}", _passed(f"joint/linear(evict={rule!r})", plan, 60.0)
    yield IDEAL, _passed("residency/belady", case.default, 60.0)
    seconds = COSMA_SECONDS[options.quick]
    yield COSMA[0], _passed("joint/cosma(mode='fixed')", case.default, seconds)
    yield COSMA[1], _passed("joint/cosma", case.default, seconds)
    yield OURS, _ours(case.default, SECONDS[options.quick])


def _passed(spec: str, plan: Plan, seconds: float) -> Figure:
    begin = time.monotonic()
    try:
        record = run_pass(make(spec), plan, Budget.of_seconds(seconds)).passes[-1]
    except Infeasible as error:
        return Figure(None, None, time.monotonic() - begin, error.message)
    assert record.certificate is not None
    bound = record.certificate.bound if record.certificate.proved_by != "analytic" else None
    return Figure(record.certificate.value, bound, record.seconds, record.note)


def _ours(plan: Plan, seconds: float) -> Figure:
    begin = time.monotonic()
    planned = Planner().plan(plan, Budget.of_seconds(seconds))
    traffic: list[Certificate] = [
        c for c in planned.certificates if c.objective == "additional_traffic_bytes" and c.scope == "order"
    ]
    note = next(record.note for record in planned.passes if record.name.startswith("joint/"))
    return Figure(traffic[-1].value, traffic[-1].bound, time.monotonic() - begin, note)


def _line(case: Case, figures: dict[str, Figure]) -> list[str | float | None]:
    ours, cosma = figures[OURS], figures[COSMA[1]]
    assert ours.nbytes is not None
    assert ours.bound is not None
    gap = 100 * (ours.nbytes - ours.bound) / ours.nbytes if ours.nbytes else 0.0
    traffic = [_kib(figure.nbytes) for provider, figure in figures.items() if provider != OURS]
    capacity = case.default.machine.scratchpad_memory.capacity_bytes
    method = ours.note.partition(";")[0].removeprefix("order by ")
    return [
        *(case.network, case.budget, round(capacity / 1024), *traffic, _kib(cosma.bound)),
        *(_kib(ours.nbytes), _kib(ours.bound), gap, round(ours.seconds, 2), method),
    ]


def _kib(nbytes: float | None) -> int | None:
    return None if nbytes is None else round(nbytes / 1024)


def _summary(found: dict[Case, dict[str, Figure]]) -> str:
    ours = {case: figures[OURS] for case, figures in found.items()}
    proven = sum(figure.nbytes == figure.bound for figure in ours.values())
    above = {
        peer: sum((ours[c].nbytes or 0) > (f[peer].nbytes or 0) for c, f in found.items() if f[peer].nbytes is not None)
        for peer in (IDEAL, *COSMA)
    }
    text = f"bench_joint: {len(ours)} plans verified, {proven} proven optimal over every order; above "
    text += ", ".join(f"{peer} in {count}" for peer, count in above.items())
    for kind, searched in (("hand-designed", False), ("searched", True)):
        seconds = [figure.seconds for case, figure in ours.items() if case.is_searched is searched]
        gaps = [1 - (f.bound or 0) / f.nbytes for c, f in ours.items() if c.is_searched is searched and f.nbytes]
        if seconds:
            text += f"; {kind}: median {median(seconds):.2f} s, longest {max(seconds):.1f} s"
            text += f", largest gap {100 * max(gaps, default=0.0):.1f} %"
    return text


if __name__ == "__main__":
    sys.exit(
        run(
            "bench_joint",
            "How little additional traffic can a network's operators cause at all?",
            measure,
            default_data=Path(__file__).parents[2] / "shared" / "data" / "opgraphs_int8",
        )
    )
