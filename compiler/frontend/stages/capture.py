"""A model as one straight line of ATen calls, exported so that it can be cut: what may be moved, repeated, or not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from ....errors import ModelError
from ..aten import is_check, is_random
from .heavy import is_heavy

__all__ = ["Program", "captured_program", "storages_of", "tensor_of"]

#: Calls that update buffers although their schema does not say so.
_UPDATES_BUFFERS = ("batch_norm", "instance_norm", "_native_batch_norm_legit", "native_batch_norm", "cudnn_batch_norm")
#: Calls in place that change no bytes.
_HARMLESS = ("detach_", "requires_grad_")


@dataclass(frozen=True)
class Program:
    """``module`` as exported: parameters and buffers are the model's own, under the model's names.

    ``body`` are the nodes that belong to one stage, in program order; ``light`` are those that any stage may repeat:
    pure, without products, of no parameter and no value that has a gradient, as masks and rotary angles are. ``inputs``
    are the placeholders of tensors, in the order of ``flatten``; ``returned`` the nodes that the model returns, in the
    structure ``result``. ``temporary`` are the buffers that are no part of the model's ``state_dict``.
    """

    module: fx.GraphModule
    name: str
    body: tuple[fx.Node, ...]
    light: frozenset[fx.Node]
    inputs: tuple[fx.Node, ...]
    returned: tuple[fx.Node, ...]
    call: pytree.TreeSpec
    result: pytree.TreeSpec
    temporary: frozenset[str]

    @cached_property
    def place(self) -> Mapping[fx.Node, int]:
        """Where each node of the body is in it."""
        return {node: index for index, node in enumerate(self.body)}

    @cached_property
    def differentiable(self) -> frozenset[fx.Node]:
        """Nodes of the body and attributes through which a gradient flows."""
        found: set[fx.Node] = set()
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                value = attribute(self.module, node)
                has = isinstance(value, torch.Tensor) and value.requires_grad
            else:
                has = node.op == "call_function" and _differentiates(node) and bool(found & set(node.all_input_nodes))
            if has:
                found.add(node)
        return frozenset(found)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> tuple[torch.Tensor, ...]:
        """The tensors that the first stage takes, for a call of the model.

        Raises:
            ModelError: the call has another structure than the example, or other values that are no tensors.
        """
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
        if spec != self.call:
            raise ModelError(
                f"{self.name} is called with {spec}, and was captured with {self.call}",
                hint="give the arguments that it was captured with, positional and named alike",
            )
        places = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        for node, leaf in zip(places, leaves, strict=True):
            if node not in self.inputs and leaf != node.meta.get("val"):
                raise ModelError(f"{self.name} was captured with {node.name}={node.meta.get('val')!r}, not {leaf!r}")
        return tuple(leaf for node, leaf in zip(places, leaves, strict=True) if node in self.inputs)

    def unflatten(self, results: torch.Tensor | Sequence[torch.Tensor]) -> Any:
        """What the model returns, of what the last stage does."""
        leaves = [results] if isinstance(results, torch.Tensor) else list(results)
        filled, given = [], iter(leaves)
        for leaf in pytree.arg_tree_leaves(*self.module.graph.output_node().args):
            filled.append(next(given) if isinstance(leaf, fx.Node) else leaf)
        return pytree.tree_unflatten(filled, self.result)


def captured_program(
    model: torch.nn.Module, example_inputs: Sequence[Any], named_inputs: Mapping[str, Any] | None = None
) -> Program:
    """``model(*example_inputs, **named_inputs)`` as a program that can be cut.

    The model is taken in the mode, training or evaluation, that it is in, for inputs of these shapes: give one
    microbatch. Real or fake tensors will do.

    Raises:
        ModelError: ``torch.export`` cannot trace the model, or it returns something that is no tensor.
    """
    args, kwargs = tuple(example_inputs), dict(named_inputs or {})
    name = type(model).__name__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.export's own classes, and of attributes that models assign
            exported = torch.export.export(model, args, kwargs)
            module = exported.module(check_guards=False)
    except Exception as error:  # torch.export raises errors of many kinds, of its own and of the model
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(
            f"torch.export cannot trace model {name!r}: {lines[0].strip():.300}",
            hint="run the model on the same inputs first; control flow and shapes may not depend on values",
        ) from error
    assert isinstance(module, fx.GraphModule)
    temporary = frozenset(
        str(spec.target)
        for spec in exported.graph_signature.input_specs
        if spec.target is not None and spec.target not in model.state_dict(keep_vars=True)
    )
    _name_ties(module, [path for path, _ in model.named_parameters()])
    return _program(module, name, exported.call_spec, temporary)


def attribute(module: torch.nn.Module, node: fx.Node) -> Any:
    """What the ``get_attr`` node reads of ``module``."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor that ``node`` makes; ``None`` if it makes none, or several."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def storages_of(node: fx.Node) -> frozenset[int]:
    """Storages in which the results of ``node`` lie."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return frozenset(leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, torch.Tensor))


def _program(module: fx.GraphModule, name: str, call: Any, temporary: frozenset[str]) -> Program:
    graph = module.graph
    for node in reversed(graph.nodes):
        if isinstance(node.target, torch._ops.OpOverload) and is_check(node.target) and not node.users:
            graph.erase_node(node)
    inputs = tuple(node for node in graph.find_nodes(op="placeholder") if tensor_of(node) is not None)
    returned = tuple(leaf for leaf in _leaves(graph) if isinstance(leaf, fx.Node))
    strange = [node.name for node in returned if tensor_of(node) is None]
    if strange or any(not isinstance(leaf, fx.Node | None) for leaf in _leaves(graph)) or not returned:
        what = f"{strange[0]!r}, which is no tensor" if strange else "something that is no tensor"
        raise ModelError(f"{name} returns {what}", hint="let the model return tensors alone")
    _place_updates(graph)
    light = _light(graph)
    body = tuple(node for node in graph.nodes if node.op == "call_function" and node not in light)
    if any(node.op in ("call_module", "call_method") for node in graph.nodes):
        raise ModelError(f"{name} exports to calls of modules, which cannot be cut")
    return Program(module, name, body, light, inputs, returned, call.in_spec, call.out_spec, temporary)


def _name_ties(module: fx.GraphModule, names: Sequence[str]) -> None:
    """Read tied parameters under the one of their names that ``named_parameters`` gives."""
    own = dict(module.named_parameters(remove_duplicate=False))
    first = {id(own[name]): name for name in reversed(names) if name in own}
    for node in module.graph.find_nodes(op="get_attr"):
        value = attribute(module, node)
        if isinstance(value, torch.nn.Parameter):
            node.target = first.get(id(value), node.target)


def _leaves(graph: fx.Graph) -> list[Any]:
    return pytree.arg_tree_leaves(*graph.output_node().args)


def _place_updates(graph: fx.Graph) -> None:
    """Put what updates a buffer at the program's end where the new value is made."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.copy_.default and node.args[0].op == "get_attr" and not node.users:
            value = node.args[1]
            if storages_of(value) & storages_of(node.args[0]):
                graph.erase_node(node)  # it was updated in place already
            elif value.op == "call_function":
                readers = [user for user in node.args[0].users if user is not node]
                last = max([value, *readers], key=list(graph.nodes).index)
                last.append(node)


