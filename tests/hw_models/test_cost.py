"""The cost model: each roof of the roofline can be the one that binds."""

from __future__ import annotations

import pytest

from opweave.errors import MachineError
from opweave.hw_models import Engine, EngineKind, HardwareModel, Memory, op_seconds, transfer_seconds

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
