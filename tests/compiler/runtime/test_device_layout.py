"""What a device plan says about memory: when each storage apart is allocated, and how many bytes are at each step."""

from __future__ import annotations

from opweave.compiler.graph import Graph, Op, Tensor
from opweave.compiler.plan import Plan, Residence
from opweave.compiler.runtime.device.layout import Allocation, DevicePlan, allocated_bytes, live_bytes
from opweave.hw_models.registry import load


def example() -> DevicePlan:
    """Four steps: ``a`` in the arena, ``guest`` in the output's memory before the output is there, ``own`` alone."""
    tensors = tuple(
        Tensor(name, (size,), "uint8") for name, size in (("a", 512), ("guest", 600), ("own", 100), ("y", 2048))
    )
    ops = (
        Op("0", (), ("a",)),
        Op("1", ("a",), ("guest",)),
        Op("2", ("guest",), ("own",)),
        Op("3", ("own",), ("y",)),
    )
    machine = load("h100-sxm")
    residences = (
        Residence("a", machine.scratchpad, 0, 2, 0),
        Residence("guest", machine.scratchpad, 1, 3, 512 + 1024),
        Residence("own", machine.scratchpad, 2, 4, 512 + 2048),
        Residence("y", machine.scratchpad, 3, 4, 512),
    )
    plan = Plan.of_order(Graph("example", tensors, ops, ()), machine)
    return DevicePlan(
        Plan(plan.graph, machine, plan.instructions, residences), arena_bytes=512, apart={"y": 512, "own": 2560}
    )


def test_a_host_is_allocated_while_anything_lies_in_it() -> None:
    assert example().allocations == {"y": Allocation(2048, 1, 4), "own": Allocation(512, 2, 4)}


def test_bytes_at_each_step_are_aligned_and_include_the_arena_throughout() -> None:
    assert allocated_bytes(example()) == (512, 2560, 3072, 3072)
    assert live_bytes(example().plan) == (512, 1536, 1536, 2560)


def test_nothing_apart_leaves_the_arena() -> None:
    plan = Plan.of_order(Graph("empty", (), (), ()), load("h100-sxm"))
    assert allocated_bytes(DevicePlan(plan, arena_bytes=512)) == ()
    assert DevicePlan(plan, arena_bytes=512).allocations == {}
