"""The pipeline benchmark: published figures are reproduced, what is left out is said, and a wrong figure is seen."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import pipeline_published, pipeline_scores
from benchmarks.bench_pipeline import QUESTION, SECTIONS, add_arguments
from benchmarks.pipeline_cases import MEASURED_TIMES, formulas, measured_times, v_shapes, zero_bubble, zero_bubble_v
from benchmarks.pipeline_comparison import Compared
from benchmarks.pipeline_published import GROUPS, rows, summary
from benchmarks.pipeline_tables import ZERO_BUBBLE, ZERO_BUBBLE_V
from benchmarks.runner import Options, run

from opweave.errors import ModelError
from opweave.passes.pipeline_parallel.named import NAMES

_HEAD = "case,microbatches,forward_us_per_stage,backward_us_per_stage,measured_iteration_ms\n"


def test_first_rows_of_both_zero_bubble_tables_are_exact() -> None:
    """Each column to four decimals; interleaved 1F1B idles more than its figure says, once every wait counts."""
    compared = [*itertools.islice(zero_bubble(True), 14), *itertools.islice(zero_bubble_v(True), 6)]
    stated = [each for each in compared if each.figure is not None]
    assert [each for each in stated if not each.agrees] == []
    assert len(stated) == 2 * len(ZERO_BUBBLE[0].bubbles) + len(ZERO_BUBBLE_V[0].bubbles)
    whole = {each.case: each.ours for each in compared if each.figure is None}
    assert len(whole) == 3
    assert all(whole[each.case] > each.ours for each in stated if "as computed there" in each.metric)


def test_formulas_and_shapes_of_a_v_are_exact() -> None:
    """Closed forms, and bubbles and peaks of ZB-V, V-Half and V-Min on four ranks."""
    compared = [*formulas(True), *itertools.islice(v_shapes(True), 33)]
    assert [each for each in compared if not each.agrees] == []
    assert {each.schedule for each in compared} >= {"chimera", "bitpipe", "dualpipe", "v-half", "v-min", "zbv"}


@pytest.mark.slow
def test_every_published_figure_is_reproduced() -> None:
    """All rows of all tables, the largest too."""
    compared = [each for group in GROUPS for each in group(False)]
    assert [each for each in compared if each.figure is not None and not each.agrees] == []
    assert len(compared) > 300


def test_measured_iterations_are_predicted_from_stage_times(tmp_path: Path) -> None:
    """A row of the file: 1F1B of its stage times, in milliseconds, beside the measured time."""
    line = "v256k_s2k,128,10572 10591 10475 10725 10360 10444 10381 36818,"
    line += "25185 21108 20737 21143 20805 21030 20827 52363,11722.2\n"
    (tmp_path / MEASURED_TIMES).write_text(_HEAD + line)
    (compared,) = measured_times(tmp_path)
    assert compared.ours == pytest.approx(11639.6, abs=0.05)
    assert compared.agrees
    assert compared.error == pytest.approx(-0.71, abs=0.005)


@pytest.mark.parametrize("text", [None, "", "case\nx\n", _HEAD + "x,8,1 2,1,3\n", _HEAD + "x,8,1 b,1 2,3\n"])
def test_files_that_are_none_are_refused(tmp_path: Path, text: str | None) -> None:
    """Missing, empty, without its columns, stages without a backward, words for times."""
    if text is not None:
        (tmp_path / MEASURED_TIMES).write_text(text)
    with pytest.raises(ModelError, match="measured times"):
        list(measured_times(tmp_path))


def test_what_is_left_out_is_said_and_all_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --data no measured times; with it they are in the table and the file; a folder without them is exit 2."""
    assert rows in SECTIONS
    monkeypatch.setattr(pipeline_published, "GROUPS", (formulas,))

    def call(*arguments: str) -> int:
        return run("bench_pipeline", QUESTION, rows, arguments=arguments, add_arguments=add_arguments)

    assert call("--quick") == 0
    assert "left out: 16 measured iteration times" in capsys.readouterr().out
    (tmp_path / MEASURED_TIMES).write_text(_HEAD + "two stages,2,1000 1000,2000 2000,9.1\n")
    path = tmp_path / "rows.json"
    assert call("--quick", "--data", str(tmp_path), "--json", str(path)) == 0
    assert "1 of 1 measured times within 1.6 %" in capsys.readouterr().out
    kept = [row for row in json.loads(path.read_text())["rows"] if row["case"] == "two stages, 1f1b"]
    assert [(row["provider"], row["value"]) for row in kept] == [("measured", 9.1), ("opweave", 9.0)]
    (tmp_path / MEASURED_TIMES).unlink()
    assert call("--quick", "--data", str(tmp_path)) == 2
    assert "cannot read measured times" in capsys.readouterr().err


def test_figures_that_differ_are_seen() -> None:
    """A fourth decimal, or more than 1.6 % of a measured time."""
    bubble = Compared("case", "1f1b", "bubble", 0.2431, 0.24306, "fraction", "published", "source")
    time = Compared("case", "1f1b", "iteration", 100.0, 98.5, "ms", "measured", "source")
    assert bubble.agrees
    assert time.agrees
    assert not replace(bubble, figure=0.2432).agrees
    assert not replace(time, ours=98.3).agrees
    text = summary([bubble, replace(bubble, figure=0.2432), time, replace(time, ours=98.0)])
    assert "1 of 2 published figures equal to 4 decimals" in text
    assert "1 of 2 measured times within 1.6 % (largest error 2.00 %)" in text


def test_every_named_schedule_is_scored(capsys: pytest.CaptureFixture[str]) -> None:
    """One line each but for shards; messages are hops between ranks, there and back, the turn of a V not among them."""
    scored = {
        (row.case.rpartition(", ")[2], row.metric): row.value for row in pipeline_scores.rows(Options(True, None))
    }
    assert {name for name, _ in scored} == set(NAMES) - {"1f1b-vocabulary"}
    sent = {name: value for (name, metric), value in scored.items() if metric == "messages"}
    assert (sent["1f1b"], sent["interleaved-1f1b"], sent["zbv"], sent["chimera"]) == (14, 30, 28, 14)
    assert scored["zb-h1", "bubble"] == 0.1323
    assert "messages of a microbatch" in capsys.readouterr().out
