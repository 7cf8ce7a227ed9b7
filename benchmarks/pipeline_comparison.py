"""One figure of a pipeline schedule beside ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .runner import Row

__all__ = ["HEAD", "Compared"]

HEAD = ("case", "schedule", "metric", "figure", "ours", "unit", "difference", "from")


@dataclass(frozen=True)
class Compared:
    """``figure``, which ``provider`` says of ``schedule``, beside what it is here; nothing of ours is fitted to any.

    ``provider`` is ``"published"``, ``"measured"``, ``"formula"``, or ``"reference"``: another program's. Without a
    ``figure``, ours stands beside another that it explains.
    """

    case: str
    schedule: str
    metric: str
    figure: float | None
    ours: float
    unit: str
    provider: str
    source: str

    @property
    def error(self) -> float | None:
        """Percent of a measured time, else the plain difference."""
        if self.figure is None:
            return None
        return 100 * (self.ours / self.figure - 1) if self.provider == "measured" else self.ours - self.figure

    @property
    def agrees(self) -> bool:
        """Equal to four decimals, or to a measured time within 1.6 %."""
        if self.figure is None or self.error is None:
            return False
        return abs(self.error) <= 1.6 if self.provider == "measured" else round(self.ours, 4) == round(self.figure, 4)

    def line(self) -> list[str | float | None]:
        """For the table."""
        difference = None if self.error is None else f"{self.error:+.4f}"
        if self.provider == "measured":
            difference = f"{self.error:+.2f} %"
        figures = [_written(value, self.unit) for value in (self.figure, self.ours)]
        source = f"{self.provider}: {self.source}"
        return [self.case, self.schedule, self.metric, *figures, self.unit, difference, source]

    def rows(self) -> Iterator[Row]:
        """In long form."""
        case = f"{self.case}, {self.schedule}"
        if self.figure is not None:
            yield Row(case, self.provider, self.metric, self.figure, self.unit, note=self.source)
        yield Row(case, "opweave", self.metric, round(self.ours, 4), self.unit, note="predicted")


def _written(value: float | None, unit: str) -> str | float | None:
    """Fractions with the decimals that are compared, which the table would cut."""
    return f"{value:.4f}" if value is not None and unit == "fraction" else value
