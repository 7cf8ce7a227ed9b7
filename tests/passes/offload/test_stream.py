"""The model of streaming weights: its two measures, the choice of residents, and the bound, against every choice."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.pipeline import Budget
from opweave.passes.offload.residents import choose_residents, lower_bound
from opweave.passes.offload.stream import Source, Stream

BANDWIDTH = 1e9


def budget(seconds: float = 10.0) -> Budget:
    return Budget.of_seconds(seconds, deterministic=True, workers=1)


def source(name: str, nbytes: int, *positions: int, candidate: bool = True) -> Source:
    return Source(name, nbytes, nbytes, nbytes / BANDWIDTH, positions, candidate)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """Up to 6 sources over up to 6 operators, in memories from too small to ample."""
    n = draw(st.integers(1, 6))
    count = draw(st.integers(0, 6))
    sources = []
    for i in range(count):
        positions = sorted(draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=2)))
        sources.append(
            source(f"w{i}", draw(st.integers(1, 40)) * 64, *positions, candidate=draw(st.integers(0, 5)) > 0)
        )
    compute = tuple(draw(st.integers(0, 30)) * 1e-7 for _ in range(n))
    held = tuple(draw(st.integers(0, 10)) * 64 for _ in range(n))
    return Stream(tuple(sources), compute, held, draw(st.integers(1, 120)) * 64, BANDWIDTH)


def every_choice(stream: Stream) -> list[frozenset[int]]:
    candidates = [i for i, s in enumerate(stream.sources) if s.candidate]
    sizes = range(len(candidates) + 1)
    return [frozenset(c) for size in sizes for c in itertools.combinations(candidates, size)]


@settings(max_examples=100, deadline=None)
@given(streams())
def test_a_fluid_is_never_slower(stream: Stream) -> None:
    """Whole buffers need room all at once; both measures agree on what fits."""
    for choice in every_choice(stream):
        whole, fluid = stream.latency_s(choice), stream.fluid_s(choice)
        assert (whole is None) == (fluid is None)
        if whole is not None and fluid is not None:
            assert fluid <= whole + 1e-12
            assert fluid >= sum(stream.compute) - 1e-12


@settings(max_examples=60, deadline=None)
@given(streams())
def test_the_bound_holds_for_every_choice(stream: Stream) -> None:
    reached = [s for choice in every_choice(stream) if (s := stream.fluid_s(choice)) is not None]
    if reached:
        assert lower_bound(stream, budget()).seconds <= min(reached) + 1e-12


@settings(max_examples=60, deadline=None)
@given(streams())
def test_choices_fit_and_are_ordered(stream: Stream) -> None:
    """The first is as good as any greedy one; all that fit come by their latency; the same twice."""
    chosen = choose_residents(stream, budget())
    latencies = [stream.latency_s(choice) for choice in chosen]
    fits = [s for choice in every_choice(stream) if (s := stream.latency_s(choice)) is not None]
    if not fits:
        assert chosen == [frozenset()]
        return
    known = [s for s in latencies if s is not None]
    assert len(known) == len(latencies)
    assert all(a <= b + 1e-11 for a, b in itertools.pairwise(known))
    greedy = [s for choice in stream.greedy() if (s := stream.latency_s(choice)) is not None]
    assert all(known[0] <= seconds + 1e-11 for seconds in greedy)
    assert choose_residents(stream, budget()) == chosen


def test_the_best_choice_is_found() -> None:
    """Eight equal weights of which three fit beside two in flight: those that a call would wait for stay."""
    sources = tuple(source(f"w{i}", 6400, i) for i in range(8))
    stream = Stream(sources, (5e-6,) * 8, (0,) * 8, 5 * 6400, BANDWIDTH)
    best = min(s for choice in every_choice(stream) if (s := stream.latency_s(choice)) is not None)
    chosen = choose_residents(stream, budget())[0]
    assert stream.latency_s(chosen) == pytest.approx(best)
    assert 0 in chosen  # nothing computes before it that could hide its load


def test_everything_stays_where_it_fits() -> None:
    stream = Stream((source("a", 640, 0), source("b", 640, 1)), (1e-6, 1e-6), (64, 64), 1344, BANDWIDTH)
    assert choose_residents(stream, budget()) == [frozenset({0, 1})]
    assert stream.latency_s({0, 1}) == pytest.approx(2e-6)


def test_no_time_is_no_failure() -> None:
    """Without a second, the greedy choice stands, and the bound is what computing or loading takes by itself."""
    sources = tuple(source(f"w{i}", 6400, i) for i in range(8))
    stream = Stream(sources, (5e-6,) * 8, (0,) * 8, 3 * 6400, BANDWIDTH)
    over = Budget(time.monotonic() - 1)
    assert stream.latency_s(choose_residents(stream, over)[0]) is not None
    assert lower_bound(stream, over).seconds == pytest.approx(40e-6)
    slow = Stream(sources, (1e-6,) * 8, (640,) * 8, 3 * 6400 + 640, BANDWIDTH)
    assert lower_bound(slow, over).seconds == pytest.approx(5 * 6.4e-6)
