"""Measures cases one after another: every provider's result is judged, then all are timed in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .._checks import dtype_name
from .budget import Budget
from .measuring import Clock, Step, quantiles
from .problem import FORWARD, TOLERANCE, Case, Problem, error_of
from .providers import OURS, Provider, providers_of
from .roofline import Roofline
from .rows import Row

__all__ = ["CALIBRATION", "Result", "calibration_rows", "measure"]

CALIBRATION = "the device"
ROUNDS = 3
LONG_MS = 20.0  # a step that takes longer is timed in one round
LEAST_MS, MOST_MS = 10.0, 30.0  # of one provider's timing in one round


@dataclass
class Result:
    """What was found about one case: its rows, and what was left out for want of time."""

    case: Case
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass
class _Runner:
    """A provider that is ready to be timed."""

    provider: Provider
    step: Step
    notes: list[str]
    error: float
    peak_bytes: int
    samples: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)  # the median of each


def calibration_rows(stated: Roofline | None, measured: Roofline) -> list[Row]:
    """What the device does at most, by measurement, with what its data sheet says as the bound."""
    rows = [
        Row(
            *(CALIBRATION, "copy", "bandwidth", measured.bytes_per_s / 1e9, "GB/s"),
            stated.bytes_per_s / 1e9 if stated else None,
        )
    ]
    for dtype, rate in measured.flops_per_s.items():
        if dtype != "default":
            bound = stated.rate(dtype) / 1e12 if stated else None
            rows.append(Row(CALIBRATION, f"matrix product, {dtype}", "rate", rate / 1e12, "TFLOP/s", bound))
    return rows


def measure(
    cases: Sequence[Case],
    clock: Clock,
    budget: Budget,
    stated: Roofline | None,
    measured: Roofline,
    providers: Callable[[str], Sequence[Provider]] = providers_of,
    *,
    tiers: int = 2,
) -> Iterator[Result]:
    """Each case's result as soon as it is there; cases for which no time is left have no rows.

    Providers of tiers above ``tiers`` are not asked.
    """
    for number, case in enumerate(cases):
        to_come = len(cases) - number - 1
        result = Result(case)
        if budget.left_s <= 0:
            result.left_out = ["everything"]
        else:
            try:
                asked = [provider for provider in providers(case.kernel.name) if provider.tier <= tiers]
                _measure(result, clock, budget, to_come, asked, stated, measured)
            except Exception as error:  # out of memory, most likely; the next case may do
                result.rows.append(Row(case.name, OURS, "time", None, "ms", note=f"failed: {_said(error)}"))
        torch.compiler.reset()
        clock.forget()
        yield result


def _measure(
    result: Result,
    clock: Clock,
    budget: Budget,
    to_come: int,
    providers: Sequence[Provider],
    stated: Roofline | None,
    measured: Roofline,
) -> None:
    case = result.case
    begin = clock.now()
    problem = Problem(case, clock.device)
    truths, digits = problem.truth()
    ready: list[_Runner] = []
    took: dict[int, float] = {0: clock.now() - begin}
    for provider in providers:
        if provider.missing:
            result.rows.append(Row(case.name, provider.name, "time", None, "ms", note=provider.missing))
        elif not budget.affords(provider.tier, to_come):
            result.left_out.append(provider.name)
        else:
            before = clock.now()
            runner = _ready(provider, problem, truths, digits, clock)
            took[provider.tier] = took.get(provider.tier, 0.0) + clock.now() - before
            if isinstance(runner, Row):
                result.rows.append(runner)
            else:
                ready.append(runner)
    del truths
    before = clock.now()
    _time_in_turns(ready, clock, budget.share_s(to_come))
    for tier in took:
        there = sum(runner.provider.tier == tier for runner in ready)
        budget.spent(tier, took[tier] + (clock.now() - before) * there / max(len(ready), 1))
    for runner in ready:
        result.rows += _rows(runner, case, stated, measured)
    result.rows += _ratios(ready, case)
    if case.mode == FORWARD:
        result.rows.append(Row(case.name, "cost", "flops", case.cost.flops, "flop"))
        result.rows.append(Row(case.name, "cost", "traffic", case.cost.traffic_bytes, "B"))


def _said(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__


def _ready(
    provider: Provider, problem: Problem, truths: Sequence[torch.Tensor], digits: str, clock: Clock
) -> _Runner | Row:
    """Prepare a provider and judge its result; a row that says why where it cannot compute."""
    try:
        prepared = provider.prepare(problem)
        results = prepared.whole()
        clock.finish()
        judged = provider.name == OURS or not problem.is_random
        error = error_of(results, truths) if judged else math.nan
        del results
        peak = clock.peak_bytes(prepared.whole)
        step, note = clock.captured(prepared.step)
    except Exception as problem_met:  # whatever a compiler or a library raises is its answer
        return Row(problem.case.name, provider.name, "time", None, "ms", note=f"failed: {_said(problem_met)}")
    notes = [note] if note else []
    if not judged:
        notes.append("draws random numbers of its own: not compared")
    elif not error <= TOLERANCE.get(problem.case.dtype, 0.0):
        notes.append(f"DIFFERS from the reference in {digits}")
    return _Runner(provider, step, notes, error, peak)


def _time_in_turns(ready: Sequence[_Runner], clock: Clock, seconds: float) -> None:
    """Time every provider in each round, every round beginning with another, so that what drifts drifts for all."""
    if not ready:
        return
    ms = min(max(1e3 * seconds / 2 / ROUNDS / len(ready), LEAST_MS), MOST_MS)
    for number in range(ROUNDS):
        turn = number % len(ready)
        for runner in [*ready[turn:], *ready[:turn]]:
            if runner.rounds and runner.rounds[0] > LONG_MS:
                continue
            try:
                samples = clock.milliseconds(runner.step, ms)
            except RuntimeError as error:
                runner.notes.append(f"failed: {_said(error)}")
                continue
            runner.samples += samples
            runner.rounds.append(quantiles(samples).p50)


def _rows(runner: _Runner, case: Case, stated: Roofline | None, measured: Roofline) -> Iterator[Row]:
    name, note = runner.provider.name, "; ".join(runner.notes)
    yield Row(case.name, name, "error", _finite(runner.error), "of the largest", TOLERANCE.get(case.dtype), note)
    yield Row(case.name, name, "peak memory", runner.peak_bytes, "B")
    if not runner.samples:
        yield Row(case.name, name, "time", None, "ms", note=note)
        return
    dtype, roof = dtype_name(case.dtype), stated or measured
    times = quantiles(runner.samples)
    known = case.mode == FORWARD  # of the backward pass no cost is known here
    bound = 1e3 * roof.seconds(case.cost, dtype) if known else None
    yield Row(case.name, name, "time p20", times.p20, "ms", bound)
    yield Row(case.name, name, "time", times.p50, "ms", bound, note)
    yield Row(case.name, name, "time p80", times.p80, "ms", bound)
    if not known:
        return
    if roof.bound_by_memory(case.cost, dtype):
        rate = case.cost.traffic_bytes / times.p50 / 1e6
        yield Row(case.name, name, "bandwidth", rate, "GB/s", roof.bytes_per_s / 1e9)
    else:
        rate = case.cost.flops / times.p50 / 1e9
        yield Row(case.name, name, "rate", rate, "TFLOP/s", roof.rate(dtype) / 1e12)
    for source in filter(None, (stated, measured)):
        share = 1e5 * source.seconds(case.cost, dtype) / times.p50
        metric = "measured roofline" if source is measured else "roofline"
        yield Row(case.name, name, metric, share, "%", 100.0, "" if source is measured else source.source)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ratios(ready: Sequence[_Runner], case: Case) -> Iterator[Row]:
    """How many times as long as ours each provider takes, in the same rounds: the median of the rounds' ratios."""
    ours = next((runner for runner in ready if runner.provider.name == OURS), None)
    for runner in ready:
        if ours is not None and runner is not ours:
            pairs = [theirs / mine for theirs, mine in zip(runner.rounds, ours.rounds, strict=False) if mine > 0]
            if pairs:
                yield Row(case.name, runner.provider.name, "time over ours", quantiles(pairs).p50, "x")
