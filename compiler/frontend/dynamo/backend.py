"""The backend: Inductor's front half around compilers of ours.

``compile_fx`` is Inductor's own entry. It runs AOTAutograd with Inductor's decompositions, passes and partitioner, and
calls an ``inner_compile`` for each forward, backward or inference graph: ours lowers the graph to a ``Program``, plans
it, and returns what runs it (tier T1); where the graph cannot be recorded, stock Inductor compiles it in our order (T0).
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from ....errors import OpweaveError
from ....hw_models.model import HardwareModel
from ...graph import Graph
from ...plan import Plan, Run
from ...runtime.device.layout import DevicePlan, allocated_bytes, live_bytes
from ...runtime.device.program import Origin, Program, Ref
from ...simulate import latency_ns
from .fallbacks import Fallbacks
from .lowering import Unrecorded, lower
from .options import MODES, BackendOptions
from .planned import LOADING, PlannedGraph, StockGraph
from .report import GraphReport, Reports
from .stock import in_our_order

__all__ = ["FORMAT", "Backend", "Planners"]

log = logging.getLogger("opweave.backend")

#: Changes whenever what the cache holds would be read differently.
FORMAT = 1


@dataclass(frozen=True)
class Planners:
    """What the backend is handed from above: how to plan a graph, order one, and model a device.

    ``plan`` takes a program all of whose sizes are integers, a machine and the options. ``order`` takes the graph of stock Inductor's scheduler and the options, and returns operator indices.
    ``machine`` takes a device and the options.
    """

    plan: Callable[[Program, HardwareModel, BackendOptions], DevicePlan]
    order: Callable[[Graph, BackendOptions], tuple[int, ...]]
    machine: Callable[[torch.device, BackendOptions], HardwareModel]


@dataclass
class Backend:
    """Compiles Dynamo's graphs; keeps reports of them and counts of fallbacks."""

    planners: Planners
    reports: Reports = field(default_factory=Reports)
    fallbacks: Fallbacks = field(default_factory=Fallbacks)
    _numbers: Any = field(default_factory=itertools.count)

    def __call__(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], options: BackendOptions
    ) -> Callable[..., Any]:
        """A function of the graph's flat inputs."""
        number = next(self._numbers)
        inner = _Inner(self, options, number)
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.config.patch(cache_key_tag=_cache_tag(options)))
            stack.enter_context(_functorch_settings(options))
            token = LOADING.set(inner)
            stack.callback(LOADING.reset, token)
            compiled: Callable[..., Any] = compile_fx(
                module, inputs, inner_compile=inner, config_patches={**MODES[options.mode], **inner.settings}
            )
            return compiled


def _cache_tag(options: BackendOptions) -> str:
    from .... import __version__

    return f"{torch.compiler.config.cache_key_tag} opweave {__version__} format {FORMAT} options {options.key}"


def _functorch_settings(options: BackendOptions) -> Any:
    """Entries of the cache hold our objects; a backward graph is compiled with its forward graph, and stored with it."""
    from torch._functorch import config

    return config.patch(
        bundled_autograd_cache=options.cache,
        enable_autograd_cache=options.cache and config.enable_autograd_cache,
        force_non_lazy_backward_lowering=True,
    )


@dataclass
class _Inner:
    """Compiles one graph of AOTAutograd's; as Inductor's ``compile_fx_inner``, whose place it takes."""

    backend: Backend
    options: BackendOptions
    number: int

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of Inductor's for the whole of a graph."""
        return {}

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        phase = "inference" if kwargs.get("is_inference") else "backward" if kwargs.get("is_backward") else "forward"
        name = f"graph {self.number} {phase}"
        device = _device_of(module, inputs)
        why = self._not_planned(module)
        if self.options.tier != "T0" and not why:
            try:
                return self._planned(module, inputs, name, phase, device, kwargs)
            except Unrecorded as reason:
                why = f"its host code has {reason}"
        fallbacks = ()
        if self.options.tier != "T0":
            what = f"{name} runs on stock Inductor in its order"
            fallbacks = (self.backend.fallbacks.note(what, why, strict=self.options.strict),)
        return self._stock(module, inputs, name, phase, device, fallbacks, kwargs)

    @property
    def replan(self) -> Callable[[Program], DevicePlan]:
        """Makes a plan for a program all of whose sizes are integers."""
        return self._plan

    def found(self, report: GraphReport) -> None:
        """Keep the report of a graph that the cache had."""
        self.backend.reports.add(report)
        log.info("%s from the cache: %s", report.name, report)

    def _not_planned(self, module: torch.fx.GraphModule) -> str:
        """Why a graph is not for us, seen before lowering changes it."""
        for node in module.graph.nodes:
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                return f"it has the higher-order operator {node.target}"
        if not any(node.op == "call_function" for node in module.graph.nodes):
            return ""
        return ""

    def _planned(
        self,
        module: torch.fx.GraphModule,
        inputs: Sequence[Any],
        name: str,
        phase: str,
        device: torch.device,
        kwargs: Mapping[str, Any],
    ) -> PlannedGraph:
        begin = time.monotonic()
        lowered = lower(
            _copied(module),
            inputs,
            is_inference=phase == "inference",
            is_backward=phase == "backward",
            static_inputs=kwargs.get("static_input_idxs", ()),
            graph_id=kwargs.get("graph_id"),
        )
        program = _handed_over(lowered.program) if phase == "backward" else lowered.program
        lowering_s = time.monotonic() - begin
        report = GraphReport(name, phase, "T1", str(device), lowering_s=lowering_s)
        graph = PlannedGraph(program, device, report, f"{name} {self.options.key}")
        graph.replan = self._plan
        example = program.at(_hints(program, inputs, graph))
        begin = time.monotonic()
        plan = self._plan(example)
        planning_s = time.monotonic() - begin
        graph.plans[graph.values([_hint(item) for item in inputs])] = plan
        graph.report = _described(report, example, plan, planning_s)
        self.backend.reports.add(graph.report)
        log.info("%s: %s", name, graph.report)
        return graph

    def _plan(self, program: Program) -> DevicePlan:
        devices = {s.device for s in program.storages.values()}
        device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        machine = self.backend.planners.machine(device, self.options)
        return self.backend.planners.plan(program, machine, self.options)

    def _stock(
        self,
        module: torch.fx.GraphModule,
        inputs: Sequence[Any],
        name: str,
        phase: str,
        device: torch.device,
        fallbacks: tuple[str, ...],
        kwargs: Mapping[str, Any],
    ) -> StockGraph:
        begin = time.monotonic()
        with inductor_config.patch(self.settings), in_our_order(lambda graph: self.backend.planners.order(graph, self.options)):
            compiled = compile_fx_inner(module, inputs, **kwargs)
        report = GraphReport(
            name, phase, "T0", str(device), fallbacks=fallbacks, lowering_s=time.monotonic() - begin
        )
        self.backend.reports.add(report)
        return StockGraph(compiled, report)


