"""The decoder: a Qwen2.5-shaped transformer with its cache, its loss and its ways of choosing tokens, in one file.

Read it from top to bottom: configuration, rotary tables, the KV cache, masks, the layers, the model, initialisation,
then generation: filters, sampling, beams.

Letters in the shapes that comments and signatures give:
    B rows of a batch      T tokens of this call      S keys seen by it (cached and new)
    E hidden size          H query heads              K key/value heads (H is a multiple of K)
    D size of a head       F inner size of the MLP    V vocabulary            L layers

Parameter names are a file format: modules bear the names of Hugging Face's Qwen2, so that published weights load
with `load_state_dict(strict=True)`. Nothing here knows about training, files or text.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Union, get_args, get_origin, get_type_hints

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a target that is not trained on, as in torch's own cross-entropy
INIT_STD = 0.02  # standard deviation of fresh matrices, as in GPT-2 and Qwen2
# Logits are the largest tensor of a small model with a large vocabulary; the loss makes at most this many at a time.
LOGITS_PER_CHUNK = 2**25  # fp32 numbers: 128 MiB
LOGITS_PER_CHUNK_CUDA = 2**29  # adding up the head's gradient once a chunk costs a GPU more than the memory does


# --- configuration ----------------------------------------------------------------------------------------------------


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def require(holds: object, name: str, expected: str, got: object) -> None:
    """Refuse the value of a field."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


class Bound(NamedTuple):
    """The numbers that a field may hold, from `low` to `high`; an open end is not one of them."""

    low: int
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def allows(self, number: float) -> bool:
        above = self.low < number if self.open_low else self.low <= number
        return above and (number < self.high if self.open_high else number <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.open_low else '>='} {self.low}"
        high = f"2**{self.high.bit_length() - 1}" if self.high >= 2**32 else self.high
        return f"in {'(' if self.open_low else '['}{self.low}, {high}{')' if self.open_high else ']'}"


Size, Count = Annotated[int, Bound(1)], Annotated[int, Bound(0)]
TensorSize = Annotated[int, Bound(1, 2**40, open_high=True)]  # torch makes no larger tensors
Layers = Annotated[int, Bound(1, 10_000)]  # a million would take a minute and a gigabyte before anything is computed
Positive, NonNegative = Annotated[float, Bound(0, open_low=True)], Annotated[float, Bound(0)]
Fraction, OpenFraction = Annotated[float, Bound(0, 1)], Annotated[float, Bound(0, 1, open_low=True, open_high=True)]
DropProbability = Annotated[float, Bound(0, 1, open_high=True)]  # at 1 nothing would be left


