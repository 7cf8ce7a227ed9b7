"""What every kernel has to do with every one of its cases, under the interpreter and on a GPU alike."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels._kernel import Kernel
from tests.kernels.guard import Guarded

__all__ = ["FLOAT_TOLERANCE", "Case", "Cases", "cases_of", "check"]

#: Relative and absolute: a few float32 roundings; for narrower dtypes those can tip one rounding to the neighbour.
FLOAT_TOLERANCE: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float32: (2e-6, 1e-6),
    torch.float16: (2.0**-10, 2.0**-14),
    torch.bfloat16: (2.0**-7, 2.0**-11),
}


@dataclass(frozen=True)
class Case:
    """Sizes for ``Kernel.arguments``, a configuration to force, and what to change about the inputs, such as strides.

    ``empty`` says that there is nothing to compute and nothing may be launched.
    """

    sizes: Mapping[str, Any]
    config: Config | None = None
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: inputs
    dtypes: tuple[torch.dtype, ...] | None = None
    label: str = ""

    def __str__(self) -> str:
        return self.label or "-".join(str(value) for value in self.sizes.values())


@dataclass(frozen=True)
class Cases:
    """A kernel's cases. ``truth`` takes the launcher's inputs, in their dtypes, and computes in float64 what the
    kernel writes (scratch left out), by other means than the kernel's own reference.
    """

    kernel: Kernel
    truth: Callable[..., Sequence[torch.Tensor]]
    cases: tuple[Case, ...]
    tolerance: Mapping[torch.dtype, tuple[float, float]] = field(default_factory=lambda: FLOAT_TOLERANCE)


def cases_of(name: str) -> Cases:
    """``CASES`` of ``tests/kernels/cases/<name>.py``."""
    found: Cases = importlib.import_module(f"tests.kernels.cases.{name}").CASES
    return found


def check(cases: Cases, case: Case, dtype: torch.dtype, device: str, slack: float = 1.0) -> None:
    """Launch once; compare with float64 and with the reference; look at sentinels around every tensor and at inputs.

    Truth and reference are computed on a CPU. ``slack`` widens what the kernel may be off by: a GPU's elementary
    functions are less exact than a CPU's.
    """
    kernel = cases.kernel
    inputs = case.change(kernel.arguments(dtype, "cpu", **case.sizes))
    guards = {n: Guarded(value, device=device) for n, value in inputs.items() if isinstance(value, torch.Tensor)}
    given = {**inputs, **{name: guard.tensor for name, guard in guards.items()}}
    outputs = {
        name: Guarded(made, output=True)
        for name, made in zip(kernel.written, kernel.allocate(*given.values()), strict=True)
    }
    kernel.launch(*given.values(), **{name: g.tensor for name, g in outputs.items()}, config=case.config)
    for name, guard in {**guards, **outputs}.items():
        assert guard.is_intact(), f"{kernel.name} wrote outside {name}"
    for name, guard in guards.items():
        if name not in kernel.mutates:
            left = guard.tensor.cpu()
            assert torch.equal(left, inputs[name]) or left.isnan().any(), f"{name} was written"
    everything = {**guards, **outputs}
    truths = cases.truth(*inputs.values())
    references = kernel.reference(*inputs.values())
    for name, truth, reference in zip(kernel.results, truths, references, strict=True):
        actual = everything[name].tensor.cpu()
        assert reference.dtype == actual.dtype, f"the reference of {name} has another dtype"
        if not actual.dtype.is_floating_point:
            assert torch.equal(actual.to(truth.dtype), truth), name
            assert torch.equal(reference.to(truth.dtype), truth), name
            continue
        rtol, atol = cases.tolerance[dtype]
        for what, value, factor in (("the kernel", actual, slack), ("the reference", reference, 1.0)):
            torch.testing.assert_close(
                value.double(),
                truth,
                rtol=factor * rtol,
                atol=factor * atol,
                equal_nan=True,
                msg=_labelled(f"{what}'s {name}"),
            )


def _labelled(label: str) -> Callable[[str], str]:
    return lambda text: f"{label}: {text}"
