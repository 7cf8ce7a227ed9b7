"""Rows, tables, files, pictures, the page and comparisons."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import OptionError
from opweave.kernels.bench.command import compare_files
from opweave.kernels.bench.figures import COLUMNS, Line, compared, comparison_table, lines_of, lines_table
from opweave.kernels.bench.files import Results
from opweave.kernels.bench.rows import Row, read_rows, table
from opweave.kernels.bench.session import CALIBRATION

CASE = "rms <b>&/Llama, 8/7 tokens/bfloat16/forward"


def rows(scale: float = 1.0, case: str = CASE) -> list[Row]:
    found = [
        Row(CALIBRATION, "copy", "bandwidth", 3000.0, "GB/s", 3350.0),
        Row(CALIBRATION, "matrix product, bfloat16", "rate", 700.0, "TFLOP/s", 989.5),
    ]
    for provider, ms in (("opweave", 0.1), ("eager", 0.3)):
        found += [
            Row(case, provider, "error", 0.001, "of the largest", 0.03, "a note"),
            Row(case, provider, "peak memory", 2**21, "B"),
            Row(case, provider, "time p20", 0.9 * ms * scale, "ms", 0.08),
            Row(case, provider, "time", ms * scale, "ms", 0.08, "a note"),
            Row(case, provider, "time p80", 1.1 * ms * scale, "ms", 0.08),
            Row(case, provider, "bandwidth", 2500.0, "GB/s", 3350.0),
            Row(case, provider, "roofline", 80.0, "%", 100.0),
            Row(case, provider, "measured roofline", 85.0, "%", 100.0),
        ]
    found.append(Row(case, "eager", "time over ours", 3.0, "x"))
    found.append(Row(case, "Liger", "time", None, "ms", note="not installed"))
    found += [Row(case, "cost", "flops", 1e9, "flop"), Row(case, "cost", "traffic", 2.5e8, "B")]
    return found


def test_a_line_has_all_of_a_provider_s_figures() -> None:
    ours, eager, liger = lines_of(rows())
    assert ours.parts == ("rms <b>&", "Llama, 8/7 tokens", "bfloat16", "forward")
    assert dict(zip(COLUMNS, ours.cells, strict=True)) == {
        **{"kernel": "rms <b>&", "workload": "Llama, 8/7 tokens", "dtype": "bfloat16", "mode": "forward"},
        **{"provider": "opweave", "ms_p20": pytest.approx(0.09), "ms": 0.1, "ms_p80": pytest.approx(0.11)},
        **{"gb_per_s": 2500.0, "tflop_per_s": None, "percent_of_roofline": 80.0, "percent_of_measured": 85.0},
        **{"peak_bytes": 2**21, "max_error": 0.001, "time_over_ours": None, "note": "a note"},
    }
    assert ours.least_ms == 0.08
    assert eager["time_over_ours"] == 3.0
    assert (liger["ms"], liger.note) == (None, "not installed")


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_table_has_a_line_each() -> None:
    head, ours, _, liger = lines_table(lines_of(rows())).splitlines()
    assert words(head) == "provider ms p20 p80 GB/s TFLOP/s % roof % measured peak MiB error x ours note"
    assert words(ours) == "opweave 0.1 0.09 0.11 2,500.00 - 80.00 85.00 2.00 1.0e-03 - a note"
    assert "not installed" in liger


def test_a_table_without_lines_is_its_head() -> None:
    assert table(("one", "two"), []) == "one  two"


def test_files_are_complete_after_every_case(tmp_path: Path) -> None:
    results = Results(tmp_path / "out")
    results.add(rows())
    results.leave_out("another case", ["Inductor"])
    head, found = read_rows(tmp_path / "out" / "kernels.json")
    assert list(found) == rows()
    assert {"benchmark", "commit", "machine", "versions", "left_out"} == set(head)
    with (tmp_path / "out" / "kernels.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["provider"] for line in lines] == ["opweave", "eager", "Liger"]
    assert tuple(lines[0]) == COLUMNS
    results.add([])
    assert read_rows(tmp_path / "out" / "kernels.json")[0]["left_out"] == {"another case": "Inductor"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["kernels.csv", "kernels.json"]


class _Tags(HTMLParser):
    """Every tag's name and attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_file_and_says_everything(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add(rows())
    results.leave_out("another <case>", ["everything"])
    written = results.finish(compared(rows(0.5), rows(), 0.05))
    assert {path.name for path in written} == {
        *("index.html", "kernels.json", "kernels.csv", "roofline.png", "rms <b>&.png"),
    }
    assert all(path.stat().st_size for path in written)
    text = (tmp_path / "index.html").read_text()
    page = _Tags()
    page.feed(text)
    assert not re.findall(r"\{\{\w+\}\}", text)
    assert [tag for tag, _ in page.tags if tag == "b"] == []
    pictures = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 2
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    assert not any("src" in attributes or "href" in attributes for tag, attributes in page.tags if tag != "img")
    for said in ("rms <b>&", "Llama, 8/7 tokens", "not installed", "another <case>", "SLOWER", "3,350", "a note"):
        assert said in page.text, said


