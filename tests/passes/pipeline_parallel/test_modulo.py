"""Templates repeat within the limit, period after period, and are as short as they can be where that is known."""

from __future__ import annotations

import msgspec
import pytest

from opweave.compiler.pipeline import Budget
from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage, Vocabulary
from opweave.compiler.pipelining.schedule import ActionKind
from opweave.compiler.pipelining.simulate import timed
from opweave.passes.pipeline_parallel import templates
from opweave.passes.pipeline_parallel._lanes import lanes_of
from opweave.passes.pipeline_parallel._progress import Search
from opweave.passes.pipeline_parallel.list_schedule import workshop_for
from opweave.passes.pipeline_parallel.modulo import template
from opweave.passes.pipeline_parallel.solution import within_limit

UNIT = Stage(0, 1, 1, 1, until_weight_gradient_bytes=1)
STAGE = Stage(0, 3, 3, 2, None, 1, 2, 1, 1, 1)
PROBLEMS = {
    "loop": uniform(STAGE, placed("loop", 3), 5, memory_limit=9),
    "v": uniform(STAGE, placed("v", 2, 2), 4, memory_limit=12),
    "copies": uniform(
        msgspec.structs.replace(STAGE, offloaded_bytes=2, offload_ns=2, reload_ns=1),
        placed("loop", 2),
        5,
        memory_limit=6,
    ),
    "two ways": PipelineProblem(
        2,
        tuple(msgspec.structs.replace(STAGE, rank=rank) for rank in (0, 1, 1, 0)),
        (Route((0, 1), 3), Route((2, 3), 3)),
        (12, 12),
    ),
    "vocabulary": PipelineProblem(
        2, (STAGE, msgspec.structs.replace(STAGE, rank=1)), (Route((0, 1), 4),), (13, 13), Vocabulary((1, 1), (1, 1))
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_schedules_out_of_templates_keep_the_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "EFFORT", 0.1)
    problem = PROBLEMS[name]
    search = Search(problem, Budget.of_seconds(60, deterministic=True), "makespan")
    templates.repeat(search, workshop_for(problem))
    assert search.best is not None
    assert within_limit(search.best)
    whole = [attempt for attempt in search.attempts if attempt.method.startswith("template")]
    # Copies out count until something waits for them, so that only with copies a template may not fit.
    assert name == "copies" or all(attempt.value is not None for attempt in whole)


def test_finds_v_min_from_scratch() -> None:
    """4 ranks, 4 chunks: a microbatch every 6 slots, as V-Min; not with one chunk less."""
    problem = uniform(UNIT, placed("v", 4, 2), 8, memory_limit=4)
    budget = Budget.of_seconds(60, deterministic=True)
    found, _ = template(lanes_of(problem), 6, False, budget, 10.0)
    assert found is not None
    assert found.period == 6
    tight = msgspec.structs.replace(problem, memory_limit=(3,) * 4)
    assert template(lanes_of(tight), 6, False, budget, 10.0) == (None, False)


def test_repeats_within_each_rank_and_behind_operands() -> None:
    """Checked with the simulator: from one period to the next everything moves by the period."""
    problem = uniform(STAGE, placed("v", 2, 2), 4, memory_limit=14)
    lanes = lanes_of(problem)
    found, _ = template(lanes, 20, False, Budget.of_seconds(60, deterministic=True), 10.0)
    assert found is not None
    for rank in range(problem.ranks):
        slots = [
            (int(found.starts[k]) + step) % 20
            for k, lane in enumerate(lanes.lane)
            if lane["rank"] == rank
            for step in range(int(lane["duration"]))
        ]
        assert len(slots) == len(set(slots)) == 16
    for k, lane in enumerate(lanes.lane):
        for edge in lanes.edges[lane["before"] : lane["before_end"]]:
            before = edge["lane"]
            assert found.starts[k] >= found.starts[before] + lanes.lane[before]["duration"] + edge["lag"]


def test_whole_backwards_need_no_room_between_halves() -> None:
    problem = uniform(STAGE, placed("loop", 2), 4, memory_limit=3)
    search = Search(problem, Budget.of_seconds(60, deterministic=True), "makespan")
    templates.repeat(search, workshop_for(problem))
    assert search.best is not None
    kinds = {action.kind for order in search.best.schedule.orders for action in order}
    assert kinds == {ActionKind.FORWARD, ActionKind.BACKWARD}
    assert timed(search.best.schedule).peak_bytes == (3, 3)
