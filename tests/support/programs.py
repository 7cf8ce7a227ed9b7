"""Programs made for an H100, and plans to run them by on the CPU; all within `tests.support.hopper.h100`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton import knobs

from opweave import fusing
from opweave.compiler.frontend.dynamo.launches import launch_instead, matched, write_beside
from opweave.compiler.frontend.dynamo.lowering import lower
from opweave.compiler.graph import Graph, OpKind
from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Plan, Residence
from opweave.compiler.runtime.device.arena import ALIGNMENT_BYTES, ArenaPool
from opweave.compiler.runtime.device.executor import Executor
from opweave.compiler.runtime.device.graph import planning_graph
from opweave.compiler.runtime.device.kernels import load_kernels
from opweave.compiler.runtime.device.layout import DevicePlan
from opweave.compiler.runtime.device.program import Origin, Program, Ref
from opweave.hw_models.registry import load as load_machine
from opweave.passes.device.planner import plan_for_device
from tests.support.hopper import DEVICE

__all__ = [
    "TrainingPrograms",
    "best_device_plan",
    "handed_over",
    "inference_program",
    "interpreted_executor",
    "random_device_plan",
    "training_programs",
]

Function = Callable[..., tuple[torch.Tensor, ...]]
_CPU = torch.device("cpu")


def inference_program(function: Function, *inputs: torch.Tensor, kernels: str = "off", **settings: Any) -> Program:
    """What ``function`` becomes on an H100; ``kernels`` is the backend's option, ``settings`` are Inductor's."""
    fakes = _fakes([tensor.detach() for tensor in inputs])
    module = _traced(function, fakes, joint=False)
    return _lowered(module, kernels, is_inference=True, settings=settings)


@dataclass(frozen=True)
class TrainingPrograms:
    """The backward program takes what the forward one returns behind its results, and the results' gradients."""

    forward: Program
    backward: Program
    activations: frozenset[str]  # inputs of the backward program that only it needs


def training_programs(function: Function, *inputs: torch.Tensor) -> TrainingPrograms:
    """What a step of ``function``, with all gradients, becomes; Inductor chooses what is kept and recomputed."""
    fakes = _fakes(inputs)
    joint = _traced(function, fakes, joint=True)
    forward, backward = min_cut_rematerialization_partition(joint, None, num_fwd_outputs=len(function(*inputs)))
    sources = {node.name for node in forward.graph.find_nodes(op="placeholder")}
    activations = [
        position
        for position, node in enumerate(backward.graph.find_nodes(op="placeholder"))
        if node.name not in sources and not node.name.startswith("tangents")
    ]
    lowered = _lowered(backward, is_inference=False, is_backward=True)
    refs = [lowered.inputs[position] for position in activations]
    names = frozenset(ref.name for ref in refs if isinstance(ref, Ref))
    return TrainingPrograms(_lowered(forward, is_inference=False), lowered, names)


def _fakes(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    mode = FakeTensorMode()
    return tuple(mode.from_tensor(tensor) for tensor in tensors)


def _traced(function: Function, fakes: tuple[torch.Tensor, ...], *, joint: bool) -> torch.fx.GraphModule:
    module = aot_export_joint_simple(function, fakes, trace_joint=joint, decompositions=select_decomp_table())
    assert isinstance(module, torch.fx.GraphModule)
    return module


def _lowered(module: torch.fx.GraphModule, kernels: str = "off", **options: Any) -> Program:
    """``module``, traced with tensors of the CPU (torch without CUDA cannot do it otherwise), on the H100."""
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": DEVICE}
    with FakeTensorMode(allow_non_fake_inputs=True):
        placeholders = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
        fakes = [torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=DEVICE) for p in placeholders]
        moved = make_fx(torch.fx.Interpreter(module).run)(*fakes)
    found, matches = matched(moved, fusing.rules(kernels))
    machine, budget = load_machine("h100-sxm"), Budget.of_seconds(10)
    chosen = fusing.choose(found.graph, matches, kernels, machine, budget, others_fuse=True)
    if chosen.matches:
        launch_instead(moved, found, chosen.matches)
    write_beside(moved, fusing.called)
    return lower(moved, fakes, **options)


def interpreted_executor(program: Program, device_plan: DevicePlan) -> Executor:
    """Runs ``program`` on tensors of the CPU, in a poisoned and guarded arena; under the interpreter only."""
    assert knobs.runtime.interpret, "run it by `tests.support.interpreted`"
    kernels = {name: partial(kernel.run, stream=0) for name, kernel in load_kernels(program).items()}
    return Executor(_on_cpu(program), device_plan, device=_CPU, kernels=kernels, pool=_PoisonedPool())


def _on_cpu(program: Program) -> Program:
    """The same program with all its memory on the CPU, its kernels plain functions as the CPU's are."""

    def moved(item: Any) -> Any:
        if isinstance(item, torch.device):
            return _CPU
        if isinstance(item, tuple | list):
            return type(item)(moved(part) for part in item)
        return item

    return replace(
        program,
        storages={name: replace(storage, device=_CPU) for name, storage in program.storages.items()},
        calls=tuple(
            replace(call, args=moved(call.args), kwargs={key: moved(value) for key, value in call.kwargs.items()})
            for call in program.calls
        ),
        kernels={name: replace(kernel, language="cpp") for name, kernel in program.kernels.items()},
        constants={name: value.cpu() for name, value in program.constants.items()},
    )


