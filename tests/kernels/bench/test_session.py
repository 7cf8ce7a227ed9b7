"""Cases, their budget, and how providers are judged and timed: on a CPU, with a clock that does as it is told."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import OptionError
from opweave.kernels.bench.budget import Budget
from opweave.kernels.bench.figures import lines_of
from opweave.kernels.bench.measuring import quantiles
from opweave.kernels.bench.problem import Case, Problem, cases, dtype_called, error_of
from opweave.kernels.bench.roofline import machine_of, roofline_of
from opweave.kernels.bench.session import Result, calibration_rows, measure
from tests.kernels.bench.probe import CLOCK, MEASURED, PROBE, STATED, probe_providers


@pytest.fixture(autouse=True)
def _fresh_clock() -> Iterator[None]:
    yield
    CLOCK.__init__()  # type: ignore[misc]


def measured(seconds: float = 1000.0, mode: str = "forward", tiers: int = 2) -> list[Result]:
    found = cases([PROBE], modes=(mode,))
    budget = Budget(seconds, CLOCK.now)
    return list(measure(found, CLOCK, budget, STATED, MEASURED, probe_providers, tiers=tiers))


def test_first_workloads_of_all_kernels_come_first() -> None:
    other = object.__new__(type(PROBE))
    other.__dict__.update(vars(PROBE), name="another")
    names = [case.name for case in cases([PROBE, other], modes=("forward",))]
    assert names == [
        *("bench_probe/small/bfloat16/forward", "another/small/bfloat16/forward"),
        *("bench_probe/large, of a model/bfloat16/forward", "another/large, of a model/bfloat16/forward"),
    ]


def test_cases_are_chosen_by_dtype_mode_and_words() -> None:
    every = (torch.bfloat16, torch.float16, torch.float32)
    assert len(cases([PROBE], every)) == 2 * 2 * 2  # no float16, but a backward pass
    assert [c.mode for c in cases([PROBE], first_only=True)] == ["forward", "backward"]
    assert {c.workload.name for c in cases([PROBE], wanted=["probe*large", "nothing"])} == {"large, of a model"}
    assert not cases([PROBE], wanted=["nothing"])
    assert dtype_called("bf16") is torch.bfloat16
    with pytest.raises(OptionError, match="--dtype is 'int8'"):
        dtype_called("int8")


def test_every_provider_is_judged_and_timed() -> None:
    small, large = measured()
    assert not small.left_out
    assert not large.left_out
    lines = {line.provider: line for line in lines_of(small.rows)}
    assert list(lines) == [
        *("missing", "failing", "opweave", "eager", "wrong", "compiler", "searching compiler"),
    ]
    assert lines["missing"].note == "not installed"
    assert lines["failing"].note == "failed: NotImplementedError: no such thing"
    assert lines["failing"]["ms"] is None
    assert lines["opweave"]["ms"] == pytest.approx(2.0)
    assert lines["eager"]["ms"] == pytest.approx(6.0)
    assert lines["eager"]["time_over_ours"] == pytest.approx(3.0)
    assert lines["opweave"]["max_error"] == pytest.approx(0, abs=2**-8)
    assert lines["wrong"]["max_error"] == pytest.approx(1.0, rel=0.1)
    assert "DIFFERS from the reference in float32" in lines["wrong"].note
    assert lines["opweave"]["peak_bytes"] == 16 * 8 * 2


def test_shares_of_the_roofline_follow_from_the_cost() -> None:
    line = next(line for line in lines_of(measured()[1].rows) if line.provider == "opweave")
    nbytes, ms = 3 * 1000 * 8 * 4, 2.0
    assert line["gb_per_s"] == pytest.approx(nbytes / ms / 1e6)
    assert line["tflop_per_s"] is None
    assert line.least_ms == pytest.approx(1e3 * nbytes / STATED.bytes_per_s)
    assert line["percent_of_roofline"] == pytest.approx(100 * nbytes / STATED.bytes_per_s / 2e-3)
    assert line["percent_of_measured"] == pytest.approx(100 * nbytes / MEASURED.bytes_per_s / 2e-3)


def test_arithmetic_bound_cases_are_told_in_flops() -> None:
    found = cases([PROBE], (torch.float32,), ("forward",))
    heavy = replace(STATED, bytes_per_s=1e15)
    results = list(measure(found, CLOCK, Budget(1e3, CLOCK.now), heavy, heavy, probe_providers))
    line = next(line for line in lines_of(results[0].rows) if line.provider == "opweave")
    assert line["gb_per_s"] is None
    assert line["tflop_per_s"] == pytest.approx(2 * 16 * 8 / 2e-3 / 1e12)


def test_the_backward_pass_is_compared_and_timed_without_a_roofline() -> None:
    lines = {line.provider: line for line in lines_of(measured(mode="backward")[0].rows)}
    assert lines["opweave"]["max_error"] == pytest.approx(0, abs=2**-7)
    assert lines["eager"]["max_error"] == pytest.approx(0, abs=2**-7)
    assert lines["opweave"]["percent_of_roofline"] is None
    assert lines["eager"]["ms"] == pytest.approx(6.0)


def test_gradients_are_taken_of_what_has_them() -> None:
    problem = Problem(Case(PROBE, PROBE.workloads[0], torch.float32, "backward"), torch.device("cpu"))
    assert problem.trained == ("x", "y")
    truths, digits = problem.truth()
    assert digits == "float64"
    assert [truth.shape for truth in truths] == [(16, 8)] * 3
    torch.testing.assert_close(truths[1], truths[2] * 0.5)


def test_time_is_kept_for_what_matters_more() -> None:
    """Both cases get ours and eager; the compiler, ten seconds each, only where it fits; its search in neither."""
    first, second = measured(seconds=13.0)
    assert first.left_out == ["searching compiler"]
    assert second.left_out == ["compiler", "searching compiler"]
    assert {"opweave", "eager"} <= {line.provider for line in lines_of(second.rows) if line["ms"]}


def test_what_there_is_no_time_for_is_said() -> None:
    assert [result.left_out for result in measured(seconds=0.0)] == [["everything"]] * 2
    assert all("compiler" not in {r.provider for r in result.rows} for result in measured(tiers=0))


def test_a_case_that_cannot_be_set_up_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*arguments: object, **sizes: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")

    monkeypatch.setitem(PROBE.__dict__, "arguments", too_large)
    results = measured()
    assert [r.note for result in results for r in result.rows] == [
        "failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 TiB"
    ] * 2


def test_budget_learns_what_tiers_take() -> None:
    now = [0.0]
    budget = Budget(100.0, lambda: now[0])
    assert budget.affords(2, 0)
    assert not budget.affords(2, 20)
    for _ in range(20):
        budget.spent(0, 1.0)
        budget.spent(1, 1.0)
    assert budget.expected_s(1) == pytest.approx((4 * 4.0 + 20) / 24)
    assert budget.affords(2, 20)
    now[0] = 95.0
    assert budget.affords(0, 20)
    assert not budget.affords(1, 20)
    assert budget.share_s(4) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("result", "truth", "error"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([math.nan, 2.0], [1.0, 4.0], math.inf),
        ([math.nan, math.inf], [math.nan, math.inf], 0.0),
        ([-math.inf, 1.0], [math.inf, 1.0], math.inf),
        ([], [], 0.0),
        ([0.0], [0.0, 0.0], math.inf),
        ([0.25], [0.0], 0.25),
    ],
)
def test_errors_are_relative_to_the_largest(result: list[float], truth: list[float], error: float) -> None:
    assert error_of([torch.tensor(result)], [torch.tensor(truth)]) == error


def test_errors_of_integers_and_of_missing_results() -> None:
    assert error_of([torch.tensor([1, 2])], [torch.tensor([1, 4])]) == 0.5
    assert error_of([], [torch.zeros(1)]) == math.inf
    assert error_of([None, torch.ones(1)], [torch.zeros(1), torch.ones(1)]) == 0.0


def test_values_of_eight_bits_may_be_one_step_off() -> None:
    truth = torch.tensor([100, -3], dtype=torch.int8)
    assert error_of([torch.tensor([99, -3], dtype=torch.int8)], [truth]) == 0.0
    assert error_of([torch.tensor([98, -3], dtype=torch.int8)], [truth]) == 0.01
    narrow = torch.tensor([448.0, 1.0]).to(torch.float8_e4m3fn)
    assert error_of([torch.tensor([416.0, 1.0]).to(torch.float8_e4m3fn)], [narrow]) == 0.0
    assert error_of([torch.tensor([384.0, 1.0]).to(torch.float8_e4m3fn)], [narrow]) == 32 / 448
    assert error_of([torch.tensor([True])], [torch.tensor([False])]) == 1.0


def test_quantiles() -> None:
    found = quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (found.p20, found.p50, found.p80) == pytest.approx((2.0, 3.5, 5.0))


@pytest.mark.parametrize(
    ("device", "machine"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_are_known_by_cuda_s_name(device: str, machine: str | None) -> None:
    found = machine_of(device)
    assert (found and found.name) == machine
    if found is not None:
        assert roofline_of(found).bytes_per_s == found.scratchpad_memory.bandwidth_bytes_per_s


def test_calibration_is_told_beside_the_data_sheet() -> None:
    copy, product = calibration_rows(STATED, MEASURED)
    assert (copy.value, copy.bound, copy.unit) == (2.0, 4.0, "GB/s")
    assert (product.provider, product.value, product.bound) == ("matrix product, bfloat16", 4e-3, 8e-3)
