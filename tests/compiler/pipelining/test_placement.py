"""Placements by name, and problems of stages that are all alike."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.pipelining.placement import PLACEMENTS, placed, uniform
from opweave.compiler.pipelining.problem import Route, Stage
from opweave.errors import OptionError


def test_placements_as_they_are_drawn() -> None:
    """Three ranks."""
    assert placed("loop", 3, 2) == (0, 1, 2, 0, 1, 2)
    assert placed("v", 3, 2) == (0, 1, 2, 2, 1, 0)
    assert placed("wave", 3, 3) == (0, 1, 2, 2, 1, 0, 0, 1, 2)


@settings(deadline=None)
@given(st.sampled_from([kind for kind in PLACEMENTS if kind != "v"]), st.integers(1, 9), st.integers(1, 5))
def test_every_rank_has_one_stage_of_each_chunk(kind: str, ranks: int, chunks: int) -> None:
    """And stages that follow one another are on one rank only where a wave turns."""
    line = placed(kind, ranks, chunks)
    for chunk in range(chunks):
        assert sorted(line[chunk * ranks : (chunk + 1) * ranks]) == list(range(ranks))
    turns = [index for index in range(1, len(line)) if line[index - 1] == line[index]]
    assert ranks == 1 or turns == (list(range(ranks, len(line), ranks)) if kind == "wave" else [])


@pytest.mark.parametrize(
    ("kind", "ranks", "chunks", "message"),
    [
        ("v", 3, 1, "a V has two chunks on each rank, not 1"),
        ("spiral", 3, 1, "no placement 'spiral'"),
        ("loop", 0, 1, "0 ranks with 1 chunks"),
        ("loop", 1, 0, "1 ranks with 0 chunks"),
    ],
)
def test_other_placements_are_refused(kind: str, ranks: int, chunks: int, message: str) -> None:
    """By what is wrong with them."""
    with pytest.raises(OptionError, match=message):
        placed(kind, ranks, chunks)


def test_uniform_stages_are_alike_but_for_their_ranks() -> None:
    """One route through all of them, one limit for all ranks, also for those that have no stage."""
    problem = uniform(Stage(0, 1, 2, 3), (2, 0), 5, memory_limit=7)
    assert problem.stages == (Stage(2, 1, 2, 3), Stage(0, 1, 2, 3))
    assert problem.routes == (Route((0, 1), 5),)
    assert (problem.ranks, problem.memory_limit) == (3, (7, 7, 7))
    with pytest.raises(OptionError, match="0 stages"):
        uniform(Stage(0, 1, 2, 3), (), 5)
