"""How fast is ``torch.compile(model, backend="opweave")``, in how much memory, and how soon, next to its peers?

Each model of ``benchmarks.zoo`` is run as an inference and, where that makes sense, as a training step (forward and
backward, without an optimizer), by every provider in a process of its own:

* ``eager``; ``inductor`` in its default mode; ``reduce-overhead`` and ``max-autotune``, its modes with CUDA graphs;
* ``opweave`` with default options; ``opweave T0``, stock Inductor in opweave's order: what the order alone is worth.

In a first round the processes of a model begin with empty compile caches (``compile_seconds``, ``cold``), are judged
against eager, measure their memory, and are timed in turns; in a second round, with the caches the first has left
(``warm``), ``opweave T0`` and ``max-autotune`` take the place of ``eager`` and ``reduce-overhead``. ``latency`` is the
median over the turns, with the quantiles of 20 % and 80 % beside it; ``speed`` is a peer's latency over opweave's in
the same turns. ``peak_memory`` is what a step allocates at most above weights and inputs, ``footprint`` what the
allocator reserves for it: see ``measuring``. ``planned_peak`` is what the plan of each graph allocates at most, against
the proven bound over every order. A training step is compiled with its loss.

On a CPU, models are small, providers few, and the figures show the shape of the results only.

``python -m benchmarks.bench_backend [--quick] [--json FILE] [--device DEVICE] [--size SIZE] [--models NAME ...]
[--minutes N] [--jobs N] [--caches cold warm]``. With ``--json`` a picture is drawn beside the file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import cast

from .backend_cases import EAGER, INDUCTOR, OURS, Case, Defaults, Scope, add_scope, providers, scope_of
from .backend_picture import draw
from .runner import Options, Row, print_table, run
from .turns import Job, Measured, Outcome, Turns, measure_in_turns

HEAD = ("case", "provider", "ms", "20 %", "80 %", "speed", "peak MiB", "footprint MiB", "cold s", "warm s", "note")
COLD, WARM = "cold", "warm"


@dataclass(frozen=True)
class Found:
    """What was measured of one case in one round, by provider."""

    case: Case
    caches: str
    outcomes: Mapping[str, Outcome]


def measure(options: Options) -> Iterator[Row]:
    """Measure every case in both rounds, as far as the time allows; prints the tables."""
    scope = scope_of(options.own, Defaults(), quick=options.quick)
    print(scope.description)
    until = time.monotonic() + 60 * scope.minutes
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as folder:
        for batch in _batches(scope):
            for caches in options.own.caches:
                if until - time.monotonic() < scope.least_s:
                    yield from _left_out(batch, caches)
                    continue
                for each in _measured(batch, caches, scope, Path(folder), until):
                    found.append(each)
                    _print(each)
                    yield from _rows(each)
                if options.json is not None:
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    draw(_latest(found), options.json.with_suffix(".png"))
    print(_summary(found))


def _batches(scope: Scope) -> Iterator[Sequence[Case]]:
    """As many cases at a time as there are processes for."""
    count = max(1, scope.jobs // len(providers(scope, warm=False)))
    for first in range(0, len(scope.cases), count):
        yield scope.cases[first : first + count]


def _measured(batch: Sequence[Case], caches: str, scope: Scope, folder: Path, until: float) -> Iterator[Found]:
    turns = Turns(until, scope.jobs, scope.patience_s, scope.samples, scope.sample_s)
    jobs = [
        [
            Job(case.name, case.spec(scope, provider), folder / case.name / provider.name.replace(" ", "_"))
            for provider in providers(scope, warm=caches == WARM)
        ]
        for case in batch
    ]
    outcomes = measure_in_turns(jobs, turns)
    for case, of_case in zip(batch, jobs, strict=True):
        yield Found(case, caches, {job.provider: outcomes[job] for job in of_case})


def _left_out(batch: Sequence[Case], caches: str) -> Iterator[Row]:
    for case in batch:
        print(f"{case.name}, {caches}: not measured, the time is up")
        yield Row(case.name, OURS, "latency", None, "s", note=f"{caches}: not measured, the time was up")


def _rows(found: Found) -> Iterator[Row]:
    name = found.case.name
    for provider, outcome in found.outcomes.items():
        if not isinstance(outcome, Measured):
            yield Row(name, provider, "latency", None, "s", note=f"{found.caches}: {outcome}")
            continue
        note = f"{found.caches}{', timed alone' if outcome.alone else ''}"
        spread, footprint = outcome.spread, outcome.prepared.footprint
        yield Row(name, provider, "latency", spread.median, "s", note=note)
        yield Row(name, provider, "latency_20", spread.low, "s", note=note)
        yield Row(name, provider, "latency_80", spread.high, "s", note=note)
        if provider != EAGER:
            yield Row(name, provider, "compile_seconds", round(footprint.compile_s, 2), "s", note=found.caches)
            yield Row(name, provider, "error", outcome.prepared.error, "1", note=outcome.prepared.judgement or "equal")
        yield Row(name, provider, "peak_memory", footprint.allocated, "B", note=found.caches)
        if footprint.reserved is not None:
            yield Row(name, provider, "footprint", footprint.reserved, "B", note=found.caches)
        yield from _report_rows(name, provider, outcome)
    for peer, ratio in _speeds(found).items():
        yield Row(name, peer, "speed", round(ratio, 4), "1", note=f"{found.caches}: its latency over {OURS}'s")


def _report_rows(case: str, provider: str, outcome: Measured) -> Iterator[Row]:
    """What opweave says of each graph: the peak of its plan, with the bound."""
    for report in outcome.prepared.reports:
        graph = f"{report['name']}, {report['tier']}"
        fallbacks = cast(Sequence[str], report["fallbacks"])
        note = f"{graph}; {len(fallbacks)} fallbacks {' '.join(fallbacks)}" if fallbacks else graph
        yield Row(case, provider, "planned_peak", report["allocated_bytes"], "B", report["bound_bytes"], note)
        yield Row(case, provider, "order_peak", report["peak_bytes"], "B", report["bound_bytes"], note)
        yield Row(case, provider, "peak_before", report["peak_before_bytes"], "B", report["bound_bytes"], note)
        yield Row(case, provider, "planning_seconds", round(report["planning_s"], 3), "s", note=note)
        if report["predicted_s"] is not None:
            yield Row(case, provider, "predicted_time", report["predicted_s"], "s", note=note)


def _speeds(found: Found) -> dict[str, float]:
    """Each peer's latency over opweave's, of those timed in turns."""
    times = {n: o.spread.median for n, o in found.outcomes.items() if isinstance(o, Measured) and not o.alone}
    return {peer: time / times[OURS] for peer, time in times.items() if peer != OURS} if OURS in times else {}


def _print(found: Found) -> None:
    lines: list[list[str | float | None]] = []
    speeds = {**_speeds(found), OURS: 1.0}
    for provider, outcome in found.outcomes.items():
        if not isinstance(outcome, Measured):
            lines.append([found.case.name, provider, *[None] * 8, str(outcome)[:100]])
            continue
        spread, footprint = outcome.spread, outcome.prepared.footprint
        milliseconds = [1e3 * seconds for seconds in (spread.median, spread.low, spread.high)]
        mebibytes = [None if n is None else n / 2**20 for n in (footprint.allocated, footprint.reserved)]
        compile_s = None if provider == EAGER else footprint.compile_s
        by_cache = [compile_s, None] if found.caches == COLD else [None, compile_s]
        lines.append(
            [found.case.name, provider, *milliseconds, speeds.get(provider), *mebibytes, *by_cache, _note(outcome)]
        )
    print_table(HEAD, lines)


def _note(outcome: Measured) -> str:
    tiers = {report["tier"] for report in outcome.prepared.reports}
    peak, bound = max(((r["allocated_bytes"], r["bound_bytes"]) for r in outcome.prepared.reports), default=(0, 0))
    parts = ["+".join(sorted(tiers))] if tiers else []
    if peak:
        parts.append(f"planned {peak / 2**20:.2f} MiB, bound {bound / 2**20:.2f}, gap {100 * (1 - bound / peak):.1f} %")
    if outcome.prepared.judgement:
        parts.append(f"DIFFERS: {outcome.prepared.judgement}")
    return "; ".join([*parts, *(["timed alone"] if outcome.alone else [])])[:140]


def _latest(found: Sequence[Found]) -> list[tuple[str, Mapping[str, Measured]]]:
    """By case, what was measured last of each provider."""
    cases: dict[str, dict[str, Measured]] = {}
    for each in found:
        measured = {name: o for name, o in each.outcomes.items() if isinstance(o, Measured)}
        cases.setdefault(each.case.name, {}).update(measured)
    return list(cases.items())


def _summary(found: Sequence[Found]) -> str:
    """One line: speed against Inductor's best mode in the same turns, memory against its default, and what differs."""
    ratios, memory, differing, failed = [], [], 0, 0
    for each in found:
        measured = {name: o for name, o in each.outcomes.items() if isinstance(o, Measured)}
        differing += sum(bool(o.prepared.judgement) for o in measured.values())
        failed += len(each.outcomes) - len(measured)
        peers = [ratio for peer, ratio in _speeds(each).items() if peer != EAGER and not peer.startswith(OURS)]
        ratios += [min(peers)] if peers else []
        if OURS in measured and INDUCTOR in measured and measured[INDUCTOR].prepared.footprint.allocated:
            ours, theirs = (measured[name].prepared.footprint.allocated for name in (OURS, INDUCTOR))
            memory.append(ours / theirs)
    text = f"bench_backend: {len(found)} measured, {failed} failures, {differing} differ from eager"
    if ratios:
        text += f"; Inductor's best mode takes {geometric_mean(ratios):.3f} x opweave's time (worst {min(ratios):.3f})"
    if memory:
        text += f"; opweave's peak is {geometric_mean(memory):.3f} x Inductor's (worst {max(memory):.3f})"
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be asked for beyond what all can."""
    add_scope(parser)
    parser.add_argument(
        "--caches", nargs="+", choices=(COLD, WARM), default=(COLD, WARM), help="rounds (default: both)"
    )


if __name__ == "__main__":
    sys.exit(
        run(
            "bench_backend",
            'How fast is torch.compile(model, backend="opweave"), in how much memory, and how soon?',
            measure,
            add_arguments=add_arguments,
        )
    )
