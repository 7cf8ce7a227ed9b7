"""Models cut at every legal place compute what they compute whole: results, gradients, buffers, names of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from opweave.compiler.frontend.stages.capture import captured_program
from opweave.compiler.frontend.stages.cuts import legal_cuts
from opweave.compiler.frontend.stages.split import split, split_model
from opweave.errors import ModelError, OptionError
from tests.compiler.frontend.stages.models import VOCABULARY, Language, Skipping, Updating, backward, copied, run


def tokens() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6) * 5 % VOCABULARY


def image() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 16, dtype=torch.float64).reshape(2, 3, 4, 4)


def chain() -> torch.nn.Module:
    return torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))


def is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether both are there and equal but for the order of a sum."""
    return one is not None and other is not None and torch.allclose(one, other, rtol=1e-12, atol=1e-12)


CASES: dict[str, tuple[Any, Any, int, int]] = {
    "chain": (chain, (torch.ones(4, 8, dtype=torch.float64),), 1, 3),
    "language": (Language, (tokens(),), 1, 5),
    "masked": (Language, (tokens(), tokens() > 3), 2, 5),
    "skipping": (Skipping, (image(),), 4, 7),
    "updating": (Updating, (image(),), 1, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_stages_compute_what_the_model_does(name: str) -> None:
    """At all cuts at once: results bit for bit, gradients, updated buffers, and names in ``state_dict``."""
    make, args, tensors, least = CASES[name]
    torch.manual_seed(0)
    model = make().double()
    whole = copied(model)
    program = captured_program(model, args)
    cuts = legal_cuts(program, tensors)
    assert len(cuts) >= least
    stages = split(program, cuts)
    torch.manual_seed(1)
    expected = whole(*args)
    torch.manual_seed(1)
    found = run(stages, args)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(one, other)
    backward(expected)
    backward(found)
    for (path, one), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert is_same(one.grad, other.grad), path
    for one, other in zip(model.buffers(), whole.buffers(), strict=True):
        assert torch.equal(one, other)
    names = [path for module in stages.modules for path in module.state_dict()]
    assert sorted(names) == sorted(model.state_dict())
    own = {id(parameter) for parameter in model.parameters()}
    assert own == {id(parameter) for module in stages.modules for parameter in module.parameters()}


def test_skipped_tensors_pass_through_every_stage() -> None:
    """A stage in the middle of a U hands on what it does not use, and gradients come back through it."""
    model = Skipping(3).double()
    with pytest.raises(ModelError, match="is not called"):
        split_model(model, (image(),), ["nothing"])
    stages = split_model(model, (image(),), ["down.1", "down.2", "up.0", "up.1"])
    assert [len(names) for names in stages.passes] == [2, 3, 3, 2]
    assert all(stages.passes[0][0] in names for names in stages.passes)
    given = image().requires_grad_()
    backward(run(stages, (given,)))
    assert given.grad is not None
    assert given.grad.abs().sum() > 0


def test_one_tensor_passes_between_blocks_with_a_common_mask() -> None:
    """What depends on no parameter is computed again by each stage instead of being sent: here the causal mask."""
    stages = split_model(Language(), (tokens(),), ["blocks.1", "head"])
    assert [len(names) for names in stages.passes] == [1, 1]


def test_tied_weights_are_refused_unless_on_one_rank() -> None:
    """Two stages that share a weight would each have half of its gradient; on one rank it is one tensor."""
    model = Language(tied=True).double()
    whole = copied(model)
    with pytest.raises(ModelError, match=r"embedding\.weight") as refused:
        split_model(model, (tokens(),), ["blocks.1", "head"])
    assert "head.weight is the same" in refused.value.message
    assert "untie" in refused.value.hint
    with pytest.raises(ModelError):
        split_model(model, (tokens(),), ["blocks.1", "head"], ranks=[0, 0, 1])
    stages = split_model(model, (tokens(),), ["blocks.1", "head"], ranks=[0, 1, 0])
    backward(whole(tokens()))
    backward(run(stages, (tokens(),)))
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert is_same(one.grad, other.grad)
    split_model(model, (tokens(),), [])


def test_calls_and_cuts_that_do_not_fit_are_refused() -> None:
    """Errors name what was expected: another structure of the call, cuts out of order, ranks of too many stages."""
    program = captured_program(Language(1), (tokens(),))
    cuts = legal_cuts(program)
    with pytest.raises(ModelError, match="was captured with"):
        program.flatten((tokens(), tokens()))
    with pytest.raises(OptionError, match="in program order"):
        split(program, [cuts[1], cuts[0]])
    with pytest.raises(OptionError, match="2 ranks"):
        split(program, [], ranks=[0, 1])
    with pytest.raises(ModelError, match="cannot trace"):
        captured_program(Language(1), (torch.zeros(2, 6),))
    with pytest.raises(ModelError, match="where the model begins"):
        split_model(Language(1), (tokens(),), ["embedding"])
