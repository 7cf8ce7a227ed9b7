"""Parallel models on real ranks: cut, put in order and run by our executor, they compute what eager mode does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.overlap.rank_programs import MODELS, everything
from tests.support.ranks import spawn

ROUNDING = 1e-12  # of float64, in another order of sums


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_compute_what_eager_mode_does(tmp_path: Path, ranks: int) -> None:
    """Tensor-parallel, sequence-parallel and expert layers, forward and backward; and mistakes are noticed."""
    for compared, controls in spawn(ranks, everything, tmp_path):
        assert set(compared) == {f"{name} {phase}" for name in MODELS for phase in ("forward", "backward")}
        assert max(compared.values()) < ROUNDING, compared
        assert min(controls["weight"], controls["left out"]) > 1e-3
        assert "ranks 0 and 1 would not start the same collectives: number 0" in controls["order"]
        assert "all_reduce.default of float64[1, 8, 64]" in controls["fewer"]
