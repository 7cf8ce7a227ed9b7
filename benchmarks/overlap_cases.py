"""Smaller published results, each put through our machines, costs and schedules: all but TokenWeave's latencies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import exp, log

from opweave.hw_models import HardwareModel, load
from opweave.hw_models.collectives import collective_modes
from opweave.hw_models.fabric import KernelKind
from opweave.hw_models.matmul import matmul_seconds, streaming
from opweave.passes.overlap.chain import (
    Chain,
    best_chunks,
    chain_order,
    chain_problem,
    closed_form,
    fsmoe_configurations,
)
from opweave.passes.overlap.list_schedule import list_schedule
from opweave.passes.overlap.problem import Mode, Problem, Task
from opweave.passes.overlap.simulate import given_modes, timed
from opweave.passes.overlap.tasks import problem_of

from .overlap_comparison import Comparison
from .overlap_models import LLAMA_70B, mlp_graph
from .overlap_published import (
    FIG9_OFFSETS,
    FIG9_US,
    FLUX_AG_GEMM,
    FLUX_GEMM_RS,
    FSMOE_LAYER_SPEEDUP,
    NANOFLOW_ABLATION,
    NANOFLOW_ESTIMATED,
    NANOFLOW_MEASURED,
    PR_143160_US,
    T3_SPEEDUPS,
)
from .overlap_tokenweave import FITTED, MARGIN

__all__ = ["figure_9", "flux", "fsmoe", "nanoflow", "pull_request", "t3"]

#: What our choice of nano-batches is from; NanoFlow's own has two for the products of the output and the MLP, 768 and
#: 1280, and four for queries, keys, values and attention.
NANO_BATCHES = ((1024, 1024), (768, 1280), (768, 640, 640), (512, 512, 512, 512))
H100, DTYPE, RANKS = "8xh100-nvlink", "bfloat16", 8


def figure_9() -> Iterator[Comparison]:
    """What splitting a MLP costs, by the wave model."""
    machine = load(H100)
    source = "microsoft/tokenweave artifacts_results/output/figure_9_hs_8192.csv"

    def seconds(tokens: int) -> float:
        return sum(t.modes[0].seconds for t in problem_of(mlp_graph(LLAMA_70B, tokens, RANKS), machine).tasks)

    for tokens, (whole_us, split_us) in FIG9_US.items():
        whole = seconds(tokens)
        inputs = "products' tiling fitted on the whole MLP and on equal halves"
        yield Comparison(f"figure9/{tokens}", "whole", whole_us, 1e6 * whole, "us", True, inputs, source)
        for offset, published in zip(FIG9_OFFSETS, split_us, strict=True):
            ours = seconds(tokens // 2 + offset) + seconds(tokens // 2 - offset)
            case = f"figure9/{tokens}/+{offset}"
            yield Comparison(
                case, "split / whole", published / whole_us, ours / whole, "x", not offset, inputs, source, 1.0
            )


def nanoflow() -> Iterator[Comparison]:
    """Table 2 by our kernels, and the ablation by our schedules with the interference table as modes."""
    machine = load("8xa100-nvlink")
    source, layers = "NanoFlow (arXiv 2408.12757v2), table 2", 80
    inputs = "A100 tiling assumed, except that its rate is NanoFlow's 280 TFLOPS; network fitted on this table"
    for name, published in NANOFLOW_MEASURED.items():
        ours = 1e3 * layers * _nanoflow_seconds(name, 2048, machine)
        roofline = NANOFLOW_ESTIMATED[name]
        case = f"nanoflow/table2/{name}"
        yield Comparison(case, "time", published, ours, "ms", name == "network", inputs, source, roofline)
    ways = {
        "non-overlapped": _nanoflow_layer_s(machine, (2048,), overlap=False),
        "nano-batches only": _nanoflow_layer_s(machine, (768, 1280), overlap=False),
        "NanoFlow": min(_nanoflow_layer_s(machine, batches, overlap=True) for batches in NANO_BATCHES),
    }
    note = f"{inputs}; interference: table 3; decode attention's bytes from its estimate"
    for way, per_layer in ways.items():
        rate, published = 2048 / RANKS / (layers * per_layer), NANOFLOW_ABLATION[way]
        case = f"nanoflow/ablation/{way}"
        yield Comparison(
            case, "throughput", published, rate, "tokens/s/GPU", False, note, "NanoFlow, figure 9, 512/512"
        )
        if way != "non-overlapped":
            ratio, base = ways["non-overlapped"] / per_layer, NANOFLOW_ABLATION["non-overlapped"]
            yield Comparison(case, "speed-up", published / base, ratio, "x", False, note, "NanoFlow, figure 9", 1.0)


def _nanoflow_seconds(name: str, tokens: int, machine: HardwareModel) -> float:
    """Seconds of one kind of kernel in one layer of Llama-2-70B, for a part of a batch of 2048 tokens."""
    shapes = {"KQV": (1280, 8192), "O": (8192, 1024), "UG": (7168, 8192), "D": (8192, 3584)}
    if name in shapes:
        columns, inner = shapes[name]
        return matmul_seconds(tokens, columns, inner, "float16", machine)
    if name == "decode attention":
        nbytes = NANOFLOW_ESTIMATED[name] * 1e-3 / 80 * machine.scratchpad_memory.bandwidth_bytes_per_s
        return streaming(int(nbytes * tokens / 2048), machine).seconds
    return 2 * _collective("all_gather", tokens, machine) + _collective("all_reduce", tokens, machine)


def _collective(kind: str, tokens: int, machine: HardwareModel, width: int = 8192) -> float:
    return collective_modes(kind, 2 * width * tokens, range(RANKS), machine)[0].seconds


def _nanoflow_layer_s(machine: HardwareModel, batches: Sequence[int], *, overlap: bool) -> float:
    """Seconds of one of many layers: one behind the other, or by the best schedule of all shares of the machine."""
    if not overlap:
        problem = _nanoflow_problem(machine, batches, 1, 1.0, 1.0)
        return sum(task.modes[0].seconds for task in problem.tasks)
    tables = {table.kernel: dict(zip(table.given_up, table.reached, strict=True)) for table in machine.interference}
    found = []
    for attention, network in product(tables[KernelKind.MATRIX_VECTOR], tables[KernelKind.NETWORK]):
        shares = {"attention": attention, "network": network}
        reached = {
            "attention": tables[KernelKind.MATRIX_VECTOR][attention],
            "network": tables[KernelKind.NETWORK][network],
        }
        if sum(shares.values()) > 1:
            continue
        spans = [_nanoflow_makespan(machine, batches, count, shares, reached) for count in (4, 8)]
        found.append((spans[1] - spans[0]) / 4)
    return min(found)


def _nanoflow_makespan(
    machine: HardwareModel, batches: Sequence[int], layers: int, shares: dict[str, float], reached: dict[str, float]
) -> float:
    problem = _nanoflow_problem(machine, batches, layers, reached["attention"], reached["network"], shares)
    return list_schedule(problem, streams=False).makespan_s


def _nanoflow_problem(
    machine: HardwareModel,
    batches: Sequence[int],
    layers: int,
    attention: float,
    network: float,
    shares: dict[str, float] | None = None,
) -> Problem:
    """Layers of a batch in nano-batches; attention and network reach these parts of their speeds, for given shares."""
    shares = shares or {}
    lanes = {"decode attention": ("attention", attention), "AG": ("network", network), "AR": ("network", network)}
    tasks: list[Task] = []
    last: list[int | None] = [None] * len(batches)
    for layer in range(layers):
        for part, tokens in enumerate(batches):
            for name in ("KQV", "decode attention", "AG", "O", "AG", "UG", "D", "AR"):
                lane, reached = lanes.get(name, ("compute", 1.0))
                kinds = {"AG": "all_gather", "AR": "all_reduce"}
                alone = _collective(kinds[name], tokens, machine) if name in kinds else 0.0
                seconds = (alone or _nanoflow_seconds(name, tokens, machine)) / reached
                mode = Mode(name, seconds, {"sm": shares.get(lane, 1.0)}, fixed=lane != "compute")
                before = () if last[part] is None else (last[part],)
                tasks.append(Task(f"{layer}.{part}.{len(tasks)}", lane, (mode,), before, part=part))  # type: ignore[arg-type]
                last[part] = len(tasks) - 1
    return Problem(tuple(tasks))


def fsmoe() -> Iterator[Comparison]:
    """The closed form beside the simulator, and what links that overlap the network gain over those that do not."""
    errors, gains, same = [], [], 0
    configurations = list(fsmoe_configurations())
    for chain in configurations:
        simulated = {chunks: _chain_s(chain, chunks) for chunks in (1, 2, 4, 8)}
        errors += [closed_form(chain, chunks)[0] / seconds - 1 for chunks, seconds in simulated.items()]
        choice = best_chunks(chain)
        same += simulated[choice.chunks] <= min(simulated.values()) * (1 + 1e-9)
        gains.append(min(_chain_s(chain, chunks, merged=True) for chunks in (1, 2, 4, 8)) / simulated[choice.chunks])
    count = len(configurations)
    inputs = "constants of stages from the paper; sizes of layers are ours"
    source = "FSMoE (arXiv 2501.10714), section 5"
    mean = 1 + sum(errors) / len(errors)
    yield Comparison("fsmoe/162", "closed form / simulator, mean", 1.0, mean, "x", False, inputs, source)
    yield Comparison("fsmoe/162", "closed form / simulator, most", 1.0, 1 + max(errors), "x", False, inputs, source)
    yield Comparison("fsmoe/162", "chunks of least time chosen", count, same, "layers", False, inputs, source)
    gain = exp(sum(map(log, gains)) / count)
    note = f"{inputs}; Tutel: gathers and scatters on the network's stream, the best of 1, 2, 4, 8 chunks"
    yield Comparison("fsmoe/162", "speed-up over Tutel", FSMOE_LAYER_SPEEDUP, gain, "x", False, note, source, 1.0)


def _chain_s(chain: Chain, chunks: int, *, merged: bool = False) -> float:
    """Seconds of FSMoE's order; ``merged`` has one stream for what goes over the network and within the node."""
    problem = chain_problem(chain, chunks)
    if not merged:
        return timed(problem, chain_order(problem), given_modes(problem)).makespan_s
    tasks = tuple(replace(t, lane="network" if t.lane == "links" else t.lane) for t in problem.tasks)
    return list_schedule(Problem(tasks), streams=False).makespan_s