@cache
def field_types(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass, with its bound."""
    return get_type_hints(cls, include_extras=True)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def describe(hint: Any) -> str:
    """A type in the words of a person: `int >= 1 or auto`."""
    words = {bool: "true|false", int: "int", float: "float", str: "text", NoneType: "null"}
    kinds = []
    for kind in alternatives(hint):
        if get_origin(kind) is Annotated:
            kinds.append(f"{words[get_args(kind)[0]]} {get_args(kind)[1]}")
        elif get_origin(kind) is Literal:
            kinds.append("|".join(get_args(kind)))
        else:
            kinds.append(
                f"list of {describe(get_args(kind)[0])}" if get_origin(kind) is tuple else words.get(kind, "mapping")
            )
    return " or ".join(kinds)


def check_fields(section: Any) -> None:
    """Refuse a dataclass whose values leave their types or bounds. Rules between fields are in its __post_init__."""
    for name, hint in field_types(type(section)).items():
        value = getattr(section, name)
        if not any(_is_a(value, kind) for kind in alternatives(hint)):
            require(False, name, describe(hint), value)


def _is_a(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _is_a(value, arguments[0]) and arguments[1].allows(value)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, arguments[0]) for item in value)
    if kind in (int, float):  # NaN is in no interval; a boolean is no number here
        number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        largest = math.inf if kind is int else sys.float_info.max
        return number and -largest <= value <= largest and abs(value) != math.inf
    return isinstance(value, origin or kind)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles are stretched beyond the context that the weights were trained with.

    The names are those of a published `config.json`; which of them are read depends on `rope_type`.
    """

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: Annotated[float, Bound(1, 2**40)] = 1.0  # new context / original context
    original_max_position_embeddings: Size | None = None  # None: the model's max_position_embeddings
    low_freq_factor: Positive = 1.0  # llama3
    high_freq_factor: Positive = 4.0  # llama3
    beta_fast: Positive = 32.0  # yarn: dimensions that turn more often than this in the original context stay
    beta_slow: Positive = 1.0  # yarn: those that turn less often are interpolated
    attention_factor: Positive | None = None  # yarn: None derives it from the factor
    mscale: Positive | None = None  # yarn
    mscale_all_dim: Positive | None = None  # yarn
    truncate: bool = True  # yarn: round the borders of the ramp to whole dimensions

    def __post_init__(self) -> None:
        check_fields(self)
        low, high = self.low_freq_factor, self.high_freq_factor
        require(high > low, "high_freq_factor", f"above low_freq_factor {low}", high)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. The defaults are Qwen2.5-0.5B; the names are those of a published `config.json`."""

    vocab_size: TensorSize = 151_936
    hidden_size: TensorSize = 896
    intermediate_size: TensorSize = 4_864
    num_hidden_layers: Layers = 24
    num_attention_heads: TensorSize = 14
    num_key_value_heads: TensorSize = 2
    head_dim: TensorSize | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: TensorSize = 32_768
    rope_theta: Annotated[float, Bound(1, open_low=True)] = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: OpenFraction = 1e-6  # of either kind of norm
    tie_word_embeddings: bool = True
    qkv_bias: bool = True  # Qwen2: biases on q, k and v alone
    qk_norm: bool = False  # Qwen3: RMSNorm on each head of q and k
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    positions: Literal["rope", "learned"] = "rope"
    bias: bool = False  # GPT-2: biases on every linear layer and norm
    j_branch: bool = False  # a third residual branch: a LayerNorm beside the attention
    j_bias: bool = True  # its bias, which released weights of that family have
    dropout: DropProbability = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        heads, kv_heads, hidden = self.num_attention_heads, self.num_key_value_heads, self.hidden_size
        _require(
            heads % kv_heads == 0,
            f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})",
        )
        _require(
            self.head_dim is not None or hidden % heads == 0,
            f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}) unless head_dim is given",
        )
        if self.positions == "rope":
            require(self.head_size % 2 == 0, "head_dim", "an even number for rotary pairs", self.head_size)
        else:
            require(self.rope_scaling is None, "rope_scaling", "null with positions: learned", self.rope_scaling)

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def original_context(self) -> int:
        """Positions that the weights were trained with, before any rotary scaling."""
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type == "dynamic":  # which looks at max_position_embeddings alone
            return self.max_position_embeddings
        return scaling.original_max_position_embeddings or self.max_position_embeddings

    @property
    def context(self) -> int:
        """The longest row that the model is meant for, scaling included."""
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type == "llama3":  # whose configurations name the stretched length
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(self.original_context * scaling.factor))


# --- rotary positions -------------------------------------------------------------------------------------------------


def _yarn_ramp(cfg: ModelConfig, scaling: RopeScaling) -> Tensor:
    """[D/2], 0 where a dimension keeps its frequency and 1 where it is interpolated (arXiv 2309.00071, section 3.2)."""
    half, base = cfg.head_size // 2, cfg.rope_theta

    def dimension_that_turns(times: float) -> float:
        return cfg.head_size * math.log(cfg.original_context / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_that_turns(scaling.beta_fast), dimension_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, cfg.head_size - 1)
    width = high - low or 0.001
    return ((torch.arange(half, dtype=torch.float64) - low) / width).clamp(0, 1)


def _yarn_magnitude(scaling: RopeScaling) -> float:
    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


def rope_frequencies(cfg: ModelConfig, length: int) -> tuple[Tensor, float]:
    """([D/2] radians per position in fp64, factor on cos and sin); `length` of the row matters to dynamic scaling."""
    pairs = torch.arange(0, cfg.head_size, 2, dtype=torch.float64) / cfg.head_size
    plain = cfg.rope_theta**-pairs
    scaling = cfg.rope_scaling
    if scaling is None or scaling.factor == 1.0:  # a factor of 1 changes nothing, to the last bit
        magnitude = scaling.attention_factor if scaling and scaling.rope_type == "yarn" else None
        return plain, magnitude or 1.0
    if scaling.rope_type == "linear":
        return plain / scaling.factor, 1.0
    if scaling.rope_type == "dynamic":
        stretch = max(scaling.factor * length / cfg.original_context - (scaling.factor - 1), 1.0)
        return (cfg.rope_theta * stretch ** (cfg.head_size / (cfg.head_size - 2))) ** -pairs, 1.0
    if scaling.rope_type == "yarn":
        ramp = _yarn_ramp(cfg, scaling)
        return plain / scaling.factor * ramp + plain * (1 - ramp), _yarn_magnitude(scaling)
    turns = cfg.original_context * plain / (2 * math.pi)  # llama3: whole turns within the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (1 - keep) * plain / scaling.factor + keep * plain, 1.0


def rope_tables(cfg: ModelConfig, positions: int, length: int = 1) -> tuple[Tensor, Tensor]:
    """cos and sin, each [positions, D/2] in fp32. The angles are fp64: in fp32 position 131,071 is off by 0.004 rad."""
    frequencies, magnitude = rope_frequencies(cfg, length)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    return (angles.cos() * magnitude).float(), (angles.sin() * magnitude).float()


def dynamic_rotation(cfg: ModelConfig, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each [B, T, D/2], of positions [B|1, T] in rows that have `lengths` [B, T] tokens so far."""
    distinct, index = lengths.cpu().unique(return_inverse=True)
    frequencies = torch.stack([rope_frequencies(cfg, length)[0] for length in distinct.tolist()])
    angles = positions.cpu().double()[..., None] * frequencies[index]  # on the CPU: Apple GPUs have no fp64
    return angles.cos().float().to(positions.device), angles.sin().float().to(positions.device)


def _lengths_so_far(positions: Tensor, counts: Sequence[int], documents: Tensor | None) -> Tensor:
    """[B, T]: the tokens that each token's row, or document, has once this call's `counts` real ones are in it."""
    ends = torch.tensor(counts, device=positions.device)[:, None]
    real = torch.arange(positions.shape[1], device=positions.device) < ends
    run = torch.zeros_like(real, dtype=torch.long) if documents is None else _document_runs(documents)[0]
    longest = run.new_zeros(len(run), positions.shape[1] + 1)
    return longest.scatter_reduce(1, run, torch.where(real, positions + 1, 1), "amax").gather(1, run)


class Rope:
    """The tables that a model last needed. They only grow, to the next power of two; they are in no state dict."""

    def __init__(self) -> None:
        self.builds = 0
        self._made_for: tuple = ()
        self._tables: tuple[Tensor, Tensor] | None = None

    def tables(self, cfg: ModelConfig, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [>= positions, D/2]; of dynamic scaling, those of rows within the original context."""
        made_for = (cfg.rope_theta, cfg.rope_scaling, cfg.head_size, cfg.original_context, device)
        size = len(self._tables[0]) if self._tables else 0
        if made_for != self._made_for or positions > size:
            size = max(size, 1 << (positions - 1).bit_length())
            cos, sin = rope_tables(cfg, size)  # on the CPU: Apple GPUs have no fp64
            self._tables = cos.to(device), sin.to(device)
            self._made_for = made_for
            self.builds += 1
        return self._tables


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of x [B, heads, T, D] by the angles of cos, sin [B|1, 1, T, D/2], in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# --- the cache --------------------------------------------------------------------------------------------------------


# Where the tokens of a call go: from this slot on, in all rows alike, or (rows, tokens, slots) one by one.
CacheSlots = int | tuple[Tensor, Tensor, Tensor]


class LayerState(Protocol):
    """What a router keeps of a request, in place of its layer's keys and values of all tokens."""

    @property
    def nbytes(self) -> int: ...
    def advance(self) -> None: ...
    def select(self, rows: Sequence[int]) -> None: ...
    def crop(self, length: int) -> None: ...


class KVCache:
    """Keys and values of one request: an argument of the forward, owned by the request, gone with it.

    Rows may have different lengths: row b holds `lengths[b]` tokens in its first slots, whatever lies behind them is
    never attended to. Memory is allocated by the first use and doubles up to `length` slots. Only the model advances
    the clock, after all layers have run, so an exception in the middle of a forward leaves the cache as it was.
    """

    def __init__(self, cfg: ModelConfig, batch: int, dtype: torch.dtype | None = None, length: int | None = None):
        self.length = length or cfg.context  # the most tokens that a row will ever hold
        self.dtype = dtype  # None: that of the keys as computed
        self.lengths = [0] * batch  # on the host, so that choosing a kernel needs no device sync
        self.capacity = 0
        self._keys: list[Tensor | None] = [None] * cfg.num_hidden_layers  # each [B, K, capacity, D]
        self._values: list[Tensor | None] = [None] * cfg.num_hidden_layers
        self.layer_state: dict[int, LayerState] = {}  # of layers with a router, which makes it on first use

    @property
    def nbytes(self) -> int:
        dense = sum(t.nbytes for t in (*self._keys, *self._values) if t is not None)
        return dense + sum(state.nbytes for state in self.layer_state.values())

    def reserve(self, slots: int) -> None:
        """Make room for rows of `slots` tokens."""
        if slots > self.length:
            raise ValueError(f"the cache is made for {self.length} tokens per row, this call needs {slots}")
        if slots > self.capacity:
            self.capacity = min(max(slots, 2 * self.capacity), self.length)

    def write(self, layer: int, k: Tensor, v: Tensor, slots: CacheSlots, keys: int) -> tuple[Tensor, Tensor]:
        """Write k, v [B, K, T, D] to their slots; return the first `keys` slots of each, [B, K, S, D]."""
        for tensors, new in ((self._keys, k), (self._values, v)):
            tensors[layer] = grow(tensors[layer], new, len(new), self.capacity, self.dtype)
            write_slots(tensors[layer], new, slots)
        return self._keys[layer][:, :, :keys].to(k.dtype), self._values[layer][:, :, :keys].to(v.dtype)

    def advance(self, counts: Sequence[int]) -> None:
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        for state in self.layer_state.values():
            state.advance()

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat or reorder rows (beam search; rows that have ended)."""
        if list(rows) == list(range(len(self.lengths))):
            return
        self.lengths = [self.lengths[row] for row in rows]
        for state in self.layer_state.values():
            state.select(rows)
        for tensors in (self._keys, self._values):
            for layer, tensor in enumerate(tensors):
                if tensor is not None:
                    tensors[layer] = tensor[torch.tensor(rows, device=tensor.device)]

    def crop(self, length: int) -> None:
        """Forget everything from position `length` on."""
        self.lengths = [min(max(length, 0), old) for old in self.lengths]
        for state in self.layer_state.values():
            state.crop(length)

    def free(self) -> None:
        """Give the memory back and start over."""
        self.lengths, self.capacity = [0] * len(self.lengths), 0
        self._keys, self._values = [None] * len(self._keys), [None] * len(self._values)
        self.layer_state = {}


def grow(old: Tensor | None, like: Tensor, batch: int, capacity: int, dtype: torch.dtype | None = None) -> Tensor:
    """[batch, heads, capacity, size] with the contents of `old`; heads, size, device and type as `like` has them."""
    if old is not None and old.shape[2] == capacity:
        return old
    _, heads, _, size = like.shape
    # Zeros, not empty: a masked weight is exactly 0, but 0 x NaN from uninitialised memory would be NaN.
    grown = torch.zeros(batch, heads, capacity, size, dtype=dtype or like.dtype, device=like.device)
    if old is not None:
        grown[:, :, : old.shape[2]] = old
    return grown


def cast_saturating(new: Tensor, dtype: torch.dtype) -> Tensor:
    """To the cache's type. fp16 saturates: an inf in the cache would become NaN in the softmax."""
    if dtype == torch.float16 and new.dtype != torch.float16:
        largest = torch.finfo(torch.float16).max
        new = new.clamp(-largest, largest)
    return new.to(dtype)


def write_slots(cache: Tensor, new: Tensor, slots: CacheSlots) -> None:
    """Write new [B, heads, T, size] into cache [B, heads, capacity, size]."""
    new = cast_saturating(new, cache.dtype)
    if isinstance(slots, int):
        cache[:, :, slots : slots + new.shape[2]] = new
    else:
        rows, tokens, index = slots
        cache[rows, :, index] = new[rows, :, tokens]


# --- who may look at whom ---------------------------------------------------------------------------------------------

MaskRule = Callable[[Tensor, Tensor, Tensor], Tensor]  # (row, query position, key position) -> may look, broadcast


class Context(NamedTuple):
    """What all layers of one forward share."""

    positions: Tensor  # [B|1, T], for rotary angles and learned positions
    cos: Tensor | None  # [B|1, 1, T, D/2]
    sin: Tensor | None
    mask: Tensor | None  # bool [B|1, 1, T, S], true where a query may look at a key; None: plain causality
    attends_to_any: Tensor | None  # bool [B|1, 1, T, 1], false for a query that may look at nothing; None: all may
    cache: Any  # a KVCache or None; a router may pass its block another object with `write`, and slots of its kind
    slots: Any  # CacheSlots of the new tokens
    keys: int  # S
    # The arguments of the forward, as a router needs them:
    counts: list[int]  # real tokens of each row
    cached: list[int]  # tokens that each row has in the cache
    attn_mask: Tensor | MaskRule | None
    targets: Tensor | None  # [B, T], where some tokens have none
    shared: dict[str, Any]  # what routers compute once per forward
    before: Tensor | None = None  # [B, T, E], the input of the layer before


def boolean_mask(mask: Tensor) -> Tensor:
    """True where a query may look: an additive mask has 0 there and -1e4 or less elsewhere."""
    if mask.dtype == torch.bool:
        return mask
    shape = tuple(mask.shape)
    if not mask.is_floating_point():
        raise ValueError(f"attn_mask {shape}: expected bool or additive float, got {mask.dtype}")
    keep = mask == 0
    if not (keep | (mask <= -1e4)).all():
        raise ValueError(f"attn_mask {shape}: an additive mask holds 0 (look) and -1e4 or less (do not), nothing else")
    return keep


def _mask_from_tensor(mask: Tensor, q_slots: Tensor, keys: int, batch: int) -> tuple[Tensor, Tensor | None]:
    """(bool [B|1, 1, T|1, S], bool [B|1, S] if it only speaks of keys), cut out at absolute positions."""
    shape = tuple(mask.shape)
    mask = boolean_mask(mask)
    if mask.dim() == 2:
        mask = mask[:, None, None, :]
    legal = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1 and mask.shape[3] >= keys
    if not legal or 1 < mask.shape[2] < keys:
        forms = "(B, S), (B, 1, 1, S) or (B, 1, S, S)"
        raise ValueError(f"attn_mask: expected {forms} with B 1 or {batch} and S at least {keys}, got {shape}")
    mask = mask[..., :keys]
    if mask.shape[2] == 1:
        return mask, mask[:, 0, 0]
    # Rows behind the last key are those of padding, whose output nobody reads.
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None]
    return mask[rows, 0, q_slots.clamp(max=keys - 1)][:, None], None


def _document_runs(documents: Tensor) -> tuple[Tensor, Tensor]:
    """(number of the run that each token is in, position inside the run), both [B, T]. A new id starts a new run."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = torch.where(starts, index, 0).cummax(dim=1).values
    return starts.cumsum(dim=1), index - first


def _is_contiguous(cached: list[int], tokens: int, keys: int) -> bool:
    """True if all rows start at the same slot and the longest fills the call, so that the write is a slice."""
    return len(set(cached)) == 1 and keys == cached[0] + tokens


def _cache_slots(cached: list[int], counts: list[int], tokens: int, keys: int, device: torch.device) -> CacheSlots:
    if _is_contiguous(cached, tokens, keys):
        return cached[0]  # padding behind shorter rows is written too, and overwritten by their next tokens
    real = [(row, i, cached[row] + i) for row, count in enumerate(counts) for i in range(count)]
    rows, new, slots = torch.tensor(real, dtype=torch.long, device=device).view(-1, 3).unbind(1)
    return rows, new, slots


def _positions_and_mask(
    tokens: Tensor,
    counts: list[int],
    cached: list[int],
    keys: int,
    attn_mask: Tensor | MaskRule | None,
    documents: Tensor | None,
    allow_future: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(positions, mask, attends_to_any) of tokens [B, T], `counts` of them real, behind `cached` ones; `keys` in all.

    The names and shapes are those of Context.
    """
    (batch, count), device = tokens.shape, tokens.device
    if len(set(cached)) == 1:  # made on the device: a copy from the host would wait for it
        q_slots = torch.arange(cached[0], cached[0] + count, device=device)[None]  # [B|1, T]
    else:
        q_slots = torch.tensor(cached, device=device)[:, None] + torch.arange(count, device=device)
    custom = attn_mask is not None or allow_future
    plain = not custom and documents is None and (count == 1 or cached[0] == 0)
    if plain and _is_contiguous(cached, count, keys):
        return q_slots, None, None

    k_slots = torch.arange(keys, device=device)
    last_key = q_slots  # query i of a call looks at all cached keys and at the new ones up to i
    if allow_future:  # at all real keys
        ends = [old + new - 1 for old, new in zip(cached, counts, strict=True)]
        last_key = torch.tensor(ends, device=device)[:, None].expand(-1, count)
    mask = k_slots <= last_key[:, None, :, None]  # [B|1, 1, T, S]
    positions = q_slots
    if callable(attn_mask):
        rows = torch.arange(batch, device=device)[:, None, None, None]
        mask = mask & attn_mask(rows, q_slots[:, None, :, None], k_slots)
    elif attn_mask is not None:
        allowed, real_keys = _mask_from_tensor(attn_mask.to(device), q_slots, keys, batch)
        mask = mask & allowed
        if real_keys is not None:  # padding on the left: positions count real tokens only
            real_before = (real_keys.long().cumsum(dim=1) - 1).clamp(min=0)
            rows = torch.arange(len(real_before), device=device)[:, None]
            positions = real_before[rows, q_slots.clamp(max=keys - 1)]
    if documents is not None:
        runs, positions = _document_runs(documents)
        mask = mask & (runs[:, None, :, None] == runs[:, None, None, :])
    if not custom:
        return positions, mask, None
    # A query that may look at nothing looks at everything, and its output is then replaced by zeros: a softmax over
    # nothing would be NaN, in the backward also for its neighbours.
    attends_to_any = mask.any(-1, keepdim=True)
    return positions, mask | ~attends_to_any, attends_to_any


# --- layers -----------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Divide each vector by its root mean square; the arithmetic is fp32 in every precision."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed).to(x.dtype)


def _norm(cfg: ModelConfig) -> nn.Module:
    if cfg.norm == "rmsnorm":
        return RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
    return nn.LayerNorm(cfg.hidden_size, cfg.rms_norm_eps, bias=cfg.bias)


def _shares_keys(q: Tensor, mask: Tensor | None) -> bool:
    """Flash attention does; the math path that would be taken otherwise writes B x H x T x S scores in fp32."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return mask is None and half and torch.cuda.get_device_capability(q.device) >= (8, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, ctx: Context, dropout: float) -> Tensor:
    """q [B, H, T, D] over k, v [B, K, S, D] -> [B, H, T, D]. Keys are repeated for the heads that share them only where
    no fused kernel of CUDA shares them itself: with a mask, in fp32, and on GPUs before Ampere."""
    batch, heads, tokens, size = q.shape
    if q.is_cuda and tokens > 1 and heads != k.shape[1] and not _shares_keys(q, ctx.mask):
        k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    if tokens == 1:  # the queries of a group become one small matrix over their keys: twice as fast as enable_gqa
        folded = q.reshape(batch, k.shape[1], -1, size)
        y = F.scaled_dot_product_attention(folded, k, v, attn_mask=ctx.mask, dropout_p=dropout)
        y = y.reshape(batch, heads, 1, size)
    else:
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=ctx.mask, dropout_p=dropout, is_causal=ctx.mask is None, enable_gqa=heads != k.shape[1]
        )
    return y if ctx.attends_to_any is None else torch.where(ctx.attends_to_any, y, 0)


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_size, self.dropout = layer, cfg.head_size, cfg.dropout
        q_size, kv_size = cfg.num_attention_heads * cfg.head_size, cfg.num_key_value_heads * cfg.head_size
        biased = cfg.qkv_bias or cfg.bias
        self.q_proj = nn.Linear(cfg.hidden_size, q_size, bias=biased)
        self.k_proj = nn.Linear(cfg.hidden_size, kv_size, bias=biased)
        self.v_proj = nn.Linear(cfg.hidden_size, kv_size, bias=biased)
        self.o_proj = nn.Linear(q_size, cfg.hidden_size, bias=cfg.bias)
        self.q_norm = RMSNorm(cfg.head_size, cfg.rms_norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_size, cfg.rms_norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """[B, T, E] -> [B, T, E]"""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if ctx.cos is not None:
            q, k = rotate(q, ctx.cos, ctx.sin), rotate(k, ctx.cos, ctx.sin)
        if ctx.cache is not None:
            k, v = ctx.cache.write(self.layer, k, v, ctx.slots, ctx.keys)
        y = attend(q, k, v, ctx, self.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gated = cfg.mlp == "swiglu"
        if self.gated:
            self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.bias)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.bias)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class Block(nn.Module):
    """One pre-norm layer, both residual additions included."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = _norm(cfg)
        self.self_attn = Attention(cfg, layer)
        self.j = nn.LayerNorm(cfg.hidden_size, cfg.rms_norm_eps, bias=cfg.j_bias) if cfg.j_branch else None
        self.post_attention_layernorm = _norm(cfg)
        self.mlp = MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        normed = self.input_layernorm(x)
        x = x + self.drop(self.self_attn(normed, ctx))
        if self.j is not None:
            x = x + self.j(normed)
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))


