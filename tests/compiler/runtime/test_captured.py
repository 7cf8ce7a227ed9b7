"""Programs captured in CUDA graphs, with a graph that computes on the CPU what was captured on the same addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from opweave.compiler.runtime.device import captured
from opweave.compiler.runtime.device.captured import CapturedExecutor, why_not_captured
from opweave.compiler.runtime.device.executor import Executor
from opweave.compiler.runtime.device.program import Call, Origin, Program, Ref, Storage, View

CUDA = torch.device("cuda", 0)
ELEMENTS = 6


def program(effect: bool = False, device: torch.device = CUDA, elements: int = ELEMENTS) -> Program:
    """One output of an input and a weight."""
    origins = {"x": Origin.INPUT, "w": Origin.INPUT, "y": Origin.OUTPUT}
    call = Call("0", "aten.mul.out", (Ref("x"), Ref("w")), {"out": Ref("y")}, ("x", "w"), ("y",), effect=effect)
    return Program(
        "small",
        (Ref("x"), Ref("w")),
        (Ref("y"),),
        {name: Storage(name, 4 * elements, torch.float32, device, origin) for name, origin in origins.items()},
        {name: View(name, name, (elements,), (1,), 0, torch.float32) for name in origins},
        (call,),
        {},
    )


class _Stream:
    device = torch.device("cpu")

    def __init__(self, device: object = None) -> None:
        self.waited: list[_Stream] = []

    def wait_stream(self, other: _Stream) -> None:
        self.waited.append(other)


class Graphs:
    """The CUDA graphs of a process; ``run`` is an executor whose work they capture."""

    def __init__(self) -> None:
        self.stream = _Stream()
        self.capturing: list[Callable[[], None]] | None = None
        self.is_callers = False
        self.runs = self.replays = self.captures = 0
        self.error: RuntimeError | None = None
        self.drift = 0.0

    def run(self, inputs: list[Any]) -> tuple[Any, ...]:
        self.runs += 1
        x, w = inputs
        inputs.clear()
        y = x * w
        if self.capturing is not None:
            if self.error is not None:
                raise self.error
            self.capturing.append(lambda: y.copy_(x * w + self.drift))
        return (y, w, 7)

    @contextmanager
    def capture(self, graph: Any, **options: Any) -> Iterator[None]:
        assert options["capture_error_mode"] == "thread_local"
        self.captures += 1
        self.capturing = graph.work
        try:
            yield
        finally:
            self.capturing = None

    def graph(self) -> SimpleNamespace:
        work: list[Callable[[], None]] = []

        def replay() -> None:
            self.replays += 1
            with torch.inference_mode():
                for item in work:
                    item()

        return SimpleNamespace(work=work, replay=replay)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    made = Graphs()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", made.graph)
    monkeypatch.setattr(torch.cuda, "graph", made.capture)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: made.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.is_callers)
    monkeypatch.setattr(torch.cuda, "device", lambda device: _nothing())
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    captured._capture_stream.cache_clear()
    yield made
    captured._capture_stream.cache_clear()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def wrapped(graphs: Graphs) -> CapturedExecutor:
    class Runs:
        kernels, code, pool, device = {}, None, None, torch.device("cpu")  # type: ignore[var-annotated]

        def __call__(self, inputs: list[Any], pool: object = None) -> tuple[Any, ...]:
            return graphs.run(inputs)

    return CapturedExecutor(cast(Executor, Runs()), program(), [1])


def call(executor: CapturedExecutor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """One call, checked; its first output."""
    y, same, number = executor([x, w])
    torch.testing.assert_close(y, x * w, rtol=0, atol=0)
    assert same is w
    assert number == 7
    result: torch.Tensor = y
    return result


def test_calls_replay_once_captured(graphs: Graphs) -> None:
    """New inputs in each call, weights changed in place, outputs that stay as they are."""
    executor, w = wrapped(graphs), torch.rand(ELEMENTS)
    kept = []
    for number in range(8):
        y = call(executor, torch.rand(ELEMENTS), w.add_(1))
        kept.append((y, y.clone()))
        assert graphs.captures == (number >= captured.WARM_UP_CALLS)
    assert all(torch.equal(y, before) for y, before in kept)
    assert graphs.replays == 8 - captured.WARM_UP_CALLS
    assert graphs.runs == captured.WARM_UP_CALLS + 2  # the capture, and what its first replay is compared with


def test_an_expanded_input_is_copied_by_its_memory(graphs: Graphs) -> None:
    executor, w = wrapped(graphs), torch.rand(ELEMENTS)
    for number in range(5):
        call(executor, torch.tensor([float(number)]).expand(ELEMENTS), w)
    assert graphs.replays == 3


def test_a_graph_of_inference_mode_serves_other_modes(graphs: Graphs) -> None:
    executor, w = wrapped(graphs), torch.rand(ELEMENTS)
    with torch.inference_mode():
        for _ in range(3):
            call(executor, torch.rand(ELEMENTS), w)
    call(executor, torch.rand(ELEMENTS), w)
    assert graphs.captures == 1


def test_weights_that_move_are_captured_again_but_not_for_ever(graphs: Graphs) -> None:
    executor = wrapped(graphs)
    weights = [torch.rand(ELEMENTS) for _ in range(captured.CAPTURES + 2)]
    for w in weights:
        for _ in range(4):
            call(executor, torch.rand(ELEMENTS), w)
    assert graphs.captures == captured.CAPTURES
    assert "moved" in executor.failure


def test_a_graph_that_disagrees_is_not_used(graphs: Graphs) -> None:
    graphs.drift = 1.0
    executor, w = wrapped(graphs), torch.rand(ELEMENTS)
    for _ in range(5):
        call(executor, torch.rand(ELEMENTS), w)
    assert graphs.replays == 1
    assert "differs" in executor.failure


def test_rounding_is_no_disagreement(graphs: Graphs) -> None:
    """Atomic additions come in any order."""
    graphs.drift = 1e-6
    executor, w = wrapped(graphs), torch.rand(ELEMENTS)
    for _ in range(3):
        call(executor, torch.rand(ELEMENTS), w)
    assert executor.failure == ""


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.bfloat16])
def test_results_of_any_dtype_are_compared(dtype: torch.dtype) -> None:
    a = torch.tensor([1.0, 0.0, 1.0]).to(dtype)
    b = torch.tensor([0.0, 0.0, 1.0]).to(dtype)
    assert captured._agree(a, a.clone())
    assert not captured._agree(a, b)


def test_not_a_number_agrees_with_itself_only() -> None:
    a = torch.tensor([float("nan"), 1.0])
    assert captured._agree(a, a.clone())
    assert not captured._agree(a, torch.tensor([1.0, 1.0]))


def test_what_cannot_be_captured_runs_call_by_call(graphs: Graphs) -> None:
    graphs.error = RuntimeError("CUDA error: operation not permitted when stream is capturing")
    executor, w = wrapped(graphs), torch.rand(ELEMENTS)
    for _ in range(5):
        call(executor, torch.rand(ELEMENTS), w)
    assert "not permitted" in executor.failure
    assert graphs.captures == 1


def test_a_capture_of_the_callers_takes_the_launches(graphs: Graphs) -> None:
    executor, w = wrapped(graphs), torch.rand(ELEMENTS)
    graphs.is_callers = True
    for _ in range(5):
        call(executor, torch.rand(ELEMENTS), w)
    assert graphs.captures == graphs.replays == 0


def test_a_call_on_another_stream_comes_behind(graphs: Graphs) -> None:
    executor, w = wrapped(graphs), torch.rand(ELEMENTS)
    for _ in range(4):
        call(executor, torch.rand(ELEMENTS), w)
    before, graphs.stream = graphs.stream, _Stream()
    call(executor, torch.rand(ELEMENTS), w)
    call(executor, torch.rand(ELEMENTS), w)
    assert graphs.stream.waited == [before]


def test_what_is_not_captured() -> None:
    small = program()
    assert why_not_captured(small, [1]) == ""
    assert "random" in why_not_captured(program(effect=True), [1])
    assert "lies on cpu" in why_not_captured(program(device=torch.device("cpu")), [1])
    assert "takes longer" in why_not_captured(program(elements=1 << 22), [1])
    storages = {**small.storages, "y": replace(small.storages["y"], origin=Origin.INPUT)}
    assert "caller keeps" in why_not_captured(replace(small, storages=storages), [1])
    storages = {**small.storages, "x": replace(small.storages["x"], origin=Origin.HOST)}
    assert "comes and goes" in why_not_captured(replace(small, storages=storages), [1])
