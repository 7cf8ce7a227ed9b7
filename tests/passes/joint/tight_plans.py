"""Random plans for what decides order and residency at once."""

from __future__ import annotations

from hypothesis import strategies as st

from opweave.compiler.graph import Role
from opweave.compiler.plan import Plan
from tests.graphs.strategies import graphs
from tests.passes.residency.crowded import crowded_graphs
from tests.passes.residency.training import tight

__all__ = ["tight_plans"]


@st.composite
def tight_plans(draw: st.DrawFn, max_ops: int = 6) -> Plan:
    """Random graphs in tight scratchpads: in-place updates, several outputs, some weights streamed."""
    graph = draw(st.one_of(crowded_graphs(max_ops=max_ops), graphs(max_ops=max_ops)))
    written = {b for buffers in graph.writes for b in buffers}
    roles = (Role.WEIGHT, Role.CONSTANT, Role.OPTIMIZER_STATE)
    streamable = [b for b, base in graph.buffers.items() if base.role in roles and b not in written]
    streamed = draw(st.lists(st.sampled_from(streamable), unique=True)) if streamable else []
    share = draw(st.sampled_from((0.0, 0.2, 0.4, 0.6)))
    return tight(graph, share, alignment=draw(st.sampled_from((1, 1, 8))), streamed=tuple(streamed))
