"""The section of ``bench_pipeline`` in which every schedule that has a name stands beside the others, on one model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from opweave.compiler.pipelining.problem import PipelineProblem, Stage
from opweave.compiler.pipelining.simulate import timed
from opweave.passes.pipeline_parallel.named import NAMES, named, problem_for

from .runner import Options, Row, print_table

__all__ = ["messages", "rows"]

HEAD = ("schedule", "makespan ms", "bubble", "longest span ms", "span bubble", "peak", "least peak", "messages")
_RANKS, _MICROBATCHES = 8, 24
_TIMES, _SEND = (29718, 29444, 19927), 527  # a rank's, in microseconds: the 6.2B model of arXiv 2401.10241
_PARTS = 12  # of a microbatch's activations on a rank, so that chunks have whole numbers of them


def rows(options: Options) -> Iterator[Row]:
    """Prints a table of all named schedules on eight ranks, and yields it in long form."""
    case = f"6.2B model, p {_RANKS}, m {_MICROBATCHES}"
    lines: list[list[str | float | None]] = []
    for name in NAMES:
        if name == "1f1b-vocabulary":  # another model: its output layer is cut
            continue
        problem = _problem(name)
        line = timed(named(name, problem, objective="makespan"))
        peaks = [peak / _PARTS for peak in line.peak_bytes]
        sent = messages(problem)
        bubbles = [f"{line.bubble:.4f}", f"{line.span_bubble:.4f}"]
        times = [line.makespan_ns / 1000, line.span_ns / 1000]
        lines.append([name, times[0], bubbles[0], times[1], bubbles[1], max(peaks), min(peaks), sent])
        yield Row(f"{case}, {name}", "opweave", "makespan", times[0], "ms", note="predicted")
        yield Row(f"{case}, {name}", "opweave", "bubble", round(line.bubble, 4), "fraction", note="predicted")
        yield Row(f"{case}, {name}", "opweave", "longest span", times[1], "ms", note="predicted")
        yield Row(f"{case}, {name}", "opweave", "peak", round(max(peaks), 3), "microbatches of a rank")
        yield Row(f"{case}, {name}", "opweave", "messages", sent, "messages of a microbatch")
    print(f"every named schedule on one model ({case}); peaks in microbatches of a rank, messages of a microbatch:")
    print_table(HEAD, lines)


def messages(problem: PipelineProblem) -> float:
    """How often a microbatch, or its gradient, goes from one rank to another, on average over routes."""
    hops = 0
    for route in problem.routes:
        ranks = [problem.stages[stage].rank for stage in route.stages]
        hops += 2 * route.microbatches * sum(here != there for here, there in itertools.pairwise(ranks))
    return hops / problem.microbatches


def _problem(name: str) -> PipelineProblem:
    """The model over all ranks; a chunk takes its share of a rank's time and bytes."""
    about = NAMES[name]
    chunks = about.chunks or 2
    f, i, w = (round(time / chunks) for time in _TIMES)
    held = _PARTS // chunks
    stage = Stage(0, f, i, w, until_weight_gradient_bytes=held, forward_send_ns=_SEND, backward_send_ns=_SEND)
    limit = _PARTS * _RANKS if name == "zb-greedy" else None  # that of 1F1B; without, it fills any memory
    return problem_for(name, stage, _RANKS, _MICROBATCHES, limit)
