"""Files of machines with several devices: what they take from others, and what is refused, with field and value."""

from __future__ import annotations

from pathlib import Path

import pytest

from opweave.cli.inspecting import hw_show
from opweave.errors import MachineError
from opweave.hw_models import EngineKind, HardwareModel, load, op_seconds
from opweave.hw_models.table import collective_table

GOOD = """
name = "mine"
description = "eight devices of my own"
device = "h100-sxm"
sources = ["a measurement"]

[[links]]
name = "network"
bandwidth_bytes_per_s = 50e9
latency_s = 5e-6

[fabric]
devices = 16
devices_per_node = 8

[[fabric.rates]]
kind = "all_reduce"
algorithm = "mine"
link = "nvlink"
ranks = 8
programs = 4
alpha_s = 1e-5
bandwidth_bytes_per_s = 1e11

[[fabric.rates]]
kind = "all_gather"
algorithm = "mine"
link = "network"
ranks = 2
scope = "across_nodes"
measured_bytes = [1000, 2000]
measured_s = [1e-5, 2e-5]

[[interference]]
kernel = "network"
given_up = [0.1, 0.5]
reached = [0.2, 1.0]
"""


def read(folder: Path, text: str, name: str = "mine") -> HardwareModel:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return load(str(path))


def test_a_machine_takes_what_it_leaves_out_from_its_device(tmp_path: Path) -> None:
    machine, device = read(tmp_path, GOOD), load("h100-sxm")
    assert (machine.name, machine.description) == ("mine", "eight devices of my own")
    assert machine.memories == device.memories
    assert machine.engines == device.engines
    assert machine.tiling == device.tiling
    assert [link.name for link in machine.links] == ["nvlink", "network"]
    assert machine.sources == (*device.sources, "a measurement")
    assert machine.fabric is not None
    assert machine.fabric.rates[1].seconds_at(1500) == pytest.approx(1.5e-5)


def test_a_fabric_takes_what_it_leaves_out_from_another(tmp_path: Path) -> None:
    taken = load("8xh200-nvlink").fabric
    assert taken == load("8xh100-nvlink").fabric
    text = GOOD.replace("devices = 16\ndevices_per_node = 8", 'like = "8xh100-nvlink"\ndevices = 16')
    fabric, other = read(tmp_path, text).fabric, load("8xh100-nvlink").fabric
    assert fabric is not None
    assert other is not None
    assert (fabric.devices, fabric.devices_per_node) == (16, 8)
    assert len(fabric.rates) == len(other.rates) + 2


def test_a_device_can_be_a_file(tmp_path: Path) -> None:
    read(tmp_path, GOOD, "base")
    path = tmp_path / "base.toml"
    machine = read(tmp_path, f'name = "b"\ndescription = "d"\ndevice = "{path}"\n', "other")
    assert machine.fabric == load(str(path)).fabric
    assert machine.sources[-1] == "a measurement"


