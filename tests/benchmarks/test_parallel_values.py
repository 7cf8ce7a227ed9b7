"""All ranks of a parallel model together compute what one rank computes alone, forward and backward.

Ranks are virtual: ``LocalTensorMode`` runs one captured graph on all of them in one process, collectives included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from benchmarks.parallel_models import TINY, TINY_MOE, DenseTensorParallel, ExpertParallelMoE
from torch import nn

from opweave.compiler.frontend.ranks import captured, fake_ranks

local_tensors = pytest.importorskip("torch.distributed._local_tensor", reason="this torch has no virtual ranks")

RANKS = 2
DENSE, EXPERTS = TINY.with_layers(1), TINY_MOE.with_layers(1)


def run(
    build: Callable[[], nn.Module], inputs: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Result and gradients of each rank, for the input and the gradient of the result of each."""
    modules = []
    for rank in range(len(inputs)):
        with fake_ranks(len(inputs), rank):
            modules.append(build())
    with fake_ranks(len(inputs), 0):
        found = captured(modules[0], (inputs[0],), training=True)
        assert found.joint is not None
        assert found.gradients is not None

        def spread(values: Sequence[torch.Tensor]) -> Any:
            return local_tensors.LocalTensor(dict(enumerate(values)))

        arguments = []
        for node in found.joint.graph.find_nodes(op="placeholder"):
            name = found.parameters.get(node.name)
            given = inputs if node.name in found.inputs else tangents
            arguments.append(spread([m.get_parameter(name).detach() for m in modules] if name else given))
        with local_tensors.LocalTensorMode(len(inputs)), torch.no_grad():
            results = found.joint(*arguments)
    locals_of = [{} if value is None else value._local_tensors for value in results]
    gradients = [{n: locals_of[p][rank] for n, p in found.gradients.items()} for rank in range(len(inputs))]
    return [locals_of[0][rank] for rank in range(len(inputs))], gradients


def part(whole: torch.Tensor, name: str, rank: int, kept: Sequence[int]) -> torch.Tensor:
    """What ``rank`` has of a whole weight of the dense model."""
    pieces = {"qkv": kept, "gate_up": [whole.shape[0] // 2] * 2}.get(name.rpartition(".")[2])
    if pieces is not None:
        return torch.cat([piece.chunk(RANKS, 0)[rank] for piece in torch.split(whole, list(pieces), 0)])
    return whole.chunk(RANKS, 1)[rank] if name.endswith((".out", ".down")) else whole


@pytest.mark.parametrize("sequence_parallel", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dense(sequence_parallel: bool) -> None:
    """The ranks' results and gradients are parts of the whole; a rank's weight that is 1 % off shows."""

    def build() -> nn.Module:
        return DenseTensorParallel(DENSE, sequence_parallel=sequence_parallel, dtype=torch.float32)

    generator = torch.Generator().manual_seed(1)
    x, tangent = (torch.randn(8, 2, DENSE.hidden, generator=generator) for _ in range(2))
    (expected,), (gradient,) = run(build, [x], [tangent])
    if sequence_parallel:
        results, gradients = run(build, x.chunk(RANKS), tangent.chunk(RANKS))
        results = [torch.cat(results)]
    else:
        results, gradients = run(build, [x] * RANKS, [tangent] * RANKS)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    for rank, own in enumerate(gradients):
        assert len(own) == 6 * DENSE.layers
        for name, value in own.items():
            wanted = part(gradient[name], name, rank, [DENSE.hidden] * 3)
            torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-3, msg=f"gradient of {name} on rank {rank}")

    def wrong() -> nn.Module:
        module = build()
        if torch.distributed.get_rank() == 1:
            with torch.no_grad():
                module.get_parameter("layers.0.down").mul_(1.01)
        return module

    inputs, tangents = (x.chunk(RANKS), tangent.chunk(RANKS)) if sequence_parallel else ([x] * RANKS, [tangent] * RANKS)
    off = run(wrong, inputs, tangents)[0]
    assert (torch.cat(off) if sequence_parallel else off[0]).sub(expected).abs().max() > 1e-3


def test_experts() -> None:
    """Each rank's own sequences come out as if one rank held all experts; gradients are those of all sequences."""

    def build() -> nn.Module:
        return ExpertParallelMoE(EXPERTS, dtype=torch.float32)

    generator = torch.Generator().manual_seed(2)
    x, tangent = (torch.randn(2 * RANKS, 8, EXPERTS.hidden, generator=generator) for _ in range(2))
    (expected,), (gradient,) = run(build, [x], [tangent])
    results, gradients = run(build, x.chunk(RANKS), tangent.chunk(RANKS))
    torch.testing.assert_close(torch.cat(results), expected, rtol=1e-4, atol=1e-4)
    for rank, own in enumerate(gradients):
        assert len(own) == 7 * EXPERTS.layers
        for name, value in own.items():
            is_cut = name.endswith((".gate_up", ".down"))
            wanted = gradient[name].chunk(RANKS)[rank] if is_cut else gradient[name]
            torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-3, msg=f"gradient of {name} on rank {rank}")


def test_experts_one_token_after_the_other() -> None:
    """Each expert takes the first tokens of a sequence that choose it, up to its capacity; the others pass by."""
    with fake_ranks(1):
        model = ExpertParallelMoE(EXPERTS, attention=False, dtype=torch.float32)
        found = captured(model, (torch.zeros(2, 8, EXPERTS.hidden),))
    x = torch.randn(2, 8, EXPERTS.hidden, generator=torch.Generator().manual_seed(3))
    layer: Any = model.layers[0]
    rows = torch.nn.functional.rms_norm(x, (EXPERTS.hidden,), layer["mlp_norm"], 1e-5)
    weights, choices = torch.nn.functional.linear(rows, layer["router"]).softmax(-1).topk(EXPERTS.experts_per_token, -1)
    expected, passed = x.clone(), 0
    for batch in range(2):
        taken = [0] * EXPERTS.experts
        for token, pick in ((t, p) for t in range(8) for p in range(EXPERTS.experts_per_token)):
            expert = int(choices[batch, token, pick])
            taken[expert] += 1
            if taken[expert] > model.capacity(8):
                passed += 1
                continue
            gate, up = (rows[batch, token] @ layer["gate_up"][expert]).chunk(2)
            done = (torch.nn.functional.silu(gate) * up) @ layer["down"][expert]
            expected[batch, token] += weights[batch, token, pick] * done
    assert passed > 0  # or the test says little
    values = {name: model.get_parameter(parameter).detach() for name, parameter in found.parameters.items()}
    with fake_ranks(1), local_tensors.LocalTensorMode(1), torch.no_grad():
        given = [values.get(n.name, x) for n in found.forward.graph.find_nodes(op="placeholder")]
        (result,) = found.forward(*(local_tensors.LocalTensor({0: value}) for value in given))
    torch.testing.assert_close(result._local_tensors[0], expected.detach(), rtol=1e-4, atol=1e-4)
