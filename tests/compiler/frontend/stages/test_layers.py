"""Layers between cuts: what each holds and shares, and that what they hold adds up to what a stage of them holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from opweave.compiler.frontend.stages.capture import Program, captured_program
from opweave.compiler.frontend.stages.cuts import Cut, legal_cuts
from opweave.compiler.frontend.stages.layers import Layer, layers
from tests.compiler.frontend.stages.models import VOCABULARY, WIDE, Language, Skipping

TOKENS, BATCH = 6, 2
ONE = BATCH * TOKENS * WIDE * 4  # bytes of what passes between blocks


def language(blocks: int, tied: bool = False) -> tuple[Program, tuple[Cut, ...]]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens = torch.zeros(BATCH, TOKENS, dtype=torch.long)
        program = captured_program(Language(blocks, tied=tied), (tokens,))
    return program, legal_cuts(program)


def held(found: Sequence[Layer]) -> tuple[int, int, int]:
    return (
        sum(layer.until_input_gradient_bytes for layer in found),
        sum(layer.until_weight_gradient_bytes for layer in found),
        sum(layer.between_gradients_bytes for layer in found),
    )


def test_layers_are_named_after_modules_and_alike_ones_traced_once() -> None:
    """Two layers a block, as the blocks have no submodules for attention; the later blocks share their graphs."""
    program, cuts = language(3)
    found = layers(program, cuts)
    assert [layer.name for layer in found] == [
        "embedding",
        *(f"blocks.{block} ({half})" for block in range(3) for half in (1, 2)),
        "head",
    ]
    assert len({id(layer.graphs) for layer in found}) == 4
    assert found[1].graphs is found[3].graphs is found[5].graphs
    assert found[0].graphs.input_gradient is None  # tokens have no gradient


def test_bytes_of_layers_add_up_to_those_of_their_stage() -> None:
    """A stage of several layers, traced as one, holds what its layers do; the first has no input gradient."""
    program, cuts = language(1)
    fine = layers(program, cuts)
    whole = layers(program, [cuts[0], cuts[2]])
    assert held(whole[1:2]) == held(fine[1:3])
    first = layers(program, [cuts[2]])[0]
    before = held(fine[:3])
    assert held([first])[:2] == (0, before[0] + before[1])
    assert held([first])[2] == ONE


def test_what_passes_a_cut_is_counted_by_one_layer() -> None:
    """A result that its layer holds for itself, and the next one too, is held once: here that of tanh."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        chain = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh())
        program = captured_program(chain, (torch.zeros(4, 8),))
    found = layers(program, legal_cuts(program))
    assert len(found) == 2
    one = 4 * 8 * 4
    assert held(found[:1]) == (0, one, one)  # its input; the gradient of its product
    assert sum(held(found[1:])) == one + one + one  # tanh before, tanh behind, and a gradient


def test_parameters_are_owned_once_and_shared_ones_named() -> None:
    """A tied weight is the embedding's, and both name it; every parameter is some layer's."""
    program, cuts = language(2, tied=True)
    found = layers(program, cuts)
    names = [name for layer in found for name in layer.parameters]
    assert len(names) == len(set(names)) == len(list(Language(2, tied=True).parameters()))
    assert found[0].shared == found[-1].shared == ("embedding.weight",)
    assert [layer.shared for layer in found[1:-1]] == [()] * 4
    assert found[0].parameters["embedding.weight"].shape == (VOCABULARY, WIDE)
    assert not found[-1].parameters


def test_layers_that_pass_several_tensors() -> None:
    """In a U each layer is given what passes its cut, what it only hands on included, and holds nothing of that."""
    program = captured_program(Skipping(3), (torch.zeros(1, 3, 8, 8),))
    cuts = legal_cuts(program, 4)
    assert max(len(cut.tensors) for cut in cuts) == 3
    found = layers(program, cuts)
    assert all(layer.graphs.weight_gradient is not None for layer in found)
    assert len({id(layer.graphs) for layer in found}) == len(found)
