"""The rules of a pipeline step written a second time, from the docstrings alone: nothing of tasks.py is used."""

from __future__ import annotations

from itertools import permutations

from opweave.compiler.pipelining.problem import PipelineProblem
from opweave.compiler.pipelining.schedule import Action, ActionKind

F, W, B = ActionKind.FORWARD, ActionKind.WEIGHT_GRADIENT, ActionKind.BACKWARD
I = ActionKind.INPUT_GRADIENT  # noqa: E741 - as torch.distributed.pipelining writes it
S, T = ActionKind.OUTPUT, ActionKind.OUTPUT_GRADIENT
OFFLOAD, RELOAD = ActionKind.OFFLOAD, ActionKind.RELOAD

Orders = tuple[tuple[Action, ...], ...]


def actions_of(problem: PipelineProblem, microbatch: int, whole: frozenset[int] = frozenset()) -> list[Action]:
    """All that is done for a microbatch; stages of ``whole`` go backward in one action."""
    actions = []
    for stage in problem.routes[problem.route_of[microbatch]].stages:
        kinds = [F, B] if stage in whole else [F, I, W]
        kinds += [OFFLOAD, RELOAD] if problem.stages[stage].offloaded_bytes else []
        actions += [Action(stage, kind, microbatch) for kind in kinds]
    if problem.vocabulary:
        actions += [Action(rank, kind, microbatch) for kind in (S, T) for rank in range(problem.ranks)]
    return actions


def rank_of(problem: PipelineProblem, action: Action) -> int:
    """The rank that does ``action``."""
    return action.stage if action.kind in (S, T) else problem.stages[action.stage].rank


def duration_of(problem: PipelineProblem, action: Action) -> int:
    """What ``action`` takes."""
    if action.kind in (S, T):
        assert problem.vocabulary
        return (problem.vocabulary.output_ns if action.kind is S else problem.vocabulary.gradient_ns)[action.stage]
    stage = problem.stages[action.stage]
    both = stage.input_gradient_ns + stage.weight_gradient_ns
    return {
        F: stage.forward_ns,
        I: stage.input_gradient_ns,
        W: stage.weight_gradient_ns,
        B: both if stage.backward_ns is None else stage.backward_ns,
        OFFLOAD: stage.offload_ns,
        RELOAD: stage.reload_ns,
    }[action.kind]


def followed(problem: PipelineProblem, action: Action) -> list[tuple[int, set[ActionKind], int]]:
    """What ``action`` follows: stage, kinds of which one is done, and the time between."""
    route = problem.routes[problem.route_of[action.microbatch]]
    vocabulary, last = problem.vocabulary, route.stages[-1]
    everyone = range(problem.ranks)
    if action.kind is S:
        assert vocabulary
        return [(last, {F}, vocabulary.broadcast_ns)]
    if action.kind is T:
        assert vocabulary
        return [(rank, {S}, vocabulary.reduce_ns) for rank in everyone]
    here = route.stages.index(action.stage)
    if action.kind is F:
        return [(route.stages[here - 1], {F}, _hop(problem, action, here - 1, forward=True))] if here else []
    if action.kind is W:
        return [(action.stage, {I}, 0)]
    if action.kind is OFFLOAD:
        return [(action.stage, {F}, 0)]
    if action.kind is RELOAD:
        return [(action.stage, {OFFLOAD}, 0)]
    before: list[tuple[int, set[ActionKind], int]] = [(action.stage, {F}, 0)]
    if problem.stages[action.stage].offloaded_bytes:
        before.append((action.stage, {RELOAD}, 0))
    if action.stage != last:
        before.append((route.stages[here + 1], {I, B}, _hop(problem, action, here, forward=False)))
    elif vocabulary:
        awaited = S if vocabulary.barriers == 1 else T
        before += [(rank, {awaited}, vocabulary.reduce_ns) for rank in everyone]
    return before


def _hop(problem: PipelineProblem, action: Action, hop: int, *, forward: bool) -> int:
    route = problem.routes[problem.route_of[action.microbatch]]
    near, far = problem.stages[route.stages[hop]], problem.stages[route.stages[hop + 1]]
    if near.rank == far.rank:
        return 0
    if forward:
        return route.forward_send_ns[hop] if route.forward_send_ns else near.forward_send_ns
    return route.backward_send_ns[hop] if route.backward_send_ns else far.backward_send_ns


