"""How low is the peak of live bytes over all orders, does the arena reach it, and what do in-place results save?

Searched networks, float32, batch 1, weights not counted, regions at multiples of 64 bytes. Each is measured twice:
``imported`` as opweave reads it, where a padded convolution or pooling is two or three operators, and ``nodes`` with
one operator for each node of the model, as HMCOS (Wang et al., DAC 2022) counts. In place, an elementwise result may
take the place of the operand that its operator is the last to use, as there; batch normalisation counts too.

Bounds hold for every order, and in place for every choice of operands. Every plan is verified. Seconds are those of a
process that has already loaded the solvers and the compiled search.

``python -m benchmarks.bench_peak [--quick] [--data DIR] [--json FILE]``. Without a folder of ONNX models, a network
made here is measured. Figures of HMCOS are references, measured on two CPU cores with its own scheduler and TensorFlow
Lite's arena: not in this run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median

import msgspec

from opweave.api import read_model, streamable
from opweave.compiler.graph import Graph, Op
from opweave.compiler.pipeline import Budget, run_pass
from opweave.compiler.plan import Plan
from opweave.hw_models.model import HardwareModel
from opweave.passes.arena import least_arena
from opweave.passes.order._reach import compiled
from opweave.passes.order.problem import OrderProblem
from opweave.passes.registry import make

from .runner import Options, Row, operator_graphs, print_table, run, scratchpad_machine

SECONDS, QUICK_SECONDS = 60.0, 5.0
QUICK_GRAPHS = 2
REPEATS = 3  # searches for an order, of which the median is told: they end in milliseconds
AMPLE_BYTES = 1 << 30
ALIGNMENT_BYTES = 64  # TensorFlow Lite's
HMCOS = "HMCOS (reference)"

#: Operators, peak and arena in KiB, milliseconds to schedule: HMCOS @cf547ee, elementwise in place.
REFERENCES = {
    "amoebanet-cifar": (742, 1152, 1424, 4019),
    "amoebanet-imagenet": (617, 4214, 4928, 68),
    "darts-cifar": (719, 1368, 1712, 274),
    "darts-imagenet": (523, 3752, 4634, 55),
    "nasnet-cifar": (780, 1744, 2672, 32454),
    "nasnet-imagenet": (647, 4234, 5050, 68),
    "pnas-cifar": (646, 1665, 2061, 25555),
    "pnas-imagenet": (615, 4732, 5447, 476),
}


@dataclass(frozen=True)
class Case:
    """One network with one notion of what an operator is, and whether results may be in place."""

    network: str
    operators: str
    graph: Graph
    in_place: bool

    @property
    def name(self) -> str:
        """Network and operators, by which rows are told apart."""
        return f"{self.network}/{self.operators}"

    @property
    def provider(self) -> str:
        """How it is planned."""
        return "in place" if self.in_place else "out of place"


@dataclass(frozen=True)
class Result:
    """Bytes and seconds of one case; ``given`` is the peak of the model's own order, out of place."""

    given: int
    peak: int
    bound: int
    order_s: float
    arena: int
    arena_s: float


def cases(options: Options) -> Iterator[Case]:
    """Every ONNX model in the folder asked for, by name; without one, a network made here."""
    if options.data is None:
        models = list(operator_graphs(options))
    else:
        paths = sorted(options.data.glob("*.onnx"))[: QUICK_GRAPHS if options.quick else None]
        models = [(path.name.partition(".")[0], read_model(path)[0].graph) for path in paths]
    for network, graph in models:
        for operators, version in (("imported", graph), ("nodes", by_node(graph))):
            for in_place in (False, True):
                yield Case(network, operators, version, in_place)


def by_node(graph: Graph) -> Graph:
    """``graph`` with the operators that one node of the model was read as made one; it can be planned, not executed."""
    outputs = {graph.tensor[name].buffer for name in graph.outputs}
    groups = [list(group) for _, group in groupby(graph.ops, key=lambda op: op.origin or op.name)]
    needed = [{graph.tensor[name].buffer for op in group for name in op.inputs} for group in groups]
    ops = []
    for number, group in enumerate(groups):
        later = outputs.union(*needed[number + 1 :])
        ops.append(group[0] if len(group) == 1 else _joined(graph, group, later))
    used = {graph.tensor[name].buffer for op in ops for name in (*op.inputs, *op.outputs)}
    return Graph(graph.name, tuple(t for t in graph.tensors if t.buffer in used), tuple(ops), graph.outputs)


