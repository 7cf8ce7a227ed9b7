"""One thing to measure: a kernel with inputs of one size, what it should give, and how far off a result is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

import torch

from ...errors import ExecutionError, OptionError
from .._checks import dtype_name
from .._kernel import Kernel, Workload
from .._match import Cost

__all__ = [
    *("FORWARD", "MODES", "TOLERANCE", "TRAINING", "Case", "Problem"),
    *("cases", "dtype_called", "error_of", "is_trainable", "tensors_in"),
]

FORWARD, TRAINING = "forward", "backward"
MODES = (FORWARD, TRAINING)

#: How far off a result may be, relative to the largest of its elements.
TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}


PIECE = 1 << 26  # elements that are compared at a time


@dataclass(frozen=True)
class Case:
    """A kernel, a workload, a dtype, and whether only the forward pass or the backward pass with it is measured."""

    kernel: Kernel
    workload: Workload
    dtype: torch.dtype
    mode: str = FORWARD

    @property
    def name(self) -> str:
        """Unique, and the same in every run."""
        return f"{self.kernel.name}/{self.workload.name}/{dtype_name(self.dtype)}/{self.mode}"

    @cached_property
    def cost(self) -> Cost:
        """Of the forward pass."""
        return self.kernel.cost(dtype_name(self.dtype), **self.workload.sizes)


def cases(
    kernels: Iterable[Kernel],
    dtypes: Sequence[torch.dtype] = (),
    modes: Sequence[str] = MODES,
    wanted: Sequence[str] = (),
    *,
    first_only: bool = False,
) -> list[Case]:
    """Every case that was asked for: the first workload of all kernels, then the second of those that have one.

    Without ``dtypes``, bfloat16, or the first dtype of a kernel that does not know it. ``wanted`` is words, or patterns
    with ``*``, of which at least one has to occur in a case's name.
    """
    found: list[tuple[int, Case]] = []
    for kernel in kernels:
        for place, workload in enumerate(kernel.workloads[:1] if first_only else kernel.workloads):
            for dtype in _dtypes(kernel, dtypes):
                for mode in modes:
                    if mode == FORWARD or is_trainable(kernel):
                        found.append((place, Case(kernel, workload, dtype, mode)))
    found.sort(key=lambda item: item[0])
    return [case for _, case in found if not wanted or any(fnmatch(case.name, f"*{word}*") for word in wanted)]


def _dtypes(kernel: Kernel, asked: Sequence[torch.dtype]) -> tuple[torch.dtype, ...]:
    if asked:
        return tuple(dtype for dtype in asked if dtype in kernel.dtypes)
    return (torch.bfloat16,) if torch.bfloat16 in kernel.dtypes else kernel.dtypes[:1]


def is_trainable(kernel: Kernel) -> bool:
    """Whether autograd knows a backward of the kernel's operator."""
    return getattr(kernel.operator, "_backward_fn", None) is not None


