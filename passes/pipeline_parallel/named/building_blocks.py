"""V-Min and V-Half: one microbatch's places over a V, repeated, and pulled together at both ends.

Qi et al., Pipeline Parallelism with Controllable Memory, arXiv 2405.15362. A building block says at which slot each
rank does F and I of its two chunks; every six slots (two F, I and W of a slot each) it begins again, so that what a
rank holds follows from the block alone. W goes where the rank is free. Both ends of the step then have holes:
microbatches of the ends move to earlier slots as far as operands and the peak allow it, twice (first with W in place,
then without), and the ranks do all in the order of the slots. The offsets are the paper's; the procedure is that of the
authors' implementation, understood and written anew.
"""

from __future__ import annotations

from collections.abc import Callable

from ....compiler.pipelining.schedule import Action, ActionKind
from .layout import Layout, Order, Orders

__all__ = ["PERIOD", "half_block", "least_block", "v_half", "v_min"]

#: Slots from one microbatch to the next.
PERIOD = 6
_STEPS = 4  # F down, F up, I up, I down: a microbatch's way through a rank
_WEIGHT = 4

_Places = list[list[int]]  # of a rank: by step, the slot of each microbatch; W besides, where they have one


def v_min(layout: Layout) -> Orders:
    """Least memory over a V: about a third of 1F1B's. Idles much unless F, I and W take as long."""
    return _built(layout, least_block)


def v_half(layout: Layout) -> Orders:
    """Half of 1F1B's memory, and about half of its bubble."""
    return _built(layout, half_block)


def least_block(rank: int, ranks: int) -> tuple[int, int, int, int]:
    """V-Min's slots of F down, F up, I up and I down of the first microbatch."""
    gap = 2 if ranks % 3 == 0 else 0  # else two actions would meet in one slot
    return rank, 2 * ranks - rank - 1, 2 * ranks + gap + rank, 4 * ranks + gap - rank - 1


def half_block(rank: int, ranks: int) -> tuple[int, int, int, int]:
    """V-Half's, likewise."""
    gap = 0 if ranks % 2 else 3
    return 2 * rank, 3 * ranks - rank - 2, 3 * ranks + gap + 2 * rank - 1, 6 * ranks + gap - rank - 2


def _built(layout: Layout, block: Callable[[int, int], tuple[int, int, int, int]]) -> Orders:
    starts = range(0, PERIOD * layout.microbatches, PERIOD)
    places = [[[offset + start for start in starts] for offset in block(r, layout.ranks)] for r in range(layout.ranks)]
    places = _squeezed(_pulled([[*rank, _holes(rank)] for rank in places]))
    places = _squeezed([[*rank, _holes(rank)] for rank in _pulled([rank[:_STEPS] for rank in places])])
    return tuple(_ordered(layout, rank, own[:_STEPS]) for rank, own in enumerate(places))


def _by_slot(places: _Places) -> list[int | None]:
    """The step of each slot, ``None`` where the rank does none."""
    steps: list[int | None] = [None] * (1 + max(slots[-1] for slots in places))
    for step, slots in enumerate(places):
        for slot in slots:
            steps[slot] = step
    return steps


def _holes(places: _Places) -> list[int]:
    """Slots of W: each in the first free slot behind an I."""
    pending, slots = 0, []
    steps = _by_slot(places)
    for slot, step in enumerate(steps):
        if step is not None:
            pending += step >= 2
        elif pending:
            slots.append(slot)
            pending -= 1
    return slots + list(range(len(steps), len(steps) + pending))


