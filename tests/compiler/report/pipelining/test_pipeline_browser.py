"""Opens the page in headless Chromium and compares what it drew with what the schedules say."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from opweave.compiler.pipelining.schedule import Action, ActionKind, TimedSchedule
from opweave.compiler.report.pipelining.colours import COLOURS, chunks_of, shaded
from opweave.compiler.report.pipelining.moves import Moves
from opweave.compiler.report.pipelining.report import pipeline_page
from opweave.compiler.report.pipelining.text import precise
from tests.compiler.report.pipelining import pipelines
from tests.compiler.report.test_browser import BROWSER, FLAGS, drawn_in, text_of

KINDS = tuple(ActionKind)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser is on the path")


def document_of(folder: Path, shown: TimedSchedule, other: TimedSchedule | None = None) -> str:
    """The page's document after its script ran, as HTML."""
    page = folder / "index.html"
    page.write_text(pipeline_page(shown, other), encoding="utf-8")
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", page.as_uri()]
    return subprocess.run(command, capture_output=True, check=True, timeout=120).stdout.decode()


def computes(schedule: TimedSchedule, rank: int) -> list[tuple[int, int, Action]]:
    """Start, finish and action of what the rank computes, in order."""
    times = zip(schedule.starts[rank], schedule.finishes[rank], schedule.schedule.orders[rank], strict=True)
    return [line for line in times if not line[2].kind.copies]


def colour_of(schedule: TimedSchedule, action: Action, chunks: int) -> list[int]:
    """Red, green and blue of an action's box on a page whose schedules have up to ``chunks`` chunks."""
    is_shard = action.kind in (ActionKind.OUTPUT, ActionKind.OUTPUT_GRADIENT)
    chunk = 0 if is_shard else chunks_of(schedule.schedule.problem)[action.stage]
    colour = shaded(COLOURS[action.kind], chunk, chunks)
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]


def agrees(drawn: dict[str, Any], number: int, schedule: TimedSchedule) -> None:
    """What chart ``number`` drew is ``schedule``, and lies where its times put it."""
    chart, probe = drawn["charts"][number], drawn["probes"][number]
    counted = Counter(action.kind for order in schedule.schedule.orders for action in order)
    assert chart["kinds"] == [counted[kind] for kind in KINDS]
    assert chart["reduces"] == sum(map(len, schedule.reduced))
    assert chart["peaks"] == list(schedule.peak_bytes)
    assert drawn["messages"][number] == len(Moves(schedule).messages)
    assert probe["tested"] > 3
    assert probe["hits"] == probe["tested"]
    path = [str(action) for order in schedule.schedule.orders for action in order if action.microbatch == 0]
    assert sorted(drawn["path"][number]) == sorted(path)


@pytest.mark.parametrize(("first", "second"), [("plain", "split"), ("offloading", "sharded"), ("both_ways", "plain")])
def test_the_page_draws_both_schedules_over_one_time(first: str, second: str, tmp_path: Path) -> None:
    pair = [pipelines.everything()[name] for name in (first, second)]
    drawn = drawn_in(document_of(tmp_path, *pair))
    assert drawn["differences"] == 9
    chunks = max(len(stages) for each in pair for stages in each.schedule.problem.stages_of)
    shown = set()
    until = max(schedule.makespan_ns for schedule in pair)
    for number, schedule in enumerate(pair):
        agrees(drawn, number, schedule)
        plot = drawn["probes"][number]["plot"]
        scale = (plot["right"] - plot["left"]) / until
        for rank, index, left, _, width, _, ends in drawn["probes"][number]["boxes"]:
            start, finish, action = computes(schedule, rank)[index]
            assert left == pytest.approx(plot["left"] + start * scale, abs=0.01)
            assert width == pytest.approx((finish - start) * scale, abs=0.01)
            assert ends == [pytest.approx(colour_of(schedule, action, chunks), abs=2)] * 2
            shown.add(action.kind)
    assert shown == {a.kind for each in pair for order in each.schedule.orders for a in order if not a.kind.copies}


