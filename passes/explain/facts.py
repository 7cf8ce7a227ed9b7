"""What an explanation consists of. All structs encode to JSON with ``msgspec.json.encode``; all sizes are bytes."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ...compiler.graph import Graph

__all__ = [
    "BindingStep",
    "DroppedGap",
    "Explanation",
    "Launched",
    "LiveBuffer",
    "Relaxation",
    "RelaxationKind",
    "Verdict",
]


RelaxationKind = Literal["capacity", "order", "residency", "recompute", "weights", "pins"]
Verdict = Literal["nothing to explain", "optimal", "optimal for its order", "above its bound", "infeasible"]


class LiveBuffer(msgspec.Struct, frozen=True):
    """A buffer that an operator touches (``operand``), or that is live across it: used before and again later."""

    buffer: str
    nbytes: int
    role: str
    state: Literal["operand", "kept", "dropped"]


class BindingStep(msgspec.Struct, frozen=True):
    """An operator at which more is live than there is room for.

    ``position`` counts operators in the plan's order from 0. ``needed_bytes`` is everything live, sizes rounded up to
    the alignment where that is what binds; ``short_bytes`` is how far it exceeds the capacity. ``forced_bytes`` is
    additional traffic that this step proves: no residency of the order moves less than the sum over all steps of an
    explanation, because no byte of a transfer is counted for two of them.
    """

    position: int
    operator: str
    needed_bytes: int
    capacity_bytes: int
    short_bytes: int
    forced_bytes: int
    live: tuple[LiveBuffer, ...]


class DroppedGap(msgspec.Struct, frozen=True):
    """A buffer that leaves the scratchpad between two uses, and the bytes this moves.

    The store of a version is counted for the first gap that needs it. A recomputed buffer moves nothing itself.
    """

    buffer: str
    nbytes: int
    after_operator: str
    before_operator: str
    moved_bytes: int
    returns: Literal["fetched", "recomputed"]


class Relaxation(msgspec.Struct, frozen=True):
    """What giving way in one respect would save, everything else unchanged.

    ``saved_bytes`` was found by planning again without addresses (``None``: nothing was planned), ``limit_bytes`` is
    proven: none of the plans that were searched saves more. Those are all residencies of the order, for ``recompute``
    what ``residency/recompute`` ranges over, for ``order`` everything. Of an infeasible model, what is saved is bytes
    of the shortage.
    """

    kind: RelaxationKind
    what: str
    saved_bytes: int | None
    limit_bytes: int
    capacity_bytes: int | None = None

    @property
    def is_exact(self) -> bool:
        """Whether what was found is all there is."""
        return self.saved_bytes == self.limit_bytes


class Launched(msgspec.Struct, frozen=True):
    """A fused kernel in the graph, and the model's own names for what it replaces."""

    kernel: str
    replaced: str

    @classmethod
    def of(cls, graph: Graph) -> tuple[Launched, ...]:
        """Those of a graph, in program order."""
        targets = ((op, op.target.split(".")) for op in graph.ops)
        ours = ((op, parts[1]) for op, parts in targets if parts[0] == "opweave")
        return tuple(cls(name, op.origin) for op, name in ours if op.name.startswith(f"{name}_"))


class Explanation(msgspec.Struct, frozen=True):
    """Why ``additional_bytes`` move, or why nothing fits.

    ``unavoidable_bytes`` move whatever is resident: streamed weights read again. ``order_bound_bytes`` is proven for
    every residency without recomputation of the plan's order, ``graph_bound_bytes`` for every order. For an
    ``infeasible`` model the steps are operators that do not fit alone, and the other figures are 0. ``untried`` are
    relaxations for which there was no time. ``launches`` are the fused kernels in the graph.
    """

    verdict: Verdict
    graph: str
    operators: int
    capacity_bytes: int
    additional_bytes: int
    unavoidable_bytes: int
    order_bound_bytes: int
    graph_bound_bytes: int
    steps: tuple[BindingStep, ...]
    dropped: tuple[DroppedGap, ...]
    relaxations: tuple[Relaxation, ...]
    untried: tuple[str, ...] = ()
    launches: tuple[Launched, ...] = ()

    @property
    def forced_bytes(self) -> int:
        """Additional traffic proven by ``steps`` and ``unavoidable_bytes``: no residency of the order moves less."""
        return self.unavoidable_bytes + sum(step.forced_bytes for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries, lists, numbers and strings, ready for JSON."""
        return {**msgspec.to_builtins(self), "forced_bytes": self.forced_bytes}
