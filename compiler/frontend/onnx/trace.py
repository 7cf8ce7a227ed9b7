"""The interpreter: walks the ONNX nodes once and records ATen operators, folding what is constant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto

from ....errors import ModelError, OpweaveError, UnsupportedOperator
from ...runtime.custom_ops import tensor_from_numpy, tensor_to_numpy
from .control import inline_control
from .external import read_tensor
from .fallback import fall_back, is_known, planned_only
from .fold import as_sequence, check_outputs, fold
from .functions import body_of, instantiate
from .graph import Recorder, untraced
from .lowering import LOWERINGS
from .node import CannotLower, Literal, Lowered, Lowering, Node, Value
from .operands import Definition, check_packed, describe, from_definition, packed_name
from .reading import SourceModel
from .wellformed import captured_names

__all__ = ["Definition", "Interpreter", "Scope"]


_MAX_DEPTH = 48
_EXAMPLE_ELEMENTS = 4096
_DEMAND_ELEMENTS = 2**26
#: Drawn anew at each run, so never folded into a constant.
_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
_BROKEN = (RuntimeError, ValueError, TypeError, IndexError, KeyError, OverflowError, ArithmeticError, AssertionError)


@dataclass
class Scope:
    """The values visible to a list of nodes: a graph, a subgraph or a function's body."""

    values: dict[str, Value]
    opsets: Mapping[str, int]
    depth: int = 0
    path: str = ""


