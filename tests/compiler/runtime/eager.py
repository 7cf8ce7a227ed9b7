"""What executed plans are compared with: a plain interpretation of the graph, without any memory planning."""

from __future__ import annotations

import torch

from opweave.compiler.graph import Graph, Tensor
from opweave.compiler.plan import Plan
from opweave.compiler.runtime.calls import evaluate
from opweave.compiler.runtime.memory import TORCH_DTYPE
from opweave.compiler.runtime.scratchpad import ExecutionResult, execute

__all__ = ["eager", "run", "same"]


def eager(graph: Graph, sources: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs and final buffers of a plain interpretation: one torch tensor a buffer, operators in program order."""
    memory = {name: value.clone() for name, value in sources.items()}

    def view(tensor: Tensor) -> torch.Tensor:
        whole = memory[tensor.buffer].flatten()
        return whole.as_strided(tensor.shape, tensor.element_strides, tensor.offset_bytes // whole.element_size())

    for op in graph.ops:
        results = evaluate(op.body, [view(graph.tensor[name]).clone() for name in op.inputs])
        for name, result in zip(op.outputs, results, strict=True):
            tensor = graph.tensor[name]
            if tensor.buffer not in memory:
                memory[tensor.buffer] = torch.zeros(tensor.shape, dtype=TORCH_DTYPE[tensor.dtype])
            view(tensor).copy_(result)
    return [view(graph.tensor[name]) for name in graph.outputs], memory


def run(plan: Plan, sources: dict[str, torch.Tensor]) -> ExecutionResult:
    """Execute with every source given both as an input and as a weight: roles choose."""
    return execute(plan, sources, sources)


def same(result: ExecutionResult, graph: Graph, sources: dict[str, torch.Tensor]) -> bool:
    """Whether outputs and updated sources equal the plain interpretation's, bit for bit."""
    outputs, memory = eager(graph, sources)
    return all(
        torch.equal(got, wanted)
        for got, wanted in [
            *zip(result.outputs, outputs, strict=True),
            *((value, memory[name]) for name, value in result.updated.items()),
        ]
    )
