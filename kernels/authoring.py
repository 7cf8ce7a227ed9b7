"""What a kernel is written with: everything that a kernel in another package needs to import from here."""

from __future__ import annotations

from ..compiler.graph import Graph, Tensor
from ._checks import FLOATS, check_apart, check_device, check_tensor, dtype_name, fail
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._match import (
    Cost,
    Found,
    Match,
    Pattern,
    Walk,
    any_tensor,
    bytes_of,
    call,
    either,
    is_row_major,
    literal,
    number,
    reshaped,
    transposed,
)
from ._patterns import ACTIVATIONS, Linear, Norm, activations, linears, norms

__all__ = [
    "ACTIVATIONS",
    "FLOATS",
    "Config",
    "Configs",
    "Cost",
    "Found",
    "Graph",
    "Kernel",
    "Linear",
    "Match",
    "Norm",
    "Pattern",
    "Tensor",
    "Walk",
    "Workload",
    "activations",
    "any_tensor",
    "bytes_of",
    "call",
    "check_apart",
    "check_device",
    "check_tensor",
    "dtype_name",
    "either",
    "fail",
    "is_row_major",
    "linears",
    "literal",
    "normal",
    "norms",
    "number",
    "reshaped",
    "transposed",
]
