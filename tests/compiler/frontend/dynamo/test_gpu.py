"""What only a GPU shows: Triton's launches, streams, captures, the allocator. Run by ``pytest -m gpu``.

Results are compared with eager mode's on the same device; arenas are poisoned and guarded as in every test here, but
where memory is measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 # the name everybody knows it by
from torch import nn

from opweave import torch_backend
from opweave.compiler.frontend.dynamo import planned
from opweave.compiler.runtime.device.executor import POOL, Executor
from opweave.compiler.runtime.device.layout import DevicePlan
from opweave.compiler.runtime.device.program import Program
from opweave.compiler.verify.races import find_races
from tests.support.streamed import on_streams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # advice for speed, which tests do not need
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]
CUDA = torch.device("cuda", 0)
WIDTH = 64


class Experts(nn.Module):
    """Branches of unequal widths, in any order or at once."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(WIDTH, (n + 1) * WIDTH) for n in range(4)])
        self.down = nn.ModuleList([nn.Linear((n + 1) * WIDTH, WIDTH) for n in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = [down(F.gelu(up(x))) for up, down in zip(self.up, self.down, strict=True)]
        total: torch.Tensor = sum(branches, x)
        return F.layer_norm(total, (WIDTH,))


class Residual(nn.Module):
    """Convolutions with statistics that training updates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = F.relu(self.norm(self.first(x))) + self.second(x)
        return total


class Attention(nn.Module):
    """Attention that a library computes, in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(x).unflatten(-1, (3, 4, -1)).movedim(-3, 0).transpose(-3, -2)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        total: torch.Tensor = x + self.out(mixed.transpose(-3, -2).flatten(-2))
        return total


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "experts": (Experts, (32, WIDTH)),
    "residual": (Residual, (4, 16, 24, 24)),
    "attention": (Attention, (2, 48, WIDTH)),
}


def made(name: str, dtype: torch.dtype = torch.float32, device: torch.device = CUDA) -> tuple[nn.Module, nn.Module]:
    """A model, and its twin to compare with."""
    model = MODELS[name][0]().to(device, dtype)
    return model, copy.deepcopy(model)


def drawn(name: str, dtype: torch.dtype = torch.float32, device: torch.device = CUDA) -> torch.Tensor:
    return torch.randn(MODELS[name][1], device=device, dtype=dtype)


def compiled(target: Any, **options: Any) -> Any:
    return torch.compile(target, backend="opweave", options={"cache": False, "strict": True, **options})


def close(found: Any, expected: Any, tolerance: float = 2e-3) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def count(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Gets an item whenever the method is called."""
    calls: list[str] = []
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize(("name", "captures"), [*((name, True) for name in MODELS), ("experts", False)])
def test_inference_is_captured_once_warm(name: str, captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """New inputs in each call, weights changed in place, and results that later calls leave alone."""
    replays = count(monkeypatch, torch.cuda.CUDAGraph, "replay")
    model, twin = made(name)
    model.eval(), twin.eval()
    function, kept = compiled(model, cuda_graph=captures), []
    with torch.no_grad():
        for number in range(6):
            x = drawn(name)
            kept.append((function(x), twin(x)))
            if number == 4:
                for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
                    parameter.mul_(1.5), other.mul_(1.5)
    for found, expected in kept:
        close(found, expected)
    assert len(replays) == (4 if captures else 0)


@pytest.mark.parametrize(
    ("name", "streams", "dtype"),
    [*((name, 1, torch.float32) for name in MODELS), *((name, 4, torch.bfloat16) for name in ("experts", "attention"))],
)
def test_training(name: str, streams: int, dtype: torch.dtype) -> None:
    model, twin = made(name, dtype)
    function = compiled(model, streams=streams)
    tolerance = 2e-3 if dtype is torch.float32 else 6e-2
    for _ in range(3):
        x = drawn(name, dtype)
        losses = [each(x).float().square().mean() for each in (function, twin)]
        for loss in losses:
            loss.backward()
        close(losses[0], losses[1], tolerance)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        scale = theirs.grad.abs().max().clamp(min=1e-3)
        close(ours.grad / scale, theirs.grad / scale, 2 * tolerance)
    close([*model.buffers()], [*twin.buffers()], tolerance)


@pytest.mark.parametrize("captures", [True, False])
def test_streams_of_our_own_compute_the_same(captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many calls without a pause, each on the results of the one before, so that a missing wait would show."""

    def drawn_streams(program: Program, device_plan: DevicePlan, *_: Any) -> DevicePlan:
        decided = on_streams(program, device_plan, 4, 0)  # whether that is faster or not
        assert find_races(program, decided) == ()
        return decided

    monkeypatch.setattr(torch_backend, "_on_streams", drawn_streams)
    model, twin = made("experts")
    function = compiled(model, streams=4, cuda_graph=captures)
    with torch.no_grad():
        x = y = drawn("experts")
        for _ in range(50):
            x, y = function(x), twin(y)
    close(x, y, 1e-2)


@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
def test_modes(mode: str) -> None:
    model, twin = made("experts", torch.bfloat16)
    function = compiled(model, mode=mode)
    with torch.no_grad():
        for _ in range(4):
            x = drawn("experts", torch.bfloat16)
            close(function(x), twin(x), 6e-2)


def test_calls_on_two_streams_of_the_callers() -> None:
    model, twin = made("experts")
    new: Any = torch.cuda.Stream
    function, sides = compiled(model), [new(CUDA), new(CUDA)]
    with torch.no_grad():
        inputs = [drawn("experts") for _ in range(12)]
        torch.cuda.synchronize()
        found = []
        for number, x in enumerate(inputs):
            with torch.cuda.stream(sides[number % 2]):
                found.append(function(x))
        torch.cuda.synchronize()
        close(found, [twin(x) for x in inputs])


def test_a_capture_of_the_callers_contains_the_program() -> None:
    """Its replays are right, even after the program has run elsewhere in between."""
    model, twin = made("experts")
    function, x = compiled(model), drawn("experts")
    with torch.no_grad():
        function(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = function(x)
        for _ in range(4):
            x.copy_(drawn("experts"))
            close(function(drawn("experts")).shape, x.shape)
            graph.replay()
            close(y, twin(x))


def numbers(x: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> Sequence[torch.Tensor]:
    """A number and a table on the host, and a result there."""
    moved = (table * 2).to(x.device)
    return x.sin() * scale + moved, x.cos().sum(0).cpu() + 1


def test_tensors_on_the_host_beside_those_on_the_device() -> None:
    function = compiled(numbers)
    for _ in range(4):
        inputs = torch.randn(8, 16, device=CUDA), torch.randn(()), torch.randn(16)
        close(function(*inputs), numbers(*inputs))


def test_inputs_that_lie_and_stride_as_they_like() -> None:
    """Off by one element, expanded, transposed."""

    def function(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return (a * 2 + b).relu() @ c

    ours = compiled(function)
    with torch.no_grad():
        for _ in range(5):
            row = torch.randn(32 * 32 + 1, device=CUDA)
            a, b = row[1:].view(32, 32), torch.randn(32, device=CUDA).expand(32, 32)
            c = torch.randn(32, 32, device=CUDA).t()
            close(ours(a, b, c), function(a, b, c))


def test_dropout_differs_from_call_to_call_and_follows_the_seed() -> None:
    function = compiled(lambda x: F.dropout(x, 0.5))
    x = torch.ones(4096, device=CUDA)
    torch.manual_seed(1)
    first, second = function(x), function(x)
    torch.manual_seed(1)
    assert torch.equal(first, function(x))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_no_more_is_allocated_than_the_plan_says(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the caching allocator's own count, in bytes, but for workspaces of libraries, which it counts, too."""
    monkeypatch.setattr(planned, "Executor", Executor)
    model = made(name)[0].train(training)
    function, x = compiled(model, cuda_graph=False), drawn(name)

    def step() -> None:
        if training:
            function(x).sum().backward()
            model.zero_grad()
        else:
            with torch.no_grad():
                function(x)

    for _ in range(3):
        step()
    peaks = [report.allocated_bytes for report in torch_backend.backend_reports()]
    POOL.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    between = sum(p.numel() * p.element_size() for p in model.parameters()) if training else 0
    slack = 64 * 512 + between  # small tensors of the caller's, such as the loss
    assert 0 < peak <= (sum if training else max)(peaks) + slack


def test_a_training_step_within_a_limit() -> None:
    model, twin = (nn.Sequential(*(Experts() for _ in range(4))).to(CUDA) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4096, WIDTH, device=CUDA)
    compiled(copy.deepcopy(model))(x).sum().backward()
    free = next(report for report in torch_backend.backend_reports() if report.phase == "backward")
    limit = round(0.7 * (free.held_bytes + free.allocated_bytes))
    torch._dynamo.reset()
    function = compiled(model, memory_limit=limit)
    for _ in range(3):
        losses = [each(x).square().mean() for each in (function, twin)]
        for loss in losses:
            loss.backward()
        close(losses[0], losses[1])
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        close(ours.grad, theirs.grad)


@pytest.mark.parametrize("part", [None, 0.5])
def test_a_model_on_the_host_runs_on_the_device(part: float | None) -> None:
    """With half of its weights on the device, the rest is streamed; results come back to the host."""
    host = torch.device("cpu")
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = {} if part is None else {"memory_limit": round(part * nbytes) + (1 << 20)}
    function = compiled(model, device="cuda", **limit)
    with torch.no_grad():
        for number in range(5):
            x = torch.randn(16, 512, device=host)
            y = function(x)
            assert y.device == host
            close(y, model(x))
            if number == 2:
                for parameter in model.parameters():
                    parameter.mul_(1.1)
