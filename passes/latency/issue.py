"""List scheduling of transfers: which load or store a copy engine takes next, and what memory that leaves."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Sequence

from ...compiler.plan import Load
from ...hw_models.model import Direction, EngineKind
from .transfers import Transfer, TransferProblem

__all__ = ["issue"]


def issue(
    problem: TransferProblem, seconds: Sequence[float], *, held_back: int, halted: Callable[[], bool]
) -> list[int] | None:
    """Steps of the plan in the order in which to issue them; ``seconds`` are those of each step.

    Anchors are issued one by one. Before each, and after the loads it needs, the copy engines are given whatever they
    can start before it finishes: stores whose bytes are final, and loads in the order in which anchors need them, as
    long as there is room for them at every anchor until then. ``held_back`` bytes of that room are left free, for
    fragmentation. Freed bytes count as taken again oldest first, which placements come close to; the simulator has
    the last word. ``None`` when ``halted``.
    """
    return _Issuer(problem, seconds, held_back).run(halted)


class _Issuer:
    def __init__(self, problem: TransferProblem, seconds: Sequence[float], held_back: int) -> None:
        self.problem = problem
        self.seconds = seconds
        self.sequence: list[int] = []
        self.issued: dict[int, float] = {}  # finish of each transfer by step
        engines = problem.plan.machine.engines
        self.copy_free = {e.name: 0.0 for e in engines if e.kind is EngineKind.COPY}
        self.takes = {d: [e.name for e in engines if e.copies(d)] for d in (Direction.LOAD, Direction.STORE)}
        self.compute_free = [0.0] * len(problem.plan.machine.engines_of(EngineKind.COMPUTE))
        self.ready = [0.0] * len(problem.stays)
        self.left = [len(stay.anchors) + len(stay.stores) for stay in problem.stays]
        self.done = [0.0] * len(problem.stays)  # when the last user so far is done
        self.begun = [False] * len(problem.stays)
        self.live = 0
        self.room = [room - held_back for room in problem.room]
        self.free: list[tuple[float, int]] = [(0.0, problem.capacity)]  # bytes, and when they became free
        loads = [t for t in problem.transfers.values() if self._is_load(t)]
        stores = [t for t in problem.transfers.values() if not self._is_load(t)]
        self.loads = deque(sorted(loads, key=lambda t: (t.last, t.step)))
        self.stores = deque(sorted(stores, key=lambda t: (t.first, t.step)))
        self.pending: list[Transfer] = []  # stores whose bytes are final

    def _is_load(self, transfer: Transfer) -> bool:
        return isinstance(self.problem.plan.instructions[transfer.step], Load)

    def run(self, halted: Callable[[], bool]) -> list[int] | None:
        """Issue everything."""
        for anchor in range(len(self.problem.anchors)):
            if halted():
                return None
            self._collect(anchor)
            while self.loads and self.loads[0].last <= anchor:
                self._make_room(self._bytes(self.loads[0]))
                self._issue(self.loads[0])
            begins = sum(self.problem.stays[s].footprint for s in self.problem.touches[anchor] if not self.begun[s])
            self._make_room(begins)
            finish = self._finish(anchor, self._free_from(begins))
            while (transfer := self._next(anchor, begins, finish)) is not None:
                self._issue(transfer)
            self._compute(anchor)
        self._collect(len(self.problem.anchors))
        for transfer in (*self.pending, *self.loads):
            self._issue(transfer)
        return self.sequence

    def _collect(self, slot: int) -> None:
        """Stores whose bytes are final by ``slot`` become pending; those that can wait no longer are issued."""
        while self.stores and self.stores[0].first <= slot:
            self.pending.append(self.stores.popleft())
        for store in [t for t in self.pending if t.last <= slot]:
            self._issue(store)

    def _make_room(self, nbytes: int) -> None:
        """Let pending stores end their stays until ``nbytes`` fit; the plan given fits, so there are enough."""
        while self.live + nbytes > self.problem.capacity and self._flush():
            pass

    def _flush(self) -> bool:
        """Issue the pending store that ends a stay and starts first; False when there is none."""
        ending = [t for t in self.pending if self.left[t.stay] == 1]
        if not ending:
            return False
        self._issue(min(ending, key=lambda t: (self._start(t), t.step)))
        return True

    def _next(self, anchor: int, begins: int, finish: float) -> Transfer | None:
        """What a copy engine starts first, before ``anchor`` is done at ``finish``; ``None`` when that is nothing.

        ``begins`` bytes are begun by the anchor itself.
        """
        found = list(self.pending)
        if self.loads and self._fits(self.loads[0], anchor, begins):
            found.append(self.loads[0])
        best = min(found, key=lambda t: (self._start(t), not self._is_load(t), t.step), default=None)
        return best if best is not None and self._start(best) < finish else None

    def _fits(self, load: Transfer, anchor: int, begins: int) -> bool:
        """Whether a load may be issued before ``anchor`` and its bytes kept until it is used."""
        if load.first > anchor or (load.behind is not None and load.behind not in self.issued):
            return False
        size = self._bytes(load)
        if self.live + begins + size > self.problem.capacity:
            return False
        return min(self.room[anchor : load.last], default=size) >= size

    def _bytes(self, transfer: Transfer) -> int:
        return self.problem.stays[transfer.stay].footprint

    def _engine(self, transfer: Transfer) -> str:
        direction = Direction.LOAD if self._is_load(transfer) else Direction.STORE
        return min(self.takes[direction], key=lambda name: self.copy_free[name])

    def _start(self, transfer: Transfer) -> float:
        waits = [self.copy_free[self._engine(transfer)]]
        if transfer.behind is not None:
            waits.append(self.issued.get(transfer.behind, 0.0))
        waits.append(self._free_from(self._bytes(transfer)) if self._is_load(transfer) else self.ready[transfer.stay])
        return max(waits)

    def _free_from(self, size: int) -> float:
        """When ``size`` bytes are free, the longest free taken first."""
        for moment, nbytes in self.free:
            size -= nbytes
            if size <= 0:
                return moment
        return 0.0

    def _take(self, stay: int) -> float:
        """Begin a stay; returns when its bytes are free."""
        size, moment, emptied = self.problem.stays[stay].footprint, 0.0, 0
        self.begun[stay] = True
        self.live += size
        while size > 0 and emptied < len(self.free):
            moment, nbytes = self.free[emptied]
            size -= nbytes
            emptied += 1
        self.free[:emptied] = [(moment, -size)] if size < 0 else []
        return moment

    def _use(self, stay: int, finish: float) -> None:
        self.left[stay] -= 1
        self.done[stay] = max(self.done[stay], finish)
        self._end(stay)

    def _end(self, stay: int) -> None:
        if self.left[stay] == 0:
            size = self.problem.stays[stay].footprint
            self.live -= size
            bisect.insort(self.free, (self.done[stay], size))

    def _issue(self, transfer: Transfer) -> None:
        engine, start = self._engine(transfer), self._start(transfer)
        finish = start + transfer.seconds
        self.copy_free[engine] = finish
        self.sequence.append(transfer.step)
        self.issued[transfer.step] = finish
        if not self._is_load(transfer):
            self.pending.remove(transfer)
            self._use(transfer.stay, finish)
            return
        self.loads.popleft()  # loads are issued in the order they are needed in
        self._take(transfer.stay)
        self.ready[transfer.stay] = self.done[transfer.stay] = finish
        for anchor in range(len(self.sequence) - len(self.issued), transfer.last):
            self.room[anchor] -= self._bytes(transfer)
        self._end(transfer.stay)

    def _finish(self, anchor: int, free: float) -> float:
        waits = [min(self.compute_free), free, *(self.ready[s] for s in self.problem.touches[anchor])]
        return max(waits) + self.seconds[self.problem.anchors[anchor]]

    def _compute(self, anchor: int) -> None:
        touched = self.problem.touches[anchor]
        finish = self._finish(anchor, max((self._take(s) for s in touched if not self.begun[s]), default=0.0))
        self.compute_free[self.compute_free.index(min(self.compute_free))] = finish
        self.sequence.append(self.problem.anchors[anchor])
        for stay in touched:
            if stay in self.problem.writes[anchor]:
                self.ready[stay] = finish
            self._use(stay, finish)
