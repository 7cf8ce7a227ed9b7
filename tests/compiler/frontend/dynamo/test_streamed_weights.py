"""``options={"device": ...}``: a model that stays on the host, its weights streamed where they do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from opweave import torch_backend
from opweave.compiler.frontend.dynamo import hosted
from opweave.compiler.frontend.dynamo.report import GraphReport
from opweave.compiler.runtime.device.host import HostExecutor, HostMemory
from opweave.errors import Infeasible, OptionError
from tests.compiler.frontend.dynamo.contract import compiled, reports

WIDTH = 64


def network(layers: int = 3) -> nn.Module:
    torch.manual_seed(1)
    parts = [nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Tanh(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(layers)]
    return nn.Sequential(*parts).eval()


def weight_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def last() -> GraphReport:
    return reports()[-1]


@torch.no_grad()
def test_every_limit_gives_what_eager_gives() -> None:
    """From more than the weights take down to the least that is named; what is loaded grows, and the limit holds."""
    model, x = network(), torch.randn(8, WIDTH)
    with pytest.raises(Infeasible, match="the least limit that works is") as refusal:
        run(model, x, 1000)
    assert "touches" in str(refusal.value)
    least = refusal.value.required_bytes
    loaded = []
    for limit in (2 * weight_bytes(model), weight_bytes(model) // 2, least):
        torch.testing.assert_close(run(model, x, limit), model(x))
        report = last()
        assert report.tier == "T1"
        assert report.resident_bytes + report.held_bytes + report.allocated_bytes <= limit
        assert report.bound_s is not None
        assert report.predicted_s is not None
        assert report.bound_s <= report.predicted_s * (1 + 1e-6)
        loaded.append(report.loaded_bytes)
    assert loaded[0] == x.nbytes
    assert loaded[0] < loaded[1] <= loaded[2]


def run(model: nn.Module, x: torch.Tensor, limit: int) -> torch.Tensor:
    """One call of ``model``, compiled for a limit; errors of the backend come unwrapped."""
    torch._dynamo.reset()
    function = compiled(model, device="cpu", memory_limit=limit)
    try:
        result: torch.Tensor = function(x)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise error.inner_exception from None
    return result


@torch.no_grad()
@pytest.mark.parametrize("part", [2.0, 0.5])
def test_changed_weights_are_seen(part: float) -> None:
    """A step in place, and a loaded state: both those that stay and those that are streamed."""
    model, x = network(2), torch.randn(4, WIDTH)
    limit = int(part * weight_bytes(model)) + 30_000
    function = compiled(model, device="cpu", memory_limit=limit)
    function(x)
    for parameter in model.parameters():
        parameter.add_(0.01)
    torch.testing.assert_close(function(x), model(x))
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})
    torch.testing.assert_close(function(x), model(x))


@torch.no_grad()
def test_buffers_are_updated_on_the_host() -> None:
    """Running statistics, which the graph writes: the caller's own tensors have the new values."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).train())
    x = torch.randn(16, WIDTH)
    function = compiled(models[0], device="cpu", memory_limit=100_000)
    torch.testing.assert_close(function(x), models[1](x))
    for own, expected in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(own, expected)


@torch.no_grad()
def test_sizes_that_change() -> None:
    """Batches of other sizes: planned by bucket within the same limit."""
    model = network(2)
    limit = weight_bytes(model) // 2 + 60_000
    function = compiled(model, dynamic=True, device="cpu", memory_limit=limit)
    for batch in (4, 9, 30):
        x = torch.randn(batch, WIDTH)
        torch.testing.assert_close(function(x), model(x))
    assert len(reports()) == 1


def test_gradients_are_refused() -> None:
    function = compiled(network(1), device="cpu")
    with pytest.raises(Exception, match="option 'device' is for inference") as refusal:
        function(torch.randn(2, WIDTH))
    assert isinstance(refusal.value.__cause__ or getattr(refusal.value, "inner_exception", None), OptionError)


@torch.no_grad()
def test_graphs_of_a_model_share_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two graphs, one memory on the device; it goes with the graphs."""
    memories: list[HostMemory] = []

    def watched(*args: Any, memory: HostMemory, **kwargs: Any) -> HostExecutor:
        memories.append(memory)
        return HostExecutor(*args, memory=memory, **kwargs)

    monkeypatch.setattr(hosted, "HostExecutor", watched)
    model = network(2)

    def broken(x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        torch._dynamo.graph_break()
        result: torch.Tensor = model(y)
        return result

    x = torch.randn(4, WIDTH)
    torch.testing.assert_close(compiled(broken, device="cpu")(x), broken(x))
    assert len(memories) == 2
    assert memories[0] is memories[1]
    assert memories[0].copied_bytes >= weight_bytes(model)
    assert torch_backend.fallback_counts() == {}
