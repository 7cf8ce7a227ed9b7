"""Which operators ``kernels/add_rms_norm.py`` offers to replace, and which it must leave alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.compiler.fusion import Match
from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.kernels.add_rms_norm import KERNEL, cost
from tests.kernels.conforming import FLOAT_TOLERANCE
from tests.kernels.matching import check_fusion, check_matches, exported


class Block(nn.Module):
    """A residual block's end with PyTorch's own normalisation."""

    def __init__(self, dtype: torch.dtype, epsilon: float | None = 1e-6) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16, eps=epsilon, dtype=dtype)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum, which the next block needs, and its normalisation."""
        hidden = x + residual
        return hidden, self.norm(hidden)


class LlamaBlock(Block):
    """As Llama writes it: float32 inside, rounded before the weight."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Block`."""
        hidden = residual + x
        wide = hidden.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return hidden, self.norm.weight * wide.to(hidden.dtype)


class LossyBlock(Block):
    """A normalised value that is rounded to a dtype narrower than the sum's."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Block`."""
        hidden = x + residual
        normalized = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
        return hidden, normalized.to(torch.bfloat16) * self.norm.weight


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rms_norm", "default epsilon", "llama"])
def test_what_is_matched_is_what_the_kernel_computes(kind: str, dtype: torch.dtype, decomposed: bool) -> None:
    """The whole block is replaced, and the reference twin gives what its operators give."""
    module = LlamaBlock(dtype) if kind == "llama" else Block(dtype, None if kind == "default epsilon" else 1e-6)
    inputs = [torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2)]
    rtol, atol = FLOAT_TOLERANCE[dtype]
    graph = check_fusion(KERNEL, module, inputs, rtol=2 * rtol, atol=4 * atol, decomposed=decomposed)
    (launch,) = graph.ops
    assert launch.flops == cost(str(dtype).removeprefix("torch."), 15, 16).flops


def test_leaves_a_lossy_cast_alone() -> None:
    inputs = [torch.zeros(3, 16) for _ in range(2)]
    assert not found_in(exported(LossyBlock(torch.float32), inputs, decomposed=False).graph)


Line = tuple[str, tuple[str, ...], tuple[int, ...]]

#: The decomposition on its own: result -> body, operands, shape. Each refusal below changes one thing about it.
LINES: Mapping[str, Line] = MappingProxyType(
    {
        "hidden": ("aten.add.Tensor(%0, %1)", ("x", "residual"), (4, 16)),
        "square": ("aten.pow.Tensor_Scalar(%0, 2)", ("hidden",), (4, 16)),
        "mean": ("aten.mean.dim(%0, [-1], True)", ("square",), (4, 1)),
        "shifted": ("aten.add.Scalar(%0, 1e-06)", ("mean",), (4, 1)),
        "root": ("aten.rsqrt.default(%0)", ("shifted",), (4, 1)),
        "scaled": ("aten.mul.Tensor(%0, %1)", ("hidden", "root"), (4, 16)),
        "y": ("aten.mul.Tensor(%0, %1)", ("scaled", "weight"), (4, 16)),
    }
)
WHOLE: Mapping[str, Line] = MappingProxyType(
    {
        "hidden": LINES["hidden"],
        "y": ("aten.rms_norm.default(%0, [16], %1, 1e-06)", ("hidden", "weight"), (4, 16)),
    }
)


