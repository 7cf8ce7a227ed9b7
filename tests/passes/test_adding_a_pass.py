"""The worked example of docs/adding-a-pass.md does what the text says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import opweave.passes
import opweave.passes.residency
from opweave.compiler.pipeline import Budget, run_pass
from opweave.compiler.plan import Plan
from opweave.errors import OptionError
from opweave.passes.registry import make
from tests.passes.residency.training import tight, training_graph

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding-a-pass.md"


@pytest.fixture
def longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Puts the document's pass beside the others; returns the document's second example."""
    module, use = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (tmp_path / "residency").mkdir()
    (tmp_path / "residency" / "longest.py").write_text(module)
    monkeypatch.setattr(opweave.passes, "__path__", [*opweave.passes.__path__, str(tmp_path)])
    paths = [*opweave.passes.residency.__path__, str(tmp_path / "residency")]
    monkeypatch.setattr(opweave.passes.residency, "__path__", paths)
    monkeypatch.delitem(sys.modules, "opweave.passes.residency.longest", raising=False)
    return str(use)


def test_the_example_is_found_described_made_and_verified(longest: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tight(training_graph(12), 0.3)
    exec(longest, {"plan": plan})
    assert "additional_traffic_bytes" in capsys.readouterr().out


def test_the_example_checks_its_option_and_loses_to_the_ilp(longest: str) -> None:
    plan: Plan = tight(training_graph(12), 0.3)
    budget = Budget.of_seconds(60.0, workers=1)
    rule, exact = (run_pass(make(f"residency/{m}"), plan, budget).certificates[-1] for m in ("longest", "ilp"))
    assert rule.value >= exact.value == exact.bound > 0
    with pytest.raises(OptionError, match="at_once"):
        make("residency/longest(at_once=0)")
