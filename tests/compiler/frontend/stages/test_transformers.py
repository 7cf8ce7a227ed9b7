"""Language models of transformers, cut at every legal place: the same results bit for bit, and the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opweave.compiler.frontend.stages.capture import captured_program
from opweave.compiler.frontend.stages.cuts import legal_cuts, ties
from opweave.compiler.frontend.stages.split import split
from tests.compiler.frontend.stages.models import backward, copied, run

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64, "use_cache": False}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"intermediate_size": 64, "num_key_value_heads": 2},
    "Qwen3": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "GPT2": {"n_positions": 32, "bos_token_id": 1, "eos_token_id": 2},
    "GPTNeoX": {"intermediate_size": 64},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_language_models_are_cut_between_and_within_blocks(name: str) -> None:
    """Cuts that one tensor passes: around attention and perceptron of each block. GPT-2 draws random numbers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, kind)(config).double().train()
    whole, tokens = copied(model), torch.randint(0, 64, (2, 8))
    program = captured_program(model, (tokens,))
    cuts = legal_cuts(program)
    assert len(cuts) >= 3
    if name in ("GPT2", "Qwen3"):
        assert len(ties(program)) == 1
    stages = split(program, cuts, ranks=[0] * (len(cuts) + 1))
    torch.manual_seed(1)
    expected = whole(tokens)
    torch.manual_seed(1)
    found = run(stages, (tokens,))
    assert type(found) is type(expected)
    assert torch.equal(found.logits, expected.logits)
    backward(expected.logits)
    backward(found.logits)
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-12, atol=1e-12)