@dataclass
class Interpreter:
    """Interprets one model; ``run`` is the function that gets traced, and is called once.

    ``specialized`` collects the example inputs whose values the recorded graph relies on.
    """

    source: SourceModel
    definitions: Mapping[str, Definition]
    examples: Mapping[str, torch.Tensor]
    native: Counter[str] = field(default_factory=Counter)
    folded: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    opaque: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    specialized: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[torch.fx.Node, torch.Tensor] = field(default_factory=dict)
    _resolved: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _recorder: Recorder | None = None

    def run(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Interpret the whole graph on fake ``inputs``, one for each of the source's inputs."""
        self._recorder = Recorder()
        self.weights = self._recorder.weights
        values: dict[str, Value] = {}
        for spec, tensor in zip(self.source.inputs, inputs, strict=True):
            example = self.examples.get(spec.name)
            usable = example is not None and example.numel() <= _EXAMPLE_ELEMENTS
            constant, sources = (example, frozenset({spec.name})) if usable else (None, frozenset[str]())
            values[spec.name] = Value(spec.name, tensor, constant, sources, spec.packed)
        graph = self.source.proto.graph
        with untraced():
            for proto in graph.initializer:
                constant = read_tensor(proto, self.source.folder, f"initializer {proto.name!r}")
                values[proto.name] = Value(proto.name, None, constant, packed=packed_name(proto))
        scope = Scope(values, self.source.opsets)
        self.run_nodes(self.source.nodes, scope)
        return tuple(self._output(scope.values[info.name]) for info in graph.output)

    def _output(self, value: Value) -> torch.Tensor:
        if value.sequence is not None:
            raise UnsupportedOperator(f"graph output {value.name!r} is a sequence, not a tensor")
        if value.packed:
            raise UnsupportedOperator(f"graph output {value.name!r} is {value.packed}, which opweave only reads")
        return self.resolve(value)

    def run_nodes(self, nodes: Sequence[onnx.NodeProto], scope: Scope) -> None:
        """Interpret ``nodes`` in order, adding their outputs to the scope."""
        if scope.depth > _MAX_DEPTH:
            raise ModelError(f"functions or subgraphs are nested more than {_MAX_DEPTH} deep; are they recursive?")
        assert self._recorder is not None
        for proto in nodes:
            node = self._node(proto, scope)
            narrow = check_packed(node)
            values = self._interpret(node, scope)
            if narrow:
                values = [None if value is None else replace(value, packed=narrow) for value in values]
            used = [name for name in proto.output if name]
            if len(values) < len(proto.output) and any(proto.output[len(values) :]):
                raise ModelError(f"{node} has {len(used)} outputs, the operator gives {len(values)}")
            for name, value in zip(proto.output, values, strict=False):
                if name and value is None:
                    raise ModelError(f"{node} does not give the output {name!r} in this form")
                if name and value is not None:
                    scope.values[name] = replace(value, name=value.name or scope.path + name)
            self._recorder.label(scope.path + (proto.name or next(iter(used), proto.op_type)))

    def _node(self, proto: onnx.NodeProto, scope: Scope) -> Node:
        try:
            inputs = tuple(scope.values[name] if name else None for name in proto.input)
        except KeyError as missing:
            raise ModelError(f"node {proto.name!r} ({proto.op_type}) uses {missing}, which nothing makes") from None
        attributes = {attribute.name: attribute for attribute in proto.attribute}
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        return Node(proto, scope.opsets.get(domain, 1), inputs, self.resolve, self.demand, self.literal, attributes)

    def resolve(self, value: Value) -> torch.Tensor:
        """The traced tensor of ``value``; a constant becomes a weight of the graph when it is first used."""
        if value.traced is not None:
            return value.traced
        if value.constant is None:
            raise CannotLower(f"{value.name!r} is a sequence")
        found = self._resolved.get(id(value.constant))
        if found is None:
            assert self._recorder is not None
            found = (value.constant, self._recorder.add_weight(value.name, value.constant))
            self._resolved[id(value.constant)] = found
        return found[1]

    def demand(self, value: Value) -> Literal:
        """The known value of ``value``, noting the example inputs that it relies on."""
        if value.constant is None:
            raise CannotLower(f"needs the value of {value.name!r} while importing")
        if value.constant.numel() > _DEMAND_ELEMENTS:
            raise CannotLower(f"needs the {value.constant.numel()} values of {value.name!r} while importing")
        self.specialized.update({name: self.examples[name] for name in value.sources})
        with untraced():
            return tensor_to_numpy(value.constant)

    def literal(self, array: Literal, name: str) -> torch.Tensor:
        """A constant that a lowering made, as a weight of the graph."""
        with untraced():
            constant = tensor_from_numpy(array)
        return self.resolve(Value(name, None, constant))

    def _interpret(self, node: Node, scope: Scope) -> Sequence[Value | None]:
        try:
            if node.op_type == "Constant" and node.proto.domain in ("", "ai.onnx"):
                return [self._constant(node)]
            known = [value.constant is not None and not value.sources for value in node.inputs if value is not None]
            if all(known) and not captured_names(node.proto) and node.op_type not in _RANDOM:
                try:
                    return self._fold(node)
                except CannotLower:
                    pass  # the general way covers function bodies and the reference implementation
            return self._record(node, scope)
        except OpweaveError:
            raise
        except _BROKEN as error:
            given = ", ".join(describe(value) for value in node.inputs)
            message = str(error).strip().splitlines()
            raise ModelError(f"{node} does not fit its inputs {given}: {message[0] if message else error!r}") from error

    def _constant(self, node: Node) -> Value:
        self.folded["Constant"] += 1
        for name, read in _CONSTANT_ATTRIBUTES.items():
            attribute = node.attributes.get(name)
            if attribute is not None:
                with untraced():
                    return Value("", None, tensor_from_numpy(np.asarray(read(attribute))))
        if "value" in node.attributes:
            with untraced():
                proto = node.attributes["value"].t
                return Value("", None, read_tensor(proto, self.source.folder, str(node)), packed=packed_name(proto))
        raise UnsupportedOperator(f"{node} is a constant of a kind that opweave does not read (string or sparse)")

    def _lowering(self, node: Node) -> Lowering | None:
        domain, op_type = node.proto.domain, node.op_type
        definition = self.definitions.get(f"{domain}::{op_type}") or self.definitions.get(op_type)
        if definition is not None:
            return from_definition(definition)
        return LOWERINGS.get(op_type if domain in ("", "ai.onnx") else f"{domain}::{op_type}")

    def _fold(self, node: Node) -> Sequence[Value | None]:
        lowering = self._lowering(node)
        if lowering is None:
            raise CannotLower("no lowering")
        try:
            results = fold(node, lowering)
        except NotImplementedError as error:
            raise CannotLower(str(error)) from None
        self.folded[node.op_type] += 1
        return [None if result is None else Value("", None, result) for result in results]

    def _record(self, node: Node, scope: Scope) -> Sequence[Value | None]:
        if node.op_type in _RANDOM and node.proto.domain in ("", "ai.onnx") and self._lowering(node) is None:
            raise UnsupportedOperator(f"{node} draws random numbers: its result cannot be checked or planned again")
        inlined = inline_control(self, node, scope)
        if inlined is not None:
            self.native[node.op_type] += 1
            return inlined
        lowering = self._lowering(node)
        reason = "no lowering"
        if lowering is not None:
            try:
                return self._lower(node, lowering)
            except CannotLower as refusal:
                reason = str(refusal)
        body = body_of(node, self.source.proto, scope.opsets)
        if body is not None:
            saved = [Counter(counter) for counter in (self.native, self.folded, self.fallbacks, self.opaque)]
            try:
                return self._inline(node, body, scope)
            except (CannotLower, UnsupportedOperator) as refusal:
                self.native, self.folded, self.fallbacks, self.opaque = saved
                reason = str(refusal)
        return self._leave(node, scope, reason)

    def _lower(self, node: Node, lowering: Lowering) -> Sequence[Value | None]:
        results = as_sequence(lowering(node))
        check_outputs(node, results)
        self.native[node.op_type] += 1
        return self._values(node, results, self._example_outputs(node, lowering))

    def _values(
        self, node: Node, results: Sequence[Lowered], examples: Sequence[torch.Tensor | None]
    ) -> list[Value | None]:
        sources = frozenset[str]().union(*(value.sources for value in node.inputs if value is not None))
        values: list[Value | None] = []
        for index, result in enumerate(results):
            if result is None:
                values.append(None)
            elif isinstance(result, np.ndarray | np.generic):
                with untraced():
                    values.append(Value("", None, tensor_from_numpy(np.asarray(result))))
            else:
                example = examples[index] if index < len(examples) else None
                if example is not None and not sources:  # computed from constants, if not by a lowering
                    values.append(Value("", None, example))
                else:
                    values.append(Value("", result, example, sources if example is not None else frozenset()))
        return values

    def _example_outputs(self, node: Node, lowering: Lowering) -> Sequence[torch.Tensor | None]:
        """The node's values for the example inputs, where those make all of its inputs known."""
        given = [value for value in node.inputs if value is not None]
        if not given or any(value.constant is None or value.constant.numel() > _EXAMPLE_ELEMENTS for value in given):
            return ()
        try:
            return fold(node, lowering)
        except (CannotLower, OpweaveError, *_BROKEN):
            return ()

    def _inline(self, node: Node, body: onnx.FunctionProto, scope: Scope) -> Sequence[Value | None]:
        function = instantiate(body, node)
        values = {name: value for name, value in zip(function.input, node.inputs, strict=False) if value is not None}
        opsets = {("" if entry.domain == "ai.onnx" else entry.domain): entry.version for entry in body.opset_import}
        label = scope.path + (node.proto.name or node.op_type) + "/"
        inner = Scope(values, opsets or scope.opsets, scope.depth + 1, label)
        for proto in function.nodes:
            absent = [name for name in proto.input if name and name in function.input and name not in values]
            for name in absent:  # an optional input that the call does not give
                proto.input[list(proto.input).index(name)] = ""
        self.run_nodes(function.nodes, inner)
        return [inner.values.get(name) for name in function.output]

    def _leave(self, node: Node, scope: Scope, reason: str) -> Sequence[Value | None]:
        """Fall back to onnx's reference implementation, or only plan the node where even that has no semantics."""
        captured = {name: scope.values[name] for name in captured_names(node.proto) if name in scope.values}
        if is_known(node, self.source.proto):
            results, examples = fall_back(node, captured, scope.opsets, self.source)
            self.fallbacks[node.op_type] += 1
            self.reasons.setdefault(node.op_type, reason)
            return self._values(node, results, examples)
        results = planned_only(node, self.source)
        self.opaque[node.op_type] += 1
        return self._values(node, results, ())


_CONSTANT_ATTRIBUTES: Mapping[str, Callable[[AttributeProto], Any]] = {
    "value_float": lambda attribute: np.float32(attribute.f),
    "value_floats": lambda attribute: np.array(attribute.floats, np.float32),
    "value_int": lambda attribute: np.int64(attribute.i),
    "value_ints": lambda attribute: np.array(attribute.ints, np.int64),
}
