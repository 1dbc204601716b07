"""Choosing tokens: filters, penalties, sampling, beams. Oracles: transformers, brute force, exhaustive search."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import Counter

import pytest
import tiny
import torch
from torch import nn

import model as model_module
from model import (
    GPT,
    KVCache,
    ModelConfig,
    Output,
    Sampling,
    apply_penalties,
    beam_search,
    filter_logits,
    generate,
    pad_rows,
    sample,
    stream,
)
from nanoqwen.fast import FastGPT

VOCAB = tiny.SHAPE["vocab_size"]


def prompt(length: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(gpt: GPT, prompts: list[list[int]], **params) -> list[list[int]]:
    return generate(gpt, prompts, temperature=0.0, **params)


class Markov(nn.Module):
    """A stand-in for GPT whose next-token logits are a table [V, V] indexed by the last token."""

    def __init__(self, table: torch.Tensor, context: int = 64):
        super().__init__()
        vocab = len(table)
        self.cfg = ModelConfig(vocab, 8, 8, 1, 1, 1, max_position_embeddings=context)
        self.table, self.device = table, table.device

    def new_cache(self, rows: int, dtype: torch.dtype | None, length: int) -> KVCache:
        return KVCache(self.cfg, rows, dtype, length)

    def forward(self, tokens, *, cache=None, lengths=None, attn_mask=None) -> Output:
        logits = self.table[tokens]
        if cache is not None:
            cache.advance(lengths)
            logits = logits[torch.arange(len(tokens)), torch.tensor(lengths) - 1][:, None]
        return Output(logits, logits, None, None, {}, {})


@pytest.mark.parametrize("minimum", [0, 1, 2, 5])
def test_a_row_ends_right_after_its_minimum_length(minimum: int):
    """eos is the most likely token at each step: rows end as soon as they may, with eos as the first token beyond."""
    table = torch.full((7, 7), -1.0)
    table[:, 3] = 5.0
    model, prompts = Markov(table), [[0, 1], [2]]
    more = {"min_new_tokens": minimum, "max_new_tokens": 20, "eos": 3}
    for rows in (greedy(model, prompts, **more), generate(model, prompts, num_beams=2, early_stopping=True, **more)):
        assert [len(row) - len(start) for row, start in zip(rows, prompts, strict=True)] == [minimum + 1] * 2
        assert all(row[-1] == 3 for row in rows)


# --- filters ----------------------------------------------------------------------------------------------------------


def brute_force_support(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The definition in plain Python, one filter after the other."""
    order = sorted((i for i, x in enumerate(logits) if not math.isnan(x)), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]
    weights = {
        i: math.exp((logits[i] - logits[order[0]]) / temperature) if logits[i] > -math.inf else 0.0 for i in order
    }
    total = math.fsum(weights.values())
    kept, before = [], 0.0
    for i in order:
        p = weights[i] / total
        first = not kept
        if first or (weights[i] > 0 and (top_p >= 1 or before < top_p) and weights[i] >= min_p * weights[order[0]]):
            kept.append(i)
        before += p
    return set(kept)


def support(logits: torch.Tensor, **filters) -> list[set[int]]:
    probs, ids = filter_logits(logits, **filters)
    assert torch.allclose(probs.sum(-1), torch.ones(len(probs), dtype=probs.dtype))
    return [{int(i) for i, p in zip(*row, strict=True) if p > 0} for row in zip(ids, probs, strict=True)]


def strange_logits(rng: torch.Generator, vocab: int) -> torch.Tensor:
    logits = torch.randn(vocab, generator=rng) * 3
    kind = int(torch.randint(6, (), generator=rng))
    if kind == 1:
        logits = logits.round()  # ties
    elif kind == 2:
        logits[torch.rand(vocab, generator=rng) < 0.3] = -math.inf
        logits[0] = 0.0
    elif kind == 3:
        logits = logits * 1e37  # up to 1e38
    elif kind == 4:
        logits[:] = 1.5
    return logits


def test_l2_the_kept_set_equals_brute_force():
    rng = torch.Generator().manual_seed(0)
    draw = lambda *values: values[int(torch.randint(len(values), (), generator=rng))]  # noqa: E731
    for _ in range(10_000):
        logits = strange_logits(rng, draw(1, 2, 5, 13))
        how = {
            "temperature": draw(0.1, 0.7, 1.0, 2.0),
            "top_k": draw(0, 0, 1, 2, 4, 50),
            "top_p": draw(1.0, 0.0, 0.3, 0.77, 0.9001, 2.0),
            "min_p": draw(0.0, 0.0, 0.05, 0.31, 1.0),
        }
        got = support(logits[None], **how)[0]
        assert got == brute_force_support(logits.tolist(), **how), (logits, how)
        assert got


