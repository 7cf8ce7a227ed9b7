"""Linear allocation with replacement: the baselines that COSMA is measured against."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

from ...compiler.pipeline import Budget, Decision
from ...compiler.plan import Plan, Run
from ...errors import Infeasible, OptionError
from ...hw_models.model import aligned_bytes
from ..residency.emit import emit
from ..residency.gaps import Gap, GapProblem, Lifetime
from ..residency.workset import require_fit

__all__ = ["LinearAllocation"]


@dataclass(frozen=True)
class LinearAllocation:
    """Give each buffer an address when it first comes up, and replace others where no gap is large enough.

    *Given* a plan with an order. *Result*: loads, stores, residences and their offsets. Buffers are placed as
    TensorFlow Lite's ``SimpleMemoryArena`` does, operator by operator: in the smallest gap between those in place that
    holds them, else on top, at the machine's alignment; they stay where they are until their last use.

    COSMA's baselines (arXiv 2311.18246) add replacement: if nothing fits below the capacity, buffers that the operator
    does not touch are evicted, by ``evict``: ``belady`` takes the furthest next use until a gap is large enough (the
    larger of equals), ``greedy`` the fewest bytes that make such a gap, exactly, since what makes one is a run of
    neighbours. Where the operator's own operands lie in the way, these baselines fail; ``give_up`` does so too.
    Without it everything is evicted there, and the operator's buffers are laid side by side afresh.
    """

    evict: Literal["belady", "greedy"] = "belady"
    give_up: bool = False

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "joint/linear"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Decide residency and addresses in one walk over the order, whatever the budget.

        Raises:
            OptionError: the scratchpad has banks, or the plan has pins: this allocator knows neither.
            Infeasible: as ``require_fit``; with ``give_up`` also where an operator's operands leave no gap for another.
        """
        if plan.pins or plan.machine.scratchpad_memory.banks_bytes:
            raise OptionError(
                f"pass {self.name!r} knows neither pins nor banks, and the plan has {'pins' if plan.pins else 'banks'}",
                hint="joint/cosma and the address passes honour them",
            )
        require_fit(plan)
        gaps = GapProblem.of(plan)
        walk = _Walk(self, plan, gaps)
        for position, op in enumerate(plan.order):
            walk.run(position, op)
        dropped = {gaps.index[gap] for gap in walk.dropped}
        note = f"layouts begun afresh because operands were in the way: {walk.fresh}" if walk.fresh else ""
        return Decision(_at(emit(plan, gaps, dropped), walk.offsets), gaps.certificate(dropped), note)


class _Region(NamedTuple):
    """Bytes ``offset`` to ``end - 1``, padding included, of ``buffer``; ordered by offset."""

    offset: int
    end: int
    buffer: str


