"""Pipeline problems from a command line: from one rank's costs, or from a file; and what of them a schedule needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import OptionError
from ..hw_models.registry import parse_bytes
from .shared import refuse

if TYPE_CHECKING:
    from ..compiler.pipelining.problem import PipelineProblem, Stage

__all__ = ["ANY", "OPTIMAL", "Source", "is_file", "parse_time", "source_of"]

OPTIMAL = "optimal"
ANY = "any"  # placement

_TIMES = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "": 1}
_TIME = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*(ns|us|ms|s|)\s*")
_FACTOR = re.compile(r"\s*(\d{1,6}(?:\.\d{1,9})?)\s*x\s*")
_COUNTED = 1 << 20  # bytes that a microbatch's activations count where no sizes are given: 1 MiB a microbatch
_TIMES_GIVEN = ("forward", "input_gradient", "weight_gradient", "backward", "send", "reduce")
_SIZES_GIVEN = ("until_input_gradient", "until_weight_gradient", "between_gradients", "message", "resident")
_MOST = 4096  # ranks, microbatches or chunks, beyond which a number is a mistake
_MOST_ACTIONS = 1 << 20
_MOST_ROUNDED = Fraction(1, 100)  # of a rank's time or bytes, that its chunks may add up to more or less


@dataclass(frozen=True)
class Source:
    """Where problems come from: one that is given, or the costs of a rank's part of the model.

    A schedule with several chunks on a rank divides that part among them, so that all schedules do the same work.
    """

    problem: PipelineProblem | None = None
    part: Stage | None = None
    ranks: int = 0
    microbatches: int = 0
    placement: str | None = None
    chunks: int | None = None
    limit: str | None = None

    def problem_of(self, schedule: str, *, fixed: bool = True) -> PipelineProblem:
        """The problem that ``schedule``, a name or ``"optimal"``, is to solve.

        ``fixed`` is whether the placement and chunks that were given are for this schedule; one that another is
        compared with has its own. Raises OptionError.
        """
        if self.problem is not None:
            return _limited(self.problem, self.limit)
        if self.part is None:
            hint = "give --ranks, --microbatches, --forward, --input-gradient and --weight-gradient, or --problem FILE"
            raise OptionError("there is no problem to solve", hint=hint)
        chunks, limit = self.chunks if fixed else None, _highest(self._base(), self.limit)
        if schedule == OPTIMAL:
            return self._placed(self.placement or "loop", chunks, limit)
        from ..passes.pipeline_parallel.named import NAMES, problem_for

        if schedule not in NAMES:
            raise OptionError(f"there is no schedule {schedule!r}", hint="`opweave pipeline --list` names them")
        about = NAMES[schedule]
        if fixed and self.placement not in (None, ANY, about.placement):
            raise OptionError(f"schedule {schedule!r} places stages as {about.placement!r}, not {self.placement!r}")
        number = chunks or about.chunks or 2
        problem = problem_for(
            schedule, _divided(self.part, number), self.ranks, self.microbatches, limit, chunks=number
        )
        return msgspec.structs.replace(problem, name="pipeline")

    def _base(self) -> PipelineProblem:
        """The ranks' parts in a row."""
        return self._placed("loop", 1, None)

    def _placed(self, placement: str, chunks: int | None, limit: int | None) -> PipelineProblem:
        from ..compiler.pipelining.placement import placed, uniform

        assert self.part is not None
        number = chunks or (1 if placement == "loop" else 2)
        on = placed("loop" if placement == ANY else placement, self.ranks, number)
        return uniform(_divided(self.part, number), on, self.microbatches, memory_limit=limit)


def is_file(schedule: str) -> bool:
    """Whether ``--schedule`` names a file."""
    return schedule.endswith(".json")


def source_of(given: dict[str, Any]) -> Source:
    """What the command's options say of the problem. Raises OptionError."""
    own = {name: given[name] for name in ("ranks", "microbatches", "placement", "chunks", *_TIMES_GIVEN, *_SIZES_GIVEN)}
    path: Path | None = given["problem"]
    if path is not None or is_file(given["schedule"]):
        from ..compiler.report.pipelining import load_problem, load_schedule

        refuse(
            "the problem comes from a file",
            **{**own, "placement": None if own["placement"] == ANY else own["placement"]},
        )
        known = load_problem(path) if path is not None else load_schedule(given["schedule"]).problem
        return Source(known, placement=own["placement"], limit=given["memory_limit"])
    if all(value is None for value in own.values()):
        return Source()
    needed = ("ranks", "microbatches", "forward", "input_gradient", "weight_gradient")
    missing = [f"--{name.replace('_', '-')}" for name in needed if own[name] is None]
    if missing:
        raise OptionError(f"the problem lacks {', '.join(missing)}", hint="or give all of it as --problem FILE")
    for name, least in (("ranks", 1), ("microbatches", 1), ("chunks", 1)):
        if own[name] is not None and not least <= own[name] <= _MOST:
            raise OptionError(f"--{name} is {own[name]}; it is {least} to {_MOST}")
    actions = own["ranks"] * own["microbatches"] * (own["chunks"] or 1)
    if actions > _MOST_ACTIONS:
        raise OptionError(f"every kind of action would be done {actions:,} times; at most {_MOST_ACTIONS:,} are taken")
    part = _part(own)
    return Source(None, part, own["ranks"], own["microbatches"], own["placement"], own["chunks"], given["memory_limit"])


