"""Conditional compute: in routed layers a block computes a share of the tokens, and the others pass by unchanged.

Three rules for which tokens those are, in training (`topk`, the best of each row by a score):
    mod    Mixture-of-Depths: the score is a learned projection of the layer's input (arXiv 2404.02258)
    dtf    surprise over depth: how far the dense layer before moved a token, against what a small prior expected
    tdtf   surprise over time: how far this layer would move a token, against what the token before it lets expect

The best of a row are known only when the row is complete: a text cannot be generated so, and a loss measured so looks
ahead. In use (`causal`, what `eval()` selects) each layer's CausalRouter therefore decides by the token and the one
before it alone. It learns the membership while the model trains, and a threshold makes its share the capacity.

Letters in shapes are those of model.py; N are the selected tokens of a row, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model as dense
from model import (
    GPT,
    INIT_STD,
    Bound,
    Context,
    Count,
    Fraction,
    ModelConfig,
    NonNegative,
    OpenFraction,
    Positive,
    RMSNorm,
    RoutedCache,
    RoutedPlace,
    Size,
    check_fields,
    require,
)

Block = Callable[[Tensor, Context], Tensor]
Named = dict[str, Tensor]
# Modules that are trained in full beside adapters, by kind: everything that a dense checkpoint does not have.
MODULES_TO_SAVE = {
    "dense": (),
    "mod": ("mod_router", "causal_router"),
    "dtf": ("prior_ffn", "surprise_router", "causal_router"),
    "tdtf": ("transition_net", "surprise_router", "causal_router"),
}
NEVER_ZERO = 1e-10  # added inside the logarithm of o_ce
SURE = 9.0  # a causal router's first bias where everything is to be computed; logit(1) is infinite


@dataclass(frozen=True)
class RoutingConfig:
    """Which layers compute a share of the tokens, and by which rule; `auto` is what the rule's authors recommend."""

    kind: Literal["dense", "mod", "dtf", "tdtf"] = "dense"
    layers: tuple[int, ...] = ()
    capacity: Annotated[float, Bound(0, 1, open_low=True)] | Literal["auto"] = "auto"
    capacity_warmup: Fraction = 0.0
    gate: Literal["auto", "soft", "ste", "hard", "raw"] = "auto"
    surprise_grad: bool | Literal["auto"] = "auto"
    prior_factor: Annotated[float, Bound(0, 4, open_low=True)] = 0.0625
    ma_window: Size = 100
    o_ce_init: Positive = 1.025
    m_cu_init: Positive = 1.1
    beta_ce_init: float = -0.3
    beta_cu_init: float = -0.6
    beta_mode: Literal["learned", "linear", "cosine"] = "learned"
    beta_start: Positive = 0.3
    beta_end: Positive = 6.0
    beta_warmup: Count = 0
    mod_aux: Literal["bce", "load", "none"] = "bce"
    normalise: bool = True
    causal_threshold: OpenFraction = 0.5
    calibrate_tokens: Count = 16_384
    causal_loss_weight: NonNegative = 0.01
    prior_loss_weight: NonNegative = 0.05
    tpn_loss_weight: NonNegative = 0.05
    mod_aux_loss_weight: NonNegative = 0.01
    mod_z_loss_weight: NonNegative = 0.0
    causal_lr: Positive | None = 1e-3
    surprise_lr: Positive | None = 1e-2
    prior_lr: Positive | None = None
    mod_lr: Positive | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.gate != "raw" or self.kind == "mod", "gate", "soft, ste or hard (raw is for mod alone)", self.gate)
        ascending = list(self.layers) == sorted(set(self.layers)) and min(self.layers, default=1) >= 1
        require(ascending, "layers", "ascending layers from 1 on (layer 0 stays dense)", self.layers)
        paired = self.kind != "dtf" or all(b - a > 1 for a, b in zip(self.layers, self.layers[1:], strict=False))
        require(paired, "layers", "a dense layer before each routed one for dtf", self.layers)

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
    require(count >= 2, "num_hidden_layers", f"2 or more with routing.kind {routing.kind}", count)
    chosen = routing.layers or tuple(range(1, count, 2))
    require(chosen[-1] < count, "routing.layers", f"layers below {count}", chosen)
    return chosen


