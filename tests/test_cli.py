"""The command line as a user meets it: files in, files out, documented exit codes, JSON that parses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from benchmarks.networks import darts_cifar
from onnx import TensorProto, helper, numpy_helper

from opweave import cli
from opweave.cli import shared
from opweave.errors import (
    ExecutionError,
    Infeasible,
    MachineError,
    ModelError,
    OptionError,
    PlanError,
    VerificationError,
)


def opweave(*arguments: str | Path, check: int = 0) -> str:
    """Run the command line in a process of its own; its standard output, after checking the exit code."""
    command = [sys.executable, "-m", "opweave.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == check, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if check == 0 else done.stdout + done.stderr


def residual_network(path: Path, blocks: int = 3, symbolic: bool = False) -> Path:
    """A small residual convolutional network with random weights, saved to ``path``."""
    random = np.random.default_rng(0)
    nodes, weights, x = [], [], "image"
    for block in range(blocks):
        value = (random.standard_normal((8, 8, 3, 3)) * 0.2).astype(np.float32)
        weights.append(numpy_helper.from_array(value, f"w{block}"))
        nodes.append(helper.make_node("Conv", [x, f"w{block}"], [f"c{block}"], pads=[1] * 4, kernel_shape=[3, 3]))
        nodes.append(helper.make_node("Relu", [f"c{block}"], [f"r{block}"]))
        nodes.append(helper.make_node("Add", [f"r{block}", x], [f"a{block}"]))
        x = f"a{block}"
    shape = ["batch" if symbolic else 1, 8, 16, 16]
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return residual_network(tmp_path_factory.mktemp("network") / "residual.onnx")


@pytest.fixture(scope="module")
def plan(network: Path) -> Path:
    """A plan for a scratchpad of one working set (three 8 KiB tensors), which leaves no room to spare."""
    path = network.parent / "plan.json"
    opweave("compile", network, "--scratchpad", "24KiB", "-o", path, "--time-limit", "5")
    return path


COMMANDS = (
    "compile",
    "run",
    "explain",
    "verify",
    "fit",
    "view",
    "export",
    "bench",
    "hw",
    "passes",
    "experts",
    "pipeline",
)


def test_help_lists_the_commands() -> None:
    text = opweave("--help")
    assert all(command in text for command in COMMANDS)


def test_compile_reports_what_it_proved(network: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    facts = json.loads(opweave("compile", network, "--scratchpad", "24KiB", "-o", out, "--time-limit", "5", "--json"))
    assert out.exists()
    assert facts["plan"] == str(out)
    verified = json.loads(opweave("verify", out, "--json"))
    assert verified["ok"]
    assert verified["level"] == "timed"


def test_run_equals_onnxruntime(plan: Path, tmp_path: Path) -> None:
    facts = json.loads(opweave("run", plan, "--json", "--outputs", tmp_path / "y.npz"))
    assert [c["equal"] for c in facts["comparison"]] == [True]
    assert np.load(tmp_path / "y.npz")["a2"].shape == (1, 8, 16, 16)


def test_run_compiles_a_model_first_and_takes_inputs(network: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", image=np.ones((1, 8, 16, 16), np.float32))
    assert "equal to onnxruntime" in opweave("run", network, "--inputs", tmp_path / "x.npz")
    np.savez(tmp_path / "wrong.npz", picture=np.ones((1, 8, 16, 16), np.float32))
    assert "'image'" in opweave("run", network, "--inputs", tmp_path / "wrong.npz", check=8)


def test_symbolic_dimension_is_bound_on_the_command_line(tmp_path: Path) -> None:
    path = residual_network(tmp_path / "symbolic.onnx", symbolic=True)
    assert "batch" in opweave("compile", path, "-o", tmp_path / "p.json", check=ModelError.exit_code)
    opweave("compile", path, "-o", tmp_path / "p.json", "--dim", "batch=2")
    assert "--dim" in opweave("compile", path, "--dim", "batch", check=OptionError.exit_code)


def test_fit_is_a_falling_curve(network: Path, tmp_path: Path) -> None:
    curve = json.loads(opweave("fit", network, "--points", "4", "--time-limit", "8", "--report", tmp_path, "--json"))[
        "points"
    ]
    assert curve[0]["capacity_bytes"] == 24 * 1024
    traffic = [point["additional_bytes"] for point in curve]
    assert traffic == sorted(traffic, reverse=True)
    assert all(point["bound_bytes"] <= point["additional_bytes"] for point in curve)
    assert (tmp_path / "fit.png").stat().st_size > 1000


def test_view_writes_the_page(plan: Path, tmp_path: Path) -> None:
    written = json.loads(opweave("view", plan, "-o", tmp_path, "--json"))
    assert {"index.html", "trace.json"} <= {Path(path).name for path in written.values()}
    assert all(Path(path).stat().st_size for path in written.values())


def test_machines_and_passes_are_listed() -> None:
    machines = {machine["name"] for machine in json.loads(opweave("hw", "list", "--json"))["machines"]}
    assert "edge-npu" in machines
    assert json.loads(opweave("hw", "show", "edge-npu", "--json"))["memories"]
    assert {"order/beam", "residency/ilp", "address/exact"} <= set(json.loads(opweave("passes", "--json")))


def test_an_operator_that_does_not_fit_is_named(network: Path, tmp_path: Path) -> None:
    text = opweave("compile", network, "--scratchpad", "20KiB", "-o", tmp_path / "p", check=Infeasible.exit_code)
    assert "24576" in text.replace(",", "")
    assert "working set" in text
    error, _ = json.JSONDecoder().raw_decode(opweave("compile", network, "--scratchpad", "20KiB", "--json", check=5))
    assert error["error"]["code"] == "infeasible"


def test_a_plan_is_explained(plan: Path) -> None:
    facts = json.loads(opweave("explain", plan, "--json"))
    verified = json.loads(opweave("verify", plan, "--json"))
    assert facts["additional_bytes"] == verified["additional_bytes"]
    assert "would help" in opweave("explain", plan)
    assert "--objective" in opweave("explain", plan, "--objective", "peak", check=OptionError.exit_code)
    assert "--inplace" in opweave("explain", plan, "--inplace", check=OptionError.exit_code)


def test_what_does_not_fit_is_explained_with_the_code_of_what_does_not_fit(network: Path) -> None:
    facts, _ = json.JSONDecoder().raw_decode(opweave("explain", network, "--scratchpad", "20KiB", "--json", check=5))
    assert facts["verdict"] == "infeasible"
    assert facts["steps"][0]["needed_bytes"] == 24 * 1024
    assert "opweave explain" in opweave("compile", network, "--scratchpad", "20KiB", check=5)


def operator_graph(path: Path) -> Path:
    """A plain operator graph, which is JSON as plans are."""
    rows = [{"op": "f", "in": ["x"], "w": [], "out": "y"}]
    path.write_text(
        json.dumps({"name": "g", "weights": {}, "tensors": {"x": 64, "y": 64}, "ops": rows, "outputs": ["y"]})
    )
    return path


def test_an_operator_graph_is_no_plan(tmp_path: Path) -> None:
    assert "nothing to explain" in opweave("explain", operator_graph(tmp_path / "g.json"))
    (tmp_path / "text.json").write_text("[1, 2]")
    opweave("explain", tmp_path / "text.json", check=PlanError.exit_code)
    opweave("explain", tmp_path / "missing.json", check=PlanError.exit_code)


def test_a_plan_is_exported_as_a_header(plan: Path, tmp_path: Path) -> None:
    written = json.loads(opweave("export", plan, "-o", tmp_path / "net.h", "--prefix", "net", "--json"))
    assert written == {"output": str(tmp_path / "net.h")}
    assert "NET_ARENA_BYTES" in (tmp_path / "net.h").read_text()


def test_objectives_and_pins_reach_the_plan(network: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    options = (
        "--objective",
        "traffic,arena",
        "--recompute",
        "--inplace",
        "--pin",
        "image=8KiB",
        "--pin",
        "a2=resident",
    )
    facts = json.loads(opweave("compile", network, "--scratchpad", "64KiB", "-o", out, *options, "--json"))
    assert facts["passes"][0]["name"] == "inplace/elementwise"
    assert facts["passes"][-1]["name"] == "objective/refine"
    content = json.loads(out.read_text())
    assert {"buffer": "image", "offset": 8192} in content["pins"]
    assert {r["offset"] for r in content["residences"] if r["buffer"] == "image"} == {8192}
    assert "equal to onnxruntime" in opweave("run", out)


def damage(plan: Path, target: Path, **changes: Any) -> Path:
    content = json.loads(plan.read_text())
    content.update(changes)
    target.write_text(json.dumps(content))
    return target


def test_a_damaged_plan_is_refused(plan: Path, tmp_path: Path) -> None:
    content = json.loads(plan.read_text())
    fewer = damage(plan, tmp_path / "fewer.json", instructions=content["instructions"][1:])
    assert "fault" in opweave("verify", fewer, check=VerificationError.exit_code)
    assert "fault" in opweave("run", fewer, check=VerificationError.exit_code)
    newer = damage(plan, tmp_path / "newer.json", schema_version=99)
    assert "version 99" in opweave("verify", newer, check=PlanError.exit_code)
    (tmp_path / "text.json").write_text("{")
    opweave("verify", tmp_path / "text.json", check=PlanError.exit_code)
    opweave("verify", tmp_path / "missing.json", check=PlanError.exit_code)


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["compile", "missing.onnx"], ModelError.exit_code, "missing.onnx"),
        (["compile", "model.txt"], ModelError.exit_code, ".onnx"),
        (["compile", "{}", "--machine", "abacus"], MachineError.exit_code, "edge-npu"),
        (["compile", "{}", "--scratchpad", "lots"], OptionError.exit_code, "lots"),
        (["compile", "{}", "--order", "order/astrology"], OptionError.exit_code, "order/beam"),
        (["compile", "{}", "--order", "order/beam(girth=3)"], OptionError.exit_code, "width"),
        (["compile", "{}", "--weights", "imagined"], OptionError.exit_code, "streamed"),
        (["compile", "{}", "--time-limit", "-1"], OptionError.exit_code, "time_limit"),
        (["compile", "{}", "--objective", "speed"], OptionError.exit_code, "traffic, peak, arena, latency"),
        (["compile", "{}", "--pin", "image"], OptionError.exit_code, "NAME=OFFSET"),
        (["compile", "{}", "--pin", "image=bank:-1"], OptionError.exit_code, "bank:NUMBER"),
        (["compile", "{}", "--pin", "image=lots"], OptionError.exit_code, "lots"),
        (["compile", "{}", "--pin", "image=0", "--pin", "image=64"], OptionError.exit_code, "contradicts"),
        (["compile", "{}", "--pin", "picture=0"], OptionError.exit_code, "picture"),
        (["compile", "{}", "--recompute", "--residency", "residency/ilp(x=1)"], OptionError.exit_code, "recompute"),
        (["explain", "model.txt"], ModelError.exit_code, ".onnx"),
        (["export", "{}"], PlanError.exit_code, "not a plan"),
        (["compile", "{}", "--frobnicate"], OptionError.exit_code, "frobnicate"),
        (["frobnicate"], OptionError.exit_code, "frobnicate"),
        (["compile", "{}", "--report", "{}"], OptionError.exit_code, "report"),
        (["compile", "{}", "--output", "."], OptionError.exit_code, "folder"),
        (["fit", "{}", "--report", "{}"], OptionError.exit_code, "report"),
        (["run", "{}", "--model", "{}"], OptionError.exit_code, "--model"),
        (["run", "{}", "--outputs", "{}/y.npz", "--no-reference"], OptionError.exit_code, "cannot write outputs"),
        (["hw", "show", "abacus"], MachineError.exit_code, "abacus"),
    ],
)
def test_mistakes_end_in_one_clear_error(network: Path, arguments: list[str], code: int, word: str) -> None:
    text = opweave(*(a.format(network) for a in arguments), check=code)
    assert word in text
    assert text.count("error[") == 1


def test_interrupting_keeps_the_best_plan(tmp_path: Path) -> None:
    """Ctrl-C during a search with minutes left ends it with exit code 130 and a plan that verifies."""
    network = tmp_path / "darts.onnx"
    onnx.save(darts_cifar(), network)
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "opweave.cli", "compile", str(network), "--scratchpad", "512KiB", "-o", str(out)]
    process = subprocess.Popen([*command, "--time-limit", "600"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "joint/best_first" in process.stderr.readline()  # it is searching now, for a share of ten minutes
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    opweave("verify", out)


@pytest.mark.parametrize(
    "source", ["DEFINITIONS = {", "import nowhere", "raise SystemExit", "DEFINITIONS = {'Relu': 3}"]
)
def test_definitions_that_cannot_be_had_are_the_users_mistake(network: Path, tmp_path: Path, source: str) -> None:
    (tmp_path / "definitions.py").write_text(source)
    text = opweave("compile", network, "--definitions", tmp_path / "definitions.py", check=OptionError.exit_code)
    assert "definitions.py" in text


def test_options_that_a_plan_has_decided_are_refused(plan: Path) -> None:
    assert "--scratchpad" in opweave("run", plan, "--scratchpad", "1MiB", check=OptionError.exit_code)


def test_options_of_the_other_export_are_refused(plan: Path, tmp_path: Path) -> None:
    """A header takes no time to plan, and a ``.tflite`` file has no names to prefix."""
    header = ("export", plan, "-o", tmp_path / "net.h")
    assert "--time-limit" in opweave(*header, "--time-limit", "5", check=OptionError.exit_code)
    assert "--prefix" in opweave(*header, "--tflite", plan, "--prefix", "net", check=OptionError.exit_code)
    assert not (tmp_path / "net.h").exists()


def test_no_command_shows_the_help_and_no_empty_error() -> None:
    assert "error[" not in opweave(check=OptionError.exit_code)


def test_outputs_numpy_has_no_type_for_are_written(tmp_path: Path) -> None:
    """Under the model's names, even those that ``numpy.savez`` keeps for itself, and where two are one value."""
    x, *outputs = (helper.make_tensor_value_info(n, TensorProto.BFLOAT16, [4]) for n in ("x", "file", "same"))
    nodes = [helper.make_node("Relu", ["x"], ["file"]), helper.make_node("Identity", ["file"], ["same"])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], outputs), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.save(model, tmp_path / "m.onnx")
    facts = json.loads(opweave("run", tmp_path / "m.onnx", "--outputs", tmp_path / "y.npz", "--json"))
    assert list(facts["outputs"]) == ["file", "same"]
    with np.load(tmp_path / "y.npz") as arrays:
        assert {name: str(array.dtype) for name, array in arrays.items()} == {"file": "float32", "same": "float32"}


