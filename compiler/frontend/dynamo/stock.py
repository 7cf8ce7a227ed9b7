"""Stock Inductor in our order (tier T0): its scheduler's nodes, after fusion, as an operator graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch._inductor import config as inductor_config
from torch._inductor import memory
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

from ...graph import Graph, Op, OpKind, Tensor
from ...runtime.device.graph import RECEIVE, RETURN

__all__ = ["in_our_order", "scheduler_graph"]

log = logging.getLogger("opweave.schedule")

Order = Callable[[Graph], Sequence[int]]


@contextmanager
def in_our_order(order: Order) -> Iterator[None]:
    """While it lasts, Inductor schedules fused nodes as ``order`` says; it is given their graph."""

    def schedule(nodes: list[Any]) -> list[Any]:
        graph = scheduler_graph(nodes)
        positions = {op.name: index for index, op in enumerate(graph.ops)}
        named = {node.get_name(): node for node in nodes}
        by_position = {positions[name]: node for name, node in named.items()}
        decided = [by_position[index] for index in order(graph) if index in by_position]
        log.debug("fused nodes scheduled: %d", len(decided))
        return decided

    with inductor_config.patch({"_post_fusion_custom_pass": schedule, "reorder_for_peak_memory": False}):
        yield


def scheduler_graph(nodes: Sequence[Any]) -> Graph:
    """The operator graph of Inductor's scheduler nodes, with the bytes of its own memory model."""
    scheduler = V.graph.scheduler
    inputs = OrderedSet(V.graph.graph_inputs.keys())
    outputs = OrderedSet(V.graph.get_output_names())
    _, freeable = memory.prepare_planning_info(
        list(nodes), scheduler.name_to_buf, scheduler.name_to_fused_node, inputs, outputs
    )
    builder = _Builder(nodes, freeable, outputs)
    return builder.graph()


class _Builder:
    def __init__(self, nodes: Sequence[Any], freeable: Mapping[str, Any], outputs: OrderedSet[str]) -> None:
        self.nodes, self.freeable, self.outputs = nodes, freeable, outputs
        self.tensors: list[Tensor] = []
        self.reads: dict[str, list[str]] = {node.get_name(): [] for node in nodes}

    def graph(self) -> Graph:
        ops: list[Op] = []
        given = [self._tensor(name, item.mpi_buffer) for name, item in self.freeable.items()]
        if given:
            ops.append(Op(RECEIVE, (), tuple(given), OpKind.BOUNDARY))
        written = {node.get_name(): self._written(node) for node in self.nodes}
        kept = [name for names in written.values() for name in names if name in self.outputs]
        for node in self.nodes:
            name = node.get_name()
            ops.append(Op(name, tuple(dict.fromkeys(self.reads[name])), tuple(written[name])))
        if kept:
            ops.append(Op(RETURN, tuple(kept), (), OpKind.BOUNDARY))
        return Graph("scheduler", tuple(self.tensors), tuple(ops), ())

    def _tensor(self, name: str, info: Any) -> str:
        self.tensors.append(Tensor(name, (int(info.size_free),), "uint8"))
        for user in info.succ_nodes:
            if user.get_name() in self.reads:
                self.reads[user.get_name()].append(name)
        return name

    def _written(self, node: Any) -> list[str]:
        names = [self._tensor(buffer.get_name(), buffer.mpi_buffer) for buffer in node.get_outputs()]
        order = f"after {node.get_name()}"  # dependencies that hold no memory
        self.tensors.append(Tensor(order, (0,), "uint8"))
        for other in node.mpi_node.succ_nodes:
            if other.get_name() in self.reads:
                self.reads[other.get_name()].append(order)
        return [*names, order]