def penalty_weights(routing: RoutingConfig) -> dict[str, float]:
    """What each penalty of a kind is multiplied with in the loss, by the penalty's name."""
    causal = {"causal_loss": routing.causal_loss_weight}
    if routing.kind == "mod":
        aux = {} if routing.mod_aux == "none" else {"mod_aux_loss": routing.mod_aux_loss_weight}
        return causal | aux | {"mod_z_loss": routing.mod_z_loss_weight}
    if routing.kind == "dtf":
        return causal | {"prior_loss": routing.prior_loss_weight}
    if routing.kind == "tdtf":
        return causal | {"tpn_loss": routing.tpn_loss_weight}
    return {}


# --- which tokens -----------------------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """The tokens of each row that a block computes, padded to the longest row's number of them."""

    index: Tensor  # [B, N], ascending
    real: Tensor | None  # bool [B, N]; None: no padding
    mask: Tensor  # bool [B, T], the same as a mask


def row_capacity(share: float, tokens: int) -> int:
    """How many of a row's tokens are selected: at least one. The millionth undoes 0.29 * 100 = 28.999..."""
    return min(tokens, max(1, math.floor(share * tokens + 1e-6)))


def top(score: Tensor, valid: Tensor | None, share: float) -> Chosen:
    """The highest scores of each row [B, T]; of equal ones the earlier. Padding is never selected."""
    batch, count = score.shape
    score, real = score.detach().float(), None
    if valid is not None:
        score = score.masked_fill(~valid, -math.inf)
    order = score.sort(dim=1, descending=True, stable=True).indices
    if valid is None:  # all rows have as many, known without asking the device
        index = order[:, : row_capacity(share, count)].sort(dim=1).values
    else:
        wanted = torch.tensor([row_capacity(share, n) for n in valid.sum(1).tolist()], device=score.device)
        most = max(1, int(wanted.max()))
        real = torch.arange(most, device=score.device) < wanted[:, None]
        # Slots of padding go behind all others, so that "earlier slot" means "earlier token".
        index = order[:, :most].masked_fill(~real, count).sort(dim=1).values.clamp(max=count - 1)
    ones = torch.ones_like(index, dtype=torch.bool) if real is None else real
    mask = torch.zeros(batch, count, dtype=torch.long, device=score.device).scatter_add(1, index, ones.long()) > 0
    return Chosen(index, real, mask)


def from_mask(mask: Tensor, most: int) -> Chosen:
    """Of a mask [B, T] with at most `most` tokens in a row."""
    order = mask.byte().sort(dim=1, descending=True, stable=True).indices
    real = torch.arange(most, device=mask.device) < mask.sum(1, keepdim=True)
    return Chosen(order[:, :most], real, mask)


# --- the routed operator ----------------------------------------------------------------------------------------------


def compute(block: Block, x: Tensor, chosen: Chosen, gate: Tensor | None, ctx: Context) -> Tensor:
    """x [B, T, E] plus, at the chosen tokens, gate [B, T] (None: 1) times the update that a block has for them.

    The block sees the chosen tokens alone, at their original positions, and of each row only that row's. All others
    come out as they went in, to the bit.
    """
    batch, count, _ = x.shape
    index, real, _ = chosen
    flat = (index + count * torch.arange(batch, device=x.device)[:, None]).flatten()
    return _update(block, x, flat, index.shape, real, gate, _among(ctx, index, real))


def _update(
    block: Block,
    x: Tensor,
    flat: Tensor,
    shape: Sequence[int],
    real: Tensor | None,
    gate: Tensor | None,
    ctx: Context,
) -> Tensor:
    """Gather tokens [B' x N] of x, compute them in `ctx`, add what changes where it belongs."""
    inputs = x.flatten(0, 1).index_select(0, flat).view(*shape, -1)
    delta = block(inputs, ctx) - inputs
    if gate is not None:
        delta = delta * gate.flatten().index_select(0, flat).view(*shape, 1)
    if real is not None:  # slots of padding hold some token's values: they add nothing
        delta = torch.where(real[..., None], delta, 0)
    return x.flatten(0, 1).index_add(0, flat, delta.to(x.dtype).flatten(0, 1)).view_as(x)


def _at(tensor: Tensor | None, rows: Tensor, index: Tensor) -> Tensor | None:
    """tensor [B|1, T, ...] at tokens index [B', N] of rows [B', 1]."""
    if tensor is None:
        return None
    return tensor[0][index] if len(tensor) == 1 else tensor[rows, index]


