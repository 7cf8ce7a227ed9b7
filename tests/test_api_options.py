"""Objectives, recomputation, rewriting in place, pins and explanations, as options of the Python interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import opweave
from opweave.compiler.plan import Recompute
from opweave.errors import Infeasible, OptionError


class Tower(nn.Module):
    """A value that is used at once and at the end, with elementwise operators between."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        early = torch.relu(x)
        return torch.tanh(torch.tanh(early) + x) * early


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def compiled(x: torch.Tensor, **options: Any) -> opweave.CompiledModel:
    model = opweave.compile(Tower(), (x,), deterministic=True, **options)
    assert model.verify().ok
    assert torch.allclose(model(x), Tower()(x))
    return model


@pytest.mark.parametrize("objective", ["traffic", "peak", "traffic,arena", "latency", "traffic,latency"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("inplace", [False, True, "inplace/elementwise(order=least_peak)"])
def test_options_combine(x: torch.Tensor, objective: str, recompute: bool, inplace: bool | str) -> None:
    model = compiled(x, scratchpad=1536, objective=objective, recompute=recompute, inplace=inplace)
    traffic = [c for c in model.plan.certificates if c.objective == "additional_traffic_bytes"]
    assert all(c.bound <= c.value for c in traffic)


def test_recomputing_spares_traffic(x: torch.Tensor) -> None:
    without, again = compiled(x, scratchpad=1536), compiled(x, scratchpad=1536, recompute=True)
    assert any(isinstance(instruction, Recompute) for instruction in again.plan.instructions)
    assert again.verify().additional_bytes < without.verify().additional_bytes


def test_writing_in_place_takes_less_room_and_loads_with_its_model(x: torch.Tensor, tmp_path: Path) -> None:
    model = compiled(x, objective="traffic,peak", inplace=True)
    assert model.verify().peak_bytes < compiled(x, objective="traffic,peak").verify().peak_bytes
    model.save(tmp_path / "plan.json")
    loaded = opweave.load_plan(tmp_path / "plan.json", (Tower(), (x,)))
    assert torch.allclose(loaded(x), Tower()(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_pinned_lies_where_it_was_pinned(x: torch.Tensor, inplace: bool) -> None:
    """A pin names a tensor; where that was written over another one, it is their buffer that is pinned."""
    pins = {"x": {"offset": 1024}, "mul": {"offset": 512, "resident": True}}
    model = compiled(x, pins=pins, inplace=inplace, objective="traffic,latency")
    buffer = {tensor.name: tensor.buffer for tensor in model.plan.graph.tensors}
    for name, pin in pins.items():
        found = [r for r in model.plan.residences or () if r.buffer == buffer[name]]
        assert {r.offset for r in found} == {pin["offset"]}


def test_pins_of_one_buffer_must_agree(x: torch.Tensor) -> None:
    """``tanh_1`` is written over ``add``: two pins then speak of one buffer."""
    with pytest.raises(OptionError, match="share buffer"):
        compiled(x, inplace=True, pins={"add": {"offset": 0}, "tanh_1": {"offset": 512}})


def wide(path: Path) -> Path:
    """A plain operator graph, the peak of whose order is above its working sets."""
    ops = [("a", ["x"]), ("b", ["a"]), ("c", ["b", "x"]), ("y", ["c", "a"])]
    rows = [{"op": "f", "in": reads, "w": [], "out": made} for made, reads in ops]
    tensors = dict.fromkeys(("x", "a", "b", "c", "y"), 512)
    path.write_text(json.dumps({"name": "wide", "weights": {}, "tensors": tensors, "ops": rows, "outputs": ["y"]}))
    return path


def test_a_plan_and_what_does_not_fit_are_explained(tmp_path: Path) -> None:
    path = wide(tmp_path / "wide.json")
    model = opweave.compile(path, scratchpad=1536, deterministic=True)
    moved = model.verify().additional_bytes
    assert opweave.explain(model, deterministic=True).additional_bytes == moved > 0
    found = opweave.explain(path, scratchpad=1536, deterministic=True)
    assert (found.verdict, found.additional_bytes) == ("optimal", moved)
    short = opweave.explain(path, scratchpad=1535)
    assert short.verdict == "infeasible"
    assert {step.short_bytes for step in short.steps} == {1}
    with pytest.raises(Infeasible, match="opweave explain"):
        opweave.compile(path, scratchpad=1535)


def test_what_pins_make_impossible_is_not_explained_away(tmp_path: Path) -> None:
    """Where bytes alone would fit, compiling and explaining end in the same error."""
    pins = {"b": {"offset": 0}, "x": {"offset": 256}}
    for ask in (opweave.compile, opweave.explain):
        with pytest.raises(Infeasible, match="pin") as error:
            ask(wide(tmp_path / "wide.json"), scratchpad=2048, pins=pins)
        assert "opweave explain" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"objective": "speed"}, "traffic, peak, arena, latency"),
        ({"objective": "traffic,traffic"}, "twice"),
        ({"objective": None}, "objective"),
        ({"recompute": "yes"}, "True or False"),
        ({"recompute": True, "residency": "residency/belady"}, "residency/belady"),
        ({"inplace": "order/beam"}, "does not decide inplace"),
        ({"inplace": "inplace/elementwise(order=some)"}, "some"),
        ({"inplace": 1}, "inplace"),
        ({"pins": [("x", 0)]}, "tensor names"),
    ],
)
def test_bad_options_are_named_before_the_model_is_read(options: dict[str, Any], word: str) -> None:
    with pytest.raises(OptionError, match=word):
        opweave.compile("missing.onnx", **options)


@pytest.mark.parametrize(
    ("pins", "word"),
    [
        ({"nobody": {"offset": 0}}, "nobody"),
        ({"x": {}}, "pin of 'x'"),
        ({"x": 0}, "pin of 'x'"),
        ({"x": {"bank": 3}}, "bank 3"),
        ({"x": {"offset": 7}}, "multiples"),
    ],
)
def test_bad_pins_are_named(x: torch.Tensor, pins: Any, word: str) -> None:
    with pytest.raises(OptionError, match=word):
        opweave.compile(Tower(), (x,), pins=pins)


@pytest.mark.parametrize("options", [{"pins": {"x": {"offset": 0}}}, {"objective": "latency"}, {"scratchpad": 2048}])
def test_fit_refuses_what_it_would_ignore(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        opweave.fit(wide(tmp_path / "wide.json"), **options)
