"""Tokens to batches that are a function of the step; what a model is trained on, to be looked at.

    python data.py prepare --data.train='corpus/*.jsonl'    tokenise what a configuration names
    python data.py show                                     a sample of what the model will be trained on

Letters in shapes: B rows, T tokens of a row (seq_len), V ids.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanoqwen.chat import Example, packed
from nanoqwen.config import DataConfig, load_config
from nanoqwen.corpus import (
    Input,
    Prepared,
    Reader,
    SplitOf,
    TokenShards,
    counted,
    identities,
    named,
    open_corpus,
    prepare,
    short_hash,
)
from nanoqwen.errors import ConfigError, DataError, escape_terminal, run_script
from nanoqwen.tokenizer import Tokenizer

IGNORE = -100  # target of a position that is not trained, as in torch's cross entropy


# --- batches ----------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """int64 [B, T] each. Targets are shifted where a batch is made, and only there: targets[i] follows tokens[i]."""

    tokens: Tensor
    targets: Tensor  # IGNORE where nothing is to be learned
    documents: Tensor | None  # which document of its row a token belongs to; None: rows are not isolated


def _batch(windows: np.ndarray, eos_id: int, isolate_documents: bool) -> Batch:
    """[B, T + 1] tokens, IGNORE where a window is shorter, as a batch."""
    # Copied by numpy: torch would share out so small a copy among threads, which wait for each other on a busy machine.
    tokens, targets = (torch.from_numpy(part.copy()) for part in (windows[:, :-1], windows[:, 1:]))
    tokens[tokens == IGNORE] = eos_id
    if not isolate_documents:
        return Batch(tokens, targets, None)
    ends = tokens == eos_id
    targets[ends] = IGNORE  # the first token of a document does not follow from the one before
    return Batch(tokens, targets, ends.cumsum(1) - ends.long())


def shuffled(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed permutation of 0 .. size - 1 sends each index, in constant memory.

    A Feistel network over 4^h >= size, entered again until it ends below size (Black and Rogaway 2002, "Ciphers
    with arbitrary finite domains"). Not numpy's: its random streams may change between versions, a run's must not.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = _mixed(np.arange(1, 7, dtype=np.uint64) + np.uint64(key))
    x = index.astype(np.uint64)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> half, x[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right + round_key) & mask)
        x[todo] = (left << half) | right
        todo = todo[x[todo] >= size]
    return x.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: each bit of the result depends on all of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_key(*parts: int | str) -> int:
    """63 bits, so that adding a small number stays within 64."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


