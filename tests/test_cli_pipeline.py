"""``opweave pipeline`` as a user meets it: figures of papers, files, comparisons, and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

import opweave
from opweave.cli import app
from opweave.cli.pipeline_problems import Source, parse_time
from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage
from opweave.compiler.pipelining.simulate import timed
from opweave.compiler.report.pipelining import load_problem, load_schedule
from opweave.errors import ExecutionError, Infeasible, OptionError, PlanError

# The 6.2B row of Zero Bubble's table (arXiv 2401.10241), with 24 microbatches on 8 ranks.
COSTS = ("--forward", "29.718ms", "--input-gradient", "29.444ms", "--weight-gradient", "19.927ms", "--send", "0.527ms")
UNITS = ("--forward", "1", "--input-gradient", "1", "--weight-gradient", "1")
LARGE = ("--ranks", "8", "--microbatches", "24", *COSTS)
SMALL = ("--ranks", "2", "--microbatches", "3", *COSTS)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What the command prints, after checking its exit code."""
    code = app(["pipeline", *map(str, arguments)], standalone_mode=False)
    assert code == 0
    return capsys.readouterr().out


def facts_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(capsys, *arguments, "--json"))
    return found


def test_figures_of_zero_bubbles_table(capsys: pytest.CaptureFixture[str]) -> None:
    """1F1B and ZB-H1 by makespan, ZB-H2 by span, as the table has them."""
    found = facts_of(capsys, *LARGE, "--schedule", "1f1b", "--compare", "zb-h1", "--compare", "zb-h2")
    assert found["schedule"]["bubble"] == pytest.approx(0.2347, abs=5e-5)
    zb_h1, zb_h2 = found["compared"]
    assert zb_h1["bubble"] == pytest.approx(0.1323, abs=5e-5)
    assert zb_h2["span_bubble"] == pytest.approx(0.0698, abs=5e-5)
    assert zb_h2["peak_bytes"] == 15 << 20
    assert found["schedule"]["peak_bytes"] == 8 << 20


