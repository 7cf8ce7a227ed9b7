"""Runs kernels under Triton's interpreter, corrected, at small sizes: what can be checked of them without a GPU.

As a program, ``python -m opweave.kernels.bench.interpreted KERNEL...`` with ``TRITON_INTERPRET=1``, it prints one line
of JSON a kernel; `checked` starts it, since Triton reads that variable when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ExecutionError
from .._checks import dtype_name
from .._kernel import Kernel
from ..registry import load
from .interpreter import corrected
from .problem import TOLERANCE, Case, Problem, dtype_called, error_of
from .providers import OURS, providers_of

__all__ = ["Check", "checked", "small_sizes"]

MARK = "checked: "
LARGEST = (32, 64, 128, 256, 1024)
LONGEST_S = 120.0


@dataclass(frozen=True)
class Check:
    """What one kernel gave in one dtype: how far off it was, or why it did not run."""

    kernel: str
    dtype: str
    sizes: Mapping[str, Any]
    error: float | None
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran and was right."""
        return self.error is not None and self.error <= self.tolerance


def small_sizes(kernel: Kernel) -> Mapping[str, Any]:
    """The first workload with every size halved until it is at most 32, or at most so much more as the kernel takes."""
    sizes = kernel.workloads[0].sizes
    for largest in LARGEST:
        small = {name: _halved(size, largest) for name, size in sizes.items()}
        try:
            made = kernel.arguments(kernel.dtypes[0], "meta", **small)
            kernel.allocate(*made.values())
            kernel.arguments(kernel.dtypes[0], "cpu", **small)
            kernel.cost(dtype_name(kernel.dtypes[0]), **small)
        except Exception:  # whatever a kernel says of sizes that do not go together
            continue
        return small
    raise ExecutionError(f"kernel {kernel.name} takes none of its workloads made small")


def _halved(size: Any, largest: int) -> Any:
    if isinstance(size, tuple | list):
        return type(size)(_halved(item, largest) for item in size)
    if isinstance(size, bool) or not isinstance(size, int):
        return size
    while size > largest:
        size = -(-size // 2)
    return size


def checked(kernels: Sequence[str], dtypes: Sequence[torch.dtype]) -> Iterator[Check]:
    """Check kernels in a process with the interpreter, one result for each kernel and dtype."""
    for kernel in kernels:
        command = [sys.executable, "-m", __name__, kernel, *map(dtype_name, dtypes)]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=LONGEST_S, check=False
            )
            said, failed = done.stdout, done.stderr.strip().splitlines()[-1:] if done.returncode else []
        except subprocess.TimeoutExpired:
            said, failed = "", [f"took more than {LONGEST_S:g} s"]
        found = [Check(**json.loads(line.removeprefix(MARK))) for line in said.splitlines() if line.startswith(MARK)]
        yield from found
        for line in failed:
            yield Check(kernel, "", {}, None, 0.0, line)


def _check(kernel: Kernel, dtype: torch.dtype, sizes: Mapping[str, Any]) -> Check:
    case = Case(kernel, type(kernel.workloads[0])("small", sizes), dtype)
    problem = Problem(case, torch.device("cpu"))
    truths, _ = problem.truth()
    ours = next(provider for provider in providers_of(kernel.name) if provider.name == OURS)
    error = error_of(ours.prepare(problem).whole(), truths)
    return Check(kernel.name, dtype_name(dtype), sizes, error, TOLERANCE[dtype])


def main(arguments: Sequence[str]) -> None:
    """Check one kernel in the dtypes that follow its name."""
    kernel = load(arguments[0])
    sizes = small_sizes(kernel)
    for name in arguments[1:]:
        if dtype_called(name) in kernel.dtypes:
            with corrected():
                check = _check(kernel, dtype_called(name), sizes)
            sys.stdout.write(MARK + json.dumps(vars(check)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
