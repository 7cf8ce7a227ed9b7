"""What every file in kernels/ has to have; a new one is found by its name."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

import torch
import triton

from opweave import kernels
from opweave.compiler.graph import Graph
from tests.graphs.build import all_graphs
from tests.kernels.matching import check_matches

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in Path(kernels.__path__[0]).glob("[!_]*.py"))


@pytest.fixture(params=NAMES)
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"opweave.kernels.{request.param}")


def stem(kernel: ModuleType) -> str:
    return kernel.__name__.rpartition(".")[2]


def test_there_are_kernels() -> None:
    assert "add_rms_norm" in NAMES


def test_opweave_imports_neither_kernels_nor_triton() -> None:
    code = "import sys, opweave; sys.exit(any(n.split('.')[0] == 'triton' or 'kernels' in n for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_has_its_parts(kernel: ModuleType) -> None:
    parts = {"matches", "reference", "cost", "launch", "operator", "CONFIGS", f"{stem(kernel)}_kernel"}
    assert parts <= set(kernel.__all__)
    assert all(getattr(kernel, part).__doc__ for part in ("matches", "reference", "cost", "launch", "operator"))
    assert isinstance(getattr(kernel, f"{stem(kernel)}_kernel"), triton.JITFunction)
    assert kernel.CONFIGS


def test_has_its_tests(kernel: ModuleType) -> None:
    assert (HERE / f"test_{stem(kernel)}.py").is_file()
    assert (HERE / f"interpreted_{stem(kernel)}.py").is_file()


def test_launcher_reference_and_operator_agree_on_their_arguments(kernel: ModuleType) -> None:
    """The launcher takes what the reference takes and then, by keyword, its outputs; the operator writes only those."""
    parameters = inspect.signature(kernel.launch).parameters.values()
    outputs = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == list(
        inspect.signature(kernel.reference).parameters
    )
    schema = getattr(torch.ops.opweave, f"{stem(kernel)}_out").default._schema
    assert [argument.name for argument in schema.arguments] == [p.name for p in parameters]
    assert [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write] == outputs
    assert not schema.returns


@pytest.mark.parametrize("graph", all_graphs().values(), ids=all_graphs())
def test_matches_say_what_a_launch_replaces(kernel: ModuleType, graph: Graph) -> None:
    check_matches(kernel, graph)