def test_a_circle_of_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(f'name = "a"\ndevice = "{tmp_path}/b.toml"\n', encoding="utf-8")
    (tmp_path / "b.toml").write_text(f'[fabric]\nlike = "{tmp_path}/a.toml"\n', encoding="utf-8")
    with pytest.raises(MachineError, match=r"in a circle: '.*a\.toml' takes from '.*b\.toml' takes from '.*a\.toml'"):
        load(str(tmp_path / "a.toml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('device = "h100-sxm"', "device = 8", "field device is 8, allowed are names of machines"),
        ('device = "h100-sxm"', 'device = "h100-smx"', "no machine is named 'h100-smx'"),
        ('device = "h100-sxm"', 'devise = "h100-sxm"', "field devise is unknown.*did you mean 'device'"),
        ("devices = 16", "like = []\ndevices = 16", r"field fabric\.like is \[\], allowed are names of machines"),
        ("devices = 16", 'like = "a100"\ndevices = 16', "field fabric.like names 'a100', which has no fabric"),
        ("devices = 16", 'lik = "a100"\ndevices = 16', r"fabric\.lik is unknown.*did you mean 'like'"),
        ("[fabric]", "[fabrik]", "field fabrik is unknown.*did you mean 'fabric'"),
        ("devices = 16", "devices = 0", r"field fabric\.devices is 0, allowed are integers above 0"),
        ("devices = 16", "devices = 12", "fabric.devices is 12, allowed are multiples of its devices_per_node, 8"),
        ("devices = 16\ndevices_per_node = 8", "devices = 1\ndevices_per_node = 1", "devices is 1, allowed"),
        ("devices_per_node = 8\n", "", "field fabric.devices_per_node is missing, it takes integers above 0"),
        ('"all_reduce"', '"reduce"', r"field fabric\.rates\[0\]\.kind is 'reduce', allowed are 'all_reduce', 'all_g"),
        ('"across_nodes"', '"everywhere"', r"rates\[1\]\.scope is 'everywhere', allowed are 'within_node', 'acr"),
        ("programs = 4", 'traffic = "mesh"', r"rates\[0\]\.traffic is 'mesh', allowed are 'peers', 'switch'"),
        ("ranks = 8", "ranks = 1", r"fabric\.rates\[0\] \(all_reduce, 'mine'\) has ranks 1, allowed are 2 or more"),
        ("alpha_s = 1e-5", "alpha_s = -1", r"rates\[0\]\.alpha_s is -1, allowed are finite numbers from 0"),
        ("alpha_s = 1e-5", "alpha_s = nan", r"rates\[0\]\.alpha_s is nan"),
        ("alpha_s = 1e-5\nbandwidth_bytes_per_s = 1e11", "alpha_s = 1e-5", "takes either bandwidth_bytes_per_s"),
        ("measured_s = ", "bandwidth_bytes_per_s = 1.0\nmeasured_s = ", "takes either bandwidth_bytes_per_s"),
        ("measured_s = ", "alpha_s = 1.0\nmeasured_s = ", "takes alpha_s beside bandwidth_bytes_per_s only"),
        ("[1e-5, 2e-5]", "[1e-5]", "has 2 measured_bytes and 1 measured_s, allowed are as many of both, 2 or more"),
        ("[1e-5, 2e-5]", "[2e-5, 1e-5]", "has measured_s that do not increase"),
        ("[1000, 2000]", "[1000, 1000]", "has measured_bytes that do not increase"),
        ("[1000, 2000]", "[1000, -1]", r"rates\[1\]\.measured_bytes\[1\] is -1, allowed are integers above 0"),
        ("[1e-5, 2e-5]", "[1e-6, 2e-5]", "first line takes less than no time without bytes"),
        ("alpha_s = 1e-5", "alpha_s = 1e-5\nstep_s = 1e-6", "takes 1e-05 s for a message without bytes, less than"),
        ('link = "nvlink"', 'link = "nvlnk"', "has link 'nvlnk', allowed are its links: network, nvlink"),
        ("programs = 4", "programs = 133", "has programs 133, allowed are up to its tiling's multiprocessors, 132"),
        ("programs = 4", "programs = 4\ncompute_share = 1.5", "has compute_share 1.5, allowed are numbers from 0 to 1"),
        ("programs = 4", "part_bytes_per_s = 1e9", "has part_bytes_per_s, which is that of one program"),
        ("measured_s = ", 'traffic = "switch"\nmeasured_s = ', "has traffic 'switch' across nodes, allowed is 'peers'"),
        ('"all_reduce"', '"all_to_all"\ntraffic = "switch"', "has traffic 'switch', allowed is 'peers'"),
        ("programs = 4", "programs = 4\nprogram = 4", r"rates\[0\]\.program is unknown"),
        ("given_up = [0.1, 0.5]", "given_up = [0.1]", "interference of 'network' has 1 of given_up and 2 of reached"),
        (
            "given_up = [0.1, 0.5]",
            "given_up = [0.5, 0.1]",
            r"has given_up \[0.5, 0.1\], allowed are increasing numbers",
        ),
        (
            "reached = [0.2, 1.0]",
            "reached = [0.2, 1.1]",
            r"has reached \[0.2, 1.1\], allowed are increasing numbers up",
        ),
        (
            'kernel = "network"',
            'kernel = "nccl"',
            r"interference\[0\]\.kernel is 'nccl', allowed are 'network', 'matri",
        ),
        ('kernel = "network"', 'kernel = "matrix_vector"', r"rates\[1\] .* states neither programs nor compute_share"),
        ("given_up = [0.1, 0.5]", "given_up = [0, 0.5]", r"interference\[0\]\.given_up\[0\] is 0, allowed are finite"),
    ],
)
def test_a_bad_file_gets_the_field_the_value_and_what_is_allowed(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in GOOD
    with pytest.raises(MachineError, match=message):
        read(tmp_path, GOOD.replace(old, new, 1))


def test_a_rate_stated_twice_is_refused(tmp_path: Path) -> None:
    begin = GOOD.index("[[fabric.rates]]")
    end = GOOD.index("[[fabric.rates]]", begin + 1)
    with pytest.raises(MachineError, match=r"fabric\.rates\[1\] \(all_reduce, 'mine'\) is stated twice"):
        read(tmp_path, GOOD[:end] + GOOD[begin:])


def test_interference_stated_twice_is_refused(tmp_path: Path) -> None:
    """By the file, or by it and the device that it takes another from."""
    begin = GOOD.index("[[interference]]")
    with pytest.raises(MachineError, match="the interference of 'network' is stated twice"):
        read(tmp_path, GOOD + GOOD[begin:])
    with pytest.raises(MachineError, match="the interference of 'network' is stated twice"):
        read(tmp_path, GOOD.replace("h100-sxm", "8xa100-nvlink"))


def test_programs_need_multiprocessors(tmp_path: Path) -> None:
    text = GOOD.replace('"h100-sxm"', '"tpuv4i-like"').replace('"nvlink"', '"network"')
    with pytest.raises(
        MachineError, match="has programs 4, allowed are up to its tiling's multiprocessors, none"
    ) as raised:
        read(tmp_path, text)
    assert "compute_share" in raised.value.hint
    assert read(tmp_path, text.replace("programs = 4", "programs = 4\ncompute_share = 0.1")).fabric


def test_units_near_memory_read_it_faster_than_others() -> None:
    """A product of a matrix and a vector is bound by memory, 16 times as fast near it; one of two matrices is not."""
    machine = load("npu-pim")
    (near,), (array,) = (machine.engines_of(kind) for kind in (EngineKind.NEAR_MEMORY, EngineKind.COMPUTE))
    vector = [op_seconds(2 << 30, "float16", 2 << 30, 0, machine, engine) for engine in (near, array)]
    assert vector[0] < vector[1] / 10
    matrix = [op_seconds(1 << 43, "float16", 1 << 28, 0, machine, engine) for engine in (near, array)]
    assert matrix[0] > 10 * matrix[1]


def test_units_near_memory_state_rates_and_bandwidth(tmp_path: Path) -> None:
    pim = '[[engines]]\nname = "pim"\nkind = "near_memory"\nflops_per_s = { default = 1e12 }\n'
    rest = '[[engines]]\nname = "c"\nkind = "compute"\nflops_per_s = { default = 1e9 }\n[[engines]]\nname = "d"\n'
    rest += 'kind = "copy"\nbandwidth_bytes_per_s = 1e9\n'
    head = 'name = "p"\ndescription = "d"\ndevice = "edge-npu"\n'
    with pytest.raises(MachineError, match="engine 'pim' states no bandwidth_bytes_per_s"):
        read(tmp_path, head + pim + rest)
    pim += "bandwidth_bytes_per_s = 1e12\n"
    assert len(read(tmp_path, head + pim + rest).engines) == 3
    with pytest.raises(MachineError, match=r"engine 'pim' states no flops_per_s\.default"):
        read(tmp_path, head + pim.replace("flops_per_s = { default = 1e12 }\n", "") + rest)


def test_the_table_shows_times_and_ways(capsys: pytest.CaptureFixture[str]) -> None:
    lines = collective_table(load("2x8xh100-infiniband")).splitlines()
    assert len(lines) == 1 + 5 * 4
    assert [line for line in lines if line.startswith("all_reduce     8 of a node") and "multimem/16" in line]
    assert collective_table(load("h100-sxm")) == ""
    hw_show("8xl20-pcie")
    shown = capsys.readouterr().out
    assert "devices_per_node: 8" in shown
    assert "reduce_scatter 8 of a node" in shown
    hw_show("edge-npu")
    assert "microseconds" not in capsys.readouterr().out
