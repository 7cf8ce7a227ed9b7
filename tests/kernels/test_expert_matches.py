"""That mixtures of experts, as models spell them, are found part by part and compute the same, and what is not found.

Grouped products are of bfloat16 throughout: ``torch._grouped_mm`` cannot be traced in any other dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.kernels._kernel import Kernel
from opweave.kernels.expert_routing import KERNEL as ROUTING
from opweave.kernels.grouped_gated_linear import KERNEL as GATED
from opweave.kernels.grouped_linear_scatter import KERNEL as SCATTER
from tests.kernels.matching import check_fusion, check_matches, exported

TOKENS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 4, 2, 16, 32
TIGHT: Mapping[str, Any]
NARROW: Mapping[str, Any]
TIGHT, NARROW = MappingProxyType({"rtol": 1e-4, "atol": 1e-5}), MappingProxyType({"rtol": 3e-2, "atol": 3e-2})
both_spellings = pytest.mark.parametrize("decomposed", [False, True])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def drawn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def matches(kernel: Kernel, function: Callable[..., Any], *inputs: torch.Tensor) -> int:
    """How many matches there are, however it is spelled."""
    counts = {len(check_matches(kernel, exported(function, inputs, decomposed=d).graph)) for d in (False, True)}
    assert len(counts) == 1
    return counts.pop()


# Routing


def routed(logits: Any, *, normalize: bool = True) -> Any:
    return ROUTING.eager(logits, TOP_K, normalize)


def chosen_first(logits: Any) -> Any:
    """Mixtral's own spelling: softmax of the chosen logits."""
    values, indices = logits.topk(TOP_K, -1)
    return functional.softmax(values, -1, dtype=torch.float32), indices


@both_spellings
@both_dtypes
@pytest.mark.parametrize("normalize", [True, False])
def test_finds_the_routing_of_models(dtype: torch.dtype, decomposed: bool, normalize: bool) -> None:
    graph = check_fusion(
        ROUTING, lambda x: routed(x, normalize=normalize), [drawn(dtype, TOKENS, EXPERTS)], decomposed=decomposed,
        **TIGHT,
    )  # fmt: skip
    assert len(graph.ops) == 1  # the sort and the counts, too


@both_spellings
@both_dtypes
def test_finds_softmax_of_the_chosen(dtype: torch.dtype, decomposed: bool) -> None:
    logits = drawn(dtype, 2, TOKENS, EXPERTS)
    graph = check_fusion(ROUTING, chosen_first, [logits], decomposed=decomposed, **TIGHT)
    assert len(graph.ops) == 1


def test_what_others_read_of_a_routing_stays() -> None:
    def all_shares(logits: Any) -> Any:
        shares = functional.softmax(logits, -1)
        values, indices = shares.topk(TOP_K, -1)
        return shares.mean(0), values / values.sum(-1, keepdim=True), values, indices

    graph = check_fusion(ROUTING, all_shares, [drawn(torch.float32, TOKENS, EXPERTS)], **TIGHT)
    assert [op.target for op in graph.ops if "softmax" in op.target] == ["aten.softmax.int"]


def _topk(x: Any, *arguments: Any, **named: Any) -> Any:
    return functional.softmax(x, -1, dtype=torch.float32).topk(*arguments, **named)


NO_ROUTING: Mapping[str, tuple[Callable[..., Any], tuple[int, ...]]] = MappingProxyType(
    {
        "the smallest": (lambda x: _topk(x, 2, largest=False), (8, 4)),
        "over tokens": (lambda x: _topk(x, 2, 0), (8, 4)),
        "softmax over tokens": (lambda x: functional.softmax(x, 0).topk(2), (8, 4)),
        "sigmoid": (lambda x: torch.sigmoid(x).topk(2), (8, 4)),
        "no softmax": (lambda x: x.topk(2), (8, 4)),
        "many choices": (lambda x: _topk(x, 17), (8, 20)),
        "many experts": (lambda x: _topk(x, 2), (8, 513)),
        "softmax in a narrow dtype": (lambda x: functional.softmax(x.bfloat16(), -1).topk(2), (8, 4)),
        "columns first": (lambda x: _topk(x.t(), 2), (4, 8)),
    }
)


@pytest.mark.parametrize("case", NO_ROUTING)
def test_does_not_match_what_routing_cannot_compute(case: str) -> None:
    function, shape = NO_ROUTING[case]
    logits = drawn(torch.float32, *shape)
    assert check_matches(ROUTING, exported(function, [logits], decomposed=False).graph) == ()


