"""Do residences of given lifetimes fit, how high do they end, and how long does each address pass take to say so?

The data are folders of ``.csv`` files with a header ``id,lower,upper,size``: half-open lifetimes and bytes. A number in
the file's name (``A.1048576.csv``) is the capacity; without one it is the bytes of the fullest step, which no placement
can undercut. Without any data, seeded random lifetimes stand in.
"""

from __future__ import annotations

import csv
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from opweave.compiler.graph import Graph, Role, Tensor
from opweave.compiler.pipeline import Budget, run_pass
from opweave.compiler.plan import Load, Plan, Residence
from opweave.errors import ModelError
from opweave.passes.address.packing import Packing
from opweave.passes.address.placement import PlacementError
from opweave.passes.registry import make

from .runner import Options, Row, print_table, run, scratchpad_machine

METHODS = ("address/first_fit", "address/best_fit", "address/exact")
EXACT_LIMIT = 5_000  # residences; beyond it only the constructive methods are asked
SECONDS, QUICK_SECONDS = 60.0, 4.0
QUICK_LIMIT = 2_000  # residences of the largest case that --quick measures


@dataclass(frozen=True)
class Case:
    """Lifetimes to place: ``(lower, upper, bytes)``, and the capacity in bytes if one was given."""

    name: str
    boxes: tuple[tuple[int, int, int], ...]
    capacity: int | None = None


def cases(data: Path | None) -> Iterator[Case]:
    """Every csv file below ``data``, by path; random lifetimes when there is none."""
    if data is None:
        for seed in range(4):
            draw = random.Random(seed)
            starts = [draw.randrange(100) for _ in range(150)]
            yield Case(f"random-{seed}", tuple((s, s + draw.randint(1, 20), draw.randint(1, 64)) for s in starts))
        return
    for path in sorted(data.rglob("*.csv")):
        boxes = _read(path)
        if boxes is not None:
            number = path.suffixes[0].lstrip(".") if len(path.suffixes) > 1 else ""
            yield Case(path.name.partition(".")[0], boxes, int(number) if number.isdigit() else None)


def _read(path: Path) -> tuple[tuple[int, int, int], ...] | None:
    """The boxes of a file; ``None`` if it is about something else. Raises ModelError for a malformed row."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if not {"lower", "upper", "size"} <= set(reader.fieldnames or ()):
            return None
        try:
            rows = [(int(row["lower"]), int(row["upper"]), int(row["size"])) for row in reader]
        except (TypeError, ValueError) as error:
            raise ModelError(f"{path.name}, line {reader.line_num}: {error}") from error
    return tuple(row for row in rows if row[2] > 0 and row[0] < row[1])


def plan_of(case: Case) -> Plan:
    """A plan that loads every box as an input of its own; a load each, by begin, keeps who overlaps whom."""
    boxes = sorted(case.boxes)
    begins = [lower for lower, _, _ in boxes]
    tensors = tuple(Tensor(f"b{i}", (size,), "uint8", Role.INPUT) for i, (_, _, size) in enumerate(boxes))
    ends = _positions(begins, [upper for _, upper, _ in boxes])
    residences = tuple(Residence(f"b{i}", "scratchpad", i, end) for i, end in enumerate(ends))
    loads = tuple(Load(tensor.name) for tensor in tensors)
    total = max(1, sum(size for _, _, size in boxes))
    plan = Plan(Graph(case.name, tensors, (), ()), scratchpad_machine(total), loads, residences)
    capacity = case.capacity or Packing.of(plan, "bench").fullest_step()[0]
    return msgspec.structs.replace(plan, machine=scratchpad_machine(capacity))


def _positions(begins: list[int], uppers: list[int]) -> list[int]:
    """How many boxes have begun before each upper end."""
    result, position = [0] * len(uppers), 0
    for index in sorted(range(len(uppers)), key=uppers.__getitem__):
        while position < len(begins) and begins[position] < uppers[index]:
            position += 1
        result[index] = position
    return result


def measure(options: Options) -> Iterator[Row]:
    """Rows ``fits`` (0 or 1), ``arena`` and ``seconds`` of every method on every case, and a table of them."""
    seconds = QUICK_SECONDS if options.quick else SECONDS
    lines: list[tuple[str | float | None, ...]] = []
    fitting = dict.fromkeys(METHODS, 0)
    count = 0
    for case in cases(options.data):
        if options.quick and len(case.boxes) > QUICK_LIMIT:
            continue
        count += 1
        plan = plan_of(case)
        bound = Packing.of(plan, "bench").fullest_step()[0]
        for method in METHODS if len(case.boxes) <= EXACT_LIMIT else METHODS[:2]:
            fits, arena, taken, note = _place(plan, method, seconds)
            fitting[method] += fits
            yield Row(case.name, method, "fits", float(fits), "bool", note=note)
            yield Row(case.name, method, "arena", float(arena), "bytes", float(bound), note)
            yield Row(case.name, method, "seconds", taken, "s")
            over = f"{arena / bound - 1:+.1%}"
            capacity = plan.machine.scratchpad_memory.capacity_bytes
            lines.append((case.name, len(case.boxes), capacity, method, "yes" if fits else "no", arena, over, taken))
    if not count:
        return
    print_table(("case", "buffers", "capacity", "method", "fits", "arena", "over bound", "seconds"), lines)
    summary = ", ".join(f"{method} {fitting[method]}" for method in METHODS)
    print(f"address: cases that fit, of {count}: {summary}; at most {seconds:g} s each")


def _place(plan: Plan, method: str, seconds: float) -> tuple[bool, int, float, str]:
    """Whether ``method`` placed the plan (verified), the least arena it knows, seconds, and a remark."""
    begin = time.monotonic()
    try:
        placed = run_pass(make(method), plan, Budget.of_seconds(seconds))
    except PlacementError as error:
        return False, error.required_bytes, time.monotonic() - begin, "proven" if error.proven else "not found in time"
    return True, placed.certificates[-1].value, placed.passes[-1].seconds, ""


if __name__ == "__main__":
    sys.exit(run("bench_address", __doc__ or "", measure, default_data=Path(__file__).parents[2] / "shared" / "data"))
