"""A cut training step in bfloat16 through Inductor, with gloo of one rank: rules add what has lowerings there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from benchmarks.parallel_models import TINY, DenseTensorParallel

from opweave.torch_backend import backend_reports


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_parts_of_causal_attention_are_merged_in_the_precision_of_their_logarithms(alone: None) -> None:
    """Conversions between dtypes are decomposed by AOTAutograd before the cut, and have no lowering of their own."""
    torch.compiler.reset()
    module = DenseTensorParallel(replace(TINY, layers=1))
    twin, x = copy.deepcopy(module), torch.randn(1, 12, TINY.hidden, dtype=torch.bfloat16)
    options: Any = {"overlap": {"sizes": (5, 7)}, "machine": "8xh100-nvlink"}
    compiled = torch.compile(module, backend="opweave", options=options)
    for function in (compiled, twin):
        function(x).float().square().sum().backward()
    with torch.no_grad():
        wanted = twin(x).float()
        torch.testing.assert_close(compiled(x).float(), wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))
    for own, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert own.grad is not None
        assert other.grad is not None
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(own.grad, other.grad, rtol=0.05, atol=0.05 * scale)
    sizes = {r.overlap.sizes for r in backend_reports()[-3:] if r.overlap is not None}
    assert sizes == {(5, 7)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:.*stock Inductor:opweave.compiler.frontend.dynamo.fallbacks.OpweaveFallbackWarning")
def test_ranks_are_compared_while_a_module_is_compiled(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they exchange is real, although the compiler traces with fake tensors; else Dynamo would run it eagerly."""
    torch.compiler.reset()
    exchanged: list[Any] = []
    gather = dist.all_gather_object

    def noting(found: list[Any], mine: Any) -> None:
        gather(found, mine)
        exchanged.append(mine)

    monkeypatch.setattr(dist, "all_gather_object", noting)
    options: Any = {"overlap": {"check_ranks": True}, "machine": "8xh100-nvlink"}
    module, x = DenseTensorParallel(replace(TINY, layers=1), attention=False), torch.randn(1, 8, TINY.hidden)
    with torch.no_grad():
        torch.compile(module, backend="opweave", options=options, fullgraph=True)(x.bfloat16())
    assert [list(each) for each in exchanged] == [["[0]"]]
