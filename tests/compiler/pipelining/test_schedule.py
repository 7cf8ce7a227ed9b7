"""Actions as text, and what a timed schedule says of itself."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.pipelining.placement import uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Stage
from opweave.compiler.pipelining.schedule import Action, ActionKind, PipelineSchedule, TimedSchedule
from opweave.compiler.pipelining.simulate import timed
from opweave.errors import OptionError
from tests.compiler.pipelining.drawn import problems, schedule_of


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(list(ActionKind)), st.integers(0, 10**6))
def test_an_action_is_what_its_text_says(stage: int, kind: ActionKind, microbatch: int) -> None:
    """Of every kind, also those whose names begin alike."""
    action = Action(stage, kind, microbatch)
    assert Action.of(f" {action} ") == action


@pytest.mark.parametrize(
    "text", ["", "F0", "3F", "3X0", "3F0x", "-1F0", "3f0", "3 F 0", "3FF0", "3SEND_F0", "٣F0", "9" * 5000 + "F0"]
)
def test_other_text_is_refused(text: str) -> None:
    """Also where torch's own reader takes a prefix, as of ``3F0x``."""
    with pytest.raises(OptionError, match="is no action"):
        Action.of(text)


@settings(deadline=None)
@given(problems(), st.integers(0, 2**20))
def test_schedules_survive_json(problem: PipelineProblem, seed: int) -> None:
    """With their problems, orders and times."""
    drawn = schedule_of(problem, Random(seed))
    assert msgspec.json.decode(msgspec.json.encode(drawn), type=PipelineSchedule) == drawn
    line = timed(drawn)
    again = msgspec.json.decode(msgspec.json.encode(line), type=TimedSchedule)
    assert again == line
    assert (again.makespan_ns, again.span_ns, again.bubble) == (line.makespan_ns, line.span_ns, line.bubble)


@settings(deadline=None)
@given(problems(), st.integers(0, 2**20))
def test_no_bubble_is_negative_and_no_span_exceeds_the_makespan(problem: PipelineProblem, seed: int) -> None:
    """A rank works for as long as it has work, within the step."""
    line = timed(schedule_of(problem, Random(seed)))
    assert line.span_ns <= line.makespan_ns
    assert 0 <= line.span_bubble <= line.bubble <= 1
    assert line.bubble < 1 or not any(problem.work_ns)  # a step may be nothing but messages and all-reduces


def test_a_step_that_takes_no_time_has_no_bubble() -> None:
    """Rather than a division by zero."""
    problem = uniform(Stage(0, 0, 0, 0), (0,), 1)
    line = timed(PipelineSchedule(problem, ((Action.of("0F0"), Action.of("0B0")),)))
    assert (line.makespan_ns, line.bubble, line.span_bubble) == (0, 0.0, 0.0)
