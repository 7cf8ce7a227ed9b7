"""Weights: one buffer for one piece of memory, values laid out as their tensors say, inputs of any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from opweave.compiler.frontend.fx import from_exported, from_module
from opweave.compiler.graph import Role
from opweave.errors import ModelError
from tests.compiler.frontend.eager_check import Lambda, check, interpret


class Tied(nn.Module):
    """A language model's ends: embedding and projection share their weight, and a buffer views part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.projection = nn.Linear(4, 7, bias=False)
        self.projection.weight = self.embedding.weight
        self.register_buffer("part", self.embedding.weight.detach()[2:4], persistent=False)

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.projection(self.embedding(tokens)) + self.get_buffer("part").sum()


def test_tied_weights_and_views_of_them_are_one_buffer() -> None:
    graph = check(Tied(), torch.tensor([1, 2]))
    weights = [t for t in graph.tensors if t.role is Role.WEIGHT]
    assert len({t.buffer for t in weights}) == 1
    assert [(t.name, t.shape, t.offset_bytes) for t in weights if t.name != t.buffer] == [("b_part", (2, 4), 32)]


def test_overlapping_weights_that_none_spans_get_a_copy_each() -> None:
    whole = torch.randn(4, 6)
    sources = {"a": nn.Parameter(whole[:, :4]), "b": nn.Parameter(whole[:, 2:])}
    graph = check(lambda m, x: x @ m.a + x @ m.b, torch.randn(2, 4), sources=sources)
    assert {t.name: t.nbytes for t in graph.buffers.values() if t.role is Role.WEIGHT} == {"p_a": 64, "p_b": 64}


def test_writing_a_weight_that_was_copied_apart_is_refused() -> None:
    whole = torch.randn(4, 6)
    model = Lambda(lambda m, x: m.a.add_(x) + m.b.sum(), a=whole[:, :4], b=whole[:, 2:])
    with pytest.raises(ModelError, match=r"writes 'b_a' in place, which shares memory with b_b"):
        from_module(model, (torch.ones(()),))


def test_neighbours_in_one_storage_stay_apart() -> None:
    """As recurrent layers keep their weights: one allocation, disjoint ranges; either may be written."""
    whole = torch.randn(8)
    graph = check(lambda m, x: m.a.add_(x) + m.b, torch.ones(4), sources={"a": whole[:4], "b": whole[4:]})
    assert {"b_a", "b_b"} <= set(graph.buffers)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(4, 3).t(),
        torch.randn(1, 4).expand(3, 4),
        torch.randn(3, 8)[:, ::2],
        torch.randn(12)[4:8].expand(3, 4),
        torch.randn(0, 3, 4),
    ],
    ids=["transposed", "expanded", "with gaps", "part of a larger one", "empty"],
)
def test_weights_of_any_layout(weight: torch.Tensor) -> None:
    check(lambda m, x: (x + m.w).view(-1, 4), torch.randn(3, 4), sources={"w": nn.Parameter(weight)})
    model = Lambda(lambda m, x: x + m.w, w=nn.Parameter(weight))
    imported = from_module(model, (torch.randn(3, 4),))
    (tensor,) = (t for t in imported.graph.buffers.values() if t.role is Role.WEIGHT)
    assert imported.weights[tensor.name].stride() == tensor.element_strides


@pytest.mark.parametrize("example", [torch.randn(4, 6)[:, ::2], torch.randn(3, 4).t(), torch.randn(1, 3).expand(4, 3)])
def test_inputs_of_any_layout(example: torch.Tensor) -> None:
    check(lambda m, x: (x + 1, x.reshape(-1)), example)


def test_a_view_of_an_input_with_gaps_becomes_a_copy() -> None:
    """A view that the exported input's gaps allow and the stored one's order does not."""
    x = torch.randn(2, 2, 8)[..., ::2].transpose(0, 2)
    program = torch.export.export(Lambda(lambda m, x: x.transpose(0, 2).view(4, 4) * 2), (x,))
    imported = from_exported(program)
    assert [op.target for op in imported.graph.ops] == ["aten.reshape.default", "aten.mul.Tensor"]
    assert torch.equal(interpret(imported, (x,))[0], x.transpose(0, 2).reshape(4, 4) * 2)


def test_constants_and_unsaved_buffers() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("unsaved", torch.ones(4), persistent=False)
            self.attribute = torch.arange(4.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.get_buffer("unsaved") * torch.tensor([1.0, 2.0, 3.0, 4.0]) + self.attribute

    graph = check(Constant(), torch.randn(4))
    roles = sorted(t.role for t in graph.buffers.values() if t.role.is_source)
    assert roles == [Role.CONSTANT, Role.CONSTANT, Role.INPUT, Role.WEIGHT]


def test_weights_without_values_can_be_planned() -> None:
    """A model on the meta device has shapes only, and imports in no memory."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 20, 1 << 18), nn.ReLU())
        imported = from_module(model, (torch.zeros(2, 1 << 20),))
    assert sum(t.nbytes for t in imported.graph.buffers.values() if t.role is Role.WEIGHT) == (1 << 40) + (1 << 20)


def test_weights_are_referred_to_not_copied() -> None:
    model = nn.Linear(3, 4)
    imported = from_module(model, (torch.randn(2, 3),))
    assert imported.weights["p_weight"].data_ptr() == model.weight.data_ptr()
