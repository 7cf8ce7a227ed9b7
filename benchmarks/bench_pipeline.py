"""Are published figures of pipeline schedules right here, and are our schedules better than the published ones?

First **what others have published**, beside what our generators of their schedules take in our simulator: bubble rates
of Zero Bubble (both tables), of ZB-V, V-Half and V-Min, of PyTorch's own schedules, Chimera's formula, and the
iteration times that Vocabulary Parallelism's authors measured. All are predicted: stage times are given, nothing is
fitted. Next, **every named schedule** on one model: makespan, span, peaks, messages. Then, row by row, **ours against
the best published** one under the same memory limit, with bound and seconds. Last, **where to cut** a model with a
large vocabulary, beside what was measured.

``python -m benchmarks.bench_pipeline [--quick] [--data DIR] [--json FILE]``. The measured times are in
``vocab_stage_times.csv`` of DIR (case, microbatches, microseconds of F and B of each stage, measured milliseconds);
without it those rows are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .pipeline_cuts import rows as cuts
from .pipeline_ours import rows as ours
from .pipeline_published import rows as published
from .pipeline_scores import rows as scores
from .runner import Options, Row, run

__all__ = ["QUESTION", "SECTIONS", "add_arguments", "measure"]

QUESTION = "Are published figures of pipeline schedules right here, and are our schedules better?"

#: Each prints its tables and yields its rows.
SECTIONS: tuple[Callable[[Options], Iterable[Row]], ...] = (published, scores, ours, cuts)


def measure(options: Options) -> Iterator[Row]:
    """Section by section."""
    for section in SECTIONS:
        yield from section(options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where measured times are."""
    parser.add_argument("--data", type=Path, help="folder with vocab_stage_times.csv; without it nothing is looked for")


if __name__ == "__main__":
    sys.exit(run("bench_pipeline", QUESTION, measure, add_arguments=add_arguments))