def _here(ctx: Context, rows: Tensor, index: Tensor) -> Context:
    """Positions, rotary angles and liveness of the chosen tokens."""
    cos, sin = (None if t is None else _at(t[:, 0], rows, index)[:, None] for t in (ctx.cos, ctx.sin))
    alive = None if ctx.alive is None else _at(ctx.alive[:, 0], rows, index)[:, None]
    positions = _at(ctx.positions, rows, index)
    return ctx._replace(positions=positions, cos=cos, sin=sin, alive=alive, valid=None, before=None)


def _among(ctx: Context, index: Tensor, real: Tensor | None) -> Context:
    """What the chosen tokens share: slots ascend, so causality among slots is causality, and needs no mask."""
    rows = torch.arange(len(index), device=index.device)[:, None]
    mask = None
    if ctx.mask is not None:
        mask = _at(ctx.mask[:, 0], rows, index)  # [B, N, S]
        mask = mask.gather(2, index[:, None, :].expand(mask.shape[0], index.shape[1], -1))[:, None]
        if real is not None:  # a slot of padding is nobody's key, and as a query may look at anything
            mask = (mask & real[:, None, None, :]) | ~real[:, None, :, None]
    return _here(ctx, rows, index)._replace(mask=mask, keys=index.shape[1])


def compute_cached(
    block: Block, x: Tensor, mask: Tensor, gate: Tensor | None, ctx: Context, part: RoutedCache, static: bool
) -> Tensor:
    """`compute` behind the entries of a cache, to which the chosen tokens [B, T] are added.

    Rows without one are left out, and without any the block does not run. With `static`, single tokens of all rows
    are computed whether chosen or not, in shapes that no decision changes: nothing is asked of the device.
    """
    (batch, count), adding = mask.shape, mask.sum(1)
    kept = None
    if static and count == 1:
        entries = part.at_most(1)
        part.begin(adding, entries)
        index, real = torch.zeros_like(mask, dtype=torch.long), mask
        rows = torch.arange(batch, device=x.device)
        place = RoutedPlace(None, rows, torch.zeros_like(rows), part.counts)
        after = part.counts + 1  # of an unchosen token the entry is overwritten by the next
    else:
        new, held = torch.stack([adding, part.counts]).tolist()  # the one question to the device
        totals = [a + b for a, b in zip(new, held, strict=True)]
        part.begin(adding, max(totals))
        listed = [row for row in range(batch) if new[row]]
        if not listed:
            return x
        if len(listed) < batch:
            kept = torch.tensor(listed, device=x.device)
            mask, adding = mask[kept], adding[kept]
        index, real, _ = from_mask(mask, max(new))
        entries = max(totals[row] for row in listed)
        counts = part.counts if kept is None else part.counts[kept]
        rows, tokens = real.nonzero().unbind(1)
        place = RoutedPlace(kept, rows, tokens, counts[rows] + tokens)
        after = counts + adding
    owners = (torch.arange(batch, device=x.device) if kept is None else kept)[:, None]  # [B', 1]
    lengths = torch.tensor(ctx.cache.lengths, device=x.device)[owners]
    slots = part.place_slots((lengths + index)[place.rows, place.tokens], place, entries)
    inner = _behind(ctx, owners, index, real, slots, after)
    inner = inner._replace(cache=part, place=place, keys=entries)
    return _update(block, x, (index + count * owners).flatten(), index.shape, real, gate, inner)


def _behind(ctx: Context, rows: Tensor, index: Tensor, real: Tensor, slots: Tensor, after: Tensor) -> Context:
    """What the chosen tokens of a call share that has cached entries at slots [B', S], `after` [B'] of them real."""
    written = torch.arange(slots.shape[1], device=slots.device) < after[:, None]
    if ctx.mask is not None:
        mask = _at(ctx.mask[:, 0], rows, index)  # [B', N, keys of the row]
        at = slots.long().clamp(max=mask.shape[2] - 1)[:, None, :].expand(-1, index.shape[1], -1)
        mask = (mask.gather(2, at) & written[:, None])[:, None] | ~real[:, None, :, None]
    elif ctx.positions.shape[1] == 1:  # one token: it comes behind everything
        mask = written[:, None, None, :]
    else:  # the first tokens of all rows: plain causality
        mask = None
    return _here(ctx, rows, index)._replace(mask=mask)


# --- the causal router ------------------------------------------------------------------------------------------------