@pytest.mark.parametrize("total", [lambda v: v.sum(0, keepdim=True), lambda v: v.sum(-1, keepdim=True) + 1e-9])
def test_other_divisions_stay(total: Callable[[Any], Any]) -> None:
    def function(logits: Any) -> Any:
        values, indices = _topk(logits, 2)
        return values / total(values), indices

    graph = check_fusion(ROUTING, function, [drawn(torch.float32, TOKENS, EXPERTS)], **TIGHT)
    assert "aten.div.Tensor" in {op.target for op in graph.ops}


@pytest.mark.parametrize(
    "ends",
    [
        lambda e: torch.histc(e.float(), EXPERTS + 1, 0, EXPERTS).cumsum(0, dtype=torch.int32),
        lambda e: torch.histc(e.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0),
        lambda e: torch.histc(e.float() + 1, EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32),
    ],
)
def test_other_counts_stay(ends: Callable[[Any], Any]) -> None:
    def function(logits: Any) -> Any:
        weights, indices = _topk(logits, 2)
        experts, order = indices.flatten().sort()
        return weights, order, ends(experts)

    graph = check_fusion(ROUTING, function, [drawn(torch.float32, TOKENS, EXPERTS)], **TIGHT)
    assert "aten.histc.default" in {op.target for op in graph.ops}


@pytest.mark.parametrize("sort", [lambda i: i.flatten().sort(descending=True), lambda i: i.t().flatten().sort()])
def test_other_sorts_stay(sort: Callable[[Any], Any]) -> None:
    def function(logits: Any) -> Any:
        weights, indices = _topk(logits, 2)
        return weights, indices, sort(indices)

    graph = check_fusion(ROUTING, function, [drawn(torch.float32, TOKENS, EXPERTS)], **TIGHT)
    assert any("sort" in op.target for op in graph.ops)


# The first half


def sorted_rows(indices: Any) -> tuple[Any, Any]:
    experts, order = indices.flatten().sort(stable=True)
    return order, torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)


