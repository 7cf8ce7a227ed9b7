"""Rectangles to pack: residences as lifetimes in steps times bytes in alignment units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ...compiler.plan import Pin, Plan
from ...errors import OptionError
from ...hw_models.model import Memory

__all__ = ["UNBOUNDED", "Packing", "Range"]

#: Two numbers; whether the second is the last that belongs to it or the first that does not, its user says.
Range = tuple[int, int]
UNBOUNDED = 2**60  # an offset, in units, beyond any memory


@dataclass(frozen=True)
class Packing:
    """Item ``i`` is ``plan.residences[i]``: ``units[i]`` alignment units during steps ``begins[i]`` to ``ends[i] - 1``.

    Regions start at multiples of ``alignment`` bytes, so offsets and sizes are counted in units of it, sizes rounded
    up; only the end of the topmost region is counted in bytes (``nbytes``), as no other starts behind it.

    ``windows[i]`` are byte ranges ``[first, behind)`` of the scratchpad, rising and disjoint: the region of item ``i``
    lies inside one of them. They are the ``banks``, or what one of the ``pins``, by buffer, leaves of them.
    """

    names: tuple[str, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    nbytes: tuple[int, ...]
    units: tuple[int, ...]
    alignment: int
    capacity: int
    banks: tuple[Range, ...]
    pins: Mapping[str, Pin]
    windows: tuple[tuple[Range, ...], ...]

    @classmethod
    def of(cls, plan: Plan, pass_name: str) -> Packing:
        """The packing problem of ``plan``'s residences in the machine's scratchpad.

        Raises:
            OptionError: the plan has no residences yet.
        """
        if plan.residences is None:
            raise OptionError(
                f"pass {pass_name} places residences and the plan has none", hint="run a residency pass before it"
            )
        memory = plan.machine.scratchpad_memory
        spans = tuple((r.buffer, r.begin, r.end) for r in plan.residences)
        return cls.of_spans(plan, memory, spans)

    @classmethod
    def of_spans(cls, plan: Plan, memory: Memory, spans: Sequence[tuple[str, int, int]]) -> Packing:
        """The problem of placing buffers of ``plan`` in ``memory``; spans are ``(buffer, begin, end)`` in steps."""
        nbytes = tuple(plan.graph.buffers[buffer].nbytes for buffer, _, _ in spans)
        pins = {pin.buffer: pin for pin in plan.pins}
        banks = memory.banks
        return cls(
            names=tuple(buffer for buffer, _, _ in spans),
            begins=tuple(begin for _, begin, _ in spans),
            ends=tuple(end for _, _, end in spans),
            nbytes=nbytes,
            units=tuple(-(-size // memory.alignment_bytes) for size in nbytes),
            alignment=memory.alignment_bytes,
            capacity=memory.capacity_bytes,
            banks=banks,
            pins=MappingProxyType(pins),
            windows=tuple(
                _pinned(pins[buffer], size, memory) if buffer in pins else banks
                for (buffer, _, _), size in zip(spans, nbytes, strict=True)
            ),
        )

    @property
    def items(self) -> range:
        """All items."""
        return range(len(self.names))

    def offsets(self, item: int, capacity: int) -> tuple[Range, ...]:
        """Where ``item`` may begin so that it ends within ``capacity`` bytes: ranges of units, last one included."""
        found = []
        for first, behind in self.windows[item]:
            low = -(-first // self.alignment)
            high = (min(behind, capacity) - self.nbytes[item]) // self.alignment
            if low <= high:
                found.append((low, high))
        return tuple(found)

    def lies_within(self, item: int, offset: int, capacity: int) -> bool:
        """Whether ``item`` may begin at ``offset``, in units, when all is to end within ``capacity`` bytes."""
        return any(low <= offset <= high for low, high in self.offsets(item, capacity))

    def is_fixed(self, item: int) -> bool:
        """Whether a pin leaves ``item`` one offset at most."""
        return sum(high - low + 1 for low, high in self.offsets(item, self.capacity)) <= 1

    def divisor(self, items: Iterable[int]) -> int:
        """A number of units that divides the sizes of ``items`` and where their windows begin; 1 at least.

        Once all lie as low as they can, each on the floor of a window or on another item, it divides their offsets.
        """
        chosen = tuple(items)
        lows = {low for i in chosen for low, _ in self.offsets(i, self.capacity)}
        return math.gcd(*(self.units[i] for i in chosen), *lows) or 1

    def arena_bytes(self, items: Iterable[int], offsets: Iterable[int]) -> int:
        """End of the highest of ``items`` in bytes, each at its offset in units."""
        return max((o * self.alignment + self.nbytes[i] for i, o in zip(items, offsets, strict=True)), default=0)

    def grain(self, items: Sequence[int]) -> int:
        """A number of bytes that every arena of ``items`` is a multiple of, once all lie as low as they can."""
        if any(self.nbytes[i] != self.units[i] * self.alignment for i in items):
            return 1
        return self.alignment * self.divisor(items)

    def together_bytes(self, items: Iterable[int]) -> int:
        """Least arena of ``items`` that are all resident at one step: the one with the most padding lies on top."""
        chosen = tuple(items)
        padded = sum(self.units[i] for i in chosen) * self.alignment
        return padded - max((self.units[i] * self.alignment - self.nbytes[i] for i in chosen), default=0)

    def least_end(self, items: Iterable[int]) -> int:
        """Bytes below which some of ``items`` cannot end, each taken by itself; 0 for those without any place."""
        ends = ((self.offsets(i, self.capacity), self.nbytes[i]) for i in items)
        return max((ranges[0][0] * self.alignment + size for ranges, size in ends if ranges), default=0)

    def fullest_step(self, items: Iterable[int] | None = None) -> tuple[int, tuple[int, ...]]:
        """A lower bound on the arena of ``items`` (all by default), in bytes, and the items resident at its step."""
        order = sorted(self.items if items is None else items, key=lambda i: (self.begins[i], i))
        best: int = 0
        where: tuple[int, ...] = ()
        live: list[int] = []
        for position, item in enumerate(order):
            live.append(item)
            if position + 1 < len(order) and self.begins[order[position + 1]] == self.begins[item]:
                continue
            live = [i for i in live if self.ends[i] > self.begins[item]]
            least = self.together_bytes(live)
            if least > best:
                best, where = least, tuple(live)
        return best, where

    def components(self) -> list[list[int]]:
        """Items in groups that share no step with one another, by first step; each can be packed by itself."""
        groups: list[list[int]] = []
        free_from = -1
        for item in sorted(self.items, key=lambda i: (self.begins[i], i)):
            if not groups or self.begins[item] >= free_from:
                groups.append([])
            groups[-1].append(item)
            free_from = max(free_from, self.ends[item])
        return groups

    def overlap(self, first: int, second: int) -> bool:
        """Whether two items share a step."""
        return self.begins[first] < self.ends[second] and self.begins[second] < self.ends[first]


def _pinned(pin: Pin, nbytes: int, memory: Memory) -> tuple[Range, ...]:
    """What ``pin`` leaves of the banks to a buffer of ``nbytes``; nothing, if it asks for what there is not."""
    found = []
    for bank, (first, behind) in enumerate(memory.banks):
        if pin.bank in (None, bank):
            if pin.offset is None:
                found.append((first, behind))
            elif first <= pin.offset and pin.offset + nbytes <= behind and pin.offset % memory.alignment_bytes == 0:
                found.append((pin.offset, pin.offset + nbytes))
    return tuple(found)
