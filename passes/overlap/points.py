"""Where to cut tokens into parts: equal parts, and points at which no matrix product begins a wave it cannot fill.

A product whose last wave of tiles is nearly empty costs as much as a full one; a cut that leaves such waves in every
product costs more than overlap gains (TokenWeave, arXiv 2505.11329, section 4). So points are compared by the sum of
the modelled times of all products that have the tokens among their rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...compiler.graph import Graph
from ...hw_models.matmul import matmul_seconds
from ...hw_models.model import HardwareModel
from .regions import is_product

__all__ = ["Product", "points", "products_of", "seconds_of_parts"]

GRANULARITY = 128  # tokens, of which split points are multiples: the rows of a tile
LEAST_SHARE = 0.15  # of the tokens, in the smallest part


@dataclass(frozen=True)
class Product:
    """``count`` matrix products with ``rows_each`` rows for each token, ``columns`` columns and ``inner`` in common."""

    rows_each: int
    columns: int
    inner: int
    dtype: str
    count: int


def products_of(graph: Graph, tokens: int) -> tuple[Product, ...]:
    """The products of ``graph`` whose rows are a multiple of ``tokens``."""
    found: dict[tuple[int, int, int, str], int] = {}
    for op in graph.ops:
        if not is_product(op) or not op.flops or not op.outputs:
            continue
        out = graph.tensor[op.outputs[0]]
        rows, columns = math.prod(out.shape[:-1]), out.shape[-1] if out.shape else 1
        if rows and columns and rows % tokens == 0:
            inner = max(1, round(op.flops / (2 * rows * columns)))
            key = (rows // tokens, columns, inner, out.dtype)
            found[key] = found.get(key, 0) + 1
    return tuple(Product(*key, count) for key, count in found.items())


def seconds_of_parts(products: Sequence[Product], sizes: Sequence[int], machine: HardwareModel) -> float:
    """Modelled seconds of all products, cut into parts of ``sizes`` tokens."""
    return math.fsum(
        product.count * matmul_seconds(size * product.rows_each, product.columns, product.inner, product.dtype, machine)
        for product in products
        for size in sizes
    )


def points(graph: Graph, tokens: int, counts: Sequence[int], machine: HardwareModel) -> Iterator[tuple[int, ...]]:
    """Sizes of parts that are worth trying, the most promising first: equal, near to equal by waves, and unequal.

    ``tokens`` is the extent that is cut and ``counts`` the numbers of parts. Sizes are multiples of a tile's rows where
    there are enough tokens for that.
    """
    seen: set[tuple[int, ...]] = set()
    products = products_of(graph, tokens)
    proposed = [_of_count(products, tokens, count, machine) for count in counts if 1 < count <= tokens]
    first = [list(itertools.islice(proposed[0], 2))] if proposed else []
    for choices in (*first, *itertools.zip_longest(*proposed)):
        for sizes in choices:
            if sizes is not None and sizes not in seen:
                seen.add(sizes)
                yield sizes


def _of_count(
    products: Sequence[Product], tokens: int, count: int, machine: HardwareModel
) -> Iterator[tuple[int, ...]]:
    yield _equal(tokens, count)
    step = max(1, min(GRANULARITY // min((p.rows_each for p in products), default=1) or 1, tokens // (2 * count)))
    if count > 2:
        yield _rounded(tokens, count, step)
        return
    cuts: list[tuple[int, ...]] = [
        (cut, tokens - cut) for cut in range(step, tokens, step) if min(cut, tokens - cut) >= LEAST_SHARE * tokens
    ]
    cost = {sizes: seconds_of_parts(products, sizes, machine) for sizes in cuts}
    for width in (0.06, 0.2, 0.5):  # from near the middle to anywhere
        near = [sizes for sizes in cuts if abs(sizes[0] - tokens / 2) <= width * tokens]
        if near:
            yield min(near, key=lambda sizes: (cost[sizes], abs(sizes[0] - sizes[1]), -sizes[0]))
    yield from sorted(cuts, key=lambda sizes: (cost[sizes], abs(sizes[0] - sizes[1]), -sizes[0]))[:4]


def _equal(tokens: int, count: int) -> tuple[int, ...]:
    base, more = divmod(tokens, count)
    return tuple(base + (part < more) for part in range(count))


def _rounded(tokens: int, count: int, step: int) -> tuple[int, ...]:
    """Nearly equal parts, all but the last multiples of ``step``."""
    size = max(step, round(tokens / count / step) * step)
    if size * (count - 1) >= tokens:
        return _equal(tokens, count)
    return (*[size] * (count - 1), tokens - size * (count - 1))
