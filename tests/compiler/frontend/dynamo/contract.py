"""Compares what is compiled with eager PyTorch in everything that a caller can see."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from opweave import torch_backend
from opweave.compiler.frontend.dynamo.report import GraphReport

#: Nothing of an earlier run may stand for what is tested.
UNCACHED = {"cache": False}


def compiled(target: Any, *, dynamic: bool | None = None, **options: Any) -> Any:
    """``target`` compiled by the backend, without its cache."""
    return torch.compile(target, backend="opweave", dynamic=dynamic, options={**UNCACHED, **options})


def reports() -> tuple[GraphReport, ...]:
    """Of all graphs compiled since the test began."""
    return torch_backend.backend_reports()


def tiers() -> set[str]:
    """The tiers of all graphs compiled since the test began."""
    return {report.tier for report in reports()}


def check(
    target: Any,
    make: Callable[[], Sequence[Any]],
    *,
    gradients: bool = False,
    calls: int = 2,
    tier: str = "T1",
    dynamic: bool | None = None,
    tolerance: float = 1e-5,
    **options: Any,
) -> Any:
    """Call ``target`` eagerly and compiled, ``calls`` times, each with inputs that ``make`` makes; compare.

    Modules are copied first, so that both start alike. Returns what is compiled, for more calls.
    """
    twin = copy.deepcopy(target) if isinstance(target, torch.nn.Module) else target
    function = compiled(target, dynamic=dynamic, **options)
    for _ in range(calls):
        compare(function, twin, make, gradients=gradients, tolerance=tolerance)
        if isinstance(target, torch.nn.Module):
            same_modules(target, twin, tolerance)
    assert tiers() == {tier}
    assert torch_backend.fallback_counts() == {} or tier == "T0"
    return function


def compare(
    function: Any, twin: Any, make: Callable[[], Sequence[Any]], *, gradients: bool = False, tolerance: float = 1e-5
) -> None:
    """Call ``function`` and its eager ``twin`` once, each with inputs of its own."""
    ours, theirs = make(), make()
    found, expected = function(*ours), twin(*theirs)
    if gradients:
        for result in (found, expected):
            backward(loss(result))
    same(found, expected, tolerance)
    same(list(ours), list(theirs), tolerance)
    assert aliases([*ours, found]) == aliases([*theirs, expected])
    for one, other in zip(tensors(ours), tensors(theirs), strict=True):
        if one.is_leaf:
            same(one.grad, other.grad, tolerance)


def loss(result: Any) -> torch.Tensor:
    """A number that depends on every floating-point result, and on no two elements alike."""
    parts = [part for part in tensors(result) if part.requires_grad]
    return torch.stack([(part.double() * (1 + weights(part))).sum() for part in parts]).sum()


def backward(result: Any) -> None:
    """``result.backward()``, which torch leaves untyped."""
    result.backward()


def weights(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(like.numel(), dtype=torch.float64).reshape(like.shape) % 7


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Same structure, types, dtypes, shapes, strides, and, within ``tolerance``, values."""
    ours, our_structure = tree_flatten(found)
    theirs, structure = tree_flatten(expected)
    assert our_structure == structure
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is type(other)
        if not isinstance(other, torch.Tensor):
            assert one == other
            continue
        assert one.requires_grad == other.requires_grad
        strides = other.numel() > 0  # without elements they mean nothing
        torch.testing.assert_close(
            one.detach(), other.detach(), rtol=tolerance, atol=tolerance, equal_nan=True, check_stride=strides
        )


def same_modules(one: torch.nn.Module, other: torch.nn.Module, tolerance: float = 1e-5) -> None:
    """Parameters, their gradients, and buffers."""
    same([*one.parameters()], [*other.parameters()], tolerance)
    same([p.grad for p in one.parameters()], [p.grad for p in other.parameters()], tolerance)
    same([*one.buffers()], [*other.buffers()], tolerance)


def aliases(tree: Any) -> list[tuple[int, int, bool, int]]:
    """Which tensors share memory: pairs of positions, whether they are one object, and how far apart they begin."""
    found = []
    flat = tensors(tree)
    for i, one in enumerate(flat):
        for j, other in enumerate(flat[:i]):
            address = one.untyped_storage().data_ptr()
            if address and address == other.untyped_storage().data_ptr():
                found.append((j, i, one is other, one.data_ptr() - other.data_ptr()))
    return found
