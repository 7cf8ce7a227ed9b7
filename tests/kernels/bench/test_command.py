"""The command without a GPU: what it lists, refuses and says; and with one that is made believe."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.cli import app
from opweave.errors import ExecutionError, OptionError
from opweave.kernels import add_rms_norm, registry, rope
from opweave.kernels._kernel import Kernel
from opweave.kernels.bench import command, without_gpu
from opweave.kernels.bench.resources import read_entries
from opweave.kernels.bench.rows import read_rows
from opweave.kernels.tuning import load, results_file
from tests.kernels.bench.test_worker import HEAD
from tests.kernels.test_resources import ENTRY

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is done without a CUDA device")


@pytest.fixture(autouse=True)
def _one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_places", lambda: {"add_rms_norm": "opweave.kernels.add_rms_norm:KERNEL"})


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    app(["bench", *arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_list_names_cases_and_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "kernels", "--list", "--filter", "add_rms_norm/*8192 tokens", "--dtype", "all")
    lines = text.splitlines()
    assert lines[-1] == "6 cases of 1 kernels"
    assert lines[1].startswith("add_rms_norm/Llama-3 70B, 8192 tokens/bfloat16/forward")
    assert "rows=8192 columns=8192" in lines[1]
    facts = json.loads(said(capsys, "kernels", "--list", "--filter", "add_rms_norm/", "--quick", "--json"))
    assert [case["case"].rpartition("/")[2] for case in facts["cases"]] == ["forward", "backward"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter", "nothing like it"], "no case fits 'nothing like it'"),
        (["--dtype", "int4"], "--dtype is 'int4'"),
        (["--minutes", "0"], "--minutes is 0; expected a number above 0"),
        (["--mode", "sideways"], "--mode is 'sideways'"),
        (["--compare", "absent.json", "--filter", "add_rms_norm/"], r"cannot read the results 'absent\.json'"),
        (["--list", "--compare", "absent.json"], "--compare has no effect here: it measures nothing"),
        (["--list", "--tune"], "--tune has no effect here"),
        (["--tune", "--compare", "absent.json"], "--compare has no effect here"),
    ],
)
def test_refuses_what_makes_no_sense(arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        app(["bench", "kernels", *arguments], standalone_mode=False)


@pytest.mark.parametrize("arguments", [["kernels", "--list"], ["resources"], ["compare", "a.json", "b.json"]])
def test_says_that_triton_is_missing(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="there is no triton here"):
        app(["bench", *arguments], standalone_mode=False)


def test_kernels_are_chosen_by_their_names() -> None:
    assert [kernel.name for kernel in command.known_kernels(print, ("rms_norm", "x"))] == ["add_rms_norm"]
    assert [kernel.name for kernel in command.known_kernels(print, ("a*norm",))] == ["add_rms_norm"]
    with pytest.raises(OptionError, match="no kernel fits 'x'"):
        app(["bench", "resources", "--filter", "x"], standalone_mode=False)


@WITHOUT_GPU
def test_tuning_needs_a_gpu() -> None:
    with pytest.raises(ExecutionError, match="there is none"):
        app(["bench", "kernels", "--tune", "--filter", "add_rms_norm/"], standalone_mode=False)


@pytest.mark.slow
@WITHOUT_GPU
def test_without_a_gpu_it_says_so_and_does_what_can_be_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "kernels", "--filter", "add_rms_norm/", "--out", str(tmp_path / "out"))
    assert text.startswith("There is no CUDA device here, so nothing is timed.")
    assert "interpreter: add_rms_norm bfloat16: right, off by" in text
    assert text.splitlines()[-2:] == [
        "7 functions compiled, 0 over budget; 1 checks, 0 failed",
        f"written: {tmp_path / 'out' / 'resources.csv'}",
    ]
    assert (tmp_path / "out" / "resources.csv").read_text().startswith("kernel,architecture,row,")


@WITHOUT_GPU
@pytest.mark.parametrize("arguments", [["kernels", "--out"], ["resources", "-o"]])
def test_what_cannot_be_written_is_said(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OptionError, match=r"cannot write results to .*/file/below.*: Not a directory"):
        app(["bench", *arguments, str(tmp_path / "file" / "below" / "it")], standalone_mode=False)


@WITHOUT_GPU
def test_the_table_so_far_outlives_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(kernels: Sequence[Kernel], *rest: object) -> dict[str, list[object]]:
        if kernels[0].name == "rope":
            raise KeyboardInterrupt
        return {"resources": [vars(ENTRY)], "faults": []}

    kernels = [add_rms_norm.KERNEL, rope.KERNEL]
    monkeypatch.setattr(command, "known_kernels", lambda say: kernels)
    monkeypatch.setattr(without_gpu, "resource_table", interrupted)
    monkeypatch.setattr(without_gpu, "checked", lambda names, dtypes: ())
    with pytest.raises(KeyboardInterrupt):
        command.kernels(command.Asked(out=tmp_path), lambda line: None)
    assert read_entries(tmp_path / "resources.csv") == [ENTRY]


@pytest.mark.slow
def test_benchmarks_kernels_is_the_same_command() -> None:
    listing = [sys.executable, "-m", "benchmarks.kernels", "--list", "--filter", "add_rms_norm/", "--quick"]
    done = subprocess.run(listing, capture_output=True, text=True, check=True, timeout=300)
    assert re.fullmatch(r"\d+ cases of \d+ kernels", done.stdout.splitlines()[-1])


BODY = """
    if request["task"] == "compile":
        break
    if "70B" in name:
        os._exit(1)
    end(name, ["Inductor"] if "4096" in name else [])
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A command that answers as a worker with a GPU would."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    script = tmp_path / "worker.py"
    script.write_text(HEAD + textwrap.dedent(BODY).replace("\n", "\n    "))
    return sys.executable, str(script)