def t3() -> Iterator[Comparison]:
    """A product beside its reduce-scatter on 8 and on 16 compute units."""
    machine = load("t3-80cu")
    modes = {m.programs: m for m in collective_modes("reduce_scatter", 1 << 28, range(8), machine) if m.programs}
    alone = modes[80].seconds
    product_s = alone * (T3_SPEEDUPS[0] - 1)  # the ideal hides the shorter of the two wholly
    inputs = "slow-down of the collective, and of the product for 16 units, from the paper; lengths from its ideal"
    for units, published in T3_SPEEDUPS.items():
        mode = modes[units or 80]
        share = mode.compute_share if units else 0.0
        tasks = (
            Task("product", "cu", (Mode("product", product_s, {"cu": 1.0}),)),
            Task("reduce", "ring", (Mode("ring", mode.seconds, {"cu": share} if share else {}, fixed=True),)),
        )
        together = timed(Problem(tasks), (0, 1), (0, 0), streams=False).makespan_s
        ours = (product_s + alone) / together
        ideal = T3_SPEEDUPS[0]
        yield Comparison(
            f"t3/{units} units", "speed-up", published, ours, "x", not units, inputs, "T3 (arXiv 2401.16677)", ideal
        )


def flux() -> Iterator[Comparison]:
    """Times of torch, and what our own split into parts would gain, beside what flux's kernels did."""
    machine = load(H100)
    source = "bytedance/flux issue 90 (a user's)"
    for kind, table, columns, inner in (
        ("all_gather", FLUX_AG_GEMM, 7168, 8192),
        ("reduce_scatter", FLUX_GEMM_RS, 8192, 3584),
    ):
        case = {"all_gather": "AG+GEMM", "reduce_scatter": "GEMM+RS"}[kind]
        for rows, (torch_ms, flux_ms) in table.items():
            plain = _sequence_s(machine, kind, rows, columns, inner)
            inputs = "products on figure 9, NCCL on TokenWeave's kernels; shape read off a file name"
            yield Comparison(f"flux/{case}/{rows}", "torch", torch_ms, 1e3 * plain, "ms", False, inputs, source)
            parts, best = min(
                ((count, _pipelined_s(machine, kind, rows, columns, inner, count)) for count in (1, 2, 3, 4)),
                key=lambda each: each[1],
            )
            gain = plain / best
            remark = f"ours: {parts} parts, guard {'on' if gain >= 1 + MARGIN else 'refuses'}; theirs: flux's kernel"
            note = f"{inputs}, contention on Llama TP8"
            yield Comparison(
                f"flux/{case}/{rows}", "speed-up", torch_ms / flux_ms, gain, "x", False, note, source, 1.0, remark
            )