def _embedding(rows: int, size: int) -> nn.Embedding:
    # On the meta device, where weights are loaded later, `normal_` would import torch._dynamo: 0.6 s for nothing.
    return nn.Embedding(rows, size, _weight=torch.empty(rows, size) if torch.empty(0).is_meta else None)


class Decoder(nn.Module):
    """Embeddings, layers and the last norm: the part that Hugging Face calls `model`."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.embed_tokens = _embedding(cfg.vocab_size, cfg.hidden_size)
        if cfg.positions == "learned":
            self.embed_positions = _embedding(cfg.max_position_embeddings, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_hidden_layers))
        self.norm = _norm(cfg)


# --- the loss ---------------------------------------------------------------------------------------------------------


class HeadSums(NamedTuple):
    """Over all targets. Only the first carries a gradient."""

    loss: Tensor  # weighted cross-entropy, plus the z-loss
    cross_entropy: Tensor  # weighted
    unweighted: Tensor  # cross-entropy as if all weights were 1
    log_z_squares: Tensor


def logits_per_chunk(device: torch.device) -> int:
    return LOGITS_PER_CHUNK_CUDA if device.type == "cuda" else LOGITS_PER_CHUNK


def cross_entropy_with_gradient(
    logits: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float
) -> tuple[Tensor, Tensor]:
    """The HeadSums [4] of logits [N, V], and the gradient of their first with respect to the logits.

    With p = softmax(logits), that of a row's cross-entropy is p - onehot(target), that of (log Z)^2 is 2 log Z p.
    """
    real, index, dtype = targets != IGNORE, targets.clamp(min=0)[:, None], logits.dtype
    logits = logits.float()
    log_p = logits.log_softmax(-1)
    losses = torch.where(real, -log_p.gather(1, index)[:, 0], 0)
    log_z = torch.where(real, logits.gather(1, index)[:, 0] + losses, 0)
    weighted, counted = losses, real.float()
    if weights is not None:
        weighted, counted = losses * weights, counted * weights
    squares = log_z.square().sum()
    sums = torch.stack([weighted.sum() + z_loss * squares, weighted.sum(), losses.sum(), squares])
    del logits  # log_p takes its place
    gradient = log_p.exp_().mul_((counted + 2 * z_loss * log_z)[:, None])
    if torch.compiler.is_compiling():  # in one pass over the logits, which scattering would not be
        ids = torch.arange(gradient.shape[1], device=gradient.device)
        return sums, torch.where(ids == index, gradient - counted[:, None], gradient).to(dtype)
    return sums, gradient.scatter_add_(1, index, -counted[:, None]).to(dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """HeadSums of the logits hidden [N, E] @ weight.T, `rows` of them at a time.

    The forward makes the gradients too: neither are logits kept for the backward, nor computed twice. The gradient of
    the weight is summed in fp32, whatever the products are computed in.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float, rows: int,
        loss_of_chunk: Callable,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        head = weight.to(dtype) if len(hidden) else weight
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        sums, chunks = torch.zeros(4, device=hidden.device), max(1, -(-len(hidden) // rows))
        size = max(1, -(-len(hidden) // chunks))  # alike, but for the last: a shape that a compiler has seen
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), size):
                part = slice(start, start + size)
                inputs = hidden[part].to(dtype)
                of_chunk, gradient = loss_of_chunk(
                    inputs @ head.T, targets[part], None if weights is None else weights[part], z_loss
                )
                sums += of_chunk
                if wants_hidden:
                    d_hidden[part] = gradient @ head
                if wants_weight and dtype == torch.float32:
                    torch.addmm(d_weight, gradient.T, inputs, out=d_weight)
                elif wants_weight:
                    d_weight += gradient.T @ inputs
        ctx.gradients, ctx.dtype = (d_hidden, d_weight), weight.dtype
        loss, *others = sums.unbind()
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the loss was differentiated a second time; its gradients were given away the first time"
            )
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None  # multiplied in place: there is no room for copies
        d_hidden = None if d_hidden is None else d_hidden.mul_(upstream)
        d_weight = None if d_weight is None else d_weight.mul_(upstream).to(ctx.dtype)
        return d_hidden, d_weight, None, None, None, None, None


# --- the model --------------------------------------------------------------------------------------------------------


class Router(Protocol):
    """Conditional compute: called in place of a layer, it decides which tokens the layer's block computes.

    It returns the layer's output [B, T, E] and may add named, unweighted penalties (each row's mean, [B]) and
    statistics (tensors) to the two dictionaries. Its parameters are siblings of the decoder's, so they rename none.
    """

    def __call__(
        self,
        x: Tensor,
        ctx: Context,
        block: Callable[[Tensor, Context], Tensor],
        penalties: dict[str, Tensor],
        stats: dict[str, Tensor],
    ) -> Tensor: ...


class Output(NamedTuple):
    hidden: Tensor  # [B, T, E], after the last norm
    logits: Tensor | None  # fp32 [B, T, V]; with a cache [B, 1, V], each row's last token; None with targets
    loss: Tensor | None  # summed over the targets; in training mode with the z-loss
    weight: Tensor | None  # how many targets there were
    penalties: dict[str, Tensor]  # of routers, means of each row, [B]
    stats: dict[str, Tensor]
    sums: HeadSums | None = None  # what the loss is made of


def _counts(tokens: Tensor, lengths: Sequence[int] | Tensor | None) -> list[int]:
    """How many tokens of each row are real. On the host, so that choosing a kernel needs no device sync."""
    batch, count = tokens.shape
    counts = [count] * batch if lengths is None else [int(n) for n in lengths]
    if len(counts) != batch or min(counts) < 0 or max(counts) > count:
        raise ValueError(f"lengths: expected {batch} of 0 to {count}, got {counts}")
    return counts


def _last_real(hidden: Tensor, counts: Sequence[int], cache: KVCache | None) -> Tensor:
    """All positions, but with a cache only each row's last real one: [B, 1, E]."""
    if cache is None or hidden.shape[1] == 1:
        return hidden
    last = torch.tensor(counts, device=hidden.device) - 1
    return hidden[torch.arange(len(last), device=hidden.device), last.clamp(min=0)][:, None]


class GPT(nn.Module):
    def __init__(self, cfg: ModelConfig, routers: dict[int, Router] | None = None):
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg)
        # A tied head is the embedding itself: no second name, as in published tied files.
        self.lm_head = None if cfg.tie_word_embeddings else nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.routers = nn.ModuleDict({str(layer): router for layer, router in (routers or {}).items()})
        self.routing: Any = None  # the configuration that the routers were made from, if any
        self.drop = nn.Dropout(cfg.dropout)
        self.rope = Rope()
        self.checkpoint_activations = False  # recompute each layer in the backward instead of keeping its activations
        self.z_loss = 0.0  # weight of the squares of log Z in the loss; like dropout, of training mode alone
        self.loss_of_chunk = cross_entropy_with_gradient  # or a compiled copy of it
        init_weights(self)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        documents: Tensor | None = None,
        attn_mask: Tensor | MaskRule | None = None,
        allow_future: bool = False,
        at: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Output:
        """Run tokens [B, T] and return logits, or with targets [B, T] (already shifted, -100: none) the summed loss.

        lengths    how many of each row's T tokens are real; the rest is padding on the right
        documents  [B, T] ids; tokens of different documents do not see each other, positions restart
        attn_mask  which keys a query sees, by absolute position: bool or additive, (B, S), (B, 1, 1, S), (B, 1, S, S),
                   or a rule (row, query, key) -> bool. It restricts causality; with allow_future it replaces it
        at         [N] indices of the flat targets [B * T] that are not -100, if known: no other logits are computed
        weights    [B, T] factors on each target's loss
        """
        if tokens.dim() != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens: expected shape (B, T) with at least one token, got {tuple(tokens.shape)}")
        counts = _counts(tokens, lengths)
        # Without `at` every token has a target: no host sync to find out.
        sparse = targets if at is not None else None
        ctx = self._context(tokens, counts, cache, documents, attn_mask, allow_future, sparse)
        x = self.model.embed_tokens(tokens)
        if self.cfg.positions == "learned":
            x = x + self.model.embed_positions(ctx.positions)
        penalties: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        hidden = self.model.norm(self._run_layers(self.drop(x), ctx, penalties, stats))
        if cache is not None:
            cache.advance(counts)
        if targets is None:
            return Output(hidden, self.logits(_last_real(hidden, counts, cache)), None, None, penalties, stats)
        if lengths is not None:
            ends = torch.tensor(counts, device=tokens.device)[:, None]
            targets = targets.masked_fill(torch.arange(tokens.shape[1], device=tokens.device) >= ends, IGNORE)
        sums = self._summed_loss(hidden, targets, at, weights)
        return Output(hidden, None, sums.loss, (targets != IGNORE).sum(), penalties, stats, sums)

    def _run_layers(self, x: Tensor, ctx: Context, penalties: dict[str, Tensor], stats: dict[str, Tensor]) -> Tensor:
        before = x
        for layer, block in enumerate(self.model.layers):
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            if str(layer) in self.routers:
                y = self.routers[str(layer)](x, ctx._replace(before=before), block, penalties, stats)
            else:
                y = block(x, ctx)
            x, before = y, x
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] -> fp32 [..., V]"""
        return F.linear(hidden, self.get_output_embeddings().weight).float()

    def new_cache(self, rows: int, dtype: torch.dtype | None, length: int) -> KVCache:
        return KVCache(self.cfg, rows, dtype, length)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        if self.lm_head is not None and embedding.num_embeddings != self.cfg.vocab_size:
            sizes = f"{self.cfg.vocab_size} rows as the head has, got {embedding.num_embeddings}"
            raise ValueError(f"embedding: expected {sizes}; resize_vocab changes both")
        self.model.embed_tokens = embedding
        self.cfg = replace(self.cfg, vocab_size=embedding.num_embeddings)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head or self.model.embed_tokens

    @torch.no_grad()
    def resize_vocab(self, vocab_size: int) -> None:
        """Cut or extend embedding and head; a new row is the mean of the old ones."""
        for owner, name in ((self.model, "embed_tokens"), (self, "lm_head")):
            old = getattr(owner, name)
            if old is None:
                continue
            common = min(vocab_size, old.weight.shape[0])
            weight = old.weight.mean(0, keepdim=True).repeat(vocab_size, 1)
            weight[:common] = old.weight[:common]
            old.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
            setattr(old, "num_embeddings" if name == "embed_tokens" else "out_features", vocab_size)
        self.cfg = replace(self.cfg, vocab_size=vocab_size)

    def _context(
        self,
        tokens: Tensor,
        counts: list[int],
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        attn_mask: Tensor | MaskRule | None = None,
        allow_future: bool = False,
        targets: Tensor | None = None,
    ) -> Context:
        count = keys = tokens.shape[1]
        cached = [0] * len(tokens)
        longest = max(counts)
        if cache is not None:
            self._check_cache(cache, tokens, documents)
            cached = cache.lengths
            keys = longest = max(old + new for old, new in zip(cached, counts, strict=True))
            cache.reserve(keys)
        positions, mask, attends_to_any = _positions_and_mask(
            tokens, counts, cached, keys, attn_mask, documents, allow_future
        )
        cos = sin = None
        reach = max(cached) + count  # padding included: it has positions too
        if self.cfg.positions == "rope":
            if (scaling := self.cfg.rope_scaling) and scaling.rope_type == "dynamic":
                # As transformers generates: keys stay in the cache as they were turned when the row was shorter.
                so_far = _lengths_so_far(positions, counts, documents)
                cos, sin = dynamic_rotation(self.cfg, positions, so_far)
            else:
                positions_to_come = reach if cache is None else max(reach, cache.length)
                cos, sin = (table[positions] for table in self.rope.tables(self.cfg, positions_to_come, tokens.device))
            cos, sin = cos[:, None], sin[:, None]
        elif longest > self.cfg.max_position_embeddings:
            table = self.cfg.max_position_embeddings
            raise ValueError(f"{longest} tokens in a row, but max_position_embeddings is {table}")
        else:
            positions = positions.clamp(max=self.cfg.max_position_embeddings - 1)  # of padding
        slots = _cache_slots(cached, counts, count, keys, tokens.device)
        call = (counts, cached, attn_mask, targets, {})
        return Context(positions, cos, sin, mask, attends_to_any, cache, slots, keys, *call)

    def _check_cache(self, cache: KVCache, tokens: Tensor, documents: Tensor | None) -> None:
        if self.training:
            raise ValueError("a cache is for inference: call model.eval() first")
        if torch.is_grad_enabled():
            raise ValueError("a cache holds no gradients: call the model under torch.no_grad()")
        if documents is not None:
            raise ValueError("documents and a cache cannot be combined: a request is one document")
        if len(cache.lengths) != len(tokens):
            raise ValueError(f"the cache has {len(cache.lengths)} rows, the tokens {len(tokens)}")

    def _summed_loss(self, hidden: Tensor, targets: Tensor, at: Tensor | None, weights: Tensor | None) -> HeadSums:
        """Of hidden [B, T, E]. At most LOGITS_PER_CHUNK logits exist at a time."""
        if targets.shape != hidden.shape[:2]:
            raise ValueError(f"targets: expected {tuple(hidden.shape[:2])}, got {tuple(targets.shape)}")
        hidden, targets, weights = (
            hidden.flatten(0, 1),
            targets.flatten(),
            None if weights is None else weights.flatten(),
        )
        if at is not None:
            hidden, targets, weights = hidden[at], targets[at], None if weights is None else weights[at]
        head, z_loss = self.get_output_embeddings().weight, self.z_loss if self.training else 0.0
        rows = max(1, logits_per_chunk(hidden.device) // self.cfg.vocab_size)
        return HeadSums(*LinearCrossEntropy.apply(hidden, head, targets, weights, z_loss, rows, self.loss_of_chunk))


# --- initialisation ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def init_weights(model: GPT) -> None:
    """Give every parameter of the decoder its first value.

    | parameter                         | first value                                            |
    | --------------------------------- | ------------------------------------------------------ |
    | embeddings, head, q k v gate up   | normal, sigma = 0.02, cut at two sigma                 |
    | o_proj, down_proj                 | the same with sigma / sqrt(2 L): 2 L of them add up    |
    | j (LayerNorm of the third branch) | 0.02 / (2 L): its L outputs all point the residual's way |
    | other norms                       | 1                                                      |
    | biases                            | 0                                                      |
    """
    layers = model.cfg.num_hidden_layers
    for name, parameter in model.named_parameters():
        if name.startswith("routers."):
            continue  # a router initialises itself
        if name.endswith("bias"):
            parameter.zero_()
        elif ".j." in name:
            parameter.fill_(INIT_STD / (2 * layers))
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            _truncated_normal(parameter, INIT_STD / math.sqrt(2 * layers) if residual else INIT_STD)


def _truncated_normal(parameter: Tensor, std: float) -> None:
    # Cut at two sigma, a normal keeps 0.8796 of its standard deviation: start wider, so that `std` comes out.
    wide = std / 0.87962566103423978
    nn.init.trunc_normal_(parameter, std=wide, a=-2 * wide, b=2 * wide)


# --- choosing tokens --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingOptions:
    """How a person lets tokens be chosen. In this order, on fp32 logits: bans, repetition penalty, n-gram ban, minimum
    length, then temperature, top-k, top-p and min-p. Greedy and beams use everything up to the minimum length."""

    max_new_tokens: Count = 128
    min_new_tokens: Count = 0  # eos is banned before that
    temperature: NonNegative = 1.0  # 0: greedy
    top_k: Count = 0  # keep exactly k, equal ones by id; 0: off
    top_p: NonNegative = 1.0  # the fewest tokens that together have at least this probability; 1: off
    min_p: Fraction = 0.0  # keep what has at least this fraction of the largest probability; 0: off
    repetition_penalty: Positive = 1.0  # for ids already in the row: l / r if l >= 0, else l * r
    no_repeat_ngram_size: Count = 0  # ban what would complete an n-gram already in the row; 0: off
    num_beams: Size = 1
    length_penalty: float = 1.0  # a beam's score is its summed log p / length**this
    early_stopping: bool | Literal["never"] = False
    overflow: Literal["error", "stop", "slide"] = "error"  # when prompt and new tokens exceed the context
    stop: tuple[str, ...] = ()  # strings that end a row; one string or any sequence is taken too

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        check_fields(self)
        require("" not in self.stop, "stop", "strings of at least one character", self.stop)
        beams = self.num_beams > 1
        _require(not (beams and self.stop), f"stop and num_beams ({self.num_beams}) cannot be combined")
        _require(not (beams and self.overflow == "slide"), "overflow: slide and num_beams cannot be combined")

    def for_request(self, **known: Any) -> Sampling:
        """These options, beside what only the caller knows."""
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(SamplingOptions)}, **known)


@dataclass(frozen=True)
class Sampling(SamplingOptions):
    """How one request chooses its tokens: the options, and what only the caller knows."""

    eos: int | Iterable[int] | None = ()  # ids that end a row
    banned: Iterable[int] = ()  # ids that are never chosen, such as padding of the vocabulary
    seed: int | None = None  # None: drawn from torch's generator

    def __post_init__(self) -> None:
        eos = () if self.eos is None else (self.eos,) if isinstance(self.eos, int) else tuple(self.eos)
        object.__setattr__(self, "eos", eos)
        object.__setattr__(self, "banned", tuple(self.banned))
        super().__post_init__()


def apply_penalties(logits: Tensor, rows: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling) -> Tensor:
    """Logits [B, V] -> fp32 [B, V] after bans, repetition penalty, n-gram ban and minimum length.

    `rows` are the ids of each row so far, prompt included, of which `new_tokens` are generated.
    """
    logits = logits.float()
    logits = logits.masked_fill(logits.isnan(), -math.inf)
    if sampling.banned:
        logits = logits.index_fill(1, torch.tensor(sampling.banned, device=logits.device), -math.inf)
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for row, ids in enumerate(rows):
            seen[row, torch.tensor(ids, device=logits.device)] = True
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.no_repeat_ngram_size:
        for row, ids in enumerate(rows):
            banned = _completions_of_seen_ngrams(ids, sampling.no_repeat_ngram_size, logits.device)
            logits[row] = logits[row].index_fill(0, banned, -math.inf)
    if sampling.eos and new_tokens < sampling.min_new_tokens:
        logits = logits.index_fill(1, torch.tensor(sampling.eos, device=logits.device), -math.inf)
    return logits


def _completions_of_seen_ngrams(ids: Sequence[int], n: int, device: torch.device) -> Tensor:
    """Every id that followed, somewhere in the row, the n - 1 ids with which the row ends."""
    row = torch.tensor(ids, device=device)
    if len(row) < n:
        return row[:0]
    windows = row.unfold(0, n, 1)  # [len - n + 1, n]
    return windows[(windows[:, :-1] == row[len(row) - n + 1 :]).all(dim=1), -1]


def filter_logits(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Logits [B, V] -> (probabilities [B, M], ids [B, M]), most probable first, 0 for what the filters drop.

    Equal logits are ordered by id. At least one token of each row keeps a probability above 0.
    """
    logits = logits.float().clamp(max=torch.finfo(torch.float32).max)
    logits = logits.masked_fill(logits.isnan(), -math.inf)
    ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    if 0 < top_k < logits.shape[-1]:
        ids = _top_k_ids(logits, top_k)
    logits, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    # Sums of 150,000 fp32 probabilities are off in the fifth digit; Apple GPUs have nothing wider.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    below_best = (logits - logits[:, :1].clamp(min=torch.finfo(torch.float32).min)).to(wide)
    below_best[:, 0] = 0  # also where everything is banned
    probs = (below_best / temperature).softmax(dim=-1)
    before = probs.cumsum(-1) - probs  # probability of everything ahead of a token
    keep = probs >= min_p * probs[:, :1]
    if top_p < 1:
        keep &= before < top_p
    keep[:, 0] = True
    probs = torch.where(keep, probs, 0)
    return probs / probs.sum(-1, keepdim=True), ids


