"""Conditional compute: in routed layers a block computes some of the tokens, and the others pass through unchanged.

Three rules select them in training (`topk`, the best of each row by a score):
    mod    Mixture-of-Depths: the score is a learned projection of the layer's input (arXiv 2404.02258)
    dtf    surprise over depth: how far the dense layer before moved a token, against what a small prior expected
    tdtf   surprise over time: how far this layer would move a token, against what the token before it lets expect

The best of a row are known only when the row is complete: such a selection cannot generate text, and a loss measured
with it is non-causal. At inference (`causal`, what `eval()` selects) each layer's CausalRouter therefore decides by the
token and the one before it alone. It learns in training which tokens are selected, and a threshold makes the fraction
that it selects the capacity.

Letters in shapes are those of model.py; N are the selected tokens of a row, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model as dense
from model import GPT, INIT_STD, Context, KVCache, ModelConfig, RMSNorm

SLOTS = 32  # selected tokens are computed in groups of as many: then matrix products on a CPU round in one way
Block = Callable[[Tensor, Context], Tensor]
Tensors = dict[str, Tensor]
# Modules that are trained in full beside adapters, by kind: everything that a dense checkpoint does not have.
MODULES_TO_SAVE = {
    "dense": (),
    "mod": ("mod_router", "causal_router"),
    "dtf": ("prior_ffn", "surprise_router", "causal_router"),
    "tdtf": ("transition_net", "surprise_router", "causal_router"),
}
LOG_EPSILON = 1e-10  # added inside the logarithm of o_ce
FULL_CAPACITY_BIAS = 9.0  # a causal router's first bias at capacity 1, whose logit would be infinite


@dataclass(frozen=True)
class RoutingConfig:
    """Which layers compute a share of the tokens, and by which rule; `auto` is what the rule's authors recommend."""

    kind: Literal["dense", "mod", "dtf", "tdtf"] = "dense"
    layers: tuple[int, ...] = ()
    capacity: Annotated[float, dense.Bound(0, 1, open_low=True)] | Literal["auto"] = "auto"
    capacity_warmup: dense.Fraction = 0.0
    gate: Literal["auto", "soft", "ste", "hard", "raw"] = "auto"
    surprise_grad: bool | Literal["auto"] = "auto"
    prior_factor: Annotated[float, dense.Bound(0, 4, open_low=True)] = 0.0625
    ma_window: dense.Size = 100
    o_ce_init: dense.Positive = 1.025
    m_cu_init: dense.Positive = 1.1
    beta_ce_init: float = -0.3
    beta_cu_init: float = -0.6
    beta_mode: Literal["learned", "linear", "cosine"] = "learned"
    beta_start: dense.Positive = 0.3
    beta_end: dense.Positive = 6.0
    beta_warmup: dense.Count = 0
    mod_aux: Literal["bce", "load", "none"] = "bce"
    normalise: bool = True
    causal_threshold: dense.OpenFraction = 0.5
    calibrate_tokens: dense.Count = 16_384
    causal_loss_weight: dense.NonNegative = 0.01
    prior_loss_weight: dense.NonNegative = 0.05
    tpn_loss_weight: dense.NonNegative = 0.05
    mod_aux_loss_weight: dense.NonNegative = 0.01
    mod_z_loss_weight: dense.NonNegative = 0.0
    causal_lr: dense.Positive | None = 1e-3
    surprise_lr: dense.Positive | None = 1e-2
    prior_lr: dense.Positive | None = None
    mod_lr: dense.Positive | None = None

    def __post_init__(self) -> None:
        dense.check_fields(self)
        dense.require(
            self.gate != "raw" or self.kind == "mod", "gate", "soft, ste or hard (raw is for mod alone)", self.gate
        )
        ascending = list(self.layers) == sorted(set(self.layers)) and min(self.layers, default=1) >= 1
        dense.require(ascending, "layers", "ascending layers from 1 on (layer 0 stays dense)", self.layers)
        paired = self.kind != "dtf" or all(b - a > 1 for a, b in zip(self.layers, self.layers[1:], strict=False))
        dense.require(paired, "layers", "a dense layer before each routed one for dtf", self.layers)

    @property
    def share(self) -> float:
        """Of the tokens that a routed layer computes, once a warm-up is over."""
        if self.capacity != "auto":
            return self.capacity
        return {"dense": 1.0, "mod": 0.125}.get(self.kind, 0.5)

    @property
    def gating(self) -> str:
        """tdtf's score needs the block's own output, which in use does not exist: there the gate is 1."""
        return self.gate if self.gate != "auto" else "ste" if self.kind == "tdtf" else "soft"

    @property
    def through_surprise(self) -> bool:
        """Whether the loss may move the backbone by way of its surprise signals."""
        return self.surprise_grad if self.surprise_grad != "auto" else self.kind == "dtf"


def routed_layers(cfg: ModelConfig, routing: RoutingConfig) -> tuple[int, ...]:
    """Which layers are routed: those that are listed, else every second from layer 1 on."""
    count = cfg.num_hidden_layers
    if routing.kind == "dense":
        return ()
    dense.require(count >= 2, "num_hidden_layers", f"2 or more with routing.kind {routing.kind}", count)
    layers = routing.layers or tuple(range(1, count, 2))
    dense.require(layers[-1] < count, "routing.layers", f"layers below {count}", layers)
    return layers


def penalty_weights(routing: RoutingConfig) -> dict[str, float]:
    """The factor on each penalty in the loss, by the penalty's name."""
    causal = {"causal_loss": routing.causal_loss_weight}
    weights = {
        "dense": {},
        "mod": causal | {"mod_aux_loss": routing.mod_aux_loss_weight, "mod_z_loss": routing.mod_z_loss_weight},
        "dtf": causal | {"prior_loss": routing.prior_loss_weight},
        "tdtf": causal | {"tpn_loss": routing.tpn_loss_weight},
    }[routing.kind]
    if routing.mod_aux == "none":
        weights.pop("mod_aux_loss", None)
    return weights


