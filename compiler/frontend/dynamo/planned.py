"""A compiled graph as AOTAutograd runs and stores it: a program, its plans, and its report."""

from __future__ import annotations

import copy
import hashlib
import logging
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Protocol

import sympy
import torch
from torch._inductor.output_code import OutputCode

from ...runtime.device.arena import Pool, TransientPool
from ...runtime.device.captured import CapturedExecutor, why_not_captured
from ...runtime.device.code import HostCode
from ...runtime.device.executor import POOL, Executor
from ...runtime.device.host import HostMemory
from ...runtime.device.layout import DevicePlan
from ...runtime.device.program import Program, Ref
from .report import GraphReport

__all__ = ["LOADING", "Loading", "PlannedGraph", "StockGraph", "bucket_of"]

log = logging.getLogger("opweave.host_code")

#: Makes a plan for a program all of whose sizes are integers, given the positions of weights among its inputs.
PlanProgram = Callable[[Program, Sequence[int]], DevicePlan]


def bucket_of(value: int) -> int:
    """The least number of four significant bits that is not below ``value``: at most an eighth above it."""
    step = 1 << max(0, value.bit_length() - 4)
    return -(-value // step) * step


def _holds(plan: DevicePlan, program: Program) -> bool:
    """Whether no storage of ``program`` is larger than in the plan, so that its places hold it."""
    planned = plan.plan.graph.buffers
    return all(s.nbytes <= planned[s.name].nbytes for s in program.storages.values() if s.name in planned)


class _Runs(Protocol):
    """What runs a program for one choice of its sizes."""

    @property
    def kernels(self) -> Mapping[str, Any]:
        """Its kernels, loaded."""

    @property
    def code(self) -> HostCode:
        """Its host code."""

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        """Run it."""


class Loading(Protocol):
    """What a graph that comes from the cache needs of the backend that asked for it."""

    @property
    def replan(self) -> PlanProgram:
        """Makes plans for shapes that no stored plan covers."""

    @property
    def memory(self) -> HostMemory | None:
        """Copies of weights on the device, for a model on the host."""

    def found(self, report: GraphReport) -> None:
        """Take the report of a graph that was found."""


#: Set by the backend while it compiles: AOTAutograd loads what it finds without saying for whom.
LOADING: ContextVar[Loading] = ContextVar("loading")
#: Shapes whose plans are kept; the oldest goes first.
KEPT_PLANS = 64


class PlannedGraph(OutputCode):
    """A program run by our executor (tier T1), with one plan for each bucket of its symbols' values.

    Sizes of one bucket share a plan made for the largest of them, and have host code of their own. It is stored without
    executors; in another process they are made when it is first called. ``replan`` makes plans for sizes that the
    stored ones do not cover; it is set by the backend after loading.
    """

    def __init__(
        self, program: Program, device: torch.device, report: GraphReport, key: str, static: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self._boxed_call = True  # in the instance: AOTAutograd copies its attributes
        self.program, self.device, self.report = program, device, report
        #: Inputs that stay where they are from call to call; ``None`` if no CUDA graph is wanted.
        self.static = static
        #: Of a model in host memory, inputs that may stay on the device between calls.
        self.weights: tuple[int, ...] = ()
        self.plans: dict[tuple[int, ...], DevicePlan] = {}
        self.replan: PlanProgram | None = None
        self._fx_graph_cache_key = key
        self._time_taken_ns = int((report.lowering_s + report.planning_s) * 1e9)
        self._prepare()

    def _prepare(self) -> None:
        self._executors: dict[tuple[int, ...], _Runs] = {}
        self._lock = threading.Lock()
        positions = enumerate(self.program.inputs)
        self._given = {item: index for index, item in positions if isinstance(item, sympy.Symbol)}
        names = {item.name: index for index, item in enumerate(self.program.inputs) if isinstance(item, Ref)}
        self._read = {symbol: (names[name], what, dim) for symbol, (name, what, dim) in self.program.symbols.items()}

    def __call__(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Run it; a list of inputs is emptied."""
        boxed = inputs if isinstance(inputs, list) else list(inputs)
        values = self.values(boxed)
        executor = self._executors.get(values)
        if executor is None:
            executor = self._executor(values)
        return executor(boxed)

    def values(self, inputs: Sequence[Any]) -> tuple[int, ...]:
        """Values of the program's symbols, in the order of ``free_symbols``."""
        if not self.program.free_symbols:
            return ()
        return tuple(self._value(symbol, inputs) for symbol in self.program.free_symbols)

    def _value(self, symbol: sympy.Symbol, inputs: Sequence[Any]) -> int:
        if symbol in self._given:
            return int(inputs[self._given[symbol]])
        index, what, dimension = self._read[symbol]
        tensor = inputs[index]
        return int(tensor.shape[dimension] if what == "size" else tensor.stride(dimension))

    def _executor(self, values: tuple[int, ...]) -> _Runs:
        with self._lock:
            if values in self._executors:
                return self._executors[values]
            program = self.sized(values)
            plan = self._plan_for(program, values)
            kernels = next(iter(self._executors.values())).kernels if self._executors else None
            log.debug("%s: making host code for sizes %s", self.report.name, values)
            executor = self._made(program, plan, kernels)
            log.debug("%s", executor.code.source)
            if len(self._executors) >= KEPT_PLANS:
                del self._executors[next(iter(self._executors))]
            self._executors[values] = executor
            return executor

    def _made(self, program: Program, plan: DevicePlan, kernels: Mapping[str, Any] | None) -> _Runs:
        """What runs ``program``, all of whose sizes are integers."""
        pool: Pool = POOL if self.report.phase == "inference" else TransientPool()
        plain = Executor(program, plan, device=self.device, kernels=kernels, pool=pool)
        if self.static is None or program.free_symbols:
            return plain
        why_not = why_not_captured(program, self.static)
        if why_not or plain.code.spill_bytes:
            log.debug("%s is not captured: %s", self.report.name, why_not or "it stores to host memory")
            return plain
        return CapturedExecutor(plain, program, self.static)

    def sized(self, values: Sequence[int]) -> Program:
        """The program for these values of its symbols."""
        return self.program.at(dict(zip(self.program.free_symbols, values, strict=True)))

    def bucket(self, values: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes to plan for ``values``: the largest of their bucket, or their own if those cannot be."""
        largest = tuple(map(bucket_of, values))
        return largest if largest in self.plans or not self.sized(largest).has_negative_sizes else values

    def _plan_for(self, program: Program, values: tuple[int, ...]) -> DevicePlan:
        """The plan of the bucket that ``values`` lie in, if no storage is larger than in it, or one of their own."""
        for size in dict.fromkeys((self.bucket(values), values)):
            plan = self.plans.get(size)
            if plan is None:
                assert self.replan is not None  # set by the backend wherever a graph comes from
                plan = self.plans[size] = self.replan(self.sized(size), self.weights)
                if len(self.plans) > KEPT_PLANS:
                    del self.plans[next(iter(self.plans))]
            if size == values or _holds(plan, program):
                return plan
        raise AssertionError("a plan made for these sizes holds them")

    def post_compile(self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: Any) -> None:
        """Called when it comes from the cache, within ``loading``."""
        compiling = LOADING.get()
        self.replan = compiling.replan
        compiling.found(self.report)

    def prepare_for_serialization(self) -> None:
        """Called before it is stored."""

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """Kernels travel as source; Triton's own cache has their binaries."""

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("_executors", "_lock", "_given", "_read"):
            state.pop(name)
        content = pickle.dumps({**state, "replan": None, "report": replace(self.report, from_cache=True)})
        return {"content": content, "digest": hashlib.sha256(content).digest()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # One wrong bit may be an address: what is not as it was stored must not run.
        if hashlib.sha256(state["content"]).digest() != state["digest"]:
            log.warning("an entry of the cache is damaged; it is ignored")
            raise pickle.UnpicklingError("a compiled graph is not as it was stored")  # AOTAutograd compiles afresh then
        self.__dict__.update(pickle.loads(state["content"]))
        self._prepare()


class StockGraph(OutputCode):
    """A graph that stock Inductor runs (tier T0), with its report."""

    def __init__(self, compiled: Any, report: GraphReport) -> None:
        super().__init__()
        self._boxed_call = True  # in the instance: AOTAutograd copies its attributes
        self.compiled, self.report = compiled, report
        self._fx_graph_cache_key = getattr(compiled, "_fx_graph_cache_key", None)
        self._time_taken_ns = getattr(compiled, "_time_taken_ns", None) or int(report.lowering_s * 1e9)

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """Run it."""
        return self.compiled(inputs)

    def post_compile(self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: Any) -> None:
        """Called when it comes from the cache, within ``loading``: what AOTAutograd does for stock Inductor's own."""
        from torch._inductor.codecache import FxGraphCache

        graph, _ = FxGraphCache.cache_hit_post_compile(self.compiled, {}, constants)
        if graph is None:
            raise RuntimeError("an entry of the cache could not be loaded")  # AOTAutograd compiles afresh then
        self.compiled = graph
        graph.post_compile(example_inputs, constants, graph_kwargs)
        LOADING.get().found(self.report)

    def prepare_for_serialization(self) -> None:
        """As stock Inductor's own, on a copy: AOTAutograd has copied only this object."""
        self.compiled = copy.copy(self.compiled)
        self.compiled.prepare_for_serialization()
        self.report = replace(self.report, from_cache=True)

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """As stock Inductor's own."""
        self.compiled.set_triton_bundle(triton_bundle)
