"""Cases of ``kernels/add_rms_norm_quantize.py``.

Results are compared bit for bit, so quotients must not lie so close to a tie that a last bit of the normalisation
decides. `exact` makes inputs whose quotients are quarters, none at a tie; random ones stay small.
"""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.add_rms_norm_quantize import KERNEL, LIMITS
from tests.kernels.conforming import Case, Cases

_SMALL = Config({"block": 32}, num_warps=1)


def truth(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, least_scale: float, dtype: str
) -> tuple[torch.Tensor, ...]:
    hidden = (x + residual).double()
    normalized = hidden / (hidden.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()
    largest = normalized.abs().amax(-1, keepdim=True) if x.shape[-1] else normalized.new_zeros((*x.shape[:-1], 1))
    scale = (largest / LIMITS[dtype]).clamp(min=least_scale)
    quotient = (normalized / scale).nan_to_num(0.0)
    if dtype == "int8":
        return hidden, quotient.round(), scale
    step = torch.exp2(quotient.abs().clamp(min=2.0**-6).log2().floor() - 3)  # of float8's three digits
    return hidden, (quotient / step).round() * step, scale


def exact(given: dict[str, Any]) -> dict[str, Any]:
    """``hidden`` in sixteenths, the largest of a row such that quotients are quarters; none of them is at a tie."""
    x = given["x"]
    sixteenths = torch.randint(-255, 256, x.shape, generator=torch.Generator().manual_seed(1))
    if given["dtype"] == "int8":
        sixteenths += sixteenths % 4 == 2
    else:
        half = torch.exp2(sixteenths.abs().clamp(min=16).double().log2().floor() - 4).long()
        sixteenths += sixteenths.sign() * (sixteenths.abs() % (2 * half) == half)
    sixteenths[..., x.shape[-1] // 2] = int(LIMITS[given["dtype"]]) * 4
    parts = {"x": sixteenths // 16, "residual": sixteenths % 16 / 16}
    return (
        given | {name: part.to(x.device, x.dtype) for name, part in parts.items()} | {"weight": given["weight"] * 0 + 1}
    )


def _row_of_zeros(given: dict[str, Any]) -> dict[str, Any]:
    """Between rows of numbers, one whose sum is zero."""
    given["x"][1], given["residual"][1] = 1, -1
    return given


CASES = Cases(
    KERNEL,
    truth,
    (
        *(
            Case({"rows": rows, "columns": columns, "quantized": dtype})
            for dtype in LIMITS
            for rows, columns in ((1, 1), (7, 1), (3, 31), (0, 8), (3, 0))
        ),
        *(
            Case(
                {"rows": rows, "columns": columns, "quantized": dtype},
                config,
                exact,
                label=f"{rows}-{columns}-{dtype}-exact",
            )
            for dtype in LIMITS
            for rows, columns, config in (
                (5, 257, None),
                (6, 256, None),
                (2, 4096, None),
                (1, 16411, None),
                (3, 32, _SMALL),
                (4, 33, _SMALL),
                (2, 101, _SMALL),
            )
        ),
        *(
            Case({"rows": 3, "columns": 37, "quantized": dtype}, config, _row_of_zeros, label=f"zeros-{dtype}-{place}")
            for dtype in LIMITS
            for place, config in (("whole", None), ("blocks", _SMALL))
        ),
        Case({"rows": 3, "columns": 37, "least_scale": 0.5}, change=_row_of_zeros, label="large least scale"),
        Case(
            {"rows": 3, "columns": 37, "least_scale": 0.5}, _SMALL, _row_of_zeros, label="large least scale in blocks"
        ),
        Case({"rows": 3, "columns": 0, "least_scale": 0.5}),
        Case({"rows": 5, "columns": 57, "weight_dtype": "float32"}, change=exact),
        Case(
            {"rows": 6, "columns": 33},
            change=lambda given: exact(given | {name: given[name].view(2, 3, 33) for name in ("x", "residual")}),
            label="three dimensions",
        ),
    ),
)
