"""The cost model: each roof of the roofline can be the one that binds."""

from __future__ import annotations

import msgspec
import pytest

from opweave.errors import MachineError
from opweave.hw_models import Engine, EngineKind, HardwareModel, Memory, op_seconds, transfer_seconds
from opweave.hw_models.cost import op_joules, transfer_joules

COMPUTE = Engine("core", EngineKind.COMPUTE, flops_per_s={"default": 1e9, "int8": 4e9}, launch_s=1e-6)
COPY = Engine("dma", EngineKind.COPY, bandwidth_bytes_per_s=1e6, latency_s=1e-3)
MACHINE = HardwareModel(
    name="round",
    description="round figures",
    sources=(),
    scratchpad="near",
    backing="far",
    memories=(Memory("near", 1024, 16, 1e8), Memory("far", 4096, 16, 1e6)),
    engines=(COMPUTE, COPY),
)


@pytest.mark.parametrize(
    ("flops", "dtype", "local_bytes", "streamed_bytes", "seconds"),
    [
        (0, "float32", 0, 0, 1e-6),
        (10**9, "float32", 0, 0, 1 + 1e-6),
        (10**9, "int8", 0, 0, 0.25 + 1e-6),
        (10**9, "int8", 10**8, 0, 1 + 1e-6),
        (10**9, "float32", 10**8, 2 * 10**6, 2 + 1e-6),
    ],
)
def test_the_slowest_of_arithmetic_and_traffic_binds(
    flops: int, dtype: str, local_bytes: int, streamed_bytes: int, seconds: float
) -> None:
    assert op_seconds(flops, dtype, local_bytes, streamed_bytes, MACHINE, COMPUTE) == pytest.approx(seconds)


def test_a_transfer_takes_its_latency_and_its_bytes() -> None:
    assert transfer_seconds(0, COPY) == 1e-3
    assert transfer_seconds(1_000_000, COPY) == pytest.approx(1.001)


def test_engines_do_only_what_they_are_for() -> None:
    with pytest.raises(MachineError, match="'dma' of machine 'round' states no flops_per_s"):
        op_seconds(1, "float32", 1, 0, MACHINE, COPY)
    with pytest.raises(MachineError, match="'core' states no bandwidth_bytes_per_s"):
        transfer_seconds(1, COMPUTE)


def test_energy_adds_up_arithmetic_and_bytes_of_both_memories() -> None:
    near, far = (
        msgspec.structs.replace(m, energy_per_byte_j=e) for m, e in zip(MACHINE.memories, (1, 10), strict=True)
    )
    machine = msgspec.structs.replace(MACHINE, memories=(near, far))
    core = msgspec.structs.replace(COMPUTE, energy_per_flop_j={"default": 0.5, "int8": 0.25})
    assert op_joules(8, "float32", 3, 2, machine, core) == 8 * 0.5 + 3 + 20
    assert op_joules(8, "int8", 3, 2, machine, core) == 8 * 0.25 + 3 + 20
    assert transfer_joules(7, machine) == 7 * 11


def test_a_machine_without_energies_says_which_field_is_missing() -> None:
    with pytest.raises(MachineError, match="engine 'core' of machine 'round' states no energy_per_flop_j"):
        op_joules(1, "float32", 1, 0, MACHINE, COMPUTE)
    with pytest.raises(MachineError, match="memory 'near' of machine 'round' states no energy_per_byte_j"):
        transfer_joules(1, MACHINE)
    lame = msgspec.structs.replace(COMPUTE, energy_per_flop_j={"int8": 1.0})
    with pytest.raises(MachineError, match=r"'core' states no energy_per_flop_j\.default"):
        msgspec.structs.replace(MACHINE, engines=(lame, COPY))
