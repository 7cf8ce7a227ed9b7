"""The operator graph of one rank of a pipeline: an operator for each action and message that the problem asks of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ...hw_models.fabric import CollectiveKind
from ..graph import Collective, Graph, Op, OpKind, Role, Tensor
from .problem import PipelineProblem
from .schedule import Action, ActionKind
from .transfers import Message, Transfer, TransferKind

__all__ = ["RankGraph", "reduction"]

_KINDS = {
    TransferKind.BROADCAST: CollectiveKind.BROADCAST,
    TransferKind.REDUCE_OUTPUT: CollectiveKind.ALL_REDUCE,
    TransferKind.REDUCE_GRADIENT: CollectiveKind.ALL_REDUCE,
}
_SENDS = {
    ActionKind.FORWARD: (TransferKind.SEND_F, TransferKind.BROADCAST),
    ActionKind.INPUT_GRADIENT: (TransferKind.SEND_B,),
    ActionKind.BACKWARD: (TransferKind.SEND_B,),
}


def reduction(stage: int) -> str:
    """The name of the operator that reduces a stage's gradients over copies of the pipeline."""
    return f"{stage}REDUCE_GRAD"


class RankGraph:
    """Writes down the graph of ``rank``; what it finds on the way is for who writes its plan.

    ``messages`` are all of the step, ``whole`` the backwards that are not split. ``arrives`` has, for an action, the
    transfers that it waits for; ``mine`` the message of each transfer of this rank; ``makes`` and ``frees``, by the
    name of an operator, the buffers that are held from its start, and until its end.
    """

    def __init__(
        self, problem: PipelineProblem, rank: int, whole: frozenset[Action], messages: Sequence[Message]
    ) -> None:
        self.problem, self.rank, self.whole = problem, rank, whole
        self.mine: dict[Transfer, Message] = {}
        self.arrives: dict[Action, list[Transfer]] = {}
        self.makes: dict[str, tuple[str, ...]] = {}
        self.frees: dict[str, tuple[str, ...]] = {}
        for message in messages:
            own = dict(message.transfers)
            if rank in own:
                self.mine[own[rank]] = message
                for other, action in message.before:
                    if other == rank:
                        self.arrives.setdefault(action, []).append(own[rank])
        self._tensors: dict[str, Tensor] = {}
        self._ops: list[Op] = []
        self._ends: dict[int, list[str]] = {}  # what tells that a stage's weight gradients are there

    def graph(self, reduced: Sequence[int] = ()) -> Graph:
        """The graph; the gradients of the stages ``reduced`` are all-reduced at its end."""
        for microbatch in range(self.problem.microbatches):
            self._describe(microbatch)
        for stage in reduced:  # with the peers of other copies of the pipeline, which are not described
            what = Collective(CollectiveKind.ALL_REDUCE, f"gradients of stage {stage}", (self.rank,), 0)
            self._communicates(reduction(stage), self._ends.get(stage, []), what)
        return Graph(f"{self.problem.name}, rank {self.rank}", tuple(self._tensors.values()), tuple(self._ops), ())

    def _describe(self, microbatch: int) -> None:
        """The operators of one microbatch, each behind what it needs."""
        problem = self.problem
        route = problem.routes[problem.route_of[microbatch]].stages
        local = [stage for stage in route if problem.stages[stage].rank == self.rank]
        before = {late: early for early, late in pairwise(route) if early in local}
        behind = {early: late for early, late in pairwise(route) if late in local}
        for stage in local:
            inputs = [f"{Action(before[stage], ActionKind.FORWARD, microbatch)} done"] if stage in before else []
            self._forward(stage, microbatch, inputs)
        if problem.vocabulary is not None:
            self._shard(route[-1], microbatch)
        for stage in reversed(local):
            inputs = [f"{self._backward_of(behind[stage], microbatch)} done"] if stage in behind else []
            self._backward(stage, microbatch, inputs)

    def _forward(self, stage: int, microbatch: int, inputs: list[str]) -> None:
        action = Action(stage, ActionKind.FORWARD, microbatch)
        figures = self.problem.stages[stage]
        kept = figures.until_weight_gradient_bytes - figures.offloaded_bytes
        held = [
            *self._held(f"{action} until I", figures.until_input_gradient_bytes),
            *self._held(f"{action} until W", kept),
            *self._held(f"{action} offloaded", figures.offloaded_bytes),
        ]
        self._computes(action, inputs, held, figures.forward_ns)

    def _backward_of(self, stage: int, microbatch: int) -> Action:
        whole = Action(stage, ActionKind.BACKWARD, microbatch)
        return whole if whole in self.whole else Action(stage, ActionKind.INPUT_GRADIENT, microbatch)

    def _backward(self, stage: int, microbatch: int, inputs: list[str]) -> None:
        """I and W, or B: they read what F left, and W what I left besides."""
        figures = self.problem.stages[stage]
        forward = Action(stage, ActionKind.FORWARD, microbatch)
        action = self._backward_of(stage, microbatch)
        early = self._known(f"{forward} until I")
        late = [*self._known(f"{forward} until W"), *self._known(f"{forward} offloaded")]
        inputs = [*inputs, f"{forward} done", *early, *late]
        if action.kind is ActionKind.BACKWARD:
            self._computes(action, inputs, [], figures.whole_backward_ns, frees=[*early, *late])
            self._ends.setdefault(stage, []).append(f"{action} done")
            return
        between = self._held(f"{action} until W", figures.between_gradients_bytes, Role.GRADIENT)
        self._computes(action, inputs, between, figures.input_gradient_ns, frees=early)
        last = Action(stage, ActionKind.WEIGHT_GRADIENT, microbatch)
        inputs = [f"{action} done", *late, *between]
        self._computes(last, inputs, [], figures.weight_gradient_ns, frees=[*late, *between])
        self._ends.setdefault(stage, []).append(f"{last} done")

    def _shard(self, last: int, microbatch: int) -> None:
        """S and T of this rank's shard of the vocabulary, and what all ranks do between them."""
        vocabulary = self.problem.vocabulary
        assert vocabulary is not None
        if self.problem.stages[last].rank != self.rank:
            self._meets(Transfer(last, TransferKind.BROADCAST, microbatch), [])
        output = Action(self.rank, ActionKind.OUTPUT, microbatch)
        held = self._held(f"{output} until T", vocabulary.shard_bytes)
        self._computes(output, [], held, vocabulary.output_ns[self.rank])
        self._meets(Transfer(last, TransferKind.REDUCE_OUTPUT, microbatch), [f"{output} done"])
        gradient = Action(self.rank, ActionKind.OUTPUT_GRADIENT, microbatch)
        self._computes(gradient, held, [], vocabulary.gradient_ns[self.rank], frees=held)
        if vocabulary.barriers == 2:
            self._meets(Transfer(last, TransferKind.REDUCE_GRADIENT, microbatch), [f"{gradient} done"])

    def _computes(
        self, action: Action, inputs: list[str], holds: list[str], duration_ns: int, *, frees: Sequence[str] = ()
    ) -> None:
        """An operator that takes as many operations as nanoseconds, for the verifier to check; what it waits for and
        what is sent behind it are written down with it.
        """
        for transfer in self.arrives.get(action, ()):
            if transfer.kind in (TransferKind.RECV_F, TransferKind.RECV_B):
                self._meets(transfer, [])
            inputs = [*inputs, f"{transfer} done"]
        name = str(action)
        outputs = [*self._held(f"{name} done", 0), *holds]
        origin = f"{action.kind.value} of stage {action.stage}"
        self._ops.append(Op(name, tuple(inputs), tuple(outputs), flops=duration_ns, origin=origin))
        self.makes[name], self.frees[name] = tuple(holds), tuple(frees)
        for kind in _SENDS.get(action.kind, ()):
            transfer = Transfer(action.stage, kind, action.microbatch)
            if transfer in self.mine:
                self._meets(transfer, [f"{name} done"])

    def _meets(self, transfer: Transfer, inputs: list[str]) -> None:
        """An operator that sends, receives or takes part; what arrives is its output."""
        message = self.mine[transfer]
        ranks = tuple(sorted(message.ranks))
        kind = _KINDS.get(transfer.kind, CollectiveKind.SEND_RECV)
        group = f"ranks {ranks[0]} and {ranks[1]}" if kind is CollectiveKind.SEND_RECV else "all ranks"
        tag = f"{message.transfers[0][1]} from rank {message.ranks[0]}"
        self._communicates(str(transfer), inputs, Collective(kind, group, ranks, message.nbytes, tag))

    def _communicates(self, name: str, inputs: Sequence[str], what: Collective) -> None:
        outputs = tuple(self._held(f"{name} done", 0))
        self._ops.append(Op(name, tuple(inputs), outputs, OpKind.COLLECTIVE, collective=what))

    def _held(self, name: str, nbytes: int, role: Role = Role.ACTIVATION) -> list[str]:
        """A new buffer. Only what tells that something is done is one without bytes."""
        if not nbytes and not name.endswith(" done"):
            return []
        self._tensors[name] = Tensor(name, (nbytes,), "uint8", role)
        return [name]

    def _known(self, name: str) -> list[str]:
        return [name] if name in self._tensors else []
