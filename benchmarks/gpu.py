"""Every check and benchmark that needs a GPU, by one command, in less time than it is given.

``python -m benchmarks.gpu --out DIR [--minutes 9] [--wheels DIR] [--only kernels backend ...] [--models NAME ...]``, in
the repository's root, with the Python that has torch. Steps:

* ``tests``: the tests of compiled models that are marked ``gpu``, and kernels with offsets beyond 32 bits;
* ``kernel_tests``: all other tests of the kernels, in eight processes where pytest-xdist is installed;
* ``kernels``: ``benchmarks.kernels``, every kernel beside its peers, into a folder of its own;
* ``backend``: ``benchmarks.bench_backend``;
* ``memory_limit``: ``benchmarks.bench_memory_limit``.

Nothing has to be installed: packages that are missing are taken from ``--wheels``, a folder of wheel files, and
opweave from the checkout. What each step prints is shown and kept as ``<step>.txt`` in ``DIR``, beside its rows
(``<step>.json``) and its picture (``<step>.png``), written while it measures; ``summary.txt`` has the machine and one
line a step. Time that a step leaves goes to those behind it; one that takes too long is interrupted, and keeps what it
has measured. Exits with 1 when a step failed, with 2 when a package is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TextIO

__all__ = ["STEPS", "Step", "main", "shares"]

ROOT = Path(__file__).resolve().parents[1]
#: What opweave imports, by import names, and where the models come from; diffusers' one model is left out without it.
NEEDED = (
    *("torch", "triton", "numpy", "onnx", "pulp", "highspy", "ortools", "numba", "ml_dtypes", "msgspec", "typer"),
    *("matplotlib", "transformers", "pytest", "hypothesis"),
)
PROCESSES = "8"
SPARE_S = 30.0  # of a step's time in which it begins nothing more
FAILED, MISSING = 1, 2


class Kind(Enum):
    """Tests take no arguments, or a number of processes; benchmarks a file and their time; the kernels' a folder."""

    TESTS = "tests"
    PARALLEL_TESTS = "parallel tests"
    BENCHMARK = "benchmark"
    KERNELS = "kernels"


@dataclass(frozen=True)
class Step:
    """One command; ``weight`` is its part of the time, ``kind`` says which arguments it takes."""

    name: str
    module: str
    weight: float
    kind: Kind = Kind.BENCHMARK
    arguments: tuple[str, ...] = ()

    def command(self, out: Path, seconds: float, models: Sequence[str], parallel: bool = False) -> list[str]:
        """What to run, to end in about ``seconds``; with ``parallel``, tests that can share their work do."""
        command = [sys.executable, "-m", self.module, *self.arguments]
        minutes = ("--minutes", f"{max(seconds - SPARE_S, 10.0) / 60:.2f}")
        if self.kind is Kind.TESTS:
            return command
        if self.kind is Kind.PARALLEL_TESTS:
            return [*command, *(("-n", PROCESSES) if parallel else ())]
        if self.kind is Kind.KERNELS:
            return [*command, "--out", str(out / self.name), *minutes]
        command += ["--json", str(out / f"{self.name}.json"), *minutes]
        return [*command, *(("--models", *models) if models else ())]


#: Where the tests are that need a GPU: to collect all others takes time.
KERNELS = "tests/kernels/test_kernels_on_gpu.py"
TESTS = (
    "tests/kernels",
    "tests/compiler/frontend/dynamo/test_gpu.py",
    "tests/overlap/test_overlap_on_gpu.py",
    "tests/compiler/runtime/pipelining/test_pipelines_on_gpu.py",
)
PYTEST = ("-m", "gpu", "-q", "-p", "no:cacheprovider")
STEPS = (
    Step("tests", "pytest", 1.5, Kind.TESTS, (*PYTEST, "-k", "not what_it_says and not full_size", *TESTS)),
    Step("kernel_tests", "pytest", 1.5, Kind.PARALLEL_TESTS, (*PYTEST, "-k", "what_it_says", KERNELS)),
    Step("kernels", "benchmarks.kernels", 4.0, Kind.KERNELS),
    Step("backend", "benchmarks.bench_backend", 3.0),
    Step("memory_limit", "benchmarks.bench_memory_limit", 2.0),
)


