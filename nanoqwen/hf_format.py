"""Hugging Face's formats: config.json and the names of tensors, converted to ours and back.

No file is read or written here: weights.py does that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from model import GPT, ModelConfig, RopeScaling
from nanoqwen.errors import CheckpointError
from nanoqwen.routing import RoutingConfig

OWN_TYPE = "nanoqwen"  # model_type of shapes that transformers has no class for, and of models with routers


# --- config.json ------------------------------------------------------------------------------------------------------

# Fields with the same name and meaning in the config.json of Qwen2, Qwen3 and Llama.
_SHARED_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings rms_norm_eps tie_word_embeddings"
).split()
_GPT2_FIELDS = {  # their name: ours
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
_ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# Defaults of transformers for keys that a config.json may leave out, by model type; only for our fields.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "qwen3": {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "head_dim": 128},
    "llama": {"max_position_embeddings": 2_048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
}


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """A ModelConfig from the contents of a config.json; an error for a model that we would compute differently."""
    kind = hf.get("model_type")
    try:
        if kind == OWN_TYPE:
            return _own_config(hf)
        if kind == "gpt2":
            return _config_from_gpt2(hf)
        if kind in _HF_DEFAULTS:
            return _config_from_llama_family(kind, {**_HF_DEFAULTS[kind], **hf})
    except KeyError as error:
        raise CheckpointError(f"config.json: missing key {error.args[0]!r}") from None
    except (OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: {error}") from None
    known = ", ".join([*_ARCHITECTURES, OWN_TYPE])
    raise CheckpointError(f"config.json: model_type: expected one of {known}, got {kind!r}")


def _own_config(hf: dict[str, Any]) -> ModelConfig:
    values = {f.name: hf[f.name] for f in fields(ModelConfig)}
    if values["rope_scaling"]:
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    return ModelConfig(**values)


def routing_from_hf(hf: dict[str, Any]) -> RoutingConfig | None:
    """The routing in a config.json; None: the model is dense."""
    values = hf.get("routing")
    if values is None:
        return None
    expect(hf, model_type=OWN_TYPE)  # another program would compute all tokens in all layers: another model
    try:
        return RoutingConfig(**{**values, "layers": tuple(values["layers"])})
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: routing: {error}") from None


def model_type(model: GPT) -> str:
    return OWN_TYPE if model.routing else hf_model_type(model.cfg)


def expect(hf: dict[str, Any], **expected: Any) -> None:
    """Refuse settings that change the computation in a way we do not implement. Absent or null means the default."""
    for key, value in expected.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if hf.get(key) is not None and hf[key] not in allowed:
            raise CheckpointError(f"config.json: {key}: expected {' or '.join(map(repr, allowed))}, got {hf[key]!r}")


def _config_from_llama_family(kind: str, hf: dict[str, Any]) -> ModelConfig:
    expect(hf, hidden_act=("silu", "swish"), use_sliding_window=False, partial_rotary_factor=1.0)
    if set(hf.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        raise CheckpointError(f"config.json: layer_types: expected full_attention alone, got {hf['layer_types']}")
    biased = bool(hf.get("attention_bias")) if kind != "qwen2" else False
    if biased != bool(hf.get("mlp_bias")):
        raise CheckpointError("config.json: attention_bias and mlp_bias: expected both or neither")
    theta, scaling = _rope_from_hf(hf)
    head_dim = hf.get("head_dim")
    if head_dim and head_dim * hf["num_attention_heads"] == hf["hidden_size"]:
        head_dim = None  # redundant
    return ModelConfig(
        **{name: hf[name] for name in _SHARED_FIELDS if name != "num_key_value_heads"},
        num_key_value_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        bias=biased,
    )


def _rope_from_hf(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """transformers 5 keeps everything under rope_parameters; published files have rope_theta at the top level."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    expect(rope, partial_rotary_factor=1.0)
    theta = float(rope.pop("rope_theta", None) or hf.get("rope_theta") or 10_000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    if kind == "default":
        return theta, None
    names = {f.name for f in fields(RopeScaling)}
    return theta, RopeScaling(rope_type=kind, **{k: v for k, v in rope.items() if k in names and v is not None})


def _config_from_gpt2(hf: dict[str, Any]) -> ModelConfig:
    expect(
        hf,
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    values = {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, **hf}
    values["n_inner"] = hf.get("n_inner") or 4 * hf["n_embd"]
    return ModelConfig(
        **{ours: values[theirs] for theirs, ours in _GPT2_FIELDS.items()},
        num_key_value_heads=hf["n_head"],
        norm="layernorm",
        mlp="gelu",
        positions="learned",
        bias=True,
    )


def hf_model_type(cfg: ModelConfig) -> str:
    """The model type of transformers that computes exactly this shape; OWN_TYPE if there is none."""
    style = (cfg.norm, cfg.mlp, cfg.positions)
    if cfg.j_branch:
        return OWN_TYPE
    if style == ("layernorm", "gelu", "learned"):
        plain_heads = cfg.num_key_value_heads == cfg.num_attention_heads
        plain_heads = plain_heads and cfg.head_size * cfg.num_attention_heads == cfg.hidden_size
        return "gpt2" if cfg.bias and plain_heads and not cfg.qk_norm else OWN_TYPE
    if style != ("rmsnorm", "swiglu", "rope") or (cfg.qkv_bias and (cfg.bias or cfg.qk_norm)):
        return OWN_TYPE
    if cfg.qkv_bias:
        return "qwen2"
    if cfg.qk_norm:
        return "qwen3" if not cfg.bias else OWN_TYPE
    return "llama"


def config_to_hf(cfg: ModelConfig, dtype: torch.dtype, routing: RoutingConfig | None = None) -> dict[str, Any]:
    """The contents of a config.json."""
    kind = OWN_TYPE if routing else hf_model_type(cfg)
    name = str(dtype).removeprefix("torch.")
    if kind == OWN_TYPE:
        routed = {"routing": asdict(routing)} if routing else {}
        return {"model_type": kind, "torch_dtype": name, **asdict(cfg), **routed}
    common = {"architectures": [_ARCHITECTURES[kind]], "model_type": kind, "torch_dtype": name}
    if kind == "gpt2":
        names = {theirs: getattr(cfg, ours) for theirs, ours in _GPT2_FIELDS.items()}
        return common | names | {"activation_function": "gelu_new"}
    scaling = {k: v for k, v in asdict(cfg.rope_scaling).items() if v is not None} if cfg.rope_scaling else None
    hf = common | {name: getattr(cfg, name) for name in _SHARED_FIELDS}
    hf |= {"head_dim": cfg.head_size, "rope_theta": cfg.rope_theta, "rope_scaling": scaling, "hidden_act": "silu"}
    if kind == "llama":
        hf |= {"attention_bias": cfg.bias, "mlp_bias": cfg.bias}
    return hf


# --- parameter names --------------------------------------------------------------------------------------------------

# GPT-2 stores its matrices transposed, joins q, k and v, and has its own names; all others have Qwen2's names.
_GPT2_NAMES = {
    "wte": "model.embed_tokens",
    "wpe": "model.embed_positions",
    "ln_f": "model.norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_TO_GPT2_NAMES = {ours: theirs for theirs, ours in _GPT2_NAMES.items()}
_GPT2_TRANSPOSED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
# Masks and tables that old files store like weights.
_NOT_WEIGHTS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|h\.\d+\.attn\.(bias|masked_bias))$")


def from_hf(kind: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(our name, our tensor) for one tensor of a published file: one, or three for GPT-2's joined q, k, v."""
    if _NOT_WEIGHTS.search(name):
        return
    if kind != "gpt2" or name == "lm_head.weight":
        yield name, tensor
        return
    path, _, leaf = name.removeprefix("transformer.").rpartition(".")
    layer = re.match(r"h\.(\d+)\.", path)
    inner = path[layer.end() :] if layer else path
    prefix = f"model.layers.{layer[1]}." if layer else ""
    if inner in _GPT2_TRANSPOSED and leaf == "weight":
        tensor = tensor.t()
    if inner == "attn.c_attn":
        for letter, matrix in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{prefix}self_attn.{letter}_proj.{leaf}", matrix
    else:
        yield f"{prefix}{_GPT2_NAMES.get(inner, inner)}.{leaf}", tensor


def to_hf(kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the names of a published file; the inverse of `from_hf`."""
    if kind != "gpt2":
        return state
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        layer = re.match(r"model\.layers\.(\d+)\.", path)
        inner = path[layer.end() :] if layer else path
        prefix = f"transformer.h.{layer[1]}." if layer else "transformer."
        if inner in ("self_attn.k_proj", "self_attn.v_proj"):
            continue  # joined with q
        if inner == "self_attn.q_proj":
            theirs, tensor = "attn.c_attn", torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        else:
            theirs = _TO_GPT2_NAMES.get(inner, inner)
        if theirs in _GPT2_TRANSPOSED and leaf == "weight":
            tensor = tensor.t()
        out[name if name == "lm_head.weight" else f"{prefix}{theirs}.{leaf}"] = tensor.contiguous()
    return out
