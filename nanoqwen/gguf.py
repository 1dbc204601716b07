"""One GGUF file for llama.cpp: weights, shape, tokenizer and chat template, under the names of its converter.

A model that the format cannot hold, or that llama.cpp would compute differently, is refused: a file that loads but
generates other text would be worse than none. Matrices have the requested dtype, or are quantised to 8 bits (Q8_0);
vectors are fp32, as llama.cpp expects.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from model import GPT, RopeScaling
from nanoqwen.errors import CheckpointError
from nanoqwen.files import complete_or_absent, read_json
from nanoqwen.gguf_reader import CONTROL, NORMAL, UNUSED, USER_DEFINED, frequency_divisors
from nanoqwen.hf_format import model_type
from nanoqwen.patterns import GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN
from nanoqwen.tokenizer import IM_END, Tokenizer
from nanoqwen.weights import load_model

# llama.cpp knows split patterns by name and implements each by hand.
PRE_TOKENIZERS = {QWEN2_PATTERN: "qwen2", GPT2_PATTERN: "gpt-2", LLAMA3_PATTERN: "llama-bpe"}
Q8_0, BLOCK = "q8_0", 32  # 8 bits for each number, and a scale for each 32 of a row
FILE_TYPES = {torch.float32: 0, torch.float16: 1, Q8_0: 7, torch.bfloat16: 32}
TAKES_WHOLE_PIECES = "llama-bpe"  # if a whole piece is a token, it takes that token, whatever the merges say


def write_gguf(source: str | Path, file: str | Path, dtype: torch.dtype | str | None = None) -> Tokenizer:
    """Write a new file, complete or not at all; returns its tokenizer. dtype None: as stored; also Q8_0."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError("gguf needs the gguf package: pip install gguf") from None
    file = Path(file)
    if file.exists() or not file.parent.is_dir():
        raise CheckpointError(f"{file}: expected a new file in a folder that exists")
    model, tokenizer = load_model(source, dtype=torch.float32 if dtype == Q8_0 else dtype)
    if reason := _why_not(model, tokenizer):
        raise CheckpointError(f"{source}: cannot be a GGUF file: {reason}")
    cfg, kind = model.cfg, model_type(model)
    with complete_or_absent(file) as temporary, closing(gguf.GGUFWriter(temporary, kind)) as writer:
        _add_shape(writer, gguf, model)
        writer.add_file_type(FILE_TYPES[dtype or model.model.embed_tokens.weight.dtype])
        _add_tokenizer(writer, tokenizer, cfg.vocab_size)
        names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), cfg.num_hidden_layers)
        for name, tensor in model.state_dict().items():
            if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                tensor = _interleave_rotary_pairs(tensor, cfg.head_size)
            _add_tensor(writer, gguf, names.get_name(name, (".weight", ".bias")), tensor, dtype == Q8_0)
        if cfg.rope_scaling is not None and cfg.rope_scaling.rope_type == "llama3":
            _add_tensor(writer, gguf, "rope_freqs.weight", frequency_divisors(cfg).float())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return tokenizer


def _why_not(model: GPT, tokenizer: Tokenizer | None) -> str | None:
    """Why the file would be another model in llama.cpp; None if it would not."""
    cfg, kind, scaling = model.cfg, model_type(model), model.cfg.rope_scaling
    if model.routing:
        return "llama.cpp would compute all tokens in its routed layers, which is another model"
    if kind not in ("qwen2", "qwen3", "llama") or cfg.bias:
        return "expected the shape of Qwen2, Qwen3 or Llama without biases"
    if tokenizer is None:
        return "expected a tokenizer.json in the folder"
    if tokenizer.engine.pattern is None and not _cuts_digits(tokenizer):
        return "expected a byte-level BPE tokenizer of one split pattern, or with digits one by one before GPT-2's"
    if scaling is None:
        return None
    stored = {"rope_type", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}
    if scaling != RopeScaling(**{name: getattr(scaling, name) for name in stored}):
        return "rope_scaling has settings that the file cannot hold: expected yarn as published"
    if scaling.rope_type == "dynamic" or (scaling.rope_type == "llama3" and kind != "llama"):
        return f"llama.cpp has no {scaling.rope_type} rope scaling for {kind}"
    return None


def _add_shape(writer: Any, gguf: Any, model: GPT) -> None:
    cfg = model.cfg
    writer.add_name(f"nanoqwen {model_type(model)}")
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
    """`size`: rows of the embedding; the rows beyond the vocabulary become padding tokens."""
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        bpe = read_json(Path(folder) / "tokenizer.json")["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    texts, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for text, token_id in bpe["vocab"].items():
        texts[token_id], types[token_id] = text, NORMAL
    for text, token_id in tokenizer.special.items():
        texts[token_id], types[token_id] = text, CONTROL if token_id in tokenizer.hidden else USER_DEFINED
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer, bpe["vocab"], merges))
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


def _cuts_digits(tokenizer: Tokenizer) -> bool:
    """Whether a text is cut as SmolLM's: each digit by itself, then by GPT-2's pattern."""
    spec = getattr(tokenizer.engine, "spec", {})
    steps = (spec.get("pre_tokenizer") or {}).get("pretokenizers", [])
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    plain = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    return plain == [digits, byte_level] and spec.get("normalizer") is None


def _pre_tokenizer(tokenizer: Tokenizer, vocab: dict[str, int], merges: list[str]) -> str:
    """llama.cpp's name for the split before BPE; an error where its ids would differ from ours."""
    merged = {merge.replace(" ", "") for merge in merges}
    longer = [text for text in vocab if len(text) > 1 and text not in tokenizer.special]
    name = "smollm" if _cuts_digits(tokenizer) else PRE_TOKENIZERS.get(tokenizer.engine.pattern)
    unreachable = [text for text in longer if text not in merged] if name != TAKES_WHOLE_PIECES else []
    if not longer:
        reason = "llama.cpp opens no vocabulary without merges"
    elif name is None:
        reason = f"its split pattern is none that llama.cpp has: {tokenizer.engine.pattern!r}"
    elif unreachable:
        reason = f"{len(unreachable)} tokens are made by no merge, among them {unreachable[0]!r}"
    elif tokenizer.prefix not in ((), (tokenizer.bos_id,)):
        reason = f"expected nothing or its first token in front of a text, got the ids {tokenizer.prefix}"
    else:
        return name
    raise CheckpointError(f'tokenizer "{tokenizer.name}": cannot be in a GGUF file: {reason}')


def _interleave_rotary_pairs(tensor: Tensor, head_size: int) -> Tensor:
    """For arch llama the two rows of a rotary pair are neighbours; here they are half a head apart."""
    return tensor.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


def _add_tensor(writer: Any, gguf: Any, name: str, tensor: Tensor, quantised: bool = False) -> None:
    tensor = (tensor.float() if tensor.dim() == 1 else tensor).contiguous()
    if tensor.dtype == torch.bfloat16:  # which numpy does not have
        writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    elif quantised and tensor.dim() > 1 and tensor.shape[-1] % BLOCK == 0:  # else it stays fp32
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, tensor.numpy())
