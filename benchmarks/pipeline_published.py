"""The first section of ``bench_pipeline``: published figures of schedules beside what our generators of them take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from .pipeline_cases import (
    MEASURED_TIMES,
    formulas,
    measured_times,
    torch_schedules,
    v_shapes,
    zero_bubble,
    zero_bubble_v,
)
from .pipeline_comparison import HEAD, Compared
from .runner import Options, Row, print_table

__all__ = ["GROUPS", "rows", "summary"]

#: Figures that need no data; each leaves out the largest cases if it is called with true.
GROUPS: tuple[Callable[[bool], Iterable[Compared]], ...] = (
    zero_bubble,
    zero_bubble_v,
    v_shapes,
    torch_schedules,
    formulas,
)


def rows(options: Options) -> Iterator[Row]:
    """Prints a table of each group and how much agrees, and yields all in long form."""
    kept: list[Compared] = []
    for group in GROUPS:
        compared = list(group(options.quick))
        kept += compared
        print_table(HEAD, [each.line() for each in compared])
    if options.data is None:
        print(f"left out: 16 measured iteration times ({MEASURED_TIMES}); --data DIR says where they are")
    else:
        compared = list(measured_times(options.data))
        kept += compared
        print_table(HEAD, [each.line() for each in compared])
    for each in kept:
        yield from each.rows()
    print(summary(kept))


def summary(kept: Iterable[Compared]) -> str:
    """One line: how many figures agree, and how far the measured times are off."""
    by_provider: dict[str, list[Compared]] = {}
    for each in kept:
        if each.figure is not None:
            by_provider.setdefault(each.provider, []).append(each)
    parts = []
    for provider, group in by_provider.items():
        agreeing = sum(each.agrees for each in group)
        if provider == "measured":
            worst = max(abs(each.error or 0) for each in group)
            parts.append(f"{agreeing} of {len(group)} measured times within 1.6 % (largest error {worst:.2f} %)")
        else:
            parts.append(f"{agreeing} of {len(group)} {provider} figures equal to 4 decimals")
    return f"bench_pipeline, published schedules: {'; '.join(parts)}"
