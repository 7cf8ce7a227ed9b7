"""Offsets for TensorFlow Lite Micro: its ``OfflineMemoryAllocation`` metadata.

TensorFlow Lite Micro takes the arena offsets of tensors from a metadata entry of this name, and plans the rest around
them. The entry's buffer is a list of 32-bit integers: format version (1), subgraph (0), number of tensors n, then n
offsets, -1 for a tensor that the runtime places itself (tflite-micro, ``docs/memory_management.md``; version and
subgraph are those that ``CheckOfflinePlannedOffsets`` accepts, while the runtime itself looks at n and the offsets).

Each tensor has one offset for its whole life. Constants stay in the model, inputs are in the arena before the first
operator, and outputs until after the last one; operators run in the file's order. ``whole_life`` makes the plan that
lives by these rules; its residences then need addresses.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from ...errors import Infeasible, PlanError
from ..graph import Role, contiguous_strides
from ..plan import Instruction, Load, Plan, Residence, Run, Store
from ..verify import verify
from .flatbuffer import TfliteModel, add_metadata, read_tflite
from .layout import require_placed, require_right

__all__ = ["METADATA_NAME", "offline_memory_allocation", "planned_tflite", "tensor_offsets", "whole_life"]

METADATA_NAME = "OfflineMemoryAllocation"
ALIGNMENT_BYTES = 16  # of every buffer in the runtime's arena
AT_RUNTIME = -1
_CONSTANT = (Role.WEIGHT, Role.CONSTANT)


def whole_life(plan: Plan) -> Plan:
    """``plan``'s order with every buffer resident for all of its life, and no addresses yet.

    Inputs are resident from the first operator on and outputs until the last; weights and constants are streamed.

    Raises:
        VerificationError: the plan claims something that is not so.
        PlanError: the plan spills; names a tensor that is fetched or computed again.
        Infeasible: these residences need more bytes at once than the scratchpad has.
    """
    require_right(plan)
    _refuse_spills(plan)
    graph = plan.graph
    written = {buffer for buffers in graph.writes for buffer in buffers}
    streamed = {b for b, base in graph.buffers.items() if base.role in _CONSTANT and b not in written and base.nbytes}
    uses: dict[str, list[int]] = {}
    for position, op in enumerate(plan.order):
        for buffer in graph.touches[op]:
            if graph.buffers[buffer].nbytes and buffer not in streamed:
                uses.setdefault(buffer, []).append(position)
    loads = [buffer for buffer in uses if graph.buffers[buffer].role.is_source]
    stores = sorted(buffer for buffer in uses if buffer in graph.output_buffers)
    runs = [Run(graph.ops[op].name) for op in plan.order]
    steps: list[Instruction] = [*map(Load, loads), *runs, *map(Store, stores)]
    residences = []
    for buffer, positions in uses.items():
        begin = loads.index(buffer) if buffer in loads else len(loads) + positions[0]
        end = len(steps) if buffer in graph.output_buffers else len(loads) + positions[-1] + 1
        residences.append(Residence(buffer, plan.machine.scratchpad, begin, end))
    residences.sort(key=lambda residence: (residence.begin, residence.buffer))
    fresh = Plan.of_order(graph, plan.machine, plan.order, streamed=streamed, source=plan.source, pins=plan.pins)
    static = msgspec.structs.replace(fresh, instructions=tuple(steps), residences=tuple(residences))
    peak, capacity = verify(static).peak_bytes, plan.machine.scratchpad_memory.capacity_bytes
    if peak > capacity:
        raise Infeasible(
            f"tensors that keep their place for life need {peak} bytes at once in this order; the scratchpad has "
            f"{capacity}",
            required_bytes=peak,
            available_bytes=capacity,
            hint=f"compile for a scratchpad of at least {peak} bytes, or with another order",
        )
    return static


def _refuse_spills(plan: Plan) -> None:
    loaded = Counter(i.buffer for i in plan.instructions if isinstance(i, Load))
    residences = Counter(residence.buffer for residence in plan.residences or ())
    for buffer in plan.graph.buffers:
        constant = plan.graph.buffers[buffer].role in _CONSTANT
        if (loaded[buffer] > 1 or residences[buffer] > 1) and not constant:
            raise PlanError(
                f"tensor {buffer!r} leaves the scratchpad and comes back {residences[buffer] - 1} times; "
                "TensorFlow Lite Micro gives a tensor one offset for its whole life",
                hint="compile for a scratchpad in which nothing is spilled (`opweave fit` finds it)",
            )


def tensor_offsets(plan: Plan, names: Sequence[str]) -> list[int]:
    """Arena offset in bytes of each tensor in ``names``, the model's own order; -1 for constants and unknown ones.

    Raises:
        PlanError: the plan has no addresses, or a tensor that does not keep its place for all of its life (see
            ``whole_life``); a placed buffer has no tensor in ``names``, or one that is named twice; an offset is no
            multiple of 16 or beyond 31 bits; a tensor is a view that skips elements.
        VerificationError: the plan claims something that is not so.
    """
    require_placed(plan)
    _refuse_spills(plan)
    role = {name: base.role for name, base in plan.graph.buffers.items()}
    offset = {r.buffer: r.offset or 0 for r in plan.residences or () if role[r.buffer] not in _CONSTANT}
    for buffer in _short_lived(plan):
        raise PlanError(
            f"tensor {buffer!r} does not have its place from the first operator on, or until the last one, "
            "as inputs and outputs must in TensorFlow Lite Micro",
            hint="give residences their whole life first: `whole_life(plan)`, then an address pass",
        )
    counts = Counter(names)
    placed: set[str] = set()
    result = []
    for name in names:
        tensor = plan.graph.tensor.get(name)
        if tensor is None or tensor.buffer not in offset:
            result.append(AT_RUNTIME)
            continue
        if counts[name] > 1:
            raise PlanError(f"the model has {counts[name]} tensors of the name {name!r}; the plan has one")
        if tensor.element_strides != contiguous_strides(tensor.shape):
            raise PlanError(f"tensor {name!r} is a view of {tensor.buffer!r} that skips elements, which has no offset")
        placed.add(tensor.buffer)
        result.append(_checked(name, offset[tensor.buffer] + tensor.offset_bytes))
    missing = sorted(set(offset) - placed)
    if missing:
        raise PlanError(
            f"the plan places {missing[0]!r} and {len(missing) - 1} more, which the model's list of tensors lacks",
            hint="the plan must be of the same model, with the names of its tensors",
        )
    return result


def _short_lived(plan: Plan) -> Iterator[str]:
    """Inputs that come after the first run, and outputs that go before the last."""
    runs = [step for step, i in enumerate(plan.instructions) if not isinstance(i, Load | Store)]
    for residence in (plan.residences or ()) if runs else ():
        role = plan.graph.buffers[residence.buffer].role
        late = role.is_source and role not in _CONSTANT and residence.begin > runs[0]
        early = residence.buffer in plan.graph.output_buffers and residence.end <= runs[-1]
        if late or early:
            yield residence.buffer


def _checked(name: str, offset: int) -> int:
    if offset % ALIGNMENT_BYTES:
        raise PlanError(
            f"tensor {name!r} lies at offset {offset}; the runtime's tensors begin at multiples of {ALIGNMENT_BYTES}",
            hint="compile for a machine whose alignment_bytes is a multiple of 16",
        )
    if offset >= 1 << 31:
        raise PlanError(f"tensor {name!r} lies at offset {offset}, beyond the 31 bits that the format has")
    return offset


def offline_memory_allocation(plan: Plan, names: Sequence[str]) -> bytes:
    """The contents of the metadata's buffer for the tensors ``names``. Raises as ``tensor_offsets``."""
    return _encoded(tensor_offsets(plan, names))


