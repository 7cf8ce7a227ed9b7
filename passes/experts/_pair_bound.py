"""What the longest transfer between two layers takes at least, wherever their clusters are: three relaxations."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from .problem import ExpertProblem

__all__ = ["layer_bound_s"]

Integers = NDArray[np.int64]


def layer_bound_s(problem: ExpertProblem, tokens: Integers) -> float:
    """Seconds that the longest transfer of ``tokens`` [devices, devices], between clusters, takes at least.

    * Any pair of devices may take any tokens: the most go with the fastest pairs.
    * Tokens that stay where they are are one entry of each row and column. Taken in descending order, the first entry
      that repeats a row or column has to go somewhere.
    * Clusters that exchange more than some number of tokens are on one node, or the slowest link takes longer than for
      that number. So the numbers are tried, from the smallest, until such clusters fit on nodes.
    """
    descending = np.sort(tokens.ravel())[::-1]
    by_rank = float((descending * np.sort(problem.pair_s.ravel())).max())
    return max(by_rank, _staying(problem, tokens), _nodes(problem, tokens)) * problem.token_bytes


def _staying(problem: ExpertProblem, tokens: Integers) -> float:
    away = problem.pair_s[problem.pair_s > 0]
    rows: set[int] = set()
    columns: set[int] = set()
    for flat in np.argsort(-tokens.ravel(), kind="stable"):
        row, column = divmod(int(flat), problem.devices)
        if row in rows or column in columns:
            return float(tokens[row, column] * away.min()) if away.size else 0.0
        rows.add(row)
        columns.add(column)
    return 0.0


def _nodes(problem: ExpertProblem, tokens: Integers) -> float:
    """Devices of one size of node only; otherwise, and on one node, nothing is proven."""
    nodes = np.array(problem.node)
    sizes = np.bincount(nodes)
    across = problem.pair_s[nodes[:, None] != nodes[None, :]]
    if len(sizes) < 2 or len(set(sizes.tolist())) > 1:
        return 0.0
    levels = np.unique(np.append(tokens.ravel(), 0))
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _fit(tokens > levels[middle], int(sizes[0])) else (middle + 1, high)
    return float(levels[low] * across.min())


def _fit(together: NDArray[np.bool_], size: int) -> bool:
    """Whether clusters joined by ``together`` [here, there] fit on nodes with room for ``size`` of each of the layers.

    Exact for two nodes; for more, whether each lot fits on some node.
    """
    lots = list(_lots(together))
    if any(here > size or there > size for here, there in lots):
        return False
    if len(together) != 2 * size:
        return True
    reached = {(0, 0)}
    for here, there in lots:
        reached |= {(a + here, b + there) for a, b in reached if a + here <= size and b + there <= size}
    return (size, size) in reached


def _lots(together: NDArray[np.bool_]) -> Iterable[tuple[int, int]]:
    """Clusters of this layer and of the next in each connected lot."""
    count = len(together)
    open_rows, open_columns = set(range(count)), set(range(count))
    while open_rows or open_columns:
        rows, columns = ({open_rows.pop()}, set()) if open_rows else (set(), {open_columns.pop()})
        fresh_rows = set(rows)
        while fresh_rows:
            found = {c for r in fresh_rows for c in np.flatnonzero(together[r]).tolist()} - columns
            columns |= found
            fresh_rows = {r for c in found for r in np.flatnonzero(together[:, c]).tolist()} - rows
            rows |= fresh_rows
        open_rows -= rows
        open_columns -= columns
        yield len(rows), len(columns)