class CausalRouter(nn.Module):
    """Predicts from a token and the one before it whether the token will be among the best of its row.

    A logit is linear in [n(x_t), n(x_t-1)], n dividing by the root mean square. Both halves are projected at once and
    the second is read one token later: of a past token a single number has to be kept.
    """

    def __init__(self, cfg: ModelConfig, routing: RoutingConfig):
        super().__init__()
        share = routing.share
        first = SURE if share == 1 else math.log(share / (1 - share))  # so that it fires about as often as it should
        self.weight = nn.Parameter(INIT_STD * torch.randn(1, 2 * cfg.hidden_size))
        self.bias = nn.Parameter(torch.full((1,), first))
        self.register_buffer("threshold", torch.tensor(routing.causal_threshold))
        self.eps = cfg.rms_norm_eps if routing.normalise else None

    def halves(self, x: Tensor) -> Tensor:
        """x [B, T, E], as a constant -> fp32 [B, T, 2]: what a token says about itself, and about the next."""
        x = x.detach().float()
        said = F.linear(x, self.weight.float().view(2, -1))
        if self.eps is not None:
            square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()  # no copy of x, unlike x.square()
            said = said * torch.rsqrt(square / x.shape[-1] + self.eps)
        return said

    def forward(self, halves: Tensor, starts: Tensor, last: Tensor | None) -> Tensor:
        """Logits [B, T]. starts: bool [B, T], tokens without one before; last: [B], said before the first token."""
        earlier = F.pad(halves[:, :-1, 1], (1, 0))
        if last is not None:
            earlier = torch.cat([last[:, None], earlier[:, 1:]], dim=1)
        return halves[..., 0] + torch.where(starts, 0, earlier) + self.bias.float()

    @torch.no_grad()
    def calibrate(self, logits: Tensor, valid: Tensor | None, share: float) -> None:
        """Set the threshold to where this share of the tokens lies above it."""
        found = logits.flatten() if valid is None else logits[valid]
        if not len(found):
            return
        found = found.sigmoid().sort(descending=True).values
        wanted = min(len(found), round(share * len(found)))
        edge = found[max(0, wanted - 1) : wanted + 1]
        self.threshold.copy_(edge.mean() if wanted < len(found) else torch.zeros(()))


# --- surprise ---------------------------------------------------------------------------------------------------------


class ResidualPrior(nn.Module):
    """A small SwiGLU that expects an update from a state: norm, w1 and w3, w2. Not called an MLP, so that adapters,
    which find their targets by name, leave it alone."""

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
    """Of each token [B, T], fp32."""

    ce: Tensor  # expected change: the token moved as the prior did not foresee, or did
    cu: Tensor  # unexpected change: it moved further than the tokens before it did
    s_ce: Tensor
    s_cu: Tensor
    rank: Tensor  # what tokens are ordered by
    gate: Tensor  # G, probability that either criterion holds


class SurpriseRouter(nn.Module):
    """Four numbers that turn two distances into a score. Positive by softplus; [1] each, since FSDP shards no scalar.

    With a schedule the two betas are buffers that hold the value in use, so that a checkpoint goes on with it.
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

    def effective(self) -> Named:
        """The four values in use, [1] each."""
        raw = {name: getattr(self, name).float() for name in ("o_ce", "m_cu", "beta_ce", "beta_cu")}
        return {
            name: value if name.startswith("beta") and not self.learned else F.softplus(value)
            for name, value in raw.items()
        }

    def forward(self, d_st: Tensor, d_ch: Tensor, average: Tensor) -> Signals:
        """Distances moved (d_st), from the expectation (d_ch), and d_st's moving average, all fp32 [B, T]."""
        now = self.effective()
        ce = d_st - d_ch + torch.log(now["o_ce"] + NEVER_ZERO)
        cu = d_st - now["m_cu"] * average
        a, c = now["beta_ce"] * ce, now["beta_cu"] * cu
        # 1 - exp(-rank) is the probabilistic "or" of the two, and the rank still tells apart what rounds to 1 there.
        rank = F.softplus(a) + F.softplus(c)
        return Signals(ce, cu, a.sigmoid(), c.sigmoid(), rank, -torch.expm1(-rank))


