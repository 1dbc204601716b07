"""A twin of a dense model for decoding: the same arithmetic, in fewer and larger steps.

    model = fast(model)                      weights as they are, q k v and gate up fused
    generate(model, prompts, ...)            everything in model.py that generates takes it in place of a GPT

On CUDA a step of one token a row is a CUDA graph: a cache of fixed shapes, positions on the device, no Python between
kernels. The kernels are ours (kernels.py) where the layers are those of published models and Triton is there. On a CPU
a step of a few tokens is one call of compiled code (cpu_kernels.py), which also reads weights in 8 and 4 bits. The
plain model remains the slow twin: same ids, logits equal but for the order of sums.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, Block, Context, KVCache, Output, attend, cast_saturating, rotate
from nanoqwen import cpu_kernels

SMALLEST_CAPACITY = 256  # slots of a graph
MOST_GRAPHS = 8  # kept: each holds a cache, and a few megabytes
WARM_UP = 3  # runs before a capture, as torch asks: libraries allocate on first use

# New keys and values [B, K, T, D] -> all of them [B, K, S, D]
Write = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


# --- weights ----------------------------------------------------------------------------------------------------------


def fuse(*layers: nn.Linear) -> nn.Linear:
    """One layer whose output is those of several, side by side. The layers become views of it: no weight is copied."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias for layer in layers]
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias=biases[0] is not None, device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    if biases[0] is not None:
        fused.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=False)
    start = 0
    for layer in layers:
        end = start + layer.out_features
        layer.weight.data = fused.weight.data[start:end]
        if layer.bias is not None:
            layer.bias.data = fused.bias.data[start:end]
        start = end
    return fused


