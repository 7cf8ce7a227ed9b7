"""How long does deciding overlap take, and how near to its bound does it end?

Prefill of a 70B-shape model on 8 ranks, as operator graphs (``overlap_models``): one layer, some, and all 80, at 1,024,
4,096 and 16,384 tokens. ``in order`` is the program's one cut into two equal parts and scheduled; ``all`` is the whole
choice: the program as given, put in order, cut at every point that is proposed, the best improved, its bound proven.
Seconds are of the processor (``processor``), which another load does not lengthen, and of the clock (``clock``);
numba's compiled code is loaded before, and made where that was never done (``compile``, once on a machine). Graphs are
made anew for each cut, which is counted. Every plan is verified. Predicted gains are of the model, not measured.

``python -m benchmarks.bench_overlap_solve [--quick] [--json FILE]``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from opweave.compiler.pipeline import Budget
from opweave.hw_models.model import HardwareModel
from opweave.hw_models.registry import load
from opweave.passes.overlap.choice import Alternative, Choice, Overlap
from opweave.passes.overlap.improve import improved
from opweave.passes.overlap.plan import to_plan
from opweave.passes.overlap.points import points

from .overlap_models import LLAMA_70B, prefill_graph
from .runner import Options, Row, print_table, run

MACHINE, RANKS = "8xh100-nvlink", 8
CASES = ((1, 1024), (1, 4096), (1, 16384), (8, 4096), (80, 4096))
QUICK_CASES = ((1, 4096), (80, 4096))
LIBRARY = ("nccl",)
T = TypeVar("T")


@dataclass(frozen=True)
class Solved:
    """One model's decision: processor and clock seconds of all and of one schedule, and what was decided."""

    layers: int
    tokens: int
    choice: Choice
    all_s: tuple[float, float]
    order_s: tuple[float, float]
    tasks: int

    @property
    def case(self) -> str:
        """By which rows are told apart."""
        return f"{self.layers} x {self.tokens}"

    @property
    def gain(self) -> float:
        """Predicted, in percent of the time before."""
        return 100 * (1 - self.choice.schedule.makespan_s / self.choice.before.makespan_s)

    @property
    def gap(self) -> float:
        """Between the schedule and its bound, in percent."""
        return 100 * (1 - self.choice.schedule.bound_s / self.choice.schedule.makespan_s)


def alternative(layers: int, sizes: Sequence[int]) -> Alternative:
    """The model with ``layers`` layers in parts of ``sizes`` tokens."""
    graph, parts = prefill_graph(replace(LLAMA_70B, layers=layers), sizes, RANKS)
    if len(sizes) == 1:
        return Alternative(graph)
    return Alternative(graph, parts, tuple(sizes))


def solved(layers: int, tokens: int, machine: HardwareModel) -> Solved:
    """Decide, timed."""
    program = alternative(layers, (tokens,))
    options = Overlap(algorithms=LIBRARY)
    proposed = list(points(program.graph, tokens, (2, 3, 4), machine))
    choice, all_s = _timed(lambda: options.choose(program, machine, lambda sizes: alternative(layers, sizes), proposed))
    to_plan(choice.alternative.graph, machine, choice.schedule)  # raises where it does not verify
    halves = replace(options, most_operators=0, margin=-1.0).choose(
        program, machine, lambda sizes: alternative(layers, sizes), [proposed[0]], forced=True
    )
    problem = halves.schedule.problem
    budget = Budget.of_seconds(3600.0, deterministic=True)
    _, order_s = _timed(lambda: improved(problem, budget, effort=options.effort))
    return Solved(layers, tokens, choice, all_s, order_s, len(problem.tasks))


def _timed(call: Callable[[], T]) -> tuple[T, tuple[float, float]]:
    begin = time.process_time(), time.monotonic()
    result = call()
    return result, (time.process_time() - begin[0], time.monotonic() - begin[1])


def measure(options: Options) -> Iterator[Row]:
    """Rows of every case, and a table."""
    machine = load(MACHINE)
    begin = time.process_time()
    solved(1, 256, machine)
    yield Row("any", "opweave", "compile", time.process_time() - begin, "s", note="first use in this process")
    lines: list[Sequence[str | float | None]] = []
    for layers, tokens in QUICK_CASES if options.quick else CASES:
        found = solved(layers, tokens, machine)
        schedule = found.choice.schedule
        yield Row(found.case, "opweave", "all processor", found.all_s[0], "s")
        yield Row(found.case, "opweave", "all clock", found.all_s[1], "s")
        yield Row(found.case, "opweave", "in order processor", found.order_s[0], "s", note=f"{found.tasks} tasks")
        yield Row(found.case, "given", "predicted", found.choice.before.makespan_s, "s")
        yield Row(found.case, "opweave", "predicted", schedule.makespan_s, "s", schedule.bound_s, schedule.proved_by)
        sizes = "+".join(map(str, found.choice.alternative.sizes)) or found.choice.reason or "uncut"
        cells = (*found.all_s, found.order_s[0], found.choice.before.makespan_s * 1e3, schedule.makespan_s * 1e3)
        lines.append((found.case, found.tasks, *(round(cell, 3) for cell in cells), round(found.gap, 2), sizes))
    head = ("layers x tokens", "tasks", "all, processor s", "all, clock s", "in order, s", "before ms", "after ms")
    print_table((*head, "gap %", "parts"), lines)
    slowest = max(float(line[2] or 0.0) for line in lines)
    print(f"the slowest decision took {slowest:.1f} s of the processor")


if __name__ == "__main__":
    sys.exit(run("bench_overlap_solve", "How long does deciding overlap take?", measure))
