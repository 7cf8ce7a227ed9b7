"""Models cut by what their layers cost on a machine: times from the cost model, bytes of weights, sends, and stages."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from opweave import hardware
from opweave.compiler.frontend.stages.capture import captured_program
from opweave.compiler.frontend.stages.cuts import legal_cuts
from opweave.compiler.pipeline import Budget
from opweave.errors import MachineError, OptionError
from opweave.hw_models.matmul import matmul_seconds
from opweave.passes.pipeline_parallel.partition_costs import layer_costs, partition_model
from tests.compiler.frontend.stages.models import Language, Skipping, run

MACHINE = hardware("h100-sxm")


def chain(*wide: int) -> torch.nn.Module:
    return torch.nn.Sequential(*(torch.nn.Linear(a, b, bias=False) for a, b in pairwise(wide)))


def test_costs_of_a_chain_of_products() -> None:
    """F, I and W of a linear are one product each, timed by tiles; the first has no I; bytes and sends by hand."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        program = captured_program(chain(512, 1024, 256), (torch.zeros(2048, 512),))
    first, second = layer_costs(program, legal_cuts(program), MACHINE)
    assert first.forward_ns == round(1e9 * matmul_seconds(2048, 1024, 512, "float32", MACHINE))
    assert first.input_gradient_ns == 0
    assert first.weight_gradient_ns == round(1e9 * matmul_seconds(1024, 512, 2048, "float32", MACHINE))
    assert second.input_gradient_ns == round(1e9 * matmul_seconds(2048, 1024, 256, "float32", MACHINE))
    assert first.parameter_bytes == 512 * 1024 * (4 + 4 + 8)
    assert second.until_weight_gradient_bytes == first.forward_bytes == first.backward_bytes == 2048 * 1024 * 4
    assert second.between_gradients_bytes == 2048 * 256 * 4
    link = MACHINE.links[0]
    assert first.forward_send_ns == round(1e9 * (link.latency_s + 2048 * 1024 * 4 / link.bandwidth_bytes_per_s))
    assert (second.forward_bytes, second.forward_send_ns) == (0, 0)
    (lean, _) = layer_costs(program, legal_cuts(program), MACHINE, optimizer_bytes=0)
    assert lean.parameter_bytes == 512 * 1024 * 8


def test_a_model_is_cut_and_its_stages_run() -> None:
    """From the model to modules that compute it; the first stage's backward is all W, as there is no input gradient."""
    torch.manual_seed(0)
    model, tokens = Language(3).double(), torch.arange(12).reshape(2, 6)
    found = partition_model(model, (tokens,), 2, 4, MACHINE, Budget.of_seconds(60.0, deterministic=True))
    assert len(found.partition.cuts) == 1
    assert found.partition.problem.stages[0].input_gradient_ns == 0
    assert found.partition.problem.stages[1].input_gradient_ns > 0
    assert torch.equal(run(found.stages(), (tokens,))["logits"], model(tokens)["logits"])


def test_as_many_tensors_pass_as_are_needed() -> None:
    """A U has few cuts that one tensor passes: more are let pass until there are cuts enough, or refused."""
    model, images = Skipping(3), (torch.zeros(1, 3, 8, 8),)
    budget = Budget.of_seconds(60.0, deterministic=True)
    found = partition_model(model, images, 5, 4, MACHINE, budget)
    assert max(len(names) for names in found.stages().passes) > 1
    with pytest.raises(OptionError, match=r"has 3 legal cuts; 5 stages need 4"):
        partition_model(model, images, 5, 4, MACHINE, budget, max_tensors=1)
    with pytest.raises(OptionError, match=r"has 7 legal cuts"):
        partition_model(model, images, 9, 4, MACHINE, budget)


def test_tied_weights_stay_on_one_rank() -> None:
    """Embedding and head are one weight: refused in a row, both ends of a V otherwise."""
    tokens = torch.arange(12).reshape(2, 6)
    budget = Budget.of_seconds(60.0, deterministic=True)
    with pytest.raises(OptionError, match=r"share 'embedding\.weight'"):
        partition_model(Language(2, tied=True), (tokens,), 2, 4, MACHINE, budget)
    found = partition_model(Language(2, tied=True), (tokens,), 2, 4, MACHINE, budget, chunks=2, placement="v")
    assert len(found.stages().modules) == 4


def test_links_are_the_machines() -> None:
    """A link that the machine does not have, or a machine without any, is refused by name."""
    program = captured_program(chain(8, 8, 8), (torch.zeros(4, 8),))
    with pytest.raises(MachineError, match="no link 'rope'"):
        layer_costs(program, legal_cuts(program), MACHINE, link="rope")
    with pytest.raises(MachineError, match="has no links"):
        layer_costs(program, legal_cuts(program), msgspec.structs.replace(MACHINE, links=()))
