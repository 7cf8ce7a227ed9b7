"""A section of ``bench_pipeline``: where to cut a model with a large vocabulary, beside what was measured.

Vocabulary Parallelism's authors (arXiv 2411.05288) measured F and B of each stage, and iterations, of 1F1B with the
layers divided evenly ("base") and with fewer at the end ("redis"). Their even stages give what a layer, the embedding
and the head take. That is derived, and rests on assumptions: the 32 layers are alike and every stage has 4; within a
layer attention takes ``ATTENTION`` of the time, which only cuts within layers use; I and W take half of B each, which
only split backwards use; a shard of the head takes an eighth of it; sending takes no time. Then everything is
predicted; the times of "redis" and of shards stand beside what was measured for them.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from opweave.compiler.pipeline import Budget
from opweave.compiler.pipelining.placement import placed
from opweave.compiler.pipelining.problem import PipelineProblem
from opweave.compiler.pipelining.simulate import timed
from opweave.errors import ModelError
from opweave.passes.pipeline_parallel.named import named
from opweave.passes.pipeline_parallel.partition import LayerCost, Partition, partition
from opweave.passes.pipeline_parallel.partition_layers import Line
from opweave.passes.pipeline_parallel.vocabulary import OutputLayer, shards_of

from .pipeline_cases import MEASURED_TIMES
from .runner import Options, Row, print_table

__all__ = ["Case", "cases", "rows"]

RANKS, LAYERS = 8, 32
ATTENTION = 0.4  # of a layer's flops at 2048 tokens and width 3072: 8hh + 4sh of 24hh + 4sh
SECONDS = 20.0
HEAD = ("case", "cuts and schedule", "ms", "bound ms", "bubble", "measured ms", "layers by stage", "seconds")
#: Per cent of the peak arithmetic that was reached: base, and shards with one barrier (the artifact's README).
REACHED = {
    "v32k_s2k": (47.52, 52.56),
    "v64k_s2k": (40.82, 52.36),
    "v128k_s2k": (33.70, 51.95),
    "v256k_s2k": (17.29, 51.20),
    "v32k_s4k": (52.82, 58.23),
    "v64k_s4k": (45.78, 57.94),
    "v128k_s4k": (37.13, 57.40),
    "v256k_s4k": (27.63, 56.61),
}


@dataclass(frozen=True)
class Case:
    """F and B in ns of one layer, the embedding and the head, and what was measured, in ms."""

    name: str
    microbatches: int
    layer: tuple[float, float]
    embedding: tuple[float, float]
    head: tuple[float, float]
    redistributed: tuple[int, ...]
    base_ms: float
    redistributed_ms: float

    @property
    def shards_ms(self) -> float:
        """Of shards with one barrier: the base's time by what each reached."""
        base, shards = REACHED[self.name]
        return self.base_ms * base / shards

    @property
    def work_ms(self) -> float:
        """An iteration in which no rank idles."""
        whole = sum(self.embedding) + sum(self.head) + LAYERS * sum(self.layer)
        return whole * self.microbatches / RANKS / 1e6

    def layers(self, *, halves: bool, head: bool = True) -> tuple[LayerCost, ...]:
        """Embedding, layers or their halves, and head; each half holds one byte of activations."""
        parts = (("attention", ATTENTION), ("mlp", 1 - ATTENTION)) if halves else (("layer", 1.0),)
        found = [_cost("embedding", self.embedding, 0, first=True)]
        for index in range(LAYERS):
            for name, part in parts:
                own = self.layer[0] * part, self.layer[1] * part
                found.append(_cost(f"{name} {index}", own, 2 // len(parts)))
        return (*found, *([_cost("head", self.head, 0)] if head else []))


def cases(folder: Path) -> Iterator[Case]:
    """One for each size of vocabulary and sequence. Raises ModelError."""
    path = folder / MEASURED_TIMES
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = {line["case"]: line for line in csv.DictReader(file)}
        for name in REACHED:
            base, redistributed = (lines[f"fullpp_{kind}_dp1_pp8_tp1_{name}"] for kind in ("base", "redis"))
            yield _case(name, base, redistributed)
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot read measured times from {str(path)!r}: {error}") from error


def rows(options: Options) -> Iterator[Row]:
    """Prints a table of cuts, and yields all in long form."""
    if options.data is None:
        print(f"left out: cuts for large vocabularies ({MEASURED_TIMES}); --data DIR says where they are")
        return
    found = list(cases(options.data))
    chosen = [case for case in found if case.name in ("v256k_s2k", "v64k_s2k")] if options.quick else found
    lines = [line for case in chosen for line in _lines(case, SECONDS / 10 if options.quick else SECONDS)]
    print_table(HEAD, [line.cells() for line in lines])
    for line in lines:
        yield from line.rows()


@dataclass(frozen=True)
class _Line:
    case: Case
    what: str
    value_ms: float
    counts: tuple[int, ...] = ()
    bound_ms: float | None = None
    measured_ms: float | None = None
    seconds: float | None = None

    def cells(self) -> list[str | float | None]:
        bubble = f"{1 - self.case.work_ms / self.value_ms:.4f}"
        counts = " ".join(f"{count / 2:g}" for count in self.counts)
        figures = [round(self.value_ms, 1), None if self.bound_ms is None else round(self.bound_ms, 1)]
        measured = None if self.measured_ms is None else round(self.measured_ms, 1)
        return [self.case.name, self.what, *figures, bubble, measured, counts, self.seconds]

    def rows(self) -> Iterator[Row]:
        case = f"{self.case.name}, {self.what}"
        yield Row(case, "opweave", "iteration", round(self.value_ms, 3), "ms", self.bound_ms, note="predicted")
        yield Row(case, "opweave", "bubble", round(1 - self.case.work_ms / self.value_ms, 4), "fraction")
        if self.measured_ms is not None:
            yield Row(
                case, "measured", "iteration", round(self.measured_ms, 1), "ms", note="arXiv 2411.05288, artifact"
            )
        if self.seconds is not None:
            yield Row(case, "opweave", "solve", round(self.seconds, 2), "s")


def _lines(case: Case, seconds: float) -> Iterator[_Line]:
    whole, halves = case.layers(halves=False), case.layers(halves=True)
    limit = 2 * LAYERS  # bytes: what 1F1B holds on rank 0, 8 microbatches of 4 layers
    even = (LAYERS // RANKS,) * RANKS
    for what, counts, measured in (
        ("even, 1f1b", even, case.base_ms),
        ("redistributed, 1f1b", case.redistributed, case.redistributed_ms),
    ):
        line = timed(named("1f1b", _with_counts(case, whole, counts)))
        yield _Line(case, what, line.makespan_ns / 1e6, tuple(2 * count for count in counts), measured_ms=measured)
    for what, layers in (("between layers", whole), ("within layers", halves)):
        answer = partition(layers, RANKS, case.microbatches, Budget.of_seconds(seconds), memory_limit=limit)
        yield _answer(case, what, answer, layers)
    shards = shards_of(
        OutputLayer(*(round(part) for part in (case.head[0], case.head[1] / 2, case.head[1] / 2))), RANKS
    )
    layers = case.layers(halves=True, head=False)
    answer = partition(
        layers, RANKS, case.microbatches, Budget.of_seconds(seconds), memory_limit=limit, vocabulary=shards
    )
    yield _answer(case, "within layers, head in shards", answer, layers, case.shards_ms)


def _answer(
    case: Case, what: str, answer: Partition, layers: Sequence[LayerCost], measured: float | None = None
) -> _Line:
    held = [layer.until_weight_gradient_bytes for layer in layers]
    places = (0, *answer.cuts, len(layers))
    counts = tuple(sum(held[first:end]) for first, end in pairwise(places))
    name = f"{what}, {answer.solution.timed.schedule.method}"
    return _Line(case, name, answer.value / 1e6, counts, answer.bound.value / 1e6, measured, answer.seconds)


def _with_counts(case: Case, layers: tuple[LayerCost, ...], counts: Sequence[int]) -> PipelineProblem:
    cuts = tuple(1 + sum(counts[:stage]) for stage in range(1, len(counts)))
    return Line(layers, placed("loop", RANKS), case.microbatches, name=case.name).problem(cuts)


def _case(name: str, base: dict[str, str], redistributed: dict[str, str]) -> Case:
    forward, backward = ([1000 * int(time) for time in base[f"{way}_us_per_stage"].split()] for way in _WAYS)
    per_stage = LAYERS // RANKS
    layer = tuple(sum(times[1:-1]) / (per_stage * (RANKS - 2)) for times in (forward, backward))
    ends = [
        tuple(max(0.0, times[end] - per_stage * own) for times, own in zip((forward, backward), layer, strict=True))
        for end in (0, -1)
    ]
    counts = [round(1000 * int(time) / layer[0]) for time in redistributed["forward_us_per_stage"].split()[:-1]]
    counts.append(LAYERS - sum(counts))
    times = float(base["measured_iteration_ms"]), float(redistributed["measured_iteration_ms"])
    pairs = [(pair[0], pair[1]) for pair in (layer, *ends)]
    return Case(name, int(base["microbatches"]), pairs[0], pairs[1], pairs[2], tuple(counts), *times)


_WAYS = ("forward", "backward")


def _cost(name: str, times: tuple[float, float], held: int, *, first: bool = False) -> LayerCost:
    backward = round(times[1])
    gradient = 0 if first else backward // 2
    return LayerCost(name, round(times[0]), gradient, backward - gradient, until_weight_gradient_bytes=held)
