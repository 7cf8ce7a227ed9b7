"""Graphs of one rank of eight, captured here: what ``bench_torch_scheduler`` schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opweave.compiler.frontend.ranks import captured, fake_ranks

from .parallel_dtensor import PlainDense, data_parallel, fully_sharded, tensor_parallel
from .parallel_models import LLAMA_3_70B, MIXTRAL_8X22B, QWEN_2_5_72B, DenseTensorParallel, ExpertParallelMoE, tokens_of

__all__ = ["RANKS", "Case", "Captured", "cases", "captures"]

RANKS = 8
Built = tuple[nn.Module, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """``build`` makes a module and its input; ``dim`` of the input carries tokens, ``None`` where it is not split.

    ``all_reduce`` marks the inference of dense layers cut by tensor parallelism, whose all-reduces nothing hides.
    """

    name: str
    build: Callable[[DeviceMesh], Built]
    graph: Literal["forward", "backward", "joint"] = "forward"
    dim: int | None = None
    tokens: int = 0
    all_reduce: bool = False


@dataclass(frozen=True)
class Captured:
    """A case's graph, and which dimension of which placeholder a split cuts; empty where it is not split."""

    case: Case
    module: torch.fx.GraphModule
    axes: Mapping[str, int]

    @property
    def tokens(self) -> int:
        """Extent of that dimension."""
        name, dim = next(iter(self.axes.items()))
        node = next(node for node in self.module.graph.find_nodes(op="placeholder") if node.name == name)
        return int(node.meta["val"].shape[dim])


def captures(chosen: list[Case]) -> Iterator[Captured]:
    """The graphs of ``chosen``, on rank 0 of eight that do not exist."""
    with fake_ranks(RANKS):
        mesh = init_device_mesh("cpu", (RANKS,))
        for case in chosen:
            with FakeTensorMode():
                module, x = case.build(mesh)
            found = captured(module, (x,), training=case.graph != "forward")
            graph = {"forward": found.forward, "backward": found.backward, "joint": found.joint}[case.graph]
            assert graph is not None
            placeholders = [node.name for node in graph.graph.find_nodes(op="placeholder")]
            tokens = [name for name in placeholders if name in found.inputs or name.startswith("tangents")]
            yield Captured(case, graph, {} if case.dim is None else dict.fromkeys(tokens, case.dim))


def cases(layers: int, *, quick: bool) -> list[Case]:
    """Dense layers by tensor parallelism at 1K to 16K tokens, sequence parallelism, experts, and training."""
    if quick:
        found = [
            _dense(layers, 4096, attention=False),
            *(_dense(layers, count, attention=True) for count in (1024, 4096)),
        ]
        return [
            *found,
            _sequence(layers, 4096),
            _experts(layers, 4096),
            _sharded(layers, "forward"),
            _replicated(layers),
        ]
    tokens = (1024, 2048, 4096, 8192, 16384)
    found = [_dense(layers, count, attention) for attention in (False, True) for count in tokens]
    for count in (4096, 16384):
        found += [_sequence(layers, count), _experts(layers, count)]
    found += [_sharded(layers, "forward"), _sharded(layers, "joint"), _replicated(layers)]
    found += [_qwen(layers), _dtensor(layers), _dense_training(layers, "backward"), _dense_training(layers, "joint")]
    return found


def _dense(layers: int, tokens: int, attention: bool) -> Case:
    sizes = LLAMA_3_70B.with_layers(layers)

    def build(_: DeviceMesh) -> Built:
        return DenseTensorParallel(sizes, attention=attention), tokens_of(sizes, 1, tokens)

    what = "layers" if attention else "MLPs"
    return Case(f"{sizes.name} TP8 {what} {tokens}", build, dim=1, tokens=tokens, all_reduce=True)


def _qwen(layers: int) -> Case:
    sizes = QWEN_2_5_72B.with_layers(layers)

    def build(_: DeviceMesh) -> Built:
        return DenseTensorParallel(sizes), tokens_of(sizes, 1, 4096)

    return Case(f"{sizes.name} TP8 layers 4096", build, dim=1, tokens=4096, all_reduce=True)


def _dtensor(layers: int) -> Case:
    sizes = LLAMA_3_70B.with_layers(layers)

    def build(mesh: DeviceMesh) -> Built:
        return tensor_parallel(PlainDense(sizes), mesh), tokens_of(sizes, 1, 4096)

    return Case(f"{sizes.name} TP8 DTensor 4096", build, dim=1, tokens=4096, all_reduce=True)


def _sequence(layers: int, tokens: int) -> Case:
    """Four sequences, cut between them: a gathered part of all ranks' tokens would be no part of the sequence."""
    sizes = LLAMA_3_70B.with_layers(layers)

    def build(_: DeviceMesh) -> Built:
        module = DenseTensorParallel(sizes, sequence_parallel=True)
        return module, tokens_of(sizes, tokens // 4 // RANKS, 4)

    return Case(f"{sizes.name} SP8 4x{tokens // 4}", build, dim=1, tokens=tokens)


def _experts(layers: int, tokens: int) -> Case:
    sizes = MIXTRAL_8X22B.with_layers(layers)

    def build(_: DeviceMesh) -> Built:
        return ExpertParallelMoE(sizes), tokens_of(sizes, 8, tokens // 8)

    return Case(f"{sizes.name} EP8 8x{tokens // 8}", build, dim=0, tokens=tokens)


def _sharded(layers: int, graph: Literal["forward", "joint"]) -> Case:
    sizes = LLAMA_3_70B.with_layers(layers)

    def build(mesh: DeviceMesh) -> Built:
        return fully_sharded(PlainDense(sizes), mesh), tokens_of(sizes, 1, 4096)

    return Case(f"{sizes.name} FSDP8 {graph} 4096", build, graph, tokens=4096)


def _replicated(layers: int) -> Case:
    sizes = LLAMA_3_70B.with_layers(layers)

    def build(mesh: DeviceMesh) -> Built:
        return data_parallel(PlainDense(sizes), mesh), tokens_of(sizes, 1, 4096)

    return Case(f"{sizes.name} DP8 backward 4096", build, "backward", tokens=4096)


def _dense_training(layers: int, graph: Literal["backward", "joint"]) -> Case:
    sizes = LLAMA_3_70B.with_layers(layers)

    def build(_: DeviceMesh) -> Built:
        return DenseTensorParallel(sizes), tokens_of(sizes, 2, 2048)

    return Case(f"{sizes.name} TP8 {graph} 2x2048", build, graph, dim=0 if graph == "joint" else None, tokens=4096)
