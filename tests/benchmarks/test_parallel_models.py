"""Parallel layers: what their ranks send, by hand calculation, and that all ranks together compute the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from benchmarks.parallel_dtensor import PlainDense, data_parallel, fully_sharded, tensor_parallel
from benchmarks.parallel_models import (
    LLAMA_3_70B,
    MIXTRAL_8X22B,
    DenseTensorParallel,
    ExpertParallelMoE,
    tokens_of,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opweave.compiler.frontend.dynamo.operators import operator_graph
from opweave.compiler.frontend.ranks import captured, fake_ranks

local_tensors = pytest.importorskip("torch.distributed._local_tensor", reason="this torch has no virtual ranks")

RANKS, TOKENS = 8, 4096
DENSE, EXPERTS = LLAMA_3_70B.with_layers(1), MIXTRAL_8X22B.with_layers(1)
#: bfloat16 bytes of all tokens' activations, and of the parameters of one layer: norms, projections, MLP.
ACTIVATIONS = TOKENS * 8192 * 2
NORMS, PROJECTIONS, KEYS, MLP = 8192 * 2, 8192 * 8192 * 2, 1024 * 8192 * 2, 28672 * 8192 * 2
PARAMETERS = {NORMS: 2, PROJECTIONS: 2, KEYS: 2, MLP: 3}
#: 8 sequences of 512 tokens; each of 8 experts takes 2 * 512 / 8 tokens of each.
SLOTS = 8 * 8 * 128 * 6144 * 2


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    with fake_ranks(RANKS, 3):
        yield init_device_mesh("cpu", (RANKS,))


def sent(module: nn.Module, x: torch.Tensor, *, training: bool) -> Counter[tuple[str, int]]:
    """How many collectives of each kind and size a rank takes part in, forward and backward."""
    found = captured(module, (x,), training=training)
    graph = operator_graph(found.joint or found.forward, int).graph
    collectives = [op.collective for op in graph.ops if op.collective is not None]
    assert all((c.group, c.ranks) == ("0", tuple(range(RANKS))) for c in collectives)
    return Counter((c.kind.value, c.nbytes) for c in collectives)


def counts(kind: str, sizes: dict[int, int]) -> Counter[tuple[str, int]]:
    return Counter({(kind, nbytes): count for nbytes, count in sizes.items()})


def test_dense_tensor_parallel(mesh: DeviceMesh) -> None:
    """Two all-reduces a layer forward, and two backward: none for the first layer's input, were it not for its norm."""
    with FakeTensorMode():
        module, x = DenseTensorParallel(DENSE), tokens_of(DENSE, 1, TOKENS)
        alone = DenseTensorParallel(DENSE, attention=False)
    assert sent(module, x, training=False) == counts("all_reduce", {ACTIVATIONS: 2})
    assert sent(module, x, training=True) == counts("all_reduce", {ACTIVATIONS: 4})
    assert sent(alone, x, training=False) == counts("all_reduce", {ACTIVATIONS: 1})


def test_sequence_parallel(mesh: DeviceMesh) -> None:
    """Each all-reduce is a gather and a scatter of the same bytes; scales of norms are reduced as gradients."""
    with FakeTensorMode():
        module, x = DenseTensorParallel(DENSE, sequence_parallel=True), tokens_of(DENSE, TOKENS // RANKS, 1)
    once = counts("all_gather", {ACTIVATIONS: 2}) + counts("reduce_scatter", {ACTIVATIONS: 2})
    assert sent(module, x, training=False) == once
    assert sent(module, x, training=True) == once + once + counts("all_reduce", {NORMS: 2})


def test_experts(mesh: DeviceMesh) -> None:
    """Two all-to-alls a layer, of every expert's slots; what all ranks hold is reduced as gradients."""
    with FakeTensorMode():
        module, x = ExpertParallelMoE(EXPERTS), tokens_of(EXPERTS, 8, 512)
    assert sent(module, x, training=False) == counts("all_to_all", {SLOTS: 2})
    held = {6144 * 2: 2, (6144 + 2 * 8 * 128) * 6144 * 2: 1, 6144 * 6144 * 2: 1, 8 * 6144 * 2: 1}
    assert sent(module, x, training=True) == counts("all_to_all", {SLOTS: 4}) + counts("all_reduce", held)


def test_dtensor_tensor_parallel(mesh: DeviceMesh) -> None:
    """Backward, DTensor reduces the gradient of each linear's input: three behind attention's, two behind the MLP's."""
    with FakeTensorMode():
        module, x = tensor_parallel(PlainDense(DENSE), mesh), tokens_of(DENSE, 1, TOKENS)
    assert sent(module, x, training=False) == counts("all_reduce", {ACTIVATIONS: 2})
    assert sent(module, x, training=True) == counts("all_reduce", {ACTIVATIONS: 2 + 5})


def test_dtensor_sequence_parallel(mesh: DeviceMesh) -> None:
    with FakeTensorMode():
        module = tensor_parallel(PlainDense(DENSE), mesh, sequence_parallel=True)
        x = tokens_of(DENSE, 1, TOKENS // RANKS)
    once = counts("all_gather", {ACTIVATIONS: 2}) + counts("reduce_scatter", {ACTIVATIONS: 2})
    assert sent(module, x, training=False) == once
    assert sent(module, x, training=True) == once + once


def test_fully_sharded(mesh: DeviceMesh) -> None:
    """Each parameter is gathered once, and its gradient scattered."""
    with FakeTensorMode():
        module, x = fully_sharded(PlainDense(DENSE), mesh), tokens_of(DENSE, 1, TOKENS)
    assert sent(module, x, training=False) == counts("all_gather", PARAMETERS)
    assert sent(module, x, training=True) == counts("all_gather", PARAMETERS) + counts("reduce_scatter", PARAMETERS)


def test_data_parallel(mesh: DeviceMesh) -> None:
    """Nothing forward; each gradient is reduced."""
    with FakeTensorMode():
        module, x = data_parallel(PlainDense(DENSE), mesh), tokens_of(DENSE, 1, TOKENS)
    assert not sent(module, x, training=False)
    assert sent(module, x, training=True) == counts("all_reduce", PARAMETERS)
