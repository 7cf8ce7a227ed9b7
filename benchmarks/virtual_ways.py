"""Ways to run a rank's module beside virtual ranks: as given, cut, cut and in order; by our executor or Inductor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from opweave.compiler.frontend.dynamo.frozen import SETTINGS, freeze
from opweave.compiler.frontend.dynamo.operators import operator_graph
from opweave.compiler.frontend.dynamo.traced import copied
from opweave.compiler.frontend.ranks import Captured, captured
from opweave.compiler.overlap import OverlapOptions
from opweave.compiler.runtime.distributed import RankExecutor
from opweave.hw_models.fabric import CollectiveKind, CollectiveRate, Fabric
from opweave.hw_models.model import Engine, EngineKind, HardwareModel, Link, Memory
from opweave.passes.overlap.costs import Costs
from opweave.passes.overlap.modules import overlapped
from opweave.passes.overlap.regions import is_attention, is_product, regions_of
from opweave.passes.split import split, token_axes

__all__ = ["Rates", "Ways", "timed_in_turns"]

Run = Callable[[], Any]
CONTROL = "split, no overlap"


@dataclass(frozen=True)
class Rates:
    """What this host computes, fitted to the module as given with a link that takes no time: see `Ways.rates`."""

    flops_per_s: float
    bytes_per_s: float

    def machine(self, ranks: int, alpha_s: float, bandwidth_bytes_per_s: float) -> HardwareModel:
        """``ranks`` such hosts on a link; a collective takes nothing from compute."""
        rates = tuple(
            CollectiveRate(kind, "virtual", "link", ranks, alpha_s, bandwidth_bytes_per_s, compute_share=0.0)
            for kind in CollectiveKind
        )
        return HardwareModel(
            name="virtual-ranks",
            description="this host, at rates fitted to one module, as one of several ranks on a virtual link",
            sources=(),
            scratchpad="ram",
            backing="disk",
            memories=(Memory("ram", 1 << 40, 64, self.bytes_per_s), Memory("disk", 1 << 41, 64, 1e9)),
            engines=(
                Engine("cores", EngineKind.COMPUTE, flops_per_s={"default": self.flops_per_s}),
                Engine("copy", EngineKind.COPY, bandwidth_bytes_per_s=1e9),
            ),
            links=(Link("link", bandwidth_bytes_per_s, alpha_s),),
            fabric=Fabric(ranks, ranks, rates),
        )


class _Timed(Interpreter):
    """Runs a module call by call; ``seconds`` of each."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[str, float] = {}

    def run_node(self, n: Node) -> Any:
        """One call."""
        begin = time.perf_counter()
        result = super().run_node(n)
        self.seconds[n.name] = time.perf_counter() - begin
        return result


class Ways:
    """The ways to run one module, each a function without arguments; ``sizes`` are the parts of those that are cut."""

    def __init__(
        self,
        model: torch.nn.Module,
        x: Tensor,
        sizes: Sequence[int],
        decompositions: Mapping[Any, Callable[..., Any]] | None,
    ) -> None:
        found: Captured = captured(model, (x,), decompositions=decompositions)
        self.module, self.sizes, self.names = found.forward, tuple(sizes), found.inputs
        self.is_compiled = decompositions is not None
        values = dict(model.named_parameters()) | dict(model.named_buffers())
        placeholders = [node.name for node in self.module.graph.find_nodes(op="placeholder")]
        parameters = found.parameters
        self.inputs = [values[parameters[name]].detach() if name in parameters else x for name in placeholders]
        axes = token_axes(self.module, found.inputs)[0]
        self.cut = split(self.module, axes, self.sizes).module

    def rates(self, repeats: int) -> Rates:
        """Two rates, while the link takes no time: products and attention, timed one by one, give that of flops; what
        the whole module takes beyond them, and the bytes that everything else moves, give that of bytes.
        """
        graph = operator_graph(self.module, int).graph
        costs = Costs(graph, Rates(1.0, 1.0).machine(2, 0.0, 1.0))
        flops = nbytes = 0
        products: list[str] = []
        for region in regions_of(graph, {}):
            op = graph.ops[region[0]]
            if len(region) == 1 and (is_product(op) or is_attention(op)):
                flops += costs.flops(region)
                products.append(op.name)
            elif op.collective is None:
                nbytes += costs.moved_bytes(region)
        each: list[float] = []
        whole: list[float] = []
        run = self.given
        for _ in range(repeats):
            timed = _Timed(self.module)
            timed.run(*self.inputs)
            each.append(sum(timed.seconds[name] for name in products))
            whole.append(seconds_of(run))
        in_products = median(each)
        return Rates(flops / in_products, nbytes / max(median(whole) - in_products, 0.02 * in_products))

    @cached_property
    def given(self) -> Run:
        """The module as it was given: it waits for each collective at once."""
        return self._runs(self.module)

    @cached_property
    def control(self) -> Run:
        """Cut, every collective waited for at once, and held in that order."""
        return self._runs(self.cut, freezes=True)

    def hidden(self, machine: HardwareModel, *, freezes: bool = True) -> Run:
        """Cut and in the order that is predicted to be fastest on ``machine``."""
        return self._runs(self._overlapped(machine).module, freezes=freezes)

    def predicted(self, machine: HardwareModel) -> tuple[float, float, float]:
        """Seconds on ``machine`` of `given`, `control` and `hidden`."""
        done = self._overlapped(machine)
        return done.seconds[0], overlapped(self.cut, (), machine, OverlapOptions()).seconds[0], done.seconds[1]

    def _overlapped(self, machine: HardwareModel) -> Any:
        return overlapped(self.module, self.names, machine, OverlapOptions(sizes=self.sizes))

    def _runs(self, module: GraphModule, *, freezes: bool = False) -> Run:
        if not self.is_compiled:
            executor = RankExecutor(module)
            return lambda: executor(*self.inputs)
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner

        examples = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
        with config.patch(dict(SETTINGS) if freezes else {}):
            compiled: Any = compile_fx_inner(freeze(module) if freezes else copied(module), examples, is_inference=True)
        return lambda: compiled(list(self.inputs))


def seconds_of(run: Run) -> float:
    """One call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def timed_in_turns(
    ways: Mapping[str, Run], turns: int, calls: int, before: Callable[[], None]
) -> dict[str, list[float]]:
    """The median seconds of ``calls`` calls of each of ``ways``, in turns; ``before`` is called before each call."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, run in ways.items():
            times = []
            for _ in range(calls):
                before()
                times.append(seconds_of(run))
            found[name].append(median(times))
    return found
