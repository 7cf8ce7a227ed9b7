"""A rank's graph, run in the order of its nodes: on a host with any backend, on a GPU with streams or as a CUDA graph.

On a GPU, what computes is queued on the caller's stream, and each process group has a stream of high priority, on which
its collectives are started. A backend queues a collective behind what the stream holds that it is started on. On the
caller's stream that would be everything issued before; on the group's it is what the operands come from, whatever else
was issued since: an event behind the last call that the start depends on says so. Waits are on the caller's stream.

Memory: operands are held until the host has issued the wait. A result that was allocated on a group's stream is marked
as used by the caller's (``record_stream``), so that its bytes go to nobody before the work that reads them is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...errors import ExecutionError
from ..frontend.aten import bind_arguments, tensors_in
from ..frontend.collectives import is_wait
from ..frontend.dynamo.frozen import is_start, is_view, orderings
from ..frontend.dynamo.traced import copied, device_of

__all__ = ["CapturedRank", "RankExecutor"]

PRIORITY = -1  # of streams that collectives are started on: before what computes
WARM_UP_CALLS = 2  # before a capture: communicators are made, and libraries choose their kernels

Start = Callable[..., Any]


class RankExecutor:
    """Calls a rank's graph with its flat inputs, and returns a tuple of its outputs.

    ``module`` is at the AOT level: ATen operators, functional collectives and their waits, each where it is to be
    issued. ``starts`` replaces the calls that start some collectives, by node name: a function of the same arguments
    that queues the collective on the current stream and returns its result, such as a kernel of ours on symmetric
    memory, with as many programs as the function chooses. On the host it must return a finished result.

    Raises:
        ExecutionError: the module is frozen for Inductor, or ``starts`` names a call that starts nothing, or one that
            the module does not wait for.
    """

    def __init__(
        self, module: GraphModule, *, starts: Mapping[str, Start] | None = None, device: torch.device | None = None
    ) -> None:
        self.device = device_of(module, ()) if device is None else device
        self.module = copied(module)
        nodes = list(self.module.graph.nodes)
        waits = _waits(nodes)
        self._check(waits, starts or {})
        #: Collectives that the caller waits for, not the module.
        self.unfinished = tuple(start.name for start, own in waits.items() if not own)
        self.streams: dict[str, Any] = {}
        # Two calls at once would record each other's events.
        self._one_at_a_time = threading.Lock() if self.device.type == "cuda" and waits else nullcontext()
        before = orderings(nodes)
        for start, own in waits.items():
            replaced = (starts or {}).get(start.name)
            self._write(start, own, replaced, _last(_sources(start, before), nodes))
        self.module.graph.lint()
        self.module.recompile()

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run it; on a GPU, queue it on the current stream."""
        is_queued = self.device.type == "cuda"
        with self._one_at_a_time, torch.no_grad(), torch.cuda.device(self.device) if is_queued else nullcontext():
            outputs = self.module(*inputs)
        return tuple(outputs) if isinstance(outputs, list | tuple) else (outputs,)

    def _check(self, waits: Mapping[Node, Sequence[Node]], starts: Mapping[str, Start]) -> None:
        for node in self.module.graph.nodes:
            if str(node.target) == "control_deps":
                raise ExecutionError(
                    f"node {node.name!r} is held in an order for Inductor", hint="run the module as it was before"
                )
        named = {start.name: own for start, own in waits.items()}
        for name in starts:
            if not named.get(name):
                what = "is started in another way, but nothing waits for it" if name in named else "starts nothing"
                raise ExecutionError(f"node {name!r} {what}", hint=f"collectives are {', '.join(named) or 'none'}")

    def _write(self, start: Node, waits: Sequence[Node], replaced: Start | None, behind: Node | None) -> None:
        """Write a start and its waits, and the event between what the start depends on and it, into the module."""
        graph = self.module.graph
        operands = tuple(start.all_input_nodes)
        flight: _InFlight | _Queued = _InFlight(start.target, replaced)
        if self.device.type == "cuda":
            group = _group_of(start)
            if group not in self.streams:
                self.streams[group] = _stream(self.device)
            flight = queued = _Queued(start.target, replaced, self.device, self.streams[group])
            first = next(node for node in graph.nodes if node.op != "placeholder")
            with graph.inserting_before(first) if behind is None else graph.inserting_after(behind):
                graph.call_function(queued.ready)
        start.target = flight.start
        for wait in waits:
            wait.args, wait.kwargs = (wait.args[0], *operands), {}
            wait.target = flight.wait


def _waits(nodes: Sequence[Node]) -> dict[Node, list[Node]]:
    """The waits of each start, in order."""
    found: dict[Node, list[Node]] = {}
    for node in nodes:
        if is_start(node):
            found[node] = []
        elif node.op == "call_function" and is_wait(node.target):
            made = node.args[0]
            while isinstance(made, Node) and is_view(made):
                made = made.all_input_nodes[0]
            if isinstance(made, Node) and made in found:
                found[made].append(node)
    return found


