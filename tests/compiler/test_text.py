"""The graph's text form prints and parses back exactly, and says where it cannot be read."""

from __future__ import annotations

import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

import opweave.compiler.text
from opweave.compiler.graph import Graph, Op, Tensor
from opweave.compiler.text import parse_graph, print_graph
from opweave.errors import ModelError
from tests.graphs.build import all_graphs
from tests.graphs.odd import odd_graphs

SMALL = all_graphs()


@pytest.mark.parametrize("name", SMALL)
def test_small_graphs_print_and_parse_back(name: str) -> None:
    assert parse_graph(print_graph(SMALL[name])) == SMALL[name]


@given(odd_graphs(text=st.text(st.characters(), max_size=6)))
def test_any_graph_prints_and_parses_back(graph: Graph) -> None:
    text = print_graph(graph)
    assert parse_graph(text) == graph
    assert text.encode().decode() == text  # survives a file, lone surrogates in names included
    assert len(text.splitlines()) == len(graph.tensors) + len(graph.ops) + 3  # one statement a line, however odd


def test_the_form_is_readable() -> None:
    assert print_graph(SMALL["output_aliases_input"]) == textwrap.dedent(
        """\
        graph "output_aliases_input" {
          input "x": float32[4, 16]
          activation "flat": float32[64] in "x"
          activation "y": float32[4, 16]
          op "op0" ("x") -> ("y") flops 64 do aten.relu.default(%0)
          return "flat", "y"
        }
        """
    )


def test_operators_that_run_once_and_touch_bytes_outside() -> None:
    """Both are kept, between the operations and the origin."""
    op = Op("draw", (), ("x",), flops=3, origin="rand", outside_bytes=64, repeatable=False)
    graph = Graph("g", (Tensor("x", (4,), "float32"),), (op,), ("x",))
    assert '() -> ("x") flops 3 outside 64 once from "rand"' in print_graph(graph)
    assert parse_graph(print_graph(graph)) == graph


def test_the_documented_example_parses() -> None:
    documentation = opweave.compiler.text.__doc__ or ""
    example = documentation[documentation.index('    graph "block"') : documentation.index("The grammar, a statement")]
    graph = parse_graph(example)
    assert print_graph(graph) == textwrap.dedent(example).rstrip() + "\n"
    assert [op.origin for op in graph.ops] == ["/stem/Conv"]


def test_comments_blank_lines_and_carriage_returns_mean_nothing() -> None:
    text = print_graph(SMALL["views"])
    loose = "# a comment\r\n\r\n" + text.replace("\n", "\r\n  # another\r\n\t\r\n")
    assert parse_graph(loose) == SMALL["views"]


BAD = [
    ("", 'line 1, column 1: expected "graph", found nothing'),
    ("grape {", 'line 1, column 1: expected "graph", found grape'),
    ("graph g {", "line 1, column 7: expected the graph's name in double quotes, found g"),
    ('graph "g" {\n  input "x" float32[1]\n}', "line 2, column 13: expected :, found float32"),
    ('graph "g" {\n  input "x": float33[1]\n}', "line 2, column 14: expected a dtype, found float33"),
    ('graph "g" {\n  input "x": float32 1\n}', "line 2, column 22: expected the shape in brackets, found 1"),
    ('graph "g" {\n  input "x": float32[1,,2]\n}', "line 2, column 24: expected an integer, found ,"),
    ('graph "g" {\n  input "x": float32[1 2]\n}', "line 2, column 24: expected , or ], found 2"),
    ('graph "g" {\n  input "x": float32[1] on\n}', "line 2, column 25: expected the end of the line, found on"),
    ('graph "g" {\n  input "x: float32[1]\n}', "line 2, column 9: expected the tensor's name in double quotes"),
    ('graph "g" {\n  inputs "x": float32[1]\n}', "line 2, column 3: expected a role, op, return or }, found inputs"),
    ('graph "g" {\n  op "a" ("x" -> ("y")\n}', "line 2, column 15: expected , or ), found ->"),
    ('graph "g" {\n  op "a" () -> () kind huge\n}', "line 2, column 24: expected a kind of operator, found huge"),
    ('graph "g" {\n  op "a" () -> () flops many\n}', "line 2, column 25: expected a number of operations, found many"),
    ('graph "g" {\n  op "a" () -> () flops ' + "9" * 50, "line 2, column 25: expected a number of operations"),
    ('graph "g" {\n  op "a" () -> () do\n}', "line 2, column 21: expected a body, found the end of the line"),
    ('graph "g" {\n  return\n  return\n}', "line 3, column 9: expected a single return"),
    ('graph "g" {\n}', "line 2, column 2: expected a return before }"),
    ('graph "g" {\n  return', "line 2, column 9: expected a line with } behind this one"),
    ('graph "g" {\n  return\n}\nmore', "line 4, column 1: expected nothing after }, found more"),
    ('graph "g" {\n  input "x": float32[-1]\n}', "line 2: tensor 'x' has shape [-1]"),
    ('graph "g" {\n  return "x"\n}', "the list of outputs names tensor 'x'"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_errors_say_where_and_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse_graph(text)
    assert message in str(caught.value)


@given(st.sampled_from(sorted(SMALL)), st.data())
def test_damaged_text_ends_in_a_model_error_or_a_graph(name: str, data: st.DataObject) -> None:
    text = print_graph(SMALL[name])
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 8)))
    damaged = text[:begin] + data.draw(st.text(max_size=3)) + text[end:]
    try:
        graph = parse_graph(damaged)
    except ModelError:
        return
    assert parse_graph(print_graph(graph)) == graph