def test_g05_each_row_by_its_own_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 3.0, 3.0, 3.0], [9.0, 0.0, 0.0, 0.0]])
    assert support(logits, top_k=2) == [{3, 2}, {0, 1}, {0, 1}]  # exactly k, equal ones by id
    assert support(logits, top_p=0.5) == [{3}, {0, 1}, {0}]
    assert support(logits, top_p=0.0) == [{3}, {0}, {0}]
    assert support(logits, top_k=99) == [{0, 1, 2, 3}] * 3
    assert support(logits, min_p=0.2) == [{3, 2}, {0, 1, 2, 3}, {0}]


def test_l2_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    n = 100_000
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = Counter(sample(logits.expand(n, -1), uniform, temperature=0.8, top_k=4).tolist())
    probs, ids = filter_logits(logits, temperature=0.8, top_k=4)
    expected = {int(i): float(p) * n for i, p in zip(ids[0], probs[0], strict=True) if p > 0}
    assert set(drawn) == set(expected)
    chi_square = sum((drawn[i] - e) ** 2 / e for i, e in expected.items())
    assert chi_square < 21.1  # p > 1e-4 with three degrees of freedom


def test_sample_at_the_edges_of_the_unit_interval():
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 0.0, -math.inf]])
    assert sample(logits, torch.tensor([0.0], dtype=torch.float64)).tolist() == [1]
    assert sample(logits, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [3]
    assert sample(logits).tolist()[0] in (1, 3)


def test_g13_a_row_without_choice_falls_back_to_the_arg_max():
    nothing = torch.full((1, 4), -math.inf)
    assert sample(nothing, torch.tensor([0.7])).tolist() == [0]
    assert sample(nothing, temperature=0.0).tolist() == [0]
    half = torch.tensor([[1.0, 60_000.0, 3.0]], dtype=torch.float16)
    assert sample(half, torch.tensor([0.9]), temperature=0.1).tolist() == [1]


def test_g02_temperature_zero_is_greedy_with_ties_by_id():
    assert sample(torch.tensor([[1.0, 5.0, 5.0, 0.0]]), temperature=0.0).tolist() == [1]
    gpt = tiny.model()
    row = prompt(5)
    for _ in range(6):
        with torch.no_grad():
            row.append(int(gpt(torch.tensor([row])).logits[0, -1].argmax()))
    assert greedy(gpt, [row[:5]], max_new_tokens=6) == [row]
    assert generate(gpt, [row[:5]], max_new_tokens=6, temperature=1e-6, seed=3) == [row]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": -0.1}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"num_beams": 0}, "num_beams"),
        ({"early_stopping": "sometimes"}, "early_stopping"),
        ({"overflow": "wrap"}, "overflow"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_impossible_parameters_are_refused(wrong: dict, said: str):
    with pytest.raises(ValueError, match=said):
        generate(tiny.model(), [[1]], **wrong)
    with pytest.raises(TypeError, match="beam_width"):
        generate(tiny.model(), [[1]], beam_width=3)


# --- penalties --------------------------------------------------------------------------------------------------------


def test_g03_repetition_penalty_has_its_closed_form():
    """Dividing a negative logit makes a repeated token more likely, not less."""
    logits = torch.tensor([[2.0, -2.0, 0.0, 1.0, -1.0]])
    rows = [[0, 1, 1, 2]]
    assert apply_penalties(logits, rows, 1, Sampling(repetition_penalty=2.0)).tolist() == [[1.0, -4.0, 0.0, 1.0, -1.0]]
    assert torch.equal(apply_penalties(logits, rows, 1, Sampling(repetition_penalty=1.0)), logits)
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        logits = torch.randn(1, 9, generator=rng) * 4
        seen = torch.randint(9, (4,), generator=rng).tolist()
        before, after = (
            apply_penalties(logits, [seen], 1, Sampling(repetition_penalty=r)).softmax(-1) for r in (1.0, 1.3)
        )
        assert (after[0, list(set(seen))].sum() <= before[0, list(set(seen))].sum() + 1e-6).all()


def test_g04_penalties_come_before_the_filters():
    gpt = Markov(torch.tensor([[5.0, 4.0, 0.0], [5.0, 4.0, 0.0], [5.0, 4.0, 0.0]]))
    # Token 0 is seen and its logit of 5 / 2 falls behind 4: top-1 is then token 1, whatever the temperature.
    for temperature in (0.0, 1.0, 0.3):
        got = generate(gpt, [[0]], max_new_tokens=1, repetition_penalty=2.0, top_k=1, temperature=temperature)
        assert got == [[0, 1]]


def banned_by_brute_force(ids: list[int], n: int) -> set[int]:
    grams = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}
    return {gram[-1] for gram in grams if gram[:-1] == tuple(ids[len(ids) - n + 1 :])}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_g12_ngram_ban_equals_brute_force(n: int):
    for seed in range(100):
        ids = prompt(seed % 17 + 1, seed, vocab=3)
        got = apply_penalties(torch.zeros(1, 3), [ids], 1, Sampling(no_repeat_ngram_size=n))[0]
        assert {i for i in range(3) if got[i] == -math.inf} == banned_by_brute_force(ids, n)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_g12_no_ngram_twice_and_no_eos_too_early(num_beams: int):
    gpt, eos = tiny.model(), 11
    with torch.no_grad():
        gpt.model.embed_tokens.weight[eos] *= 3  # a likely eos
    for row in generate(
        gpt,
        [prompt(4), prompt(7)],
        max_new_tokens=30,
        num_beams=num_beams,
        temperature=0.0,
        no_repeat_ngram_size=2,
        min_new_tokens=9,
        eos=eos,
    ):
        pairs = list(itertools.pairwise(row))
        assert len(pairs) == len(set(pairs))
        assert eos not in row[:13]


def test_banned_ids_are_never_chosen():
    gpt = tiny.model()
    likely = {row[-1] for row in greedy(gpt, [prompt(5, seed) for seed in range(20)], max_new_tokens=1)}
    for params in ({"temperature": 0.0}, {"temperature": 5.0, "seed": 1}, {"num_beams": 3}):
        rows = generate(gpt, [prompt(5, seed) for seed in range(20)], max_new_tokens=4, banned=likely, **params)
        assert not likely & {i for row in rows for i in row[5:]}


def test_nan_logits_are_an_error_not_token_zero():
    with pytest.raises(FloatingPointError, match="finite"):
        generate(Markov(torch.full((3, 3), math.nan)), [[1]], max_new_tokens=1)
    half = Markov(torch.tensor([[math.nan, 1.0, 0.0]] * 3))
    assert greedy(half, [[1]], max_new_tokens=1) == [[1, 1]]


# --- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 20])
@pytest.mark.parametrize("length", [5, 50, 500])
def test_g01_exactly_n_new_tokens(length: int, n: int):
    """max_new_tokens was once taken for the total length, so a long prompt got nothing."""
    gpt = tiny.model(max_position_embeddings=600)
    row = prompt(length)
    for num_beams in (1, 2):
        (got,) = generate(gpt, [row], max_new_tokens=n, num_beams=num_beams)
        assert got[:length] == row
        assert len(got) == length + n


@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_cached_generation_equals_the_slow_twin(name: str):
    gpt, rows = tiny.model(name), [prompt(3), prompt(11, 1), prompt(7, 2)]
    for params in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5}, {"num_beams": 3, "eos": 4}):
        fast = generate(gpt, rows, max_new_tokens=12, **params)
        assert fast == generate(gpt, rows, max_new_tokens=12, use_cache=False, **params)
        assert fast == [generate(gpt, [row], max_new_tokens=12, **params)[0] for row in rows]


