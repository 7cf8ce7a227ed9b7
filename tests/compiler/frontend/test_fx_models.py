"""Real architectures with random weights: the imported graph, planned and executed in a scratchpad, equals eager.

Configurations are tiny; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from opweave.compiler.frontend.fx import from_module
from tests.compiler.frontend.eager_check import assert_same, execute_in_scratchpad, interpret

Model = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tokens(length: int) -> torch.Tensor:
    return torch.randint(3, 64, (1, length))


def image(size: int) -> torch.Tensor:
    return torch.randn(1, 3, size, size)


def gpt2() -> Model:
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32, **SPECIAL)
    return transformers.GPT2LMHeadModel(config), (tokens(8),), {"use_cache": False}


def bert() -> Model:
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    return transformers.BertModel(transformers.BertConfig(**TEXT)), (tokens(8),), {"attention_mask": mask}


def llama() -> Model:
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, **SPECIAL)
    return transformers.LlamaForCausalLM(config), (tokens(8),), {"use_cache": False}


def mixtral() -> Model:
    """Experts as one batched product: routing in fixed shapes, without an operator that only transformers has."""
    config = transformers.MixtralConfig(
        **TEXT, num_key_value_heads=2, num_local_experts=4, experts_implementation="batched_mm", **SPECIAL
    )
    return transformers.MixtralForCausalLM(config), (tokens(8),), {"use_cache": False}


def t5() -> Model:
    config = transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=64)
    inputs = {"input_ids": tokens(8), "decoder_input_ids": tokens(4), "use_cache": False}
    return transformers.T5ForConditionalGeneration(config), (), inputs


def vit() -> Model:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config), (image(32),), {}


def swin() -> Model:
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    return transformers.SwinForImageClassification(config), (image(32),), {}


def resnet() -> Model:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck")
    return transformers.ResNetForImageClassification(config), (image(32),), {}


def convnext() -> Model:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    return transformers.ConvNextForImageClassification(config), (image(32),), {}


def mobilenet() -> Model:
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.25)
    return transformers.MobileNetV2ForImageClassification(config), (image(32),), {}


def whisper() -> Model:
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=64,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        decoder_start_token_id=1,
        **SPECIAL,
    )
    inputs = {"decoder_input_ids": tokens(4), "use_cache": False}
    return transformers.WhisperForConditionalGeneration(config), (torch.randn(1, 8, 32),), inputs


class UNet(nn.Module):
    """Two levels with skip connections, normalised in groups, upsampled by a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = self.block(3, 8)
        self.bottom = self.block(8, 16)
        self.rise = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.leave = self.block(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    @staticmethod
    def block(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(2, after), nn.SiLU(inplace=True))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        skip = self.enter(x)
        deep = self.rise(self.bottom(nn.functional.max_pool2d(skip, 2)))
        merged = self.leave(torch.cat([skip, deep], dim=1))
        return {"logits": self.head(merged), "deep": deep}


def unet() -> Model:
    return UNet(), (image(16),), {}


MODELS = [gpt2, bert, llama, mixtral, t5, vit, swin, resnet, convnext, mobilenet, whisper, unet]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_planned_models_compute_what_eager_computes(make: Callable[[], Model]) -> None:
    torch.manual_seed(0)
    module, args, kwargs = make()
    module.eval()
    imported = from_module(module, args, kwargs)
    with torch.no_grad():
        expected = module(*args, **kwargs)
    assert_same(interpret(imported, args, kwargs)[0], expected)
    assert_same(execute_in_scratchpad(imported, args, kwargs)[0], expected)


def test_tied_weights_of_a_language_model_are_one_buffer() -> None:
    module, args, kwargs = gpt2()
    imported = from_module(module.eval(), args, kwargs)
    shapes = [imported.graph.buffers[name].shape for name in imported.weights]
    assert shapes.count((64, 32)) == 1
