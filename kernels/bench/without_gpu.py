"""What the bench does on a machine without a GPU: resource table and interpreter check."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .._checks import dtype_name
from .._kernel import Kernel
from ..registry import names
from .interpreted import checked
from .problem import Case
from .resources import Entry, difference, entries, faults, read_entries, written
from .rows import make_folder, table, write_whole

__all__ = ["Say", "resource_table", "without_gpu"]

Say = Callable[[str], None]
TABLE = "resources.csv"


def without_gpu(cases: Sequence[Case], seconds: float, out: Path | None, say: Say) -> dict[str, Any]:
    """The resource table and the interpreter's check of the kernels of ``cases``, within the time.

    With ``out``, a folder, the table is on the disk after every kernel.

    Raises:
        OptionError: the folder cannot be written.
    """
    if out is not None:
        make_folder(out)  # before time is spent on what cannot be written
    say("There is no CUDA device here, so nothing is timed. What can be done without one:")
    say("1. compile every configuration for sm_90a and read what the machine code needs;")
    say("2. run every kernel under Triton's interpreter at small sizes, against its reference.")
    until = time.monotonic() + seconds
    kernels = list({case.kernel.name: case.kernel for case in cases}.values())
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    left_out: list[str] = []
    facts: dict[str, Any] = {"device": None, "faults": [], "resources": [], "checks": [], "left_out": left_out}
    for kernel in kernels:
        if time.monotonic() > until:
            left_out.append(kernel.name)
            continue
        table_facts = resource_table((kernel,), dtypes, None, None, say)
        facts["resources"] += table_facts["resources"]
        facts["faults"] += table_facts["faults"]
        for check in checked((kernel.name,), dtypes):
            error = "did not run" if check.error is None else f"off by {check.error:.1e} of the largest"
            verdict = "right" if check.passed else "WRONG"
            say(f"interpreter: {check.kernel} {check.dtype}: {verdict}, {error} {check.note}".rstrip())
            facts["checks"].append({**vars(check), "passed": check.passed})
        _write(out, facts["resources"])
    if left_out:
        say(f"no time was left for {', '.join(left_out)}")
    wrong = [check for check in facts["checks"] if not check["passed"]]
    say(
        f"{len(facts['resources'])} functions compiled, {len(facts['faults'])} over budget; "
        f"{len(facts['checks'])} checks, {len(wrong)} failed"
    )
    if out is not None:
        say(f"written: {out / TABLE}")
    return facts


def _write(out: Path | None, resources: Sequence[dict[str, Any]]) -> None:
    if out is not None:
        write_whole(out / TABLE, written(Entry(**entry) for entry in resources))


def resource_table(
    kernels: Sequence[Kernel],
    dtypes: Sequence[torch.dtype],
    output: Path | None,
    against: Path | None,
    say: Say,
    architecture: int = 90,
) -> dict[str, Any]:
    """Compile all configurations of kernels in ``dtypes``, or in all they know; say what they need.

    ``output`` is a table to write; what one that is there says of other kernels and dtypes stays in it.

    Raises:
        OptionError: a table cannot be read or written.
    """
    before = read_entries(against) if against is not None else []
    if output is not None:
        make_folder(output.parent)
    found: list[Entry] = []
    failed: list[str] = []
    for kernel in kernels:
        for dtype in dtypes or kernel.dtypes:
            if dtype not in kernel.dtypes:
                continue
            try:
                found += entries(kernel, dtype, architecture)
            except Exception as error:  # whatever Triton raises where it cannot compile
                text = str(error).strip().splitlines() or [""]
                failed.append(f"{kernel.name} {dtype_name(dtype)}: {type(error).__name__}: {text[0][:160]}")
    head = ("kernel", "row", "dtype", "function", "warps", "registers", "spills", "shared", "tensor core", "programs")
    lines: list[list[str | float | None]] = [
        [
            *(e.kernel, e.row, e.dtype, e.function, e.num_warps, e.registers, e.spills, e.shared_bytes),
            *(e.tensor_core, e.programs),
        ]
        for e in found
    ]
    say(table(head, lines))
    wrong = [*failed, *(fault for entry in found for fault in faults(entry))]
    changed = difference(before, found) if against is not None else []
    for line in (*wrong, *changed):
        say(line)
    if output is not None:
        made = {(kernel.name, dtype_name(dtype)) for kernel in kernels for dtype in dtypes or kernel.dtypes}
        others = read_entries(output) if output.exists() else []
        kept = [entry for entry in others if (entry.kernel, entry.dtype) not in made and entry.kernel in names()]
        write_whole(output, written([*kept, *found]))
        say(f"written: {output}")
    return {"resources": [vars(entry) for entry in found], "faults": wrong, "changed": changed}
