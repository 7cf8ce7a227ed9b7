"""Each operator once, in an order that respects every dependency; names that exist; decisions taken whole."""

from __future__ import annotations

from collections.abc import Iterator

from ...hw_models.model import Direction, Engine, EngineKind
from ..graph import OpKind, Role
from ..plan import CollectiveStart, CollectiveWait, Instruction, Load, Plan, Recompute, Run, Store
from ..repeatable import is_repeatable
from .facts import Facts
from .faults import Fault, Finding

__all__ = ["check_names", "check_order", "check_whole", "first_runs"]

_STREAMABLE = (Role.WEIGHT, Role.CONSTANT, Role.OPTIMIZER_STATE)


def first_runs(plan: Plan, facts: Facts) -> dict[int, int]:
    """Step of the first Run, or start, of each operator that has one, by the operator's position in the graph."""
    steps: dict[int, int] = {}
    for step, instruction in enumerate(plan.instructions):
        if isinstance(instruction, Run | CollectiveStart) and instruction.op in facts.op_index:
            steps.setdefault(facts.op_index[instruction.op], step)
    return steps


def check_order(plan: Plan, facts: Facts) -> Iterator[Finding]:
    """Each operator exactly once, after every operator it depends on."""
    steps = first_runs(plan, facts)
    for step, instruction in enumerate(plan.instructions):
        if isinstance(instruction, Load | Store | CollectiveWait):
            continue
        if instruction.op not in facts.op_index:
            yield Finding(Fault.OPERATOR_UNKNOWN, f"the graph has no operator {instruction.op!r}", step)
        elif isinstance(instruction, Recompute):
            yield from _check_recompute(plan, facts, instruction.op, steps, step)
        elif (first := steps[facts.op_index[instruction.op]]) != step:
            yield Finding(
                Fault.OPERATOR_REPEATED, f"operator {instruction.op!r} ran already at step {first}; it runs once", step
            )
    for index, op in enumerate(plan.graph.ops):
        if index not in steps:
            yield Finding(Fault.OPERATOR_MISSING, f"operator {op.name!r} never runs; it runs once")
    done = dict(steps)
    yield from _check_waits(plan, facts, steps, done)
    yield from _check_dependencies(plan, facts, steps, done)


def _check_waits(plan: Plan, facts: Facts, steps: dict[int, int], done: dict[int, int]) -> Iterator[Finding]:
    """Every start is of a collective, and has one wait behind it; ``done`` gets the steps of the waits."""
    waited: dict[int, int] = {}
    for step, instruction in enumerate(plan.instructions):
        index = None if isinstance(instruction, Load | Store) else facts.op_index.get(instruction.op)
        if isinstance(instruction, CollectiveStart) and index is not None:
            kind = plan.graph.ops[index].kind
            if kind is not OpKind.COLLECTIVE:
                message = f"operator {instruction.op!r} is of kind {kind.value}; only a collective is started"
                yield Finding(Fault.COLLECTIVE_NOT_STARTED, message, step)
        if not isinstance(instruction, CollectiveWait):
            continue
        if index is None:
            yield Finding(Fault.OPERATOR_UNKNOWN, f"the graph has no operator {instruction.op!r}", step)
        elif index in waited:
            message = f"operator {instruction.op!r} was waited for already at step {waited[index]}; one wait is enough"
            yield Finding(Fault.OPERATOR_REPEATED, message, step)
        elif steps.get(index, step) >= step or not isinstance(plan.instructions[steps[index]], CollectiveStart):
            message = f"operator {instruction.op!r} is waited for, but it was not started before"
            yield Finding(Fault.COLLECTIVE_NOT_STARTED, message, step)
        else:
            waited[index] = done[index] = step
    for index, step in steps.items():
        if isinstance(plan.instructions[step], CollectiveStart) and index not in waited:
            message = f"operator {plan.graph.ops[index].name!r} is started, and nobody waits for it"
            yield Finding(Fault.COLLECTIVE_NOT_WAITED, message, step)


