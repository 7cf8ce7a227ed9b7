"""Parallel models on eight ranks of one process (PyTorch's local tensors), against one rank that holds all of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from opweave.compiler.frontend.ranks import fake_ranks
from tests.overlap.rank_programs import (
    MODELS,
    SIZES,
    Graphs,
    difference,
    graphs_of,
    inputs_for,
    joint_inputs,
    without_a_collective,
)
from tests.support.ranks import local_ranks, run_local

RANKS = 8
ROUNDING = 1e-12  # of float64, in another order of sums


def models(name: str) -> list[nn.Module]:
    """The model as each rank has it."""
    found = []
    for rank in range(RANKS):
        with fake_ranks(RANKS, rank):
            found.append(MODELS[name]())
    return found


def whole(name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What one rank that holds all weights returns for each rank's input."""
    with fake_ranks(1), torch.no_grad():
        model = MODELS[name]()
        if name == "sequence parallel":
            return list(model(torch.cat(list(inputs))).chunk(RANKS))
        return [model(x) for x in inputs]


def placed(graphs: Graphs, each: Sequence[nn.Module], inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """The inputs of a graph on each rank; the tangent is the input, whose shape it has."""
    return [joint_inputs(graphs, model, x, x.cos()) for model, x in zip(each, inputs, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_eight_ranks_compute_what_one_would(name: str) -> None:
    """Forward against all weights on one rank, forward and backward together against the graph as it was."""
    each = models(name)
    inputs = [inputs_for(name, rank, RANKS) for rank in range(RANKS)]
    expected = whole(name, inputs)
    with local_ranks(RANKS) as mode:
        graphs = graphs_of(each[0], inputs[0], SIZES[name], training=False)
        found = run_local(graphs.parts, placed(graphs, each, inputs), mode)
        assert max(difference(one, [other]) for one, other in zip(found, expected, strict=True)) < ROUNDING
        joint = graphs_of(each[0], inputs[0], SIZES[name], training=True)
        given = placed(joint, each, inputs)
        pairs = zip(run_local(joint.parts, given, mode), run_local(joint.whole, given, mode), strict=True)
        for one, other in pairs:
            assert difference(*(tuple(t for t in item if t is not None) for item in (one, other))) < ROUNDING


def test_a_wrong_rank_shows_on_all_of_them() -> None:
    """One rank's weight off by 1 %, and a collective that is not there."""
    name = "tensor parallel"
    each = models(name)
    inputs = [inputs_for(name, rank, RANKS) for rank in range(RANKS)]
    expected = whole(name, inputs)
    with local_ranks(RANKS) as mode:
        graphs = graphs_of(each[0], inputs[0], SIZES[name], training=False)
        lacking = run_local(without_a_collective(graphs.parts), placed(graphs, each, inputs), mode)
        with torch.no_grad():
            next(iter(each[3].parameters())).mul_(1.01)
        wrong = run_local(graphs.parts, placed(graphs, each, inputs), mode)
    for found in (lacking, wrong):
        assert min(difference(one, [other]) for one, other in zip(found, expected, strict=True)) > 1e-4
