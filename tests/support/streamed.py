"""Random programs of small ATen calls, planned for several streams, and plans with their steps in another order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

import msgspec
import torch

from opweave.compiler.graph import OpKind
from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Instruction, Load, Plan, Recompute, Run, Store
from opweave.compiler.runtime.device.graph import planning_graph
from opweave.compiler.runtime.device.layout import DevicePlan
from opweave.compiler.runtime.device.order import synchronisation
from opweave.compiler.runtime.device.program import Call, Origin, Program, Ref, Storage, View
from opweave.hw_models.model import EngineKind
from opweave.hw_models.registry import load
from opweave.passes.device.planner import plan_for_device

__all__ = [
    "ELEMENTS",
    "example_inputs",
    "made_by_calls",
    "on_streams",
    "planned",
    "random_linear_extension",
    "random_program",
    "reordered",
]

ELEMENTS = 16  # of each tensor; storages are longer, by different lengths
_CPU = torch.device("cpu")


class _Writer:
    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.storages: dict[str, Storage] = {}
        self.views: dict[str, View] = {}
        self.calls: list[Call] = []

    def storage(self, name: str, origin: Origin, length: int = 0) -> None:
        length = length or self.draw.choice((ELEMENTS, 150, 300, 700))
        self.storages[name] = Storage(name, 4 * length, torch.float32, _CPU, origin)
        self.views[name] = View(name, name, (length,), (1,), 0, torch.float32)
        self.views[f"{name}_head"] = View(f"{name}_head", name, (ELEMENTS,), (1,), 0, torch.float32)

    def known(self) -> str:
        """A storage that holds something, late ones more likely."""
        names = list(self.storages)
        return names[max(self.draw.randrange(len(names)), self.draw.randrange(len(names)))]

    def combine(self, number: int, origin: Origin) -> None:
        """A call that writes a storage of its own."""
        first, second, name = self.known(), self.known(), f"s{number}"
        args = Ref(f"{first}_head"), Ref(f"{second}_head")
        reads = tuple(dict.fromkeys((first, second)))
        effect = self.draw.random() < 0.1
        if origin is Origin.CALL:
            self.storage(name, origin, ELEMENTS)
            self._call("aten.mul.Tensor", args, {}, reads, (name,), makes=((name, ()),), effect=effect)
        else:
            self.storage(name, origin)
            self._call("aten.add.out", args, {"out": Ref(f"{name}_head")}, reads, (name,), effect=effect)

    def update(self) -> None:
        """A call that writes a storage again."""
        target, source = self.known(), self.known()
        reads = tuple(dict.fromkeys((target, source)))
        self._call("aten.sub_.Tensor", (Ref(f"{target}_head"), Ref(f"{source}_head")), {}, reads, (target,))

    def _call(
        self,
        target: str,
        args: tuple[Ref, ...],
        kwargs: dict[str, Ref],
        reads: tuple[str, ...],
        writes: tuple[str, ...],
        makes: tuple[tuple[str, tuple[int, ...]], ...] = (),
        effect: bool = False,
    ) -> None:
        self.calls.append(Call(f"{len(self.calls)}_{target}", target, args, kwargs, reads, writes, makes, effect))


def random_program(seed: int, calls: int = 24) -> Program:
    """Calls over inputs that are kept or handed over, in the arena, in outputs, and in memory of their own."""
    writer = _Writer(random.Random(seed))
    inputs = [writer.draw.choice((Origin.INPUT, Origin.GIVEN)) for _ in range(4)]
    for number, origin in enumerate(inputs):
        writer.storage(f"in{number}", origin)
    for number in range(calls):
        if writer.draw.random() < 0.15:
            writer.update()
        else:
            kinds = (Origin.PLANNED, Origin.OUTPUT, Origin.CALL)
            writer.combine(number, writer.draw.choices(kinds, (0.6, 0.15, 0.25))[0])
    outputs = [n for n, s in writer.storages.items() if s.origin is Origin.OUTPUT]
    made = [n for n, s in writer.storages.items() if s.origin is Origin.CALL]
    outputs += made[-1:]
    return Program(
        f"random {seed}",
        tuple(Ref(f"in{number}") for number in range(len(inputs))),
        tuple(Ref(f"{name}_head") for name in outputs),
        MappingProxyType(writer.storages),
        MappingProxyType(writer.views),
        tuple(writer.calls),
        {},
    )


def example_inputs(program: Program, seed: int) -> list[torch.Tensor]:
    """Inputs for ``program``, afresh each time."""
    generator = torch.Generator().manual_seed(seed)
    names = [item.name for item in program.inputs if isinstance(item, Ref)]
    return [torch.rand(program.views[name].shape, generator=generator) for name in names]


def made_by_calls(program: Program) -> frozenset[str]:
    """Storages that calls make for themselves."""
    return frozenset(name for name, storage in program.storages.items() if storage.origin is Origin.CALL)


def planned(program: Program, *, hosts: bool = False) -> DevicePlan:
    """The plan for one stream; with ``hosts``, others may lie in the memory of outputs and inputs handed over."""
    graph = planning_graph(program)
    apart = program.apart & graph.buffers.keys()
    hosting = apart - made_by_calls(program) if hosts else frozenset[str]()
    machine = load("h100-sxm")
    return plan_for_device(graph, apart, machine, Budget.of_seconds(5, deterministic=True), hosts=hosting)


def on_streams(program: Program, device_plan: DevicePlan, count: int, seed: int) -> DevicePlan:
    """The plan with its calls on streams drawn at random, and the waits that this takes."""
    draw = random.Random(seed)
    machine = device_plan.plan.machine.with_streams(count)
    names = [engine.name for engine in machine.engines_of(EngineKind.COMPUTE)]
    steps = tuple(msgspec.structs.replace(i, engine=draw.choice(names)) for i in device_plan.plan.instructions)
    plan = msgspec.structs.replace(device_plan.plan, machine=machine, instructions=steps)
    assigned = replace(device_plan, plan=plan, waits=())
    return replace(assigned, waits=synchronisation(assigned, made_by_calls(program)))


def reordered(device_plan: DevicePlan, order: tuple[int, ...]) -> DevicePlan:
    """The plan with its steps in another order, on one stream; residences last from first to last use."""
    plan = device_plan.plan
    position = {step: place for place, step in enumerate(order)}
    residences = []
    for residence in plan.residences or ():
        uses = [
            position[step]
            for step in range(residence.begin, residence.end)
            if residence.buffer in _touched(plan, plan.instructions[step])
        ]
        residences.append(msgspec.structs.replace(residence, begin=min(uses), end=max(uses) + 1))
    residences.sort(key=lambda r: (r.begin, r.buffer))
    steps = tuple(msgspec.structs.replace(plan.instructions[step], engine="") for step in order)
    plan = msgspec.structs.replace(plan, instructions=steps, residences=tuple(residences))
    return replace(device_plan, plan=plan, waits=())


def _touched(plan: Plan, instruction: Instruction) -> tuple[str, ...]:
    if isinstance(instruction, Load | Store):
        return (instruction.buffer,)
    assert isinstance(instruction, Run | Recompute)
    index = next(i for i, op in enumerate(plan.graph.ops) if op.name == instruction.op)
    return plan.graph.touches[index]


def random_linear_extension(plan: Plan, waits: Sequence[Sequence[int]], rng: random.Random) -> tuple[int, ...]:
    """The plan's steps in an order that its engines and ``waits`` admit, each step that may come next equally likely.

    What receives comes first and what returns last, as the program begins and ends there.
    """
    boundary = {op.name: not op.inputs for op in plan.graph.ops if op.kind is OpKind.BOUNDARY}
    kinds = [boundary.get(i.op) if isinstance(i, Run | Recompute) else None for i in plan.instructions]
    inner = [step for step, kind in enumerate(kinds) if kind is None]
    remaining = {step: set(waits[step]) if waits else set() for step in inner}
    last: dict[str, int] = {}
    for step in inner:
        engine = plan.instructions[step].engine
        remaining[step] |= {last[engine]} if engine in last else set()
        last[engine] = step
    followers: dict[int, list[int]] = {}
    for step, before in remaining.items():
        for other in before:
            followers.setdefault(other, []).append(step)
    ready = [step for step, before in remaining.items() if not before]
    order: list[int] = []
    while ready:
        step = ready.pop(rng.randrange(len(ready)))
        order.append(step)
        for follower in followers.get(step, ()):
            remaining[follower].discard(step)
            if not remaining[follower]:
                ready.append(follower)
    received = [step for step, kind in enumerate(kinds) if kind]
    return (*received, *order, *(step for step, kind in enumerate(kinds) if kind is False))
