"""The decoder alone: attention, masks, positions, cache, loss, initialisation. Ids are those of the test catalogue."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

import model as model_module
from model import GPT, IGNORE, KVCache, ModelConfig, RopeScaling, attend, rope_frequencies, rope_tables
from nanoqwen.flops import dense_flops_per_token

ALL = list(tiny.ARCHITECTURES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T = 20


def tokens(batch: int = 2, length: int = T, seed: int = 1) -> torch.Tensor:
    return torch.randint(tiny.SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def decode(gpt: GPT, ids: torch.Tensor, chunks: list[int], **kwargs) -> torch.Tensor:
    """Logits of a cached forward in chunks; every position, so that nothing hides behind the last one."""
    cache, out, start = KVCache(gpt.cfg, len(ids), length=ids.shape[1]), [], 0
    for size in chunks:
        hidden = gpt(ids[:, start : start + size], cache=cache, **kwargs).hidden
        out.append(gpt.logits(hidden))
        start += size
    assert cache.lengths == [ids.shape[1]] * len(ids)
    return torch.cat(out, dim=1)


@torch.no_grad()
def context_of(gpt: GPT, ids: torch.Tensor, lengths=None, **kwargs) -> model_module.Context:
    return gpt._context(ids, model_module._counts(ids, lengths), **kwargs)


# --- A: attention, masks, positions, cache ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a01_cached_decoding_equals_one_forward(name: str, dtype: torch.dtype):
    """A cached step once attended to a single key: causality was aligned to the top left of a 1 x S mask."""
    gpt, ids = tiny.model(name).to(dtype), tokens()
    full, step = gpt(ids).logits, decode(gpt, ids, [1] * T)
    tolerance = (1e-4 if dtype == torch.float32 else 2e-2) * full.abs().max()
    assert (full - step).abs().max() <= tolerance
    best = full.max(dim=-1).values
    chosen = full.gather(-1, step.argmax(-1, keepdim=True))[..., 0]
    assert (best - chosen).max() <= (0 if dtype == torch.float32 else tolerance)


@pytest.mark.parametrize("chunks", [[20], [2] * 10, [7, 7, 6], [5, 1, 1, 7, 2, 4], [1, 19], [19, 1]], ids=str)
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a02_chunks_are_bottom_right_aligned(name: str, chunks: list[int]):
    gpt, ids = tiny.model(name), tokens()
    full = gpt(ids).logits
    assert (full - decode(gpt, ids, chunks)).abs().max() <= 1e-4 * full.abs().max()


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a02_ragged_rows_equal_each_row_alone(name: str):
    gpt, ids = tiny.model(name), tokens(3)
    cache, ends = KVCache(gpt.cfg, 3, length=T), [0, 0, 0]
    for counts in ([4, 9, 1], [1, 1, 1], [3, 0, 5], [1, 1, 1], [2, 7, 4]):
        width = max(counts)
        chunk = torch.full((3, width), 96)
        for row, (end, count) in enumerate(zip(ends, counts, strict=True)):
            chunk[row, :count] = ids[row, end : end + count]
        logits = gpt(chunk, cache=cache, lengths=counts).logits[:, 0]
        ends = [end + count for end, count in zip(ends, counts, strict=True)]
        for row, count in enumerate(counts):
            if count:
                alone = gpt(ids[row : row + 1, : ends[row]]).logits[0, -1]
                assert (logits[row] - alone).abs().max() <= 1e-4 * alone.abs().max()
    assert cache.lengths == ends


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
@torch.no_grad()
def test_a03_the_position_of_a_cached_token_is_the_length_of_the_cache(name: str):
    gpt = tiny.model(name)
    same = torch.full((1, 12), 5)  # equal tokens: only positions can tell the steps apart
    for start in (0, 3, 11):
        cache = KVCache(gpt.cfg, 1)
        gpt.eval()
        if start:
            gpt(same[:, :start], cache=cache)
        ctx = context_of(gpt, same[:, :1], cache=cache)
        assert ctx.positions.tolist() == [[start]]


def mask_sources(ids: torch.Tensor) -> dict[str, dict]:
    batch, length = ids.shape
    document = torch.arange(length).expand(batch, -1) // 7
    banded = torch.ones(length, length, dtype=torch.bool).triu(-5)
    return {
        "none": {},
        "padding": {"attn_mask": (torch.arange(length) >= 2).expand(batch, -1)},
        "custom": {"attn_mask": banded[None, None]},
        "additive": {"attn_mask": torch.where(banded, 0.0, -math.inf)[None, None]},
        "rule": {"attn_mask": lambda row, query, key: query - key < 5 + row},
        "documents": {"documents": document},
        "lengths": {"lengths": [length, length - 3]},
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", list(mask_sources(tokens())))
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "j-branch", "yarn"])
@torch.no_grad()
def test_a04_a_later_token_never_moves_an_earlier_logit(name: str, source: str, dtype: torch.dtype):
    """In half precision a mask of -1e4 once let the future through; the difference allowed here is zero bits."""
    gpt, ids = tiny.model(name).to(dtype), tokens()
    kwargs = mask_sources(ids)[source]
    before = gpt(ids, **kwargs).logits
    for position in range(1, T):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 97
        after = gpt(changed, **kwargs).logits
        assert torch.equal(before[:, :position], after[:, :position]), f"position {position} leaks"
        if kwargs.get("lengths", [T])[-1] > position:
            assert not torch.equal(before[:, position], after[:, position])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["qwen2", "mha", "gpt2"])
def test_a05_a_fully_masked_query_gives_zeros_forward_and_backward(name: str, dtype: torch.dtype):
    gpt, ids = tiny.model(name).to(dtype), tokens()
    mask = torch.ones(2, 1, T, T, dtype=torch.bool)
    mask[0, :, 4] = False  # one query of row 0
    mask[1] = False  # the whole of row 1
    seen = []
    hook = gpt.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = gpt(ids, targets=ids, attn_mask=mask)
    out.loss.backward()
    hook.remove()
    assert torch.equal(seen[0][0, 4], torch.zeros_like(seen[0][0, 4]))
    assert torch.equal(seen[0][1], torch.zeros_like(seen[0][1]))
    assert out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in gpt.parameters())
    with torch.no_grad():
        masked = gpt(ids, attn_mask=mask).logits
        assert masked.isfinite().all()
        # neighbours: queries before the masked one are what they would be with its row left alone
        open_row = torch.ones_like(mask)
        assert torch.equal(masked[0, :4], gpt(ids, attn_mask=open_row).logits[0, :4])


def test_a05_gradients_of_neighbours_do_not_feel_a_masked_row():
    ids, mask = tokens(), torch.ones(2, 1, T, T, dtype=torch.bool)
    mask[1] = False
    targets = ids.clone()
    targets[1] = IGNORE
    both, alone = tiny.model(), tiny.model()
    both(ids, targets, attn_mask=mask).loss.backward()
    alone(ids[:1], targets[:1], attn_mask=mask[:1]).loss.backward()
    for (name, p), q in zip(both.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5 * q.grad.abs().max()), name


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a06_every_encoding_of_a_mask_means_the_same(side: str):
    gpt, ids = tiny.model(), tokens()
    real = torch.ones(2, T, dtype=torch.bool)
    if side == "left":
        real[0, :6] = False
    else:
        real[0, -6:] = False
    square = real[:, None, None, :] & torch.ones(T, T, dtype=torch.bool).tril()
    expected = gpt(ids, attn_mask=real).logits
    floats = [-math.inf, -1e4, -1e9, torch.finfo(torch.float32).min]
    for encoding in (real, real[:, None, None], square):
        for mask in (encoding, *(torch.where(encoding, 0.0, low) for low in floats)):
            got = gpt(ids, attn_mask=mask).logits
            assert (got - expected)[real].abs().max() <= 1e-5 * expected.abs().max()
    shared = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    assert torch.equal(gpt(ids, attn_mask=shared).logits, gpt(ids, attn_mask=shared.expand(2, 1, T, T)).logits)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(T, dtype=torch.bool),
        torch.ones(2, T - 1, dtype=torch.bool),
        torch.ones(3, T, dtype=torch.bool),
        torch.ones(2, T, T, dtype=torch.bool),
        torch.ones(2, 4, T, T, dtype=torch.bool),
        torch.ones(1, 1, T - 1, T, dtype=torch.bool),
        torch.ones(2, T),  # 1.0 and 0.0: a boolean written as a float, or a bias?
        torch.full((1, 1, T, T), -3.0),
        torch.ones(2, T, dtype=torch.long),
    ],
    ids=lambda mask: f"{tuple(mask.shape)} {mask.dtype}",
)
def test_a06_ambiguous_masks_are_refused_by_shape(mask: torch.Tensor):
    with pytest.raises(
        ValueError, match="attn_mask.*" + str(tuple(mask.shape)).replace("(", r"\(").replace(")", r"\)")
    ):
        tiny.model()(tokens(), attn_mask=mask)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a07_padding_on_either_side_changes_nothing(name: str):
    gpt, ids, pad = tiny.model(name), tokens(1), torch.full((1, 5), 96)
    alone = gpt(ids).logits[0]
    left = torch.cat((pad, ids), dim=1)
    right = torch.cat((ids, pad), dim=1)
    real = torch.arange(T + 5) >= 5
    for got in (
        gpt(left, attn_mask=real[None]).logits[0, 5:],
        gpt(right, attn_mask=real.flip(0)[None]).logits[0, :T],
        gpt(right, lengths=[T]).logits[0, :T],
    ):
        assert (got - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a08_packed_documents_are_strangers(name: str):
    gpt, ids = tiny.model(name), tokens(1)
    documents = torch.tensor([[7] * 8 + [3] * 7 + [7] * 5])  # an id that comes back is a new document
    packed = gpt(ids, documents=documents).logits[0]
    for start, end in ((0, 8), (8, 15), (15, 20)):
        alone = gpt(ids[:, start:end]).logits[0]
        assert (packed[start:end] - alone).abs().max() <= 1e-5 * alone.abs().max()
    changed = ids.clone()
    changed[:, :8] = 1
    assert torch.equal(packed[8:], gpt(changed, documents=documents).logits[0, 8:])
    assert not torch.equal(gpt(ids).logits[0, 8:], gpt(changed).logits[0, 8:])  # without isolation they do meet


@pytest.mark.parametrize("kind", ["keys", "square", "rule"])
@torch.no_grad()
def test_a09_a_custom_mask_holds_in_every_decode_step(kind: str):
    gpt, ids = tiny.model(), tokens()
    real = torch.ones(2, T, dtype=torch.bool)
    real[0, 3:5] = False
    square = (torch.arange(T)[:, None] - torch.arange(T)).abs() % 3 != 1
    mask = {"keys": real, "square": square[None, None], "rule": lambda row, query, key: (query - key).abs() % 3 != 1}[
        kind
    ]
    full = gpt(ids, attn_mask=mask).logits
    if kind == "rule":
        assert torch.equal(full, gpt(ids, attn_mask=square[None, None]).logits)
    for chunks in ([1] * T, [6, 1, 1, 5, 7]):
        assert (full - decode(gpt, ids, chunks, attn_mask=mask)).abs().max() <= 1e-4 * full.abs().max()


@torch.no_grad()
def test_a09_causality_is_only_lifted_on_request():
    gpt, ids, everything = tiny.model(), tokens(), torch.ones(1, 1, T, T, dtype=torch.bool)
    assert (gpt(ids, attn_mask=everything).logits - gpt(ids).logits).abs().max() <= 1e-4
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 97
    kwargs = {"attn_mask": everything, "allow_future": True}
    assert not torch.equal(gpt(ids, **kwargs).logits[:, 0], gpt(changed, **kwargs).logits[:, 0])
    # padding stays invisible even then
    changed[:, -3:] = 1
    ragged = {"allow_future": True, "lengths": [T - 3, T - 3]}
    assert torch.equal(gpt(ids, **ragged).logits[:, : T - 3], gpt(changed, **ragged).logits[:, : T - 3])


@torch.no_grad()
def test_a10_rope_tables_only_grow():
    """Tables were once rebuilt for every decoded token, later at each power of two: a request needs them once."""
    gpt = tiny.model(max_position_embeddings=256)
    cache, ids = KVCache(gpt.cfg, 1), tokens(1, 48)
    gpt(ids[:, :16], cache=cache)
    small = [table.clone() for table in gpt.rope._tables]
    builds = gpt.rope.builds
    for step in range(16, 48):
        gpt(ids[:, step : step + 1], cache=cache)
    gpt(ids)
    gpt(ids[:, :3])
    assert gpt.rope.builds == builds
    for grown, table in zip(gpt.rope._tables, small, strict=True):
        assert torch.equal(grown[: len(table)], table)
    before = gpt.rope.builds
    gpt.cfg = tiny.config(rope_theta=5e5, max_position_embeddings=256)
    gpt(ids)
    gpt(ids)
    assert gpt.rope.builds == before + 1
    fresh = rope_tables(gpt.cfg, len(gpt.rope._tables[0]), 48)
    assert all(torch.equal(a, b) for a, b in zip(gpt.rope._tables, fresh, strict=True))
    gpt.bfloat16()(ids)
    assert gpt.rope._tables[0].dtype == torch.float32


@torch.no_grad()
def test_a11_a_long_context_allocates_nothing_of_its_square():
    context = 32_768
    gpt = tiny.model(max_position_embeddings=context, lively=False)
    names = set(gpt.state_dict())
    assert names == {name for name, _ in gpt.named_parameters()}
    assert not list(gpt.buffers())
    largest = max(tensor.numel() for tensor in gpt.state_dict().values())
    assert largest < context
    gpt(tokens())
    assert set(gpt.state_dict()) == names
    assert len(gpt.rope._tables[0]) == 32  # made for what was asked, not for the context


def test_a11_plain_causality_uses_no_mask_at_all():
    gpt = tiny.model()
    assert context_of(gpt, tokens()).mask is None
    assert context_of(gpt, tokens(), lengths=[3, 20]).mask is None
    cache = KVCache(gpt.cfg, 2)
    with torch.no_grad():
        gpt(tokens(), cache=cache)
    assert context_of(gpt, tokens()[:, :1], cache=cache).mask is None
    assert context_of(gpt, tokens()[:, :4], cache=cache).mask.shape == (1, 1, 4, 24)


def test_a13_errors_inside_the_kernel_are_not_swallowed(monkeypatch: pytest.MonkeyPatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(F, "scaled_dot_product_attention", no_memory)
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        tiny.model()(tokens())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "custom"])
def test_a16_attention_weights_sum_to_one_and_masked_ones_are_zero(mask: str, dtype: torch.dtype):
    gpt = tiny.model().to(dtype)
    rule = None if mask == "none" else torch.ones(1, 1, T, T, dtype=torch.bool).triu(-4)
    ctx = context_of(gpt, tokens(), attn_mask=rule)
    q, k = torch.randn(2, 4, T, T, dtype=dtype), torch.randn(2, 2, T, T, dtype=dtype)
    weights = attend(q, k, torch.eye(T, dtype=dtype).expand(2, 2, T, T), ctx, 0.0)  # values = unit vectors
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    half_step = torch.finfo(dtype).eps * T  # the kernel rounds each weight when it writes it
    assert (weights.float().sum(-1) - 1).abs().max() <= tolerance + (0 if dtype == torch.float32 else half_step)
    allowed = torch.ones(T, T, dtype=torch.bool).tril()
    allowed = allowed if mask == "none" else allowed.triu(-4)
    assert (weights[..., ~allowed] == 0).all()


def slow_attention(q, k, v, allowed):
    """The twin: every head with its own copy of keys and values, an explicit softmax, in fp64."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).double() for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("new", [1, 3, 9])
