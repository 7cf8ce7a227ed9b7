"""The process that watches over measuring: workers that die, hang, chatter, or do as they are asked."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.kernels.bench.rows import Row
from opweave.kernels.bench.worker import Answer, supervised

HEAD = """
import json, os, sys, time
request = json.load(sys.stdin)
def say(kind, **facts):
    print("opweave: " + json.dumps({"kind": kind, **facts}), flush=True)
def row(case):
    return {"case": case, "provider": "opweave", "metric": "time", "value": float(request["until"] > 0), "unit": "ms"}
def end(case, left_out=()):
    say("end", case=case, rows=[row(case)], left_out=list(left_out), tuned=[])
say("device", rows=[row("")], roofline={"source": "measured", "again": request.get("roofline") is not None})
for case in request["cases"]:
    name = case["name"]
    say("begin", case=name)
"""


def answers(
    tmp_path: Path, body: str, names: str = "a b c", head: str = HEAD, seconds: float = 60.0, **options: Any
) -> list[Answer]:
    script = tmp_path / "worker.py"
    script.write_text(head + textwrap.indent(textwrap.dedent(body), "    "))
    cases = [{"name": name} for name in names.split()]
    return list(supervised("measure", cases, seconds, command=(sys.executable, str(script)), **options))


def brief(found: list[Answer]) -> list[tuple[str, int, str]]:
    return [(answer.case, len(answer.rows), answer.lost) for answer in found]


def test_answers_come_in_order_with_the_device_first(tmp_path: Path) -> None:
    found = answers(tmp_path, "print('chatter')\nend(name, ['Inductor'])")
    assert brief(found) == [("", 1, ""), ("a", 1, ""), ("b", 1, ""), ("c", 1, "")]
    assert found[1] == Answer("a", (Row("a", "opweave", "time", 1.0, "ms"),), ("Inductor",))


def test_a_worker_that_dies_costs_one_case(tmp_path: Path) -> None:
    body = """
        if name == "b":
            sys.stderr.write("some warning\\nCUDA error: an illegal memory access was encountered\\n")
            os._exit(3)
        end(name)
    """
    found = answers(tmp_path, body)
    why = "the worker ended with 3: CUDA error: an illegal memory access was encountered"
    assert brief(found) == [("", 1, ""), ("a", 1, ""), ("b", 0, why), ("c", 1, "")]


def test_a_worker_that_hangs_is_stopped(tmp_path: Path) -> None:
    found = answers(tmp_path, "time.sleep(0 if name != 'a' else 600)\nend(name)", patience_s=3.0)
    assert brief(found) == [("", 1, ""), ("a", 0, "said nothing for 3 s and was stopped"), ("b", 1, ""), ("c", 1, "")]


def test_what_shows_between_cases_costs_none(tmp_path: Path) -> None:
    found = answers(tmp_path, "end(name)\nsys.exit(1)")
    assert brief(found) == [("", 1, ""), ("a", 1, ""), ("b", 1, ""), ("c", 1, "")]


def test_a_worker_that_cannot_begin_is_not_asked_again(tmp_path: Path) -> None:
    found = answers(tmp_path, "", head="raise SystemExit('no driver')\nfor _ in ():\n    pass\n")
    assert brief(found) == [("", 0, "the worker ended with 1: no driver")]


def test_what_is_left_when_time_is_over_is_said(tmp_path: Path) -> None:
    found = answers(tmp_path, "time.sleep(1.5)\nos._exit(1)", seconds=1.0)
    assert brief(found)[1][0] == "a"
    assert [(answer.case, answer.left_out) for answer in found[2:]] == [("b", ("everything",)), ("c", ("everything",))]


def test_later_workers_are_told_what_the_first_measured(tmp_path: Path) -> None:
    body = """
        if name == "a":
            os._exit(1)
        assert request["roofline"]["source"] == "measured"
        end(name)
    """
    assert [answer.lost for answer in answers(tmp_path, body)[2:]] == ["", ""]
