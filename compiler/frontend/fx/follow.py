"""Runs a ``GraphModule`` node by node on fake tensors and decides what each call is: view, write, or operator."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx.node import map_arg

from ....errors import ModelError, UnsupportedOperator
from ...graph import Role
from ..aten import functional_form, is_check, is_random, positional, tensors_in
from ..collectives import collective_of, is_communication, is_wait
from .recorder import Call, Recorder
from .sources import check_plain, place_weights

__all__ = ["Follower"]

_NAMESPACES = ("aten", "opweave", "prims")
_SIZE_ARITHMETIC = frozenset({"_operator", "operator", "math", "builtins", "torch"})
_ATEN = torch.ops.aten
_CPU = torch.device("cpu")
#: Take (input, weight, bias, running mean, running variance, training, momentum, eps, ...) and move the statistics in
#: training, most of them without saying so in their schema. The value tells whether they return one tensor.
_BATCH_NORMS = {
    _ATEN.batch_norm.default: True,
    _ATEN.native_batch_norm.default: False,
    _ATEN._native_batch_norm_legit.default: False,
}
#: Calls whose first result another operator gives alone, for the same arguments: without their other results, int64
#: indices twice the size of the values among them, an operator's working set is smaller.
_FIRST_RESULT = {
    _ATEN.max_pool2d_with_indices.default: _ATEN.max_pool2d.default,
    _ATEN.max_pool3d_with_indices.default: _ATEN.max_pool3d.default,
    _ATEN.native_layer_norm.default: _ATEN.layer_norm.default,
}


class Follower:
    """Runs nodes. Storage that a call creates becomes a buffer, the call an operator; other results are views.

    ``constants`` collects the values of tensors that the module holds itself, by the buffer's name.
    """

    def __init__(self, recorder: Recorder, mode: FakeTensorMode) -> None:
        self.constants: dict[str, torch.Tensor] = {}
        self._recorder = recorder
        self._mode = mode
        self._attributes: dict[int, torch.Tensor] = {}

    def run(self, module: torch.fx.GraphModule, arguments: Sequence[Any]) -> Any:
        """What ``module`` returns for ``arguments``; records its operators."""
        values: dict[torch.fx.Node, Any] = {}
        remaining = iter(arguments)
        for node in module.graph.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            match node.op:
                case "placeholder":
                    values[node] = next(remaining)
                case "get_attr":
                    values[node] = self._attribute(module, node)
                case "call_function":
                    values[node] = self._call(node, args, kwargs)
                case "output":
                    return args[0]
                case _:
                    raise _not_aten(node)
            self._recorder.remember(node, values[node])
        raise ModelError("the module has no output node")

    def _attribute(self, module: torch.fx.GraphModule, node: torch.fx.Node) -> Any:
        value = operator.attrgetter(str(node.target))(module)
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self._attributes:
            with unset_fake_temporarily():  # the value is real
                placed = place_weights(
                    self._recorder.builder, self._mode, {node.name: value}, {node.name: Role.CONSTANT}
                )
            self._attributes[id(value)] = placed.fakes[node.name]
            self.constants.update(placed.values)
        return self._attributes[id(value)]

    def _call(self, node: torch.fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            return self._overload(node, target, args, kwargs)
        if isinstance(target, torch._ops.HigherOrderOperator):
            if str(target) == "wrap_with_set_grad_enabled":  # (enabled, body, *operands): no gradients here anyway
                return self.run(args[1], args[2:])
            raise UnsupportedOperator(
                f"node {node.name!r} is the higher-order operator {target}, which has no lowering here",
                hint="control flow and custom regions must be decided when the model is exported",
            )
        if target is operator.getitem:
            return args[0][args[1]]
        if getattr(target, "__module__", "") not in _SIZE_ARITHMETIC or list(tensors_in((args, kwargs))):
            raise _not_aten(node)
        return target(*args, **kwargs)  # type: ignore[operator]

    def _overload(
        self, node: torch.fx.Node, target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if is_check(target):
            return None
        if is_wait(target):
            return args[0]  # the same memory: the collective and its wait are one operator
        if is_communication(target):
            _refuse_unknown_communication(node, target, args, kwargs)
        elif target.namespace not in _NAMESPACES:
            raise UnsupportedOperator(
                f"node {node.name!r} calls {target}, which has no lowering here",
                hint="choose an implementation in plain torch, where the library offers one: for experts of "
                'transformers, experts_implementation="batched_mm" in the configuration',
            )
        arguments = positional(target, _on_cpu(args), _on_cpu(dict(kwargs)))
        if target in _FIRST_RESULT and _uses_first_only(node):
            return (self._operator(Call(_FIRST_RESULT[target], *arguments, node), self._recorder.label(node)),)
        return self._operator(Call(target, *arguments, node), self._recorder.label(node))

    def _operator(self, call: Call, label: str) -> Any:
        if torch.Tag.inplace_view in call.target.tags and not call.target._schema.name.startswith("aten::resize"):
            return _evaluate(call)  # changes the fake's own sizes and strides, and no bytes
        if call.target in _BATCH_NORMS and call.args[5] and call.args[3] is not None:
            return self._training_batch_norm(call, label)
        if call.target is _ATEN.instance_norm.default and call.args[5] and call.args[3] is not None:
            raise _hidden_write(call, label)
        if call.target._schema.is_mutable:
            return self._in_place(call, label)
        if call.target is _ATEN.copy.default:
            call = _copy(call.args[0], call.args[1], call.node)
        try:
            result = _evaluate(call)
        except ModelError:
            if call.target is not _ATEN.view.default:
                raise
            # An input that came with gaps is stored without, so a view of it may now need a copy.
            call = Call(_ATEN.reshape.default, call.args, call.kwargs, call.node)
            result = _evaluate(call)
        for value in tensors_in(result):
            check_plain(value, f"the result of node {label!r}")
        if all(self._recorder.builder.is_placed(value) for value in tensors_in(result)):
            return result
        _refuse_random(call, label)
        return self._recorder.create(call, result, label)

    def _in_place(self, call: Call, label: str) -> Any:
        """A call that writes its first argument: the functional form's result becomes the buffer's new version."""
        plain = functional_form(call.target)
        if plain is None:
            raise _hidden_write(call, label)
        old = call.args[0]
        call = Call(plain, call.args, call.kwargs, call.node)
        if plain is _ATEN.copy.default:
            self._recorder.write(_copy(old, call.args[1], call.node), old, label)
            return old
        result = _evaluate(call)
        if self._recorder.builder.is_placed(result):  # nothing to do, like dropout_ in evaluation
            return old
        _refuse_random(call, label)
        if result.shape != old.shape:  # resize_
            raise _hidden_write(call, label)
        if result.dtype != old.dtype:  # float16.add_(float32) computes in float32
            new = self._recorder.create(call, result, f"{label}promoted")
            call = _copy(old, new, call.node)
        self._recorder.write(call, old, label)
        return old

    def _training_batch_norm(self, call: Call, label: str) -> Any:
        """Batch normalisation that moves its running statistics: its functional form, written over them."""
        single = _BATCH_NORMS[call.target]
        call = Call(_ATEN._native_batch_norm_legit_functional.default, call.args[:8], node=call.node)
        result: tuple[torch.Tensor, ...] = _evaluate(call)
        self._recorder.create_and_write(call, result, call.args[3:5], label)
        return result[0] if single else result[:3]


def _copy(old: torch.Tensor, new: torch.Tensor, node: torch.fx.Node | None) -> Call:
    """``new`` in the shape and dtype of ``old``. ``aten.copy`` says the same, but reads ``old`` and all its storage."""
    expanded = new if new.shape == old.shape else _ATEN.expand.default(new, list(old.shape))
    if new.dtype == old.dtype:
        return Call(_ATEN.clone.default, (expanded,), node=node)
    return Call(_ATEN._to_copy.default, (expanded,), {"dtype": old.dtype}, node)


def _uses_first_only(node: torch.fx.Node) -> bool:
    return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


def _on_cpu(value: Any) -> Any:
    """Arguments with every device replaced: the plan decides where things are."""
    if isinstance(value, torch.device):
        return _CPU
    if isinstance(value, list | tuple):
        items = [_on_cpu(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return value


def _not_aten(node: torch.fx.Node) -> UnsupportedOperator:
    return UnsupportedOperator(
        f"node {node.name!r} is a {node.op} of {node.target!s:.80}, which is no ATen operator",
        hint="export the model first: torch.export.export(model, example_inputs)",
    )


def _refuse_unknown_communication(
    node: torch.fx.Node, target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    if collective_of(target, args, kwargs, node.name) is None:
        raise UnsupportedOperator(
            f"node {node.name!r} calls {target}, a communication that is no functional collective",
            hint="use the collectives of torch.distributed._functional_collectives in the model",
        )


def _hidden_write(call: Call, label: str) -> UnsupportedOperator:
    return UnsupportedOperator(
        f"node {label!r} calls {call.target}, which writes its arguments in a way that has no lowering here",
        hint="call model.eval() before exporting, or use the operator's functional form in the model",
    )


def _refuse_random(call: Call, label: str) -> None:
    if is_random(call.target, call.args, call.kwargs):
        raise UnsupportedOperator(
            f"node {label!r} calls {call.target}, which draws random numbers",
            hint="call model.eval() before exporting, or pass random tensors as inputs",
        )


def _evaluate(call: Call) -> Any:
    """The call's result on fake tensors.

    Raises:
        ModelError: the shape or value of the result depends on data, or torch rejects the call.
    """
    where = f"node {call.node.name!r}" if call.node is not None else "a copy"
    try:
        return call.target(*call.args, **call.kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ModelError(
            f"{where} calls {call.target}, whose result depends on values that are known only when the model runs",
            hint="plans hold for fixed shapes: replace it by an operation of fixed output shape, such as torch.where",
        ) from error
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        message = str(error).strip().partition("\n")[0]
        raise ModelError(f"{where} calls {call.target}, which torch rejects: {message}") from error