def _encoded(offsets: Sequence[int]) -> bytes:
    return struct.pack(f"<{3 + len(offsets)}i", 1, 0, len(offsets), *offsets)


def planned_tflite(model: bytes, plan: Plan) -> bytes:
    """The ``.tflite`` file ``model`` with ``plan``'s offsets in its metadata; all else stays as it is.

    Constants and variables get -1: the runtime finds them elsewhere.

    Raises:
        ModelError: ``model`` is not a ``.tflite`` file of one subgraph.
        PlanError: as ``tensor_offsets``; a tensor has another size in the file; or two tensors that the file's order of
            operators needs at once share bytes, because the plan has another order.
    """
    parsed = read_tflite(model)
    offsets = tensor_offsets(plan, [tensor.name for tensor in parsed.tensors])
    for number, tensor in enumerate(parsed.tensors):
        if tensor.constant or tensor.variable:
            offsets[number] = AT_RUNTIME
        elif offsets[number] != AT_RUNTIME and tensor.nbytes not in (None, plan.graph.tensor[tensor.name].nbytes):
            raise PlanError(
                f"tensor {tensor.name!r} has {tensor.nbytes} bytes in the .tflite file and "
                f"{plan.graph.tensor[tensor.name].nbytes} in the plan",
                hint="the plan must be of the same model, at the same batch size and types",
            )
    _refuse_overlaps(plan, parsed, offsets)
    return add_metadata(model, METADATA_NAME, _encoded(offsets))


def _refuse_overlaps(plan: Plan, model: TfliteModel, offsets: Sequence[int]) -> None:
    """Lifetimes as the runtime counts them: 0 before the first operator, which is 1."""
    begin: dict[int, int] = dict.fromkeys(model.inputs, 0)
    end: dict[int, int] = {}
    for scope, (inputs, outputs) in enumerate(model.operators, 1):
        for number in outputs:
            begin.setdefault(number, scope)
        end.update(dict.fromkeys((*inputs, *outputs), scope))
    end.update(dict.fromkeys(model.outputs, len(model.operators)))
    tensor = plan.graph.tensor
    live: list[tuple[int, int]] = []  # tensor number, byte behind it
    for number in sorted((n for n in begin if n >= 0 and offsets[n] != AT_RUNTIME), key=lambda n: (begin[n], n)):
        live = [(other, top) for other, top in live if end.get(other, 0) >= begin[number]]
        name = model.tensors[number].name
        top = offsets[number] + tensor[name].nbytes
        for other, other_top in live:
            other_name = model.tensors[other].name
            shared = tensor[name].buffer == tensor[other_name].buffer
            if offsets[number] < other_top and offsets[other] < top and not shared:
                raise PlanError(
                    f"tensors {other_name!r} and {name!r} share bytes, but operator {begin[number] - 1} of the .tflite "
                    "file needs both: the plan has the operators in another order",
                    hint="compile with order='order/given', so that the plan keeps the model's order",
                )
        live.append((number, top))