def test_g14_the_same_request_gives_the_same_text_in_any_company():
    gpt = tiny.model()
    row, other = prompt(6), prompt(4, 1)
    params = {"max_new_tokens": 15, "temperature": 1.5, "seed": 7}
    (alone,) = generate(gpt, [row], **params)
    assert generate(gpt, [other, row, prompt(9, 2)], **params)[1] == alone
    assert generate(gpt, [row], **{**params, "seed": 8})[0] != alone
    twice = generate(gpt, [row, other, row], **params)
    assert twice[0] == alone
    assert twice[2] != alone  # the same prompt a second time is a second draw
    for seed in (0, -1, 2**63 - 1, 2**80):
        assert generate(gpt, [row], **{**params, "seed": seed}) == generate(gpt, [row], **{**params, "seed": seed})
    torch.manual_seed(3)
    first = generate(gpt, [row], max_new_tokens=15, temperature=1.5)
    assert generate(gpt, [row], max_new_tokens=15, temperature=1.5) != first
    torch.manual_seed(3)
    assert generate(gpt, [row], max_new_tokens=15, temperature=1.5) == first


def test_g09_rows_that_end_at_different_steps():
    gpt, rows = tiny.model(), [prompt(5, seed) for seed in range(6)]
    free = greedy(gpt, rows, max_new_tokens=20)
    eos = Counter(row[5 + step] for step, row in enumerate(free)).most_common(1)[0][0]
    together = greedy(gpt, rows, max_new_tokens=20, eos=eos)
    assert len({len(row) for row in together}) > 1
    for row, got in zip(rows, together, strict=True):
        assert got == greedy(gpt, [row], max_new_tokens=20, eos=eos)[0]
        assert eos not in got[5:-1]
    padded, lengths = pad_rows(together, pad=eos)
    assert lengths == [len(row) for row in together]
    assert padded.shape == (6, max(lengths))
    assert all((padded[i, n:] == eos).all() for i, n in enumerate(lengths))
    assert greedy(gpt, rows, max_new_tokens=20, eos=[eos, 3]) == greedy(gpt, rows, max_new_tokens=20, eos={3, eos})
    assert greedy(gpt, rows, max_new_tokens=20, eos=None) == free