def test_pictures_of_backward_passes_and_of_what_failed(tmp_path: Path) -> None:
    """No share of a roofline is known there; and a kernel without any time has no picture."""
    results = Results(tmp_path)
    case = "k/w/bfloat16/backward"
    results.add([Row(case, "opweave", "time", 1.0, "ms"), Row(case, "eager", "time", 2.0, "ms")])
    results.add([Row("other/w/bfloat16/forward", "opweave", "time", None, "ms", note="failed: why")])
    assert {path.suffix: path.name for path in results.finish()}[".png"] == "k.png"


def test_nothing_is_written_without_a_folder() -> None:
    results = Results(None)
    results.add(rows())
    assert results.finish() == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot write results"):
        Results(tmp_path / "file" / "out")


def test_comparisons_judge_by_the_threshold() -> None:
    before = [Row("k/a/x/f", "opweave", "time", 1.0, "ms"), Row("k/gone/x/f", "opweave", "time", 1.0, "ms")]
    before += [Row("k/b/x/f", "opweave", "time", 1.0, "ms"), Row("k/c/x/f", "eager", "time", None, "ms")]
    now = [Row("k/a/x/f", "opweave", "time", 1.04, "ms"), Row("k/b/x/f", "opweave", "time", 2.0, "ms")]
    now += [Row("k/new/x/f", "opweave", "time", 1.0, "ms"), Row("k/c/x/f", "eager", "time", None, "ms")]
    found = compared(before, now, 0.05)
    assert [(c.case, c.verdict) for c in found] == [
        *(("k/a/x/f", "same"), ("k/b/x/f", "SLOWER"), ("k/new/x/f", "new"), ("k/gone/x/f", "gone")),
    ]
    assert [c.verdict for c in compared(now, before, 0.05)] == ["same", "new", "faster", "gone"]
    assert compared(before, now, 0.03)[0].verdict == "SLOWER"
    text = comparison_table(found).splitlines()
    assert words(text[0]) == "case provider before ms now ms ratio threshold"
    assert words(text[2]) == "k/b/x/f opweave 1 2 2.000 5% SLOWER"
    assert text[-1].startswith("1 slower, 0 faster, 1 same; 1.442 times")


def test_files_are_compared(tmp_path: Path) -> None:
    paths = []
    for scale, device in ((1.0, "an H100"), (2.0, "an H200")):
        results = Results(tmp_path / device)
        results.head = {**results.head, "machine": {"accelerator": device}}
        results.add(rows(scale))
        paths.append(tmp_path / device / "kernels.json")
    said: list[str] = []
    facts = compare_files(paths[0], paths[1], 0.05, said.append)
    assert [item["verdict"] for item in facts["comparison"]] == ["SLOWER", "SLOWER"]
    assert said[0] == "note: measured on different devices: an H100, and now an H200"


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"rows": [{"case": "x"}]}', '{"rows": [1]}', '{"rows": [], "machine": "mine"}'),
        '{"rows": [{"case": "a", "provider": "b", "metric": "time", "value": "fast", "unit": "ms"}]}',
    ],
)
def test_what_holds_no_results_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(text)
    with pytest.raises(OptionError, match="holds no results"):
        read_rows(path)
    with pytest.raises(OptionError, match="cannot read"):
        read_rows(tmp_path / "absent.json")


def test_later_fields_of_rows_are_ignored(tmp_path: Path) -> None:
    row = {"case": "a", "provider": "b", "metric": "time", "value": 1.0, "unit": "ms", "later": True}
    (tmp_path / "kernels.json").write_text(json.dumps({"rows": [row]}))
    assert read_rows(tmp_path / "kernels.json")[1] == (Row("a", "b", "time", 1.0, "ms"),)


def test_a_line_of_another_benchmark_has_no_parts() -> None:
    assert Line("resnet50", "x").parts == ("resnet50", "", "", "")
