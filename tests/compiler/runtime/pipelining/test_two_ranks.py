"""Two real ranks train by schedules of each kind as one rank would; what cannot be run is refused on both.

All of it is one start of two processes, so that it costs little; each check says in its name what it is about.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import opweave
from opweave.compiler.pipelining.placement import placed
from opweave.compiler.pipelining.problem import PipelineProblem
from opweave.compiler.pipelining.schedule import Action, PipelineSchedule
from opweave.compiler.runtime.pipelining.calibrate import one_after_the_other
from opweave.compiler.runtime.pipelining.halves import SplitStage
from opweave.compiler.runtime.pipelining.pipeline import Pipeline
from opweave.compiler.runtime.pipelining.together import decided, together
from opweave.errors import ExecutionError, Infeasible, ModelError, OptionError, OpweaveError, VerificationError
from tests.compiler.runtime.pipelining.rank_checks import (
    ROWS,
    STAGE,
    WIDTH,
    batch,
    block,
    blocks,
    chain,
    pipelined,
    ranks_of,
    same_gradients,
    schedule_of,
    trains_as_one,
    whole,
)
from tests.support.ranks import spawn


def schedules_of_each_kind() -> None:
    """Whole backwards, halves, chunks in loops and in a V, which hands over on its own rank, and a mixture."""
    for name in ("1f1b", "zb-h1", "interleaved-1f1b", "zbv"):
        trains_as_one(schedule_of(name, 4))
    mixed = schedule_of("zbv", 4)
    trains_as_one(one_after_the_other(mixed.problem, ()))


def microbatches_are_renumbered_for_the_last_stage() -> None:
    schedule = schedule_of("zb-h1", 4)
    reversed_ = PipelineSchedule(
        schedule.problem,
        tuple(tuple(Action(a.stage, a.kind, 3 - a.microbatch) for a in order) for order in schedule.orders),
    )
    reference = blocks(2)
    inputs, target = batch(4)
    whole(reference, inputs, target, 4)
    pipeline = pipelined(reversed_, blocks(2))
    assert pipeline.schedule.orders == schedule.orders
    pipeline.step(inputs, target=target)
    same_gradients(pipeline, reference)


class Counts(nn.Module):
    """A batch norm, dropout of nothing, and random numbers drawn in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x)) + 0 * torch.rand(())  # type: ignore[no-any-return]


def nothing_but_the_step_leaves_traces() -> None:
    schedule = schedule_of("1f1b", 4)
    modules = blocks(2, lambda _: Counts())
    torch.manual_seed(7)
    before = torch.get_rng_state()
    pipeline = pipelined(schedule, modules)
    assert torch.equal(before, torch.get_rng_state())
    mine: Any = modules[dist.get_rank()]
    assert mine.norm.num_batches_tracked == 0
    inputs, target = batch(4)
    pipeline.step(inputs, target=target)
    assert mine.norm.num_batches_tracked == 4


def modules_are_evaluated_in_evaluation() -> None:
    """Batch norms read what they counted, and count nothing; modes are put back, also of parts that differ."""
    modules = blocks(2, lambda _: nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Dropout(0.5)))
    for module in modules:
        module[1].eval()  # type: ignore[index]
    reference = [copy.deepcopy(module).eval() for module in modules]
    inputs, _ = batch(4)
    pipeline = pipelined(schedule_of("1f1b", 4), modules)
    outputs = pipeline.eval(inputs)
    if outputs is not None:
        torch.testing.assert_close(outputs, chain(reference, inputs))
    (own,) = pipeline.modules.values()
    assert [part.training for part in own.modules()] == [True, True, False, True]
    assert own.get_buffer("0.num_batches_tracked") == 0


