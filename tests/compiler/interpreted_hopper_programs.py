"""Programs made for an H100, run on the CPU under the interpreter; `test_hopper_programs.py` runs this file.

The arena has exactly the bytes that the plan says, is full of NaN and guarded; the plan is the backend's own, and then
random legal orders with random places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import msgspec
import pytest
import torch

from opweave.compiler.runtime.device.layout import DevicePlan
from opweave.compiler.runtime.device.program import Origin, Program, Ref
from tests.support.hopper import h100
from tests.support.hopper_zoo import ZOO, Case
from tests.support.interpreter import correct
from tests.support.programs import (
    best_device_plan,
    handed_over,
    inference_program,
    interpreted_executor,
    random_device_plan,
    training_programs,
)

Planner = Callable[[Program], DevicePlan]
PLANNERS: Sequence[Planner] = (best_device_plan, *(partial(random_device_plan, seed=seed) for seed in range(2)))


@pytest.fixture(autouse=True)
def _interpreted_h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    correct(monkeypatch)
    with h100():
        yield


def execute(program: Program, plan: DevicePlan, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Run once, on copies of the inputs, which must not change."""
    copies = [tensor.detach().clone() for tensor in inputs]
    kept = [tensor.clone() for tensor in copies]
    results = list(interpreted_executor(program, plan)(list(copies)))
    given = [program.storage_of(ref).origin is Origin.GIVEN for ref in program.inputs if isinstance(ref, Ref)]
    assert all(
        is_given or torch.equal(copy, original) for is_given, copy, original in zip(given, copies, kept, strict=True)
    )
    return results


def close(actual: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    torch.testing.assert_close(actual, expected.detach(), rtol=case.tolerance, atol=case.tolerance)


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if not case.trains])
def test_inference_equals_eager_under_every_plan(name: str) -> None:
    case = ZOO[name]
    inputs = case.inputs()
    program = inference_program(case.function, *inputs)
    for plan in PLANNERS:
        results = execute(program, plan(program), inputs)
        for actual, expected in zip(results, case.function(*inputs), strict=True):
            close(actual, expected, case)


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.trains])
def test_gradients_equal_eager_under_every_plan(name: str) -> None:
    """Activations are handed over to the backward program, as the backend does."""
    case = ZOO[name]
    inputs = [tensor.requires_grad_() for tensor in case.inputs()]
    programs = training_programs(case.function, *inputs)
    backward = handed_over(programs.backward, programs.activations)
    (loss,) = case.function(*inputs)
    expected = torch.autograd.grad(loss, inputs)
    for plan in PLANNERS:
        result, *saved = execute(programs.forward, plan(programs.forward), inputs)
        gradients = execute(backward, plan(backward), [*saved, torch.ones_like(result)])
        close(result, loss, case)
        for actual, gradient in zip(gradients, expected, strict=True):
            close(actual, gradient, case)


def weighted_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The seam between two blocks of Llama, with the weight that the kernel takes."""
    hidden = x + residual
    return hidden, torch.nn.functional.rms_norm(hidden, (96,), weight[0], 1e-5) * 2


LAUNCHED = {
    "gated_linear": ZOO["swiglu"],
    "linear_epilogue": ZOO["perceptron"],
    "add_rms_norm": Case(weighted_norm, ((8, 96), (8, 96), (1, 96)), torch.bfloat16, 2e-2),
}


@pytest.mark.parametrize("kernel", LAUNCHED)
def test_our_kernels_compute_the_same_in_planned_memory(kernel: str) -> None:
    """Launched by the operators that a compiled graph calls, between Inductor's own kernels, under every plan."""
    case = LAUNCHED[kernel]
    inputs = case.inputs()
    program = inference_program(case.function, *inputs, kernels=kernel)
    assert f"opweave.{kernel}_out.default" in {call.target for call in program.calls}
    for plan in PLANNERS:
        for actual, expected in zip(execute(program, plan(program), inputs), case.function(*inputs), strict=True):
            close(actual, expected, case)


def test_two_living_buffers_in_the_same_bytes_show() -> None:
    """The comparison would notice a plan that is wrong: here the two products that meet in a sum share an address."""
    case = ZOO["branches"]
    inputs = case.inputs()
    program = inference_program(case.function, *inputs)
    good = random_device_plan(program, 0)
    lives = sorted(r for r in _arena(good))
    first, second = next((a, b) for a, b in pairwise(lives) if b[0] < a[1] and a[3] != b[3])
    residences = tuple(
        msgspec.structs.replace(r, offset=first[3]) if r.buffer == second[2] else r for r in good.plan.residences or ()
    )
    bad = replace(good, plan=msgspec.structs.replace(good.plan, residences=residences))
    (right,), (wrong,) = (execute(program, plan, inputs) for plan in (good, bad))
    close(right, case.function(*inputs)[0], case)
    assert not torch.allclose(wrong, right, rtol=1e-2, atol=1e-2)


def _arena(plan: DevicePlan) -> Iterator[tuple[int, int, str, int]]:
    """Begin, end, buffer and offset of what lies in the arena."""
    for residence in plan.plan.residences or ():
        assert residence.offset is not None
        if residence.offset < plan.arena_bytes:
            yield residence.begin, residence.end, residence.buffer, residence.offset


def test_random_plans_differ_and_reuse_bytes() -> None:
    program = inference_program(ZOO["experts"].function, *ZOO["experts"].inputs())
    plans = [random_device_plan(program, seed) for seed in range(4)]
    assert len({plan.plan.order for plan in plans}) == 4
    for plan in plans:
        sizes = {buffer: plan.plan.graph.buffers[buffer].nbytes for _, _, buffer, _ in _arena(plan)}
        assert plan.arena_bytes < sum(sizes.values())
