"""What scratch holds before a launch makes no difference; `test_interpreted.py` runs this file."""

from __future__ import annotations

import pytest
import torch

from opweave.kernels._configs import Config
from opweave.kernels.linear_cross_entropy import KERNEL
from tests.support.interpreter import correct

SMALL = Config({"block_m": 16, "block_n": 16, "block_k": 16, "group_m": 2})


@pytest.mark.parametrize("target", [21, 22, 2**40, -1, -(2**40)])
def test_a_target_outside_the_vocabulary_is_nan_whatever_scratch_holds(
    target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    correct(monkeypatch)
    inputs = KERNEL.arguments(torch.float32, tokens=5, depth=8, vocabulary=21)
    inputs["target"][:] = torch.tensor([0, target, 20, -100, 3])
    made = dict(zip(KERNEL.written, KERNEL.allocate(*inputs.values()), strict=True))
    for scratch in KERNEL.scratch:
        made[scratch].zero_()
    KERNEL.launch(**inputs, **made, config=SMALL)
    assert made["losses"].isnan().tolist() == [False, True, False, False, False]
    assert made["loss"].isnan()
    assert not made["log_sum_exp"].isnan().any()
