"""Cases of ``kernels/w8a16_linear.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.w8a16_linear import KERNEL
from tests.kernels.conforming import Case, Cases


def truth(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, group: int
) -> tuple[torch.Tensor]:
    depth = x.shape[-1]
    dequantized = weight.double() * scales.double()[torch.arange(depth, device=x.device) // group].t()
    if group < depth:
        dequantized = dequantized.to(x.dtype).double()
    return (x.double() @ dequantized.t() + (0 if bias is None else bias.double()),)


def _config(block_m: int, block_n: int, splits: int, block_k: int = 32, group_m: int = 2) -> Config:
    constants = {"block_m": block_m, "block_n": block_n, "block_k": block_k, "splits": splits, "group_m": group_m}
    return Config(constants)


_SMALL, _SPLIT, _DEEP = _config(16, 16, 1), _config(16, 32, 3), _config(16, 32, 1, block_k=128)


def _case(config: Config | None, rows: int, depth: int, columns: int, group: int | None = None, **more: Any) -> Case:
    return Case({"rows": rows, "depth": depth, "columns": columns, "group": group, **more}, config)


CASES = Cases(
    KERNEL,
    truth,
    (
        _case(None, 1, 1, 1),
        _case(None, 16, 512, 64),
        _case(None, 65, 300, 70, 64, bias=True),
        _case(_SMALL, 17, 31, 33),
        _case(_SMALL, 7, 257, 15, 32, bias=True),  # the last group holds one weight
        _case(_SMALL, 33, 64, 50, 64),
        _case(_DEEP, 3, 97, 17, 32, bias=True),  # the block along the depth is no deeper than a group
        _case(_DEEP, 3, 301, 17, 512),
        _case(_SPLIT, 1, 127, 33, bias=True),  # splits of two blocks each, the last of one less
        _case(_SPLIT, 19, 161, 37, 64),
        _case(_SPLIT, 2, 130, 31, 64, bias=True),  # splits of one block
        _case(None, 0, 64, 8),
        _case(None, 3, 64, 0),
        Case(
            {"rows": 12, "depth": 100, "columns": 20, "bias": True},
            _SMALL,
            lambda given: given | {"x": given["x"].view(2, 6, 100), "bias": given["bias"].float()},
            label="three dimensions",
        ),
        Case(
            {"rows": 40, "depth": 101, "columns": 40},
            _SMALL,
            lambda given: (
                given
                | {
                    "x": given["x"].t().contiguous().t()[::2],
                    "weight": given["weight"].t().contiguous().t()[::2],
                    "scales": given["scales"][:, :20].contiguous(),
                }
            ),
            label="strides",
        ),
    ),
)
