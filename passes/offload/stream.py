"""Streaming weights behind compute, as a fluid: which ones stay, and how long a call then takes at least.

Positions are those of one order. Loads come in the order of first use, as far ahead as there is room.
``docs/formulations/offload.md`` has the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...compiler.graph import Graph
from ...compiler.plan import Plan
from ...compiler.simulate import simulate
from ...hw_models.cost import transfer_seconds
from ...hw_models.model import Direction, HardwareModel, aligned_bytes

__all__ = ["Source", "Stream"]

LEVELS = 24  # sizes of the resident part that the greedy choice tries


@dataclass(frozen=True)
class Source:
    """A buffer in host memory: ``nbytes``, ``footprint`` as aligned, ``seconds`` of its load, positions that use it.

    One that is a ``candidate`` may stay on the device between calls.
    """

    name: str
    nbytes: int
    footprint: int
    seconds: float
    positions: tuple[int, ...]
    candidate: bool


@dataclass(frozen=True)
class Stream:
    """Sources in the order of first use, ``compute`` seconds by position, and what memory they have.

    ``held`` are bytes by position that are neither sources nor available to them; ``capacity`` bytes are there for
    residents, for what is held, and for what is loaded. ``bandwidth`` is that of all engines that load, in bytes/s.
    """

    sources: tuple[Source, ...]
    compute: tuple[float, ...]
    held: tuple[int, ...]
    capacity: int
    bandwidth: float

    @classmethod
    def of(
        cls,
        graph: Graph,
        machine: HardwareModel,
        order: Sequence[int],
        capacity: int,
        candidates: Collection[str],
        *,
        keep: bool,
        staying: Collection[str] = (),
    ) -> Stream:
        """The stream of ``graph`` in ``order``.

        Buffers in ``staying`` are held from first to last use; others just while they are used, unless told to
        ``keep`` them.
        """
        plan = simulate(Plan.of_order(graph, machine, order))
        compute = tuple((run.finish_s or 0.0) - (run.start_s or 0.0) for run in plan.instructions)
        loaders = [engine for engine in machine.engines if engine.copies(Direction.LOAD)]
        uses: dict[str, list[int]] = {}
        for position, op in enumerate(order):
            for buffer in graph.touches[op]:
                uses.setdefault(buffer, []).append(position)
        alignment = machine.scratchpad_memory.alignment_bytes
        held = [0] * (len(order) + 1)
        sources = []
        for name, positions in uses.items():
            base = graph.buffers[name]
            footprint = aligned_bytes(base.nbytes, alignment)
            if base.role.is_source and base.nbytes:
                seconds = min(transfer_seconds(base.nbytes, engine) for engine in loaders) / len(loaders)
                sources.append(Source(name, base.nbytes, footprint, seconds, tuple(positions), name in candidates))
                continue
            stays = keep or name in staying
            for position in range(positions[0], positions[-1] + 1) if stays else positions:
                held[position] += footprint
        bandwidth = sum(engine.bandwidth_bytes_per_s or 0.0 for engine in loaders)
        return cls(tuple(sources), compute, tuple(held[:-1]), capacity, bandwidth)

    @cached_property
    def first_used(self) -> tuple[tuple[int, ...], ...]:
        """Sources (indices) by the position that uses them first."""
        found: list[list[int]] = [[] for _ in self.compute]
        for index, source in enumerate(self.sources):
            found[source.positions[0]].append(index)
        return tuple(map(tuple, found))

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """Sources by the positions that use them."""
        found: list[list[int]] = [[] for _ in self.compute]
        for index, source in enumerate(self.sources):
            for position in source.positions:
                found[position].append(index)
        return tuple(map(tuple, found))

    def with_capacity(self, capacity: int) -> Stream:
        """The same in another memory."""
        return Stream(self.sources, self.compute, self.held, capacity, self.bandwidth)

    def rooms(self, resident: Collection[int]) -> list[int]:
        """Bytes left at each position for what is used later, with the sources ``resident`` on the device."""
        left = self.capacity - sum(self.sources[i].footprint for i in resident)
        return [
            left - held - sum(self.sources[i].footprint for i in users if i not in resident)
            for held, users in zip(self.held, self.users, strict=True)
        ]

    def latency_s(self, resident: Collection[int]) -> float | None:
        """Seconds a call takes with these residents, each load issued once there is room for all of its bytes.

        ``None`` where they leave too little room. A load is issued as late as the copy engine can take it, and waits
        until, from then to its use, no operator needs its place; the bytes may lie anywhere.
        """
        rooms = self.rooms(resident)
        if min(rooms, default=0) < 0:
            return None
        finish = [0.0] * (len(self.compute) + 1)  # of position k - 1 at index k
        copied = 0.0
        for position, compute in enumerate(self.compute):
            for i in self.first_used[position]:
                if i in resident:
                    continue
                source = self.sources[i]
                slot = position
                while finish[slot] > copied and rooms[slot - 1] >= source.footprint:
                    slot -= 1
                    rooms[slot] -= source.footprint
                copied = max(copied, finish[slot]) + source.seconds
            finish[position + 1] = max(finish[position], copied) + compute
        return finish[-1]

    def fluid_s(self, resident: Collection[int]) -> float | None:
        """Seconds a call takes at least with these residents, were loads divisible; ``None`` as in ``latency_s``."""
        rooms = self.rooms(resident)
        if min(rooms, default=0) < 0:
            return None
        now = seconds = window = 0.0
        nbytes = 0
        for position, compute in enumerate(self.compute):
            for i in self.first_used[position]:
                if i not in resident:
                    seconds += self.sources[i].seconds
                    nbytes += self.sources[i].nbytes
            now = max(now, seconds, window + nbytes / self.bandwidth) + compute
            window = max(window, now - (nbytes + rooms[position]) / self.bandwidth)
        return now

    def greedy(self) -> set[frozenset[int]]:
        """Choices of residents, found in milliseconds, of which some are good."""
        return {choice for level in range(LEVELS + 1) for choice in self._choices(level)}

    def _choices(self, level: int) -> Iterator[frozenset[int]]:
        """Residents in a ``level``-th part of the memory: whatever a call would wait for, then the largest."""
        spare = min(self.rooms([i for i, s in enumerate(self.sources) if s.candidate]) or [0], default=0)
        total = sum(source.footprint for source in self.sources if source.candidate)
        left = min(total, total + spare) if spare < 0 else total
        left = max(0, left) * level // LEVELS
        chosen: set[int] = set()
        now = seconds = 0.0
        for position, compute in enumerate(self.compute):
            for i in self.first_used[position]:
                source = self.sources[i]
                if not source.candidate or seconds + source.seconds <= now or source.footprint > left:
                    seconds += source.seconds
                else:
                    chosen.add(i)
                    left -= source.footprint
            now = max(now, seconds) + compute
        yield frozenset(chosen)
        for i in sorted(range(len(self.sources)), key=lambda i: (-self.sources[i].nbytes, i)):
            source = self.sources[i]
            if source.candidate and i not in chosen and source.footprint <= left:
                chosen.add(i)
                left -= source.footprint
        yield frozenset(chosen)
