"""What was compiled and planned is found again, in other processes too; anything else, or damage, compiles afresh."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from opweave import torch_backend
from opweave.compiler.frontend.dynamo import backend
from tests.compiler.frontend.dynamo.cached_process import step
from tests.compiler.frontend.dynamo.contract import reports, same

PROCESS = Path(__file__).with_name("cached_process.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for these tests."""
    path = tmp_path_factory.mktemp("inductor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(path))
        yield path


def _again(**options: Any) -> tuple[list[bool], list[torch.Tensor]]:
    """Whether the graphs of a step came from the cache, when nothing else remembers them, and its results."""
    torch._dynamo.reset()
    torch_backend.reset()
    values = step(**options)
    return [report.from_cache for report in reports()], values


@pytest.fixture(scope="module")
def values(directory: Path) -> list[torch.Tensor]:
    """Results of the step that filled the cache."""
    return _again()[1]


def test_what_is_stored_is_found(directory: Path, values: list[torch.Tensor]) -> None:
    again, found = _again()
    assert again == [True, True]
    same(found, values)
    assert {report.phase for report in reports()} == {"forward", "backward"}


@pytest.mark.slow  # two more processes that import torch
def test_a_second_process_neither_lowers_nor_plans(directory: Path, values: list[torch.Tensor]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for made in (2, 0):
        done = subprocess.run([sys.executable, str(PROCESS)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["lowered"] == told["planned"] == made
        assert told["from_cache"] == [made == 0] * 2
        same(told["values"], [value.tolist() for value in values])


@pytest.mark.parametrize("options", [{"streams": 2}, {"deterministic": True}, {"time_limit": 3.0}, {"cache": False}])
def test_other_options_are_compiled(directory: Path, values: list[torch.Tensor], options: dict[str, Any]) -> None:
    again, found = _again(**options)
    assert again == [False, False]
    same(found, values)


def test_a_machine_file_that_changed_is_compiled(directory: Path, values: list[torch.Tensor], tmp_path: Path) -> None:
    """What a plan is made for is in the file, not in its name."""
    text = (resources.files("opweave") / "hw_models" / "data" / "cpu-server.toml").read_text()
    machine = tmp_path / "machine.toml"
    for name, compiled in (("one", True), ("one", False), ("another", True)):
        machine.write_text(text.replace('name = "cpu-server"', f'name = "{name}"'))
        again, found = _again(machine=str(machine))
        assert again == [not compiled] * 2
        same(found, values)


def test_another_format_is_compiled(
    directory: Path, values: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "FORMAT", -1)
    again, found = _again()
    assert again == [False, False]
    same(found, values)


def test_stock_graphs_are_stored_too(directory: Path, values: list[torch.Tensor]) -> None:
    for expected in (False, True):
        again, found = _again(tier="T0")
        assert again == [expected, expected]
        assert {report.tier for report in reports()} == {"T0"}
        same(found, values)


def test_a_dynamic_graph_from_the_cache_plans_new_sizes(directory: Path) -> None:
    """Other sizes than it was stored with: the plan is made where it is used."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.t() @ x).sin().sum(0)

    for expected, sizes in ((False, (5, 6)), (True, (7, 5, 9))):
        torch._dynamo.reset()
        torch_backend.reset()
        compiled = torch.compile(function, backend="opweave", dynamic=True)
        for rows in sizes:
            x = torch.linspace(-1, 1, rows * 4).reshape(rows, 4)
            same(compiled(x), function(x))
        assert [report.from_cache for report in reports()] == [expected]


@pytest.fixture
def told() -> Iterator[list[str]]:
    """Warnings of torch's cache and of ours, which are logged."""
    messages: list[str] = []

    class _Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = _Kept(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("torch._inductor.codecache", "opweave")]
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "garbage": lambda content: bytes(range(256)) * 4,
    "one bit": lambda content: _flipped(content, content.index(b"cpp_fused") + 3),
}


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_ignored_with_a_warning(
    directory: Path, values: list[torch.Tensor], told: list[str], damage: str
) -> None:
    """And replaced; the one bit leaves an entry that can be read, but is not what was stored."""
    tag = {"time_limit": 20.0 + list(DAMAGES).index(damage)}  # an entry for each damage
    before = _entries(directory)
    _again(**tag)
    (entry,) = _entries(directory) - before
    entry.write_bytes(DAMAGES[damage](entry.read_bytes()))
    assert told == []
    again, found = _again(**tag)
    assert again == [False, False]
    same(found, values)
    assert any("unable to load compiled graph" in message for message in told)
    assert ("an entry of the cache is damaged; it is ignored" in told) == (damage == "one bit")
    assert _again(**tag)[0] == [True, True]


def _entries(directory: Path) -> set[Path]:
    return {path for path in (directory / "aotautograd").rglob("*") if path.is_file()}
