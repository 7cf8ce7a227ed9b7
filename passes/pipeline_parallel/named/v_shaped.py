"""Schedules over a V: each rank has one stage on the way down the ranks and one on the way back.

The last stage is on the first rank, so a microbatch is soon back where it started, and all ranks hold about as much.
"""

from __future__ import annotations

from ....compiler.pipelining.schedule import ActionKind
from .layout import Layout, Order, Orders

__all__ = ["zero_bubble_v"]

_FORWARD, _INPUT, _WEIGHT = ActionKind.FORWARD, ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT


def zero_bubble_v(layout: Layout) -> Orders:
    """ZB-V by hand (Qi et al., Zero Bubble, arXiv 2401.10241, section 6), for F, I and W that take as long.

    With fewer microbatches than ``2p - 1``, those that are too many are left out of the order for ``2p - 1``.
    """
    microbatches = max(2 * layout.ranks - 1, layout.microbatches)
    orders = []
    for rank, (down, up) in enumerate(layout.stages):
        order = Order(layout.first)
        _fill_v(order, down, up, rank, layout.ranks, microbatches)
        last = layout.first + layout.microbatches
        orders.append(tuple(action for action in order.actions() if action.microbatch < last))
    return tuple(orders)


def _fill_v(order: Order, down: int, up: int, rank: int, ranks: int, microbatches: int) -> None:
    order.add_all(2 * (ranks - rank) - 1, (_FORWARD, down))  # until the first microbatch is back on this rank
    order.add_all(rank, (_FORWARD, up), (_FORWARD, down))
    order.add_all(ranks - rank, (_FORWARD, up), (_INPUT, up), (_WEIGHT, up))
    while order.done(_FORWARD, up) < microbatches:
        if order.done(_FORWARD, down) < microbatches:
            order.add(_FORWARD, down)
        order.add_all(1, (_INPUT, down), (_WEIGHT, down), (_FORWARD, up), (_INPUT, up), (_WEIGHT, up))
    order.add_all(rank, (_INPUT, down), (_INPUT, up))
    order.add_all(ranks - rank, (_INPUT, down), (_WEIGHT, down))
    for stage in (up, down):
        order.add_all(microbatches - order.done(_WEIGHT, stage), (_WEIGHT, stage))
