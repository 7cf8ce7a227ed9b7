"""Pictures of the figures: how near each kernel comes to the roofline, and all of them under it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .figures import Line
from .rows import Row
from .session import CALIBRATION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["kernel_picture", "roofline_picture"]

COLOURS = ("#0072b2", "#8c8c8c", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b3a100")
_GRID = "#e3e3e3"


def kernel_picture(kernel: str, lines: Sequence[Line]) -> bytes:
    """A PNG: one group of bars a case of ``kernel``, one bar a provider, as a share of the roofline.

    Where no share is known, as of backward passes, bars are how many times as fast as the eager one a provider is.
    """
    parts = [line for line in lines if line.parts[0] == kernel and line["ms"]]
    shares = [line for line in parts if _share(line) is not None]
    others = [line for line in parts if _share(line) is None]
    panels = [(title, found) for title, found in (("share", shares), ("speed", others)) if found]
    figure = _figure(11.0, 1.6 + 0.28 * len(parts) + 0.25 * len({line.case for line in parts}))
    if panels:
        heights = [len(found) + 2 for _, found in panels]
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights).flatten()
        for axis, (title, found) in zip(axes, panels, strict=True):
            _bars(axis, found, title == "share")
        axes[0].set_title(kernel, loc="left", fontweight="bold", parse_math=False)
    return _png(figure)


def _share(line: Line) -> float | None:
    stated = line["percent_of_roofline"]
    return stated if stated is not None else line["percent_of_measured"]


def _bars(axes: Any, lines: Sequence[Line], is_share: bool) -> None:
    names = list(dict.fromkeys(line.provider for line in lines))
    eager = {line.case: line["ms"] for line in lines if line.provider == "eager"}
    place, ticks, labels, shown = 0.0, [], [], set()
    for case in dict.fromkeys(line.case for line in lines):
        first = place
        for line in (line for line in lines if line.case == case):
            base, own = eager.get(case), line["ms"]
            value = _share(line) if is_share else base / own if base and own else None
            if value is not None:
                label = line.provider if line.provider not in shown else None
                shown.add(line.provider)
                axes.barh(place, value, 0.9, color=COLOURS[names.index(line.provider) % len(COLOURS)], label=label)
                axes.text(value, place, f" {line['ms']:.3g} ms", va="center", fontsize=7, color="#555555")
                place += 1
        ticks.append((first + place - 1) / 2)
        _, workload, dtype, mode = _parts(case)
        labels.append(f"{workload}\n{dtype}, {mode}")
        place += 0.8
    axes.set_yticks(ticks, labels, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.axvline(100 if is_share else 1, color="#c1121f", linewidth=0.9)
    axes.set_xlabel("% of what the roofline allows" if is_share else "times as fast as eager")
    axes.grid(visible=True, axis="x", color=_GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="lower right", framealpha=0.9)


def _parts(case: str) -> tuple[str, str, str, str]:
    return Line(case, "").parts


def roofline_picture(rows: Sequence[Row], lines: Sequence[Line], dtype: str, provider: str) -> bytes:
    """A PNG: each case of ``provider`` by flops a byte and flops a second, under the device's roofs."""
    amounts: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.metric in ("flops", "traffic") and row.value:
            amounts.setdefault(row.case, {})[row.metric] = row.value
    figure = _figure(11.0, 6.5)
    axes = figure.subplots()
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        known = amounts.get(line.case, {})
        ms = line["ms"]
        if line.provider == provider and line.least_ms and ms and len(known) == 2:
            point = (known["flops"] / known["traffic"], known["flops"] / ms / 1e9)
            points.setdefault(line.parts[0], []).append(point)
    for number, (kernel, found) in enumerate(points.items()):
        marker = "osD^v<>pP*Xh"[number % 12]
        colour = COLOURS[number % len(COLOURS)]
        axes.scatter(*zip(*found, strict=True), marker=marker, color=colour, label=kernel, alpha=0.85)
    intensities = [x for found in points.values() for x, _ in found] or [1.0]
    for name, style, bandwidth, rate in _roofs(rows, dtype):
        ridge = 1e3 * rate / bandwidth
        ends = sorted({min(min(intensities), ridge) / 3, ridge, max(max(intensities), ridge) * 3})
        axes.plot(ends, [min(x * bandwidth / 1e3, rate) for x in ends], style, color="#444444", label=name)
    axes.set(xscale="log", yscale="log", xlabel="flops a byte", ylabel="TFLOP/s")
    axes.set_title(f"{provider} under the roofline of {dtype}", loc="left", fontweight="bold", parse_math=False)
    axes.grid(visible=True, color=_GRID)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _png(figure)


def _roofs(rows: Sequence[Row], dtype: str) -> list[tuple[str, str, float, float]]:
    """Name, line style, GB/s and TFLOP/s of what was measured and of what is stated."""
    copy = next((row for row in rows if row.case == CALIBRATION and row.metric == "bandwidth"), None)
    products = (row for row in rows if row.case == CALIBRATION and row.metric == "rate")
    product = next((row for row in products if row.provider.endswith(dtype)), None)
    if copy is None or product is None:
        return []
    found: Mapping[str, tuple[str, float | None, float | None]] = {
        "measured copy and matrix product": ("--", copy.value, product.value),
        "data sheet": ("-", copy.bound, product.bound),
    }
    return [(name, style, b, r) for name, (style, b, r) in found.items() if b and r]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