def shares(steps: Sequence[Step], seconds: float) -> tuple[float, ...]:
    """The seconds of each step, by weight."""
    total = sum(step.weight for step in steps)
    return tuple(seconds * step.weight / total for step in steps)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps. Returns the exit status."""
    asked = _arguments(arguments)
    until = time.monotonic() + 60 * asked.minutes
    asked.out.mkdir(parents=True, exist_ok=True)
    steps = [step for step in STEPS if not asked.only or step.name in asked.only]
    failed = 0
    with _environment(asked.wheels) as environment, (asked.out / "summary.txt").open("w") as summary:
        missing = _missing(environment)
        for line in (*_machine(environment), *(f"missing: {name}" for name in missing)):
            _say(line, summary)
        if missing:
            return MISSING
        for number, step in enumerate(steps):
            seconds = shares(steps[number:], until - time.monotonic() - 15)[0]
            status, line = _run(step, asked.out, seconds, asked.models, environment)
            failed += status != 0
            _say(f"{step.name}: {'done' if status == 0 else f'FAILED ({status})'}: {line}", summary)
    return FAILED if failed else 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Check and measure on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all of it (default: 9)")
    parser.add_argument("--wheels", type=Path, help="folder of wheel files of packages that are missing")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="steps (default: all)")
    parser.add_argument("--models", nargs="+", default=[], help="cases for the benchmarks, such as gpt2:infer")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def _environment(wheels: Path | None) -> Iterator[Mapping[str, str]]:
    """The environment of all steps: opweave from the checkout, packages from ``wheels`` before installed ones."""
    with tempfile.TemporaryDirectory() as folder:
        if wheels is not None:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
            files = sorted(str(path) for path in wheels.glob("*.whl"))
            subprocess.run([*pip, "--disable-pip-version-check", "--target", folder, *files], check=True)
        path = os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), folder, os.environ.get("PYTHONPATH", "")]))
        yield {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _missing(environment: Mapping[str, str], names: Sequence[str] = NEEDED) -> list[str]:
    code = "import importlib.util, sys; print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n) is None))"
    command = [sys.executable, "-c", code, *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


def _machine(environment: Mapping[str, str]) -> list[str]:
    """Lines that say where this runs."""
    code = "import torch; print(torch.__version__, [torch.cuda.get_device_name()] if torch.cuda.is_available() else '')"
    torch = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    lines = [f"Python {platform.python_version()}, {os.cpu_count()} cores", f"torch {torch.stdout.strip()}"]
    with contextlib.suppress(OSError):
        command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem", "--format=csv"]
        lines += subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines


def _run(
    step: Step, out: Path, seconds: float, models: Sequence[str], environment: Mapping[str, str]
) -> tuple[int, str]:
    """Run a step, at most for ``seconds``; its exit status and the last line it printed."""
    print(f"--- {step.name}, {seconds:.0f} s", flush=True)
    command = step.command(out, seconds, models, not _missing(environment, ("xdist",)))
    process = subprocess.Popen(
        *(command,),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its workers can be ended with it
    )
    timers = [
        threading.Timer(seconds, _signal, (process, signal.SIGINT)),
        threading.Timer(seconds + 15, _signal, (process, signal.SIGKILL)),
    ]
    for timer in timers:
        timer.start()
    last = ""
    assert process.stdout is not None
    with (out / f"{step.name}.txt").open("w") as kept, process.stdout as printed:
        for line in printed:
            print(line, end="", flush=True)
            kept.write(line)
            kept.flush()
            last = line.strip() or last
    status = process.wait()
    for timer in timers:
        timer.cancel()
    _signal(process, signal.SIGKILL)  # of workers that it may have left
    return status, last


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _say(line: str, summary: TextIO) -> None:
    print(line, flush=True)
    print(line, file=summary, flush=True)


if __name__ == "__main__":
    sys.exit(main())
