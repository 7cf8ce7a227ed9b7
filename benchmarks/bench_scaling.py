"""How do seconds, memory and gap grow with a graph's size?

Layered graphs (``networks.layered``, four branches wide), one process for each, are planned within 1.2 times the
largest working set of one operator: every order can run there, and none without spilling, so order and residency both
have something to decide at every size. ``traffic`` is additional traffic. ``given`` is the least in the default order
(``residency/ilp``), ``joint`` that of ``joint/best_first``, with its bound over every order and residency; ``best at``
is when its last improvement came. Addresses are ``address/exact``'s for the joint result; an arena above the capacity
means that it found none, and the planner would ask for a plan with more room. Every plan is verified. Seconds are
those of a process that has loaded the compiled search; MiB are its peak, all of Python and its libraries included,
which is most of them at a hundred operators.

Linear in the operators: reading and checking a graph, the residency of one order (the gaps fall into blocks that are
solved one by one), a round of annealing, the bounds of windows, placing by first fit, simulation and verification.
Not linear: the rounds that annealing needs until nothing improves, cut off by the time limit in large graphs; the
states of best-first search, exponential in general, which is why graphs above some thousand operators are bounded
window by window, with a gap that no longer closes; one state, a bitmask of all operators, so a prefix or a milestone
costs as many bits as there are operators; and placing what first fit cannot, an NP-hard problem.

``python -m benchmarks.bench_scaling [--quick] [--json FILE]``. With ``--json`` a picture is drawn beside the file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import msgspec

from opweave.compiler.pipeline import Budget, Progress, run_pass
from opweave.compiler.plan import Certificate, PassRecord, Plan
from opweave.compiler.simulate import simulate
from opweave.compiler.verify import verify
from opweave.errors import InternalError
from opweave.passes.address.placement import PlacementError
from opweave.passes.order.problem import OrderProblem
from opweave.passes.order.search import search_orders
from opweave.passes.registry import make
from opweave.passes.residency.workset import least_capacity

from .runner import Options, Row, print_table, run, scratchpad_machine

SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000)
QUICK_SIZE = 1_000  # operators of the largest graph that --quick measures
WIDTH, SEED = 4, 0
TIGHT = 6, 5  # capacity, as a fraction of the largest working set
SECONDS, QUICK_SECONDS = 60.0, 5.0  # of the joint search, and of the residency of the default order
ADDRESS_SECONDS, QUICK_ADDRESS_SECONDS = 20.0, 3.0
COMPILE_SECONDS = 120.0  # at most, once on a machine
GIVEN, JOINT, ADDRESS = "residency/ilp", "joint/best_first", "address/exact"
CHECK = "simulate + verify"


@dataclass(frozen=True)
class Scale:
    """What planning a graph of ``operators`` took: bytes, seconds, and the process's peak MiB."""

    operators: int
    capacity: int
    given: Certificate
    given_s: float
    joint: Certificate
    improved_s: float
    joint_s: float
    arena: int
    address_s: float
    check_s: float
    mebibytes: float

    @property
    def case(self) -> str:
        """By which rows are told apart."""
        return f"layered_{self.operators}"

    @property
    def gap(self) -> float:
        """Distance between the joint traffic and its bound, in percent."""
        return 100 * self.joint.gap


def scale_of(operators: int, seconds: float, address_seconds: float) -> Scale:
    """Plan the graph of ``operators``; called in a process of its own, for the sake of its peak memory."""
    _load_compiled()
    plan, capacity = _tight_plan(operators)
    _, given_record, given = _timed(GIVEN, plan, Budget.of_seconds(seconds))
    progress: list[Progress] = []
    decided, record, joint = _timed(JOINT, plan, Budget.of_seconds(seconds, listen=progress.append))
    told = [p for p in progress if p.pass_name == JOINT and p.incumbent == joint.value]
    placed, arena, address_s = _placed(decided, address_seconds)
    begin = time.monotonic()
    faults = verify(simulate(placed)).faults
    check_s = time.monotonic() - begin
    if faults:
        raise InternalError(f"the plan of {operators} operators does not verify: {faults[0]}")
    improved_s = min((p.elapsed_s for p in told), default=record.seconds)
    return Scale(
        *(operators, capacity, given, given_record.seconds, joint, improved_s, record.seconds),
        *(arena, address_s, check_s, _peak_mebibytes()),
    )


def _tight_plan(operators: int) -> tuple[Plan, int]:
    from .networks import layered  # onnx, which would count as memory of the parent process too

    ample = Plan.of_order(layered(operators, WIDTH, SEED), scratchpad_machine(1 << 50))
    capacity = least_capacity(ample) * TIGHT[0] // TIGHT[1]
    return msgspec.structs.replace(ample, machine=scratchpad_machine(capacity)), capacity