def window_sums(values: Tensor, age: Tensor, window: int) -> Tensor:
    """Sums [B, T] over the last `window` values up to each, none older than its `age` [B, T] in tokens.

    Put together from sums over 1, 2, 4, ... values: the difference of two long running sums would lose, in fp32, the
    small values behind a large one.
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
    """Of the last `window` values up to each token [B, T], those of its document alone, padding left out."""
    counted = torch.ones_like(d_st) if valid is None else valid.to(d_st.dtype)
    return window_sums(d_st * counted, age, window) / window_sums(counted, age, window).clamp(min=1)


# --- routers ----------------------------------------------------------------------------------------------------------

Mode = Literal["auto", "topk", "causal", "calibrate", "all", "none"]


class Scores(NamedTuple):
    rank: Tensor  # fp32 [B, T], what tokens are ordered by
    soft: Tensor  # fp32 [B, T], what the update is multiplied with


class LayerRouter(nn.Module):
    """What the three kinds share: selection, the causal router's training and use, statistics."""

    def __init__(self, cfg: ModelConfig, routing: RoutingConfig, layer: int, layers: int):
        super().__init__()
        self.routing, self.layer, self.part_of_mean = routing, layer, 1 / layers
        self.capacity = routing.share  # `at_step` moves it in a warm-up
        self.mode: Mode = "auto"  # topk in training, causal in use
        self.static = False  # decode in shapes that no decision changes
        self.causal_router = CausalRouter(cfg, routing)

    def scores(self, x: Tensor, ctx: Context, block: Block, penalties: Named, stats: Named) -> Scores:
        """How the kind orders tokens in training; may add penalties and statistics."""
        raise NotImplementedError

    def causal_gate(self, x: Tensor, ctx: Context, past: Tensor | None) -> Tensor | None:
        """fp32 [B, T], the training's formula where it can be known in use; None: 1."""
        raise NotImplementedError

    def notes(self, x: Tensor, ctx: Context, halves: Tensor) -> Tensor:
        """fp32 [B, T, numbers], what later tokens of a request need of each; the first is said by the causal router."""
        return halves[..., 1:]

    def forward(self, x: Tensor, ctx: Context, block: Block, penalties: Named, stats: Named) -> Tensor:
        mode = self.mode if self.mode != "auto" else "topk" if self.training else "causal"
        if mode == "topk":
            return self._best(x, ctx, block, penalties, stats)
        return self._decided(mode, x, ctx, block, stats)

    def _best(self, x: Tensor, ctx: Context, block: Block, penalties: Named, stats: Named) -> Tensor:
        if ctx.cache is not None:
            raise ValueError("routing by topk needs the whole row at once: no cache")
        scores = self.scores(x, ctx, block, penalties, stats)
        chosen = top(scores.rank, ctx.valid, self.capacity)
        with torch.autocast(x.device.type, enabled=False):
            logits = self.causal_router(self.causal_router.halves(x), _starts(ctx), None)
            self._judge(logits, chosen.mask, ctx.valid, penalties, stats)
            self.penalise(scores, chosen.mask, ctx.valid, penalties)
        stats[f"{self.layer}/chosen"] = chosen.mask
        return compute(block, x, chosen, self._gated(scores.soft), ctx)

    def penalise(self, scores: Scores, chosen: Tensor, valid: Tensor | None, penalties: Named) -> None:
        """Penalties that depend on what was chosen [B, T]."""

    def _gated(self, soft: Tensor) -> Tensor | None:
        kind = self.routing.gating
        if kind == "ste":
            return 1 + (soft - soft.detach()) if torch.is_grad_enabled() else None
        return None if kind == "hard" else soft

    def _decided(self, mode: Mode, x: Tensor, ctx: Context, block: Block, stats: Named) -> Tensor:
        part = past = last = None
        with torch.autocast(x.device.type, enabled=False):
            halves = self.causal_router.halves(x)
            if ctx.cache is not None:
                part = ctx.cache.routed(self.layer, x.device)
                past = part.note(self.notes(x, ctx, halves), ctx.place)
                lengths = torch.tensor(ctx.cache.lengths, device=x.device)
                last = past[torch.arange(len(past), device=x.device), (lengths - 1).clamp(min=0), 0]
            logits = self.causal_router(halves, _starts(ctx), last)
            if mode == "calibrate":
                self.causal_router.calibrate(logits, ctx.valid, self.capacity)
            mask = logits.sigmoid() > self.causal_router.threshold
            if mode in ("all", "none"):
                mask = torch.full_like(mask, mode == "all")
            if ctx.valid is not None:
                mask = mask & ctx.valid
            gate = self.causal_gate(x, ctx, past)
        stats[f"{self.layer}/chosen"] = mask
        stats[f"{self.layer}/selected_fraction"] = _mean(mask.float(), ctx.valid)
        if part is not None:
            return compute_cached(block, x, mask, gate, ctx, part, self.static)
        # At least one slot, so that ranks that share a block's weights all come to it.
        return compute(block, x, from_mask(mask, max(1, int(mask.sum(1).max()))), gate, ctx)

    def _judge(self, logits: Tensor, chosen: Tensor, valid: Tensor | None, penalties: Named, stats: Named) -> None:
        """The causal router's loss, and how well it does beside one that knows the share alone."""
        target = chosen.float()
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        self._penalty("causal_loss", loss, valid, penalties)
        with torch.no_grad():
            guess = (logits.sigmoid() > self.causal_router.threshold).float()
            share, said = _mean(target, valid), _mean(guess, valid)
            hits = _mean(guess * target, valid)
            tell = {
                "selected_fraction": share,
                "causal_selected_fraction": said,
                "causal_bce": _mean(loss, valid),
                "causal_acc": 1 - said - share + 2 * hits,
                "causal_precision": hits / said.clamp(min=1e-9),
                "causal_recall": hits / share.clamp(min=1e-9),
                "causal_acc_baseline": torch.maximum(share, 1 - share),
                "causal_bce_baseline": -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)),
            }
        stats.update({f"{self.layer}/{name}": value for name, value in tell.items()})

    def _penalty(self, name: str, values: Tensor, valid: Tensor | None, penalties: Named) -> None:
        """Add this layer's part of a penalty: the mean over each row's tokens of values [B, T]."""
        penalties[name] = penalties.get(name, 0) + self.part_of_mean * row_means(values, valid)

    def _spread(self, name: str, values: Tensor, valid: Tensor | None, stats: Named) -> None:
        """Mean, extremes and standard deviation of values [B, T] over all tokens."""
        values = values.detach().float()
        mean = _mean(values, valid)
        low, high = values.min(), values.max()
        if valid is not None:  # where all is padding, 0: an infinity would spoil whatever it is averaged with
            low, high = values.masked_fill(~valid, math.inf).min(), values.masked_fill(~valid, -math.inf).max()
            low, high = (torch.where(valid.any(), extreme, 0.0) for extreme in (low, high))
        found = {"": mean, "_min": low, "_max": high}
        found["_std"] = _mean((values - mean).square(), valid).sqrt()
        stats.update({f"{self.layer}/{name}{end}": value for end, value in found.items()})


