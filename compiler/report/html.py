"""One self-contained page of a plan, and everything else that there is to see of it, as files."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from ...errors import OptionError
from ..overlap import CollectiveLine
from ..plan import Plan
from ..verify import Verification, verify
from .assemble import assembled
from .payload import payload
from .text import summary
from .trace import chrome_trace
from .view import is_timed

__all__ = ["write_html", "write_report"]


def write_html(
    plan: Plan, path: str | Path, verification: Verification | None = None, lines: Sequence[CollectiveLine] = ()
) -> None:
    """Write the page to ``path``, creating its folder; ``verification`` spares verifying the plan again.

    ``lines`` are what became of the collectives, for their table.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(_page(plan, verification or verify(plan), lines).encode())


def write_report(plan: Plan, folder: str | Path, lines: Sequence[CollectiveLine] = ()) -> dict[str, Path]:
    """Write everything there is to see of ``plan`` into ``folder``; returns the files by name.

    Always ``index.html``, ``memory_map.png``, ``timeline.png``, ``live_bytes.png`` and ``traffic.png``; ``trace.json``
    for a plan that has times.

    Raises:
        OptionError: the folder cannot be made or written to.
    """
    try:
        return _write_all(plan, Path(folder), lines)
    except OSError as error:
        raise OptionError(
            f"cannot write the report to {str(folder)!r}: {error.strerror}", hint="name a folder that can be written to"
        ) from error


def _write_all(plan: Plan, target: Path, lines: Sequence[CollectiveLine]) -> dict[str, Path]:
    from . import pictures  # matplotlib takes a while to import

    counted = verify(plan)
    names = ("index.html", "trace.json", "memory_map.png", "timeline.png", "live_bytes.png", "traffic.png")
    paths = {name: target / name for name in names}
    write_html(plan, paths["index.html"], counted, lines)
    if is_timed(plan):
        paths["trace.json"].write_bytes(chrome_trace(plan))
    else:
        del paths["trace.json"]
    pictures.memory_map(plan, paths["memory_map.png"])
    pictures.timeline(plan, paths["timeline.png"])
    pictures.live_bytes(plan, paths["live_bytes.png"])
    pictures.traffic(plan, paths["traffic.png"], counted)
    return paths


def _page(plan: Plan, counted: Verification, lines: Sequence[CollectiveLine]) -> str:
    folder = resources.files(__package__).joinpath("page")
    return assembled(
        folder.joinpath("page.html").read_text(encoding="utf-8"),
        [folder.joinpath("page.css")],
        [file for file in folder.iterdir() if file.name.endswith(".js")],
        title=f"{plan.graph.name} on {plan.machine.name}",
        summary=summary(plan, counted),
        data=payload(plan, counted, lines).decode(),
    )
