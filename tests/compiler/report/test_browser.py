"""Opens the page in headless Chromium and compares what it drew with what the plan says.

The page records what its draw calls put on the canvases (not what it read) in the element ``#drawn``, and looks up
residences by hit test and by the colour of the canvas's pixels. The browser is used through its command line only.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from opweave.compiler.graph import Graph
from opweave.compiler.plan import Plan, Run
from opweave.compiler.report import view, write_html
from opweave.compiler.report.ranks import side_by_side
from opweave.compiler.simulate import simulate
from opweave.compiler.verify import verify
from tests.compiler.report.report_plans import HOSTILE_NAME, at_every_level, dense, faulty, hostile, recorded, spilling
from tests.compiler.verify.collective_faults import timed
from tests.graphs.build import all_graphs
from tests.graphs.recomputed import recomputing

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1400,2000",
    "--virtual-time-budget=5000",
    "--dump-dom",
)
PRIME = 2147483647

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)} is on the path")


def document_of(plan: Plan, folder: Path) -> str:
    """The page's document after its script ran, as HTML."""
    write_html(plan, folder / "index.html")
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", (folder / "index.html").as_uri()]
    return subprocess.run(command, capture_output=True, check=True, timeout=120).stdout.decode()


def drawn_in(document: str) -> dict[str, Any]:
    """What the page says it drew; the element stays empty when its script fails anywhere."""
    match = re.search(r'<script id="drawn" type="application/json">(.*?)</script>', document, re.DOTALL)
    assert match
    assert match[1], "the page's script failed"
    drawn: dict[str, Any] = json.loads(match[1])
    return drawn


def text_of(document: str) -> str:
    """All text of the document that is not script or style."""
    shown = re.sub(r"<(script|style|noscript)\b.*?</\1>", "", document, flags=re.DOTALL)
    return unescape(re.sub(r"<[^>]*>", " ", shown))


def checksum(graph: Graph, plan: Plan) -> int:
    """Of all rectangles of the memory map, in any order; the page computes the same where it draws."""
    total = 0
    for r in plan.residences or ():
        value = 7
        for part in (r.begin, r.end, r.offset or 0, graph.buffers[r.buffer].nbytes):
            value = (value * 31 + part % PRIME) % PRIME
        total = (total + value) % PRIME
    return total


