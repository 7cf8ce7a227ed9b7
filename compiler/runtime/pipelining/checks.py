"""Whether ranks may execute what torch has made of a schedule, judged before anything runs.

torch itself counts actions, and finds orders that cannot be completed; duplicates, the order on the last stage, pairs
of sends and receives, and memory it does not look at. What is wrong there shows up as a hang, or as wrong gradients.
Here each rank's list, as torch lowered it, is compared with the schedule and with every other rank's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from ....errors import OptionError, VerificationError
from ...pipelining.plans import plans_of_steps
from ...pipelining.schedule import ActionKind, PipelineSchedule
from ...pipelining.simulate import timed
from ...pipelining.transfers import Transfer, TransferKind
from ...verify import verify, verify_ranks
from .lowered import COMPUTES, RECEIVES, SENDS, WAITS, Step, parsed

__all__ = ["check_lowered"]

_Lists = Mapping[int, Sequence[Step]]


def check_lowered(
    lowered: Mapping[int, Sequence[str]],
    schedule: PipelineSchedule,
    *,
    as_plans: bool = True,
) -> None:
    """Prove of ``lowered``, torch's lists by rank, that they do ``schedule``, once, and come to an end.

    Proved are: the schedule's actions, each once, on the rank of its stage, in the schedule's order; on the last stage
    F in the order of microbatches; sends behind what they send and receives before what needs them, one of each for
    every message; between two ranks both sides post all messages in one order; nobody waits for ever; gradients of
    each stage reduced once, behind its last W or B, and stages gathered while they compute; memory limits are kept.

    With ``as_plans`` the lists are written down as plans too, and the verifier of all plans judges each rank's, and
    all together; it shares nothing with what else is proved here, and takes some ten times as long.

    Raises:
        VerificationError: something of this is not so; the first that is found is named.
    """
    lists = parsed(lowered)
    for finding in _findings(lists, schedule):
        raise VerificationError(finding, hint="nothing has run")
    _check_memory(schedule)
    if as_plans:
        _check_plans(lists, schedule)


def _findings(lists: _Lists, schedule: PipelineSchedule) -> Iterator[str]:
    """What is wrong, what would hide something else first."""
    yield from _repeated(lists)
    yield from _not_the_schedule(lists, schedule)
    yield from _last_stage_out_of_order(lists, schedule)
    yield from _messages_missing(lists, schedule)
    for rank, steps in lists.items():
        yield from _reductions(rank, steps, schedule)
        yield from _out_of_place(rank, steps)
        yield from _gathers(rank, steps)
    yield from _pairs_differ(lists, schedule)
    yield from _waits(lists)


def _repeated(lists: _Lists) -> Iterator[str]:
    done: dict[Step, int] = {}
    for rank, steps in lists.items():
        for step in steps:
            if step.kind in ("UNSHARD", "RESHARD"):
                continue
            if step in done:
                yield f"{step} is done twice: by rank {done[step]}, and again by rank {rank}"
            done[step] = rank


def _not_the_schedule(lists: _Lists, schedule: PipelineSchedule) -> Iterator[str]:
    try:
        timed(schedule)
    except OptionError as error:
        yield f"the schedule itself cannot be executed: {error.message}"
    if set(lists) != set(range(schedule.problem.ranks)):
        yield f"there are lists for ranks {list(lists)}; the schedule is of ranks 0 to {schedule.problem.ranks - 1}"
    for rank, order in enumerate(schedule.orders):
        computed = [step.action for step in lists[rank] if step.kind in COMPUTES]
        for place, (wanted, found) in enumerate(zip_longest(order, computed)):
            if wanted != found:
                yield (
                    f"rank {rank} does {found or 'nothing'} where the schedule has {wanted or 'nothing'} "
                    f"(computing action {place})"
                )


def _last_stage_out_of_order(lists: _Lists, schedule: PipelineSchedule) -> Iterator[str]:
    last = len(schedule.problem.stages) - 1
    steps = lists[schedule.problem.stages[last].rank]
    forwards = [step for step in steps if step.stage == last and step.kind == ActionKind.FORWARD.value]
    for place, step in enumerate(forwards):
        if step.microbatch != place:
            yield (
                f"the last stage does {step} as its forward number {place}; torch takes the loss of microbatch "
                f"{place} from there, so that microbatches must come in their order (see `renumbered`)"
            )


def _messages_missing(lists: _Lists, schedule: PipelineSchedule) -> Iterator[str]:
    """For every computing action that needs a message, or makes one, its two ends on the right ranks; and no others."""
    stages = schedule.problem.stages
    wanted: dict[Step, int] = {}
    for order in schedule.orders:
        for action in order:
            sends = [Step(action.stage, kind, action.microbatch) for kind, of in SENDS.items() if action.kind in of]
            for send in sends:
                receive = send.other_end
                if 0 <= receive.stage < len(stages) and stages[receive.stage].rank != stages[send.stage].rank:
                    wanted[send], wanted[receive] = stages[send.stage].rank, stages[receive.stage].rank
    moved = (*SENDS, *RECEIVES)
    found = {step: rank for rank, steps in lists.items() for step in steps if step.kind in moved}
    for step, rank in wanted.items():
        if found.get(step) != rank:
            yield f"rank {rank} never does {step}, for which {step.other_end} on another rank would wait"
    for step, rank in found.items():
        if step not in wanted:
            yield f"rank {rank} does {step}, a message that nothing of the schedule makes or needs"


def _out_of_place(rank: int, steps: Sequence[Step]) -> Iterator[str]:
    """What is sent has been computed, and what is needed was asked for."""
    place = {step: number for number, step in enumerate(steps)}
    for step in steps:
        before = [kind for kind, needed in RECEIVES.items() if step.kind in needed]
        for kind in SENDS.get(step.kind, before):
            other = Step(step.stage, kind, step.microbatch)
            if place.get(other, -1) > place[step]:
                yield f"rank {rank} does {step} before {other}, which it depends on"
        if step.kind in WAITS:
            begun = Step(step.stage, WAITS[step.kind], step.microbatch)
            if place.get(begun, len(steps)) > place[step]:
                yield f"rank {rank} does {step}, but {begun} does not come before it"


def _reductions(rank: int, steps: Sequence[Step], schedule: PipelineSchedule) -> Iterator[str]:
    done: Counter[int] = Counter()
    reduced: set[int] = set()
    for step in steps:
        if step.kind in ("W", "B"):
            done[step.stage] += 1
        elif step.kind == "REDUCE_GRAD":
            reduced.add(step.stage)
            if done[step.stage] != schedule.problem.microbatches:
                yield (
                    f"rank {rank} reduces the gradients of stage {step.stage} after {done[step.stage]} of "
                    f"{schedule.problem.microbatches} backwards"
                )
    for stage in sorted(set(done) - reduced):
        yield f"rank {rank} never reduces the gradients of stage {stage} (REDUCE_GRAD)"


def _gathers(rank: int, steps: Sequence[Step]) -> Iterator[str]:
    gathered: set[int] = set()
    for step in steps:
        if step.kind == "UNSHARD":
            if step.stage in gathered:
                yield f"rank {rank} gathers the weights of stage {step.stage} twice"
            gathered.add(step.stage)
        elif step.kind == "RESHARD":
            if step.stage not in gathered:
                yield f"rank {rank} frees weights of stage {step.stage} that it has not gathered"
            gathered.discard(step.stage)
        elif step.kind in COMPUTES and step.stage not in gathered:
            yield f"rank {rank} does {step} while the weights of stage {step.stage} are not gathered (UNSHARD)"
    for stage in sorted(gathered):
        yield f"rank {rank} never frees the weights of stage {stage} that it has gathered (RESHARD)"


def _pairs_differ(lists: _Lists, schedule: PipelineSchedule) -> Iterator[str]:
    """Between two ranks messages are matched by the order in which they are posted, and NCCL does them in that order:
    both sides must post the same ones, both ways together, in the same order.
    """
    stages = schedule.problem.stages
    between: dict[tuple[int, int], dict[int, list[Step]]] = {}
    for rank, steps in lists.items():
        for step in steps:
            if step.kind in SENDS or step.kind in RECEIVES:
                peer = stages[step.other_end.stage].rank
                send = step if step.kind in SENDS else step.other_end
                between.setdefault((min(rank, peer), max(rank, peer)), {}).setdefault(rank, []).append(send)
    for (low, high), posted in between.items():
        for number, (one, other) in enumerate(zip_longest(posted.get(low, ()), posted.get(high, ()))):
            if one != other:
                yield (
                    f"ranks {low} and {high} post their messages in different orders: number {number} is {one} for "
                    f"rank {low}, and {other} for rank {high}; one would take the other's for its own, or hang"
                )


def _waits(lists: _Lists) -> Iterator[str]:
    """Execute the lists, each message when both sides have come to it: NCCL does a rank's messages one by one, so that
    a send that nobody receives yet holds up what is posted behind it.
    """
    position = dict.fromkeys(lists, 0)
    offered: dict[Step, int] = {}
    ready = list(lists)
    while ready:
        rank = ready.pop()
        steps = lists[rank]
        while position[rank] < len(steps):
            step = steps[position[rank]]
            if step.kind in SENDS or step.kind in RECEIVES:
                peer = offered.pop(step.other_end, None)
                if peer is None:
                    offered[step] = rank
                    break
                position[peer] += 1
                ready.append(peer)
            position[rank] += 1
    stuck = [f"rank {rank} at {steps[position[rank]]}" for rank, steps in lists.items() if position[rank] < len(steps)]
    if stuck:
        yield f"ranks would wait for each other for ever: {', '.join(stuck)}"


def _check_memory(schedule: PipelineSchedule) -> None:
    limits = schedule.problem.memory_limit
    for rank, (peak, limit) in enumerate(zip(timed(schedule).peak_bytes, limits or (), strict=limits is not None)):
        if peak > limit:
            raise VerificationError(
                f"rank {rank} would hold {peak} bytes at once; its limit is {limit}",
                hint="solve again with the limit, or raise it; nothing has run",
            )


def _check_plans(lists: _Lists, schedule: PipelineSchedule) -> None:
    """The same lists as plans, for the judge of all plans; without what concerns FSDP alone, or waits."""
    steps = {
        rank: [
            step.action if step.kind in COMPUTES else Transfer(step.stage, TransferKind(step.kind), step.microbatch)
            for step in own
            if step.microbatch >= 0 and step.kind not in WAITS
        ]
        for rank, own in lists.items()
    }
    plans = plans_of_steps(schedule.problem, steps)
    faults = [(f"rank {rank}: ", fault) for rank, plan in plans.items() for fault in verify(plan).faults]
    faults += [("", fault) for fault in verify_ranks(plans)]
    for where, fault in faults:
        raise VerificationError(f"{where}{fault.message}", hint="nothing has run")
