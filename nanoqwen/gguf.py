"""One GGUF file for llama.cpp: weights, shape, tokenizer and chat template, as its converter would name them.

What the format cannot say, or llama.cpp would compute otherwise, is refused: a file that loads and writes other text
would be worse than none. Matrices are in the dtype asked for, vectors in fp32, as llama.cpp wants them.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from model import GPT, ModelConfig, RopeScaling, rope_frequencies
from nanoqwen.errors import CheckpointError
from nanoqwen.hf_format import model_type
from nanoqwen.tokenizer import GPT2_PATTERN, IM_END, QWEN2_PATTERN, Tokenizer
from nanoqwen.weights import load_model

# llama.cpp knows split patterns by name and implements each by hand. The third is Llama 3's tokenizer.json.
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")
PRE_TOKENIZERS = {QWEN2_PATTERN: "qwen2", GPT2_PATTERN: "gpt-2", LLAMA3_PATTERN: "llama-bpe"}
TAKES_WHOLE_PIECES = "llama-bpe"  # the one that takes a piece that is a token as it is, whatever the merges say
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types


def write_gguf(source: str | Path, file: str | Path, dtype: torch.dtype | None = None) -> Tokenizer:
    """Write a new file, all or nothing; returns the tokenizer in it. dtype None: as stored."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError("gguf needs the gguf package: pip install gguf") from None
    file = Path(file)
    if file.exists() or not file.parent.is_dir():
        raise CheckpointError(f"{file}: expected a new file in a folder that exists")
    model, tokenizer = load_model(source, dtype=dtype)
    kind = _checked(source, model, tokenizer)
    unfinished = file.with_name(f".tmp-{secrets.token_hex(8)}")
    writer = gguf.GGUFWriter(unfinished, kind)
    try:
        _add_shape(writer, gguf, model)
        _add_tokenizer(writer, tokenizer, model.cfg.vocab_size)
        names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), model.cfg.num_hidden_layers)
        for name, tensor in model.state_dict().items():
            _add_tensor(
                writer, gguf, names.get_name(name, (".weight", ".bias")), _turned(kind, model.cfg, name, tensor)
            )
        if model.cfg.rope_scaling is not None and model.cfg.rope_scaling.rope_type == "llama3":
            _add_tensor(writer, gguf, "rope_freqs.weight", _frequency_divisors(model.cfg))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.rename(unfinished, file)
    except BaseException:
        writer.close()
        unfinished.unlink(missing_ok=True)
        raise
    return tokenizer


def _checked(source: str | Path, model: GPT, tokenizer: Tokenizer | None) -> str:
    """The architecture's name in GGUF; a CheckpointError where the file would be another model."""
    cfg, kind, reason = model.cfg, model_type(model), None
    scaling = cfg.rope_scaling
    if model.routing:
        reason = "llama.cpp would compute all tokens in its routed layers, which is another model"
    elif kind not in ("qwen2", "qwen3", "llama") or cfg.bias:
        reason = "expected the shape of Qwen2, Qwen3 or Llama without biases"
    elif tokenizer is None:
        reason = "expected a tokenizer.json in the folder"
    elif scaling and scaling != RopeScaling(
        scaling.rope_type, scaling.factor, scaling.original_max_position_embeddings, *_llama3_borders(scaling)
    ):
        reason = "rope_scaling has settings that the file cannot hold: expected yarn as published"
    elif scaling and (scaling.rope_type == "dynamic" or (scaling.rope_type == "llama3" and kind != "llama")):
        reason = f"llama.cpp has no {scaling.rope_type} rope scaling for {kind}"
    if reason is not None:
        raise CheckpointError(f"{source}: cannot be a GGUF file: {reason}")
    return kind


def _llama3_borders(scaling: RopeScaling) -> tuple[float, float]:
    return scaling.low_freq_factor, scaling.high_freq_factor


def _add_shape(writer: Any, gguf: Any, model: GPT) -> None:
    cfg, stored = model.cfg, model.model.embed_tokens.weight.dtype
    writer.add_name(f"nanoqwen {model_type(model)}")
    writer.add_file_type({torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[stored])
    writer.add_context_length(cfg.context)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_key_length(cfg.head_size)
    writer.add_value_length(cfg.head_size)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_rope_dimension_count(cfg.head_size)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_vocab_size(cfg.vocab_size)
    if cfg.rope_scaling is not None and cfg.rope_scaling.rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(cfg.rope_scaling.rope_type))
        writer.add_rope_scaling_factor(cfg.rope_scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(cfg.original_context)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, size: int) -> None:
    """`size`: rows of the embedding, which may have more than there are tokens."""
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        spec = json.loads((Path(folder) / "tokenizer.json").read_bytes())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["merges"]]
    texts, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for text, token_id in spec["vocab"].items():
        texts[token_id], types[token_id] = text, NORMAL
    for text, token_id in tokenizer.special.items():
        texts[token_id], types[token_id] = text, CONTROL if token_id in tokenizer.hidden else USER_DEFINED
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer, spec, merges))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.eos_id)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if IM_END in tokenizer.special:
        writer.add_eot_token_id(tokenizer.special[IM_END])
    writer.add_add_bos_token(bool(tokenizer.prefix))
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(tokenizer: Tokenizer, spec: dict[str, Any], merges: list[str]) -> str:
    """llama.cpp's name for what comes before BPE; refused where its ids would be others than ours."""
    made, reason = {merge.replace(" ", "") for merge in merges}, None
    longer = [text for text in spec["vocab"] if len(text) > 1 and text not in tokenizer.special]
    name = PRE_TOKENIZERS.get(tokenizer.pattern) if longer else "gpt-2"  # bytes stay bytes wherever a text is cut
    if name is None:
        reason = f"its split pattern is none that llama.cpp has: {tokenizer.pattern!r}"
    elif name != TAKES_WHOLE_PIECES and (stuck := [text for text in longer if text not in made]):
        reason = f"{len(stuck)} tokens are made by no merge, among them {stuck[0]!r}"
    elif tokenizer.prefix not in ((), (tokenizer.bos_id,)):
        reason = f"expected nothing or its first token in front of a text, got the ids {tokenizer.prefix}"
    if reason is not None:
        raise CheckpointError(f'tokenizer "{tokenizer.name}": cannot be in a GGUF file: {reason}')
    return name


def _turned(kind: str, cfg: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """For arch llama the pairs that a rotary angle turns lie side by side; here they are half a head apart."""
    if kind != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    return tensor.unflatten(0, (-1, 2, cfg.head_size // 2)).transpose(1, 2).flatten(0, 2)


def _frequency_divisors(cfg: ModelConfig) -> Tensor:
    plain = cfg.rope_theta ** -(torch.arange(0, cfg.head_size, 2, dtype=torch.float64) / cfg.head_size)
    return (plain / rope_frequencies(cfg, cfg.context)[0]).float()


def _add_tensor(writer: Any, gguf: Any, name: str, tensor: Tensor) -> None:
    tensor = (tensor.float() if tensor.dim() == 1 else tensor).contiguous()
    if tensor.dtype == torch.bfloat16:  # which numpy does not have
        writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())
