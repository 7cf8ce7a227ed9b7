"""Rectangles to pack: residences as lifetimes in steps times bytes in alignment units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...compiler.plan import Plan
from ...errors import OptionError

__all__ = ["Packing"]


@dataclass(frozen=True)
class Packing:
    """Item ``i`` is ``plan.residences[i]``: ``units[i]`` alignment units during steps ``begins[i]`` to ``ends[i] - 1``.

    Regions start at multiples of ``alignment`` bytes, so offsets and sizes are counted in units of it, sizes rounded
    up; only the end of the topmost region is counted in bytes (``nbytes``), as no other starts behind it.
    """

    names: tuple[str, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    nbytes: tuple[int, ...]
    units: tuple[int, ...]
    alignment: int
    capacity: int

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
        nbytes = tuple(plan.graph.buffers[r.buffer].nbytes for r in plan.residences)
        return cls(
            names=tuple(r.buffer for r in plan.residences),
            begins=tuple(r.begin for r in plan.residences),
            ends=tuple(r.end for r in plan.residences),
            nbytes=nbytes,
            units=tuple(-(-size // memory.alignment_bytes) for size in nbytes),
            alignment=memory.alignment_bytes,
            capacity=memory.capacity_bytes,
        )

    @property
    def items(self) -> range:
        """All items."""
        return range(len(self.names))

    def highest_offset(self, item: int, capacity: int) -> int:
        """Largest offset, in units, at which ``item`` ends within ``capacity`` bytes; negative if there is none."""
        return (capacity - self.nbytes[item]) // self.alignment

    def arena_bytes(self, items: Iterable[int], offsets: Iterable[int]) -> int:
        """End of the highest of ``items`` in bytes, each at its offset in units."""
        return max((o * self.alignment + self.nbytes[i] for i, o in zip(items, offsets, strict=True)), default=0)

    def grain(self, items: Sequence[int]) -> int:
        """A number of bytes that every arena of ``items`` is a multiple of, once all lie as low as they can."""
        if any(self.nbytes[i] != self.units[i] * self.alignment for i in items):
            return 1
        return self.alignment * math.gcd(*(self.units[i] for i in items))

    def together_bytes(self, items: Iterable[int]) -> int:
        """Least arena of ``items`` that are all resident at one step: the one with the most padding lies on top."""
        chosen = tuple(items)
        padded = sum(self.units[i] for i in chosen) * self.alignment
        return padded - max((self.units[i] * self.alignment - self.nbytes[i] for i in chosen), default=0)

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
