"""What each configuration needs of an H100: within its budget, and as the committed table says.

The table is made anew by ``opweave bench resources --dtype all --output benchmarks/results/sm_90a/resources.csv`` with
the pinned triton. In the gate one row of each kernel is compiled; all
of them are in the slow lane, and on the oldest and the newest Triton besides.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

import torch
import triton

from opweave.errors import OptionError
from opweave.kernels import registry
from opweave.kernels.bench.offline import compiled_for
from opweave.kernels.bench.resources import (
    Entry,
    difference,
    entries,
    faults,
    occupancy,
    read_entries,
    sizes_for,
    written,
)
from opweave.kernels.bench.without_gpu import resource_table
from tests.kernels.conforming import cases_of
from tests.kernels.test_kernels import NAMES

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "results" / "sm_90a" / "resources.csv"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OTHER_TRITONS = ("3.6.0", "3.9.0")


@functools.cache
def committed() -> tuple[Entry, ...]:
    return tuple(read_entries(TABLE))


def same_triton() -> None:
    stated = {entry.triton for entry in committed()}
    if stated != {triton.__version__}:
        pytest.skip(f"the table is of triton {', '.join(sorted(stated))}; this is {triton.__version__}")


def test_the_committed_table_is_within_budget() -> None:
    assert [fault for entry in committed() for fault in faults(entry)] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_table_has_every_row(name: str) -> None:
    """Every row that some sizes reach, in every dtype; needs no compiler."""
    kernel = registry.load(name)
    rows = range(len(kernel.configs.of_architecture(90)))
    wanted = {
        (number, str(dtype).removeprefix("torch."))
        for dtype in kernel.dtypes
        for number in rows
        if sizes_for(kernel, number, dtype, 90) is not None
    }
    assert {number for number, _ in wanted} == set(rows), "a row that no size of a workload reaches"
    assert {(entry.row, entry.dtype) for entry in committed() if entry.kernel == name} == wanted


def check(name: str, dtype: torch.dtype, architecture: int, rows: list[int] | None = None) -> list[Entry]:
    found = list(entries(registry.load(name), dtype, architecture, rows))
    assert [fault for entry in found for fault in faults(entry)] == []
    return found


@pytest.mark.parametrize("place", range(len(NAMES)), ids=NAMES)
def test_a_row_of_each_kernel_needs_what_the_table_says(place: int) -> None:
    """Another row of each kernel, so that small and large ones, early and late ones are among them."""
    kernel = registry.load(NAMES[place])
    dtype = torch.bfloat16 if torch.bfloat16 in kernel.dtypes else kernel.dtypes[0]
    reached = [n for n in range(len(kernel.configs.of_architecture(90))) if sizes_for(kernel, n, dtype, 90) is not None]
    found = check(NAMES[place], dtype, 90, [reached[place % len(reached)]])
    assert found
    same_triton()
    assert difference(committed(), found) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_row_needs_what_the_table_says(name: str, dtype: torch.dtype) -> None:
    if dtype not in registry.load(name).dtypes:
        pytest.skip(f"{name} does not know {dtype}")
    found = check(name, dtype, 90)
    same_triton()
    assert difference(committed(), found) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_row_for_older_gpus_fits_the_smallest_of_them(name: str, dtype: torch.dtype) -> None:
    """What is chosen on sm_80 has to run on sm_86 and sm_89 as well, which have less shared memory."""
    if dtype not in registry.load(name).dtypes:
        pytest.skip(f"{name} does not know {dtype}")
    check(name, dtype, 80)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_case_compiles(name: str, dtype: torch.dtype) -> None:
    """The interpreter lets pass what the compiler does not, such as a name that changes its type in a loop."""
    cases = cases_of(name)
    for case in cases.cases:
        if dtype in (case.dtypes or cases.kernel.dtypes):
            inputs = case.change(cases.kernel.arguments(dtype, "cpu", **case.sizes))
            compiled_for(cases.kernel, inputs, case.config)


@pytest.mark.slow
@pytest.mark.parametrize("version", OTHER_TRITONS)
def test_every_row_compiles_on_other_tritons(version: str, tmp_path: Path) -> None:
    """In a folder of its own, beside the torch that is here; skipped where no index of wheels is reachable."""
    if version == triton.__version__:
        pytest.skip("that is the one all other tests use")
    folder = tmp_path / "triton"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    try:
        done = subprocess.run(
            [*install, f"triton=={version}"], capture_output=True, text=True, timeout=600, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip("pip found no index of wheels in ten minutes")
    if done.returncode:
        pytest.skip(f"pip cannot install triton {version}: {done.stderr.strip().splitlines()[-1][:200]}")
    command = [sys.executable, "-m", "opweave.cli", "bench", "resources", "--dtype", "bfloat16"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


ENTRY = Entry(
    *("a", 90, 0, "bfloat16", 0, "a_kernel", 8, 3, "block=64"),
    *(128, 0, 0, 1024, 2, 16, 0, occupancy(128, 8, 1024)),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spills": 2}, "2 spills and 0 bytes of stack"),
        ({"stack_bytes": 8}, "0 spills and 8 bytes of stack"),
        ({"shared_bytes": 232_449}, "232449 bytes of shared memory, more than 232448"),
        ({"shared_bytes": 101_377, "architecture": 80}, "more than 101376"),
        ({"num_warps": 16, "registers": 129}, "129 registers in 16 warps, more than 65536"),
        ({"tensor_core": 0}, "matrix products without tensor cores"),
    ],
    ids=str,
)
def test_what_is_over_budget_is_said(changes: dict[str, Any], message: str) -> None:
    assert faults(ENTRY) == []
    (fault,) = faults(replace(ENTRY, **changes))
    assert message in fault


def test_products_of_float32_need_no_tensor_cores() -> None:
    assert faults(replace(ENTRY, dtype="float32", tensor_core=0)) == []


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    other = replace(ENTRY, row=1, registers=40)
    (tmp_path / "table.csv").write_text(written([other, ENTRY]))
    found = read_entries(tmp_path / "table.csv")
    assert found == [ENTRY, other]
    assert difference(found, [other]) == []
    assert difference(found, [replace(other, registers=41, programs=3)]) == [
        "a sm_90 row 1 bfloat16 launch 0: registers 40 -> 41",
        f"a sm_90 row 1 bfloat16 launch 0: programs {other.programs} -> 3",
    ]
    assert difference([], [ENTRY]) == ["a sm_90 row 0 bfloat16 launch 0: is new"]


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    for text in ("", "something else\n", "kernel,row\na,0\n", ",".join(vars(ENTRY)) + "\na,x\n"):
        (tmp_path / "table.csv").write_text(text)
        with pytest.raises(OptionError, match="is no resource table"):
            read_entries(tmp_path / "table.csv")
    with pytest.raises(OptionError, match="cannot read the resource table"):
        read_entries(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("registers", "num_warps", "shared_bytes", "programs"),
    [
        (32, 4, 0, 16),  # warps
        (128, 8, 0, 2),  # registers
        (168, 4, 0, 3),
        (40, 1, 0, 32),  # programs
        (32, 4, 100_000, 2),  # shared memory
        (255, 8, 0, 1),
    ],
)
def test_occupancy(registers: int, num_warps: int, shared_bytes: int, programs: int) -> None:
    assert occupancy(registers, num_warps, shared_bytes) == programs


def test_a_table_keeps_what_it_says_of_other_kernels(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    other, gone = replace(ENTRY, kernel="add_rms_norm", dtype="float16"), replace(ENTRY, kernel="no_such_kernel")
    path.write_text(written([other, gone, replace(ENTRY, kernel="add_rms_norm", registers=1)]))
    kernel = registry.load("add_rms_norm")
    facts = resource_table((kernel,), (torch.bfloat16,), path, path, lambda line: None)
    found = read_entries(path)
    assert other in found
    assert {entry.kernel for entry in found} == {"add_rms_norm"}
    rows = len(kernel.configs.of_architecture(90))
    assert [entry.row for entry in found if entry.dtype == "bfloat16"] == list(range(rows))
    assert any("registers 1 ->" in line for line in facts["changed"])
    assert not facts["faults"]
