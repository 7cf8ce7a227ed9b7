"""How many chunks a chain over links, network and experts is cut into, in closed form.

An expert-parallel layer dispatches its tokens over the network (all-to-all), gathers them within the node (all-gather),
computes the experts, scatters the sums within the node (reduce-scatter) and combines over the network. Cut into
``chunks``, its five stages form a pipeline over three resources. The four cases are those of FSMoE (Pan et al., ASPLOS
2025, arXiv 2501.10714): the network is never idle; the experts are what everything waits for; the network is the
bottleneck, but waits for one chunk within the node; the node's links are what everything waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from ...errors import OptionError
from .problem import Mode, Problem, Task

__all__ = [
    "Chain",
    "ChunkChoice",
    "GradientPartition",
    "Linear",
    "best_chunks",
    "chain_order",
    "chain_problem",
    "closed_form",
    "fsmoe_configurations",
    "network_slack_s",
    "partition_gradients",
]

NETWORK, LINKS, COMPUTE = "network", "links", "compute"


@dataclass(frozen=True)
class Linear:
    """A stage that takes ``alpha_s`` for each chunk and ``work_s`` for all of them together."""

    alpha_s: float
    work_s: float

    def __post_init__(self) -> None:
        if not (0 <= self.alpha_s < float("inf") and 0 <= self.work_s < float("inf")):
            raise OptionError(f"a stage takes {self.alpha_s} s a chunk and {self.work_s} s of work; both are 0 or more")

    def chunk_s(self, chunks: int) -> float:
        """Seconds of one of ``chunks`` equal chunks."""
        return self.alpha_s + self.work_s / chunks


@dataclass(frozen=True)
class Chain:
    """The stages of one layer; ``exchange`` is one all-to-all of two, ``reduce_s`` what else the network has to do.

    In the backward pass ``expert`` counts twice, and ``reduce_s`` is the all-reduce of gradients put into this layer.
    """

    exchange: Linear
    gather: Linear
    expert: Linear
    scatter: Linear
    reduce_s: float = 0.0


@dataclass(frozen=True)
class ChunkChoice:
    """The number of ``chunks`` that takes the fewest ``seconds`` by the closed form, and which ``case`` applied."""

    chunks: int
    seconds: float
    case: int


def closed_form(chain: Chain, chunks: int) -> tuple[float, int]:
    """Seconds of the chain cut into ``chunks``, and the case from 1 to 4 (FSMoE's predicates Q1 to Q7).

    Raises:
        OptionError: fewer than 1 chunk.
    """
    if chunks < 1:
        raise OptionError(f"a chain is cut into {chunks} chunks; it takes 1 or more")
    exchange, expert = chain.exchange.chunk_s(chunks), chain.expert.chunk_s(chunks)
    node = chain.gather.chunk_s(chunks) + chain.scatter.chunk_s(chunks)
    between = 2 * (chunks - 1) * exchange  # what the network does while the first chunk's result is not there yet
    if exchange > chain.gather.chunk_s(chunks):
        expert_bound = chunks * expert > between
        slack = node + chunks * expert - between if expert_bound else node
    else:
        expert_bound = chunks * expert > (chunks - 1) * node
        slack = node + chunks * expert - between if expert_bound else chunks * node - between
    if chain.reduce_s > slack:
        return 2 * chunks * exchange + chain.reduce_s, 1
    if expert_bound:
        return 2 * exchange + node + chunks * expert, 2
    if exchange > chain.gather.chunk_s(chunks):
        return 2 * chunks * exchange + node, 3
    return 2 * exchange + chunks * node, 4


def network_slack_s(chain: Chain, chunks: int) -> float:
    """Seconds that the network is idle within the chain: what else it can do there at no cost, by the closed form."""
    alone, _ = closed_form(Chain(chain.exchange, chain.gather, chain.expert, chain.scatter), chunks)
    return max(0.0, alone - 2 * chunks * chain.exchange.chunk_s(chunks))


def best_chunks(chain: Chain, choices: Iterable[int] = (1, 2, 4, 8)) -> ChunkChoice:
    """The choice of the fewest seconds, the smaller of equal ones.

    FSMoE minimises over real numbers by SLSQP, case by case, and rounds; the integers that matter are few.

    Raises:
        OptionError: no choices, or one below 1.
    """
    answers = [ChunkChoice(chunks, *closed_form(chain, chunks)) for chunks in sorted(set(choices))]
    if not answers:
        raise OptionError("no numbers of chunks to choose from were given")
    return min(answers, key=lambda answer: (answer.seconds, answer.chunks))


def chain_problem(chain: Chain, chunks: int) -> Problem:
    """The chain as tasks on lanes ``network``, ``links`` and ``compute`` that share nothing else.

    Program order: dispatches, the gradients' all-reduce, gathers, experts, scatters, combines.
    """
    tasks = [_task(f"dispatch{i}", NETWORK, chain.exchange, chunks) for i in range(chunks)]
    if chain.reduce_s:
        tasks.append(Task("reduce", NETWORK, (Mode("alone", chain.reduce_s),)))
    first = len(tasks)
    tasks += [_task(f"gather{i}", LINKS, chain.gather, chunks, i) for i in range(chunks)]
    tasks += [_task(f"expert{i}", COMPUTE, chain.expert, chunks, first + i) for i in range(chunks)]
    tasks += [_task(f"scatter{i}", LINKS, chain.scatter, chunks, first + chunks + i) for i in range(chunks)]
    scattered = range(first + 2 * chunks, first + 3 * chunks)
    tasks += [_task(f"combine{i}", NETWORK, chain.exchange, chunks, scattered[i]) for i in range(chunks)]
    return Problem(tuple(tasks))


def _task(name: str, lane: str, stage: Linear, chunks: int, *before: int) -> Task:
    return Task(name, lane, (Mode("alone", stage.chunk_s(chunks)),), before)


def chain_order(problem: Problem) -> tuple[int, ...]:
    """FSMoE's order of a ``chain_problem``: each lane as programmed; the links take what is ready, gathers first."""
    free: dict[str, float] = {}
    done: dict[int, float] = {}
    order: list[int] = []
    waiting = list(range(len(problem.tasks)))
    while waiting:
        ready: list[tuple[float, int]] = []
        lanes: set[str] = set()
        for index in waiting:
            task = problem.tasks[index]
            if (task.lane == LINKS or task.lane not in lanes) and all(other in done for other in task.before):
                start = max((done[other] for other in task.before), default=0.0)
                ready.append((max(start, free.get(task.lane, 0.0)), index))
            lanes.add(task.lane)
        start, index = min(ready)
        done[index] = free[problem.tasks[index].lane] = start + problem.tasks[index].modes[0].seconds
        order.append(index)
        waiting.remove(index)
    return tuple(order)


@dataclass(frozen=True)
class GradientPartition:
    """Bytes of gradients that each layer's network sends, in the order of the backward pass, and seconds not hidden."""

    nbytes: tuple[int, ...]
    exposed_s: float


def partition_gradients(
    ready_bytes: Sequence[int], slack_s: Sequence[float], alpha_s: float, seconds_per_byte: float
) -> GradientPartition:
    """Put gradients into the slack of later layers, greedily: as many bytes, as early, as hide (FSMoE's first step).

    ``ready_bytes[i]`` exist when layer ``i`` of the backward pass begins, ``slack_s[i]`` is what its network idles
    (``network_slack_s``). A message of ``n > 0`` bytes takes ``alpha_s + n * seconds_per_byte``. What hides nowhere
    joins the last layer's message. Of all partitions this one hides the most bytes in slack.

    Raises:
        OptionError: lists of different lengths or none at all, or something negative.
    """
    if len(ready_bytes) != len(slack_s) or not ready_bytes:
        raise OptionError(f"gradients of {len(ready_bytes)} layers and slack of {len(slack_s)}; one of each per layer")
    if min(*ready_bytes, *slack_s, alpha_s) < 0 or seconds_per_byte <= 0:
        raise OptionError("gradients, slack and the time of a message are 0 or more, the time of a byte is more than 0")
    sent: list[int] = []
    pool = 0
    for ready, slack in zip(ready_bytes, slack_s, strict=True):
        pool += ready
        sent.append(min(pool, max(0, int((slack - alpha_s) / seconds_per_byte))))
        pool -= sent[-1]
    sent[-1] += pool
    last_s = alpha_s + sent[-1] * seconds_per_byte if pool else 0.0
    return GradientPartition(tuple(sent), max(0.0, last_s - slack_s[-1]) if pool else 0.0)


def fsmoe_configurations() -> Iterator[Chain]:
    """162 layers on FSMoE's testbed B (32 RTX 2080 Ti), by its fitted constants; the layers' sizes are ours.

    Tokens, model and hidden sizes, top-2 of experts with capacity factors 1.2 and 2.4, 4 GPUs that share an expert.
    The constants are the paper's, in ms and ms per byte or per flop: GEMM .0924 and 4.42e-11, all-to-all .175 and
    3.06e-7, all-gather .032 and 1.68e-7, reduce-scatter .0391 and 1.67e-7. An expert is two matrix products.
    """
    for batch, length, model, ratio, capacity in product(
        (1, 2, 4), (256, 512, 1024), (1024, 2048, 4096), (2, 3, 4), (1.2, 2.4)
    ):
        routed = batch * length * 2 * capacity * model
        products = routed * ratio * model
        yield Chain(
            exchange=Linear(1.75e-4, routed * 3.06e-10),
            gather=Linear(3.2e-5, 4 * routed * 1.68e-10),
            expert=Linear(2 * 9.24e-5, 2 * products * 4.42e-14),
            scatter=Linear(3.91e-5, 4 * routed * 1.67e-10),
        )
