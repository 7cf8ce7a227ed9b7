"""What a split divides, what it joins and why, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from opweave.errors import InternalError, ModelError, OptionError, SplitRefused
from opweave.passes.split import Rule, split, token_axes
from opweave.passes.split.rule import Divided
from opweave.passes.split.state import Along, Division
from tests.passes.split.comparison import checked, difference, own_part
from tests.passes.split.programs import traced

_ATEN = torch.ops.aten


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _graph(function: Callable[..., object], *inputs: Tensor) -> GraphModule:
    def listed(*given: Tensor) -> tuple[object, ...]:
        result = function(*given)
        return result if isinstance(result, tuple) else (result,)

    return traced(listed, inputs)


def _agree(function: Callable[..., object], *inputs: Tensor, sizes: Sequence[int], axes: dict[str, int]) -> list[str]:
    """Operators of the joins, after comparing the split with the given module."""
    module = _graph(function, *inputs)
    result = split(module, axes, sizes)
    checked(module, result)
    assert difference(module, result, inputs) < 1e-12
    return [entry.target.removeprefix("aten.").partition(".")[0] for entry in result.joined]


@pytest.mark.parametrize(("shape", "along"), [((12,), Along(0)), ((2, 24), Along(1, 2)), ((36, 2), Along(0, 1, 3))])
def test_bounds_are_those_of_the_definition(shape: tuple[int, ...], along: Along) -> None:
    """Parts of a Division hold each element once, in the order that ``Along`` says."""
    division = Division((3, 9)) if along == Along(0) else Division((5, 7))
    state = division.along(shape, along.dim, along.blocks)
    assert state is not None
    value = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = [own_part(value, state, division, part) for part in range(2)]
    assert [tuple(part.shape) for part in parts] == [division.shape(shape, state, part) for part in range(2)]
    assert sorted(torch.cat([part.flatten() for part in parts]).tolist()) == list(range(value.numel()))


def test_parts_stand_side_by_side_and_are_named() -> None:
    module = _graph(lambda x, w: torch.tanh(x @ w), _drawn(6, 4), _drawn(4, 4))
    result = split(module, {"arg0_1": 0}, (2, 4))
    calls = [node for node in result.module.graph.nodes if node.op == "call_function"]
    assert [(node.meta["opweave_origin"], node.meta.get("opweave_part")) for node in calls] == [
        ("arg0_1", 0), ("arg0_1", 1), ("mm", 0), ("mm", 1), ("tanh", 0), ("tanh", 1), ("tanh", None)
    ]  # fmt: skip
    assert result.parts["mm"] == tuple(node.name for node in calls if node.meta["opweave_origin"] == "mm")
    assert result.joined == ()


def test_the_given_module_stays_as_it_is() -> None:
    module = _graph(lambda x: torch.tanh(x), _drawn(6))
    before = module.code, [dict(node.meta) for node in module.graph.nodes]
    split(module, {"arg0_1": 0}, (2, 4))
    assert (module.code, [dict(node.meta) for node in module.graph.nodes]) == before


def test_one_part_divides_nothing() -> None:
    module = _graph(lambda x, w: torch.tanh(x @ w), _drawn(6, 4), _drawn(4, 4))
    result = split(module, {"arg0_1": 0}, (6,))
    assert [node.target for node in result.module.graph.nodes] == [node.target for node in module.graph.nodes]


def test_gradients_of_weights_are_summed() -> None:
    """A joint graph: activations and their gradients in parts, gradients of weights and bias as sums, no joins."""

    def step(x: Tensor, w: Tensor, b: Tensor, dy: Tensor) -> list[Tensor]:
        leaves = [each.detach().requires_grad_() for each in (x, w, b)]
        y = torch.nn.functional.silu(torch.addmm(leaves[2], leaves[0], leaves[1]))
        return [y, *torch.autograd.grad(y, leaves, dy)]

    inputs = (_drawn(10, 4), _drawn(4, 6, seed=1), _drawn(6, seed=2), _drawn(10, 6, seed=3))
    module = make_fx(step, tracing_mode="fake")(*inputs)
    result = split(module, {"x_1": 0, "dy_1": 0}, (3, 7), strict=True)
    assert not result.joined
    assert difference(module, result, inputs) < 1e-12


def test_means_are_weighed_by_the_parts_lengths() -> None:
    joins = _agree(lambda x: (x.tanh().mean(), x.mean(0), x.mean(1)), _drawn(10, 4), sizes=(3, 7), axes={"arg0_1": 0})
    assert joins == []


def test_a_batch_of_sequences_is_merged_and_parted() -> None:
    """Tokens in the middle become blocks when they are merged, and tokens again when they are parted."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        flat = x.reshape(-1, 4) @ w
        return flat.view(3, 8, 2, 3).transpose(1, 2).tanh()

    inputs = _drawn(3, 8, 4), _drawn(4, 6, seed=1)
    assert _agree(function, *inputs, sizes=(3, 5), axes={"arg0_1": 1}) == []
    assert _agree(function, *inputs, sizes=(1, 2), axes={"arg0_1": 0}) == []


