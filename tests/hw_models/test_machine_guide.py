"""The guide's example is a machine, and the error it shows is the one that comes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opweave.errors import MachineError
from opweave.hw_models import collective_modes, load
from opweave.hw_models.fabric import CollectiveRate, Fabric, Interference
from opweave.hw_models.model import Concurrency, Engine, HardwareModel, Link, Memory, Tiling

GUIDE = Path(__file__).parents[2] / "docs" / "adding-a-machine.md"


def blocks(language: str) -> list[str]:
    """Fenced code blocks of the guide in one language."""
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_loads_and_its_error_is_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, _ = blocks("toml")
    monkeypatch.chdir(tmp_path)
    Path("my-npu.toml").write_text(example, encoding="utf-8")
    assert load("my-npu.toml").name == "my-npu"
    Path("my-npu.toml").write_text(example.replace("1_048_576", "-5"), encoding="utf-8")
    with pytest.raises(MachineError) as raised:
        load("my-npu.toml")
    assert [raised.value.message] == [block.strip() for block in blocks("text")]


def test_the_example_of_several_devices_has_collectives(tmp_path: Path) -> None:
    _, example = blocks("toml")
    path = tmp_path / "4xh100-nvlink.toml"
    path.write_text(example, encoding="utf-8")
    (mode,) = collective_modes("all_reduce", 240 * 10**6, range(4), load(str(path)))
    assert mode.seconds == pytest.approx(1e-3 + 12e-6)
    assert mode.compute_share == 8 / 132


def test_the_guide_names_every_field() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for struct in (HardwareModel, Memory, Engine, Link, Concurrency, Tiling, Fabric, CollectiveRate, Interference):
        for field in struct.__struct_fields__:
            assert field in text, f"{struct.__name__}.{field}"
