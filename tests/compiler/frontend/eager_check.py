"""Imported graphs against eager, by two readings of the graph that share nothing but the evaluation of one call.

``interpret`` keeps every buffer and runs operators in program order; ``execute_in_scratchpad`` runs a plan that keeps
nothing between operators, so that every value goes through planned memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from opweave.compiler.frontend.fx import from_module
from opweave.compiler.frontend.program import ImportedGraph
from opweave.compiler.graph import Graph, Tensor
from opweave.compiler.runtime.calls import evaluate
from opweave.compiler.runtime.scratchpad import execute
from opweave.compiler.verify import verify
from tests.graphs.build import machine
from tests.graphs.plans import keep_nothing

__all__ = ["Lambda", "assert_same", "check", "execute_in_scratchpad", "interpret"]


class Lambda(nn.Module):
    """A module whose forward is a function of itself and its inputs; keyword arguments become buffers or parameters."""

    def __init__(self, function: Callable[..., Any], **sources: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in sources.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def interpret(
    imported: ImportedGraph, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Run an imported graph: what the model returns, and the sources it updates, by name."""
    assert imported.flatten is not None
    assert imported.unflatten is not None
    graph = imported.graph
    values = dict(zip(imported.input_names, imported.flatten(args, kwargs or {}), strict=True)) | dict(imported.weights)
    memory = {b: torch.full((t.nbytes,), 0xFF, dtype=torch.uint8) for b, t in graph.buffers.items()}
    for name, tensor in graph.buffers.items():
        if tensor.role.is_source:
            assert values[name].dtype == getattr(torch, tensor.dtype)
            _view(memory, tensor).copy_(values[name].detach())
    for op in graph.ops:
        results = [r.clone() for r in evaluate(op.body, [_view(memory, graph.tensor[t]) for t in op.inputs])]
        for name, result in zip(op.outputs, results, strict=True):
            destination = _view(memory, graph.tensor[name])
            assert (destination.dtype, destination.shape) == (result.dtype, result.shape), op
            destination.copy_(result)
    sources = [b for b in graph.output_buffers if graph.buffers[b].role.is_source]
    updated = {name: _view(memory, graph.buffers[name]).clone() for name in sources}
    return imported.unflatten([_view(memory, graph.tensor[t]).clone() for t in graph.outputs]), updated


def execute_in_scratchpad(
    imported: ImportedGraph, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, Mapping[str, torch.Tensor]]:
    """What ``interpret`` returns, from the scratchpad machine, which is as large as the largest operator needs."""
    assert imported.flatten is not None
    assert imported.unflatten is not None
    graph = imported.graph
    largest = max((sum(graph.buffers[b].nbytes + 16 for b in touched) for touched in graph.touches), default=0)
    plan = keep_nothing(graph, machine(largest + 16))
    assert not verify(plan).faults
    inputs = dict(zip(imported.input_names, imported.flatten(args, kwargs), strict=True))
    result = execute(plan, inputs, imported.weights)
    return imported.unflatten(list(result.outputs)), result.updated


def _view(memory: Mapping[str, torch.Tensor], tensor: Tensor) -> torch.Tensor:
    """The tensor's elements in its buffer, as a view."""
    dtype = getattr(torch, tensor.dtype)
    if 0 in tensor.shape:
        return torch.empty(tensor.shape, dtype=dtype)
    elements = memory[tensor.buffer][tensor.offset_bytes : tensor.end_bytes].view(dtype)
    return elements.as_strided(tensor.shape, tensor.element_strides)


def check(
    model: nn.Module | Callable[..., Any],
    *args: Any,
    sources: Mapping[str, torch.Tensor] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    load: Callable[..., ImportedGraph] = from_module,
) -> Graph:
    """Import a module, interpret the graph, compare with eager; returns the graph.

    Results, buffers, parameters and inputs must all be what eager leaves. ``model`` may be a function of a
    module that holds ``sources`` and of the inputs. ``load`` takes the place of ``from_module``.
    """
    module = model if isinstance(model, nn.Module) else Lambda(model, **(sources or {}))
    kwargs = dict(kwargs or {})
    # Import and interpretation must change neither the module nor the arguments, which eager uses afterwards.
    imported = load(module, copy.deepcopy(args), copy.deepcopy(kwargs))
    readings = [interpret(imported, args, kwargs), execute_in_scratchpad(imported, args, kwargs)]
    with torch.no_grad():
        expected = module(*args, **kwargs)
    for result, updated in readings:
        assert_same(result, expected)
        _assert_updates(imported, updated, module, (args, kwargs))
    return imported.graph


def assert_same(result: Any, expected: Any) -> None:
    """Equal structure, shapes and dtypes; floats within torch's tolerance: kernels differ by alignment."""
    found, structure = pytree.tree_flatten(result)
    wanted, wanted_structure = pytree.tree_flatten(expected)
    assert structure == wanted_structure
    for value, reference in zip(found, wanted, strict=True):
        if isinstance(reference, torch.Tensor):
            torch.testing.assert_close(value, reference.detach(), equal_nan=True)
        else:
            assert value == reference


def _assert_updates(
    imported: ImportedGraph, updated: Mapping[str, torch.Tensor], module: nn.Module, call: tuple[Any, ...]
) -> None:
    """Every source holds what eager left in it: an unchanged one if the graph does not write it."""
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    after = dict(zip(imported.input_names, tensors, strict=True))
    for prefix, named in (("b_", module.named_buffers()), ("p_", module.named_parameters())):
        after |= {prefix + name.replace(".", "_"): value.detach() for name, value in named}
    torch.testing.assert_close(dict(updated), {name: after[name] for name in updated})