def test_prompts_may_be_a_tensor_and_must_not_be_empty():
    gpt = tiny.model()
    assert greedy(gpt, torch.tensor([[1, 2], [3, 4]]), max_new_tokens=2) == greedy(
        gpt, [[1, 2], [3, 4]], max_new_tokens=2
    )
    for wrong, said in (
        ([], "at least one"),
        ([[1], []], "prompt 2.*at least one token"),
        ([[97]], "ids of 0 to 96, got 97"),
        ([[-1]], "ids of 0 to 96, got -1"),
    ):
        with pytest.raises(ValueError, match=said):
            greedy(gpt, wrong, max_new_tokens=2)


def test_an_object_of_settings_is_as_good_as_keywords_which_override_it():
    gpt, rows = tiny.model(), [prompt(5), prompt(3, 1)]
    for values in ({"temperature": 0.0, "eos": 4}, {"top_k": 5, "seed": 3}, {"num_beams": 3, "length_penalty": 0.5}):
        settings = Sampling(max_new_tokens=7, **values)
        assert generate(gpt, rows, settings) == generate(gpt, rows, max_new_tokens=7, **values)
        assert generate(gpt, rows, settings, max_new_tokens=3) == generate(gpt, rows, max_new_tokens=3, **values)


def test_streaming_yields_what_generate_returns():
    gpt, rows = tiny.model(), [prompt(5), prompt(3, 1)]
    eos = greedy(gpt, rows, max_new_tokens=5)[0][-1]
    got = [list(row) for row in rows]
    events = list(stream(gpt, rows, max_new_tokens=8, temperature=0.0, eos=eos))
    for event in events:
        got[event.row].append(event.token)
    assert got == greedy(gpt, rows, max_new_tokens=8, eos=eos)
    ends = {event.row: event.finish for event in events if event.finish}
    assert ends[0] == "eos"
    assert set(ends) == {0, 1}
    with pytest.raises(ValueError, match="beams cannot be streamed"):
        next(stream(gpt, rows, num_beams=2))


def decode(ids: list[int]) -> str:
    return "".join(chr(97 + i) for i in ids)


def test_stop_strings_end_a_row_across_token_borders():
    cycle = torch.full((5, 5), -9.0)
    for i in range(5):
        cycle[i, (i + 1) % 5] = 9.0
    gpt = Markov(cycle)
    for stop, expected in (
        (["cd"], "ab"),
        (["xyz", "e"], "abcd"),
        (["eabc"], "abcd"),
        (["zz"], "abcdeabcdeabcdeabcde"),
    ):
        (row,) = greedy(gpt, [[4]], max_new_tokens=20, stop=stop, decode=decode)
        assert decode(row[1:]) == expected
    finish = [event.finish for event in stream(gpt, [[4]], max_new_tokens=20, stop=["cd"], decode=decode)]
    assert finish == [None, None, None, "stop"]
    # The prompt does not count: it ends in "e", and "ea" is not generated text until e comes round again.
    (row,) = greedy(gpt, [[4]], max_new_tokens=20, stop=["ea"], decode=decode)
    assert decode(row[1:]) == "abcd"
    with pytest.raises(ValueError, match="decode"):
        greedy(gpt, [[4]], stop=["x"])
    with pytest.raises(ValueError, match="stop and num_beams"):
        generate(gpt, [[4]], stop=["x"], num_beams=2)


def test_g10_overflow_policies():
    gpt = tiny.model(max_position_embeddings=16)
    short, long = prompt(4), prompt(12, 1)
    for params in ({}, {"num_beams": 2}):
        with pytest.raises(ValueError, match="prompt 2: 12 tokens and 8 new ones exceed the context of 16"):
            generate(gpt, [short, long], max_new_tokens=8, **params)
    got = greedy(gpt, [short, long], max_new_tokens=8, overflow="stop")
    assert [len(row) for row in got] == [12, 16]
    assert [len(row) for row in generate(gpt, [short, long], max_new_tokens=8, overflow="stop", num_beams=2)] == [
        12,
        16,
    ]
    with pytest.raises(ValueError, match="prompt 1: 16 tokens"):
        greedy(gpt, [prompt(16)], max_new_tokens=1, overflow="stop")
    with pytest.raises(ValueError, match="slide and num_beams"):
        generate(gpt, [short], num_beams=2, overflow="slide")


