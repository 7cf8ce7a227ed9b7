"""Routing traces: counted right, read from both kinds of file, and refused with the place of what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from opweave.errors import ModelError, OptionError
from opweave.passes.experts.trace import RoutingTrace, read_trace, zipf_trace


def test_counts_are_those_of_a_loop() -> None:
    trace = zipf_trace(50, 3, 6, 2, seed=1)
    load = np.zeros((3, 6), int)
    flow = np.zeros((2, 6, 6), int)
    for token in trace.chosen:
        for layer in range(3):
            for expert in token[layer]:
                load[layer, expert] += 1
                for after in token[layer + 1] if layer < 2 else ():
                    flow[layer, expert, after] += 1
    assert np.array_equal(trace.load, load)
    assert np.array_equal(trace.flow, flow)


def test_files_are_read_back(tmp_path: Path) -> None:
    trace = zipf_trace(20, 2, 4, 2)
    np.savez(tmp_path / "a.npz", chosen=trace.chosen.astype(np.int32), experts=4)
    (tmp_path / "a.json").write_text(json.dumps({"chosen": trace.chosen.tolist(), "experts": 4}))
    (tmp_path / "b.json").write_text(json.dumps({"chosen": [[[0], [2]]]}))
    for name in ("a.npz", "a.json"):
        read = read_trace(tmp_path / name)
        assert np.array_equal(read.chosen, trace.chosen)
        assert read.experts == 4
    assert read_trace(tmp_path / "b.json").experts == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no routing trace"),
        ("[]", "no 'chosen'"),
        ('{"chosen": [[0, 1]]}', r"shape \[1, 2\]"),
        ('{"chosen": [[[0]], [[0, 1]]]}', "different lengths"),
        ('{"chosen": [[[0.5]]]}', "whole numbers"),
        ('{"chosen": []}', "of type|shape"),
        ('{"chosen": [[["a"]]]}', "whole numbers"),
        ('{"chosen": [[[0], [7]]], "experts": 4}', "token 0 in layer 1 to expert 7 of 4"),
        ('{"chosen": [[[-1]]]}', "expert -1|experts"),
        ('{"chosen": [[[0]]], "experts": [4]}', "expected one number"),
        ('{"chosen": [[[0]]], "experts": 99999999}', "expected 1 to"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_trace(tmp_path / "t.json")


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        read_trace(tmp_path / "missing.json")
    (tmp_path / "t.npz").write_bytes(b"PK nothing")
    with pytest.raises(ModelError, match="no routing trace"):
        read_trace(tmp_path / "t.npz")
    np.savez(tmp_path / "pickle.npz", chosen=np.array([None], dtype=object))
    with pytest.raises(ModelError, match="no routing trace"):
        read_trace(tmp_path / "pickle.npz")
    with pytest.raises(OptionError, match=r"\.npz or \.json"):
        read_trace(tmp_path / "t.csv")


def test_synthetic_traces_are_skewed_and_follow() -> None:
    """A token's experts differ; more skew loads one expert more; what follows keeps tokens together."""
    even, skewed = zipf_trace(2000, 2, 8, 2, skew=0.0, follow=0.0), zipf_trace(2000, 2, 8, 2, skew=1.5, follow=0.9)
    assert all(len(set(row)) == 2 for row in skewed.chosen.reshape(-1, 2).tolist())
    assert skewed.load.max() > 1.5 * even.load.max()
    assert skewed.flow.max() > 2 * even.flow.max()
    assert np.array_equal(skewed.chosen, zipf_trace(2000, 2, 8, 2, skew=1.5, follow=0.9).chosen)
    with pytest.raises(OptionError, match="3 of 2 experts"):
        zipf_trace(1, 1, 2, 3)


def test_trace_needs_three_axes() -> None:
    with pytest.raises(ModelError, match="expected \\[tokens, layers, top_k\\]"):
        RoutingTrace(np.zeros((2, 0, 1), np.int64), 4)