# --- which tokens -----------------------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """The tokens of each row that a block computes, padded to the row with the most of them."""

    index: Tensor  # [B, N], ascending
    real: Tensor | None  # bool [B, N]; None: no padding
    mask: Tensor  # bool [B, T], the same as a mask


def row_capacity(share: float, tokens: int) -> int:
    """How many of a row's tokens are selected: at least one. The millionth undoes 0.29 * 100 = 28.999..."""
    return min(tokens, max(1, math.floor(share * tokens + 1e-6)))


def select_top(score: Tensor, valid: Tensor | None, share: float) -> Chosen:
    """The highest scores of each row [B, T]; of equal ones the earlier. Padding is never selected."""
    batch, count = score.shape
    score, real = score.detach().float(), None
    if valid is not None:
        score = score.masked_fill(~valid, -math.inf)
    order = score.sort(dim=1, descending=True, stable=True).indices
    if valid is None:  # all rows have as many, known without asking the device
        index = order[:, : row_capacity(share, count)].sort(dim=1).values
    else:
        capacities = torch.tensor([row_capacity(share, n) for n in valid.sum(1).tolist()], device=score.device)
        width = max(1, int(capacities.max()))
        real = torch.arange(width, device=score.device) < capacities[:, None]
        # Padding goes behind all selected tokens, so that "earlier in N" means "earlier in the row".
        index = order[:, :width].masked_fill(~real, count).sort(dim=1).values.clamp(max=count - 1)
    ones = torch.ones_like(index, dtype=torch.bool) if real is None else real
    mask = torch.zeros(batch, count, dtype=torch.long, device=score.device).scatter_add(1, index, ones.long()) > 0
    return Chosen(index, real, mask)


def from_mask(mask: Tensor, width: int) -> Chosen:
    """The tokens of a mask [B, T] with at most `width` in a row."""
    order = mask.byte().sort(dim=1, descending=True, stable=True).indices
    real = torch.arange(width, device=mask.device) < mask.sum(1, keepdim=True)
    return Chosen(order[:, :width], real, mask)


def valid_tokens(ctx: Context) -> Tensor | None:
    """bool [B, T], false for padding: by lengths, by a mask of keys, or behind a row's last target. None: no padding.

    It is the same in all layers, so it is computed once per forward.
    """
    if "valid" not in ctx.shared:
        ctx.shared["valid"] = _find_valid_tokens(ctx)
    return ctx.shared["valid"]


def _find_valid_tokens(ctx: Context) -> Tensor | None:
    count, device, mask = ctx.positions.shape[1], ctx.positions.device, ctx.attn_mask
    index = torch.arange(count, device=device)
    conditions = []
    if min(ctx.counts) < count:
        conditions.append(index < torch.tensor(ctx.counts, device=device)[:, None])
    if isinstance(mask, Tensor) and (mask.dim() == 2 or mask.shape[2] == 1):
        slots = torch.tensor(ctx.cached, device=device)[:, None] + index
        keys = dense.boolean_mask(mask.to(device)).flatten(1).expand(len(slots), -1)
        conditions.append(keys.gather(1, slots.clamp(max=keys.shape[1] - 1)))
    if ctx.targets is not None:
        conditions.append((ctx.targets != dense.IGNORE).flip(1).cumsum(1).flip(1) > 0)
    return reduce(torch.logical_and, conditions) if conditions else None


# --- the cache of a routed layer --------------------------------------------------------------------------------------


class SelectedSlots(NamedTuple):
    """Where the selected tokens of a call go in a RoutedCache. The call may be on some of the cache's rows alone."""

    cache_rows: Tensor | None  # [B'] rows of the cache that the call is on; None: all, in their order
    owners: Tensor  # [N] rows of the cache
    rows: Tensor  # [N] of the call
    tokens: Tensor  # [N] of the call
    entries: Tensor  # [N] where they go

    def of_call(self, tensor: Tensor) -> Tensor:
        """Rows [B', ...] of a tensor of the cache [B, ...]."""
        return tensor if self.cache_rows is None else tensor[self.cache_rows]