PLANS: dict[str, Callable[[], Plan]] = {
    "spill": spilling,
    "keep": lambda: at_every_level(all_graphs()["in_place"])["timed"],
    "dense": dense,
    "recompute": lambda: simulate(recomputing()),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_page_draws_the_plan(name: str, tmp_path: Path) -> None:
    plan = PLANS[name]()
    drawn, counted = drawn_in(document_of(plan, tmp_path)), verify(plan)
    categories = Counter(bar.category for bar in view.bars(plan))
    for mode in ("step", "time"):
        assert drawn[mode]["bars"]["count"] == len(plan.instructions)
        assert {name: n for name, n in drawn[mode]["bars"]["categories"].items() if n} == categories
        assert drawn[mode]["regions"]["count"] == len(plan.residences or ())
        assert drawn[mode]["regions"]["checksum"] == checksum(plan.graph, plan)
        assert drawn[mode]["live"]["capacity"] == plan.machine.scratchpad_memory.capacity_bytes
    assert drawn["step"]["live"]["highest"] == counted.peak_bytes
    assert drawn["time"]["live"]["highest"] == max(held for _, held in view.live_over_time(plan))
    assert drawn["moved"] == {"compulsory": counted.compulsory_bytes, "additional": counted.additional_bytes}
    assert drawn["tensors"] == sum(1 for row in counted.traffic if row.total_bytes)
    assert drawn["operators"] == sum(bar.executes for bar in view.bars(plan))
    assert drawn["faults"] == 0


def test_what_is_under_the_pointer_is_what_is_drawn_there(tmp_path: Path) -> None:
    probe = drawn_in(document_of(spilling(), tmp_path))["probe"]
    assert probe["tested"] > 20
    assert probe["hits"] == probe["tested"]
    assert probe["colours"] == probe["tested"]


def test_rectangles_lie_where_their_steps_and_addresses_put_them(tmp_path: Path) -> None:
    """Pixels worked out here, from the plan, against the pixels of the page's fillRect calls."""
    plan = spilling()
    probe = drawn_in(document_of(plan, tmp_path))["probe"]
    x0, x1, y0, y1 = probe["range"]
    plot = probe["plot"]
    assert (x0, x1, y0) == (0, len(plan.instructions), 0)
    assert y1 >= plan.machine.scratchpad_memory.capacity_bytes
    per_step, per_byte = (plot["right"] - plot["left"]) / x1, (plot["bottom"] - plot["top"]) / y1
    assert plot["right"] - plot["left"] > 1000
    for index, left, top, width, height in probe["boxes"]:
        residence = (plan.residences or ())[index]
        nbytes = plan.graph.buffers[residence.buffer].nbytes
        assert left == pytest.approx(plot["left"] + residence.begin * per_step, abs=0.01)
        assert width == pytest.approx((residence.end - residence.begin) * per_step, abs=0.01)
        assert top + height == pytest.approx(plot["bottom"] - (residence.offset or 0) * per_byte, abs=0.01)
        assert height == pytest.approx(nbytes * per_byte, abs=0.01)


def test_the_page_says_what_was_proven(tmp_path: Path) -> None:
    plan = recorded()
    text = " ".join(text_of(document_of(plan, tmp_path)).split())
    value = verify(plan).additional_bytes
    assert f"({value:,} B)" in text
    assert f"({value - value // 8:,} B)" in text
    assert "12.5 % by integer programming over every residency of this order" in text
    assert "of the plan before later passes; searched everything" in text
    assert "verified" in text


def test_operators_are_listed_in_the_order_they_run(tmp_path: Path) -> None:
    plan = spilling()
    table = document_of(plan, tmp_path).partition('id="operators"')[2]
    steps = [int(text) for text in re.findall(r'<tr><td class="number">(\d+)</td>', table)]
    assert steps == [step for step, instruction in enumerate(plan.instructions) if isinstance(instruction, Run)]


def test_hostile_names_are_shown_and_do_nothing(tmp_path: Path) -> None:
    """No name becomes an element; each is there as text, in the title, in the tables and in the passes."""
    document = document_of(hostile(), tmp_path)
    drawn_in(document)
    assert "<img" not in document
    assert "<img src=x onerror=alert(1)>" in text_of(document)
    assert f"x{HOSTILE_NAME}" in text_of(document)
    assert f"y{HOSTILE_NAME}" in text_of(document)
    assert f"op0{HOSTILE_NAME}" in text_of(document)
    assert "{{data}}" in text_of(document)


def test_faults_are_shown_first(tmp_path: Path) -> None:
    plan = faulty()
    document = document_of(plan, tmp_path)
    faults = verify(plan).faults
    drawn, text = drawn_in(document), text_of(document)
    assert drawn["faults"] == len(faults)
    assert drawn["step"]["bars"]["count"] == len(plan.instructions)
    assert text.index("This plan is wrong") < text.index("additional traffic")
    for fault in faults:
        assert fault.message in text


@pytest.mark.parametrize("level", ["order", "residency", "address"])
def test_undecided_plans_are_drawn_as_far_as_they_go(level: str, tmp_path: Path) -> None:
    plan = at_every_level(all_graphs()["views"])[level]
    drawn = drawn_in(document_of(plan, tmp_path))
    assert "time" not in drawn
    assert drawn["step"]["bars"]["count"] == len(plan.instructions)
    assert drawn["step"]["regions"]["count"] == (len(plan.residences or ()) if level == "address" else 0)
    assert drawn["step"]["live"]["highest"] == (verify(plan).peak_bytes if level != "order" else 0)


def test_a_plan_of_nothing_has_a_page(tmp_path: Path) -> None:
    plan = Plan.of_order(all_graphs()["no_operators"], spilling().machine)
    assert drawn_in(document_of(plan, tmp_path))["operators"] == 0


def test_collectives_have_lanes_and_a_table(tmp_path: Path) -> None:
    """Of two ranks, side by side; a wait is a mark on the lane that waits."""
    plan = side_by_side({0: timed(), 1: timed()})
    document = document_of(plan, tmp_path)
    drawn = drawn_in(document)
    assert {n: c for n, c in drawn["time"]["bars"]["categories"].items() if c} == {"run": 6, "collective": 2, "wait": 2}
    assert drawn["collectives"] == 2
    assert "all_reduce" in text_of(document)
