"""Cases of ``kernels/paged_decode_attention.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.paged_decode_attention import KERNEL
from tests.kernels.conforming import FLOAT_TOLERANCE, Case, Cases

#: Probabilities are rounded before they meet the values, which are as large as 4: half a unit in the last place of
#: each, a weighted mean of which is smaller than the largest.
_TOLERANCE = {**FLOAT_TOLERANCE, torch.float16: (2.0**-10, 2.0**-11), torch.bfloat16: (2.0**-7, 2.0**-8)}
_SMALL = Config({"block_n": 16})


def truth(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    soft_cap: float,
    window: int,
    splits: int,
) -> tuple[torch.Tensor, ...]:
    """Sequence by sequence and head by head."""
    page_size, kv_heads = key_cache.shape[1:3]
    shape, q = q.shape, q.reshape(*q.shape[:2], q.shape[-1])
    out = torch.zeros(q.shape, dtype=torch.float64)
    for sequence, length in enumerate(lengths.tolist()):
        end = min(length, page_table.shape[1] * page_size)
        tokens = range(max(0, length - window) if window else 0, end)
        places = [(int(page_table[sequence, token // page_size]), token % page_size) for token in tokens]
        places = [(min(max(page, 0), len(key_cache) - 1), row) for page, row in places]
        for head in range(q.shape[1] if places else 0):
            kv_head = head * kv_heads // q.shape[1]
            keys, values = (
                torch.stack([cache[page, row, kv_head] for page, row in places]).double()
                for cache in (key_cache, value_cache)
            )
            scores = keys @ q[sequence, head].double() * scale
            if soft_cap:
                scores = torch.tanh(scores / soft_cap) * soft_cap
            out[sequence, head] = scores.softmax(0) @ values
    return (out.view(shape),)


def _sizes(sequences: int, heads: int, kv_heads: int, dim: int, tokens: int, **more: Any) -> dict[str, Any]:
    return {"sequences": sequences, "heads": heads, "kv_heads": kv_heads, "dim": dim, "tokens": tokens, **more}


def _of_lengths(*lengths: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Shorter sequences; page table entries behind them, and before their windows, are garbage."""

    def change(given: dict[str, Any]) -> dict[str, Any]:
        page_table = given["page_table"].clone()
        page_size, window = given["key_cache"].shape[1], given["window"]
        garbage = torch.tensor([-1, 2**31 - 1, -(2**31)], dtype=torch.int32)
        for sequence, length in enumerate(lengths):
            used = -(-length // page_size)
            page_table[sequence, used:] = garbage.repeat(page_table.shape[1])[: page_table.shape[1] - used]
            if window:
                page_table[sequence, : max(0, length - window) // page_size] = -1
        return given | {"lengths": torch.tensor(lengths, dtype=torch.int32), "page_table": page_table}

    return change


def _strided(given: dict[str, Any]) -> dict[str, Any]:
    """Queries out of a projection, heads before the rows of a page, and a page table with a margin."""
    q = torch.cat((given["q"], given["q"] + 1), 1)[:, : given["q"].shape[1]]
    caches = {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("key_cache", "value_cache")}
    page_table = torch.nn.functional.pad(given["page_table"], (0, 3), value=-1)[:, : given["page_table"].shape[1]]
    return given | caches | {"q": q, "page_table": page_table}


def _longer_than_the_page_table(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"lengths": given["lengths"] + torch.tensor([1, 9, 10**6], dtype=torch.int32)}


def _pages_that_are_none(given: dict[str, Any]) -> dict[str, Any]:
    """Within a sequence, pages before the first and behind the last; queries as PyTorch's attention takes them."""
    page_table = given["page_table"].clone()
    page_table[0, 0], page_table[1, 1] = -5, len(given["key_cache"])
    return given | {"page_table": page_table, "q": given["q"][:, :, None]}


CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(1, 1, 1, 1, 1)),
        Case(_sizes(2, 4, 2, 64, 16)),
        Case(_sizes(1, 6, 2, 96, 33)),
        Case(_sizes(1, 3, 1, 7, 47, page_size=3), config=_SMALL),
        Case(_sizes(1, 17, 1, 32, 31, page_size=32)),
        Case(_sizes(1, 80, 1, 16, 31)),
        Case(_sizes(1, 8, 2, 128, 256, page_size=256)),
        Case(_sizes(1, 4, 1, 32, 600)),
        Case(_sizes(2, 4, 2, 32, 67, splits=3), config=_SMALL),
        Case(_sizes(1, 2, 1, 32, 40, splits=20), config=_SMALL),
        Case(_sizes(1, 2, 1, 32, 310, splits=20), config=_SMALL),
        Case(_sizes(5, 4, 2, 32, 70, splits=1), change=_of_lengths(0, 1, 16, 17, 70), config=_SMALL, label="lengths"),
        Case(
            _sizes(5, 4, 2, 32, 70, splits=3),
            change=_of_lengths(0, 1, 15, 33, 70),
            config=_SMALL,
            label="lengths, split",
        ),
        Case(
            _sizes(4, 2, 1, 32, 70, splits=2, window=20),
            change=_of_lengths(70, 20, 3, 0),
            config=_SMALL,
            label="window",
        ),
        Case(_sizes(2, 2, 1, 32, 70, window=1), change=_of_lengths(70, 49), config=_SMALL, label="window of itself"),
        Case(_sizes(2, 4, 2, 32, 40, soft_cap=0.5, splits=2), config=_SMALL),
        Case(_sizes(2, 4, 2, 64, 40), change=_strided, label="strided"),
        Case(
            _sizes(3, 4, 2, 32, 48, window=20), change=_longer_than_the_page_table, label="longer than the page table"
        ),
        Case(_sizes(2, 4, 2, 32, 40), change=_pages_that_are_none, label="pages that are none"),
        Case(_sizes(2, 4, 2, 32, 0)),
        Case(_sizes(0, 4, 2, 32, 16)),
    ),
    tolerance=_TOLERANCE,
)