def _top_k_ids(logits: Tensor, k: int) -> Tensor:
    """Ids [B, k] of the k largest, ascending; of equal ones the smaller ids. torch.topk alone picks any of them."""
    threshold = logits.topk(k, dim=-1).values[:, -1:]
    above, equal = logits > threshold, logits == threshold
    room = k - above.sum(-1, keepdim=True)
    keep = above | (equal & (equal.cumsum(-1) <= room))
    return keep.nonzero()[:, 1].view(-1, k)


def sample(logits: Tensor, uniform: Tensor | None = None, **filters: Any) -> Tensor:
    """Logits [B, V] -> one id a row [B]. `uniform` [B] holds a number in [0, 1) for each row; None draws them.

    Temperature 0, and a row in which everything is banned, take the largest logit, of equal ones the smallest id.
    """
    if filters.get("temperature", 1.0) == 0:
        return logits.float().argmax(dim=-1)
    probs, ids = filter_logits(logits, **filters)
    if uniform is None:
        uniform = torch.rand(len(logits), dtype=torch.float64)
    cumulative = probs.cumsum(-1)
    target = uniform.to(probs)[:, None] * cumulative[:, -1:]
    last = (probs > 0).sum(-1, keepdim=True) - 1  # rounding may carry the target past the end
    choice = torch.searchsorted(cumulative, target, right=True).minimum(last)
    return ids.gather(-1, choice)[:, 0]


