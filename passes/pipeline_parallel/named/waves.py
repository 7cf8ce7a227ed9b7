"""Chimera, Hanayo's waves and BitPipe: slots in which microbatches follow one another without ever meeting.

A slot takes a forward or a backward. Microbatch ``k`` does F of a route's ``i``-th of ``n`` stages in slot ``i + 2 k``
and B in slot ``2 n - 1 - i + 2 k``: 1F1B, two slots apart. On a rank that has a route's stages ``i`` and ``n' - i`` at
odd distances, be it of two routes in opposite directions or of one that turns, all these slots differ, and so many
microbatches as are apart by what the rank needs for one fill the rank without a hole. The next unit of so many begins
when the first F of this one has been on the rank for ``2 n`` slots, and fills the holes at its end. Orders are those of
the slots, whatever F and B take; the makespan is as in the papers where F and B take as long.
"""

from __future__ import annotations

from ....compiler.pipelining.schedule import ActionKind
from .layout import Layout, Order, Orders

__all__ = ["bidirectional", "refuse_odd", "refuse_waves", "waves"]


def bidirectional(pair: tuple[Layout, Layout]) -> Orders:
    """Chimera (Li and Hoefler, arXiv 2107.06925); with a V each way BitPipe (Wu et al., arXiv 2410.19367).

    ``p / 2`` microbatches of each direction make a unit; units are joined end to start.
    """
    return _in_slots(pair, pair[0].ranks // 2)


def waves(layout: Layout) -> Orders:
    """Hanayo (Liu et al., SC 2023): Chimera folded, so that one copy of the model is enough; ``p`` make a unit."""
    return _in_slots((layout,), layout.ranks)


def refuse_odd(layout: Layout) -> str:
    """Why two directions do not fit together on so many ranks; or nothing."""
    return f"it has {layout.ranks} ranks; this schedule needs an even number" if layout.ranks % 2 else ""


def refuse_waves(layout: Layout) -> str:
    """Why so many chunks make no waves; or nothing."""
    return f"it has {layout.chunks} chunks on each rank; waves need an even number" if layout.chunks % 2 else ""


def _in_slots(layouts: tuple[Layout, ...], unit: int) -> Orders:
    orders = []
    for rank in range(layouts[0].ranks):
        slots = []
        for layout in layouts:
            length = layout.ranks * layout.chunks
            for stage, place in zip(layout.stages[rank], layout.places[rank], strict=True):
                for number in range(layout.microbatches):
                    start = 2 * length * (number // unit) + 2 * (number % unit)
                    slots.append((start + place, ActionKind.FORWARD, stage))
                    slots.append((start + 2 * length - 1 - place, ActionKind.BACKWARD, stage))
        order = Order(rank, *layouts)
        for _, kind, stage in sorted(slots):
            order.add(kind, stage)
        orders.append(order.actions())
    return tuple(orders)