def _joined(graph: Graph, group: list[Op], later: set[str]) -> Op:
    made = {graph.tensor[name].buffer for op in group for name in op.outputs}
    inputs = dict.fromkeys(name for op in group for name in op.inputs if graph.tensor[name].buffer not in made)
    results = tuple(name for op in group for name in op.outputs if graph.tensor[name].buffer in later)
    return Op(group[0].name, tuple(inputs), results, origin=group[0].origin)


def plan_case(case: Case, seconds: float) -> Result:
    """Search the order of least peak, then its least arena."""
    plan = Plan.of_order(case.graph, _machine(), streamed=streamable(case.graph))
    given = OrderProblem.of(plan).peak_bytes(plan.order)
    method = "inplace/elementwise(order=least_peak)" if case.in_place else "order/least_peak"
    runs = [run_pass(make(method), plan, Budget.of_seconds(seconds)) for _ in range(REPEATS)]
    ordered, order_s = runs[0], median(run.passes[-1].seconds for run in runs)
    proven = ordered.passes[-1].certificate
    placed = least_arena(ordered, Budget.of_seconds(seconds))
    arena = placed.passes[-1].certificate
    assert proven is not None  # both certify what they return
    assert arena is not None
    return Result(given, proven.value, proven.bound, order_s, arena.value, placed.passes[-1].seconds)


def _machine() -> HardwareModel:
    machine = scratchpad_machine(AMPLE_BYTES)
    scratchpad, backing = machine.memories
    aligned = msgspec.structs.replace(scratchpad, alignment_bytes=ALIGNMENT_BYTES)
    return msgspec.structs.replace(machine, memories=(aligned, backing))


def measure(options: Options) -> Iterator[Row]:
    """Rows ``given``, ``peak``, ``arena`` and seconds of every case, HMCOS's beside them, and a table of both."""
    compiled()
    lines: list[tuple[str | float | None, ...]] = []
    measured: list[tuple[Case, Result]] = []
    for case in cases(options):
        result = plan_case(case, QUICK_SECONDS if options.quick else SECONDS)
        if not measured:  # the first one also loaded the solvers
            result = plan_case(case, QUICK_SECONDS if options.quick else SECONDS)
        measured.append((case, result))
        yield from _rows(case, result)
        lines.append(_line(case, result))
    if not measured:
        return
    for network in dict.fromkeys(case.network for case, _ in measured):
        yield from _reference_rows(network)
    head = ("network", "operators", "count", "results", "given KiB", "peak KiB", "bound KiB", "ms", "arena KiB", "ms")
    print_table((*head, "HMCOS peak", "HMCOS arena", "HMCOS ms"), lines)
    closed = sum(r.peak == r.bound for _, r in measured)
    reached = sum(r.arena <= r.peak for _, r in measured)
    print(f"bench_peak: proven least in {closed} of {len(measured)} cases; the arena is the peak in {reached}")


def _rows(case: Case, result: Result) -> Iterator[Row]:
    bound = _kib(result.bound)
    if not case.in_place:
        yield Row(case.name, "order/given", "peak", _kib(result.given), "KiB")
    yield Row(case.name, case.provider, "peak", _kib(result.peak), "KiB", bound)
    yield Row(case.name, case.provider, "arena", _kib(result.arena), "KiB", bound)
    yield Row(case.name, case.provider, "seconds", result.order_s, "s", note="order")
    yield Row(case.name, case.provider, "seconds", result.arena_s, "s", note="order again, residency and addresses")


def _reference_rows(network: str) -> Iterator[Row]:
    if network in REFERENCES:
        _, peak, arena, milliseconds = REFERENCES[network]
        note = "not measured in this run"
        yield Row(f"{network}/nodes", HMCOS, "peak", float(peak), "KiB", note=note)
        yield Row(f"{network}/nodes", HMCOS, "arena", float(arena), "KiB", note=note)
        yield Row(f"{network}/nodes", HMCOS, "seconds", milliseconds / 1000, "s", note=note)


def _line(case: Case, result: Result) -> tuple[str | float | None, ...]:
    sizes = (_kib(result.given), _kib(result.peak), _kib(result.bound), 1000 * result.order_s)
    reference = REFERENCES.get(case.network) if case.operators == "nodes" and case.in_place else None
    return (
        *(case.network, case.operators, len(case.graph.ops), case.provider, *sizes),
        *(_kib(result.arena), 1000 * result.arena_s),
        *(reference[1:] if reference else (None, None, None)),
    )


def _kib(nbytes: int) -> float:
    return nbytes / 1024


if __name__ == "__main__":
    sys.exit(
        run(
            "bench_peak",
            "How low is the peak of live bytes over all orders, and does the arena reach it?",
            measure,
            default_data=Path(__file__).parents[2] / "shared" / "data" / "nas_onnx",
        )
    )