def test_tokens_of_several_sequences_are_cut_between_sequences() -> None:
    """Parts of whole sequences of 4 tokens: [T] may become [B, S]; parts that end within a sequence may not."""
    assert _agree(lambda x: x.view(3, 4, 2).sum(1), _drawn(12, 2), sizes=(4, 8), axes={"arg0_1": 0}) == []
    assert _agree(lambda x: x.view(3, 4, 2).sum(1), _drawn(12, 2), sizes=(6, 6), axes={"arg0_1": 0}) == ["view"]


def test_the_last_token_comes_from_the_last_part() -> None:
    """Logits of one token: no join, and the product runs once."""
    module = _graph(lambda x, w: x.tanh()[:, -1] @ w, _drawn(2, 9, 4), _drawn(4, 5))
    result = split(module, {"arg0_1": 1}, (4, 5), strict=True)
    assert not result.joined
    assert sum(node.target == _ATEN.mm.default for node in result.module.graph.nodes) == 1
    assert difference(module, result, (_drawn(2, 9, 4), _drawn(4, 5))) < 1e-12


def test_whole_values_are_sliced_where_they_meet_tokens() -> None:
    joins = _agree(lambda x, p: x + p + torch.arange(9).view(9, 1), _drawn(9, 3), _drawn(9, 1), sizes=(4, 5),
                   axes={"arg0_1": 0})  # fmt: skip
    assert joins == []


