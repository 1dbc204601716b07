"""Conditional compute: the invariants of the three variants, against a loop in float64 that was written apart.

Tests are named after the invariants of the design, `inv_01` to `inv_28`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import tiny
import torch
from routing_reference import Reference
from torch import Tensor, nn

from model import GPT, KVCache, beam_search, generate
from nanoqwen import routing
from nanoqwen.routing import (
    RoutingConfig,
    build_model,
    layers_used,
    penalty_weights,
    routed_layers,
    routing_mode,
    select_top,
    set_step,
)

KINDS = ("mod", "dtf", "tdtf")
PRIORS = {"dtf": "prior_ffn", "tdtf": "transition_net"}
B, T, V, WINDOW = 3, 17, 97, 5
CHUNKS = ([1] * T, [T], [3, 1, 1, 5, 7], [16, 1])
each_kind = pytest.mark.parametrize("kind", KINDS)


def settings(kind: str, **more) -> RoutingConfig:
    return RoutingConfig(**{"kind": kind, "capacity": 0.5, "ma_window": WINDOW, **more})


def model(kind: str, *, layers: int = 4, seed: int = 0, shape: dict | None = None, **more) -> GPT:
    """In eval mode, with lively weights and thresholds such that about a capacity's share of tokens is computed."""
    torch.manual_seed(seed)
    gpt = build_model(tiny.config(num_hidden_layers=layers, **(shape or {})), settings(kind, **more)).eval()
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            if p.dim() > 1:
                p.mul_(10)
            elif not name.startswith("routers."):
                p.add_(torch.randn_like(p) * 0.1)
        with routing_mode(gpt, "calibrate"):
            gpt(tokens(seed=9))
    return gpt


