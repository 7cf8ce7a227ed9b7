"""Figures as people read them: one line a case and provider, and beside those of an older run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .rows import Row, table

__all__ = ["COLUMNS", "Comparison", "Line", "compared", "comparison_table", "lines_of", "lines_table"]

COLUMNS = (
    *("kernel", "workload", "dtype", "mode", "provider", "ms_p20", "ms", "ms_p80", "gb_per_s", "tflop_per_s"),
    *("percent_of_roofline", "percent_of_measured", "peak_bytes", "max_error", "time_over_ours", "note"),
)
_METRICS = {
    **{"time p20": "ms_p20", "time": "ms", "time p80": "ms_p80", "bandwidth": "gb_per_s", "rate": "tflop_per_s"},
    **{"roofline": "percent_of_roofline", "measured roofline": "percent_of_measured", "peak memory": "peak_bytes"},
    **{"error": "max_error", "time over ours": "time_over_ours"},
}


@dataclass
class Line:
    """All figures of one provider for one case; ``least_ms`` is what the roofline allows."""

    case: str
    provider: str
    values: dict[str, float | None] = field(default_factory=dict)
    note: str = ""
    least_ms: float | None = None

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """Kernel, workload, dtype and mode."""
        kernel, _, rest = self.case.partition("/")
        workload, dtype, mode = (["", "", *rest.rsplit("/", 2)])[-3:]
        return kernel, workload, dtype, mode

    @property
    def cells(self) -> tuple[object, ...]:
        """What stands under `COLUMNS`."""
        return (*self.parts, self.provider, *(self.values.get(name) for name in COLUMNS[5:-1]), self.note)

    def __getitem__(self, column: str) -> float | None:
        return self.values.get(column)


def lines_of(rows: Iterable[Row]) -> list[Line]:
    """One line for each case and provider, in the order of their first rows."""
    found: dict[tuple[str, str], Line] = {}
    for row in rows:
        if row.metric not in _METRICS or "/" not in row.case:
            continue
        line = found.setdefault((row.case, row.provider), Line(row.case, row.provider))
        line.values[_METRICS[row.metric]] = row.value
        if row.metric == "time":
            line.least_ms = row.bound
        if row.metric in ("time", "error"):
            line.note = row.note
    return list(found.values())


def lines_table(lines: Sequence[Line]) -> str:
    """The providers of one case under each other."""
    head = ("provider", "ms", "p20", "p80", "GB/s", "TFLOP/s", "% roof", "% measured", "peak MiB", "error", "x ours")
    cells: list[list[str | float | None]] = []
    for line in lines:
        peak, error = line["peak_bytes"], line["max_error"]
        cells.append(
            [
                line.provider,
                *(_digits(line[name]) for name in ("ms", "ms_p20", "ms_p80")),
                *(line[name] for name in ("gb_per_s", "tflop_per_s", "percent_of_roofline", "percent_of_measured")),
                None if peak is None else peak / 2**20,
                None if error is None else f"{error:.1e}",
                line["time_over_ours"],
                line.note,
            ]
        )
    return table((*head, "note"), cells)


def _digits(ms: float | None) -> str | None:
    return None if ms is None else f"{ms:.4g}" if ms < 100 else f"{ms:.1f}"


@dataclass(frozen=True)
class Comparison:
    """One provider's time for one case, before and now."""

    case: str
    provider: str
    before_ms: float | None
    now_ms: float | None
    threshold: float

    @property
    def ratio(self) -> float | None:
        """Time now over time before."""
        return self.now_ms / self.before_ms if self.now_ms and self.before_ms else None

    @property
    def verdict(self) -> str:
        """Whether it changed by more than the threshold."""
        if self.ratio is None:
            return "new" if self.now_ms else "gone" if self.before_ms else "not measured"
        if self.ratio > 1 + self.threshold:
            return "SLOWER"
        return "faster" if self.ratio < 1 / (1 + self.threshold) else "same"


def compared(before: Iterable[Row], now: Iterable[Row], threshold: float) -> list[Comparison]:
    """Every case and provider that either has a time for; those that were not measured now come last."""
    old, new = (
        {(r.case, r.provider): r.value for r in rows if r.metric == "time" and "/" in r.case} for rows in (before, now)
    )
    keys = [*new, *(key for key in old if key not in new)]
    found = [Comparison(*key, old.get(key), new.get(key), threshold) for key in keys]
    return [item for item in found if item.verdict != "not measured"]


def comparison_table(found: Sequence[Comparison]) -> str:
    """Ratios with the threshold that judges them, and a last line for all."""
    head = ("case", "provider", "before ms", "now ms", "ratio", "threshold", "")
    lines = [
        [
            *(item.case, item.provider, _digits(item.before_ms), _digits(item.now_ms)),
            *(None if item.ratio is None else f"{item.ratio:.3f}", f"{item.threshold:.0%}", item.verdict),
        ]
        for item in found
    ]
    ratios = [item.ratio for item in found if item.ratio]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan
    counts = {verdict: sum(item.verdict == verdict for item in found) for verdict in ("SLOWER", "faster", "same")}
    total = ", ".join(f"{count} {verdict.lower()}" for verdict, count in counts.items())
    return f"{table(head, lines)}\n{total}; {mean:.3f} times as long in the geometric mean"
