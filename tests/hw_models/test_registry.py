"""Machines by name and file: what is wrong in a file is named with its value and what is allowed."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opweave import hw_models
from opweave.errors import MachineError, OptionError
from opweave.hw_models.registry import load, parse_bytes

GOOD = """
name = "mine"
description = "two memories"
sources = ["a data sheet"]
scratchpad = "near"
backing = "far"

[[memories]]
name = "near"
capacity_bytes = 65536
alignment_bytes = 16
bandwidth_bytes_per_s = 2e9

[[memories]]
name = "far"
capacity_bytes = 1048576
alignment_bytes = 16
bandwidth_bytes_per_s = 1000000000

[[engines]]
name = "core"
kind = "compute"
flops_per_s = { default = 1e9 }

[[engines]]
name = "dma"
kind = "copy"
bandwidth_bytes_per_s = 1e9
"""


def test_a_machine_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    machine = load(str(path))
    assert machine.name == "mine"
    assert machine.backing_memory.bandwidth_bytes_per_s == 1e9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("65536", "-5", r"field memories\[0\]\.capacity_bytes is -5, allowed are integers above 0"),
        ("65536", "1.5", r"field memories\[0\]\.capacity_bytes is 1\.5, allowed are integers above 0"),
        ("65536", "true", r"field memories\[0\]\.capacity_bytes is True, allowed are integers above 0"),
        ("65536", '"64KiB"', r"field memories\[0\]\.capacity_bytes is '64KiB', allowed are integers above 0"),
        ("1000000000", "0", r"field memories\[1\]\.bandwidth_bytes_per_s is 0, allowed are finite numbers above 0"),
        ("2e9", "inf", r"field memories\[0\]\.bandwidth_bytes_per_s is inf, allowed are finite numbers above 0"),
        ("2e9", "nan", r"field memories\[0\]\.bandwidth_bytes_per_s is nan"),
        ("default = 1e9", "default = 1e9, int8 = 0", r"field engines\[0\]\.flops_per_s\.int8 is 0"),
        ('kind = "copy"', 'kind = "dma"', r"field engines\[1\]\.kind is 'dma', allowed are 'compute', 'copy'"),
        ('kind = "copy"', 'kind = "copy"\nlatency_s = -1', r"latency_s is -1, allowed are finite numbers from 0"),
        ("alignment_bytes", "alignement_bytes", r"memories\[0\]\.alignement_bytes is unknown.*did you mean 'align"),
        ('scratchpad = "near"\n', "", "field scratchpad is missing, it takes strings"),
        ('scratchpad = "near"', "scratchpad = 3", "field scratchpad is 3, allowed are strings"),
        ('["a data sheet"]', '"a data sheet"', "field sources is 'a data sheet', allowed are a list of strings"),
        ("flops_per_s = { default = 1e9 }", "flops_per_s = 1e9", "allowed are a table of finite numbers above 0"),
        (
            'scratchpad = "near"',
            'scratchpad = "middle"',
            "'scratchpad' is 'middle', allowed are its memories: far, near",
        ),
        ('scratchpad = "near"', 'scratchpad = "far"', "name the same memory"),
        ('name = "far"', 'name = "near"', "names a memory twice"),
        ("default", "int8", r"engine 'core' states no flops_per_s\.default"),
        ('kind = "compute"', 'kind = "copy"', "no engine of kind 'compute'"),
        ("[[engines]]", "[engines]", "is not TOML"),
        ('name = "mine"', "name = ", "is not TOML"),
    ],
)
def test_a_bad_file_gets_the_field_the_value_and_what_is_allowed(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "mine.toml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(MachineError, match=message) as raised:
        load(str(path))
    assert "mine.toml" in raised.value.message


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot read machine file"):
        load(str(tmp_path / "absent.toml"))
    with pytest.raises(MachineError, match="cannot read machine file"):
        load(str(tmp_path) + "/")
    with pytest.raises(MachineError, match="cannot read machine file"):
        load("nul\0byte.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(MachineError, match="cannot read machine file"):
        load(str(tmp_path / "binary.toml"))


def test_an_unknown_name_lists_the_names_and_the_nearest() -> None:
    with pytest.raises(MachineError, match=r"there are .*a100, cpu-server, edge-npu") as raised:
        load("edge_npu")
    assert "did you mean 'edge-npu'?" in raised.value.hint
    with pytest.raises(MachineError) as raised:
        load("h100")
    assert "did you mean 'h100-sxm'?" in raised.value.hint
    with pytest.raises(MachineError) as raised:
        load("zzz")
    assert "did you mean" not in raised.value.hint


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1MiB", 1 << 20),
        ("1.5 MiB", 3 << 19),
        (" 640kB ", 640_000),
        ("2 GB", 2_000_000_000),
        ("0.5GiB", 1 << 29),
        ("256kib", 256 << 10),
        ("3MB", 3_000_000),
        ("17B", 17),
        ("4096", 4096),
        ("0", 0),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "1 M", "1,5MiB", "-1MiB", "1e3", "1MiBs", "0x10", "inf", "1.MiB", "\uff11MiB"]
)
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="is not a size"):
        parse_bytes(text)


def test_fractions_of_a_byte_are_dropped() -> None:
    assert parse_bytes("0.3KiB") == 307


@given(st.integers(0, 10**6), st.sampled_from(["B", "kB", "MB", "GB", "KiB", "MiB", "GiB"]))
def test_sizes_scale_with_their_unit(number: int, unit: str) -> None:
    assert Fraction(parse_bytes(f"{number}{unit}")) == number * Fraction(parse_bytes(f"1{unit}"))


def test_the_package_exports_lazily() -> None:
    """Plans import ``hw_models.model``; reading machine files must not come with it."""
    program = "import sys, opweave.hw_models.model; sys.exit('opweave.hw_models.registry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    for name in hw_models.__all__:
        assert getattr(hw_models, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hw_models.nothing
