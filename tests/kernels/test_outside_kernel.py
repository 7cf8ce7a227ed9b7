"""The kernel of docs/adding-a-kernel.md as a package of its own: installed, tested, compiled, listed by the bench."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "squared_relu"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and the metadata that installing it leaves."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE / "squared_relu", site / "squared_relu")
    metadata = site / "squared_relu-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: squared-relu\nVersion: 1.0\n")
    project = (EXAMPLE / "pyproject.toml").read_text()
    section = project.partition('[project.entry-points."opweave.kernels"]')[2].strip().replace('"', "")
    (metadata / "entry_points.txt").write_text(f"[opweave.kernels]\n{section}\n")
    return site


def run(site: Path, *arguments: str, interpreted: bool = False) -> str:
    path = os.pathsep.join(part for part in (str(site), os.environ.get("PYTHONPATH", "")) if part)
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1" if interpreted else "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_own_tests_pass(installed: Path) -> None:
    run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(EXAMPLE), str(EXAMPLE / "tests"))


def test_its_numerics_pass_under_the_interpreter(installed: Path) -> None:
    where = str(EXAMPLE / "tests" / "test_squared_relu.py")
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", str(EXAMPLE), "-k", "reference")
    run(installed, "-m", "pytest", *options, where, interpreted=True)


def test_the_bench_lists_and_compiles_it(installed: Path) -> None:
    listed = run(installed, "-m", "opweave.cli", "bench", "kernels", "--filter", "squared_relu", "--list")
    assert "Primer, 2048 tokens" in listed