def test_fused_attention_equals_the_slow_twin(heads: int, kv_heads: int, new: int):
    gpt = tiny.model(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8)
    q, k, v = torch.randn(2, heads, new, 8), torch.randn(2, kv_heads, 9, 8), torch.randn(2, kv_heads, 9, 8)
    cache = KVCache(gpt.cfg, 2)
    cache.lengths = [9 - new] * 2
    ctx = context_of(gpt, tokens(2, new), cache=cache)
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()[-new:]
    assert (attend(q, k, v, ctx, 0.0) - slow_attention(q, k, v, allowed)).abs().max() <= 1e-6


SCALINGS = [
    None,
    RopeScaling("linear", factor=4.0),
    RopeScaling("dynamic", factor=4.0, original_max_position_embeddings=8_192),
    RopeScaling("yarn", factor=4.0, original_max_position_embeddings=32_768),
    RopeScaling("llama3", factor=8.0, original_max_position_embeddings=8_192),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.rope_type if s else "none")
def test_a17_cos_and_sin_are_right_to_128k(scaling: RopeScaling | None):
    cfg = ModelConfig(rope_scaling=scaling, max_position_embeddings=131_072)
    cos, sin = rope_tables(cfg, 131_072, 131_072)
    frequencies, magnitude = rope_frequencies(cfg, 131_072)
    for position in (0, 1, 4_096, 4_097, 65_537, 131_071):
        for pair in (0, 1, 16, 31):
            angle = position * float(frequencies[pair])
            assert abs(float(cos[position, pair]) - math.cos(angle) * magnitude) < 1e-6
            assert abs(float(sin[position, pair]) - math.sin(angle) * magnitude) < 1e-6
    assert not torch.equal(cos[4_096], cos[4_097])


