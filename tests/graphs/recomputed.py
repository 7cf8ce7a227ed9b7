"""A plan that drops a value and computes it again, and the graph it is of."""

from __future__ import annotations

from opweave.compiler.graph import Graph, Op
from opweave.compiler.plan import Instruction, Load, Plan, Recompute, Residence, Run, Store
from opweave.hw_models.model import HardwareModel

from .build import GraphBuilder
from .build import machine as default_machine

__all__ = ["recomputable", "recomputing"]


def recomputable(again: Op | None = None) -> Graph:
    """``a = relu(x)`` is used at once and at the end; ``x`` stays in use. ``again`` replaces the operator of ``a``."""
    g = GraphBuilder("recomputable")
    x = g.input("x", 8, 16)
    a = g.unary("relu", x, "a")
    b = g.unary("tanh", a, "b")
    c = g.binary("add", b, x, "c")
    g.binary("mul", c, a, "y")
    if again is not None:
        g.ops[0] = again
    return g.build("y")


def recomputing(machine: HardwareModel | None = None, graph: Graph | None = None) -> Plan:
    """``recomputable()`` with ``a`` dropped after its first use and recomputed from ``x`` before its last; no store."""
    instructions: tuple[Instruction, ...] = (
        Load("x"),
        Run("op0"),
        Run("op1"),
        Run("op2"),
        Recompute("op0"),
        Run("op3"),
        Store("y"),
    )
    residences = (
        Residence("x", "sram", 0, 5, 0),
        Residence("a", "sram", 1, 3, 512),
        Residence("b", "sram", 2, 4, 1024),
        Residence("c", "sram", 3, 6, 512),
        Residence("a", "sram", 4, 6, 1024),
        Residence("y", "sram", 5, 7, 0),
    )
    return Plan(graph or recomputable(), machine or default_machine(1536), instructions, residences)