@pytest.mark.parametrize(
    ("raised", "code", "word"), [(KeyError(1), 70, "internal"), (KeyboardInterrupt(), 130, "interrupted")]
)
def test_json_says_every_end(
    raised: BaseException, code: int, word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody foresaw is reported as a fault of opweave's own, and Ctrl-C is no traceback."""

    def fail() -> None:
        raise raised

    monkeypatch.setattr("opweave.passes.registry.names", fail)
    monkeypatch.setattr(sys, "argv", ["opweave", "passes", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert json.loads(capsys.readouterr().out)["error"]["code"] == word


def test_json_has_no_infinities(capsys: pytest.CaptureFixture[str]) -> None:
    shared.print_json({"a": [float("inf"), 1.5], "b": (float("nan"),)})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [None, 1.5], "b": [None]}


def test_random_indices_out_of_range_point_to_real_inputs(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.zeros((2, 4), np.float32), "table")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "token"], ["y"])],
        "embedding",
        [helper.make_tensor_value_info("token", TensorProto.INT64, [6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [6, 4])],
        [table],
    )
    path = tmp_path / "embedding.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    assert "--inputs" in opweave("run", path, check=ExecutionError.exit_code)
    np.savez(tmp_path / "x.npz", token=np.array([0, 1, 0, 1, 0, 1]))
    assert "equal to onnxruntime" in opweave("run", path, "--inputs", tmp_path / "x.npz")
