"""Problems and schedules as files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from ....errors import OptionError, OpweaveError, PlanError
from ...pipelining.problem import PipelineProblem
from ...pipelining.schedule import Action, PipelineSchedule

__all__ = ["load_problem", "load_schedule", "save_schedule", "schedule_json"]


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    opweave_pipeline: Literal[1]
    method: str
    problem: PipelineProblem
    orders: tuple[tuple[str, ...], ...]


def schedule_json(schedule: PipelineSchedule) -> bytes:
    """The schedule with its problem; actions as ``3F0``. Times are left out: ``timed`` finds them again."""
    orders = tuple(tuple(map(str, order)) for order in schedule.orders)
    return msgspec.json.encode(_Document(1, schedule.method, schedule.problem, orders))


def save_schedule(schedule: PipelineSchedule, path: str | Path) -> None:
    """Write the schedule as JSON, creating the folder. Raises OptionError."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(schedule_json(schedule))
    except OSError as error:
        raise OptionError(f"cannot write the schedule to {str(path)!r}: {error.strerror}") from error


def load_schedule(path: str | Path) -> PipelineSchedule:
    """A schedule that ``save_schedule`` wrote; ``timed`` says whether its orders can be done.

    Raises:
        PlanError: the file cannot be read, or is no schedule.
    """
    try:
        document = msgspec.json.decode(_read(path, PlanError), type=_Document)
        orders = tuple(tuple(map(Action.of, order)) for order in document.orders)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OpweaveError) as error:
        raise PlanError(f"{str(path)!r} is no pipeline schedule: {error}") from error
    return PipelineSchedule(document.problem, orders, document.method)


def load_problem(path: str | Path) -> PipelineProblem:
    """A problem from ``.json`` or ``.toml``, with the fields of ``PipelineProblem``.

    Raises:
        OptionError: the file cannot be read, or is no problem.
    """
    text = _read(path, OptionError)
    decode = msgspec.toml.decode if Path(path).suffix == ".toml" else msgspec.json.decode
    try:
        return decode(text, type=PipelineProblem)
    except (msgspec.MsgspecError, ValueError, RecursionError, OpweaveError) as error:
        hint = "its fields are those of PipelineProblem: ranks, stages, routes; docs/pipeline.md has an example"
        raise OptionError(f"{str(path)!r} is no pipeline problem: {error}", hint=hint) from error


def _read(path: str | Path, refusal: type[OpweaveError]) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise refusal(f"cannot read {str(path)!r}: {getattr(error, 'strerror', error)}") from error
