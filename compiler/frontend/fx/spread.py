"""Modules whose parameters DTensor spreads over ranks: the graph is that of this rank, its weights the local ones.

``torch.export`` has no values for a DTensor's placements; AOTAutograd takes DTensors apart as it traces.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ....errors import ModelError
from ...graph import Role
from ..program import ImportedGraph
from ..ranks import Captured, captured
from .convert import convert

__all__ = ["from_spread", "is_spread"]


def is_spread(module: torch.nn.Module) -> bool:
    """Whether a parameter or buffer of ``module`` is a DTensor; asks nothing where no DTensor was ever made."""
    dtensor = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and any(isinstance(value, dtensor.DTensor) for value in _held(module).values())


def from_spread(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> ImportedGraph:
    """The graph of ``module(*args, **kwargs)`` on this rank. Inputs and results are plain tensors.

    Raises:
        ModelError: AOTAutograd cannot trace the module, a process group is not known here, or an input or a result is
            no plain tensor.
    """
    for leaf in pytree.tree_leaves((args, kwargs)):
        if not isinstance(leaf, torch.Tensor) or is_traceable_wrapper_subclass(leaf):
            raise ModelError(
                f"model {name!r} is spread over ranks, and an input is a {type(leaf).__name__}",
                hint="give this rank's plain tensors; fix other arguments in the module",
            )
    rank = captured(module, args, kwargs)
    _check_results(rank, name)
    held = _held(module)
    weights = {placeholder: _local(held[parameter]) for placeholder, parameter in rank.parameters.items()}
    inputs = dict(zip(rank.inputs, _input_names(module, args, kwargs), strict=True))
    converted = convert(
        rank.forward, name, inputs, weights, dict.fromkeys(weights, Role.WEIGHT), {}, updated=rank.updated
    )

    def flatten(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
        if structure != rank.call or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise ModelError(
                f"the call does not have the structure of the example inputs: {structure} instead of {rank.call}",
                hint="give the same positional and keyword arguments as when the model was imported",
            )
        return leaves

    def unflatten(outputs: list[torch.Tensor]) -> Any:
        return pytree.tree_unflatten(converted.assemble(outputs), rank.result)

    return ImportedGraph(converted.graph, converted.weights, converted.input_names, flatten, unflatten)


def _input_names(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """What ``forward`` calls each input tensor; numbered where it stands in a list or the like."""
    positional = [*inspect.signature(module.forward).parameters, *("input" for _ in args)]
    given = [*zip(positional, args, strict=False), *kwargs.items()]
    named = [(name, pytree.tree_leaves(value)) for name, value in given]
    return [name if len(leaves) == 1 else f"{name}_{i}" for name, leaves in named for i in range(len(leaves))]


def _check_results(rank: Captured, name: str) -> None:
    """Raises ModelError where the module returns what is no plain tensor."""
    leaves: Any = rank.forward.graph.output_node().args[0]
    returned = leaves[len(rank.updated) :]
    if len(returned) != rank.result.num_leaves or any(leaf is None for leaf in returned):
        raise ModelError(
            f"model {name!r} is spread over ranks, and returns something that is no plain tensor",
            hint="end it with to_local(), or use_local_output=True in the plan that spreads it",
        )


def _held(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _local(value: torch.Tensor) -> torch.Tensor:
    local = getattr(value, "to_local", None)
    return value if local is None else local().detach()
