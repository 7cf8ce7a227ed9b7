"""The pictures have their size, show their colours, and show more of what there is more of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib import image

from opweave.compiler.plan import Plan
from opweave.compiler.report import pictures, view
from opweave.compiler.report.palette import CATEGORY_COLOURS, ROLE_COLOURS, TRAFFIC_COLOURS
from opweave.compiler.simulate import simulate
from opweave.compiler.verify import BufferTraffic, verify
from tests.compiler.report.report_plans import at_every_level, faulty, hostile, spilling
from tests.compiler.verify.collective_faults import communicating
from tests.graphs.build import all_graphs
from tests.graphs.recomputed import recomputing

Draw = Callable[[Plan, Path], None]
PICTURES: list[Draw] = [pictures.memory_map, pictures.timeline, pictures.live_bytes, pictures.traffic]


def pixels(path: Path) -> npt.NDArray[np.int_]:
    """The picture as ``[height, width, 3]`` integers from 0 to 255."""
    return np.asarray(np.rint(image.imread(path)[:, :, :3] * 255), dtype=np.int_)


def area(picture: npt.NDArray[np.int_], colour: str) -> int:
    """How many pixels have exactly this colour."""
    wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    return int((picture == wanted).all(axis=2).sum())


@pytest.mark.parametrize("draw", PICTURES)
@pytest.mark.parametrize("level", ["order", "residency", "address", "timed"])
def test_every_picture_is_drawn_at_every_level(draw: Draw, level: str, tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "picture.png"
    draw(at_every_level(all_graphs()["residual"])[level], target)
    height, width, _ = pixels(target).shape
    assert width == 1600
    assert 300 <= height <= 1200


@pytest.mark.parametrize("draw", PICTURES)
@pytest.mark.parametrize("plan", [hostile(), faulty(), Plan.of_order(all_graphs()["no_operators"], spilling().machine)])
def test_strange_plans_are_drawn_without_a_warning(draw: Draw, plan: Plan, tmp_path: Path) -> None:
    """Markup, characters no font has, unknown buffers and empty plans; warnings are errors here."""
    draw(plan, tmp_path / "picture.png")
    assert pixels(tmp_path / "picture.png").std() > 1


def test_the_memory_map_shows_each_role_in_proportion(tmp_path: Path) -> None:
    """Pixels of a role are as many as its bytes times its steps, up to edges."""
    plan = at_every_level(all_graphs()["residual"])["address"]
    tight = plan.machine.with_scratchpad(verify(plan).arena_bytes)
    pictures.memory_map(Plan(plan.graph, tight, plan.instructions, plan.residences), tmp_path / "map.png")
    picture = pixels(tmp_path / "map.png")
    byte_steps: dict[str, int] = {}
    for region in view.regions(plan):
        byte_steps[region.role] = byte_steps.get(region.role, 0) + region.nbytes * (region.end - region.begin)
    shown = {role: area(picture, ROLE_COLOURS[role]) for role in byte_steps}
    assert set(byte_steps) == {"input", "weight", "activation"}
    for role in byte_steps:
        expected = byte_steps[role] / sum(byte_steps.values())
        assert shown[role] / sum(shown.values()) == pytest.approx(expected, rel=0.1)
    assert area(picture, ROLE_COLOURS["gradient"]) == 0


def test_the_timeline_shows_every_kind_of_instruction(tmp_path: Path) -> None:
    shown: set[str] = set()
    for plan in (spilling(), simulate(recomputing()), recomputing(), communicating()):
        pictures.timeline(plan, tmp_path / "timeline.png")
        picture = pixels(tmp_path / "timeline.png")
        present = {bar.category for bar in view.bars(plan)}
        assert all(area(picture, CATEGORY_COLOURS[name]) > 500 for name in present)
        shown |= present
    assert shown == set(CATEGORY_COLOURS)


def test_the_traffic_picture_splits_in_the_verifiers_proportion(tmp_path: Path) -> None:
    plan = at_every_level(all_graphs()["chain"])["timed"]
    pictures.traffic(plan, tmp_path / "none.png")
    only_legend = area(pixels(tmp_path / "none.png"), TRAFFIC_COLOURS["additional"])
    pictures.traffic(spilling(), tmp_path / "some.png")
    assert verify(plan).additional_bytes == 0
    assert area(pixels(tmp_path / "some.png"), TRAFFIC_COLOURS["additional"]) > 10 * only_legend


def test_weights_do_not_crowd_spilled_tensors_out_of_the_traffic_picture(tmp_path: Path) -> None:
    """Thirty large weights are read once each; the one small tensor that moves twice still has its bar."""
    weights = [BufferTraffic(f"w{i:02}", 9000, 0, 0, 9000) for i in range(30)]
    rows = (*weights, BufferTraffic("spilled", 500, 500, 0, 0))
    plan = spilling()
    counted = dataclasses.replace(verify(plan), traffic=rows)
    pictures.traffic(plan, tmp_path / "traffic.png", counted)
    pictures.traffic(plan, tmp_path / "without.png", dataclasses.replace(counted, traffic=tuple(weights)))
    shown, legend_alone = (
        area(pixels(tmp_path / f"{name}.png"), TRAFFIC_COLOURS["additional"]) for name in ("traffic", "without")
    )
    assert shown > legend_alone


def test_the_same_plan_gives_the_same_picture(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        pictures.memory_map(spilling(), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@dataclasses.dataclass(frozen=True)
class Point:
    """One size and what it costs."""

    capacity_bytes: int
    additional_bytes: int
    bound_bytes: int


@pytest.mark.parametrize(
    "points",
    [
        [Point(1 << 18, 9 << 20, 9 << 20), Point(1 << 20, 4 << 20, 3 << 20), Point(1 << 22, 0, 0)],
        [Point(1 << 20, 0, 0)],
        [Point(3000, 17, 0), Point(2000, 4000, 0)],
        [],
    ],
)
def test_the_curve_takes_any_number_of_points(points: list[Point], tmp_path: Path) -> None:
    pictures.traffic_curve(points, tmp_path / "curve.png", "a model on a machine")
    picture = pixels(tmp_path / "curve.png")
    assert picture.shape == (800, 1600, 3)
    assert area(picture, TRAFFIC_COLOURS["additional"]) > 100