def handed_over(program: Program, names: frozenset[str]) -> Program:
    """``program`` with the inputs ``names`` given to it for good."""
    storages = {
        name: replace(storage, origin=Origin.GIVEN) if name in names else storage
        for name, storage in program.storages.items()
    }
    return replace(program, storages=storages)


def best_device_plan(program: Program) -> DevicePlan:
    """The plan that the backend would run on an H100."""
    graph = planning_graph(program)
    apart = frozenset(name for name in graph.buffers if _lies_apart(program, name))
    return plan_for_device(graph, apart, load_machine("h100-sxm"), Budget.of_seconds(20, deterministic=True))


def random_device_plan(program: Program, seed: int) -> DevicePlan:
    """A legal order drawn at random, and places drawn at random among those where nothing else lies then.

    Outputs, and what calls or the caller allocate, lie apart from the arena, as `DevicePlan` has it.
    """
    draw = random.Random(seed)
    machine = load_machine("h100-sxm")
    plan = Plan.of_order(planning_graph(program), machine)
    plan = plan.with_order(_random_order(plan.graph, draw))
    lives = _lives(plan)
    nbytes = {name: _aligned(plan.graph.buffers[name].nbytes) for name in lives}
    planned = [name for name in lives if not _lies_apart(program, name)]
    draw.shuffle(planned)
    offsets: dict[str, int] = {}
    for name in planned:
        meets = [other for other in offsets if lives[other][0] < lives[name][1] and lives[name][0] < lives[other][1]]
        offsets[name] = draw.choice(_free(name, nbytes, offsets, meets)[:3])
    arena_bytes = end = max((offsets[name] + nbytes[name] for name in planned), default=0)
    apart: dict[str, int] = {}
    for name in lives:
        if name not in offsets:
            apart[name] = offsets[name] = end
            end += nbytes[name]
    residences = tuple(
        Residence(name, machine.scratchpad, begin, finish, offsets[name]) for name, (begin, finish) in lives.items()
    )
    return DevicePlan(Plan(plan.graph, machine, plan.instructions, residences), arena_bytes, apart)


def _lies_apart(program: Program, name: str) -> bool:
    return name in program.storages and program.storages[name].origin is not Origin.PLANNED


def _random_order(graph: Graph, draw: random.Random) -> list[int]:
    """What receives comes first and what returns last."""
    frame = [index for index, op in enumerate(graph.ops) if op.kind is OpKind.BOUNDARY]
    order = [index for index in frame if not graph.ops[index].inputs]
    waiting = {i: set(before).difference(order) for i, before in enumerate(graph.predecessors) if i not in frame}
    while waiting:
        chosen = draw.choice(sorted(index for index, before in waiting.items() if not before))
        order.append(chosen)
        del waiting[chosen]
        for before in waiting.values():
            before.discard(chosen)
    return [*order, *(index for index in frame if graph.ops[index].inputs)]


def _lives(plan: Plan) -> dict[str, tuple[int, int]]:
    """Steps from the first use to behind the last one, by buffer that has bytes."""
    lives: dict[str, tuple[int, int]] = {}
    for step, index in enumerate(plan.order):
        for name in plan.graph.touches[index]:
            if plan.graph.buffers[name].nbytes:
                lives[name] = (lives.get(name, (step, step))[0], step + 1)
    return lives


def _free(name: str, nbytes: Mapping[str, int], offsets: Mapping[str, int], meets: Sequence[str]) -> list[int]:
    """The first byte and those right behind other buffers, where ``name`` overlaps nothing of what it ``meets``."""
    starts = sorted({0, *(offsets[other] + nbytes[other] for other in offsets)})
    return [
        start
        for start in starts
        if all(start + nbytes[name] <= offsets[o] or offsets[o] + nbytes[o] <= start for o in meets)
    ]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class _PoisonedPool(ArenaPool):
    """Lends arenas of exactly the bytes asked for, full of NaN (-1 as integers), guarded on both sides."""

    guard_bytes = 4096
    guard = 0xA5

    @contextmanager
    def lend(self, nbytes: int, device: torch.device) -> Iterator[torch.Tensor]:
        """As `ArenaPool.lend`; what was written outside of the arena fails an assertion."""
        memory = torch.full((nbytes + 3 * self.guard_bytes,), self.guard, dtype=torch.uint8, device=device)
        first = 2 * self.guard_bytes - memory.data_ptr() % self.guard_bytes
        before, arena, behind = memory[:first], memory[first : first + nbytes], memory[first + nbytes :]
        arena.fill_(0xFF)
        yield arena
        assert bool((before == self.guard).all()), "written before the arena"
        assert bool((behind == self.guard).all()), "written behind the arena"
