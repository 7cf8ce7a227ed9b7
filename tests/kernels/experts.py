"""What tests of kernels for mixtures of experts share: gradients against float64, refusals, sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from opweave.errors import ExecutionError
from opweave.kernels._kernel import Kernel

__all__ = ["SIZES", "check_gradients", "check_refusal", "inputs_for"]

SIZES: Mapping[str, int] = {"tokens": 9, "experts": 4, "top_k": 2, "hidden": 11, "intermediate": 7}


def inputs_for(kernel: Kernel, dtype: torch.dtype = torch.float32, **sizes: Any) -> dict[str, Any]:
    """The kernel's arguments of small sizes."""
    return kernel.arguments(dtype, **{**SIZES, **sizes})


def check_gradients(kernel: Kernel, inputs: Mapping[str, Any], *names: str) -> None:
    """Gradients of the kernel's operator for ``names``, each alone and all, are those of ``eager`` in float64."""
    for wanted in (*[(name,) for name in names], names):
        tight = {n: v.detach().requires_grad_(n in wanted) for n, v in inputs.items() if isinstance(v, torch.Tensor)}
        wide = {
            n: v.detach().double().requires_grad_(n in wanted) if v.is_floating_point() else v for n, v in tight.items()
        }
        out = kernel(*{**inputs, **tight}.values())
        expected = kernel.eager(*{**inputs, **wide}.values())
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
        actual = torch.autograd.grad(out, [tight[name] for name in wanted], weight)
        truth = torch.autograd.grad(expected, [wide[name] for name in wanted], weight.double())
        rtol, atol = (2e-5, 2e-5) if out.dtype == torch.float32 else (2e-2, 6e-2)
        for name, one, other in zip(wanted, actual, truth, strict=True):
            assert one.dtype == inputs[name].dtype, name
            torch.testing.assert_close(one.double(), other, rtol=rtol, atol=atol, msg=f"the gradient of {name}")


def check_refusal(kernel: Kernel, inputs: Mapping[str, Any], changed: Mapping[str, Any], message: str) -> None:
    """Launcher and operator refuse the changed inputs, and so does what allocates."""
    given: Sequence[Any] = [*{**inputs, **changed}.values()]
    outputs = dict(zip(kernel.written, kernel.allocate(*inputs.values()), strict=True))
    for refusing in (lambda: kernel.allocate(*given), lambda: kernel.launch(*given, **outputs), lambda: kernel(*given)):
        with pytest.raises(ExecutionError, match=message):
            refusing()