# --- generation -------------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """One new token of one row."""

    row: int
    token: int
    finish: Literal["eos", "stop", "length", "context"] | None  # why the row ends with it


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, list[int]]:
    """Rows of different lengths -> (ids [B, longest], filled up on the right with `pad`; their lengths)."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
    return padded.to(device), [len(row) for row in rows]


class _Request:
    """What a request keeps between its steps: the cache of its rows, and the prompt that each row came from."""

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        attn_mask: Tensor | MaskRule | None,
        cache_dtype: torch.dtype | None,
        use_cache: bool,
    ):
        self.model, self.attn_mask, self.cache_dtype, self.use_cache = model, attn_mask, cache_dtype, use_cache
        self.prompt_of_row = list(range(len(prompts)))
        self.length = min(max(map(len, prompts)) + sampling.max_new_tokens, model.cfg.context)
        self.restart()

    def restart(self) -> None:
        """Begin with an empty cache."""
        rows = len(self.prompt_of_row)
        self.cache = self.model.new_cache(rows, self.cache_dtype, self.length) if self.use_cache else None

    def logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """fp32 [B, V] for the token after each row. Only what the cache has not seen is fed to the model."""
        cached = self.cache.lengths if self.cache is not None else [0] * len(rows)
        new = [row[start:] for row, start in zip(rows, cached, strict=True)]
        tokens, lengths = pad_rows(new, device=self.model.device)
        if training := self.model.training:  # for this forward alone: between two tokens the caller may use the model
            self.model.eval()
        try:
            out = self.model(tokens, cache=self.cache, lengths=lengths, attn_mask=self._mask())
        finally:
            if training:
                self.model.train()
        logits = out.logits[:, -1]
        if self.cache is None:
            logits = out.logits[torch.arange(len(rows)), torch.tensor(lengths) - 1]
        if not torch.isfinite(logits).any(dim=-1).all():
            raise FloatingPointError("the model gave a row without a single finite logit")
        return logits

    def _mask(self) -> Tensor | MaskRule | None:
        """The caller's mask, for the rows that are still there."""
        if callable(self.attn_mask):
            prompts = torch.tensor(self.prompt_of_row)
            return lambda row, query, key: self.attn_mask(prompts.to(row.device)[row], query, key)
        alike = self.attn_mask is None or len(self.attn_mask) == 1
        return self.attn_mask if alike else self.attn_mask[self.prompt_of_row]

    def select(self, rows: Sequence[int]) -> None:
        self.prompt_of_row = [self.prompt_of_row[row] for row in rows]
        if self.cache is not None:
            self.cache.select(rows)


