"""``torch.export`` programs and plain modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    InputSpec,
    OutputKind,
    TensorArgument,
)

from ....errors import ModelError, UnsupportedOperator
from ...graph import Role
from ..program import ImportedGraph
from .builder import is_dense
from .convert import Converted, convert
from .spread import from_spread, is_spread

__all__ = ["from_exported", "from_module"]

_UPDATES = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION, OutputKind.PARAMETER_MUTATION)


def from_module(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, name: str | None = None
) -> ImportedGraph:
    """The graph of ``module(*args, **kwargs)``, for inputs of these shapes and dtypes.

    Args:
        module: exported as it is: call ``eval()`` before, unless training behaviour is wanted. Its weights are
            referred to, not copied. One whose weights DTensor spreads over ranks is captured as this rank runs it.
        args: example inputs; nested lists, tuples and dictionaries of tensors and plain values.
        kwargs: keyword inputs.
        name: name of the graph; the module's class where ``None``.

    Raises:
        ModelError: ``torch.export`` cannot trace the module, or as for ``from_exported``.
        UnsupportedOperator: as for ``from_graph_module``.
    """
    name = name or type(module).__name__
    if is_spread(module):
        return from_spread(module, tuple(args), dict(kwargs or {}), name)
    args, kwargs = pytree.tree_map(_without_gaps, (tuple(args), dict(kwargs or {})))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # torch.export warns about its own use of pytree classes, and of how its own recurrent layers keep weights.
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            warnings.filterwarnings(
                "ignore", category=UserWarning, message=r"The tensor attributes? self\._flat_weights"
            )
            program = torch.export.export(module, args, kwargs)
    except Exception as error:  # torch.export raises errors of many kinds, of its own and of the model
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(
            f"torch.export cannot trace model {name!r}: {lines[0].strip():.300}",
            hint="call torch.export.export on the model yourself for the full explanation; control flow and shapes "
            "that depend on values must be removed",
        ) from error
    return from_exported(program, name=name)


def from_exported(program: ExportedProgram, *, name: str = "exported") -> ImportedGraph:
    """The graph of an exported program; weights are referred to, not copied.

    Source tensors are called what the program calls its placeholders. Buffers, parameters and inputs that the program
    updates are updated in place. Calls must have the structure of the example inputs, with equal values
    wherever the example had something that is no tensor.

    Raises:
        ModelError: symbolic shapes, inputs that are no tensors, outputs such as gradients.
        UnsupportedOperator: as for ``from_graph_module``.
    """
    if any(_has_autocast(m) for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)):
        with _without_torchs_own_warnings():
            program = program.run_decompositions({})  # spells out the casts of autocast regions
    weights: dict[str, torch.Tensor] = {}
    roles: dict[str, Role] = {}
    inputs: dict[str, str] = {}
    literals: dict[str, Any] = {}
    for spec in program.graph_signature.input_specs:
        match spec.kind, spec.arg:
            case InputKind.USER_INPUT, TensorArgument(name=placeholder):
                inputs[placeholder] = placeholder
            case InputKind.USER_INPUT, ConstantArgument(name=placeholder, value=value):
                literals[placeholder] = value
            case InputKind.PARAMETER | InputKind.BUFFER | InputKind.CONSTANT_TENSOR, TensorArgument(name=placeholder):
                weights[placeholder] = _source_value(program, spec)
                roles[placeholder] = Role.CONSTANT if spec.kind is InputKind.CONSTANT_TENSOR else Role.WEIGHT
            case _:
                raise ModelError(
                    f"input {spec.arg.name!r} of program {name!r} is a {type(spec.arg).__name__}, not a tensor",
                    hint="sizes and other numbers must be fixed when the model is exported",
                )
    updated = _updated(program, name)
    converted = convert(program.graph_module, name, inputs, weights, roles, literals, updated=updated)
    calls = _Calls(program, converted, literals)
    return ImportedGraph(converted.graph, converted.weights, converted.input_names, calls.flatten, calls.unflatten)


@contextmanager
def _without_torchs_own_warnings() -> Iterator[None]:
    """Without what torch.export warns of in torch itself: its pytree classes, and how recurrent layers keep weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", category=UserWarning, message=r"The tensor attr\w* self\._flat_weights")
        yield


def _has_autocast(module: torch.fx.GraphModule) -> bool:
    return any(str(node.target) == "wrap_with_autocast" for node in module.graph.nodes)


def _without_gaps(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) and not is_dense(value) else value


def _source_value(program: ExportedProgram, spec: InputSpec) -> torch.Tensor:
    target = str(spec.target)
    value = program.state_dict.get(target, program.constants.get(target))
    if not isinstance(value, torch.Tensor):
        raise ModelError(f"source {target!r} of the exported program has no tensor value")
    return value


def _updated(program: ExportedProgram, name: str) -> list[str]:
    """Placeholders that the first outputs are new values of, in order."""
    signature = program.graph_signature
    by_target = {spec.target: spec.arg.name for spec in signature.input_specs if spec.target is not None}
    updated: list[str] = []
    for spec in signature.output_specs:
        if spec.kind in _UPDATES and spec.target is not None:
            updated.append(by_target.get(spec.target, spec.target))
        elif spec.kind not in (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT):
            raise UnsupportedOperator(
                f"output {spec.arg.name!r} of program {name!r} is a {spec.kind.name.lower().replace('_', ' ')}",
                hint="export the forward computation",
            )
    return updated


class _Calls:
    """The pytree of the user's call and of its result."""

    def __init__(self, program: ExportedProgram, converted: Converted, literals: Mapping[str, Any]) -> None:
        if program.call_spec.in_spec is None or program.call_spec.out_spec is None:
            raise ModelError("the exported program does not say how it is called")
        self._in_spec = program.call_spec.in_spec
        self._out_spec = program.call_spec.out_spec
        self._converted = converted
        arguments = [s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
        self._arguments = arguments
        self._literals = literals

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The input tensors of one call, in the order of ``input_names``.

        Raises:
            ModelError: another structure than the example inputs had, or another value where they had no tensor.
        """
        order = self._in_spec.child(1).context
        known = {key: kwargs[key] for key in order if key in kwargs}
        unknown = {key: value for key, value in kwargs.items() if key not in known}
        leaves, spec = pytree.tree_flatten((tuple(args), {**known, **unknown}))
        if spec != self._in_spec:
            raise ModelError(
                f"the call does not have the structure of the example inputs: {spec} instead of {self._in_spec}",
                hint="give the same positional and keyword arguments as when the model was imported",
            )
        tensors: list[torch.Tensor] = []
        for argument, leaf in zip(self._arguments, leaves, strict=True):
            if argument not in self._literals:
                if not isinstance(leaf, torch.Tensor):
                    raise ModelError(f"argument {argument!r} is a {type(leaf).__name__}; a tensor was imported")
                tensors.append(leaf)
            elif isinstance(leaf, torch.Tensor) or leaf != self._literals[argument]:
                raise ModelError(
                    f"argument {argument!r} is {leaf!r}, but the model was imported with {self._literals[argument]!r}",
                    hint="import the model again for another value",
                )
        return tensors

    def unflatten(self, outputs: Sequence[torch.Tensor]) -> Any:
        """What the module returns, given one tensor for each output of the graph."""
        return pytree.tree_unflatten(self._converted.assemble(outputs), self._out_spec)
