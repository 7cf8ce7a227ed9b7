"""A placed plan as a C99 header: sizes as macros, everything else as constant tables, no code and no dependencies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import OptionError
from ..plan import Plan
from .identifiers import comment_text, identifiers, string_literal
from .layout import Call, Layout, Operand, layout

__all__ = ["c_header", "save_c_header"]

_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,11}")
_PLACES = {"nowhere": 0, "scratchpad": 1, "backing": 2}
_KINDS = {"run": 0, "load": 1, "store": 2, "recompute": 3}

_TYPES = """\
typedef {size} {p}_size_t;

/* The buffers: bytes, and where each lies in the backing area ({P}_NONE: it never lies there). */
typedef struct {{
    {p}_size_t bytes;
    {p}_size_t backing_offset;
}} {p}_buffer_t;

/* A buffer occupies bytes offset to offset + bytes - 1 of the arena during steps begin to end - 1. */
typedef struct {{
    uint32_t buffer;
    uint32_t begin;
    uint32_t end;
    {p}_size_t offset;
}} {p}_residence_t;

/* One tensor of one call: where its bytes lie then, and where they begin in its buffer. */
typedef struct {{
    uint32_t buffer;
    uint32_t place; /* {P}_NOWHERE (no bytes), {P}_SCRATCHPAD or {P}_BACKING (streamed) */
    {p}_size_t offset;
    {p}_size_t within;
    {p}_size_t bytes;
}} {p}_operand_t;

/* Operator op runs with operands first_operand onwards, the inputs first. */
typedef struct {{
    uint32_t op;
    uint32_t step;
    uint32_t first_operand;
    uint32_t inputs;
    uint32_t outputs;
}} {p}_call_t;

/* The DMA list: copy bytes between the backing area and the arena, after all calls below before_call. */
typedef struct {{
    uint32_t kind; /* {P}_LOAD or {P}_STORE */
    uint32_t buffer;
    {p}_size_t backing_offset;
    {p}_size_t arena_offset;
    {p}_size_t bytes;
    uint32_t before_call;
    uint32_t step;
}} {p}_transfer_t;

