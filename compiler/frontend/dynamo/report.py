"""What became of each graph that the backend compiled."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

from ...overlap import Overlapped
from ...plan import Plan, relative_gap

__all__ = ["GraphReport", "Reports"]

KEPT = 1000  # reports of a process; a compiler that made more has been asked about the last ones


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph.

    ``phase`` is ``"inference"``, ``"forward"`` or ``"backward"``. ``launches`` are our
    fused kernels, each with the calls that it replaces. ``kernels`` and ``operators`` count the calls to each
    generated kernel and to each library operator. Bytes are of what comes and goes while the graph runs, without
    ``held_bytes``, which the caller keeps (weights, inputs): ``peak_before_bytes`` live at once in Inductor's order,
    ``peak_bytes`` in ours, of which ``rounding_bytes`` are what rounding sizes up adds, ``bound_bytes`` in any order,
    sizes not rounded, ``allocated_bytes`` what the process really allocates with an arena of ``arena_bytes``.
    ``predicted_s`` is the simulated time on the hardware model, ``seconds`` what lowering and planning took,
    ``status`` what the solver proved. Under a limit of ``limit_bytes``, ``saved_bytes`` stay on the device from the
    forward to the backward half, ``offloaded_bytes`` wait in host memory, and ``recomputed_s`` is the predicted time
    of what runs again. Of a model in host memory ``resident_bytes`` of weights stay on the device, and a call loads
    ``loaded_bytes``; ``bound_s`` is what it takes at least in this order within the limit. ``overlap`` says what became
    of its collectives, where they were to be hidden; of those of the whole step, where that was cut as a whole.
    """

    name: str
    phase: str
    tier: str
    device: str
    launches: tuple[tuple[str, tuple[str, ...]], ...] = ()
    kernels: dict[str, int] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    fallbacks: tuple[str, ...] = ()
    peak_before_bytes: int = 0
    peak_bytes: int = 0
    bound_bytes: int = 0
    rounding_bytes: int = 0
    allocated_bytes: int = 0
    arena_bytes: int = 0
    held_bytes: int = 0
    streams: int = 1
    predicted_s: float | None = None
    lowering_s: float = 0.0
    planning_s: float = 0.0
    status: str = ""
    limit_bytes: int | None = None
    saved_bytes: int = 0
    offloaded_bytes: int = 0
    recomputed_s: float = 0.0
    resident_bytes: int = 0
    loaded_bytes: int = 0
    bound_s: float | None = None
    overlap: Overlapped | None = field(default=None, repr=False)
    from_cache: bool = False
    waits: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    plan: Plan | None = field(default=None, repr=False)

    @property
    def gap(self) -> float:
        """Relative distance of what is allocated from the bound over all orders, but for what alignment adds."""
        return relative_gap(max(0, self.allocated_bytes - self.rounding_bytes), self.bound_bytes)


class Reports:
    """The reports of a process, in the order of compilation; safe to use from several threads."""

    def __init__(self) -> None:
        self._all: deque[GraphReport] = deque(maxlen=KEPT)
        self._lock = threading.Lock()

    def add(self, report: GraphReport) -> None:
        """Keep one more."""
        with self._lock:
            self._all.append(report)

    @property
    def all(self) -> tuple[GraphReport, ...]:
        """Those kept."""
        with self._lock:
            return tuple(self._all)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._all.clear()
