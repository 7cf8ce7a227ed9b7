"""C headers, compiled and replayed: what the tables say is what the verifier counts."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.export import c_header, save_c_header
from opweave.compiler.export.identifiers import comment_text, identifiers, string_literal
from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Load, Plan, Recompute, Residence, Run, Store
from opweave.compiler.verify import verify
from opweave.errors import OptionError, PlanError, VerificationError
from opweave.passes.planner import Planner
from tests.graphs.build import GraphBuilder, all_graphs, machine
from tests.graphs.plans import keep_everything, keep_nothing
from tests.passes.residency.training import tight, training_graph

COMPILER = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler (gcc, cc or clang) on this machine")
STRICT = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror"]
REPLAY = Path(__file__).with_name("replay.c")
HOSTILE = (
    '"; exit(1); "',
    "line\nbreak",
    "*/ int x; /*",
    "??/",
    "??'??<",
    "\\",
    "\0nul",
    "ünïcödé 網",
    "",
    "9 lives",
    "//",
)


def run_compiler(*arguments: str, folder: Path) -> None:
    result = subprocess.run([str(COMPILER), *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr[:3000]


def replay(plan: Plan, folder: Path) -> tuple[list[int], list[bool], list[bytes]]:
    """Bytes loaded, stored and streamed; by buffer, whether backing memory ends with its contents; the names."""
    (folder / "plan.h").write_text(c_header(plan, prefix="net"), encoding="ascii")
    run_compiler(*STRICT, "-Wno-type-limits", "-I.", str(REPLAY), "-o", "replay", folder=folder)
    result = subprocess.run([str(folder / "replay")], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
    figures, *names = result.stdout.splitlines()
    numbers = [int(word) for word in figures.split()]
    return numbers[:3], [bool(n) for n in numbers[3:]], [bytes.fromhex(name) for name in names]


def planned(graph: Graph, share: float = 0.2, *, weights_streamed: bool = False) -> Plan:
    streamed = tuple(b for b, base in graph.buffers.items() if base.role is Role.WEIGHT) if weights_streamed else ()
    return Planner("order/given", "residency/least_cost", "address/best_fit").plan(
        tight(graph, share, streamed=streamed), Budget.of_seconds(30)
    )


def renamed(graph: Graph, words: dict[str, str]) -> Graph:
    """``graph`` with other names for tensors; operators are named after their first output."""

    def new(name: str) -> str:
        return words.get(name, name)

    tensors = tuple(msgspec.structs.replace(t, name=new(t.name), buffer=new(t.buffer)) for t in graph.tensors)
    ops = tuple(
        Op(new(op.outputs[0]) + "!", tuple(map(new, op.inputs)), tuple(map(new, op.outputs)), body=op.body)
        for op in graph.ops
    )
    return Graph('*/ ??/ " \n', tensors, ops, tuple(map(new, graph.outputs)))


@needs_compiler
@pytest.mark.parametrize("name", all_graphs())
@pytest.mark.parametrize("make", [keep_everything, keep_nothing, planned], ids=lambda make: make.__name__)
def test_replaying_the_tables_moves_what_the_verifier_counts(
    name: str, make: Callable[[Graph], Plan], tmp_path: Path
) -> None:
    graph = all_graphs()[name]
    plan = make(graph)
    moved, ends_in_backing, _ = replay(plan, tmp_path)
    rows = verify(plan).traffic
    assert moved == [sum(getattr(row, f"{way}_bytes") for row in rows) for way in ("loaded", "stored", "streamed")]
    outputs = {b for b in graph.output_buffers if graph.buffers[b].nbytes}
    assert all(ends for buffer, ends in zip(graph.buffers, ends_in_backing, strict=True) if buffer in outputs)


@needs_compiler
def test_spills_and_streamed_weights_are_replayed(tmp_path: Path) -> None:
    """A training graph without room spills; a shared weight is streamed twice."""
    spilling = planned(training_graph(12), 0.1)
    assert verify(spilling).additional_bytes > 0
    moved, _, _ = replay(spilling, tmp_path)
    assert sum(moved) == verify(spilling).total_bytes
    streaming = planned(all_graphs()["shared_weight"], weights_streamed=True)
    moved, _, _ = replay(streaming, tmp_path)
    assert moved[2] == sum(row.streamed_bytes for row in verify(streaming).traffic) > 0


@needs_compiler
def test_a_recomputed_operator_is_called_twice(tmp_path: Path) -> None:
    g = GraphBuilder("again")
    a = g.unary("relu", g.input("x", 4, 16), "a")
    left = g.unary("tanh", a, "left")
    graph = g.build(g.binary("add", left, g.unary("sigmoid", a, "right"), "y"))
    steps = (Load("x"), Run("op0"), Run("op1"), Recompute("op0"), Run("op2"), Run("op3"), Store("y"))
    spans = {"x": (0, 4, 0), "a": (1, 3, 256), "left": (2, 6, 512), "right": (4, 6, 0), "y": (5, 7, 768)}
    residences = [Residence(buffer, "sram", *span) for buffer, span in spans.items()]
    residences.append(Residence("a", "sram", 3, 5, 768))
    plan = Plan(graph, machine(1024), steps, tuple(residences))
    moved, _, _ = replay(plan, tmp_path)
    assert moved == [256, 256, 0]
    header = (tmp_path / "plan.h").read_text()
    assert "{ NET_RECOMPUTE, 2u }, /* 3: op0 */" in header
    assert "#define NET_OFFSET_a_1 768u" in header


@needs_compiler
def test_the_replay_notices_a_wrong_table(tmp_path: Path) -> None:
    """The program in C is no rubber stamp: an operand one byte off changes what an operator reads."""
    plan = keep_nothing(all_graphs()["residual"])
    header = c_header(plan, prefix="net")
    rows = [line for line in header.splitlines() if "NET_SCRATCHPAD, 0u" in line]
    assert rows
    wrong = header.replace(rows[0], rows[0].replace("NET_SCRATCHPAD, 0u", "NET_SCRATCHPAD, 1u"))
    (tmp_path / "plan.h").write_text(wrong, encoding="ascii")
    run_compiler(*STRICT, "-I.", str(REPLAY), "-o", "replay", folder=tmp_path)
    result = subprocess.run([str(tmp_path / "replay")], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "FAULT operator read other bytes" in result.stdout


@needs_compiler
def test_hostile_names_compile_and_come_back(tmp_path: Path) -> None:
    """Quotes, line breaks, comment ends and trigraphs are data: nothing of them becomes code."""
    graph = all_graphs()["fan_out"]
    names = [t.name for t in graph.tensors]
    hostile = renamed(graph, dict(zip(names, [word for word in HOSTILE if word], strict=False)))
    plan = keep_nothing(hostile)
    _, _, texts = replay(plan, tmp_path)
    expected = [name.encode() for name in hostile.buffers]
    assert texts == [name.partition(b"\0")[0] for name in expected]


@needs_compiler
@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=40, unique=True))
def test_any_text_is_an_identifier_a_string_and_a_comment(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("names")
    words = identifiers(names)
    assert len(set(words)) == len(words)
    lines = [
        f"#define N_{word} {i}u /* {comment_text(name)} */"
        for i, (word, name) in enumerate(zip(words, names, strict=True))
    ]
    lines += ["static const char *const texts[] = {", *(f"    {string_literal(name)}," for name in names), "};"]
    lines += ["int main(void) { return texts[N_" + words[-1] + "] == 0; }"]
    (folder / "names.c").write_text("\n".join(lines) + "\n", encoding="ascii")
    run_compiler(*STRICT, "-fsyntax-only", "names.c", folder=folder)


@needs_compiler
def test_the_header_is_clean_and_may_be_included_twice(tmp_path: Path) -> None:
    (tmp_path / "plan.h").write_text(c_header(keep_everything(all_graphs()["views"])), encoding="ascii")
    (tmp_path / "twice.c").write_text('#include "plan.h"\n#include "plan.h"\nint main(void) { return 0; }\n')
    run_compiler(*STRICT, "-Wconversion", "-fsyntax-only", "twice.c", folder=tmp_path)


@needs_compiler
def test_the_loop_in_the_documentation_compiles(tmp_path: Path) -> None:
    docs = next(parent for parent in Path(__file__).parents if (parent / "docs").is_dir()) / "docs" / "exporting.md"
    loop = docs.read_text(encoding="utf-8").partition("```c\n")[2].partition("```")[0]
    assert "net_instructions[i]" in loop
    (tmp_path / "plan.h").write_text(c_header(planned(all_graphs()["chain"]), prefix="net"), encoding="ascii")
    program = (
        '#include "plan.h"\n#include <string.h>\nstatic uint8_t arena[NET_ARENA_BYTES], backing[NET_BACKING_BYTES];\n'
        "typedef void (*kernel_t)(const net_operand_t *, uint32_t, uint32_t);\n"
        f"static const kernel_t kernels[NET_OPERATORS] = {{ 0 }};\nint main(void) {{\n{loop}return 0;\n}}\n"
    )
    (tmp_path / "loop.c").write_text(program, encoding="ascii")
    run_compiler(*STRICT, "-fsyntax-only", "loop.c", folder=tmp_path)


@needs_compiler
def test_memories_beyond_32_bits_get_64_bit_sizes(tmp_path: Path) -> None:
    huge = Graph(
        "huge",
        (Tensor("x", (3 << 30,), "int8", Role.INPUT), Tensor("y", (3 << 30,), "int8")),
        (Op("f", ("x",), ("y",)),),
        ("y",),
    )
    text = c_header(keep_everything(huge, machine(1 << 33)))
    assert "typedef uint64_t opweave_size_t;" in text
    assert f"#define OPWEAVE_BACKING_BYTES {6 << 30}u" in text
    (tmp_path / "plan.h").write_text(text, encoding="ascii")
    (tmp_path / "use.c").write_text('#include "plan.h"\nint main(void) { return 0; }\n')
    run_compiler(*STRICT, "-fsyntax-only", "use.c", folder=tmp_path)


def test_identifiers_keep_what_needs_no_change() -> None:
    """A name that is an identifier already is not displaced by one that only becomes it."""
    assert identifiers(["conv 1", "conv_1", "conv-1", "9", ""]) == ["conv_1_2", "conv_1", "conv_1_3", "9", "_"]
    long = "layer" * 20
    assert identifiers(["a/" + long, "b/" + long, long]) == [long[-36:], long[-36:] + "_2", long[-36:] + "_3"]
    assert len(set(identifiers(f"{i} {long}" for i in range(20_000)))) == 20_000


def test_strings_hold_no_trigraph_and_end_where_they_should() -> None:
    assert string_literal('a"?\\\n1é') == '"a\\"\\?\\\\\\0121\\303\\251"'
    assert "??" not in string_literal("????/")
    assert len(string_literal("x" * 5000)) == 1002
    assert comment_text("*/??/\\\n") == "_" * 7


def test_the_same_plan_gives_the_same_header() -> None:
    plan = keep_nothing(all_graphs()["residual"])
    assert c_header(plan) == c_header(Plan.from_json(plan.to_json()))


def test_weights_come_first_in_the_backing_area() -> None:
    """What never changes can be linked into read-only memory."""
    plan = keep_everything(all_graphs()["chain"])
    text = c_header(plan)
    weights = 16 * 32 * 4 + 32 * 8 * 4
    assert f"#define OPWEAVE_BACKING_READ_ONLY_BYTES {weights}u" in text


def test_unplaced_faulty_or_badly_named_plans_are_refused(tmp_path: Path) -> None:
    plan = keep_everything(all_graphs()["chain"])
    with pytest.raises(PlanError, match="has decided its order, but no addresses"):
        c_header(Plan.of_order(plan.graph, plan.machine))
    without_load = tuple(i for i in plan.instructions if not isinstance(i, Load))
    with pytest.raises(VerificationError, match="faults and is not exported"):
        c_header(msgspec.structs.replace(plan, instructions=without_load))
    for prefix in ("", "9", "a b", "_net", "x" * 13):
        with pytest.raises(OptionError, match="becomes part of C identifiers"):
            c_header(plan, prefix=prefix)
    with pytest.raises(OptionError, match="cannot write header"):
        save_c_header(plan, tmp_path / "missing" / "plan.h")
    save_c_header(plan, tmp_path / "plan.h", prefix="Net")
    assert "#define NET_STEPS" in (tmp_path / "plan.h").read_text()
