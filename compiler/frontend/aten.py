"""Which ATen calls compute, which only check, draw random numbers or write, and how a writing one is said without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

__all__ = ["bind_arguments", "functional_form", "is_check", "is_random", "positional", "replace_tensors", "tensors_in"]

_CHECKS = frozenset(
    {
        "aten::_assert_async",
        "aten::_assert_scalar",
        "aten::_assert_tensor_metadata",
        "aten::_functional_assert_async",
        "aten::_functional_assert_scalar",
        "aten::sym_constrain_range",
        "aten::sym_constrain_range_for_size",
    }
)
_PROBABILITIES = ("p", "dropout_p", "dropout", "attn_dropout_p")
_SWITCHES = ("train", "training")


def is_check(target: torch._ops.OpOverload) -> bool:
    """Whether the call only asserts something, which held for the example inputs and their shapes."""
    return target._schema.name in _CHECKS


def is_random(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the result depends on a random generator: a seeded operator that is not switched off by its arguments."""
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    bound = bind_arguments(target, args, kwargs)
    switched_off = any(bound.get(name) is False for name in _SWITCHES)
    return not switched_off and not any(name in bound and bound[name] == 0 for name in _PROBABILITIES)


def bind_arguments(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by their names in the schema, defaults filled in."""
    parameters = target._schema.arguments
    bound = {p.name: p.default_value for p in parameters if p.has_default_value()}
    bound.update({p.name: value for p, value in zip(parameters, args, strict=False)})
    bound.update(kwargs)
    return bound


def positional(
    target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with every argument in its place that may stand in one: ``args[i]`` is the schema's ``i``-th."""
    places = [p for p in target._schema.arguments if not p.kwarg_only]
    named = [index for index, p in enumerate(places) if p.name in kwargs]
    values, rest = list(args), dict(kwargs)
    for p in places[len(args) : max(named, default=-1) + 1]:
        values.append(rest.pop(p.name) if p.name in rest else p.default_value)
    return tuple(values), rest


def functional_form(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The operator that returns what the in-place ``target`` writes into its first argument; ``None`` if unknown.

    ATen names them alike: ``add_.Tensor`` and ``add.Tensor``, ``__iand__.Tensor`` and ``__and__.Tensor``.
    """
    writes = [p.alias_info is not None and p.alias_info.is_write for p in target._schema.arguments]
    namespace, _, name = target._schema.name.partition("::")
    if sum(writes) != 1 or not writes[0] or not name.endswith("_"):
        return None
    plain = f"__{name[3:]}" if name.startswith("__i") else name[:-1]
    packet = getattr(getattr(torch.ops, namespace), plain, None)
    form = getattr(packet, target._overloadname, None)
    return form if isinstance(form, torch._ops.OpOverload) and not form._schema.is_mutable else None


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Tensors of nested lists, tuples and mappings, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def replace_tensors(value: Any, replacement: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with each tensor replaced, in the order of ``tensors_in``; tuples stay tuples, lists lists."""
    if isinstance(value, torch.Tensor):
        return replacement(value)
    if isinstance(value, list | tuple):
        items = [replace_tensors(item, replacement) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value
