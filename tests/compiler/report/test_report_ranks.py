"""Several ranks side by side: one plan that still verifies, and the line of each collective on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from opweave.compiler.overlap import CollectiveLine
from opweave.compiler.report import write_html
from opweave.compiler.report.ranks import side_by_side
from opweave.compiler.report.trace import chrome_trace
from opweave.compiler.report.view import bars
from opweave.compiler.verify import verify
from opweave.errors import OptionError
from tests.compiler.verify.collective_faults import communicating, timed


def test_ranks_side_by_side_are_one_plan_of_all_engines() -> None:
    merged = side_by_side({3: timed(), 1: timed()})
    assert verify(merged).ok, list(map(str, verify(merged).faults))
    assert [e.name for e in merged.machine.engines] == ["rank 1 core", "rank 3 core", "rank 1 dma"]
    assert [link.name for link in merged.machine.links] == ["rank 1 net", "rank 3 net"]
    assert len(merged.instructions) == 2 * len(timed().instructions)
    waits = [bar.engine for bar in bars(merged) if bar.kind == "wait"]
    assert sorted(waits) == ["rank 1 core", "rank 3 core"]
    threads = {e["args"]["name"] for e in json.loads(chrome_trace(merged))["traceEvents"] if e["name"] == "thread_name"}
    assert {"rank 1 core", "rank 1 net", "rank 3 core", "rank 3 net"} <= threads


def test_a_rank_without_times_is_named() -> None:
    with pytest.raises(OptionError, match="rank 1 has no times"):
        side_by_side({0: timed(), 1: communicating()})
    with pytest.raises(OptionError, match="no rank"):
        side_by_side({})


def test_the_page_has_the_line_of_each_collective(tmp_path: Path) -> None:
    """What was said of a collective arrives in the page's data, long lists cut short."""
    line = CollectiveLine("op1", "all_reduce", "0", 512, 2.0, 0.5, tuple("abcdefg"), "nccl", "too small")
    write_html(timed(), tmp_path / "page.html", lines=[line])
    found = re.search(r'<script id="plan" type="application/json">(.*?)</script>', (tmp_path / "page.html").read_text())
    assert found is not None
    data = json.loads(found[1])
    assert data["is_compared"]
    assert data["collectives"] == [{**msgspec.to_builtins(line), "hidden_by": "a, b, c, d and 3 more"}]
