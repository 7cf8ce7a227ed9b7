"""What an instruction costs: a roofline per operator, latency plus bandwidth per transfer; seconds and joules."""

from __future__ import annotations

from ..errors import MachineError
from .model import Engine, EngineKind, HardwareModel, Memory

__all__ = ["op_joules", "op_seconds", "transfer_joules", "transfer_seconds"]


def op_seconds(
    flops: int, dtype: str, local_bytes: int, streamed_bytes: int, machine: HardwareModel, engine: Engine
) -> float:
    """Seconds one operator occupies a compute engine: its launch, then the slowest of arithmetic and traffic.

    The roofline model of Williams, Waterman and Patterson (Communications of the ACM 52(4), 2009), with one roof for
    the arithmetic in ``dtype`` (the engine's ``default`` rate where it states none), one for the ``local_bytes`` read
    and written in the scratchpad, and one for the ``streamed_bytes`` read from backing memory. Units near memory have
    their own bandwidth in the scratchpad.

    Raises:
        MachineError: ``engine`` states no arithmetic rate, so it is not a compute engine.
    """
    rate = engine.flops_per_s.get(dtype) or engine.flops_per_s.get("default")
    if rate is None:
        raise MachineError(
            f"engine {engine.name!r} of machine {machine.name!r} states no flops_per_s; it cannot compute"
        )
    near = engine.bandwidth_bytes_per_s if engine.kind is EngineKind.NEAR_MEMORY else None
    return engine.launch_s + max(
        flops / rate,
        local_bytes / (near or machine.scratchpad_memory.bandwidth_bytes_per_s),
        streamed_bytes / machine.backing_memory.bandwidth_bytes_per_s,
    )


def transfer_seconds(nbytes: int, engine: Engine) -> float:
    """Seconds a copy engine takes for one transfer of ``nbytes``: its latency, then the bytes at its bandwidth.

    Raises:
        MachineError: ``engine`` states no bandwidth, so it is not a copy engine.
    """
    if engine.bandwidth_bytes_per_s is None:
        raise MachineError(f"engine {engine.name!r} states no bandwidth_bytes_per_s; it cannot copy")
    return engine.latency_s + nbytes / engine.bandwidth_bytes_per_s


def op_joules(
    flops: int, dtype: str, local_bytes: int, streamed_bytes: int, machine: HardwareModel, engine: Engine
) -> float:
    """Joules one operator takes: its arithmetic in ``dtype`` (the ``default`` where the engine states none for it),
    ``local_bytes`` moved in the scratchpad, and ``streamed_bytes`` read from backing memory. Idle power is left out.

    Raises:
        MachineError: the machine states no energy for one of them; the message names the field.
    """
    per_flop = engine.energy_per_flop_j.get(dtype) or engine.energy_per_flop_j.get("default")
    if per_flop is None:
        raise MachineError(f"engine {engine.name!r} of machine {machine.name!r} states no energy_per_flop_j")
    return (
        flops * per_flop
        + local_bytes * _byte_joules(machine, machine.scratchpad_memory)
        + streamed_bytes * _byte_joules(machine, machine.backing_memory)
    )


def transfer_joules(nbytes: int, machine: HardwareModel) -> float:
    """Joules one transfer of ``nbytes`` takes, either way: one access to each byte in each of the two memories.

    Raises:
        MachineError: a memory states no energy; the message names the field.
    """
    memories = (machine.scratchpad_memory, machine.backing_memory)
    return nbytes * sum(_byte_joules(machine, memory) for memory in memories)


def _byte_joules(machine: HardwareModel, memory: Memory) -> float:
    if memory.energy_per_byte_j is None:
        raise MachineError(f"memory {memory.name!r} of machine {machine.name!r} states no energy_per_byte_j")
    return memory.energy_per_byte_j
