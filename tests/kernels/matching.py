"""What holds for the matches of every kernel's rule: they are well formed, and the fused graph computes the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._inductor.decomposition import select_decomp_table

from opweave.compiler.frontend.fx import from_exported
from opweave.compiler.frontend.program import ImportedGraph
from opweave.compiler.fusion import Cost, Match, fused
from opweave.compiler.graph import Graph, Tensor
from opweave.compiler.runtime.calls import evaluate
from opweave.kernels._kernel import Kernel

__all__ = ["check_fusion", "check_matches", "exported", "values_of"]


class _Module(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The function's result."""
        return self._function(*inputs)


def exported(function: Callable[..., Any], inputs: Sequence[torch.Tensor], *, decomposed: bool) -> ImportedGraph:
    """The graph of a function of tensors: as it is exported, or with Inductor's decompositions."""
    module = function if isinstance(function, nn.Module) else _Module(function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, tuple(inputs), strict=False)
        if decomposed:
            program = program.run_decompositions(select_decomp_table())
        return from_exported(program)


def check_matches(kernel: Kernel, graph: Graph) -> tuple[Match, ...]:
    """Whatever is matched exists, in program order, and has the operands that the launcher takes."""
    found = kernel.matches(graph)
    assert found == kernel.matches(graph)
    position = {op.name: index for index, op in enumerate(graph.ops)}
    for match in found:
        assert match.kernel == kernel.name
        assert match.ops
        assert sorted(match.ops, key=position.__getitem__) == list(match.ops)
        assert tuple(match.arguments) == kernel.inputs
        assert len(match.outputs) == len(kernel.results)
        assert all(t.name in graph.tensor or t.buffer == t.name for t in match.outputs)
        assert isinstance(match.cost, Cost)
        assert match.cost.flops >= 0
        assert match.cost.traffic_bytes >= 0
    return found


def values_of(graph: Graph, sources: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The graph's outputs, its operators run one after the other over buffers; ``sources`` by tensor name."""
    memory = {
        name: torch.empty(base.shape, dtype=getattr(torch, base.dtype)).flatten()
        for name, base in graph.buffers.items()
    }

    def view(tensor: Tensor) -> torch.Tensor:
        offset = tensor.offset_bytes // getattr(torch, tensor.dtype).itemsize
        typed = memory[tensor.buffer].view(getattr(torch, tensor.dtype))
        return typed.as_strided(tensor.shape, tensor.element_strides, offset)

    for name, value in sources.items():
        view(graph.tensor[name]).copy_(value)
    for op in graph.ops:
        results = evaluate(op.body, [view(graph.tensor[name]).clone() for name in op.inputs])
        for name, value in zip(op.outputs, results, strict=True):
            assert value.dtype == getattr(torch, graph.tensor[name].dtype), op.body
            assert value.shape == graph.tensor[name].shape, op.body
            view(graph.tensor[name]).copy_(value)
    return [view(graph.tensor[name]) for name in graph.outputs]


def check_fusion(
    kernel: Kernel,
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    *,
    rtol: float,
    atol: float,
    decomposed: bool = False,
    count: int = 1,
) -> Graph:
    """``function`` has ``count`` matches, and the graph fused by all of them gives the same; returns that graph.

    Matches of one result are counted once; none may overlap another.
    """
    program = exported(function, inputs, decomposed=decomposed)
    chosen = {match.outputs: match for match in check_matches(kernel, program.graph)}
    assert len(chosen) == count, [op.body for op in program.graph.ops]
    graph = fused(program.graph, list(chosen.values()))
    assert sum(op.target == f"opweave.{kernel.name}.default" for op in graph.ops) == count
    sources = {**program.weights, **dict(zip(program.input_names, inputs, strict=True))}
    before, after = (values_of(g, {n: v for n, v in sources.items() if n in g.tensor}) for g in (program.graph, graph))
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one, rtol=rtol, atol=atol)
    return graph
