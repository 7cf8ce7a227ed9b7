"""What ``torch.compile`` accepts from users of the backend, and what it tells them otherwise."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from opweave import torch_backend
from opweave.compiler.frontend.dynamo.fallbacks import OpweaveFallbackWarning
from opweave.compiler.frontend.dynamo.options import MODES, BackendOptions
from opweave.errors import ExecutionError, OptionError
from tests.compiler.frontend.dynamo.contract import compiled, reports, same, tiers

X = torch.linspace(-1, 1, 12)


def _function(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def _branching(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
    return result


def test_it_is_found_by_name() -> None:
    """Without importing us; torch lists it."""
    code = "import sys, torch; assert 'opweave' in torch._dynamo.list_backends(); assert 'opweave' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"memory_limt": 1}, "no option 'memory_limt'"),
        ({"strict": 1}, "'strict' of backend 'opweave' is 1; it takes True or False"),
        ({"streams": 1.5}, "'streams'.*a number of streams"),
        ({"streams": True}, "'streams'.*a number of streams"),
        ({"streams": 0}, "'streams'.*1 or more"),
        ({"tier": "T9"}, "'tier'.*one of 'auto', 'T0', 'T1'"),
        ({"tier": 1}, "'tier'.*one of 'auto', 'T0', 'T1'"),
        ({"time_limit": "1"}, "'time_limit'.*seconds"),
        ({"time_limit": -1.0}, "'time_limit'.*seconds"),
        ({"deterministic": "yes"}, "'deterministic'.*True or False"),
        ({"cuda_graph": None}, "'cuda_graph'.*True or False"),
        ({"cache": 0}, "'cache'.*True or False"),
        ({"mode": "fast"}, "'mode'.*one of 'default'"),
        ({"memory_limit": []}, "'memory_limit'.*8GiB"),
        ({"memory_limit": "8 apples"}, "apples"),
        ({"memory_limit": 0}, "'memory_limit'.*8GiB"),
        ({"memory_limit": 1.5}, "'memory_limit'.*8GiB"),
        ({"memory_limit": float("nan")}, "'memory_limit'.*8GiB"),
        ({"memory_limit": float("inf")}, "'memory_limit'.*8GiB"),
        ({"memory_limit": "50%"}, "'memory_limit' of backend 'opweave' is '50%'"),
        ({"time_limit": float("nan")}, "'time_limit'.*seconds"),
        ({"device": 3}, "'device'.*such as 'cuda'"),
        ({"device": "toaster"}, "'device'.*such as 'cuda'"),
        ("memory_limit", "options of backend 'opweave' is 'memory_limit'; it takes a dictionary"),
        ({"machine": 3}, "'machine'.*opweave hw"),
    ],
)
def test_wrong_options(options: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        BackendOptions.of(options)
    with pytest.raises(BackendCompilerFailed, match=told) as failed:
        torch.compile(_function, backend="opweave", options=options)(X)
    assert isinstance(failed.value.inner_exception, OptionError)


def test_an_unknown_option_is_told_the_valid_ones() -> None:
    with pytest.raises(OptionError, match="its options are cache, cuda_graph, deterministic, device, kernels, machine"):
        BackendOptions.of({"max_autotune": True})


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    """Each of torch.compile's own; on a CPU they differ in nothing that can be seen."""
    same(torch.compile(_function, backend="opweave", mode=mode)(X), _function(X))
    assert tiers() == {"T1"}


def test_mode_and_options_together_are_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="Either mode or options"):
        torch.compile(_function, backend="opweave", mode="default", options={"cache": False})


def test_an_unknown_mode() -> None:
    with pytest.raises(BackendCompilerFailed, match="'mode' of backend 'opweave' is 'fast'"):
        torch.compile(_function, backend="opweave", mode="fast")(X)


def test_strict_turns_a_fallback_into_an_error() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"stock Inductor.*\n?.*strict") as failed:
        compiled(_branching, strict=True)(X)
    assert isinstance(failed.value.inner_exception, ExecutionError)
    same(compiled(_function, strict=True)(X), _function(X))


def test_tier_0_is_stock_inductor() -> None:
    """By request it is no fallback."""
    x = X.clone().requires_grad_()
    y = compiled(_function, tier="T0", strict=True)(x)
    y.sum().backward()
    same(y.detach(), _function(X))
    same(x.grad, X.cos())
    assert [(report.phase, report.tier) for report in reports()] == [("forward", "T0"), ("backward", "T0")]
    assert torch_backend.fallback_counts() == {}


def test_fallbacks_are_counted_and_warned_of_once() -> None:
    """The same reason in two graphs."""
    function = compiled(_branching)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(X)
        torch._dynamo.reset()
        function(X)
    assert [warning.category for warning in caught] == [OpweaveFallbackWarning]
    assert sum(torch_backend.fallback_counts().values()) == 2
    assert [report.tier for report in reports()] == ["T0", "T0"]


def test_reports_and_reset() -> None:
    compiled(lambda x: (x @ x.t()).sin())(X.reshape(3, 4))
    (report,) = reports()
    assert report.phase == "inference"
    assert report.tier == "T1"
    assert report.device == "cpu"
    assert report.fallbacks == ()
    assert report.kernels
    assert report.operators
    assert not report.from_cache
    assert report.allocated_bytes >= X.nbytes
    assert report.held_bytes == X.nbytes
    assert report.bound_bytes <= report.peak_bytes <= report.peak_before_bytes
    torch_backend.reset()
    assert reports() == ()


def test_an_unknown_machine_is_told_the_known_ones() -> None:
    with pytest.raises(BackendCompilerFailed, match="abacus"):
        compiled(_function, machine="abacus")(X)
