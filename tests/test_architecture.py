"""The house rules that a reader relies on: what imports what, and how much an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import opweave

ROOT = Path(opweave.__file__).resolve().parent
FLOORS = {
    "__version__": 0,
    "errors": 0,
    "hw_models": 1,
    "compiler": 2,
    "passes": 3,
    "kernels": 3,
    "fusing": 4,
    "torch_backend": 5,
    "pipelining": 5,
    "api": 6,
    "cli": 7,
}
HEAVY = ("torch", "ortools", "highspy", "matplotlib", "onnx", "pulp", "triton", "transformers", "numba")


def _imports(path: Path) -> Iterator[str]:
    """First component, below the package, of every relative import in ``path``."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module or "").split(".")) if node.module else base
            yield target[0] if target and target[0] else node.names[0].name


@pytest.mark.parametrize("floor", [name for name in FLOORS if name not in ("__version__", "errors")])
def test_arrows_run_down(floor: str) -> None:
    """A part imports only what lies on its own floor (itself) or below."""
    files = [ROOT / f"{floor}.py"] if (ROOT / f"{floor}.py").exists() else sorted((ROOT / floor).rglob("*.py"))
    assert files
    for path in files:
        for name in _imports(path):
            assert name == floor or FLOORS[name] < FLOORS[floor], f"{path.relative_to(ROOT)} imports {name}"


def test_verifier_shares_nothing_with_solvers_or_derived_graph_facts() -> None:
    """The verifier recounts dependencies and working sets itself instead of asking what the passes ask."""
    derived = {"predecessors", "successors", "reads", "writes", "touches", "output_buffers"}
    for path in sorted((ROOT / "compiler" / "verify").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in derived:
                assert not ast.unparse(node.value).endswith("graph"), f"{path.name}: {ast.unparse(node)}"


def _modules_after(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    ["import opweave; dir(opweave)", "import opweave.cli", "import opweave.passes.registry as r; r.names()"],
)
def test_import_is_light(statement: str) -> None:
    assert not _modules_after(statement) & set(HEAVY)


@pytest.mark.parametrize("order", ["highspy, ortools.sat.python.cp_model", "ortools.sat.python.cp_model, highspy"])
def test_solvers_share_a_process(order: str) -> None:
    """Both ship a libhighs; the pinned versions tolerate each other, whichever comes first."""
    assert {"highspy", "ortools"} <= _modules_after(f"import {order}")


def test_links_cover_the_wheel() -> None:
    """src/opweave holds one link to each part the wheel is made from, so both installs are the same package."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    links = sorted((ROOT / "src" / "opweave").iterdir())
    assert [link.name for link in links] == sorted(parts)
    assert all(link.is_symlink() and link.resolve() == (ROOT / link.name).resolve() for link in links)


def test_easy_placements_do_not_import_numba() -> None:
    """Planning a model loads the passes; the compiled search comes only with a placement that is hard."""
    assert "numba" not in _modules_after("import opweave.passes.address.exact, opweave.passes.planner")
