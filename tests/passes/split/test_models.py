"""Whole models in parts, on two ranks in lock-step: outputs and all gradients as unsplit, and how many joins they need.

Parts are of unequal lengths, one of them of a single token. Everything is in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from opweave.passes.split.split import Split, split
from tests.passes.split.kernels import REPLACED
from tests.passes.split.mixtures import Mixture
from tests.passes.split.models import Language, Llama, Vision, tables
from tests.passes.split.traced import difference, fake_group, fed, lockstep, state, trace

RANKS = 2
EXACT = 1e-10
THREE = (1, 14, 1)
FOUR = (1, 2, 6, 7)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """Two ranks, of which this process is the first."""
    with fake_group(RANKS):
        yield


@dataclass(frozen=True)
class Case:
    """How to make a rank's module, its inputs, and the dimension of each that has the 16 tokens (None: no tokens)."""

    make: Callable[[int], nn.Module]
    inputs: tuple[Tensor, ...]
    axes: tuple[int | None, ...]


def activations(*shape: int) -> Tensor:
    """Normal numbers whose gradient is wanted."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def words(*shape: int) -> tuple[Tensor, Tensor]:
    """Tokens, and targets some of which are to be ignored (-1)."""
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 11, shape, generator=generator), torch.randint(-1, 11, shape, generator=generator)


def cases() -> dict[str, Case]:
    """Models by the axis along which they are cut."""
    batch, sequence, share = activations(16, 6, 8), activations(2, 16, 8), activations(16, 3, 8)
    short, long = tables(6, 4), tables(16, 4)
    mixtures = {
        f"{form} mixture by batch": Case(lambda rank, form=form: Mixture(form, rank), (batch,), (0,))  # type: ignore[misc]
        for form in ("dense", "exchange", "sorted", "added", "inverse", "slots", "capacity")
    }
    return {
        "llama by batch": Case(lambda rank: Llama(rank, layers=1), (batch, *short), (0, None, None)),
        "llama by sequence": Case(lambda rank: Llama(rank, layers=1), (sequence, *long), (1, 0, 0)),
        "sequence parallel llama by batch": Case(
            lambda rank: Llama(rank, layers=1, parallel="sequence"), (share, *short), (0, None, None)
        ),
        "written out llama by batch": Case(
            lambda rank: Llama(rank, layers=1, form="written", written=True), (batch, *short), (0, None, None)
        ),
        "written out llama by sequence": Case(
            lambda rank: Llama(rank, layers=1, form="written", written=True), (sequence, *long), (1, 0, 0)
        ),
        "language by batch": Case(Language, (*words(16, 6), *short), (0, 0, None, None)),
        "language by sequence": Case(lambda rank: Language(rank, sequence=16), (*words(2, 16), *long), (1, 1, 0, 0)),
        "vision by batch": Case(Vision, (activations(16, 2, 4, 4),), (0,)),
        **mixtures,
    }


@dataclass(frozen=True)
class Ready:
    """A traced graph, each rank's inputs, and the axes to cut."""

    graph: fx.GraphModule
    inputs: tuple[list[Tensor], ...]
    axes: dict[str, int]


@cache
def ready(name: str, training: bool, decomposed: bool = False) -> Ready:
    """The graph of one rank, and inputs of all."""
    case = cases()[name]
    modules = [case.make(rank) for rank in range(RANKS)]
    traced = trace(modules[0], case.inputs, training=training, decompositions=_table() if decomposed else None)
    graph = traced.joint if training else traced.inference
    assert graph is not None
    axes = {name: dim for name, dim in zip(traced.names, case.axes, strict=True) if dim is not None}
    for node in graph.graph.find_nodes(op="placeholder"):
        if node.name.startswith("tangents") and node.meta["val"].dim() > 1:
            assert case.axes[0] is not None
            axes[node.name] = case.axes[0]
    given = [value.detach() for value in case.inputs]
    return Ready(graph, tuple(fed(graph, [*state(module), *given]) for module in modules), axes)


def _table() -> Any:
    """What Inductor decomposes."""
    import_module("torch._inductor.lowering")  # functions of the table need it, and do not import it
    return import_module("torch._inductor.decomposition").select_decomp_table()


def joins(made: Split) -> Counter[tuple[str, str]]:
    """How often which operator joined, and by what."""
    return Counter((entry.target.split(".")[1], entry.by) for entry in made.joined)


