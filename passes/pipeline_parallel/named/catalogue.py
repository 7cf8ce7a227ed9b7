"""Schedules that the field has drawn by hand, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import msgspec

from ....compiler.pipelining.placement import placed, uniform
from ....compiler.pipelining.problem import PipelineProblem, Route, Stage, Vocabulary
from ....compiler.pipelining.schedule import PipelineSchedule
from ....compiler.pipelining.simulate import timed
from ....errors import OptionError
from .._copies import with_copies, without_copies
from ..solution import Objective
from . import building_blocks, depth_first, v_shaped, vocabulary, waves, zero_bubble, zero_bubble_v
from .layout import Layout, Orders, lay_out, opposed

__all__ = ["NAMES", "NamedSchedule", "fitting", "named", "problem_for"]


@dataclass(frozen=True)
class NamedSchedule:
    """What a schedule is, and the problems that it is for.

    ``placement`` is one of ``placed``, or ``"both ways"`` for two routes over copies of the model that run in opposite
    directions. ``chunks`` are the stages on each rank, of each copy; ``None`` is any number.
    """

    description: str
    placement: str
    chunks: int | None
    source: str


@dataclass(frozen=True)
class _Entry:
    about: NamedSchedule
    make: Callable[..., Orders]  # of what _fitted returns, a layout or two that are opposed; and of the objective
    refuse: Callable[[Layout], str] = lambda layout: ""
    searches: bool = False  # whether it takes the objective
    shards: bool = False  # whether it is for problems with vocabulary shards, and for no others


_ENTRIES: Mapping[str, _Entry] = {
    "gpipe": _Entry(
        NamedSchedule("all forwards, then all backwards", "loop", 1, "Huang et al., arXiv 1811.06965"),
        depth_first.all_forward_first,
    ),
    "1f1b": _Entry(
        NamedSchedule("one forward, one backward in turn", "loop", 1, "Narayanan et al., arXiv 2006.09503"),
        depth_first.one_forward_one_backward,
    ),
    "interleaved-1f1b": _Entry(
        NamedSchedule("1F1B, chunks of a rank in turn", "loop", None, "Narayanan et al., arXiv 2104.04473"),
        depth_first.interleaved,
        depth_first.refuse_rounds,
    ),
    "breadth-first": _Entry(
        NamedSchedule("each chunk for all microbatches", "loop", None, "Lamy-Poirier, arXiv 2211.05953"),
        depth_first.breadth_first,
    ),
    "2bp": _Entry(
        NamedSchedule("1F1B with every W at the end", "loop", 1, "Rae et al., arXiv 2405.18047"),
        depth_first.two_stage_backward,
    ),
    "1f1b-vocabulary": _Entry(
        NamedSchedule("1F1B with the output layer in shards on all ranks", "loop", 1, "Yeung et al., arXiv 2411.05288"),
        vocabulary.sharded_vocabulary,
        vocabulary.refuse_whole,
        shards=True,
    ),
    "zb-h1": _Entry(
        NamedSchedule("1F1B, W put off; memory of 1F1B", "loop", 1, "Qi et al., arXiv 2401.10241"),
        depth_first.zero_bubble_1,
    ),
    "zb-h2": _Entry(
        NamedSchedule(
            "1F1B, W put off; no bubble in the span; twice the memory", "loop", 1, "Qi et al., arXiv 2401.10241"
        ),
        depth_first.zero_bubble_2,
    ),
    "zb-greedy": _Entry(
        NamedSchedule("1F1B, W where a rank idles; heeds the memory limit", "loop", 1, "Qi et al., arXiv 2401.10241"),
        zero_bubble.zero_bubble_greedy,
        searches=True,
    ),
    "interleaved-zb": _Entry(
        NamedSchedule("ZB-H1, chunks of a rank in turn", "loop", None, "torch ScheduleInterleavedZeroBubble"),
        depth_first.interleaved_zero_bubble,
        depth_first.refuse_rounds,
    ),
    "zbv": _Entry(
        NamedSchedule("zero bubble over a V, by hand; memory of 1F1B", "v", 2, "Qi et al., arXiv 2401.10241"),
        v_shaped.zero_bubble_v,
    ),
    "zbv-greedy": _Entry(
        NamedSchedule(
            "zero bubble over a V, from times; heeds the memory limit", "v", 2, "Qi et al., arXiv 2401.10241"
        ),
        zero_bubble_v.zero_bubble_v_greedy,
        searches=True,
    ),
    "v-half": _Entry(
        NamedSchedule("half the memory and half the bubble of 1F1B", "v", 2, "Qi et al., arXiv 2405.15362"),
        building_blocks.v_half,
    ),
    "v-min": _Entry(
        NamedSchedule("a third of the memory of 1F1B", "v", 2, "Qi et al., arXiv 2405.15362"),
        building_blocks.v_min,
    ),
    "dualpipe-v": _Entry(
        NamedSchedule("DualPipe on one copy of the model", "v", 2, "github.com/deepseek-ai/DualPipe"),
        v_shaped.dual_pipe_v,
        v_shaped.refuse_few,
    ),
    "dualpipe": _Entry(
        NamedSchedule("two directions, W put off at the ends", "both ways", 1, "DeepSeek-AI, arXiv 2412.19437"),
        v_shaped.dual_pipe,
        v_shaped.refuse_dual_pipe,
    ),
    "chimera": _Entry(
        NamedSchedule("1F1B in two directions, fitted together", "both ways", 1, "Li and Hoefler, arXiv 2107.06925"),
        waves.bidirectional,
        waves.refuse_odd,
    ),
    "bitpipe": _Entry(
        NamedSchedule("1F1B over a V in two directions", "both ways", 2, "Wu et al., arXiv 2410.19367"),
        waves.bidirectional,
        waves.refuse_odd,
    ),
    "hanayo": _Entry(
        NamedSchedule("1F1B in waves, each there and back", "wave", None, "Liu et al., SC 2023"),
        waves.waves,
        waves.refuse_waves,
    ),
}

#: What schedules there are.
NAMES: Mapping[str, NamedSchedule] = MappingProxyType({name: entry.about for name, entry in _ENTRIES.items()})

_CHUNKS = 2  # on each rank, where a schedule takes any number and none was asked for


def named(name: str, problem: PipelineProblem, *, objective: Objective = "makespan") -> PipelineSchedule:
    """The schedule ``name`` of ``problem``. It may exceed the problem's memory limit: only some schedules heed one.

    ``objective`` is what the schedules that try several ways choose by; their authors choose by the span. Stages that
    offload get their copies behind F and just before I; what is chosen by, or heeds a limit, does as if they did not.

    Raises:
        OptionError: there is no schedule of that name, or the problem is not one that it is for; says which. Or the
            schedule heeds the memory limit, and cannot keep this one.
    """
    if any(stage.offloaded_bytes for stage in problem.stages):
        return _with_copies(name, problem, objective)
    entry = _entry(name)
    try:
        layout = _fitted(entry, problem)
    except OptionError as error:
        raise OptionError(
            f"schedule {name!r} does not fit pipeline {problem.name!r}: {error.message}",
            hint="problem_for() makes a problem that a schedule fits, fitting() says which fit a problem",
        ) from error
    orders = entry.make(layout, objective) if entry.searches else entry.make(layout)
    return PipelineSchedule(problem, orders, name)


def _with_copies(name: str, problem: PipelineProblem, objective: Objective) -> PipelineSchedule:
    line = timed(named(name, without_copies(problem), objective=objective))
    return msgspec.structs.replace(with_copies(line, problem), method=name)


def fitting(problem: PipelineProblem) -> tuple[str, ...]:
    """Names of the schedules that fit ``problem``, whether within its memory limit or not."""
    return tuple(name for name, entry in _ENTRIES.items() if _fits(entry, problem))


def problem_for(
    name: str,
    stage: Stage,
    ranks: int,
    microbatches: int,
    memory_limit: int | None = None,
    *,
    chunks: int | None = None,
    shards: Vocabulary | None = None,
) -> PipelineProblem:
    """A problem that schedule ``name`` fits, all of whose stages are like ``stage``, on ranks as the schedule has them.

    ``stage`` is a chunk: of a schedule with two chunks on a rank, the model is ``2 * ranks`` of it. ``chunks`` may be
    given where the schedule takes any number (2 if it is not). ``memory_limit`` is that of each rank, in bytes.
    ``shards`` are those of an output layer that is cut over the ranks; only some schedules place them, these need them.

    Raises:
        OptionError: there is no such schedule, or it does not go with as many chunks, ranks or microbatches.
    """
    about = _entry(name).about
    if chunks is not None and about.chunks not in (None, chunks):
        raise OptionError(f"schedule {name!r} has {about.chunks} chunks on each rank, not {chunks}")
    number = about.chunks or _CHUNKS if chunks is None else chunks
    if about.placement == "both ways":
        problem = _both_ways(stage, ranks, microbatches, number, memory_limit)
    else:
        problem = uniform(stage, placed(about.placement, ranks, number), microbatches, memory_limit=memory_limit)
    name_of_problem = f"{name}, {ranks} ranks, {microbatches} microbatches"
    problem = msgspec.structs.replace(problem, name=name_of_problem, vocabulary=shards)
    try:
        _fitted(_entry(name), problem)
    except OptionError as error:
        raise OptionError(f"schedule {name!r}: {error.message}") from error
    return problem


def _both_ways(stage: Stage, ranks: int, microbatches: int, chunks: int, limit: int | None) -> PipelineProblem:
    if microbatches % 2:
        raise OptionError(f"{microbatches} microbatches cannot be halved for two directions")
    down = placed("v" if chunks == 2 else "loop", ranks, chunks)
    on = (*down, *(ranks - 1 - rank for rank in down))
    routes = (
        Route(tuple(range(len(down))), microbatches // 2),
        Route(tuple(range(len(down), len(on))), microbatches // 2),
    )
    stages = tuple(msgspec.structs.replace(stage, rank=rank) for rank in on)
    return PipelineProblem(ranks, stages, routes, None if limit is None else (limit,) * ranks)


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise OptionError(f"there is no schedule {name!r}", hint=f"choose among {', '.join(_ENTRIES)}")
    return _ENTRIES[name]


def _fitted(entry: _Entry, problem: PipelineProblem) -> Layout | tuple[Layout, Layout]:
    chunks = entry.about.chunks
    if problem.vocabulary is not None and not entry.shards:
        raise OptionError("its output layer is cut into vocabulary shards; this schedule does not place them")
    if entry.about.placement == "both ways":
        pair = opposed(problem, "v" if chunks == 2 else "loop", chunks or 1)
        layout = pair[0]
    else:
        pair = None
        layout = lay_out(problem, entry.about.placement, chunks)
    reason = entry.refuse(layout)
    if reason:
        raise OptionError(reason)
    return pair or layout


def _fits(entry: _Entry, problem: PipelineProblem) -> bool:
    try:
        _fitted(entry, problem)
    except OptionError:
        return False
    return True
