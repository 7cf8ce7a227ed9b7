"""The published architectures of the zoo: what configures each size, and what it is given."""

from __future__ import annotations

from typing import Any

from .zoo_parts import Case, Input, Pretrained

__all__ = ["DIFFUSERS", "TRANSFORMERS"]

#: Tokens with a meaning, within the small vocabularies; the published ones lie beyond them.
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

#: The rotary base of Mixtral 8x7B.
ROPE = {"rope_type": "default", "rope_theta": 1e6}


def _text(batch: int, length: int, vocabulary: int) -> tuple[Input, ...]:
    return (Input.tokens("input_ids", (batch, length), vocabulary),)


def _padded(batch: int, length: int, vocabulary: int) -> tuple[Input, ...]:
    return (*_text(batch, length, vocabulary), Input.mask("attention_mask", (batch, length)))


def _pair(batch: int, source: int, target: int, vocabulary: int) -> tuple[Input, ...]:
    decoder = Input.tokens("decoder_input_ids", (batch, target), vocabulary)
    return (*_padded(batch, source, vocabulary), decoder)


def _speech(batch: int, mels: int, frames: int, target: int, vocabulary: int) -> tuple[Input, ...]:
    decoder = Input.tokens("decoder_input_ids", (batch, target), vocabulary)
    return (Input.values("input_features", (batch, mels, frames)), decoder)


def _image(batch: int, side: int) -> tuple[Input, ...]:
    return (Input.values("pixel_values", (batch, 3, side, side)),)


def _latent(batch: int, side: int, words: int, width: int) -> tuple[Input, ...]:
    return (
        Input.values("sample", (batch, 4, side, side)),
        Input.tokens("timestep", (batch,), 1000),
        Input.values("encoder_hidden_states", (batch, words, width)),
    )


def _words(vocabulary: int) -> dict[str, int]:
    """A small vocabulary, with the tokens that begin and end a text in it."""
    return {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2}


def _llama(width: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
    }


def _encoder(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _whisper(
    width: int, layers: int, heads: int, mels: int, frames: int, target: int, vocabulary: int
) -> dict[str, Any]:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * width))
    }
    return {
        **sides,
        "d_model": width,
        "num_mel_bins": mels,
        "max_source_positions": frames // 2,
        "max_target_positions": target,
        "vocab_size": vocabulary,
    }


def _mixtral(name: str, experts: str, batch: int, length: int, note: str) -> Pretrained:
    """The published widths with 4 of 32 layers as ``full``; ``experts`` is transformers' experts_implementation."""
    widest = {**_llama(4096, 14336, 4, 32, 8, 32000), "max_position_embeddings": 32768, "rope_parameters": ROPE}
    return Pretrained(
        name,
        "transformer",
        "MixtralConfig",
        "MixtralForCausalLM",
        ("logits",),
        {
            "tiny": Case(_text(2, 8, 128), {**_llama(32, 64, 2, 4, 2, 128), "num_local_experts": 4}),
            "small": Case(_text(2, 32, 1024), _llama(256, 512, 4, 8, 4, 1024)),
            "full": Case(_text(batch, length, 32000), widest),
        },
        {"use_cache": False, "experts_implementation": experts},
        kinks=True,
        note=note,
    )