class RoutedCache:
    """A routed layer's part of a KVCache: keys and values of selected tokens alone, each with its slot in the row.

    Beside them a history: a few numbers for every token of the row, selected or not, from which the next decisions
    follow. With numbers for each token it can be cropped; a last hidden state could not.
    """

    def __init__(self, cache: KVCache, device: torch.device):
        self.cache = cache
        self.counts = torch.zeros(len(cache.lengths), dtype=torch.long, device=device)  # entries of each row
        self.max_count = 0  # on the host: an upper bound of the counts
        self._reserved: tuple[Tensor, int] | None = None  # new entries of each row, max_count with them
        self._keys: Tensor | None = None  # [B, K, C, D]
        self._values: Tensor | None = None
        self._slots: Tensor | None = None  # int32 [B, 1, C, 1]
        self._history: Tensor | None = None  # fp32 [B, 1, capacity of the cache, numbers]

    @property
    def nbytes(self) -> int:
        tensors = (self.counts, self._keys, self._values, self._slots, self._history)
        return sum(t.nbytes for t in tensors if t is not None)

    def append_history(self, new: Tensor, slots: dense.CacheSlots) -> Tensor:
        """Write numbers [B, T, N] of new tokens; return those of all slots, [B, capacity, N]."""
        self._history = dense.grow(self._history, new[:, None], len(new), self.cache.capacity)
        dense.write_slots(self._history, new[:, None], slots)
        return self._history[:, 0]

    def reserve(self, new: Tensor, max_count: int) -> None:
        """Announce `new` [B] entries, after which a row has at most `max_count`.

        They count from `advance` on, so that a call which fails leaves no trace.
        """
        self._reserved = new, max_count

    def upper_bound(self, new: int) -> int:
        """How many entries a row may have after `new` more; the device is asked only before the memory grows."""
        if self._keys is not None and self.max_count + new > self._keys.shape[2]:
            self.max_count = int(self.counts.max())
        return self.max_count + new

    def write_slots_of(self, positions: Tensor, slots: SelectedSlots, entries: int) -> Tensor:
        """Write the slots in the row of new entries [N]; return the first `entries` of all, [B', entries]."""
        like = positions.new_empty(1, 1, 1, 1, dtype=torch.int32)
        self._slots = dense.grow(self._slots, like, len(self.counts), self._capacity(self._slots, entries))
        self._slots[slots.owners, 0, slots.entries, 0] = positions.int()
        return slots.of_call(self._slots[:, 0, :entries, 0])

    def write(self, _: int, k: Tensor, v: Tensor, slots: SelectedSlots, entries: int) -> tuple[Tensor, Tensor]:
        """As KVCache.write: write selected k, v [B', K, T, D]; return [B', K, entries, D] of each."""
        capacity = self._capacity(self._keys, entries)
        self._keys = dense.grow(self._keys, k, len(self.counts), capacity, self.cache.dtype)
        self._values = dense.grow(self._values, v, len(self.counts), capacity, self.cache.dtype)
        for tensor, new in ((self._keys, k), (self._values, v)):
            new = new[slots.rows, :, slots.tokens]
            tensor[slots.owners, :, slots.entries] = dense.cast_saturating(new, tensor.dtype)
        keys, values = (slots.of_call(tensor[:, :, :entries]) for tensor in (self._keys, self._values))
        return keys.to(k.dtype), values.to(v.dtype)

    def _capacity(self, tensor: Tensor | None, entries: int) -> int:
        old = 0 if tensor is None else tensor.shape[2]
        return old if entries <= old else min(max(entries, 2 * old), self.cache.length)

    def advance(self) -> None:
        if self._reserved is not None:
            self.counts, self.max_count = self.counts + self._reserved[0], self._reserved[1]
            self._reserved = None

    def select(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self.counts.device)
        for name in ("counts", "_keys", "_values", "_slots", "_history"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor[index])

    def crop(self, length: int) -> None:
        """Slots ascend within a row, so what remains are its first entries."""
        if self._slots is not None:
            real = torch.arange(self._slots.shape[2], device=self.counts.device) < self.counts[:, None]
            self.counts = (real & (self._slots[:, 0, :, 0] < length)).sum(1)
            self.max_count = min(self.max_count, max(length, 0))


# --- the routed operator ----------------------------------------------------------------------------------------------


def apply_to_selected(block: Block, x: Tensor, chosen: Chosen, gate: Tensor | None, ctx: Context) -> Tensor:
    """x [B, T, E] plus, at the chosen tokens, gate [B, T] (None: 1) times the block's update of them.

    The block sees the chosen tokens of each row alone, at their original positions. All other tokens are returned
    unchanged, bit for bit.
    """
    batch, count, _ = x.shape
    index, real, _ = chosen
    flat = index + count * torch.arange(batch, device=x.device)[:, None]
    return _update(block, x, flat, real, gate, _context_without_cache(ctx, index, real))


def _update(block: Block, x: Tensor, flat: Tensor, real: Tensor | None, gate: Tensor | None, ctx: Context) -> Tensor:
    """Gather tokens flat [B', N] of x [B * T], compute them in `ctx`, add their changes to x."""
    shape, flat = flat.shape, flat.flatten()
    inputs = x.flatten(0, 1).index_select(0, flat).view(*shape, -1)
    delta = block(inputs, ctx) - inputs
    if gate is not None:
        delta = delta * gate.flatten().index_select(0, flat).view(*shape, 1)
    if real is not None:  # padding holds some token's values: it adds nothing
        delta = torch.where(real[..., None], delta, 0)
    return x.flatten(0, 1).index_add(0, flat, delta.to(x.dtype).flatten(0, 1)).view_as(x)


def _at(tensor: Tensor | None, rows: Tensor, index: Tensor) -> Tensor | None:
    """tensor [B|1, T, ...] at tokens index [B', N] of rows [B', 1]."""
    if tensor is None:
        return None
    return tensor[0][index] if len(tensor) == 1 else tensor[rows, index]


def _select_positions(ctx: Context, rows: Tensor, index: Tensor) -> Context:
    """The context of tokens index [B', N] of rows [B', 1], but for their mask."""
    cos, sin = (None if t is None else _at(t[:, 0], rows, index)[:, None] for t in (ctx.cos, ctx.sin))
    some = None if ctx.attends_to_any is None else _at(ctx.attends_to_any[:, 0], rows, index)[:, None]
    positions = _at(ctx.positions, rows, index)
    return ctx._replace(positions=positions, cos=cos, sin=sin, attends_to_any=some, shared={}, before=None)


def _context_without_cache(ctx: Context, index: Tensor, real: Tensor | None) -> Context:
    """Of the chosen tokens alone. They keep their order, so plain causality holds among them and needs no mask."""
    rows = torch.arange(len(index), device=index.device)[:, None]
    mask = None
    if ctx.mask is not None:
        mask = _at(ctx.mask[:, 0], rows, index)  # [B, N, S]
        mask = mask.gather(2, index[:, None, :].expand(mask.shape[0], index.shape[1], -1))[:, None]
        if real is not None:  # padding is nobody's key, and as a query may look at anything
            mask = (mask & real[:, None, None, :]) | ~real[:, None, :, None]
    return _select_positions(ctx, rows, index)._replace(mask=mask, keys=index.shape[1])