class _Line:
    """What a rank does in each slot, and how many forwards whose W is still to come it holds behind it.

    W that have no place are in the first free slots behind their I; then ``pending`` are those still to come.
    """

    def __init__(self, places: _Places) -> None:
        self.steps = _by_slot(places)
        self.placed = len(places) > _STEPS
        self.states: list[tuple[int, int]] = []
        for slot in range(len(self.steps)):
            self.states.append(self.behind(slot, self.states[-1] if slot else (0, 0)))

    def behind(self, slot: int, state: tuple[int, int]) -> tuple[int, int]:
        held, pending = state
        step = self.steps[slot]
        if step is None:
            return (held - 1, pending - 1) if pending else state
        if step == _WEIGHT:
            return held - 1, pending
        return (held + 1, pending) if step < 2 else (held, pending + (not self.placed))

    @property
    def peak(self) -> int:
        return max(held for held, _ in self.states)

    def move(self, slot: int, earlier: int, limit: int) -> bool:
        """Move what is in ``slot`` to ``earlier``, which is free, unless more than ``limit`` would be held."""
        self.steps[earlier], self.steps[slot] = self.steps[slot], None
        state, changed = self.states[earlier - 1] if earlier else (0, 0), []
        for index in range(earlier, len(self.steps)):
            state = self.behind(index, state)
            if state[0] > limit:
                self.steps[slot], self.steps[earlier] = self.steps[earlier], None
                return False
            if index >= slot and state == self.states[index]:
                break
            changed.append(state)
        self.states[earlier : earlier + len(changed)] = changed
        return True


def _in_order(places: list[_Places]) -> list[tuple[int, int, int, int]]:
    """All actions by slot, rank, step and microbatch."""
    return sorted(
        (slot, rank, step, number)
        for rank, own in enumerate(places)
        for step, slots in enumerate(own)
        for number, slot in enumerate(slots)
    )


def _earliest(places: list[_Places], rank: int, step: int, number: int) -> int:
    """The first slot behind all that an action follows, the same step of the microbatch before it among them."""
    own = places[rank]
    before = [own[step][number - 1]] if number else []
    if step == _WEIGHT:
        before.append(sorted(own[2] + own[3])[number])
    else:
        other = rank - 1 if step in (0, 2) else rank + 1
        if 0 <= other < len(places):
            before.append(places[other][step][number])
        if step:
            before.append(own[step - 1][number])
    return max(before, default=-1) + 1


def _pulled(places: list[_Places]) -> list[_Places]:
    """What is behind the last forward on its way down moved to earlier slots; what is before the first I back, too.

    The latter only if W have places: without, what they free could not be told yet.
    """
    places = [[list(slots) for slots in own] for own in places]
    lines = [_Line(own) for own in places]
    limit = max(line.peak for line in lines)
    last = len(places[0][0]) - 1
    phase = "warm-up"
    for slot, rank, step, number in _in_order(places):
        if phase == "warm-up" and rank == 0 and step == 3:
            phase = "steady"
        if phase == "cool-down" or (phase == "warm-up" and lines[0].placed):
            earliest = _earliest(places, rank, step, number)
            free = (at for at in range(earliest, slot) if lines[rank].steps[at] is None)
            places[rank][step][number] = next((at for at in free if lines[rank].move(slot, at, limit)), slot)
        elif phase == "steady" and step == 0 and number == last:
            phase = "cool-down"
    return places


def _squeezed(places: list[_Places]) -> list[_Places]:
    """All at the first slot that their order on the rank allows."""
    found: list[_Places] = [[[] for _ in own] for own in places]
    free = [0] * len(places)
    for _, rank, step, number in _in_order(places):
        slot = free[rank]
        if step != _WEIGHT:  # W is behind its I in the rank's order
            slot = max(slot, _earliest(found, rank, step, number))
        found[rank][step].append(slot)
        free[rank] = slot + 1
    return found


def _ordered(layout: Layout, rank: int, places: _Places) -> tuple[Action, ...]:
    """What a rank does: steps by slot, W in the free ones, first of the last chunk."""
    down, up = layout.stages[rank]
    order = Order(rank, layout)
    pending = {up: 0, down: 0}
    for step in _by_slot(places):
        if step is None:
            stage = next((stage for stage, count in pending.items() if count), None)
            if stage is not None:
                order.add(ActionKind.WEIGHT_GRADIENT, stage)
                pending[stage] -= 1
            continue
        stage = up if step in (1, 2) else down
        order.add(ActionKind.FORWARD if step < 2 else ActionKind.INPUT_GRADIENT, stage)
        pending[stage] += step >= 2
    for stage, count in pending.items():
        order.add_all(count, (ActionKind.WEIGHT_GRADIENT, stage))
    return order.actions()