def parse_time(text: str, option: str) -> int:
    """Nanoseconds of ``"29.7ms"``, ``"800 us"``, ``"12"``; rounded to whole ones. Raises OptionError."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise OptionError(f"--{option} is {text!r}, which is no time", hint="write a number and ns, us, ms or s: 1.5ms")
    return round(Fraction(match[1]) * _TIMES[match[2]])


def _part(own: dict[str, Any]) -> Stage:
    """One rank's part of the model."""
    from ..compiler.pipelining.problem import Stage

    times = {n: None if own[n] is None else parse_time(own[n], n.replace("_", "-")) for n in _TIMES_GIVEN}
    sizes = {name: 0 if own[name] is None else _size(own[name], name) for name in _SIZES_GIVEN}
    held = sum(sizes[name] for name in ("until_input_gradient", "until_weight_gradient", "between_gradients"))
    return Stage(
        0,
        times["forward"] or 0,
        times["input_gradient"] or 0,
        times["weight_gradient"] or 0,
        times["backward"],
        sizes["until_input_gradient"],
        sizes["until_weight_gradient"] if held else _COUNTED,
        sizes["between_gradients"],
        forward_send_ns=times["send"] or 0,
        backward_send_ns=times["send"] or 0,
        forward_bytes=sizes["message"],
        backward_bytes=sizes["message"],
        reduce_ns=times["reduce"] or 0,
        resident_bytes=sizes["resident"],
    )


def _divided(part: Stage, chunks: int) -> Stage:
    """A chunk of ``part``: messages are as long and as large as before, all else is shared out.

    Raises OptionError where the whole numbers of the chunks would not be the part's any more.
    """
    whole = ("rank", "forward_send_ns", "backward_send_ns", "forward_bytes", "backward_bytes")
    shared = {name: value for name in part.__struct_fields__ if (value := getattr(part, name)) and name not in whole}
    each = {name: round(Fraction(value, chunks)) for name, value in shared.items()}
    for name, value in shared.items():
        if abs(each[name] * chunks - value) > _MOST_ROUNDED * value:
            what, _, unit = name.rpartition("_")
            raise OptionError(
                f"--{what.replace('_', '-')} of {value} {unit} is not to be divided among {chunks} chunks",
                hint="give all times, and all sizes, a thousandfold, as 1us in place of 1ns: both are counted as whole",
            )
    return msgspec.structs.replace(part, **each)


def _limited(problem: PipelineProblem, limit: str | None) -> PipelineProblem:
    if limit is None:
        return problem
    factor = _FACTOR.fullmatch(limit)
    if factor is None:
        multiple = ", or a multiple of what activations need in 1F1B, such as 1.5x"
        limits = (_size(limit, "memory_limit", multiple),) * problem.ranks
    else:
        room = int(Fraction(factor[1]) * _activations(problem))
        limits = tuple(resident + room for resident in problem.resident_bytes)
    return msgspec.structs.replace(problem, memory_limit=limits)


def _highest(base: PipelineProblem, limit: str | None) -> int | None:
    limits = _limited(base, limit).memory_limit
    return None if limits is None else max(limits)


def _size(text: str, name: str, others: str = "") -> int:
    try:
        return parse_bytes(text)
    except OptionError as error:
        hint = f"write a size such as 40GiB{others}"
        raise OptionError(f"--{name.replace('_', '-')} is {text!r}, which is no size", hint=hint) from error


def _activations(problem: PipelineProblem) -> int:
    """The most that activations of any rank need in 1F1B, where the n-th rank from the end has n microbatches."""
    ranks = list(dict.fromkeys(problem.stages[stage].rank for stage in problem.routes[0].stages))
    held = dict.fromkeys(ranks, 0)
    for index in problem.routes[0].stages:
        stage = problem.stages[index]
        held[stage.rank] += stage.until_input_gradient_bytes + stage.until_weight_gradient_bytes
    return max(min(len(ranks) - position, problem.microbatches) * held[rank] for position, rank in enumerate(ranks))