/* The program, one instruction a step: index is into the calls for {P}_RUN and {P}_RECOMPUTE, else the transfers. */
typedef struct {{
    uint32_t kind;
    uint32_t index;
}} {p}_instruction_t;
"""


def c_header(plan: Plan, *, prefix: str = "opweave") -> str:
    """``plan`` as the text of a C99 header; see ``docs/exporting.md`` for its tables.

    Macros begin with ``prefix`` in capitals, types and tables with it in small letters.

    Raises:
        OptionError: ``prefix`` is not a letter followed by up to 11 letters, digits and underscores.
        PlanError: the plan has no addresses yet.
        VerificationError: the plan claims something that is not so.
    """
    if not _PREFIX.fullmatch(prefix):
        raise OptionError(
            f"prefix is {prefix!r}; it becomes part of C identifiers",
            hint="give a letter and up to 11 letters, digits and underscores, such as 'net'",
        )
    return "\n".join(_Writer(layout(plan), prefix.lower()).lines()) + "\n"


def save_c_header(plan: Plan, path: str | Path, *, prefix: str = "opweave") -> None:
    """Write ``c_header(plan, prefix=prefix)`` to ``path``. Raises as it, and OptionError where that cannot be."""
    text = c_header(plan, prefix=prefix)
    try:
        Path(path).write_text(text, encoding="ascii")
    except OSError as error:
        raise OptionError(f"cannot write header {str(path)!r}: {error.strerror}", hint="name another file") from error


class _Writer:
    """The header's text, section by section."""

    def __init__(self, facts: Layout, prefix: str) -> None:
        self.facts = facts
        self.p, self.P = prefix, prefix.upper()
        graph = facts.plan.graph
        self.buffers = list(graph.buffers)
        self.number = {name: i for i, name in enumerate(self.buffers)}
        self.buffer_words = identifiers(self.buffers)
        self.op_words = identifiers([op.name for op in graph.ops])

    def lines(self) -> Iterator[str]:
        yield from self._opening()
        yield from self._sizes()
        yield from self._names()
        yield _TYPES.format(p=self.p, P=self.P, size=self._size_type())
        yield from self._tables()
        yield from self._name_tables()
        yield f"#endif /* {self.P}_PLAN_H */"

    def _size_type(self) -> str:
        plan = self.facts.plan
        sizes = [base.nbytes for base in plan.graph.buffers.values()]
        largest = max(self.facts.backing_bytes, plan.machine.scratchpad_memory.capacity_bytes, *sizes)
        return "uint32_t" if largest < 0xFFFFFFFF else "uint64_t"

    def _opening(self) -> Iterator[str]:
        plan = self.facts.plan
        yield "/*"
        yield f" * Plan of graph {comment_text(plan.graph.name)} for machine {comment_text(plan.machine.name)}."
        yield " *"
        yield f" * Give it an arena of {self.P}_ARENA_BYTES in the scratchpad, aligned to {self.P}_ARENA_ALIGNMENT,"
        yield f" * and a backing area of {self.P}_BACKING_BYTES whose inputs and weights are filled in. Then take the"
        yield f" * {self.P}_STEPS instructions in turn: copy what the transfer says, or call the operator's kernel on"
        yield " * its operands. Afterwards the outputs lie in the backing area."
        yield " */"
        yield f"#ifndef {self.P}_PLAN_H"
        yield f"#define {self.P}_PLAN_H"
        yield ""
        yield "#include <stdint.h>"
        yield ""

    def _sizes(self) -> Iterator[str]:
        facts, memory = self.facts, self.facts.plan.machine.scratchpad_memory
        yield from self._defines(
            ("ARENA_BYTES", facts.arena_bytes),
            ("ARENA_ALIGNMENT", memory.alignment_bytes),
            ("SCRATCHPAD_BYTES", memory.capacity_bytes),
            ("BACKING_BYTES", facts.backing_bytes),
            ("BACKING_ALIGNMENT", facts.plan.machine.backing_memory.alignment_bytes),
            ("BACKING_READ_ONLY_BYTES", facts.read_only_bytes),
            ("STEPS", len(facts.plan.instructions)),
            ("BUFFERS", len(self.buffers)),
            ("OPERATORS", len(facts.plan.graph.ops)),
            ("RESIDENCES", len(facts.residences)),
            ("CALLS", len(facts.calls)),
            ("OPERANDS", sum(len(call.inputs) + len(call.outputs) for call in facts.calls)),
            ("TRANSFERS", len(facts.transfers)),
            *((kind.upper(), number) for kind, number in _KINDS.items()),
            *((place.upper(), number) for place, number in _PLACES.items()),
        )
        yield f"#define {self.P}_NONE (({self.p}_size_t)-1)"
        yield ""

    def _names(self) -> Iterator[str]:
        yield "/* Buffers and operators by name; arena offsets of a buffer's residences, in the order of time. */"
        yield from self._defines(*((f"BUFFER_{word}", i) for i, word in enumerate(self.buffer_words)))
        count = dict.fromkeys(self.buffers, 0)
        for residence in self.facts.residences:
            word = self.buffer_words[self.number[residence.buffer]]
            yield from self._defines((f"OFFSET_{word}_{count[residence.buffer]}", residence.offset or 0))
            count[residence.buffer] += 1
        yield from self._defines(*((f"OP_{word}", i) for i, word in enumerate(self.op_words)))
        yield ""

    def _defines(self, *values: tuple[str, int]) -> Iterator[str]:
        return (f"#define {self.P}_{name} {value}u" for name, value in values)

    def _tables(self) -> Iterator[str]:
        facts, number = self.facts, self.number
        rows = [
            (f"{base.nbytes}u, {self._backing(name)}", f"{i}: {name}")
            for i, (name, base) in enumerate(facts.plan.graph.buffers.items())
        ]
        yield from self._table("buffer", "buffers", rows)
        spans = [(f"{number[r.buffer]}u, {r.begin}u, {r.end}u, {r.offset or 0}u", r.buffer) for r in facts.residences]
        yield from self._table("residence", "residences", spans)
        operands = [(self._operand(o), o.tensor) for call in facts.calls for o in (*call.inputs, *call.outputs)]
        yield from self._table("operand", "operands", operands)
        yield from self._table("call", "calls", list(self._calls(facts.calls)))
        transfers = [
            (
                f"{self.P}_{t.kind.upper()}, {number[t.buffer]}u, {t.backing_offset}u, {t.scratchpad_offset}u, "
                f"{t.nbytes}u, {t.before}u, {t.step}u",
                t.buffer,
            )
            for t in facts.transfers
        ]
        yield from self._table("transfer", "transfers", transfers)
        yield from self._table("instruction", "instructions", self._instructions())

    def _backing(self, buffer: str) -> str:
        offset = self.facts.backing.get(buffer)
        return f"{self.P}_NONE" if offset is None else f"{offset}u"

    def _operand(self, operand: Operand) -> str:
        place = f"{self.P}_{operand.place.upper()}"
        return f"{self.number[operand.buffer]}u, {place}, {operand.offset}u, {operand.within}u, {operand.nbytes}u"

    def _calls(self, calls: Sequence[Call]) -> Iterator[tuple[str, str]]:
        first = 0
        for call in calls:
            inputs, outputs = len(call.inputs), len(call.outputs)
            op = self.facts.plan.graph.ops[call.op]
            yield f"{call.op}u, {call.step}u, {first}u, {inputs}u, {outputs}u", f"{op.name} {op.target}"
            first += inputs + outputs

    def _instructions(self) -> list[tuple[str, str]]:
        facts = self.facts
        rows = [(t.step, t.kind, i, t.buffer) for i, t in enumerate(facts.transfers)]
        rows += [(c.step, c.kind, i, facts.plan.graph.ops[c.op].name) for i, c in enumerate(facts.calls)]
        return [(f"{self.P}_{kind.upper()}, {i}u", f"{step}: {name}") for step, kind, i, name in sorted(rows)]

    def _table(self, kind: str, name: str, rows: Sequence[tuple[str, str]]) -> Iterator[str]:
        """C knows no empty array: a table without rows has one of zeros, which its count leaves out."""
        yield f"static const {self.p}_{kind}_t {self.p}_{name}[{max(1, len(rows))}] = {{"
        for row, comment in rows or [("0", "none")]:
            yield f"    {{ {row} }}, /* {comment_text(comment)} */"
        yield "};"
        yield ""

    def _name_tables(self) -> Iterator[str]:
        ops = self.facts.plan.graph.ops
        yield f"#ifdef {self.P}_NAMES /* define it before including this header to have the names as text, in UTF-8 */"
        yield from self._strings("buffer_names", self.buffers)
        yield from self._strings("operator_names", [op.name for op in ops])
        yield from self._strings("operator_targets", [op.target for op in ops])
        yield f"#endif /* {self.P}_NAMES */"
        yield ""

    def _strings(self, name: str, texts: Sequence[str]) -> Iterator[str]:
        yield f"static const char *const {self.p}_{name}[{max(1, len(texts))}] = {{"
        yield from (f"    {string_literal(text)}," for text in texts or [""])
        yield "};"