def apply_with_cache(
    block: Block, x: Tensor, mask: Tensor, gate: Tensor | None, ctx: Context, state: RoutedCache, static: bool
) -> Tensor:
    """As `apply_to_selected`: the tokens of mask [B, T] see the entries of a cache, and are added to them.

    Rows without a selected token are left out, and without any the block does not run. With `static`, single tokens of
    all rows are computed whether selected or not: no shape depends on a decision, so there is no host sync.
    """
    (batch, count), new = mask.shape, mask.sum(1)
    cache_rows = None
    if static and count == 1:
        entries = state.upper_bound(1)
        state.reserve(new, entries)
        index, real = torch.zeros_like(mask, dtype=torch.long), mask
        rows = torch.arange(batch, device=x.device)
        slots = SelectedSlots(None, rows, rows, torch.zeros_like(rows), state.counts)
        ends = state.counts + 1  # the entry of a token that was not selected is overwritten by the next
    else:
        new_counts, old_counts = torch.stack([new, state.counts]).tolist()  # the one host sync
        totals = [a + b for a, b in zip(new_counts, old_counts, strict=True)]
        state.reserve(new, max(totals))
        active = [row for row in range(batch) if new_counts[row]]
        if not active:
            return x
        if len(active) < batch:
            cache_rows = torch.tensor(active, device=x.device)
            mask, new = mask[cache_rows], new[cache_rows]
        index, real, _ = from_mask(mask, max(new_counts))
        entries = max(totals[row] for row in active)
        counts = state.counts if cache_rows is None else state.counts[cache_rows]
        rows, tokens = real.nonzero().unbind(1)
        owners = rows if cache_rows is None else cache_rows[rows]
        slots = SelectedSlots(cache_rows, owners, rows, tokens, counts[rows] + tokens)
        ends = counts + new
    x_rows = (torch.arange(batch, device=x.device) if cache_rows is None else cache_rows)[:, None]  # [B', 1]
    lengths = torch.tensor(ctx.cached, device=x.device)[x_rows]
    entry_slots = state.write_slots_of((lengths + index)[slots.rows, slots.tokens], slots, entries)
    inner = _context_with_cache(ctx, x_rows, index, real, entry_slots, ends)
    inner = inner._replace(cache=state, slots=slots, keys=entries)
    return _update(block, x, index + count * x_rows, real, gate, inner)


def _context_with_cache(ctx: Context, rows: Tensor, index: Tensor, real: Tensor, at: Tensor, ends: Tensor) -> Context:
    """Of the chosen tokens with cached entries at slots `at` [B', S] of the row, the first `ends` [B'] of them."""
    written = torch.arange(at.shape[1], device=at.device) < ends[:, None]
    if ctx.mask is not None:
        mask = _at(ctx.mask[:, 0], rows, index)  # [B', N, keys of the row]
        columns = at.long().clamp(max=mask.shape[2] - 1)[:, None, :].expand(-1, index.shape[1], -1)
        mask = (mask.gather(2, columns) & written[:, None])[:, None] | ~real[:, None, :, None]
    elif ctx.positions.shape[1] == 1:  # one token: it comes behind all entries
        mask = written[:, None, None, :]
    else:  # the first tokens of all rows: plain causality
        mask = None
    return _select_positions(ctx, rows, index)._replace(mask=mask)


# --- the causal router ------------------------------------------------------------------------------------------------


class CausalRouter(nn.Module):
    """Predicts from a token and the one before it whether the token will be among the best of its row.

    A logit is linear in [n(x_t), n(x_t-1)], n dividing by the root mean square. Both terms are projected at once and
    the second is used one token later, so that a single number is kept of a past token.
    """

    def __init__(self, cfg: ModelConfig, routing: RoutingConfig):
        super().__init__()
        share = routing.share
        bias = FULL_CAPACITY_BIAS if share == 1 else math.log(share / (1 - share))  # selects about that fraction
        self.weight = nn.Parameter(INIT_STD * torch.randn(1, 2 * cfg.hidden_size))
        self.bias = nn.Parameter(torch.full((1,), bias))
        self.register_buffer("threshold", torch.tensor(routing.causal_threshold))
        self.eps = cfg.rms_norm_eps if routing.normalise else None

    def project(self, x: Tensor) -> Tensor:
        """x [B, T, E], as a constant -> fp32 [B, T, 2]: a token's term in its own logit, and in the next token's."""
        x = x.detach().float()
        terms = F.linear(x, self.weight.float().view(2, -1))
        if self.eps is not None:
            square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()  # no copy of x, unlike x.square()
            terms = terms * torch.rsqrt(square / x.shape[-1] + self.eps)
        return terms

    def forward(self, terms: Tensor, starts: Tensor, last: Tensor | None) -> Tensor:
        """Logits [B, T]. starts: bool [B, T], tokens with none before them; last: [B], term of the token before."""
        earlier = F.pad(terms[:, :-1, 1], (1, 0))
        if last is not None:
            earlier = torch.cat([last[:, None], earlier[:, 1:]], dim=1)
        return terms[..., 0] + torch.where(starts, 0, earlier) + self.bias.float()

    @torch.no_grad()
    def calibrate(self, logits: Tensor, valid: Tensor | None, share: float) -> None:
        """Set the threshold such that this fraction of the tokens lies above it."""
        logits = logits.flatten() if valid is None else logits[valid]
        if not len(logits):
            return
        probs = logits.sigmoid().sort(descending=True).values
        count = min(len(probs), round(share * len(probs)))
        border = probs[max(0, count - 1) : count + 1]
        self.threshold.copy_(border.mean() if count < len(probs) else torch.zeros(()))