def tokens(rows: int = B, length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def reference(gpt: GPT, **more) -> Reference:
    cfg = gpt.routing
    layers = routed_layers(gpt.cfg, cfg)
    how = {"capacity": cfg.share, "gate": cfg.gating, "window": cfg.ma_window}
    return Reference(gpt, cfg.kind, layers, **how | more)


def thresholds(gpt: GPT) -> dict[int, float]:
    return {int(layer): float(router.causal_router.threshold) for layer, router in gpt.routers.items()}


@torch.no_grad()
def run(gpt: GPT, ids: Tensor, mode: str = "auto", **more):
    with routing_mode(gpt, mode):
        return gpt(ids, **more)


def masks(out) -> dict[int, list[list[bool]]]:
    return {int(k.split("/")[0]): v.tolist() for k, v in out.stats.items() if k.endswith("/chosen")}


def dense_twin(gpt: GPT) -> GPT:
    twin = GPT(gpt.cfg).eval()
    twin.load_state_dict({k: v for k, v in gpt.state_dict().items() if not k.startswith("routers.")})
    return twin


@torch.no_grad()
def cached(gpt: GPT, ids: Tensor, chunks: Sequence[int]) -> tuple[Tensor, KVCache]:
    """(the last logits of each chunk [B, chunks, V], the cache)"""
    cache, out, start = KVCache(gpt.cfg, len(ids), length=ids.shape[1]), [], 0
    for count in chunks:
        out.append(gpt(ids[:, start : start + count], cache=cache).logits)
        start += count
    return torch.cat(out, dim=1), cache


def entries(cache: KVCache, layer: int) -> list[int]:
    return cache.layer_state[layer].counts.tolist()


def gradients(gpt: GPT, loss: Tensor) -> dict[str, float]:
    gpt.zero_grad()
    loss.backward()
    return {name: 0.0 if p.grad is None else float(p.grad.abs().max()) for name, p in gpt.named_parameters()}


def close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-6 of the largest logit: fp32 itself has 1.2e-7."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def part(found: dict[str, float], *words: str) -> dict[str, float]:
    return {name: value for name, value in found.items() if any(word in name.split(".") for word in words)}


# --- what it is compared with -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [4, 5])
@each_kind
def test_topk_equals_a_loop_in_float64_with_its_masks_and_penalties(kind: str, layers: int):
    gpt, ids = model(kind, layers=layers), tokens()
    out = run(gpt, ids, "topk")
    for row in range(B):
        logits, chosen, penalties = reference(gpt).topk(ids[row].tolist())
        torch.testing.assert_close(out.logits[row].double(), logits, rtol=0, atol=1e-5)
        assert {layer: found[row] for layer, found in masks(out).items()} == chosen
        assert penalties == pytest.approx({name: float(out.penalties[name][row]) for name in penalties}, abs=1e-6)
        assert penalties.keys() == out.penalties.keys() == penalty_weights(gpt.routing).keys()


@each_kind
def test_packed_documents_are_routed_together_and_computed_apart(kind: str):
    """Capacity counts per row; attention, averages and the token before restart with a document."""
    gpt, ids = model(kind), tokens()
    documents = [[0] * 5 + [1] * 9 + [2] * 3, [0] * 17, [3] + [4] * 7 + [5] * 9]
    out = run(gpt, ids, "topk", documents=torch.tensor(documents))
    for row in range(B):
        logits, chosen, penalties = reference(gpt).topk(ids[row].tolist(), documents[row])
        torch.testing.assert_close(out.logits[row].double(), logits, rtol=0, atol=1e-5)
        assert {layer: found[row] for layer, found in masks(out).items()} == chosen
        assert penalties == pytest.approx({name: float(out.penalties[name][row]) for name in penalties}, abs=1e-6)
    alone = run(gpt, ids[:1, 5:14]).logits
    packed = run(gpt, ids[:1], documents=torch.tensor(documents[:1])).logits
    torch.testing.assert_close(packed[:, 5:14], alone, rtol=0, atol=1e-5)


# --- INV-1, 2: reductions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["ste", "hard"])
@each_kind
def test_inv_01_at_full_capacity_it_is_the_dense_model(kind: str, gate: str):
    gpt, ids = model(kind, capacity=1.0, gate=gate), tokens()
    expected = dense_twin(gpt)(ids).logits
    for mode in ("topk", "all"):
        torch.testing.assert_close(run(gpt, ids, mode).logits, expected, rtol=0, atol=1e-5)
    gpt.train()  # with gradients, where ste is not simply 1
    torch.testing.assert_close(gpt(ids).logits, expected, rtol=0, atol=1e-5)


@each_kind
def test_inv_02_at_full_capacity_a_soft_gate_weighs_each_update(kind: str):
    gpt, ids = model(kind, capacity=1.0, gate="soft"), tokens()
    out = run(gpt, ids, "topk")
    for row in range(B):
        logits, _, _ = reference(gpt).topk(ids[row].tolist())
        torch.testing.assert_close(out.logits[row].double(), logits, rtol=0, atol=1e-5)


def test_a_raw_gate_is_the_score_itself():
    gpt, ids = model("mod", gate="raw"), tokens(1)
    logits, _, _ = reference(gpt).topk(ids[0].tolist())
    torch.testing.assert_close(run(gpt, ids, "topk").logits[0].double(), logits, rtol=0, atol=1e-5)


# --- INV-3, 4: who looks ahead ----------------------------------------------------------------------------------------


@each_kind
def test_inv_03_causal_routing_never_looks_ahead(kind: str):
    gpt, ids = model(kind), tokens()
    before = run(gpt, ids)
    for t in range(T - 1):
        other = ids.clone()
        other[:, t + 1] = (other[:, t + 1] + 1) % V
        after = run(gpt, other)
        torch.testing.assert_close(after.logits[:, : t + 1], before.logits[:, : t + 1], rtol=0, atol=1e-5)
        for layer, found in masks(before).items():
            assert [row[: t + 1] for row in masks(after)[layer]] == [row[: t + 1] for row in found]


@each_kind
def test_inv_03_a_later_token_changes_no_bit_of_an_earlier_logit(kind: str):
    """How many later tokens are selected must not choose another kernel for the earlier ones."""
    gpt = model(kind, capacity=0.25, shape={"hidden_size": 128, "intermediate_size": 256})
    texts = tokens(rows=2, length=256)
    for seed in range(12):
        cut, (first, second) = 3 + 5 * seed, tokens(rows=2, length=1, seed=seed)
        texts[1, :cut] = texts[0, :cut]
        texts[0, cut:], texts[1, cut:] = first, second  # one is selected often, the other seldom
        ones, others = (run(gpt, row[None]).logits[0, :cut] for row in texts)
        assert torch.equal(ones, others)


@each_kind
def test_a_token_at_the_threshold_itself_is_not_selected(kind: str):
    """As many lie above a calibrated threshold as the capacity says; equal ones would all come in together."""
    gpt = model(kind)
    for router in gpt.routers.values():
        router.causal_router.weight.data.zero_(), router.causal_router.bias.data.zero_()
        router.causal_router.threshold.fill_(0.5)  # the sigmoid of each logit
    assert not any(any(row) for found in masks(run(gpt, tokens())).values() for row in found)


@each_kind
def test_inv_04_topk_routing_does(kind: str):
    gpt, ids = model(kind), tokens()
    before, largest = run(gpt, ids, "topk").logits, 0.0
    for t in range(T - 1):
        other = ids.clone()
        other[:, t + 1] = (other[:, t + 1] + 1) % V
        gap = run(gpt, other, "topk").logits[:, : t + 1] - before[:, : t + 1]
        largest = max(largest, float(gap.abs().max()))
    assert largest > 1e-3


# --- INV-5, 6, 8, 26: the cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@each_kind
def test_inv_05_06_the_cache_in_any_chunks_equals_one_forward(kind: str, chunks: list[int], static: bool):
    gpt, ids = model(kind), tokens()
    full = run(gpt, ids)
    for router in gpt.routers.values():
        router.static = static
    last, cache = cached(gpt, ids, chunks)
    ends = torch.tensor(chunks).cumsum(0) - 1
    torch.testing.assert_close(last, full.logits[:, ends], rtol=0, atol=1e-5)
    assert cache.lengths == [T] * B
    decisions = masks(full)
    assert len({tuple(map(tuple, rows)) for rows in decisions.values()}) > 1
    for layer in range(gpt.cfg.num_hidden_layers):
        if layer in decisions:
            assert cache._keys[layer] is None
            assert entries(cache, layer) == [sum(row) for row in decisions[layer]]
        else:
            assert cache._keys[layer] is not None


@each_kind
def test_inv_08_the_vectorised_forward_equals_a_loop_over_tokens(kind: str):
    gpt, ids = model(kind), tokens()
    out = run(gpt, ids)
    for row in range(B):
        logits, chosen = reference(gpt).causal(ids[row].tolist(), thresholds(gpt))
        torch.testing.assert_close(out.logits[row].double(), logits, rtol=0, atol=1e-5)
        assert {layer: found[row] for layer, found in masks(out).items()} == chosen
        assert any(any(found) and not all(found) for found in chosen.values())


@pytest.mark.parametrize("rows", [[2, 0, 0, 1], [1], [2, 1, 0], [0, 0]])
@each_kind
def test_inv_26_selected_rows_of_a_cache_go_on_as_they_would_have(kind: str, rows: list[int]):
    gpt, ids = model(kind), tokens()
    full = run(gpt, ids).logits
    cache = KVCache(gpt.cfg, B, length=T)
    with torch.no_grad():
        gpt(ids[:, :9], cache=cache)
        cache.select(rows)
        for t in range(9, T):
            logits = gpt(ids[rows, t : t + 1], cache=cache).logits[:, 0]
            torch.testing.assert_close(logits, full[rows, t], rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [0, 1, 4, 8, 20])
@each_kind
def test_a_cropped_cache_goes_on_as_if_the_rest_had_never_been(kind: str, length: int):
    """Averages and the token before come back too: a number a token is kept for each."""
    gpt, ids = model(kind), tokens()
    cache = KVCache(gpt.cfg, B, length=T)
    with torch.no_grad():
        for t in range(9):
            gpt(tokens(seed=1)[:, t : t + 1], cache=cache)
        cache.crop(length)
        start = min(length, 9)
        other = torch.cat([ids[:, :start], tokens(seed=5)[:, start:]], dim=1)
        full = run(gpt, other).logits
        for t in range(start, T):
            logits = gpt(other[:, t : t + 1], cache=cache).logits[:, 0]
            torch.testing.assert_close(logits, full[:, t], rtol=0, atol=1e-5)


@each_kind
def test_rows_of_different_lengths_share_a_cache(kind: str):
    gpt, ids = model(kind), tokens()
    full, cache, at = run(gpt, ids).logits, KVCache(gpt.cfg, B, length=T), [0] * B
    for lengths in ([3, 1, 5], [1, 0, 2], [1, 1, 1], [4, 6, 2]):
        parts = [ids[row, at[row] : at[row] + n].tolist() + [0] * (6 - n) for row, n in enumerate(lengths)]
        with torch.no_grad():
            out = gpt(torch.tensor(parts), cache=cache, lengths=lengths).logits[:, 0]
        at = [a + n for a, n in zip(at, lengths, strict=True)]
        for row, n in enumerate(lengths):
            if n:
                torch.testing.assert_close(out[row], full[row, at[row] - 1], rtol=0, atol=1e-5)
    assert cache.lengths == at


@each_kind
def test_the_bytes_of_a_cache_are_those_of_its_tensors_and_fewer_than_a_dense_one_has(kind: str):
    gpt, ids = model(kind, capacity=0.25), tokens()
    _, cache = cached(gpt, ids, [T])
    _, dense = cached(dense_twin(gpt), ids, [T])
    held = [t for t in (*cache._keys, *cache._values) if t is not None]
    for state in cache.layer_state.values():
        held += [state.counts, state._keys, state._values, state._slots, state._history]
    assert cache.nbytes == sum(t.element_size() * t.nelement() for t in held) < 0.8 * dense.nbytes
    cache.free()
    assert cache.nbytes == 0
    assert torch.equal(gpt.eval()(ids).logits, run(gpt, ids).logits)


@each_kind
def test_a_cache_grows_with_what_is_selected_and_no_further_than_the_row(kind: str):
    gpt, ids = model(kind, capacity=1.0), tokens()
    for router in gpt.routers.values():
        router.causal_router.threshold.zero_()
    last, cache = cached(gpt, ids, [1] * T)
    torch.testing.assert_close(last, run(gpt, ids, "all").logits, rtol=0, atol=1e-5)
    assert entries(cache, 1) == [T] * B


@each_kind
def test_a_forward_that_fails_leaves_no_trace_in_the_cache(kind: str):
    gpt, ids = model(kind), tokens()
    full, cache = run(gpt, ids).logits, KVCache(gpt.cfg, B, length=T)
    with torch.no_grad():
        gpt(ids[:, :5], cache=cache)
        before = {layer: entries(cache, layer) for layer in (1, 3)}
        broken = gpt.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gpt(ids[:, 5:12], cache=cache)
        broken.remove()
        assert {layer: entries(cache, layer) for layer in (1, 3)} == before
        out = gpt(ids[:, 5:12], cache=cache).logits[:, 0]
    torch.testing.assert_close(out, full[:, 11], rtol=0, atol=1e-5)


@each_kind
def test_text_and_beams_with_a_cache_equal_those_without(kind: str):
    gpt = model(kind)
    prompts = [[5, 6, 7, 8], [1, 2], [9, 3, 4, 1, 1, 1, 2]]
    how = {"max_new_tokens": 12, "temperature": 0.0}
    assert generate(gpt, prompts, **how) == generate(gpt, prompts, use_cache=False, **how)
    beams = [
        beam_search(gpt, prompts, num_beams=3, max_new_tokens=8, use_cache=use_cache) for use_cache in (True, False)
    ]
    assert [[b.ids for b in row] for row in beams[0]] == [[b.ids for b in row] for row in beams[1]]


@each_kind
def test_nothing_selected_is_the_identity_and_costs_no_block(kind: str, monkeypatch: pytest.MonkeyPatch):
    gpt, ids = model(kind), tokens()
    full = run(gpt, ids, "none").logits
    rest = dense_twin(gpt)
    rest.model.layers = nn.ModuleList(layer for n, layer in enumerate(rest.model.layers) if n % 2 == 0)
    for n, layer in enumerate(rest.model.layers):
        layer.self_attn.layer = n
    torch.testing.assert_close(full, rest(ids).logits, rtol=0, atol=1e-6)
    called = []
    for layer in (1, 3):
        gpt.model.layers[layer].register_forward_pre_hook(lambda *_: called.append(1))
    with routing_mode(gpt, "none"):
        last, cache = cached(gpt, ids, [5, *[1] * 12])
    torch.testing.assert_close(last[:, -1], full[:, -1], rtol=0, atol=1e-5)
    assert not called
    assert entries(cache, 1) == [0] * B


def test_topk_and_a_cache_are_refused_together():
    gpt = model("mod")
    with pytest.raises(ValueError, match="no cache"):
        run(gpt, tokens(), "topk", cache=KVCache(gpt.cfg, B))


# --- INV-7, 9, 10, 11, 17, 18, 25: the operator -----------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, [17, 4, 1], [17, 0, 9]])
@each_kind
def test_inv_07_each_row_has_its_number_of_tokens_in_their_order(kind: str, lengths: list[int] | None):
    score = torch.randn(B, T).round(decimals=1)  # with ties
    valid = None if lengths is None else torch.arange(T) < torch.tensor(lengths)[:, None]
    chosen = select_top(score, valid, 0.3)
    for row, count in enumerate(lengths or [T] * B):
        k = min(count, max(1, int(0.3 * count + 1e-6)))
        real = chosen.index[row] if chosen.real is None else chosen.index[row][chosen.real[row]]
        assert len(real) == k
        assert real.tolist() == sorted(set(real.tolist()))
        best = sorted(range(count), key=lambda t: (-float(score[row, t]), t))[:k]
        assert real.tolist() == sorted(best)
        assert chosen.mask[row].nonzero()[:, 0].tolist() == real.tolist()


def test_equal_scores_go_to_the_first_tokens():
    assert select_top(torch.zeros(2, 8), None, 0.5).index.tolist() == [[0, 1, 2, 3]] * 2


@each_kind
def test_routers_of_zeros_do_not_crash(kind: str):
    gpt = model(kind)
    with torch.no_grad():
        for p in gpt.routers.parameters():
            p.zero_()
    for mode in ("topk", "causal", "calibrate"):
        assert run(gpt, tokens(), mode).logits.isfinite().all()


@pytest.mark.parametrize("mode", ["topk", "causal"])
@each_kind
def test_inv_09_tokens_that_are_not_selected_pass_by_to_the_bit(kind: str, mode: str):
    gpt, ids, seen = model(kind), tokens(), {}
    router = gpt.routers["1"]
    inner = router.forward

    def watched(x, *rest):
        seen["in"], seen["out"] = x, inner(x, *rest)
        return seen["out"]

    router.forward = watched
    chosen = torch.tensor(masks(run(gpt, ids, mode))[1])
    assert torch.equal(seen["out"][~chosen], seen["in"][~chosen])
    assert ((seen["out"] - seen["in"])[chosen].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("mode", ["topk", "causal"])
@each_kind
def test_inv_10_a_row_does_not_depend_on_its_batch(kind: str, mode: str):
    gpt, ids = model(kind), tokens()
    batch = run(gpt, ids, mode)
    for row in range(B):
        alone = run(gpt, ids[row : row + 1], mode)
        close(alone.logits[0], batch.logits[row])
        assert {k: v[0] for k, v in masks(alone).items()} == {k: v[row] for k, v in masks(batch).items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["topk", "causal"])
@each_kind
def test_inv_11_padding_changes_nothing(kind: str, mode: str, side: str):
    gpt, ids, pad = model(kind), tokens(), 6
    plain = run(gpt, ids, mode)
    filler = tokens(length=pad, seed=4)
    if side == "right":
        padded = run(gpt, torch.cat([ids, filler], 1), mode, lengths=[T] * B)
        own = slice(0, T)
    else:
        mask = (torch.arange(T + pad) >= pad).expand(B, -1)
        padded = run(gpt, torch.cat([filler, ids], 1), mode, attn_mask=mask)
        own = slice(pad, None)
    close(padded.logits[:, own], plain.logits)
    for layer, found in masks(plain).items():
        assert [row[own] for row in masks(padded)[layer]] == found
        assert sum(map(sum, masks(padded)[layer])) == sum(map(sum, found))
    for name, values in plain.penalties.items():
        torch.testing.assert_close(padded.penalties[name], values, rtol=0, atol=1e-6)
    single = {k: v for k, v in plain.stats.items() if v.dim() == 0}
    for name, value in single.items():
        torch.testing.assert_close(padded.stats[name], value, rtol=1e-5, atol=1e-6, msg=name)


@each_kind
def test_padding_on_the_left_goes_with_a_cache(kind: str):
    gpt, ids, pad = model(kind), tokens(), 6
    full, cache = run(gpt, ids).logits, KVCache(gpt.cfg, B, length=T + pad)
    padded = torch.cat([tokens(length=pad, seed=4), ids], 1)
    mask, start = (torch.arange(T + pad) >= pad).expand(B, -1), 0
    for count in (pad + 3, 1, 1, 5, 7):
        with torch.no_grad():
            out = gpt(padded[:, start : start + count], cache=cache, attn_mask=mask).logits[:, 0]
        start += count
        torch.testing.assert_close(out, full[:, start - pad - 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", [0.3, 1.0])
@each_kind
def test_inv_24_the_operator_and_its_gradients_equal_those_of_a_mask_over_all_tokens(kind: str, share: float):
    """No kernel of our own: gather, block, scatter. The slow twin computes all tokens and lets them see the chosen."""
    gpt, ids = model(kind), tokens()
    block, found = gpt.model.layers[1], []
    for fast in (True, False):
        gpt.zero_grad()
        x = torch.randn(B, T, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        gate = torch.rand(B, T, generator=torch.Generator().manual_seed(3)).requires_grad_()
        ctx = gpt._context(ids, [T] * B)
        chosen = select_top(x.sum(-1), None, share)
        if fast:
            out = routing.apply_to_selected(block, x, chosen, gate, ctx)
        else:
            seen = torch.ones(T, T, dtype=torch.bool).tril() & chosen.mask[:, None, :]
            seen = seen | torch.eye(T, dtype=torch.bool)  # what passes by may look at itself: nobody reads it
            update = block(x, ctx._replace(mask=seen[:, None])) - x
            out = x + torch.where(chosen.mask, gate, 0)[..., None] * update
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
        (out * weights).sum().backward()
        found.append([out, x.grad, gate.grad, *(p.grad for p in block.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.detach().abs().max())))


@each_kind
def test_a_row_of_padding_alone_is_finite_and_selects_nothing(kind: str):
    gpt, ids = model(kind), tokens()
    for mode in ("topk", "causal"):
        out = run(gpt, ids, mode, lengths=[T, 0, 4])
        assert out.logits.isfinite().all()
        assert not any(any(found[1]) for found in masks(out).values())
        assert all(float(v[1]) == 0 and v.isfinite().all() for v in out.penalties.values())
    nothing = torch.full_like(ids, -100)  # as ranks without a window of their own evaluate it
    for mode in ("topk", "causal", "calibrate"):
        out = run(gpt, ids, mode, targets=nothing, at=torch.empty(0, dtype=torch.long))
        assert all(v.isfinite().all() for v in (*out.stats.values(), *out.penalties.values(), out.loss))


@each_kind
def test_what_lies_behind_the_last_target_of_a_row_is_padding(kind: str):
    """So that the filler of a short conversation takes no capacity; prompts, which have no targets, are routed."""
    gpt, ids = model(kind).train(), tokens()
    targets = ids.roll(-1, 1)
    targets[0, 8:], targets[1, :6], targets[1, 12:], targets[2] = -100, -100, -100, -100
    at = (targets != -100).flatten().nonzero()[:, 0]
    chosen = masks(gpt(ids, targets, at=at))
    for found in chosen.values():
        assert [sum(row) for row in found] == [4, 6, 0]
        assert not any(found[0][8:] + found[1][12:])


@each_kind
def test_inv_17_slots_are_in_the_order_of_their_tokens(kind: str, monkeypatch: pytest.MonkeyPatch):
    gpt, ids = model(kind), tokens()
    right = run(gpt, ids, "topk").logits
    sorted_top = routing.select_top

    def shuffled(*arguments):
        chosen = sorted_top(*arguments)
        return chosen._replace(index=chosen.index.flip(1))

    monkeypatch.setattr(routing, "select_top", shuffled)
    assert float((run(gpt, ids, "topk").logits - right).abs().max()) > 1e-2  # a missing sort would be seen
    monkeypatch.setattr(routing, "select_top", lambda rank, *rest: sorted_top(3 * rank - 1, *rest))
    torch.testing.assert_close(run(gpt, ids, "topk").logits, right, rtol=0, atol=1e-6)


@each_kind
def test_inv_18_tokens_keep_their_positions(kind: str, monkeypatch: pytest.MonkeyPatch):
    gpt, ids = model(kind), tokens(1)
    right = run(gpt, ids, "topk").logits
    context = GPT._context

    def shifted(self, *arguments, **how):
        ctx = context(self, *arguments, **how)
        cos, sin = self.rope.tables(self.cfg, 64, ids.device)
        return ctx._replace(cos=cos[ctx.positions + 11][:, None], sin=sin[ctx.positions + 11][:, None])

    monkeypatch.setattr(GPT, "_context", shifted)
    torch.testing.assert_close(run(gpt, ids, "topk").logits, right, rtol=0, atol=1e-4)
    monkeypatch.undo()
    select = routing._select_positions

    def ranked(ctx, rows, index):  # slot numbers in place of positions
        ranks = torch.arange(index.shape[1]).expand_as(index)
        return select(ctx, rows, ranks)

    monkeypatch.setattr(routing, "_select_positions", ranked)
    assert float((run(gpt, ids, "topk").logits - right).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("count", "share", "k"), [(7, 0.125, 1), (100, 0.29, 29), (1024, 0.125, 128), (10, 0.7, 7), (0, 0.5, 0), (3, 1, 3)]
)
def test_inv_25_rounding_of_the_capacity(count: int, share: float, k: int):
    assert routing.row_capacity(share, count) == k


@pytest.mark.parametrize("architecture", ["qwen2-untied", "mqa", "qwen3", "dynamic", "gpt2", "j-branch"])
@each_kind
def test_every_architecture_can_be_routed(kind: str, architecture: str):
    torch.manual_seed(0)
    gpt = build_model(tiny.config(architecture, num_hidden_layers=4), settings(kind)).eval()
    run(gpt, tokens(), "calibrate")
    full = run(gpt, tokens())
    last, _ = cached(gpt, tokens(), [5, 1, 1, 10])
    torch.testing.assert_close(last, full.logits[:, [4, 5, 6, 16]], rtol=0, atol=1e-4)


# --- INV-12, 13: gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["soft", "ste", "hard"])
@each_kind
def test_inv_12_what_the_loss_of_the_text_teaches(kind: str, gate: str):
    gpt, ids = model(kind, gate=gate).train(), tokens()
    found = gradients(gpt, gpt(ids, ids.roll(-1, 1)).loss)
    taught = part(found, "mod_router") if kind == "mod" else part(found, PRIORS[kind], "surprise_router")
    assert taught
    assert all(value != 0 for value in taught.values()) if gate != "hard" else not any(taught.values())
    assert not any(part(found, "causal_router").values())


@each_kind
def test_inv_13_the_penalties_teach_their_own_modules_alone(kind: str):
    gpt, ids = model(kind).train(), tokens()
    out = gpt(ids)
    found = gradients(gpt, out.penalties["causal_loss"].sum())
    assert all(part(found, "causal_router").values())
    assert not any(value for name, value in found.items() if "causal_router" not in name)
    if kind == "mod":
        return
    found = gradients(gpt, gpt(ids).penalties["prior_loss" if kind == "dtf" else "tpn_loss"].sum())
    assert all(part(found, PRIORS[kind]).values())
    assert not any(value for name, value in found.items() if PRIORS[kind] not in name)


@pytest.mark.parametrize("kind", ["dtf", "tdtf"])
def test_surprise_moves_the_backbone_only_where_it_is_let(kind: str):
    """Watched from the first layer's MLP by the surprise's own path: the gate of tokens."""
    found = {}
    for let in (True, False):
        gpt = model(kind, surprise_grad=let, gate="soft", layers=2).train()
        router, kept = gpt.routers["1"], {}
        scores = router.scores
        router.scores = lambda *a, scores=scores, kept=kept: kept.setdefault("s", scores(*a))
        gpt(tokens())
        found[let] = gradients(gpt, kept["s"].soft.sum())["model.layers.0.mlp.up_proj.weight"]
    assert found[True] > 0
    assert found[False] == 0


# --- INV-14 to 16: surprise -------------------------------------------------------------------------------------------


def test_inv_14_the_rank_orders_as_the_gate_does_and_past_its_rounding():
    router = routing.SurpriseRouter(settings("dtf", beta_mode="linear"))
    d_st, d_ch, average = (torch.rand(4, 64) * 0.4 for _ in range(3))
    found = router(d_st, d_ch, average)
    either = found.s_ce + found.s_cu - found.s_ce * found.s_cu
    torch.testing.assert_close(found.gate, either, rtol=0, atol=1e-6)
    by_rank = found.gate.gather(1, found.rank.argsort(1))
    assert (by_rank.diff(dim=1) >= -1e-7).all()  # but for the last digit
    router.beta_ce.fill_(100.0), router.beta_cu.fill_(100.0)
    sharp = router(d_st, d_ch, average)
    assert len(sharp.rank.unique()) > len(sharp.gate.unique())


@pytest.mark.parametrize("window", [1, 2, 5, 7, 100])
def test_inv_15_moving_averages_equal_brute_force(window: int):
    values = torch.rand(3, 40) * torch.tensor([1.0, 1.0, 1e-4])[:, None]
    values[2, 0] = 1e4  # a first token far larger than the rest, which a running sum in fp32 would not forget
    documents = torch.tensor([[0] * 40, [0] * 11 + [1] * 20 + [2] * 9, [0] * 40])
    starts = torch.tensor([[0] * 40, [0] * 11 + [11] * 20 + [31] * 9, [0] * 40])
    age = torch.arange(40) - starts
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[0, 30:] = False
    found = routing.moving_average(values, age, valid, window)
    for row in range(3):
        for t in range(40 if row else 30):
            first = max(int(starts[row, t]), t - window + 1)
            assert documents[row, first] == documents[row, t]
            expected = values[row, first : t + 1].double().mean()
            assert float(found[row, t]) == pytest.approx(float(expected), rel=1e-6)
    later = values.clone()
    later[:, 20:] += 1
    assert torch.equal(routing.moving_average(later, age, valid, window)[:, :20], found[:, :20])


def test_inv_16_first_values():
    router = routing.SurpriseRouter(RoutingConfig(kind="dtf"))
    now = {name: value.item() for name, value in router.effective().items()}
    assert now == pytest.approx({"o_ce": 1.025, "m_cu": 1.1, "beta_ce": 0.55436, "beta_cu": 0.43749}, abs=5e-6)
    assert [p.item() for p in (router.o_ce, router.m_cu)] == pytest.approx([0.58059, 0.69523], abs=5e-6)
    d = torch.rand(2, 5)
    found = router(d, d, d)  # a prior that expects nothing
    torch.testing.assert_close(found.ce, torch.full_like(d, math.log(1.025)), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.cu, d * (1 - 1.1), rtol=0, atol=1e-6)
    wide = tiny.config(hidden_size=896, num_attention_heads=14)
    for factor, inner, size in (
        (0.0625, 56, 151_424),
        (0.125, 112, 301_952),
        (0.25, 224, 603_008),
        (0.5, 448, 1_205_120),
    ):
        prior = routing.ResidualPrior(wide, factor)
        assert prior.w1.weight.shape[0] == inner
        assert sum(p.numel() for p in prior.parameters()) == size
    assert routing.ResidualPrior.width(tiny.config(hidden_size=8), 0.01) == 2


@pytest.mark.parametrize("share", [0.125, 0.5, 0.75, 1.0])
def test_the_causal_router_starts_with_the_capacitys_odds(share: float):
    router = build_model(tiny.config(), settings("mod", capacity=share)).routers["1"].causal_router
    expected = 9.0 if share == 1 else math.log(share / (1 - share))
    assert router.bias.item() == pytest.approx(expected)


# --- INV-20, 22, 23, 27, 28: training ---------------------------------------------------------------------------------


@each_kind
def test_inv_22_recomputed_activations_change_nothing(kind: str):
    found = []
    for recompute in (False, True):
        gpt, ids = model(kind).train(), tokens()
        gpt.checkpoint_activations = recompute
        out = gpt(ids, ids.roll(-1, 1))
        total = out.loss + sum(weight * out.penalties[n].sum() for n, weight in penalty_weights(gpt.routing).items())
        total.backward()
        found.append((total.item(), masks(out), {n: p.grad.clone() for n, p in gpt.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert found[0][1] == found[1][1]
    for name, grad in found[0][2].items():
        torch.testing.assert_close(found[1][2][name], grad, rtol=1e-5, atol=1e-5)


@each_kind
def test_inv_20_a_known_cycle_is_learned(kind: str):
    """A label shifted twice would leave this loss high."""
    torch.manual_seed(0)
    gpt = build_model(tiny.config(num_hidden_layers=2), settings(kind)).train()
    row = torch.tensor([3, 14, 15, 92, 65, 35, 89, 79] * 4)[None]
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    for _ in range(80):
        out = gpt(row[:, :-1], row[:, 1:])
        optimizer.zero_grad()
        (out.loss / out.weight).backward()
        optimizer.step()
    assert (out.loss / out.weight).item() < 0.05


def test_inv_23_the_causal_router_learns_what_is_marked():
    """Tokens above the middle of the vocabulary carry a mark in their embedding, by which MoD selects them."""
    torch.manual_seed(0)
    gpt = build_model(tiny.config(num_hidden_layers=2), settings("mod", capacity=0.5)).train()
    with torch.no_grad():
        gpt.model.embed_tokens.weight[:, 0] = torch.where(torch.arange(V) % 2 == 0, 3.0, -3.0)
        gpt.routers["1"].mod_router.weight.zero_()[0, 0] = 1.0
    router = gpt.routers["1"].causal_router
    optimizer = torch.optim.AdamW(router.parameters(), lr=3e-2)
    generator = torch.Generator().manual_seed(3)
    for _ in range(60):
        ids = torch.stack([torch.randperm(V - 1, generator=generator)[:32] for _ in range(8)])
        loss = gpt(ids).penalties["causal_loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    even = torch.randperm(48, generator=generator)[:16] * 2
    odd = torch.randperm(48, generator=generator)[:16] * 2 + 1
    held_out = torch.cat([even, odd])[torch.randperm(32, generator=generator)][None]
    stats = run(gpt, held_out, "topk").stats
    assert float(stats["1/causal_bce"]) < float(stats["1/causal_bce_baseline"])
    assert float(stats["1/causal_acc"]) > 0.95


def test_the_baseline_is_what_a_router_gets_that_knows_the_share_alone():
    stats = run(model("mod", capacity=0.125), tokens(length=64), "topk").stats
    assert float(stats["1/selected_fraction"]) == 0.125
    assert float(stats["1/causal_acc_baseline"]) == 0.875
    assert float(stats["1/causal_bce_baseline"]) == pytest.approx(0.3768, abs=1e-4)


@each_kind
def test_calibration_makes_the_share_the_capacity(kind: str):
    gpt, ids = model(kind, capacity=0.3), tokens(8, 40)
    run(gpt, ids, "calibrate")
    out = run(gpt, ids)
    for layer in (1, 3):
        assert float(out.stats[f"{layer}/selected_fraction"]) == pytest.approx(0.3, abs=0.01)
    full = model(kind, capacity=1.0)
    run(full, ids, "calibrate")
    assert float(run(full, ids).stats["1/selected_fraction"]) == 1.0


# --- schedules and shapes ---------------------------------------------------------------------------------------------


def test_capacity_falls_from_one_in_a_warm_up():
    gpt = model("mod", capacity=0.5, capacity_warmup=0.1)
    found = []
    for step in (0, 5, 10, 50):
        set_step(gpt, step, 100)
        found.append(gpt.routers["1"].capacity)
    assert found == pytest.approx([1.0, 0.75, 0.5, 0.5])


@pytest.mark.parametrize(("mode", "half"), [("linear", 3.15), ("cosine", 3.15)])
def test_scheduled_betas_are_functions_of_the_step_and_kept(mode: str, half: float):
    gpt = model("dtf", beta_mode=mode, beta_warmup=20)
    found = []
    for step in (0, 20, 60, 100):
        set_step(gpt, step, 100)
        found.append(float(gpt.routers["1"].surprise_router.beta_ce))
    assert found == pytest.approx([0.3, 0.3, half, 6.0])
    assert gpt.state_dict()["routers.1.surprise_router.beta_ce"].item() == pytest.approx(6.0)
    assert not any("beta" in name for name, _ in gpt.named_parameters())


def test_how_many_layers_computed_each_token():
    gpt = model("mod")
    out = run(gpt, tokens())
    expected = sum(torch.tensor(found).long() for found in masks(out).values())
    assert torch.equal(layers_used(out.stats), expected)
    assert expected.max() <= 2


def test_dense_is_the_plain_decoder_and_all_kinds_begin_with_its_weights():
    torch.manual_seed(0)
    plain = GPT(tiny.config())
    for kind in ("dense", *KINDS):
        torch.manual_seed(0)
        gpt = build_model(tiny.config(), RoutingConfig(kind=kind))
        own = {k: v for k, v in gpt.state_dict().items() if not k.startswith("routers.")}
        assert own.keys() == plain.state_dict().keys()
        assert all(torch.equal(v, plain.state_dict()[k]) for k, v in own.items())
        assert (gpt.routing is None) == (kind == "dense") == (len(gpt.routers) == 0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"capacity": 0.0}, "capacity: expected"),
        ({"capacity": 1.5}, "capacity: expected"),
        ({"layers": (0, 2)}, "layers: expected ascending"),
        ({"layers": (3, 1)}, "layers: expected ascending"),
        ({"kind": "dtf", "layers": (1, 2)}, "a dense layer before"),
        ({"kind": "dtf", "gate": "raw"}, "gate: expected"),
        ({"gate": "open"}, "gate: expected"),
        ({"ma_window": 0}, "ma_window: expected"),
        ({"causal_threshold": 1.0}, "causal_threshold: expected"),
        ({"causal_loss_weight": -1.0}, "causal_loss_weight: expected"),
        ({"mod_lr": 0.0}, "mod_lr: expected"),
        ({"o_ce_init": 0.0}, "o_ce_init: expected"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(more: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RoutingConfig(**{"kind": "mod", **more})


def test_which_layers_are_routed():
    four, five, one = (tiny.config(num_hidden_layers=n) for n in (4, 5, 1))
    assert routed_layers(four, RoutingConfig(kind="mod")) == routed_layers(five, RoutingConfig(kind="dtf")) == (1, 3)
    assert routed_layers(four, RoutingConfig(kind="mod", layers=(2, 3))) == (2, 3)
    with pytest.raises(ValueError, match="num_hidden_layers: expected 2 or more"):
        build_model(one, RoutingConfig(kind="tdtf"))
    with pytest.raises(ValueError, match="layers below 4"):
        build_model(four, RoutingConfig(kind="mod", layers=(4,)))
    assert replace(RoutingConfig(), kind="mod").share == 0.125


@each_kind
def test_routing_is_computed_in_fp32_in_every_precision(kind: str):
    """In bf16 the scores of a row would round to a few values, and tokens would be selected by position."""
    gpt, ids = model(kind).train(), tokens()
    exact = gpt(ids, ids.roll(-1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        out = gpt(ids, ids.roll(-1, 1))
        (out.loss + sum(value.sum() for value in out.penalties.values())).backward()
    assert all(p.grad.isfinite().all() for p in gpt.parameters() if p.grad is not None)
    for name, value in out.penalties.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact.penalties[name], rtol=0.05, atol=0.05)
    gpt.eval().model.to(torch.bfloat16)
    for router in gpt.routers.values():
        seen = []
        router.causal_router.register_forward_hook(lambda *a, seen=seen: seen.append(a[2].dtype))
        last, _ = cached(gpt, ids, [5, 1, 1, 10])
        assert last.isfinite().all()
        assert set(seen) == {torch.float32}
    narrow = generate(gpt, ids.tolist(), max_new_tokens=5, cache_dtype=torch.float16, temperature=0.0)
    assert all(len(row) == T + 5 for row in narrow)
