"""Commands that measure kernels, or check them where there is no GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError
from .shared import AsJson, print_json, refuse, say

__all__ = ["compare", "kernels", "resources"]

Filters = Annotated[
    list[str] | None,
    typer.Option("--filter", help="Only cases with this in their name, * for anything; again for more."),
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option("--dtype", help="float32, float16, bfloat16 or all; bfloat16 if left out. Again for more."),
]
KernelFilters = Annotated[
    list[str] | None,
    typer.Option("--filter", help="Only kernels with this in their name, * for anything; again for more."),
]
KernelDtypes = Annotated[
    list[str] | None,
    typer.Option("--dtype", help="float32, float16, bfloat16 or all; all if left out. Again for more."),
]
Threshold = Annotated[float, typer.Option(help="What share of change counts in a comparison.")]


def kernels(
    filter: Filters = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="Name all cases with their sizes; measure nothing.")
    ] = False,
    compare: Annotated[Path | None, typer.Option(help="A kernels.json of before: each case's time over its.")] = None,
    threshold: Threshold = 0.05,
    quick: Annotated[
        bool, typer.Option("--quick", help="Within a minute: first workloads, without compilers as peers.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Find and store the fastest configurations instead of comparing providers.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for JSON, CSV, pictures and a page; none if left out.")
    ] = None,
    dtype: Dtypes = None,
    mode: Annotated[
        list[str] | None,
        typer.Option("--mode", help="forward, or backward (a forward pass with it); both if left out."),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time for all of it, shared over the cases.")] = 8.5,
    as_json: AsJson = False,
) -> int:
    """Measure each kernel beside its peers and the roofline; without a GPU, do what can be done there."""
    _needs_triton()
    from ..kernels.bench import command
    from ..kernels.bench.problem import MODES

    asked = command.Asked(
        filters=tuple(filter or ()),
        dtypes=tuple(dtype or ()),
        modes=tuple(mode or MODES),
        quick=quick,
        minutes=minutes,
        out=out,
        compare=compare,
        threshold=threshold,
    )
    if list_only or tune:
        refuse("it measures nothing" if list_only else "tuning compares configurations", compare=compare)
    if list_only:
        refuse("--list measures nothing", tune=tune, out=out)
    work = command.list_cases if list_only else command.tune if tune else command.kernels
    facts = work(asked, _aside if as_json else say)
    if as_json:
        print_json(facts)
    return 0


def resources(
    filter: KernelFilters = None,
    dtype: KernelDtypes = None,
    architecture: Annotated[int, typer.Option(help="Compute capability as one number, such as 90 or 80.")] = 90,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the table to this CSV file.")] = None,
    against: Annotated[Path | None, typer.Option(help="A table of before; say what changed.")] = None,
    as_json: AsJson = False,
) -> int:
    """Compile every configuration without a GPU and tabulate registers, memory and instructions; 1 if over budget."""
    _needs_triton()
    from ..kernels.bench import command
    from ..kernels.bench.without_gpu import resource_table
    from .shared import DIFFERENT

    speak = _aside if as_json else say
    known = command.known_kernels(speak, tuple(filter or ()))
    dtypes = command.dtypes_called(tuple(dtype or ()))
    facts = resource_table(known, dtypes, output, against, speak, architecture)
    if as_json:
        print_json(facts)
    return DIFFERENT if facts["faults"] or facts["changed"] else 0


def compare(
    before: Annotated[Path, typer.Argument(help="A kernels.json that was measured before.")],
    now: Annotated[Path, typer.Argument(help="Another, measured later.")],
    threshold: Threshold = 0.05,
    as_json: AsJson = False,
) -> int:
    """Compare two files of results: each case's time over what it was."""
    _needs_triton()
    from ..kernels.bench.command import compare_files

    facts = compare_files(before, now, threshold, _aside if as_json else say)
    if as_json:
        print_json(facts)
    return 0


def _needs_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise OptionError("there is no triton here, which makes the kernels", hint="it exists for Linux only")


def _aside(text: str) -> None:
    """Progress, where standard output is for JSON."""
    sys.stderr.write(text + "\n")
