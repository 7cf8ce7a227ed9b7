"""The bench on every kernel without a GPU: its inputs, its truth, and the eager program beside the operator."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.kernels import registry
from opweave.kernels._kernel import Workload
from opweave.kernels.bench.interpreted import small_sizes
from opweave.kernels.bench.problem import FORWARD, TOLERANCE, TRAINING, Case, Problem, error_of, is_trainable
from opweave.kernels.bench.providers import _function
from tests.kernels.test_kernels import NAMES

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_eager_and_the_operator_are_close_to_the_truth(name: str, mode: str, dtype: torch.dtype) -> None:
    """On a CPU the operator computes the reference, and its gradients the references of the kernels for them."""
    kernel = registry.load(name)
    if dtype not in kernel.dtypes or (mode == TRAINING and not is_trainable(kernel)):
        pytest.skip("the kernel has no such case")
    problem = Problem(Case(kernel, Workload("small", small_sizes(kernel)), dtype, mode), CPU)
    truths, digits = problem.truth()
    assert digits in ("float32", "float64"), "the reference computes in its inputs' dtype only"
    assert len(truths) == len(kernel.results) + len(problem.trained)
    assert error_of(_function(problem, kernel.operator).whole(), truths) <= TOLERANCE[dtype]
    if not problem.is_random:
        assert error_of(_function(problem, kernel.eager).whole(), truths) <= TOLERANCE[dtype]
    if mode == TRAINING:
        assert problem.trained
