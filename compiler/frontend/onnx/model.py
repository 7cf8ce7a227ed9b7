"""From an ONNX model to a module of ATen operators."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ....errors import OptionError, UnsupportedOperator
from .graph import identifier
from .operands import Definition
from .reading import InputSpec, SourceModel, read_model
from .trace import Interpreter

__all__ = ["ImportedModel", "load"]


@dataclass(frozen=True)
class ImportedModel:
    """An ONNX model as ATen operators.

    ``module`` is called with the inputs, then the weights, and returns a tuple of the outputs. Its nodes carry a
    FakeTensor in ``meta["val"]`` and the name of the ONNX node they come from in ``meta["origin"]``; besides ATen
    operators it calls ``opweave::onnx_node`` and ``opweave::opaque`` (see ``compiler.runtime.custom_ops``).
    """

    module: torch.fx.GraphModule
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    #: Placeholder name to value, for every placeholder after the inputs, in the order of the placeholders.
    weights: Mapping[str, torch.Tensor]
    input_specs: tuple[InputSpec, ...]
    #: Operator type to how many nodes: recorded as ATen operators.
    native: Mapping[str, int]
    #: Computed from constants while importing, by the same lowerings.
    folded: Mapping[str, int]
    #: Left to onnx's reference implementation.
    fallbacks: Mapping[str, int]
    #: Planned from declared shapes, not executable.
    opaque: Mapping[str, int]
    #: Why the operator types in ``fallbacks`` were not lowered.
    reasons: Mapping[str, str]
    #: Inputs whose example value is built into the module; it is right only for inputs with these values.
    specialized: Mapping[str, torch.Tensor]


def load(
    source: str | Path | onnx.ModelProto,
    *,
    dims: Mapping[str, int] | None = None,
    definitions: Mapping[str, Definition] | None = None,
    strict: bool = False,
    fill_seed: int | None = None,
    examples: Mapping[str, torch.Tensor] | None = None,
) -> ImportedModel:
    """Import an ONNX model from a file or a ModelProto; opset 7 to the newest that the installed onnx knows.

    ``dims`` binds symbolic dimensions. ``definitions`` gives operators a meaning, by ``op_type`` or
    ``domain::op_type``: each is called with one tensor an input (``None`` if absent) and the node's attributes by name.
    ``strict`` refuses models with operators that are not lowered. ``fill_seed`` replaces all-equal weights by random
    ones, as ``randomize_weights`` does. ``examples`` gives values for some inputs: where an operator needs the value of
    an input to know its shapes, the module is specialised to the example and says so in ``specialized``.

    Raises ModelError if the model is malformed or too large, UnsupportedOperator for operators and element types that
    cannot be represented, OptionError for ``dims`` and ``examples`` that the model does not have.
    """
    if fill_seed is not None:
        from .external import embed_external_data
        from .randomize import randomize_weights

        source = randomize_weights(embed_external_data(source), fill_seed)
    examples = dict(examples or {})
    model = read_model(source, dict(dims or {}), examples)
    _check_examples(model, examples)
    interpreter = Interpreter(model, dict(definitions or {}), examples)
    module = _trace(model, interpreter)
    if strict and (interpreter.fallbacks or interpreter.opaque):
        refused = sorted({*interpreter.fallbacks, *interpreter.opaque})
        raise UnsupportedOperator(
            f"no lowering for {', '.join(refused)}, and strict import allows no fallback",
            hint="register a definition, or import without strict",
        )
    return ImportedModel(
        module=module,
        input_names=tuple(spec.name for spec in model.inputs),
        output_names=tuple(info.name for info in model.proto.graph.output),
        weights=_finish(module, model, interpreter),
        input_specs=model.inputs,
        native=dict(interpreter.native),
        folded=dict(interpreter.folded),
        fallbacks=dict(interpreter.fallbacks),
        opaque=dict(interpreter.opaque),
        reasons=dict(interpreter.reasons),
        specialized=dict(interpreter.specialized),
    )


def _check_examples(model: SourceModel, examples: Mapping[str, torch.Tensor]) -> None:
    specs = {spec.name: spec for spec in model.inputs}
    for name, value in examples.items():
        if value.dtype != specs[name].dtype:
            raise OptionError(f"the example for input {name!r} is {value.dtype}, expected {specs[name].dtype}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging a traceback for each operator that does not fit its inputs: ModelError says it once."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")

    def silence(record: logging.LogRecord) -> bool:
        del record
        return False

    logger.addFilter(silence)
    try:
        yield
    finally:
        logger.removeFilter(silence)


def _trace(model: SourceModel, interpreter: Interpreter) -> torch.fx.GraphModule:
    with torch.no_grad(), _quiet(), FakeTensorMode():
        inputs = [torch.empty(spec.shape, dtype=spec.dtype) for spec in model.inputs]
        module: torch.fx.GraphModule = make_fx(interpreter.run)(*inputs)
    return module


def _finish(module: torch.fx.GraphModule, model: SourceModel, interpreter: Interpreter) -> dict[str, torch.Tensor]:
    """Drop what nothing uses, give the placeholders the model's names; returns the weights in order."""
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    values = {node.name: value for node, value in interpreter.weights.items()}
    graph.eliminate_dead_code()
    weights = {}
    for index, node in enumerate(placeholders):
        if index < len(model.inputs):
            name = model.inputs[index].name
            node._rename(identifier(name))
            node.target = node.name
            node.meta["origin"] = name
        elif not node.users:
            graph.erase_node(node)
        else:
            weights[str(node.target)] = values[str(node.target)]
    graph.set_codegen(torch.fx.graph.CodeGen())
    graph.lint()
    module.recompile()
    return weights
