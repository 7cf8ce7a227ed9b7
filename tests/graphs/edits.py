"""Small changes to a plan, each to one thing, for tests that need a plan to be wrong in one way."""

from __future__ import annotations

from typing import Any

import msgspec

from opweave.compiler.plan import Instruction, Plan, Residence

__all__ = [
    "with_instruction",
    "with_more",
    "with_residence",
    "with_times",
    "without_offsets",
]


def with_instruction(plan: Plan, old: Instruction | int, new: Instruction) -> Plan:
    """Replace the first instruction equal to ``old``, or the one at step ``old``."""
    step = old if isinstance(old, int) else plan.instructions.index(old)
    return msgspec.structs.replace(plan, instructions=(*plan.instructions[:step], new, *plan.instructions[step + 1 :]))


def with_more(plan: Plan, *things: Instruction | Residence) -> Plan:
    """Append instructions and residences."""
    residences = tuple(thing for thing in things if isinstance(thing, Residence))
    instructions = tuple(thing for thing in things if not isinstance(thing, Residence))
    return msgspec.structs.replace(
        plan,
        instructions=(*plan.instructions, *instructions),
        residences=(*plan.residences, *residences) if plan.residences is not None else residences or None,
    )


def with_residence(plan: Plan, buffer: str, **fields: Any) -> Plan:
    """Change fields of the first residence of ``buffer``."""
    residences = list(plan.residences or ())
    index = next(i for i, residence in enumerate(residences) if residence.buffer == buffer)
    residences[index] = msgspec.structs.replace(residences[index], **fields)
    return msgspec.structs.replace(plan, residences=tuple(residences))


def with_times(plan: Plan, step: int, start_s: float | None, finish_s: float | None) -> Plan:
    """Change the times of one instruction."""
    timed = msgspec.structs.replace(plan.instructions[step], start_s=start_s, finish_s=finish_s)
    return with_instruction(plan, step, timed)


def without_offsets(plan: Plan) -> Plan:
    """Forget where the residences are."""
    bare = tuple(msgspec.structs.replace(residence, offset=None) for residence in plan.residences or ())
    return msgspec.structs.replace(plan, residences=bare)
