"""Pictures of what the benchmarks of the torch.compile backend measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .backend_cases import INDUCTOR
from .turns import Measured

__all__ = ["Curve", "draw", "draw_curves"]

#: Points of one way to run a model under limits: (peak bytes, seconds).
Curve = Sequence[tuple[float, float]]


def draw(cases: Sequence[tuple[str, Mapping[str, Measured]]], path: Path) -> None:
    """Write a PNG of latency and peak memory of each provider in each case, relative to Inductor's default mode."""
    names = list(dict.fromkeys(name for _, measured in cases for name in measured))
    figure = _figure(max(8.0, 1.3 * len(cases) + 3), 8.0)
    latency, memory = figure.subplots(2, 1, sharex=True)
    width = 0.8 / max(len(names), 1)
    for number, name in enumerate(names):
        for axes, value in ((latency, _latency), (memory, _peak)):
            points = [
                (i, value(m[name]) / value(m[INDUCTOR])) for i, (_, m) in enumerate(cases) if _comparable(name, m)
            ]
            places = [i + (number - (len(names) - 1) / 2) * width for i, _ in points]
            axes.bar(places, [ratio for _, ratio in points], width, label=name)
    for axes, title in ((latency, "latency"), (memory, "peak memory above weights and inputs")):
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_ylabel(f"relative to {INDUCTOR}")
        axes.set_title(title)
        axes.grid(visible=True, axis="y", color="#e3e3e3")
    latency.legend(fontsize="small", ncols=3)
    memory.set_xticks(range(len(cases)), [name for name, _ in cases], rotation=30, ha="right")
    figure.savefig(path)


def draw_curves(cases: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Write a PNG of time against peak memory, a panel for each case, a line for each provider."""
    count = max(len(cases), 1)
    figure = _figure(6.5 * min(count, 3), 4.5 * -(-count // 3))
    panels = figure.subplots(-(-count // 3), min(count, 3), squeeze=False).flatten()
    for axes, (case, curves) in zip(panels, cases.items(), strict=False):
        for name, curve in curves.items():
            points = sorted(curve)
            axes.plot([p[0] / 2**20 for p in points], [1e3 * p[1] for p in points], marker="o", label=name)
        axes.set(title=case, xlabel="peak MiB on the device", ylabel="ms")
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, color="#e3e3e3")
        axes.legend(fontsize="small")
    figure.savefig(path)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _comparable(name: str, measured: Mapping[str, Measured]) -> bool:
    return name in measured and INDUCTOR in measured and _peak(measured[INDUCTOR]) > 0


def _latency(measured: Measured) -> float:
    return measured.spread.median


def _peak(measured: Measured) -> float:
    return float(measured.prepared.footprint.allocated)
