"""A second reading of the graph, independent of the executor: buffers are byte tensors, operators run in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from opweave.compiler.frontend.program import ImportedGraph
from opweave.compiler.graph import Tensor
from opweave.compiler.runtime.calls import evaluate


@pytest.fixture
def interpret() -> Callable[..., Any]:
    """Run an imported graph on the arguments of a call; returns what the model returns."""

    def run(imported: ImportedGraph, *args: Any, updates: dict[str, torch.Tensor] | None = None, **kwargs: Any) -> Any:
        assert imported.flatten is not None
        assert imported.unflatten is not None
        graph = imported.graph
        values = dict(zip(imported.input_names, imported.flatten(args, kwargs), strict=True)) | dict(imported.weights)
        memory = {b: torch.full((t.nbytes,), 0xFF, dtype=torch.uint8) for b, t in graph.buffers.items()}
        for name, tensor in graph.buffers.items():
            if tensor.role.is_source:
                assert values[name].dtype == getattr(torch, tensor.dtype)
                view_of(memory, tensor).copy_(values[name])
        for op in graph.ops:
            results = evaluate(op.body, [view_of(memory, graph.tensor[t]) for t in op.inputs])
            results = tuple(result.clone() for result in results)
            for name, result in zip(op.outputs, results, strict=True):
                destination = view_of(memory, graph.tensor[name])
                assert destination.dtype == result.dtype, op
                assert destination.shape == result.shape, op
                destination.copy_(result)
        if updates is not None:
            for name in graph.output_buffers:
                if graph.buffers[name].role.is_source:
                    updates[name] = view_of(memory, graph.buffers[name]).clone()
        return imported.unflatten([view_of(memory, graph.tensor[t]).clone() for t in graph.outputs])

    return run


def view_of(memory: dict[str, torch.Tensor], tensor: Tensor) -> torch.Tensor:
    """The tensor's elements in its buffer, as a view."""
    dtype = getattr(torch, tensor.dtype)
    if 0 in tensor.shape:
        return torch.empty(tensor.shape, dtype=dtype)
    elements = memory[tensor.buffer][tensor.offset_bytes : tensor.end_bytes].view(dtype)
    return elements.as_strided(tensor.shape, tensor.element_strides)
