"""Does a step take as long as its schedule says, when torch's runtime executes it?

Four ranks (processes that talk by gloo) have stages that sleep through F, I and W, so that a processor with few cores
does for four devices, and nothing but the schedule and the runtime decides what a step takes. Each schedule is
simulated, executed by ``compiler/runtime/pipelining`` and timed; its gradients are compared with those of one process.
Of several steps the median counts, of several ranks the slowest. Nothing is fitted.

``python -m benchmarks.bench_pipeline_clock [--quick] [--json FILE]``
"""

from __future__ import annotations

import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opweave.compiler.pipeline import Budget
from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Stage
from opweave.compiler.pipelining.schedule import ActionKind, PipelineSchedule
from opweave.compiler.pipelining.simulate import timed
from opweave.compiler.runtime.pipelining.pipeline import Pipeline
from opweave.errors import ExecutionError
from opweave.passes.pipeline_parallel.named import named
from opweave.passes.pipeline_parallel.solve import solve

from .runner import Options, Row, print_table, run

RANKS, MICROBATCHES, WIDTH, ROWS = 4, 8, 8, 2
HELD = 1  # bytes of a microbatch on a stage, in the schedules' problem: limits are numbers of stages' microbatches
NAMED_LOOP, NAMED_V = ("gpipe", "1f1b", "zb-h1"), ("zbv", "v-half", "v-min")
LIMITS = ((1, 3), (2, 5))  # stages a rank, and what a rank may hold, of schedules that are solved for
SOLVE_S = 10.0


@dataclass(frozen=True)
class Timing:
    """Of one schedule: seconds of each counted step, how far the gradients are from one process's, and how much longer
    than they were told to ranks slept: on a busy machine, more.
    """

    seconds: tuple[float, ...]
    worst: float
    overslept: float


class Sleeper(nn.Module):
    """A linear layer that sleeps through F, I and W, and splits its backward itself."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.stage = stage
        self.kept: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is (rows, width)."""
        apply: Any = _Sleeps.apply
        result: Tensor = apply(x, self.weight, self)
        return result

    def dw_builder(self) -> Callable[[], None]:
        """W of the microbatch whose I has just run."""
        x, gradient = self.kept.pop()

        def weight_gradient() -> None:
            time.sleep(self.stage.weight_gradient_ns * 1e-9)
            found = gradient.t() @ x.detach()
            self.weight.grad = found if self.weight.grad is None else self.weight.grad + found

        return weight_gradient


class _Sleeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, module: Sleeper) -> Tensor:
        time.sleep(module.stage.forward_ns * 1e-9)
        ctx.save_for_backward(x, weight)
        ctx.module = module
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        time.sleep(ctx.module.stage.input_gradient_ns * 1e-9)
        ctx.module.kept.append((x, gradient))
        return gradient @ weight, None, None


def measure(options: Options) -> Iterator[Row]:
    """Time every schedule; prints the table."""
    unit_ns, steps = (40_000_000, 2) if options.quick else (80_000_000, 5)
    schedules = list(_schedules(unit_ns, options.quick))
    timings = _timed_on_ranks(schedules, steps)
    lines: list[list[str | float | None]] = []
    for schedule, timing in zip(schedules, timings, strict=True):
        predicted, found = timed(schedule).makespan_ns * 1e-9, median(timing.seconds)
        name, off = schedule.problem.name, found / predicted - 1
        spread = f"{min(timing.seconds):.3f} to {max(timing.seconds):.3f} s in {len(timing.seconds)} steps"
        slept = f"{timing.overslept:+.1%}"
        lines.append([name, schedule.method, predicted, found, f"{off:+.1%}", slept, f"{timing.worst:.0e}"])
        yield Row(name, "simulator", "step", predicted, "s", note=schedule.method)
        yield Row(
            name, "torch.distributed.pipelining", "step", found, "s", note=f"{spread}; {off:+.1%}; actions {slept}"
        )
        yield Row(name, "torch.distributed.pipelining", "gradient error", timing.worst, "")
    print_table(["schedule", "method", "predicted s", "measured s", "off", "actions off", "gradients within"], lines)
    within = sum(abs(float(str(line[4])[:-1])) <= 5 for line in lines)
    order = [line[0] for line in sorted(lines, key=lambda line: float(line[2] or 0))]
    kept = order == [line[0] for line in sorted(lines, key=lambda line: float(line[3] or 0))]
    print(
        f"bench_pipeline_clock: {within} of {len(lines)} steps within 5 % of their schedules, "
        f"their ranking {'kept' if kept else 'not kept'}"
    )


