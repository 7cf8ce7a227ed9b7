"""The comparison of a split with the given module: values, metadata, order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from opweave.passes.split import Split
from opweave.passes.split.state import Along, Division


class Recorder(Interpreter):
    """Runs a module, keeps the value of every node, and compares each with the node's metadata."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, object] = {}

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        self.values[n.name] = result
        known = n.meta.get("val")
        if isinstance(result, Tensor) and n.op != "output":
            assert isinstance(known, Tensor), n.name
            assert (known.shape, known.dtype, known.device) == (result.shape, result.dtype, result.device), n.name
            assert _strides(known) == _strides(result), n.name
        return result


def _strides(value: Tensor) -> list[int]:
    """The strides that matter: of dimensions that have more than one element."""
    return [stride for stride, extent in zip(value.stride(), value.shape, strict=True) if extent > 1]


def difference(module: GraphModule, result: Split, given: Sequence[Tensor]) -> float:
    """The greatest difference of any output, relative to its size or 1; shapes and types agree."""
    before, after = Recorder(module), Recorder(result.module)
    one, other = before.run(*given), after.run(*given)
    assert len(one) == len(other)
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.numel():
            gap = (a.double() - b.double()).abs() / a.double().abs().clamp(min=1)
            worst = max(worst, float(gap.max()))
            assert not gap.isnan().any()
    return worst


def checked(module: GraphModule, result: Split) -> None:
    """Metadata and order: parts of one node stand side by side, those of earlier parts first."""
    names = {node.name for node in module.graph.nodes}
    place = {node.name: index for index, node in enumerate(result.module.graph.nodes)}
    for node in result.module.graph.nodes:
        assert node.meta["opweave_origin"] in names
        assert 0 <= node.meta.get("opweave_part", 0) < len(result.sizes)
        assert node.users or node.is_impure()
    for parts in result.parts.values():
        assert [place[name] for name in parts] == sorted(place[name] for name in parts)


def own_part(value: Tensor, along: Along, division: Division, part: int) -> Tensor:
    """The slice that part ``part`` holds of ``value``, by definition: element by element."""
    block = division.total(along) // along.blocks
    start, end = division.bounds(along, part)
    rows = [index for index in range(division.total(along)) if start <= index % block < end]
    return value.index_select(along.dim, torch.tensor(rows))
