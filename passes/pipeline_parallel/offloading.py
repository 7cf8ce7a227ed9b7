"""Which stages offload their activations to the host, so that the memory limit holds at the least slow-down.

PipeOffload (Wan et al., arXiv 2503.01328): activations of early stages live longest, and going away while they wait
costs nothing as long as the copies fit beside compute; so offload those that live longest, and only as many as the
limit asks for. Here a stage says what it could offload (``offloaded_bytes``, ``offload_ns``, ``reload_ns``), and the
choice is which do, wholly or in part, judged by schedules in which copies have an engine of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product

import msgspec

from ...compiler.pipeline import Budget
from ...compiler.pipelining.problem import PipelineProblem, Stage
from ...compiler.pipelining.schedule import PipelineSchedule, TimedSchedule
from ...compiler.pipelining.simulate import timed
from ...errors import Infeasible, OptionError
from ._choosing import Choice, best_choice
from ._copies import away, with_copies, without_copies
from .bounds import lower_bound
from .solution import Objective, PipelineSolution
from .solve import solve

__all__ = ["choose_offload", "offloaded"]

_ALL = 64  # choices that are all looked at


def offloaded(problem: PipelineProblem, parts: Sequence[int], of: int = 1) -> PipelineProblem:
    """``problem`` in which stage s offloads ``parts[s]`` of ``of`` equal parts of what it could; times in proportion.

    Raises:
        OptionError: another number of stages, or parts that there are not.
    """
    if len(parts) != len(problem.stages) or any(not 0 <= part <= of for part in parts):
        raise OptionError(f"parts {list(parts)} of {of} for {len(problem.stages)} stages; each takes 0 to {of}")
    stages = tuple(_scaled(stage, part, of) for stage, part in zip(problem.stages, parts, strict=True))
    chosen = ", ".join(f"{stage}: {part}/{of}" for stage, part in enumerate(parts) if part)
    return msgspec.structs.replace(problem, stages=stages, name=f"{problem.name}, offload {{{chosen}}}")


def _scaled(stage: Stage, part: int, of: int) -> Stage:
    if not part:
        return msgspec.structs.replace(stage, offloaded_bytes=0, offload_ns=0, reload_ns=0)
    return msgspec.structs.replace(
        stage,
        offloaded_bytes=stage.offloaded_bytes * part // of,
        offload_ns=-(-stage.offload_ns * part // of),
        reload_ns=-(-stage.reload_ns * part // of),
    )


def choose_offload(
    problem: PipelineProblem, budget: Budget, *, objective: Objective = "makespan", of: int = 1
) -> PipelineSolution:
    """The best schedule found within the memory limit for any choice of what offloads: none to ``of`` ``of``-ths.

    Without a limit nothing offloads. The solution's problem holds the choice; its bound holds for all choices.

    Raises:
        Infeasible: the memory limit is not kept even if all offloads.
        OptionError: ``of`` is below 1.
    """
    if of < 1:
        raise OptionError(f"stages offload {of} parts; the least is 1")
    begin = time.monotonic()
    nothing = offloaded(problem, [0] * len(problem.stages))
    if problem.memory_limit is None or not any(stage.offloaded_bytes for stage in problem.stages):
        return solve(nothing, budget, objective=objective)
    references = list(_references(problem, budget.share(0.3), objective))
    tried = list(dict.fromkeys(_candidates(problem, references, of, budget.share(0.3))))
    exhaustive = len(tried) == (of + 1) ** sum(bool(stage.offloaded_bytes) for stage in problem.stages)
    choices = []
    for parts in tried:
        chosen = offloaded(problem, parts, of)
        choices.append(Choice(f"parts {list(parts)} of {of}", chosen, _hints(chosen, references)))
    others = None if exhaustive else lower_bound(away(problem), objective)
    solution = best_choice(choices, budget, objective=objective, others=others)
    return replace(solution, seconds=time.monotonic() - begin)


def _candidates(
    problem: PipelineProblem, references: Sequence[TimedSchedule], of: int, budget: Budget
) -> Iterator[tuple[int, ...]]:
    """Parts of each stage that are worth a look: all there are, if few.

    Or: of none; of the first stages of the route, few to all; what a schedule asks for, and with a part more or less.
    """
    movable = [bool(stage.offloaded_bytes) for stage in problem.stages]
    if (of + 1) ** sum(movable) <= _ALL:
        yield from product(*(range(of + 1) if moves else (0,) for moves in movable))
        return
    parts = [0] * len(movable)
    yield tuple(parts)
    for stage in dict.fromkeys(stage for route in problem.routes for stage in route.stages if movable[stage]):
        parts[stage] = of
        yield tuple(parts)
    for line in references:
        asked = _least_parts(problem, line, of, budget)
        yield asked
        for stage, change in product(range(len(asked)), (1, -1)):
            if movable[stage] and 0 <= asked[stage] + change <= of:
                yield (*asked[:stage], asked[stage] + change, *asked[stage + 1 :])


def _references(problem: PipelineProblem, budget: Budget, objective: Objective) -> Iterator[TimedSchedule]:
    """Schedules without copies: the best without a limit, and the best if half or all that may go took nothing."""
    unlimited = msgspec.structs.replace(without_copies(problem), memory_limit=None)
    yield solve(unlimited, budget.share(0.3), objective=objective).timed
    for parts in (1, 2):
        try:
            yield solve(away(problem, parts), budget.share(0.5), objective=objective).timed
        except Infeasible:
            return


def _hints(problem: PipelineProblem, references: Sequence[TimedSchedule]) -> Callable[[], Iterable[PipelineSchedule]]:
    return lambda: (_hint(problem, line) for line in references)


def _hint(problem: PipelineProblem, line: TimedSchedule) -> PipelineSchedule:
    """``line`` with the copies of ``problem``, whichever slack ends it soonest within the limit."""
    slacks = sorted({0, max(stage.offload_ns for stage in problem.stages)})
    found = [timed(with_copies(line, problem, slack)) for slack in slacks]
    return min(found, key=lambda one: (_excess(one), one.makespan_ns)).schedule


def _excess(line: TimedSchedule, rank: int | None = None) -> int:
    """Bytes above the limit, of one rank or of the worst."""
    limit = line.schedule.problem.memory_limit
    assert limit is not None
    over = [max(0, peak - most) for peak, most in zip(line.peak_bytes, limit, strict=True)]
    return max(over) if rank is None else over[rank]


def _least_parts(problem: PipelineProblem, line: TimedSchedule, of: int, budget: Budget) -> tuple[int, ...]:
    """For each rank by itself, the parts that keep its limit in ``line`` at the least delay, and then the least bytes.

    Copies of one rank delay others only where they delay its own actions, so ranks may choose one by one. Ranks for
    which there is no time left offload all.
    """
    parts = [of * bool(stage.offloaded_bytes) for stage in problem.stages]
    for rank, stages in enumerate(problem.stages_of):
        if budget.halted():
            break
        movable = [stage for stage in stages if problem.stages[stage].offloaded_bytes]
        best: tuple[tuple[int, int, int], dict[int, int]] | None = None
        for chosen in _ways(movable, line, of):
            tried = offloaded(problem, [chosen.get(stage, 0) for stage in range(len(parts))], of)
            judged = timed(_hint(tried, line))
            moved = sum(problem.stages[stage].offloaded_bytes * part for stage, part in chosen.items())
            key = (_excess(judged, rank), judged.makespan_ns, moved)
            if best is None or key < best[0]:
                best = (key, chosen)
            if key[:2] == (0, line.makespan_ns):
                break
        if best is not None:
            for stage, part in best[1].items():
                parts[stage] = part
    return tuple(parts)


def _ways(stages: Sequence[int], line: TimedSchedule, of: int) -> Iterator[dict[int, int]]:
    """Parts to try on a rank, ever more: of the stage whose activations live longest first, then of the next."""
    lives = _lives(line)
    chosen = dict.fromkeys(stages, 0)
    yield dict(chosen)
    for stage in sorted(stages, key=lambda stage: (-lives.get(stage, 0), stage)):
        for part in range(1, of + 1):
            chosen[stage] = part
            yield dict(chosen)


def _lives(line: TimedSchedule) -> dict[int, int]:
    """By stage, how long F's activations wait for I, over all microbatches."""
    lives: dict[int, int] = {}
    for order, starts, finishes in zip(line.schedule.orders, line.starts, line.finishes, strict=True):
        for action, start, finish in zip(order, starts, finishes, strict=True):
            if action.kind.value == "F":
                lives[action.stage] = lives.get(action.stage, 0) - finish
            elif action.kind.value in "IB":
                lives[action.stage] = lives.get(action.stage, 0) + start
    return lives
