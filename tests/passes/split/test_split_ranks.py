"""Graphs of one rank of a group: tensor parallel, sequence parallel, exchanges; run on all ranks in lock-step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.fx import GraphModule

from opweave.passes.split import Split, split
from opweave.passes.split.rule import Call, Divided, Outcome, Rule
from opweave.passes.split.rules.collective import REDUCED_SUMMANDS
from opweave.passes.split.state import Along
from tests.passes.split.comparison import checked
from tests.passes.split.programs import traced
from tests.passes.split.traced import difference, fake_group

RANKS, WIDTH, HIDDEN = 4, 8, 6
_C10D = torch.ops._c10d_functional


def _waited(value: Tensor) -> Tensor:
    waited: Tensor = _C10D.wait_tensor(value)
    return waited


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)


def _tensor_parallel(x: Tensor, *weights: Tensor) -> Tensor:
    """Two blocks whose hidden dimension is spread over the ranks."""
    for up, down in zip(weights[::2], weights[1::2], strict=True):
        partial = torch.nn.functional.silu(_norm(x) @ up) @ down
        x = x + _waited(_C10D.all_reduce(partial, "sum", "0"))
    return x


def _sequence_parallel(x: Tensor, *weights: Tensor) -> Tensor:
    """The same, each rank holding a share of the tokens between the blocks."""
    for up, down in zip(weights[::2], weights[1::2], strict=True):
        whole = _waited(_C10D.all_gather_into_tensor(_norm(x), RANKS, "0"))
        partial = torch.tanh(whole @ up) @ down
        x = x + _waited(_C10D.reduce_scatter_tensor(partial, "sum", RANKS, "0"))
    return x


def _exchanged(x: Tensor, *weights: Tensor) -> Tensor:
    """Each rank gathers, sends every rank its block back, and adds up what it is sent."""
    whole = _waited(_C10D.all_gather_into_tensor(x, RANKS, "0")) @ weights[0]
    sizes = [x.shape[0]] * RANKS
    back = _waited(_C10D.all_to_all_single(torch.tanh(whole), sizes, sizes, "0")) @ weights[1]
    return x + sum(back.chunk(RANKS))


def _batch_of_sequences(x: Tensor, *weights: Tensor) -> Tensor:
    """DTensor's way of gathering along dimension 1: along dimension 0, then pieces beside each other."""
    whole = _waited(_C10D.all_gather_into_tensor(x, RANKS, "0"))
    side = torch.cat(torch.split(whole, x.shape[0]), 1)
    partial = torch.tanh(side @ weights[0]) @ weights[1]
    pieces = torch.cat(partial.chunk(RANKS, 1))
    return x + _waited(_C10D.reduce_scatter_tensor(pieces, "sum", RANKS, "0"))


def _drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2


def _per_rank(x: Sequence[Tensor]) -> list[list[Tensor]]:
    shapes = [(WIDTH, HIDDEN), (HIDDEN, WIDTH)] * 2
    return [[x[r], *(_drawn(10 * r + i, *shape) for i, shape in enumerate(shapes))] for r in range(RANKS)]


CASES = {
    "tensor parallel": (_tensor_parallel, [_drawn(99, 12, WIDTH)] * RANKS, 0),
    "sequence parallel": (_sequence_parallel, [_drawn(r, 6, WIDTH) for r in range(RANKS)], 0),
    "exchanged": (_exchanged, [_drawn(r, 6, WIDTH) for r in range(RANKS)], 0),
    "batch of sequences": (_batch_of_sequences, [_drawn(r, 3, 2, WIDTH) for r in range(RANKS)], 0),
    "sequence of batches": (_batch_of_sequences, [_drawn(r, 2, 3, WIDTH) for r in range(RANKS)], 1),
}


def _graph(function: Callable[..., object], inputs: Sequence[Tensor]) -> GraphModule:
    return traced(lambda *given: (function(*given),), inputs)


def _starts(result: Split) -> int:
    nodes = result.module.graph.nodes
    return sum("_c10d" in str(node.target) and "wait" not in str(node.target) for node in nodes)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shares", [(1, 2), (1, 1, 1), (2, 1)])
