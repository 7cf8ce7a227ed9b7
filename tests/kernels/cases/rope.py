"""Cases of ``kernels/rope.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.rope import KERNEL
from tests.kernels.conforming import Case, Cases

_SMALL = Config({"block_heads": 2}, num_warps=1)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool) -> Any:
    """Each pair as one complex number, times ``cos + i sin``."""
    pairs = cos.shape[1]
    factor = torch.complex(cos.double(), sin.double())[positions.long()][:, None]
    wide = x.double()
    first, second = (
        (wide[..., 0 : 2 * pairs : 2], wide[..., 1 : 2 * pairs : 2])
        if interleaved
        else (wide[..., :pairs], wide[..., pairs : 2 * pairs])
    )
    product = torch.complex(first, second) * factor
    out = wide.clone()
    if interleaved:
        out[..., 0 : 2 * pairs : 2], out[..., 1 : 2 * pairs : 2] = product.real, product.imag
    else:
        out[..., :pairs], out[..., pairs : 2 * pairs] = product.real, product.imag
    return out


def truth(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, ...]:
    sin = -sin if inverse else sin
    return turned(q, cos, sin, positions, interleaved), turned(k, cos, sin, positions, interleaved)


def _sizes(tokens: int, heads: int, kv_heads: int, dim: int, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "dim": dim, "context": 37, **more}


def _tables_side_by_side(given: dict[str, Any]) -> dict[str, Any]:
    """Tables as halves of one, as vLLM keeps them, and positions of 32 bits."""
    both = torch.cat((given["cos"], given["sin"]), -1)
    cos, sin = both.chunk(2, -1)
    return given | {"cos": cos, "sin": sin, "positions": given["positions"].int()}


def _heads_first(given: dict[str, Any]) -> dict[str, Any]:
    return given | {name: given[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("q", "k")}


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
        Case(_sizes(3, 4, 2, 32), change=_heads_first, label="heads first"),
        Case(_sizes(3, 4, 2, 32, table_dtype="bfloat16"), dtypes=(torch.bfloat16,)),
        Case(_sizes(3, 4, 2, 32, table_dtype="float16"), dtypes=(torch.float16,)),
        Case(_sizes(0, 4, 2, 8)),
        Case(_sizes(3, 0, 2, 8)),
        Case(_sizes(3, 2, 0, 8)),
    ),
)