class Several(nn.Module):
    """Hands on a view, a transposed tensor, and whole numbers, which have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor | None = None, which: Tensor | None = None) -> Any:
        if y is None or which is None:
            x = self.linear(x)
            return x, x.transpose(1, 2), torch.zeros(x.shape[0], dtype=torch.int64)
        return self.linear(x + y.transpose(1, 2)), y, which


def several_tensors_pass_a_boundary() -> None:
    """Also with a gradient that is one number, expanded: gloo sends no such thing."""
    reference = blocks(3, lambda _: Several())
    inputs, target = batch(4)

    def loss(outputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        return outputs[0].sum() * target.mean() + outputs[1].sum()

    whole(reference, inputs, target, 4, loss)
    problem = schedule_of("1f1b", 4).problem
    ranks = (0, 1, 0)
    stages = tuple(STAGE if rank == 0 else problem.stages[rank] for rank in ranks)
    problem = PipelineProblem(2, stages, (type(problem.routes[0])((0, 1, 2), 4),))
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        with pytest.raises(ExecutionError, match="passes no such tensors on"):
            pipelined(one_after_the_other(problem, ()), blocks(3, lambda _: Several()), loss)
        return
    pipeline = pipelined(one_after_the_other(problem, ()), blocks(3, lambda _: Several()), loss)
    pipeline.step(inputs, target=target)
    same_gradients(pipeline, reference)
    assert [str(facts) for facts in pipeline.chain.boundaries[1]] == [
        f"float32[{ROWS}, 3, {WIDTH}]",
        f"float32[{ROWS}, {WIDTH}, 3]",
        f"int64[{ROWS}]",
    ]


def frozen_stages_stay_as_they_are() -> None:
    modules, reference = blocks(2), blocks(2)
    for module in (modules[0], reference[0]):
        module.requires_grad_(False)
    inputs, target = batch(4)
    whole(reference, inputs, target, 4)
    pipeline = pipelined(schedule_of("1f1b", 4), modules)
    pipeline.step(inputs, target=target)
    if 1 in pipeline.modules:
        same_gradients(pipeline, reference)
    else:
        assert all(parameter.grad is None for parameter in pipeline.parameters())
    with pytest.raises(ExecutionError, match="stage 1 cannot be split: its output 0 does not depend on an input that"):
        pipelined(schedule_of("zb-h1", 4), modules)


def tied(count: int, first: int, second: int) -> list[nn.Module]:
    modules = blocks(count)
    modules[second][0].weight = modules[first][0].weight  # type: ignore[index]
    return modules


def tied_weights_are_right_or_refused() -> None:
    """On one rank the two gradients meet; on two they never would."""
    reference = tied(4, 0, 3)
    inputs, target = batch(4)
    whole(reference, inputs, target, 4)
    pipeline = pipelined(schedule_of("zbv", 4), tied(4, 0, 3))
    pipeline.step(inputs, target=target)
    same_gradients(pipeline, reference)
    with pytest.raises(ModelError, match=r"stage 0 on rank 0 and stage 1 on rank 1 share a weight, '0.weight'"):
        pipelined(schedule_of("1f1b", 4), tied(2, 0, 1))


def compiled_stages_do_their_backward_whole() -> None:
    runs = []

    def backend(graph: Any, examples: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def counted(graph: Any, examples: Any) -> Any:
            def run(*arguments: Any) -> Any:
                runs.append(1)
                return graph(*arguments)

            return run

        forward: Any = lambda graph, examples: graph  # noqa: E731
        return aot_autograd(fw_compiler=forward, bw_compiler=counted)(graph, examples)

    def wrap(module: nn.Module) -> nn.Module:
        return torch.compile(module, backend=backend)  # type: ignore[return-value]

    trains_as_one(schedule_of("1f1b", 4), wrap)
    assert len(runs) == 8  # two steps
    with pytest.raises(ExecutionError, match=r"stage . cannot be split: torch.compile"):
        pipelined(schedule_of("zb-h1", 4), [wrap(module) for module in blocks(2)])


def split_stages_bring_their_own_halves() -> None:
    """On the first rank too, where torch's I does nothing."""
    for name in ("zb-h1", "zbv"):
        trains_as_one(schedule_of(name, 4), SplitStage)
    inside = [nn.Sequential(SplitStage(module)) for module in blocks(2)]
    with pytest.raises(OpweaveError, match="'0' of a Sequential is a SplitStage, whose W torch would never ask for"):
        pipelined(schedule_of("1f1b", 4), inside)


def too_much(problem: PipelineProblem) -> PipelineSchedule:
    raise Infeasible("rank 0 would hold too much", required_bytes=2, available_bytes=1)