def _check_recompute(plan: Plan, facts: Facts, name: str, steps: dict[int, int], step: int) -> Iterator[Finding]:
    """The operator ran before, gives the same bytes again, and alone says what its outputs hold."""
    index = facts.op_index[name]
    if steps.get(index, step) >= step:
        message = f"operator {name!r} is recomputed, but its first run does not come before"
        yield Finding(Fault.RECOMPUTED_BEFORE_RUN, message, step)
    op = plan.graph.ops[index]
    if op.kind is not OpKind.COMPUTE or not is_repeatable(op):
        message = f"operator {name!r} ({op.target or op.kind.value}) may give other values when it runs again"
        yield Finding(Fault.RECOMPUTED_ILLEGALLY, message, step)
    for buffer in facts.writes[index]:
        if buffer not in facts.creates[index] or facts.writers[buffer] > 1:
            message = f"operator {name!r} is recomputed, but it is not the only one that writes buffer {buffer!r}"
            yield Finding(Fault.RECOMPUTED_ILLEGALLY, message, step)


def _check_dependencies(plan: Plan, facts: Facts, steps: dict[int, int], done: dict[int, int]) -> Iterator[Finding]:
    """Read after write, write after read and write after write, buffer by buffer in program order.

    ``steps`` is where each operator begins, ``done`` where others may rely on it: for a collective, its wait.
    """
    writer: dict[str, int] = {}
    readers: dict[str, list[int]] = {}
    for index in range(len(plan.graph.ops)):
        for buffer in facts.reads[index]:
            if buffer in writer:
                yield from _after(plan, steps, done, index, writer[buffer], f"reads {buffer!r}, which it writes")
        for buffer in facts.writes[index]:
            if buffer in writer:
                yield from _after(plan, steps, done, index, writer[buffer], f"overwrites {buffer!r}, which it writes")
            for reader in readers.pop(buffer, ()):
                yield from _after(plan, steps, done, index, reader, f"overwrites {buffer!r}, which it reads")
            writer[buffer] = index
        for buffer in facts.reads[index]:
            if buffer not in facts.writes[index]:
                readers.setdefault(buffer, []).append(index)


def _after(
    plan: Plan, steps: dict[int, int], done: dict[int, int], index: int, before: int, why: str
) -> Iterator[Finding]:
    if index in steps and before in steps and steps[index] <= done[before]:
        name, other = plan.graph.ops[index].name, plan.graph.ops[before].name
        yield Finding(
            Fault.DEPENDENCY_VIOLATED,
            f"operator {name!r} must run after {other!r}, at step {done[before]}: it {why}",
            steps[index],
        )


def check_names(plan: Plan, facts: Facts) -> Iterator[Finding]:
    """Buffers, memories and engines exist and are of the right kind; streamed buffers may be streamed."""
    admitted = {engine.name: _admitted(engine) for engine in plan.machine.engines}
    links = {link.name for link in plan.machine.links}
    admitted |= dict.fromkeys(sorted(links), (Run, CollectiveStart, CollectiveWait))
    for step, instruction in enumerate(plan.instructions):
        if isinstance(instruction, Load | Store) and instruction.buffer not in facts.nbytes:
            yield Finding(Fault.BUFFER_UNKNOWN, f"the graph has no buffer {instruction.buffer!r}", step)
        if not instruction.engine and (instruction.start_s is None or isinstance(instruction, CollectiveWait)):
            continue
        if instruction.engine not in admitted:
            known = ", ".join(admitted)
            message = f"machine {plan.machine.name!r} has no engine {instruction.engine!r}; it has {known}"
            yield Finding(Fault.ENGINE_UNKNOWN, message, step)
        elif not isinstance(instruction, admitted[instruction.engine]):
            word = type(instruction).__name__
            yield Finding(Fault.ENGINE_OF_WRONG_KIND, f"engine {instruction.engine!r} takes no {word}", step)
        elif isinstance(instruction, Run | CollectiveStart) and instruction.op in facts.op_index:
            kind = plan.graph.ops[facts.op_index[instruction.op]].kind
            if (kind is OpKind.COLLECTIVE) != (instruction.engine in links):
                message = f"engine {instruction.engine!r} takes no operator of kind {kind.value}"
                yield Finding(Fault.ENGINE_OF_WRONG_KIND, message, step)
    yield from _check_streamed(plan, facts)
    yield from _check_residence_names(plan, facts)