# --- surprise ---------------------------------------------------------------------------------------------------------


class ResidualPrior(nn.Module):
    """A small SwiGLU that predicts an update from a state: norm, w1 and w3, w2. Its layers are not named as those of an
    MLP, so that adapters, which find their targets by name, leave it alone."""

    def __init__(self, cfg: ModelConfig, factor: float):
        super().__init__()
        inner = self.width(cfg, factor)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.w1 = nn.Linear(cfg.hidden_size, inner, bias=False)
        self.w2 = nn.Linear(inner, cfg.hidden_size, bias=False)
        self.w3 = nn.Linear(cfg.hidden_size, inner, bias=False)
        for layer in (self.w1, self.w2, self.w3):
            nn.init.normal_(layer.weight, std=INIT_STD)

    @staticmethod
    def width(cfg: ModelConfig, factor: float) -> int:
        wide = math.ceil(factor * cfg.hidden_size)
        return max(2, wide + wide % 2)  # even

    def forward(self, state: Tensor) -> Tensor:
        """[B, T, E], as a constant -> fp32 [B, T, E]"""
        z = self.norm(state.detach().float())
        w1, w2, w3 = (layer.weight.float() for layer in (self.w1, self.w2, self.w3))
        return F.linear(F.silu(F.linear(z, w1)) * F.linear(z, w3), w2)


class Signals(NamedTuple):
    """Of each token, fp32 [B, T]."""

    ce: Tensor  # expected change: the higher, the better the prior predicted the movement
    cu: Tensor  # unexpected change: positive if the token moved further than the tokens before it
    s_ce: Tensor
    s_cu: Tensor
    rank: Tensor  # the sort key of tokens
    gate: Tensor  # G, probability that either criterion holds


class SurpriseRouter(nn.Module):
    """Four numbers that turn two distances into a score. Positive by softplus; [1] each, since FSDP shards no scalar.

    With a schedule the two betas are buffers with the current value, so that a checkpoint holds it.
    """

    def __init__(self, routing: RoutingConfig):
        super().__init__()
        self.learned = routing.beta_mode == "learned"
        self.o_ce = nn.Parameter(torch.tensor([math.log(math.expm1(routing.o_ce_init))]))
        self.m_cu = nn.Parameter(torch.tensor([math.log(math.expm1(routing.m_cu_init))]))
        for name, raw in (("beta_ce", routing.beta_ce_init), ("beta_cu", routing.beta_cu_init)):
            if self.learned:
                setattr(self, name, nn.Parameter(torch.tensor([float(raw)])))
            else:
                self.register_buffer(name, torch.tensor([routing.beta_start]))

    def effective(self) -> Tensors:
        """The four positive values, [1] each."""
        raw = {name: getattr(self, name).float() for name in ("o_ce", "m_cu", "beta_ce", "beta_cu")}
        fixed = () if self.learned else ("beta_ce", "beta_cu")
        return {name: value if name in fixed else F.softplus(value) for name, value in raw.items()}

    def forward(self, d_st: Tensor, d_ch: Tensor, average: Tensor) -> Signals:
        """From squared lengths of the update (d_st) and of its error (d_ch), and d_st's moving average, fp32 [B, T]."""
        values = self.effective()
        ce = d_st - d_ch + torch.log(values["o_ce"] + LOG_EPSILON)
        cu = d_st - values["m_cu"] * average
        a, c = values["beta_ce"] * ce, values["beta_cu"] * cu
        # 1 - exp(-rank) is the probabilistic "or" of the two; the rank still orders what rounds to 1 there.
        rank = F.softplus(a) + F.softplus(c)
        return Signals(ce, cu, a.sigmoid(), c.sigmoid(), rank, -torch.expm1(-rank))


def window_sums(values: Tensor, age: Tensor, window: int) -> Tensor:
    """Sums [B, T] over the last `window` values up to each, none older than its `age` [B, T] in tokens.

    Composed of sums over 1, 2, 4, ... values: the difference of two long running sums would lose, in fp32, the small
    values behind a large one.
    """

    def earlier(sums: Tensor, by: int) -> Tensor:
        shifted = F.pad(sums, (by, 0))[:, : sums.shape[1]] if by < sums.shape[1] else torch.zeros_like(sums)
        return torch.where(age >= by, shifted, 0) if by else sums

    out, taken, size, block = torch.zeros_like(values), 0, 1, values
    while size <= window:
        if window & size:
            out, taken = out + earlier(block, taken), taken + size
        block, size = block + earlier(block, size), 2 * size
    return out


def moving_average(d_st: Tensor, age: Tensor, valid: Tensor | None, window: int) -> Tensor:
    """Mean of the last `window` values up to each token [B, T], within its document, padding left out."""
    counted = torch.ones_like(d_st) if valid is None else valid.to(d_st.dtype)
    return window_sums(d_st * counted, age, window) / window_sums(counted, age, window).clamp(min=1)


# --- routers ----------------------------------------------------------------------------------------------------------

Mode = Literal["auto", "topk", "causal", "calibrate", "all", "none"]


class Scores(NamedTuple):
    rank: Tensor  # fp32 [B, T], the sort key of tokens
    soft: Tensor  # fp32 [B, T], the factor on the update


class LayerCall(NamedTuple):
    """One call of a router: its arguments, and what all kinds derive from them."""

    x: Tensor  # [B, T, E]
    ctx: Context
    block: Block
    penalties: Tensors
    stats: Tensors
    valid: Tensor | None  # bool [B, T], as `valid_tokens` gives it
    starts: Tensor  # bool [B|1, T], tokens with none before them


