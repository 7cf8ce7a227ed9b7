"""How even do experts lie, how much do they move, and how long does placing them take?

SYNTHETIC routing traces (Zipf's law for each layer, layers that hang together; ``passes/experts/trace.py``): no model
was run, and real routers are less skewed where training balances them. One half of the tokens is placed by, and both
halves are counted: ``seen`` and ``unseen``. Placements: ``default`` (the first experts on the first device, and so on),
``balanced`` (even clusters, on devices as they come), ``opweave`` (both programs). Tokens are counted as staying where
their expert was, as MoETuner does. On one node all pairs of devices are alike, and the second program only chooses
which tokens stay on their device; with a combine behind every layer it decides nothing at all.

``python -m benchmarks.bench_experts [--quick] [--json FILE]``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from opweave.compiler.pipeline import Budget
from opweave.hw_models.registry import load
from opweave.passes.experts.balance import balanced
from opweave.passes.experts.placement import Facts, PlaceExperts, facts_of
from opweave.passes.experts.problem import Clusters, ExpertProblem, expert_problem
from opweave.passes.experts.trace import RoutingTrace, zipf_trace

from .runner import Options, Row, print_table, run

SECONDS = {True: 6.0, False: 60.0}  # for one placement, by --quick
HIDDEN_BYTES = 8192  # a row of 4096 elements in bfloat16


@dataclass(frozen=True)
class Case:
    """Layers and experts shaped like a published model's, on a machine."""

    name: str
    layers: int
    experts: int
    top_k: int
    devices: int
    machine: str
    skew: float = 0.8


CASES = (
    Case("32 layers x 8, top 2, 4 of 8xH100", 32, 8, 2, 4, "8xh100-nvlink"),
    Case("32 layers x 8, top 2, 8xH100", 32, 8, 2, 8, "8xh100-nvlink"),
    Case("94 layers x 128, top 8, 8xH100", 94, 128, 8, 8, "8xh100-nvlink"),
    Case("94 layers x 128, top 8, 2 nodes of 8", 94, 128, 8, 16, "2x8xh100-infiniband"),
)


def measure(options: Options) -> Iterator[Row]:
    """Rows for each case, and a table."""
    table: list[list[str]] = []
    for case in CASES:
        rows = list(_measured(case, SECONDS[options.quick]))
        yield from rows
        for provider in ("default", "balanced", "opweave"):
            table.append([case.name, provider, *(_shown(rows, provider, metric) for metric in METRICS)])
    print_table(["case", "placement", *METRICS], table)
    print("traces are synthetic; gap: of the longest transfers, against their proven bound")


METRICS = ("imbalance seen", "imbalance unseen", "across MB", "longest ms", "gap", "seconds")


def _measured(case: Case, seconds: float) -> Iterator[Row]:
    trace = zipf_trace(8192, case.layers, case.experts, case.top_k, skew=case.skew, follow=0.5)
    seen, unseen = (RoutingTrace(trace.chosen[half::2], case.experts) for half in (0, 1))
    machine = load(case.machine)
    problems = [
        expert_problem(half, machine, devices=case.devices, token_bytes=HIDDEN_BYTES) for half in (seen, unseen)
    ]
    begin = time.monotonic()
    even = [balanced(loads, case.devices, Budget.of_seconds(0)).clusters for loads in problems[0].load]
    even_s = time.monotonic() - begin
    method = PlaceExperts(devices=case.devices, token_bytes=HIDDEN_BYTES)
    found = method.place(seen, machine, Budget.of_seconds(seconds))
    room = case.experts // case.devices
    placed = [tuple(order[g * room : (g + 1) * room] for g in range(case.devices)) for order in found.order]
    yield from _rows(case, "default", problems, [problems[0].default()] * case.layers)
    yield from _rows(case, "balanced", problems, even)
    yield from _rows(case, "opweave", problems, placed, bound_s=found.transfers[1])
    yield Row(case.name, "balanced", "seconds", even_s, "s")
    yield Row(case.name, "opweave", "seconds", found.seconds, "s", note=f"of {seconds:g} s allowed")
    value, bound = found.uneven
    yield Row(case.name, "opweave", "uneven", value, "tokens", bound, found.proved_by[0])


def _rows(
    case: Case,
    provider: str,
    problems: Sequence[ExpertProblem],
    places: Sequence[Clusters],
    bound_s: float | None = None,
) -> Iterator[Row]:
    facts: list[Facts] = [facts_of(problem, places) for problem in problems]
    for name, each in zip(("seen", "unseen"), facts, strict=True):
        yield Row(case.name, provider, f"imbalance {name}", each.imbalance, "x", note="synthetic trace")
        yield Row(case.name, provider, f"worst imbalance {name}", each.worst_imbalance, "x", note="synthetic trace")
    yield Row(case.name, provider, "moved", facts[0].moved_bytes, "bytes", note="synthetic trace")
    yield Row(case.name, provider, "across", facts[0].across_bytes, "bytes", note="synthetic trace")
    longest_s = facts[0].transfer_s
    yield Row(case.name, provider, "longest transfers", longest_s * 1e3, "ms", bound_s and bound_s * 1e3)


def _shown(rows: Sequence[Row], provider: str, metric: str) -> str:
    names = {"across MB": "across", "longest ms": "longest transfers", "gap": "longest transfers"}
    row = next((r for r in rows if r.provider == provider and r.metric == names.get(metric, metric)), None)
    if row is None or row.value is None:
        return "-"
    if metric == "gap":
        return "-" if row.bound is None else f"{(row.value - row.bound) / row.value if row.value else 0.0:.1%}"
    return f"{row.value / 1e6:,.0f}" if metric == "across MB" else f"{row.value:.3f}"


if __name__ == "__main__":
    sys.exit(run("bench_experts", __doc__.splitlines()[0], measure))