def _light(graph: fx.Graph) -> frozenset[fx.Node]:
    light: set[fx.Node] = set()
    changed = frozenset(storage for node in graph.nodes for storage in updated_storages(node))
    for node in graph.nodes:
        if node.op != "call_function" or not _is_pure(node) or is_heavy(node):
            continue
        if storages_of(node) & changed or any(storages_of(read) & changed for read in node.all_input_nodes):
            continue
        if all(read in light or read.op == "placeholder" or _is_fixed(read) for read in node.all_input_nodes):
            light.add(node)
    return frozenset(light)


def _is_parameter(node: fx.Node) -> bool:
    module = node.graph.owning_module
    return module is not None and isinstance(attribute(module, node), torch.nn.Parameter)


def _is_fixed(node: fx.Node) -> bool:
    return node.op == "get_attr" and not _is_parameter(node)


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        inner = [read for read in node.all_input_nodes if read.op == "get_attr" and read.meta.get("val") is None]
        graph = node.graph.owning_module
        return not inner or all(_graph_is_pure(attribute(graph, read)) for read in inner if graph is not None)
    if any(target._schema.name == f"aten::{name}" for name in _HARMLESS):
        return True
    return not target._schema.is_mutable and not is_random(target, node.args, node.kwargs) and not _updates(node)


def _graph_is_pure(inner: Any) -> bool:
    if not isinstance(inner, fx.GraphModule):
        return False
    return all(_is_pure(node) and not is_heavy(node) for node in inner.graph.nodes if node.op == "call_function")


def _updates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and any(
        node.target._schema.name == f"aten::{name}" for name in _UPDATES_BUFFERS
    )


def updated_storages(node: fx.Node) -> Iterator[int]:
    """Storages that ``node`` writes to which were there before it."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    if _updates(node):
        for read in node.all_input_nodes:
            if read.op == "get_attr" and not _is_parameter(read):
                yield from storages_of(read)
        return
    schema = node.target._schema
    if not schema.is_mutable or any(schema.name == f"aten::{name}" for name in _HARMLESS):
        return
    given = dict(zip([argument.name for argument in schema.arguments], node.args, strict=False)) | dict(node.kwargs)
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            for read in pytree.arg_tree_leaves(given.get(argument.name)):
                if isinstance(read, fx.Node):
                    yield from storages_of(read)


def _differentiates(node: fx.Node) -> bool:
    """Whether a gradient flows through ``node`` if one flows into it."""
    name = str(node.target)
    if "wrap_with_set_grad_enabled" in name:
        return bool(node.args[0])
    if name.startswith(("aten.detach", "aten.stop_gradient")):
        return False
    leaves = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
    return not leaves or any(leaf.dtype.is_floating_point or leaf.dtype.is_complex for leaf in leaves)