class LayerRouter(nn.Module):
    """What the three kinds share: selection, training and use of the causal router, statistics."""

    def __init__(self, cfg: ModelConfig, routing: RoutingConfig, layer: int, layers: int):
        super().__init__()
        self.routing, self.layer, self.part_of_mean = routing, layer, 1 / layers
        self.capacity = routing.share  # `set_step` changes it during a warm-up
        self.mode: Mode = "auto"  # topk in training, causal at inference
        self.static = False  # decode in shapes that no decision changes
        self.causal_router = CausalRouter(cfg, routing)

    def scores(self, call: LayerCall) -> Scores:
        """How the kind orders tokens in training; may add penalties and statistics."""
        raise NotImplementedError

    def causal_gate(self, call: LayerCall, history: Tensor | None) -> Tensor | None:
        """fp32 [B, T], the formula of training where it can be evaluated at inference; None: 1."""
        return None

    def history(self, call: LayerCall, terms: Tensor) -> Tensor:
        """fp32 [B, T, numbers], what later tokens need of each; the first is its term in the next token's logit."""
        return terms[..., 1:]

    def penalise(self, call: LayerCall, scores: Scores, chosen: Tensor) -> None:
        """Add penalties that depend on which tokens were chosen [B, T]."""

    def forward(self, x: Tensor, ctx: Context, block: Block, penalties: Tensors, stats: Tensors) -> Tensor:
        valid = valid_tokens(ctx)
        starts = ctx.positions == 0  # of a row or document
        if valid is not None and valid.shape[1] > 1:  # or the first token behind padding
            starts = starts | F.pad(~valid[:, :-1], (1, 0))
        call = LayerCall(x, ctx, block, penalties, stats, valid, starts)
        mode = self.mode if self.mode != "auto" else "topk" if self.training else "causal"
        return self._forward_topk(call) if mode == "topk" else self._forward_causal(mode, call)

    def _forward_topk(self, call: LayerCall) -> Tensor:
        if call.ctx.cache is not None:
            raise ValueError("routing by topk needs the whole row at once: no cache")
        scores = self.scores(call)
        chosen = select_top(scores.rank, call.valid, self.capacity)
        with torch.autocast(call.x.device.type, enabled=False):
            logits = self.causal_router(self.causal_router.project(call.x), call.starts, None)
            self._causal_loss_and_stats(call, logits, chosen.mask)
            self.penalise(call, scores, chosen.mask)
        call.stats[f"{self.layer}/chosen"] = chosen.mask
        return apply_to_selected(call.block, call.x, chosen, self._training_gate(scores.soft), call.ctx)

    def _training_gate(self, soft: Tensor) -> Tensor | None:
        gating = self.routing.gating
        if gating == "ste":
            return 1 + (soft - soft.detach()) if torch.is_grad_enabled() else None
        return None if gating == "hard" else soft

    def _forward_causal(self, mode: Mode, call: LayerCall) -> Tensor:
        x, ctx = call.x, call.ctx
        state = history = last = None
        with torch.autocast(x.device.type, enabled=False):
            terms = self.causal_router.project(x)
            if ctx.cache is not None:
                if self.layer not in ctx.cache.layer_state:
                    ctx.cache.layer_state[self.layer] = RoutedCache(ctx.cache, x.device)
                state = ctx.cache.layer_state[self.layer]
                history = state.append_history(self.history(call, terms), ctx.slots)
                lengths = torch.tensor(ctx.cached, device=x.device)
                last = history[torch.arange(len(history), device=x.device), (lengths - 1).clamp(min=0), 0]
            logits = self.causal_router(terms, call.starts, last)
            if mode == "calibrate":
                self.causal_router.calibrate(logits, call.valid, self.capacity)
            mask = logits.sigmoid() > self.causal_router.threshold
            if mode in ("all", "none"):
                mask = torch.full_like(mask, mode == "all")
            if call.valid is not None:
                mask = mask & call.valid
            gate = self.causal_gate(call, history)
        call.stats[f"{self.layer}/chosen"] = mask
        call.stats[f"{self.layer}/selected_fraction"] = _mean(mask.float(), call.valid)
        if state is not None:
            return apply_with_cache(call.block, x, mask, gate, ctx, state, self.static)
        # At least one slot, so that all ranks that share a block's weights run it; whole groups of slots, so that the
        # number of later tokens that are selected does not choose another kernel for the earlier ones.
        width = -(-max(1, int(mask.sum(1).max())) // SLOTS) * SLOTS
        chosen = from_mask(mask, min(width, mask.shape[1]))
        return apply_to_selected(call.block, x, chosen, gate, ctx)

    def _causal_loss_and_stats(self, call: LayerCall, logits: Tensor, chosen: Tensor) -> None:
        """The causal router's loss, and its accuracy beside that of a baseline which knows the capacity alone."""
        target = chosen.float()
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        self._add_penalty(call, "causal_loss", loss)
        with torch.no_grad():
            guess = (logits.sigmoid() > self.causal_router.threshold).float()
            selected, guessed = _mean(target, call.valid), _mean(guess, call.valid)
            hits = _mean(guess * target, call.valid)
            stats = {
                "selected_fraction": selected,
                "causal_selected_fraction": guessed,
                "causal_bce": _mean(loss, call.valid),
                "causal_acc": 1 - guessed - selected + 2 * hits,
                "causal_precision": hits / guessed.clamp(min=1e-9),
                "causal_recall": hits / selected.clamp(min=1e-9),
                "causal_acc_baseline": torch.maximum(selected, 1 - selected),
                "causal_bce_baseline": -(torch.xlogy(selected, selected) + torch.xlogy(1 - selected, 1 - selected)),
            }
        call.stats.update({f"{self.layer}/{name}": value for name, value in stats.items()})

    def _add_penalty(self, call: LayerCall, name: str, values: Tensor) -> None:
        """Add this layer's contribution to a penalty: values [B], or the mean of each row of values [B, T]."""
        values = row_means(values, call.valid) if values.dim() == 2 else values
        call.penalties[name] = call.penalties.get(name, 0) + self.part_of_mean * values

    def _add_summary(self, call: LayerCall, name: str, values: Tensor) -> None:
        """Mean, extremes and standard deviation of values [B, T] over all tokens."""
        values = values.detach().float()
        mean = _mean(values, call.valid)
        low, high = values.min(), values.max()
        if (valid := call.valid) is not None:  # 0 where all is padding: an infinity would spoil an average
            low, high = values.masked_fill(~valid, math.inf).min(), values.masked_fill(~valid, -math.inf).max()
            low, high = (torch.where(valid.any(), extreme, 0.0) for extreme in (low, high))
        deviation = _mean((values - mean).square(), valid).sqrt()
        summary = {"": mean, "_min": low, "_max": high, "_std": deviation}
        call.stats.update({f"{self.layer}/{name}{suffix}": value for suffix, value in summary.items()})


def row_means(values: Tensor, valid: Tensor | None) -> Tensor:
    """[B, T] -> [B], padding left out; 0 of a row that is all padding."""
    if valid is None:
        return values.mean(1)
    return torch.where(valid, values, 0).sum(1) / valid.sum(1).clamp(min=1)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return values.mean()
    return torch.where(valid, values, 0).sum() / valid.sum().clamp(min=1)


class MoDRouter(LayerRouter):
    """Mixture-of-Depths: the score is a projection of the layer's input, and its sigmoid the gate."""

    def __init__(self, cfg: ModelConfig, routing: RoutingConfig, layer: int, layers: int):
        super().__init__(cfg, routing, layer, layers)
        self.mod_router = nn.Linear(cfg.hidden_size, 1, bias=False)
        nn.init.normal_(self.mod_router.weight, std=INIT_STD)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.mod_router.weight.float())[..., 0]

    def _soft(self, logits: Tensor) -> Tensor:
        return logits if self.routing.gating == "raw" else logits.sigmoid()

    def scores(self, call: LayerCall) -> Scores:
        with torch.autocast(call.x.device.type, enabled=False):
            logits = self._logits(call.x)
            self._add_summary(call, "router_logit", logits)
            self._add_summary(call, "router_prob", logits.sigmoid())
            self._add_penalty(call, "mod_z_loss", logits.square())
            return Scores(logits, self._soft(logits))

    def penalise(self, call: LayerCall, scores: Scores, chosen: Tensor) -> None:
        logits, target = scores.rank, chosen.float()
        if self.routing.mod_aux == "bce":  # puts the boundary of the selection at a probability of one half
            loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            self._add_penalty(call, "mod_aux_loss", loss)
        elif self.routing.mod_aux == "load":
            gap = row_means(logits.sigmoid(), call.valid) - row_means(target, call.valid)
            self._add_penalty(call, "mod_aux_loss", gap.square())

    def causal_gate(self, call: LayerCall, history: Tensor | None) -> Tensor | None:
        return None if self.routing.gating in ("ste", "hard") else self._soft(self._logits(call.x))


