"""What every frontend ends in: a graph, the values of its weights, and how the user's call maps onto both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..graph import Graph

if TYPE_CHECKING:
    import torch

__all__ = ["ImportedGraph"]


@dataclass(frozen=True)
class ImportedGraph:
    """A model that is ready to be planned and, if it has weights and bodies, executed.

    ``weights`` holds the value of every source tensor that is not an input (weights, constants, optimizer state), by
    the tensor's name, with the tensor's shape, dtype and strides. ``input_names`` are the tensors of the graph's
    inputs in call order.

    ``flatten(args, kwargs)`` turns the user's call into the list of input tensors, one for each of ``input_names``;
    ``unflatten(outputs)`` turns one tensor for each of ``graph.outputs`` into what the model returns. Both are
    ``None`` where the model cannot be called, as for plain operator graphs.

    ``operators`` counts operators by how they were imported and then by type, for example
    ``{"native": {"Conv": 53}, "fallback": {"TfIdfVectorizer": 1}}``; empty where all are native.

    ``output_names`` are what the model calls its outputs, where that can differ from ``graph.outputs``: an output that
    is another's value, unchanged, is the same tensor in the graph and goes by its name there. Empty: as in the graph.
    """

    graph: Graph
    weights: Mapping[str, torch.Tensor]
    input_names: tuple[str, ...]
    flatten: Callable[[tuple[Any, ...], Mapping[str, Any]], list[torch.Tensor]] | None = None
    unflatten: Callable[[list[torch.Tensor]], Any] | None = None
    operators: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    output_names: tuple[str, ...] = ()
