"""Workers of several cases: prepared a few at a time, then timed in turns, case by case.

Ratios between ways to run a model are only taken between those timed in turns: what else the machine does, and how
warm it is, then strikes all alike.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median, quantiles

from .worker import Failure, Prepared, Spec, Worker, WorkerError

__all__ = ["Job", "Measured", "Outcome", "Spread", "Turns", "measure_in_turns", "spread"]


@dataclass(frozen=True, eq=False)
class Job:
    """One worker: what it runs, and the folder of its compile caches."""

    case: str
    spec: Spec
    cache: Path

    @property
    def provider(self) -> str:
        """The name of the way to run."""
        return self.spec.provider.name


@dataclass(frozen=True)
class Spread:
    """Median of some measurements, with the quantiles of 20 % and 80 %, all in seconds."""

    median: float
    low: float
    high: float


def spread(seconds: Sequence[float]) -> Spread:
    """The quantiles of one or more measurements."""
    if len(seconds) == 1:
        return Spread(seconds[0], seconds[0], seconds[0])
    cuts = quantiles(seconds, n=5, method="inclusive")
    return Spread(median(seconds), cuts[0], cuts[-1])


@dataclass(frozen=True)
class Measured:
    """What a worker found, and the seconds of a step in each of its turns; ``alone``: no other worker was there."""

    prepared: Prepared
    seconds: tuple[float, ...]
    alone: bool = False

    @property
    def spread(self) -> Spread:
        """The distribution over the turns."""
        return spread(self.seconds)


@dataclass(frozen=True)
class Turns:
    """How workers are measured: ``jobs`` prepare at a time, for at most ``patience_s``; ``samples`` of ``sample_s``.

    No worker goes on preparing after ``until``, on ``time.monotonic``'s clock.
    """

    until: float = math.inf
    jobs: int = 1
    patience_s: float = 300.0
    samples: int = 7
    sample_s: float = 0.1

    @property
    def threads(self) -> int:
        """How many kernels each worker may compile at a time: its share of the cores, and a few, as most often wait."""
        cores = os.cpu_count() or 1
        return min(cores, max(4, cores // self.jobs))


Outcome = Measured | Failure


def measure_in_turns(cases: Sequence[Sequence[Job]], turns: Turns) -> Mapping[Job, Outcome]:
    """Prepare all jobs of all cases, then time those of each case in turns.

    A job that found too little memory beside the others is measured again alone.
    """
    outcomes: dict[Job, Outcome] = {}
    workers: dict[Job, Worker] = {}
    try:
        ready = _prepared([job for case in cases for job in case], turns, workers, outcomes)
        for case in cases:
            _time(case, turns, workers, ready, outcomes)
            _close([workers.pop(job) for job in case if job in workers])
    finally:
        _close(list(workers.values()))
    crowded = [job for job, found in outcomes.items() if isinstance(found, Failure) and found.out_of_memory]
    for job in crowded if len(outcomes) > 1 else ():
        (found,) = measure_in_turns([[job]], turns).values()
        outcomes[job] = Measured(found.prepared, found.seconds, alone=True) if isinstance(found, Measured) else found
    return outcomes


def _close(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.hang_up()
    for worker in workers:
        worker.close()


def _prepared(
    jobs: Sequence[Job], turns: Turns, workers: dict[Job, Worker], outcomes: dict[Job, Outcome]
) -> Mapping[Job, Prepared]:
    """Start the workers, ``turns.jobs`` at a time, and collect what they found; failures are outcomes."""
    waiting, busy = list(jobs), dict[Job, float]()
    ready: dict[Job, Prepared] = {}
    begin = time.monotonic()
    while waiting or busy:
        while waiting and len(busy) < turns.jobs:
            job = waiting.pop(0)
            if time.monotonic() >= turns.until:
                outcomes[job] = Failure("", "not begun, the time was up")
                continue
            workers[job] = Worker(job.spec, job.cache, turns.threads)
            busy[job] = min(time.monotonic() + turns.patience_s, turns.until)
        if not busy:
            break
        wait([workers[job].connection for job in busy], max(min(busy.values()) - time.monotonic(), 0.0))
        now = time.monotonic()
        for job in [job for job, until in busy.items() if workers[job].ready() or until <= now]:
            del busy[job]
            try:
                ready[job] = workers[job].prepared(0.0)
            except WorkerError as error:
                outcomes[job] = error.failure
                workers.pop(job).close()
            said = outcomes.get(job, "ready")
            print(f"  {now - begin:5.0f} s  {job.case}, {job.provider}: {said}", flush=True)
    return ready


def _time(
    case: Sequence[Job],
    turns: Turns,
    workers: Mapping[Job, Worker],
    ready: Mapping[Job, Prepared],
    outcomes: dict[Job, Outcome],
) -> None:
    """One sample of each job, then another of each; every round begins with another job."""
    seconds: dict[Job, list[float]] = {job: [] for job in case if job in ready}
    for number in range(turns.samples):
        jobs = list(seconds)
        for job in jobs[number % len(jobs) :] + jobs[: number % len(jobs)] if jobs else ():
            try:
                seconds[job].append(workers[job].time(turns.sample_s))
            except WorkerError as error:
                outcomes[job] = error.failure
                del seconds[job]
    for job, samples in seconds.items():
        outcomes[job] = Measured(ready[job], tuple(samples))