class SurpriseLayerRouter(LayerRouter):
    """What dtf and tdtf share: a token is worth computing when its update is surprising."""

    def __init__(self, cfg: ModelConfig, routing: RoutingConfig, layer: int, layers: int):
        super().__init__(cfg, routing, layer, layers)
        self.surprise_router = SurpriseRouter(routing)

    def _surprise(self, call: LayerCall, penalty: str, update: Tensor, expected: Tensor) -> Scores:
        """Scores from updates and their expectation [B, T, E], which the penalty trains."""
        update = update.float()
        error = (expected - update.detach()).square().mean(-1)
        if self.routing.gating == "hard":  # a gradient of 0 for the four numbers: DDP waits for one of each
            error = error + 0 * sum(p.sum() for p in self.surprise_router.parameters())
        self._add_penalty(call, penalty, error)
        update = update if self.routing.through_surprise else update.detach()
        d_st, d_ch = update.square().mean(-1), (update - expected).square().mean(-1)
        signals = self.surprise_router(d_st, d_ch, self._average(d_st, call))
        for name, value in {"D_st": d_st, "D_ch": d_ch, "CE": signals.ce, "CU": signals.cu}.items():
            call.stats[f"{self.layer}/{name}"] = _mean(value.detach(), call.valid)
        for name, value in {"S_CE": signals.s_ce, "S_CU": signals.s_cu, "G_cont": signals.gate}.items():
            self._add_summary(call, name, value)
        for name, value in self.surprise_router.effective().items():
            call.stats[f"{self.layer}/{name}"] = value.detach()[0]
        return Scores(signals.rank, signals.gate)

    def _average(self, d_st: Tensor, call: LayerCall) -> Tensor:
        age = call.ctx.positions.expand_as(d_st)
        return moving_average(d_st.detach(), age, call.valid, self.routing.ma_window)


