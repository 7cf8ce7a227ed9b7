"""The second section of ``bench_pipeline``: our schedules against the best published one within the same memory.

Published schedules are those of ``named`` that fit the placement and keep the limit, Zero Bubble's and ZB-V's searches
among them. The limits are chunks' activations, a microbatch of a chunk holding 1 from F to W, or the bytes that torch's
eager split was measured to hold: 32 from F to W and 22 more from I to W.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from opweave.compiler.pipeline import Budget
from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Stage
from opweave.compiler.pipelining.simulate import timed
from opweave.compiler.pipelining.verdict import verified
from opweave.errors import OptionError
from opweave.passes.pipeline_parallel._progress import Search
from opweave.passes.pipeline_parallel.improve import improve
from opweave.passes.pipeline_parallel.list_schedule import construct, workshop_for
from opweave.passes.pipeline_parallel.named import fitting, named
from opweave.passes.pipeline_parallel.solution import Bound, Objective, PipelineSolution, value_of, within_limit
from opweave.passes.pipeline_parallel.solve import solve

from .runner import Options, Row, print_table

__all__ = ["CASES", "Case", "Against", "best_published", "rows", "summary"]

HEAD = ("case", "limit", "objective", "published", "bubble", "ours", "bound", "gap %", "seconds", "by")


@dataclass(frozen=True)
class Case:
    """Stages that are alike: nanoseconds of F, I, W and a transfer, bytes from F to W and from I to W."""

    name: str
    times: tuple[int, int, int, int]
    ranks: int
    microbatches: int
    placement: str
    limit: int
    seconds: float
    held: tuple[int, int] = (1, 0)
    objective: Objective = "makespan"
    quick: bool = False

    @property
    def problem(self) -> PipelineProblem:
        """The problem to solve."""
        forward, gradient, weight, send = self.times
        stage = Stage(
            0,
            forward,
            gradient,
            weight,
            until_weight_gradient_bytes=self.held[0],
            between_gradients_bytes=self.held[1],
            forward_send_ns=send,
            backward_send_ns=send,
        )
        ranks = placed(self.placement, self.ranks, 1 if self.placement == "loop" else 2)
        return uniform(stage, ranks, self.microbatches, memory_limit=self.limit, name=self.name)


UNIT = (1, 1, 1, 0)
SMALL = (18522, 18086, 9337, 601)  # 1.5B, 8 ranks, 24 microbatches, in Zero Bubble's table
MEDIUM = (29718, 29444, 19927, 527)  # 6.2B, likewise
LARGE = (10402, 10248, 7698, 460)  # 28.3B, 32 ranks, 256 microbatches
CHUNK = (9447, 9644, 7193, 887)  # of ZB-V's table, 32 ranks, 256 microbatches
HALF = tuple(time // 2 for time in MEDIUM[:3])
MEDIUM_V = (HALF[0], HALF[1], HALF[2], MEDIUM[3])
EAGER = (32, 22)
QUICK_S = 8.0

# What solving is to take at most: 15 and 120 s. A budget ends a search, not the judge's count of what it found.
SMALL_S, LARGE_S = 13.0, 112.0

#: The quick ones take a minute together.
CASES = (
    *(Case("V, equal times, p4 m8", UNIT, 4, 8, "v", limit, SMALL_S, quick=limit == 5) for limit in (4, 5, 6, 8)),
    *(Case("V, equal times, p8 m16", UNIT, 8, 16, "v", limit, SMALL_S) for limit in (8, 10, 12, 16)),
    *(Case("V, 6.2B times, p4 m12", MEDIUM_V, 4, 12, "v", limit, SMALL_S, quick=limit == 5) for limit in (4, 5, 6, 8)),
    *(
        Case("torch eager, 6.2B, p8 m24", MEDIUM, 8, 24, "loop", limit, SMALL_S, EAGER, quick=limit == 256)
        for limit in (256, 320, 384)
    ),
    *(Case("1.5B, p8 m24", SMALL, 8, 24, "loop", limit, SMALL_S) for limit in (6, 8, 10, 12, 16)),
    *(Case("6.2B, p8 m24", MEDIUM, 8, 24, "loop", limit, SMALL_S, quick=limit == 10) for limit in (6, 8, 10, 12, 16)),
    *(
        Case("6.2B, p8 m24", MEDIUM, 8, 24, "loop", limit, SMALL_S, objective="span", quick=limit == 16)
        for limit in (8, 10, 12, 16)
    ),
    *(Case("28.3B, p32 m256", LARGE, 32, 256, "loop", limit, LARGE_S) for limit in (24, 32, 40, 64)),
    *(Case("V, ZB-V times, p32 m256", CHUNK, 32, 256, "v", limit, LARGE_S) for limit in (32, 48, 64)),
    Case("28.3B times, p64 m512", LARGE, 64, 512, "loop", 80, 240),
)


@dataclass(frozen=True)
class Against:
    """What we found for a case, beside the best ``published`` value and the schedule that has it, if any fits."""

    case: Case
    solution: PipelineSolution
    published: int | None
    schedule: str

    def bubble(self, value: int) -> float:
        """The fraction of ``value`` in which the busiest rank idles."""
        return 1 - max(self.case.problem.work_ns) / value

    def line(self) -> list[str | float | None]:
        """For the table."""
        solution = self.solution
        return [
            self.case.name,
            str(self.case.limit),
            self.case.objective,
            self.schedule,
            None if self.published is None else f"{self.bubble(self.published):.4f}",
            f"{self.bubble(solution.value):.4f}",
            f"{self.bubble(solution.bound.value):.4f}" if solution.bound.value else None,
            f"{100 * solution.gap:.2f}",
            f"{solution.seconds:.1f}",
            solution.timed.schedule.method,
        ]

    def rows(self) -> Iterator[Row]:
        """In long form: bubble rates, and seconds."""
        case = f"{self.case.name}, limit {self.case.limit}, {self.case.objective}"
        if self.published is not None:
            yield Row(case, "best published", "bubble", self.bubble(self.published), "fraction", note=self.schedule)
        solution = self.solution
        least = self.bubble(solution.bound.value) if solution.bound.value else None
        method = solution.timed.schedule.method
        yield Row(case, "opweave", "bubble", self.bubble(solution.value), "fraction", least, method)
        yield Row(case, "opweave", "gap", solution.gap, "fraction", note=solution.bound.proved_by)
        yield Row(case, "opweave", "solve", solution.seconds, "s")


def best_published(problem: PipelineProblem, objective: Objective) -> tuple[int | None, str]:
    """The best objective of the named schedules that fit and keep the limit, and whose it is."""
    best: int | None = None
    whose = "none fits"
    for name in fitting(problem):
        try:
            judged = timed(named(name, problem, objective=objective))
        except OptionError:  # one that keeps to the limit, and cannot
            continue
        value = value_of(judged, objective)
        if within_limit(judged) and (best is None or value < best):
            best, whose = value, name
    return best, whose


def rows(options: Options) -> Iterator[Row]:
    """Solves case by case; prints the table and how often ours is better, and yields all in long form."""
    tiny = uniform(Stage(0, 1, 1, 1), placed("loop", 2), 2)
    print(f"loaded, and compiled where it was not yet, in {_improved(tiny):.1f} s; not counted below")
    found: list[Against] = []
    for case in CASES:
        if options.quick and not case.quick:
            continue
        problem = case.problem
        published, schedule = best_published(problem, case.objective)
        seconds = min(case.seconds, QUICK_S) if options.quick else case.seconds
        solution = solve(problem, Budget.of_seconds(seconds), objective=case.objective)
        verified(solution.timed)
        found.append(Against(case, solution, published, schedule))
        yield from found[-1].rows()
    print_table(HEAD, [each.line() for each in found])
    print(summary(found))


def _improved(problem: PipelineProblem) -> float:
    """The seconds that it takes to go through all methods with a problem that asks nothing of them."""
    begin = time.monotonic()
    shop = workshop_for(problem)
    search = Search(problem, Budget.of_seconds(60, deterministic=True), "makespan")
    construct(search, shop)
    search.bound = Bound(0, "analytic")
    improve(search, shop)
    return time.monotonic() - begin


def summary(found: Sequence[Against]) -> str:
    """One line: better, equal and worse than the best published, how much, gaps, and the seconds that it took."""
    pairs = [(each, each.published) for each in found if each.published is not None]
    if not pairs:
        return f"no published schedule fits any of {len(found)} cases"
    ratios = [each.solution.value / published for each, published in pairs]
    gaps = [100 * each.solution.gap for each in found]
    return (
        f"against the best published within the same memory: {sum(ratio < 1 for ratio in ratios)} better, "
        f"{sum(ratio == 1 for ratio in ratios)} equal, {sum(ratio > 1 for ratio in ratios)} worse, "
        f"{len(found) - len(pairs)} where none fits; median of the time taken {statistics.median(ratios):.4f} of it, "
        f"least {min(ratios):.4f}; gap to the bound: median {statistics.median(gaps):.2f} %, most {max(gaps):.2f} %, "
        f"{sum(gap == 0 for gap in gaps)} of {len(found)} proved optimal"
    )
