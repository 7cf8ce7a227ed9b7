"""Times of a machine's collectives as a small table, for people to read."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import MachineError
from .collectives import collective_modes
from .fabric import CollectiveKind, Fabric
from .model import HardwareModel

__all__ = ["collective_table"]

_SIZES = {"64 KiB": 1 << 16, "1 MiB": 1 << 20, "16 MiB": 1 << 24, "256 MiB": 1 << 28}


def collective_table(machine: HardwareModel) -> str:
    """One line a collective and group of ranks: microseconds of whole messages of four sizes, and which way is taken.

    Each is the fastest way that fuses nothing else, while nothing else runs. Empty for a machine of one device.
    """
    if machine.fabric is None:
        return ""
    lines = [f"{'microseconds, alone':<30}" + "".join(f"{size:>26}" for size in _SIZES)]
    for kind in CollectiveKind:
        for name, ranks in _groups(machine.fabric):
            cells = [_cell(kind, nbytes, ranks, machine) for nbytes in _SIZES.values()]
            if any(cells):
                lines.append(f"{kind.value:<15}{name:<15}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def _groups(fabric: Fabric) -> Iterator[tuple[str, range]]:
    """Groups worth showing: two devices, those of a node, one of each node, and all, where they differ."""
    node, devices = fabric.devices_per_node, fabric.devices
    if node > 2:
        yield "2 of a node", range(2)
    if node > 1:
        yield f"{node} of a node", range(node)
    if node < devices:
        yield f"1 of {devices // node} nodes", range(0, devices, node)
        if node > 1:
            yield f"all {devices}", range(devices)


def _cell(kind: str, nbytes: int, ranks: range, machine: HardwareModel) -> str:
    try:
        mode = collective_modes(kind, nbytes, ranks, machine)[0]
    except MachineError:
        return ""
    way = f"{mode.algorithm}/{mode.programs}" if mode.programs else mode.algorithm
    return f"{mode.seconds * 1e6:,.1f} {way}"
