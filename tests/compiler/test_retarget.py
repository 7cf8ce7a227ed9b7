"""Graphs of models on the host, made for another device: everything follows, and what cannot is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import compile_fx

from opweave.compiler.frontend.dynamo.retarget import retarget

GPU = torch.device("cuda:0")


class Followed(torch.fx.Interpreter):
    """Runs a retargeted graph on fake tensors and notes the devices of all it makes."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.devices: set[torch.device] = set()

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.devices.add(result.device)
        return result


def devices(function: Callable[..., Any], *inputs: torch.Tensor, **options: Any) -> set[torch.device]:
    """Devices of every tensor of ``function``'s graph once it is made for a GPU."""
    found: set[torch.device] = set()

    def backend(module: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
        mode = detect_fake_mode(examples)
        assert mode is not None
        moved, moved_inputs = retarget(module, examples, GPU)
        for before, after in zip(examples, moved_inputs, strict=True):
            if isinstance(before, torch.Tensor):
                assert (after.shape, after.stride(), after.dtype) == (before.shape, before.stride(), before.dtype)
        followed = Followed(moved)
        with mode:
            followed.run(*moved_inputs)
        found.update(followed.devices)
        return lambda *_: (torch.zeros(()),)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, **options)(*inputs)
    return found


def graph_of(function: Callable[..., Any], *inputs: torch.Tensor) -> tuple[torch.fx.GraphModule, list[Any]]:
    """What Dynamo captures of ``function``."""
    captured: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def backend(module: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
        captured.append((module, list(examples)))
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*inputs)
    return captured[0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_everything_follows(dynamic: bool) -> None:
    """Constructors with and without a device, moves to the host by text, object and method, constants, buffers."""

    class Model(torch.nn.Module):
        seen: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(8, 8)
            self.register_buffer("seen", torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = (
                self.inner(x) + torch.arange(8) + torch.zeros(8, device=x.device) + torch.tensor([0.5] * 8)
            )
            self.seen.add_(1)
            y = y.cpu() + y.to("cpu") + y.to(torch.device("cpu")) + y.to(device="cpu") + y.to("cpu", torch.float32)
            return y * torch.full((8,), 2.0, device="cpu") * y.new_ones(8) + self.seen

    assert devices(Model(), torch.randn(3, 8), dynamic=dynamic) == {GPU}


def test_strides_are_kept() -> None:
    """Also of inputs that are no dense rows."""
    assert devices(lambda x, y: x + y, torch.randn(6, 4).t(), torch.randn(4, 1).expand(4, 6)) == {GPU}


def test_autocast_keeps_its_dtype() -> None:
    """What the host casts to, the device casts to: without a dtype, the host's default."""

    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu"):
            return torch.mm(x, x)

    moved: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
        moved.append(retarget(module, examples, GPU)[0])
        return lambda *_: (torch.zeros(4, 4),)

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(torch.randn(4, 4))
    entered = next(node for node in moved[0].graph.nodes if "_enter_autocast" in str(node.target))
    assert entered.args[:2] == ("cuda", torch.bfloat16)


def test_aot_keeps_symbols_and_weights() -> None:
    """Traced afresh on the device, with the symbols of Dynamo's shapes and the positions of what is static."""
    seen: list[tuple[list[Any], Any]] = []

    def inner(module: torch.fx.GraphModule, _: Any, **options: Any) -> Any:
        seen.append(
            ([node.meta["val"] for node in module.graph.find_nodes(op="placeholder")], options["static_input_idxs"])
        )

        def run(inputs: list[Any]) -> list[torch.Tensor]:
            return [torch.zeros(next(i for i in inputs if isinstance(i, int)), 8)]

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(module: torch.fx.GraphModule, examples: Sequence[Any]) -> Any:
        return compile_fx(*retarget(module, examples, torch.device("meta")), inner_compile=inner)

    torch._dynamo.reset()
    function = torch.compile(torch.nn.Linear(8, 8), backend=backend, dynamic=True)
    with torch.no_grad():
        assert [function(torch.randn(rows, 8)).shape[0] for rows in (3, 5)] == [3, 5]
    assert len(seen) == 1
    values, static = seen[0]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert any(isinstance(tensor.shape[0], torch.SymInt) for tensor in tensors)
    assert [tuple(values[i].shape) for i in static] == [(8, 8), (8,)]


def test_the_host_itself_changes_nothing() -> None:
    module, inputs = graph_of(lambda x: x.cpu() + 1, torch.randn(3))
    code = module.code
    moved, same = retarget(module, inputs, torch.device("cpu"))
    assert moved.code == code
    assert all(a is b for a, b in zip(same, inputs, strict=True))


def test_gradients_are_refused() -> None:
    module, inputs = graph_of(torch.nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(Exception, match=r"is for inference, but .*weight.* requires a gradient") as refusal:
        retarget(module, inputs, GPU)
    assert "torch.no_grad()" in str(refusal.value)


def test_inputs_elsewhere_are_refused() -> None:
    module, inputs = graph_of(lambda x: x + 1, torch.randn(2))
    with pytest.raises(Exception, match=r"is on the host, but .* is on meta"):
        retarget(module, [torch.empty(2, device="meta") for _ in inputs], GPU)


def test_operators_of_the_host_are_refused() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.mkldnn._linear_pointwise.default, (x, x, None, "none", [], "")),))
    module = torch.fx.GraphModule({}, graph)
    with pytest.raises(Exception, match=r"_linear_pointwise\.default works on the host only"):
        retarget(module, [torch.empty(2)], GPU)


def test_generators_of_the_host_are_refused() -> None:
    graph = torch.fx.Graph()
    generator = torch.Generator()
    graph.output((graph.call_function(torch.rand, (2,), {"generator": graph.get_attr("g")}),))
    module = torch.fx.GraphModule({"g": generator}, graph)
    with pytest.raises(Exception, match="a generator of the host's"):
        retarget(module, [], GPU)


def test_foreign_tensors_are_refused() -> None:
    graph = torch.fx.Graph()
    graph.output((graph.call_function(torch.from_numpy, (graph.placeholder("x"),)),))
    module = torch.fx.GraphModule({}, graph)
    with pytest.raises(Exception, match="from_numpy works on the host only"):
        retarget(module, [1], GPU)


def test_a_refusal_reaches_the_user() -> None:
    """Through torch.compile, as the error it is."""
    torch._dynamo.reset()
    function = torch.compile(torch.nn.Linear(2, 2), backend=lambda m, i: retarget(m, list(i), GPU))
    with pytest.raises(BackendCompilerFailed, match="requires a gradient"):
        function(torch.randn(1, 2))
