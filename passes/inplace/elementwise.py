"""Elementwise results written over an operand that nobody needs afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Literal

import msgspec

from ...compiler.graph import Graph
from ...compiler.pipeline import Budget, Decision
from ...compiler.plan import Plan
from ...errors import OptionError
from ..order._peak_search import certificate, least_peak_order, plain_bound
from ..order.problem import OrderProblem, decide
from ..residency.workset import planned_buffers
from ._overwrite import candidates, last_in_any_order, last_in_order, overwritten

__all__ = ["ElementwiseInPlace"]


@dataclass(frozen=True)
class ElementwiseInPlace:
    """Let elementwise operators write over an operand of theirs that nobody reads afterwards.

    *Given* a plan. *Result*: a plan of the graph in which such a result is a new version of its operand's buffer; the
    operators and their operands stay the same, by name, and so do weights and outputs. Which results:

    * ``order="any"``: those whose operand is last used by the operator whatever the order. No order is lost, and the
      plan keeps its own.
    * ``order="least_peak"``: the order of least peak is searched in which each operator may write over what it is the
      last to use, as HMCOS counts (Wang et al., DAC 2022). The plan gets that order, and later ones keep
      its operators behind those they depend on now. The bound holds for every order and every choice of operands.
    """

    order: Literal["any", "least_peak"] = "any"

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "inplace/elementwise"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Rewrite the graph; with ``order="any"`` at once, whatever the budget.

        Raises:
            OptionError: the plan has pins, which name buffers that may be others in the graph rewritten.
        """
        if plan.pins:
            raise OptionError(
                f"pass {self.name!r} rewrites the graph, and the plan has pins of its buffers",
                hint="rewrite in place first, then pin, as compile(inplace=True, pins=...) does",
            )
        if self.order == "least_peak":
            return _with_order(plan, budget)
        chosen = last_in_any_order(plan.graph)
        fresh = _fresh(plan, overwritten(plan.graph, chosen), plan.order)
        return decide(fresh, OrderProblem.of(fresh), plan.order, note=_note(chosen))


def _with_order(plan: Plan, budget: Budget) -> Decision:
    graph, problem = plan.graph, OrderProblem.of(plan)
    index = {buffer: number for number, buffer in enumerate(planned_buffers(plan))}
    overwrites = [tuple(index[b] for b in buffers if b in index) for buffers in candidates(graph)]
    found = least_peak_order(problem, budget, overwrites=overwrites, start=plan.order)
    bound = plain_bound(problem, found, budget, overwrites=overwrites)
    chosen = last_in_order(graph, found.order)
    fresh = _fresh(plan, overwritten(graph, chosen, found.order))
    peak = OrderProblem.of(fresh).peak_bytes(fresh.order)
    return Decision(fresh, certificate(problem, peak, bound, overwrites), _note(chosen))


def _fresh(plan: Plan, graph: Graph, order: Iterable[int] | None = None) -> Plan:
    """A plan of ``graph`` that keeps what is known about ``plan``; program order by default."""
    fresh = Plan.of_order(graph, plan.machine, order, streamed=plan.streamed, source=plan.source)
    return msgspec.structs.replace(fresh, passes=plan.passes)


def _note(chosen: Sized) -> str:
    return f"{len(chosen)} results written over an operand"