@dataclass
class _Walk:
    """The arena while the order is walked, the gaps dropped so far, and each residence's offset by its first use."""

    options: LinearAllocation
    plan: Plan
    gaps: GapProblem
    dropped: set[Gap] = field(default_factory=set)
    offsets: dict[tuple[str, int], int] = field(default_factory=dict)
    fresh: int = 0

    def __post_init__(self) -> None:
        memory = self.plan.machine.scratchpad_memory
        self.capacity, self.alignment = memory.capacity_bytes, memory.alignment_bytes
        self.lifetimes: dict[str, Lifetime] = {lifetime.buffer: lifetime for lifetime in self.gaps.lifetimes}
        self.regions: list[_Region] = []

    def run(self, position: int, op: int) -> None:
        """Place what the operator lacks, and free what nobody uses after it."""
        touched = [buffer for buffer in self.plan.graph.touches[op] if buffer in self.lifetimes]
        present = {region.buffer for region in self.regions}
        for buffer in touched:
            if buffer not in present and not self._place(buffer, position, touched):
                self._lay_afresh(touched, position, op, buffer)
                break
        self.regions = [r for r in self.regions if self.lifetimes[r.buffer].positions[-1] > position]

    def _place(self, buffer: str, position: int, touched: Sequence[str]) -> bool:
        """Whether ``buffer`` could be placed, with or without evicting others than those ``touched``."""
        nbytes = self.lifetimes[buffer].nbytes
        offset = self._smallest_gap(nbytes)
        if offset is None:
            victims = (_furthest if self.options.evict == "belady" else _fewest_bytes)(self, nbytes, position, touched)
            for victim in victims:
                self._evict(victim, position)
            offset = self._smallest_gap(nbytes)
        if offset is None:
            return False
        self._put(buffer, offset, position)
        return True

    def _smallest_gap(self, nbytes: int, without: Sequence[_Region] = ()) -> int | None:
        """Offset of the smallest gap that holds ``nbytes``, or on top of all, ``without`` some regions."""
        size = aligned_bytes(nbytes, self.alignment)
        best: tuple[int, int] | None = None
        top = 0
        for region in self.regions:
            if region in without:
                continue
            if region.offset - top >= size and (best is None or region.offset - top < best[0]):
                best = region.offset - top, top
            top = region.end
        if best is not None:
            return best[1]
        return top if top + nbytes <= self.capacity else None

    def _put(self, buffer: str, offset: int, position: int) -> None:
        end = offset + aligned_bytes(self.lifetimes[buffer].nbytes, self.alignment)
        bisect.insort(self.regions, _Region(offset, end, buffer))
        self.offsets[buffer, position] = offset

    def _evict(self, region: _Region, position: int) -> None:
        """Drop the gap that ends with the buffer's next use, at ``position`` or later."""
        self.regions.remove(region)
        self.dropped.add(Gap(region.buffer, bisect.bisect_left(self.lifetimes[region.buffer].positions, position) - 1))

    def next_use(self, region: _Region, position: int) -> int:
        """Position of the first use of a region's buffer from ``position`` on."""
        positions = self.lifetimes[region.buffer].positions
        return positions[bisect.bisect_left(positions, position)]

    def nbytes(self, region: _Region) -> int:
        """Bytes of a region's buffer, without padding."""
        return self.lifetimes[region.buffer].nbytes

    def _lay_afresh(self, touched: Sequence[str], position: int, op: int, missing: str) -> None:
        """Evict everything and lay the operator's buffers side by side, the most padded one last."""
        if self.options.give_up:
            raise self._failure(op, missing)
        self.fresh += 1
        for region in list(self.regions):
            if (region.buffer, position) in self.offsets:  # placed for this operator a moment ago
                self.regions.remove(region)
            else:
                self._evict(region, position)
        sizes = {buffer: self.lifetimes[buffer].nbytes for buffer in touched}
        offset = 0
        for buffer in sorted(touched, key=lambda b: aligned_bytes(sizes[b], self.alignment) - sizes[b]):
            self._put(buffer, offset, position)
            offset += aligned_bytes(sizes[buffer], self.alignment)

    def _failure(self, op: int, missing: str) -> Infeasible:
        nbytes = self.lifetimes[missing].nbytes
        held = ", ".join(f"{r.buffer!r} in [{r.offset}, {r.end})" for r in self.regions)
        required = max((region.end for region in self.regions), default=0) + nbytes
        return Infeasible(
            f"linear allocation finds no gap of {nbytes} bytes for {missing!r} of operator "
            f"{self.plan.graph.ops[op].name!r}, whose operands hold {held} of {self.capacity}",
            required_bytes=required,
            available_bytes=self.capacity,
            hint="give_up=False lays the operator's buffers out afresh; joint/cosma chooses addresses together",
        )


def _furthest(walk: _Walk, nbytes: int, position: int, touched: Sequence[str]) -> list[_Region]:
    """Victims in the order of their next use, the furthest first, until there is a gap."""
    victims: list[_Region] = []
    candidates = [region for region in walk.regions if region.buffer not in touched]
    for region in sorted(candidates, key=lambda r: (-walk.next_use(r, position), -walk.nbytes(r), r)):
        victims.append(region)
        if walk._smallest_gap(nbytes, victims) is not None:
            break
    return victims


def _fewest_bytes(walk: _Walk, nbytes: int, position: int, touched: Sequence[str]) -> list[_Region]:
    """The neighbours of fewest bytes whose eviction makes a gap; of equals, those needed again the latest.

    Everything that may go, if no run of neighbours is enough.
    """
    size = aligned_bytes(nbytes, walk.alignment)
    best: tuple[tuple[int, int], list[_Region]] | None = None
    for first in range(len(walk.regions)):
        floor = walk.regions[first - 1].end if first else 0
        run: list[_Region] = []
        for behind, region in enumerate(walk.regions[first:], start=first + 1):
            if region.buffer in touched:
                break
            run.append(region)
            is_last = behind == len(walk.regions)
            if floor + nbytes <= walk.capacity if is_last else floor + size <= walk.regions[behind].offset:
                key = sum(map(walk.nbytes, run)), -min(walk.next_use(r, position) for r in run)
                if best is None or key < best[0]:
                    best = key, run
                break
    return [region for region in walk.regions if region.buffer not in touched] if best is None else best[1]


def _at(plan: Plan, offsets: dict[tuple[str, int], int]) -> Plan:
    """``plan`` with the offset of each residence, given by buffer and position of the first operator inside it."""
    runs = [step for step, instruction in enumerate(plan.instructions) if isinstance(instruction, Run)]
    residences = tuple(
        msgspec.structs.replace(r, offset=offsets[r.buffer, bisect.bisect_left(runs, r.begin)])
        for r in plan.residences or ()
    )
    return msgspec.structs.replace(plan, residences=residences)