def test_chunks_divide_a_ranks_work(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the placement, a rank computes the same, and 1F1B's activations are what a limit of 1x allows."""
    found = facts_of(
        capsys, *LARGE, "--schedule", "zbv", "--compare", "1f1b", "--compare", "dualpipe", "--memory-limit", "1x"
    )
    work = [each["ranks"][0]["work_ns"] for each in (found["schedule"], *found["compared"])]
    assert max(work) - min(work) <= 24 * 3
    assert [rank["limit_bytes"] for rank in found["schedule"]["ranks"]] == [8 << 20] * 8
    assert found["schedule"]["stages"] == 16
    assert found["schedule"]["within"]
    assert not found["compared"][1]["within"]
    assert found["compared"][1]["bound"] is None


def test_a_chunk_has_its_share_of_the_work_and_messages_as_long_as_before() -> None:
    """And the fullest rank of 1F1B, whichever it is, tells what a limit of 1x allows."""
    part = Stage(0, 300, 311, 80, 90, 500, 70, 2, 3, 5, 7, 11, reduce_ns=4, resident_bytes=80)
    chunk = Source(None, part, 3, 4, limit="2x").problem_of("zbv")
    assert chunk.stages[4] == Stage(1, 150, 156, 40, 45, 250, 35, 1, 3, 5, 7, 11, reduce_ns=2, resident_bytes=40)
    assert chunk.memory_limit == (80 + 2 * 3 * 570,) * 3
    held = (100, 400, 100)
    stages = tuple(Stage(rank, 1, 1, 1, until_weight_gradient_bytes=size) for rank, size in enumerate(held))
    known = PipelineProblem(3, stages, (Route((0, 1, 2), 4),))
    assert Source(known, limit="1x").problem_of("optimal").memory_limit == (800,) * 3


def test_optimal_keeps_the_limit_and_beats_what_it_is_compared_with(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = (
        *SMALL,
        "--memory-limit",
        "1x",
        "--time-limit",
        "5",
        "--compare",
        "1f1b",
        "--report",
        tmp_path / "report",
    )
    found = facts_of(capsys, *options, "-o", tmp_path / "s.json", "--csv", tmp_path / "s.csv", "--deterministic")
    assert found["schedule"]["makespan_ns"] < found["compared"][0]["makespan_ns"]
    assert found["schedule"]["within"]
    assert found["schedule"]["gap"] == pytest.approx(1 - found["schedule"]["bound"] / found["schedule"]["makespan_ns"])
    assert found["schedule"]["attempts"]
    assert timed(load_schedule(tmp_path / "s.json")).makespan_ns == found["schedule"]["makespan_ns"]
    assert (tmp_path / "s.csv").read_text().splitlines()[0].startswith("0F0,0F1")
    assert all(Path(path).exists() for path in found["files"].values())
    assert set(found["files"]) >= {"schedule", "csv", "index.html", "pipeline.png", "trace.json"}


def test_any_placement_is_no_worse_than_a_loop(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of costs, and of a file; the loop of two chunks counts among the placements."""
    options = (*SMALL, "--chunks", "2", "--memory-limit", "1x", "--time-limit", "2", "--deterministic")
    found = facts_of(capsys, *options, "--placement", "any", "-o", tmp_path / "any.json")
    loop = facts_of(capsys, *options, "--placement", "loop", "-o", tmp_path / "loop.json")
    assert found["schedule"]["makespan_ns"] <= loop["schedule"]["makespan_ns"]
    assert found["schedule"]["bound"] <= loop["schedule"]["makespan_ns"]
    problem = load_schedule(tmp_path / "loop.json").problem
    (tmp_path / "p.json").write_bytes(msgspec.json.encode(problem))
    again = facts_of(capsys, "--problem", tmp_path / "p.json", "--placement", "any", "--time-limit", "2")
    assert again["schedule"]["makespan_ns"] <= loop["schedule"]["makespan_ns"]


def test_text_has_a_table_of_ranks_and_one_of_differences(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, *SMALL, "--schedule", "gpipe", "--compare", "1f1b")
    assert "gpipe: 2 ranks, 2 stages, 3 microbatches" in text
    assert "difference" in text
    assert [line.split()[0] for line in text.splitlines() if line.strip()[:1].isdigit()] == ["0", "1"]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(run(capsys, "--list", "--json"))
    assert listed["zbv"]["placement"] == "v"
    assert "optimal" in run(capsys, "--list")


def test_problem_and_schedule_from_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A file's schedule is shown as it is, and its problem is what others are made for."""
    stage = Stage(0, 5, 6, 7, until_weight_gradient_bytes=100, resident_bytes=1000)
    problem = uniform(stage, placed("loop", 3), 4)
    (tmp_path / "p.json").write_bytes(msgspec.json.encode(problem))
    options = ("--problem", tmp_path / "p.json", "--memory-limit", "1.5x")
    found = facts_of(capsys, *options, "--schedule", "1f1b", "-o", tmp_path / "s.json")
    assert found["schedule"]["ranks"][0]["limit_bytes"] == 1000 + 450
    assert found["schedule"]["peak_bytes"] == 1000 + 300
    again = facts_of(capsys, "--schedule", tmp_path / "s.json", "--compare", "gpipe", "--compare", tmp_path / "s.json")
    assert again["schedule"] == {**found["schedule"]}
    assert again["compared"][0]["peak_bytes"] == 1000 + 400
    assert again["compared"][1] == again["schedule"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ((), "no problem to solve"),
        (("--ranks", "2"), "lacks --microbatches, --forward, --input-gradient, --weight-gradient"),
        ((*SMALL, "--schedule", "zbx"), "no schedule 'zbx'"),
        ((*SMALL, "--schedule", "zbv", "--placement", "loop"), "places stages as 'v'"),
        ((*SMALL, "--schedule", "zbv", "--chunks", "3"), "2 chunks on each rank, not 3"),
        ((*SMALL, "--placement", "spiral"), "no placement 'spiral'"),
        ((*SMALL, "--memory-limit", "lots"), "--memory-limit is 'lots'"),
        ((*SMALL, "--until-weight-gradient", "lots"), "--until-weight-gradient is 'lots'"),
        (("--ranks", "4096", "--microbatches", "4096", *COSTS), "16,777,216 times"),
        ((*SMALL, "--memory-limit", "-1x"), "--memory-limit is '-1x'"),
        (
            ("--ranks", "2", "--microbatches", "2", *UNITS, "--schedule", "zbv"),
            "--forward of 1 ns is not to be divided",
        ),
        ((*SMALL, "--placement", "any", "--until-weight-gradient", "3"), "--until-weight-gradient of 3 bytes"),
        ((*SMALL, "--time-limit", "nan"), "--time-limit is nan"),
        ((*SMALL, "--time-limit", "0"), "--time-limit is 0"),
        ((*SMALL, "--objective", "speed"), "--objective is 'speed'"),
        ((*SMALL, "--send", "-1ms"), "--send is '-1ms'"),
        ((*SMALL, "--send", "nan"), "--send is 'nan'"),
        ((*SMALL, "--send", "1e9s"), "no time"),
        ((*SMALL, "--problem", "missing.json"), "--ranks has no effect"),
        (("--problem", "missing.json"), "cannot read 'missing.json'"),
        (("--ranks", "0", *SMALL[2:]), "--ranks is 0"),
        (("--ranks", "99999999", *SMALL[2:]), "--ranks is 99999999"),
        ((*SMALL, "--schedule", "dualpipe"), "microbatches"),
    ],
)
def test_what_is_refused(options: tuple[str, ...], word: str) -> None:
    with pytest.raises(OptionError) as refused:
        app(["pipeline", *options], standalone_mode=False)
    assert word in str(refused.value)


def test_a_limit_below_one_microbatch() -> None:
    with pytest.raises(Infeasible) as refused:
        app(["pipeline", *SMALL, "--memory-limit", "0.4x"], standalone_mode=False)
    assert refused.value.required_bytes == 1 << 20


def test_nothing_is_searched_for_before_the_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("searched")

    monkeypatch.setattr("opweave.passes.pipeline_parallel.solve.solve", refuse)
    with pytest.raises(OptionError, match="no schedule 'later'"):
        app(["pipeline", *SMALL, "--compare", "later"], standalone_mode=False)


def test_a_schedule_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(PlanError, match="no pipeline schedule"):
        app(["pipeline", "--schedule", str(tmp_path / "s.json")], standalone_mode=False)


def test_a_table_that_torch_cannot_execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is made."""
    options = ("--ranks", "2", "--microbatches", "8", *COSTS, "--schedule", "dualpipe")
    with pytest.raises(ExecutionError, match="2 routes"):
        app(["pipeline", *options, "--csv", str(tmp_path / "s.csv")], standalone_mode=False)
    stage = Stage(0, 1, 1, 1, until_weight_gradient_bytes=1, offloaded_bytes=1)
    (tmp_path / "p.json").write_bytes(msgspec.json.encode(uniform(stage, (0, 1), 2)))
    monkeypatch.setattr("opweave.passes.pipeline_parallel.solve.solve", lambda *_, **__: pytest.fail("searched"))
    with pytest.raises(ExecutionError, match="stage 0 offloads"):
        app(
            ["pipeline", "--problem", str(tmp_path / "p.json"), "--csv", str(tmp_path / "s.csv")], standalone_mode=False
        )
    assert not (tmp_path / "s.csv").exists()


@given(st.integers(0, 10**9), st.sampled_from([("ns", 1), ("us", 10**3), ("ms", 10**6), ("s", 10**9)]))
def test_times(value: int, unit: tuple[str, int]) -> None:
    name, size = unit
    assert parse_time(f"{value}{name}", "send") == value * size
    assert parse_time(f" {value}.5 {name} ", "send") in (value * size + size // 2, value * size + (size + 1) // 2)


def test_errors_reach_the_shell_as_documented() -> None:
    command = [sys.executable, "-m", "opweave.cli", "pipeline", *SMALL, "--schedule", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == OptionError.exit_code
    assert done.stderr.startswith("error[option]: there is no schedule 'nothing'")


def test_the_documented_options_exist_and_the_documented_problem_is_one(tmp_path: Path) -> None:
    text = (Path(opweave.__file__).resolve().parent / "docs" / "pipeline.md").read_text(encoding="utf-8")
    (problem,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "p.toml").write_text(problem)
    assert load_problem(tmp_path / "p.toml").ranks == 2
    command = typer.main.get_command(app).commands["pipeline"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named <= known
    assert known - named <= {"--output"}  # as -o
