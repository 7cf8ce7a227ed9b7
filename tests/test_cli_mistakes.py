"""What a user of the command line gets wrong, and who reads what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import opweave
from opweave.cli.shared import UNREAD, keywords
from opweave.errors import ExecutionError, ModelError, OptionError


def graph(path: Path) -> Path:
    """A plain operator graph."""
    rows = [{"op": "f", "in": ["x"], "w": [], "out": "y"}]
    path.write_text(
        json.dumps({"name": "g", "weights": {}, "tensors": {"x": 64, "y": 64}, "ops": rows, "outputs": ["y"]})
    )
    return path


@pytest.mark.skipif(os.name != "posix", reason="pipes of other systems end otherwise")
def test_a_reader_that_goes_is_not_a_difference_from_the_reference(tmp_path: Path) -> None:
    """The plan is there all the same, and Python does not complain at exit."""
    reading, writing = os.pipe()
    os.close(reading)
    paths = (str(graph(tmp_path / "g.json")), "-o", str(tmp_path / "plan.json"))
    command = [sys.executable, "-m", "opweave.cli", "compile", *paths]
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == UNREAD
    assert "Error" not in done.stderr
    assert opweave.load_plan(tmp_path / "plan.json").verify().ok


def test_dimensions_that_contradict_each_other() -> None:
    assert keywords({"dim": ["n=4", "m=2", "n=4"]})["dims"] == {"n": 4, "m": 2}
    with pytest.raises(OptionError, match=r"'n=5' contradicts .* n=4"):
        keywords({"dim": ["n=4", "n=5"]})


@pytest.mark.parametrize(
    ("options", "word"),
    [({"dims": {"n": 1}}, "dims"), ({"fill_seed": 0}, "seed"), ({"definitions": {"f": abs}}, "def")],
)
def test_options_that_an_operator_graph_has_no_use_for(tmp_path: Path, options: dict[str, Any], word: str) -> None:
    with pytest.raises(OptionError, match=f"{word}.* no effect on an operator graph"):
        opweave.compile(graph(tmp_path / "g.json"), **options)


@pytest.mark.parametrize("suffix", ["json", "onnx"])
def test_a_path_that_no_plan_can_name(suffix: str) -> None:
    with pytest.raises(ModelError, match="not Unicode"):
        opweave.compile(f"g\udcff.{suffix}")


def test_what_cannot_be_executed_says_what_can(tmp_path: Path) -> None:
    """Not that random inputs might be to blame."""
    with pytest.raises(ExecutionError, match="planned, not executed") as error:
        opweave.compile(graph(tmp_path / "g.json"))(1)
    assert ".onnx" in error.value.hint
