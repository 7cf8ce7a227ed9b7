"""The summary as text: its figures are the schedule's, whatever the names."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest

from opweave.compiler.pipelining.schedule import TimedSchedule
from opweave.compiler.report.pipelining import pipeline_text
from tests.compiler.report.pipelining import pipelines


@dataclass(frozen=True)
class Proof:
    """A bound."""

    value: int
    proved_by: str = "analytic"


@dataclass(frozen=True)
class Row:
    """An attempt."""

    method: str
    value: int | None
    seconds: float = 0.25


@dataclass(frozen=True)
class Solution:
    """What a method returns, as far as the report reads it."""

    timed: TimedSchedule
    objective: str
    bound: Proof
    attempts: tuple[Row, ...] = ()
    seconds: float = 1.5

    @property
    def gap(self) -> float:
        return 1 - self.bound.value / self.timed.makespan_ns


def test_figures_overall_and_by_rank() -> None:
    text = pipeline_text(pipelines.plain())
    assert "1f1b of plain: 4 ranks, 4 stages, 8 microbatches" in text
    assert "makespan     370 ns, bubble 35.14 %" in text
    rows = [line.split() for line in text.splitlines()[-4:]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert rows[0][-6:] == ["KiB", "100.0", "%", "8", "512", "B"]


@pytest.mark.parametrize("name", pipelines.everything())
def test_columns_stand_below_each_other(name: str) -> None:
    lines = pipeline_text(pipelines.everything()[name]).splitlines()
    table = lines[lines.index("") + 1 :]
    assert len(table) == 1 + len(pipelines.everything()[name].schedule.orders)
    assert len({len(line) for line in table}) == 1


def test_a_proof_is_told_with_what_was_tried() -> None:
    schedule = pipelines.plain()
    attempts = (Row("gpipe", 400), Row("exact", None), Row("2bp", 390), Row("list", 395))
    text = pipeline_text(Solution(schedule, "makespan", Proof(296), attempts))
    assert "at most 20.0 % could be saved: makespan at least 296 ns by an analytic argument" in text
    assert "gpipe: 400 ns, in 250 ms" in text
    assert [line.strip() for line in text.splitlines() if "2bp" in line or "other" in line] == [
        "2bp: 390 ns, in 250 ms",
        "and 2 others",
    ]
    assert "optimal: makespan" in pipeline_text(Solution(schedule, "makespan", Proof(370)))


def test_over_the_limit_is_said() -> None:
    assert "OVER THE LIMIT on 2 ranks: 0, 1" in pipeline_text(pipelines.split())
    assert "OVER" not in pipeline_text(pipelines.plain())


def test_differences_have_the_sign_of_the_first_less_the_second() -> None:
    text = pipeline_text(pipelines.split(), pipelines.plain())
    line = next(line for line in text.splitlines() if line.startswith("makespan  ") and "332" in line and "370" in line)
    assert line.split()[-2:] == ["-10.27", "%"]


def test_names_do_not_reach_a_terminal_as_they_are() -> None:
    schedule = pipelines.plain()
    problem = msgspec.structs.replace(schedule.schedule.problem, name="x\x1b[31m\nrank 9")
    named = msgspec.structs.replace(schedule, schedule=msgspec.structs.replace(schedule.schedule, problem=problem))
    text = pipeline_text(named)
    assert "\x1b" not in text
    assert "x\\x1b[31m\\nrank 9" in text