def test_a17_closed_forms():
    plain = 1e6 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)

    def frequencies(scaling: RopeScaling, length: int = 16) -> tuple[torch.Tensor, float]:
        return rope_frequencies(ModelConfig(rope_scaling=scaling, max_position_embeddings=8_192), length)

    assert torch.equal(frequencies(RopeScaling("linear", factor=4.0))[0], plain / 4)
    assert torch.equal(frequencies(RopeScaling("dynamic", factor=4.0), 8_192)[0], plain)
    stretched = 1e6 * (4 * 16_384 / 8_192 - 3) ** (64 / 62)
    expected = stretched ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert torch.allclose(frequencies(RopeScaling("dynamic", factor=4.0), 16_384)[0], expected, rtol=1e-12)
    llama3, _ = frequencies(RopeScaling("llama3", factor=8.0))
    wavelengths = 2 * math.pi / plain
    assert torch.equal(llama3[wavelengths < 8_192 / 4], plain[wavelengths < 8_192 / 4])
    assert torch.equal(llama3[wavelengths > 8_192], plain[wavelengths > 8_192] / 8)
    yarn, magnitude = frequencies(RopeScaling("yarn", factor=4.0))
    assert magnitude == 0.1 * math.log(4) + 1
    assert yarn[0] == plain[0]
    assert yarn[-1] == plain[-1] / 4


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
@torch.no_grad()
def test_a17_a_factor_of_one_changes_no_bit(kind: str):
    scaled = tiny.model(rope_scaling=RopeScaling(kind, factor=1.0, original_max_position_embeddings=16))
    assert torch.equal(scaled(tokens()).logits, tiny.model()(tokens()).logits)


