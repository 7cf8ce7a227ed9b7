"""What is written can be read again, and what cannot be read is refused with a word about why."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.simulate import timed
from opweave.compiler.report.pipelining import load_problem, load_schedule, save_schedule, schedule_json
from opweave.errors import OptionError, PlanError
from tests.compiler.report.pipelining import pipelines


@pytest.mark.parametrize("name", pipelines.everything())
def test_schedules_come_back(name: str, tmp_path: Path) -> None:
    known = pipelines.everything()[name]
    save_schedule(known.schedule, tmp_path / "deep" / "schedule.json")
    again = load_schedule(tmp_path / "deep" / "schedule.json")
    assert again == known.schedule
    assert timed(again) == known


@given(ranks=st.integers(1, 5), microbatches=st.integers(1, 7), whole=st.booleans(), limit=st.none() | st.integers(0))
def test_the_same_schedule_is_the_same_text(ranks: int, microbatches: int, whole: bool, limit: int | None) -> None:
    problem = uniform(pipelines.UNIT, placed("loop", ranks), microbatches, memory_limit=limit and limit % 10**15)
    schedule = pipelines.one_forward_one_backward(problem, whole=whole)
    assert schedule_json(schedule) == schedule_json(pipelines.one_forward_one_backward(problem, whole=whole))
    assert json.loads(schedule_json(schedule))["orders"][0][0] == "0F0"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "truncated"),
        (b"{}", "opweave_pipeline"),
        (b"\xff\xfe", "no pipeline schedule"),
        (b"[" * 100_000, "no pipeline schedule"),
        (b'{"opweave_pipeline": 2}', "2"),
        (
            b'{"opweave_pipeline": 1, "method": "", "orders": [], "problem": {"ranks": 0, "stages": [], "routes": []}}',
            "0",
        ),
    ],
)
def test_what_is_no_schedule(text: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(text)
    with pytest.raises(PlanError, match=word):
        load_schedule(tmp_path / "s.json")


def test_an_action_that_is_none(tmp_path: Path) -> None:
    text = schedule_json(pipelines.plain().schedule).replace(b'"0F0"', b'"0X0"')
    (tmp_path / "s.json").write_bytes(text)
    with pytest.raises(PlanError, match="'0X0' is no action"):
        load_schedule(tmp_path / "s.json")
    with pytest.raises(PlanError, match="cannot read"):
        load_schedule(tmp_path / "missing.json")


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot write the schedule"):
        save_schedule(pipelines.plain().schedule, tmp_path / "file" / "s.json")


def test_problems_from_json_and_toml(tmp_path: Path) -> None:
    problem = pipelines.both_ways().schedule.problem
    (tmp_path / "p.json").write_bytes(msgspec.json.encode(problem))
    assert load_problem(tmp_path / "p.json") == problem
    (tmp_path / "p.toml").write_text(
        "ranks = 2\nroutes = [{stages = [0, 1], microbatches = 4}]\n"
        + "".join(
            f"[[stages]]\nrank = {rank}\nforward_ns = 5\ninput_gradient_ns = 6\nweight_gradient_ns = 7\n"
            for rank in (0, 1)
        )
    )
    assert load_problem(tmp_path / "p.toml").stages[1].weight_gradient_ns == 7


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("p.json", "{", "no pipeline problem"),
        ("p.toml", "ranks = ", "no pipeline problem"),
        ("p.json", '{"ranks": 2, "stages": [], "routes": []}', "0 stages"),
        ("p.json", '{"ranks": 2, "stages": [], "routes": [], "speed": 3}', "speed"),
    ],
)
def test_what_is_no_problem(name: str, text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(OptionError, match=word):
        load_problem(tmp_path / name)
