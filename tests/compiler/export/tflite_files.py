"""Small ``.tflite`` files, written with the flatbuffers runtime and the schema's field numbers."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import flatbuffers.table
import numpy as np

__all__ = [
    "ADD",
    "FLOAT32",
    "INT32",
    "INT8",
    "NODES",
    "RELU",
    "SLOTS",
    "Node",
    "Slot",
    "metadata_of",
    "random_model",
    "sample",
    "tflite_file",
]

FLOAT32, INT32, INT8 = 0, 2, 9
ADD, CONCATENATION, RELU, SPLIT = 0, 2, 19, 49
_OPTIONS = {ADD: 11, CONCATENATION: 10, SPLIT: 35}  # the kind of an operator's options; of a split, how many parts


@dataclass(frozen=True)
class Slot:
    """A tensor of the file; with ``data`` it is a constant."""

    name: str
    shape: tuple[int, ...]
    type: int = FLOAT32
    data: bytes = b""
    variable: bool = False


@dataclass(frozen=True)
class Node:
    """An operator of the file, by tensor numbers."""

    code: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def tflite_file(
    slots: Sequence[Slot],
    nodes: Sequence[Node],
    inputs: Sequence[int],
    outputs: Sequence[int],
    *,
    metadata: Sequence[tuple[str, bytes]] = (),
    subgraphs: int = 1,
) -> bytes:
    """A model of these tensors and operators; its first buffer is empty, as the schema wants it."""
    b = flatbuffers.Builder(1024)
    constants = [slot.data for slot in slots if slot.data]
    payloads = [b"", *constants, *(payload for _, payload in metadata)]
    buffers = _vector(b, [_buffer(b, payload) for payload in payloads])
    entries = [
        _table(b, [("text", 0, name), ("u32", 1, 1 + len(constants) + i)]) for i, (name, _) in enumerate(metadata)
    ]
    codes = sorted({node.code for node in nodes})
    operator_codes = _vector(b, [_table(b, [("i8", 0, code), ("i32", 2, 1), ("i32", 3, code)]) for code in codes])
    graphs = [_subgraph(b, slots, nodes, inputs, outputs, codes) for _ in range(subgraphs)]
    fields = [("u32", 0, 3), ("ref", 1, operator_codes), ("ref", 2, _vector(b, graphs)), ("text", 3, "made for tests")]
    fields.append(("ref", 4, buffers))
    if entries:
        fields.append(("ref", 6, _vector(b, entries)))
    b.Finish(_table(b, fields), file_identifier=b"TFL3")
    return bytes(b.Output())


def _buffer(b: Any, payload: bytes) -> int:
    if not payload:
        return _table(b, [])
    b.StartVector(1, len(payload), 16)
    for byte in reversed(payload):
        b.PrependUint8(byte)
    return _table(b, [("ref", 0, b.EndVector())])


def _subgraph(
    b: Any,
    slots: Sequence[Slot],
    nodes: Sequence[Node],
    inputs: Sequence[int],
    outputs: Sequence[int],
    codes: list[int],
) -> int:
    tensors, stored = [], 0
    for slot in slots:
        stored += bool(slot.data)
        shape = b.CreateNumpyVector(np.array(slot.shape, dtype=np.int32))
        fields = [
            ("ref", 0, shape),
            ("i8", 1, slot.type),
            ("u32", 2, stored if slot.data else 0),
            ("text", 3, slot.name),
        ]
        tensors.append(_table(b, [*fields, ("bool", 5, slot.variable)]))
    operators = []
    for node in nodes:
        operands = [b.CreateNumpyVector(np.array(part, dtype=np.int32)) for part in (node.inputs, node.outputs)]
        fields = [("u32", 0, codes.index(node.code)), ("ref", 1, operands[0]), ("ref", 2, operands[1])]
        if node.code in _OPTIONS:
            kind, options = _OPTIONS[node.code], [("i32", 0, len(node.outputs))] if node.code == SPLIT else []
            fields += [("u8", 3, kind), ("ref", 4, _table(b, options))]
        operators.append(_table(b, fields))
    ends = [b.CreateNumpyVector(np.array(part, dtype=np.int32)) for part in (inputs, outputs)]
    parts = [("ref", 0, _vector(b, tensors)), ("ref", 1, ends[0]), ("ref", 2, ends[1])]
    return _table(b, [*parts, ("ref", 3, _vector(b, operators)), ("text", 4, "main")])


def _table(b: Any, fields: Sequence[tuple[str, int, Any]]) -> int:
    texts = {number: b.CreateString(value) for kind, number, value in fields if kind == "text"}
    b.StartObject(13)
    for kind, number, value in fields:
        match kind:
            case "ref":
                b.PrependUOffsetTRelativeSlot(number, value, 0)
            case "text":
                b.PrependUOffsetTRelativeSlot(number, texts[number], 0)
            case "u32":
                b.PrependUint32Slot(number, value, 0)
            case "i32":
                b.PrependInt32Slot(number, value, 0)
            case "u8":
                b.PrependUint8Slot(number, value, 0)
            case "i8":
                b.PrependInt8Slot(number, value, 0)
            case _:
                b.PrependBoolSlot(number, value, False)
    return int(b.EndObject())


def _vector(b: Any, references: Sequence[int]) -> int:
    b.StartVector(4, len(references), 4)
    for reference in reversed(references):
        b.PrependUOffsetTRelative(reference)
    return int(b.EndVector())


#: y = relu(relu(x) + relu(z) + c), and the sum of the first two is returned as well: tensors in an order of their own.
SLOTS = (
    Slot("c", (4, 8), data=struct.pack("<32f", *range(32))),
    Slot("y", (4, 8)),
    Slot("x", (4, 8)),
    Slot("a", (4, 8)),
    Slot("sum", (4, 8)),
    Slot("z", (4, 8)),
    Slot("b", (4, 8)),
    Slot("shifted", (4, 8)),
)
NODES = (
    Node(RELU, (2,), (3,)),
    Node(RELU, (5,), (6,)),
    Node(ADD, (3, 6), (4,)),
    Node(ADD, (4, 0), (7,)),
    Node(RELU, (7,), (1,)),
)


def sample(**changes: Any) -> bytes:
    return tflite_file(**{"slots": SLOTS, "nodes": NODES, "inputs": (2, 5), "outputs": (4, 1), **changes})


def random_model(seed: int, operators: int = 40) -> tuple[tuple[Slot, ...], tuple[Node, ...], tuple[int, ...]]:
    """A model whose tensors grow, shrink and wait for each other: slots, nodes, and its output; input 1."""
    draw = random.Random(seed)
    slots = [Slot("axis", (), INT32, struct.pack("<i", 0)), Slot("x", (draw.randrange(64, 512) * 4,))]
    nodes: list[Node] = []

    def results(*extents: int) -> tuple[int, ...]:
        first = len(slots)
        slots.extend(Slot(f"t{first + i}", (extent,)) for i, extent in enumerate(extents))
        return tuple(range(first, len(slots)))

    while len(nodes) < operators:
        left, right = (draw.randrange(max(1, len(slots) - 6), len(slots)) for _ in range(2))
        extent, joined = slots[left].shape[0], slots[left].shape[0] + slots[right].shape[0]
        match draw.randrange(5):
            case 0 if joined < 4096:
                nodes.append(Node(CONCATENATION, (left, right), results(joined)))
            case 1 | 2 if extent % 8 == 0:
                nodes.append(Node(SPLIT, (0, left), results(extent // 2, extent // 2)))
            case _:
                nodes.append(Node(RELU, (left,), results(extent)))
    return tuple(slots), tuple(nodes), nodes[-1].outputs


def metadata_of(data: bytes) -> dict[str, bytes]:
    """Metadata as the flatbuffers runtime reads it, which shares no code with the exporter."""
    position = struct.unpack_from("<I", data)[0]
    root = flatbuffers.table.Table(bytearray(data), position)

    def vector(table: Any, field: int) -> list[Any]:
        offset = table.Offset(4 + 2 * field)
        if not offset:
            return []
        start = table.Vector(offset)
        elements = (table.Indirect(start + 4 * i) for i in range(table.VectorLen(offset)))
        return [flatbuffers.table.Table(table.Bytes, element) for element in elements]

    buffers = vector(root, 4)
    found = {}
    for entry in vector(root, 6):
        number = entry.Get(flatbuffers.number_types.Uint32Flags, entry.Offset(6) + entry.Pos)
        held = buffers[number]
        offset = held.Offset(4)
        start, size = held.Vector(offset), held.VectorLen(offset)
        assert start % 16 == 0
        found[entry.String(entry.Offset(4) + entry.Pos).decode()] = bytes(data[start : start + size])
    return found