def row_means(values: Tensor, valid: Tensor | None) -> Tensor:
    """[B, T] -> [B], padding left out; 0 of a row that is all padding."""
    if valid is None:
        return values.mean(1)
    return torch.where(valid, values, 0).sum(1) / valid.sum(1).clamp(min=1)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return values.mean()
    return torch.where(valid, values, 0).sum() / valid.sum().clamp(min=1)


def _starts(ctx: Context) -> Tensor:
    """bool [B|1, T]: tokens with none before them: the first of a row or document, or the first behind padding."""
    starts = ctx.positions == 0
    if ctx.valid is not None and ctx.valid.shape[1] > 1:
        starts = starts | F.pad(~ctx.valid[:, :-1], (1, 0))
    return starts


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

    def scores(self, x: Tensor, ctx: Context, block: Block, penalties: Named, stats: Named) -> Scores:
        with torch.autocast(x.device.type, enabled=False):
            logits = self._logits(x)
            self._spread("router_logit", logits, ctx.valid, stats)
            self._spread("router_prob", logits.sigmoid(), ctx.valid, stats)
            self._penalty("mod_z_loss", logits.square(), ctx.valid, penalties)
            return Scores(logits, self._soft(logits))

    def penalise(self, scores: Scores, chosen: Tensor, valid: Tensor | None, penalties: Named) -> None:
        logits, target = scores.rank, chosen.float()
        if self.routing.mod_aux == "bce":  # puts the boundary of the selection at a probability of one half
            loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            self._penalty("mod_aux_loss", loss, valid, penalties)
        elif self.routing.mod_aux == "load":
            gap = row_means(logits.sigmoid(), valid) - row_means(target, valid)
            penalties["mod_aux_loss"] = penalties.get("mod_aux_loss", 0) + self.part_of_mean * gap.square()

    def causal_gate(self, x: Tensor, ctx: Context, past: Tensor | None) -> Tensor | None:
        return None if self.routing.gating in ("ste", "hard") else self._soft(self._logits(x))


