"""Cases of ``kernels/rope.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from opweave.kernels._configs import Config
from opweave.kernels.rope import KERNEL
from tests.kernels.conforming import Case, Cases

_SMALL = Config({"block_heads": 2}, num_warps=1)


def turned(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    rotary_dim: int,
    interleaved: bool,
    inverse: bool = False,
) -> torch.Tensor:
    """Each head ``[..., tokens, heads, dim]`` times the matrix of its position, transposed for the inverse."""
    pairs = rotary_dim // 2
    out = x.double().clone()
    first = [2 * pair if interleaved else pair for pair in range(pairs)]
    second = [2 * pair + 1 if interleaved else pairs + pair for pair in range(pairs)]
    columns = (first, second) if cos.shape[1] == rotary_dim else (list(range(pairs)), list(range(pairs)))
    rows = torch.broadcast_to(positions.long(), x.shape[:-2])
    for place in np.ndindex(*x.shape[:-2]):
        matrix = torch.zeros(rotary_dim, rotary_dim, dtype=torch.float64)
        row = int(rows[place])
        if not -len(cos) <= row < len(cos):
            out[place][:, :rotary_dim] = torch.nan
            continue
        matrix[first, first], matrix[first, second] = cos[row, columns[0]].double(), -sin[row, columns[0]].double()
        matrix[second, second], matrix[second, first] = cos[row, columns[1]].double(), sin[row, columns[1]].double()
        matrix = matrix.T if inverse else matrix
        out[place][:, :rotary_dim] = x[place][:, :rotary_dim].double() @ matrix.T
    return out


def truth(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    heads_first: bool,
    row_major: bool,
    inverse: bool,
) -> tuple[torch.Tensor, ...]:
    results = []
    for x in (q, k):
        tokenwise = x.transpose(-2, -3) if heads_first else x
        if positions is None:
            rows = torch.arange(tokenwise.shape[:-2].numel()).view(tokenwise.shape[:-2]) % max(1, len(cos))
        else:
            rows = positions[0] if x.dim() == 3 and positions.dim() == 2 else positions
        out = turned(tokenwise, cos, sin, rows, rotary_dim, interleaved, inverse)
        results.append(out.transpose(-2, -3) if heads_first else out)
    return tuple(results)


def _sizes(tokens: int, heads: int, kv_heads: int, dim: int, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "dim": dim, "context": 37, **more}


def _tables_side_by_side(given: dict[str, Any]) -> dict[str, Any]:
    """Tables as halves of one, as vLLM keeps them, and positions of 32 bits."""
    cos, sin = torch.cat((given["cos"], given["sin"]), -1).chunk(2, -1)
    return given | {"cos": cos, "sin": sin, "positions": given["positions"].int()}


def _tables_alternating(given: dict[str, Any]) -> dict[str, Any]:
    """Tables as real and imaginary parts, and results that are row-major though inputs are not."""
    cos, sin = torch.stack((given["cos"], given["sin"]), -1).unbind(-1)
    return _heads_first_in_memory(given) | {"cos": cos, "sin": sin, "row_major": True}


def _negative_positions(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"positions": given["positions"] - len(given["cos"])}


def _positions_outside(given: dict[str, Any]) -> dict[str, Any]:
    context = len(given["cos"])
    return given | {"positions": torch.tensor([context, context - 1, -context, -context - 1, 2**40, -(2**40)])}


def _heads_first_in_memory(given: dict[str, Any]) -> dict[str, Any]:
    return given | {name: given[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("q", "k")}


def _batched(
    batch: int, heads_first: bool, positions: str, each: bool = False
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Tokens regrouped into a batch; heads in front of tokens as a model has them: a view of its projection."""

    def change(given: dict[str, Any]) -> dict[str, Any]:
        given = dict(given)
        for name in ("q", "k"):
            x = given[name].unflatten(0, (batch, -1))
            given[name] = x.transpose(1, 2) if heads_first else x
        rows = given["positions"].view(batch, -1)
        chosen = {"of each": rows, "of all": rows[:1].clone(), "flat": rows[0].clone()}
        if positions in chosen:
            given["positions"] = chosen[positions]
        else:  # tables gathered before
            wanted = given["positions"] if positions == "none, of each" else rows[0]
            given |= {name: given[name][wanted] for name in ("cos", "sin")} | {"positions": None}
        if each:  # which need not be the same for both elements of a pair
            given |= {name: torch.cat((given[name], given[name].flip(-1)), -1) for name in ("cos", "sin")}
        return given | {"heads_first": heads_first}

    return change


CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(1, 1, 1, 2)),
        Case(_sizes(3, 1, 1, 2, interleaved=True)),
        Case(_sizes(5, 7, 3, 64)),
        Case(_sizes(2, 32, 8, 128, table_dtype="float32")),
        Case(_sizes(3, 17, 1, 128, interleaved=True)),
        Case(_sizes(2, 4, 2, 96)),
        Case(_sizes(2, 5, 3, 80, interleaved=True), config=_SMALL),
        Case(_sizes(2, 5, 3, 80, rotary_dim=32), config=_SMALL),
        Case(_sizes(3, 3, 2, 40, rotary_dim=12, interleaved=True)),
        Case(_sizes(3, 3, 2, 7, rotary_dim=6)),
        Case(_sizes(2, 4, 2, 256), config=_SMALL),
        Case(_sizes(2, 4, 2, 32, inverse=True)),
        Case(_sizes(2, 4, 2, 32, inverse=True, interleaved=True)),
        Case(_sizes(3, 4, 2, 32), change=_tables_side_by_side, label="tables side by side"),
        Case(_sizes(3, 4, 2, 32), change=_tables_alternating, label="tables alternating, row-major"),
        Case(_sizes(3, 4, 2, 32), change=_negative_positions, label="negative positions"),
        Case(_sizes(6, 4, 2, 16, rotary_dim=12), change=_positions_outside, label="positions outside of the tables"),
        Case(_sizes(3, 4, 2, 32), change=_heads_first_in_memory, label="heads first in memory"),
        *(
            Case(
                _sizes(6, 3, 2, 16, interleaved=interleaved, inverse=inverse),
                config=_SMALL,
                change=_batched(2, heads_first, positions, each),
                label=f"positions {positions}{', heads first' * heads_first}{', each' * each}"
                f"{', interleaved' * interleaved}{', inverse' * inverse}",
            )
            for positions, heads_first, each, interleaved, inverse in (
                ("of each", False, False, False, False),
                ("of all", True, False, False, False),
                ("flat", False, True, True, True),
                ("flat", True, True, False, True),
                ("none, of each", True, True, False, False),
                ("none, of all", False, True, True, False),
            )
        ),
        Case(_sizes(3, 4, 2, 32, table_dtype="bfloat16"), dtypes=(torch.bfloat16,)),
        Case(_sizes(3, 4, 2, 32, table_dtype="float16"), dtypes=(torch.float16,)),
        Case(_sizes(0, 4, 2, 8)),
        Case(_sizes(3, 0, 2, 8)),
        Case(_sizes(3, 2, 0, 8)),
    ),
)
