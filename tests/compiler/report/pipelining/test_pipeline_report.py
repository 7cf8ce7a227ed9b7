"""The files of a report: a page that is closed to the outside, data that is the schedule's, a trace, a table."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from opweave.compiler.report.pipelining import load_schedule, write_pipeline_report
from opweave.compiler.report.pipelining.moves import Moves
from opweave.compiler.report.pipelining.report import pipeline_page
from opweave.compiler.report.pipelining.trace import pipeline_trace
from opweave.errors import OptionError
from tests.compiler.report.pipelining import pipelines

HOSTILE = '</script><img src=x onerror=alert(1)>{{data}}\u2028"&'


class Elements(HTMLParser):
    """Scripts and styles of a page, and every attribute."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: dict[str, list[str]] = {}
        self.inside = ""
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = dict(attrs).get("id") or tag
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.inside, []).append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def data_of(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads("".join(Elements(page).text["plan"]))
    return found


@pytest.mark.parametrize("name", pipelines.everything())
def test_nothing_runs_but_the_pages_own_script(name: str) -> None:
    page = pipeline_page(pipelines.everything()[name])
    elements = Elements(page)
    policy = next(v for tag, a, v in elements.attributes if tag == "meta" and a == "content" and "default-src" in v)
    for tag in ("script", "style"):
        (text,) = ["".join(elements.text[tag])]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    outside = [v for _, a, v in elements.attributes if a in ("src", "href", "action") and not v.startswith("data:")]
    assert not outside
    assert not re.search(r"https?://", page)


@pytest.mark.parametrize("name", pipelines.everything())
def test_the_page_holds_every_action(name: str) -> None:
    schedule = pipelines.everything()[name]
    data = data_of(pipeline_page(schedule))
    (shown,) = data["schedules"]
    for rank, order in enumerate(schedule.schedule.orders):
        rows = [
            (stage, data["kinds"][kind], microbatch, start, finish)
            for lane in ("computes", "copies")
            for stage, kind, microbatch, start, finish in zip(
                *(shown["rows"][rank][lane][c] for c in ("stage", "kind", "microbatch", "start", "finish")), strict=True
            )
        ]
        times = zip(order, schedule.starts[rank], schedule.finishes[rank], strict=True)
        assert sorted(rows) == sorted((a.stage, a.kind.value, a.microbatch, s, f) for a, s, f in times)
        for lane in ("computes", "copies"):
            starts = shown["rows"][rank][lane]["start"]
            assert starts == sorted(starts)
    assert shown["facts"]["makespan_ns"] == schedule.makespan_ns
    assert [max(held) for _, held in shown["curves"]] == list(schedule.peak_bytes)


def test_hostile_names_stay_text() -> None:
    known = pipelines.plain()
    problem = msgspec.structs.replace(known.schedule.problem, name=HOSTILE)
    schedule = msgspec.structs.replace(known, schedule=msgspec.structs.replace(known.schedule, problem=problem))
    page = pipeline_page(schedule, known)
    assert "<img" not in page
    assert page.count("<script") == 3
    assert data_of(page)["schedules"][0]["facts"]["name"] == HOSTILE


def test_all_files_and_no_table_that_torch_cannot_execute(tmp_path: Path) -> None:
    """A second report in the same folder leaves nothing of the first behind."""
    names = {"index.html", "pipeline.png", "schedule.json", "schedule.csv", "trace.json"}
    written = write_pipeline_report(pipelines.plain(), tmp_path, pipelines.split())
    assert {path.name for path in tmp_path.iterdir()} == set(written) == names
    rows = (tmp_path / "schedule.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["0F0", "1F0", "2F0", "3F0"]
    assert load_schedule(tmp_path / "schedule.json") == pipelines.plain().schedule
    again = write_pipeline_report(pipelines.both_ways(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(again) == names - {"schedule.csv"}
    assert (tmp_path / "pipeline.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_schedule_gives_the_same_files(tmp_path: Path) -> None:
    first = write_pipeline_report(pipelines.split(), tmp_path / "a")
    second = write_pipeline_report(pipelines.split(), tmp_path / "b")
    assert {name: path.read_bytes() for name, path in first.items()} == {
        name: path.read_bytes() for name, path in second.items()
    }


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot write the report"):
        write_pipeline_report(pipelines.plain(), tmp_path / "file" / "folder")


@pytest.mark.parametrize("name", pipelines.everything())
def test_the_trace_has_every_action_and_message(name: str) -> None:
    moves = Moves(pipelines.everything()[name])
    events = json.loads(pipeline_trace([moves, moves]))["traceEvents"]
    phases = Counter(event["ph"] for event in events)
    reduced = sum(map(len, moves.timed.reduced))
    assert phases["X"] == 2 * (sum(map(len, moves.timed.schedule.orders)) + reduced)
    assert phases["s"] == phases["f"] == 2 * len(moves.messages)
    assert {event["pid"] for event in events} == {1, 2}
    end = max(event["ts"] + event["dur"] for event in events if event["ph"] == "X")
    assert end == pytest.approx(moves.timed.makespan_ns / 1000)
    peaks = {
        e["name"]: e["args"]["bytes"]
        for e in sorted((e for e in events if e["ph"] == "C"), key=lambda e: e["args"]["bytes"])
    }
    assert peaks == {f"bytes held on rank {rank}": peak for rank, peak in enumerate(moves.timed.peak_bytes)}


def test_arrows_begin_inside_the_sending_slice_and_end_at_the_receiving_one() -> None:
    moves = Moves(pipelines.plain())
    events = json.loads(pipeline_trace([moves]))["traceEvents"]
    nanoseconds = {
        id(e): (int(e["ts"] * 1000), int(e["ts"] * 1000) + round(e["dur"] * 1000)) for e in events if "dur" in e
    }
    slices = [(e["tid"], *nanoseconds[id(e)]) for e in events if e["ph"] == "X"]
    for event in (e for e in events if e["ph"] in "sf"):
        ends = [
            (low, high) for tid, low, high in slices if tid == event["tid"] and low <= int(event["ts"] * 1000) < high
        ]
        assert len(ends) == 1
        assert event["ph"] == "s" or int(event["ts"] * 1000) == ends[0][0]
