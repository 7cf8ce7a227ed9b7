"""The PNG shows the schedule: each kind of action covers as much of it as it takes time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from opweave.compiler.pipelining.schedule import ActionKind, TimedSchedule
from opweave.compiler.report.palette import CAPACITY_COLOUR
from opweave.compiler.report.pipelining.colours import COLOURS, REDUCE, chunks_of, shaded
from opweave.compiler.report.pipelining.picture import write_pipeline_png
from tests.compiler.report.pipelining import pipelines


def pixels_of(picture: Path, colour: str) -> int:
    """How many pixels have about this colour, outside of the legends in the top rows."""
    shown = image.imread(picture)[70:, :, :3] * 255
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return int((np.abs(shown - wanted).max(axis=2) < 6).sum())


def time_of(schedule: TimedSchedule, kind: ActionKind) -> int:
    return sum(
        finish - start
        for rank, order in enumerate(schedule.schedule.orders)
        for action, start, finish in zip(order, schedule.starts[rank], schedule.finishes[rank], strict=True)
        if action.kind is kind
    )


@pytest.mark.parametrize("name", ["plain", "split"])
def test_areas_are_times(name: str, tmp_path: Path) -> None:
    """Numbers inside and edges around the boxes cost a share of them, about the same of each kind."""
    schedule = pipelines.everything()[name]
    write_pipeline_png(schedule, tmp_path / "p.png")
    kinds = {action.kind for order in schedule.schedule.orders for action in order}
    ratios = [pixels_of(tmp_path / "p.png", COLOURS[kind]) / time_of(schedule, kind) for kind in kinds]
    assert max(ratios) < 1.15 * min(ratios)
    for kind in set(COLOURS) - kinds - {ActionKind.OFFLOAD}:  # grey, as edges of letters are
        assert pixels_of(tmp_path / "p.png", COLOURS[kind]) < 10
    assert (pixels_of(tmp_path / "p.png", REDUCE) > 200) == (name == "split")
    assert pixels_of(tmp_path / "p.png", CAPACITY_COLOUR) > 1000


def test_boxes_reach_from_start_to_finish(tmp_path: Path) -> None:
    """One rank never idles: all of the row through its boxes is F or B, but for numbers and edges."""
    write_pipeline_png(pipelines.plain(ranks=1, microbatches=4), tmp_path / "p.png")
    shown = image.imread(tmp_path / "p.png")[:, :, :3] * 255
    wanted = [
        [int(COLOURS[kind][at : at + 2], 16) for at in (1, 3, 5)] for kind in (ActionKind.FORWARD, ActionKind.BACKWARD)
    ]
    is_box = np.any([np.abs(shown - colour).max(axis=2) < 6 for colour in wanted], axis=0)
    fullest = is_box.sum(axis=1).max()
    assert fullest > 0.97 * (shown.shape[1] - 80)


def test_the_second_schedule_is_below_the_first_over_the_same_time(tmp_path: Path) -> None:
    """Only one of them has S and T, in the lower half."""
    write_pipeline_png(pipelines.plain(), tmp_path / "p.png", pipelines.sharded())
    shown = image.imread(tmp_path / "p.png")[:, :, :3] * 255
    wanted = [int(COLOURS[ActionKind.OUTPUT][at : at + 2], 16) for at in (1, 3, 5)]
    rows, columns = np.nonzero(np.abs(shown - wanted).max(axis=2) < 6)
    assert len(rows) > 100
    assert rows.min() > shown.shape[0] / 2
    boxes = columns[rows > rows.min() + 30]  # without the legend
    assert boxes.max() < shown.shape[1] / 4  # 60 ns of 370


def test_later_chunks_are_paler() -> None:
    problem = pipelines.both_ways().schedule.problem
    assert chunks_of(problem) == (0, 0, 1, 1)
    assert shaded("#0072b2", 0, 2) == "#0072b2"
    levels = [int(shaded("#0072b2", chunk, 4)[1:3], 16) for chunk in range(4)]
    assert levels == sorted(levels)
    assert levels[-1] < 170


@pytest.mark.parametrize("name", pipelines.everything())
def test_everything_can_be_drawn(name: str, tmp_path: Path) -> None:
    write_pipeline_png(pipelines.everything()[name], tmp_path / "deep" / "p.png")
    assert image.imread(tmp_path / "deep" / "p.png").shape[1] == 1600