def _copied(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A module that lowering may change: the original is left for stock Inductor."""
    import copy

    graph = copy.deepcopy(module.graph)
    for old, new in zip(module.graph.nodes, graph.nodes, strict=True):
        new.meta = dict(old.meta)
    fresh = torch.fx.GraphModule(module, graph)
    fresh.meta = dict(module.meta)
    return fresh


def _device_of(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> torch.device:
    """The device a graph runs on: that of its tensors, an accelerator before the host."""
    tensors = [item for item in inputs if isinstance(item, torch.Tensor)]
    tensors += [n.meta["val"] for n in module.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    devices = [tensor.device for tensor in tensors]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _handed_over(program: Program) -> Program:
    """A backward program whose inputs are the caller's no more: what autograd saved for it, and the gradients it gets.

    Forward inputs that were saved (AOTAutograd names them ``primals``) are still held by whoever passed them.
    """
    storages = dict(program.storages)
    for item in program.inputs:
        if isinstance(item, Ref) and not item.name.startswith("primals"):
            storages[item.name] = dataclasses.replace(storages[item.name], origin=Origin.GIVEN)
    return dataclasses.replace(program, storages=storages)


def _hint(item: Any) -> Any:
    """The integer behind a symbolic one, for which a graph was traced."""
    if isinstance(item, torch.SymInt):
        return int(item.node.hint) if item.node.has_hint() else 1
    return item


def _hints(program: Program, inputs: Sequence[Any], graph: PlannedGraph) -> dict[Any, int]:
    if not program.free_symbols:
        return {}
    values = []
    for symbol in program.free_symbols:
        values.append(int(_hint(graph_value(graph, symbol, inputs))))
    return dict(zip(program.free_symbols, values, strict=True))


def graph_value(graph: PlannedGraph, symbol: Any, inputs: Sequence[Any]) -> Any:
    """The (symbolic) value of a symbol among example inputs."""
    if symbol in graph._given:
        return inputs[graph._given[symbol]]
    index, what, dimension = graph._read[symbol]
    return inputs[index].shape[dimension] if what == "size" else inputs[index].stride(dimension)


def _described(report: GraphReport, program: Program, plan: DevicePlan, planning_s: float) -> GraphReport:
    kernels = Counter(call.target for call in program.calls if call.target in program.kernels)
    operators = Counter(call.target for call in program.calls if call.target not in program.kernels)
    held = sum(int(s.nbytes) for s in program.storages.values() if s.origin in (Origin.INPUT, Origin.CONSTANT))
    proven = next((c for c in plan.plan.certificates if c.objective == "peak_bytes"), None)
    engines = {i.engine for i in plan.plan.instructions if isinstance(i, Run)}
    live = max(live_bytes(plan.plan), default=0)
    return dataclasses.replace(
        report,
        kernels=dict(kernels),
        operators=dict(operators),
        peak_before_bytes=program_order_peak(plan.plan),
        peak_bytes=live,
        bound_bytes=min(live, proven.bound) if proven else 0,
        allocated_bytes=max(allocated_bytes(plan), default=plan.arena_bytes),
        arena_bytes=plan.arena_bytes,
        held_bytes=held,
        streams=max(1, len(engines)),
        predicted_s=latency_ns(plan.plan) / 1e9,
        planning_s=planning_s,
        status="" if proven is None else f"{'optimal' if proven.gap == 0 else f'gap {proven.gap:.1%}'} ({proven.proved_by})",
        plan=plan.plan,
    )


def program_order_peak(plan: Plan) -> int:
    """Bytes live at once when operators run in program order, each buffer from its first to its last use."""
    span: dict[str, tuple[int, int]] = {}
    for index, touched in enumerate(plan.graph.touches):
        for name in touched:
            span[name] = (span.get(name, (index, index))[0], index)
    alignment = plan.machine.scratchpad_memory.alignment_bytes
    change = [0] * (len(plan.graph.ops) + 1)
    for name, (first, last) in span.items():
        nbytes = -(-plan.graph.buffers[name].nbytes // alignment) * alignment
        change[first] += nbytes
        change[last + 1] -= nbytes
    return max(itertools.accumulate(change), default=0)
