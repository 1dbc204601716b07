"""GGUF files in: shape, weights and tokenizer, as the files of a Hugging Face folder would hold them.

Each count and length of a file is held against its size before anything is made of it, so that a broken or hostile
one is an error of one line, at once. The `gguf` package is needed for quantised weights alone.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import ModelConfig, RopeScaling, rope_frequencies
from nanoqwen.errors import CheckpointError, DataError
from nanoqwen.files import json_bytes
from nanoqwen.patterns import GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN

MAGIC, VERSIONS = b"GGUF", (2, 3)  # of little-endian files
MOST_DIMENSIONS, ALIGNMENT = 4, 32  # llama.cpp's
CHUNK_BYTES = 2**24  # of stored weights that are decoded at a time


# --- the container ----------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A type of stored numbers: so many bytes hold a block of so many numbers of one row."""

    name: str
    block: int
    size: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    30: Kind("BF16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}


class StoredTensor(NamedTuple):
    kind: Kind
    shape: tuple[int, ...]
    start: int  # in bytes from the start of the file

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.kind.block * self.kind.size

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


class Gguf(NamedTuple):
    """The header of a file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """A value of the metadata, which must be of this type; without a default it must be there."""
        value = self.metadata.get(key, default)
        if value is default and value is not ...:
            return value
        if type(value) is not kind:
            got = "nothing" if value is ... else f"{type(value).__name__} {str(value)[:80]!r}"
            raise CheckpointError(f"{self.path}: {key}: expected {kind.__name__}, got {got}")
        return value


class _Header:
    """The values at the head of a file, one after the other."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a readable GGUF file: {message}")

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size else b""
        if len(data) != count:
            raise self.error(f"it ends within its header, after {self.size} bytes")
        return data

    def number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise self.error("a text in it is not UTF-8") from None

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _ARRAY:
            return self.array()
        return self.text() if kind == _STRING else self.numbers(kind, 1)[0]

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        return [self.text() for _ in range(count)] if kind == _STRING else self.numbers(kind, count)

    def numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in _NUMBERS:
            raise self.error(f"a value of unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def tensor(self) -> tuple[str, StoredTensor]:
        """Its start counts from the end of the header."""
        name, dimensions = self.text(), self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self.error(f"{name}: expected 1 to {MOST_DIMENSIONS} dimensions, got {dimensions}")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        kind, start = self.number("I"), self.number("Q")
        if kind not in KINDS:
            known = ", ".join(known.name for known in KINDS.values())
            raise self.error(f"{name}: expected weights in {known}, got type {kind}")
        stored = StoredTensor(KINDS[kind], shape, start)
        if shape[-1] % stored.kind.block or not all(shape):
            raise self.error(f"{name}: expected rows of blocks of {stored.kind.block} numbers, got the shape {shape}")
        return name, stored


def read_gguf(path: Path) -> Gguf:
    """The header; read once for each state of the file, since a command asks for it several times."""
    try:
        stat = path.stat()
        return _read_header(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


@lru_cache(maxsize=2)
def _read_header(path: Path, size: int, _: int) -> Gguf:
    with path.open("rb") as file:
        header = _Header(path, file, size)
        if (magic := header.take(4)) != MAGIC:
            raise header.error(f"it starts with {magic!r} instead of {MAGIC!r}")
        if (version := header.number("I")) not in VERSIONS:
            raise header.error(f"expected version 2 or 3, little-endian, got {version}")
        n_tensors, n_values = header.number("Q"), header.number("Q")
        metadata = _unique(header, ((header.text(), header.value()) for _ in range(n_values)))
        stored = _unique(header, (header.tensor() for _ in range(n_tensors)))
        file_ = Gguf(path, metadata, stored)
        alignment = file_.get("general.alignment", int, ALIGNMENT)
        if alignment < 1:
            raise header.error(f"general.alignment: expected 1 or more, got {alignment}")
        start = -(-file.tell() // alignment) * alignment
    for name, tensor in stored.items():
        stored[name] = tensor._replace(start=start + tensor.start)
        if (end := stored[name].start + tensor.nbytes) > size:
            raise header.error(f"{name} would end at byte {end}, the file ends at {size}")
    return file_


def _unique(header: _Header, pairs: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise header.error(f"{name} stands twice in it")
        found[name] = value
    return found


# --- shape ------------------------------------------------------------------------------------------------------------

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # also the model types of transformers
_SCALING_KEYS = ("type", "factor", "original_context_length", "finetuned")


def hf_config(path: Path) -> dict[str, Any]:
    """The contents of the config.json that the model would have."""
    file = read_gguf(path)
    arch = file.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise CheckpointError(f"{path}: general.architecture: expected one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    if file.metadata.get(f"{arch}.expert_count"):
        raise CheckpointError(f"{path}: {arch}.expert_count: expected a model without experts")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path}: token_embd.weight: expected a matrix")
    hidden, heads = (file.get(f"{arch}.{key}", int) for key in ("embedding_length", "attention.head_count"))
    layers = file.get(f"{arch}.block_count", int)
    if not 0 < layers <= len(file.tensors) or heads < 1:  # before a wrong count builds anything
        raise CheckpointError(f"{path}: {arch}: expected layers and heads, got {layers} and {heads}")
    head_dim = file.get(f"{arch}.attention.key_length", int, hidden // heads)
    if (rotated := file.get(f"{arch}.rope.dimension_count", int, head_dim)) != head_dim:
        raise CheckpointError(f"{path}: {arch}.rope.dimension_count: expected whole heads of {head_dim}, got {rotated}")
    theta = file.get(f"{arch}.rope.freq_base", float, 10_000.0)
    return {
        "model_type": arch,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": file.get(f"{arch}.feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(f"{arch}.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.get(f"{arch}.context_length", int),
        "rms_norm_eps": file.get(f"{arch}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, arch, theta),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _rope_scaling(file: Gguf, arch: str, theta: float) -> dict[str, Any] | None:
    prefix = f"{arch}.rope.scaling."
    found = {key.removeprefix(prefix) for key in file.metadata if key.startswith(prefix)}
    if unknown := sorted(found - set(_SCALING_KEYS)):
        raise CheckpointError(f"{file.path}: {prefix}{unknown[0]}: expected {', '.join(_SCALING_KEYS)} alone")
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, theta)
    kind = file.get(f"{prefix}type", str, "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{file.path}: {prefix}type: expected none, linear or yarn, got {kind!r}")
    original = file.get(f"{prefix}original_context_length", int, None)
    scaling = {"rope_type": kind, "factor": file.get(f"{prefix}factor", float)}
    return scaling if original is None else scaling | {"original_max_position_embeddings": original}


def _llama3_scaling(file: Gguf, theta: float) -> dict[str, Any] | None:
    """The settings of Llama 3's rule that give the stored divisors of frequencies: the file holds nothing else."""
    stored = file.tensors["rope_freqs.weight"]
    divisors = read_tensor(file.path, stored, torch.float64).flatten()
    pairs = torch.arange(len(divisors), dtype=torch.float64) / len(divisors)
    factor = float(divisors.max())
    if factor == 1.0:
        return None
    low, high = 1.0, 4.0  # as in every released model
    keep = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (keep > 1e-3) & (keep < 1 - 1e-3)
    turns = theta**-pairs / (2 * math.pi)  # of one position
    contexts = ((high - low) * keep + low)[between] / turns[between]
    original = round(float(contexts.median())) if len(contexts) else 8_192
    scaling = {"factor": factor, "original_max_position_embeddings": original}
    cfg = ModelConfig(head_dim=2 * len(divisors), rope_theta=theta, rope_scaling=RopeScaling("llama3", **scaling))
    if not torch.allclose(frequency_divisors(cfg), divisors, rtol=1e-3):
        raise CheckpointError(f"{file.path}: rope_freqs.weight: expected the divisors of Llama 3's rope scaling")
    return {"rope_type": "llama3", **scaling}


def frequency_divisors(cfg: ModelConfig) -> Tensor:
    """By how much a rope scaling divides each frequency, in fp64."""
    plain = cfg.rope_theta ** -(torch.arange(0, cfg.head_size, 2, dtype=torch.float64) / cfg.head_size)
    return plain / rope_frequencies(cfg, cfg.context)[0]


# --- weights ----------------------------------------------------------------------------------------------------------

_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def tensors(path: Path) -> Iterator[tuple[str, Tensor, Callable[..., Tensor]]]:
    """(name in a Hugging Face folder, meta tensor, function of dtype and device that reads it) of every tensor."""
    file, cfg = read_gguf(path), hf_config(path)
    for name, stored in file.tensors.items():
        if name in _NOT_WEIGHTS:
            continue
        interleaved = cfg["model_type"] == "llama" and re.search(r"\.attn_[qk]\.", name)
        meta = torch.empty(stored.shape, dtype=_FLOATS.get(stored.kind.name, torch.float32), device="meta")
        yield hf_name(name), meta, partial(_read, path, stored, cfg["head_dim"] if interleaved else None)


def hf_name(name: str) -> str:
    """Of a tensor; an unknown name stays as it is, and is reported as unexpected."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
    path, _, leaf = name.rpartition(".")
    return f"{_NAMES[path]}.{leaf}" if path in _NAMES else name


def _read(
    path: Path, stored: StoredTensor, head_dim: int | None, dtype: torch.dtype | None, device: torch.device
) -> Tensor:
    tensor = read_tensor(path, stored, dtype)
    if head_dim is not None:
        if stored.shape[0] % head_dim:
            raise CheckpointError(f"{path}: expected q and k of heads of {head_dim} rows, got the shape {stored.shape}")
        tensor = half_apart(tensor, head_dim)
    return tensor.to(device)


def half_apart(tensor: Tensor, head_size: int) -> Tensor:
    """For arch llama the two rows of a rotary pair are neighbours; here they are half a head apart."""
    return tensor.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flatten(0, 2)


def read_tensor(path: Path, stored: StoredTensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor as floats, decoded piece by piece. dtype None: as stored, and fp32 if it is quantised."""
    rows = math.prod(stored.shape[:-1])
    out = torch.empty((rows, stored.shape[-1]), dtype=dtype or _FLOATS.get(stored.kind.name, torch.float32))
    step = max(1, CHUNK_BYTES // stored.row_bytes)
    with path.open("rb") as file:
        file.seek(stored.start)
        for start in range(0, rows, step):
            data = bytearray(min(step, rows - start) * stored.row_bytes)
            if file.readinto(data) != len(data):
                raise CheckpointError(f"{path}: became shorter while it was read")
            out[start : start + step] = _decode(path, data, stored)
    return out.view(stored.shape)


def _decode(path: Path, data: bytearray, stored: StoredTensor) -> Tensor:
    name = stored.kind.name
    if name in _FLOATS:
        return torch.frombuffer(data, dtype=_FLOATS[name]).view(-1, stored.shape[-1])
    try:
        from gguf import GGMLQuantizationType, dequantize
    except ImportError:
        raise CheckpointError(f"{path}: weights in {name} need the gguf package: pip install gguf") from None
    blocks = np.frombuffer(data, np.uint8).reshape(-1, stored.row_bytes)
    return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[name]))


# --- tokenizer --------------------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
LONGEST_TOKEN = 1_000  # characters, of which all pairs are tried
# llama.cpp's names for how a text is cut, as far as models of these architectures have them. Without a name, as old
# files are, transformers takes GPT-2's.
SPLITS = {
    "gpt-2 default": GPT2_PATTERN,
    "qwen2 deepseek-r1-qwen": QWEN2_PATTERN,
    "llama-bpe llama3 llama-v3 falcon3": LLAMA3_PATTERN,
    "smollm starcoder refact": "digits",  # one by one, the rest by GPT-2's pattern
}
_BY_NAME = {name: split for names, split in SPLITS.items() for name in names.split()}
_SPACE = "\u2581"  # SentencePiece's


def has_tokenizer(path: Path) -> bool:
    return read_gguf(path).metadata.get("tokenizer.ggml.model") not in (None, "none", "no_vocab")


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """The tokenizer.json, tokenizer_config.json and generation_config.json that the model would have."""
    file = read_gguf(path)
    texts, types = _tokens(file)
    named = {name: file.get(f"tokenizer.ggml.{name}_token_id", int, None) for name in ("bos", "eos", "eot", "eom")}
    for name, token_id in named.items():
        if token_id is not None and not 0 <= token_id < len(texts):
            raise DataError(f"{path}: tokenizer.ggml.{name}_token_id: expected one of {len(texts)} ids, got {token_id}")
    ends = {token_id for token_id in named.values() if token_id is not None}
    special = {i: i in ends or kind != USER_DEFINED for i, kind in enumerate(types)
               if i in ends or kind in (UNKNOWN, CONTROL, USER_DEFINED)}  # fmt: skip
    vocab = {text: i for i, text in enumerate(texts) if types[i] != UNUSED or i in special}
    if len(vocab) != sum(kind != UNUSED or i in special for i, kind in enumerate(types)):
        raise DataError(f"{path}: tokenizer.ggml.tokens: expected different texts")
    kind = file.get("tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        raise DataError(f"{path}: tokenizer.ggml.model: expected gpt2 or llama, got {kind!r}")
    parts = _byte_level(file, vocab) if kind == "gpt2" else _sentencepiece(file, vocab, types)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": texts[i], **flags, "special": hidden} for i, hidden in sorted(special.items())]
    prefix = texts[named["bos"]] if named["bos"] is not None and _adds_bos(file, kind) else None
    spec = {"version": "1.0", "added_tokens": added, **parts, "post_processor": _begin_with(prefix, named["bos"])}
    generation = {"eos_token_id": sorted(ends - {named["bos"]} | {named["eos"]} - {None})}
    made = {"tokenizer": spec, "tokenizer_config": _config(file, texts, named), "generation_config": generation}
    return {f"{name}.json": json_bytes(content) for name, content in made.items()}


def _tokens(file: Gguf) -> tuple[list[str], list[int]]:
    texts = file.get("tokenizer.ggml.tokens", list)
    types = file.get("tokenizer.ggml.token_type", list, [NORMAL] * len(texts))
    if not all(isinstance(text, str) and len(text) <= LONGEST_TOKEN for text in texts):
        raise DataError(f"{file.path}: tokenizer.ggml.tokens: expected texts of up to {LONGEST_TOKEN} characters")
    if len(types) != len(texts):
        raise DataError(f"{file.path}: tokenizer.ggml.token_type: expected {len(texts)} numbers, got {len(types)}")
    return texts, types


def _byte_level(file: Gguf, vocab: dict[str, int]) -> dict[str, Any]:
    name = file.get("tokenizer.ggml.pre", str, "default")
    if name not in _BY_NAME:
        raise DataError(f"{file.path}: tokenizer.ggml.pre: expected one of {', '.join(_BY_NAME)}, got {name!r}")
    split = _BY_NAME[name]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    if split == "digits":
        steps = [{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}]
    else:
        isolated = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        steps = [isolated, byte_level | {"use_regex": False}]
    merges = file.get("tokenizer.ggml.merges", list)
    if wrong := [merge for merge in merges if not isinstance(merge, str) or merge.count(" ") != 1][:1]:
        raise DataError(f"{file.path}: tokenizer.ggml.merges: expected pairs of tokens, got {wrong[0]!r}")
    # The released models of these two families bring text to NFC, and take a whole piece that is a token as it is.
    return {
        "normalizer": {"type": "NFC"} if split == QWEN2_PATTERN else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level | {"use_regex": True},
        "model": {"type": "BPE", "ignore_merges": split == LLAMA3_PATTERN, "vocab": vocab, "merges": merges},
    }


def _sentencepiece(file: Gguf, vocab: dict[str, int], types: list[int]) -> dict[str, Any]:
    """As the tokenizer.json of Llama 2 spells it."""
    scores = file.get("tokenizer.ggml.scores", list)
    if len(scores) != len(types):
        raise DataError(f"{file.path}: tokenizer.ggml.scores: expected {len(types)} numbers, got {len(scores)}")
    normal = {text: scores[i] for text, i in vocab.items() if types[i] == NORMAL}
    unknown = next((text for text, i in vocab.items() if types[i] == UNKNOWN), None)
    first_space = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if first_space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if first_space else []
    to_space = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    from_space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, from_space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges_by_score(normal, vocab),
        },
    }


def merges_by_score(scores: dict[str, float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the best score first, of equals the lower id: the order of Llama 2's."""
    pairs = [
        (-score, vocab[text], vocab[text[:cut]], vocab[text[cut:]], text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(pairs)]


def _adds_bos(file: Gguf, kind: str) -> bool:
    """llama.cpp's defaults, for files that do not say."""
    default = kind == "llama" or _BY_NAME.get(file.metadata.get("tokenizer.ggml.pre")) == LLAMA3_PATTERN
    return file.get("tokenizer.ggml.add_bos_token", bool, default)


def _begin_with(token: str | None, token_id: int | None) -> dict[str, Any] | None:
    if token is None:
        return None
    text = {"Sequence": {"id": "A", "type_id": 0}}
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    ids = {token: {"id": token, "ids": [token_id], "tokens": [token]}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {"type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text, second], "special_tokens": ids}


def _config(file: Gguf, texts: list[str], named: dict[str, int | None]) -> dict[str, Any]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{name}_token": texts[named[name]] for name in ("bos", "eos") if named[name] is not None}
    if (template := file.get("tokenizer.chat_template", str, None)) is not None:
        config["chat_template"] = template
    return config
