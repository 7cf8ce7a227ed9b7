"""Everything that there is to see of a schedule, or of two, as files in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from ....errors import ExecutionError, OptionError
from ...runtime.pipelining.emit import csv_of, renumbered
from .. import __name__ as report
from ..assemble import assembled
from .facts import PipelineFacts, Shown, pairs_of
from .files import schedule_json
from .moves import Moves
from .payload import pipeline_payload
from .text import facts_text
from .trace import pipeline_trace

__all__ = ["pipeline_page", "write_pipeline_report"]


def write_pipeline_report(shown: Shown, folder: str | Path, other: Shown | None = None) -> dict[str, Path]:
    """Write what there is to see of ``shown`` into ``folder``, beside ``other`` if that is given; the files by name.

    Always ``index.html``, ``pipeline.png``, ``schedule.json`` and ``trace.json``; ``schedule.csv`` in the format
    ``compute_only`` where torch can execute the schedule (``compiler.runtime.pipelining.emit`` says why not). Files of
    schedules are those of ``shown``.

    Raises:
        OptionError: the folder cannot be made or written to.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        return _write_all(shown, target, other)
    except OSError as error:
        raise OptionError(
            f"cannot write the report to {str(folder)!r}: {error.strerror}", hint="name a folder that can be written to"
        ) from error


def pipeline_page(shown: Shown, other: Shown | None = None) -> str:
    """The self-contained HTML page."""
    return _page(pairs_of(shown, other))


def _write_all(shown: Shown, target: Path, other: Shown | None) -> dict[str, Path]:
    from .picture import draw_pairs  # matplotlib takes a while to import

    names = ("index.html", "pipeline.png", "schedule.json", "schedule.csv", "trace.json")
    paths = {name: target / name for name in names}
    pairs = pairs_of(shown, other)
    schedule = pairs[0][0].timed.schedule
    paths["index.html"].write_bytes(_page(pairs).encode())
    draw_pairs(pairs, paths["pipeline.png"])
    paths["schedule.json"].write_bytes(schedule_json(schedule))
    paths["trace.json"].write_bytes(pipeline_trace([moves for moves, _ in pairs]))
    try:
        paths["schedule.csv"].write_text(csv_of(renumbered(schedule)), encoding="utf-8")
    except ExecutionError:  # not something torch executes: what an earlier report left here would be another schedule's
        paths.pop("schedule.csv").unlink(missing_ok=True)
    return paths


def _page(pairs: Sequence[tuple[Moves, PipelineFacts]]) -> str:
    own = resources.files(__package__).joinpath("page")
    shared = resources.files(report).joinpath("page")
    scripts = [f for f in (*shared.iterdir(), *own.iterdir()) if f.name.endswith(".js")]
    return assembled(
        own.joinpath("pipeline.html").read_text(encoding="utf-8"),
        [shared.joinpath("page.css"), own.joinpath("pipeline.css")],
        [file for file in scripts if file.name.startswith(("0_", "p"))],
        title=" and ".join(facts.title for _, facts in pairs),
        summary=facts_text(*(facts for _, facts in pairs)),
        data=pipeline_payload(pairs).decode(),
    )