@torch.no_grad()
def test_a17_dynamic_scaling_follows_the_row_so_far():
    """Whatever lies beside a row in its batch, behind it as padding or before it as another document."""
    gpt = tiny.model("dynamic", max_position_embeddings=16)
    ids = tokens(1, 30)
    alone = {length: gpt(ids[:, :length]).logits for length in (9, 16, 20, 30)}
    cache = KVCache(gpt.cfg, 1, length=16)
    steps = torch.cat([gpt(ids[:, t : t + 1], cache=cache).logits for t in range(16)], dim=1)
    torch.testing.assert_close(steps, alone[16], rtol=1e-4, atol=1e-5)  # the original context: no stretching yet
    ragged = gpt(ids.expand(2, -1), lengths=[20, 30]).logits
    torch.testing.assert_close(ragged[:1, :20], alone[20], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ragged[1:], alone[30], rtol=1e-4, atol=1e-5)
    packed = torch.cat((ids[:, :9], ids[:, :20]), dim=1)
    documents = torch.tensor([[0] * 9 + [1] * 20])
    both = gpt(packed, documents=documents).logits
    torch.testing.assert_close(both[:, :9], alone[9], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[:, 9:], alone[20], rtol=1e-4, atol=1e-5)


def caches_alive() -> list[KVCache]:
    import gc

    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is KVCache]


