"""TokenWeave's prefill latencies, predicted: operator graphs, their overlap problems, our schedules, our simulator.

What a forward pass takes beyond the machine's own figures is stated in ``Serving``. Nothing here reads a latency
without communication; those are predicted too, and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from opweave.hw_models import load
from opweave.passes.overlap.list_schedule import list_schedule
from opweave.passes.overlap.problem import Mode, Problem, Schedule, Task
from opweave.passes.overlap.simulate import Simulator, given_modes, synchronous_waits
from opweave.passes.overlap.tasks import problem_of

from .overlap_comparison import Comparison
from .overlap_models import LLAMA_70B, MIXTRAL_8X22B, QWEN3_235B, QWEN25_72B, Model, prefill_graph
from .overlap_published import LENGTHS, TOKENWEAVE

__all__ = ["FITTED", "MODELS", "Prediction", "Serving", "comparisons", "contended", "fit", "predict"]

MODELS = {model.name: model for model in (LLAMA_70B, QWEN25_72B, MIXTRAL_8X22B, QWEN3_235B)}
MACHINE = "8xh100-nvlink"
OFFSETS = (0, 128, 256)  # TokenWeave's own choices of a split point
PROGRAMS = (2, 4, 8, 16)
#: Slots of the launch queue that one launch takes, and one of a Triton kernel from Python.
LAUNCH, TRITON_LAUNCH = 3, 10
FEW_LAYERS = 6
MARGIN = 0.03


@dataclass(frozen=True)
class Serving:
    """What vLLM on a machine takes beside its kernels.

    While ``u`` of the time computes, clocks are ``clock_drop * u`` lower than in a benchmark of one kernel.
    ``overhead_s`` passes before and behind the kernels of a forward pass. A collective takes ``contention`` times the
    multiprocessors that it occupies from what runs beside it. The launch queue takes ``slot_s`` for a slot.
    """

    clock_drop: float
    overhead_s: float
    contention: float
    slot_s: float


#: All four fitted on Llama-70B with 8 ranks, baseline and overlapped (`fit`), ``slot_s`` on its 1024 tokens overlapped;
#: ``TRITON_LAUNCH`` on Qwen3-235B's 1024 tokens without communication. Qwen2.5, Mixtral and 4 ranks have set nothing.
FITTED = Serving(clock_drop=0.115, overhead_s=0.0, contention=3.0, slot_s=9.6e-6)


@dataclass(frozen=True)
class Prediction:
    """Seconds of the forward pass, and the split and the programs of the all-reduces that were chosen."""

    baseline_s: float
    free_s: float
    overlapped_s: float
    tokens: tuple[int, ...]
    programs: int

    @property
    def speedup(self) -> float:
        """What overlap gains."""
        return self.baseline_s / self.overlapped_s


def predict(model: Model, tokens: int, ranks: int, serving: Serving = FITTED, *, quick: bool = False) -> Prediction:
    """Predict one point; ``quick`` tries one split point only."""
    whole = _problem(model, (tokens,), ranks, serving)
    plain = _with_mode(whole, lambda mode: mode.name.startswith("multimem"))
    order = tuple(range(len(plain.tasks)))
    baseline = _sustained(plain, order, given_modes(plain), synchronous_waits(plain, order), serving)
    free = _without_communication(plain)
    alone = _sustained(free, order, given_modes(free), (), serving)
    few = replace(model, layers=FEW_LAYERS)
    splits = [(tokens // 2 + offset, tokens // 2 - offset) for offset in (OFFSETS[:1] if quick else OFFSETS)]
    choices = [(parts, count) for parts in splits for count in PROGRAMS]
    parts, count = min(choices, key=lambda c: _scheduled(few, c[0], ranks, c[1], serving).makespan_s)
    schedule = _scheduled(model, parts, ranks, count, serving)
    overlapped = _sustained(schedule.problem, schedule.order, schedule.modes, schedule.waits, serving)
    more = serving.overhead_s
    return Prediction(baseline + more, alone + more, overlapped + more, parts, count)


def _problem(model: Model, tokens: Sequence[int], ranks: int, serving: Serving) -> Problem:
    """The overlap problem, with what the launch queue and contention take."""
    graph, parts = prefill_graph(model, tokens, ranks)
    problem = problem_of(graph, load(MACHINE), parts=parts if len(tokens) > 1 else {})
    tasks = tuple(replace(contended(task, serving.contention), launches=_slots(task)) for task in problem.tasks)
    return replace(problem, tasks=tasks, issue_s=serving.slot_s)


def _slots(task: Task) -> int:
    return TRITON_LAUNCH if task.modes[0].name == "_grouped_mm" else LAUNCH * task.launches


def contended(task: Task, contention: float, engine: str = "sm") -> Task:
    """A collective that takes ``contention`` times its part of the compute engine; what computes as it was."""
    if task.collective is None:
        return task
    modes = (
        replace(mode, needs={k: min(1.0, v * contention) if k == engine else v for k, v in mode.needs.items()})
        for mode in task.modes
    )
    return replace(task, modes=tuple(modes))


def _with_mode(problem: Problem, wanted: Callable[[Mode], bool]) -> Problem:
    """Every collective in the first, the fastest, of the modes that are ``wanted``."""
    tasks = (
        replace(task, modes=(next(filter(wanted, task.modes)),), given_mode=0) if task.collective else task
        for task in problem.tasks
    )
    return replace(problem, tasks=tuple(tasks))


def _without_communication(problem: Problem) -> Problem:
    tasks = (
        replace(task, modes=(Mode("none", 0.0),), launches=0, given_mode=0) if task.collective else task
        for task in problem.tasks
    )
    return replace(problem, tasks=tuple(tasks))


def _scheduled(model: Model, parts: tuple[int, ...], ranks: int, programs: int, serving: Serving) -> Schedule:
    """Our list schedule with all-reduces fused with norms, of one number of programs."""
    problem = _problem(model, parts, ranks, serving)
    name = f"fused_rms_norm/{programs}"
    names = [[mode.name for mode in task.modes] for task in problem.tasks]
    return list_schedule(problem, [each.index(name) if name in each else 0 for each in names])


def _sustained(
    problem: Problem, order: Sequence[int], modes: Sequence[int], waits: Sequence[tuple[int, int]], serving: Serving
) -> float:
    """Makespan at the clocks that the machine sustains: a fixed point, as the clocks follow from what computes."""
    slower, makespan = 1.0, 0.0
    absorbed = {i for task, mode in zip(problem.tasks, modes, strict=True) for i in task.modes[mode].absorbs}
    computing = [i for i, task in enumerate(problem.tasks) if task.collective is None and i not in absorbed]
    for _ in range(8):
        schedule = Simulator(_slowed(problem, slower)).timed(order, modes, waits)
        before, makespan = makespan, schedule.makespan_s
        busy = sum(schedule.finish_s[i] - schedule.start_s[i] for i in computing) / makespan
        slower = 1 / (1 - serving.clock_drop * min(1.0, busy))
        if abs(makespan - before) < 1e-4 * makespan:
            break
    return makespan


def _slowed(problem: Problem, slower: float, memory: str = "hbm") -> Problem:
    """Products and attention ``slower`` times as long; what waits for the memory is not."""
    tasks = (
        task
        if task.collective is not None or task.modes[0].needs.get(memory, 0.0) > 0.6
        else replace(task, modes=tuple(replace(mode, seconds=slower * mode.seconds) for mode in task.modes))
        for task in problem.tasks
    )
    return replace(problem, tasks=tuple(tasks))


def comparisons(quick: bool) -> Iterator[Comparison]:
    """Every point: baseline, without communication, overlapped, speed-up, and what the guard would do."""
    for (name, ranks), published in TOKENWEAVE.items():
        if quick and (ranks != 8 or name not in ("Llama-3.3-70B", "Mixtral-8x22B")):
            continue
        for i, tokens in enumerate(LENGTHS[:3] if quick else LENGTHS):
            if name == QWEN3_235B.name and tokens == 1024:
                continue  # was not split there; its time without communication set a constant
            found = predict(MODELS[name], tokens, ranks, quick=quick)
            fitted = (name, ranks) == (LLAMA_70B.name, 8)
            case = f"tokenweave/{name}/tp{ranks}/{tokens}"
            inputs = "clocks, overhead, contention and launches fitted on Llama TP8, products on figure 9"
            if MODELS[name].experts:
                inputs += ", Triton launches on Qwen3-235B"
            guard = "on" if found.speedup >= 1 + MARGIN else "refused"
            remark = f"{' + '.join(map(str, found.tokens))}, {found.programs} programs; guard: {guard}"
            base, free, over = published.baseline[i], published.free[i], published.overlapped[i]
            figures = (
                ("baseline", base, 1e3 * found.baseline_s, "ms", fitted, None, ""),
                ("without communication", free, 1e3 * found.free_s, "ms", False, None, ""),
                ("overlapped", over, 1e3 * found.overlapped_s, "ms", fitted, free, remark),
                ("speed-up", base / over, found.speedup, "x", fitted, base / free, remark),
            )
            for metric, value, ours, unit, is_fitted, trivial, note in figures:
                yield Comparison(case, metric, value, ours, unit, is_fitted, inputs, published.source, trivial, note)


def fit() -> tuple[Serving, float]:
    """The constants of least mean error of both latencies on Llama-70B with 8 ranks, and that error."""
    published = TOKENWEAVE[LLAMA_70B.name, 8]
    found: list[tuple[float, Serving]] = []
    for contention, drop in product((2.7, 3.0, 3.3, 3.6), (0.10, 0.115, 0.13)):
        serving = Serving(drop, 0.0, contention, FITTED.slot_s)
        points = [predict(LLAMA_70B, tokens, 8, serving, quick=True) for tokens in LENGTHS]
        for overhead in (0.0, 0.5e-3, 1e-3, 1.5e-3, 2e-3):
            errors = [
                abs(1e3 * (seconds + overhead) / milliseconds - 1)
                for i, point in enumerate(points)
                for seconds, milliseconds in (
                    (point.baseline_s, published.baseline[i]),
                    (point.overlapped_s, published.overlapped[i]),
                )
            ]
            found.append((sum(errors) / len(errors), replace(serving, overhead_s=overhead)))
    error, serving = min(found, key=lambda each: each[0])
    return serving, error
