"""What holds for the matches of every kernel's rule on every graph."""

from __future__ import annotations

import inspect
from types import ModuleType

from opweave.compiler.graph import Graph
from opweave.kernels._match import Cost, Match

__all__ = ["check_matches"]


def check_matches(kernel: ModuleType, graph: Graph) -> tuple[Match, ...]:
    """Whatever is matched exists, once, in program order, and has as many operands as the launcher takes."""
    found: tuple[Match, ...] = kernel.matches(graph)
    assert found == kernel.matches(graph)
    position = {op.name: index for index, op in enumerate(graph.ops)}
    taken = [position[name] for match in found for name in match.ops]
    assert len(taken) == len(set(taken))
    parameters = inspect.signature(kernel.launch).parameters
    for match in found:
        assert sorted(match.ops, key=position.__getitem__) == list(match.ops)
        assert len(match.inputs) + len(match.attributes) + len(match.outputs) == len(parameters)
        assert set(match.attributes) <= set(parameters)
        assert {*match.inputs, *match.outputs} <= set(graph.tensor)
        assert isinstance(match.cost, Cost)
    return found
