"""What ``opweave bench`` does: measure or tune on a GPU, or what can be done without one; list and compare."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import msgspec
import torch

from ...errors import ExecutionError, OptionError
from .. import registry
from .._checks import dtype_name
from .._kernel import Kernel
from ..tuning import TunedResult, results_file, store
from .figures import Comparison, compared, comparison_table, lines_of, lines_table
from .files import Results
from .problem import FORWARD, MODES, Case, cases, dtype_called
from .rows import Row, read_rows, table
from .without_gpu import Say, without_gpu
from .worker import COMMAND, supervised

__all__ = ["Asked", "compare_files", "dtypes_called", "kernels", "known_kernels", "list_cases", "tune"]

FINISHING_S = 15.0  # pictures, the page, and what a case runs over
QUICK_S = 50.0
MOST_COMPILERS = 24  # each holds its own PyTorch: a server of 200 cores has no memory for as many


@dataclass(frozen=True)
class Asked:
    """What the command line asked for."""

    filters: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    quick: bool = False
    minutes: float = 8.5
    out: Path | None = None
    compare: Path | None = None
    threshold: float = 0.05

    def cases(self, say: Say) -> list[Case]:
        """The cases. Raises OptionError if there are none."""
        dtypes = dtypes_called(self.dtypes)
        for mode in self.modes:
            if mode not in MODES:
                raise OptionError(f"--mode is {mode!r}; expected {' or '.join(MODES)}")
        if not self.minutes > 0:
            raise OptionError(f"--minutes is {self.minutes:g}; expected a number above 0")
        found = cases(known_kernels(say), dtypes, self.modes, self.filters, first_only=self.quick)
        if not found:
            raise OptionError(
                f"no case fits {' or '.join(map(repr, self.filters)) or 'these options'}",
                hint="opweave bench kernels --list names all cases",
            )
        return found

    @property
    def seconds(self) -> float:
        """Time to measure in."""
        return min(QUICK_S, 60 * self.minutes) if self.quick else max(60 * self.minutes - FINISHING_S, 5.0)


def known_kernels(say: Say, words: Sequence[str] = ()) -> list[Kernel]:
    """All kernels whose names have one of ``words``; one of another package that cannot be loaded is said.

    Raises:
        OptionError: no name has one of them.
    """
    found = []
    for name in registry.names():
        if not words or any(fnmatch(name, f"*{word}*") for word in words):
            try:
                found.append(registry.load(name))
            except OptionError as error:
                say(f"left out: {error}")
    if not found:
        hint = f"the kernels are {', '.join(registry.names())}"
        raise OptionError(f"no kernel fits {' or '.join(map(repr, words)) or 'these options'}", hint=hint)
    return found


def dtypes_called(names: Sequence[str]) -> tuple[torch.dtype, ...]:
    """The dtypes of those names, ``all`` being the three that most kernels know. Raises OptionError."""
    if "all" in names:
        return (torch.bfloat16, torch.float16, torch.float32)
    return tuple(dict.fromkeys(dtype_called(name) for name in names))


def list_cases(asked: Asked, say: Say) -> dict[str, Any]:
    """Every case with its sizes and what a launch does. Measures nothing."""
    found = asked.cases(say)
    facts = [
        {"case": c.name, "sizes": dict(c.workload.sizes), "flops": c.cost.flops, "traffic_bytes": c.cost.traffic_bytes}
        for c in found
    ]
    lines: list[list[str | float | None]] = [
        [
            c.name,
            " ".join(f"{k}={v}" for k, v in c.workload.sizes.items()),
            c.cost.flops / 1e9,
            c.cost.traffic_bytes / 1e6,
        ]
        for c in found
    ]
    say(table(("case", "sizes", "Gflop", "MB"), lines))
    say(f"{len(found)} cases of {len({c.kernel.name for c in found})} kernels")
    return {"cases": facts}


def kernels(asked: Asked, say: Say, command: Sequence[str] = COMMAND) -> dict[str, Any]:
    """Measure all cases, or check what can be checked where there is no GPU.

    Raises:
        OptionError: nothing fits what was asked for, or a file of results cannot be read or written.
        ExecutionError: there is a GPU, and nothing could be measured on it.
    """
    found = asked.cases(say)
    old = read_rows(asked.compare)[1] if asked.compare is not None else ()
    if not torch.cuda.is_available():
        if asked.compare is not None:
            say(f"Nothing is compared with {asked.compare}, which has times.")
        return without_gpu(found, asked.seconds, asked.out, say)
    results = Results(asked.out)
    lost = _measure(asked, found, results, say, command)
    comparisons = compared(old, results.rows, asked.threshold) if asked.compare is not None else []
    if comparisons:
        say("\n" + comparison_table(comparisons))
    written = results.finish(comparisons)
    _summarize(results, lost, say)
    if written:
        say(f"written: {', '.join(str(path) for path in written[:3])} and {len(written) - 3} pictures")
    if not any(line["ms"] for line in lines_of(results.rows)):
        raise ExecutionError(f"nothing could be measured: {next(iter(lost.values()), 'no time was left')}")
    return _document(results, lost, comparisons)


def _document(results: Results, lost: dict[str, str], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    return {
        **results.head,
        "rows": [vars(row) for row in results.rows],
        "left_out": results.left_out,
        "lost": lost,
        "comparison": [{**vars(c), "ratio": c.ratio, "verdict": c.verdict} for c in comparisons],
    }


def _requests(found: Sequence[Case]) -> list[dict[str, str]]:
    return [
        {
            **{"name": case.name, "kernel": case.kernel.name, "workload": case.workload.name},
            **{"dtype": dtype_name(case.dtype), "mode": case.mode},
        }
        for case in found
    ]


def _measure(asked: Asked, found: Sequence[Case], results: Results, say: Say, command: Sequence[str]) -> dict[str, str]:
    """Let workers measure, keep and show what they answer. Returns what was lost on the way, by case."""
    lost: dict[str, str] = {}
    requests = _requests(found)
    with _compiling_ahead([r for r in requests if r["mode"] == FORWARD], command):
        try:
            tiers = 0 if asked.quick else 2
            for number, answer in enumerate(
                supervised("measure", requests, asked.seconds, command=command, tiers=tiers)
            ):
                if answer.lost:
                    lost[answer.case or "the device"] = answer.lost
                    results.add([Row(answer.case, "opweave", "time", None, "ms", note=f"LOST: {answer.lost}")])
                results.leave_out(answer.case, answer.left_out)
                results.add(answer.rows)
                _show(answer.case, answer.rows, f"{number}/{len(found)}", answer.lost, say)
        except KeyboardInterrupt:
            say("interrupted: what has been measured is kept")
    return lost


def _show(case: str, rows: Sequence[Row], place: str, lost: str, say: Say) -> None:
    if not case:
        for row in rows:
            stated = f" (data sheet: {row.bound:,.0f})" if row.bound else ""
            say(f"{row.provider}: {row.value:,.0f} {row.unit}{stated}")
    elif lost:
        say(f"\n[{place}] {case}\nLOST: {lost}")
    elif rows:
        say(f"\n[{place}] {case}\n{lines_table(lines_of(rows))}")


def _summarize(results: Results, lost: dict[str, str], say: Say) -> None:
    lines = lines_of(results.rows)
    measured = {line.case for line in lines if line["ms"]}
    different = sorted({f"{line.case} by {line.provider}" for line in lines if "DIFFERS" in line.note})
    for what, names in (
        ("results that differ from the reference", different),
        ("lost", [f"{c}: {w}" for c, w in lost.items()]),
    ):
        if names:
            say(f"\n{len(names)} {what}:")
            for name in names:
                say(f"  {name}")
    if results.left_out:
        whole = [case for case, what in results.left_out.items() if what == "everything"]
        others = len(results.left_out) - len(whole)
        say(f"\nno time was left for {len(whole)} cases, and for some providers of {others}:")
        for case, what in results.left_out.items():
            say(f"  {case}: {what}")
    say(f"\n{len(measured)} cases measured")


@contextmanager
def _compiling_ahead(requests: Sequence[dict[str, str]], command: Sequence[str]) -> Iterator[None]:
    """Meanwhile, other cores fill Triton's cache with what will be launched; nothing waits for them."""
    cores = min((os.cpu_count() or 1) - 2, MOST_COMPILERS, len(requests))
    major, minor = torch.cuda.get_device_capability()
    processes = []
    for number in range(max(cores, 0)):
        request = {"task": "compile", "cases": requests[number::cores], "architecture": 10 * major + minor}
        process = subprocess.Popen(
            *(list(command),), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        processes.append(process)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def tune(asked: Asked, say: Say, command: Sequence[str] = COMMAND) -> dict[str, Any]:
    """Find the fastest configurations on the GPU, and store them where launches look for them.

    Of cases that share a bucket, as those do whose kernel chooses by other sizes, the one that takes longest counts.

    Raises:
        OptionError: nothing fits what was asked for.
        ExecutionError: there is no GPU, or results cannot be stored.
    """
    found = [case for case in asked.cases(say) if case.mode == FORWARD]
    if not torch.cuda.is_available():
        raise ExecutionError("configurations are tuned on a CUDA device; there is none")
    results = Results(asked.out)
    stored: dict[tuple[object, ...], TunedResult] = {}
    try:
        for number, answer in enumerate(supervised("tune", _requests(found), asked.seconds, command=command)):
            results.leave_out(answer.case, answer.left_out)
            results.add(answer.rows if answer.case else ())
            best = [msgspec.convert(item, TunedResult) for item in answer.tuned]
            for item in best:
                if item.place not in stored or item.default_ms > stored[item.place].default_ms:
                    stored[item.place] = item
                    store([item])
                gain = f"{item.default_ms / item.ms:.2f} times as fast as by default"
                say(f"[{number}/{len(found)}] {answer.case}: {item.ms:.4g} ms, {gain}: {item.config.options}")
            if answer.case and not best:
                reason = answer.lost or ", ".join(answer.left_out) or "no configuration ran right"
                say(f"[{number}/{len(found)}] {answer.case}: nothing stored: {reason}")
    except KeyboardInterrupt:
        say("interrupted: what has been found is stored")
    say(f"{len(stored)} results in {results_file()}")
    return {
        **results.head,
        "stored": [msgspec.to_builtins(item) for item in stored.values()],
        "left_out": results.left_out,
    }


def compare_files(before: Path, now: Path, threshold: float, say: Say) -> dict[str, Any]:
    """Two files of results side by side. Raises OptionError."""
    (old_head, old), (new_head, new) = read_rows(before), read_rows(now)
    devices = [str(head.get("machine", {}).get("accelerator", "unknown")) for head in (old_head, new_head)]
    if devices[0] != devices[1]:
        say(f"note: measured on different devices: {devices[0]}, and now {devices[1]}")
    found = compared(old, new, threshold)
    if not found:
        raise OptionError("neither file has times of kernels")
    say(comparison_table(found))
    return {"comparison": [{**vars(item), "ratio": item.ratio, "verdict": item.verdict} for item in found]}
