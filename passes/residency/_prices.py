"""What fetching a buffer and running an operator again cost, by the objective; whole numbers: their sums are exact."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ...compiler.plan import Plan
from ...errors import MachineError, OptionError
from ...hw_models.cost import op_joules, op_seconds, transfer_joules, transfer_seconds
from ...hw_models.model import Direction, EngineKind
from .gaps import Lifetime

__all__ = ["UNITS", "Objective", "Prices"]

Objective = Literal["traffic", "latency", "energy"]

#: What one unit of each objective's prices is.
UNITS: dict[Objective, str] = {"traffic": "bytes", "latency": "picoseconds of engines", "energy": "femtojoules"}


@dataclass(frozen=True)
class Prices:
    """Prices on the machine of ``plan``: bytes moved, or picoseconds on the fastest engine, or femtojoules.

    The seconds of all engines are added up, as if nothing overlapped: what overlaps is decided later.

    Raises:
        OptionError: the objective is energy and the machine does not state it; the message names the field.
    """

    plan: Plan
    objective: Objective

    def __post_init__(self) -> None:
        if self.objective != "energy":
            return
        try:
            transfer_joules(0, self.plan.machine)
            for engine in self.plan.machine.engines_of(EngineKind.COMPUTE):
                op_joules(0, "default", 0, 0, self.plan.machine, engine)
        except MachineError as error:
            raise OptionError(
                f"option 'objective' of pass 'residency/recompute' is 'energy', but {error.message}",
                hint="state it in a machine file, or choose the objective traffic or latency",
            ) from error

    def load(self, nbytes: int) -> int:
        """Price of loading ``nbytes``."""
        return self._transfer(nbytes, Direction.LOAD)

    def store(self, nbytes: int) -> int:
        """Price of storing ``nbytes``."""
        return self._transfer(nbytes, Direction.STORE)

    def fetch_at_most(self, lifetime: Lifetime) -> int:
        """Price of fetching a buffer that only one operator writes, its store included unless it is paid anyway."""
        stored = 0 if 1 in lifetime.backed else self.store(lifetime.nbytes)
        return stored + self.load(lifetime.nbytes)

    def run_again(self, op: int) -> int:
        """Price of running the operator at index ``op`` of the graph once more."""
        machine, graph = self.plan.machine, self.plan.graph
        tensors = [graph.tensor[name] for name in dict.fromkeys((*graph.ops[op].inputs, *graph.ops[op].outputs))]
        streamed = self.streamed_bytes(op)
        local = graph.ops[op].outside_bytes
        local += sum(tensor.nbytes for tensor in tensors if tensor.buffer not in self._streamed)
        if self.objective == "traffic":
            return streamed
        flops, dtype = graph.ops[op].flops, tensors[0].dtype if tensors else "default"
        engines = machine.engines_of(EngineKind.COMPUTE)
        if self.objective == "latency":
            return round(1e12 * min(op_seconds(flops, dtype, local, streamed, machine, e) for e in engines))
        return round(1e15 * min(op_joules(flops, dtype, local, streamed, machine, e) for e in engines))

    def streamed_bytes(self, op: int) -> int:
        """Bytes that running the operator at index ``op`` again reads from backing memory."""
        graph = self.plan.graph
        return sum(graph.buffers[b].nbytes for b in graph.reads[op] if b in self._streamed)

    def _transfer(self, nbytes: int, direction: Direction) -> int:
        machine = self.plan.machine
        if self.objective == "traffic":
            return nbytes
        if self.objective == "energy":
            return round(1e15 * transfer_joules(nbytes, machine))
        return round(1e12 * min(transfer_seconds(nbytes, e) for e in machine.engines if e.copies(direction)))

    @cached_property
    def _streamed(self) -> frozenset[str]:
        return frozenset(self.plan.streamed)
