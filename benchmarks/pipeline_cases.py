"""Published figures of pipeline schedules, case by case, and what our generators of the schedules take."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage
from opweave.compiler.pipelining.schedule import Action, ActionKind, PipelineSchedule, TimedSchedule
from opweave.compiler.pipelining.simulate import timed
from opweave.errors import ModelError
from opweave.passes.pipeline_parallel.named import named, problem_for

from .pipeline_comparison import Compared
from .pipeline_tables import DUALPIPE, MEASURED_V, TORCH, UNIT_V, ZERO_BUBBLE, ZERO_BUBBLE_V, Measured

__all__ = [
    "MEASURED_TIMES",
    "formulas",
    "interleaved_bubble_with_few_waits",
    "measured_times",
    "torch_schedules",
    "v_shapes",
    "zero_bubble",
    "zero_bubble_v",
]

#: The file of ``--data``.
MEASURED_TIMES = "vocab_stage_times.csv"
_LARGE = 1600  # ranks times microbatches; what has more is left out with --quick


def _stage(f: int, i: int, w: int, send: int = 0, *, until_i: int = 0, until_w: int = 1) -> Stage:
    return Stage(
        *(0, f, i, w),
        until_input_gradient_bytes=until_i,
        until_weight_gradient_bytes=until_w,
        forward_send_ns=send,
        backward_send_ns=send,
    )


def _timed(name: str, stage: Stage, ranks: int, microbatches: int, *, chunks: int | None = None) -> TimedSchedule:
    return timed(named(name, problem_for(name, stage, ranks, microbatches, chunks=chunks)))


def _bytes(entry: Measured) -> tuple[int, int]:
    """Bytes of a token's activations in a layer until W, and those until I alone (the authors' ``mem.py``)."""
    until_weight = 32 * entry.hidden
    return until_weight, 34 * entry.hidden + 5 * entry.heads * 1024 - until_weight


def _zero_bubble(entry: Measured, source: str, scale: int) -> Iterator[Compared]:
    """The columns of a row; its times are those of an ``scale``-th of a rank."""
    f, i, w = (scale * time for time in (entry.forward, entry.input_gradient, entry.weight_gradient))
    until_w, until_i = _bytes(entry)
    stage = _stage(f, i, w, entry.send, until_i=until_i, until_w=until_w)
    whole = entry.ranks * (until_w + until_i)
    for column, figure in entry.bubbles.items():
        if column == "interleaved-1f1b":
            yield from _interleaved(entry, figure, scale)
            continue
        if column in ("zb-1p", "zb-2p"):
            limit = whole * (2 if column == "zb-2p" else 1)
            problem = problem_for("zb-greedy", stage, entry.ranks, entry.microbatches, limit)
            line = timed(named("zb-greedy", problem, objective="span"))
        elif column == "zb-v":
            halves = _stage(f // scale, i // scale, w // scale, entry.send, until_i=until_i, until_w=until_w)
            problem = problem_for("zbv-greedy", halves, entry.ranks, entry.microbatches, 2 * whole)
            line = timed(named("zbv-greedy", problem, objective="span"))
        else:
            line = _timed(column, stage, entry.ranks, entry.microbatches)
        span = column in ("zb-h2", "zb-1p", "zb-2p", "zb-v")
        ours = line.span_bubble if span else line.bubble
        yield Compared(
            entry.case, column, "span bubble" if span else "bubble", figure, ours, "fraction", "published", source
        )


def _interleaved(entry: Measured, figure: float, scale: int) -> Iterator[Compared]:
    """Interleaved 1F1B with a chunk for each layer; times in units of ``1 / chunks`` microseconds, so as to be whole.

    The figures come from a program in which rank 0 waits for the last rank, and the last for rank 0, only at the first
    microbatch of a round; so they are too low.
    """
    chunks = entry.layers // entry.ranks
    f, i, w = (scale * time for time in (entry.forward, entry.input_gradient, entry.weight_gradient))
    stage = _stage(f, i, w, chunks * entry.send)
    problem = problem_for("interleaved-1f1b", stage, entry.ranks, entry.microbatches, chunks=chunks)
    schedule = named("interleaved-1f1b", problem)
    name, source = f"interleaved-1f1b, {chunks} chunks", "arXiv 2401.10241, efficiency.py"
    few = interleaved_bubble_with_few_waits(schedule)
    yield Compared(entry.case, name, "bubble, as computed there", figure, few, "fraction", "published", source)
    ours = timed(schedule).bubble
    yield Compared(entry.case, name, "bubble, with every wait", None, ours, "fraction", "published", source)


def interleaved_bubble_with_few_waits(schedule: PipelineSchedule) -> float:
    """The bubble if, between the first rank and the last, only a round's first microbatch is waited for.

    No execution can be like that: others would start before their operand is there.
    """
    problem = schedule.problem
    finish: dict[Action, int] = {}
    free, positions, moved = [0] * problem.ranks, [0] * problem.ranks, True
    while moved:
        moved = False
        for rank, order in enumerate(schedule.orders):
            while positions[rank] < len(order):
                action = order[positions[rank]]
                stage = problem.stages[action.stage]
                forward = action.kind is ActionKind.FORWARD
                before = Action(action.stage + (-1 if forward else 1), action.kind, action.microbatch)
                ready = 0
                if 0 <= before.stage < len(problem.stages):
                    sender = problem.stages[before.stage]
                    turns = sender.rank == (problem.ranks - 1 if forward else 0)
                    if not turns or action.microbatch % problem.ranks == 0:
                        if before not in finish:
                            break
                        ready = finish[before] + (sender.forward_send_ns if forward else sender.backward_send_ns)
                taken = stage.forward_ns if forward else stage.whole_backward_ns
                finish[action] = free[rank] = max(free[rank], ready) + taken
                positions[rank] += 1
                moved = True
    return 1 - max(problem.work_ns) / max(free)


def zero_bubble(quick: bool) -> Iterator[Compared]:
    """Zero Bubble's table."""
    for entry in ZERO_BUBBLE:
        if not quick or entry.ranks * entry.microbatches < _LARGE:
            yield from _zero_bubble(entry, "arXiv 2401.10241", 1)


