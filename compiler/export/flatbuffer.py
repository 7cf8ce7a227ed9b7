"""As much of a ``.tflite`` file as exporting takes: read its tensors and operators, add an entry to its metadata.

A flatbuffer is a tree of tables whose references are relative and point forward. Therefore nothing inside a file
needs to be understood to move it: an entry is added by writing a new root table, with new lists of buffers and of
metadata, in front of the old bytes, which follow unchanged. Field numbers are those of TensorFlow Lite's schema,
version 3 (``tensorflow/compiler/mlir/lite/schema/schema.fbs``).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from ...errors import ModelError

__all__ = ["TfliteModel", "TfliteTensor", "add_metadata", "read_tflite"]

_MODEL_FIELDS = 8
_SUBGRAPHS, _BUFFERS, _METADATA = 2, 4, 6  # fields of the model; all but field 0, the version, are references
_ALIGNMENT = 64  # the old bytes move by a multiple of this, so that what was aligned stays aligned
_NOTHING = -1

#: Bits of one element, by the schema's number of the type; strings, resources and variants have no fixed size.
_ELEMENT_BITS = {
    0: 32, 1: 16, 2: 32, 3: 8, 4: 64, 6: 8, 7: 16, 8: 64, 9: 8, 10: 64, 11: 128, 12: 64, 15: 32, 16: 16, 17: 4, 18: 16
}  # fmt: skip


@dataclass(frozen=True)
class TfliteTensor:
    """A tensor of the file: its bytes (``None`` without a fixed size), and whether it is stored in the file itself.

    ``variable`` tensors keep their contents from one run to the next.
    """

    name: str
    nbytes: int | None
    constant: bool
    variable: bool


@dataclass(frozen=True)
class TfliteModel:
    """The file's only subgraph; ``inputs``, ``outputs`` and ``operators`` (inputs, outputs) hold tensor numbers.

    An operand that is left out has number -1.
    """

    tensors: tuple[TfliteTensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    operators: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True)
class _File:
    data: bytes

    def number(self, position: int, form: str) -> int:
        if position < 0 or position + struct.calcsize(form) > len(self.data):
            raise ModelError(f"the .tflite file refers to byte {position}, but it has {len(self.data)}")
        return int(struct.unpack_from(f"<{form}", self.data, position)[0])

    def target(self, position: int) -> int:
        return position + self.number(position, "I")

    def field(self, table: int, number: int) -> int:
        """Position of a table's field, or -1 where it is left out."""
        vtable = table - self.number(table, "i")
        if 4 + 2 * number >= self.number(vtable, "H"):
            return _NOTHING
        offset = self.number(vtable + 4 + 2 * number, "H")
        return table + offset if offset else _NOTHING

    def scalar(self, table: int, number: int, form: str) -> int:
        position = self.field(table, number)
        return 0 if position == _NOTHING else self.number(position, form)

    def vector(self, table: int, number: int, size: int) -> range:
        """Positions of a vector's elements of ``size`` bytes; none where it is left out."""
        position = self.field(table, number)
        if position == _NOTHING:
            return range(0)
        start = self.target(position)
        count = self.number(start, "I")
        if start + 4 + count * size > len(self.data):
            raise ModelError(
                f"the .tflite file has a list of {count} elements at byte {start}, which is beyond its end"
            )
        return range(start + 4, start + 4 + count * size, size)

    def tables(self, table: int, number: int) -> list[int]:
        return [self.target(position) for position in self.vector(table, number, 4)]

    def integers(self, table: int, number: int) -> tuple[int, ...]:
        return tuple(self.number(position, "i") for position in self.vector(table, number, 4))

    def text(self, table: int, number: int) -> str:
        span = self.vector(table, number, 1)
        return self.data[span.start : span.stop].decode("utf-8", errors="backslashreplace")

    def root(self) -> int:
        if len(self.data) < 8 or self.data[4:8] != b"TFL3":
            raise ModelError(
                "not a .tflite file: the identifier 'TFL3' is missing", hint="give a TensorFlow Lite model"
            )
        return self.target(0)


def read_tflite(data: bytes) -> TfliteModel:
    """Read the tensors and operators of a ``.tflite`` file.

    Raises:
        ModelError: not such a file, truncated, or with other than one subgraph.
    """
    file = _File(data)
    root = file.root()
    subgraphs = file.tables(root, _SUBGRAPHS)
    if len(subgraphs) != 1:
        raise ModelError(
            f"the .tflite file has {len(subgraphs)} subgraphs; an offline memory plan is for exactly one",
            hint="convert the model without control flow",
        )
    buffers = file.tables(root, _BUFFERS)
    tensors = tuple(_tensor(file, table, buffers) for table in file.tables(subgraphs[0], 0))
    inputs, outputs = file.integers(subgraphs[0], 1), file.integers(subgraphs[0], 2)
    operators = tuple((file.integers(op, 1), file.integers(op, 2)) for op in file.tables(subgraphs[0], 3))
    for number in (*inputs, *outputs, *(n for operands in operators for part in operands for n in part)):
        if not -1 <= number < len(tensors):
            raise ModelError(f"the .tflite file refers to tensor {number}, but it has {len(tensors)}")
    return TfliteModel(tensors, inputs, outputs, operators)


