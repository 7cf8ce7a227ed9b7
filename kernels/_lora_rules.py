"""Where a graph adds a product of low rank to a linear layer: what the match rules of the LoRA kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..compiler.graph import Tensor
from ._checks import FLOATS, dtype_name
from ._match import Found, Walk, any_tensor, call, either, number
from ._patterns import Linear, linears, sums

__all__ = ["LowRank", "low_rank_sums", "product_of"]

#: A product of more is no adapter, and not what the kernels' tiles are made for.
MOST_RANK = 256


@dataclass(frozen=True)
class LowRank:
    """``out = base.x @ base.weight + base.bias + scale * s @ b``, with the rank less than every other extent."""

    out: Tensor
    base: Linear
    s: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Columns of ``s``."""
        return self.b.shape[0]


def low_rank_sums(walk: Walk) -> Iterator[LowRank]:
    """Each way in which a sum in the graph is one, from the first to the last."""
    for out in walk.results("add"):
        if out.dtype not in map(dtype_name, FLOATS) or not out.shape:
            continue
        for one, other, total in sums(walk, out):
            for up, scale in _scaled(walk, other):
                for base in linears(walk, one):
                    rank, extents = up.weight.shape[0], base.weight.shape
                    if total is out and 0 < rank < min(*extents, MOST_RANK + 1):
                        yield LowRank(out, base, up.x, up.weight, scale)


def _scaled(walk: Walk, tensor: Tensor) -> Iterator[tuple[Linear, float]]:
    """Products without a bias that ``tensor`` may be a multiple of, and which."""
    for up in linears(walk, tensor):
        if up.bias is None:
            yield up, 1.0
    for found in walk.find(call("mul", any_tensor("product"), number("scale")), tensor):
        for up in linears(walk, found["product"]):
            if up.bias is None and found["product"].shape == tensor.shape:
                yield up, float(found.literals["scale"])


def product_of(walk: Walk, s: Tensor, x: Tensor) -> Iterator[Tensor]:
    """The matrices whose product with ``x`` may be ``s``; dropout that drops nothing is decomposed to a copy."""
    bound = Found({"x": x})
    for down in linears(walk, s):
        same = next(walk.find(either(any_tensor("x"), call("clone", any_tensor("x"))), down.x, bound), None)
        if same is not None and down.x.shape == x.shape and down.bias is None:
            yield down.weight
