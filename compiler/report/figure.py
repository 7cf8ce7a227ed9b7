"""What all pictures share: a figure without pyplot's global state, rectangles by category, axes with units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from .units import format_bytes, format_seconds

__all__ = [
    "PIXELS_WIDE",
    "Rectangle",
    "bytes_axis",
    "fill",
    "new_figure",
    "plain",
    "remark",
    "save",
    "steps_axis",
    "time_axis",
]

PIXELS_WIDE = 1600
_DPI = 100

#: Left, right, bottom and top, in data units.
Rectangle = tuple[float, float, float, float]


def plain(text: str, longest: int = 60) -> str:
    """``text`` in characters the font certainly has, shortened in the middle; the rest as escapes."""
    escaped = text.encode("ascii", "backslashreplace").decode("ascii")
    if len(escaped) > longest:
        half = (longest - 3) // 2
        escaped = f"{escaped[:half]}...{escaped[-half:]}"
    return "".join(c if c.isprintable() else "?" for c in escaped)


def new_figure(title: str, subtitle: str, pixels_high: int) -> tuple[Figure, Axes]:
    """A figure 1600 pixels wide with one pair of axes, and a title that is never read as markup."""
    figure = Figure(figsize=(PIXELS_WIDE / _DPI, pixels_high / _DPI), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    heading = axes.set_title(f"{title}\n", loc="left", fontsize=15, fontweight="bold", parse_math=False)
    heading.set_linespacing(1.6)
    below = axes.annotate(subtitle, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points")
    below.set(fontsize=10.5, color="#555555", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def fill(axes: Axes, groups: Mapping[str, Sequence[Rectangle]], colours: Mapping[str, str]) -> None:
    """Draw the rectangles of each group in its colour, in the order of ``colours``, with a legend.

    The axes have their limits already: rectangles of more than a few pixels get an edge, which would swallow others.
    """
    box = axes.get_window_extent()
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    widest, highest = 4 * abs(right - left) / box.width, 4 * abs(top - bottom) / box.height
    handles: list[Patch] = []
    for name in (name for name in colours if groups.get(name)):
        for edged in (False, True):
            shown = [r for r in groups[name] if (r[1] - r[0] > widest and r[3] - r[2] > highest) == edged]
            corners = [[(a, c), (b, c), (b, d), (a, d)] for a, b, c, d in shown]
            collection = PolyCollection(corners, facecolors=colours[name], linewidths=0.5 if edged else 0.0)
            collection.set_edgecolor("white" if edged else "none")
            axes.add_collection(collection, autolim=False)
        handles.append(Patch(facecolor=colours[name], label=f"{name.replace('_', ' ')} ({len(groups[name]):,})"))
    if handles:
        legend(axes, handles)


def legend(axes: Axes, handles: Iterable[Patch]) -> None:
    """A legend in one row above the axes, out of the data's way."""
    listed = list(handles)
    axes.legend(
        handles=listed, loc="lower right", bbox_to_anchor=(1, 1.0), ncols=len(listed), frameon=False, fontsize=10
    )


def bytes_axis(axes: Axes, highest: int, *, vertical: bool = True) -> None:
    """Scale one axis from 0 to ``highest`` bytes, with ticks at round binary sizes."""
    axis = axes.yaxis if vertical else axes.xaxis
    step = 1 << max(0, (max(highest, 1) - 1).bit_length() - 3)
    axis.set_major_locator(MultipleLocator(step))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(round(value))))
    (axes.set_ylim if vertical else axes.set_xlim)(0, highest)


def time_axis(axes: Axes, latency_s: float) -> None:
    """Scale the x axis over the simulated time."""
    axes.set_xlim(0, latency_s or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_seconds(value)))
    axes.set_xlabel("simulated time")


def steps_axis(axes: Axes, steps: int) -> None:
    """Scale the x axis over the plan's steps."""
    axes.set_xlim(0, max(steps, 1))
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.set_xlabel("step (index of the instruction)")


def remark(axes: Axes, text: str) -> None:
    """Say in the middle of empty axes why they are empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=14, color="#777777")


def save(figure: Figure, path: Path) -> None:
    """Write the PNG, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", facecolor="white")
