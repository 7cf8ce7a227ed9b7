"""What the benchmarks of the torch.compile backend count, time, choose and report."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from benchmarks import gpu, measuring, turns
from benchmarks.backend_cases import OURS, Case, Defaults, Scope, add_scope, providers, scope_of
from benchmarks.backend_picture import draw, draw_curves
from benchmarks.bench_backend import Found, _rows, _summary
from benchmarks.measuring import footprint
from benchmarks.memory_ways import BASE, Result, Unlimited, Way, unlimited_of, ways
from benchmarks.runner import Options, Row, run
from benchmarks.turns import Job, Measured, Turns, measure_in_turns, spread
from benchmarks.worker import Device, Failure, Prepared, Provider, Spec
from benchmarks.workload import Workload, checkpoint_blocks
from benchmarks.zoo import MODELS

from opweave.errors import OptionError

MEBIBYTE = 1 << 20
SCOPE = Scope((Case("gpt2", False),), "cpu", "tiny", "float32", 1.0, 1, quick=False)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_scope(parser)
    return parser.parse_args(words)


def prepared(allocated: int = 100, held: int = 1000, link: float = 10.0, total: int = 0) -> Prepared:
    reports = ({"name": "graph 0 inference", "tier": "T1", "fallbacks": (), "allocated_bytes": 80, "bound_bytes": 60},)
    rest = {"peak_bytes": 70, "peak_before_bytes": 90, "planning_s": 0.5, "predicted_s": None}
    kept = measuring.Footprint(allocated, None, 3.0)
    return Prepared(kept, tuple({**r, **rest} for r in reports), "", 0.0, held, Device("cpu", total, link))


def test_peak_is_of_what_is_alive_during_the_measured_step() -> None:
    """What was allocated before and is still there counts; what came and went before, or comes later, does not."""
    changes = [(1, 1000), (2, -1000), (3, 50), (11, 200), (12, -200), (13, 100), (25, 5000)]
    assert measuring._peak(changes, 10, 20) == 250
    assert measuring._peak(changes[:3], 10, 20) == 50
    assert measuring._peak([], 10, 20) == 0


def test_footprint_counts_what_compiled_code_keeps_and_what_a_step_allocates() -> None:
    kept: list[torch.Tensor] = []

    def step() -> None:
        if not kept:
            kept.append(torch.empty(3 * MEBIBYTE, dtype=torch.uint8))
        first = torch.empty(2 * MEBIBYTE, dtype=torch.uint8)
        del first
        torch.empty(MEBIBYTE, dtype=torch.uint8)

    found = footprint(step, torch.device("cpu"))
    assert 5 * MEBIBYTE <= found.allocated < 5 * MEBIBYTE + 4096
    assert found.reserved is None
    assert found.compile_s >= 0


def test_spread_is_median_and_quantiles() -> None:
    assert spread([2.0]) == turns.Spread(2.0, 2.0, 2.0)
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == turns.Spread(3.5, 2.0, 5.0)


def test_scope_names_cases_and_refuses_what_is_not_there() -> None:
    scope = scope_of(arguments("--device", "cpu", "--models", "gpt2:train", "resnet50"), Defaults(), quick=False)
    assert [case.name for case in scope.cases] == ["gpt2:train", "resnet50:infer", "resnet50:train"]
    assert (scope.size, scope.dtype, scope.jobs) == ("tiny", "float32", 1)
    assert "shape of the results only" in scope.description
    for words in (("--models", "gpt3"), ("--models", "gpt2:fly"), ("--size", "huge")):
        with pytest.raises(OptionError):
            scope_of(arguments("--device", "cpu", *words), Defaults(), quick=False)


def test_on_a_gpu_all_of_the_zoo_is_full() -> None:
    scope = scope_of(arguments("--device", "cuda"), Defaults(), quick=False)
    assert {case.model for case in scope.cases} == set(MODELS)
    assert len({case.name for case in scope.cases}) == len(scope.cases)
    assert (scope.size, scope.dtype) == ("full", "bfloat16")
    assert "reduce-overhead" in {provider.name for provider in providers(scope, warm=False)}
    assert "max-autotune" in {provider.name for provider in providers(scope, warm=True)}


@pytest.mark.slow
def test_a_failing_worker_is_told_apart_and_holds_up_nobody(tmp_path: Path) -> None:
    made = [Provider("eager"), Provider("missing", "no-such-backend")]
    jobs = [Job("gpt2:infer", SCOPE.cases[0].spec(SCOPE, each), tmp_path / each.name) for each in made]
    found = measure_in_turns([jobs], Turns(jobs=2, samples=2, sample_s=0.001))
    eager, missing = (found[job] for job in jobs)
    assert isinstance(eager, Measured)
    assert len(eager.seconds) == 2
    assert min(eager.seconds) > 0
    assert eager.prepared.footprint.allocated > 0
    assert eager.prepared.held_bytes > sum(p.nbytes for p in MODELS["gpt2"].build("tiny").parameters()) * 0.9
    assert isinstance(missing, Failure)
    assert "no-such-backend" in str(missing)


def test_results_are_judged_against_eager() -> None:
    load = Workload.of(Spec("transformer_12", "tiny", "cpu", "float32", True, Provider("eager")))
    eager, higher = load.references()
    assert load.judged(load.model, eager, higher).equal
    with torch.no_grad():
        next(iter(load.model.parameters())).mul_(1.01)
    assert not load.judged(load.model, eager, higher).equal


@pytest.mark.parametrize(("model", "blocks"), [("transformer_12", 2), ("gpt2", 2)])
def test_checkpointing_recomputes_every_block_and_changes_nothing(model: str, blocks: int) -> None:
    load = Workload.of(Spec(model, "tiny", "cpu", "float32", True, Provider("eager")))
    references = load.references()
    calls = []
    assert checkpoint_blocks(load.model) == blocks
    for module in load.model.modules():
        if "forward" in vars(module):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    assert load.judged(load.model, *references).equal
    assert len(calls) == blocks


def test_rows_and_summary_of_a_case() -> None:
    outcomes: dict[str, turns.Outcome] = {
        "eager": Measured(prepared(), (4.0,)),
        "inductor": Measured(prepared(allocated=200), (3.0,)),
        OURS: Measured(prepared(), (2.0,)),
        "opweave T0": Failure("OptionError", "refused"),
    }
    found = Found(Case("gpt2", False), "cold", outcomes)
    rows = {(row.provider, row.metric): row for row in _rows(found)}
    assert rows["inductor", "speed"].value == 1.5
    assert rows[OURS, "planned_peak"].value == 80
    assert rows[OURS, "planned_peak"].bound == 60
    assert rows["opweave T0", "latency"].value is None
    assert "refused" in rows["opweave T0", "latency"].note
    assert "1 failures" in _summary([found])
    assert "1.500 x opweave's time" in _summary([found])
    assert "0.500 x Inductor's" in _summary([found])


def test_limits_end_at_the_least_that_works() -> None:
    """Shares below the least are left out; the least itself is run; every limit is in bytes of the peak."""
    case = Case("gpt2", True)
    unlimited = unlimited_of(Measured(prepared(), (1.0,)), Failure("Infeasible", "too little", 600))
    assert unlimited == Unlimited(held=1000, peak=1100, least=600, device_bytes=0)
    made = {way.name: way for way in ways(case, SCOPE, unlimited)}
    assert made["opweave @ 60 %"].limit == 660
    assert "opweave @ 50 %" not in made
    assert made["opweave @ least"].limit == 600
    assert made["opweave @ least"].provider.options["memory_limit"] == 600
    assert {"activation budget @ 0.5", "checkpointed", "inductor", OURS} <= set(made)
    assert unlimited_of(Failure("OptionError", "no"), Failure("", "")) is None


def test_streamed_weights_are_bounded_by_compute_and_by_the_link() -> None:
    """Held 1000 bytes: under a limit of 900 at least 100 move, 10 a second; the model alone takes 2 s."""
    limited = {n: Way(Provider(f"opweave @ {n}", OURS, on_host=True), n) for n in (900, 990)}
    outcomes: dict[Way, turns.Outcome] = {BASE: Measured(prepared(), (2.0,))}
    outcomes |= {way: Measured(prepared(), (12.5,)) for way in limited.values()}
    result = Result(Case("gpt2", False), Unlimited(1000, 1100, None, 0), outcomes)
    measured = Measured(prepared(), (12.5,))
    assert result.bound_s(limited[900], measured) == 10.0
    assert result.bound_s(limited[990], measured) == 2.0
    assert result.bound_s(BASE, measured) is None
    assert result.slowdown(limited[900]) == 6.25
    assert result.peak(limited[900], measured) == 100
    assert result.peak(BASE, measured) == 1100


def test_pictures_are_drawn(tmp_path: Path) -> None:
    measured = {"inductor": Measured(prepared(), (3.0,)), OURS: Measured(prepared(), (2.0,))}
    draw([("gpt2:infer", measured), ("failed", {})], tmp_path / "backend.png")
    draw_curves({"gpt2:train": {OURS: [(2e6, 1.0), (1e6, 2.0)]}}, tmp_path / "curves.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("backend.png", "curves.png"))


def with_number(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--number")


def test_interrupted_benchmarks_keep_what_they_measured(tmp_path: Path) -> None:
    def measure(options: Options) -> Iterator[Row]:
        yield Row("case", "provider", "metric", float(options.own.number), "s")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(
            *("bench_nothing", "Nothing?", measure),
            arguments=["--json", str(tmp_path / "rows.json"), "--number", "3"],
            add_arguments=with_number,
        )
    document = json.loads((tmp_path / "rows.json").read_text())
    assert [row["value"] for row in document["rows"]] == [3.0]


def test_steps_share_the_time_that_is_left(tmp_path: Path) -> None:
    assert sum(gpu.shares(gpu.STEPS, 540.0)) == pytest.approx(540.0)
    steps = {step.name: step for step in gpu.STEPS}
    backend, limit = steps["backend"], steps["memory_limit"]
    assert gpu.shares([backend, limit], 400.0) == pytest.approx((240.0, 160.0))
    command = backend.command(tmp_path, 300.0, ["gpt2:infer"])
    assert command[1:3] == ["-m", "benchmarks.bench_backend"]
    assert command[command.index("--minutes") + 1] == "4.50"
    assert command[-2:] == ["--models", "gpt2:infer"]
    assert "--json" not in steps["tests"].command(tmp_path, 60.0, ["gpt2:infer"])


def test_kernels_are_tested_in_parallel_and_measured_into_a_folder(tmp_path: Path) -> None:
    steps = {step.name: step for step in gpu.STEPS}
    assert "-n" not in steps["kernel_tests"].command(tmp_path, 60.0, [])
    assert steps["kernel_tests"].command(tmp_path, 60.0, [], True)[-2:] == ["-n", "8"]
    assert "-n" not in steps["tests"].command(tmp_path, 60.0, [], True)
    command = steps["kernels"].command(tmp_path, 240.0, ["gpt2:infer"])
    assert command[1:] == ["-m", "benchmarks.kernels", "--out", str(tmp_path / "kernels"), "--minutes", "3.50"]


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_interrupted_and_its_output_kept(tmp_path: Path) -> None:
    code = "import time; print('begun', flush=True); time.sleep(600)"
    step = gpu.Step("endless", "", 1.0)
    endless = type("Endless", (gpu.Step,), {"command": lambda *_: [sys.executable, "-c", code]})
    status, line = gpu._run(endless(step.name, "", 1.0), tmp_path, 3.0, [], dict(os.environ))
    assert status != 0
    assert "KeyboardInterrupt" in line or line == "begun"
    assert "begun" in (tmp_path / "endless.txt").read_text()
