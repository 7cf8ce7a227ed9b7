"""Moved experts compute what they computed: stacked, in lists, in transformers' models, and over simulated ranks."""

from __future__ import annotations

import random

import msgspec
import pytest
import torch
from torch import Tensor, nn

from opweave.compiler.pipeline import Budget
from opweave.errors import ModelError
from opweave.hw_models.registry import load
from opweave.passes.experts.apply import apply_to_model, expert_layers, permuted
from opweave.passes.experts.placement import ExpertPlacement, PlaceExperts
from opweave.passes.experts.trace import RoutingTrace

EXPERTS, TOP_K, HIDDEN, INNER = 8, 3, 12, 20


class Stacked(nn.Module):
    """Experts as two tensors [experts, ...]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))

    def one(self, expert: int, rows: Tensor) -> Tensor:
        return torch.relu(rows @ self.up[expert].T) @ self.down[expert].T


class Listed(nn.ModuleList):
    """Experts as modules."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(HIDDEN, INNER), nn.ReLU(), nn.Linear(INNER, HIDDEN)) for _ in range(EXPERTS)
        )

    def one(self, expert: int, rows: Tensor) -> Tensor:
        result: Tensor = self[expert](rows)
        return result


class Layer(nn.Module):
    """Routing that gathers: weights and sums are over a token's choices in their order, and do not depend on places."""

    def __init__(self, experts: Stacked | Listed) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = experts

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, chosen = self.gate(x).topk(TOP_K)
        return torch.softmax(scores, -1), chosen

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.route(x)
        rows = [
            torch.cat([self.experts.one(int(e), row[None]) for e in these])
            for row, these in zip(x, chosen, strict=True)
        ]
        return x + (torch.stack(rows) * scores[..., None]).sum(1)


def _model(kind: str) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(Layer(Stacked() if kind == "stacked" else Listed()) for _ in range(3)))


def _trace(model: nn.Sequential, x: Tensor) -> RoutingTrace:
    chosen = []
    for layer in model:
        assert isinstance(layer, Layer)
        chosen.append(layer.route(x)[1])
        x = layer(x)
    return RoutingTrace(torch.stack(chosen, 1).numpy(), EXPERTS)


def _placement(trace: RoutingTrace, devices: int = 4) -> ExpertPlacement:
    return PlaceExperts(devices=devices).place(trace, load("8xh100-nvlink"), Budget.of_seconds(5))


@pytest.mark.parametrize("kind", ["stacked", "listed"])
@torch.no_grad()
def test_function_is_bitwise_the_same(kind: str) -> None:
    """And the router's numbers become places; a router left as it was, or an expert exchanged, is seen."""
    model, x = _model(kind), torch.randn(40, HIDDEN)
    before, trace = model(x), _trace(model, x)
    placement = _placement(trace)
    assert any(order != tuple(range(EXPERTS)) for order in placement.order)
    gates = [layer.gate.weight.clone() for layer in model if isinstance(layer, Layer)]
    assert apply_to_model(model, placement) > 0
    assert torch.equal(model(x), before)
    moved = _trace(model, x)
    for layer in range(3):
        expected = torch.tensor(placement.remap[layer])[torch.from_numpy(trace.chosen[:, layer])]
        assert torch.equal(torch.from_numpy(moved.chosen[:, layer]), expected)
    first = model[0]
    assert isinstance(first, Layer)
    first.gate.weight.copy_(gates[0])
    assert not torch.allclose(model(x), before)


@torch.no_grad()
def test_ranks_with_their_experts_compute_the_same() -> None:
    """Simulated expert parallelism: each rank has its places' weights, tokens go to the rank of the place, and back."""
    model, x = _model("stacked"), torch.randn(40, HIDDEN)
    expected, placement = model(x), _placement(_trace(model, x))
    room, received = EXPERTS // placement.devices, [0] * placement.devices
    for layer, order in zip(list(model), placement.order, strict=True):
        assert isinstance(layer, Layer)
        assert isinstance(layer.experts, Stacked)
        up, down = permuted(layer.experts.up, order), permuted(layer.experts.down, order)
        gate, bias = permuted(layer.gate.weight, order), permuted(layer.gate.bias, order)
        shards = [(up[g * room : (g + 1) * room], down[g * room : (g + 1) * room]) for g in range(placement.devices)]
        scores, places = nn.functional.linear(x, gate, bias).topk(TOP_K)
        results = torch.empty(len(x), TOP_K, HIDDEN)
        for rank, (mine_up, mine_down) in enumerate(shards):
            for token, choice in (places // room == rank).nonzero().tolist():
                place = int(places[token, choice]) % room
                rows = torch.relu(x[token][None] @ mine_up[place].T) @ mine_down[place].T
                results[token, choice] = rows[0]
                received[rank] += 1
        x = x + (results * torch.softmax(scores, -1)[..., None]).sum(1)
    assert torch.equal(x, expected)
    assert max(received) * placement.devices / sum(received) <= placement.found.worst_imbalance + 1e-9


@pytest.mark.slow
@torch.no_grad()
def test_transformers_models() -> None:
    """Mixtral as transformers has it: logits agree to rounding, as weights are normalised over all experts there."""
    mixtral = pytest.importorskip("transformers.models.mixtral")
    torch.manual_seed(0)
    config = mixtral.MixtralConfig(
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
    )
    model = mixtral.modeling_mixtral.MixtralForCausalLM(config).eval()
    ids = torch.arange(30)[None]
    before = model(ids).logits
    assert [layer.count for layer in expert_layers(model)] == [8, 8]
    shuffled = [tuple(random.Random(seed).sample(range(8), 8)) for seed in range(2)]
    placement = _placement(RoutingTrace(torch.randint(8, (50, 2, 1)).numpy(), 8), 2)
    apply_to_model(model, msgspec.structs.replace(placement, order=tuple(shuffled)))
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)


def test_what_is_not_known_is_refused_before_anything_moves() -> None:
    model = _model("stacked")
    placement = _placement(_trace(model, torch.randn(40, HIDDEN)))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ModelError, match="no rows for 8"):
        permuted(torch.zeros(3, 2), placement.order[0])
    with pytest.raises(ModelError, match="2 layers with experts, the placement 3"):
        apply_to_model(nn.Sequential(*list(model)[:2]), placement)
    last = model[2]
    assert isinstance(last, Layer)
    last.n_group = 4  # type: ignore[assignment]
    with pytest.raises(ModelError, match="groups of neighbouring experts"):
        apply_to_model(model, placement)
    del last.n_group
    last.experts.register_buffer("table", torch.zeros(3))
    with pytest.raises(ModelError, match="'table' has no row for each of 8"):
        apply_to_model(model, placement)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    del last.gate
    with pytest.raises(ModelError, match="no gate or router"):
        apply_to_model(model, placement)