def gated(x: Any, gate: Any, up: Any, indices: Any, *, activation: Callable[..., Any] = functional.silu) -> Any:
    order, ends = sorted_rows(indices)
    rows = x[order // TOP_K]
    return activation(torch._grouped_mm(rows, gate, offs=ends)) * torch._grouped_mm(rows, up, offs=ends)


def packed(x: Any, both: Any, indices: Any) -> Any:
    order, ends = sorted_rows(indices)
    gate, up = torch._grouped_mm(x[order // TOP_K], both.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    return up * functional.silu(gate)


def operands(dtype: torch.dtype) -> list[torch.Tensor]:
    indices = drawn(torch.float32, TOKENS, EXPERTS).topk(TOP_K, -1).indices
    weights = (drawn(dtype, EXPERTS, HIDDEN, INTERMEDIATE) / 4, drawn(dtype, EXPERTS, HIDDEN, INTERMEDIATE).flip(0) / 4)
    return [drawn(dtype, TOKENS, HIDDEN), *weights, indices]


@both_spellings
@pytest.mark.parametrize(
    "activation", [functional.silu, functional.gelu, lambda v: functional.gelu(v, approximate="tanh"), torch.relu]
)
def test_finds_gated_products(activation: Callable[..., Any], decomposed: bool) -> None:
    def function(*inputs: Any) -> Any:
        return gated(*inputs, activation=activation)

    graph = check_fusion(GATED, function, operands(torch.bfloat16), decomposed=decomposed, **NARROW)
    assert "aten._grouped_mm.default" not in {op.target for op in graph.ops}


@both_spellings
def test_finds_halves_of_one_product(decomposed: bool) -> None:
    x, gate, up, indices = operands(torch.bfloat16)
    both = torch.cat([gate, up], 2).transpose(1, 2).contiguous()
    graph = check_fusion(GATED, packed, [x, both, indices], decomposed=decomposed, **NARROW)
    assert "aten._grouped_mm.default" not in {op.target for op in graph.ops}


def _products(change: str, x: Any, gate: Any, up: Any, indices: Any) -> Any:
    """`gated` with one thing changed."""
    order, ends = sorted_rows(indices)
    tokens = order % (TOKENS * TOP_K) // TOP_K if change == "an order that is not a sort's" else order // TOP_K
    tokens = order // 4 if change == "another top_k" else tokens
    rows = x.t().contiguous().t()[tokens] if change == "columns first" else x[tokens]
    other = x[order // TOP_K] if change == "other rows" else rows
    ends_of_up = ends.clone() if change == "other ends" else ends
    opened = torch._grouped_mm(rows, gate, offs=ends)
    if change == "a bias in place":
        opened = opened.add_(1)
    if change == "a step":
        opened, up = opened[:, ::2].contiguous(), up[..., : INTERMEDIATE // 2].contiguous()
    closed = torch._grouped_mm(other * 2 if change == "other rows" else other, up, offs=ends_of_up)
    opened = functional.hardswish(opened) if change == "another activation" else functional.silu(opened)
    return opened + closed if change == "a sum" else opened * closed


CHANGES = (
    "an order that is not a sort's", "another top_k", "columns first", "other rows", "other ends", "a bias in place",
    "a step", "another activation", "a sum",
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_does_not_match_other_products(change: str) -> None:
    given = operands(torch.bfloat16)
    assert matches(GATED, lambda *inputs: _products(change, *inputs), *given) == 0
    assert matches(GATED, lambda *inputs: _products("", *inputs), *given) == 1


def test_a_bias_in_place_of_halves_is_seen() -> None:
    """What the halves view was written twice."""

    def function(x: Any, both: Any, indices: Any) -> Any:
        order, ends = sorted_rows(indices)
        gate, up = torch._grouped_mm(x[order // TOP_K], both, offs=ends).add_(1).chunk(2, dim=-1)
        return functional.silu(gate) * up

    x, gate, up, indices = operands(torch.bfloat16)
    assert matches(GATED, function, x, torch.cat([gate, up], 2), indices) == 0


# The second half


def by_assignment(order: Any) -> Any:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return inverse


def summed(hidden: Any, down: Any, weights: Any, indices: Any, *, change: str = "") -> Any:
    order, ends = sorted_rows(indices)
    rows = torch._grouped_mm(hidden, down, offs=ends)
    other = (indices + 1).flatten().sort().indices
    shares = weights.flatten()[other if change == "shares in another order" else order]
    rows = rows * (shares + 1 if change == "other shares" else shares)[:, None]
    if change == "no inverse":
        rows = rows[order]
    elif change == "argsort":
        rows = rows[order.argsort()]
    elif change == "falling argsort":
        rows = rows[order.argsort(descending=True)]
    else:
        rows = rows[by_assignment(other if change == "another order" else order)]
    if change == "choices first":
        return rows.view(TOP_K, TOKENS, -1).sum(0)
    return rows.view(TOKENS, TOP_K, -1).sum(2 if change == "over columns" else 1)


def shares(dtype: torch.dtype, shares_dtype: torch.dtype) -> list[torch.Tensor]:
    *_, indices = operands(dtype)
    rows, down = drawn(dtype, TOKENS * TOP_K, INTERMEDIATE), drawn(dtype, EXPERTS, INTERMEDIATE, HIDDEN) / 4
    return [rows, down, drawn(torch.float32, TOKENS, TOP_K).softmax(-1).to(shares_dtype), indices]


@both_spellings
@pytest.mark.parametrize("change", ["", "argsort"])
def test_finds_weighted_sums(decomposed: bool, change: str) -> None:
    def function(*inputs: Any) -> Any:
        return summed(*inputs, change=change)

    check_fusion(SCATTER, function, shares(torch.bfloat16, torch.bfloat16), decomposed=decomposed, **NARROW)


@both_spellings
def test_finds_sums_weighted_in_float32(decomposed: bool) -> None:
    def function(*inputs: Any) -> Any:
        return summed(*inputs).to(torch.bfloat16)

    given = shares(torch.bfloat16, torch.float32)
    graph = check_fusion(SCATTER, function, given, decomposed=decomposed, **NARROW)
    assert "aten._grouped_mm.default" not in {op.target for op in graph.ops}
    assert matches(SCATTER, summed, *given) == 0  # without the cast, the sum is wider than the rows


@pytest.mark.parametrize(
    "change",
    ["shares in another order", "other shares", "no inverse", "falling argsort", "another order", "choices first",
     "over columns"],
)  # fmt: skip
def test_does_not_match_other_sums(change: str) -> None:
    given = shares(torch.bfloat16, torch.bfloat16)
    assert matches(SCATTER, lambda *inputs: summed(*inputs, change=change), *given) == 0
    assert matches(SCATTER, summed, *given) == 1


# A model's layer


@both_spellings
@pytest.mark.parametrize("normalize", [True, False])
def test_finds_every_part_of_qwen_s_layer(normalize: bool, decomposed: bool) -> None:
    pytest.importorskip("transformers")
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        norm_topk_prob=normalize,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    layer = Qwen3MoeSparseMoeBlock(config).bfloat16().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    inputs = [drawn(torch.bfloat16, 2, TOKENS, HIDDEN)]
    for kernel in (ROUTING, GATED, SCATTER):
        check_fusion(kernel, layer, inputs, decomposed=decomposed, **NARROW)
