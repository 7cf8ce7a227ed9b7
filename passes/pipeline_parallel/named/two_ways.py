"""Bidirectional schedules: half of the microbatches go through the ranks one way, half the other, over two copies."""

from __future__ import annotations

from ....compiler.pipelining.schedule import ActionKind
from .layout import Layout, Order, Orders
from .v_shaped import write_dual_pipe

__all__ = ["chimera", "dual_pipe", "refuse_dual_pipe", "refuse_odd"]

_Pair = tuple[Layout, Layout]


def chimera(pair: _Pair) -> Orders:
    """Chimera (Li and Hoefler, arXiv 2107.06925), units of ``p`` microbatches joined end to start.

    In slots that a forward and a backward take, each direction is a 1F1B of ``p / 2`` microbatches, two slots apart;
    for an even ``p`` the two never meet. A unit begins ``2 p`` slots after the one before and fills its holes.
    """
    ranks = pair[0].ranks
    orders = []
    for rank in range(ranks):
        slots = []
        for layout in pair:
            (stage,) = layout.stages[rank]
            place = rank if layout is pair[0] else ranks - 1 - rank
            for number in range(layout.microbatches):
                unit, within = divmod(number, ranks // 2)
                start = 2 * ranks * unit + 2 * within
                slots.append((start + place, ActionKind.FORWARD, stage))
                slots.append((start + 2 * ranks - 1 - place, ActionKind.BACKWARD, stage))
        order = Order(rank, *pair)
        for _, kind, stage in sorted(slots):
            order.add(kind, stage)
        orders.append(order.actions())
    return tuple(orders)


def dual_pipe(pair: _Pair) -> Orders:
    """DualPipe (DeepSeek-AI, arXiv 2412.19437, section 3.2.1), what it does at once one after the other.

    From either end, a rank and the directions that come to it first and second look like a V of half the ranks.
    """
    ranks = pair[0].ranks
    orders = []
    for rank in range(ranks):
        near, far = pair if rank < ranks // 2 else reversed(pair)
        order = Order(rank, *pair)
        place = min(rank, ranks - 1 - rank)
        write_dual_pipe(order, near.stages[rank][0], far.stages[rank][0], place, ranks // 2, near.microbatches)
        orders.append(order.actions())
    return tuple(orders)


def refuse_odd(layout: Layout) -> str:
    """Why two directions do not fit together on so many ranks; or nothing."""
    return f"it has {layout.ranks} ranks; this schedule needs an even number" if layout.ranks % 2 else ""


def refuse_dual_pipe(layout: Layout) -> str:
    """Why DualPipe does not go with so many ranks or microbatches; or nothing."""
    if layout.ranks % 2:
        return refuse_odd(layout)
    if layout.microbatches >= layout.ranks:
        return ""
    return f"it has {layout.microbatches} microbatches in each direction; the least is {layout.ranks}"
