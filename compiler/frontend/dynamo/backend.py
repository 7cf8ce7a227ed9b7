"""The backend: Inductor's front half around compilers of ours.

``compile_fx`` is Inductor's own entry. It runs AOTAutograd with Inductor's decompositions, passes and partitioner, and
calls an ``inner_compile`` for each forward, backward or inference graph: ours lowers the graph to a ``Program``, plans
it, and returns what runs it (tier T1). Where a graph cannot be recorded, stock Inductor compiles it in our order (T0).
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from ....errors import ExecutionError, Infeasible
from ....hw_models.model import HardwareModel
from ...graph import Graph
from ...partition import Partition, PartitionProblem
from ...runtime.device.host import HostMemory, on_host, residents
from ...runtime.device.layout import DevicePlan
from ...runtime.device.offload import fetched, sent
from ...runtime.device.program import Origin, Program, Ref
from .explain import described
from .fallbacks import Fallbacks
from .figures import figured
from .hosted import HostedGraph
from .lowering import Unrecorded, lower
from .options import MODES, BackendOptions
from .planned import LOADING, PlannedGraph, StockGraph, bucket_of
from .repairs import repaired
from .report import GraphReport, Reports
from .retarget import retarget
from .stock import in_our_order
from .traced import copied, device_of, sized_example
from .training import ATTEMPTS, UNLIMITED, Partitioner, step_bytes

__all__ = ["FORMAT", "Backend", "Planners"]

log = logging.getLogger("opweave.backend")
_compiler_config: Any = torch.compiler.config

#: Changes whenever what the cache holds would be read differently.
FORMAT = 2


@dataclass(frozen=True)
class Planners:
    """What the backend is handed from above: how to plan a graph, order one, and model a device.

    ``plan`` takes a program all of whose sizes are integers, a machine, the options, a limit in bytes or ``None``, and
    storages in host memory that may stay on the device between calls; where any are, it returns a ``HostPlan``.
    ``order`` takes the graph of stock Inductor's scheduler and the options, and returns operator indices. ``machine``
    takes a device and the options. ``partition`` takes a problem, the most bytes to save on the device, answers to
    begin with, and the options.
    """

    plan: Callable[[Program, HardwareModel, BackendOptions, int | None, frozenset[str]], DevicePlan]
    order: Callable[[Graph, BackendOptions], tuple[int, ...]]
    machine: Callable[[torch.device, BackendOptions], HardwareModel]
    partition: Callable[[PartitionProblem, int, Sequence[Any], BackendOptions], Partition]


@dataclass
class Backend:
    """Compiles Dynamo's graphs; keeps reports of them and counts of fallbacks."""

    planners: Planners
    version: str
    reports: Reports = field(default_factory=Reports)
    fallbacks: Fallbacks = field(default_factory=Fallbacks)
    _numbers: Any = field(default_factory=itertools.count)
    #: By device and options, as long as a graph uses one: graphs of one model share the copies of its weights.
    _memories: weakref.WeakValueDictionary[tuple[torch.device, str], HostMemory] = field(
        default_factory=weakref.WeakValueDictionary
    )

    def __call__(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], options: BackendOptions
    ) -> Callable[..., Any]:
        """A function of the graph's flat inputs.

        Raises:
            Infeasible: no plan holds the memory limit.
            ExecutionError: a fallback would be needed, and the options are strict.
            OptionError: the option ``device`` is for another model: one with gradients, or on a device already.
            ModelError: what works on the host only cannot run on that device.
        """
        number = next(self._numbers)
        if options.device is not None:
            return self._hosted(module, inputs, options, number)
        machine = self.planners.machine(device_of(module, inputs), options)
        limit = options.limit_bytes(machine.scratchpad_memory.capacity_bytes)
        if limit is None:
            return self._compiled(module, inputs, _Inner(self, options, number, machine))
        return self._within(module, inputs, _Inner(self, options, number, machine, limit))

    def _hosted(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], options: BackendOptions, number: int
    ) -> Callable[..., Any]:
        """For a model in host memory: the device does the work, within the limit or what the device has."""
        device = torch.device(options.device or "")
        if device.type != "cpu" and device.index is None:
            device = torch.device(device.type, torch.accelerator.current_device_index())
        module, inputs = retarget(module, inputs, device)
        machine = self.planners.machine(device, options)
        capacity = machine.scratchpad_memory.capacity_bytes
        limit = options.limit_bytes(capacity)
        memory = self._memories.setdefault((device, options.key), HostMemory(device))
        inner = _Inner(self, options, number, machine, capacity if limit is None else limit, memory=memory)
        return self._compiled(module, inputs, inner)

    def _compiled(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], inner: _Inner, tag: str = ""
    ) -> Callable[..., Any]:
        with ExitStack() as stack:
            stack.enter_context(_compiler_config.patch(cache_key_tag=_cache_tag(inner.options, self.version) + tag))
            stack.enter_context(_functorch_settings(inner.options))
            token = LOADING.set(inner)
            stack.callback(LOADING.reset, token)
            settings = {**MODES[inner.options.mode], **inner.settings}
            compiled: Any = compile_fx(module, inputs, inner_compile=inner, config_patches=settings)
        if not tag:
            inner.settle()
        return compiled  # type: ignore[no-any-return] # for a graph of Dynamo's, always a function

    def _within(self, module: torch.fx.GraphModule, inputs: Sequence[Any], inner: _Inner) -> Callable[..., Any]:
        """The first attempt that holds the limit: ever less is saved between the halves of a training step."""
        assert inner.limit is not None
        saved_limit, least, lowest, reason = UNLIMITED, UNLIMITED, 0, ""
        for number in range(ATTEMPTS):
            attempt = inner.saving(saved_limit)
            try:
                compiled = self._compiled(copied(module), inputs, attempt, f" saved {saved_limit}")
            except Infeasible as error:
                answer = attempt.partitioned
                if answer is None:
                    if saved_limit == UNLIMITED:  # no graph of a training step
                        raise
                    saved_limit = lowest = error.required_bytes  # so much has to be saved
                    continue
                needed, saved, reason = error.required_bytes, answer.recount.kept_bytes, f": {error.message}"
            else:
                needed = step_bytes(attempt.reports) if any(r.phase == "backward" for r in attempt.reports) else 0
                if needed <= inner.limit:
                    attempt.settle()
                    return compiled
                saved = max(report.saved_bytes for report in attempt.reports)
            log.info("saving %d bytes between forward and backward, a step needs %d", saved, needed)
            least = min(least, needed)
            if min(saved, saved_limit) <= lowest:
                break
            saved_limit = min(saved, saved_limit) - (needed - inner.limit)
            if number >= ATTEMPTS - 3:  # small steps have not led there: the last ones save as little as can be
                saved_limit = lowest
            saved_limit = max(saved_limit, lowest)
        raise Infeasible(
            f"a training step within {inner.limit:,} bytes was not found; the least found needs {least:,}{reason}",
            required_bytes=least,
            available_bytes=inner.limit,
            hint="parameters, inputs and outputs stay on the device: a smaller batch, or a larger limit",
        )


