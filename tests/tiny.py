"""Tiny models for the tests: ours, and those of transformers that they are compared with."""

from __future__ import annotations

from pathlib import Path

import torch

from model import GPT, ModelConfig, RopeScaling
from nanoqwen.tokenizer import load_tokenizer
from nanoqwen.weights import export

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
YARN = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=16)
GPT2 = {"norm": "layernorm", "mlp": "gelu", "positions": "learned", "bias": True, "num_key_value_heads": 4}

# Every switch of the architecture that changes what a forward computes.
ARCHITECTURES: dict[str, dict] = {
    "qwen2": {},
    "qwen2-untied": {"tie_word_embeddings": False},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "wide-heads": {"head_dim": 16},
    "qwen3": {"qkv_bias": False, "qk_norm": True, "head_dim": 16},
    "llama": {"qkv_bias": False},
    "llama3": {"qkv_bias": False, "rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "linear": {"rope_scaling": RopeScaling("linear", factor=2.0)},
    "dynamic": {"rope_scaling": RopeScaling("dynamic", factor=2.0)},
    "gpt2": GPT2,
    "j-branch": {"j_branch": True},
}


def config(name: str = "qwen2", **overrides) -> ModelConfig:
    return ModelConfig(**{**SHAPE, **ARCHITECTURES[name], **overrides})


def base_over_bytes(path: Path, *, seed: int, **shape: int) -> Path:
    """Weights that no run wrote, with a tokenizer of their own, as a Hugging Face folder."""
    torch.manual_seed(seed)
    export(
        GPT(ModelConfig(vocab_size=259, num_attention_heads=4, num_key_value_heads=2, **shape)),
        load_tokenizer("bytes"),
        path,
    )
    return path


def model(name: str = "qwen2", *, seed: int = 0, lively: bool = True, **overrides) -> GPT:
    """A model in eval mode. `lively` weights are ten times the initial ones, so that logits differ visibly."""
    torch.manual_seed(seed)
    gpt = GPT(config(name, **overrides)).eval()
    if lively:
        with torch.no_grad():
            for parameter in gpt.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(10)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return gpt
