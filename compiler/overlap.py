"""What became of each collective: exposed before and after, hidden by what, or why it was left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import OptionError
from ..hw_models.registry import parse_bytes
from .plan import CollectiveStart, Plan, Recompute, Run

__all__ = ["LIBRARY", "CollectiveLine", "OverlapOptions", "Overlapped", "exposed_seconds", "lines_of"]

_OPTIONS: Mapping[str, str] = {
    "margin": "a fraction of the predicted time, from 0 and below 1",
    "parts": "one number of parts, or several to choose from, each 2 or more",
    "sizes": "the sizes of the parts in tokens, two or more, each above 0",
    "axis": "'auto', 'batch' or 'sequence'",
    "memory_limit": "bytes, or a size such as '8GiB'",
    "strict": "True or False",
    "check_ranks": "True or False",
    "algorithms": "names of algorithms that `opweave hw show` lists for a machine",
}


#: Algorithms that a call of torch.distributed's runs by, as machines name them.
LIBRARY = ("nccl", "ring", "gloo")


@dataclass(frozen=True)
class OverlapOptions:
    """What a user may decide about overlap; what is left out is chosen by prediction.

    ``margin`` is the least predicted gain, as a fraction of the time without: below it nothing is changed. ``parts``
    are the numbers of parts to choose from; ``sizes`` fixes the parts, in tokens, whatever the prediction says.
    ``axis`` says along what inputs are cut: ``"batch"``, ``"sequence"`` or, ``"auto"``, the first of them that can be.
    ``memory_limit`` bounds the bytes alive at once. ``strict`` refuses a cut that needs a value to be joined on the
    way. ``check_ranks`` compares the orders of all ranks before anything is started; every rank of the default process
    group must then compile, or call, the module. ``algorithms`` are those that collectives may be done by: what
    torch.distributed's own calls do, unless others are named, which is to see what they would gain.

    Raises:
        OptionError: a value is of a wrong type or out of range.
    """

    margin: float = 0.03
    parts: tuple[int, ...] = (2, 3, 4)
    sizes: tuple[int, ...] = ()
    axis: str = "auto"
    memory_limit: int | str | None = None
    strict: bool = False
    check_ranks: bool = False
    algorithms: tuple[str, ...] = LIBRARY

    @classmethod
    def of(cls, value: object) -> OverlapOptions | None:
        """The options that ``overlap=value`` means: True, False, or a mapping of fields. Raises OptionError."""
        if isinstance(value, cls):
            return value
        if isinstance(value, bool):
            return cls() if value else None
        if not isinstance(value, Mapping):
            raise OptionError(f"overlap is {value!r}; it takes True, False or a mapping of {', '.join(_OPTIONS)}")
        unknown = [str(name) for name in value if name not in _OPTIONS]
        if unknown:
            raise OptionError(f"overlap has no option {unknown[0]!r}", hint=f"its options are {', '.join(_OPTIONS)}")
        given: dict[str, Any] = {str(name): item for name, item in value.items()}
        for name in ("parts", "sizes", "algorithms"):
            if name in given:
                item = given[name]
                given[name] = tuple(item) if isinstance(item, list | tuple) else (item,)
        return cls(**given)

    def __post_init__(self) -> None:
        right = {
            "margin": _is_number(self.margin) and 0 <= self.margin < 1,
            "parts": all(_is_whole(n) and n >= 2 for n in self.parts) and bool(self.parts),
            "sizes": all(_is_whole(n) and n >= 1 for n in self.sizes) and len(self.sizes) != 1,
            "axis": self.axis in ("auto", "batch", "sequence"),
            "memory_limit": self.memory_limit is None
            or isinstance(self.memory_limit, str)
            or _is_whole(self.memory_limit),
            "strict": isinstance(self.strict, bool),
            "check_ranks": isinstance(self.check_ranks, bool),
            "algorithms": bool(self.algorithms) and all(isinstance(name, str) for name in self.algorithms),
        }
        for name, is_right in right.items():
            if not is_right:
                raise OptionError(f"option {name!r} of overlap is {getattr(self, name)!r}; it takes {_OPTIONS[name]}")
        if self.limit_bytes is not None and self.limit_bytes <= 0:
            raise OptionError(f"option 'memory_limit' of overlap is {self.memory_limit!r}; it must be above 0")

    @property
    def limit_bytes(self) -> int | None:
        """The memory limit in bytes."""
        return parse_bytes(self.memory_limit) if isinstance(self.memory_limit, str) else self.memory_limit


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class CollectiveLine:
    """One collective, ``op`` of the module as it was given; its parts after a split count together.

    ``before_s`` and ``after_s`` are the seconds in which only communication ran, as predicted for the plan before and
    the plan that was chosen; where several collectives are in flight they share such time equally. ``hidden_by`` names
    the operators that ran while it was in flight, the longest first. ``mode`` is how it is done. ``reason`` says why
    it was left as it was, and is empty where it was not.
    """

    op: str
    kind: str
    group: str
    nbytes: int
    exposed_before_s: float
    exposed_after_s: float
    hidden_by: tuple[str, ...] = ()
    mode: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Overlapped:
    """What became of a module of one rank: ``module`` as it is to run, its nodes in the order of ``plan``.

    ``plan`` is timed and verified, of a graph whose operators are what is launched as one; ``before`` is that of the
    module as it was given. ``sizes`` are the parts in tokens, empty where nothing is cut. ``lines`` has every
    collective of the module as given; ``joined`` the operators that ended a cut, with the reason. ``reason`` says why
    nothing was changed, and is empty where something was.
    """

    module: Any
    plan: Plan
    before: Plan
    lines: tuple[CollectiveLine, ...]
    sizes: tuple[int, ...] = ()
    joined: tuple[tuple[str, str], ...] = ()
    reason: str = ""

    @property
    def seconds(self) -> tuple[float, float]:
        """Predicted seconds before and after."""
        ends = [max((i.finish_s or 0.0 for i in plan.instructions), default=0.0) for plan in (self.before, self.plan)]
        return ends[0], ends[1]

    def left_alone(self, reason: str) -> Overlapped:
        """The same of a module in which nothing was changed, because of ``reason``."""
        return replace(self, reason=reason, lines=tuple(replace(line, reason=reason) for line in self.lines))


def exposed_seconds(plan: Plan) -> Mapping[str, float]:
    """Seconds of each collective of a timed ``plan`` in which no compute engine runs, by operator.

    What several collectives expose at one time counts for each in equal parts, so that the sum is the time in which
    nothing but communication runs.
    """
    exposed = dict.fromkeys((name for name, _, _ in _flying(plan)), 0.0)
    changes: list[tuple[float, int, str]] = []  # when something begins (1) or ends (-1); what, "" for compute
    for name, start, finish in [*_flying(plan), *(("", *span) for span in _computing(plan))]:
        if finish > start:  # what ends first at a moment is sorted first, which what takes no time must not be
            changes += [(start, 1, name), (finish, -1, name)]
    changes.sort()
    running, inside, since = 0, dict[str, None](), 0.0
    for moment, change, name in changes:
        if not running:
            for other in inside:
                exposed[other] += (moment - since) / len(inside)
        since = moment
        if not name:
            running += change
        elif change > 0:
            inside[name] = None
        else:
            inside.pop(name, None)
    return exposed


def lines_of(
    before: Plan, after: Plan, origin: Mapping[str, str] | None = None, reasons: Mapping[str, str] | None = None
) -> list[CollectiveLine]:
    """A line for each collective of ``before``, in its order; both plans are timed.

    ``origin`` says of operators of ``after`` which of ``before`` they are parts of, where the name is another;
    ``reasons`` why some of ``before`` were left alone.
    """
    origin, reasons = origin or {}, reasons or {}
    was, now = exposed_seconds(before), exposed_seconds(after)
    modes = {i.op: i.mode for i in after.instructions if isinstance(i, CollectiveStart)}
    parts: dict[str, list[str]] = {}
    for name in now:
        parts.setdefault(origin.get(name, name), []).append(name)
    lines = []
    for op in before.graph.ops:
        if op.collective is None:
            continue
        own = parts.get(op.name, [])
        line = CollectiveLine(op.name, op.collective.kind.value, op.collective.group, op.collective.nbytes, 0.0, 0.0)
        lines.append(
            replace(
                line,
                exposed_before_s=was.get(op.name, 0.0),
                exposed_after_s=sum(now[name] for name in own),
                hidden_by=tuple(_hiding(after, own)),
                mode=" + ".join(dict.fromkeys(modes[name] for name in own if modes.get(name))),
                reason=reasons.get(op.name, ""),
            )
        )
    return lines


def _flying(plan: Plan) -> list[tuple[str, float, float]]:
    collectives = {op.name for op in plan.graph.ops if op.collective is not None}
    return [
        (i.op, i.start_s or 0.0, i.finish_s or 0.0)
        for i in plan.instructions
        if isinstance(i, CollectiveStart | Run) and i.op in collectives
    ]


def _computing(plan: Plan) -> Iterator[tuple[float, float]]:
    collectives = {op.name for op in plan.graph.ops if op.collective is not None}
    for i in plan.instructions:
        if isinstance(i, Run | Recompute) and i.op not in collectives and (i.finish_s or 0.0) > (i.start_s or 0.0):
            yield i.start_s or 0.0, i.finish_s or 0.0


def _hiding(plan: Plan, collectives: Sequence[str]) -> Iterator[str]:
    """Operators that compute while one of ``collectives`` is in flight, the longest in common first."""
    flying = [(start, finish) for name, start, finish in _flying(plan) if name in collectives]
    common: dict[str, float] = {}
    others = {op.name for op in plan.graph.ops if op.collective is not None}
    for i in plan.instructions:
        if isinstance(i, Run | Recompute) and i.op not in others:
            own = (i.start_s or 0.0, i.finish_s or 0.0)
            seconds = sum(max(0.0, min(own[1], finish) - max(own[0], start)) for start, finish in flying)
            if seconds > 0:
                common[i.op] = common.get(i.op, 0.0) + seconds
    yield from sorted(common, key=lambda name: -common[name])
