"""The page is one safe, self-contained file; what a browser makes of it is tested in test_browser.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from opweave.compiler.plan import Plan
from opweave.compiler.report import write_html, write_report
from opweave.compiler.verify import verify
from opweave.errors import OptionError
from tests.compiler.report.report_plans import HOSTILE_NAME, at_every_level, decided, faulty, hostile, spilling
from tests.graphs.build import all_graphs


class Elements(HTMLParser):
    """Every element's name and attributes, the way a browser nests scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def page_of(plan: Plan, folder: Path) -> str:
    write_html(plan, folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, Any]:
    match = re.search(r'<script id="plan" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert match
    data: dict[str, Any] = json.loads(match[1])
    return data


def test_the_page_reaches_for_nothing_outside(tmp_path: Path) -> None:
    page = page_of(spilling(), tmp_path)
    for tag, attributes in Elements(page).found:
        assert not {"src", "srcset", "action", "data"} & set(attributes)
        if "href" in attributes:
            assert (tag, attributes["href"]) == ("link", "data:,")
    assert "http:" not in page.replace("http-equiv", "")
    assert "https:" not in page
    assert "@import" not in page


def test_the_policy_lets_only_the_pages_own_script_run(tmp_path: Path) -> None:
    page = page_of(spilling(), tmp_path)
    policies = [a["content"] for tag, a in Elements(page).found if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert policies[0] is not None
    assert policies[0].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policies[0]


@pytest.mark.parametrize("plan", [hostile(), spilling()])
def test_names_are_never_markup(plan: Plan, tmp_path: Path) -> None:
    page = page_of(plan, tmp_path)
    found = Elements(page).found
    assert "img" not in {tag for tag, _ in found}
    assert [tag for tag, _ in found].count("script") == 3
    assert data_of(page)["digest"]["model"]["name"] == plan.graph.name
    assert [op.name for op in plan.graph.ops] == data_of(page)["ops"]["name"]


def test_hostile_names_arrive_whole() -> None:
    assert "</script>" in HOSTILE_NAME
    assert hostile().graph.name == HOSTILE_NAME


def test_the_embedded_columns_are_the_plan(tmp_path: Path) -> None:
    plan = spilling()
    data = data_of(page_of(plan, tmp_path))
    name = data["buffers"]["name"]
    columns = data["residences"]
    rows = zip(columns["buffer"], columns["offset"], columns["begin"], columns["end"], strict=True)
    assert [(name[b], o, s, e) for b, o, s, e in rows] == [
        (r.buffer, r.offset, r.begin, r.end) for r in plan.residences or ()
    ]
    starts = [i.start_s for i in plan.instructions]
    assert data["instructions"]["start"] == starts
    moved = {t.buffer: t.loaded_bytes for t in verify(plan).traffic}
    assert dict(zip(name, data["buffers"]["loaded"], strict=True)) == {n: moved.get(n, 0) for n in name}


def test_the_same_plan_gives_the_same_page(tmp_path: Path) -> None:
    assert page_of(spilling(), tmp_path) == page_of(spilling(), tmp_path)


def test_a_report_of_a_timed_plan_has_every_file(tmp_path: Path) -> None:
    written = write_report(decided(all_graphs()["diamond"]), tmp_path / "deep" / "folder")
    assert set(written) == {
        "index.html",
        "trace.json",
        "memory_map.png",
        "timeline.png",
        "live_bytes.png",
        "traffic.png",
    }
    assert all(path.name == name and path.stat().st_size > 1000 for name, path in written.items())


def test_a_report_without_times_has_no_trace(tmp_path: Path) -> None:
    for level, plan in at_every_level(all_graphs()["diamond"]).items():
        written = write_report(plan, tmp_path / level)
        assert ("trace.json" in written) == (level == "timed")
        assert {path.name for path in (tmp_path / level).iterdir()} == set(written)


def test_a_wrong_plan_still_has_a_page(tmp_path: Path) -> None:
    faults = data_of(page_of(faulty(), tmp_path))["digest"]["faults"]
    assert [(f["fault"], f["message"], f["step"]) for f in faults] == [
        (f.fault.value, f.message, f.step) for f in verify(faulty()).faults
    ]


def test_text_trace_and_page_load_no_heavy_module() -> None:
    """The command line imports them at every start; matplotlib comes with the first picture."""
    code = "import sys, opweave.compiler.report, opweave.compiler.report.text; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.decode().split()
    assert not {"matplotlib", "numpy", "torch", "ortools", "onnx", "highspy"} & set(loaded)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OptionError, match=r"cannot write the report to .*file"):
        write_report(spilling(), tmp_path / "file" / "report")