def what_is_wrong_is_refused_on_both_ranks() -> None:
    """Also where only one of them can see it; nothing hangs."""
    schedule = schedule_of("1f1b", 4)
    inputs, target = batch(4)

    def refused(says: str, error: type[OpweaveError], **changed: Any) -> None:
        given = {"stages": blocks(2), "schedule": schedule, "ranks": ranks_of(schedule.problem), **changed}
        stages = given.pop("stages")
        with pytest.raises(error, match=says):
            Pipeline(stages, inputs, mse_loss, microbatches=4, **given)

    here = dist.get_rank()
    only = [None if stage == here else module for stage, module in enumerate(blocks(2))]
    refused("no module for its stage", OptionError, stages=only)
    one = [blocks(2)[0], None] if here == 1 else blocks(2)
    refused("rank 1" if here == 0 else "no module for its stage 1", OpweaveError, stages=one)
    refused("3 stages are given, and ranks of 2", OptionError, stages=blocks(3))
    refused("a schedule, or a planner", OptionError, planner=lambda problem: schedule)
    refused("has ranks 0 to 1", OptionError, ranks=(0, 2))
    refused("a schedule is given, and a memory limit", OptionError, memory_limit=1)
    refused("the schedule has 8 microbatches, not 4", OptionError, schedule=schedule_of("1f1b", 8))
    refused("modules of stages", ExecutionError, ranks=(1, 0))
    asks: dict[str, Any] = {"schedule": None, "example_target": target}
    refused("the planner returned None", OpweaveError, planner=lambda problem: None, **asks)
    refused("a schedule of another problem", OpweaveError, planner=lambda problem: schedule, **asks)
    refused("rank 0 would hold" if here == 0 else "rank 0 gave up", OpweaveError, planner=too_much, **asks)
    narrow = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH + 1, WIDTH)]
    refused(r"stage 1 fails on inputs float32\[2, 3, 6\]", ExecutionError, stages=narrow)
    tight = schedule_of("zb-h2", 4, type(STAGE)(0, 2, 2, 1, until_weight_gradient_bytes=10))
    limited = PipelineProblem(2, tight.problem.stages, tight.problem.routes, (20, 20))
    over = PipelineSchedule(limited, tight.orders, "zb-h2")
    refused("rank 0 would hold 30 bytes at once; its limit is 20", VerificationError, schedule=over)
    with pytest.raises(OptionError, match="is not 4 microbatches of one size"):
        pipelined(schedule, blocks(2), example=inputs[:7])

    pipeline = pipelined(schedule, blocks(2))
    if here == 0:
        with pytest.raises(OptionError, match="made for 4 microbatches of float32"):
            pipeline.step(inputs[:4])
        with pytest.raises(OptionError, match="takes 1 inputs, not 0"):
            pipeline.step(None)
    else:
        with pytest.raises(OptionError, match="needs a target"):
            pipeline.step(inputs)
        for short in (target[:7], target[:0], target[0, 0, 0]):
            with pytest.raises(OptionError, match=r"a target of shape .* is not 4 microbatches of one size"):
                pipeline.step(inputs, target=short)
    pipeline.step(inputs, target=target)  # and it goes on
    if here == 0:
        said = r"returns bfloat16(.|\n)* same autocast mode|dtype mismatch"  # the latter by torch 2.11 itself
        with torch.autocast("cpu"), pytest.raises((ExecutionError, RuntimeError), match=said):
            pipeline._runner.stages[0].forward_one_chunk(0, (inputs[:ROWS],), {})


def one_rank_decides() -> None:
    here = dist.get_rank()
    assert decided(lambda: f"by {here}", by=1) == "by 1"

    def fails() -> str:
        if here == 1:
            raise OptionError("no schedule", hint="use another")
        return "fine"

    with pytest.raises(OptionError if here == 1 else ExecutionError, match="no schedule") as caught:
        together(fails)
    assert caught.value.hint == "use another"
    with pytest.raises(ValueError if here == 0 else ExecutionError, match="zero"):
        decided(lambda: (_ for _ in ()).throw(ValueError("zero")))


def losses_that_fail_are_refused_on_both_ranks() -> None:
    """The last rank alone sees them; in a step the other would wait for gradients."""
    _, target = batch(4)
    losses: dict[str, Any] = {
        "the loss fails on a microbatch: ZeroDivisionError": lambda output, target: 1 / 0,
        "the loss is tuple, not a scalar": lambda output, target: (mse_loss(output, target), 1),
        r"shape \[2\], not a scalar": lambda output, target: (output - target).mean((1, 2)),
        "does not depend on any weight": lambda output, target: mse_loss(output.detach(), target),
    }
    for says, loss in losses.items():
        with pytest.raises(OptionError if dist.get_rank() == 1 else ExecutionError, match=says):
            pipelined(schedule_of("1f1b", 4), blocks(2), loss, example_target=target)
    with pytest.raises(OpweaveError, match="is not 4 microbatches"):
        pipelined(schedule_of("1f1b", 4), blocks(2), example_target=target[:7] if dist.get_rank() == 1 else None)