class Surprising(LayerRouter):
    """What dtf and tdtf share: a token is worth computing when its update is surprising."""

    def __init__(self, cfg: ModelConfig, routing: RoutingConfig, layer: int, layers: int):
        super().__init__(cfg, routing, layer, layers)
        self.surprise_router = SurpriseRouter(routing)

    def _surprise(self, name: str, moved: Tensor, expected: Tensor, ctx: Context, out: Named, stats: Named) -> Scores:
        """Scores from updates moved, expected [B, T, E]; the penalty `name` teaches the expectation."""
        moved = moved.float()
        miss = (expected - moved.detach()).square().mean(-1)
        if self.routing.gating == "hard":  # the four numbers then have no gradient, which ranks would wait for
            miss = miss + 0 * sum(p.sum() for p in self.surprise_router.parameters())
        self._penalty(name, miss, ctx.valid, out)
        moved = moved if self.routing.through_surprise else moved.detach()
        d_st, d_ch = moved.square().mean(-1), (moved - expected).square().mean(-1)
        found = self.surprise_router(d_st, d_ch, self._average(d_st, ctx))
        for key, value in {"D_st": d_st, "D_ch": d_ch, "CE": found.ce, "CU": found.cu}.items():
            stats[f"{self.layer}/{key}"] = _mean(value.detach(), ctx.valid)
        for key, value in {"S_CE": found.s_ce, "S_CU": found.s_cu, "G_cont": found.gate}.items():
            self._spread(key, value, ctx.valid, stats)
        for key, value in self.surprise_router.effective().items():
            stats[f"{self.layer}/{key}"] = value.detach()[0]
        return Scores(found.rank, found.gate)

    def _average(self, d_st: Tensor, ctx: Context) -> Tensor:
        age = ctx.positions.expand_as(d_st)
        return moving_average(d_st.detach(), age, ctx.valid, self.routing.ma_window)


class DTFRouter(Surprising):
    """Surprise over depth: the dense layer before has just moved the tokens, a prior expects by how much."""

    def __init__(self, cfg: ModelConfig, routing: RoutingConfig, layer: int, layers: int):
        super().__init__(cfg, routing, layer, layers)
        self.prior_ffn = ResidualPrior(cfg, routing.prior_factor)

    def scores(self, x: Tensor, ctx: Context, block: Block, penalties: Named, stats: Named) -> Scores:
        with torch.autocast(x.device.type, enabled=False):
            expected = self.prior_ffn(ctx.before)
            return self._surprise("prior_loss", x.float() - ctx.before.float(), expected, ctx, penalties, stats)

    def notes(self, x: Tensor, ctx: Context, halves: Tensor) -> Tensor:
        moved = (x.float() - ctx.before.float()).square().mean(-1, keepdim=True)
        return torch.cat([halves[..., 1:], moved], dim=-1)

    def causal_gate(self, x: Tensor, ctx: Context, past: Tensor | None) -> Tensor | None:
        """The dense layer before ran on all tokens, so that the gate is known in use as in training."""
        if self.routing.gating in ("ste", "hard"):
            return None
        moved = x.float() - ctx.before.float()
        d_st, d_ch = moved.square().mean(-1), (moved - self.prior_ffn(ctx.before)).square().mean(-1)
        average = self._average(d_st, ctx) if past is None else self._average_behind(d_st, ctx, past[..., 1])
        return self.surprise_router(d_st, d_ch, average).gate

    def _average_behind(self, d_st: Tensor, ctx: Context, past: Tensor) -> Tensor:
        """The moving average of new tokens [B, T] behind those that a request has seen: past [B, capacity]."""
        back = torch.arange(1 - self.routing.ma_window, 0, device=d_st.device)  # how far from the first new token
        lengths = torch.tensor(ctx.cache.lengths, device=d_st.device)[:, None]
        history = past.gather(1, (lengths + back).clamp(min=0))
        age = ctx.positions.expand_as(d_st)
        earlier = age[:, :1] + back  # below 0: before the row's first token
        valid = torch.ones_like(d_st, dtype=torch.bool) if ctx.valid is None else ctx.valid
        everything = torch.cat([history, d_st], dim=1)
        age, valid = torch.cat([earlier, age], dim=1), torch.cat([earlier >= 0, valid], dim=1)
        if d_st.shape[1] == 1:  # while decoding, all of it is one window
            return (everything * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
        return moving_average(everything, age, valid, self.routing.ma_window)[:, len(back) :]


class TDTFRouter(Surprising):
    """Surprise over time: the block's own update, against what the output of the token before lets expect.

    In training the block runs twice, on all tokens as a teacher without gradients, then on the chosen ones.
    """

    def __init__(self, cfg: ModelConfig, routing: RoutingConfig, layer: int, layers: int):
        super().__init__(cfg, routing, layer, layers)
        self.transition_net = ResidualPrior(cfg, routing.prior_factor)

    def scores(self, x: Tensor, ctx: Context, block: Block, penalties: Named, stats: Named) -> Scores:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.routing.through_surprise):
            y = block(x, ctx)
            moved = y.float() - x.float()
        with torch.autocast(x.device.type, enabled=False):
            earlier = F.pad(y.detach()[:, :-1], (0, 0, 1, 0)).masked_fill(_starts(ctx)[..., None], 0)
            return self._surprise("tpn_loss", moved, self.transition_net(earlier), ctx, penalties, stats)

    def causal_gate(self, x: Tensor, ctx: Context, past: Tensor | None) -> Tensor | None:
        return None


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
def routed_by(model: GPT, mode: Mode) -> Iterator[None]:
    """Within a `with`: who selects tokens."""
    before = {router: router.mode for router in model.routers.values()}
    try:
        for router in before:
            router.mode = mode
        yield
    finally:
        for router, old in before.items():
            router.mode = old