TRANSFORMERS: tuple[Pretrained, ...] = (
    Pretrained(
        "gpt2",
        "transformer",
        "GPT2Config",
        "GPT2LMHeadModel",
        ("logits",),
        {
            "tiny": Case(_text(2, 16, 128), {"n_embd": 64, "n_layer": 2, "n_head": 4, **_words(128)}),
            "small": Case(_text(2, 128, 4096), {"n_embd": 256, "n_layer": 6, "n_head": 8, **_words(4096)}),
            "full": Case(_text(8, 1024, 50257)),
        },
        {"use_cache": False},
        note="full is GPT-2, 124 M parameters",
    ),
    Pretrained(
        "llama",
        "transformer",
        "LlamaConfig",
        "LlamaForCausalLM",
        ("logits",),
        {
            "tiny": Case(_text(2, 16, 128), _llama(64, 128, 2, 4, 2, 128)),
            "small": Case(_text(2, 128, 4096), _llama(256, 688, 6, 8, 4, 4096)),
            "full": Case(
                _text(1, 2048, 128256),
                {**_llama(2048, 8192, 16, 32, 8, 128256), "head_dim": 64, "tie_word_embeddings": True},
            ),
        },
        {"use_cache": False},
        note="full has the shape of Llama 3.2 1B (plain rotary frequencies), 1.2 G parameters",
    ),
    _mixtral("mixtral", "batched_mm", 2, 4, "gathers the experts' weights once a token and choice: for few tokens"),
    _mixtral("mixtral_grouped", "grouped_mm", 1, 2048, "sorts tokens by expert; transformers' default"),
    Pretrained(
        "bert",
        "transformer",
        "BertConfig",
        "BertForMaskedLM",
        ("logits",),
        {
            "tiny": Case(_padded(2, 16, 128), {**_encoder(64, 2, 4), "vocab_size": 128}),
            "small": Case(_padded(2, 128, 4096), {**_encoder(256, 6, 8), "vocab_size": 4096}),
            "full": Case(_padded(16, 512, 30522)),
        },
        note="full is BERT base, 110 M parameters; one row is padded",
    ),
    Pretrained(
        "t5",
        "transformer",
        "T5Config",
        "T5ForConditionalGeneration",
        ("logits", "encoder_last_hidden_state"),
        {
            "tiny": Case(
                _pair(2, 16, 8, 128),
                {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128},
            ),
            "small": Case(
                _pair(2, 128, 64, 4096),
                {"d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 4, "num_heads": 8, "vocab_size": 4096},
            ),
            "full": Case(_pair(8, 512, 128, 32128), {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}),
        },
        {"use_cache": False},
        kinks=True,
        note="full is T5 base, 220 M parameters; two outputs; one row is padded",
    ),
    Pretrained(
        "vit",
        "transformer",
        "ViTConfig",
        "ViTForImageClassification",
        ("logits",),
        {
            "tiny": Case(_image(2, 32), {**_encoder(64, 2, 4), "image_size": 32, "patch_size": 8, "num_labels": 10}),
            "small": Case(_image(2, 224), {**_encoder(192, 6, 3), "num_labels": 1000}),
            "full": Case(_image(64, 224), {"num_labels": 1000}),
        },
        note="full is ViT B/16, 86 M parameters",
    ),
    Pretrained(
        "swin",
        "transformer",
        "SwinConfig",
        "SwinForImageClassification",
        ("logits",),
        {
            "tiny": Case(
                _image(2, 32),
                {"image_size": 32, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
                | {"num_labels": 10},
            ),
            "small": Case(_image(2, 224), {"depths": [2, 2, 2, 2], "num_labels": 1000}),
            "full": Case(_image(64, 224), {"num_labels": 1000}),
        },
        note="full is Swin T, 28 M parameters; windows are shifted by rolling",
    ),
    Pretrained(
        "resnet50",
        "cnn",
        "ResNetConfig",
        "ResNetForImageClassification",
        ("logits",),
        {
            "tiny": Case(
                _image(2, 64),
                {"embedding_size": 8, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1], "num_labels": 10},
            ),
            "small": Case(_image(2, 224), {"num_labels": 1000}),
            "full": Case(_image(64, 224), {"num_labels": 1000}),
        },
        kinks=True,
        note="small and full are ResNet-50, 26 M parameters; batch normalisation mutates its buffers in training",
    ),
    Pretrained(
        "convnext",
        "cnn",
        "ConvNextConfig",
        "ConvNextForImageClassification",
        ("logits",),
        {
            "tiny": Case(_image(2, 64), {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "num_labels": 10}),
            "small": Case(_image(2, 224), {"num_labels": 1000}),
            "full": Case(_image(64, 224), {"num_labels": 1000}),
        },
        note="small and full are ConvNeXt T, 29 M parameters",
    ),
    Pretrained(
        "mobilenet_v2",
        "cnn",
        "MobileNetV2Config",
        "MobileNetV2ForImageClassification",
        ("logits",),
        {
            "tiny": Case(_image(4, 128), {"depth_multiplier": 0.25, "image_size": 128, "num_labels": 10}),
            "small": Case(_image(2, 224), {"num_labels": 1000}),
            "full": Case(_image(128, 224), {"num_labels": 1000}),
        },
        kinks=True,
        note="small and full are MobileNetV2 1.0, 3.5 M parameters; all layers in every size",
    ),
    Pretrained(
        "whisper",
        "transformer",
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        ("logits", "encoder_last_hidden_state"),
        {
            "tiny": Case(_speech(2, 8, 32, 8, 128), {**_whisper(32, 2, 4, 8, 32, 16, 128), **SPECIAL}),
            "small": Case(_speech(1, 80, 1000, 64, 4096), {**_whisper(256, 4, 4, 80, 1000, 64, 4096), **SPECIAL}),
            "full": Case(_speech(8, 80, 3000, 448, 51865), _whisper(768, 12, 12, 80, 3000, 448, 51865)),
        },
        {"use_cache": False},
        note="full is Whisper small, 244 M parameters; two outputs",
    ),
)

DIFFUSERS: tuple[Pretrained, ...] = (
    Pretrained(
        "unet",
        "cnn",
        "",
        "UNet2DConditionModel",
        ("sample",),
        {
            "tiny": Case(
                _latent(2, 8, 5, 16),
                {
                    "sample_size": 8,
                    "block_out_channels": (16, 32),
                    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                    "layers_per_block": 1,
                    "norm_num_groups": 8,
                    "attention_head_dim": 2,
                    "cross_attention_dim": 16,
                },
            ),
            "small": Case(
                _latent(1, 16, 16, 128),
                {
                    "sample_size": 16,
                    "block_out_channels": (64, 128, 256, 256),
                    "attention_head_dim": 4,
                    "cross_attention_dim": 128,
                },
            ),
            "full": Case(_latent(2, 64, 77, 768), {"sample_size": 64, "cross_attention_dim": 768}),
        },
        package="diffusers",
        regression=True,
        note="full is the denoiser of Stable Diffusion 1.5, 860 M parameters; Inductor of torch 2.13 loses gradients "
        "of tiny on a CPU: a read is ordered before the scatter that it needs, as in pytorch issue 185509",
    ),
)