def _cache_tag(options: BackendOptions, version: str) -> str:
    return f"{torch.compiler.config.cache_key_tag} opweave {version} format {FORMAT} options {options.key}"


def _functorch_settings(options: BackendOptions) -> Any:
    """Entries of the cache hold our objects; a backward graph is compiled, and stored, with its forward graph."""
    from torch._functorch import config

    return config.patch(
        bundled_autograd_cache=options.cache,
        enable_autograd_cache=options.cache and config.enable_autograd_cache,
        force_non_lazy_backward_lowering=True,
    )


@dataclass
class _Inner:
    """Compiles one graph of AOTAutograd's; as Inductor's ``compile_fx_inner``, whose place it takes.

    Its ``reports`` are kept back until the attempt that they belong to is settled.
    """

    backend: Backend
    options: BackendOptions
    number: int
    machine: HardwareModel
    limit: int | None = None
    partitioner: Partitioner | None = None
    memory: HostMemory | None = None
    reports: list[GraphReport] = field(default_factory=list)
    is_settled: bool = False

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of Inductor's for the whole of a graph."""
        return {} if self.partitioner is None else {"custom_partitioner_fn": self.partitioner}

    def saving(self, saved_limit: int) -> _Inner:
        """The same for an attempt that saves at most so many bytes between the halves of a training step."""

        def choose(problem: PartitionProblem, within: int, starts: Sequence[Any]) -> Partition:
            return self.backend.planners.partition(problem, within, starts, self.options)

        partitioner = Partitioner(choose, self.machine, saved_limit, self.options.key)
        return dataclasses.replace(self, partitioner=partitioner, reports=[], is_settled=False)

    def settle(self) -> None:
        """Publish the reports: this is what runs."""
        self.is_settled = True
        for report in self.reports:
            self.backend.reports.add(report)
            log.info("%s", "\n".join(described(report)))

    def found(self, report: GraphReport) -> None:
        """Keep the report of a graph that was made, or that the cache had."""
        self.reports.append(report)
        if self.is_settled:  # compiled lazily
            self.backend.reports.add(report)

    @property
    def replan(self) -> Callable[[Program, Sequence[int]], DevicePlan]:
        """Makes a plan for a program all of whose sizes are integers, some inputs of which are weights."""
        return self._plan

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        phase = "inference" if kwargs.get("is_inference") else "backward" if kwargs.get("is_backward") else "forward"
        name = f"graph {self.number} {phase}"
        report = GraphReport(name, phase, "T1", str(device_of(module, inputs)), limit_bytes=self.limit)
        why = ""
        if self.options.tier != "T0":
            try:
                return self._planned(module, inputs, report, kwargs)
            except Unrecorded as reason:
                why = f"its host code has {reason}"
        if self.limit is not None:
            raise ExecutionError(
                f"{name} cannot hold a memory limit, which only tier T1 does: {why or 'tier T0 was asked for'}",
                hint="without memory_limit it runs on stock Inductor",
            )
        if self.options.tier != "T0":
            what = "runs on stock Inductor in our order"
            noted = self.backend.fallbacks.note(name, what, why, strict=self.options.strict)
            report = dataclasses.replace(report, fallbacks=(noted,))
        return self._stock(module, inputs, report, kwargs)

    def _planned(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], report: GraphReport, kwargs: Mapping[str, Any]
    ) -> PlannedGraph:
        begin = time.monotonic()
        program = lower(
            copied(module),
            inputs,
            is_inference=report.phase == "inference",
            is_backward=report.phase == "backward",
            static_inputs=kwargs.get("static_input_idxs", ()),
            graph_id=kwargs.get("graph_id"),
            settings=MODES[self.options.mode],  # a backward graph may be compiled after the call that set them
        )
        program = self._divided(program, module, report.phase)
        report = dataclasses.replace(report, lowering_s=time.monotonic() - begin, **self._saved(report.phase))
        static = tuple(kwargs.get("static_input_idxs", ()))
        key = f"{report.name} {self.options.key}"
        device = torch.device(report.device)
        if self.memory is not None:
            graph: PlannedGraph = HostedGraph(on_host(program), device, report, key, static, memory=self.memory)
        else:
            # A graph has memory beside what is planned: inputs, outputs and an arena of its own.
            captures = self.options.cuda_graph and report.phase == "inference" and self.limit is None
            graph = PlannedGraph(program, device, report, key, static if captures else None)
        graph.replan = self._plan
        bucket = tuple(map(bucket_of, graph.values([sized_example(item) for item in inputs])))
        example = graph.sized(bucket)
        begin = time.monotonic()
        plan = self._plan(example, graph.weights)
        graph.plans[bucket] = plan
        graph.report = figured(report, example, plan, time.monotonic() - begin)
        self.found(graph.report)
        return graph

    def _divided(self, program: Program, module: torch.fx.GraphModule, phase: str) -> Program:
        """``program`` as half of a training step: what it is handed, and what waits in host memory in between."""
        halves = self.partitioner.halves if self.partitioner is not None else None
        offloaded = {halves.saved[p] for p in halves.offloaded} if halves is not None else set()
        if phase == "backward":
            return fetched(_handed_over(program), offloaded)
        if phase == "forward" and offloaded:
            returned = torch.utils._pytree.arg_tree_leaves(*module.graph.output_node().args)
            saved = range(len(returned) - len(halves.saved), len(returned)) if halves is not None else ()
            return sent(program, [p for p in saved if getattr(returned[p], "name", None) in offloaded])
        return program

    @property
    def partitioned(self) -> Partition | None:
        """How a training step was divided, if it was."""
        halves = self.partitioner.halves if self.partitioner is not None else None
        return None if halves is None else halves.partition

    def _saved(self, phase: str) -> dict[str, Any]:
        """What a report says of the partition, in the forward half's."""
        answer = self.partitioned
        if answer is None or phase != "forward":
            return {}
        return {
            "saved_bytes": answer.recount.kept_bytes,
            "offloaded_bytes": sum(answer.problem.values[v].nbytes for v in answer.offloaded),
            "recomputed_s": answer.recount.again_ps / 1e12,
        }

    def _plan(self, program: Program, weights: Sequence[int] = ()) -> DevicePlan:
        limit = self.limit
        if limit is not None:  # the caller keeps what the forward half was given, whether this half sees it or not
            kept = max((report.held_bytes for report in self.reports if report.phase == "forward"), default=0)
            limit -= max(0, kept - program.held_bytes)
        candidates = residents(program, weights)
        return self.backend.planners.plan(program, self.machine, self.options, limit, candidates)

    def _stock(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], report: GraphReport, kwargs: Mapping[str, Any]
    ) -> StockGraph:
        begin = time.monotonic()

        def order(graph: Graph) -> Sequence[int]:
            return self.backend.planners.order(graph, self.options)

        with inductor_config.patch(dict(self.settings)), repaired(), in_our_order(order):
            compiled = compile_fx_inner(module, inputs, **kwargs)
        report = dataclasses.replace(report, tier="T0", lowering_s=time.monotonic() - begin)
        self.found(report)
        return StockGraph(compiled, report)


def _handed_over(program: Program) -> Program:
    """A backward program whose inputs are the caller's no more: what autograd saved for it, and the gradients it gets.

    Forward inputs that were saved (AOTAutograd names them ``primals``) are still held by whoever passed them.
    """
    storages = dict(program.storages)
    for item in program.inputs:
        if isinstance(item, Ref) and not item.name.startswith("primals"):
            storages[item.name] = dataclasses.replace(storages[item.name], origin=Origin.GIVEN)
    return dataclasses.replace(program, storages=storages)
