"""One decoding step of a dense model on the cores of a CPU: cpu_step.cpp, compiled on first use, and its structures.

Weights are read where they lie: fp32 and bf16 as the model has them, int8 and int4 as quantize.py packs them. Without
a compiler there is no kernel, and the model decodes by torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from functools import cache as cached
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import GPT, KVCache, grow
from nanoqwen.errors import say
from nanoqwen.quantize import Quantized

SOURCE = Path(__file__).with_name("cpu_step.cpp")
FLAGS = "-O3 -march=native -fno-math-errno -fopenmp -shared -fPIC -std=c++17".split()
MOST_TOKENS = 16  # of a call; with more, torch's products of matrices are as fast
CHUNK_ROWS = 64  # as in the source
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.int32: 3}


# --- the library ------------------------------------------------------------------------------------------------------


def _processor() -> str:
    """What -march=native looks at: a home that two machines share must not give one the other's code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@cached
def library() -> ctypes.CDLL | None:
    """The compiled source, from the user's cache or compiled now (5 s); None where that is not possible."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        return None
    known = [SOURCE.read_text(encoding="utf-8"), compiler, *FLAGS, _processor()]
    name = hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoqwen"
    file = folder / f"cpu_step-{name}.so"
    try:
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as build:
                made = Path(build) / file.name
                say(f"compiling {SOURCE.name} for this CPU, once: some 5 s")
                subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made)], check=True, capture_output=True)
                made.replace(file)
        loaded = ctypes.CDLL(str(file))
    except (OSError, subprocess.CalledProcessError):
        return None
    loaded.lanes.restype, loaded.step.restype = c_int64, None
    return loaded


def lanes() -> int:
    """Floats of a vector, by which int4 codes are packed."""
    return library().lanes() if library() else 8


# --- structures, as in the source -------------------------------------------------------------------------------------


class Linear(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("weight", "scales", "grids", "bias")),
        *((name, c_int64) for name in ("outputs", "inputs", "format")),
    ]


class Layer(Structure):
    _fields_ = [
        *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
    ]


class Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layers", "hidden", "heads", "kv_heads", "head_size", "intermediate")),
        ("eps", c_float), ("layer", POINTER(Layer)), ("final_norm", c_void_p), ("head", Linear),
    ]  # fmt: skip


class Step(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "tokens", "wanted", "threads", "capacity", "cache_format")),
        *((name, c_int64) for name in ("width", "own_size")),
        *((name, c_void_p) for name in ("first", "slot", "wanted_tokens", "cos", "sin", "keys", "values")),
        *((name, c_void_p) for name in ("x", "logits", "qkv", "mixed", "inner", "own", "counters")),
    ]


# --- a model that decodes by it ---------------------------------------------------------------------------------------


def fits(model: GPT) -> bool:
    """The kernel knows the layers of Qwen, Llama and their kind, in fp32, bf16, int8 and int4."""
    cfg, embedding = model.cfg, model.get_input_embeddings()
    known = (cfg.norm, cfg.mlp, cfg.positions, cfg.j_branch) == ("rmsnorm", "swiglu", "rope", False)
    scaling = cfg.rope_scaling  # a dynamic one turns keys by another angle in each step
    weight = next(embedding.parameters(), None)
    stored = weight is None or (weight.device.type == "cpu" and weight.dtype in FORMATS)
    return known and not len(model.routers) and not (scaling and scaling.rope_type == "dynamic") and stored


class Decoder:
    """Holds the structures of a model, and every tensor that they point to."""

    def __init__(self, model: GPT):
        self.model, self.cfg = model, model.cfg
        self.tensors: list[Tensor] = []
        cfg, decoder = model.cfg, model.model
        self.layers = (Layer * cfg.num_hidden_layers)(*(self._layer(block) for block in decoder.layers))
        sizes = (cfg.num_hidden_layers, cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads)
        head = self._linear(model.get_output_embeddings())
        norm = self._address(decoder.norm.weight.float())
        self.structure = Model(*sizes, cfg.head_size, cfg.intermediate_size, cfg.rms_norm_eps, self.layers, norm, head)
        q, kv = cfg.num_attention_heads * cfg.head_size, cfg.num_key_value_heads * cfg.head_size
        widest = max(q + 2 * kv, cfg.intermediate_size, cfg.hidden_size)
        self.width = -(-widest // 128) * 128
        self.buffers: dict[str, Tensor] = {}

    def _address(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self.tensors.append(tensor)
        return tensor.data_ptr()

    def _linear(self, layer: nn.Module) -> Linear:
        matrix: Quantized | None = getattr(layer, "matrix", None)
        bias = getattr(layer, "bias", None)
        bias = self._address(bias.float()) if bias is not None else None
        if matrix is None:
            weight = layer.weight
            return Linear(self._address(weight), None, None, bias, *weight.shape, FORMATS[weight.dtype])
        named = dict(matrix.named_buffers())
        addresses = [self._address(named[name]) if name in named else None for name in ("scales", "grids")]
        return Linear(self._address(matrix.codes), *addresses, bias, *matrix.shape, FORMATS[matrix.codes.dtype])

    def _layer(self, block: nn.Module) -> Layer:
        a, mlp = block.self_attn, block.mlp
        matrices = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        norms = (block.input_layernorm, block.post_attention_layernorm, a.q_norm, a.k_norm)
        weights = (getattr(norm, "weight", None) for norm in norms)  # without QK-norm they are identities
        addresses = (None if weight is None else self._address(weight.float()) for weight in weights)
        return Layer(*map(self._linear, matrices), *addresses)

    def _buffer(self, name: str, size: int) -> int:
        """Memory that is zero where nothing was ever written; it grows, and then is zero again."""
        if name not in self.buffers or len(self.buffers[name]) < size:
            self.buffers[name] = torch.zeros(size)
        return self.buffers[name].data_ptr()

    def __call__(self, tokens: Tensor, counts: Sequence[int], cache: KVCache, every: bool = False) -> Tensor:
        """fp32 logits [B, 1, V] behind the last of each row's tokens [B, T]; with `every` [tokens, V] behind all."""
        cfg, rows, total = self.cfg, len(counts), sum(counts)
        slots = [old + i for old, new in zip(cache.lengths, counts, strict=True) for i in range(new)]
        cache.reserve(max(slots) + 1)
        firsts = [0]
        for count in counts:
            firsts.append(firsts[-1] + count)
        wanted = range(total) if every else [end - 1 for end in firsts[1:]]
        ids = tokens.flatten() if total == tokens.numel() else torch.cat(
            [row[:count] for row, count in zip(tokens, counts, strict=True)]
        )  # fmt: skip
        x = self.model.get_input_embeddings()(ids).float().contiguous()
        logits = torch.empty(len(wanted), self.structure.head.outputs)
        cos, sin = self.model.rope.tables(cfg, cache.length, x.device)
        keys, values = (self._cache(tensors, cache, rows) for tensors in (cache._keys, cache._values))
        threads, group = torch.get_num_threads(), cfg.num_attention_heads // cfg.num_key_value_heads
        own = total * (self.width + CHUNK_ROWS) + group * (-(-cache.capacity // 16) * 16) + cfg.head_size
        if self.buffers.get("sizes") != (total, own, threads):  # else what one call wrote is another's padding
            self.buffers = {"sizes": (total, own, threads)}
        call = Step(
            rows, total, len(wanted), threads, cache.capacity, FORMATS[cache._keys[0].dtype], self.width, own,
            ctypes.addressof(firsts_ := (c_int64 * (rows + 1))(*firsts)),
            ctypes.addressof(slots_ := (c_int64 * total)(*slots)),
            ctypes.addressof(wanted_ := (c_int64 * len(wanted))(*wanted)),
            cos.data_ptr(), sin.data_ptr(), ctypes.addressof(keys), ctypes.addressof(values),
            x.data_ptr(), logits.data_ptr(),
            *(self._buffer(name, total * self.width) for name in ("qkv", "mixed", "inner")),
            self._buffer("own", threads * own), self._buffer("counters", 2 * (7 * cfg.num_hidden_layers + 1)),
        )  # fmt: skip
        library().step(ctypes.byref(self.structure), ctypes.byref(call))
        del firsts_, slots_, wanted_
        return logits if every else logits[:, None]

    def _cache(self, tensors: list[Tensor | None], cache: KVCache, rows: int) -> Any:
        for layer, tensor in enumerate(tensors):
            tensors[layer] = grow(tensor, tensor, rows, cache.capacity, cache.dtype).contiguous()
        return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
