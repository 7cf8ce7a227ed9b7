"""Cases of ``kernels/w4a16_linear.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from opweave.kernels._configs import Config
from opweave.kernels.w4a16_linear import KERNEL
from tests.kernels.conforming import Case, Cases


def truth(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
) -> tuple[torch.Tensor]:
    """Weight by weight through the bytes: the low nibble of byte ``i // 2`` of word ``j`` is number ``32 i + j``."""
    depth = x.shape[-1]
    columns, words = packed.shape
    octets = packed.numpy(force=True).astype("<u4").view(np.uint8).reshape(columns, words // 32, 32, 4)
    nibbles = np.stack([octets & 15, octets >> 4], axis=-1)  # [columns, block, word, octet, half]
    integers = nibbles.transpose(0, 1, 3, 4, 2).reshape(columns, 8 * words)[:, :depth].astype(np.float64)
    of_group = torch.arange(depth) // group
    zero = 8.0 if zeros is None else zeros.cpu().double()[of_group].t()
    centred = torch.from_numpy(integers) - zero
    scale = scales.cpu().double()[of_group].t()
    weight = (centred * scale).to(x.dtype).double() if group < depth else centred * scale
    total = x.cpu().double() @ weight.t() + (0 if bias is None else bias.cpu().double())
    return (total.to(x.device),)


def _config(block_m: int, block_n: int, splits: int, group_m: int = 2) -> Config:
    return Config({"block_m": block_m, "block_n": block_n, "splits": splits, "group_m": group_m})


_SMALL, _SPLIT = _config(16, 16, 1), _config(16, 32, 3)


def _case(config: Config | None, rows: int, depth: int, columns: int, group: int, **more: Any) -> Case:
    sizes = {"rows": rows, "depth": depth, "columns": columns, "group": group, **more}
    return Case(sizes, config)


CASES = Cases(
    KERNEL,
    truth,
    (
        _case(None, 1, 1, 1, 1),
        _case(None, 16, 512, 64, 128),
        _case(None, 65, 300, 70, 64, asymmetric=True, bias=True),
        _case(_SMALL, 17, 31, 33, 31, asymmetric=True),  # one group: scales multiply sums
        _case(_SMALL, 7, 257, 15, 32, asymmetric=True, bias=True),  # the last group holds one weight
        _case(_SMALL, 33, 256, 50, 32),
        _case(_SMALL, 3, 97, 17, 64, bias=True),
        _case(_SPLIT, 1, 1021, 33, 128, asymmetric=True, bias=True),  # splits of two blocks, one of none
        _case(_SPLIT, 19, 769, 37, 256),
        _case(_SPLIT, 5, 1030, 31, 512, asymmetric=True),  # a group wider than a block
        _case(_SPLIT, 2, 1030, 31, 4096, asymmetric=True, bias=True),
        _case(None, 0, 64, 8, 32),
        _case(None, 3, 64, 0, 32),
        Case(
            {"rows": 12, "depth": 300, "columns": 20, "group": 32, "bias": True},
            _SMALL,
            lambda given: given | {"x": given["x"].view(2, 6, 300), "bias": given["bias"].float()},
            label="three dimensions",
        ),
        Case(
            {"rows": 40, "depth": 301, "columns": 20, "group": 32},
            _SMALL,
            lambda given: given | {"x": given["x"].t().contiguous().t()[::2]},
            label="strides",
        ),
    ),
)
