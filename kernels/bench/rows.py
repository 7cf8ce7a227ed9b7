"""Figures in long form, with where they were measured: what all benchmarks write and compare.

Peers, baselines and bounds are just other providers of a figure. A file reads ``{"benchmark", "commit", "machine",
"versions", "rows": [{"case", "provider", "metric", "value", "unit", "bound", "note"}, ...]}``.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...errors import OptionError

__all__ = ["Row", "document", "dumped", "make_folder", "read_rows", "table", "write_csv", "write_whole"]

PACKAGES = (
    *("opweave", "pulp", "highspy", "ortools", "numba", "torch", "triton", "transformers", "onnx", "numpy"),
    "liger-kernel",
)


@dataclass(frozen=True)
class Row:
    """One figure: ``case`` measured by ``provider``; ``bound`` is the proven limit of ``value``, in the same unit."""

    case: str
    provider: str
    metric: str
    value: float | None
    unit: str
    bound: float | None = None
    note: str = ""


def document(name: str) -> dict[str, object]:
    """All of a file but its rows."""
    machine = {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system(), **_accelerator()}
    return {
        "benchmark": name,
        "commit": _commit(),
        "machine": machine,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def make_folder(path: Path) -> None:
    """Make a folder for results. Raises OptionError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"cannot write results to {str(path)!r}: {error.strerror}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever reads it, or stops us, finds the old one or the new one.

    Raises:
        OptionError: it cannot be written.
    """
    make_folder(path.parent)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise OptionError(f"cannot write {str(path)!r}: {error.strerror}") from error


def write_csv(path: Path, names: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """A table for spreadsheets; ``None`` is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(lines)
    write_whole(path, text.getvalue())


def read_rows(path: Path) -> tuple[dict[str, Any], tuple[Row, ...]]:
    """What a file says of itself, and its rows.

    Raises:
        OptionError: the file cannot be read, or is no such file.
    """
    known = {field.name for field in fields(Row)}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
            raise ValueError("it has no list of rows")
        rows = tuple(Row(**{name: value for name, value in row.items() if name in known}) for row in content["rows"])
        if not all(isinstance(row.value, int | float | None) for row in rows):
            raise ValueError("a value is no number")
        if not isinstance(content.get("machine", {}), dict):
            raise ValueError("its machine is no object")
    except OSError as error:
        raise OptionError(f"cannot read the results {str(path)!r}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise OptionError(f"{str(path)!r} holds no results of a benchmark: {error}") from error
    return {name: value for name, value in content.items() if name != "rows"}, rows


def dumped(head: Mapping[str, object], rows: Iterable[Row]) -> str:
    """A file's text."""
    return json.dumps({**head, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"


def table(head: Sequence[str], lines: Sequence[Sequence[str | float | None]]) -> str:
    """``lines`` under ``head``: numbers to the right, everything else to the left, ``None`` as a dash."""
    cells = [[_shown(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    text = ["  ".join(title.ljust(width) for title, width in zip(head, widths, strict=True)).rstrip()]
    for line, texts in zip(lines, cells, strict=True):
        columns = zip(line, texts, widths, strict=True)
        text.append("  ".join(t.ljust(w) if isinstance(cell, str) else t.rjust(w) for cell, t, w in columns).rstrip())
    return "\n".join(text)


def _shown(cell: str | float | None) -> str:
    if cell is None:
        return "-"
    return f"{cell:,.2f}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else cell


def _accelerator() -> dict[str, str]:
    """The first GPU and its driver, where there is one."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"accelerator": done.stdout.splitlines()[0]} if done.returncode == 0 and done.stdout else {}


def _commit() -> str:
    """The commit of the checkout that this lies in, marked when files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