def asked(tmp_path: Path, **changes: object) -> command.Asked:
    options = {"filters": ("add_rms_norm/",), "modes": ("forward",), "out": tmp_path / "out", **changes}
    return command.Asked(**options)  # type: ignore[arg-type]


def test_a_run_keeps_everything_and_says_what_is_missing(tmp_path: Path, worker: tuple[str, str]) -> None:
    lines: list[str] = []
    facts = command.kernels(asked(tmp_path), lines.append, worker)
    text = "\n".join(lines)
    assert [row["case"].rpartition("/")[0] for row in facts["rows"]] == [
        "",
        "add_rms_norm/Llama-3 8B, decoding 16 sequences/bfloat16",
        "add_rms_norm/Llama-3 8B, 4096 tokens/bfloat16",
        "add_rms_norm/Llama-3 70B, 8192 tokens/bfloat16",
    ]
    lost = "add_rms_norm/Llama-3 70B, 8192 tokens/bfloat16/forward"
    assert list(facts["lost"]) == [lost]
    assert f"  {lost}: the worker ended with 1: silent" in lines
    assert "no time was left for 0 cases, and for some providers of 1:" in text
    assert "2 cases measured" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("add_rms_norm.png", "index.html", "kernels.csv", "kernels.json"),
    ]


def test_a_run_is_compared_with_one_before(tmp_path: Path, worker: tuple[str, str]) -> None:
    command.kernels(asked(tmp_path), lambda line: None, worker)
    before = tmp_path / "out" / "kernels.json"
    lines: list[str] = []
    facts = command.kernels(asked(tmp_path, compare=before, out=tmp_path / "new"), lines.append, worker)
    assert [item["verdict"] for item in facts["comparison"]] == ["same", "same"]
    assert "0 slower, 0 faster, 2 same; 1.000 times" in "\n".join(lines)
    assert len(read_rows(tmp_path / "new" / "kernels.json")[1]) == len(facts["rows"])


def test_a_run_that_measures_nothing_fails(tmp_path: Path, worker: tuple[str, str]) -> None:
    with pytest.raises(ExecutionError, match="nothing could be measured: the worker ended with 1: silent"):
        command.kernels(asked(tmp_path, filters=("add_rms_norm/*70B",)), lambda line: None, worker)


def test_a_kernel_of_another_package_that_cannot_be_loaded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {**registry._places(), "foreign": "no_such_module:KERNEL"}
    monkeypatch.setattr(registry, "_places", lambda: places)
    lines: list[str] = []
    assert [kernel.name for kernel in command.known_kernels(lines.append, ("foreign", "add_rms_norm"))][:1] == [
        "add_rms_norm"
    ]
    assert lines == [
        "left out: kernel 'foreign' cannot be loaded from 'no_such_module:KERNEL': No module named 'no_such_module'"
    ]


TUNING = """
    result = dict(kernel="add_rms_norm", fingerprint="x", device="a GPU", dtype="bfloat16", triton="3", constants={},
                  num_warps=4, num_stages=1, sizes={"columns": 4096 if "8B" in name else 8192})
    long = "decoding" not in name
    tuned = [dict(result, num_warps=8 if long else 2, ms=1.0, default_ms=4.0 if long else 2.0)]
    say("end", case=name, rows=[row(name)], left_out=["70B"] if "70B" in name else [],
        tuned=[] if "70B" in name else tuned)
"""


def test_results_of_tuning_are_stored_as_they_come(
    tmp_path: Path, worker: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workloads share a bucket: the longer one counts, whichever comes last."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path(worker[1]).write_text(HEAD + textwrap.dedent(TUNING).replace("\n", "\n    "))
    lines: list[str] = []
    facts = command.tune(asked(tmp_path), lines.append, worker)
    (stored,) = load(results_file())
    assert (stored.num_warps, stored.default_ms) == (8, 4.0)
    assert len(facts["stored"]) == 1
    assert lines[-2].endswith("8192 tokens/bfloat16/forward: nothing stored: 70B")
    assert lines[-1] == f"1 results in {results_file()}"
    assert "4.00 times as fast as by default" in lines[1]
