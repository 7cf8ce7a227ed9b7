"""List scheduling of transfers: which load or store a copy engine takes next, and what memory that leaves."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence

from ...compiler.plan import Load
from ...hw_models.model import Direction, EngineKind
from .memory import Scratchpad
from .transfers import Transfer, TransferProblem

__all__ = ["issue"]


def issue(
    problem: TransferProblem, seconds: Sequence[float], scratchpad: Scratchpad, halted: Callable[[], bool]
) -> list[int] | None:
    """Steps of the plan in the order in which to issue them; ``seconds`` are those of each step.

    Anchors are issued one by one. Before each, and after the loads it needs, the copy engines are given whatever they
    can start before it finishes: stores whose bytes are final, and loads in the order in which anchors need them, as
    long as ``scratchpad`` admits them. ``None`` when ``halted``.
    """
    return _Issuer(problem, seconds, scratchpad).run(halted)


class _Issuer:
    def __init__(self, problem: TransferProblem, seconds: Sequence[float], scratchpad: Scratchpad) -> None:
        self.problem = problem
        self.seconds = seconds
        self.scratchpad = scratchpad
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
                self._make_room((self.loads[0].stay,))
                self._issue(self.loads[0])
            begins = [s for s in self.problem.touches[anchor] if not self.begun[s]]
            self._make_room(begins)
            finish = self._finish(anchor, self.scratchpad.free_from(begins))
            while (transfer := self._next(anchor, begins, finish)) is not None:
                self._issue(transfer)
            self._compute(anchor, begins)
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

    def _make_room(self, stays: Sequence[int]) -> None:
        """Issue pending stores whose stays end with them and are in the way; in the plan given, all came before."""
        while crowd := self.scratchpad.in_the_way(stays):
            stores = Counter(t.stay for t in self.pending)
            ending = [t for t in self._open() if t.stay in crowd and self.left[t.stay] == stores[t.stay]]
            if not ending:
                return
            self._issue(min(ending, key=lambda t: (self._start(t), t.step)))

    def _open(self) -> list[Transfer]:
        """Pending stores that wait for no other transfer of their buffer."""
        return [t for t in self.pending if t.behind is None or t.behind in self.issued]

    def _next(self, anchor: int, begins: Sequence[int], finish: float) -> Transfer | None:
        """What a copy engine starts first, before ``anchor`` is done at ``finish``; ``None`` when that is nothing."""
        found = self._open()
        if self.loads and self._may_load(self.loads[0], anchor, begins):
            found.append(self.loads[0])
        best = min(found, key=lambda t: (self._start(t), not self._is_load(t), t.step), default=None)
        return best if best is not None and self._start(best) < finish else None

    def _may_load(self, load: Transfer, anchor: int, begins: Sequence[int]) -> bool:
        if load.first > anchor or (load.behind is not None and load.behind not in self.issued):
            return False
        return self.scratchpad.admits(load, anchor, begins)

    def _engine(self, transfer: Transfer) -> str:
        direction = Direction.LOAD if self._is_load(transfer) else Direction.STORE
        return min(self.takes[direction], key=lambda name: self.copy_free[name])

    def _start(self, transfer: Transfer) -> float:
        waits = [self.copy_free[self._engine(transfer)]]
        if transfer.behind is not None:
            waits.append(self.issued.get(transfer.behind, 0.0))
        waits.append(
            self.scratchpad.free_from((transfer.stay,)) if self._is_load(transfer) else self.ready[transfer.stay]
        )
        return max(waits)

    def _use(self, stay: int, finish: float) -> None:
        self.left[stay] -= 1
        self.done[stay] = max(self.done[stay], finish)
        self._end(stay)

    def _end(self, stay: int) -> None:
        if self.left[stay] == 0:
            self.scratchpad.end(stay, self.done[stay])

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
        self._begin(transfer.stay, len(self.sequence) - len(self.issued))
        self.ready[transfer.stay] = self.done[transfer.stay] = finish
        self._end(transfer.stay)

    def _begin(self, stay: int, anchor: int) -> float:
        self.begun[stay] = True
        return self.scratchpad.take(stay, anchor)

    def _finish(self, anchor: int, free: float) -> float:
        waits = [min(self.compute_free), free, *(self.ready[s] for s in self.problem.touches[anchor])]
        return max(waits) + self.seconds[self.problem.anchors[anchor]]

    def _compute(self, anchor: int, begins: Sequence[int]) -> None:
        finish = self._finish(anchor, max((self._begin(stay, anchor) for stay in begins), default=0.0))
        self.compute_free[self.compute_free.index(min(self.compute_free))] = finish
        self.sequence.append(self.problem.anchors[anchor])
        for stay in self.problem.touches[anchor]:
            if stay in self.problem.writes[anchor]:
                self.ready[stay] = finish
            self._use(stay, finish)