def graph_of(
    lines: Mapping[str, Line], *, outputs: Iterable[str] = ("hidden", "y"), updates: Mapping[str, str] | None = None
) -> Graph:
    """The program ``lines``; before the line ``updates[source]``, ``source`` is written in place."""
    tensors = [Tensor(name, (4, 16), "float32", Role.INPUT) for name in ("x", "residual")]
    tensors += [Tensor("weight", (16,), "float32", Role.OPTIMIZER_STATE), Tensor("row", (16,), "float32", Role.INPUT)]
    ops = []
    for name, (body, inputs, shape) in lines.items():
        for source, before in (updates or {}).items():
            if before == name:
                of = next(tensor for tensor in tensors if tensor.name == source)
                tensors.append(Tensor(f"{source}_1", of.shape, of.dtype, of.role, source))
                ops.append(Op(f"update_{source}", (source,), (f"{source}_1",), body="aten.neg.default(%0)"))
        tensors.append(Tensor(name, shape, "float32"))
        ops.append(Op(f"op_{name}", inputs, (name,), body=body))
    return Graph("rms", tuple(tensors), tuple(ops), tuple(outputs))


def found_in(graph: Graph) -> tuple[Match, ...]:
    """One of each pair that differs by the order of its summands only."""
    return tuple({(match.ops, match.outputs): match for match in reversed(check_matches(KERNEL, graph))}.values())[::-1]


@pytest.mark.parametrize("lines", [LINES, WHOLE], ids=["decomposed", "whole"])
def test_matches_the_plain_program(lines: Mapping[str, Line]) -> None:
    (found,) = found_in(graph_of(lines))
    assert found.ops == tuple(f"op_{name}" for name in lines)
    assert found.before == "op_hidden"
    names = {key: value.name if isinstance(value, Tensor) else value for key, value in found.arguments.items()}
    assert names == {"x": "x", "residual": "residual", "weight": "weight", "epsilon": 1e-6}
    assert [tensor.name for tensor in found.outputs] == ["hidden", "y"]
    assert found.cost == cost("float32", 4, 16)


CHANGED: Mapping[str, Line] = MappingProxyType(
    {
        "the sum is scaled": ("aten.add.Tensor(%0, %1, alpha=2)", ("x", "residual"), (4, 16)),
        "a literal is added": ("aten.add.Tensor(%0, 1.0)", ("x",), (4, 16)),
        "the addition broadcasts": ("aten.add.Tensor(%0, %1)", ("x", "row"), (4, 16)),
        "another power": ("aten.pow.Tensor_Scalar(%0, 3)", ("hidden",), (4, 16)),
        "another tensor is squared": ("aten.pow.Tensor_Scalar(%0, 2)", ("x",), (4, 16)),
        "the mean of both dimensions": ("aten.mean.dim(%0, [0, 1], True)", ("square",), (1, 1)),
        "the mean of columns": ("aten.mean.dim(%0, [0], True)", ("square",), (1, 16)),
        "the epsilon is scaled": ("aten.add.Scalar(%0, 1e-06, 2)", ("mean",), (4, 1)),
        "the epsilon is a tensor": ("aten.add.Tensor(%0, %1)", ("mean", "row"), (4, 16)),
        "another root": ("aten.rsqrt.default(%1)", ("shifted", "x"), (4, 16)),
        "another tensor is scaled": ("aten.mul.Tensor(%0, %1)", ("x", "root"), (4, 16)),
        "the scale is squared": ("aten.mul.Tensor(%1, %1)", ("hidden", "root"), (4, 1)),
        "the weight is a matrix": ("aten.mul.Tensor(%0, %1)", ("scaled", "x"), (4, 16)),
        "the weight is the result": ("aten.mul.Tensor(%0, %0)", ("scaled",), (4, 16)),
    }
)
PLACE = ("hidden",) * 3 + ("square",) * 2 + ("mean",) * 2 + ("shifted",) * 2 + ("root",) + ("scaled",) * 2 + ("y",) * 2


@pytest.mark.parametrize(("case", "name"), list(zip(CHANGED, PLACE, strict=True)))
def test_leaves_other_arithmetic_alone(case: str, name: str) -> None:
    assert not found_in(graph_of({**LINES, name: CHANGED[case]}))