class DTFRouter(SurpriseLayerRouter):
    """Surprise over depth: the dense layer before has just moved the tokens, and a prior predicts how."""

    def __init__(self, cfg: ModelConfig, routing: RoutingConfig, layer: int, layers: int):
        super().__init__(cfg, routing, layer, layers)
        self.prior_ffn = ResidualPrior(cfg, routing.prior_factor)

    def scores(self, call: LayerCall) -> Scores:
        before = call.ctx.before
        with torch.autocast(call.x.device.type, enabled=False):
            expected = self.prior_ffn(before)
            return self._surprise(call, "prior_loss", call.x.float() - before.float(), expected)

    def history(self, call: LayerCall, terms: Tensor) -> Tensor:
        d_st = (call.x.float() - call.ctx.before.float()).square().mean(-1, keepdim=True)
        return torch.cat([terms[..., 1:], d_st], dim=-1)

    def causal_gate(self, call: LayerCall, history: Tensor | None) -> Tensor | None:
        """The dense layer before ran on all tokens, so that the gate is known at inference as in training."""
        if self.routing.gating in ("ste", "hard"):
            return None
        update = call.x.float() - call.ctx.before.float()
        d_st, d_ch = update.square().mean(-1), (update - self.prior_ffn(call.ctx.before)).square().mean(-1)
        average = self._average(d_st, call) if history is None else self._average_with_history(d_st, call, history)
        return self.surprise_router(d_st, d_ch, average).gate

    def _average_with_history(self, d_st: Tensor, call: LayerCall, history: Tensor) -> Tensor:
        """The moving average of new tokens [B, T] after those of the request so far: history [B, capacity, 2]."""
        offsets = torch.arange(1 - self.routing.ma_window, 0, device=d_st.device)  # from the first new token
        lengths = torch.tensor(call.ctx.cached, device=d_st.device)[:, None]
        recent = history[..., 1].gather(1, (lengths + offsets).clamp(min=0))
        age = call.ctx.positions.expand_as(d_st)
        recent_age = age[:, :1] + offsets  # below 0: before the row's first token
        valid = torch.ones_like(d_st, dtype=torch.bool) if call.valid is None else call.valid
        values = torch.cat([recent, d_st], dim=1)
        age, valid = torch.cat([recent_age, age], dim=1), torch.cat([recent_age >= 0, valid], dim=1)
        if d_st.shape[1] == 1:  # while decoding, all of it is one window
            return (values * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
        return moving_average(values, age, valid, self.routing.ma_window)[:, len(offsets) :]


class TDTFRouter(SurpriseLayerRouter):
    """Surprise over time: the block's own update, against what the output of the token before lets expect.

    In training the block runs twice: on all tokens as a teacher without gradients, then on the chosen ones.
    """

    def __init__(self, cfg: ModelConfig, routing: RoutingConfig, layer: int, layers: int):
        super().__init__(cfg, routing, layer, layers)
        self.transition_net = ResidualPrior(cfg, routing.prior_factor)

    def scores(self, call: LayerCall) -> Scores:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.routing.through_surprise):
            y = call.block(call.x, call.ctx)
            update = y.float() - call.x.float()
        with torch.autocast(call.x.device.type, enabled=False):
            earlier = F.pad(y.detach()[:, :-1], (0, 0, 1, 0)).masked_fill(call.starts[..., None], 0)
            return self._surprise(call, "tpn_loss", update, self.transition_net(earlier))


ROUTERS: dict[str, type[LayerRouter]] = {"mod": MoDRouter, "dtf": DTFRouter, "tdtf": TDTFRouter}


# --- the model --------------------------------------------------------------------------------------------------------


def make_routers(cfg: ModelConfig, routing: RoutingConfig) -> nn.ModuleDict:
    """Fresh routers by layer: none with kind dense."""
    layers = routed_layers(cfg, routing)
    return nn.ModuleDict({str(i): ROUTERS[routing.kind](cfg, routing, i, len(layers)) for i in layers})


def build_model(cfg: ModelConfig, routing: RoutingConfig) -> GPT:
    """The decoder with its routers; with kind dense the plain decoder. Its own weights depend on the seed alone."""
    model = GPT(cfg)
    model.routers = make_routers(cfg, routing)
    model.routing = routing if len(model.routers) else None
    return model


@contextmanager
def routing_mode(model: GPT, mode: Mode) -> Iterator[None]:
    """Select tokens by this mode within a `with`."""
    modes = {router: router.mode for router in model.routers.values()}
    try:
        for router in modes:
            router.mode = mode
        yield
    finally:
        for router, old in modes.items():
            router.mode = old


def set_step(model: GPT, step: int, steps: int) -> None:
    """Set what is a function of the step of a run: the capacity of a warm-up, and scheduled betas."""
    for router in model.routers.values():
        cfg = router.routing
        warmup = cfg.capacity_warmup * steps
        progress = min(1.0, step / warmup) if warmup else 1.0
        router.capacity = 1 + (cfg.share - 1) * progress
        if cfg.beta_mode != "learned" and isinstance(router, SurpriseLayerRouter):
            progress = min(1.0, max(0.0, (step - cfg.beta_warmup) / max(1, steps - cfg.beta_warmup)))
            if cfg.beta_mode == "cosine":
                progress = (1 - math.cos(math.pi * progress)) / 2
            for beta in (router.surprise_router.beta_ce, router.surprise_router.beta_cu):
                beta.fill_(cfg.beta_start + progress * (cfg.beta_end - cfg.beta_start))


def mean_stats(stats: Tensors) -> Tensors:
    """Statistics by LAYER/NAME -> 0-d tensors by LAYER/NAME and, over the layers, by mean/NAME."""
    single = {name: value for name, value in stats.items() if value.dim() == 0}
    groups: dict[str, list[Tensor]] = {}
    for name, value in single.items():
        groups.setdefault(name.partition("/")[2], []).append(value)
    return single | {f"mean/{name}": torch.stack(values).mean() for name, values in groups.items()}


@torch.no_grad()
def layers_per_token(model: GPT, ids: Sequence[int]) -> list[int]:
    """How many routed layers compute each token of a text, selected as at inference: for a picture of it."""
    was_training = model.training
    model.eval()
    device = model.device
    stats = model(torch.tensor([list(ids)], device=device)).stats
    model.train(was_training)
    return layers_used(stats)[0].tolist()


def layers_used(stats: Tensors) -> Tensor:
    """How many routed layers computed each token, [B, T]."""
    return sum(value.long() for name, value in stats.items() if name.endswith("/chosen"))
