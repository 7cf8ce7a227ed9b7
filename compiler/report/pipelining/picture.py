"""The pipeline diagram as a PNG: ranks over time, and under each rank the bytes that it holds against its limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ...pipelining.schedule import ActionKind
from ..figure import PIXELS_WIDE, Rectangle, plain, save
from ..palette import CAPACITY_COLOUR
from ..units import format_bytes, format_seconds
from .colours import COLOURS, HELD, REDUCE, chunks_of, shaded
from .facts import PipelineFacts, Shown, pairs_of
from .moves import Curve, Moves
from .text import precise, worth

__all__ = ["draw_pairs", "write_pipeline_png"]

_DPI = 100
_HIGHEST = 6000  # pixels; beyond it rows get lower
_ROW = 1.0  # a rank: its actions, its copies and all-reduces, the bytes that it holds
_BOX = (0.02, 0.50)
_BESIDE = (0.51, 0.58)
_HELD = (0.62, 0.94)
_LEAST_LABEL = 9.0  # pixels that a microbatch's number needs, and 4 more for each further digit
_MOST_LABELS = 6000
_LEGEND: dict[str, Any] = {"bbox_to_anchor": (1, 1), "borderaxespad": 2.2, "frameon": False, "fontsize": 10}


@dataclass(frozen=True)
class _Panel:
    moves: Moves
    facts: PipelineFacts

    @property
    def tops(self) -> tuple[int, ...]:
        """What the height of each rank's curve means, in bytes: its limit, unless it holds more, or far less."""
        highest = [
            max(rank.peak_bytes, limit if (limit := rank.limit_bytes or 0) < 4 * rank.peak_bytes else 0)
            for rank in self.facts.ranks
        ]
        return tuple(max(1, *highest) for _ in highest)


def write_pipeline_png(shown: Shown, path: str | Path, other: Shown | None = None) -> None:
    """Draw the schedule, and below it ``other`` over the same time; creates the folder."""
    draw_pairs(pairs_of(shown, other), Path(path))


