"""What every shipped configuration needs of an H100, read off its machine code without one: a table that is diffed.

Each row of a kernel's configurations is compiled through the kernel's own launcher, at sizes for which the launcher
takes it. ``dots`` are matrix products in Triton's intermediate code, which have to become
tensor-core instructions unless their operands are float32. ``programs`` is how many fit on one multiprocessor.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton

from ...errors import OptionError
from .._checks import dtype_name
from .._configs import HOPPER, Config
from .._kernel import Kernel
from .offline import choice, compiled, resources

__all__ = ["BUDGET", "Entry", "difference", "entries", "faults", "read_entries", "sizes_for", "written"]

#: Bytes of shared memory that one program may have. Rows for sm_80 keep to what consumer GPUs have, sm_86 and sm_89.
BUDGET: Mapping[int, int] = {80: 101_376, 90: 232_448}
REGISTERS, SHARED_BYTES, WARPS, PROGRAMS = 65_536, 233_472, 64, 32  # of one multiprocessor of sm_90
SYSTEM_SHARED_BYTES = 1024  # what CUDA takes for itself of each program


@dataclass(frozen=True)
class Entry:
    """One function of one launch, compiled for ``architecture`` by one row of a kernel's configurations."""

    kernel: str
    architecture: int
    row: int
    dtype: str
    launch: int
    function: str
    num_warps: int
    num_stages: int
    constants: str
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    dots: int
    tensor_core: int
    bulk_copies: int
    programs: int
    triton: str = triton.__version__

    @property
    def place(self) -> tuple[str, int, int, str, int]:
        """What it is an entry for."""
        return self.kernel, self.architecture, self.row, self.dtype, self.launch


def sizes_for(kernel: Kernel, number: int, dtype: torch.dtype, architecture: int) -> Mapping[str, Any] | None:
    """Sizes at which a launch takes this row: a workload's, or those with what the row bounds made small enough.

    Sizes for which the row at least holds, where others come before it; ``None`` if it holds for none, as a row for
    narrow dtypes does not hold for wide ones.
    """
    row = kernel.configs.of_architecture(architecture)[number]
    fallback: Mapping[str, Any] | None = None
    for sizes in _candidates(kernel, row):
        try:
            found = choice(kernel, sizes, dtype, architecture)
        except Exception:  # whatever a kernel says of sizes that do not go together
            continue
        if found is None or found.config is row:
            return sizes
        if fallback is None and row.holds_for(found.sizes):
            fallback = sizes
    return fallback


def _candidates(kernel: Kernel, row: Config) -> Iterator[Mapping[str, Any]]:
    """Workloads; then with every size that a row bounds; then with any one size as small as a bound of another name."""
    for workload in kernel.workloads:
        yield workload.sizes
    for workload in kernel.workloads:
        sizes = dict(workload.sizes)
        for name, bound in row.up_to.items():
            if isinstance(sizes.get(name), int):
                sizes[name] = min(sizes[name], bound)
        yield sizes
    for workload in kernel.workloads:
        for bound in row.up_to.values():
            for name, size in workload.sizes.items():
                if isinstance(size, int) and not isinstance(size, bool) and size > bound > 0:
                    yield {**workload.sizes, name: bound}


def entries(
    kernel: Kernel, dtype: torch.dtype, architecture: int = HOPPER, rows: Iterable[int] | None = None
) -> Iterator[Entry]:
    """Compile the kernel's rows for an architecture, those numbered ``rows`` or all, that hold for ``dtype``."""
    everything = kernel.configs.of_architecture(architecture)
    for number in range(len(everything)) if rows is None else rows:
        sizes = sizes_for(kernel, number, dtype, architecture)
        if sizes is not None:
            for launch, made in enumerate(compiled(kernel, sizes, dtype, everything[number], architecture)):
                yield _entry(kernel, architecture, number, dtype, launch, everything[number], made)


def _entry(
    kernel: Kernel, architecture: int, number: int, dtype: torch.dtype, launch: int, row: Config, made: Any
) -> Entry:
    used = resources(made)
    warps = int(made.metadata.num_warps)
    return Entry(
        kernel.name,
        architecture,
        number,
        dtype_name(dtype),
        launch,
        used.function,
        warps,
        int(made.metadata.num_stages),
        " ".join(f"{name}={value}" for name, value in row.constants.items()),
        used.registers,
        used.stack_bytes,
        used.spills,
        used.shared_bytes,
        str(made.asm["ttir"]).count("tt.dot"),
        used.tensor_core,
        used.bulk_copies,
        occupancy(used.registers, warps, used.shared_bytes),
    )


def occupancy(registers: int, num_warps: int, shared_bytes: int) -> int:
    """Programs that one multiprocessor of sm_90 can hold at a time."""
    by_registers = REGISTERS // (-(-max(registers, 1) // 8) * 8 * 32 * num_warps)
    by_memory = SHARED_BYTES // (shared_bytes + SYSTEM_SHARED_BYTES)
    return min(by_registers, by_memory, WARPS // num_warps, PROGRAMS)


def faults(entry: Entry) -> list[str]:
    """What is wrong with it; nothing may be."""
    found = []
    if entry.spills or entry.stack_bytes:
        found.append(f"{entry.spills} spills and {entry.stack_bytes} bytes of stack")
    limit = BUDGET.get(entry.architecture, BUDGET[80])
    if entry.shared_bytes > limit:
        found.append(f"{entry.shared_bytes} bytes of shared memory, more than {limit}")
    if entry.registers * 32 * entry.num_warps > REGISTERS:
        found.append(f"{entry.registers} registers in {entry.num_warps} warps, more than {REGISTERS} in all")
    if entry.dots and not entry.tensor_core and entry.dtype != "float32":
        found.append("matrix products without tensor cores")
    where = f"{entry.kernel} sm_{entry.architecture} row {entry.row} {entry.dtype} {entry.function}"
    return [f"{where}: {fault}" for fault in found]


_NAMES = tuple(field.name for field in fields(Entry))
_TYPES = {field.name: int if field.type == "int" else str for field in fields(Entry)}


def written(found: Iterable[Entry]) -> str:
    """The table as CSV, sorted."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_NAMES)
    writer.writerows(astuple(entry) for entry in sorted(found, key=lambda entry: entry.place))
    return text.getvalue()


def read_entries(path: Path) -> list[Entry]:
    """A table that was written. Raises OptionError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            lines = list(reader)
        if missing := sorted(set(_NAMES).difference(reader.fieldnames or ())):
            raise ValueError(f"it has no column {', '.join(missing)}")
        facts: list[dict[str, Any]] = [{name: _TYPES[name](line[name]) for name in _NAMES} for line in lines]
        return [Entry(**fact) for fact in facts]
    except OSError as error:
        raise OptionError(f"cannot read the resource table {str(path)!r}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(f"{str(path)!r} is no resource table: {error}") from error


def difference(before: Iterable[Entry], now: Sequence[Entry]) -> list[str]:
    """How entries differ from those that stand for the same in an older table; old ones without a new one are not."""
    known = {entry.place: entry for entry in before}
    found = []
    for entry in now:
        old = known.get(entry.place)
        where = f"{entry.kernel} sm_{entry.architecture} row {entry.row} {entry.dtype} launch {entry.launch}"
        if old is None:
            found.append(f"{where}: is new")
            continue
        changed = [n for n in _NAMES if getattr(old, n) != getattr(entry, n)]
        found += [f"{where}: {name} {getattr(old, name)} -> {getattr(entry, name)}" for name in changed]
    return found
