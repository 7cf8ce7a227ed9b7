"""The cut of a joint graph: least bytes by brute force, and what F, I and W may not share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from opweave.compiler.frontend.dynamo import halves_cut
from opweave.compiler.frontend.dynamo.halves import split
from opweave.compiler.frontend.dynamo.halves_cut import Dependencies, least_bytes
from opweave.compiler.frontend.dynamo.halves_joint import PlaceKind, joint_graph
from opweave.compiler.frontend.dynamo.halves_rewrite import rewritten
from opweave.compiler.frontend.dynamo.joint_costs import aliased, nbytes_of
from opweave.errors import ModelError


class Drawn(nn.Module):
    """Layers drawn at random on a vector of changing width, with a connection around some of them."""

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        self.layers = layers
        self.weights = nn.ParameterList()
        width = 2
        for layer in layers:
            if layer in ("wider", "narrower"):
                other = 6 if layer == "wider" else 2
                self.weights.append(nn.Parameter(torch.ones(width, other)))
                width = other
            elif layer in ("scale", "shift"):
                self.weights.append(nn.Parameter(torch.ones(width)))

    def forward(self, x: torch.Tensor) -> Any:
        """``x`` is (3, 2)."""
        weights = iter(self.weights)
        begin = x
        for layer in self.layers:
            match layer:
                case "wider" | "narrower":
                    x = x @ next(weights)
                case "scale":
                    x = x * next(weights)
                case "shift":
                    x = x + next(weights)
                case "tanh":
                    x = torch.tanh(x)
                case "sine":
                    x = torch.sin(x)
                case "norm":
                    x = x / x.sum(-1, keepdim=True)
                case "around" if x.shape == begin.shape:
                    x = x + begin
        return x


LAYERS = ("wider", "narrower", "scale", "shift", "tanh", "sine", "norm", "around")


class _BruteForce:
    """The least bytes of any two sets of held values that I and W can be computed from, by trying them all."""

    def __init__(self, found: Dependencies) -> None:
        self.found = found
        joint = found.joint
        self.given = {node for node, place in joint.places.items() if place.kind is PlaceKind.INPUT}
        needed = found.input_gradient | found.weight_gradient
        self.values = [
            node
            for node in found.nodes
            if node in needed and node not in found.static and isinstance(node.meta.get("val"), torch.Tensor)
            if node.op == "placeholder" or aliased(node) is None
        ]

    def least(self) -> int:
        """Bytes held behind F, inputs aside, and those held between I and W, added up."""
        early = [node for node in self.values if node not in self.found.backward and node not in self.given]
        late = [node for node in self.values if node not in self.found.deferred]
        orders = sorted(_subsets(late), key=_bytes)
        best = 1 << 60
        for first in sorted(_subsets(early), key=_bytes):
            if _bytes(first) >= best:
                break
            in_i = self._run_in_i(set(first) | self.given)
            if in_i is None:
                continue
            for second in orders:
                if _bytes(first) + _bytes(second) >= best:
                    break
                if in_i.issuperset(second) and self._can_run_w(set(second)):
                    best = _bytes(first) + _bytes(second)
        return best

    def _run_in_i(self, held: set[fx.Node]) -> set[fx.Node] | None:
        """All that I can compute; nothing if that is not the gradients of the inputs."""
        found = self.found
        has = set(found.static) | held | {n for n in found.backward if n.op == "placeholder"}
        for node in found.nodes:
            can_run = found.is_cheap(node) if node not in found.backward else node not in found.deferred
            if node.op == "call_function" and can_run and has.issuperset(node.all_input_nodes):
                has.add(node)
        return has if has.issuperset(found.joint.input_gradients.values()) else None

    def _can_run_w(self, held: set[fx.Node]) -> bool:
        found = self.found
        has = set(found.static) | held
        for node in found.nodes:
            can_run = found.is_cheap(node) or node in found.deferred
            if node.op == "call_function" and can_run and has.issuperset(node.all_input_nodes):
                has.add(node)
        return has.issuperset(found.joint.parameter_gradients.values())


def _subsets(nodes: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, ...]]:
    return chain.from_iterable(combinations(nodes, size) for size in range(len(nodes) + 1))


def _bytes(nodes: Sequence[fx.Node]) -> int:
    return sum(map(nbytes_of, nodes))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.lists(st.sampled_from(LAYERS), min_size=2, max_size=4))
def test_no_choice_holds_fewer_bytes(layers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where computing again costs nothing, the cut is the best of all pairs of sets."""
    monkeypatch.setattr(halves_cut, "AGAIN", 0)
    module = Drawn([*layers, "scale"])
    found = Dependencies(rewritten(joint_graph(module, (torch.ones(3, 2, requires_grad=True),))))
    brute = _BruteForce(found)
    if len(brute.values) > 14:
        return
    cut = least_bytes(found)
    behind_forward = [node for node in cut.behind_forward if node not in brute.given]
    assert _bytes(behind_forward) + _bytes(cut.behind_input_gradient) == brute.least()