def _load_compiled() -> None:
    """Load the compiled search, and compile it where that was never done, before anything is timed."""
    for _ in search_orders(OrderProblem.of(_tight_plan(SIZES[0])[0]), Budget.of_seconds(COMPILE_SECONDS), most_moves=0):
        pass


def _timed(name: str, plan: Plan, budget: Budget) -> tuple[Plan, PassRecord, Certificate]:
    decided = run_pass(make(name), plan, budget)
    record = decided.passes[-1]
    assert record.certificate is not None  # both passes asked certify what they return
    return decided, record, record.certificate


def _placed(plan: Plan, seconds: float) -> tuple[Plan, int, float]:
    """The plan with addresses if any were found, the least arena known, and seconds."""
    begin = time.monotonic()
    try:
        placed, record, certificate = _timed(ADDRESS, plan, Budget.of_seconds(seconds))
    except PlacementError as error:
        return plan, error.required_bytes, time.monotonic() - begin
    return placed, certificate.value, record.seconds


def _peak_mebibytes() -> float:
    import resource  # not on Windows, where the other benchmarks run

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def measure(options: Options) -> Iterator[Row]:
    """Plan a graph of every size; prints the table and draws the picture."""
    seconds = (QUICK_SECONDS, QUICK_ADDRESS_SECONDS) if options.quick else (SECONDS, ADDRESS_SECONDS)
    found: list[Scale] = []
    for size in SIZES:
        if options.quick and size > QUICK_SIZE:
            continue
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found.append(pool.submit(scale_of, size, *seconds).result())
        yield from _rows(found[-1])
    traffic = ("given KiB", "s", "joint KiB", "bound KiB", "gap %", "best at s", "s")
    print_table(("operators", *traffic, "arena/capacity", "address s", "check s", "MiB"), [_line(s) for s in found])
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        draw(found, options.json.with_suffix(".png"))


def _rows(scale: Scale) -> Iterator[Row]:
    for provider, certificate, taken in (
        (GIVEN, scale.given, scale.given_s),
        (JOINT, scale.joint, scale.joint_s),
    ):
        yield Row(scale.case, provider, "additional_traffic", certificate.value, "B", certificate.bound)
        yield Row(scale.case, provider, "seconds", round(taken, 3), "s")
    yield Row(scale.case, JOINT, "seconds", round(scale.improved_s, 3), "s", note="to the last improvement")
    yield Row(scale.case, ADDRESS, "arena", scale.arena, "B", note=f"capacity {scale.capacity} B")
    yield Row(scale.case, ADDRESS, "seconds", round(scale.address_s, 3), "s")
    yield Row(scale.case, CHECK, "seconds", round(scale.check_s, 3), "s")
    yield Row(scale.case, "process", "peak_memory", round(scale.mebibytes, 1), "MiB")


def _line(scale: Scale) -> tuple[str | float | None, ...]:
    kib = [round(n / 1024) for n in (scale.given.value, scale.joint.value, scale.joint.bound)]
    return (
        *(scale.operators, kib[0], scale.given_s, kib[1], kib[2], scale.gap, scale.improved_s, scale.joint_s),
        *(scale.arena / scale.capacity, scale.address_s, scale.check_s, round(scale.mebibytes)),
    )


def draw(scales: Sequence[Scale], path: Path) -> None:
    """Write a PNG of seconds, MiB and gap by operators."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    operators = [scale.operators for scale in scales]
    seconds, memory, gap = figure.subplots(1, 3)
    for label, values in (
        (f"{GIVEN}, default order", [scale.given_s for scale in scales]),
        (f"{JOINT}, in all", [scale.joint_s for scale in scales]),
        (f"{JOINT}, last improvement", [scale.improved_s for scale in scales]),
        (ADDRESS, [scale.address_s for scale in scales]),
        (CHECK, [scale.check_s for scale in scales]),
    ):
        seconds.plot(operators, values, marker="o", label=label)
    seconds.legend(fontsize="small")
    memory.plot(operators, [scale.mebibytes for scale in scales], marker="o")
    gap.plot(operators, [scale.gap for scale in scales], marker="o")
    for axes, title in ((seconds, "seconds"), (memory, "peak MiB"), (gap, "gap of the joint traffic, %")):
        axes.set(title=title, xlabel="operators", xscale="log", yscale="linear" if axes is gap else "log")
        axes.grid(visible=True, color="#e3e3e3")
    gap.set_ylim(bottom=0)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(run("bench_scaling", "How do seconds, memory and gap grow with a graph's size?", measure))
