"""The other roof: ``torch.compile(model, backend="opweave")``. Inductor, our passes and our runtime meet here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from .compiler.frontend.dynamo.backend import Backend
from .compiler.frontend.dynamo.explain import BackendExplanation
from .compiler.frontend.dynamo.inner import Planners
from .compiler.frontend.dynamo.options import BackendOptions
from .compiler.frontend.dynamo.report import GraphReport
from .compiler.pipeline import Budget
from .compiler.runtime.device.arena import ALIGNMENT_BYTES
from .compiler.runtime.device.program import Origin
from .errors import InternalError, MachineError, OptionError
from .fusing import called, checked
from .hw_models.model import HardwareModel
from .hw_models.registry import load as hardware

if TYPE_CHECKING:
    from .compiler.fusion import Match
    from .compiler.graph import Graph
    from .compiler.overlap import OverlapOptions, Overlapped
    from .compiler.partition import Partition, PartitionProblem
    from .compiler.runtime.device.layout import DevicePlan
    from .compiler.runtime.device.program import Program

__all__ = ["backend", "backend_reports", "explain", "fallback_counts", "reset"]


def backend(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend itself, as torch.compile calls it; registered under the entry point ``torch_dynamo_backends``.

    Raises:
        OptionError: an option is unknown, or has a wrong type or value.
        Infeasible: no plan holds the memory limit; says the least that works.
        ExecutionError: a fallback would be needed, and ``strict`` is set.
    """
    return _backend()(module, example_inputs, _chosen(options, mode))


def explain(model: Callable[..., Any], inputs: Any = (), **options: Any) -> BackendExplanation:
    """Compile ``model`` afresh with the backend, run it once on ``inputs``, and say what became of each graph.

    ``model`` is a module or a function, compiled already or not. ``inputs`` are one tensor, a sequence of arguments, or
    a mapping of keyword arguments. ``options`` are the backend's; those of a model that was compiled are not known
    here, and have to be said again. Raises as the backend does, but unwrapped.
    """
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._dynamo.utils import counters

    own = Backend(_backend().planners, _backend().version)
    chosen = _chosen(options)
    original: Any = getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))
    if getattr(original, "_compiled_call_impl", None) is not None:  # by Module.compile
        original = original._call_impl
    region, limits = _own_region()
    compiled: Any = torch.compile(original, backend=lambda module, examples: own(module, examples, chosen), **region)
    before = dict(counters["graph_break"])
    arguments, named = _arguments(inputs)
    try:
        with torch._dynamo.config.patch(limits):
            compiled(*arguments, **named)
    except BackendCompilerFailed as error:
        raise error.inner_exception from error
    breaks = tuple(reason for reason, count in counters["graph_break"].items() if count > before.get(reason, 0))
    return BackendExplanation(own.reports.all, own.fallbacks.counts, breaks)


def _chosen(options: Mapping[str, Any] | None, mode: str | None = None) -> BackendOptions:
    """The options, whose device is there. Raises OptionError."""
    chosen = BackendOptions.of(options, mode)
    checked(chosen.kernels)
    device = torch.device(chosen.device or "cpu")
    there = torch.accelerator.current_accelerator(check_available=True)
    is_there = (
        there is not None and there.type == device.type and (device.index or 0) < torch.accelerator.device_count()
    )
    if device.type != "cpu" and not is_there:
        count = "no accelerator" if there is None else f"{torch.accelerator.device_count()} of {there.type!r}"
        raise OptionError(f"option 'device' of backend 'opweave' is {chosen.device!r}; torch finds {count} here")
    return chosen


def _own_region() -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of torch.compile's, and settings, with which what was compiled before does not count.

    Dynamo leaves a function to eager mode once it has compiled it too often; an explanation is neither the next time
    too often, nor does it bring one nearer. A torch without regions can be kept from the former only.
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        return {"isolate_recompiles": True}, {}
    return {}, {"recompile_limit": torch._dynamo.config.accumulated_recompile_limit}


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)), {}


