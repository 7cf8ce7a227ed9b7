"""Banks of a scratchpad: they make up its capacity, and begin where a region may."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import msgspec
import pytest

from opweave.errors import MachineError
from opweave.hw_models import load
from opweave.hw_models.model import HardwareModel, Memory

NPU = load("edge-npu")  # 64-byte alignment


def test_a_memory_without_banks_is_one() -> None:
    assert NPU.scratchpad_memory.banks == ((0, NPU.scratchpad_memory.capacity_bytes),)


def test_banks_follow_one_another() -> None:
    memory = NPU.with_banks(128, 64, 10).scratchpad_memory
    assert memory.capacity_bytes == 202
    assert memory.banks == ((0, 128), (128, 192), (192, 202))


def test_banks_are_read_from_a_file(tmp_path: Path) -> None:
    text = (files("opweave.hw_models") / "data" / "edge-npu.toml").read_text(encoding="utf-8")
    stated = "capacity_bytes = 1_048_576\n"
    assert stated in text
    path = tmp_path / "banked.toml"
    path.write_text(text.replace(stated, f"{stated}banks_bytes = [786_432, 262_144]\n"), encoding="utf-8")
    assert load(str(path)).scratchpad_memory.banks == ((0, 786_432), (786_432, 1_048_576))
    path.write_text(text.replace(stated, f"{stated}banks_bytes = [-1]\n"), encoding="utf-8")
    with pytest.raises(MachineError, match=r"banks_bytes\[0\] is -1, allowed are integers above 0"):
        load(str(path))


def with_memory(**fields: object) -> HardwareModel:
    scratchpad = msgspec.structs.replace(NPU.scratchpad_memory, **fields)
    return msgspec.structs.replace(NPU, memories=(scratchpad, NPU.backing_memory))


def test_banks_sum_to_the_capacity() -> None:
    with pytest.raises(MachineError, match="sum to 192, allowed is its capacity_bytes, 1000"):
        with_memory(capacity_bytes=1000, banks_bytes=(128, 64))


def test_banks_begin_aligned() -> None:
    with pytest.raises(MachineError, match="bank 1 of memory 'sram' begins at byte 100, allowed are multiples"):
        NPU.with_banks(100, 64)


@pytest.mark.parametrize("sizes", [(), (0,), (64, -64, 128)])
def test_banks_have_bytes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(MachineError, match="above 0 each"):
        NPU.with_banks(*sizes)


def test_another_capacity_does_not_say_how_it_is_divided() -> None:
    machine = NPU.with_banks(128, 64)
    assert machine.with_scratchpad(192) == machine
    with pytest.raises(MachineError, match="has banks of 128, 64 bytes") as raised:
        machine.with_scratchpad(256)
    assert "with_banks" in raised.value.hint


def test_a_description_without_banks_does_not_name_them() -> None:
    """Plans and files of machines without banks stay as they were."""
    assert b"banks_bytes" not in msgspec.json.encode(Memory("m", 1, 1, 1.0))
