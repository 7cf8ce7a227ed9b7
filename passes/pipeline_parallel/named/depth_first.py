"""Schedules of one pattern: forwards until the rank has enough in flight, then one forward and one backward in turn.

1F1B (Narayanan et al., PipeDream-Flush, arXiv 2006.09503), with several chunks on a rank taken microbatches of one
round after the other (Narayanan et al., Megatron-LM, arXiv 2104.04473), and with the gradients of weights put off
(Qi et al., Zero Bubble, arXiv 2401.10241, section 2: H1 and H2); and the two that do all forwards first.
"""

from __future__ import annotations

from ....compiler.pipelining.schedule import Action, ActionKind
from .layout import Layout, Order, Orders

__all__ = [
    "all_forward_first",
    "breadth_first",
    "interleaved",
    "interleaved_zero_bubble",
    "one_forward_one_backward",
    "refuse_rounds",
    "two_stage_backward",
    "zero_bubble_1",
    "zero_bubble_2",
]

_FORWARD, _BACKWARD = ActionKind.FORWARD, ActionKind.BACKWARD
_INPUT, _WEIGHT = ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT


def all_forward_first(layout: Layout) -> Orders:
    """GPipe (Huang et al., arXiv 1811.06965): all forwards, then all backwards, both from the first microbatch on."""
    orders = []
    for rank, (stage,) in enumerate(layout.stages):
        order = Order(rank, layout)
        for kind in (_FORWARD, _BACKWARD):
            for _ in range(layout.microbatches):
                order.add(kind, stage)
        orders.append(order.actions())
    return tuple(orders)


def breadth_first(layout: Layout) -> Orders:
    """Breadth-first (Lamy-Poirier, arXiv 2211.05953): each chunk for all microbatches; backwards from the last on."""
    numbers = range(layout.first, layout.first + layout.microbatches)
    return tuple(
        tuple(Action(stage, _FORWARD, number) for stage in stages for number in numbers)
        + tuple(Action(stage, _BACKWARD, number) for stage in reversed(stages) for number in reversed(numbers))
        for stages in layout.stages
    )


def one_forward_one_backward(layout: Layout) -> Orders:
    """1F1B: rank ``r`` of ``p`` does ``p - 1 - r`` forwards before it alternates."""
    return _depth_first(layout, warm_up=[layout.ranks - 1 - rank for rank in range(layout.ranks)])


def interleaved(layout: Layout) -> Orders:
    """Interleaved 1F1B; two forwards more with each rank before the last, for one has to be back from there in time."""
    return _depth_first(layout, warm_up=_interleaved_warm_up(layout, 2))


def interleaved_zero_bubble(layout: Layout) -> Orders:
    """Interleaved, I and W apart, W of rank ``r`` put off by ``r`` microbatches of a chunk (ZB-H1 with chunks)."""
    return _depth_first(layout, warm_up=_interleaved_warm_up(layout, 1), put_off=list(range(layout.ranks)))


def zero_bubble_1(layout: Layout) -> Orders:
    """ZB-H1: 1F1B's forwards; W is put off by ``r`` microbatches, so that all ranks hold as much as the first."""
    return interleaved_zero_bubble(layout)


def zero_bubble_2(layout: Layout) -> Orders:
    """ZB-H2: twice the forwards before the first backward, and W put off by twice as much."""
    ranks = range(layout.ranks)
    warm_up = [2 * (layout.ranks - 1 - rank) for rank in ranks]
    return _depth_first(layout, warm_up=warm_up, put_off=[2 * rank for rank in ranks])


def two_stage_backward(layout: Layout) -> Orders:
    """2BP (Rae et al., arXiv 2405.18047) with 1F1B: its F and I, and every W behind the last I."""
    warm_up = [layout.ranks - 1 - rank for rank in range(layout.ranks)]
    return _depth_first(layout, warm_up=warm_up, put_off=[layout.microbatches] * layout.ranks)


def refuse_rounds(layout: Layout) -> str:
    """Why the microbatches do not make rounds of one size, each about as many as there are ranks; or nothing."""
    rounds = _rounds(layout)
    if layout.microbatches % rounds == 0:
        return ""
    return f"{layout.microbatches} microbatches on {layout.ranks} ranks do not make {rounds} rounds of one size"


def _rounds(layout: Layout) -> int:
    return max(1, layout.microbatches // layout.ranks)


def _interleaved_warm_up(layout: Layout, hop: int) -> list[int]:
    size = layout.microbatches // _rounds(layout)
    return [(layout.chunks - 1) * size + hop * (layout.ranks - 1 - rank) for rank in range(layout.ranks)]


def _depth_first(layout: Layout, *, warm_up: list[int], put_off: list[int] | None = None) -> Orders:
    """``warm_up`` forwards on each rank, then forward and backward in turn while there are forwards.

    The chunks take turns, for the microbatches of a round each. Whole backwards without ``put_off``; with it, W comes
    behind I, in the same order, ``put_off`` microbatches late.
    """
    size = layout.microbatches // _rounds(layout)
    total = layout.microbatches * layout.chunks
    orders = []
    for rank, stages in enumerate(layout.stages):
        order = Order(rank, layout)
        forwards = [stages[step // size % layout.chunks] for step in range(total)]
        backwards = [stages[-1 - step // size % layout.chunks] for step in range(total)]
        first = min(warm_up[rank], total)
        for stage in forwards[:first]:
            order.add(_FORWARD, stage)
        for step, stage in enumerate(backwards):
            if first + step < total:
                order.add(_FORWARD, forwards[first + step])
            order.add(_BACKWARD if put_off is None else _INPUT, stage)
            if put_off is not None and step >= put_off[rank]:
                order.add(_WEIGHT, backwards[step - put_off[rank]])
        if put_off is not None:
            for stage in backwards[max(0, total - put_off[rank]) :]:
                order.add(_WEIGHT, stage)
        orders.append(order.actions())
    return tuple(orders)
