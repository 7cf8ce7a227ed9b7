"""A linear layer of PyTorch with its weight quantised, for models that are exported or compiled."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import OptionError
from ._packing import pack, quantize
from .w4a16_linear import KERNEL as FOUR_BITS
from .w8a16_linear import KERNEL as EIGHT_BITS

__all__ = ["QuantizedLinear", "quantized_linear"]


class QuantizedLinear(nn.Module):
    """``x @ dequantised.T + bias`` by ``opweave::w4a16_linear`` or ``opweave::w8a16_linear``, for inference.

    ``x`` is float16 or bfloat16. ``weight``, ``scales`` and ``zeros`` are buffers, as the operator takes them.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        in_features: int,
        bits: int,
        group: int,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group = in_features, weight.shape[0], bits, group
        for name, tensor in (("weight", weight), ("scales", scales), ("zeros", zeros), ("bias", bias)):
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in_features]`` to ``[..., out_features]``, in its dtype."""
        if self.bits == 4:
            out: torch.Tensor = FOUR_BITS(x, self.weight, self.scales, self.zeros, self.bias, self.group)
        else:
            out = EIGHT_BITS(x, self.weight, self.scales, self.bias, self.group)
        return out

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, bits={self.bits}, group={self.group}"


def quantized_linear(module: nn.Linear, bits: int, group: int | None = None, *, symmetric: bool = True) -> nn.Module:
    """A layer with the weight of ``module`` rounded to 4 or 8 ``bits``, to stand in its place.

    ``group`` weights along the input share a scale: 32, 64, 128, ..., or all of them (None). Without ``symmetric``,
    4 bits get a zero point for each group. Weights are rounded to nearest; integers of a better method, such as GPTQ,
    go into `QuantizedLinear` by way of `opweave.kernels._packing.pack_integers`.

    Raises:
        OptionError: ``bits`` is neither 4 nor 8, or 8 bits are to be asymmetric, or there is no such group.
    """
    depth = module.in_features
    size = depth if group is None else group
    if bits not in (4, 8) or (bits == 8 and not symmetric):
        wanted = f"{bits} bits" if symmetric else f"{bits} bits with zero points"
        raise OptionError(f"linear layers have 4 bits, or 8 without zero points; got {wanted}")
    if size < depth and (size < 32 or size & (size - 1)):
        raise OptionError(f"a group has 32, 64, 128, ... weights, or all {depth}; got {size}")
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach().clone()
    packed, scales, zeros = pack(weight, size, symmetric=symmetric) if bits == 4 else (*quantize(weight, size), None)
    return QuantizedLinear(packed, scales, zeros, bias, depth, bits, size)
