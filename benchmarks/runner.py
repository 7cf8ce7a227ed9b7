"""What all benchmarks share: the command line, the long-form rows, where they were measured, and the JSON file.

A benchmark is a module ``bench_<question>.py`` that ends in ``sys.exit(run(...))``. It yields rows; peers, baselines
and bounds are just other providers. It exits with 0 when it measured, whatever the figures, and with 2 when it could
not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opweave.api import read_model
from opweave.compiler.graph import Graph
from opweave.errors import OpweaveError
from opweave.hw_models.model import Engine, EngineKind, HardwareModel, Memory
from opweave.kernels.bench.rows import Row, document, dumped, table, write_whole

__all__ = ["Options", "Row", "operator_graphs", "print_table", "run", "scratchpad_machine"]

SECONDS_UNWRITTEN = 5.0


@dataclass(frozen=True)
class Options:
    """What the command line asked for; ``data`` is ``None`` when neither ``--data`` nor the default folder is there.

    ``json`` is where the rows are written, as they come, beside which a benchmark may lay what it draws. ``own`` has
    the arguments that the benchmark has added.
    """

    quick: bool
    data: Path | None
    json: Path | None = None
    own: argparse.Namespace = field(default_factory=argparse.Namespace)


def run(
    name: str,
    question: str,
    measure: Callable[[Options], Iterable[Row]],
    *,
    default_data: Path | None = None,
    arguments: Sequence[str] | None = None,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Parse the command line, measure, and write the rows where ``--json`` says. Returns the exit status.

    Without ``default_data`` there is no ``--data`` either: the benchmark makes its inputs itself. ``add_arguments``
    adds arguments of the benchmark's own. What a benchmark that is cut off has measured is in the file.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=question)
    parser.add_argument("--quick", action="store_true", help="end within a minute on two cores")
    parser.set_defaults(data=None)
    if default_data is not None:
        parser.add_argument("--data", type=Path, help=f"folder of inputs (default: {default_data} where it exists)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    if add_arguments is not None:
        add_arguments(parser)
    parsed = parser.parse_args(arguments)
    if parsed.data is not None and not parsed.data.is_dir():
        print(f"{name}: {parsed.data} is not a folder", file=sys.stderr)
        return 2
    data = parsed.data or (default_data if default_data is not None and default_data.is_dir() else None)
    kept = _Kept(name, parsed.json)
    try:
        for row in measure(Options(parsed.quick, data, parsed.json, parsed)):
            kept.add(row)
    except OpweaveError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    finally:
        kept.write()
    if not kept.rows:
        print(f"{name}: nothing to measure{'' if data is None else f' in {data}'}", file=sys.stderr)
        return 2
    return 0


class _Kept:
    """Rows, written to a file at most every few seconds and at the end."""

    def __init__(self, name: str, path: Path | None) -> None:
        self.rows: list[Row] = []
        self._path = path
        self._head = document(name) if path is not None else {}
        self._written = time.monotonic()

    def add(self, row: Row) -> None:
        """Keep one more."""
        self.rows.append(row)
        if time.monotonic() - self._written > SECONDS_UNWRITTEN:
            self.write()

    def write(self) -> None:
        """Write them all, if there are any and a file was asked for."""
        if self._path is None or not self.rows:
            return
        write_whole(self._path, dumped(self._head, self.rows))
        self._written = time.monotonic()


def scratchpad_machine(capacity_bytes: int) -> HardwareModel:
    """A machine of which only the scratchpad's capacity matters; regions may start at any byte."""
    return HardwareModel(
        name="benchmark",
        description="a scratchpad whose capacity is the budget",
        sources=(),
        scratchpad="scratchpad",
        backing="dram",
        memories=(Memory("scratchpad", capacity_bytes, 1, 1e12), Memory("dram", 1 << 50, 1, 1e10)),
        engines=(
            Engine("compute", EngineKind.COMPUTE, flops_per_s={"default": 1e12}),
            Engine("dma", EngineKind.COPY, bandwidth_bytes_per_s=1e10),
        ),
    )


def operator_graphs(options: Options) -> Iterator[tuple[str, Graph]]:
    """The operator graphs (``*.json``) in the folder asked for, by name; without one, a network made here."""
    if options.data is None:
        from .networks import darts_cifar  # onnx, which some benchmarks do not need

        print("no folder of networks: measuring one made here; --data DIR names a folder")
        yield "darts_cifar", read_model(darts_cifar())[0].graph
        return
    for path in sorted(options.data.glob("*.json")):
        yield path.stem, read_model(path)[0].graph


def print_table(head: Sequence[str], lines: Sequence[Sequence[str | float | None]]) -> None:
    """Print ``lines`` under ``head``: numbers to the right, everything else to the left, ``None`` as a dash."""
    print(table(head, lines))
