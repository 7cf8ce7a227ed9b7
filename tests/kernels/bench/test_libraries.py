"""Libraries that are measured beside our kernels: those that run on a CPU compute the same; the others are named."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels import registry
from opweave.kernels._kernel import Workload
from opweave.kernels.bench.interpreted import small_sizes
from opweave.kernels.bench.libraries import LIBRARIES, Library
from opweave.kernels.bench.problem import TOLERANCE, Case, Problem, error_of
from opweave.kernels.bench.providers import _function, providers_of

BY_NAME = {library.name: library for library in LIBRARIES}


def problem(kernel: str, **sizes: Any) -> Problem:
    loaded = registry.load(kernel)
    workload = Workload("small", {**small_sizes(loaded), **sizes})
    return Problem(Case(loaded, workload, torch.bfloat16), torch.device("cpu"))


def check(library: str, asked: Problem) -> None:
    truths, _ = asked.truth()
    found = _function(asked, BY_NAME[library].build(asked)).whole()
    assert error_of(found, truths) <= TOLERANCE[torch.bfloat16]


def test_every_library_is_for_kernels_that_there_are() -> None:
    for library in LIBRARIES:
        assert set(library.kernels) <= set(registry.names()), library.name


def test_a_library_that_is_not_there_says_so() -> None:
    absent = Library("Nothing", "no_such_module", ("add_rms_norm",), BY_NAME["Liger"].build)
    assert absent.missing() == "not installed"
    assert replace(absent, needs="torch.no_such_operator").missing().endswith("has no torch.no_such_operator")
    assert replace(absent, needs="torch.mm").missing() == ""


def test_providers_are_ours_eager_libraries_and_compilers() -> None:
    names = [provider.name for provider in providers_of("grouped_linear")]
    assert names[:4] == ["opweave", "eager", "cuBLAS loop", "torch._grouped_mm"]
    assert names[4:] == ["Inductor", "Inductor max-autotune"]


@pytest.mark.parametrize("kernel", BY_NAME["cuBLAS in the inputs' dtype"].kernels)
def test_dense_weights_are_the_dequantised_ones(kernel: str) -> None:
    check("cuBLAS in the inputs' dtype", problem(kernel, rows=5, depth=256, columns=128))


def test_the_loop_over_experts_is_the_grouped_product() -> None:
    asked = problem("grouped_linear")
    check("cuBLAS loop", asked)
    with torch.enable_grad():
        found = BY_NAME["cuBLAS loop"].build(asked)(*asked.given())
    assert error_of([found], asked.truth()[0]) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("sizes", [{"depth": 256, "columns": 128}, {"depth": 256, "columns": 128, "asymmetric": True}])
def test_the_four_bit_product_of_torch_gets_the_same_weights(
    sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its packing runs on a GPU only, so both of its functions are replaced by what they document."""

    def multiply(x: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
        integers = torch.stack((packed >> 4, packed & 15), -1).flatten(-2).float() - 8
        scale, zero = (part.float().t().repeat_interleave(group, 1) for part in scales.unbind(-1))
        return (x.float() @ (integers * scale + zero).t()).to(x.dtype)

    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda weight, tiles: weight)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", multiply)
    check("torch._weight_int4pack_mm", problem("w4a16_linear", rows=3, **sizes))


def liger(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
    """A module of Liger's with these functions."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, function in functions.items():
        setattr(sys.modules[module], name, function)


def test_liger_s_normalisation_gives_the_sum_second(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(x: Any, residual: Any, weight: Any, epsilon: float, *options: Any) -> Any:
        hidden = x + residual
        return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], weight, epsilon), hidden

    function = types.SimpleNamespace(apply=apply)
    liger(monkeypatch, "liger_kernel.ops.fused_add_rms_norm", LigerFusedAddRMSNormFunction=function)
    check("Liger", problem("add_rms_norm"))


def test_liger_s_rotation_is_of_halves_heads_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(q: torch.Tensor, k: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> Any:
        def rotated(x: torch.Tensor) -> torch.Tensor:
            low, high = x.clone().chunk(2, -1)
            return x.copy_(x * cosine[:, None] + torch.cat((-high, low), -1) * sine[:, None])

        return rotated(q), rotated(k)

    liger(monkeypatch, "liger_kernel.ops.rope", LigerRopeFunction=types.SimpleNamespace(apply=apply))
    asked = problem("rope")
    before = asked.inputs["q"].clone()
    check("Liger", asked)
    assert torch.equal(asked.inputs["q"], before)


def test_liger_s_loss_is_the_first_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(x: Any, weight: Any, target: Any, **options: Any) -> torch.Tensor:
        assert options["softcap"] is None
        logits = torch.nn.functional.linear(x, weight).float()
        return torch.nn.functional.cross_entropy(logits, target, ignore_index=options["ignore_index"])

    liger(monkeypatch, "liger_kernel.transformers.functional", liger_fused_linear_cross_entropy=loss)
    check("Liger", problem("linear_cross_entropy"))


def test_liger_refuses_activations_it_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    liger(monkeypatch, "liger_kernel.ops.geglu", LigerGELUMulFunction=None)
    function = types.SimpleNamespace(apply=lambda gate, up: torch.nn.functional.silu(gate) * up)
    liger(monkeypatch, "liger_kernel.ops.swiglu", LigerSiLUMulFunction=function)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.geglu", types.SimpleNamespace(LigerGELUMulFunction=None))
    check("Liger", problem("gated_linear"))
    with pytest.raises(ExecutionError, match="it has no relu"):
        BY_NAME["Liger"].build(problem("gated_linear", activation="relu"))
