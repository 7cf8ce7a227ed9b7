"""What a rule says of one operator: in which states it needs its operands, and in which state its result then is.

``docs/adding-a-split-rule.md`` shows how to write one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.fx import Node

from .state import WHOLE, Along, Division, Result, State

__all__ = ["Builder", "Call", "Divided", "Emit", "Operand", "Outcome", "Part", "Refused", "Rule"]


@dataclass(frozen=True)
class Operand:
    """A value that an operator reads: its ``node`` in the given module, its ``value`` (fake) and its ``state``.

    ``name`` is the argument it is in, and ``index`` its place there where the argument is a list.
    """

    node: Node
    value: Any
    state: State
    name: str
    index: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole value; of anything but a tensor, ``()``."""
        return tuple(self.value.shape) if isinstance(self.value, torch.Tensor) else ()

    @property
    def along(self) -> Along | None:
        """The state, where it is Along."""
        return self.state if isinstance(self.state, Along) else None


@dataclass(frozen=True)
class Call:
    """One call of an operator, at least one operand of which is not Whole.

    ``arguments`` are all its arguments by name, defaults filled in, nodes in place of values. ``operands`` are its
    tensors in the order of the arguments, one entry for each place. ``value`` is what it returns (fake).
    """

    node: Node
    arguments: Mapping[str, Any]
    operands: tuple[Operand, ...]
    value: Any
    division: Division

    @property
    def operator(self) -> str:
        """The operator's name without the overload, such as ``aten::mm``."""
        return str(getattr(getattr(self.node.target, "_schema", None), "name", self.node.target))

    def at(self, name: str, index: int | None = None) -> int | None:
        """The place in ``operands`` of argument ``name`` (of item ``index`` of a list); None for no tensor."""
        for place, operand in enumerate(self.operands):
            if operand.name == name and operand.index == index:
                return place
        return None

    def operand(self, name: str, index: int | None = None) -> Operand | None:
        """The operand in argument ``name`` (at ``index`` of a list); None where there is no tensor."""
        place = self.at(name, index)
        return None if place is None else self.operands[place]

    def states(self, /, **given: State) -> tuple[State, ...]:
        """States of all operands as they are, but for those given by the argument's name."""
        return tuple(given.get(operand.name, operand.state) for operand in self.operands)


class Builder(Protocol):
    """Makes nodes of the new module, with what they return as ``meta["val"]``."""

    def make(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Node:
        """A call of ``target``, run in fake mode for its value."""
        ...

    def attempt(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Node | None:
        """The same; None where the operator does not take the arguments (a view of an unsuitable layout)."""
        ...


@dataclass(frozen=True)
class Part:
    """What a rule's ``emit`` is given: the part it makes nodes for, and the operands in the states it needs.

    ``earlier`` holds what ``emit`` returned for the parts made before: 0 .. index - 1, or, with ``last_first``, those
    behind ``index``, the last part first. All nodes are of the new module.
    """

    index: int
    call: Call
    nodes: tuple[tuple[Node, ...], ...]
    earlier: tuple[Node | tuple[Node, ...], ...]
    builder: Builder

    @property
    def division(self) -> Division:
        """The lengths of the parts."""
        return self.call.division

    def operand(self, place: int, part: int | None = None) -> Node:
        """The node of operand ``place`` of the call for this part, or for part ``part`` (also a later one)."""
        held = self.nodes[place]
        return held[0] if len(held) == 1 else held[self.index if part is None else part]

    def make(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new call of the operator ``target`` (an ATen overload) that belongs to this part."""
        return self.builder.make(target, args, kwargs)

    def again(self, /, **given: Any) -> Node:
        """The call itself with this part's operands, but for arguments given by name."""
        args, kwargs = self.arguments(given)
        return self.builder.make(self.call.node.target, args, kwargs)

    def arguments(self, given: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and named arguments of the call for this part, with those ``given`` by name in their place."""
        places = iter(range(len(self.call.operands)))
        filled: dict[str, Any] = {}
        for name, argument in self.call.arguments.items():
            own = torch.fx.map_arg(argument, lambda _: self.operand(next(places)))
            filled[name] = given.get(name, own)
        target = self.call.node.target
        if not isinstance(target, torch._ops.OpOverload):
            raise TypeError(f"{target} has no schema")
        return _called(target, filled)

    def reshape(self, node: Node, shape: Sequence[int]) -> Node:
        """``node`` viewed as ``shape``; copied first where its layout does not allow a view."""
        aten = torch.ops.aten
        viewed = self.builder.attempt(aten.view.default, (node, list(shape)), {})
        if viewed is not None:
            return viewed
        copied = self.make(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self.make(aten.view.default, copied, list(shape))


def _called(target: torch._ops.OpOverload, filled: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """``filled`` as the schema wants it: trailing arguments that equal their defaults are left away."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in target._schema.arguments:
        if not argument.kwarg_only:
            args.append(filled[argument.name])
        elif not (argument.has_default_value() and filled[argument.name] == argument.default_value):
            kwargs[argument.name] = filled[argument.name]
    plain = [argument for argument in target._schema.arguments if not argument.kwarg_only]
    while args and plain[len(args) - 1].has_default_value():
        default = plain[len(args) - 1].default_value
        if isinstance(args[-1], Node) or type(args[-1]) is not type(default) or args[-1] != default:
            break
        args.pop()
    return args, kwargs


Emit = Callable[[Part], Node | tuple[Node, ...]]


@dataclass(frozen=True)
class Divided:
    """The operator runs once for each part.

    ``result`` is the state of what it returns. ``needs`` are the states in which it reads its operands, one for each
    entry of ``Call.operands``; None is as they are. A Whole operand can be needed Along (it is sliced); one that is
    not Whole can be needed Whole (it is joined, for ``reason``). ``emit`` makes the nodes of one part; None is the
    call itself with that part's operands, and with the arguments that ``given`` has for the part, by name. With
    ``last_first`` the parts are made from the last to the first. Of a tuple that ``emit`` returns, items behind the
    states of ``result`` are for the parts made later alone.

    With a ``result`` of Whole only, the operator runs once, on the operands of part 0: right where what it returns
    does not depend on the divided operands' values or extents. Such a result is offered to what follows in state
    ``again``: an Along slices it.
    """

    result: Result
    needs: tuple[State, ...] | None = None
    emit: Emit | None = None
    given: Mapping[str, Callable[[int], Any]] = field(default_factory=dict)
    reason: str = ""
    again: Result = WHOLE
    last_first: bool = False


@dataclass(frozen=True)
class Refused:
    """The operator runs once, on joined operands, for ``reason`` (a clause: "softmax over the tokens").

    ``again`` is the state in which its result is offered to what follows: an Along slices it again. None leaves it to
    the split, which slices what has the tokens' dimension still.
    """

    reason: str
    again: Result | None = None


Outcome = Divided | Refused


@dataclass(frozen=True)
class Rule:
    """How one operator is divided.

    ``divide`` is a pure function of a call. With ``partial`` it is asked about operands that are Partial as well;
    without, they are summed first, which is always right. With ``seeded`` it is asked about operators that may draw
    random numbers, and refuses those that do.
    """

    divide: Callable[[Call], Outcome]
    partial: bool = False
    seeded: bool = False