@settings(max_examples=25, deadline=None)
@given(layers=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=12), is_first=st.booleans())
def test_halves_compute_what_autograd_does(layers: list[str], is_first: bool) -> None:
    """The three graphs, called one after the other, give the outputs and gradients of eager execution."""
    module = Drawn([*layers, "scale"])
    x = torch.rand(3, 2, requires_grad=not is_first)
    graphs = split(module, (x,))
    own = dict(module.named_parameters())
    with torch.no_grad():

        def run(half: Any, values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
            taken = [
                values[take]
                if isinstance(take, str)
                else own[take.name]
                if take.kind is PlaceKind.PARAMETER
                else values[take.kind.value]
                for take in half.takes
            ]
            return list(half.module(*taken))

        values = {"input": x.detach()}
        results = run(graphs.forward, values)
        values |= dict(zip(graphs.forward.gives, results[1:], strict=True))
        gradient = torch.rand_like(results[0])
        held = {name: values[name if place is None else place.kind.value] for name, place in graphs.held.items()}
        held["output gradient"] = gradient
        found = []
        if graphs.input_gradient is not None:
            found = run(graphs.input_gradient, held)
            held |= dict(zip(graphs.input_gradient.gives, found[1:], strict=True))
        kept = {
            name: held[name if name in held or place is None else place.kind.value]
            for name, place in graphs.kept.items()
        }
        assert graphs.weight_gradient is not None
        weights = dict(zip(graphs.parameter_gradients, run(graphs.weight_gradient, kept), strict=True))
    expected = module(x)
    expected.backward(gradient)
    assert torch.equal(results[0], expected)
    assert is_first or torch.equal(found[0], x.grad)  # type: ignore[arg-type]
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(weights[name], parameter.grad)


class Narrow(nn.Module):
    """A product of something much smaller than the input, computed from it by cheap operators."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 4))

    def forward(self, x: torch.Tensor) -> Any:
        """``x`` is (2, 50)."""
        return torch.tanh(x.sum(-1, keepdim=True)) @ self.weight


def test_inputs_are_there_until_i() -> None:
    """What can be computed from the input is not held behind F, however small it is; between I and W the least is."""
    graphs = split(Narrow(), (torch.ones(2, 50, requires_grad=True),))
    assert [place and place.kind for place in graphs.held.values()] == [PlaceKind.INPUT]
    assert graphs.weight_gradient is not None
    taken = graphs.weight_gradient.module.graph.find_nodes(op="placeholder")
    assert sorted(node.meta["val"].numel() for node in taken) == [2, 8]


def test_small_weight_gradients_are_made_in_i() -> None:
    """The gradient of a scale is a sum: as long as one row, where what it is a sum of are two whole values."""
    graphs = split(Drawn(["scale"]), (torch.ones(3, 2, requires_grad=True),))
    assert graphs.weight_gradient is not None
    taken = graphs.weight_gradient.module.graph.find_nodes(op="placeholder")
    assert [node.meta["val"].numel() for node in taken] == [2]


def test_a_checkpoint_is_left_to_the_cut_and_random_numbers_run_once() -> None:
    """Random numbers of the backward half would be others: they are refused, and a checkpoint makes none."""
    from torch.utils.checkpoint import checkpoint

    layer = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 4))

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> Any:
            return checkpoint(self.layer, x, use_reentrant=False)

    graphs = split(Checkpointed(), (torch.ones(2, 4, requires_grad=True),))
    halves = (graphs.forward, graphs.input_gradient, graphs.weight_gradient)
    drawn = [
        node for half in halves if half for node in half.module.graph.nodes if "dropout.default" in str(node.target)
    ]
    assert len(drawn) == 1

    class Drawing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.rand_like(gradient)

    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return Drawing.apply(x)  # type: ignore[no-untyped-call]

    with pytest.raises(ModelError, match="draws random numbers"):
        split(Noisy(), (torch.ones(2, 4, requires_grad=True),))