def test_ranks_agree_with_the_given_module_and_nothing_is_joined(case: str, shares: tuple[int, ...]) -> None:
    """Every collective runs once for each part, and parts meet only in the output."""
    function, x, dim = CASES[case]
    inputs = _per_rank(x)
    module = _graph(function, inputs[0])
    sizes = [share * x[0].shape[dim] // sum(shares) for share in shares]
    result = split(module, {"arg0_1": dim}, sizes, strict=True)
    checked(module, result)
    assert not result.joined
    before = sum("_c10d" in str(node.target) and "wait" not in str(node.target) for node in module.graph.nodes)
    assert _starts(result) == len(sizes) * before
    assert difference(module, result.module, inputs) < 1e-12


def test_local_tensors_of_eight_ranks() -> None:
    """PyTorch's own simulation of ranks agrees too, and notices another weight on one of them."""
    ranks = 8
    inputs = [[_drawn(99, 12, WIDTH), _drawn(r, WIDTH, 2), _drawn(50 + r, 2, WIDTH)] for r in range(ranks)]
    result = split(_graph(_tensor_parallel, inputs[0]), {"arg0_1": 0}, (5, 7), strict=True)
    up, down = (torch.cat([each[i] for each in inputs], 2 - i) for i in (1, 2))
    x = inputs[0][0]
    expected = x + torch.nn.functional.silu(_norm(x) @ up) @ down

    def gap(given: list[list[Tensor]]) -> float:
        with LocalTensorMode(ranks), torch.no_grad():
            local = [LocalTensor({r: given[r][i] for r in range(ranks)}) for i in range(3)]  # type: ignore[no-untyped-call]
            out = result.module(*local)[0]
        return max(float((value - expected).abs().max()) for value in out._local_tensors.values())

    with fake_group(ranks):
        assert gap(inputs) < 1e-12
        inputs[3][1] = inputs[3][1] * 1.01
        assert gap(inputs) > 1e-5


def test_tokens_of_one_block_are_not_scattered() -> None:
    """Tokens that all ranks have, scattered to ranks: part 0's would go to other ranks than the whole's."""
    inputs = [[_drawn(99, 12, WIDTH)]] * RANKS

    def scattered(x: Tensor) -> Tensor:
        return _waited(_C10D.reduce_scatter_tensor(torch.tanh(x), "sum", RANKS, "0"))

    module = _graph(scattered, inputs[0])
    result = split(module, {"arg0_1": 0}, (4, 8))
    assert [entry.target for entry in result.joined] == ["_c10d_functional.reduce_scatter_tensor.default"]
    assert difference(module, result.module, inputs) < 1e-12


def test_ranks_that_scatter_tokens_go_on_in_parts_of_their_own() -> None:
    """Embeddings that every rank has are scattered once; from there on all collectives run once for each part."""

    def scattered(x: Tensor, *weights: Tensor) -> Tensor:
        own = _waited(_C10D.reduce_scatter_tensor(torch.tanh(x), "sum", RANKS, "0"))
        return _sequence_parallel(own, *weights)

    inputs = _per_rank([_drawn(99, 24, WIDTH)] * RANKS)
    module = _graph(scattered, inputs[0])
    result = split(module, {"arg0_1": 0}, (8, 16))
    assert [entry.target for entry in result.joined] == ["_c10d_functional.reduce_scatter_tensor.default"]
    assert _starts(result) == 1 + 2 * 4
    assert difference(module, result.module, inputs) < 1e-12


def test_a_ranks_own_tokens_are_cut_the_same_way_on_every_rank() -> None:
    """A slice of tokens in one part, or across two: states follow from its length alone, so ranks call alike."""
    targets = []
    for rank in range(RANKS):

        def sliced(x: Tensor, w: Tensor, rank: int = rank) -> Tensor:
            return _waited(_C10D.all_reduce(x[6 * rank : 6 * rank + 6].tanh() @ w, "sum", "0"))

        module = _graph(sliced, (_drawn(99, 24, WIDTH), _drawn(1, WIDTH, 2)))
        result = split(module, {"arg0_1": 0}, (8, 16))
        targets.append([str(node.target) for node in result.module.graph.nodes if "c10d" in str(node.target)])
    assert len(targets[0]) == 4
    assert all(each == targets[0] for each in targets)


def test_summands_are_added_before_they_are_reduced_unless_asked() -> None:
    """A gradient over the tokens moves its bytes once; with REDUCED_SUMMANDS each part's are reduced on their own."""

    def gradient(x: Tensor, dy: Tensor) -> Tensor:
        return _waited(_C10D.all_reduce(x.t() @ dy, "sum", "0"))

    inputs = [[_drawn(r, 12, WIDTH), _drawn(r + 50, 12, HIDDEN)] for r in range(RANKS)]
    module = _graph(gradient, inputs[0])
    once = split(module, {"arg0_1": 0, "arg1_1": 0}, (4, 8))
    twice = split(module, {"arg0_1": 0, "arg1_1": 0}, (4, 8), rules=REDUCED_SUMMANDS)
    assert (_starts(once), _starts(twice)) == (1, 2)
    assert [entry.by for entry in once.joined] == ["sum"]
    for result in (once, twice):
        assert difference(module, result.module, inputs) < 1e-12


def _one_block(call: Call) -> Outcome:
    """A mistake: gathered tokens taken for tokens that lie together."""
    state = call.operands[0].state
    assert isinstance(state, Along)
    return Divided(Along(state.dim, state.scale * RANKS))


def test_a_wrong_rule_is_noticed() -> None:
    _, x, dim = CASES["sequence parallel"]
    inputs = _per_rank(x)

    def gathered(x: Tensor) -> Tensor:
        return _waited(_C10D.all_gather_into_tensor(x, RANKS, "0"))

    module = _graph(gathered, inputs[0][:1])
    rules = {"_c10d_functional::all_gather_into_tensor": Rule(_one_block)}
    wrong = split(module, {"arg0_1": dim}, (2, 4), rules=rules)
    assert difference(module, wrong.module, [each[:1] for each in inputs]) > 1e-3
    right = split(module, {"arg0_1": dim}, (2, 4))
    assert difference(module, right.module, [each[:1] for each in inputs]) == 0
