"""Cases of ``kernels/rope_cache.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.rope_cache import KERNEL
from tests.kernels.cases.rope import turned
from tests.kernels.conforming import Case, Cases

_SMALL = Config({"block_heads": 2}, num_warps=1)


def truth(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    rotary_dim: int,
    interleaved: bool,
    wrap: bool,
) -> tuple[torch.Tensor, ...]:
    """Token by token."""
    positions = torch.arange(len(q)) if positions is None else positions
    turned_k = turned(k, cos, sin, positions, rotary_dim, interleaved)
    keys, values = (cache.double().flatten(0, 1).clone() for cache in (key_cache, value_cache))
    for token, slot in enumerate(slots.tolist()):
        if -len(keys) * wrap <= slot < len(keys):
            keys[slot], values[slot] = turned_k[token], v[token].double()
    return (
        turned(q, cos, sin, positions, rotary_dim, interleaved),
        keys.view_as(key_cache.contiguous()),
        values.view_as(value_cache.contiguous()),
    )


def _sizes(tokens: int, heads: int, kv_heads: int, dim: int, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "dim": dim, "context": 37, **more}


def _some_skipped(given: dict[str, Any]) -> dict[str, Any]:
    """No slot, one before the first, one behind the last, and some far outside."""
    slots = given["slots"].clone()
    end = given["key_cache"].shape[0] * given["key_cache"].shape[1]
    outside = torch.tensor([-1, -end - 1, end, end + 1, 2**40, -(2**40)])
    slots[1:] = outside[: len(slots) - 1]
    return given | {"slots": slots}


def _wrapped(given: dict[str, Any]) -> dict[str, Any]:
    """The same slots counted from the end, but for those outside, and a row of the tables for each token."""
    given = _some_skipped(given)
    tables = {name: given[name][: len(given["slots"])] for name in ("cos", "sin")}
    return given | tables | {"positions": None, "wrap": True}


def _edges(given: dict[str, Any]) -> dict[str, Any]:
    """The first and the last slot of the cache."""
    end = given["key_cache"].shape[0] * given["key_cache"].shape[1]
    return given | {"slots": torch.tensor([end - 1, 0])}


def _alternating(given: dict[str, Any]) -> dict[str, Any]:
    """Pages of the value cache between those of the key cache, and heads before the slots of a page."""
    both = torch.stack((given["key_cache"], given["value_cache"]), 1).transpose(2, 3).contiguous().transpose(2, 3)
    return given | {"key_cache": both[:, 0], "value_cache": both[:, 1]}


CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(1, 1, 1, 2, page_size=1)),
        Case(_sizes(5, 7, 3, 64)),
        Case(_sizes(2, 32, 8, 128, page_size=32)),
        Case(_sizes(3, 17, 1, 128, interleaved=True)),
        Case(_sizes(3, 4, 2, 96, page_size=3)),
        Case(_sizes(2, 5, 3, 80, rotary_dim=32), config=_SMALL),
        Case(_sizes(2, 5, 3, 40, rotary_dim=12, interleaved=True), config=_SMALL),
        Case(_sizes(7, 4, 2, 32, page_size=4), change=_some_skipped, label="tokens that are not stored"),
        Case(_sizes(7, 4, 2, 32, page_size=4), change=_wrapped, label="slots from the end"),
        Case(_sizes(2, 4, 2, 32, page_size=4), change=_edges, label="first and last slot"),
        Case(_sizes(3, 4, 3, 32, page_size=4), change=_alternating, label="alternating caches"),
        Case(_sizes(3, 4, 2, 32, table_dtype="bfloat16"), dtypes=(torch.bfloat16,)),
        Case(_sizes(0, 4, 2, 8)),
        Case(_sizes(3, 0, 2, 8)),
        Case(_sizes(3, 2, 0, 8)),
    ),
)