def _sources(start: Node, before: Mapping[Node, Sequence[Node]]) -> set[Node]:
    """The calls that a start comes behind: what wrote its operands, and what still reads the memory it writes."""
    found: set[Node] = set()
    stack = list(before[start])
    while stack:
        node = stack.pop()
        if is_view(node):
            stack += before[node]
        elif node.op != "placeholder":
            found.add(node)
    return found


def _last(nodes: Collection[Node], order: Sequence[Node]) -> Node | None:
    return next((node for node in reversed(order) if node in nodes), None)


def _group_of(start: Node) -> str:
    assert isinstance(start.target, torch._ops.OpOverload)
    return str(bind_arguments(start.target, start.args, start.kwargs).get("group_name", ""))


def _stream(device: torch.device) -> Any:
    new: Any = torch.cuda.Stream
    return new(device, priority=PRIORITY)


class _InFlight:
    """One collective of a host: started by what the graph calls, or by what replaces it."""

    def __init__(self, call: Any, replaced: Start | None) -> None:
        self.call: Start = replaced or call
        self.is_replaced = replaced is not None

    def start(self, *args: Any, **kwargs: Any) -> Any:
        """Start it."""
        return self.call(*args, **kwargs)

    def wait(self, result: Any, *operands: Any) -> Any:
        """Wait for it; the caller has held its operands until now."""
        return result if self.is_replaced else torch.ops._c10d_functional.wait_tensor(result)


class _Queued(_InFlight):
    """One collective of a GPU: started on ``stream``, behind the last `ready`."""

    def __init__(self, call: Any, replaced: Start | None, device: torch.device, stream: Any) -> None:
        super().__init__(call, replaced)
        event: Any = torch.cuda.Event
        self.device, self.stream, self.is_ready, self.is_done = device, stream, event(), event()

    def ready(self) -> None:
        """What the collective depends on has been issued."""
        self.is_ready.record(torch.cuda.current_stream(self.device))

    def start(self, *args: Any, **kwargs: Any) -> Any:
        """Start it behind that, whatever has been issued since."""
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_event(self.is_ready)
        torch.cuda.set_stream(self.stream)
        try:
            result = self.call(*args, **kwargs)
            if self.is_replaced:
                self.is_done.record(self.stream)
        finally:
            torch.cuda.set_stream(caller)
        return result

    def wait(self, result: Any, *operands: Any) -> Any:
        """Let what is issued next on the caller's stream wait for it."""
        caller = torch.cuda.current_stream(self.device)
        if self.is_replaced:
            caller.wait_event(self.is_done)
        result = super().wait(result, *operands)
        for tensor in tensors_in(result):
            tensor.record_stream(caller)
        return result


class CapturedRank:
    """As the executor it wraps; from the third call on a CUDA graph of it, on every rank at the same call.

    ``static`` are positions of inputs whose addresses never change, as those of weights; the others are copied into
    tensors of the graph's own, and outputs into fresh ones. A call in which a static input has moved raises
    ExecutionError: ranks that capture anew at different calls would wait for one another.

    Raises:
        ExecutionError: the executor is not of a GPU, or does not wait for all that it starts.
    """

    def __init__(self, executor: RankExecutor, static: Collection[int] = ()) -> None:
        if executor.device.type != "cuda":
            raise ExecutionError(f"a CUDA graph cannot hold work of {executor.device}")
        if executor.unfinished:
            raise ExecutionError(
                f"a CUDA graph must wait for {executor.unfinished[0]!r}, which the module leaves to its caller"
            )
        self.executor, self.static = executor, frozenset(static)
        self._calls = 0
        self._graph: Any = None
        self._inputs: list[Any] = []
        self._outputs: tuple[Any, ...] = ()

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run it, by one launch from the third call on. Raises ExecutionError."""
        self._calls += 1
        if self._calls <= WARM_UP_CALLS:
            return self.executor(*inputs)
        if self._graph is None:
            self._capture(inputs)
        for number, (own, given) in enumerate(zip(self._inputs, inputs, strict=True)):
            if number not in self.static and isinstance(given, torch.Tensor):
                own.copy_(given)
            elif isinstance(given, torch.Tensor) and given.data_ptr() != own.data_ptr():
                raise ExecutionError(f"input {number} has moved since its CUDA graph was captured", hint="copy into it")
        self._graph.replay()
        return tuple(item.clone() if isinstance(item, torch.Tensor) else item for item in self._outputs)

    def _capture(self, inputs: Sequence[Any]) -> None:
        self._inputs = [
            item.clone() if isinstance(item, torch.Tensor) and number not in self.static else item
            for number, item in enumerate(inputs)
        ]
        self._graph = torch.cuda.CUDAGraph()
        # Threads of communicators go on querying events meanwhile.
        with torch.cuda.device(self.executor.device), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = self.executor(*self._inputs)
