"""Tokens to batches: the order of windows, mixtures, ranks, evaluation, streams, and what `show` shows."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import tiny
import torch
from corpora import EOS, ROOT, documents, jsonl, made, split_at_eos, stream_config, texts, tokens, write_as

import bench
import data
from data import IGNORE, Mixture, PretrainBatches, StreamBatches, eval_windows, open_batches, shuffled, token_bytes
from nanoqwen.config import DataConfig
from nanoqwen.corpus import prepare
from nanoqwen.errors import ConfigError, DataError
from nanoqwen.tokenizer import load_tokenizer, train_tokenizer

GOLDEN_ORDER = [3, 8, 5, 6, 7, 1, 4, 0, 9, 2]
GOLDEN_SHA = "566fe7460913b71e"


# --- D01, D02: documents and their ends -----------------------------------------------------------------------------


def test_d01_streamed_documents_are_the_same(build, tmp_path):
    rows = [*texts(60), "ends in <|endoftext|>", " ", ""]
    jsonl(tmp_path / "a.jsonl", rows)
    prepared = build("a.jsonl")
    cfg = stream_config(tmp_path, "a.jsonl")
    stream = StreamBatches(cfg, load_tokenizer("bytes"), 8, 1, 0)
    expected = tokens(prepared.train[0][0])
    found = [stream(step).tokens[0].tolist() for step in range(len(expected) // 8)]
    assert list(itertools.chain(*found)) == expected[: len(expected) // 8 * 8]


@pytest.mark.parametrize("seq_len", [1, 3, 7, 16])
def test_d02_an_epoch_has_every_token_as_a_target_once(tmp_path, seq_len):
    """All but the first token, and but fewer than seq_len tokens at the end, which are in no window."""
    ids = [*range(200), EOS] * 2
    shards = made(tmp_path / "a.bin", ids)
    windows = (len(ids) - 1) // seq_len
    batches = PretrainBatches([(shards, 1.0)], seq_len, 1, seed=3)
    seen = [t for step in range(windows) for t in batches(step).targets[0].tolist()]
    assert Counter(seen) == Counter(ids[1 : 1 + windows * seq_len])
    assert len(ids) - 1 - len(seen) < seq_len
    assert batches.steps_per_epoch == windows


def test_targets_are_shifted_once(tmp_path):
    """A label shifted in the data and again in the loss trains to predict two tokens ahead, and its loss falls too."""
    shards = made(tmp_path / "a.bin", [*range(250)])
    batch = PretrainBatches([(shards, 1.0)], 10, 4, seed=0)(0)
    assert torch.equal(batch.targets, batch.tokens + 1)
    assert batch.tokens.shape == (4, 10)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.documents is None
    for window in eval_windows([shards], 10, 1000):
        real = window.targets != IGNORE
        assert torch.equal(window.targets[real], window.tokens[real] + 1)


def test_isolated_documents(tmp_path):
    shards = made(tmp_path / "a.bin", [1, 2, EOS, 3, EOS, 4, 5, 6, EOS])
    batch = PretrainBatches([(shards, 1.0)], 8, 1, seed=0, isolate_documents=True)(0)
    assert batch.tokens.tolist() == [[1, 2, EOS, 3, EOS, 4, 5, 6]]
    assert batch.targets.tolist() == [[2, EOS, IGNORE, EOS, IGNORE, 5, 6, EOS]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]


# --- D04: train and validation ----------------------------------------------------------------------------------------


def test_d04_what_is_validated_on_is_never_trained_on(build, tmp_path):
    rows = texts(50)
    jsonl(tmp_path / "train.jsonl", rows)
    jsonl(tmp_path / "val.jsonl", [*rows[:5], "  " + rows[5].upper(), "new"])
    found = build("train.jsonl", val=(str(tmp_path / "val.jsonl"),))
    assert documents(found.train[0][0]) == rows[6:]
    assert found.train[0][0].counts["other_split"] == 6
    assert found.val[0].n_documents == 7
    stream = StreamBatches(
        stream_config(tmp_path, "train.jsonl", val=(str(tmp_path / "val.jsonl"),)), load_tokenizer("bytes"), 4, 1, 0
    )
    assert bytes(stream(0).tokens[0].tolist()).decode() == rows[6][:4]


# --- E2, D08: nothing to train on -------------------------------------------------------------------------------------


def test_e2_fewer_tokens_than_one_window(tmp_path):
    shards = made(tmp_path / "a.bin", [1, 2, 3, EOS])
    assert PretrainBatches([(shards, 1.0)], 3, 5, seed=0)(0).tokens.tolist() == [[1, 2, 3]] * 5
    with pytest.raises(DataError, match=r"a\.bin: expected at least 5 tokens of text, got 4"):
        PretrainBatches([(shards, 1.0)], 4, 5, seed=0)
    with pytest.raises(DataError, match="nothing to validate on"):
        eval_windows([made(tmp_path / "b.bin", [1])], 4, 100)


# --- E9: mixtures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [(0.5, 0.5), (1, 3), (7, 2, 1), (0.001, 0.999), (1e-30, 1), (5,), (3, 1, 4, 1, 5, 9)]
)
def test_e9_realised_shares(weights):
    source, nth = Mixture(weights, seed=1)(np.arange(10_000))
    for which, weight in enumerate(weights):
        assert abs((source == which).mean() - weight / sum(weights)) < 0.01
        assert nth[source == which].tolist() != [] or weight < 0.01
        assert sorted(nth[source == which].tolist()) == list(range(np.count_nonzero(source == which)))


def test_e9_any_part_of_the_order_is_known_without_the_rest():
    mixture = Mixture((2, 3, 5), seed=4)
    source, nth = mixture(np.arange(5000))
    for first, last in ((0, 1), (1000, 1100), (4095, 4200), (4999, 5000)):
        again = mixture(np.arange(first, last))
        assert np.array_equal(again[0], source[first:last])
        assert np.array_equal(again[1], nth[first:last])
    assert not np.array_equal(Mixture((2, 3, 5), seed=5)(np.arange(5000))[0], source)


def test_e9_an_exhausted_source_starts_its_next_epoch(tmp_path):
    small = made(tmp_path / "a.bin", [*range(41)])  # 10 windows
    large = made(tmp_path / "b.bin", [*range(100, 256)] * 40)
    batches = PretrainBatches([(small, 1.0), (large, 3.0)], 4, 10, seed=2)
    rows = torch.cat([batches(step).tokens for step in range(100)])
    of_small = rows[rows[:, 0] < 100][:, 0].tolist()
    assert abs(len(of_small) / len(rows) - 0.25) < 0.01
    epochs = [of_small[at : at + 10] for at in range(0, len(of_small) - 9, 10)]
    assert all(sorted(epoch) == list(range(0, 40, 4)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


# --- E12: epochs and ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_shuffled_is_a_permutation(size):
    index = np.arange(size)
    found = [shuffled(index, size, data.random_key(0, 0, epoch)) for epoch in range(3)]
    assert all(sorted(order.tolist()) == index.tolist() for order in found)
    if size > 10:
        assert not np.array_equal(found[0], found[1])
    assert np.array_equal(shuffled(index[::-1], size, 5), shuffled(index, size, 5)[::-1])  # one by one, too


def test_shuffled_is_fair():
    """Each index goes everywhere equally often, and neighbours do not stay together."""
    counts = np.zeros((7, 7))
    for key in range(1400):
        counts[np.arange(7), shuffled(np.arange(7), 7, data.random_key(key))] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 80  # chi-square, 36 degrees of freedom
    order = shuffled(np.arange(100_000), 100_000, 1)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02


def test_the_order_never_changes(tmp_path):
    """Golden: a run that is resumed with another numpy, torch or machine goes on with the same batches."""
    assert shuffled(np.arange(10), 10, 12345).tolist() == GOLDEN_ORDER
    shards = made(tmp_path / "a.bin", [*range(250)] * 4)
    other = made(tmp_path / "b.bin", [*range(250, 0, -1)] * 4)
    assert PretrainBatches([(shards, 1.0), (other, 2.0)], 16, 8, seed=1337).sha(1000) == GOLDEN_SHA


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_e12_every_window_once_in_an_epoch_on_any_number_of_ranks(tmp_path, rows, world):
    """An epoch ends within a batch, and the rest of that batch begins the next one: nothing is dropped."""
    shards = made(tmp_path / "a.bin", [*range(250), *range(250)][: 4 * 37 + 3])
    batches = PretrainBatches([(shards, 1.0)], 4, rows, seed=7)
    steps = 3 * batches.steps_per_epoch
    parts = [torch.cat([batches(step, rank, world).tokens for rank in range(world)]) for step in range(steps)]
    starts = torch.cat(parts)[:, 0].tolist()
    windows = len(range(0, len(shards) - 4, 4))
    for epoch in range(3):
        assert sorted(starts[epoch * windows : (epoch + 1) * windows]) == list(range(0, windows * 4, 4))
    assert all(torch.equal(part, batches(step).tokens) for step, part in enumerate(parts))
    assert batches.epoch(batches.steps_per_epoch) >= 1 > batches.epoch(batches.steps_per_epoch - 1)


def test_a_batch_is_a_function_of_seed_and_step(tmp_path):
    shards = made(tmp_path / "a.bin", random.Random(0).choices(range(250), k=5000))
    one, two = (PretrainBatches([(shards, 1.0)], 16, 4, seed=5) for _ in range(2))
    steps = [9, 0, 300, 7, 9]
    assert [one.sha(step) for step in steps] == [two.sha(step) for step in steps]
    assert len({one.sha(step) for step in range(75)}) == 75
    assert PretrainBatches([(shards, 1.0)], 16, 4, seed=6).sha(0) != one.sha(0)
    assert (
        one.fingerprint
        == two.fingerprint
        != PretrainBatches([(made(tmp_path / "b.bin", [1] * 99), 1.0)], 16, 4, 5).fingerprint
    )


@pytest.mark.parametrize(("seq_len", "most"), [(16, 10**6), (16, 320), (7, 100), (100, 5)])
def test_eval_windows_cover_each_token_at_most_once(tmp_path, seq_len, most):
    shards = [made(tmp_path / "a.bin", [*range(200)]), made(tmp_path / "b.bin", [*range(200, 250)])]
    batches = eval_windows(shards, seq_len, most)
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    seen = targets[targets != IGNORE].tolist()
    assert len(set(seen)) == len(seen) <= max(most, seq_len)
    assert all(len(batch.tokens) <= 8 for batch in batches)
    assert all((batch.tokens >= 0).all() for batch in batches)
    if most > 1000:
        assert sorted(seen) == [*range(1, 200), *range(201, 250)]
    if most == 320:
        assert max(seen) > 200 > min(seen)  # from all shards


def test_token_bytes():
    tokenizer = train_tokenizer(texts(50), 300)
    sizes = token_bytes(tokenizer)
    text = texts(1, seed=9)[0] + "é€"
    assert sizes[tokenizer.encode(text)].sum() == len(text.encode())
    assert sizes[tokenizer.eos_id] == 0
    assert len(sizes) == tokenizer.n_vocab


# --- what a batch costs -----------------------------------------------------------------------------------------------


def seconds(action: Callable[[int], object], turns: int) -> float:
    """The least of some times: what it takes when nothing else runs."""
    times = []
    for turn in range(turns):
        started = time.process_time()
        action(turn)
        times.append(time.process_time() - started)
    return min(times)


def test_a_step_does_not_wait_for_its_batch(tmp_path):
    """64 rows of 2,048 tokens and their hash, beside the forward and backward of a model far below 10M parameters."""
    shards = made(tmp_path / "a.bin", random.Random(0).choices(range(97), k=400_000))
    batches = PretrainBatches([(shards, 1.0)], 2048, 64, seed=0)
    reading = seconds(lambda step: (batches(step), batches.sha(step)), 9)
    model, batch = tiny.model(max_position_embeddings=2048), batches(0)
    row = seconds(lambda _: model(batch.tokens[:1], batch.targets[:1]).loss.backward(), 2)
    assert reading < 0.05 * 64 * row


def test_a_single_rank_reads_a_batch_once(tmp_path, monkeypatch):
    shards = made(tmp_path / "a.bin", [*range(250)] * 4)
    batches = PretrainBatches([(shards, 1.0)], 16, 8, seed=1)
    calls = []
    monkeypatch.setattr(shards, "window", lambda *a, window=shards.window: calls.append(a) or window(*a))
    first = batches(3), batches.sha(3)
    assert len(calls) == 8
    first[0].tokens.zero_()  # what a caller does to its batch is its own affair
    first[0].targets.zero_()
    again = PretrainBatches([(shards, 1.0)], 16, 8, seed=1)
    assert batches.sha(3) == again.sha(3) == first[1]
    assert torch.equal(batches(3).tokens, torch.cat([again(3, rank, 2).tokens for rank in range(2)]))


# --- D06, D07: streams ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["files", "mixture", "hf:jsonl", "hf:parquet"])
@pytest.mark.filterwarnings("ignore")  # of the libraries behind `datasets`
def test_d07_a_stream_goes_on_with_exactly_the_next_row(tmp_path, kind, quiet_datasets):
    suffix = "parquet" if "parquet" in kind else "jsonl"
    (tmp_path / "docs").mkdir()
    for part in range(3):
        write_as(tmp_path / "docs" / f"{part}.{suffix}", texts(20, seed=part))
    sources = ("docs/0.jsonl=1", "docs/1.jsonl=2") if kind == "mixture" else ("docs",)
    cfg = stream_config(tmp_path, *((f"hf:{tmp_path}/docs",) if kind.startswith("hf:") else sources))
    tokenizer = load_tokenizer("bytes")
    straight = StreamBatches(cfg, tokenizer, 16, 4, seed=3)
    expected, states = [], [json.dumps(straight.state())]
    for step in range(80):  # more than two epochs
        expected.append(straight(step))
        states.append(json.dumps(straight.state()))
    assert straight.epoch(80) >= 2
    for step in (0, 1, 17, 40, 79):
        again = StreamBatches(cfg, tokenizer, 16, 4, seed=3)
        again.load_state(json.loads(states[step]))
        for later in range(step, min(step + 8, 80)):
            ranks = [again(later, rank, 2) for rank in range(2)]  # on another number of ranks
            assert torch.equal(torch.cat([part.tokens for part in ranks]), expected[later].tokens)
            assert torch.equal(torch.cat([part.targets for part in ranks]), expected[later].targets)
            if "hf" not in kind:  # `datasets` says the same place in more than one way
                assert json.dumps(again.state()) == states[later + 1]


def test_d06_an_epoch_of_a_stream_has_every_training_document_once(build, tmp_path):
    (tmp_path / "docs").mkdir()
    for part in range(6):
        jsonl(tmp_path / "docs" / f"{part}.jsonl", texts(20, seed=part))
    expected = sorted(documents(build("docs").train[0][0]))
    cfg = stream_config(tmp_path, "docs")
    orders = []
    for seed in (1, 1, 2):
        stream = StreamBatches(cfg, load_tokenizer("bytes"), 32, 4, seed)
        step = itertools.count()
        read: list[int] = []
        while read.count(EOS) < 2 * len(expected):
            read += stream(next(step)).tokens.flatten().tolist()
        found = [bytes(part).decode() for part in split_at_eos(read)]
        orders.append(found[: 2 * len(expected)])
        for epoch in range(2):
            assert sorted(found[epoch * len(expected) : (epoch + 1) * len(expected)]) == expected
        assert found[: len(expected)] != found[len(expected) : 2 * len(expected)]
    assert orders[0] == orders[1] != orders[2]


def test_streams_refuse_what_they_cannot_do(tmp_path):
    jsonl(tmp_path / "a.jsonl", texts(20))
    stream = StreamBatches(stream_config(tmp_path, "a.jsonl"), load_tokenizer("bytes"), 8, 2, 0)
    sha = stream.sha(0)
    assert stream.sha(0) == sha
    with pytest.raises(DataError, match="resumes with step 1"):
        stream(5)
    state = stream.state()
    jsonl(tmp_path / "a.jsonl", texts(21))
    other = StreamBatches(stream_config(tmp_path, "a.jsonl"), load_tokenizer("bytes"), 8, 2, 0)
    with pytest.raises(DataError, match="have changed since"):
        other.load_state(state)
    jsonl(tmp_path / "a.jsonl", [""])
    with pytest.raises(DataError, match=r"nothing to train on \(1 empty\)"):
        StreamBatches(stream_config(tmp_path, "a.jsonl"), load_tokenizer("bytes"), 8, 2, 0)(0)


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_of_a_configuration(tmp_path, streaming):
    jsonl(tmp_path / "a.jsonl", texts(60))
    cfg = DataConfig(
        "auto", (str(tmp_path / "a.jsonl"),), val_fraction=0.2, streaming=streaming, cache_dir=str(tmp_path / "cache")
    )
    prepared = prepare(cfg, 300, progress=False)
    batches = open_batches(cfg, prepared, 16, 4, seed=0)
    assert isinstance(batches, StreamBatches if streaming else PretrainBatches)
    assert bool(prepared.train) is not streaming
    val = prepared.tokenizer.decode(tokens(prepared.val[0]))
    read = "".join(prepared.tokenizer.decode(batches(step).tokens.flatten()) for step in range(20))
    assert val.split("<|endoftext|>")[0] not in read
    assert eval_windows(prepared.val, 16, 1000)


# --- command line -----------------------------------------------------------------------------------------------------


def test_show_tells_trained_from_masked(tmp_path):
    tokenizer = load_tokenizer("bytes")
    ids = [*tokenizer.encode("ab"), EOS, *tokenizer.encode("c\x1b"), EOS, *tokenizer.encode("de")]
    shards = made(tmp_path / "a.bin", ids)
    batch = PretrainBatches([(shards, 1.0)], 7, 1, seed=0, isolate_documents=True)(0)
    plain = data.show(batch, tokenizer, colour=False)
    assert plain.endswith("\n[-a-]b<|endoftext|>[-c-]\\x1b<|endoftext|>[-d-]e")
    assert "5 of 7 positions are trained" in plain
    assert "\x1b[32mb<|endoftext|>\x1b[0m" in data.show(batch, tokenizer, colour=True)


def test_the_program(tmp_path, capsys):
    jsonl(tmp_path / "a.jsonl", [*texts(60), ""])
    options = [
        f"--data.train={tmp_path}/a.jsonl",
        f"--cache_dir={tmp_path}/cache",
        "--tokenizer=bytes",
        "--val_fraction=0.2",
    ]
    data.main(["prepare", *options])
    data.main(["show", *options, "--model.max_position_embeddings=16"])
    said = capsys.readouterr().out
    assert "documents" in said
    assert "1 empty" in said
    assert "16 of 16 positions are trained" in said


def test_prepare_verifies_on_request(tmp_path, capsys):
    jsonl(tmp_path / "a.jsonl", texts(60))
    options = [f"--data.train={tmp_path}/a.jsonl", f"--cache_dir={tmp_path}/cache", "--tokenizer=bytes"]
    assert data.main(["prepare", "--verify", *options, "--val_fraction=0.2"]) == 0
    (path,) = tmp_path.glob("cache/shards/*/train.bin")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    data.main(["prepare", *options, "--val_fraction=0.2"])  # which reads sizes and headers alone
    with pytest.raises(DataError, match=r"train\.bin: damaged") as error:
        data.main(["prepare", *options, "--verify", "--val_fraction=0.2"])
    assert error.value.exit_code == 3
    with pytest.raises(ConfigError, match="verify"):
        data.main(["show", *options, "--verify"])


def test_bench_compares_preparation_with_tiktoken(tmp_path, capsys):
    jsonl(tmp_path / "a.jsonl", texts(60))
    options = [f"--data.train={tmp_path}/a.jsonl", f"--cache_dir={tmp_path}/cache", "--tokenizer=bytes"]
    bench.main(["prepare", *options, "--val_fraction=0.2"])
    said = dict(line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()[-6:])
    assert float(said["tokens"]) == float(said["characters"]) == sum(map(len, texts(60)))
    assert float(said["ratio"]) > 0
    assert float(said["cpu_ratio"]) > 0


@pytest.mark.slow
def test_preparation_is_nearly_as_fast_as_tiktoken_alone(tmp_path):
    cfg = DataConfig(cache_dir=str(tmp_path))
    tokenizer = prepare(cfg, 4096, progress=False).tokenizer
    assert bench.tokenising_rates(cfg, tokenizer)["cpu_ratio"] > 0.9


def test_the_program_leaves_with_3_and_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n')
    script = [sys.executable, "data.py", "prepare", f"--data.train={tmp_path}/a.jsonl", f"--cache_dir={tmp_path}"]
    done = subprocess.run([*script, "--tokenizer=bytes"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == f"error: {tmp_path}/a.jsonl:1: text: expected text, got a number\n"