def zero_bubble_v(quick: bool) -> Iterator[Compared]:
    """The earlier table, with ZB-V; its times are those of half a rank."""
    for entry in ZERO_BUBBLE_V:
        if not quick or entry.ranks * entry.microbatches < _LARGE:
            yield from _zero_bubble(entry, "arXiv 2401.10241v1", 2)


def v_shapes(quick: bool) -> Iterator[Compared]:
    """ZB-V, V-Half and V-Min: bubbles and peaks."""
    source = "the authors' generators"
    for row in UNIT_V:
        case = f"unit times, p {row.ranks}, m {row.microbatches}"
        sizes = (_stage(1, 1, 1), row.ranks, row.microbatches)
        yield Compared(
            *(case, "1f1b", "bubble", row.one_forward, _timed("1f1b", *sizes).bubble, "fraction", "reference", source)
        )
        makespan, span, peak = row.zero_bubble
        for name, expected in (
            ("zbv", (makespan, span, peak)),
            ("zbv-greedy", (makespan, span, peak)),
            ("v-half", (row.half[0], None, row.half[1])),
            ("v-min", (row.least[0], None, row.least[1])),
        ):
            yield from _v_shape(case, name, _timed(name, *sizes), expected, source)
    for each in MEASURED_V:
        if quick and each.ranks * each.microbatches >= _LARGE:
            continue
        case = f"measured times, p {each.ranks}, m {each.microbatches}"
        stage = _stage(each.forward, each.input_gradient, each.weight_gradient, each.send)
        problem = problem_for("zbv-greedy", stage, each.ranks, each.microbatches)
        line = timed(named("zbv-greedy", problem, objective="span"))
        yield from _v_shape(case, "zbv-greedy", line, (*each.zero_bubble, None), source)
        for name, bubble in (("v-half", each.half), ("v-min", each.least)):
            line = _timed(name, stage, each.ranks, each.microbatches)
            yield from _v_shape(case, name, line, (bubble, None, None), source)


def _v_shape(
    case: str, name: str, line: TimedSchedule, expected: tuple[float, float | None, int | None], source: str
) -> Iterator[Compared]:
    makespan, span, peak = expected
    yield Compared(case, name, "bubble", makespan, line.bubble, "fraction", "reference", source)
    if span is not None:
        yield Compared(case, name, "span bubble", span, line.span_bubble, "fraction", "reference", source)
    if peak is not None:
        yield Compared(case, name, "peak", peak, max(line.peak_bytes), "chunks", "reference", source)


def torch_schedules(quick: bool) -> Iterator[Compared]:
    """What torch.distributed.pipelining has built in: bubbles and peaks."""
    source = "PyTorch 2.13's own orders"
    for row in TORCH:
        for (ranks, microbatches), bubble in row.bubbles.items():
            line = _torch_timed(row.name, row.chunks, (1, 1, 1, 0), ranks, microbatches)
            case = f"unit times, p {ranks}, m {microbatches}"
            yield Compared(case, row.name, "bubble", bubble, line.bubble, "fraction", "reference", source)
            peak = microbatches if row.peaks is None else row.peaks[ranks == 8]
            ours = max(line.peak_bytes) / row.chunks
            yield Compared(case, row.name, "peak", peak, ours, "microbatches", "reference", source)
        times = (29718, 29444, 19927, 527) if row.chunks == 1 else (14859, 14722, 9963, 527)
        line = _torch_timed(row.name, row.chunks, times, 8, 16)
        case = "measured times, p 8, m 16"
        yield Compared(case, row.name, "bubble", row.measured, line.bubble, "fraction", "reference", source)
        if row.measured_span is not None:
            span = line.span_bubble
            yield Compared(case, row.name, "span bubble", row.measured_span, span, "fraction", "reference", source)