class FastBlock(nn.Module):
    """model.Block with fused projections. Where new keys and values go is the caller's."""

    def __init__(self, block: Block):
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        self.input_layernorm, self.post_attention_layernorm, self.j = (
            block.input_layernorm, block.post_attention_layernorm, block.j,
        )  # fmt: skip
        self.q_norm, self.k_norm, self.head_size = attention.q_norm, attention.k_norm, attention.head_size
        self.qkv = fuse(attention.q_proj, attention.k_proj, attention.v_proj)
        self.sizes = [layer.out_features for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.o_proj, self.down_proj, self.gated = attention.o_proj, mlp.down_proj, mlp.gated
        self.gate_up = fuse(mlp.gate_proj, mlp.up_proj) if mlp.gated else mlp.up_proj

    def forward(self, x: Tensor, ctx: Context, write: Write) -> Tensor:
        """[B, T, E] -> [B, T, E]"""
        normed = self.input_layernorm(x)
        q, k, v = (
            part.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for part in self.qkv(normed).split(self.sizes, dim=-1)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if ctx.cos is not None:
            q, k = rotate(q, ctx.cos, ctx.sin), rotate(k, ctx.cos, ctx.sin)
        k, v = write(k, v)
        y = attend_by_hand(q, k, v, ctx.mask) if isinstance(write, StaticLayer) else attend(q, k, v, ctx, 0.0)
        x = x + self.o_proj(y.transpose(1, 2).flatten(2))
        if self.j is not None:
            x = x + self.j(normed)
        return x + self.down_proj(self._activate(self.gate_up(self.post_attention_layernorm(x))))

    def _activate(self, hidden: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(hidden, approximate="tanh")
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up


def attend_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One query [B, H, 1, D] a row over k, v [B, K, S, D]. Fused kernels split their work by queries: here is one."""
    folded = q.reshape(len(k), k.shape[1], -1, q.shape[-1])
    scores = (folded @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights.to(v.dtype) @ v).reshape(q.shape)


# --- a step as a CUDA graph -------------------------------------------------------------------------------------------


class FastCache(KVCache):
    """A KVCache whose contents may lie in the memory of a graph."""

    graph: Graph | None = None

    def select(self, rows: Sequence[int]) -> None:
        before = self._keys[0]
        super().select(rows)
        if self._keys[0] is not before:  # the rows are now in memory of their own
            self.detach()

    def free(self) -> None:
        self.detach()
        super().free()

    def detach(self) -> None:
        if self.graph is not None:
            self.graph.owner, self.graph = lambda: None, None


class StaticLayer(NamedTuple):
    """Writes the keys and values of one token a row to the slots of a layer; returns all slots."""

    keys: Tensor  # [B, K, capacity, D]
    values: Tensor
    rows: Tensor  # [B]
    slots: Tensor  # [B]

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for cache, new in ((self.keys, k), (self.values, v)):
            cache[self.rows, :, self.slots] = cast_saturating(new[:, :, 0], cache.dtype)
        return self.keys.to(k.dtype), self.values.to(v.dtype)


def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """(a function that runs the kernels of `step` again, the tensor that it writes its result to)"""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


class Graph:
    """One decoding step, captured: tokens [B, 1] in, logits [B, 1, V] out, slots one further.

    It belongs to the request whose cache lies in it, and to the next one when that is gone.
    """

    def __init__(self, model: FastGPT, batch: int, capacity: int, dtype: torch.dtype):
        self.batch, self.capacity, self.dtype, cfg = batch, capacity, dtype, model.cfg
        device = model.device
        self.owner: Callable[[], FastCache | None] = lambda: None
        self.expected: list[int] | None = None  # lengths of the rows when the graph runs next
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.slots, rows = torch.zeros(batch, dtype=torch.long, device=device), torch.arange(batch, device=device)
        shape = (batch, cfg.num_key_value_heads, capacity, cfg.head_size)
        self.layers = [
            StaticLayer(*(torch.zeros(shape, dtype=dtype, device=device) for _ in "kv"), rows, self.slots)
            for _ in model.blocks
        ]
        kernels = kernels_for(model, batch)
        step = partial(self._step_by_kernels, kernels) if kernels else self._step
        self.replay, self.logits = capture(lambda: step(model))

    def adopt(self, cache: FastCache) -> None:
        """Take over the contents of a cache."""
        tokens = max(cache.lengths)
        for index, layer in enumerate(self.layers):
            for own, theirs in ((layer.keys, cache._keys), (layer.values, cache._values)):
                own[:, :, :tokens] = theirs[index][:, :, :tokens]
                theirs[index] = own
        cache.detach()
        cache.capacity, cache.graph = self.capacity, self
        self.owner, self.expected = weakref.ref(cache), None

    def run(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        if self.expected != lengths:
            self.slots.copy_(torch.tensor(lengths))
        self.tokens.copy_(tokens)
        self.replay()
        self.expected = [length + 1 for length in lengths]
        return self.logits.clone()

    def _step(self, model: FastGPT) -> Tensor:
        x = model.embed(self.tokens, self.slots[:, None])
        cos = sin = None
        if model.cfg.positions == "rope":
            tables = model.model.rope.tables(model.cfg, self.capacity, x.device)
            cos, sin = (table[self.slots][:, None, None] for table in tables)
        mask = torch.arange(self.capacity, device=x.device) <= self.slots[:, None, None, None]
        ctx = Context(self.slots[:, None], cos, sin, mask, None, None, None, self.capacity, [], [], None, None, {})
        for block, layer in zip(model.blocks, self.layers, strict=True):
            x = block(x, ctx, layer)
        self.slots += 1
        return model.head(x)

    def _step_by_kernels(self, kernels: ModuleType, model: FastGPT) -> Tensor:
        cfg, linear = model.cfg, kernels.linear
        attention = kernels.Attention(self.batch, cfg, self.capacity, self.slots)
        x = model.embed(self.tokens, self.slots[:, None])[:, 0].float()
        tables = model.model.rope.tables(cfg, self.capacity, x.device)
        for block, layer in zip(model.blocks, self.layers, strict=True):
            qkv = linear(x, block.qkv, norm=block.input_layernorm)
            y = attention(qkv, block.q_norm, block.k_norm, tables, layer.keys, layer.values)
            x = linear(y, block.o_proj, residual=x)
            hidden = linear(x, block.gate_up, norm=block.post_attention_layernorm, gated=True)
            x = linear(hidden, block.down_proj, residual=x)
        self.slots += 1
        return linear(x, model.model.get_output_embeddings(), norm=model.model.model.norm)[:, None]


def kernels_for(model: FastGPT, rows: int) -> ModuleType | None:
    """Our kernels, where they fit and Triton is there. They know the layers of Qwen, Llama and their kind."""
    cfg = model.cfg
    fit = (cfg.norm, cfg.mlp, cfg.positions, cfg.j_branch) == ("rmsnorm", "swiglu", "rope", False)
    if not fit:
        return None
    try:
        from nanoqwen import kernels
    except ImportError:
        return None
    shared = cfg.num_attention_heads // cfg.num_key_value_heads
    return kernels if rows <= kernels.MOST_ROWS and shared <= kernels.MOST_SHARED else None


# --- the twin ---------------------------------------------------------------------------------------------------------


class FastGPT:
    """What generation needs of a GPT. It shares the model's weights, and must not outlive a change of them."""

    training = False

    def __init__(self, model: GPT):
        self.model, self.cfg, self.device = model.eval(), model.cfg, model.device
        self.blocks = [FastBlock(block) for block in model.model.layers]
        self.graphs: list[Graph] = []
        scaling = model.cfg.rope_scaling  # a dynamic one turns keys by another angle in each step
        self.static = not (scaling and scaling.rope_type == "dynamic") and model.get_input_embeddings().weight.is_cuda

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def new_cache(self, rows: int, dtype: torch.dtype | None, length: int) -> KVCache:
        return (FastCache if self.static else KVCache)(self.cfg, rows, dtype, length)

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        attn_mask: Any = None,
    ) -> Output:
        """As GPT.forward without targets."""
        if cache is None:
            return self.model(tokens, lengths=lengths, attn_mask=attn_mask)
        counts = [int(count) for count in lengths] if lengths is not None else [tokens.shape[1]] * len(tokens)
        first = not max(cache.lengths)  # also a prompt of one token: there is nothing to continue
        if self.static and not first and tokens.shape[1] == min(counts) == 1 and attn_mask is None:
            logits = self._graphed(tokens, cache)
        else:
            logits = self._eager(tokens, counts, cache, attn_mask)
        cache.advance(counts)
        return Output(None, logits, None, None, {}, {})

    def _graphed(self, tokens: Tensor, cache: FastCache) -> Tensor:
        graph, slots = cache.graph, max(cache.lengths) + 1
        if graph is None or slots > graph.capacity:
            graph = self._graph_for(cache, slots)
            graph.adopt(cache)
        return graph.run(tokens, cache.lengths)

    def _graph_for(self, cache: FastCache, slots: int) -> Graph:
        """One that no request holds, or a new one. Capacities are powers of two, so that requests find one again."""
        batch, dtype = len(cache.lengths), cache._keys[0].dtype
        capacity = max(SMALLEST_CAPACITY, 1 << (max(slots, cache.length) - 1).bit_length())
        free = [graph for graph in self.graphs if graph.owner() is None]
        for graph in free:
            if (graph.batch, graph.capacity, graph.dtype) == (batch, capacity, dtype):
                return graph
        if len(self.graphs) >= MOST_GRAPHS and free:
            self.graphs.remove(free[0])
        self.graphs.append(Graph(self, batch, capacity, dtype))
        return self.graphs[-1]

    def _eager(self, tokens: Tensor, counts: list[int], cache: KVCache, attn_mask: Any) -> Tensor:
        ctx = self.model._context(tokens, counts, cache, None, attn_mask)
        x = self.embed(tokens, ctx.positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, ctx, lambda k, v, layer=layer: cache.write(layer, k, v, ctx.slots, ctx.keys))
        last = torch.tensor(counts, device=x.device) - 1
        return self.head(x[torch.arange(len(x), device=x.device), last][:, None])

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.model.model.embed_tokens(tokens)
        return x + self.model.model.embed_positions(positions) if self.cfg.positions == "learned" else x

    def head(self, x: Tensor) -> Tensor:
        return self.model.logits(self.model.model.norm(x))


class CPUFastGPT:
    """A GPT whose steps of a few tokens are calls of compiled code. It shares the model's weights."""

    training = False

    def __init__(self, model: GPT):
        self.model, self.cfg, self.device = model.eval(), model.cfg, model.device
        self.decoder = cpu_kernels.Decoder(model)
        self.new_cache = model.new_cache

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        attn_mask: Any = None,
    ) -> Output:
        """As GPT.forward without targets."""
        counts = [int(count) for count in lengths] if lengths is not None else [tokens.shape[1]] * len(tokens)
        few = cache is not None and min(cache.lengths) and min(counts) and sum(counts) <= cpu_kernels.MOST_TOKENS
        if not few or attn_mask is not None or cache._keys[0].dtype == torch.float16:
            return self.model(tokens, cache=cache, lengths=lengths, attn_mask=attn_mask)
        logits = self.decoder(tokens, counts, cache)
        cache.advance(counts)
        return Output(None, logits, None, None, {}, {})


def fast(model: GPT) -> FastGPT | CPUFastGPT | GPT:
    """The twin of a model, where there is one for it and its device; else the model itself."""
    if model.device.type == "cuda" and not len(model.routers):
        return FastGPT(model)
    return CPUFastGPT(model) if cpu_kernels.fits(model) and cpu_kernels.library() else model
