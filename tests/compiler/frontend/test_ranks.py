"""Worlds of fake ranks in one process, and the graphs captured in them: for inference, training, and DTensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from opweave.compiler.frontend.collectives import collective_of
from opweave.compiler.frontend.dynamo.operators import operator_graph
from opweave.compiler.frontend.fx import from_module
from opweave.compiler.frontend.ranks import Captured, captured, fake_ranks
from opweave.errors import ModelError, OptionError


class Gated(torch.nn.Module):
    """Two linears with a ReLU between, as tensor parallelism cuts them."""

    seen: torch.Tensor

    def __init__(self, wide: int = 16, inner: int = 32) -> None:
        super().__init__()
        self.up = torch.nn.Linear(wide, inner, bias=False)
        self.down = torch.nn.Linear(inner, wide, bias=False)
        self.register_buffer("seen", torch.zeros(wide))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One pass; counts in ``seen`` what came in."""
        self.seen += x.detach().sum((0, 1))
        return self.down(self.up(x).relu())  # type: ignore[no-any-return]


def spread(module: Gated, mesh: DeviceMesh) -> torch.nn.Module:
    return parallelize_module(module, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def run(module: torch.fx.GraphModule, values: dict[str, torch.Tensor]) -> Any:
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    return module(*(values[name] for name in names))


def test_ranks_are_made_and_gone() -> None:
    """Any rank of any number; nothing is left behind, even by an error; a second world cannot be made inside."""
    with fake_ranks(8, 5):
        assert (dist.get_rank(), dist.get_world_size()) == (5, 8)
        with pytest.raises(OptionError, match="is rank 5 of 8 already"), fake_ranks(2):
            pass
        assert dist.get_world_size() == 8
    assert not dist.is_initialized()
    with pytest.raises(KeyError), fake_ranks(2, 1):
        raise KeyError
    assert not dist.is_initialized()
    for world, rank in ((0, 0), (8, 8), (8, -1)):
        with pytest.raises(OptionError, match="there is no rank"), fake_ranks(world, rank):
            pass
    with pytest.raises(ModelError, match="but this process has none"):
        collective_of(torch.ops._c10d_functional.all_reduce.default, (torch.ones(1), "sum", "0"), {}, "n")


def test_inference_is_one_graph_that_computes_the_same() -> None:
    """Parameters and inputs are named, updated buffers come first among the results."""
    module, x = Gated(), torch.randn(2, 3, 16)
    found = captured(module, (x,))
    assert sorted(found.parameters.values()) == ["down.weight", "seen", "up.weight"]
    assert (len(found.inputs), found.outputs, found.backward) == (1, 2, None)
    assert [found.parameters[name] for name in found.updated] == ["seen"]
    assert torch.count_nonzero(module.seen) == 0  # tracing leaves the module as it is
    held = module.state_dict()
    values = {name: held[parameter] for name, parameter in found.parameters.items()} | {found.inputs[0]: x}
    seen, result = run(found.forward, values)
    torch.testing.assert_close(result, module(x))
    torch.testing.assert_close(seen, module.seen)


def test_training_gives_joint_and_halves_that_agree() -> None:
    """Gradients of the joint graph, and of the two halves in turn, are eager's."""
    module, x = Gated(), torch.randn(2, 3, 16)
    found = captured(module, (x,), training=True)
    assert found.joint is not None
    assert found.backward is not None
    assert found.gradients is not None
    held: dict[str, torch.Tensor] = {name: value.clone() for name, value in module.state_dict().items()}
    values = {name: held[parameter] for name, parameter in found.parameters.items()} | {found.inputs[0]: x}
    tangent = torch.randn(2, 3, 16)
    (tangents,) = (n.name for n in found.joint.graph.find_nodes(op="placeholder") if n.name.startswith("tangents"))
    values[str(tangents)] = tangent
    module(x).backward(tangent)
    whole = run(found.joint, values)
    assert set(found.gradients) == {"up.weight", "down.weight"}
    forward = run(found.forward, values)
    leaves: Any = found.forward.graph.output_node().args[0]
    saved = [str(node.name) for node in leaves[found.outputs :]]
    backward = run(found.backward, values | dict(zip(saved, forward[found.outputs :], strict=True)))
    for name, position in found.gradients.items():
        torch.testing.assert_close(whole[position], module.get_parameter(name).grad)
        torch.testing.assert_close(backward[position - found.outputs], module.get_parameter(name).grad)


def test_a_seventy_billion_shape_takes_no_memory() -> None:
    """DTensor leaves plain calls on local shapes; meshes are gone from the placeholders."""

    def checked(found: Captured) -> None:
        shapes = {
            found.parameters[n.name]: tuple(n.meta["val"].shape)
            for n in placeholders(found)
            if n.name in found.parameters
        }
        assert shapes["up.weight"] == (28672 // 8, 8192)
        assert shapes["down.weight"] == (8192, 28672 // 8)
        (reduced,) = (op for op in operator_graph(found.forward, int).graph.ops if op.collective is not None)
        assert reduced.collective is not None
        assert (reduced.collective.nbytes, len(reduced.collective.ranks)) == (4096 * 8192 * 4, 8)

    def placeholders(found: Captured) -> list[torch.fx.Node]:
        nodes = list(found.forward.graph.find_nodes(op="placeholder"))
        assert all(isinstance(node.meta["val"], torch.Tensor) for node in nodes)
        return nodes

    with fake_ranks(8, 7):
        mesh = init_device_mesh("cpu", (8,))
        with FakeTensorMode():
            module, x = spread(Gated(8192, 28672), mesh), torch.empty(1, 4096, 8192)
        checked(captured(module, (x,)))
        checked(captured(module, (x,), training=True))


def test_what_cannot_be_captured_says_why() -> None:
    class Deciding(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x

    x = torch.randn(2, 3, 16)
    with pytest.raises(ModelError, match="AOTAutograd cannot trace Deciding"):
        captured(Deciding(), (x,))
    with pytest.raises(ModelError, match="nothing that Gated returns requires a gradient"):
        captured(Gated().requires_grad_(False), (x,), training=True)
    from torch.distributed.fsdp import fully_shard

    with fake_ranks(2):
        sharded = Gated()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(ModelError, match="sharded by fully_shard"):
            captured(sharded, (x,))


def test_the_frontend_imports_what_dtensor_spreads() -> None:
    """The weights are the local ones; a call has the structure of the example; results are plain tensors."""
    x = torch.randn(2, 3, 16)
    with fake_ranks(8, 2):
        module = spread(Gated(), init_device_mesh("cpu", (8,)))
        found = from_module(module, (), {"x": x})
        assert found.input_names == ("x",)
        assert [op.collective.nbytes for op in found.graph.ops if op.collective is not None] == [2 * 3 * 16 * 4]
        local = module.get_parameter("up.weight").to_local()  # type: ignore[attr-defined]
        assert sorted(tuple(value.shape) for value in found.weights.values()) == [(4, 16), (16,), (16, 4)]
        assert any(value.data_ptr() == local.data_ptr() for value in found.weights.values())
        assert found.flatten is not None
        assert found.unflatten is not None
        (given,) = found.flatten((), {"x": x})
        assert given is x
        assert found.unflatten([x]) is x
        with pytest.raises(ModelError, match="structure of the example inputs"):
            found.flatten((x,), {})
        with pytest.raises(ModelError, match="an input is a int"):
            from_module(module, (1,))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel(use_local_output=False)}
        returning = parallelize_module(Gated(), init_device_mesh("cpu", (8,)), plan)
        with pytest.raises(ModelError, match="no plain tensor"):
            from_module(returning, (x,))
