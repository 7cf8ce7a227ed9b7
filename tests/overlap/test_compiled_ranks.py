"""``torch.compile(model, backend="opweave", options={"overlap": ...})`` on processes that talk by gloo."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.overlap.compiled_programs import compiled
from tests.overlap.rank_programs import MODELS, SIZES
from tests.support.ranks import spawn

ROUNDING = 1e-12  # of float64, in another order of sums


@pytest.mark.slow
def test_compiled_models_compute_what_eager_mode_does(tmp_path: Path) -> None:
    """Inference, and both halves of a training step, cut into the parts that were asked for; on two ranks."""
    for found in spawn(2, compiled, tmp_path, list(MODELS)):
        for name in MODELS:
            assert max(found[f"{name} {phase}"] for phase in ("inference", "forward", "backward")) < ROUNDING
            phases = [("inference", "T0", SIZES[name]), ("forward", "T0", SIZES[name]), ("backward", "T0", SIZES[name])]
            assert found[f"{name} sizes"] == phases
