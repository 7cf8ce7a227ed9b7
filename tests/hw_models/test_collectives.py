"""Ways of collectives: the formulas by hand, what holds for every machine, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opweave.compiler.graph import CollectiveKind as GraphKind
from opweave.errors import MachineError
from opweave.hw_models import CollectiveKind, CollectiveMode, HardwareModel, collective_modes, collective_seconds, load
from opweave.hw_models import names as machine_names
from opweave.hw_models.fabric import CollectiveRate, Fabric, Scope

MACHINES = {name: load(name) for name in machine_names() if load(name).fabric is not None}
H100, NODES = MACHINES["8xh100-nvlink"], MACHINES["2x8xh100-infiniband"]


def joined(devices: int, per_node: int, *rates: CollectiveRate) -> HardwareModel:
    """Two links and these rates, in the place of what joins H100s."""
    return msgspec.structs.replace(NODES, fabric=Fabric(devices, per_node, rates), interference=())


def rate(kind: str, *, across: bool = False, **fields: object) -> CollectiveRate:
    """A rate of 100 GB/s for four ranks, 10 us and no steps, over NVLink; or across nodes for two, over InfiniBand."""
    usual: dict[str, object] = {
        "kind": kind,
        "algorithm": "a",
        "link": "infiniband" if across else "nvlink",
        "ranks": 2 if across else 4,
        "alpha_s": 1e-5,
        "compute_share": None if "programs" in fields else 0.0,
        "bandwidth_bytes_per_s": 1e11,
        "scope": "across_nodes" if across else "within_node",
    }
    return msgspec.convert(usual | fields, CollectiveRate)


def only(kind: str, nbytes: int, ranks: Sequence[int], machine: HardwareModel) -> CollectiveMode:
    (mode,) = collective_modes(kind, nbytes, ranks, machine)
    return mode


def test_kinds_are_those_of_graphs() -> None:
    """Two definitions, as machines must not import the compiler."""
    assert [kind.value for kind in CollectiveKind] == [kind.value for kind in GraphKind]
    assert collective_modes(GraphKind.ALL_REDUCE, 1 << 20, range(8), H100)


@pytest.mark.parametrize(
    ("kind", "traffic", "eighths"),  # bytes on the wire among 8 by those among 4
    [
        ("all_reduce", "peers", (2 * 7 / 8) / (2 * 3 / 4)),
        ("all_gather", "peers", (7 / 8) / (3 / 4)),
        ("reduce_scatter", "peers", (7 / 8) / (3 / 4)),
        ("all_to_all", "peers", (7 / 8) / (3 / 4)),
        ("broadcast", "peers", 1.0),
        ("all_reduce", "switch", (1 + 1 / 8) / (1 + 1 / 4)),
        ("all_gather", "switch", 1.0),
        ("reduce_scatter", "switch", 1.0),
    ],
)
def test_other_groups_have_other_bytes_on_the_wire_and_other_steps(kind: str, traffic: str, eighths: float) -> None:
    machine = joined(8, 8, rate(kind, traffic=traffic, step_s=1e-6))
    assert only(kind, 10**8, range(4), machine).seconds == pytest.approx(1e-5 + 1e-3)
    steps = 0 if traffic == "switch" else 8 if kind == "all_reduce" else 4
    assert only(kind, 10**8, range(8), machine).seconds == pytest.approx(1e-5 + eighths * 1e-3 + steps * 1e-6)


def test_few_programs_bound_small_groups() -> None:
    """Two programs of 10 GB/s each get through a quarter of the message at 80 GB/s, through a half at 40."""
    machine = joined(8, 8, rate("all_gather", traffic="switch", programs=2, part_bytes_per_s=1e10))
    for ranks, bandwidth in ((8, 100e9), (4, 80e9), (2, 40e9)):
        assert only("all_gather", 10**8, range(ranks), machine).seconds == pytest.approx(1e-5 + 1e8 / bandwidth)


def test_what_a_mode_takes() -> None:
    """Half of the multiprocessors, three bytes in memory for each of the message, 3 in 4 of them on the wire."""
    machine = joined(8, 8, rate("all_gather", programs=66, memory_bytes_per_byte=3))
    mode = only("all_gather", 10**8, range(4), machine)
    assert mode.compute_share == 0.5
    assert mode.memory_share == pytest.approx(3e8 / 1.01e-3 / 3.35e12)
    assert mode.link_shares == pytest.approx({"nvlink": 0.75e8 / 1.01e-3 / 450e9})
    assert (mode.link, mode.algorithm, mode.programs) == ("nvlink", "a", 66)


def test_measurements_lie_on_lines() -> None:
    sizes, times = (1000, 3000, 4000), (1e-3, 3e-3, 4e-3)
    measured = rate("all_gather", alpha_s=0, bandwidth_bytes_per_s=None, measured_bytes=sizes, measured_s=times)
    machine = joined(8, 8, measured)
    found = [only("all_gather", nbytes, range(4), machine).seconds for nbytes in (0, 500, 1000, 2000, 3000, 3500, 5000)]
    assert found == pytest.approx([0, 5e-4, 1e-3, 2e-3, 3e-3, 3.5e-3, 5e-3])


def test_a_ring_over_nodes_waits_for_the_slowest_link() -> None:
    """W is 50 GB/s across (an all-gather of two has half of 100 on the wire) and 75 within."""
    machine = joined(16, 8, rate("all_gather", step_s=1e-6), rate("all_gather", across=True, step_s=5e-6))
    nbytes = 10**9
    one = collective_modes("all_gather", nbytes, (0, 8), machine, algorithms=["a"])[0]
    assert one.seconds == pytest.approx(1e-5 + 1e-2)
    pairs = collective_modes("all_gather", nbytes, (0, 1, 8, 9), machine, algorithms=["a"])[0]
    assert pairs.seconds == pytest.approx(1e-5 + 2e-6 + 0.75 * nbytes / 75e9)  # two ways out, 100 GB/s: more than 75
    uneven = collective_modes("all_gather", nbytes, (0, 1, 8), machine, algorithms=["a"])[0]
    assert uneven.seconds == pytest.approx(1e-5 + 1e-6 + 2 / 3 * nbytes / 50e9)
    assert (pairs.link, set(pairs.link_shares)) == ("infiniband", {"nvlink", "infiniband"})
    assert uneven.link_shares["infiniband"] == pytest.approx(1.0, rel=0.01)
    three = joined(24, 8, rate("all_gather", step_s=1e-6), rate("all_gather", across=True, step_s=5e-6))
    six = collective_modes("all_gather", 0, (0, 1, 8, 9, 16, 17), three, algorithms=["a"])[0]
    assert six.seconds == pytest.approx(1e-5 + 5e-6 + 3e-6)  # one step more across, three within


def test_two_nodes_reduce_in_a_tree() -> None:
    """8 ways of 10 GB/s out of each node, the message once: 1 / 80; a ring would have 15 / 8 of it."""
    slow = rate("all_reduce", across=True, bandwidth_bytes_per_s=1e10)
    machine = joined(16, 8, rate("all_reduce"), slow)
    nbytes = 10**9
    mode = collective_modes("all_reduce", nbytes, range(16), machine, algorithms=["a"])[0]
    assert mode.seconds == pytest.approx(2e-5 + nbytes / 80e9)
    three = joined(24, 8, rate("all_reduce"), slow)
    ring = collective_modes("all_reduce", nbytes, range(24), three, algorithms=["a"])[0]
    assert ring.seconds == pytest.approx(1e-5 + 2 * 23 / 24 * nbytes / 80e9)


def test_levels_are_three_collectives() -> None:
    machine = joined(16, 8, rate("reduce_scatter"), rate("all_gather"), rate("all_reduce", across=True))
    mode = only("all_reduce", 8 * 10**8, range(16), machine)
    whole = 8e8 / 1e11 * (7 / 8) / (3 / 4)
    assert mode.algorithm == "levels_a"
    assert mode.seconds == pytest.approx(3e-5 + 2 * whole + 1e8 / 1e11)
    with pytest.raises(MachineError, match="no rate for all_reduce among 3 ranks on 2 nodes"):
        collective_modes("all_reduce", 1, (0, 1, 8), machine)


def test_pairs_use_both_links_at_a_time() -> None:
    """Of 16 parts, 8 go over the network at 50 GB/s, and 7 over NVLink at 75."""
    machine = joined(16, 8, rate("all_to_all"), rate("all_to_all", across=True))
    mode = only("all_to_all", 16 * 10**8, range(16), machine)
    assert mode.seconds == pytest.approx(1e-5 + 8e8 / 50e9)
    assert mode.link == "infiniband"
    assert mode.link_shares["nvlink"] == pytest.approx(7e8 / mode.seconds / 450e9)
    uneven = only("all_to_all", 9 * 10**8, range(9), machine)  # the ninth has all others across
    assert uneven.seconds == pytest.approx(1e-5 + 8e8 / 50e9)
    fast = joined(16, 8, rate("all_to_all"), rate("all_to_all", across=True, bandwidth_bytes_per_s=1e13))
    local = only("all_to_all", 16 * 10**8, range(16), fast)
    assert local.seconds == pytest.approx(1e-5 + 7e8 / 75e9)
    steps = joined(32, 8, rate("all_to_all"), rate("all_to_all", across=True, step_s=1e-6))
    assert only("all_to_all", 0, range(32), steps).seconds == pytest.approx(1e-5 + 23e-6)  # to 24 others, not one


def test_what_is_fused_is_asked_for() -> None:
    fused = collective_modes("all_reduce", 1 << 26, range(8), H100, fuses="rms_norm")
    assert {mode.algorithm for mode in fused} == {"fused_rms_norm"}
    assert "fused_rms_norm" not in {mode.algorithm for mode in collective_modes("all_reduce", 1 << 26, range(8), H100)}
    with pytest.raises(MachineError, match="no rate for all_gather among 8 ranks on 1 node with 'rms_norm' fused"):
        collective_modes("all_gather", 1 << 26, range(8), H100, fuses="rms_norm")


def test_algorithms_are_chosen() -> None:
    assert {m.algorithm for m in collective_modes("all_reduce", 1, range(8), H100, algorithms=["nccl"])} == {"nccl"}
    with pytest.raises(MachineError, match="no rate for all_reduce among 8 ranks on 1 node by 'gloo'"):
        collective_modes("all_reduce", 1, range(8), H100, algorithms=["gloo"])


def test_one_rank_has_nothing_to_do() -> None:
    (mode,) = collective_modes("all_reduce", 1 << 20, [3], H100)
    assert (mode.seconds, mode.compute_share, mode.link) == (0.0, 0.0, "nvlink")


@pytest.mark.parametrize(
    ("kind", "nbytes", "ranks", "message"),
    [
        ("all_reduce", 1, [0, 8], "has 8 devices; ranks .* from 0 to 7"),
        ("all_reduce", 1, [], "has 8 devices"),
        ("all_reduce", 1, [0, 0], "has 8 devices"),
        ("all_reduce", 1, [-1, 0], "has 8 devices"),
        ("all_reduce", -1, [0, 1], "of -1 bytes was asked for"),
        ("reduce", 1, [0, 1], "no collective is named 'reduce'; there are all_reduce, all_gather"),
    ],
)
def test_what_there_is_not(kind: str, nbytes: int, ranks: list[int], message: str) -> None:
    with pytest.raises(MachineError, match=message):
        collective_modes(kind, nbytes, ranks, H100)


def test_one_device_has_no_collectives() -> None:
    with pytest.raises(MachineError, match="'h100-sxm' is one device: it states no fabric") as raised:
        collective_seconds("all_reduce", 1, [0], load("h100-sxm"))
    assert "8xh100-nvlink" in raised.value.hint


@st.composite
def groups(draw: st.DrawFn) -> tuple[HardwareModel, str, list[int]]:
    """A machine that comes with opweave, a collective and two devices or more."""
    machine = MACHINES[draw(st.sampled_from(sorted(MACHINES)))]
    assert machine.fabric is not None
    devices = machine.fabric.devices
    ranks = draw(st.lists(st.integers(0, devices - 1), min_size=2, max_size=devices, unique=True))
    return machine, draw(st.sampled_from([kind.value for kind in CollectiveKind])), ranks


def stated(machine: HardwareModel, kind: str, ranks: Sequence[int]) -> bool:
    """Whether the machine has a rate for such a group: all have one within nodes wherever they have one across."""
    assert machine.fabric is not None
    scope = "within_node" if len({rank // machine.fabric.devices_per_node for rank in ranks}) == 1 else "across_nodes"
    return any(rate.kind == kind and rate.scope == scope and not rate.fuses for rate in machine.fabric.rates)


@given(groups(), st.integers(0, 1 << 30), st.integers(0, 1 << 30))
def test_more_bytes_take_longer_and_shares_are_parts(
    group: tuple[HardwareModel, str, list[int]], one: int, other: int
) -> None:
    machine, kind, ranks = group
    if not stated(machine, kind, ranks):
        with pytest.raises(MachineError, match="states no rate for"):
            collective_modes(kind, one, ranks, machine)
        return
    small, large = (collective_modes(kind, nbytes, ranks, machine) for nbytes in sorted((one, other)))
    for modes in (small, large):
        assert [mode.seconds for mode in modes] == sorted(mode.seconds for mode in modes)
        assert len({(mode.algorithm, mode.programs, mode.compute_share) for mode in modes}) == len(modes)
    by_name = {(mode.algorithm, mode.programs, mode.compute_share): mode.seconds for mode in small}
    for mode in large:
        assert 0 < by_name[mode.algorithm, mode.programs, mode.compute_share] <= mode.seconds * (1 + 1e-12)
        assert 0 <= mode.compute_share <= 1
        assert 0 <= mode.memory_share <= 1
        assert mode.link in mode.link_shares
        assert set(mode.link_shares) <= {link.name for link in machine.links}
        assert all(0 <= share <= 1 for share in mode.link_shares.values())


@given(groups(), st.integers(0, 1 << 30), st.randoms(use_true_random=False))
def test_who_is_who_in_a_node_does_not_matter(
    group: tuple[HardwareModel, str, list[int]], nbytes: int, random: Random
) -> None:
    """The order in which ranks are named changes nothing."""
    machine, kind, ranks = group
    if stated(machine, kind, ranks):
        shuffled = random.sample(ranks, len(ranks))
        assert collective_modes(kind, nbytes, shuffled, machine) == collective_modes(kind, nbytes, ranks, machine)


@given(
    st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]),
    st.integers(1, 4),
    st.integers(1, 1 << 30),
)
def test_leaving_the_node_is_not_faster(kind: str, half: int, nbytes: int) -> None:
    """As many ranks on one node, by NCCL, which is the same within nodes and across them."""
    inside = collective_modes(kind, nbytes, range(2 * half), NODES, algorithms=["nccl"])[0]
    outside = collective_modes(kind, nbytes, [*range(half), *range(8, 8 + half)], NODES, algorithms=["nccl"])[0]
    assert outside.seconds >= inside.seconds * 0.999


@pytest.mark.parametrize("name", MACHINES)
def test_every_rate_is_reached(name: str) -> None:
    """No rate of a shipped machine is dead: at some size each is the time of a mode among as many ranks."""
    machine = MACHINES[name]
    fabric = machine.fabric
    assert fabric is not None
    for one in fabric.rates:
        step = 1 if one.scope is Scope.WITHIN_NODE else fabric.devices_per_node
        ranks = range(0, one.ranks * step, step)
        times = {
            round(mode.seconds / one.seconds_at(nbytes), 9)
            for nbytes in (1 << 14, 1 << 20, 1 << 25, 1 << 30)
            for mode in collective_modes(one.kind, nbytes, ranks, machine, fuses=one.fuses)
        }
        assert 1.0 in times, one
