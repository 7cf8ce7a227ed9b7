"""Of values that cost the same, offload those that are computed first and needed last."""

from __future__ import annotations

from dataclasses import replace

from ...compiler.partition import Partition

__all__ = ["offloading_early"]

TRIES = 400


def offloading_early(answer: Partition) -> Partition:
    """``answer`` with offloaded values changed for kept ones of the same size, where that takes no longer.

    A recount knows engines, not memory: what is stored early makes room for the rest of the forward half, and what is
    needed late is loaded when the backward half has made room for it.
    """
    values, released = answer.problem.values, answer.problem.released_ps
    best, tries = answer, 0
    for late in sorted(answer.offloaded, key=lambda v: (-released[v], v)):
        like = (values[late].nbytes, values[late].store_ps, values[late].load_ps)
        rivals = [
            v
            for v in best.kept
            if values[v].can_offload
            and released[v] < released[late]
            and (values[v].nbytes, values[v].store_ps, values[v].load_ps) == like
        ]
        for early in sorted(rivals, key=lambda v: (released[v], v)):
            tries += 1
            if tries > TRIES:
                return best
            kept, offloaded = best.kept - {early} | {late}, best.offloaded - {late} | {early}
            count = best.problem.recount(kept, offloaded)
            if count is not None and count.kept_bytes <= best.limit_bytes and count.total_ps <= best.recount.total_ps:
                best = replace(best, kept=kept, offloaded=offloaded)
                break
    return best
