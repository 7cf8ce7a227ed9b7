"""Modules wrapped for data parallel training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import nn

from tests.compiler.frontend.dynamo.contract import compare, compiled, reports, same_modules, tiers


class _Network(nn.Module):
    """Of a class of its own: Dynamo enters none of torch's from within a wrapper that it does not trace."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(x)
        return result


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("outside", [True, False])
def test_data_parallel_training(alone: None, outside: bool) -> None:
    """Compiled as it is wrapped, and wrapped as it is compiled: gradients come as in eager mode, step after step."""
    module = _Network()
    twin = copy.deepcopy(module)
    if outside:
        function = compiled(nn.parallel.DistributedDataParallel(module))
    else:
        function = nn.parallel.DistributedDataParallel(compiled(module))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, twin)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        compare(function, twin, lambda: (torch.linspace(-1, 1, 20).reshape(5, 4),), gradients=True)
        same_modules(module, twin)
        for optimizer in optimizers:
            optimizer.step()
    assert tiers() == {"T1"}
    assert {report.phase for report in reports()} == {"forward", "backward"}
