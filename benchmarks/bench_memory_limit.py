"""How much time does a memory limit cost, from all the memory a model takes down to the least that works?

**Training.** A step of a model whose weights, gradients and activations together peak at ``P`` bytes under opweave
without a limit, next to: opweave with ``memory_limit`` at fractions of ``P``, down to the least that it says works;
Inductor with torch's ``activation_memory_budget`` at several values; every block checkpointed
(``torch.utils.checkpoint``), eager and by Inductor; eager as it is.

**Inference.** A model that stays in host memory, whose weights do not fit: opweave with ``device`` and
``memory_limit`` at fractions of what it takes when it fits, next to accelerate's ``cpu_offload`` where that is
installed, and to opweave with the model on the device. ``bound`` of a latency is the larger of two times: that of the
model on the device, and that of moving over the link, at the bandwidth measured beside it, the bytes of weights above
the limit, which no schedule can keep.

All ways to run one model are timed in turns, each in a process of its own. ``peak`` is weights and inputs on the device
plus what a step allocates at most; opweave's must be at most its limit, which is the ``bound`` beside it.

``python -m benchmarks.bench_memory_limit [--quick] [--json FILE] [--device DEVICE] [--size SIZE] [--models NAME ...]
[--minutes N] [--jobs N]``. With ``--json`` a picture is drawn beside the file.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean

from .backend_cases import OURS, Case, Defaults, Scope, add_scope, scope_of
from .backend_picture import Curve, draw_curves
from .memory_ways import BASE, Result, Way, probe, unlimited_of, ways
from .runner import Options, Row, print_table, run
from .turns import Job, Measured, Outcome, Turns, measure_in_turns
from .worker import Failure

DEFAULTS = Defaults(
    gpu=("resnet50:train", "transformer_12:train", "llama:infer", "gpt2:train", "gpt2:infer", "inception:train"),
    cpu=("transformer_12:train", "gpt2:infer"),
    quick=("transformer_12:train",),
    gpu_jobs=6,
)
HALF = f"{OURS} @ 50 %"
HEAD = ("case", "way", "limit MiB", "peak MiB", "held", "ms", "20 %", "80 %", "x unlimited", "bound ms", "note")


def measure(options: Options) -> Iterator[Row]:
    """Measure every case: first without a limit, then under all limits side by side; prints the tables."""
    scope = scope_of(options.own, DEFAULTS, quick=options.quick)
    print(scope.description)
    until = time.monotonic() + 60 * scope.minutes
    results: list[Result] = []
    for case in scope.cases:
        if until - time.monotonic() < scope.least_s:
            print(f"{case.name}: not measured, the time is up")
            yield Row(case.name, OURS, "latency", None, "s", note="not measured, the time was up")
            continue
        found = _of_case(case, scope, until)
        if isinstance(found, Failure):
            print(f"{case.name}: {found}")
            yield Row(case.name, OURS, "latency", None, "s", note=str(found))
            continue
        results.append(found)
        _print(found)
        yield from _rows(found)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            draw_curves({each.case.name: _curves(each) for each in results}, options.json.with_suffix(".png"))
    print(_summary(results))


def _of_case(case: Case, scope: Scope, until: float) -> Result | Failure:
    with tempfile.TemporaryDirectory() as folder:
        asked = probe(case, scope)
        first = _measured(case, [BASE, asked], replace(scope, samples=1), Path(folder), until)
        unlimited = unlimited_of(first[BASE], first[asked])
        if unlimited is None:
            failure = first[BASE]
            assert isinstance(failure, Failure)
            return failure
        fitting = unlimited.device_bytes * 4 // 5 // unlimited.peak if unlimited.device_bytes else scope.jobs
        scope = replace(scope, jobs=max(1, min(scope.jobs, fitting)))
        return Result(case, unlimited, _measured(case, ways(case, scope, unlimited), scope, Path(folder), until))


def _measured(case: Case, asked: Sequence[Way], scope: Scope, folder: Path, until: float) -> dict[Way, Outcome]:
    turns = Turns(until, scope.jobs, scope.patience_s, scope.samples, scope.sample_s)
    jobs = [Job(case.name, case.spec(scope, way.provider), folder / way.name.replace(" ", "_")) for way in asked]
    outcomes = measure_in_turns([jobs], turns)
    return {way: outcomes[job] for way, job in zip(asked, jobs, strict=True)}


def _rows(result: Result) -> Iterator[Row]:
    name, unlimited = result.case.name, result.unlimited
    yield Row(name, OURS, "unlimited_peak", unlimited.peak, "B", note=f"{unlimited.held} B weights and inputs")
    yield Row(name, OURS, "least_limit", unlimited.least, "B")
    for way, outcome in result.outcomes.items():
        if not isinstance(outcome, Measured):
            yield Row(name, way.name, "latency", None, "s", note=str(outcome))
            continue
        note = "timed alone" if outcome.alone else ""
        spread = outcome.spread
        yield Row(name, way.name, "latency", spread.median, "s", result.bound_s(way, outcome), note)
        yield Row(name, way.name, "latency_20", spread.low, "s", note=note)
        yield Row(name, way.name, "latency_80", spread.high, "s", note=note)
        yield Row(name, way.name, "peak", result.peak(way, outcome), "B", way.limit)
        slowdown = result.slowdown(way)
        if slowdown is not None:
            yield Row(name, way.name, "slowdown", round(slowdown, 4), "1")
        predicted = [r["predicted_s"] for r in outcome.prepared.reports if r["predicted_s"] is not None]
        if predicted:
            yield Row(name, way.name, "predicted_time", sum(predicted), "s")
        if way.provider.backend:
            yield Row(name, way.name, "error", outcome.prepared.error, "1", note=outcome.prepared.judgement or "equal")


def _print(result: Result) -> None:
    lines: list[list[str | float | None]] = []
    for way, outcome in result.outcomes.items():
        limit = None if way.limit is None else way.limit / 2**20
        if not isinstance(outcome, Measured):
            lines.append([result.case.name, way.name, limit, *[None] * 7, str(outcome)[:100]])
            continue
        peak, spread, bound = result.peak(way, outcome), outcome.spread, result.bound_s(way, outcome)
        held = "" if way.limit is None else "yes" if peak <= way.limit else "NO"
        times = [1e3 * seconds for seconds in (spread.median, spread.low, spread.high)]
        bound_ms = None if bound is None else 1e3 * bound
        note = f"DIFFERS: {outcome.prepared.judgement}"[:100] if outcome.prepared.judgement else ""
        lines.append(
            [result.case.name, way.name, limit, peak / 2**20, held, *times, result.slowdown(way), bound_ms, note]
        )
    print_table(HEAD, lines)


def _curves(result: Result) -> dict[str, Curve]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for way, outcome in result.outcomes.items():
        if isinstance(outcome, Measured):
            curves.setdefault(way.line, []).append((result.peak(way, outcome), outcome.spread.median))
    return dict(curves)


def _summary(results: Sequence[Result]) -> str:
    """One line: whether limits hold, what half the memory costs in training, how near streaming comes to its bound."""
    limited = [
        (result, way, outcome)
        for result in results
        for way, outcome in result.outcomes.items()
        if way.limit is not None and isinstance(outcome, Measured)
    ]
    held = sum(result.peak(way, outcome) <= (way.limit or 0) for result, way, outcome in limited)
    failed = sum(isinstance(outcome, Failure) for result in results for outcome in result.outcomes.values())
    text = f"bench_memory_limit: {len(results)} cases, {held} of {len(limited)} limits held, {failed} failures"
    halves = [r.slowdown(way) for r, way, _ in limited if r.case.training and way.name == HALF]
    costs = [cost for cost in halves if cost is not None]
    if costs:
        text += f"; training in half the memory takes {geometric_mean(costs):.2f} x the time (worst {max(costs):.2f})"
    shares = [(r.bound_s(way, o) or 0.0) / o.spread.median for r, way, o in limited if not r.case.training]
    if shares:
        mean, worst = 100 * geometric_mean(shares), 100 * min(shares)
        text += f"; the bound is {mean:.0f} % of the time with streamed weights (worst {worst:.0f} %)"
    return text


if __name__ == "__main__":
    sys.exit(
        run("bench_memory_limit", "How much time does a memory limit cost?", measure, add_arguments=add_scope),
    )
