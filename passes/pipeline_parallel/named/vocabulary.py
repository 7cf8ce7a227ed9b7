"""1F1B with the output layer cut along the vocabulary (Yeung et al., Vocabulary Parallelism, arXiv 2411.05288).

In every period a rank does F, S, T and B, each of another microbatch. Between a rank's F and the next rank's lies so
much of a period as F is of F and B, and the rest between their B, so that F and B stay in place within the period on
all ranks. A rank's S is the first behind F of the last stage, hence all S of a microbatch are done within a period of
it, and all T in the next one; the last stage's B comes as many periods late as there are barriers, and so every rank
has that many more microbatches in flight than in 1F1B (the paper's ``p + 1`` and ``p + 2``). That S, T and B follow one
another in this order, and the periods' offsets, are worked out here; the paper's figures could not be read.
"""

from __future__ import annotations

import math
from fractions import Fraction

from ....compiler.pipelining.schedule import ActionKind
from .layout import Layout, Order, Orders

__all__ = ["refuse_whole", "sharded_vocabulary"]


def sharded_vocabulary(layout: Layout) -> Orders:
    """Vocab-2 if the problem's vocabulary has one barrier, Vocab-1 if it has two."""
    assert layout.problem.vocabulary is not None
    orders = []
    for rank, (stage,) in enumerate(layout.stages):
        after = layout.ranks - 1 - rank
        heard = _periods_until_heard(layout, rank)
        late = (
            (ActionKind.FORWARD, stage, 0),
            (ActionKind.OUTPUT, rank, heard),
            (ActionKind.OUTPUT_GRADIENT, rank, heard + 1),
            (ActionKind.BACKWARD, stage, after + layout.problem.vocabulary.barriers),
        )
        order = Order(rank, layout)
        for period in range(layout.microbatches + max(periods for *_, periods in late)):
            for kind, on, periods in late:
                if 0 <= period - periods < layout.microbatches:
                    order.add(kind, on)
        orders.append(order.actions())
    return tuple(orders)


def refuse_whole(layout: Layout) -> str:
    """Why there is nothing to place; or nothing."""
    return "" if layout.problem.vocabulary else "its output layer is not cut into vocabulary shards"


def _periods_until_heard(layout: Layout, rank: int) -> int:
    """How many periods after the rank's F of a microbatch its S can be: that of the last stage is done by then."""
    distance = Fraction(0)
    for (stage,) in layout.stages[rank:-1]:
        costs = layout.problem.stages[stage]
        forward, backward = costs.forward_ns, costs.whole_backward_ns
        distance += Fraction(forward, forward + backward) if forward and backward else Fraction(1, 2)
    return math.ceil(distance)
