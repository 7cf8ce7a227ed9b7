"""Pictures of a plan as PNG files, drawn by matplotlib's Agg canvas without any of its global state."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from ..plan import Plan, relative_gap
from ..verify import BufferTraffic, Verification, verify
from . import view
from .figure import Rectangle, bytes_axis, fill, legend, new_figure, plain, remark, save, steps_axis, time_axis
from .palette import BOUND_COLOUR, CAPACITY_COLOUR, CATEGORY_COLOURS, ROLE_COLOURS, TRAFFIC_COLOURS
from .units import format_bytes, format_percent

__all__ = ["CurvePoint", "live_bytes", "memory_map", "timeline", "traffic", "traffic_curve"]

_MOST_BUFFERS = 25
_MOST_LABELS = 16


class CurvePoint(Protocol):
    """What one scratchpad size costs: additional traffic of the best plan found, and a proven lower bound, in bytes."""

    @property
    def capacity_bytes(self) -> int:
        """Capacity of the scratchpad."""

    @property
    def additional_bytes(self) -> int:
        """Additional traffic of the best plan found."""

    @property
    def bound_bytes(self) -> int:
        """What no plan can undercut."""


def memory_map(plan: Plan, path: str | Path) -> None:
    """Addresses over time (over steps for an untimed plan), one rectangle a residence, coloured by role."""
    figure, axes = _figure(f"Memory map of {plain(plan.machine.scratchpad)}", plan, 900)
    timed = view.is_timed(plan)
    groups: dict[str, list[Rectangle]] = {}
    for region in view.regions(plan):
        if region.offset is not None:
            left, right = _across(region.start_s, region.finish_s, region.begin, region.end, timed)
            box = (left, right, region.offset, region.offset + region.nbytes)
            groups.setdefault(region.role, []).append(box)
    _capacity(axes, plan)
    _horizontal(axes, plan)
    axes.set_ylabel(f"address in {plain(plan.machine.scratchpad)}")
    fill(axes, groups, ROLE_COLOURS)
    if not groups:
        remark(axes, "no addresses are decided")
    save(figure, Path(path))


def timeline(plan: Plan, path: str | Path) -> None:
    """What every engine does over time; an untimed plan shows its instructions by kind, over steps."""
    timed = view.is_timed(plan)
    instructions = view.bars(plan)
    lanes = list(dict.fromkeys([e.name for e in plan.machine.engines] + [b.engine for b in instructions]))
    if not timed:
        kinds = {bar.kind for bar in instructions}
        lanes = ["run", "load", "store", *(kind for kind in ("recompute", "collective", "wait") if kind in kinds)]
    figure, axes = _figure("Engines", plan, 260 + 110 * len(lanes))
    groups: dict[str, list[Rectangle]] = {}
    for bar in instructions:
        lane = lanes.index(bar.engine if timed else bar.kind)
        left, right = _across(bar.start_s, bar.finish_s, bar.step, bar.step + 1, timed)
        groups.setdefault(bar.category, []).append((left, right, lane - 0.38, lane + 0.38))
    axes.set_yticks(range(len(lanes)), [plain(lane) for lane in lanes], parse_math=False)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    _horizontal(axes, plan)
    fill(axes, groups, CATEGORY_COLOURS)
    if not instructions:
        remark(axes, "the plan is empty")
    save(figure, Path(path))


def live_bytes(plan: Plan, path: str | Path) -> None:
    """Bytes held in the scratchpad against its capacity, over time (over steps for an untimed plan)."""
    figure, axes = _figure(f"Bytes held in {plain(plan.machine.scratchpad)}", plan, 600)
    if plan.residences is None:
        remark(axes, "no residences are decided")
    elif view.is_timed(plan):
        points = view.live_over_time(plan)
        axes.stairs([held for _, held in points[:-1]], [t for t, _ in points] or [0.0], fill=True, color="#56b4e9")
    else:
        profile = view.live_bytes(plan)
        axes.stairs(profile, range(len(profile) + 1), fill=True, color="#56b4e9")
    _capacity(axes, plan)
    axes.set_ylabel("bytes held")
    _horizontal(axes, plan)
    save(figure, Path(path))


def traffic(plan: Plan, path: str | Path, verification: Verification | None = None) -> None:
    """Off-chip bytes by tensor, compulsory and additional, by the verifier's count; those beyond need come first."""
    counted = verification or verify(plan)
    most = _most_moved(counted)
    figure, axes = _figure("Off-chip traffic by tensor", plan, 260 + 26 * max(len(most), 4))
    rows = range(len(most))
    compulsory = [min(t.compulsory_bytes, t.total_bytes) for t in most]
    additional = [t.total_bytes - c for t, c in zip(most, compulsory, strict=True)]
    axes.barh(rows, compulsory, color=TRAFFIC_COLOURS["compulsory"], height=0.72)
    axes.barh(rows, additional, left=compulsory, color=TRAFFIC_COLOURS["additional"], height=0.72)
    axes.set_yticks(rows, [plain(t.buffer) for t in most], fontsize=9, parse_math=False)
    axes.set_ylim(max(len(most), 4) - 0.4, -0.6)
    bytes_axis(axes, max((t.total_bytes for t in most), default=1), vertical=False)
    axes.set_xlabel(f"bytes moved; {len(most)} of {len(counted.traffic):,} tensors, most additional bytes first")
    totals = {"compulsory": counted.compulsory_bytes, "additional": counted.additional_bytes}
    legend(
        axes,
        [Patch(facecolor=TRAFFIC_COLOURS[k], label=f"{k} (in all {format_bytes(v)})") for k, v in totals.items()],
    )
    if not most:
        remark(axes, "nothing is moved" if plan.residences is not None else "no residences are decided")
    save(figure, Path(path))


