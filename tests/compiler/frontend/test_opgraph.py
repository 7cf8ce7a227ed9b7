"""Plain operator graphs: what is read, and that everything else is one error that names the field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opweave.compiler.frontend.opgraph import load_opgraph
from opweave.compiler.graph import Role
from opweave.errors import ModelError


def small() -> dict[str, Any]:
    return {
        "name": "small",
        "unit": "bytes",
        "weights": {"k": 64, "unread": 8},
        "tensors": {"x": 256, "y": 128, "z": 0},
        "ops": [
            {"op": "conv2d", "in": ["x"], "w": ["k"], "out": "y"},
            {"op": "add", "in": ["y", "x"], "w": [], "out": "z"},
        ],
        "outputs": ["z"],
    }


def load(tmp_path: Path, content: Any) -> Any:
    path = tmp_path / "graph.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_opgraph(path)


def test_reads_tensors_operators_and_roles(tmp_path: Path) -> None:
    imported = load(tmp_path, small())
    graph = imported.graph
    assert graph.name == "small"
    assert imported.input_names == ("x",)
    assert [(op.name, op.inputs, op.outputs, op.origin, op.body) for op in graph.ops] == [
        ("y", ("x", "k"), ("y",), "conv2d", ""),
        ("z", ("y", "x"), ("z",), "add", ""),
    ]
    assert {t.name: (t.nbytes, t.role) for t in graph.tensors} == {
        "k": (64, Role.WEIGHT),
        "x": (256, Role.INPUT),
        "y": (128, Role.ACTIVATION),
        "z": (0, Role.OUTPUT),
    }
    assert graph.outputs == ("z",)
    assert not imported.weights
    assert imported.flatten is None


def test_the_name_defaults_to_the_files(tmp_path: Path) -> None:
    content = small()
    del content["name"], content["unit"]
    assert load(tmp_path, content).graph.name == "graph"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("tensors"), ["tensors"]),
        (lambda c: c.update(extra=1), ["extra"]),
        (lambda c: c["ops"][1].pop("out"), ["out", "ops[1]"]),
        (lambda c: c["ops"][1].update(flops=3), ["flops", "ops[1]"]),
        (lambda c: c["ops"][0].update({"in": "x"}), ["array", "ops[0].in"]),
        (lambda c: c["tensors"].update(x=-1), [">= 0", "tensors"]),
        (lambda c: c["tensors"].update(x=1 << 60), ["<= ", "tensors"]),
        (lambda c: c["tensors"].update(x="256"), ["int", "tensors"]),
        (lambda c: c["weights"].update(k=1.5), ["int", "weights"]),
        (lambda c: c["ops"][1].update({"in": ["y", "nobody"]}), ["ops[1].in[1]", "nobody"]),
        (lambda c: c["ops"][0].update({"w": ["y"]}), ["ops[0].w[0]", "'y'"]),
        (lambda c: c["ops"][0].update({"out": "nobody"}), ["ops[0].out", "nobody"]),
        (lambda c: c.update(outputs=["nobody"]), ["outputs[0]", "nobody"]),
        (lambda c: c["ops"].reverse(), ["'y'", "before it exists"]),
        (lambda c: c["ops"][1].update({"out": "y"}), ["twice"]),
        (lambda c: c["weights"].update(x=1) or c["ops"][0].update({"w": ["x"]}), ["twice"]),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, change: Any, words: list[str]) -> None:
    content = small()
    change(content)
    with pytest.raises(ModelError) as caught:
        load(tmp_path, content)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"weights": ' * 5000, "\xff"])
def test_what_is_no_operator_graph_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelError, match=r"graph\.json"):
        load(tmp_path, text)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_bytes(b'{"name": "\xff\xfe"}')
    with pytest.raises(ModelError, match="malformed"):
        load_opgraph(path)


def test_a_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        load_opgraph(tmp_path / "nothing.json")
    with pytest.raises(ModelError, match="cannot be read"):
        load_opgraph(tmp_path)


def test_loading_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(small()))
    program = (
        "import sys; from opweave.compiler.frontend.opgraph import load_opgraph; "
        f"load_opgraph({str(path)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
