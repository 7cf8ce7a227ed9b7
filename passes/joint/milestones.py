"""What is at least to go from points along an order: bounds that add up over a long graph, built from its end.

Every prefix of an order is a set of operators closed under predecessors. Once it has run, no plan has less to pay than
one that finds every live buffer, paid for, in backing memory (``StateSpace.entry``). A search from there, cut short,
bounds what the operators behind it still move; the next one, from a shorter prefix, is guided by all those before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..order.problem import OrderProblem
from .search import BestFirst, Milestone
from .states import StateSpace, order_of

__all__ = ["milestones", "prefixes"]

UNLIMITED = 1 << 62  # bytes: no plan is known that a search would have to undercut


def prefixes(problem: OrderProblem, order: Sequence[int], spacing: int) -> list[int]:
    """Bitmasks of prefixes of ``order``, about ``spacing`` operators apart, ending where the fewest bytes are live."""
    live = list(_live_after(problem, order))
    found: list[int] = []
    done = last = 0
    position = -1
    while position + spacing < len(order) - 1:
        window = range(position + 1 + spacing // 2, min(position + 1 + spacing + spacing // 2, len(order) - 1))
        position = min(window, key=lambda p: (live[p], p))
        done |= sum(1 << op for op in order[last : position + 1])
        last = position + 1
        found.append(done)
    return found


def milestones(
    space: StateSpace,
    cuts: Sequence[int],
    known: Sequence[Milestone],
    states: int,
    halted: Callable[[], bool],
    offer: Callable[[int, list[int]], None],
) -> list[Milestone]:
    """A milestone for each of the prefixes ``cuts``, by searches of ``states`` expanded each, no worse than ``known``.

    ``offer`` hears of complete orders behind a prefix. What ``halted`` cuts off keeps what was ``known`` of it.
    """
    before = dict(known)
    found: list[Milestone] = []
    for done in reversed(cuts):
        to_go = max(before.get(done, 0), found[0].to_go if found else 0)
        if not halted():
            search = BestFirst(space, space.entry(done), UNLIMITED, tuple(found), bound=to_go)
            search.run(lambda search=search: halted() or search.expanded >= states)  # type: ignore[misc]
            to_go = search.bound
            if search.found is not None:
                offer(done, order_of(search.found))
        found.insert(0, Milestone(done, to_go))
    return found


def _live_after(problem: OrderProblem, order: Sequence[int]) -> Iterator[int]:
    """Bytes live after each operator of ``order``, in aligned sizes."""
    left = [len(users) for users in problem.users]
    live = 0
    for op in order:
        for buffer in problem.touches[op]:
            if left[buffer] == len(problem.users[buffer]):
                live += problem.footprint[buffer]
            left[buffer] -= 1
            if not left[buffer]:
                live -= problem.footprint[buffer]
        yield live
