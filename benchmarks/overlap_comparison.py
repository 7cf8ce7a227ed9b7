"""One published figure beside ours, and where ours comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .runner import Row

__all__ = ["Comparison"]


@dataclass(frozen=True)
class Comparison:
    """``ours`` is ``fitted`` where the published figure, or one of its group, set a constant that it follows from.

    ``inputs`` says which constants were fitted on what. ``trivial`` is what a predictor says that knows no model:
    communication is free, or splitting costs nothing. ``remark`` is what was chosen on the way. A ``unit`` of ``"x"``
    is a ratio, its error in points.
    """

    case: str
    metric: str
    published: float
    ours: float
    unit: str
    fitted: bool
    inputs: str
    source: str
    trivial: float | None = None
    remark: str = ""

    @property
    def error(self) -> float:
        """Points for a ratio, percent for anything else."""
        return self.error_of(self.ours)

    @property
    def trivial_error(self) -> float | None:
        """The error of the trivial predictor, where there is one."""
        return None if self.trivial is None else self.error_of(self.trivial)

    def error_of(self, value: float) -> float:
        """The error that ``value`` would have."""
        return 100 * (value - self.published if self.unit == "x" else value / self.published - 1)

    def rows(self) -> Iterator[Row]:
        """In long form: what was published, ours, and the trivial predictor's."""
        how = f"{'fitted' if self.fitted else 'predicted'}: {'; '.join(filter(None, (self.inputs, self.remark)))}"
        yield Row(self.case, "published", self.metric, self.published, self.unit, note=self.source)
        yield Row(self.case, "opweave", self.metric, round(self.ours, 4), self.unit, note=how)
        if self.trivial is not None:
            yield Row(self.case, "trivial", self.metric, round(self.trivial, 4), self.unit)
