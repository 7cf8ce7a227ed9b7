"""The two ways to write capacity rows, and the reductions before them, agree on the optimum."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from opweave.compiler.pipeline import Budget
from opweave.passes._solver.highs import solve
from opweave.passes.residency.formulation import Block, Capacity, reduce
from opweave.passes.residency.gaps import GapProblem
from opweave.passes.residency.model import build, objective_unit
from opweave.passes.residency.search import repair, search_block
from tests.passes.residency.training import tight, training_graph


def blocks_of(seed: int, share: float) -> tuple[GapProblem, tuple[Block, ...]]:
    problem = GapProblem.of(tight(training_graph(30, seed), share, alignment=1))
    return problem, reduce(problem).blocks


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_chained_rows_and_explicit_rows_have_the_same_optimum(seed: int, share: float) -> None:
    _, blocks = blocks_of(seed, share)
    assert blocks
    for block in blocks:
        budget = Budget.of_seconds(60.0, workers=1)
        explicit, chained = (solve(build(block, max_row_terms=limit), budget) for limit in (10**9, 0))
        assert explicit.status == chained.status == "optimal"
        assert explicit.objective == pytest.approx(chained.objective)
        assert explicit.bound * objective_unit(block) <= block.moved_bytes(repair(block, ())) + 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_rows_left_imply_every_row(seed: int) -> None:
    """What satisfies a block's rows satisfies the capacity at every position, settled gaps included."""
    problem, blocks = blocks_of(seed, 0.3)
    reduction = reduce(problem)
    dropped = reduction.dropped.union(*(repair(block, ()) for block in blocks))
    assert (problem.slack(dropped) >= 0).all()


def test_repair_drops_no_more_than_needed() -> None:
    _, blocks = blocks_of(1, 0.3)
    for block in blocks:
        chosen = repair(block, block.cost)
        for i in chosen:
            freed = [capacity.freed(chosen - {i}) for capacity in block.capacities]
            assert any((f < c.need).any() for f, c in zip(freed, block.capacities, strict=True))


def test_what_tolerances_let_through_is_caught_in_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that calls an overflow of one byte optimal is told that one of those kept must go."""
    spans = {0: (0, 1, 10**9), 1: (0, 1, 10**9 + 1)}
    block = Block({0: 2, 1: 3}, (), (Capacity(np.array([10**9 + 1]), spans),), ())
    from opweave.passes.residency import search

    def careless(tightened: Block) -> object:
        loose = Capacity(np.array([10**9]), spans)
        return build(dataclasses.replace(tightened, capacities=(loose,)))

    monkeypatch.setattr(search, "build", careless)
    result = search_block(block, frozenset({0, 1}), Budget.of_seconds(60.0, workers=1))
    assert (result.dropped, result.bound_bytes, result.complete) == (frozenset({1}), 3, True)