def dtype_called(name: str) -> torch.dtype:
    """PyTorch's dtype of that name. Raises OptionError."""
    found = getattr(torch, {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(name, name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(f"--dtype is {name!r}; expected float32, float16 or bfloat16")
    return found


class Problem:
    """A case's inputs on a device, and what they should give."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case = case
        self.kernel = case.kernel
        self.inputs = case.kernel.arguments(case.dtype, str(device), seed, **case.workload.sizes)
        self.trained: tuple[str, ...] = ()
        self.gradients: tuple[torch.Tensor | None, ...] = ()
        if case.mode == TRAINING:
            self._find_gradients(seed)

    @property
    def is_random(self) -> bool:
        """Whether values are dropped at random, with a probability ``p``: others draw other numbers than the kernel."""
        return bool(self.inputs.get("p", 0.0))

    def given(self) -> list[Any]:
        """The inputs in order; those that are written, or that gradients are taken of, are copies."""
        values = dict(self.inputs)
        for name in self.kernel.mutates:
            values[name] = values[name].clone()
        for name in self.trained:
            values[name] = values[name].detach().clone().requires_grad_()
        return list(values.values())

    def backward(self, given: Sequence[Any], results: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Gradients of the trained inputs for the same gradients of results, whoever computed them."""
        pairs = [(r, g) for r, g in zip(results, self.gradients, strict=False) if g is not None and r.requires_grad]
        sources = [given[list(self.inputs).index(name)] for name in self.trained]
        outputs, gradients = [r for r, _ in pairs], [g.to(r.dtype) for r, g in pairs]
        return torch.autograd.grad(outputs, sources, gradients, allow_unused=True)

    def _find_gradients(self, seed: int) -> None:
        """Which inputs the operator has gradients of, and what to hand to the backward pass."""
        floats = [n for n, v in self.inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
        names = tuple(name for name in floats if name not in self.kernel.mutates)
        try:
            self.trained = self._trainable(names, seed)
        except ExecutionError:  # some inputs are frozen, and it says so
            found: list[str] = []
            for name in names:
                with contextlib.suppress(ExecutionError):
                    found += self._trainable((name,), seed)
            self.trained = self._trainable(tuple(found), seed)

    def _trainable(self, names: tuple[str, ...], seed: int) -> tuple[str, ...]:
        """Those of ``names`` that the operator has gradients of; sets the gradients of its results for them."""
        self.trained = names
        given = self.given()
        results = tensors_in(self.kernel.operator(*given))[: self._spoken()]
        generator = torch.Generator(results[0].device).manual_seed(seed + 1)
        self.gradients = tuple(
            torch.randn(r.shape, generator=generator, device=r.device).to(r.dtype) if r.requires_grad else None
            for r in results
        )
        found = self.backward(given, results)
        return tuple(name for name, value in zip(names, found, strict=True) if value is not None)

    def _spoken(self) -> int:
        """How many results a user's own program gives, which are the first; all where that cannot be told."""
        sizes = self.case.workload.sizes
        try:
            return len(tensors_in(self.kernel.eager(*self.kernel.arguments(self.case.dtype, "meta", **sizes).values())))
        except Exception:  # it looks at values, and there are none
            return len(self.kernel.results)

    def padded(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """``results`` with ``None`` for those at the end that a provider does not give."""
        return [*results, *[None] * (len(self.kernel.results) - len(results))]

    def truth(self) -> tuple[list[torch.Tensor], str]:
        """What the reference gives for inputs in more digits, and in which: float64 for float32, float32 for others.

        A reference that cannot take them computes as the kernel does.
        """
        wide = torch.float64 if self.case.dtype == torch.float32 else torch.float32
        for dtype in (wide, torch.float32, self.case.dtype):
            try:
                return self._reference(dtype), dtype_name(dtype)
            except (RuntimeError, TypeError, ValueError, AssertionError, KeyError) as error:
                if dtype == self.case.dtype:
                    raise
                del error
        raise AssertionError

    def _reference(self, dtype: torch.dtype) -> list[torch.Tensor]:
        trained = set(self.trained)
        values = dict(self.inputs)
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.dtype == self.case.dtype:
                values[name] = value.to(dtype)
        for name in self.kernel.mutates:
            values[name] = values[name].clone()
        for name in trained:
            values[name] = values[name].detach().clone().requires_grad_()
        results = list(self.kernel.reference(*values.values()))
        if not trained:
            return results
        return [*_detached(results), *_detached(self.backward(list(values.values()), results))]


def _detached(values: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    return [value.detach() for value in values if value is not None]


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors of a result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, tuple | list) else []


def error_of(results: Sequence[torch.Tensor | None], truths: Sequence[torch.Tensor]) -> float:
    """The largest difference, relative to the largest element of the result it is in; infinite for other shapes.

    A result that is not a number where the truth is one is infinitely far off; equal infinities are equal. ``None``
    is a result that is not there and not judged.
    """
    if len(results) != len(truths):
        return math.inf
    pairs = [(result, truth) for result, truth in zip(results, truths, strict=True) if result is not None]
    return max((_distance(result, truth) for result, truth in pairs), default=0.0)


def _distance(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Piece by piece: both may be gigabytes, and float64 copies of them more than there is."""
    if result.shape != truth.shape:
        return math.inf
    worst = largest = 0.0
    for one, other in zip(result.reshape(-1).split(PIECE), truth.reshape(-1).split(PIECE), strict=True):  # type: ignore[no-untyped-call]
        if other.numel():
            kind = torch.float64 if other.dtype == torch.float64 or not other.is_floating_point() else torch.float32
            one, other = one.to(kind), other.to(kind)
            same = (one == other) | (one.isnan() & other.isnan())
            difference = torch.where(same, 0, (one - other).abs())
            worst = max(worst, torch.nan_to_num(difference, nan=math.inf, posinf=math.inf).max().item())
            largest = max(largest, torch.where(other.isfinite(), other.abs(), 0).max().item())
    worst = max(0.0, worst - _unit(truth.dtype, largest))
    return worst / largest if largest > 0 else worst


def _unit(dtype: torch.dtype, largest: float) -> float:
    """What a value of 8 bits may be off by: one step, since what is rounded to it has been rounded before."""
    if dtype.itemsize > 1 or dtype == torch.bool or not 0 < largest < math.inf:
        return 0.0
    return 2.0 ** math.floor(math.log2(largest)) * torch.finfo(dtype).eps if dtype.is_floating_point else 1.0
