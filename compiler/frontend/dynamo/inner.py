"""The compiler of one graph: ours where Inductor's front half asks for its own."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner

from ....errors import ExecutionError, ModelError
from ....hw_models.model import HardwareModel
from ...fusion import Called, Match
from ...graph import Graph
from ...overlap import OverlapOptions
from ...partition import Partition, PartitionProblem
from ...runtime.device.host import HostMemory, on_host, residents
from ...runtime.device.layout import DevicePlan
from ...runtime.device.program import Program
from .differentiable import Differentiable, launch_differentiable
from .explain import described
from .fallbacks import Fallbacks
from .figures import figured
from .frozen import SETTINGS
from .hosted import HostedGraph
from .joint import Halves
from .launches import Rules, launch_instead, matched, write_beside
from .lowering import Unrecorded, lower
from .options import MODES, BackendOptions
from .overlapping import Cutting, Overlap, communicates, hidden, own_inputs
from .planned import PlannedGraph, StockGraph
from .repairs import repaired
from .report import GraphReport, Reports
from .stock import in_our_order
from .traced import copied, device_of, sized_example
from .training import Partitioner, half, saved_figures

__all__ = ["Inner", "Planners"]

log = logging.getLogger("opweave.backend")


@dataclass(frozen=True)
class Planners:
    """What the backend is handed from above: how to plan a graph, order one, and model a device.

    ``plan`` takes a program all of whose sizes are integers, a machine, the options, a limit in bytes or ``None``, and
    storages in host memory that may stay on the device between calls; where any are, it returns a ``HostPlan``.
    ``order`` takes the graph of stock Inductor's scheduler and the options, and returns operator indices. ``machine``
    takes a device and the options. ``rules`` takes the options, and whether kernels need gradients, and returns the
    match rules of the fused kernels that they allow; ``launch`` takes a graph, matches in it, the machine and the
    options, and returns which of them to launch; ``called`` says of a kernel's name how it is called. ``partition``
    takes a problem, the most bytes to save on the device, answers to begin with, and the options. ``overlap`` takes a
    module that communicates, inputs along which it may be cut, the machine and what is wanted.
    """

    plan: Callable[[Program, HardwareModel, BackendOptions, int | None, frozenset[str]], DevicePlan]
    order: Callable[[Graph, BackendOptions], tuple[int, ...]]
    machine: Callable[[torch.device, BackendOptions], HardwareModel]
    rules: Callable[[BackendOptions, bool], Rules]
    launch: Callable[[Graph, Sequence[Match], HardwareModel, BackendOptions], Sequence[Match]]
    called: Callable[[str], Called | None]
    partition: Callable[[PartitionProblem, int, Sequence[Any], BackendOptions], Partition]
    overlap: Overlap


@dataclass
class Inner:
    """Compiles the graphs that AOTAutograd makes of one of Dynamo's, in the place of Inductor's ``compile_fx_inner``.

    Its ``reports`` are kept back until the attempt that they belong to is settled, and then ``published``.
    """

    planners: Planners
    published: Reports
    fallbacks: Fallbacks
    options: BackendOptions
    number: int
    machine: HardwareModel
    limit: int | None = None
    partitioner: Partitioner | None = None
    memory: HostMemory | None = None
    launches: Differentiable = ()
    reports: list[GraphReport] = field(default_factory=list)
    is_settled: bool = False

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of Inductor's for the whole of a graph."""
        return {} if self.partitioner is None else {"custom_partitioner_fn": self.partitioner}

    @property
    def halves(self) -> Halves | None:
        """The halves of a training step, if it was divided here."""
        return None if self.partitioner is None else self.partitioner.halves

    @property
    def partitioned(self) -> Partition | None:
        """How a training step was divided, if it was."""
        return None if self.halves is None else self.halves.partition

    def saving(self, saved_limit: int) -> Inner:
        """The same for an attempt that saves at most so many bytes between the halves of a training step."""

        def choose(problem: PartitionProblem, within: int, starts: Sequence[Any]) -> Partition:
            return self.planners.partition(problem, within, starts, self.options)

        partitioner = Partitioner(choose, self.machine, saved_limit, self.options.key)
        return dataclasses.replace(self, partitioner=partitioner, reports=[], is_settled=False)

    def cutting(self) -> Inner:
        """The same for a training step whose joint graph may be cut, so that its parts hide collectives."""
        wanted = self.options.overlapping
        if wanted is None:
            return self
        cut = Cutting(self.planners.overlap, self.machine, wanted)
        return dataclasses.replace(self, partitioner=Partitioner(None, self.machine, 0, self.options.key, cut))

    def differentiable(self, module: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """``module``, a graph of Dynamo's, with kernels that have gradients, where they were asked for."""
        if self.options.kernels in ("auto", "off"):  # what a backward costs that computes again, no prediction tells
            return module

        def choose(graph: Graph, matches: Sequence[Match]) -> Sequence[Match]:
            return self.planners.launch(graph, matches, self.machine, self.options)

        module, self.launches = launch_differentiable(module, self.planners.rules(self.options, True), choose)
        return module

    def settle(self) -> None:
        """Publish the reports: this is what runs."""
        self.is_settled = True
        for report in self.reports:
            self.published.add(report)
            log.info("%s", "\n".join(described(report)))

    def found(self, report: GraphReport) -> None:
        """Keep the report of a graph that was made, or that the cache had, by the number that it has here."""
        report = dataclasses.replace(report, name=f"graph {self.number} {report.phase}")
        self.reports.append(report)
        if self.is_settled:  # compiled lazily
            self.published.add(report)

    @property
    def replan(self) -> Callable[[Program, Sequence[int]], DevicePlan]:
        """Makes a plan for a program all of whose sizes are integers, some inputs of which are weights."""
        return self._plan

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        """What runs a graph, given the arguments of ``compile_fx_inner``. Raises ExecutionError, Infeasible."""
        phase = "inference" if kwargs.get("is_inference") else "backward" if kwargs.get("is_backward") else "forward"
        name = f"graph {self.number} {phase}"
        report = GraphReport(name, phase, "T1", str(device_of(module, inputs)), limit_bytes=self.limit)
        if self.options.overlapping is not None and communicates(module):
            report, changed = self._overlapped(module, report, kwargs, self.options.overlapping)
            if changed is not None:
                return self._frozen(changed, inputs, report, kwargs)
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
            noted = self.fallbacks.note(name, what, why, strict=self.options.strict)
            report = dataclasses.replace(report, fallbacks=(noted,))
        return self._stock(module, inputs, report, kwargs)

    def _planned(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], report: GraphReport, kwargs: Mapping[str, Any]
    ) -> PlannedGraph:
        begin = time.monotonic()
        changed = copied(module)
        report = dataclasses.replace(report, launches=self._launched(changed, report))
        write_beside(changed, self.planners.called)
        program = lower(
            changed,
            inputs,
            is_inference=report.phase == "inference",
            is_backward=report.phase == "backward",
            static_inputs=kwargs.get("static_input_idxs", ()),
            graph_id=kwargs.get("graph_id"),
            settings=MODES[self.options.mode],  # a backward graph may be compiled after the call that set them
        )
        program = half(program, module, report.phase, self.halves)
        saved = saved_figures(report.phase, self.partitioned)
        report = dataclasses.replace(report, lowering_s=time.monotonic() - begin, **saved)
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
        bucket = graph.bucket(graph.values([sized_example(item) for item in inputs]))
        example = graph.sized(bucket)
        begin = time.monotonic()
        plan = self._plan(example, graph.weights)
        graph.plans[bucket] = plan
        graph.report = figured(report, example, plan, time.monotonic() - begin)
        self.found(graph.report)
        return graph

    def _launched(self, module: torch.fx.GraphModule, report: GraphReport) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Put fused kernels into ``module``; returns each with the names of the calls that it replaces."""
        if self.options.kernels == "off" or (self.options.kernels == "auto" and not report.device.startswith("cuda")):
            return ()
        known = self.launches if report.phase != "backward" else ()
        try:
            found, matches = matched(module, self.planners.rules(self.options, False))
        except ModelError as error:  # kernels are matched on plain tensors of known sizes; the graph runs without
            log.info("%s: no fused kernel is looked for: %s", report.name, error.message)
            return known
        chosen = self.planners.launch(found.graph, matches, self.machine, self.options)
        return (*known, *(launch_instead(module, found, chosen) if chosen else ()))

    def _overlapped(
        self, module: torch.fx.GraphModule, report: GraphReport, kwargs: Mapping[str, Any], wanted: OverlapOptions
    ) -> tuple[GraphReport, torch.fx.GraphModule | None]:
        """What became of the collectives, for the report; and ``module`` in an order to keep, if it gains by one."""
        begin = time.monotonic()
        static = kwargs.get("static_input_idxs", ())
        own = own_inputs(module, static) if report.phase == "inference" else ()
        if not own:  # the halves of a training step, which was cut as a whole, are put in order only
            wanted = dataclasses.replace(wanted, sizes=())
        changed, done = hidden(copied(module), own, self.planners.overlap, self.machine, wanted)
        cut = self.partitioner.cut if self.partitioner is not None else None
        told, is_cut = done, False
        if isinstance(cut, Cutting) and cut.answer is not None and report.phase != "inference":
            is_cut = bool(cut.answer.sizes)
            told = cut.answer if is_cut else done  # what a cut gains is to be seen on the whole step
        seconds = done.seconds[1]
        report = dataclasses.replace(report, overlap=told, predicted_s=seconds, planning_s=time.monotonic() - begin)
        return report, None if done.reason and not is_cut else changed

    def _frozen(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], report: GraphReport, kwargs: Mapping[str, Any]
    ) -> StockGraph:
        """A graph that communicates, run by stock Inductor in an order that it keeps."""
        begin = time.monotonic()
        with inductor_config.patch({**self.settings, **SETTINGS}), repaired():
            compiled = compile_fx_inner(module, inputs, **kwargs)
        report = dataclasses.replace(report, tier="T0", lowering_s=time.monotonic() - begin)
        self.found(report)
        return StockGraph(compiled, report)

    def _plan(self, program: Program, weights: Sequence[int] = ()) -> DevicePlan:
        limit = self.limit
        if limit is not None:  # the caller keeps what the forward half was given, whether this half sees it or not
            kept = max((report.held_bytes for report in self.reports if report.phase == "forward"), default=0)
            limit -= max(0, kept - program.held_bytes)
        candidates = residents(program, weights)
        return self.planners.plan(program, self.machine, self.options, limit, candidates)

    def _stock(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], report: GraphReport, kwargs: Mapping[str, Any]
    ) -> StockGraph:
        begin = time.monotonic()

        def order(graph: Graph) -> Sequence[int]:
            return self.planners.order(graph, self.options)

        with inductor_config.patch(dict(self.settings)), repaired(), in_our_order(order):
            compiled = compile_fx_inner(module, inputs, **kwargs)
        report = dataclasses.replace(report, tier="T0", lowering_s=time.monotonic() - begin)
        self.found(report)
        return StockGraph(compiled, report)