def _admitted(engine: Engine) -> tuple[type[Instruction], ...]:
    """The instructions an engine can run."""
    if engine.kind is EngineKind.COMPUTE:
        return Run, Recompute
    if engine.direction is Direction.BOTH:
        return Load, Store
    return (Load,) if engine.direction is Direction.LOAD else (Store,)


def _check_residence_names(plan: Plan, facts: Facts) -> Iterator[Finding]:
    memories = [memory.name for memory in plan.machine.memories]
    for residence in plan.residences or ():
        if residence.buffer not in facts.nbytes:
            message = f"the graph has no buffer {residence.buffer!r}, which has a residence"
            yield Finding(Fault.BUFFER_UNKNOWN, message, residence.begin)
        if residence.memory not in memories:
            message = f"buffer {residence.buffer!r} lies in memory {residence.memory!r}; known: {', '.join(memories)}"
            yield Finding(Fault.MEMORY_UNKNOWN, message, residence.begin)
        elif residence.memory != plan.machine.scratchpad:
            message = f"buffer {residence.buffer!r} lies in {residence.memory!r}, expected {plan.machine.scratchpad!r}"
            yield Finding(Fault.NOT_THE_SCRATCHPAD, message, residence.begin)


def _check_streamed(plan: Plan, facts: Facts) -> Iterator[Finding]:
    written = {buffer for buffers in facts.writes for buffer in buffers}
    resident = {residence.buffer for residence in plan.residences or ()}
    for buffer in sorted(set(plan.streamed)):
        if buffer not in facts.nbytes:
            yield Finding(Fault.BUFFER_UNKNOWN, f"the graph has no buffer {buffer!r}, which the plan streams")
            continue
        if facts.role[buffer] not in _STREAMABLE:
            allowed = ", ".join(role.value for role in _STREAMABLE)
            message = f"buffer {buffer!r} is streamed but has role {facts.role[buffer].value}; allowed: {allowed}"
            yield Finding(Fault.STREAMED_ILLEGALLY, message)
        elif buffer in written:
            message = f"buffer {buffer!r} is streamed but an operator writes it; only what is never written may be"
            yield Finding(Fault.STREAMED_ILLEGALLY, message)
        if buffer in resident:
            message = f"buffer {buffer!r} is streamed and has a residence too; it may have one of the two"
            yield Finding(Fault.STREAMED_ILLEGALLY, message)


def check_whole(plan: Plan) -> Iterator[Finding]:
    """A decision is taken for everything it concerns or for nothing."""
    if plan.residences is None:
        for step, instruction in enumerate(plan.instructions):
            if isinstance(instruction, Load | Store | Recompute):
                what = (
                    f"operator {instruction.op!r} runs again"
                    if isinstance(instruction, Recompute)
                    else f"buffer {instruction.buffer!r} moves"
                )
                message = f"{what}, but the plan has no residences"
                yield Finding(Fault.PARTLY_DECIDED, message, step)
                break
    elif any(residence.offset is not None for residence in plan.residences):
        for residence in plan.residences:
            if residence.offset is None:
                message = f"the residence of {residence.buffer!r} has no offset, others have; all have one or none has"
                yield Finding(Fault.PARTLY_DECIDED, message, residence.begin)
                break
    yield from _check_all_timed(plan)


def _check_all_timed(plan: Plan) -> Iterator[Finding]:
    if all(i.start_s is None and i.finish_s is None for i in plan.instructions):
        return
    for step, instruction in enumerate(plan.instructions):
        if instruction.start_s is None or instruction.finish_s is None:
            name = instruction.buffer if isinstance(instruction, Load | Store) else instruction.op
            message = f"{name!r} has no start or no finish, others have; all have both or none has"
            yield Finding(Fault.PARTLY_DECIDED, message, step)
            break
