"""Every model of the zoo through the backend: results as in eager mode, in tier T1, in no more memory than before."""

from __future__ import annotations

import copy
import importlib.util

import pytest
from benchmarks.numerics import compare, result, result64
from benchmarks.zoo import MODELS, ZooModel

from opweave import torch_backend
from tests.compiler.frontend.dynamo.contract import compiled, reports

#: Compiled in every run: attention, and branches whose order has slack. The others have more kernels, each of which
#: takes seconds to compile where Inductor's cache is empty.
QUICK = {("gpt2", False), ("inception", False)}

#: Judged in float64. In float32, eager and compiled code round one activation of this model to either side of where
#: ReLU6 clips, and a gradient jumps by 2.6e-2 (as far with stock Inductor, to the bit); in float64 it agrees to 2e-13.
DOUBLE = {("mobilenet_v2", True)}


def _cases() -> list[object]:
    cases: list[object] = []
    for name, entry in MODELS.items():
        missing = bool(entry.requires) and importlib.util.find_spec(entry.requires) is None
        for train in (False, True) if entry.trains else (False,):
            marks = [pytest.mark.skipif(missing, reason=f"{entry.requires} is not installed")]
            if (name, train) not in QUICK:
                marks.append(pytest.mark.slow)
            cases.append(pytest.param(entry, train, id=f"{name}-{'training' if train else 'inference'}", marks=marks))
    return cases


@pytest.mark.parametrize(("entry", "train"), _cases())
def test_a_model_computes_what_eager_mode_does(entry: ZooModel, train: bool) -> None:
    """Twice, because a program's memory is used again; the second call is not compiled again."""
    model, inputs, loss = entry.build(train=train), entry.inputs(), entry.loss if train else None
    if (entry.name, train) in DOUBLE:
        model, inputs = model.double(), tuple(each.double() for each in inputs)
    twin, function = copy.deepcopy(model), compiled(model)
    for _ in range(2):
        reference64 = result64(twin, inputs, loss)
        found, expected = result(model, inputs, loss, call=function), result(twin, inputs, loss)
        verdict = compare(found, expected, reference64, kinks=entry.kinks)
        assert verdict.equal, verdict.reason
    phases = [report.phase for report in reports()]
    assert phases == (["forward", "backward"] if train else ["inference"])
    assert torch_backend.fallback_counts() == {}
    for report in reports():
        assert report.tier == "T1"
        assert 0 < report.bound_bytes <= report.peak_bytes <= report.allocated_bytes <= report.peak_before_bytes
