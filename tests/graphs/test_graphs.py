"""The graphs other tests rely on are what they claim to be."""

from __future__ import annotations

import pytest
from hypothesis import given

from opweave.compiler.graph import Graph
from opweave.compiler.verify import verify

from .build import all_graphs
from .plans import keep_everything, keep_nothing
from .strategies import graphs


@pytest.mark.parametrize("name", all_graphs())
def test_small_graphs_have_right_plans(name: str) -> None:
    graph = all_graphs()[name]
    assert graph.name == name
    for plan in (keep_everything(graph), keep_nothing(graph)):
        assert [str(finding) for finding in verify(plan).faults] == []


@given(graphs())
def test_random_graphs_have_right_plans(graph: Graph) -> None:
    kept, dropped = verify(keep_everything(graph)), verify(keep_nothing(graph))
    assert kept.faults == dropped.faults == ()
    assert kept.additional_bytes == 0 <= dropped.additional_bytes
    assert dropped.peak_bytes <= kept.peak_bytes
