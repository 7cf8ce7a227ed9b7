"""Whether a program that runs on several engines computes what its own order prescribes: an independent judge.

Works on the program's calls, which say what they read and write, and on the device plan's engines, waits and addresses;
knows neither the planning graph nor how the waits were found. A step happens before another if it precedes it on its
engine, if the other waits for it, or through a third. What receives happens before everything, what returns after.
Checked are every two accesses to the same bytes one of which writes; every read, which must find the bytes that the
last call before it in program order wrote; and memory that the host may hand on while it is in use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from ..graph import Op, OpKind
from ..plan import Instruction, Load, Recompute, Residence, Run, Store
from .race_bytes import ENTRY, Bytes, Content, Range, Touch
from .race_faults import RaceFault, RaceFinding
from .race_reuse import check_reuse

if TYPE_CHECKING:
    from ..runtime.device.layout import DevicePlan
    from ..runtime.device.program import Call, Program

__all__ = ["RaceFault", "RaceFinding", "find_races"]


def find_races(program: Program, device_plan: DevicePlan) -> tuple[RaceFinding, ...]:
    """All faults of ``device_plan`` for ``program``, whose sizes are integers; none proves that it is free of races.

    Time and memory grow with the square of the steps, by bit masks: a plan of 5,000 steps takes seconds.
    """
    malformed = tuple(_check_form(program, device_plan))
    if malformed:
        return malformed
    return tuple(_Judge(program, device_plan).findings())


def _check_form(program: Program, device_plan: DevicePlan) -> Iterator[RaceFinding]:
    """What must hold before anything else can be asked: engines, waits and calls have the form that the others read."""
    steps, waits = device_plan.plan.instructions, device_plan.waits
    if waits and len(waits) != len(steps):
        yield RaceFinding(RaceFault.WAITS_MALFORMED, f"there are waits for {len(waits)} of {len(steps)} steps")
    for step, others in enumerate(waits):
        for other in others:
            if not 0 <= other < step:
                message = f"waits for step {other}; only earlier steps can be waited for"
                yield RaceFinding(RaceFault.WAITS_MALFORMED, message, step)
    if any(i.engine for i in steps):
        for step, instruction in enumerate(steps):
            if not instruction.engine:
                yield RaceFinding(RaceFault.ENGINE_MISSING, "other steps name their engines, this one does not", step)
    yield from _check_calls(program, device_plan)


def _check_calls(program: Program, device_plan: DevicePlan) -> Iterator[RaceFinding]:
    steps = device_plan.plan.instructions
    known = {call.name for call in program.calls} | {op.name for op in device_plan.plan.graph.ops if _is_boundary(op)}
    runs = Counter(i.op for i in steps if isinstance(i, Run))
    for call in program.calls:
        if runs[call.name] != 1:
            message = f"call {call.name!r} is run {runs[call.name]} times, expected once"
            yield RaceFinding(RaceFault.CALL_MISSING, message)
    for step, instruction in enumerate(steps):
        if not isinstance(instruction, Load | Store):
            if instruction.op not in known:
                yield RaceFinding(RaceFault.CALL_UNKNOWN, f"the program has no call {instruction.op!r}", step)
        elif instruction.buffer not in program.storages:
            yield RaceFinding(RaceFault.CALL_UNKNOWN, f"the program has no storage {instruction.buffer!r}", step)


def _is_boundary(op: Op) -> bool:
    return op.kind is OpKind.BOUNDARY


class _Judge:
    def __init__(self, program: Program, device_plan: DevicePlan) -> None:
        from ..runtime.device.program import Origin, Ref  # which imports torch, as whoever made the program has

        self.program, self.device_plan, self.plan = program, device_plan, device_plan.plan
        self.kept = {n for n, s in program.storages.items() if s.origin in (Origin.INPUT, Origin.CONSTANT)}
        self.given = {n for n, s in program.storages.items() if s.origin is Origin.GIVEN}
        self.host = {n for n, s in program.storages.items() if s.origin is Origin.HOST}
        self.sent = {n for n, s in program.storages.items() if s.origin is Origin.RETURNED}
        self.returned = {program.views[o.name].storage for o in program.outputs if isinstance(o, Ref)}
        self.calls: dict[str, Call] = {call.name: call for call in program.calls}
        self.stays: dict[str, list[Residence]] = {}
        for residence in sorted(self.plan.residences or (), key=lambda r: r.begin):
            self.stays.setdefault(residence.buffer, []).append(residence)
        self.prescribed, self.last = _prescribed(program)
        self.done = self._happened_before()
        self.spaces: dict[str, Bytes] = {}
        self.touched: list[list[Touch]] = []

    def findings(self) -> Iterator[RaceFinding]:
        for name in sorted(self.kept | self.host):
            self._hold(Touch(_home(name), 0, 1), (name, ENTRY))
        for name in sorted(self.given):
            for stay in self.stays.get(name, ())[:1]:
                self._hold(self._at(name, stay), (name, ENTRY))
        for step, instruction in enumerate(self.plan.instructions):
            touched: list[Touch] = []
            yield from self._touch(step, instruction, touched)
            for touch in touched:
                yield from self._replay(step, touch)
            self.touched.append(touched)
        yield from self._check_end()
        yield from self._check_effects()
        yield from check_reuse(self.program, self.device_plan, self.touched, self.done)

    def _happened_before(self) -> list[int]:
        """For each step, the steps that are done when it starts, as a bit mask."""
        boundary = {op.name for op in self.plan.graph.ops if _is_boundary(op)}
        done: list[int] = []
        last: dict[str, int] = {}
        for step, instruction in enumerate(self.plan.instructions):
            mask = 0
            if not (isinstance(instruction, Run | Recompute) and instruction.op in boundary):
                others = set(self.device_plan.waits[step]) if self.device_plan.waits else set()
                for other in others | ({last[instruction.engine]} if instruction.engine in last else set()):
                    mask |= done[other] | 1 << other
                last[instruction.engine] = step
            done.append(mask)
        return done

    # --- what each step touches

    def _touch(self, step: int, instruction: Instruction, touched: list[Touch]) -> Iterator[RaceFinding]:
        if not isinstance(instruction, Load | Store):
            call = self.calls.get(instruction.op)
            if call is None:
                return
            for name in call.reads:
                yield from self._locate(name, step, self.prescribed[call.name].get(name), None, touched)
            for name in call.writes:
                yield from self._locate(name, step, None, (name, call.name), touched)
        else:
            name = instruction.buffer
            home = self.spaces.setdefault(_home(name), Bytes())
            if isinstance(instruction, Load):
                held = home.ranges[0].content if home.ranges else None
                touched.append(Touch(_home(name), 0, 1))
                yield from self._locate(name, step, None, held or (name, "nothing"), touched)
            else:
                yield from self._locate(name, step, None, None, touched)
                held = self._held(touched[-1]) if touched else None
                touched.append(Touch(_home(name), 0, 1, left=held or (name, "nothing")))

    def _locate(
        self, name: str, step: int, expected: Content | None, left: Content | None, touched: list[Touch]
    ) -> Iterator[RaceFinding]:
        """Where a storage is at a step."""
        stay = next((r for r in self.stays.get(name, ()) if r.begin <= step < r.end), None)
        if stay is not None and stay.offset is not None:
            at = self._at(name, stay)
            touched.append(Touch(at.space, at.begin, at.end, expected, left))
        elif name in self.kept:
            touched.append(Touch(_home(name), 0, 1, expected, left))
        elif self.program.storages[name].nbytes:
            yield RaceFinding(RaceFault.NO_ADDRESS, f"storage {name!r} is used but has no address", step)

    def _at(self, name: str, stay: Residence) -> Touch:
        first = stay.offset or 0
        return Touch(stay.memory, first, first + int(self.program.storages[name].nbytes))

    def _hold(self, touch: Touch, content: Content) -> None:
        space = self.spaces.setdefault(touch.space, Bytes())
        space.take(touch.begin, touch.end)
        space.put([Range(touch.begin, touch.end, content)])

    def _held(self, touch: Touch) -> Content | None:
        """What bytes hold, if it is the same everywhere."""
        space = self.spaces.setdefault(touch.space, Bytes())
        inside = space.take(touch.begin, touch.end)
        space.put(inside)
        return inside[0].content if len({known.content for known in inside}) == 1 else None

    # --- what must hold

    def _replay(self, step: int, touch: Touch) -> Iterator[RaceFinding]:
        space = self.spaces.setdefault(touch.space, Bytes())
        inside = space.take(touch.begin, touch.end)
        unordered = 0
        for known in inside:
            unordered |= known.wrote | (known.read if touch.left else 0)
        unordered &= ~(self.done[step] | 1 << step)
        if unordered:
            message = (
                f"bytes [{touch.begin}, {touch.end}) of {touch.space!r} are {'written' if touch.left else 'read'} "
            )
            message += f"while step {unordered.bit_length() - 1} may still use them"
            yield RaceFinding(RaceFault.UNORDERED_ACCESS, message, step)
        wrong = {known.content for known in inside if touch.expected not in (None, known.content)}
        if wrong and not unordered:
            held = ", ".join(sorted("nothing" if c is None else f"{c[0]!r} of {c[1] or 'the caller'}" for c in wrong))
            assert touch.expected is not None
            message = f"reads {touch.expected[0]!r} as {touch.expected[1] or 'the caller'!r} left it, finds {held}"
            yield RaceFinding(RaceFault.WRONG_VALUE, message, step)
        if touch.left:
            space.put([Range(touch.begin, touch.end, touch.left, 1 << step)])
        else:
            space.put([known._replace(read=known.read | 1 << step) for known in inside])

    def _check_end(self) -> Iterator[RaceFinding]:
        """Outputs, and inputs that were written, hold what the last call left in them."""
        at_home = self.kept | self.host | self.sent
        for name in sorted(self.returned | ((self.kept | self.host) & self.last.keys())):
            stays = self.stays.get(name, [])
            if name in at_home:
                touch = Touch(_home(name), 0, int(bool(self.program.storages[name].nbytes)))
            elif stays and stays[-1].offset is not None:
                touch = self._at(name, stays[-1])
            else:
                continue  # has no bytes, or no address where it was written
            expected = (name, self.last.get(name, ENTRY))
            if touch.begin < touch.end and self._held(touch) != expected:
                message = f"{name!r} does not hold what {expected[1] or 'the caller'!r} left when the program is done"
                yield RaceFinding(RaceFault.WRONG_VALUE, message)

    def _check_effects(self) -> Iterator[RaceFinding]:
        step_of = {i.op: step for step, i in enumerate(self.plan.instructions) if isinstance(i, Run)}
        for before, after in pairwise(call.name for call in self.program.calls if call.effect):
            if not self.done[step_of[after]] >> step_of[before] & 1:
                message = f"{after!r} is not ordered behind {before!r}, whose effect comes first"
                yield RaceFinding(RaceFault.UNORDERED_EFFECTS, message, step_of[after])
        for step, instruction in enumerate(self.plan.instructions):
            if (
                isinstance(instruction, Recompute)
                and instruction.op in self.calls
                and self.calls[instruction.op].effect
            ):
                yield RaceFinding(RaceFault.UNORDERED_EFFECTS, f"{instruction.op!r} has an effect; it runs once", step)


def _home(storage: str) -> str:
    """Where a storage lies that the caller keeps, or the copy in backing memory of any other."""
    return f"home of {storage}"


def _prescribed(program: Program) -> tuple[dict[str, dict[str, Content]], dict[str, str]]:
    """What each call reads in each storage, in program order, and the last writer of each storage."""
    from ..runtime.device.program import Origin

    provided = (Origin.INPUT, Origin.GIVEN, Origin.CONSTANT, Origin.HOST)
    holds = {name: (name, ENTRY) for name, storage in program.storages.items() if storage.origin in provided}
    last: dict[str, str] = {}
    result: dict[str, dict[str, Content]] = {}
    for call in program.calls:
        result[call.name] = {name: holds[name] for name in call.reads if name in holds}
        holds |= {name: (name, call.name) for name in call.writes}
        last |= dict.fromkeys(call.writes, call.name)
    return result, last
