"""V-Half and V-Min: what they hold follows from the block, and their ends have no more holes than their authors'."""

from __future__ import annotations

import pytest

from opweave.compiler.pipelining.problem import Stage
from opweave.compiler.pipelining.schedule import TimedSchedule
from opweave.compiler.pipelining.simulate import timed
from opweave.passes.pipeline_parallel.named import named, problem_for
from opweave.passes.pipeline_parallel.named.building_blocks import PERIOD, half_block, least_block


def _timed(name: str, ranks: int, microbatches: int) -> TimedSchedule:
    stage = Stage(0, 1, 1, 1, until_weight_gradient_bytes=1)
    return timed(named(name, problem_for(name, stage, ranks, microbatches)))


@pytest.mark.parametrize("ranks", [*range(1, 33), 64, 128])
def test_actions_of_a_block_never_meet_those_of_its_repetitions(ranks: int) -> None:
    """The four slots of a rank differ by more than whole periods; each follows what it needs, W have room."""
    for block in (half_block, least_block):
        slots = [block(rank, ranks) for rank in range(ranks)]
        assert all(len({slot % PERIOD for slot in own}) == 4 for own in slots)
        ways = [own[step] for step, order in enumerate((1, -1, 1, -1)) for own in slots[::order]]
        assert ways == sorted(set(ways))


@pytest.mark.parametrize("ranks", range(2, 13))
def test_memory_is_the_papers(ranks: int) -> None:
    """(p+2)/2 and (p+4)/3 microbatches, rounded down, of two chunks each, where microbatches fill the pipeline."""
    assert max(_timed("v-half", ranks, 3 * ranks).peak_bytes) == 2 * ((ranks + 2) // 2)
    assert max(_timed("v-min", ranks, 3 * ranks).peak_bytes) == 2 * ((ranks + 4) // 3)


def test_four_ranks_and_eight_microbatches_are_optimal() -> None:
    """53 and 59 slots, which CP-SAT proved to be the least within 6 and 4 chunks."""
    assert _timed("v-half", 4, 8).makespan_ns == 53
    assert _timed("v-min", 4, 8).makespan_ns == 59


@pytest.mark.parametrize("name", ["v-half", "v-min"])
def test_bubbles_do_not_grow_with_the_number_of_microbatches(name: str) -> None:
    """A steady state without holes: each microbatch more costs its work."""
    for ranks in (3, 4, 5, 8):
        fewer, more = (_timed(name, ranks, microbatches).makespan_ns for microbatches in (3 * ranks, 5 * ranks))
        assert more - fewer == 6 * 2 * ranks