def _schedules(unit_ns: int, quick: bool) -> Iterator[PipelineSchedule]:
    """Named ones, and solved ones within limits that lie between those; each rank has as much to do in all of them."""

    def problem(chunks: int, name: str, limit: int | None = None) -> PipelineProblem:
        each = unit_ns // chunks
        stage = Stage(0, each, each, each, until_weight_gradient_bytes=HELD)
        limits = None if limit is None else limit * HELD
        ranks = placed("v" if chunks == 2 else "loop", RANKS, chunks)
        return uniform(stage, ranks, MICROBATCHES, memory_limit=limits, name=name)

    for name in NAMED_LOOP[1:] if quick else NAMED_LOOP:
        yield named(name, problem(1, name))
    for name in NAMED_V[:1] if quick else NAMED_V:
        yield named(name, problem(2, name))
    for chunks, limit in () if quick else LIMITS:
        given = problem(chunks, f"solved, {'V, ' if chunks == 2 else ''}{limit} held", limit)
        yield solve(given, Budget.of_seconds(SOLVE_S)).timed.schedule


def _timed_on_ranks(schedules: list[PipelineSchedule], steps: int) -> list[Timing]:
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, schedules, steps)
        processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise ExecutionError(f"ranks ended with {[process.exitcode for process in processes]}")
        found: list[Timing] = pickle.loads(Path(folder, "timings").read_bytes())
    return found


def _rank(rank: int, folder: str, schedules: list[PipelineSchedule], steps: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)  # type: ignore[attr-defined] # torch does not say it exports it
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    timings = [_timing(schedule, steps) for schedule in schedules]
    if rank == 0:
        Path(folder, "timings").write_bytes(pickle.dumps(timings))
    dist.barrier()
    dist.destroy_process_group()


def _timing(schedule: PipelineSchedule, steps: int) -> Timing:
    torch.manual_seed(0)
    stages = [Sleeper(stage) for stage in schedule.problem.stages]
    weights = [stage.weight.detach().clone().requires_grad_() for stage in stages]
    inputs, target = torch.randn(2, ROWS * MICROBATCHES, WIDTH)
    values = inputs
    for weight in weights:
        values = values @ weight.t()
    torch.autograd.backward(nn.functional.mse_loss(values, target))
    ranks = [stage.rank for stage in schedule.problem.stages]
    pipeline = Pipeline(
        stages, inputs, nn.functional.mse_loss, ranks=ranks, microbatches=MICROBATCHES, schedule=schedule
    )
    seconds = []
    for _ in range(steps + 1):  # the first opens connections
        for parameter in pipeline.parameters():
            parameter.grad = None
        dist.barrier()
        begin = time.perf_counter()
        pipeline.step(inputs, target=target, measure=True)
        seconds.append(_slowest(time.perf_counter() - begin))
    worst = 0.0
    for stage, module in pipeline.modules.items():
        found, wanted = next(module.parameters()).grad, weights[stage].grad
        assert found is not None
        assert wanted is not None
        worst = max(worst, float((found - wanted).abs().max()))
    return Timing(tuple(seconds[1:]), _slowest(worst), _slowest(_overslept(pipeline)))


def _overslept(pipeline: Pipeline) -> float:
    """How much longer than their problem says this rank's actions took."""
    told = slept = 0.0
    for action, seconds in pipeline.seconds.items():
        stage = pipeline.problem.stages[action.stage]
        takes = {
            ActionKind.FORWARD: stage.forward_ns,
            ActionKind.INPUT_GRADIENT: stage.input_gradient_ns,
            ActionKind.WEIGHT_GRADIENT: stage.weight_gradient_ns,
            ActionKind.BACKWARD: stage.whole_backward_ns,
        }
        told += len(seconds) * takes[action.kind] * 1e-9
        slept += sum(seconds)
    return slept / told - 1


def _slowest(value: float) -> float:
    """The largest of all ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


if __name__ == "__main__":
    sys.exit(run("bench_pipeline_clock", __doc__.splitlines()[0], measure))