def backend_reports() -> tuple[GraphReport, ...]:
    """What became of each graph compiled in this process, the last thousand, in order."""
    return _backend().reports.all


def fallback_counts() -> Mapping[str, int]:
    """How often each fallback has happened in this process."""
    return _backend().fallbacks.counts


def reset() -> None:
    """Forget reports and fallbacks, and give back the memory that programs share."""
    from .compiler.runtime.device.executor import POOL

    _backend().reports.clear()
    _backend().fallbacks.clear()
    POOL.clear()


@cache
def _backend() -> Backend:
    """One for the process: Dynamo calls a function, and users ask afterwards what it did."""
    from . import __version__

    planners = Planners(_plan, _order, _machine, _rules, _launch, called, _partition, _overlap)
    return Backend(planners, f"{__version__} kernels {_kernels_digest()}")


def _budget(options: BackendOptions) -> Budget:
    return Budget.of_seconds(options.time_limit, deterministic=options.deterministic)


def _plan(
    program: Program,
    machine: HardwareModel,
    options: BackendOptions,
    limit_bytes: int | None,
    candidates: frozenset[str],
) -> DevicePlan:
    """Order, addresses and streams of one program; transfers and recomputation, too, where a limit needs them."""
    from .compiler.runtime.device.graph import planning_graph
    from .compiler.runtime.device.layout import allocated_bytes
    from .passes.device.planner import plan_for_device

    graph, budget = planning_graph(program), _budget(options)
    if limit_bytes is not None and program.provided_by(Origin.HOST, Origin.RETURNED):
        return _within(program, graph, machine, limit_bytes, candidates, budget)
    hosts = program.provided_by(Origin.OUTPUT)
    planned = plan_for_device(graph, program.apart, machine, budget.share(0.8), hosts=hosts)
    if limit_bytes is not None and program.held_bytes + max(allocated_bytes(planned), default=0) > limit_bytes:
        return _within(program, graph, machine, limit_bytes, candidates, _budget(options))
    return planned if options.streams == 1 else _on_streams(program, planned, options, budget)


def _within(
    program: Program,
    graph: Graph,
    machine: HardwareModel,
    limit_bytes: int,
    candidates: frozenset[str],
    budget: Budget,
) -> DevicePlan:
    """A plan with transfers, which the limit needs, or what is in host memory."""
    from .compiler.runtime.device.host import HostPlan, with_resident
    from .passes.offload.planner import plan_within

    limited = plan_within(
        graph,
        program.apart,
        machine,
        limit_bytes,
        budget,
        candidates=candidates,
        kept_bytes=program.held_bytes,
        hosts=program.provided_by(Origin.OUTPUT),
    )
    planned = _synchronised(with_resident(program, limited.resident), limited.device_plan)
    return HostPlan(
        planned.plan,
        planned.arena_bytes,
        planned.apart,
        planned.waits,
        resident=limited.resident,
        resident_bytes=limited.resident_bytes,
        room_bytes=limited.room_bytes,
        loaded_bytes=limited.loaded_bytes,
        bound_s=limited.bound_s,
    )


def _rules(options: BackendOptions, differentiable: bool) -> Callable[[Graph], Sequence[Match]]:
    from .fusing import rules

    return rules(options.kernels, differentiable=differentiable)


def _launch(graph: Graph, matches: Sequence[Match], machine: HardwareModel, options: BackendOptions) -> Sequence[Match]:
    from .fusing import choose

    return choose(graph, matches, options.kernels, machine, _budget(options).share(0.2), others_fuse=True).matches


def _kernels_digest() -> str:
    """Of the code of all kernels: what was compiled with others must not be taken from a cache."""
    from .kernels.registry import digest

    return digest()