def _torch_timed(
    name: str, chunks: int, times: tuple[int, int, int, int], ranks: int, microbatches: int
) -> TimedSchedule:
    f, i, w, send = times
    return _timed(name, _stage(f, i, w, send), ranks, microbatches, chunks=chunks)


def formulas(quick: bool) -> Iterator[Compared]:
    """Closed forms, of schedules whose tables could not be had; F, I and W of a stage take 1 unless it says more."""
    for ranks, microbatches in ((8, 24), (16, 48)):
        yield from _zero_bubble_formulas(ranks, microbatches)
    for depth, microbatches in ((4, 4), (4, 8), (8, 8), (8, 32), (16, 16)):
        yield _chimera(depth, microbatches)
    for depth in (4, 8, 16):
        line = _timed("bitpipe", _stage(1, 1, 1), depth, depth)
        bubble, case = (depth - 2) / (4 * depth - 2), f"B = 2 F, p {depth}, m {depth}"
        source = "(D-2)/(3N+D-2), as remembered of arXiv 2410.19367"
        yield Compared(case, "bitpipe", "bubble", bubble, line.bubble, "fraction", "formula", source)
    for (name, ranks, microbatches), (_, makespan, _) in DUALPIPE.items():
        line = _timed(name, _stage(1, 1, 1), ranks, microbatches)
        case, source = f"p {ranks}, m {microbatches}", "the official steps, by a review of them"
        yield Compared(case, name, "makespan", makespan, line.makespan_ns, "F", "reference", source)


def _zero_bubble_formulas(ranks: int, microbatches: int) -> Iterator[Compared]:
    """Of ``efficiency.py``: what is added to the work, in the makespan, or for H2 in the span."""
    f, i, w, send = 29718, 29444, 19927, 527
    work, hops = microbatches * (f + i + w), ranks - 1
    source = "asserted in efficiency.py of arXiv 2401.10241"
    for name, added, sent in (
        ("1f1b", f + i + w, 0),
        ("zb-h1", f + i - w, 0),
        ("zb-h2", f + i + 2 * send - 2 * w, send),
    ):
        line = _timed(name, _stage(f, i, w, sent), ranks, microbatches)
        value = line.span_ns if name == "zb-h2" else line.makespan_ns
        case = f"measured times, p {ranks}, m {microbatches}"
        yield Compared(case, name, "bubble time", hops * added, value - work, "us", "formula", source)
    line = _timed("interleaved-1f1b", _stage(f, i, w), ranks, microbatches, chunks=4)
    added = hops * (f + i + w)
    case = f"measured times of a chunk, p {ranks}, m {microbatches}"
    ours = line.makespan_ns - 4 * work
    yield Compared(case, "interleaved-1f1b, 4 chunks", "bubble time", added, ours, "us", "formula", source)


def _chimera(depth: int, microbatches: int) -> Compared:
    line = _timed("chimera", _stage(2, 1, 1), depth, microbatches)
    bubble, case = (depth - 2) / (2 * microbatches + depth - 2), f"F = B, p {depth}, m {microbatches}"
    source = "(D-2)/(2N+D-2), arXiv 2107.06925"
    return Compared(case, "chimera", "bubble", bubble, line.bubble, "fraction", "formula", source)


def measured_times(folder: Path) -> Iterator[Compared]:
    """Iterations of 1F1B on 8 A100 (Yeung et al., arXiv 2411.05288), from measured times of each stage.

    Raises:
        ModelError: the file is not there, or not what it should be.
    """
    path = folder / MEASURED_TIMES
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        if not lines:
            raise ValueError("it has no rows")
        for line in lines:
            forward = [int(time) for time in line["forward_us_per_stage"].split()]
            backward = [int(time) for time in line["backward_us_per_stage"].split()]
            stages = tuple(Stage(rank, f, b, 0) for rank, (f, b) in enumerate(zip(forward, backward, strict=True)))
            route = Route(tuple(range(len(stages))), int(line["microbatches"]))
            problem = PipelineProblem(len(stages), stages, (route,), name=line["case"])
            ours = timed(named("1f1b", problem)).makespan_ns / 1000
            measured = float(line["measured_iteration_ms"])
            source = "arXiv 2411.05288, artifact"
            yield Compared(line["case"], "1f1b", "iteration", measured, ours, "ms", "measured", source)
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot read measured times from {str(path)!r}: {error}") from error