def _tensor(file: _File, table: int, buffers: list[int]) -> TfliteTensor:
    number = file.scalar(table, 2, "I")
    if number >= len(buffers):
        raise ModelError(f"the .tflite file refers to buffer {number}, but it has {len(buffers)}")
    bits = _ELEMENT_BITS.get(file.scalar(table, 1, "b"))
    shape = file.integers(table, 0)
    nbytes = None if bits is None or min(shape, default=0) < 0 else -(-math.prod(shape) * bits // 8)
    stored = len(file.vector(buffers[number], 0, 1)) > 0 or file.scalar(buffers[number], 1, "Q") > 1
    return TfliteTensor(file.text(table, 3), nbytes, stored, bool(file.scalar(table, 5, "b")))


def add_metadata(data: bytes, name: str, payload: bytes) -> bytes:
    """The ``.tflite`` file with ``payload`` as its metadata ``name``, in place of an entry that has this name already.

    The payload begins at a multiple of 16 bytes. Raises ModelError for a file that cannot be edited.
    """
    file = _File(data)
    root = file.root()
    fields = (file.number(root - file.number(root, "i"), "H") - 4) // 2
    if fields > _MODEL_FIELDS:
        raise ModelError(f"the .tflite file's model has {fields} fields; the schema known here has {_MODEL_FIELDS}")
    buffers = file.tables(root, _BUFFERS)
    _refuse_far_data(file, root, buffers)
    block = _Block()
    block.append(bytes(4) + b"TFL3")
    present = {number: file.target(file.field(root, number)) for number in range(1, fields) if _has(file, root, number)}
    references = block.table(_MODEL_FIELDS, {0: file.scalar(root, 0, "I")}, {*present, _BUFFERS, _METADATA})
    block.refer(0, block.tables[0])
    for number, target in present.items():
        if number not in (_BUFFERS, _METADATA):
            block.keep(references[number], target)
    entries = [table for table in file.tables(root, _METADATA) if file.text(table, 0) != name]
    own_buffer = block.vector(references[_BUFFERS], buffers)
    own_entry = block.vector(references[_METADATA], entries)
    named = block.table(2, {1: len(buffers)}, {0})
    block.refer(own_entry, block.tables[1])
    block.refer(named[0], block.append(struct.pack("<I", len(name.encode())) + name.encode() + b"\0"))
    held = block.table(1, {}, {0})
    block.refer(own_buffer, block.tables[2])
    block.align(16, ahead=4)
    block.refer(held[0], block.append(struct.pack("<I", len(payload)) + payload))
    return block.finish(data)


def _has(file: _File, root: int, number: int) -> bool:
    return file.field(root, number) != _NOTHING


def _refuse_far_data(file: _File, root: int, buffers: list[int]) -> None:
    """Data behind the flatbuffer is found by its absolute position, which moving would change."""
    operators = [op for subgraph in file.tables(root, _SUBGRAPHS) for op in file.tables(subgraph, 3)]
    far = any(file.scalar(table, 1, "Q") > 1 for table in buffers)
    if far or any(file.scalar(op, 9, "Q") > 1 for op in operators):
        raise ModelError("the .tflite file keeps data outside of its flatbuffer, as models above 2 GiB do")
    if not buffers:
        raise ModelError("the .tflite file has no buffers, not even the empty one that its tensors refer to")


class _Block:
    """New objects of a flatbuffer, written in order; references are filled in once it is known how long it is."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self.tables: list[int] = []
        self.inner: list[tuple[int, int]] = []
        self.outer: list[tuple[int, int]] = []

    def align(self, alignment: int, ahead: int = 0) -> None:
        """Pad so that what is written ``ahead`` bytes behind the next position is aligned."""
        self.bytes += bytes(-(len(self.bytes) + ahead) % alignment)

    def append(self, data: bytes) -> int:
        """Position of ``data``, at a multiple of 4."""
        self.align(4)
        self.bytes += data
        return len(self.bytes) - len(data)

    def table(self, fields: int, scalars: dict[int, int], references: set[int]) -> dict[int, int]:
        """A table of 32-bit fields behind its vtable; the positions of its references."""
        numbers = sorted({*scalars, *references})
        place = {number: 4 + 4 * i for i, number in enumerate(numbers)}
        vtable = [4 + 2 * fields, 4 + 4 * len(numbers), *(place.get(number, 0) for number in range(fields))]
        start = self.append(struct.pack(f"<{len(vtable)}H", *vtable))
        table = self.append(b"")
        self.append(struct.pack(f"<i{len(numbers)}I", table - start, *(scalars.get(number, 0) for number in numbers)))
        self.tables.append(table)
        return {number: table + place[number] for number in references}

    def vector(self, reference: int, kept: list[int]) -> int:
        """A vector of references to old tables and one to a new one, whose position is returned."""
        start = self.append(struct.pack("<I", len(kept) + 1) + bytes(4 * len(kept) + 4))
        self.refer(reference, start)
        for i, target in enumerate(kept):
            self.keep(start + 4 + 4 * i, target)
        return start + 4 + 4 * len(kept)

    def refer(self, position: int, target: int) -> None:
        """Let ``position`` refer to ``target`` in this block."""
        self.inner.append((position, target))

    def keep(self, position: int, target: int) -> None:
        """Let ``position`` refer to what was byte ``target`` of the old file."""
        self.outer.append((position, target))

    def finish(self, old: bytes) -> bytes:
        """The block, and the old file behind it."""
        self.align(_ALIGNMENT)
        moved = len(self.bytes)
        for position, target in (*self.inner, *((p, moved + t) for p, t in self.outer)):
            struct.pack_into("<I", self.bytes, position, target - position)
        return bytes(self.bytes) + old