def test_g10_slide_reads_the_last_half_window_again():
    gpt, window = tiny.model(max_position_embeddings=16), 16
    rows = [prompt(4), prompt(12, 1), prompt(40, 2)]
    got = greedy(gpt, rows, max_new_tokens=40, overflow="slide")
    for row, result in zip(rows, got, strict=True):
        expected = list(row)
        start = 0 if len(row) <= window else len(row) - window // 2
        for _ in range(40):
            if len(expected) - start > window:
                start = len(expected) - window // 2
            with torch.no_grad():
                expected.append(int(gpt(torch.tensor([expected[start:]])).logits[0, -1].argmax()))
        assert result == expected  # no id is lost
    assert got == greedy(gpt, rows, max_new_tokens=40, overflow="slide", use_cache=False)


def test_g16_prefill_makes_logits_for_the_last_position_only(monkeypatch: pytest.MonkeyPatch):
    gpt, shapes = tiny.model(), []
    logits = GPT.logits
    monkeypatch.setattr(GPT, "logits", lambda self, hidden: shapes.append(tuple(hidden.shape)) or logits(self, hidden))
    greedy(gpt, [prompt(20), prompt(9, 1)], max_new_tokens=4)
    assert shapes == [(2, 1, 32)] * 4


def test_a_custom_mask_holds_during_generation():
    gpt, rows = tiny.model(), [prompt(5), prompt(9, 1)]
    near = lambda row, query, key: query - key < 4 + row  # noqa: E731
    q, k = torch.arange(24)[:, None], torch.arange(24)
    square = torch.stack([near(row, q, k) for row in range(2)])[:, None]
    eos = greedy(gpt, rows, max_new_tokens=3, attn_mask=square)[0][-1]  # row 0 ends first: the mask must follow row 1
    for params in ({"temperature": 0.0}, {"num_beams": 3}):
        params |= {"max_new_tokens": 12, "eos": eos}
        by_rule = generate(gpt, rows, attn_mask=near, **params)
        assert by_rule == generate(gpt, rows, attn_mask=square, **params)
        assert by_rule == generate(gpt, rows, attn_mask=near, use_cache=False, **params)
        assert by_rule != generate(gpt, rows, **params)
    with pytest.raises(ValueError, match="attn_mask"):
        greedy(gpt, rows, max_new_tokens=20, attn_mask=square)
    with pytest.raises(ValueError, match="slide"):
        greedy(gpt, rows, attn_mask=near, overflow="slide")


def test_a_request_leaves_the_mode_of_the_model_alone():
    """Two streams over a model in training: the first to end once switched dropout on under the other."""
    gpt = tiny.model(dropout=0.5).train()
    first, second = (stream(gpt, [[1]], max_new_tokens=n, temperature=0.0) for n in (2, 4))
    tokens = [next(first).token, next(second).token, next(first).token]
    assert gpt.training  # also in the middle of a stream that nobody reads to its end
    tokens += [event.token for event in second]
    assert list(first) == []
    gpt.eval()
    expected = [event.token for event in stream(gpt, [[1]], max_new_tokens=4, temperature=0.0)]
    assert tokens == [expected[0], expected[0], expected[1], *expected[1:]]
    beam_search(gpt.train(), [[1]], num_beams=2, max_new_tokens=2)
    assert gpt.training


@pytest.mark.parametrize("shape", [(3, 1, 40, 40), (3, 40), (1, 40), (1, 1, 1, 40), (1, 1, 40, 40)])
def test_a_tensor_mask_follows_its_rows_when_others_end(shape: tuple[int, ...]):
    gpt = tiny.model()
    rows = [prompt(4), prompt(6, 1), prompt(5, 2)]
    mask = torch.ones(shape, dtype=torch.bool)
    free = greedy(gpt, rows, max_new_tokens=10)
    for ends in range(3):  # each row ends first, once
        eos = free[ends][len(rows[ends])]
        assert greedy(gpt, rows, max_new_tokens=10, eos=eos, attn_mask=mask) == greedy(
            gpt, rows, max_new_tokens=10, eos=eos
        )


def test_dynamic_scaling_does_not_depend_on_company_or_length():
    gpt = tiny.model("dynamic", max_position_embeddings=16)
    short, long = prompt(5), prompt(20, 1)
    (alone,) = greedy(gpt, [short], max_new_tokens=6)
    assert greedy(gpt, [short, long], max_new_tokens=6)[0] == alone
    assert greedy(gpt, [short], max_new_tokens=12)[0][: len(alone)] == alone
    assert greedy(gpt, [short, long], max_new_tokens=6, use_cache=False)[0] == alone
    across = prompt(12, 2)  # keys stay as they were turned when the row was shorter
    assert greedy(gpt, [long, across], max_new_tokens=12)[1:] == greedy(gpt, [across], max_new_tokens=12)


def test_beams_keep_what_they_have_when_everything_is_banned():
    gpt = tiny.model(vocab_size=5)
    (beams,) = beam_search(gpt, [[0]], num_beams=2, no_repeat_ngram_size=1, max_new_tokens=10)
    assert sorted(beams[0].ids) == [0, 1, 2, 3, 4]