def test_constants_are_made_as_long_as_the_part() -> None:
    """What is the same all along the tokens is not made whole and sliced."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.full((9, 3), 0.5, dtype=torch.float64) + w.expand(9, 3) + w.view(1, 3).expand(9, 3)

    inputs = _drawn(9, 3), _drawn(3, seed=1)
    module = _graph(function, *inputs)
    result = split(module, {"arg0_1": 0}, (4, 5), strict=True)
    made = [node for node in result.module.graph.nodes if node.target in (_ATEN.full.default, _ATEN.expand.default)]
    assert [tuple(node.meta["val"].shape) for node in made] == [(4, 3), (5, 3)] * 3
    assert difference(module, result, inputs) == 0


def test_reasons_name_operator_and_value() -> None:
    module = _graph(lambda x: torch.softmax(x.tanh(), 0) * x, _drawn(6, 2))
    entry = split(module, {"arg0_1": 0}, (2, 4)).joined[0]
    assert (entry.node, entry.target, entry.value, entry.by) == ("_softmax", "aten._softmax.default", "tanh", "cat")
    assert entry.reason == "softmax over the tokens"
    with pytest.raises(SplitRefused, match="softmax over the tokens") as refusal:
        split(module, {"arg0_1": 0}, (2, 4), strict=True)
    assert (refusal.value.node, refusal.value.target) == ("_softmax", "aten._softmax.default")


def test_an_operator_without_rule_runs_once() -> None:
    joins = _agree(lambda x: torch.linalg.inv(x.tanh())[:, :2] + x[:, :2], _drawn(4, 4), sizes=(1, 3),
                   axes={"arg0_1": 0})  # fmt: skip
    assert joins[:1] == ["linalg_inv_ex"]


def test_random_operators_draw_what_they_drew() -> None:
    """They run once, on joined values, in their order."""
    x = _drawn(8, 3)
    module = _graph(lambda x: (torch.native_dropout(x.tanh(), 0.5, True)[0] + x, torch.bernoulli(x.sigmoid())), x)
    result = split(module, {"arg0_1": 0}, (3, 5))
    torch.manual_seed(3)
    before = module(x)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(before, result.module(x), strict=True))
    assert {entry.reason for entry in result.joined} == {"it draws random numbers"}


class TestWrites:
    """In-place writes: those into inputs, at the end, as AOTAutograd leaves them."""

    @staticmethod
    def _module(after: Callable[[Tensor], Tensor], axes: dict[str, int]) -> tuple[GraphModule, dict[str, int]]:
        def function(x: Tensor, buffer: Tensor) -> Tensor:
            y = x.tanh() + buffer
            view = buffer.view(-1)
            _ATEN.copy_.default(buffer, y * 2)
            return after(view if axes.get("view") else y)

        return _graph(function, _drawn(6, 2), _drawn(6, 2, seed=1)), {"arg0_1": 0, **axes}

    @pytest.mark.parametrize("axes", [{}, {"arg1_1": 0}])
    def test_a_buffer_gets_its_new_content(self, axes: dict[str, int]) -> None:
        module, cut = self._module(lambda y: y, axes)
        result = split(module, cut, (2, 4), strict=True)
        x, one, other = _drawn(6, 2), _drawn(6, 2, seed=1), _drawn(6, 2, seed=1)
        assert torch.equal(module(x, one)[0], result.module(x, other)[0])
        assert torch.equal(one, other)
        assert not torch.equal(one, _drawn(6, 2, seed=1))

    def test_reading_after_the_write_is_refused(self) -> None:
        module, _ = self._module(lambda view: view + 1, {"view": 1})
        with pytest.raises(SplitRefused, match="after the write"):
            split(module, {"arg0_1": 0}, (2, 4))

    def test_other_writes_are_refused(self) -> None:
        module = _graph(lambda x: x.tanh().add_(1), _drawn(6))
        with pytest.raises(SplitRefused, match="writes in place"):
            split(module, {"arg0_1": 0}, (2, 4))


@pytest.mark.parametrize(
    ("axes", "sizes", "message"),
    [
        ({"arg0_1": 0}, (2, 5), "sum of"),
        ({"arg0_1": 0}, (), "sizes"),
        ({"arg0_1": 0}, (6, 0), "sizes"),
        ({"arg0_1": 0}, (7, -1), "sizes"),
        ({"arg0_1": 2}, (2, 4), "no dimension 2"),
        ({"other": 0}, (2, 4), "'other'"),
    ],
)
def test_mistakes_are_named(axes: dict[str, int], sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        split(_graph(lambda x: x.tanh(), _drawn(6, 2)), axes, sizes)


def test_symbolic_sizes_are_refused() -> None:
    module = make_fx(lambda x: x.tanh(), tracing_mode="symbolic")(_drawn(6, 2))
    with pytest.raises(SplitRefused, match="size is not known"):
        split(module, {}, (2, 4))


def test_graphs_without_metadata_are_refused() -> None:
    with pytest.raises(ModelError, match="no value in its metadata"):
        split(torch.fx.symbolic_trace(torch.nn.Tanh()), {}, (2, 4))


def test_axes_are_guessed_by_extent() -> None:
    """Batch first, then sequence, wherever the other inputs have it."""
    ids, positions, mask, hidden = torch.zeros(3, 8).long(), torch.arange(8), _drawn(1, 1, 8, 8), _drawn(3, 8, 4)
    module = _graph(lambda i, p, m, h: h + i.unsqueeze(-1) + p.view(8, 1) + m.sum(), ids, positions, mask, hidden)
    names = ["arg0_1", "arg1_1", "arg2_1", "arg3_1"]
    assert token_axes(module, names) == (
        {"arg0_1": 0, "arg3_1": 0},
        {"arg0_1": 1, "arg1_1": 0, "arg2_1": 2, "arg3_1": 1},
    )
    for axes in token_axes(module, names):
        result = split(module, axes, (1, 2) if axes["arg0_1"] == 0 else (3, 5))
        assert difference(module, result, (ids, positions, mask, hidden)) < 1e-12


def test_a_state_that_shapes_refute_is_an_error() -> None:
    wrong = Rule(lambda call: Divided(Along(1)))
    with pytest.raises(InternalError, match=r"aten\.tanh"):
        split(_graph(lambda x: x.tanh(), _drawn(6, 6)), {"arg0_1": 0}, (2, 4), rules={"aten::tanh": wrong})


def test_the_documented_rule_works() -> None:
    """The scan of docs/adding-a-split-rule.md, as a reader would type it, in place of the rule there is."""
    text = (Path(__file__).parents[3] / "docs" / "adding-a-split-rule.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    scope: dict[str, dict[str, Rule]] = {}
    exec(code, scope)
    module = _graph(lambda x: (x.cumsum(0), x.cumsum(1)), _drawn(9, 3))
    result = split(module, {"arg0_1": 0}, (2, 4, 3), rules=scope["RULES"], strict=True)
    assert not result.joined
    assert difference(module, result, (_drawn(9, 3),)) < 1e-12