def starts_of(problem: PipelineProblem, orders: Orders) -> dict[Action, int]:
    """Earliest starts, by raising them from 0 until no rule is broken any more."""
    starts = {action: 0 for order in orders for action in order}

    def done(action: Action) -> int:
        return starts[action] + duration_of(problem, action)

    rooms = {
        action: _room(problem, rank, order[:place], action)
        for rank, order in enumerate(orders)
        for place, action in enumerate(order)
    }
    for _ in range(len(starts) + 1):
        raised = dict(starts)
        for order in orders:
            for place, action in enumerate(order):
                earlier = [done(other) for other in order[:place] if not other.kind.copies or action.kind.copies]
                needed = [
                    done(Action(stage, kind, action.microbatch)) + lag
                    for stage, kinds, lag in followed(problem, action)
                    for kind in kinds
                    if Action(stage, kind, action.microbatch) in starts
                ]
                needed += [done(copy) for copy in rooms[action]]
                raised[action] = max([0, *earlier, *needed])
        if raised == starts:
            return starts
        starts = raised
    raise AssertionError("the orders wait for each other for ever")


def _room(problem: PipelineProblem, rank: int, before: tuple[Action, ...], action: Action) -> list[Action]:
    """Copies out among those ``before`` that must be done so that ``action`` keeps the limit; as few as that takes."""
    if problem.memory_limit is None or action.kind is RELOAD or not any(n for *_, n in _held(problem, (action,))):
        return []
    lines = [(a, kinds, n) for a, kinds, n in _held(problem, (*before, action)) if kinds != {OFFLOAD}]
    done = set(before)
    held = sum(n for a, kinds, n in lines if not any(Action(a.stage, k, a.microbatch) in done for k in kinds))
    held += sum(stage.resident_bytes for stage in problem.stages if stage.rank == rank)
    staying = [a for a in (*before, action) if a.kind is F and Action(a.stage, OFFLOAD, a.microbatch) not in done]
    held += sum(problem.stages[a.stage].offloaded_bytes for a in staying)
    copies = [a for a in before if a.kind is OFFLOAD]
    for count in range(len(copies) + 1):
        if held + sum(problem.stages[a.stage].offloaded_bytes for a in copies[count:]) <= problem.memory_limit[rank]:
            return copies[:count]
    return []


def peaks_of(problem: PipelineProblem, orders: Orders, starts: dict[Action, int]) -> tuple[int, ...]:
    """The most bytes on each rank, from what is held from when until when."""
    peaks = []
    for rank, order in enumerate(orders):
        place = {action: index for index, action in enumerate(order)}
        held = [
            (_key(starts[a], place[a]), *_until(problem, starts, place, a, end), n)
            for a, end, n in _held(problem, order)
        ]
        resident = sum(stage.resident_bytes for stage in problem.stages if stage.rank == rank)
        moments = [begin for begin, *_ in held]
        peaks.append(resident + max((sum(n for b, e, n in held if b <= now <= e) for now in moments), default=0))
    return tuple(peaks)


def _key(time: int, place: int) -> tuple[int, int]:
    return time, place


def _until(
    problem: PipelineProblem,
    starts: dict[Action, int],
    place: dict[Action, int],
    action: Action,
    kinds: set[ActionKind],
) -> tuple[tuple[int, int]]:
    ends = [Action(action.stage, kind, action.microbatch) for kind in kinds]
    (end,) = [end for end in ends if end in starts]
    return (_key(starts[end] + duration_of(problem, end), place[end]),)


def _held(problem: PipelineProblem, order: tuple[Action, ...]) -> list[tuple[Action, set[ActionKind], int]]:
    """From the start of an action until the end of another of the same stage and microbatch: so many bytes."""
    lines = []
    for action in order:
        if action.kind is S:
            assert problem.vocabulary
            lines.append((action, {T}, problem.vocabulary.shard_bytes))
            continue
        if action.kind is T:
            continue
        stage = problem.stages[action.stage]
        moved = stage.offloaded_bytes
        if action.kind is F:
            lines.append((action, {I, B}, stage.until_input_gradient_bytes))
            lines.append((action, {W, B}, stage.until_weight_gradient_bytes - moved))
            if moved:
                lines.append((action, {OFFLOAD}, moved))
        elif action.kind is RELOAD:
            lines.append((action, {W, B}, moved))
        elif action.kind is I:
            lines.append((action, {W}, stage.between_gradients_bytes))
    return lines


def reduced_by(problem: PipelineProblem, orders: Orders, starts: dict[Action, int]) -> list[int]:
    """When each rank's all-reduces are all done, at the earliest of any order in which it may do them."""
    ends = []
    for order in orders:
        ready: dict[int, int] = {}
        for action in order:
            if action.kind in (W, B) and problem.stages[action.stage].reduce_ns:
                ready[action.stage] = max(ready.get(action.stage, 0), starts[action] + duration_of(problem, action))
        ends.append(min(_one_by_one(problem, ready, way) for way in permutations(ready)))
    return ends


def _one_by_one(problem: PipelineProblem, ready: dict[int, int], way: tuple[int, ...]) -> int:
    now = 0
    for stage in way:
        now = max(now, ready[stage]) + problem.stages[stage].reduce_ns
    return now
