"""Random overlap problems for property tests, and the tensor-parallel layers that the pass is for."""

from __future__ import annotations

from hypothesis import strategies as st

from opweave.compiler.graph import Collective, CollectiveKind
from opweave.passes.overlap.problem import Mode, Problem, Task

__all__ = ["ALL_REDUCE", "layers", "problems"]

ALL_REDUCE = Collective(CollectiveKind.ALL_REDUCE, "0", tuple(range(8)), 1 << 26)
RESOURCES = ("sm", "hbm", "wire")


@st.composite
def problems(draw: st.DrawFn, most: int = 9, limited: bool = False) -> Problem:
    """Up to ``most`` tasks on one or two lanes that compute and one or two links, in one or two modes each.

    With ``limited``, memory is bounded by something between the largest task and everything at once.
    """
    count = draw(st.integers(1, most))
    computing = draw(st.sampled_from((("compute",), ("compute", "near_memory"))))
    links = draw(st.sampled_from((("nvlink",), ("nvlink", "nic"))))
    tasks: list[Task] = []
    for index in range(count):
        communicates = draw(st.booleans())
        before = draw(st.sets(st.integers(0, index - 1), max_size=3)) if index else set()
        modes = tuple(
            _mode(draw, f"m{number}", communicates and draw(st.booleans())) for number in range(draw(st.integers(1, 2)))
        )
        tasks.append(
            Task(
                f"t{index}",
                draw(st.sampled_from(links if communicates else computing)),
                modes,
                tuple(sorted(before)),
                collective=ALL_REDUCE if communicates else None,
                launches=draw(st.integers(0, 2)),
                allocates_bytes=draw(st.integers(0, 8)),
                frees=tuple(sorted(draw(st.sets(st.sampled_from(sorted(before)))))) if before else (),
            )
        )
    tasks = _with_absorbing(draw, tasks)
    issue_s, event_s = draw(st.sampled_from((0.0, 0.5))), draw(st.sampled_from((0.0, 0.25)))
    limit = None
    if limited:
        largest = max(task.allocates_bytes for task in tasks)
        limit = draw(st.integers(largest, max(largest, sum(task.allocates_bytes for task in tasks))))
    return Problem(tuple(tasks), issue_s, event_s, limit)


def _mode(draw: st.DrawFn, name: str, fixed: bool) -> Mode:
    names = draw(st.sets(st.sampled_from(RESOURCES)))
    needs = {resource: draw(st.sampled_from((0.25, 0.5, 0.75, 1.0))) for resource in sorted(names)}
    return Mode(name, float(draw(st.integers(0, 4))), needs, fixed)


def _with_absorbing(draw: st.DrawFn, tasks: list[Task]) -> list[Task]:
    """One collective may get a mode that absorbs a task behind it whose other operands come earlier."""
    pairs = [
        (first, then)
        for then, task in enumerate(tasks)
        for first in task.before
        if tasks[first].collective is not None
        and task.collective is None
        and all(other <= first for other in task.before)
    ]
    wanted: bool = draw(st.booleans())
    if pairs and wanted:
        first, then = draw(st.sampled_from(pairs))
        mode = Mode("fused", float(draw(st.integers(1, 4))), {"sm": 0.5}, fixed=True, absorbs=(then,))
        tasks[first] = Task(**{**vars(tasks[first]), "modes": (*tasks[first].modes, mode)})
    return tasks


def layers(count: int, parts: int, *, communication: float = 1.0, split_cost: float = 1.04) -> Problem:
    """Layers of tensor-parallel inference: attention and a feed-forward block, each with an all-reduce, in parts.

    One part's attention reads the keys that the parts before have written. Seconds are of the size that a 70B model
    has with 4,096 tokens on 8 GPUs.
    """
    tasks: list[Task] = []
    scale = (split_cost if parts > 1 else 1.0) / parts
    last: list[int | None] = [None] * parts

    def add(name: str, seconds: float, before: list[int | None], part: int, memory: float = 0.3) -> int:
        mode = Mode("kernel", seconds * scale + 5e-6, {"sm": 1.0 if memory < 1 else 0.5, "hbm": memory})
        known = tuple(index for index in before if index is not None)
        tasks.append(Task(name, "compute", (mode,), known, part=part))
        return len(tasks) - 1

    def reduce(name: str, operand: int, norm: int | None, part: int) -> int:
        seconds = 350e-6 * communication / parts
        modes = [
            Mode("nccl/24", seconds + 40e-6, {"sm": 24 / 132, "hbm": 0.2}, True),
            Mode("multimem/8", 0.8 * seconds + 13e-6, {"sm": 8 / 132, "hbm": 0.2}, True),
        ]
        if norm is not None:
            modes.append(Mode("fused/16", 0.85 * seconds + 15e-6, {"sm": 16 / 132, "hbm": 0.2}, True, (norm,)))
        tasks.append(Task(name, "nvlink", tuple(modes), (operand,), collective=ALL_REDUCE, part=part))
        return len(tasks) - 1

    for layer in range(count):
        keys: int | None = None
        for part in range(parts):
            norm = add(f"norm{layer}.{part}", 60e-6, [last[part]], part, memory=1.0)
            qkv = add(f"qkv{layer}.{part}", 300e-6, [norm], part)
            keys = attention = add(f"attention{layer}.{part}", 200e-6, [qkv, keys], part)
            out = add(f"out{layer}.{part}", 250e-6, [attention], part)
            last[part] = reduce(f"reduce{layer}.{part}", out, len(tasks) + 1, part)
            norm = add(f"norm_{layer}.{part}", 60e-6, [last[part], last[part]], part, memory=1.0)
            up = add(f"up{layer}.{part}", 900e-6, [norm], part)
            down = add(f"down{layer}.{part}", 500e-6, [up], part)
            last[part] = reduce(f"reduce_{layer}.{part}", down, None, part)
    return Problem(tuple(tasks), issue_s=2e-6, event_s=1e-6)
