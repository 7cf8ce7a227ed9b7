"""Who computes what a kernel computes: ourselves, PyTorch as it is, Inductor, and libraries where they are installed.

A provider that is missing says why; it is never an error. ``tier`` says what is left out first where time is short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .libraries import LIBRARIES, Library
from .problem import TRAINING, Problem, tensors_in

__all__ = ["OURS", "Prepared", "Provider", "providers_of"]

OURS = "opweave"

Step = Callable[[], Any]


@dataclass(frozen=True)
class Prepared:
    """Ready to run: ``whole`` allocates and returns all results; ``step`` is what is timed."""

    whole: Callable[[], Sequence[torch.Tensor | None]]
    step: Step


@dataclass(frozen=True)
class Provider:
    """Somebody who computes the results of a problem."""

    name: str
    tier: int
    prepare: Callable[[Problem], Prepared]
    missing: str = ""


def providers_of(kernel: str) -> tuple[Provider, ...]:
    """All that can compute what the kernel of that name does, the most important first."""
    return (
        Provider(OURS, 0, _ours),
        Provider("eager", 0, lambda problem: _function(problem, problem.kernel.eager)),
        *(_library(library) for library in LIBRARIES if kernel in library.kernels),
        Provider("Inductor", 1, lambda problem: _compiled(problem, None)),
        Provider("Inductor max-autotune", 2, lambda problem: _compiled(problem, "max-autotune-no-cudagraphs")),
    )


def _library(library: Library) -> Provider:
    def prepare(problem: Problem) -> Prepared:
        return _function(problem, library.build(problem))

    return Provider(library.name, 0, prepare, library.missing())


def _ours(problem: Problem) -> Prepared:
    """Forward, the launch alone is timed: it writes tensors that are there, as it does in a plan."""
    kernel = problem.kernel
    if problem.case.mode == TRAINING:
        return _function(problem, kernel.operator)
    given = problem.given()
    outputs = dict(zip(kernel.written, kernel.allocate(*given), strict=True))

    def whole() -> list[torch.Tensor | None]:
        fresh = problem.given()
        made = dict(zip(kernel.written, kernel.allocate(*fresh), strict=True))
        kernel.launch(*fresh, **made)
        everything = {**dict(zip(kernel.inputs, fresh, strict=True)), **made}
        return [everything[name] for name in kernel.results]

    return Prepared(whole, lambda: kernel.launch(*given, **outputs))


def _function(problem: Problem, function: Callable[..., Any]) -> Prepared:
    """A function of the launcher's inputs that returns what the kernel writes."""
    given = problem.given()
    if problem.case.mode == TRAINING:

        def both(values: Sequence[Any]) -> list[torch.Tensor | None]:
            results = tensors_in(function(*values))
            found = problem.backward(values, results)
            return [*problem.padded([result.detach() for result in results]), *found]

        return Prepared(lambda: both(problem.given()), lambda: both(given))

    def forward(values: Sequence[Any]) -> list[torch.Tensor | None]:
        with torch.no_grad():
            return problem.padded(tensors_in(function(*values)))

    return Prepared(lambda: forward(problem.given()), lambda: forward(given))


def _compiled(problem: Problem, mode: str | None) -> Prepared:
    return _function(problem, torch.compile(problem.kernel.eager, dynamic=False, mode=mode))
