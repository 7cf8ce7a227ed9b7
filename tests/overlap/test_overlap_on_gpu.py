"""Cut modules on a GPU: streams of collectives, CUDA graphs and Inductor's frozen order, with NCCL of one rank.

One GPU shows that results stay right and that streams wait for one another; what overlap gains takes several.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from benchmarks.parallel_models import LLAMA_3_70B, DenseTensorParallel

import opweave
from opweave.compiler.rank_model import RankModel
from opweave.compiler.runtime.distributed import CapturedRank

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

MACHINE = "8xh100-nvlink"
SMALL = LLAMA_3_70B.with_layers(2)
TOKENS = 512


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of NCCL with one rank."""
    store = (tmp_path_factory.mktemp("ranks") / "store").as_uri()
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model() -> tuple[torch.nn.Module, torch.Tensor]:
    """Two layers as one of eight ranks has them, in width, and their tokens."""
    from dataclasses import replace

    sizes = replace(SMALL, hidden=1024, intermediate=3584, heads=8, key_heads=8)
    x = torch.randn(1, TOKENS, sizes.hidden, dtype=torch.bfloat16, device="cuda")
    return DenseTensorParallel(sizes).cuda(), x


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), wanted.float(), rtol=2e-2, atol=2e-2 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize("sizes", [(256, 256), (128, 384)])
def test_streams_and_a_cuda_graph_compute_what_eager_does(sizes: tuple[int, ...]) -> None:
    """Five calls each, the later ones of other values; nothing may be read before it is there."""
    module, x = model()
    rank = opweave.compile(module, (x,), machine=MACHINE, overlap={"sizes": sizes})
    assert isinstance(rank, RankModel)
    assert rank.overlapped.sizes == sizes
    flat = [rank.weights.get(rank.captured.parameters.get(n.name, ""), x) for n in placeholders(rank)]
    static = [number for number, n in enumerate(placeholders(rank)) if n.name in rank.captured.parameters]
    graph = CapturedRank(rank.executor, static)
    for _ in range(5):
        x.normal_()
        with torch.no_grad():
            wanted = module(x)
        close(rank(x), wanted)
        close(graph(*flat)[0], wanted)


def placeholders(rank: RankModel) -> list[torch.fx.Node]:
    return list(rank.overlapped.module.graph.find_nodes(op="placeholder"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_keeps_the_order_and_the_gradients() -> None:
    module, x = model()
    twin = copy.deepcopy(module)
    options: Any = {"overlap": {"sizes": (256, 256)}, "machine": MACHINE}
    compiled = torch.compile(module, backend="opweave", options=options)
    for _ in range(2):
        close(compiled(x), twin(x))
        compiled(x).float().square().mean().backward()
        twin(x).float().square().mean().backward()
    for own, other in zip(module.parameters(), twin.parameters(), strict=True):
        if other.grad is not None:
            assert own.grad is not None
            close(own.grad, other.grad)