class RequestError(ValueError):
    """A prompt that this model cannot continue with these settings."""


def _checked_prompts(model: GPT, prompts: Sequence[Sequence[int]] | Tensor, sampling: Sampling) -> list[list[int]]:
    rows = [[int(i) for i in row] for row in prompts]
    if not rows:
        raise RequestError("prompts: expected at least one")
    context, vocab, new_tokens = model.cfg.context, model.cfg.vocab_size, sampling.max_new_tokens
    illegal = [i for i in (*sampling.eos, *sampling.banned) if not 0 <= i < vocab]
    if illegal:
        raise RequestError(f"eos and banned: expected ids of 0 to {vocab - 1}, got {illegal[0]}")
    room = {"error": new_tokens, "stop": min(1, new_tokens)}.get(sampling.overflow)  # None: windows slide
    for number, row in enumerate(rows, start=1):
        if not row:
            raise RequestError(f"prompt {number}: expected at least one token, got none")
        if min(row) < 0 or max(row) >= vocab:
            raise RequestError(f"prompt {number}: expected ids of 0 to {vocab - 1}, got {min(row)} to {max(row)}")
        if room and len(row) + room > context:
            sizes = f"{len(row)} tokens and {new_tokens} new ones"
            raise RequestError(f"prompt {number}: {sizes} exceed the context of {context} (see overflow)")
    return rows


