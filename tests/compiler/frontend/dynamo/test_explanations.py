"""What ``opweave.explain`` says of PyTorch models, and what it leaves as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import opweave
from opweave.compiler.frontend.dynamo.explain import BackendExplanation
from opweave.compiler.frontend.dynamo.options import BackendOptions
from opweave.errors import OptionError

X = torch.linspace(-1, 1, 12)


def _function(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def _explained(x: torch.Tensor = X, **options: object) -> BackendExplanation:
    found = opweave.explain(_function, x, **options)
    assert isinstance(found, BackendExplanation)
    return found


def test_explaining_often_neither_stops_explanations_nor_compilation() -> None:
    """Dynamo compiles a function eight times at most, then leaves it to eager mode."""
    for _ in range(torch._dynamo.config.recompile_limit + 1):
        assert len(_explained(cache=False, tier="T0").graphs) == 1
    before = len(opweave.backend_reports())
    torch.compile(_function, backend="opweave")(X)
    assert len(opweave.backend_reports()) == before + 1


def test_a_machine_of_a_function_is_the_backends() -> None:
    """Only a module that is not compiled could be meant for a scratchpad."""
    assert _explained(machine="h100-sxm").graphs[0].tier == "T1"
    compiled = opweave.explain(torch.compile(torch.nn.Tanh()), X, machine="h100-sxm")
    assert isinstance(compiled, BackendExplanation)
    with torch.no_grad():
        planned = opweave.explain(torch.nn.Tanh(), (X,), machine="edge-npu")
    assert not isinstance(planned, BackendExplanation)
    limited = opweave.explain(torch.nn.Tanh(), X, machine="h100-sxm", memory_limit=0.5)
    assert isinstance(limited, BackendExplanation)
    assert limited.graphs[0].limit_bytes == 40 * 1000**3


class _Module(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _function(x)


def test_a_module_that_compiles_itself_is_explained() -> None:
    model = _Module()
    model.compile(backend="eager")
    model(X)
    found = opweave.explain(model, X)
    assert isinstance(found, BackendExplanation)
    assert len(found.graphs) == 1


def test_an_exported_program_is_explained_for_a_scratchpad() -> None:
    """It can be called, in principle, but is no module that torch.compile takes."""
    program = torch.export.export(torch.nn.Tanh(), (X,))
    found = opweave.explain(program)
    assert not isinstance(found, BackendExplanation)
    assert found.operators == 1


def test_what_compiles_to_nothing_says_so() -> None:
    assert "no graph was compiled" in str(opweave.explain(lambda number: number + 1, 3))


def test_an_empty_graph_has_a_bound() -> None:
    assert "at least 0 B in any order" in str(_explained(torch.empty(0)))


def test_a_report_names_its_graphs(tmp_path: Path) -> None:
    paths = _explained().report(tmp_path / "new" / "folder")
    assert "graph 0 inference" in paths["graph-0-inference/index.html"].read_text()
    assert paths["explanation.txt"].read_text().startswith("1 graph compiled")


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OptionError, match=r"cannot write a report to .*file"):
        _explained().report(file)


@pytest.mark.parametrize("device", ["cuda:99", "meta"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(OptionError, match=f"'device' of backend 'opweave' is '{device}'; torch finds"):
        _explained(device=device)


def test_a_limit_beyond_every_memory_is_no_limit() -> None:
    assert BackendOptions(memory_limit=10**30).limit_bytes(1) == 2**60
    assert BackendOptions(memory_limit="1000000000000 GiB").limit_bytes(1) == 2**60