def _sequence_s(
    machine: HardwareModel, kind: str, rows: int, columns: int, inner: int, algorithm: str = "nccl"
) -> float:
    width = inner if kind == "all_gather" else columns
    mode = collective_modes(kind, 2 * rows * width, range(RANKS), machine, algorithms=(algorithm,))[0]
    return mode.seconds + matmul_seconds(rows, columns, inner, DTYPE, machine)


def _pipelined_s(machine: HardwareModel, kind: str, rows: int, columns: int, inner: int, count: int) -> float:
    """The best schedule of ``count`` parts, each with its collective, in the best mode for all."""
    width = inner if kind == "all_gather" else columns
    ways = collective_modes(kind, 2 * rows * width // count, range(RANKS), machine)
    found = []
    for way in ways:
        tasks: list[Task] = []
        share = {"sm": min(1.0, FITTED.contention * way.compute_share)} if way.compute_share else {}
        moved = Mode(way.algorithm, way.seconds, share, fixed=True)
        for part in range(count):
            seconds = matmul_seconds(rows // count, columns, inner, DTYPE, machine)
            pair = [("link", moved), ("sm", Mode("mm", seconds, {"sm": 1.0}))]
            for lane, mode in pair if kind == "all_gather" else pair[::-1]:
                before = (len(tasks) - 1,) if len(tasks) % 2 else ()
                tasks.append(Task(f"{lane}{part}", lane, (mode,), before, part=part))
        found.append(list_schedule(Problem(tuple(tasks), event_s=1e-6), streams=False).makespan_s)
    return min(found)


def pull_request() -> Iterator[Comparison]:
    """An all-gather and a product: by NCCL, by multimem, and decomposed into what each rank sends."""
    machine = load(H100)
    rows, columns, inner, source = 2048, 3584, 8192, "pytorch/pytorch pull request 143160"
    inputs = "products on figure 9, collectives on TokenWeave's kernels"
    for name, algorithm in (("NCCL", "nccl"), ("multimem", "multimem")):
        ours = 1e6 * _sequence_s(machine, "all_gather", rows, columns, inner, algorithm)
        yield Comparison(f"pr143160/{name}", "time", PR_143160_US[name], ours, "us", False, inputs, source)
    link = machine.links[0]
    copy = link.latency_s + 2 * rows // RANKS * inner / link.bandwidth_bytes_per_s
    chunk = matmul_seconds(rows // RANKS, columns, inner, DTYPE, machine)
    tasks = [Task("mm0", "sm", (Mode("mm", chunk, {"sm": 1.0}),))]  # a rank's own rows come first
    for part in range(1, RANKS):
        tasks.append(Task(f"copy{part}", "link", (Mode("copy", copy),)))
        tasks.append(Task(f"mm{part}", "sm", (Mode("mm", chunk, {"sm": 1.0}),), (len(tasks) - 1,)))
    ours = 1e6 * list_schedule(Problem(tuple(tasks), event_s=1e-6), streams=False).makespan_s
    note = "products on figure 9; copies at the link's rate"
    yield Comparison("pr143160/decomposed", "time", PR_143160_US["decomposed"], ours, "us", False, note, source)