def test_one_schedule_alone_and_a_rank_without_work(tmp_path: Path) -> None:
    document = document_of(tmp_path, pipelines.idle_rank())
    drawn = drawn_in(document)
    assert len(drawn["charts"]) == 1
    assert drawn["charts"][0]["peaks"] == [400, 0]
    assert "over the limit on 1 of 2 ranks" in " ".join(text_of(document).split())


NODE = shutil.which("node")
#: The model's functions with a document that holds only the data.
HARNESS = """
const fs = require("fs");
const page = fs.readFileSync(process.argv[1], "utf8");
const script = page.split("<script>").pop().split("</script>")[0];
const data = page.split('<script id="plan" type="application/json">')[1].split("</script>")[0];
const upTo = script.indexOf("// The diagrams: a canvas a schedule");
globalThis.document = { getElementById: () => ({ textContent: data }) };
new Function(script.slice(script.indexOf("(() => {") + 8, upTo) + `
  const [shown] = schedules;
  fit();
  const ranges = [[view.x0, view.x1]];
  const moves = [
    () => zoom(0.1, 0.25), () => pan(0.5), () => pan(100), () => zoom(1e-12), () => pan(-1e15), () => zoom(1e15),
    () => setRange(-50, 20), fit,
  ];
  for (const move of moves) {
    move();
    ranges.push([view.x0, view.x1]);
  }
  console.log(JSON.stringify({
    messages: messagesOf(shown).map((m) => [nameAt(shown, m.from), nameAt(shown, m.to), m.leaves, m.arrives]),
    held: shown.curves.map((_, rank) => [0, 5, 10, 25, 1e9].map((time) => heldAt(shown, rank, time))),
    ranges,
    precise: [0, 999, 1000, 12345, 1234567, 999999999, 2187300000].map(formatPrecise),
    found: ["3F7", " 2 ", "0reload1", "8", "x", "-1", "F3"].map(microbatchIn),
  }));`)();
"""


def moves_in_sight(ranges: list[list[float]], end: int) -> None:
    """The range stays inside the schedule, and a zoom leaves the time under the pointer where it is."""
    assert all(0 <= low < high <= end * (1 + 1e-9) for low, high in ranges)
    whole, closer, right, last, closest, first, all_of_it, left, fitted = ranges
    assert whole == all_of_it == fitted == [0, end]
    assert closer == pytest.approx([0.25 * end - 0.025 * end, 0.25 * end + 0.075 * end])
    assert right == pytest.approx([low + 0.05 * end for low in closer])
    assert last[1] == pytest.approx(end)
    assert 0 < closest[1] - closest[0] <= 1
    assert first[0] == 0
    assert left == [0, min(70, end)]


@pytest.mark.skipif(NODE is None, reason="node is not on the path")
@pytest.mark.parametrize("name", ["plain", "sharded", "both_ways", "offloading"])
def test_the_script_counts_as_python_does(name: str, tmp_path: Path) -> None:
    schedule = pipelines.everything()[name]
    (tmp_path / "index.html").write_text(pipeline_page(schedule), encoding="utf-8")
    command = [str(NODE), "-e", HARNESS, str(tmp_path / "index.html")]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    counted = json.loads(done.stdout)
    moves = Moves(schedule)
    assert sorted(counted["messages"]) == sorted(
        [str(m.sent), str(m.needed), m.leaves_ns, m.arrives_ns] for m in moves.messages
    )
    for rank, curve in enumerate(moves.curves):
        expected = [[held for at, held in curve if at <= time][-1] for time in (0, 5, 10, 25, 10**9)]
        assert counted["held"][rank] == expected
    assert counted["precise"] == [precise(t) for t in (0, 999, 1000, 12345, 1234567, 999999999, 2187300000)]
    moves_in_sight(counted["ranges"], schedule.makespan_ns)
    total = schedule.schedule.problem.microbatches
    wanted = [7, 2, 1, 8, None, None, None]
    assert counted["found"] == [n if n is not None and n < total else None for n in wanted]
