"""Programs that Inductor makes for an H100, without one: what is in them, that they compile, and that they compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.compiler.runtime.device.program import Origin, Program
from opweave.kernels.bench.offline import resources
from tests.support.hopper import DEVICE, compile_kernels, h100
from tests.support.hopper_zoo import ZOO
from tests.support.interpreted import run
from tests.support.programs import inference_program, training_programs


@pytest.mark.slow
def test_programs_compute_what_eager_computes_under_any_plan() -> None:
    run(Path(__file__).parent / "interpreted_hopper_programs.py", timeout_s=600)


@pytest.fixture(scope="module", autouse=True)
def _one_h100() -> Iterator[None]:
    with h100():
        yield


@pytest.fixture(scope="module")
def zoo(_one_h100: None) -> Mapping[str, Program]:
    programs = {name: inference_program(case.function, *case.inputs()) for name, case in ZOO.items()}
    for name, case in ZOO.items():
        if case.trains:
            step = training_programs(case.function, *(tensor.requires_grad_() for tensor in case.inputs()))
            programs[f"{name} backward"] = step.backward
    return programs


def test_the_zoo_has_every_kind_of_kernel_and_call(zoo: Mapping[str, Program]) -> None:
    source = "\n".join(program.source for program in zoo.values())
    for kind in ("@triton_heuristics.pointwise(", "@triton_heuristics.reduction(", ".persistent_reduction("):
        assert kind in source
    for feature in ("tl.atomic_add", "online_softmax", "welford", "libdevice.", "*bf16", "Grid2D"):
        assert feature in source
    calls = [call for program in zoo.values() for call in program.calls]
    assert {"aten.mm.out", "aten.addmm.out"} <= {call.target for call in calls}
    assert any(call.makes for call in calls)
    origins = {storage.origin for program in zoo.values() for storage in program.storages.values()}
    assert {Origin.INPUT, Origin.PLANNED, Origin.OUTPUT, Origin.CALL} <= origins


def test_everything_lies_on_the_h100(zoo: Mapping[str, Program]) -> None:
    for program in zoo.values():
        assert {storage.device for storage in program.storages.values()} == {DEVICE}
        assert {kernel.language for kernel in program.kernels.values()} <= {"triton"}


def test_large_reductions_are_split(zoo: Mapping[str, Program]) -> None:
    """Partial results are buffers of the program's, so that the planner places them."""
    program = zoo["reductions"]
    assert len(program.calls) > len(program.outputs)
    assert any(storage.origin is Origin.PLANNED for storage in program.storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ZOO, *(f"{name} backward" for name, case in ZOO.items() if case.trains)])
def test_kernels_compile_for_hopper_without_spills(name: str, zoo: Mapping[str, Program]) -> None:
    """In the configuration that Inductor tries first. 232448 bytes are what one program may have of shared memory."""
    compiled = compile_kernels(zoo[name])
    assert set(compiled) == set(zoo[name].kernels)
    for kernel in compiled.values():
        assert ".target sm_90a" in kernel.asm["ptx"]
        used = resources(kernel)
        assert (used.stack_bytes, used.spills) == (0, 0), used
        assert used.registers * 32 * kernel.metadata.num_warps <= 65536, used
        assert used.shared_bytes <= 232448, used
