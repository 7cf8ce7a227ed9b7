"""Calls as rules see them, the rule that answers for a call, and the check of what it claimed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from ...errors import InternalError
from .orders import Ordered
from .rule import Call, Operand, Rule
from .rules.elementwise import POINTWISE
from .state import WHOLE, Along, Division, Result, State

__all__ = ["call_of", "check_claim", "offered", "refusal_of", "rule_of"]


def call_of(node: Node, states: Mapping[Node, Result], division: Division) -> Call:
    """The call that ``node`` is, with its operands in ``states``."""
    arguments = _arguments(node)
    operands: list[Operand] = []
    for name, argument in arguments.items():
        if isinstance(argument, Node):
            operands.append(_operand(argument, states, name, None))
        elif isinstance(argument, list | tuple):
            found = [(index, item) for index, item in enumerate(argument) if isinstance(item, Node)]
            operands.extend(_operand(item, states, name, index) for index, item in found)
    return Call(node, arguments, tuple(operands), node.meta.get("val"), division)


def _operand(node: Node, states: Mapping[Node, Result], name: str, index: int | None) -> Operand:
    state = states[node]
    return Operand(node, node.meta.get("val"), state if not isinstance(state, tuple) else WHOLE, name, index)


def _arguments(node: Node) -> dict[str, Any]:
    """Arguments of a call by name: those of the schema, or ``arg0``, ``arg1`` ... of an operator without one."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{f"arg{place}": argument for place, argument in enumerate(node.args)}, **node.kwargs}
    filled: dict[str, Any] = {}
    for place, argument in enumerate(node.target._schema.arguments):
        if place < len(node.args) and not argument.kwarg_only:
            filled[argument.name] = node.args[place]
        else:
            filled[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return filled


def rule_of(node: Node, rules: Mapping[str, Rule]) -> Rule | None:
    """The rule for the overload, for its operator, or for all that is pointwise; None where there is none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return rules.get(str(target))
    name = target._schema.name
    own = rules.get(f"{name}.{target._schema.overload_name or 'default'}", rules.get(name))
    return POINTWISE if own is None and torch.Tag.pointwise in target.tags else own


def refusal_of(node: Node, rule: Rule | None) -> str:
    """Why the call must run once whatever rules say; empty where it need not."""
    values = [node.meta.get("val"), *(value.meta.get("val") for value in node.all_input_nodes)]
    if any(isinstance(value, list | tuple) for value in values[1:]):
        return "it reads several values at once"
    if any(_symbolic(value) for value in values):
        return "a size depends on values"
    target = node.target
    seeded = isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
    if seeded and not (rule and rule.seeded):
        return "it draws random numbers"
    return ""


def _symbolic(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_symbolic(item) for item in value)
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    return any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes)


def offered(call: Call) -> Result:
    """The state in which the result of an operator that ran once is offered: slices where the tokens seem to be.

    Slicing is always right; it pays where an operator in the middle of a network cannot be divided, such as an
    attention that no rule knows, and what follows can.
    """
    divided = [operand for operand in call.operands if operand.along and not isinstance(operand.along, Ordered)]
    if not divided:
        return WHOLE
    largest = max(divided, key=lambda operand: operand.value.numel())
    assert isinstance(largest.state, Along)
    if isinstance(call.value, list | tuple):
        return tuple(_sliceable(value, largest.state, call.division) for value in call.value)
    return _sliceable(call.value, largest.state, call.division)


def _sliceable(value: Any, along: Along, division: Division) -> State:
    if not isinstance(value, torch.Tensor) or value.dim() <= along.dim or _symbolic(value):
        return WHOLE
    return along if value.shape[along.dim] == division.total(along) else WHOLE


def check_claim(node: Node, value: Any, result: Result, made: Sequence[Any], division: Division) -> None:
    """Raises InternalError where the parts ``made`` are not of the shapes and types that ``result`` says."""
    if isinstance(result, tuple):
        if not isinstance(value, list | tuple) or len(value) != len(result):
            raise InternalError(f"the rule of {node.target} gives {len(result)} states for what {node.name!r} returns")
        for index, state in enumerate(result):
            own = [part[index] if isinstance(part, tuple) else part.meta["val"][index] for part in made]
            _check(node, value[index], state, own, division)
    else:
        _check(node, value, result, made, division)


def _check(node: Node, value: Any, state: State, made: Sequence[Any], division: Division) -> None:
    if isinstance(value, list | tuple) and state == WHOLE:
        return
    for part, own in enumerate(made):
        held = own.meta["val"] if isinstance(own, Node) else own
        if not isinstance(value, torch.Tensor):
            if held is not None and type(held) is not type(value):
                raise InternalError(f"the rule of {node.target} gives {held!r} for what {node.name!r} returns")
            continue
        shape = tuple(value.shape)
        wanted = division.shape(shape, state, part) if isinstance(state, Along) else shape
        whole = not isinstance(state, Along) or division.total(state) == shape[state.dim]
        if not whole or not isinstance(held, torch.Tensor) or (tuple(held.shape), held.dtype) != (wanted, value.dtype):
            raise InternalError(
                f"the rule of {node.target} claims {state} for {node.name!r} of shape {list(shape)} and "
                f"{value.dtype}, but part {part} is {list(getattr(held, 'shape', ()))} of {getattr(held, 'dtype', '')}"
            )