def test_a20_no_cache_outside_a_request():
    gpt = tiny.model()
    gpt(tokens(), tokens()).loss.backward()
    gpt.eval()
    with torch.no_grad():
        gpt(tokens(), tokens())
    model_module.generate(gpt, [[1, 2], [3]], max_new_tokens=3)
    assert caches_alive() == []
    events = model_module.stream(gpt, [[1, 2]], max_new_tokens=3)
    next(events)
    with pytest.raises(ZeroDivisionError):
        events.throw(ZeroDivisionError())
    del events
    assert caches_alive() == []


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1)])
@torch.no_grad()
def test_a20_a21_cache_bytes_are_exact(heads: int, kv_heads: int):
    gpt = tiny.model(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=4)
    cache = KVCache(gpt.cfg, 3)
    assert cache.nbytes == 0
    gpt(tokens(3, 10), cache=cache)

    def expected(slots: int, itemsize: int = 4) -> int:
        return 3 * 2 * gpt.cfg.num_hidden_layers * slots * kv_heads * 4 * itemsize

    assert cache.nbytes == expected(10)
    gpt(tokens(3, 1), cache=cache)
    assert cache.nbytes == expected(20)  # doubled
    gpt(tokens(3, 40), cache=cache)
    assert cache.nbytes == expected(51)
    gpt(tokens(3, 1), cache=cache)
    assert cache.nbytes == expected(64)  # never beyond the context
    with pytest.raises(ValueError, match="made for 64 tokens per row, this call needs 72"):
        gpt(tokens(3, 20), cache=cache)
    cache.free()
    assert cache.nbytes == 0
    assert cache.lengths == [0, 0, 0]
    half = KVCache(gpt.cfg, 3, dtype=torch.float16)
    gpt(tokens(3, 10), cache=half)
    assert half.nbytes == expected(10, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a22_a_half_precision_cache_is_close_and_never_infinite(dtype: torch.dtype):
    gpt, ids = tiny.model(), tokens()
    cache = KVCache(gpt.cfg, 2, dtype=dtype)
    step = torch.cat([gpt(ids[:, t : t + 1], cache=cache).logits for t in range(T)], dim=1)
    full = gpt(ids).logits
    assert (step - full).abs().max() <= 2e-2 * full.abs().max()
    gpt.model.layers[0].self_attn.v_proj.weight.mul_(1e6)
    cache = KVCache(gpt.cfg, 2, dtype=dtype)
    gpt(ids[:, :4], cache=cache)
    assert gpt(ids[:, 4:5], cache=cache).logits.isfinite().all()


@torch.no_grad()
def test_a23_nothing_survives_a_request():
    gpt, ids = tiny.model(), tokens()
    expected = gpt(ids).logits
    first, second = KVCache(gpt.cfg, 2), KVCache(gpt.cfg, 2)
    gpt(ids[:, :10], cache=first)
    gpt(ids.flip(1)[:, :10], cache=second)  # interleaved
    got = gpt(ids[:, 10:], cache=first).hidden
    assert (gpt.logits(got) - expected[:, 10:]).abs().max() <= 1e-4
    with pytest.raises(IndexError):
        gpt(torch.full((2, 3), 10_000), cache=second)
    assert second.lengths == [10, 10]  # an exception in the middle leaves the clock where it was
    assert torch.equal(gpt(ids).logits, expected)


@torch.no_grad()
def test_cache_select_and_crop():
    gpt, ids = tiny.model(), tokens(3)
    cache = KVCache(gpt.cfg, 3)
    gpt(ids[:, :8], cache=cache, lengths=[8, 5, 7])
    cache.select([2, 0, 0])
    assert cache.lengths == [7, 8, 8]
    got = gpt(ids[[2, 0, 0], 10:11], cache=cache).logits[:, 0]
    for row, (origin, length) in enumerate(((2, 7), (0, 8), (0, 8))):
        alone = gpt(torch.cat((ids[origin : origin + 1, :length], ids[origin : origin + 1, 10:11]), dim=1)).logits[
            0, -1
        ]
        assert (got[row] - alone).abs().max() <= 1e-4
    cache.crop(4)
    assert cache.lengths == [4, 4, 4]
    again = gpt(ids[[2, 0, 0], 4:9], cache=cache).logits[:, 0]
    assert (again - gpt(ids[[2, 0, 0], :9]).logits[:, -1]).abs().max() <= 1e-4


@torch.no_grad()
def test_rows_may_fill_the_cache_to_its_last_slot():
    """Padding of a chunk was once counted against the room of the longest row."""
    gpt, ids = tiny.model(), tokens()
    cache = KVCache(gpt.cfg, 2, length=12)
    gpt(ids[:, :11], cache=cache, lengths=[11, 4])
    got = gpt(torch.stack((ids[0, 11:16], ids[1, 4:9])), cache=cache, lengths=[1, 5]).logits[:, 0]
    assert cache.lengths == [12, 9]
    for row, length in enumerate((12, 9)):
        alone = gpt(ids[row : row + 1, :length]).logits[0, -1]
        assert (got[row] - alone).abs().max() <= 1e-4 * alone.abs().max()
    got = gpt(torch.stack((ids[0, :3], ids[1, 9:12])), cache=cache, lengths=[0, 3]).logits[1, 0]
    assert (got - gpt(ids[1:, :12]).logits[0, -1]).abs().max() <= 1e-4


def test_a_cache_is_refused_where_gradients_are_kept():
    gpt = tiny.model()
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        gpt(tokens(), cache=KVCache(gpt.cfg, 2))


def test_k01_the_context_that_a_configuration_means():
    """Llama 3.2: max_position_embeddings is the stretched length already, though factor x original is larger."""
    llama = RopeScaling("llama3", factor=32.0, original_max_position_embeddings=8_192)
    assert ModelConfig(max_position_embeddings=131_072, rope_scaling=llama).context == 131_072
    yarn = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=32_768)
    assert ModelConfig(max_position_embeddings=32_768, rope_scaling=yarn).context == 131_072
    dynamic = RopeScaling("dynamic", factor=2.0, original_max_position_embeddings=7)
    assert ModelConfig(max_position_embeddings=64, rope_scaling=dynamic).context == 128