#: Joins of inference and of training, by operator. None is within a layer of tensor-parallel or sequence-parallel
#: Llama; what is summed are gradients of parameters, read by what follows, and the number of targets of a mean.
JOINS: dict[str, tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]] = {
    "llama by batch": ({}, {}),
    "llama by sequence": ({}, {}),
    "sequence parallel llama by batch": ({}, {}),
    "written out llama by batch": ({}, {}),
    "written out llama by sequence": ({("bmm", "cat"): 2}, {("bmm", "cat"): 4, ("mm", "sum"): 2, ("mul", "sum"): 2}),
    "language by batch": ({}, {("nll_loss_backward", "sum"): 1}),
    "language by sequence": ({}, {("nll_loss_backward", "sum"): 1}),
    "vision by batch": ({}, {}),
    "dense mixture by batch": ({}, {("select_backward", "sum"): 12}),
    "exchange mixture by batch": ({}, {}),
    "sorted mixture by batch": ({}, {}),
    "added mixture by batch": ({}, {}),
    "inverse mixture by batch": ({}, {}),
}


def check(name: str, training: bool, sizes: Sequence[int]) -> None:
    """Outputs, and in training all gradients, on both ranks; and no more joins than are known."""
    case = ready(name, training)
    made = split(case.graph, case.axes, sizes)
    assert difference(case.graph, made.module, case.inputs, REPLACED) < EXACT
    if name in JOINS:
        assert joins(made) == JOINS[name][training]


#: Cases for every run; all others are among the slow ones.
INFERENCE = [
    "llama by batch",
    "llama by sequence",
    "written out llama by sequence",
    "language by batch",
    "sorted mixture by batch",
    "exchange mixture by batch",
]
TRAINING = [
    "llama by sequence",
    "sequence parallel llama by batch",
    "language by sequence",
    "vision by batch",
    "dense mixture by batch",
    "added mixture by batch",
    "capacity mixture by batch",
]


@pytest.mark.parametrize("name", INFERENCE)
def test_parts_of_inference_compute_the_same(name: str) -> None:
    """In two parts."""
    check(name, False, (5, 11))


@pytest.mark.parametrize("name", TRAINING)
def test_parts_of_training_compute_the_same(name: str) -> None:
    """In three parts, two of them of a single token."""
    check(name, True, THREE)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(5, 11), THREE, FOUR], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", list(cases()))
def test_any_parts_compute_the_same(name: str, training: bool, sizes: tuple[int, ...]) -> None:
    """Two, three and four parts of each."""
    check(name, training, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(cases()))
def test_decomposed_models_compute_the_same(name: str) -> None:
    """The same after Inductor's decompositions, in training."""
    case = ready(name, True, True)
    made = split(case.graph, case.axes, FOUR)
    assert difference(case.graph, made.module, case.inputs, REPLACED) < EXACT


@pytest.mark.parametrize("name", ["slots mixture by batch", "capacity mixture by batch"])
def test_a_buffer_with_a_place_per_token_is_joined(name: str) -> None:
    """Which tokens an expert drops depends on all tokens: places are given out exactly, and the buffer is whole."""
    case = ready(name, False)
    made = split(case.graph, case.axes, (5, 11))
    assert any(entry.by == "sum" for entry in made.joined)
    assert made.parts


def dropped(graph: fx.GraphModule, target: str) -> fx.GraphModule:
    """The graph without the first sum of parts called ``target``: its first operand in its place."""
    node = next(node for node in graph.graph.nodes if target in node.name)
    node.replace_all_uses_with(node.args[0])
    graph.graph.erase_node(node)
    graph.recompile()
    return graph


def test_a_dropped_summand_is_caught() -> None:
    """A part's gradients of a weight, left out, show."""
    case = ready("llama by sequence", True)
    made = split(case.graph, case.axes, (5, 11))
    assert difference(case.graph, made.module, case.inputs, REPLACED) < EXACT
    assert difference(case.graph, dropped(made.module, "_sum"), case.inputs, REPLACED) > 1e-3


def test_ranks_in_lockstep_are_those_of_torch() -> None:
    """The collectives that the other tests run equal those of torch's own virtual ranks."""
    local = import_module("torch.distributed._local_tensor")
    case = ready("sequence parallel llama by batch", False)
    with torch.no_grad(), local.LocalTensorMode(RANKS):
        pairs = zip(*case.inputs, strict=True)
        (result,) = case.graph(*(local.LocalTensor(dict(enumerate(pair))) for pair in pairs))
    for rank, (expected,) in enumerate(lockstep(case.graph, case.inputs)):
        assert torch.equal(result._local_tensors[rank], expected)