def at_step(model: GPT, step: int, steps: int) -> None:
    """Set what follows from the step of a run: the capacity of a warm-up, and scheduled betas."""
    for router in model.routers.values():
        cfg = router.routing
        rising = cfg.capacity_warmup * steps
        done = min(1.0, step / rising) if rising else 1.0
        router.capacity = 1 + (cfg.share - 1) * done
        if cfg.beta_mode != "learned" and isinstance(router, Surprising):
            part = min(1.0, max(0.0, (step - cfg.beta_warmup) / max(1, steps - cfg.beta_warmup)))
            if cfg.beta_mode == "cosine":
                part = (1 - math.cos(math.pi * part)) / 2
            for beta in (router.surprise_router.beta_ce, router.surprise_router.beta_cu):
                beta.fill_(cfg.beta_start + part * (cfg.beta_end - cfg.beta_start))


def mean_stats(stats: Named) -> Named:
    """Statistics by LAYER/NAME -> 0-d tensors by LAYER/NAME and, over the layers, by mean/NAME."""
    single = {name: value for name, value in stats.items() if value.dim() == 0}
    groups: dict[str, list[Tensor]] = {}
    for name, value in single.items():
        groups.setdefault(name.partition("/")[2], []).append(value)
    return single | {f"mean/{name}": torch.stack(values).mean() for name, values in groups.items()}


@torch.no_grad()
def tokens_used(model: GPT, ids: Sequence[int]) -> list[int]:
    """How many routed layers compute each token of a text, decided as in use: what a picture of it needs."""
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    stats = model(torch.tensor([list(ids)], device=device), length=model.cfg.context).stats
    model.train(was_training)
    return layers_used(stats)[0].tolist()


def layers_used(stats: Named) -> Tensor:
    """How many routed layers computed each token, [B, T]."""
    return sum(value.long() for name, value in stats.items() if name.endswith("/chosen"))


def flops_per_token(
    cfg: ModelConfig, routing: RoutingConfig | None, seq_len: int, *, causal: bool = True, training: bool = True
) -> float:
    """As model.flops_per_token, of routed layers at their capacity; priors and teachers are counted, scores are not."""
    layers = routed_layers(cfg, routing) if routing else ()
    if not layers:
        return dense.flops_per_token(cfg, seq_len, causal=causal, training=training)
    used = [routing.share if layer in layers else 1.0 for layer in range(cfg.num_hidden_layers)]
    flops = dense.flops_per_token(cfg, seq_len, causal=causal, training=training, used=used)
    inner = ResidualPrior.width(cfg, routing.prior_factor)
    prior = 6 * cfg.hidden_size * inner * len(layers) * (3 if training else 1)
    if routing.kind == "dtf":
        return flops + prior
    if routing.kind == "tdtf" and training:  # the teacher: a forward of each routed layer over all tokens
        every = dense.flops_per_token(cfg, seq_len, causal=causal, training=False)
        none = [0.0 if layer in layers else 1.0 for layer in range(cfg.num_hidden_layers)]
        rest = dense.flops_per_token(cfg, seq_len, causal=causal, training=False, used=none)
        return flops + prior + (every - rest) * (3 if routing.through_surprise else 1)
    return flops