def test_one_graph_serves_all_lengths():
    """Message strings made for every call once specialised the graph to each length, and compiled code went unused."""
    from torch._dynamo.testing import CompileCounter

    gpt = tiny.model()
    gpt(tokens(2, 60))  # the rotary tables are there
    torch._dynamo.reset()
    counter = CompileCounter()
    fast = torch.compile(gpt, backend=counter, fullgraph=True)
    for length in (16, 20, 33, 47, 60):
        assert torch.equal(fast(tokens(2, length)).logits, gpt(tokens(2, length)).logits)
    assert counter.frame_count <= 2  # one for the first length, one for any


def test_a_cache_is_refused_in_training():
    gpt = tiny.model().train()
    with pytest.raises(ValueError, match="cache is for inference"):
        gpt(tokens(), cache=KVCache(gpt.cfg, 2))


def test_learned_positions_end_at_their_table():
    with pytest.raises(ValueError, match="65 tokens in a row, but max_position_embeddings is 64"):
        tiny.model("gpt2")(tokens(1, 65))


# --- loss, checkpointing, precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 97 * 3, 97 * 7, 2**25])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_t12_chunked_loss_equals_plain_cross_entropy(chunk: int, z_loss: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_module, "LOGITS_PER_CHUNK", chunk)
    targets = tokens(seed=2)
    targets[0, :5] = IGNORE
    ours, plain = tiny.model(tie_word_embeddings=False), tiny.model(tie_word_embeddings=False)
    ours.z_loss = z_loss
    out = ours.train()(tokens(), targets)
    logits = plain(tokens()).logits
    reference = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    square = (logits.logsumexp(-1)[targets != IGNORE] ** 2).sum()
    assert torch.allclose(out.sums.cross_entropy, reference, rtol=1e-6)
    assert int(out.weight) == 35
    assert torch.allclose(out.sums.log_z_squares, square, rtol=1e-6)
    assert torch.allclose(out.loss, reference + z_loss * square, rtol=1e-6)
    (3 * out.loss).backward()
    (3 * reference + 3 * z_loss * square).backward()
    assert ours.eval()(tokens(), targets).loss == out.sums.cross_entropy  # of training alone, as dropout is
    for (name, p), q in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.allclose(p.grad, q[1].grad, rtol=1e-4, atol=1e-5 * q[1].grad.abs().max()), name


def test_t12_no_targets_no_loss_no_nan():
    gpt = tiny.model()
    out = gpt(tokens(), torch.full((2, T), IGNORE))
    out.loss.backward()
    assert out.loss == 0
    assert out.weight == 0
    assert all((p.grad == 0).all() for p in gpt.parameters() if p.grad is not None)


def test_a_loss_is_differentiated_once():
    loss = tiny.model().train()(tokens(), tokens(seed=2)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated a second time"):
        loss.backward()


def test_padding_behind_lengths_is_not_trained_on():
    gpt, ids = tiny.model(), tokens()
    out = gpt(ids, ids, lengths=[T, 5])
    assert int(out.weight) == T + 5
    alone = gpt(ids[:1], ids[:1]).loss + gpt(ids[1:, :5], ids[1:, :5]).loss
    assert torch.allclose(out.loss, alone, rtol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "j-branch"])