def _most_moved(counted: Verification) -> list[BufferTraffic]:
    """The rows worth a bar, by additional, then by all traffic: large weights must not crowd out what is spilled."""
    moved = [row for row in counted.traffic if row.total_bytes]
    moved.sort(key=lambda row: (row.compulsory_bytes - row.total_bytes, -row.total_bytes, row.buffer))
    return moved[:_MOST_BUFFERS]


def traffic_curve(points: Iterable[CurvePoint], path: str | Path, title: str = "") -> None:
    """What each scratchpad size costs: additional traffic over capacity, with the proven bound below it.

    ``points`` may come in any order. Capacity is on a binary logarithmic axis; traffic on a linear one, because it
    reaches 0.
    """
    ordered = sorted(points, key=lambda point: point.capacity_bytes)
    figure, axes = new_figure("Additional off-chip traffic by scratchpad size", plain(title, 150), 800)
    sizes = [p.capacity_bytes for p in ordered]
    values, bounds = [p.additional_bytes for p in ordered], [p.bound_bytes for p in ordered]
    # A plan for one size works in every larger one, and a bound for one size holds for every smaller one.
    axes.plot(sizes, values, drawstyle="steps-post", color=TRAFFIC_COLOURS["additional"], marker="o", linewidth=2)
    axes.plot(sizes, bounds, drawstyle="steps-pre", color=BOUND_COLOUR, marker="_", linewidth=1.4, linestyle="--")
    if len(ordered) > 1:
        axes.stairs(values[:-1], sizes, baseline=bounds[1:], fill=True, color=TRAFFIC_COLOURS["additional"], alpha=0.12)
    if len(ordered) <= _MOST_LABELS:
        for size, value in zip(sizes, values, strict=True):
            label = f"{format_bytes(value)}\nat {format_bytes(size)}"
            axes.annotate(label, (size, value), xytext=(6, 5), textcoords="offset points", fontsize=9, color="#444444")
    worst = max((relative_gap(p.additional_bytes, p.bound_bytes) for p in ordered), default=0.0)
    bytes_axis(axes, max(round(max(values, default=0) * 1.12), 1))
    if ordered:
        axes.set_xscale("log", base=2)
    else:
        remark(axes, "no sizes were tried")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(round(value))))
    axes.set_xlabel("scratchpad capacity")
    axes.set_ylabel("additional traffic")
    legend(
        axes,
        [
            Patch(facecolor=TRAFFIC_COLOURS["additional"], label="best plan found"),
            Patch(facecolor=BOUND_COLOUR, label=f"proven lower bound (largest gap {format_percent(worst)})"),
        ],
    )
    save(figure, Path(path))


def _figure(title: str, plan: Plan, pixels_high: int) -> tuple[Figure, Axes]:
    steps = len(plan.instructions)
    subtitle = f"{plain(plan.graph.name)} on {plain(plan.machine.name)}, {steps:,} instructions"
    return new_figure(title, subtitle, pixels_high)


def _across(start_s: float | None, finish_s: float | None, begin: int, end: int, timed: bool) -> tuple[float, float]:
    return (start_s or 0.0, finish_s or 0.0) if timed else (begin, end)


def _horizontal(axes: Axes, plan: Plan) -> None:
    if view.is_timed(plan):
        time_axis(axes, max(i.finish_s or 0.0 for i in plan.instructions))
    else:
        steps_axis(axes, len(plan.instructions))


def _capacity(axes: Axes, plan: Plan) -> None:
    """The capacity as a line; when little of it is in use, only what is used, and the capacity in words."""
    capacity = plan.machine.scratchpad_memory.capacity_bytes
    ends = [region.offset + region.nbytes for region in view.regions(plan) if region.offset is not None]
    used = max([*view.live_bytes(plan), *ends], default=0)
    axis = axes.get_yaxis_transform()
    if 0 < used < capacity / 4:
        bytes_axis(axes, round(used * 1.15))
        label = f"capacity {format_bytes(capacity)} is above"
        axes.text(0.004, used * 1.14, label, transform=axis, va="top", color=CAPACITY_COLOUR)
        return
    bytes_axis(axes, round(max(capacity, used) * 1.06))
    axes.axhline(capacity, color=CAPACITY_COLOUR, linewidth=1.6)
    label = f"capacity {format_bytes(capacity)}"
    axes.text(0.004, capacity, label, transform=axis, va="bottom", color=CAPACITY_COLOUR)