def ranks_that_differ_are_refused() -> None:
    """Each rank's arguments are right by themselves."""
    schedule = schedule_of("1f1b" if dist.get_rank() else "gpipe", 4)
    with pytest.raises(OptionError, match=r"ranks differ in the schedule.*\n.*on every rank"):
        pipelined(schedule, blocks(2))
    inputs, target = batch(4)
    with pytest.raises(OptionError, match="ranks differ in microbatches: 4 on rank 0, 2 on rank 1"):
        opweave.pipeline(blocks(2), inputs, mse_loss, microbatches=2 if dist.get_rank() else 4, example_target=target)
    model = nn.Sequential(*blocks(2 + dist.get_rank()))
    with pytest.raises(OptionError, match=r"ranks differ in the model: 'Sequential of 168 weights"):
        opweave.pipeline(model, inputs, mse_loss, microbatches=4, example_target=target)
    with pytest.raises(OpweaveError, match="time_limit is 0"):
        opweave.pipeline(
            blocks(2), inputs, mse_loss, microbatches=4, example_target=target, time_limit=float(dist.get_rank())
        )


class Slow(nn.Module):
    """Takes as long as it is told, in its forward and for its input's gradient."""

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.forward_s, self.backward_s = forward_s, backward_s
        self.inner = block(0)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.forward_s)
        out: Any = self.inner(x)
        out.register_hook(lambda gradient: time.sleep(self.backward_s))
        return out  # type: ignore[no-any-return]


def times_are_measured_and_a_schedule_is_chosen() -> None:
    """The planner is asked on rank 0 alone, for a problem with what the stages take; then again, for new times."""
    asked: list[PipelineProblem] = []

    def planner(problem: PipelineProblem) -> PipelineSchedule:
        asked.append(problem)
        return one_after_the_other(problem, ())

    torch.manual_seed(0)
    modules = [Slow(0.004, 0.030), Slow(0.030, 0.002)]
    inputs, target = batch(4)
    options: dict[str, Any] = {"planner": planner, "example_target": target, "memory_limit": 1 << 20}
    pipeline = Pipeline(modules, inputs, mse_loss, ranks=placed("loop", 2), microbatches=4, **options)
    assert len(asked) == (dist.get_rank() == 0)
    first, second = pipeline.problem.stages
    assert all(parameter.grad is None for parameter in pipeline.parameters())

    def near(found: int, milliseconds: float) -> bool:  # a busy machine sleeps longer
        return milliseconds * 1e6 <= found < milliseconds * 1e6 + 10e6

    assert near(first.forward_ns, 4), first
    assert near(first.input_gradient_ns, 0), first  # torch does nothing there on the first stage
    assert near(first.weight_gradient_ns, 30), first
    assert near(second.forward_ns, 30), second
    assert near(second.input_gradient_ns, 2), second
    assert near(second.weight_gradient_ns, 0), second
    assert near(second.whole_backward_ns, 2), second
    assert first.forward_bytes == second.backward_bytes == 4 * ROWS * 3 * WIDTH
    assert first.between_gradients_bytes == 0 < second.between_gradients_bytes
    assert first.resident_bytes == 2 * 4 * 2 * (WIDTH * WIDTH + WIDTH) + 4 * 2 * first.forward_bytes

    modules[1].forward_s = 0.001
    with pytest.raises(ExecutionError, match="was not measured"):
        pipeline.replan()
    pipeline.step(inputs, target=target, measure=True)
    pipeline.step(inputs, target=target, measure=True)
    pipeline.replan()
    assert near(pipeline.problem.stages[1].forward_ns, 1), pipeline.problem.stages[1]
    assert pipeline.problem.memory_limit == (1 << 20, 1 << 20)
    pipeline.step(inputs, target=target)


CHECKS = (
    schedules_of_each_kind,
    microbatches_are_renumbered_for_the_last_stage,
    nothing_but_the_step_leaves_traces,
    modules_are_evaluated_in_evaluation,
    several_tensors_pass_a_boundary,
    frozen_stages_stay_as_they_are,
    tied_weights_are_right_or_refused,
    compiled_stages_do_their_backward_whole,
    split_stages_bring_their_own_halves,
    what_is_wrong_is_refused_on_both_ranks,
    one_rank_decides,
    losses_that_fail_are_refused_on_both_ranks,
    ranks_that_differ_are_refused,
    times_are_measured_and_a_schedule_is_chosen,
)


def everything() -> dict[str, float]:
    took = {}
    for check in CHECKS:
        begin = time.perf_counter()
        check()
        took[check.__name__] = round(time.perf_counter() - begin, 2)
    return took


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    for took in spawn(2, everything, tmp_path):
        assert list(took) == [check.__name__ for check in CHECKS]
