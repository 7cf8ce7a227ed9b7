"""Makespans, bubbles and peaks that papers give in closed form, over whole ranges of sizes and times."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.pipelining.problem import Stage, Vocabulary
from opweave.compiler.pipelining.schedule import TimedSchedule
from opweave.compiler.pipelining.simulate import timed
from opweave.passes.pipeline_parallel.named import named, problem_for

_TIME = st.integers(1, 9)
_RANKS = st.integers(1, 6)


def _timed(
    name: str, times: tuple[int, int, int], ranks: int, microbatches: int, *, chunks: int | None = None
) -> TimedSchedule:
    stage = Stage(0, *times, until_weight_gradient_bytes=1)
    return timed(named(name, problem_for(name, stage, ranks, microbatches, chunks=chunks)))


@settings(max_examples=30, deadline=None)
@given(_TIME, _TIME, _TIME, _RANKS, st.integers(1, 4), st.integers(2, 3))
def test_pipelines_without_split_backward(f: int, i: int, w: int, ranks: int, rounds: int, chunks: int) -> None:
    """GPipe and 1F1B idle (p-1)(F+B) and hold m and p microbatches; chunks divide the first, or it is as one stage."""
    microbatches, whole = rounds * ranks, f + i + w
    for name, held in (("gpipe", microbatches), ("1f1b", min(ranks, microbatches))):
        line = _timed(name, (f, i, w), ranks, microbatches)
        assert line.makespan_ns == (microbatches + ranks - 1) * whole
        assert max(line.peak_bytes) == held
    for name in ("interleaved-1f1b", "breadth-first"):
        line = _timed(name, (f, i, w), ranks, microbatches, chunks=chunks)
        assert line.makespan_ns == (chunks * microbatches + ranks - 1) * whole
        in_flight = chunks * ranks + ranks - 1 if name == "interleaved-1f1b" else chunks * microbatches
        assert max(line.peak_bytes) == min(in_flight, chunks * microbatches)


@settings(max_examples=30, deadline=None)
@given(_TIME, _TIME, _TIME, _RANKS, st.integers(1, 14))
def test_two_stage_backward(f: int, i: int, w: int, ranks: int, microbatches: int) -> None:
    """2BP idles (p-1)(F+I) whatever W takes, and holds every microbatch."""
    line = _timed("2bp", (f, i, w), ranks, microbatches)
    assert line.makespan_ns == microbatches * (f + i + w) + (ranks - 1) * (f + i)
    assert line.peak_bytes == (microbatches,) * ranks


@settings(max_examples=30, deadline=None)
@given(_TIME, _TIME, _TIME, _RANKS, st.integers(0, 6))
def test_zero_bubble_by_hand(f: int, i: int, w: int, ranks: int, more: int) -> None:
    """H1 idles (p-1)(F+I-W), H2's span (p-1)(F+I-2W), unless W is too long to be put off; p and 2p-1 held."""
    microbatches = 2 * ranks + more
    work, hops = microbatches * (f + i + w), ranks - 1
    first, second = (_timed(name, (f, i, w), ranks, microbatches) for name in ("zb-h1", "zb-h2"))
    assert first.peak_bytes == (ranks,) * ranks
    assert second.peak_bytes == (2 * ranks - 1,) * ranks
    if w <= min(f, i):
        assert first.makespan_ns == work + hops * (f + i - w)
        assert second.span_ns == work + hops * (f + i - 2 * w)


@settings(max_examples=25, deadline=None)
@given(_TIME, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 7))
def test_slots_of_two_directions_and_of_waves_have_no_holes(
    time: int, half: int, units: int, waves: int, ranks: int
) -> None:
    """With F = B: Chimera adds p-2 slots to the work and holds p/2+1 to p microbatches; BitPipe p-2, Hanayo 2p-2."""
    depth, microbatches = 2 * half, 2 * half * units
    times = (2 * time, time, time)
    line = _timed("chimera", times, depth, microbatches)
    assert line.makespan_ns == (2 * microbatches + depth - 2) * 2 * time
    assert (min(line.peak_bytes), max(line.peak_bytes)) == (half + 1, depth)
    assert _timed("bitpipe", (time, time, time), depth, depth).makespan_ns == 2 * (4 * depth - 2) * time  # B = 2F
    line = _timed("bitpipe", times, depth, microbatches)
    assert max(line.peak_bytes) <= 2 * depth
    assert line.makespan_ns == (4 * microbatches + depth - 2) * 2 * time
    line = _timed("hanayo", times, ranks, units * ranks, chunks=2 * waves)
    assert line.makespan_ns == (4 * waves * units * ranks + 2 * ranks - 2) * 2 * time


def test_chimera_and_hanayo_with_longer_backwards_are_as_good_as_can_be() -> None:
    """B = 2F, a unit: 16 and 36 for 4 and 8 ranks, the optimum that CP-SAT proved; Hanayo's on half of the ranks."""
    for ranks, makespan in ((4, 16), (8, 36)):
        assert _timed("chimera", (1, 1, 1), ranks, ranks).makespan_ns == makespan
        assert _timed("hanayo", (1, 1, 1), ranks // 2, ranks // 2, chunks=2).makespan_ns == makespan


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 10), (8, 20), (6, 12)])
def test_dual_pipe_idles_less_than_zero_bubble(ranks: int, microbatches: int) -> None:
    """Idle p/2-1 in two directions and p-1 over a V where all take 1; p+1 microbatches held, counted in stages."""
    both = _timed("dualpipe", (1, 1, 1), ranks, microbatches)
    assert both.makespan_ns == 3 * microbatches + ranks // 2 - 1
    assert max(both.peak_bytes) == ranks + 1
    once = _timed("dualpipe-v", (1, 1, 1), ranks, 2 * ranks + 2)
    assert once.makespan_ns == 6 * (2 * ranks + 2) + ranks - 1
    assert max(once.peak_bytes) == 2 * ranks + 1


@settings(max_examples=30, deadline=None)
@given(_TIME, _TIME, _TIME, _TIME, st.integers(1, 6), st.integers(1, 2))
def test_vocabulary_shards_cost_a_microbatch_for_each_barrier(
    f: int, b: int, output: int, gradient: int, ranks: int, barriers: int
) -> None:
    """In flight p + 1 and p + 2; and what is added to the work does not grow with the number of microbatches."""
    shards = Vocabulary((output,) * ranks, (gradient,) * ranks, barriers=barriers)
    added = []
    for microbatches in (3 * ranks + 4, 6 * ranks + 8):
        stage = Stage(0, f, b, 0, until_weight_gradient_bytes=1)
        problem = problem_for("1f1b-vocabulary", stage, ranks, microbatches, shards=shards)
        line = timed(named("1f1b-vocabulary", problem))
        assert line.peak_bytes == tuple(ranks - rank + barriers for rank in range(ranks))
        added.append(line.makespan_ns - problem.work_ns[0])
    assert added[0] == added[1]