G17 = {
    "max_new_tokens": (5, 6),
    "min_new_tokens": (0, 9),
    "temperature": (0.0, 3.0),
    "top_k": (0, 1),
    "top_p": (1.0, 0.01),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1.0, 5.0),
    "no_repeat_ngram_size": (0, 1),
    "num_beams": (1, 4),
    "length_penalty": (0.0, 4.0),
    "early_stopping": (True, "never"),
    "overflow": ("stop", "slide"),
    "eos": ((), None),  # None: chosen below
    "banned": ((), None),
    "stop": ((), ("b",)),
    "seed": (1, 2),
}


@pytest.mark.parametrize("name", list(Sampling.__dataclass_fields__))
def test_g17_every_parameter_changes_the_output(name: str):
    gpt = tiny.model(max_position_embeddings=16)
    low, high = G17[name]
    base = {"max_new_tokens": 10, "temperature": 2.0, "seed": 1, "decode": decode_loose}
    if name in ("eos", "banned", "stop"):
        third = generate(gpt, [prompt(4)], **base)[0][6]
        high = (decode_loose([third]),) if name == "stop" else (third,)
    if name == "overflow":
        base["max_new_tokens"] = 20
    if name == "min_new_tokens":
        base["eos"] = generate(gpt, [prompt(4)], **base)[0][6]
    if name == "repetition_penalty":
        base["temperature"] = 0.0
    if name in ("num_beams", "length_penalty", "early_stopping"):
        base = {"max_new_tokens": 10, "temperature": 0.0, "eos": range(0, 97, 8)} | (
            {"num_beams": 3} if name != "num_beams" else {}
        )
    if name == "early_stopping":
        base["length_penalty"] = 2.0
    prompts = [prompt(4, seed) for seed in range(12)] if name in ("early_stopping", "length_penalty") else [prompt(4)]
    assert generate(gpt, prompts, **{**base, name: low}) != generate(gpt, prompts, **{**base, name: high})


def decode_loose(ids: list[int]) -> str:
    return "".join(chr(0x4E00 + i) for i in ids)


# --- beams ------------------------------------------------------------------------------------------------------------


def exhaustive(
    table: torch.Tensor, start: int, length: int, eos: int | None, penalty: float
) -> tuple[float, list[int]]:
    """The best of all sequences that end with eos or at `length`."""
    log_p, best = table.log_softmax(-1).tolist(), -math.inf

    def extend(ids: list[int], total: float) -> None:
        nonlocal best
        n = len(ids) - 1
        if n and (ids[-1] == eos or n == length):
            best = max(best, total / n**penalty)
            return
        for token, value in enumerate(log_p[ids[-1]]):
            extend([*ids, token], total + value)

    extend([start], 0.0)
    return best


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
def test_l3_beams_find_the_brute_force_optimum(penalty: float):
    rng = torch.Generator().manual_seed(int(penalty * 10))
    for case in range(60):
        table = torch.randn(5, 5, generator=rng) * 2
        eos = 4 if case % 2 else None
        best = exhaustive(table, 0, 4, eos, penalty)
        params = {"max_new_tokens": 4, "eos": eos, "length_penalty": penalty, "early_stopping": "never"}
        for width in (1, 2, 3, 5, 625):
            (beams,) = beam_search(Markov(table), [[0]], num_beams=width, **params)
            assert beams[0].score <= best + 1e-5
            assert all(a.score >= b.score for a, b in itertools.pairwise(beams))
            for beam in beams:
                steps = list(itertools.pairwise(beam.ids))
                total = sum(table.log_softmax(-1)[a, b].item() for a, b in steps)
                assert abs(total / len(steps) ** penalty - beam.score) <= 1e-5
                assert eos not in beam.ids[:-1]
        assert abs(beams[0].score - best) <= 1e-5  # equal sums may come in another order of the same steps


def test_g06_one_beam_is_greedy():
    gpt = tiny.model()
    for seed in range(10):
        row = prompt(5, seed)
        assert (
            beam_search(gpt, [row], num_beams=1, max_new_tokens=8)[0][0].ids == greedy(gpt, [row], max_new_tokens=8)[0]
        )