def draw_pairs(pairs: Sequence[tuple[Moves, PipelineFacts]], path: Path) -> None:
    """The same of what has been counted already."""
    panels = [_Panel(moves, facts) for moves, facts in pairs]
    ranks = [len(panel.facts.ranks) for panel in panels]
    pixels = min(_HIGHEST, sum(150 + max(34, 66 - number // 2) * number for number in ranks))
    figure = Figure(figsize=(PIXELS_WIDE / _DPI, pixels / _DPI), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=ranks)
    until = max(panel.facts.makespan_ns for panel in panels) or 1
    for (axes,), panel in zip(rows, panels, strict=True):
        _prepare(axes, panel, until)
    rows[-1][0].set_xlabel("simulated time")
    figure.draw_without_rendering()  # settles where axes lie, on which it depends what has room for a number
    for (axes,), panel in zip(rows, panels, strict=True):
        _draw(axes, panel)
    save(figure, path)


def _prepare(axes: Axes, panel: _Panel, until: int) -> None:
    facts = panel.facts
    heading = axes.set_title(
        f"{plain(facts.title, 90)}\n", loc="left", fontsize=14, fontweight="bold", parse_math=False
    )
    heading.set_linespacing(1.6)
    figures = f"makespan {precise(facts.makespan_ns)}, bubble {100 * facts.bubble:.2f} %"
    subtitle = f"{figures}, peak {format_bytes(facts.peak_bytes)}{'; ' * bool(worth(facts))}{worth(facts)}"
    below = axes.annotate(plain(subtitle, 170), (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points")
    below.set(fontsize=10.5, color="#555555", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, until)
    axes.set_ylim(len(facts.ranks), 0)
    axes.xaxis.set_major_locator(MaxNLocator(12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_seconds(value * 1e-9)))
    axes.xaxis.set_tick_params(labelbottom=True)
    axes.set_yticks([rank + sum(_BOX) / 2 for rank in range(len(facts.ranks))], [f"rank {r.rank}" for r in facts.ranks])
    axes.tick_params(axis="y", length=0)


def _draw(axes: Axes, panel: _Panel) -> None:
    timed = panel.moves.timed
    groups: dict[str, list[Rectangle]] = {}
    kinds: set[ActionKind] = set()
    for kind, colour, box in _boxes(panel):
        kinds.add(kind)
        groups.setdefault(colour, []).append(box)
    reduced = [
        (start, finish, rank + _BESIDE[0], rank + _BESIDE[1])
        for rank, lines in enumerate(timed.reduced)
        for _, start, finish in lines
    ]
    groups.setdefault(REDUCE, []).extend(reduced)
    pixel = abs(axes.transData.inverted().transform((1, 0))[0] - axes.transData.inverted().transform((0, 0))[0])
    for colour, boxes in groups.items():
        _fill(axes, boxes, colour, pixel)
    for rank, curve in enumerate(panel.moves.curves):
        _held(axes, panel, rank, curve)
    _numbers(axes, panel, pixel)
    handles = [Patch(facecolor=COLOURS[kind], label=kind.value) for kind in COLOURS if kind in kinds]
    handles += [Patch(facecolor=REDUCE, label="all-reduce")] if reduced else []
    handles.append(Patch(facecolor=HELD, label="bytes held"))
    if panel.facts.ranks[0].limit_bytes is not None:
        handles.append(Patch(facecolor=CAPACITY_COLOUR, label="limit"))
    # At the height of the title, since the line below it may be long.
    axes.legend(handles=handles, loc="lower right", ncols=len(handles), **_LEGEND)


def _boxes(panel: _Panel) -> Iterator[tuple[ActionKind, str, Rectangle]]:
    timed = panel.moves.timed
    problem = timed.schedule.problem
    chunk, chunks = chunks_of(problem), max(map(len, problem.stages_of))
    for rank, order in enumerate(timed.schedule.orders):
        for action, start, finish in zip(order, timed.starts[rank], timed.finishes[rank], strict=True):
            low, high = _BESIDE if action.kind.copies else _BOX
            is_shard = action.kind in (ActionKind.OUTPUT, ActionKind.OUTPUT_GRADIENT)
            shade = shaded(COLOURS[action.kind], 0 if is_shard else chunk[action.stage], chunks)
            yield action.kind, shade, (start, finish, rank + low, rank + high)


def _fill(axes: Axes, boxes: list[Rectangle], colour: str, pixel: float) -> None:
    """Boxes of one colour; the wide ones with a white edge, which would swallow the others."""
    for edged in (False, True):
        corners = [[(a, c), (b, c), (b, d), (a, d)] for a, b, c, d in boxes if (b - a > 4 * pixel) == edged]
        collection = PolyCollection(corners, facecolors=colour, linewidths=0.5 if edged else 0.0)
        collection.set_edgecolor("white" if edged else "none")
        axes.add_collection(collection, autolim=False)


def _held(axes: Axes, panel: _Panel, rank: int, curve: Curve) -> None:
    """The curve, upside up although ranks run down, the limit as a line, and the peak in words."""
    top = panel.tops[rank]
    high, low = rank + _HELD[0], rank + _HELD[1]
    scale = (low - high) / top
    times = [time for time, _ in curve] + [panel.facts.makespan_ns]
    heights = [low - held * scale for _, held in curve]
    heights.append(heights[-1])
    axes.fill_between(times, heights, low, step="post", color=HELD, linewidth=0, alpha=0.75)
    facts = panel.facts.ranks[rank]
    axis = axes.get_yaxis_transform()
    if facts.limit_bytes is not None and facts.limit_bytes <= top:
        axes.plot([0, panel.facts.makespan_ns], [low - facts.limit_bytes * scale] * 2, color=CAPACITY_COLOUR, lw=1.0)
    words = format_bytes(facts.peak_bytes)
    colour = "#555555" if facts.within else CAPACITY_COLOUR
    axes.text(-0.004, (high + low) / 2, words, transform=axis, ha="right", va="center", fontsize=7.5, color=colour)


def _numbers(axes: Axes, panel: _Panel, pixel: float) -> None:
    """The microbatch inside each box that has room for it, unless there would be thousands."""
    timed = panel.moves.timed
    found = []
    for rank, order in enumerate(timed.schedule.orders):
        for action, start, finish in zip(order, timed.starts[rank], timed.finishes[rank], strict=True):
            digits = len(str(action.microbatch))
            if not action.kind.copies and finish - start >= pixel * (_LEAST_LABEL + 4 * (digits - 1)):
                found.append((rank, action, (start + finish) / 2))
    problem = timed.schedule.problem
    chunk, chunks = chunks_of(problem), max(map(len, problem.stages_of))
    for rank, action, middle in found if len(found) <= _MOST_LABELS else ():
        is_shard = action.kind in (ActionKind.OUTPUT, ActionKind.OUTPUT_GRADIENT)
        ink = _ink(shaded(COLOURS[action.kind], 0 if is_shard else chunk[action.stage], chunks))
        words = str(action.microbatch)
        axes.text(middle, rank + sum(_BOX) / 2, words, ha="center", va="center", fontsize=6.5, color=ink, clip_on=True)


def _ink(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#10202c" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"
