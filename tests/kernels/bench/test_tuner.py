"""Tuning: which configurations are tried, that wrong and impossible ones are passed over, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import OptionError
from opweave.kernels._configs import Config
from opweave.kernels.bench.problem import Case
from opweave.kernels.bench.tuner import candidates, tune
from tests.kernels.bench.probe import CLOCK, CONFIGS, PROBE

SMALL = Case(PROBE, PROBE.workloads[0], torch.bfloat16)


@pytest.fixture(autouse=True)
def _fresh_clock() -> Iterator[None]:
    yield
    CLOCK.__init__()  # type: ignore[misc]


def shape(config: Config) -> tuple[int, int, int]:
    return config.constants["block"], config.num_warps, config.num_stages


def test_candidates_are_rows_that_hold_for_the_bucket_and_their_neighbours() -> None:
    found = [shape(config) for config in candidates(CONFIGS, 90, {"rows": 60})]
    assert found[:2] == [(32, 2, 2), (64, 4, 1)]
    assert len(found) == len(set(found)) == 3 * 3 + 3 * 2
    assert {config.num_warps for config in candidates(CONFIGS, 90, {"rows": 60})} == {1, 2, 4, 8}
    assert {block for block, _, _ in map(shape, candidates(CONFIGS, 90, {"rows": 65}))} == {64}


def test_the_fastest_is_kept_with_what_it_gained() -> None:
    CLOCK.faster = lambda config: 0.25 if shape(config) == (64, 2, 1) else 1.0
    found = tune(SMALL, CLOCK, 1000.0)
    best = found.best
    assert best is not None
    assert (best.constants, best.num_warps, best.num_stages) == ({"block": 64}, 2, 1)
    assert (best.ms, best.default_ms) == pytest.approx((0.5, 2.0))
    assert (best.kernel, best.fingerprint, best.device, best.dtype) == ("bench_probe", "one", "a probe", "bfloat16")
    assert best.sizes == {"rows": 16}
    assert len(found.rows) == 15
    assert found.rows[0].provider == "block=32 num_warps=2 num_stages=2"


def test_a_result_is_of_the_kernel_whose_rows_are_chosen_from() -> None:
    """As launches look for it: a kernel that calls another's launcher has rows of that."""
    object.__setattr__(PROBE, "name", "another")
    try:
        best = tune(SMALL, CLOCK, 0.0).best
    finally:
        object.__setattr__(PROBE, "name", "bench_probe")
    assert best is not None
    assert best.kernel == "bench_probe"


def test_a_wrong_result_is_never_kept() -> None:
    CLOCK.faster = lambda config: 0.25 if shape(config) == (64, 2, 1) else 1.0
    CLOCK.wrong = lambda config: shape(config) == (64, 2, 1)
    found = tune(SMALL, CLOCK, 1000.0)
    assert found.best is not None
    assert found.best.ms == pytest.approx(2.0)
    (row,) = (row for row in found.rows if row.provider == "block=64 num_warps=2 num_stages=1")
    assert row.value is None
    assert row.note.startswith("wrong by")


def test_what_cannot_be_launched_is_passed_over() -> None:
    CLOCK.faster = lambda config: 1 / config.num_warps
    case = Case(PROBE, PROBE.workloads[1], torch.float32)
    wide = Config({"block": 64}, num_warps=8)
    object.__setattr__(PROBE, "configs", type(CONFIGS)("bench_probe", {90: (wide,)}, "one"))
    try:
        with pytest.raises(OptionError, match="chooses no configuration by dtype"):
            tune(case, CLOCK, 1000.0)
    finally:
        object.__setattr__(PROBE, "configs", CONFIGS)
    found = tune(case, CLOCK, 1000.0)
    assert found.best is not None
    assert found.best.num_warps == 8


def test_a_default_that_is_wrong_keeps_nothing() -> None:
    CLOCK.wrong = lambda config: shape(config) == (32, 2, 2)
    found = tune(SMALL, CLOCK, 1000.0)
    assert found.best is None
    assert found.left_out == ["everything: the default configuration does not run right"]


def test_without_time_the_default_alone_is_timed() -> None:
    found = tune(SMALL, CLOCK, 0.0)
    assert found.left_out == ["14 of 15 configurations"]
    assert found.best is not None
    assert found.best.ms == found.best.default_ms