def _partition(
    problem: PartitionProblem, limit_bytes: int, starts: Sequence[Any], options: BackendOptions
) -> Partition:
    from .passes.partition._early import offloading_early
    from .passes.partition.ilp import IlpPartition

    return offloading_early(IlpPartition().choose(problem, limit_bytes, _budget(options), starts))


def _overlap(
    module: torch.fx.GraphModule,
    inputs: Sequence[str],
    machine: HardwareModel,
    wanted: OverlapOptions,
    forward_outputs: int | None,
) -> Overlapped:
    from .passes.overlap.modules import overlapped

    return overlapped(module, inputs, machine, wanted, forward_outputs=forward_outputs)


def _on_streams(program: Program, planned: DevicePlan, options: BackendOptions, budget: Budget) -> DevicePlan:
    """``planned`` with independent calls on streams of their own, where that is predicted to be faster."""
    from .passes.streams.critical_path import CriticalPath

    made = program.provided_by(Origin.CALL)
    decided = CriticalPath(streams=options.streams).assign(planned, made, budget)
    return _judged(program, decided.device_plan)


def _synchronised(program: Program, planned: DevicePlan) -> DevicePlan:
    """``planned``, whose copies have engines of their own, with the waits that keep its meaning."""
    from .compiler.runtime.device.order import synchronisation

    return _judged(program, replace(planned, waits=synchronisation(planned, program.provided_by(Origin.CALL))))


def _judged(program: Program, planned: DevicePlan) -> DevicePlan:
    """``planned``, in which no two accesses race. Raises InternalError."""
    from .compiler.verify.races import find_races

    races = find_races(program, planned)
    if races:
        raise InternalError(f"a plan on several engines has a race: {races[0].message}", hint="please report this")
    return planned


def _order(graph: Graph, options: BackendOptions) -> tuple[int, ...]:
    from .compiler.pipeline import run_pass
    from .compiler.plan import Plan
    from .passes.order.least_peak import LeastPeakOrder

    machine = hardware("h100-sxm")
    return run_pass(LeastPeakOrder(), Plan.of_order(graph, machine), _budget(options)).order


def _machine_of_ranks(device: torch.device, options: BackendOptions) -> HardwareModel:
    """The hardware model of the devices that talk to each other. Raises OptionError, MachineError."""
    name = options.machine
    if name is None and device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
        name = next((model for part, model in _RANKS if part in kind), None)
    machine = None if name is None else hardware(name)
    if machine is None or machine.fabric is None:
        missing = "no machine is named" if name is None else f"machine {name!r} is one device"
        raise OptionError(
            f"overlap needs a machine that says what collectives cost; {missing}",
            hint="name one that `opweave hw` lists with its devices, as options={'machine': '8xh100-nvlink'}",
        )
    return machine


#: Machines of several GPUs, by the name of one.
_RANKS = (("H200", "8xh200-nvlink"), ("H100", "8xh100-nvlink"), ("A100", "8xa100-nvlink"))
#: Which of our hardware models a GPU's name means, the most particular first.
_GPUS = (("H200", "h200"), ("H100", "h100-sxm"), ("A100", "a100"))


def _machine(device: torch.device, options: BackendOptions) -> HardwareModel:
    """The hardware model of ``device``. Raises MachineError."""
    if options.overlapping is not None:
        return _machine_of_ranks(device, options)
    if options.machine is not None:
        return hardware(options.machine)
    if device.type != "cuda":
        return hardware("cpu-server")
    name = torch.cuda.get_device_name(device)
    for part, model in _GPUS:
        if part in name:
            total = torch.cuda.get_device_properties(device).total_memory
            return hardware(model).with_scratchpad(total // ALIGNMENT_BYTES * ALIGNMENT_BYTES)
    raise MachineError(
        f"there is no hardware model of the GPU {name!r}",
        hint="name the nearest one that `opweave hw` lists, as options={'machine': 'a100'}, or write a machine file",
    )
