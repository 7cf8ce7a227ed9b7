"""A machine: memories, engines and links, with the unit in every field's name."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated

import msgspec

from ..errors import MachineError

__all__ = ["Direction", "Engine", "EngineKind", "HardwareModel", "Link", "Memory"]

#: Beyond any machine, and far enough below 2**63 that sums of a few such sizes stay exact in 64 bits.
LARGEST_MEMORY_BYTES = 2**60

PositiveInt = Annotated[int, msgspec.Meta(gt=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
NonNegativeFloat = Annotated[float, msgspec.Meta(ge=0)]


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An addressable memory; regions in it start at multiples of ``alignment_bytes``."""

    name: str
    capacity_bytes: PositiveInt
    alignment_bytes: PositiveInt
    bandwidth_bytes_per_s: PositiveFloat


class EngineKind(StrEnum):
    """What an engine does: compute operators, or copy between memories."""

    COMPUTE = "compute"
    COPY = "copy"


class Direction(StrEnum):
    """Which transfers a copy engine takes: loads into the scratchpad, stores out of it, or both."""

    BOTH = "both"
    LOAD = "load"
    STORE = "store"


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One unit that runs one instruction at a time.

    A compute engine states ``flops_per_s`` by dtype name (``default`` for the rest) and ``launch_s``, the fixed cost
    of one operator; a copy engine states ``bandwidth_bytes_per_s``, ``latency_s``, the fixed cost of one transfer,
    and the ``direction`` it copies in.
    """

    name: str
    kind: EngineKind
    flops_per_s: dict[str, PositiveFloat] = {}
    launch_s: NonNegativeFloat = 0.0
    bandwidth_bytes_per_s: PositiveFloat | None = None
    latency_s: NonNegativeFloat = 0.0
    direction: Direction = Direction.BOTH

    def copies(self, direction: Direction) -> bool:
        """Whether this is a copy engine that takes transfers of ``direction``, load or store."""
        return self.kind is EngineKind.COPY and self.direction in (Direction.BOTH, direction)


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A connection to other devices: ``bandwidth_bytes_per_s`` in one direction, ``latency_s`` for one message."""

    name: str
    bandwidth_bytes_per_s: PositiveFloat
    latency_s: NonNegativeFloat


class HardwareModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A machine. ``scratchpad`` names the memory that is planned, ``backing`` the one behind it (off-chip)."""

    name: str
    description: str
    sources: tuple[str, ...]
    scratchpad: str
    backing: str
    memories: tuple[Memory, ...]
    engines: tuple[Engine, ...]
    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        for kind, things in (("memory", self.memories), ("engine", self.engines), ("link", self.links)):
            names = [thing.name for thing in things]
            if len(set(names)) != len(names):
                raise MachineError(f"machine {self.name!r} names a {kind} twice: {', '.join(names)}")
        for memory in self.memories:
            if memory.capacity_bytes > LARGEST_MEMORY_BYTES:
                raise MachineError(
                    f"machine {self.name!r}: memory {memory.name!r} has {memory.capacity_bytes} bytes, "
                    f"allowed are up to {LARGEST_MEMORY_BYTES} (2**60)"
                )
        memories = {memory.name for memory in self.memories}
        for field in ("scratchpad", "backing"):
            if getattr(self, field) not in memories:
                raise MachineError(
                    f"machine {self.name!r}: field {field!r} is {getattr(self, field)!r}, "
                    f"allowed are its memories: {', '.join(sorted(memories))}"
                )
        if self.scratchpad == self.backing:
            raise MachineError(f"machine {self.name!r}: fields 'scratchpad' and 'backing' name the same memory")
        self._check_engines()

    def _check_engines(self) -> None:
        for kind in EngineKind:
            if not self.engines_of(kind):
                raise MachineError(f"machine {self.name!r} has no engine of kind {kind.value!r}; it needs at least one")
        for direction in (Direction.LOAD, Direction.STORE):
            if not any(engine.copies(direction) for engine in self.engines):
                raise MachineError(
                    f"machine {self.name!r} has no copy engine whose direction admits a {direction.value}"
                )
        for engine in self.engines:
            if engine.kind is EngineKind.COMPUTE and "default" not in engine.flops_per_s:
                raise MachineError(f"machine {self.name!r}: engine {engine.name!r} states no flops_per_s.default")
            if engine.kind is EngineKind.COPY and engine.bandwidth_bytes_per_s is None:
                raise MachineError(f"machine {self.name!r}: engine {engine.name!r} states no bandwidth_bytes_per_s")

    @property
    def memory(self) -> Mapping[str, Memory]:
        """Memories by name."""
        return {memory.name: memory for memory in self.memories}

    @property
    def scratchpad_memory(self) -> Memory:
        """The memory whose addresses and residences are planned."""
        return self.memory[self.scratchpad]

    @property
    def backing_memory(self) -> Memory:
        """The off-chip memory, where sources start and outputs end."""
        return self.memory[self.backing]

    def engines_of(self, kind: EngineKind) -> tuple[Engine, ...]:
        """Engines of one kind, in the order they were described."""
        return tuple(engine for engine in self.engines if engine.kind is kind)

    def with_scratchpad(self, capacity_bytes: int) -> HardwareModel:
        """The same machine with a scratchpad of ``capacity_bytes``."""
        if not 0 < capacity_bytes <= LARGEST_MEMORY_BYTES:
            raise MachineError(
                f"a scratchpad of {capacity_bytes} bytes was asked for; it takes at least 1, and at most "
                f"{LARGEST_MEMORY_BYTES} (2**60)"
            )
        memories = tuple(
            msgspec.structs.replace(m, capacity_bytes=capacity_bytes) if m.name == self.scratchpad else m
            for m in self.memories
        )
        return msgspec.structs.replace(self, memories=memories)