class Mixture:
    """Which source a row comes from, and which of that source's rows it is: a function of the row's number.

    The rows are dealt in blocks, each a shuffled hand that has every source at its share, so that shares are exact at
    the end of each block, and counts are known without going through the rows before.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.seed, self.block = seed, max(1024, len(weights) ** 2)
        total = math.fsum(weights)
        self.shares = [int(weight / total * 2**62) for weight in weights]  # whole numbers: the same on any machine
        self.largest = max(range(len(weights)), key=weights.__getitem__)

    def _before(self, block: int) -> list[int]:
        """Rows of each source before a block; what rounding leaves over goes to the largest."""
        counts = [block * self.block * share >> 62 for share in self.shares]
        counts[self.largest] += block * self.block - sum(counts)
        return counts

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(self.shares) == 1:
            return np.zeros_like(rows), rows
        source, nth = np.empty_like(rows), np.empty_like(rows)
        for block in np.unique(rows // self.block).tolist():
            before, after = self._before(block), self._before(block + 1)
            hand = np.repeat(np.arange(len(before)), np.subtract(after, before))
            hand = hand[shuffled(np.arange(self.block), self.block, random_key(self.seed, "mixture", block))]
            order = np.empty_like(hand)
            for which, first in enumerate(before):
                order[hand == which] = np.arange(first, first + np.count_nonzero(hand == which))
            here = rows // self.block == block
            source[here], nth[here] = hand[rows[here] % self.block], order[rows[here] % self.block]
        return source, nth


class PretrainBatches:
    """The global batch of each step, a pure function of (seed, step): neither ranks nor micro-batches matter.

    A source's windows overlap by one token, so each token is a target once; fewer than T tokens at its end are in no
    window. Each epoch is a permutation of its own. Epochs follow each other without a gap, within a batch if need be:
    every window comes once before any comes twice, and nothing is dropped.
    """

    targets = 1.0  # share of the positions that have one, about

    def __init__(
        self,
        shards: Sequence[tuple[TokenShards, float]],
        seq_len: int,
        rows: int,
        seed: int,
        *,
        isolate_documents: bool = False,
    ) -> None:
        self.shards = [source for source, _ in shards]
        self.seq_len, self.rows, self.seed, self.isolated = seq_len, rows, seed, isolate_documents
        self.mixture = Mixture([weight for _, weight in shards], seed)
        self.windows = [(len(source) - 1) // seq_len for source in self.shards]  # of each source
        for source, windows in zip(self.shards, self.windows, strict=True):
            if windows < 1:
                raise DataError(f"{source.path}: expected at least {seq_len + 1} tokens of text, got {len(source)}")
        self.steps_per_epoch = math.ceil(sum(self.windows) / rows)  # after which all windows could have come once
        parts = [(source.fingerprint, share) for source, share in zip(self.shards, self.mixture.shares, strict=True)]
        self.fingerprint = short_hash(parts)
        self._kept: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        first, last = self.rows * rank // world, self.rows * (rank + 1) // world
        windows = self._global(step) if world == 1 else self._windows(step, first, last)
        return _batch(windows, self.shards[0].eos_id, self.isolated)

    def sha(self, step: int) -> str:
        """Hash of the token ids of the global batch."""
        return token_sha(self._global(step))

    def _global(self, step: int) -> np.ndarray:
        """[B, T + 1], kept until another step is asked for: a single rank needs them for its batch and for the hash."""
        if self._kept[0] != step:
            self._kept = step, self._windows(step, 0, self.rows)
        return self._kept[1]

    def epoch(self, step: int) -> float:
        """How often, at the start of `step`, as many windows have come as there are in all sources together."""
        return step * self.rows / sum(self.windows)

    def _windows(self, step: int, first: int, last: int) -> np.ndarray:
        """[last - first, T + 1]"""
        source, nth = self.mixture(np.arange(step * self.rows + first, step * self.rows + last))
        out = np.empty((last - first, self.seq_len + 1), np.int64)
        for which in np.unique(source).tolist():
            count = self.windows[which]
            for epoch in np.unique(nth[source == which] // count).tolist():
                at = np.flatnonzero((source == which) & (nth // count == epoch))
                windows = shuffled(nth[at] % count, count, random_key(self.seed, which, epoch))
                for row, window in zip(at.tolist(), windows.tolist(), strict=True):
                    out[row] = self.shards[which].window(window * self.seq_len, self.seq_len + 1)
        return out


def token_sha(windows: np.ndarray) -> str:
    return hashlib.sha256(windows.astype("<i8").tobytes()).hexdigest()[:16]


class _Stream:
    """The windows of one source, in the order of its documents, tokenised when they are asked for."""

    def __init__(self, cfg: DataConfig, inputs: list[Input], split_of: SplitOf, tokenizer: Tokenizer, key: Any) -> None:
        self.cfg, self.inputs, self.split_of, self.tokenizer, self.key = cfg, inputs, split_of, tokenizer, key
        self.go_to([0, [0, 0, None], 0])

    def go_to(self, place: list[Any]) -> None:
        """The next window begins `skip` tokens behind the start of the first document at or after the cursor."""
        epoch, cursor, skip = place
        self._documents = self._read(epoch, cursor)
        self._tokens = np.empty(0, np.int64)
        self._starts: deque[tuple[int, int, list[Any]]] = deque()  # where in _tokens a document starts: its place
        self._used, self._pending = skip, place

    def place(self) -> list[Any]:
        if not self._starts:
            return self._pending
        start, epoch, cursor = self._starts[0]
        return [epoch, cursor, self._used - start]

    def window(self, length: int) -> np.ndarray:
        """The next `length` tokens; the last of them is also the first of the window after."""
        parts, size = [self._tokens], len(self._tokens)
        while size < self._used + length:
            epoch, cursor, tokens = next(self._documents)
            self._starts.append((size, epoch, cursor))
            parts.append(tokens)
            size += len(tokens)
        self._tokens = np.concatenate(parts) if len(parts) > 1 else self._tokens
        window = self._tokens[self._used : self._used + length]
        self._used += length - 1
        while len(self._starts) > 1 and self._starts[1][0] <= self._used:  # documents that are used up
            self._starts.popleft()
        first = self._starts[0][0]
        self._tokens, self._used = self._tokens[first:], self._used - first
        self._starts = deque((start - first, *place) for start, *place in self._starts)
        return window

    def _read(self, epoch: int, cursor: list[Any]) -> Iterator[tuple[int, list[Any], np.ndarray]]:
        """Documents without end, with the epoch and the cursor before each. Files come in another order each epoch."""
        while True:
            order = shuffled(np.arange(len(self.inputs)), len(self.inputs), random_key(*self.key, epoch))
            reader = Reader(self.cfg, [self.inputs[i] for i in order], self.split_of, cursor)
            found, parts = cursor != [0, 0, None], []
            for piece in reader:
                if piece.split == "train":
                    found = True
                    parts.append(self.tokenizer.encode_array(piece.text))
                    if piece.ends:
                        yield epoch, cursor, np.concatenate([*parts, [self.tokenizer.eos_id]], dtype=np.int64)
                        cursor, parts = piece.cursor, []
            if not found:
                raise DataError(f"data.train: {named(self.inputs)}: nothing to train on ({counted(reader.counts)})")
            epoch, cursor = epoch + 1, [0, 0, None]


class StreamBatches:
    """As PretrainBatches, for text that is tokenised on the fly: steps come in order, and `state` is where one is.

    Every rank reads the whole stream and takes its rows of each batch, so that neither the order nor the state
    depends on the number of ranks: a run goes on with any other. It costs each rank the tokenisation of all rows.
    """

    steps_per_epoch = 0  # not known before the end
    targets = 1.0

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer, seq_len: int, rows: int, seed: int) -> None:
        text = open_corpus(cfg)
        self.tokenizer, self.seq_len, self.rows, self.isolated = tokenizer, seq_len, rows, cfg.isolate_documents
        self.mixture = Mixture([weight for weight, _ in text.groups], seed)
        self.streams = [
            _Stream(cfg, inputs, text.split_of, tokenizer, (seed, which))
            for which, (_, inputs) in enumerate(text.groups)
        ]
        texts = [identities(cfg, inputs) for _, inputs in text.groups]
        self.fingerprint = short_hash([texts, text.settings, self.mixture.shares, tokenizer.hash])
        self._step, self._windows, self._epoch = -1, np.empty(0), 0.0

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        first, last = self.rows * rank // world, self.rows * (rank + 1) // world
        return _batch(self._global(step)[first:last], self.tokenizer.eos_id, self.isolated)

    def sha(self, step: int) -> str:
        return token_sha(self._global(step))

    def epoch(self, step: int) -> float:
        """Of the source that is furthest. Within an epoch the share is not known: whole epochs only."""
        return float(max(stream.place()[0] for stream in self.streams))

    def state(self) -> dict[str, Any]:
        """Where the stream stands after the last batch: plain JSON, the same on all ranks."""
        return {"step": self._step + 1, "places": [stream.place() for stream in self.streams], "of": self.fingerprint}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["of"] != self.fingerprint:
            raise DataError("data.train: the text, the tokenizer or the settings have changed since the stream's state")
        self._step = state["step"] - 1
        for stream, place in zip(self.streams, state["places"], strict=True):
            stream.go_to(place)

    def _global(self, step: int) -> np.ndarray:
        """[B, T + 1], of the last step again, or of the one after it."""
        if step == self._step and len(self._windows):
            return self._windows
        if step != self._step + 1:
            raise DataError(f"a stream goes on with step {self._step + 1}, expected no other, got {step}")
        sources, _ = self.mixture(np.arange(step * self.rows, (step + 1) * self.rows))
        self._windows = np.stack([self.streams[which].window(self.seq_len + 1) for which in sources.tolist()])
        self._step = step
        return self._windows


def open_batches(
    cfg: DataConfig, prepared: Prepared, seq_len: int, rows: int, seed: int
) -> PretrainBatches | StreamBatches:
    """The batches of a configuration, from shards or streamed."""
    if cfg.streaming:
        return StreamBatches(cfg, prepared.tokenizer, seq_len, rows, seed)
    return PretrainBatches(prepared.train, seq_len, rows, seed, isolate_documents=cfg.isolate_documents)


def eval_windows(
    shards: Sequence[TokenShards], seq_len: int, max_tokens: int, *, rows: int = 8, isolate_documents: bool = False
) -> list[Batch]:
    """The rows that every evaluation uses, as batches of at most `rows`: the same for any run, rank or world.

    They lie at equal distances over all shards; each token is a target at most once, and `max_tokens` are at most.
    The last window of a shard is filled up with EOS, which is no target.
    """
    windows = [(source, start) for source in shards for start in range(0, len(source) - 1, seq_len)]
    if not windows:
        raise DataError("data.val: nothing to validate on, the documents have no two tokens")
    count = min(len(windows), max(1, max_tokens // seq_len))
    found = np.full((count, seq_len + 1), IGNORE, np.int64)
    for row in range(count):
        source, start = windows[row * len(windows) // count]
        tokens = source.window(start, seq_len + 1)
        found[row, : len(tokens)] = tokens
    parts = [found[first : first + rows] for first in range(0, count, rows)]
    return [_batch(part, shards[0].eos_id, isolate_documents) for part in parts]


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """Bytes of each id [V], for bits per byte; control tokens stand for no text: 0."""
    sizes = torch.zeros(tokenizer.n_vocab, dtype=torch.int64)
    for token, token_id in tokenizer.ranks.items():
        sizes[token_id] = len(token)
    return sizes


# --- on the device ----------------------------------------------------------------------------------------------


class Micro(NamedTuple):
    """A micro-batch, on the device."""

    tokens: Tensor  # [B, T]
    targets: Tensor  # [B, T]
    documents: Tensor | None  # [B, T]
    at: Tensor | None  # [N] positions with a target, where there are others; found on the host, which knows for free
    extra: tuple[Tensor, ...] = ()  # what else an objective wants to know


def micro_batches(batch: Any, rows: int, device: torch.device) -> list[Micro]:
    """A batch cut into rows, with what is not of single rows in each of its parts.

    batch: a Batch, or a tuple that begins as one and goes on with what an objective wants to know
    """
    micros = []
    for first in range(0, len(batch.tokens), rows):
        part = [t if t is None or t.dim() < 2 else t[first : first + rows] for t in batch]
        kept = (part[1] != IGNORE).flatten()
        at = None if kept.all() else kept.nonzero().squeeze(1)
        moved = [None if t is None else to_device(t, device) for t in (*part[:3], at, *part[3:])]
        micros.append(Micro(*moved[:4], tuple(moved[4:])))
    return micros


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """From pinned memory, so that the copy waits neither for the device nor the program for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# --- command line -----------------------------------------------------------------------------------------------


