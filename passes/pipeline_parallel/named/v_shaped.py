"""Schedules over a V, each rank with a stage on the way down the ranks and one on the way back; DualPipe from its ends.

The last stage is on the first rank, so a microbatch is soon back where it started, and all ranks hold about as much.
"""

from __future__ import annotations

from collections import deque

from ....compiler.pipelining.schedule import ActionKind
from .layout import Layout, Order, Orders

__all__ = ["dual_pipe", "dual_pipe_v", "refuse_dual_pipe", "refuse_few", "zero_bubble_v"]

_FORWARD, _BACKWARD = ActionKind.FORWARD, ActionKind.BACKWARD
_INPUT, _WEIGHT = ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT


def zero_bubble_v(layout: Layout) -> Orders:
    """ZB-V by hand (Qi et al., Zero Bubble, arXiv 2401.10241, section 6), for F, I and W that take as long.

    With fewer microbatches than ``2p - 1``, those that are too many are left out of the order for ``2p - 1``.
    """
    microbatches = max(2 * layout.ranks - 1, layout.microbatches)
    orders = []
    for rank, (down, up) in enumerate(layout.stages):
        order = Order(rank, layout)
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


def dual_pipe_v(layout: Layout) -> Orders:
    """DualPipeV: DualPipe cut in half, so that one copy of the model is enough (deepseek-ai/DualPipe).

    What DualPipe does at once, the forward of one microbatch and the backward of another, comes one after the other.
    """
    orders = []
    for rank, (down, up) in enumerate(layout.stages):
        order = Order(rank, layout)
        _write_dual_pipe(order, down, up, rank, layout.ranks, layout.microbatches)
        orders.append(order.actions())
    return tuple(orders)


def refuse_few(layout: Layout) -> str:
    """Why there are too few microbatches for DualPipeV; or nothing."""
    least = 2 * layout.ranks
    return "" if layout.microbatches >= least else f"it has {layout.microbatches} microbatches; the least is {least}"


def dual_pipe(pair: tuple[Layout, Layout]) -> Orders:
    """DualPipe (DeepSeek-AI, arXiv 2412.19437, section 3.2.1), what it does at once one after the other.

    From either end, a rank and the directions that come to it first and second look like a V of half the ranks.
    """
    ranks = pair[0].ranks
    orders = []
    for rank in range(ranks):
        near, far = pair if rank < ranks // 2 else reversed(pair)
        order = Order(rank, *pair)
        place = min(rank, ranks - 1 - rank)
        _write_dual_pipe(order, near.stages[rank][0], far.stages[rank][0], place, ranks // 2, near.microbatches)
        orders.append(order.actions())
    return tuple(orders)


def refuse_dual_pipe(layout: Layout) -> str:
    """Why DualPipe does not go with so many ranks or microbatches; or nothing."""
    if layout.ranks % 2:
        return f"it has {layout.ranks} ranks; this schedule needs an even number"
    if layout.microbatches >= layout.ranks:
        return ""
    return f"it has {layout.microbatches} microbatches in each direction; the least is {layout.ranks}"


def _write_dual_pipe(order: Order, down: int, up: int, rank: int, ranks: int, microbatches: int) -> None:
    """DualPipe's eight phases on one rank of a V, or of what looks like one from its outer end.

    In the second half of the last backwards W is put off; the rest of the time it follows at once.
    """
    after = ranks - rank - 1
    order.add_all(2 * after, (_FORWARD, down))
    order.add_all(rank + 1, (_FORWARD, down), (_FORWARD, up))
    order.add_all(after, (_INPUT, up), (_WEIGHT, up), (_FORWARD, up))
    both = microbatches - 2 * ranks + rank + 1
    order.add_all(both, (_FORWARD, down), (_BACKWARD, up), (_FORWARD, up), (_BACKWARD, down))
    order.add_all(after, (_BACKWARD, up), (_FORWARD, up), (_BACKWARD, down))
    put_off: deque[int] = deque()
    for step in range(2 * (rank + 1)):
        stage = down if step % 2 else up
        order.add(_BACKWARD if step <= rank else _INPUT, stage)
        if step > rank:
            put_off.append(stage)
    for _ in range(after):
        order.add_all(1, (_WEIGHT, put_off.popleft()), (_INPUT, down))
        put_off.append(down)
    for stage in put_off:
        order.add(_WEIGHT, stage)
