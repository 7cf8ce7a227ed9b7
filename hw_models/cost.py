"""What an instruction costs: a roofline per operator, latency plus bandwidth per transfer. All times in seconds."""

from __future__ import annotations

from ..errors import MachineError
from .model import Engine, HardwareModel

__all__ = ["op_seconds", "transfer_seconds"]


def op_seconds(
    flops: int, dtype: str, local_bytes: int, streamed_bytes: int, machine: HardwareModel, engine: Engine
) -> float:
    """Seconds one operator occupies a compute engine: its launch, then the slowest of arithmetic and traffic.

    The roofline model of Williams, Waterman and Patterson (Communications of the ACM 52(4), 2009), with one roof for
    the arithmetic in ``dtype`` (the engine's ``default`` rate where it states none), one for the ``local_bytes`` read
    and written in the scratchpad, and one for the ``streamed_bytes`` read from backing memory.

    Raises:
        MachineError: ``engine`` states no arithmetic rate, so it is not a compute engine.
    """
    rate = engine.flops_per_s.get(dtype) or engine.flops_per_s.get("default")
    if rate is None:
        raise MachineError(
            f"engine {engine.name!r} of machine {machine.name!r} states no flops_per_s; it cannot compute"
        )
    return engine.launch_s + max(
        flops / rate,
        local_bytes / machine.scratchpad_memory.bandwidth_bytes_per_s,
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
