"""Operators and collectives that share a machine: multi-mode scheduling with resources (DESIGN 3.3), stated once.

A task runs on one *lane* (a compute engine, a link, a copy engine), one task at a time, in the order of issue. While it
runs at full speed, its mode needs a fraction of further *resources* (``"sm"``, ``"hbm"``, ``"nvlink"``); what runs on
several lanes at a time shares them. A collective has a fixed part of the machine: it gets what its mode needs; the rest
slows down to what is left. That is the interference table, written as needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...compiler.graph import Collective

__all__ = ["Mode", "Problem", "Schedule", "Task"]


@dataclass(frozen=True)
class Mode:
    """One way of doing a task: ``seconds`` while nothing else runs, and the fraction of each resource it then needs.

    ``needs`` are in (0, 1]. One that is ``fixed`` (a kernel with a given number of programs) takes its needs first;
    the others go on at the rate that the scarcest of their resources leaves them, sharing it in proportion.
    ``absorbs`` are the tasks, by index, that this mode does as well, as a fused all-reduce does a normalisation: each
    comes behind this one in the problem, and then takes no time, no launch and no lane of its own; what else it waits
    for, this one waits for.
    """

    name: str
    seconds: float
    needs: Mapping[str, float] = field(default_factory=dict)
    fixed: bool = False
    absorbs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """What is issued as one: ``ops`` of the graph, fused, on ``lane``, in one of ``modes``.

    ``before`` are the tasks that must be done before it starts, by index, all smaller. ``launches`` kernels are issued
    by the host for it. ``allocates_bytes`` come to life when it starts; ``frees`` are the tasks whose bytes die once
    it, and all others that free them, are done. ``part`` numbers the part of the split it belongs to, -1 for none.
    ``given_mode`` is the mode, by index, in which the program does it if nothing is decided; it absorbs nothing.
    """

    name: str
    lane: str
    modes: tuple[Mode, ...]
    before: tuple[int, ...] = ()
    collective: Collective | None = None
    ops: tuple[str, ...] = ()
    launches: int = 1
    allocates_bytes: int = 0
    frees: tuple[int, ...] = ()
    part: int = -1
    given_mode: int = 0


@dataclass(frozen=True)
class Problem:
    """Tasks in program order. Host launches are ``issue_s`` apart; a wait between two lanes costs ``event_s``.

    ``memory_limit_bytes`` bounds the bytes that tasks have allocated and not freed; ``None`` is no limit. On every
    rank the collectives of one process group are issued in one order.
    """

    tasks: tuple[Task, ...]
    issue_s: float = 0.0
    event_s: float = 0.0
    memory_limit_bytes: int | None = None


@dataclass(frozen=True)
class Schedule:
    """An answer: ``order`` of issue (task indices), the ``modes`` of the tasks, and when each starts and finishes.

    ``waits`` are pairs of tasks, by index: the second waits for the first although it needs nothing of it, so that
    memory is free again, or because the program waits at once. ``peak_bytes`` are the most bytes alive. ``bound_s`` is
    a makespan that no schedule of the problem undercuts, and ``proved_by`` what proved it.
    """

    problem: Problem
    order: tuple[int, ...]
    modes: tuple[int, ...]
    start_s: tuple[float, ...]
    finish_s: tuple[float, ...]
    peak_bytes: int = 0
    bound_s: float = 0.0
    proved_by: str = "analytic"
    waits: tuple[tuple[int, int], ...] = ()

    @property
    def makespan_s(self) -> float:
        """When the last task is done."""
        return max(self.finish_s, default=0.0)
