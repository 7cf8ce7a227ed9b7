"""Every machine that comes with opweave keeps the promises of its format."""

from __future__ import annotations

from importlib.resources import files

import msgspec
import pytest

from opweave.compiler.graph import DTYPE_BYTES
from opweave.hw_models import EngineKind, HardwareModel, load, names

EXPECTED = (
    "2x8xh100-infiniband",
    "8x4x2080ti-infiniband",
    "8xa100-nvlink",
    "8xh100-nvlink",
    "8xh200-nvlink",
    "8xl20-pcie",
    "a100",
    "cpu-server",
    "edge-npu",
    "ethos-u65-like",
    "h100-sxm",
    "h200",
    "microcontroller",
    "npu-pim",
    "t3-80cu",
    "tpuv4i-like",
)


def test_the_promised_machines_are_there() -> None:
    assert names() == EXPECTED


@pytest.mark.parametrize("name", names())
def test_a_machine_is_what_its_file_is_called_and_cites_sources(name: str) -> None:
    machine = load(name)
    assert machine.name == name
    assert machine.description.strip()
    assert machine.sources
    assert all(len(source) > 20 for source in machine.sources)


@pytest.mark.parametrize("name", names())
def test_a_machine_says_where_it_assumes(name: str) -> None:
    """No figure without a source: launch and transfer latencies are in no data sheet, so each file has assumptions."""
    text = (files("opweave.hw_models") / "data" / f"{name}.toml").read_text(encoding="utf-8")
    assert "# assumed" in text
    assert "assumed" in load(name).description


@pytest.mark.parametrize("name", names())
def test_bandwidths_fall_with_the_distance(name: str) -> None:
    """Scratchpad at least as fast as backing memory, and no copy engine faster than either."""
    machine = load(name)
    near, far = machine.scratchpad_memory.bandwidth_bytes_per_s, machine.backing_memory.bandwidth_bytes_per_s
    assert near >= far
    for engine in machine.engines_of(EngineKind.COPY):
        assert engine.bandwidth_bytes_per_s is not None
        assert engine.bandwidth_bytes_per_s <= far


@pytest.mark.parametrize("name", names())
def test_units_are_in_their_usual_range(name: str) -> None:
    """A factor of a thousand between two units would show here: no figure is outside what any such machine has."""
    machine = load(name)
    assert 1 << 16 <= machine.scratchpad_memory.capacity_bytes < machine.backing_memory.capacity_bytes < 1 << 40
    for memory in machine.memories:
        assert memory.alignment_bytes.bit_count() == 1
        assert memory.alignment_bytes <= 4096
        assert memory.capacity_bytes % memory.alignment_bytes == 0
        assert 1e8 <= memory.bandwidth_bytes_per_s <= 1e13
    for engine in machine.engines:
        assert set(engine.flops_per_s) <= {"default", *DTYPE_BYTES}
        assert all(1e8 <= rate <= 1e16 for rate in engine.flops_per_s.values())
        assert 0 <= engine.launch_s <= 1e-4
        assert 0 <= engine.latency_s <= 1e-4
    for link in machine.links:
        assert 1e8 <= link.bandwidth_bytes_per_s <= 1e12
        assert 0 < link.latency_s <= 1e-4


@pytest.mark.parametrize("name", names())
def test_narrower_types_are_not_slower(name: str) -> None:
    (engine,) = load(name).engines_of(EngineKind.COMPUTE)
    rates = engine.flops_per_s
    ordered = [rates.get(dtype, rates["default"]) for dtype in ("float32", "bfloat16", "int8")]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize("name", names())
def test_a_machine_survives_a_round_trip(name: str) -> None:
    machine = load(name)
    assert msgspec.json.decode(msgspec.json.encode(machine), type=HardwareModel) == machine
    assert msgspec.convert(msgspec.to_builtins(machine), HardwareModel) == machine


def test_the_edge_npu_takes_the_scratchpads_it_promises() -> None:
    for kib in (256, 1024, 8192):
        assert load("edge-npu").with_scratchpad(kib * 1024).scratchpad_memory.capacity_bytes == kib * 1024
    assert load("edge-npu").scratchpad_memory.capacity_bytes == 1 << 20
    assert load("microcontroller").scratchpad_memory.capacity_bytes == 512 << 10
    assert load("tpuv4i-like").scratchpad_memory.capacity_bytes == 128 << 20