def _random_streams(rows: Sequence[Sequence[int]], seed: int | None) -> list[random.Random]:
    """A source of random numbers for each row, from the seed, the row and how many equal rows come before it: a row
    gets the same text alone and in any batch, and a prompt given twice gets two."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    copies: dict[tuple[int, ...], int] = {}
    streams = []
    for row in map(tuple, rows):
        streams.append(random.Random(f"{seed}/{copies.setdefault(row, 0)}"))
        copies[row] += 1
    return streams


@torch.no_grad()
def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]] | Tensor,
    sampling: Sampling | None = None,
    *,
    decode: Callable[[list[int]], str] | None = None,
    attn_mask: Tensor | MaskRule | None = None,
    cache_dtype: torch.dtype | None = None,
    use_cache: bool = True,
    **values: Any,
) -> Iterator[Event]:
    """Yield an Event for every new token, step by step, row by row.

    sampling   how tokens are chosen; `values` replace fields of it
    decode     ids -> text; stop strings need it. The tokens of a stop string are yielded too; `generate` cuts them
    attn_mask  as in GPT.forward; it must cover prompt and new tokens
    use_cache  False recomputes the whole row for every token: the slow twin
    """
    sampling = replace(sampling or Sampling(), **values)
    if sampling.num_beams > 1:
        raise ValueError("beams cannot be streamed: a beam may still lose to another")
    if sampling.stop and decode is None:
        raise ValueError("stop strings need decode=")
    if attn_mask is not None and sampling.overflow == "slide":
        raise ValueError("overflow: slide moves positions under a custom attn_mask")
    rows, context = _checked_prompts(model, prompts, sampling), model.cfg.context
    request = _Request(model, rows, sampling, attn_mask, cache_dtype, use_cache)
    filters = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    streams, prompt_lengths = _random_streams(rows, sampling.seed), [len(row) for row in rows]
    window_starts = [0] * len(rows)
    if sampling.overflow == "slide":
        window_starts = [0 if len(row) <= context else len(row) - context // 2 for row in rows]
    running = list(range(len(rows)))
    for step in range(sampling.max_new_tokens):
        logits = request.logits([rows[row][window_starts[row] :] for row in running])
        logits = apply_penalties(logits, [rows[row] for row in running], step, sampling)
        uniform = torch.tensor([streams[row].random() for row in running], dtype=torch.float64)
        unfinished = []  # indices into `running`
        for index, (row, token) in enumerate(zip(running, sample(logits, uniform, **filters).tolist(), strict=True)):
            rows[row].append(token)
            finish = _finish_reason(rows[row], prompt_lengths[row], sampling, context, decode)
            if not finish:
                unfinished.append(index)
            yield Event(row, token, finish)
        if len(unfinished) < len(running):
            running = [running[index] for index in unfinished]
            if not running:
                return
            request.select(unfinished)
        full = [row for row in running if len(rows[row]) - window_starts[row] > context]
        if full:  # only with overflow: slide. The last half of a full window is computed again from position 0
            for row in full:
                window_starts[row] = len(rows[row]) - context // 2
            request.restart()


def _finish_reason(
    row: list[int], prompt_length: int, sampling: Sampling, context: int, decode: Callable | None
) -> str | None:
    new_tokens = len(row) - prompt_length
    if row[-1] in sampling.eos:
        return "eos"
    if sampling.stop:
        # A stop string that ends with this token lies within as many tokens as it has bytes, each token having one.
        reach = max(len(stop.encode()) for stop in sampling.stop) + 1
        tail = decode(row[-min(reach, new_tokens) :])
        if any(stop in tail for stop in sampling.stop):
            return "stop"
    if new_tokens == sampling.max_new_tokens:
        return "length"
    return "context" if sampling.overflow == "stop" and len(row) >= context else None


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]] | Tensor,
    sampling: Sampling | None = None,
    *,
    decode: Callable[[list[int]], str] | None = None,
    **values: Any,
) -> list[list[int]]:
    """Rows of ids, prompt and continuation, each of its own length (`pad_rows` makes a tensor of them).

    Takes what `stream` takes. With num_beams > 1 the best beam of each row. eos is part of a row, a stop string is not.
    """
    rows, given = [[int(i) for i in row] for row in prompts], vars(sampling or Sampling()) | values
    if given["num_beams"] > 1:
        return [beams[0].ids for beams in beam_search(model, rows, sampling, **values)]
    starts = [len(row) for row in rows]
    for row, token, finish in stream(model, rows, sampling, decode=decode, **values):
        rows[row].append(token)
        if finish == "stop":
            rows[row][starts[row] :] = _without_stop(rows[row][starts[row] :], given["stop"], decode)
    return rows


def _without_stop(ids: list[int], stop: str | Sequence[str], decode: Callable[[list[int]], str]) -> list[int]:
    """The longest run of tokens whose text ends before the first stop string begins."""
    text, count, strings = decode(ids), len(ids), (stop,) if isinstance(stop, str) else stop
    begin = min(text.index(string) for string in strings if string in text)
    while count and len(decode(ids[:count])) > begin:
        count -= 1
    return ids[:count]


class Beam(NamedTuple):
    ids: list[int]  # prompt and continuation
    score: float  # summed log p of the continuation / its length ** length_penalty


@torch.no_grad()
def beam_search(
    model: GPT,
    prompts: Sequence[Sequence[int]] | Tensor,
    sampling: Sampling | None = None,
    *,
    attn_mask: Tensor | MaskRule | None = None,
    cache_dtype: torch.dtype | None = None,
    use_cache: bool = True,
    **values: Any,
) -> list[list[Beam]]:
    """The finished hypotheses of each prompt, best first. Settings as for `stream`.

    Each step ranks the best candidates over beams x vocabulary: so many that `num_beams` of them can continue even if
    the rest are eos. A candidate that ends (by eos or by length) is pooled if it ranks within the first `num_beams`.
    """
    sampling = replace(sampling or Sampling(), **values)
    prompts = _checked_prompts(model, prompts, sampling)
    request = _Request(model, prompts, sampling, attn_mask, cache_dtype, use_cache)
    limits = [min(sampling.max_new_tokens, model.cfg.context - len(prompt)) for prompt in prompts]
    pools: list[list[Beam]] = [[] for _ in prompts]  # finished hypotheses, best first
    beams = [[Beam(prompt, 0.0)] for prompt in prompts]  # scores here are plain sums of log p
    running = [row for row, limit in enumerate(limits) if limit > 0]
    for step in range(max(limits)):
        if not running:
            break
        ids = [beam.ids for row in running for beam in beams[row]]
        log_p = apply_penalties(request.logits(ids).log_softmax(dim=-1), ids, step, sampling)  # not normalised again
        parents, start = [], 0
        for row in running:
            count = len(beams[row])
            candidates = _best_candidates(log_p[start : start + count], beams[row], sampling)
            last = step + 1 == limits[row]
            following, chosen = _advance_beams(beams[row], candidates, pools[row], sampling, step + 1, last)
            if not candidates and not pools[row]:  # everything is banned: return the beams as they are
                pools[row] = [Beam(ids, total / max(1, step) ** sampling.length_penalty) for ids, total in beams[row]]
            if following and not _can_stop(following, pools[row], sampling, step + 1, limits[row]):
                beams[row] = following
                parents += [start + parent for parent in chosen]
            else:
                beams[row] = []
            start += count
        running = [row for row in running if beams[row]]
        if running:
            request.select(parents)
    return [pool or [Beam(prompt, 0.0)] for pool, prompt in zip(pools, prompts, strict=True)]


def _best_candidates(log_p: Tensor, beams: list[Beam], sampling: Sampling) -> list[tuple[float, int, int]]:
    """(summed log p, beam, token), best first, of log_p [beams, V]."""
    totals = log_p + torch.tensor([beam.score for beam in beams], device=log_p.device)[:, None]
    count = max(2, 1 + len(sampling.eos)) * sampling.num_beams
    scores, flat = totals.flatten().topk(min(count, totals.numel()))
    vocab = log_p.shape[1]
    ranked = zip(scores.tolist(), flat.tolist(), strict=True)
    return [(score, index // vocab, index % vocab) for score, index in ranked if score > -math.inf]


def _advance_beams(
    beams: list[Beam],
    candidates: list[tuple[float, int, int]],
    pool: list[Beam],
    sampling: Sampling,
    length: int,
    last: bool,
) -> tuple[list[Beam], list[int]]:
    """Move the candidates that end to the pool; return the beams that continue and the indices of their parents."""
    following, parents = [], []
    for rank, (score, parent, token) in enumerate(candidates):
        ids = [*beams[parent].ids, token]
        if last or token in sampling.eos:
            if rank < sampling.num_beams:
                pool.append(Beam(ids, score / length**sampling.length_penalty))
                pool.sort(key=lambda beam: -beam.score)  # stable: of equal ones the earlier stays ahead
                del pool[sampling.num_beams :]
        elif len(following) < sampling.num_beams:
            following.append(Beam(ids, score))
            parents.append(parent)
    return following, parents


def _can_stop(beams: list[Beam], pool: list[Beam], sampling: Sampling, length: int, limit: int) -> bool:
    """True if the pool is full and no running beam is expected to beat the worst in it."""
    if len(pool) < sampling.num_beams:
        return False
    if sampling.early_stopping is True:
        return True
    reach = limit if sampling.early_stopping == "never" and sampling.length_penalty > 0 else length
    return beams[0].score / reach**sampling.length_penalty <= pool[-1].score
