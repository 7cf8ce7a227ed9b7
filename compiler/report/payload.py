"""The plan as the page's script reads it: columns of numbers, each name once, indices everywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from ..overlap import CollectiveLine, lines_of
from ..plan import Plan
from ..verify import Verification
from .assemble import harmless
from .digest import Digest, digest
from .palette import CAPACITY_COLOUR, CATEGORY_COLOURS, ROLE_COLOURS, TRAFFIC_COLOURS
from .text import LEVELS, OBJECTIVES, PROVERS, SCOPES, UNSPILLED
from .view import Bar, Region, bars, is_timed, regions, role_of

__all__ = ["payload"]

_KINDS = ("run", "load", "store", "recompute", "collective", "wait")
_MOST_NAMES = 4
_Columns = dict[str, list[Any]]


def payload(plan: Plan, verification: Verification | None = None, lines: Sequence[CollectiveLine] = ()) -> bytes:
    """JSON that is safe inside a ``<script>`` element whatever the names in the plan are.

    ``lines`` say what became of collectives; without them the page shows what ``plan`` alone tells.
    """
    facts = digest(plan, verification)
    instructions, residences = bars(plan), regions(plan)
    # A plan that does not verify may use names that the graph does not have; they are drawn all the same.
    moved = [bar.subject for bar in instructions if not bar.executes]
    buffers = _index([*plan.graph.buffers, *moved, *(region.buffer for region in residences)])
    ops = _index([*(op.name for op in plan.graph.ops), *(bar.subject for bar in instructions if bar.executes)])
    engines = _index([*(engine.name for engine in plan.machine.engines), *(bar.engine for bar in instructions)])
    document = {
        "digest": {key: value for key, value in facts.to_dict().items() if key != "moved"},
        "passes": _passes(plan, facts),
        "timed": is_timed(plan),
        "engines": list(engines),
        "buffers": _buffers(plan, facts, buffers),
        "ops": _ops(plan, ops, buffers),
        "instructions": _instructions(plan, instructions, ops, buffers, engines),
        "collectives": [_collective(line) for line in lines or (lines_of(plan, plan) if is_timed(plan) else ())],
        "is_compared": bool(lines),
        "residences": _residences(plan, residences, buffers),
        "palette": {
            "roles": dict(ROLE_COLOURS),
            "categories": dict(CATEGORY_COLOURS),
            "traffic": dict(TRAFFIC_COLOURS),
            "capacity": CAPACITY_COLOUR,
        },
        "words": {
            "scopes": SCOPES,
            "unspilled": UNSPILLED,
            "provers": PROVERS,
            "objectives": OBJECTIVES,
            "levels": LEVELS,
        },
    }
    return harmless(msgspec.json.encode(document))


def _index(names: Iterable[str]) -> dict[str, int]:
    return {name: index for index, name in enumerate(dict.fromkeys(names))}


def _passes(plan: Plan, facts: Digest) -> list[dict[str, Any]]:
    certificates = iter(facts.to_dict()["certificates"])
    return [
        {
            "name": record.name,
            "seconds": record.seconds,
            "note": record.note,
            "certificate": None if record.certificate is None else next(certificates),
        }
        for record in plan.passes
    ]


def _buffers(plan: Plan, facts: Digest, buffers: Mapping[str, int]) -> _Columns:
    roles = {role: index for index, role in enumerate(ROLE_COLOURS)}
    base, streamed = plan.graph.buffers, set(plan.streamed)
    moved = {row.buffer: row for row in facts.moved}
    known = [base.get(name) for name in buffers]
    columns: _Columns = {
        "name": list(buffers),
        "role": [roles[role_of(plan, name)] for name in buffers],
        "nbytes": [0 if tensor is None else tensor.nbytes for tensor in known],
        "dtype": ["unknown" if tensor is None else tensor.dtype for tensor in known],
        "shape": [() if tensor is None else tensor.shape for tensor in known],
        "is_streamed": [int(name in streamed) for name in buffers],
    }
    for way in ("loaded", "stored", "streamed", "compulsory"):
        columns[way] = [getattr(moved[name], f"{way}_bytes") if name in moved else 0 for name in buffers]
    return columns


def _ops(plan: Plan, ops: Mapping[str, int], buffers: Mapping[str, int]) -> _Columns:
    graph = plan.graph
    unknown = len(ops) - len(graph.ops)
    return {
        "name": list(ops),
        "target": [op.target for op in graph.ops] + [""] * unknown,
        "body": [op.body for op in graph.ops] + [""] * unknown,
        "flops": [op.flops for op in graph.ops] + [0] * unknown,
        "origin": [op.origin for op in graph.ops] + [""] * unknown,
        "inputs": [[buffers[b] for b in reads] for reads in graph.reads] + [[] for _ in range(unknown)],
        "outputs": [[buffers[b] for b in writes] for writes in graph.writes] + [[] for _ in range(unknown)],
    }


def _instructions(
    plan: Plan,
    instructions: tuple[Bar, ...],
    ops: Mapping[str, int],
    buffers: Mapping[str, int],
    engines: Mapping[str, int],
) -> _Columns:
    timed = is_timed(plan)
    return {
        "kind": [_KINDS.index(bar.kind) for bar in instructions],
        "subject": [(ops if bar.executes else buffers)[bar.subject] for bar in instructions],
        "engine": [engines[bar.engine] for bar in instructions],
        "nbytes": [bar.nbytes for bar in instructions],
        "additional": [bar.additional_bytes for bar in instructions],
        "start": [bar.start_s for bar in instructions] if timed else [],
        "finish": [bar.finish_s for bar in instructions] if timed else [],
    }


def _collective(line: CollectiveLine) -> dict[str, Any]:
    hidden_by = ", ".join(line.hidden_by[:_MOST_NAMES])
    more = len(line.hidden_by) - _MOST_NAMES
    return {**asdict(line), "hidden_by": f"{hidden_by} and {more} more" if more > 0 else hidden_by}


def _residences(plan: Plan, residences: tuple[Region, ...], buffers: Mapping[str, int]) -> _Columns:
    timed = is_timed(plan)
    return {
        "buffer": [buffers[region.buffer] for region in residences],
        "offset": [region.offset for region in residences],
        "begin": [region.begin for region in residences],
        "end": [region.end for region in residences],
        "start": [region.start_s for region in residences] if timed else [],
        "finish": [region.finish_s for region in residences] if timed else [],
    }