def test_g07_a_larger_length_penalty_never_prefers_shorter_beams():
    gpt, eos = tiny.model(), range(0, 97, 8)
    changed = 0
    for seed in range(10):
        beams = beam_search(
            gpt, [prompt(4, seed)], num_beams=8, max_new_tokens=10, eos=eos, length_penalty=0.0, early_stopping="never"
        )[0]
        lengths = [
            len(max(beams, key=lambda b, a=a: b.score / (len(b.ids) - 4) ** a).ids) for a in (-1.0, 0.0, 1.0, 2.0)
        ]
        assert lengths == sorted(lengths)
        changed += lengths[0] != lengths[-1]
        totals = beam_search(gpt, [prompt(4, seed)], num_beams=3, max_new_tokens=5, length_penalty=0.0)[0]
        mean = beam_search(gpt, [prompt(4, seed)], num_beams=3, max_new_tokens=5, length_penalty=1.0)[0]
        assert [b.ids for b in totals] == [b.ids for b in mean]  # equal lengths: the penalty orders nothing
        assert totals[0].score == pytest.approx(5 * mean[0].score, rel=1e-5)
    assert changed


@pytest.fixture(scope="module")
def oracle() -> tuple[GPT, nn.Module]:
    """One tiny Qwen2, ours and that of transformers, with the same weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {**tiny.SHAPE, "vocab_size": 41, "num_hidden_layers": 2, "max_position_embeddings": 128}
    ours = tiny.model(**shape)
    with torch.no_grad():
        ours.model.embed_tokens.weight[7] *= 1.5  # a token that comes often: the late or early eos of the cases below
    theirs = Qwen2ForCausalLM(Qwen2Config(**shape, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True)).eval()
    theirs.load_state_dict({**ours.state_dict(), "lm_head.weight": ours.model.embed_tokens.weight})
    return ours, theirs


def transformers_ids(theirs: nn.Module, rows: list[list[int]], eos, **params) -> list[list[int]]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = theirs.generate(ids, attention_mask=real, do_sample=False, eos_token_id=eos, pad_token_id=40, **params)
    results = []
    for row, got in zip(rows, out.tolist(), strict=True):
        new = got[width:]
        ends = [i for i, token in enumerate(new) if token in ([eos] if isinstance(eos, int) else eos or [])]
        results.append(row + new[: ends[0] + 1 if ends else len(new)])
    return results


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("num_beams", [1, 2, 3, 4, 5])
def test_beams_and_greedy_give_the_ids_of_transformers(oracle, num_beams: int, length_penalty: float, early_stopping):
    """60 settings x 4 batches of unequal prompts, with an eos that comes early, late, twofold or never."""
    ours, theirs = oracle
    for seed, eos in enumerate((7, 19, [7, 3], None)):
        case = 100 * (
            seed + 4 * (num_beams + 6 * int(10 * length_penalty) + 150 * [False, True, "never"].index(early_stopping))
        )
        rows = [prompt(2 + (3 * seed + 5 * i) % 11, case + i, vocab=41) for i in range(3)]  # new prompts in every case
        params = {"num_beams": num_beams, "max_new_tokens": 12}
        if num_beams > 1:
            params |= {"length_penalty": length_penalty, "early_stopping": early_stopping}
        assert generate(ours, rows, temperature=0.0, eos=eos, **params) == transformers_ids(theirs, rows, eos, **params)


def test_filtered_distributions_are_those_of_transformers():
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rng = torch.Generator().manual_seed(0)
    for temperature, k, p, min_p in itertools.product((0.7, 1.3), (3, 20, 41), (0.4, 0.9, 1.0), (0.0, 0.1)):
        logits = torch.randn(8, 41, generator=rng) * 3
        scores = TopKLogitsWarper(k)(None, TemperatureLogitsWarper(temperature)(None, logits))
        scores = TopPLogitsWarper(p)(None, scores) if p < 1 else scores
        expected = (MinPLogitsWarper(min_p)(None, scores) if min_p else scores).softmax(-1)
        probs, ids = filter_logits(logits, temperature=temperature, top_k=k, top_p=p, min_p=min_p)
        got = torch.zeros(8, 41, dtype=probs.dtype).scatter(1, ids, probs)
        assert (got - expected).abs().max() <= 1e-6


def test_penalties_are_those_of_transformers(oracle):
    ours, theirs = oracle
    rows = [prompt(4 + i, i, vocab=41) for i in range(3)]
    penalties = [{"repetition_penalty": penalty} for penalty in (0.7, 1.4, 2.0)]
    for extra, beams in itertools.product((*penalties, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 6}), (1, 2, 4)):
        options = extra | {"max_new_tokens": 15, "num_beams": beams}
        expected = [transformers_ids(theirs, [row], 7, **options)[0] for row in rows]
        assert greedy(ours, rows, eos=7, **options) == expected, options


# --- speed ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def seconds_per_token(gpt: GPT, cached: int, repeats: int) -> list[float]:
    cache, ids = KVCache(gpt.cfg, 1, length=1024), torch.randint(VOCAB, (1, 1024))
    gpt(ids[:, :cached], cache=cache)
    cache.reserve(1024)
    gpt(ids[:, :1], cache=cache)  # so that no growth falls into the measured steps
    times = []
    for step in range(repeats):
        cache.crop(cached)
        start = time.perf_counter()
        gpt(ids[:, step : step + 1], cache=cache)
        times.append(time.perf_counter() - start)
    return times


def test_g11_the_time_of_a_cached_token_is_flat():
    """At 512 cached tokens below 1.2 times that at 64, and at least five times faster than recomputing the row."""
    gpt = tiny.model(max_position_embeddings=1024, hidden_size=128, intermediate_size=384, num_attention_heads=4)
    ids = torch.randint(VOCAB, (1, 512))

    def ratio_of_medians() -> tuple[float, float]:
        near, far, full = [], [], []
        for _ in range(6):  # alternating, so that a slow moment of the machine hits all three
            near += seconds_per_token(gpt, 64, 20)
            far += seconds_per_token(gpt, 512, 20)
            start = time.perf_counter()
            with torch.no_grad():
                gpt(ids)
            full.append(time.perf_counter() - start)
        return statistics.median(far) / statistics.median(near), statistics.median(full) / statistics.median(far)

    tries = [ratio_of_medians() for _ in range(3)]
    assert min(flat for flat, _ in tries) < 1.2, tries
    assert max(gain for _, gain in tries) >= 5, tries


def test_public_names_are_documented():
    for name in ("generate", "stream", "beam_search", "sample", "filter_logits", "apply_penalties", "Sampling"):
        assert getattr(model_module, name).__doc__


# --- the twin for decoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(tiny.ARCHITECTURES))
def test_the_fast_twin_writes_the_same_text(name: str):
    """Greedy, sampled and by beams; rows of several lengths, one of which ends early. On CUDA: tests/test_gpu.py."""
    plain, twin = tiny.model(name), FastGPT(tiny.model(name))
    prompts = [[1, 2, 3], [4, 5], [7, 8, 9, 10, 11]]
    ends = generate(plain, prompts, max_new_tokens=6, temperature=0.0)[0][-1]
    for options in (
        {"temperature": 0.0},
        {"temperature": 0.0, "eos": ends},
        {"seed": 1, "top_p": 0.9},
        {"num_beams": 3},
    ):
        expected = generate(plain, prompts, max_new_tokens=20, **options)
        assert generate(twin, prompts, max_new_tokens=20, **options) == expected, options


def written_out(step):
    """A stand-in for a captured step: the same Python runs again, into the same memory."""
    result = step()
    return lambda: result.copy_(step()), result


def captured(monkeypatch: pytest.MonkeyPatch, name: str = "qwen2") -> FastGPT:
    monkeypatch.setattr("nanoqwen.fast.capture", written_out)
    monkeypatch.setattr("nanoqwen.fast.SMALLEST_CAPACITY", 8)
    twin = FastGPT(tiny.model(name))
    twin.static = True
    return twin


@pytest.mark.parametrize("name", sorted(set(tiny.ARCHITECTURES) - {"dynamic"}))
def test_a_captured_step_writes_the_same_text(name: str, monkeypatch: pytest.MonkeyPatch):
    """Rows of several lengths, one of which ends early, past the first capacity; beams; the second request reuses."""
    plain, twin = tiny.model(name), captured(monkeypatch, name)
    prompts = [[1, 2, 3], [4, 5], [7, 8, 9, 10, 11]]
    ends = generate(plain, prompts, max_new_tokens=6, temperature=0.0)[0][-1]
    for options in ({"temperature": 0.0}, {"temperature": 0.0, "eos": ends}, {"num_beams": 3}, {"temperature": 0.0}):
        assert generate(twin, prompts, max_new_tokens=20, **options) == generate(
            plain, prompts, max_new_tokens=20, **options
        )
    assert len({(graph.batch, graph.capacity) for graph in twin.graphs}) == len(twin.graphs)


def test_a_captured_step_belongs_to_one_request_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Two requests in turns, the first of which selects the rows that it has: its memory is not given away."""
    twin, ids = captured(monkeypatch), torch.tensor([[1, 2, 3]])
    first, second = (twin.new_cache(1, None, 20) for _ in "ab")
    with torch.no_grad():
        for cache in (first, second):
            twin(ids, cache=cache)
        got = [twin(ids[:, :1], cache=first).logits]
        first.select([0])
        twin(ids[:, 1:2], cache=second)
        got.append(twin(ids[:, :1], cache=first).logits)
        expected = tiny.model()(torch.tensor([[1, 2, 3, 1, 1]])).logits
    assert torch.allclose(torch.cat(got, 1), expected[:, 3:], atol=1e-5)
    assert first.graph is not second.graph


def test_the_fast_twin_shares_the_weights():
    model = tiny.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = FastGPT(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    fused = twin.blocks[0].qkv.weight.untyped_storage().data_ptr()
    assert model.model.layers[0].self_attn.v_proj.weight.untyped_storage().data_ptr() == fused
