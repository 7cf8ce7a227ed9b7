"""The split: each operator of a graph once for each part where its rule allows, once for all where it does not.

``docs/formulations/split.md`` says why the result computes the same.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ...errors import ModelError, OptionError, SplitRefused
from .build import Maker, Making, alike, fake_mode_of, fresh_value, prune
from .calls import call_of, check_claim, offered, refusal_of, rule_of
from .dispatch import in_order, plain
from .forms import Forms, Joined
from .mutation import mutates
from .orders import Counts, Ordered
from .rule import Call, Divided, Part, Refused, Rule
from .rules import default_rules
from .state import WHOLE, Along, Division, Partial, Result, State

__all__ = ["Joined", "Split", "split"]


@dataclass(frozen=True)
class Split:
    """A module that computes the same as the given one, in parts.

    Nodes of part i have ``meta["opweave_part"] = i``, and every node has ``meta["opweave_origin"]``, the name of the
    node of the given module that it stands for. ``sizes`` are the lengths of the parts in tokens. ``joined`` tells
    where a value was made whole because an operator needs it so. ``parts`` are, by the name of a divided node, the
    names of the nodes that return its parts.
    """

    module: GraphModule
    sizes: tuple[int, ...]
    joined: tuple[Joined, ...]
    parts: Mapping[str, tuple[str, ...]]


def split(
    module: GraphModule,
    axes: Mapping[str, int],
    sizes: Sequence[int],
    *,
    rules: Mapping[str, Rule] | None = None,
    strict: bool = False,
) -> Split:
    """``module``, an AOT graph of functional ATen operators and collectives, in parts of ``sizes`` tokens.

    ``axes`` names the placeholders to cut and the dimension of each that carries the tokens: its extent is the sum of
    ``sizes``, or a multiple of it where a token has several elements in a row. Everything else follows from rules
    (``rules`` are taken before the default ones, by operator name). An operator that no rule divides runs once, on
    joined values; with ``strict`` it is refused. The given module is left as it is.

    Raises:
        OptionError: ``axes`` names no such placeholder or dimension, or its extent does not fit ``sizes``.
        ModelError: the module has calls of methods or modules, or no values in its metadata.
        SplitRefused: a size is symbolic, an operator writes in place, or, with ``strict``, cannot be divided.
        InternalError: a rule claimed a state that its own nodes do not have.
    """
    division = _division(sizes)
    splitting = _Splitting(module, division, {**default_rules(), **(rules or {})}, strict)
    splitting.cut(axes)
    for node in module.graph.nodes:
        splitting.visit(node)
    return splitting.finished()


def _division(sizes: Sequence[int]) -> Division:
    if not sizes or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes):
        raise OptionError(f"sizes of parts are {list(sizes)}", hint="give one or more positive numbers of tokens")
    return Division(tuple(sizes))


class _Splitting:
    """One run over the given module's nodes, in program order. Not to be used twice."""

    def __init__(self, module: GraphModule, division: Division, rules: Mapping[str, Rule], strict: bool) -> None:
        self.module, self.division, self.rules, self.strict = module, division, rules, strict
        self.graph = Graph()
        self.mode = fake_mode_of(module)
        self.states: dict[Node, Result] = {}
        self.forms = Forms(self.graph, self.mode, division)
        self.axes: dict[str, Along] = {}

    def cut(self, axes: Mapping[str, int]) -> None:
        """Take the placeholders named by ``axes`` for divided."""
        placeholders = {node.name: node for node in self.module.graph.find_nodes(op="placeholder")}
        for name, dim in axes.items():
            value = placeholders[name].meta.get("val") if name in placeholders else None
            if not isinstance(value, torch.Tensor):
                raise OptionError(f"there is no tensor {name!r} to cut", hint=f"there are {', '.join(placeholders)}")
            if not isinstance(dim, int) or not -value.dim() <= dim < value.dim():
                raise OptionError(f"{name!r} of shape {list(value.shape)} has no dimension {dim!r}")
            fresh_value(placeholders[name], self.mode)
            along = self.division.along(tuple(value.shape), dim % value.dim())
            if along is None:
                raise OptionError(
                    f"dimension {dim} of {name!r}, of shape {list(value.shape)}, is no multiple of "
                    f"{sum(self.division.sizes)}, the sum of {list(self.division.sizes)}",
                    hint="the parts' sizes add up to the number of tokens",
                )
            if self.division.count > 1:
                self.axes[name] = along

    def visit(self, node: Node) -> None:
        """Make the nodes that stand for ``node``."""
        if node.op in ("placeholder", "get_attr"):
            self._input(node)
        elif node.op == "output":
            self._output(node)
        elif node.op != "call_function":
            raise ModelError(f"{node.name!r} is a {node.op}, which an AOT graph has not", hint="trace with AOTAutograd")
        elif node.target is operator.getitem and isinstance(self._state(node.args[0]), tuple):
            self._item(node)
        elif mutates(node):
            self._once(node, "", WHOLE)
        else:
            self._operator(node)

    def finished(self) -> Split:
        """The module, once all nodes are visited."""
        prune(self.graph)
        self.graph.lint()
        result = GraphModule(self.module, self.graph)
        result.meta.update(self.module.meta)
        alive = set(self.graph.nodes)
        parts: dict[str, tuple[str, ...]] = {}
        for node, state in self.states.items():
            held = self.forms.parts(node, state)
            if held and alive.issuperset(held):
                parts[node.name] = tuple(part.name for part in held)
        return Split(result, self.division.sizes, tuple(self.forms.joined), MappingProxyType(parts))

    def _state(self, argument: Any) -> Result:
        return self.states[argument] if isinstance(argument, Node) else WHOLE

    def _input(self, node: Node) -> None:
        value = fresh_value(node, self.mode)
        made = self.graph.create_node(node.op, node.target, node.args, node.kwargs, node.name, node.type)
        made.meta = {**node.meta, "opweave_origin": node.name}
        if "val" in node.meta or isinstance(value, torch.Tensor):
            made.meta["val"] = value
        self.forms.put(node, WHOLE, (made,))
        self.states[node] = self.axes.get(node.name, WHOLE)

    def _output(self, node: Node) -> None:
        whole = torch.fx.map_arg(node.args, lambda value: self._whole(value, node, ""))
        made = self.graph.output(whole[0], node.type)
        made.meta = {**node.meta, "opweave_origin": node.name}

    def _item(self, node: Node) -> None:
        source, index = node.args
        states = self._state(source)
        assert isinstance(source, Node)
        assert isinstance(index, int)
        assert isinstance(states, tuple)
        state = states[index]
        if not self.forms.has_items(source):
            self._once(node, "", state)
            return
        made = []
        for part, held in enumerate(self.forms.items(source)):
            if isinstance(held, tuple):
                made.append(held[index])
            else:
                shown = part if state != WHOLE else None
                name = node.name if shown is None else f"{node.name}_part{part}"
                maker = Maker(self.graph, self.mode, Making(node, shown, name))
                made.append(maker.make(operator.getitem, (held, index), {}))
            if state == WHOLE:
                break
        self.states[node] = state
        self.forms.put(node, state, tuple(made))
        check_claim(node, source.meta["val"][index], state, made, self.division)

    def _operator(self, node: Node) -> None:
        if all(self._state(value) == WHOLE for value in node.all_input_nodes):
            self._once(node, "", WHOLE)
            return
        call, outcome = self._asked(node)
        if isinstance(outcome, Refused):
            if self.strict and any(isinstance(operand.state, Along) for operand in call.operands):
                raise SplitRefused(node.name, str(node.target), outcome.reason)
            self._once(node, outcome.reason, offered(call) if outcome.again is None else outcome.again)
        else:
            self._divided(call, outcome)

    def _asked(self, node: Node) -> tuple[Call, Divided | Refused]:
        """What the rule says, with operands that are Partial counted as Whole for rules that do not take them."""
        if "val" not in node.meta:
            raise ModelError(f"{node.name!r} has no value in its metadata", hint="trace with fake tensors")
        call = call_of(node, self.states, self.division)
        rule = rule_of(node, self.rules)
        refused = refusal_of(node, rule)
        if not refused and any(isinstance(operand.state, Ordered | Counts) for operand in call.operands):
            found = in_order(call, rule)
            if found is not None:
                return call, found
            call = call_of(node, {value: plain(self.states[value]) for value in node.all_input_nodes}, self.division)
        if refused or rule is None:
            return call, Refused(refused or "no rule for this operator")
        if rule.partial or not any(isinstance(operand.state, Partial) for operand in call.operands):
            return call, rule.divide(call)
        summed = {value: _unpartial(self.states[value]) for value in node.all_input_nodes}
        call = call_of(node, summed, self.division)
        if not any(isinstance(operand.state, Along) for operand in call.operands):
            return call, Refused("it reads the sum over all parts")
        outcome = rule.divide(call)
        if isinstance(outcome, Divided) and outcome.needs is None:
            needs = tuple(operand.state for operand in call.operands)
            outcome = replace(outcome, needs=needs)
        return call, outcome

    def _once(self, node: Node, reason: str, again: Result) -> None:
        """The operator once, on whole values."""
        maker = Maker(self.graph, self.mode, Making(node, None, node.name))
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda value: self._whole(value, node, reason))
        read = [(value, self.forms.held(value, WHOLE)[0]) for value in node.all_input_nodes]
        if all(alike(value.meta.get("val"), own.meta.get("val")) for value, own in read):
            made = maker.repeat(args, kwargs, node.meta.get("val"))
        elif "as_strided" in str(node.target):
            raise SplitRefused(node.name, str(node.target), "it reads memory whose layout the split changes")
        else:
            made = maker.make(node.target, args, kwargs)
            check_claim(node, node.meta.get("val"), WHOLE, [made], self.division)
        self.forms.put(node, WHOLE, (made,))
        self.states[node] = again

    def _divided(self, call: Call, outcome: Divided) -> None:
        """The operator once for each part; once for all where its result is Whole."""
        node = call.node
        needs = outcome.needs or tuple(operand.state for operand in call.operands)
        held = tuple(
            self._held(operand.node, state, node, outcome.reason)
            for operand, state in zip(call.operands, needs, strict=True)
        )
        single = all(state == WHOLE for state in _states(outcome.result))
        made: list[Node | tuple[Node, ...]] = []
        order = range(1 if single else self.division.count)
        for index in reversed(order) if outcome.last_first else order:
            making = Making(node, None if single else index, node.name if single else f"{node.name}_part{index}")
            part = Part(index, call, held, tuple(made), Maker(self.graph, self.mode, making))
            given = {name: values(index) for name, values in outcome.given.items()}
            made.append(outcome.emit(part) if outcome.emit else part.again(**given))
        if outcome.last_first:
            made.reverse()
        self.states[node] = outcome.again if outcome.result == WHOLE else outcome.result
        if isinstance(outcome.result, tuple):
            self.forms.put_items(node, made)
        else:
            self.forms.put(node, outcome.result, tuple(value for value in made if isinstance(value, Node)))
        check_claim(node, call.value, outcome.result, made, self.division)

    def _held(self, value: Node, wanted: State, reader: Node, reason: str) -> tuple[Node, ...]:
        """The nodes of ``value`` as ``wanted``."""
        state = _single(self.states[value])
        if isinstance(state, Ordered) and wanted != state:
            self._again(value, reader, reason)
        return self.forms.get(value, state, wanted, reader, reason)

    def _again(self, value: Node, reader: Node, reason: str) -> None:
        """``value``, whose parts do not join to it, from whole operands: the same call that the given module makes."""
        if self.forms.has(value, WHOLE):
            return
        reason = reason or "rows in the order of their experts are returned"
        args, kwargs = torch.fx.map_arg((value.args, value.kwargs), lambda own: self._whole(own, reader, reason))
        maker = Maker(self.graph, self.mode, Making(value, None, value.name))
        self.forms.put(value, WHOLE, (maker.make(value.target, args, kwargs),))

    def _whole(self, value: Node, reader: Node, reason: str) -> Node:
        state = self.states[value]
        if isinstance(state, tuple):
            if any(isinstance(item, Ordered) for item in state):
                self._again(value, reader, reason)
            if not self.forms.has(value, WHOLE):
                raise SplitRefused(reader.name, str(reader.target), f"it reads all that {value.name!r} returns at once")
            return self.forms.held(value, WHOLE)[0]
        return self._held(value, WHOLE, reader, reason)[0]


def _states(result: Result) -> tuple[State, ...]:
    return result if isinstance(result, tuple) else (result,)


def _single(result: Result) -> State:
    return WHOLE if isinstance(result, tuple) else result


def _unpartial(state: Result) -> Result:
    if isinstance(state, tuple):
        return state
    return WHOLE if isinstance(state, Partial) else state
