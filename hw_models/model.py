"""A machine: memories, engines and links, with the unit in every field's name."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from itertools import accumulate
from typing import Annotated

import msgspec

from ..errors import MachineError
from .fabric import Fabric, Interference, KernelKind

__all__ = [
    "Concurrency",
    "Direction",
    "Engine",
    "EngineKind",
    "HardwareModel",
    "Link",
    "Memory",
    "Tiling",
    "aligned_bytes",
]

#: Beyond any machine, and far enough below 2**63 that sums of a few such sizes stay exact in 64 bits.
LARGEST_MEMORY_BYTES = 2**60

PositiveInt = Annotated[int, msgspec.Meta(gt=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
NonNegativeFloat = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(gt=0, le=1)]


def aligned_bytes(nbytes: int, alignment_bytes: int) -> int:
    """``nbytes`` rounded up to a multiple of ``alignment_bytes``."""
    return -(-nbytes // alignment_bytes) * alignment_bytes


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An addressable memory; regions in it start at multiples of ``alignment_bytes``.

    ``banks_bytes`` are the sizes of its banks, which follow one another from address 0 and make up the capacity; a
    region lies inside one of them. A memory that states none is one bank. ``energy_per_byte_j`` is what reading or
    writing one byte takes, where it is known.
    """

    name: str
    capacity_bytes: PositiveInt
    alignment_bytes: PositiveInt
    bandwidth_bytes_per_s: PositiveFloat
    banks_bytes: tuple[PositiveInt, ...] = ()
    energy_per_byte_j: NonNegativeFloat | None = None

    @property
    def banks(self) -> tuple[tuple[int, int], ...]:
        """First byte of each bank and the byte behind its last."""
        ends = tuple(accumulate(self.banks_bytes or (self.capacity_bytes,)))
        return tuple(zip((0, *ends), ends, strict=False))


class EngineKind(StrEnum):
    """What an engine does: compute operators, copy between memories, or compute inside the scratchpad's memory."""

    COMPUTE = "compute"
    COPY = "copy"
    NEAR_MEMORY = "near_memory"


class Direction(StrEnum):
    """Which transfers a copy engine takes: loads into the scratchpad, stores out of it, or both."""

    BOTH = "both"
    LOAD = "load"
    STORE = "store"


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One unit that runs one instruction at a time.

    A compute engine states ``flops_per_s`` by dtype name (``default`` for the rest), ``launch_s``, the fixed cost of
    one operator, and, where it is known, ``energy_per_flop_j`` by dtype name like the rates; a copy engine states
    ``bandwidth_bytes_per_s``, ``latency_s``, the fixed cost of one transfer, and the ``direction`` it copies in. Units
    near memory state ``flops_per_s`` and ``launch_s`` as well, and as ``bandwidth_bytes_per_s`` what they read and
    write inside the scratchpad's memory, which is more than the memory hands out.
    """

    name: str
    kind: EngineKind
    flops_per_s: dict[str, PositiveFloat] = {}
    launch_s: NonNegativeFloat = 0.0
    bandwidth_bytes_per_s: PositiveFloat | None = None
    latency_s: NonNegativeFloat = 0.0
    direction: Direction = Direction.BOTH
    energy_per_flop_j: dict[str, PositiveFloat] = {}

    def copies(self, direction: Direction) -> bool:
        """Whether this is a copy engine that takes transfers of ``direction``, load or store."""
        return self.kind is EngineKind.COPY and self.direction in (Direction.BOTH, direction)


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A connection to other devices: ``bandwidth_bytes_per_s`` in one direction, ``latency_s`` for one message."""

    name: str
    bandwidth_bytes_per_s: PositiveFloat
    latency_s: NonNegativeFloat


class Concurrency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How operators share a compute engine that runs several at a time, as a GPU runs kernels of several streams.

    At most ``streams`` queues of operators are worth having. Operators are issued ``issue_s`` apart, on whatever
    queue, and waiting for one on another queue adds ``event_s``. One with ``saturating_elements`` elements or more
    uses the whole engine; a smaller one uses that fraction of it, and leaves the rest to others.
    """

    streams: PositiveInt
    issue_s: NonNegativeFloat
    event_s: NonNegativeFloat
    saturating_elements: PositiveInt


class Tiling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a compute engine of ``multiprocessors`` works through tiles, and what part of its peaks kernels reach.

    A matrix product's result is cut into ``tiles`` of one of these shapes. A tile of ``r`` x ``c`` elements runs at
    ``matmul_efficiency / (1 + operand_elements * (1/r + 1/c))`` of the peak and takes ``tile_s`` more for its begin
    and end. ``attention_efficiency`` is the part of the peak that attention's two products reach,
    ``memory_efficiency`` the part of the bandwidth that a streaming kernel does, on at least ``saturating_share`` of
    the multiprocessors (less of the bandwidth on fewer, in proportion). A grouped product, as of experts, runs at
    ``grouped_efficiency`` of the rate of a plain one.
    """

    multiprocessors: PositiveInt
    tiles: tuple[tuple[PositiveInt, ...], ...]
    matmul_efficiency: Fraction
    operand_elements: NonNegativeFloat
    tile_s: NonNegativeFloat
    attention_efficiency: Fraction
    memory_efficiency: Fraction
    saturating_share: Fraction
    grouped_efficiency: Fraction = 1.0

    def __post_init__(self) -> None:
        if not self.tiles or any(len(tile) != 2 for tile in self.tiles):
            raise MachineError(
                f"a tiling has the tiles {[list(tile) for tile in self.tiles]}; "
                "it takes at least one, of rows and columns, as [[128, 256]]"
            )


class HardwareModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A machine. ``scratchpad`` names the memory that is planned, ``backing`` the one behind it (off-chip).

    ``concurrency`` says how its compute engine runs several operators at a time, where it does, ``tiling`` how kernels
    fill it, where that is known. One with a ``fabric`` is one of several equal devices; ``interference`` is what was
    measured of kernels that run beside one another.
    """

    name: str
    description: str
    sources: tuple[str, ...]
    scratchpad: str
    backing: str
    memories: tuple[Memory, ...]
    engines: tuple[Engine, ...]
    links: tuple[Link, ...] = ()
    concurrency: Concurrency | None = None
    tiling: Tiling | None = None
    fabric: Fabric | None = None
    interference: tuple[Interference, ...] = ()

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
            self._check_banks(memory)
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
        self._check_fabric()

    def _check_banks(self, memory: Memory) -> None:
        begins = [begin for begin, _ in memory.banks]
        if sum(memory.banks_bytes) not in (0, memory.capacity_bytes):
            raise MachineError(
                f"machine {self.name!r}: the banks_bytes of memory {memory.name!r} sum to {sum(memory.banks_bytes)}, "
                f"allowed is its capacity_bytes, {memory.capacity_bytes}"
            )
        for bank, begin in enumerate(begins):
            if begin % memory.alignment_bytes:
                raise MachineError(
                    f"machine {self.name!r}: bank {bank} of memory {memory.name!r} begins at byte {begin}, "
                    f"allowed are multiples of its alignment_bytes, {memory.alignment_bytes}"
                )

    def _check_engines(self) -> None:
        for kind in (EngineKind.COMPUTE, EngineKind.COPY):
            if not self.engines_of(kind):
                raise MachineError(f"machine {self.name!r} has no engine of kind {kind.value!r}; it needs at least one")
        for direction in (Direction.LOAD, Direction.STORE):
            if not any(engine.copies(direction) for engine in self.engines):
                raise MachineError(
                    f"machine {self.name!r} has no copy engine whose direction admits a {direction.value}"
                )
        for engine in self.engines:
            if engine.kind is not EngineKind.COPY and "default" not in engine.flops_per_s:
                raise MachineError(f"machine {self.name!r}: engine {engine.name!r} states no flops_per_s.default")
            if engine.energy_per_flop_j and "default" not in engine.energy_per_flop_j:
                raise MachineError(f"machine {self.name!r}: engine {engine.name!r} states no energy_per_flop_j.default")
            if engine.kind is not EngineKind.COMPUTE and engine.bandwidth_bytes_per_s is None:
                raise MachineError(f"machine {self.name!r}: engine {engine.name!r} states no bandwidth_bytes_per_s")

    def _check_fabric(self) -> None:
        if self.fabric is not None:
            multiprocessors = self.tiling.multiprocessors if self.tiling else None
            measured = any(table.kernel is KernelKind.NETWORK for table in self.interference)
            links = [link.name for link in self.links]
            self.fabric.check(self.name, links, multiprocessors, shares_measured=measured)
        for index, table in enumerate(self.interference):
            table.check(self.name, self.interference[:index])

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
        """The same machine with a scratchpad of ``capacity_bytes``.

        Raises:
            MachineError: no such scratchpad is allowed, or the scratchpad has banks and another capacity: how that
                would be divided does not follow from how this one is.
        """
        if not 0 < capacity_bytes <= LARGEST_MEMORY_BYTES:
            raise MachineError(
                f"a scratchpad of {capacity_bytes} bytes was asked for; it takes at least 1, and at most "
                f"{LARGEST_MEMORY_BYTES} (2**60)"
            )
        memory = self.scratchpad_memory
        if memory.banks_bytes and capacity_bytes != memory.capacity_bytes:
            raise MachineError(
                f"a scratchpad of {capacity_bytes} bytes was asked for, but {memory.name!r} of machine {self.name!r} "
                f"has banks of {', '.join(map(str, memory.banks_bytes))} bytes",
                hint="state the banks you mean as banks_bytes in a machine file of your own, or call with_banks",
            )
        return self._with(msgspec.structs.replace(memory, capacity_bytes=capacity_bytes))

    def with_banks(self, *banks_bytes: int) -> HardwareModel:
        """The same machine with a scratchpad of banks of these sizes, from address 0 on.

        Raises:
            MachineError: no bank, one without bytes, one that begins where no region may, or too many bytes.
        """
        if not banks_bytes or min(banks_bytes) <= 0:
            raise MachineError(f"banks of {list(banks_bytes)} bytes were asked for; it takes one or more, above 0 each")
        memory = self.scratchpad_memory
        return self._with(
            msgspec.structs.replace(memory, capacity_bytes=sum(banks_bytes), banks_bytes=tuple(banks_bytes))
        )

    def with_streams(self, count: int) -> HardwareModel:
        """The same machine with ``count`` queues for its first compute engine: itself, and others numbered from 1.

        They share that engine's rates as ``concurrency`` says, which ``simulate`` does not count: times of a plan over
        several queues are those its pass has given it.

        Raises:
            MachineError: no queue was asked for, or more than one, and the machine does not say how they share.
        """
        if count < 1 or (count > 1 and self.concurrency is None):
            raise MachineError(
                f"{count} streams were asked for on machine {self.name!r}, allowed is at least 1, and more than 1 "
                "only where it states its concurrency",
                hint="state the table 'concurrency' in a machine file of your own",
            )
        first = self.engines_of(EngineKind.COMPUTE)[0]
        more = (msgspec.structs.replace(first, name=f"{first.name}{number}") for number in range(1, count))
        return msgspec.structs.replace(self, engines=(*self.engines, *more))

    def _with(self, scratchpad: Memory) -> HardwareModel:
        memories = tuple(scratchpad if memory.name == self.scratchpad else memory for memory in self.memories)
        return msgspec.structs.replace(self, memories=memories)