@pytest.mark.parametrize(
    "body",
    [
        "aten.rms_norm.default(%0, [4, 16], %1, 1e-06)",
        "aten.rms_norm.default(%0, [4], %1, 1e-06)",
        "aten.rms_norm.default(%0, [16], None, 1e-06)",
        "aten.rms_norm.default(%0, [16])",
        "aten.rms_norm.default(%1, [16], %0, 1e-06)",
    ],
)
def test_leaves_other_normalisations_alone(body: str) -> None:
    assert not found_in(graph_of({**WHOLE, "y": (body, ("hidden", "weight"), (4, 16))}))


@pytest.mark.parametrize("name", ["square", "mean", "shifted", "root", "scaled"])
def test_what_others_see_stays(name: str) -> None:
    """A value between addition and result that another operator reads, or the caller gets, is computed as before."""
    shape = LINES[name][2]
    lines = list(LINES)
    needed = {f"op_{line}" for line in lines[1 : lines.index(name) + 1]}  # the sum itself is the kernel's
    for graph in (
        graph_of(LINES, outputs=("y", name)),
        graph_of({**LINES, "other": ("aten.neg.default(%0)", (name,), shape)}, outputs=("y", "other")),
    ):
        for found in found_in(graph):
            assert not needed & set(found.ops)


@pytest.mark.parametrize("lines", [LINES, WHOLE], ids=["decomposed", "whole"])
def test_the_weight_has_to_be_there_before_the_addition(lines: Mapping[str, Line]) -> None:
    """A weight made from the sum cannot be an operand of the launch that makes the sum."""
    made = ("aten.select.int(%0, 0, 0)", ("hidden",), (16,))
    body, (operand, _), shape = lines["y"]
    dependent = {**{k: v for k, v in lines.items() if k != "y"}, "made": made, "y": (body, (operand, "made"), shape)}
    assert not found_in(graph_of(dependent))
    before = {"made": ("aten.neg.default(%0)", ("weight",), (16,)), **lines, "y": (body, (operand, "made"), shape)}
    assert len(found_in(graph_of(before))) == 1


@pytest.mark.parametrize(("source", "before"), [("weight", "y"), ("hidden", "scaled"), ("hidden", "square")])
def test_nothing_may_be_written_between(source: str, before: str) -> None:
    assert len(found_in(graph_of(LINES))) == 1
    assert not found_in(graph_of(LINES, updates={source: before}))


def test_results_need_row_major_memory_of_their_own() -> None:
    """A sum that is written over an operand, or laid out by columns, is another kernel's business."""
    graph = graph_of(WHOLE)
    for name, operand in (("hidden", "x"), ("y", "residual")):
        in_place = Tensor(name, (4, 16), "float32", buffer=operand)
        by_columns = Tensor(name, (4, 16), "float32", strides=(1, 4))
        for other in (in_place, by_columns):
            tensors = tuple(other if tensor.name == name else tensor for tensor in graph.tensors)
            assert not found_in(Graph("rms", tensors, graph.ops, graph.outputs))


def test_what_is_written_before_or_after_does_not_matter() -> None:
    after = {**LINES, "other": ("aten.neg.default(%0)", ("x",), (4, 16))}
    assert len(found_in(graph_of(after, updates={"hidden": "other", "weight": "hidden"}))) == 1


def test_each_normalisation_of_one_sum_is_a_candidate() -> None:
    """Whoever chooses among them sees that they overlap: both write the sum."""
    twice = {**WHOLE, "z": ("aten.rms_norm.default(%0, [16], %1, 1e-05)", ("hidden", "weight"), (4, 16))}
    found = found_in(graph_of(twice, outputs=("y", "z")))
    assert [match.ops for match in found] == [("op_hidden", "op_y"), ("op_hidden", "op_z")]


def test_the_sum_may_be_of_one_tensor_with_itself() -> None:
    doubled = {**WHOLE, "hidden": ("aten.add.Tensor(%0, %0)", ("x",), (4, 16))}
    (found,) = found_in(graph_of(doubled))
    assert [tensor.name for tensor in found.arguments.values() if isinstance(tensor, Tensor)] == ["x", "x", "weight"]