def test_t08_recomputed_activations_give_the_same_gradients(name: str, dropout: float):
    grads = []
    for recompute in (False, True):
        gpt = tiny.model(name, dropout=dropout).train()
        gpt.checkpoint_activations = recompute
        torch.manual_seed(3)
        loss = gpt(tokens(), tokens(seed=2)).loss
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in gpt.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with pytest.raises(ValueError, match="cache is for inference"):
        gpt(tokens(), cache=KVCache(gpt.cfg, 2))
    assert model_module.generate(gpt, [[1, 2]], max_new_tokens=2)  # a sample in the middle of training
    assert gpt.training


def test_dropout_acts_in_training_alone():
    gpt = tiny.model(dropout=0.5)
    with torch.no_grad():
        assert torch.equal(gpt(tokens()).logits, tiny.model()(tokens()).logits)
        gpt.train()
        assert not torch.equal(gpt(tokens()).logits, gpt(tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_n03_half_precision_stays_finite(dtype: torch.dtype):
    gpt = tiny.model(lively=False).to(dtype).train()
    for step in range(100):
        length = (1, 2, T)[step % 3]
        ids = tokens(2, length, seed=step)
        mask = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(step)) > 0.7
        gpt.zero_grad()
        out = gpt(ids, ids, attn_mask=mask)
        (out.loss / out.weight).backward()
        assert out.loss.isfinite()
        assert all(p.grad.isfinite().all() for p in gpt.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_n04_norms_rotation_and_logits_are_fp32_inside(dtype: torch.dtype):
    norm = model_module.RMSNorm(64, 1e-6).to(dtype)
    big = torch.full((1, 64), 3e4, dtype=dtype)  # its square overflows fp16
    assert torch.allclose(norm(big).float(), torch.ones(1, 64), rtol=1e-2)
    assert not norm(torch.zeros(1, 64, dtype=dtype)).any()  # by its epsilon; else 0 / 0
    gpt = tiny.model().to(dtype)
    assert gpt(tokens()).logits.dtype == torch.float32
    assert gpt(tokens(), tokens()).loss.dtype == torch.float32
    cos, sin = rope_tables(gpt.cfg, 64, 64)
    x = torch.randn(1, 1, 64, 8, dtype=dtype)
    exact = model_module.rotate(x.double(), cos, sin)
    assert (model_module.rotate(x, cos, sin).double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


# --- K: construction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"num_attention_heads": 32, "num_key_value_heads": 7},
            ["num_attention_heads (32)", "num_key_value_heads (7)"],
        ),
        ({"hidden_size": 33}, ["hidden_size (33)", "num_attention_heads (4)"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads", "got 0"]),
        ({"num_key_value_heads": 8}, ["num_attention_heads (4)", "num_key_value_heads (8)"]),
        ({"head_dim": 7}, ["head_dim", "got 7"]),
        ({"head_dim": -2}, ["head_dim", "got -2"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "got 0"]),
        ({"vocab_size": -5}, ["vocab_size", "got -5"]),
        ({"max_position_embeddings": 0}, ["max_position_embeddings", "got 0"]),
        ({"hidden_size": 32.0}, ["hidden_size", "32.0"]),
        ({"bias": 1}, ["bias", "got 1"]),
        ({"tie_word_embeddings": 0}, ["tie_word_embeddings", "got 0"]),
        ({"norm": "batch"}, ["norm", "'batch'"]),
        ({"mlp": True}, ["mlp", "True"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
        ({"dropout": float("nan")}, ["dropout", "nan"]),
        ({"rms_norm_eps": 0.0}, ["rms_norm_eps", "0.0"]),
        ({"rope_theta": -1.0}, ["rope_theta", "-1.0"]),
        ({"positions": "learned", "rope_scaling": tiny.YARN}, ["rope_scaling", "learned"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_k01_impossible_shapes_are_refused_by_name_and_value(wrong: dict, said: list[str]):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011, all parts are checked below
        tiny.config(**wrong)
    assert all(part in str(refusal.value) for part in said)


@pytest.mark.parametrize(
    "wrong",
    [{"rope_type": "ntk"}, {"rope_type": "yarn", "factor": 0.5}, {"rope_type": "llama3", "low_freq_factor": 9.0}],
)
def test_k01_impossible_scalings(wrong: dict):
    with pytest.raises(ValueError, match=r"rope_type|factor"):
        RopeScaling(**wrong)


@torch.no_grad()
def test_k06_the_j_branch_is_its_formula():
    """x1 = x + Attn(u) + LN_J(u), x2 = x1 + MLP(LN2(x1)), u = LN1(x); LN_J carries a bias of its own."""
    gpt, ids = tiny.model("j-branch"), tokens()
    assert "model.layers.0.j.bias" in gpt.state_dict()
    block, ctx = gpt.model.layers[0], context_of(gpt, ids)
    x = gpt.model.embed_tokens(ids)
    u = block.input_layernorm(x)
    centred = u - u.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + gpt.cfg.rms_norm_eps).sqrt()
    x1 = x + block.self_attn(u, ctx) + normed * block.j.weight + block.j.bias
    x2 = x1 + block.mlp(block.post_attention_layernorm(x1))
    assert (block(x, ctx) - x2).abs().max() <= 1e-5
    assert "model.layers.0.j.bias" not in tiny.model("j-branch", j_bias=False).state_dict()


def test_a_router_takes_the_place_of_a_layer_and_renames_nothing():
    class SkipOdd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x, ctx, block, penalties, stats):
            penalties["skip"] = self.scale.square()
            stats["used"] = torch.tensor(0.5)
            return torch.where((ctx.positions % 2 == 0)[..., None], block(x, ctx) * self.scale, x)

    dense = tiny.model()
    routed = GPT(dense.cfg, routers={1: SkipOdd()}).eval()
    assert set(routed.state_dict()) - set(dense.state_dict()) == {"routers.1.scale"}
    missing, unexpected = routed.load_state_dict(dense.state_dict(), strict=False)
    assert missing == ["routers.1.scale"]
    assert not unexpected
    out = routed(tokens(), tokens())
    assert set(out.penalties) == {"skip"}
    assert set(out.stats) == {"used"}
    assert not torch.equal(out.hidden, dense(tokens()).hidden)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_g15_the_head_follows_the_embedding(tied: bool):
    gpt = tiny.model(tie_word_embeddings=tied)
    old = gpt(tokens()).logits
    gpt.resize_vocab(110)
    new = gpt(tokens()).logits
    assert new.shape[-1] == 110
    assert torch.equal(new[..., :97], old)
    assert ("lm_head.weight" in gpt.state_dict()) != tied
    again = GPT(gpt.cfg).eval()
    again.load_state_dict(gpt.state_dict())
    assert torch.equal(again(tokens()).logits, new)
    gpt.resize_vocab(97)
    assert torch.equal(gpt(tokens()).logits, old)
    if not tied:
        with pytest.raises(ValueError, match="resize_vocab changes both"):
            gpt.set_input_embeddings(nn.Embedding(50, 32))
    other = nn.Embedding(97, 32)
    gpt.set_input_embeddings(other)
    assert gpt.get_input_embeddings() is other
    if tied:
        assert torch.equal(gpt(tokens()).logits, F.linear(gpt(tokens()).hidden, other.weight))
        assert gpt.get_output_embeddings() is other


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_gets_a_gradient(name: str):
    gpt = tiny.model(name, lively=False)
    gpt(tokens(), tokens(seed=2)).loss.backward()
    # A bias on k adds the same to every score of a query, and softmax does not see it.
    silent = {n for n, p in gpt.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert all(n.endswith("k_proj.bias") for n in silent)


# --- N: initialisation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_n01_standard_deviations_of_fresh_weights(mlp: str):
    """An MLP's output was once left unscaled because the rule looked for the attention's name alone."""
    torch.manual_seed(0)
    gpt = GPT(ModelConfig(512, 256, 512, 8, 8, 4, max_position_embeddings=64, mlp=mlp, qkv_bias=True, j_branch=True))
    for name, p in gpt.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif ".j." in name:
            assert (p == 0.02 / 16).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            sigma = 0.02 / math.sqrt(16) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert abs(p.std().item() / sigma - 1) < 0.03, name
            assert abs(p.mean().item()) < 0.05 * sigma, name
            assert p.abs().max() <= 2.0001 * sigma / 0.87962566, name  # cut at two sigma of the wider normal


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "j-branch"])
@torch.no_grad()
def test_n02_the_residual_stream_grows_little_over_64_layers(name: str):
    """At width 128. A fixed sigma of 0.02 means more growth in wider models; NOTES.md has the table."""
    gpt = tiny.model(
        name, lively=False, num_hidden_layers=64, hidden_size=128, intermediate_size=384, num_attention_heads=4
    )
    norms: list[float] = []
    for block in gpt.model.layers:
        block.register_forward_hook(lambda _, __, out: norms.append(out.square().mean().sqrt().item()))
    gpt(tokens())
    start = gpt.model.embed_tokens(tokens())
    if name == "gpt2":
        start = start + gpt.model.embed_positions(torch.arange(T))
    assert norms[-1] <= 3 * start.square().mean().sqrt().item()


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mqa", "wide-heads"])
def test_flops_are_those_that_torch_counts(name: str):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    gpt = tiny.model(name)
    # The unfused kernel, because torch counts no attention in the CPU's fused one; it computes all T x T scores.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gpt(tokens(1)).logits.sum().backward()
    assert counter.get_total_flops() / T == dense_flops_per_token(gpt.cfg, T, causal=False)
    halves = [dense_flops_per_token(gpt.cfg, T, causal=causal, training=False) for causal in (True, False)]
    scores = 4 * gpt.cfg.num_attention_heads * gpt.cfg.head_size * gpt.cfg.num_hidden_layers
    assert halves[1] - halves[0] == scores * (T - (T + 1) / 2)  # query t needs t + 1 keys: (T + 1) / 2 on average
    assert 3 * halves[0] == dense_flops_per_token(gpt.cfg, T)
