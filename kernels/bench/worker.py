"""The process that measures, and the one that watches over it.

A kernel that touches memory it must not takes the whole process with it, and one that waits for what never comes
takes for ever. So cases are measured by a worker, ``python -m opweave.kernels.bench.worker``, that reads one request
from standard input and answers a line of JSON for each case it begins and for each it ends; when it dies, or says
nothing for too long, `supervised` notes that and goes on behind that case with another.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .rows import Row

__all__ = ["COMMAND", "Answer", "main", "supervised"]

MARK = "opweave: "
COMMAND = (sys.executable, "-m", __name__)
PATIENCE_S = 180.0  # what one case may take; a search for the fastest products included


@dataclass(frozen=True)
class Answer:
    """What is known of a case after its end: rows, what was left out, and whether it ended at all."""

    case: str
    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()
    tuned: tuple[Mapping[str, Any], ...] = ()
    lost: str = ""


def supervised(
    task: str,
    cases: Sequence[Mapping[str, str]],
    seconds: float,
    *,
    command: Sequence[str] = COMMAND,
    patience_s: float = PATIENCE_S,
    **facts: Any,
) -> Iterator[Answer]:
    """Answers to ``cases``, each with a ``name``, as they come; the first, of the device, has the name ``""``."""
    until = time.monotonic() + seconds
    left = list(cases)
    first = True
    while left or first:
        remaining = until - time.monotonic()
        if remaining <= 0 and not first:
            yield from (Answer(case["name"], (), ("everything",)) for case in left)
            return
        request = {"task": task, "cases": left, "until": time.time() + remaining, **facts}
        begun, ended = "", 0
        for message in _talk(command, request, patience_s):
            if message["kind"] == "begin":
                begun = message["case"]
            elif message["kind"] == "device":
                facts["roofline"] = message["roofline"]
                if first:
                    yield Answer("", _rows(message["rows"]))
                first = False
            elif message["kind"] == "end":
                begun, ended = "", ended + 1
                left = [case for case in left if case["name"] != message["case"]]
                yield Answer(
                    message["case"], _rows(message["rows"]), tuple(message["left_out"]), tuple(message["tuned"])
                )
            else:
                failure = str(message["why"])
                if not begun and not ended:
                    yield Answer("", (), lost=failure)
                    return
                if not begun:  # what went wrong showed between two cases
                    break
                left = [case for case in left if case["name"] != begun]
                yield Answer(begun, (), lost=failure)


def _rows(rows: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    return tuple(Row(**row) for row in rows)


def _talk(command: Sequence[str], request: Mapping[str, Any], patience_s: float) -> Iterator[dict[str, Any]]:
    """Messages of one worker; the last says ``lost`` unless it did all that was asked."""
    process = subprocess.Popen(
        *(list(command),), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    readers = [
        threading.Thread(target=_read, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=_read, args=(process.stderr, lambda line: errors.append(line or "")), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        try:
            process.stdin.write(json.dumps(request))
            process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended already, and what it said is below
        while True:
            try:
                line = lines.get(timeout=patience_s)
            except queue.Empty:
                yield {"kind": "lost", "why": f"said nothing for {patience_s:g} s and was stopped"}
                return
            if line is None:
                break
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
        if process.wait() != 0:
            readers[1].join(timeout=5)
            said = [text.strip() for text in errors if text.strip()]
            yield {
                "kind": "lost",
                "why": f"the worker ended with {process.returncode}: {(said or ['silent'])[-1][:200]}",
            }
    finally:
        process.kill()
        process.wait()
        for reader in readers:
            reader.join(timeout=5)


def _read(stream: Any, take: Callable[[str | None], None]) -> None:
    with stream:
        for line in stream:
            take(line)
    take(None)


def _say(kind: str, **facts: Any) -> None:
    sys.stdout.write(MARK + json.dumps({"kind": kind, **facts}) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Do what standard input asks for."""
    request = json.load(sys.stdin)
    {"measure": _measure, "tune": _tune, "compile": _compile}[request["task"]](request)


def _cases(request: Mapping[str, Any]) -> list[Any]:
    from ..registry import load
    from .problem import Case, dtype_called

    found = []
    for asked in request["cases"]:
        kernel = load(asked["kernel"])
        workload = next(w for w in kernel.workloads if w.name == asked["workload"])
        found.append(Case(kernel, workload, dtype_called(asked["dtype"]), asked["mode"]))
    return found


def _device(request: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """The device's clock, what is stated of it, and what was measured, now or by a worker before."""
    import torch

    from .measuring import Gpu
    from .roofline import Roofline, machine_of, roofline_of
    from .session import calibration_rows

    gpu = Gpu(torch.device("cuda", torch.cuda.current_device()))
    machine = machine_of(gpu.name)
    stated = None if machine is None else roofline_of(machine)
    known = request.get("roofline")
    measured = Roofline(**known) if known else gpu.measured()
    rows = [asdict(row) for row in calibration_rows(stated, measured)]
    roofline = {"source": measured.source, "bytes_per_s": measured.bytes_per_s, "flops_per_s": measured.flops_per_s}
    _say("device", rows=rows, roofline=roofline)
    return gpu, stated, measured


def _measure(request: Mapping[str, Any]) -> None:
    from .budget import Budget
    from .session import measure

    gpu, stated, measured = _device(request)
    budget = Budget(request["until"] - time.time(), gpu.now)
    cases = _cases(request)
    results = measure(cases, gpu, budget, stated, measured, tiers=request["tiers"])
    for case in cases:
        _say("begin", case=case.name)
        result = next(results)
        _say("end", case=case.name, rows=[asdict(r) for r in result.rows], left_out=result.left_out, tuned=[])
        gpu.finish()  # an error that stays is this process's end


def _tune(request: Mapping[str, Any]) -> None:
    import msgspec

    from .budget import Budget
    from .tuner import tune

    gpu, _, _ = _device({**request, "roofline": request.get("roofline") or {**_NOTHING}})
    budget = Budget(request["until"] - time.time(), gpu.now)
    cases = _cases(request)
    for number, case in enumerate(cases):
        _say("begin", case=case.name)
        result = tune(case, gpu, budget.share_s(len(cases) - number - 1))
        results = [] if result.best is None else [msgspec.to_builtins(result.best)]
        _say("end", case=case.name, rows=[asdict(r) for r in result.rows], left_out=result.left_out, tuned=results)
        gpu.finish()


_NOTHING = {"source": "not measured", "bytes_per_s": 1.0, "flops_per_s": {"default": 1.0}}


def _compile(request: Mapping[str, Any]) -> None:
    """Put what cases launch into Triton's cache: compiling needs no GPU, and workers find it there."""
    from .offline import compiled

    os.nice(10)  # what is being timed meanwhile goes first
    for case in _cases(request):
        try:
            compiled(case.kernel, case.workload.sizes, case.dtype, None, request["architecture"])
        except Exception as error:  # whoever launches it will be told
            sys.stderr.write(f"{case.name}: {error}\n")


if __name__ == "__main__":
    main()
