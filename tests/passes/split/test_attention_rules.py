"""Attention in parts equals attention at once: results and gradients, for each operator, along each axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from opweave.passes.split.rule import Divided, Part, Rule
from opweave.passes.split.rules import attention, attention_backward
from opweave.passes.split.split import Split, split
from tests.passes.split.kernels import REPLACED, attend, backwards, forwards, graph_of, trained
from tests.passes.split.traced import difference

aten = torch.ops.aten

KINDS = ("cpu", "flash", "efficient", "cudnn")
EXACT = 1e-10


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attended(kind: str, *, causal: bool, training: bool, shape: Sequence[int], mask: Tensor | None = None) -> Any:
    """A graph of one attention, and inputs; ``shape`` is batch, heads, groups, sequence."""
    batch, heads, groups, length = shape
    inputs = [numbers(batch, count, length, 4, seed=count) for count in (heads, groups, groups)]
    inputs[2] = numbers(batch, groups, length, 4, seed=99)
    inputs += [mask] if mask is not None else []
    inputs += [numbers(batch, heads, length, 4, seed=5)] if training else []
    function = (trained if training else forwards)(kind, causal)
    return graph_of(lambda *given: function(*given), *inputs), inputs


def parts(
    graph: fx.GraphModule,
    inputs: Sequence[Tensor],
    dim: int,
    sizes: Sequence[int],
    rules: Mapping[str, Rule] | None = None,
) -> Split:
    """The split of everything with four dimensions along ``dim``."""
    names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
    axes = {name: dim for name, value in zip(names, inputs, strict=True) if value.dim() == 4}
    return split(graph, axes, sizes, rules=rules)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_causal_sequence_is_cut_without_a_join(kind: str, training: bool) -> None:
    """Each operator, in four unequal parts; the first is a single token."""
    graph, inputs = attended(kind, causal=True, training=training, shape=(2, 2, 2, 32))
    made = parts(graph, inputs, 2, (1, 20, 4, 7))
    assert not made.joined
    assert difference(graph, made.module, [inputs], REPLACED) < EXACT


@pytest.mark.parametrize(
    ("kind", "masked"),
    [(kind, masked) for kind in KINDS for masked in (False, True) if (kind, masked) != ("flash", True)],
)
def test_queries_with_all_keys_join_keys_and_values_alone(kind: str, masked: bool) -> None:
    """Without a causal mask, parts of the queries read all keys; rows of an explicit mask go with the queries."""
    mask = numbers(32, 32, seed=7) if masked else None
    graph, inputs = attended(kind, causal=False, training=True, shape=(2, 2, 2, 32), mask=mask)
    made = parts(graph, inputs, 2, (5, 27))
    assert {entry.value for entry in made.joined} == {"arg1_1", "arg2_1"}
    assert difference(graph, made.module, [inputs], REPLACED) < EXACT


@pytest.mark.parametrize("dim", [0, 1], ids=["batch", "heads"])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_and_heads_are_cut_plainly(kind: str, dim: int) -> None:
    """One attention each, no join, bit for bit."""
    graph, inputs = attended(kind, causal=True, training=True, shape=(4, 4, 4, 8))
    made = parts(graph, inputs, dim, (1, 3))
    calls = [node for node in made.module.graph.nodes if "attention" in str(node.target)]
    assert len(calls) == 4
    assert not made.joined
    assert difference(graph, made.module, [inputs], REPLACED) == 0


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_random_shapes_of_grouped_queries(data: st.DataObject) -> None:
    """Groups, odd lengths, two to four parts: outputs and gradients as those of the whole."""
    groups = data.draw(st.integers(1, 2))
    shape = (data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 3)), groups)
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=4))
    graph, inputs = attended("cpu", causal=True, training=True, shape=(*shape, sum(sizes)))
    made = parts(graph, inputs, 2, sizes)
    assert not made.joined
    assert difference(graph, made.module, [inputs]) < EXACT


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_attention_of_no_kernel_yet(dim: int, causal: bool) -> None:
    """``scaled_dot_product_attention`` itself, as in graphs before autograd: an explicit mask for later parts."""
    inputs = [numbers(4, heads, 4, 4, seed=seed) for seed, heads in enumerate((4, 4, 4))]
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("query", "key", "value")]
    operator = aten.scaled_dot_product_attention.default
    graph.output((graph.call_function(operator, tuple(nodes), {"is_causal": causal}),))
    module = fx.GraphModule({}, graph)
    FakeTensorProp(module).propagate(*inputs)
    made = split(module, dict.fromkeys(("query", "key", "value"), dim), (1, 3))
    assert bool(made.joined) == (dim == 2 and not causal)
    assert difference(module, made.module, [inputs]) < EXACT


@pytest.mark.parametrize(
    ("kind", "arguments", "reason"),
    [
        ("cpu", {"dropout_p": 0.5}, "dropout"),
        ("flash", {"return_debug_mask": True}, "probabilities"),
        ("efficient", {"compute_log_sumexp": True}, "multiple of 32"),
    ],
)
def test_what_cannot_be_cut_is_joined(kind: str, arguments: dict[str, Any], reason: str) -> None:
    """Random numbers, probabilities, and padded logarithms that do not join."""
    name = {"cpu": "flash_attention_for_cpu", "flash": "flash_attention", "efficient": "efficient_attention"}[kind]
    operator = getattr(aten, f"_scaled_dot_product_{name}")
    given = {"attn_bias": None, **arguments} if kind == "efficient" else arguments

    def run(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return operator(query, key, value, is_causal=True, **given)[:1]

    inputs = [numbers(1, 1, 6, 4, seed=seed) for seed in range(3)]
    made = parts(graph_of(run, *inputs), inputs, 2, (2, 4))
    assert len(made.joined) == 3
    assert all(reason in entry.reason for entry in made.joined)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_half_alone(kind: str) -> None:
    """Results and logarithms are inputs, whose slices have gaps in memory; kernels that would read on get copies."""
    gradient, query, key, value = (numbers(2, 2, 32, 4, seed=seed) for seed in range(4))
    out, logarithms = attend(query, key, value, causal=True)
    given = [gradient, query, key, value, out, logarithms[..., None] if kind == "cudnn" else logarithms]
    function = backwards(kind)
    graph = graph_of(lambda *values: function(*values), *given)
    axes = {node.name: 2 for node in graph.graph.find_nodes(op="placeholder")}
    made = split(graph, axes, (5, 27))
    assert not made.joined
    assert difference(graph, made.module, [given], REPLACED) < EXACT


def test_a_mask_and_causal_besides_is_joined() -> None:
    """No rule for the corner where both masks meet."""
    inputs = [*(numbers(1, 1, 6, 4, seed=seed) for seed in range(3)), numbers(6, 6)]
    function = forwards("cpu", True)
    graph = graph_of(lambda *given: function(*given), *inputs)
    assert all("besides" in entry.reason for entry in parts(graph, inputs, 2, (2, 4)).joined)


def test_tokens_that_do_not_lie_together_are_joined() -> None:
    """Two blocks of tokens, as two ranks gather them: an earlier part is not a prefix."""

    def run(x: Tensor) -> Any:
        query = x.view(1, 1, 8, 4)
        return forwards("cpu", True)(query, query, query)[:1]

    x = numbers(2, 4, 4)
    graph = graph_of(run, x)
    made = split(graph, {"x_1": 1}, (1, 3))
    assert any("lie together" in entry.reason for entry in made.joined)
    assert difference(graph, made.module, [[x]]) < EXACT


def wrong(rule: Rule, change: Callable[[Part], Part]) -> Rule:
    """The rule, with what its ``emit`` is given changed."""

    def divide(call: Any) -> Any:
        outcome = rule.divide(call)
        assert isinstance(outcome, Divided)
        emit = outcome.emit
        assert emit is not None
        return replace(outcome, emit=lambda part: emit(change(part)))

    return replace(rule, divide=divide)


def one_key_short(part: Part) -> Part:
    """Earlier parts' keys without their last row, values too: an off-by-one in the offset of the causal mask."""

    def shortened(held: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        if len(held) < 2 or part.index == 0:
            return held
        rows = held[0].meta["val"].shape[2]
        return (part.make(aten.slice.Tensor, held[0], 2, 0, rows - 1), *held[1:])

    query, *rest = part.nodes
    return replace(part, nodes=(query, *map(shortened, rest)))


def nothing_carried(part: Part) -> Part:
    """Gradients of keys without what later parts add to them."""
    return replace(part, earlier=())


def test_an_offset_that_is_off_by_one_is_caught() -> None:
    """The comparison that the other tests make is not met by a wrong rule."""
    graph, inputs = attended("cpu", causal=True, training=False, shape=(2, 2, 1, 9))
    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    rules = {name: wrong(attention.RULES[name], one_key_short)}
    assert difference(graph, parts(graph, inputs, 2, (3, 6), rules).module, [inputs]) > 1e-3


def test_a_dropped_summand_of_gradients_is_caught() -> None:
    """Likewise for the gradients of keys that later queries attend to."""
    graph, inputs = attended("cpu", causal=True, training=True, shape=(2, 2, 1, 9))
    name = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
    rules = {name: wrong(attention_backward.RULES[name], nothing_carried)}
    assert difference(graph, parts(graph, inputs, 2, (3, 6), rules).module, [inputs]) > 1e-3