def show(batch: Batch, tokenizer: Tokenizer, colour: bool) -> str:
    """The rows of a batch as text, one tone for what is trained and another (or `[- -]`) for what is only read."""
    trained, masked = ("\033[32m", "\033[90m") if colour else ("", "[-")
    done, unmasked = ("\033[0m", "\033[0m") if colour else ("", "-]")
    lines = []
    for number, (tokens, targets) in enumerate(zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)):
        learned = [False, *(target != IGNORE for target in targets)]  # of each token: is it a target?
        lines.append(f"--- row {number}: {sum(learned)} of {len(targets)} positions are trained")
        row, start = [*tokens, targets[-1]] if learned[-1] else tokens, 0
        line = ""
        for at in range(1, len(row) + 1):
            if at == len(row) or learned[at] != learned[start]:
                text = escape_terminal(_readable(row[start:at], tokenizer))
                line += f"{trained}{text}{done}" if learned[start] else f"{masked}{text}{unmasked}"
                start = at
        lines.append(line)
    return "\n".join(lines)


def write_text(text: str) -> None:
    """To stdout, whatever characters its encoding has."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def _readable(ids: list[int], tokenizer: Tokenizer) -> str:
    """Text of ids; a control token many times over, as at the end of a row that is filled up, stands there once."""
    parts = []
    for token, times in ((token, len(list(run))) for token, run in itertools.groupby(ids)):
        is_filling = times > 3 and token in tokenizer.special.values()
        parts.append(tokenizer.decode_bytes([token] * (1 if is_filling else times)))
        parts.append(f" x {times}".encode() * is_filling)
    return b"".join(parts).decode("utf-8", "replace")


def _packed_batch(rows: Sequence[Sequence[Example]], seq_len: int) -> Batch:
    """Conversations side by side; each is a document of its own, and so is what fills up the row."""
    tokens = np.empty((len(rows), seq_len), np.int64)
    targets = np.full((len(rows), seq_len), IGNORE, np.int64)
    documents = np.empty((len(rows), seq_len), np.int64)
    for row, examples in enumerate(rows):
        at = 0
        for number, example in enumerate(examples):
            end = at + len(example.ids)
            tokens[row, at:end], documents[row, at:end] = example.ids, number
            targets[row, at : end - 1] = np.where(example.mask[1:], example.ids[1:], IGNORE)
            at = end
        tokens[row, at:], documents[row, at:] = examples[-1].ids[-1], len(examples)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(documents))


class ChatBatches:
    """The global batch of each step, a pure function of (seed, step), as PretrainBatches.

    Conversations are packed once, by their lengths. In each epoch those of equal length change places at random, and
    the rows come in another order, so that any epoch is known without the ones before. Each conversation comes once
    in an epoch; epochs follow each other without a gap, within a batch if need be.
    """

    def __init__(self, examples: Sequence[Example], seq_len: int, rows: int, seed: int, *, pack: bool = True) -> None:
        if not examples:
            raise DataError("chat.train: expected at least one conversation, got none")
        for example in examples:
            if len(example.ids) > seq_len or not example.mask[1:].any():
                what = f"{len(example.ids)} tokens, {example.mask[1:].sum()} of them learned"
                raise DataError(f"{example.where}: expected at most {seq_len} tokens, and some to learn, got {what}")
        self.examples, self.seq_len, self.rows, self.seed = examples, seq_len, rows, seed
        self.lengths = np.array([len(example.ids) for example in examples])
        ascending = np.sort(self.lengths).tolist()
        self.slots = packed(ascending, seq_len) if pack else [[index] for index in range(len(ascending))]
        self.steps_per_epoch = math.ceil(len(self.slots) / rows)
        self.padding = 1 - sum(ascending) / (len(self.slots) * seq_len)
        self.targets = sum(int(example.mask.sum()) for example in examples) / (len(self.slots) * seq_len)
        self.isolated = True
        digest = hashlib.sha256(bytes([pack]))
        for example in examples:
            digest.update(b"%d " % len(example.ids) + example.ids.tobytes() + example.mask.tobytes())
        self.fingerprint = digest.hexdigest()[:32]
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._kept: tuple[int, Batch | None] = (-1, None)

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        if world == 1:
            return Batch(*(torch.from_numpy(part.numpy().copy()) for part in self._global(step)))
        return self._rows(step, self.rows * rank // world, self.rows * (rank + 1) // world)

    def sha(self, step: int) -> str:
        """Hash of the tokens and targets of the global batch."""
        batch = self._global(step)
        return token_sha(np.stack([batch.tokens.numpy(), batch.targets.numpy()]))

    def epoch(self, step: int) -> float:
        """How often, at the start of `step`, as many rows have come as there are."""
        return step * self.rows / len(self.slots)

    def _global(self, step: int) -> Batch:
        if self._kept[0] != step:
            self._kept = step, self._rows(step, 0, self.rows)
        return self._kept[1]

    def _rows(self, step: int, first: int, last: int) -> Batch:
        return _packed_batch(self.conversations(step, first, last), self.seq_len)

    def conversations(self, step: int, first: int, last: int) -> list[list[Example]]:
        """Those in rows `first` to `last` of the global batch."""
        epochs, places = np.divmod(np.arange(step * self.rows + first, step * self.rows + last), len(self.slots))
        found = []
        for epoch in np.unique(epochs).tolist():  # most often one; two where an epoch ends within the batch
            here = places[epochs == epoch]
            order = self._by_length(epoch)
            for row in shuffled(here, len(self.slots), random_key(self.seed, "rows", epoch)).tolist():
                found.append([self.examples[order[slot]] for slot in self.slots[row]])
        return found

    def _by_length(self, epoch: int) -> np.ndarray:
        """The examples from short to long, those of equal length in an order of this epoch."""
        if self._order[0] != epoch:
            count = len(self.examples)
            chance = shuffled(np.arange(count), count, random_key(self.seed, "examples", epoch))
            self._order = epoch, np.lexsort((chance, self.lengths))
        return self._order[1]


def chat_windows(examples: Sequence[Example], seq_len: int, max_tokens: int, *, rows: int = 8) -> list[Batch]:
    """The rows that every evaluation uses, in batches of at most `rows`: the same for any run, rank or world.

    They are packed, and taken at equal distances from all; `max_tokens` positions are at most.
    """
    slots = packed([len(example.ids) for example in examples], seq_len)
    if not slots:
        raise DataError("chat.val: nothing to validate on, there are no conversations")
    count = min(len(slots), max(1, max_tokens // seq_len))
    chosen = [[examples[index] for index in slots[row * len(slots) // count]] for row in range(count)]
    return [_packed_batch(chosen[first : first + rows], seq_len) for first in range(0, count, rows)]


# --- command line -----------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:

    usage = "python data.py prepare|show [FILE.yaml] [--preset NAME] [--key=value ...]"
    command = argv[0] if argv else "--help"
    if command not in ("prepare", "show", "-h", "--help"):
        raise ConfigError(f"{command}: expected prepare or show ({usage})")
    cfg = load_config([command, *argv[1:]] if command.startswith("-") else argv[1:], "data", usage=usage)
    prepared = prepare(cfg.data, cfg.model.vocab_size)
    tokenizer = prepared.tokenizer
    print(f"tokenizer  {tokenizer.n_vocab:,} ids, {tokenizer.hash[:12]}, {escape_terminal(tokenizer.name)}")
    splits = [("train", source, weight) for source, weight in prepared.train]
    for split, source, weight in [*splits, *(("val", source, 1.0) for source in prepared.val)]:
        left_out = {name: count for name, count in source.counts.items() if name not in ("train", "val")}
        print(f"{split:<9}  {source.n_documents:,} documents, {len(source):,} tokens, weight {weight:g}, {source.path}")
        print(f"{'':<9}  left out of both splits: {counted(left_out)}" if left_out else "", end="\n" * bool(left_out))
    if command == "show":
        length = cfg.model.max_position_embeddings
        batches = open_batches(cfg.data, prepared, length, 2, cfg.run.seed)
        text = show(batches(0), tokenizer, sys.stdout.isatty())
        print(f"epoch      {batches.steps_per_epoch * 2:,} rows of {length} tokens; [- -] is read, but not trained")
        write_text(text)
    return 0


if __name__ == "__main__":
    run_script(main)
