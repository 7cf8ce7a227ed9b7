"""The command ``opweave experts``: a trace in, a table or JSON and a placement out, errors with their codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from opweave.cli import main
from opweave.passes.experts.placement import ExpertPlacement
from opweave.passes.experts.trace import zipf_trace


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["opweave", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


def test_experts_are_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = zipf_trace(300, 3, 8, 2, skew=0.5)
    np.savez(tmp_path / "t.npz", chosen=trace.chosen, experts=8)
    written = tmp_path / "p.json"
    assert _run(monkeypatch, "experts", tmp_path / "t.npz", "--devices", 4, "-o", written, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    found = ExpertPlacement.load(written)
    assert [list(order) for order in found.order] == printed["order"]
    assert printed["found"]["imbalance"] == found.found.imbalance <= found.default.imbalance
    assert _run(monkeypatch, "experts", tmp_path / "t.npz", "--devices", 4) == 0
    assert "3 layers of 8 experts on 4 devices of 8xh100-nvlink" in capsys.readouterr().out


def test_mistakes_have_their_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "t.json"
    trace.write_text('{"chosen": [[[0], [1]]], "experts": 8}')
    assert _run(monkeypatch, "experts", trace, "-m", "h100-sxm") == 4
    assert _run(monkeypatch, "experts", trace, "--devices", 3) == 2
    assert _run(monkeypatch, "experts", tmp_path / "none.json") == 3
    assert _run(monkeypatch, "experts", trace, "--devices", 2, "-o", tmp_path) == 2
    assert "Traceback" not in capsys.readouterr().err
