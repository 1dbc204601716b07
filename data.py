"""Batches as functions of the step, and a view of what a model is trained on.

    python data.py prepare --data.train='corpus/*.jsonl'    tokenise what a configuration names
    python data.py prepare --verify                         and compare the shards with their SHA-256
    python data.py show                                     a sample of what the model will be trained on

Letters in shapes: B rows, T tokens of a row (seq_len), V ids.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C while torch is being imported: leave, without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hashlib
import itertools
import math
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanoqwen.chat import Example, pack_lengths
from nanoqwen.config import DataConfig, load_config
from nanoqwen.corpus import (
    Input,
    Prepared,
    Reader,
    SplitFn,
    TokenShards,
    describe_counts,
    identities,
    no_training_text,
    open_corpus,
    prepare,
    short_hash,
)
from nanoqwen.errors import ConfigError, DataError, escape_terminal, run_script
from nanoqwen.tokenizer import Tokenizer

IGNORE = -100  # target of a position that is not trained, as in torch's cross entropy
T = TypeVar("T")


# --- batches ----------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """int64 [B, T] each. Targets are shifted where a batch is made, and only there: targets[i] follows tokens[i]."""

    tokens: Tensor
    targets: Tensor  # IGNORE where nothing is to be learned
    documents: Tensor | None  # which document of its row a token belongs to; None: rows are not isolated


class Batches:
    """The global batch of each step, a function of (seed, step): neither ranks nor micro-batches matter.

    A kind of batch is one method, `make`. Every rank makes all rows and takes its own: 2 to 3 ms for 64 x 2,048
    tokens, which the main rank needs for the hash anyway.
    """

    rows: int  # of the global batch
    steps_per_epoch: int  # 0: unknown before the end of the text
    fingerprint: str  # hash of the examples and of the settings that decide a batch
    targets = 1.0  # fraction of the positions that have one, about
    isolated = True  # whether documents of a row see nothing of each other
    _last: tuple[int, Batch] | None = None  # step and global batch

    def make(self, step: int) -> Batch:
        raise NotImplementedError

    def epoch(self, step: int) -> float:
        """Epochs that are complete at the start of `step`."""
        raise NotImplementedError

    def global_batch(self, step: int) -> Batch:
        if self._last is None or self._last[0] != step:
            self._last = step, self.make(step)
        return self._last[1]

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of a rank, as a copy that the caller may change."""
        batch = rows_of(self.global_batch(step), self.rows * rank // world, self.rows * (rank + 1) // world)
        return batch._make(None if tensor is None else _copy(tensor) for tensor in batch)

    def sha(self, step: int) -> str:
        """Hash of the tokens and targets of the global batch."""
        batch = self.global_batch(step)
        return token_sha(np.stack([batch.tokens.numpy(), batch.targets.numpy()]))


def rows_of(batch: Batch, first: int, last: int) -> Batch:
    """Some rows of a batch, as views; what is not of single rows stays as it is."""
    return batch._make(t if t is None or t.dim() < 2 else t[first:last] for t in batch)


def _copy(tensor: Tensor) -> Tensor:
    # By numpy: torch would divide so small a copy among threads, which wait for each other on a busy machine.
    return torch.from_numpy(tensor.numpy().copy())


def token_sha(tokens: np.ndarray) -> str:
    return hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()[:16]


# --- order ------------------------------------------------------------------------------------------------------------


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


def random_key(*key: int | str) -> int:
    """63 bits, so that adding a small number stays within 64."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


class Mixture:
    """Which source a row comes from, and which of that source's rows it is: a function of the row's number.

    Rows come in blocks, each a shuffle that has every source at its share. Shares are thus exact at the end of each
    block, and counts are known without going through the rows before.
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
            sources = np.repeat(np.arange(len(before)), np.subtract(after, before))
            sources = sources[shuffled(np.arange(self.block), self.block, random_key(self.seed, "mixture", block))]
            order = np.empty_like(sources)
            for which, first in enumerate(before):
                order[sources == which] = np.arange(first, first + np.count_nonzero(sources == which))
            in_block = rows // self.block == block
            source[in_block], nth[in_block] = (values[rows[in_block] % self.block] for values in (sources, order))
        return source, nth


# --- text -------------------------------------------------------------------------------------------------------------


def _text_batch(windows: np.ndarray, eos_id: int, isolate_documents: bool) -> Batch:
    """[B, T + 1] tokens, IGNORE where a window is shorter, as a batch."""
    tokens, targets = (torch.from_numpy(ids.copy()) for ids in (windows[:, :-1], windows[:, 1:]))
    tokens[tokens == IGNORE] = eos_id
    if not isolate_documents:
        return Batch(tokens, targets, None)
    ends = tokens == eos_id
    targets[ends] = IGNORE  # the first token of a document does not follow from the one before
    return Batch(tokens, targets, ends.cumsum(1) - ends.long())


class _TextBatches(Batches):
    """Rows of running text. The hash is of the windows, where the last target is known even after an EOS."""

    eos_id: int
    _windows: np.ndarray  # [B, T + 1], of the last batch

    def read_windows(self, step: int) -> np.ndarray:
        raise NotImplementedError

    def make(self, step: int) -> Batch:
        self._windows = self.read_windows(step)
        return _text_batch(self._windows, self.eos_id, self.isolated)

    def sha(self, step: int) -> str:
        """Hash of the token ids of the global batch."""
        self.global_batch(step)
        return token_sha(self._windows)


class PretrainBatches(_TextBatches):
    """Windows of token shards.

    A source's windows overlap by one token, so each token is a target once; fewer than T tokens at its end are in no
    window. Each epoch is a permutation of its own. Epochs follow each other without a gap, within a batch if need be:
    every window comes once before any comes twice, and nothing is dropped.
    """

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
        self.eos_id = self.shards[0].eos_id
        self.mixture = Mixture([weight for _, weight in shards], seed)
        self.counts = [(len(source) - 1) // seq_len for source in self.shards]  # windows of each source
        for source, count in zip(self.shards, self.counts, strict=True):
            if count < 1:
                raise DataError(f"{source.path}: expected at least {seq_len + 1} tokens of text, got {len(source)}")
        self.steps_per_epoch = math.ceil(sum(self.counts) / rows)  # after which all windows could have come once
        self.fingerprint = short_hash(
            [(source.fingerprint, share) for source, share in zip(self.shards, self.mixture.shares, strict=True)]
        )

    def epoch(self, step: int) -> float:
        """How often, at the start of `step`, as many windows have come as there are in all sources together."""
        return step * self.rows / sum(self.counts)

    def read_windows(self, step: int) -> np.ndarray:
        source, nth = self.mixture(np.arange(step * self.rows, (step + 1) * self.rows))
        windows = np.empty((self.rows, self.seq_len + 1), np.int64)
        for which in np.unique(source).tolist():
            count = self.counts[which]
            for epoch in np.unique(nth[source == which] // count).tolist():
                rows = np.flatnonzero((source == which) & (nth // count == epoch))
                places = shuffled(nth[rows] % count, count, random_key(self.seed, which, epoch))
                for row, place in zip(rows.tolist(), places.tolist(), strict=True):
                    windows[row] = self.shards[which].window(place * self.seq_len, self.seq_len + 1)
        return windows


class _Stream:
    """The windows of one source, in the order of its documents, tokenised on demand."""

    def __init__(self, cfg: DataConfig, inputs: list[Input], split_of: SplitFn, tokenizer: Tokenizer, key: Any) -> None:
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
        chunks, size = [self._tokens], len(self._tokens)
        while size < self._used + length:
            epoch, cursor, tokens = next(self._documents)
            self._starts.append((size, epoch, cursor))
            chunks.append(tokens)
            size += len(tokens)
        self._tokens = np.concatenate(chunks) if len(chunks) > 1 else self._tokens
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
            has_text, chunks = cursor != [0, 0, None], []
            for piece in reader:
                if piece.split == "train":
                    has_text = True
                    chunks.append(self.tokenizer.encode_array(piece.text))
                    if piece.ends:
                        yield epoch, cursor, np.concatenate([*chunks, [self.tokenizer.eos_id]], dtype=np.int64)
                        cursor, chunks = piece.cursor, []
            if not has_text:
                raise no_training_text(self.inputs, reader.counts)
            epoch, cursor = epoch + 1, [0, 0, None]


class StreamBatches(_TextBatches):
    """Windows of text that is tokenised on the fly: steps come in order, and `state` is where one is.

    Every rank reads the whole stream, so that neither the order nor the state depends on the number of ranks and a
    run resumes with any other. It costs each rank the tokenisation of all rows.
    """

    steps_per_epoch = 0

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer, seq_len: int, rows: int, seed: int) -> None:
        text = open_corpus(cfg)
        self.seq_len, self.rows, self.isolated, self.eos_id = seq_len, rows, cfg.isolate_documents, tokenizer.eos_id
        self.mixture = Mixture([weight for weight, _ in text.groups], seed)
        self.streams = [
            _Stream(cfg, inputs, text.split_of, tokenizer, (seed, which))
            for which, (_, inputs) in enumerate(text.groups)
        ]
        texts = [identities(cfg, inputs) for _, inputs in text.groups]
        self.fingerprint = short_hash([texts, text.settings, self.mixture.shares, tokenizer.hash])
        self._next_step = 0

    def epoch(self, step: int) -> float:
        """Of the source that is furthest. The fraction of an epoch is unknown: whole epochs only."""
        return float(max(stream.place()[0] for stream in self.streams))

    def state(self) -> dict[str, Any]:
        """Where the stream stands after the last batch: plain JSON, the same on all ranks."""
        return {"step": self._next_step, "places": [stream.place() for stream in self.streams], "of": self.fingerprint}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["of"] != self.fingerprint:
            raise DataError("data.train: the text, the tokenizer or the settings have changed since the stream's state")
        self._next_step, self._last = state["step"], None
        for stream, place in zip(self.streams, state["places"], strict=True):
            stream.go_to(place)

    def read_windows(self, step: int) -> np.ndarray:
        if step != self._next_step:
            raise DataError(f"a stream resumes with step {self._next_step}, expected no other, got {step}")
        sources, _ = self.mixture(np.arange(step * self.rows, (step + 1) * self.rows))
        windows = np.stack([self.streams[which].window(self.seq_len + 1) for which in sources.tolist()])
        self._next_step = step + 1
        return windows


def open_batches(cfg: DataConfig, prepared: Prepared, seq_len: int, rows: int, seed: int) -> Batches:
    """The batches of a configuration, from shards or streamed."""
    if cfg.streaming:
        return StreamBatches(cfg, prepared.tokenizer, seq_len, rows, seed)
    return PretrainBatches(prepared.train, seq_len, rows, seed, isolate_documents=cfg.isolate_documents)


# --- conversations ----------------------------------------------------------------------------------------------------


def pack_rows(rows: Sequence[Sequence[Example]], seq_len: int, filler: int) -> Batch:
    """Examples side by side; each is a document of its own, and so is the `filler` at the end of a row."""
    shape = (len(rows), seq_len)
    tokens, targets = np.full(shape, filler, np.int64), np.full(shape, IGNORE, np.int64)
    documents = np.empty(shape, np.int64)
    for row, examples in enumerate(rows):
        end = 0
        for number, example in enumerate(examples):
            start, end = end, end + len(example.ids)
            tokens[row, start:end], documents[row, start:end] = example.ids, number
            targets[row, start : end - 1] = np.where(example.mask[1:], example.ids[1:], IGNORE)
        documents[row, end:] = len(examples)
    return Batch(*map(torch.from_numpy, (tokens, targets, documents)))


class ChatBatches(Batches):
    """Packed conversations.

    They are packed once, by their lengths. In each epoch those of equal length change places at random, and the rows
    come in another order, so that any epoch is known without the ones before. Each conversation comes once in an
    epoch; epochs follow each other without a gap, within a batch if need be.
    """

    def __init__(self, examples: Sequence[Example], seq_len: int, rows: int, seed: int, *, pack: bool = True) -> None:
        if not examples:
            raise DataError("chat.train: expected at least one conversation, got none")
        for example in examples:
            if len(example.ids) > seq_len or not example.mask[1:].any():
                size = f"{len(example.ids)} tokens, {example.mask[1:].sum()} of them learned"
                raise DataError(f"{example.where}: expected at most {seq_len} tokens, and some to learn, got {size}")
        self.examples, self.seq_len, self.rows, self.seed = examples, seq_len, rows, seed
        self.lengths = np.array([len(example.ids) for example in examples])
        ascending = np.sort(self.lengths).tolist()
        self.slots = pack_lengths(ascending, seq_len) if pack else [[index] for index in range(len(ascending))]
        self.steps_per_epoch = math.ceil(len(self.slots) / rows)
        self.padding = 1 - sum(ascending) / (len(self.slots) * seq_len)
        self.targets = sum(int(example.mask.sum()) for example in examples) / (len(self.slots) * seq_len)
        digest = hashlib.sha256(bytes([pack]))
        for example in examples:
            digest.update(b"%d " % len(example.ids) + example.ids.tobytes() + example.mask.tobytes())
        self.fingerprint = digest.hexdigest()[:32]
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def epoch(self, step: int) -> float:
        """How often, at the start of `step`, as many rows have come as there are."""
        return step * self.rows / len(self.slots)

    def make(self, step: int) -> Batch:
        return pack_rows(self.conversations(step), self.seq_len, filler=self.examples[0].ids[-1])

    def conversations(self, step: int) -> list[list[Example]]:
        """Those in each row of the global batch."""
        epochs, places = np.divmod(np.arange(step * self.rows, (step + 1) * self.rows), len(self.slots))
        rows = []
        for epoch in np.unique(epochs).tolist():  # most often one; two where an epoch ends within the batch
            order = self._by_length(epoch)
            key = random_key(self.seed, "rows", epoch)
            for row in shuffled(places[epochs == epoch], len(self.slots), key).tolist():
                rows.append([self.examples[order[slot]] for slot in self.slots[row]])
        return rows

    def _by_length(self, epoch: int) -> np.ndarray:
        """The examples from short to long, those of equal length in an order of this epoch."""
        if self._order[0] != epoch:
            count = len(self.examples)
            ties = shuffled(np.arange(count), count, random_key(self.seed, "examples", epoch))
            self._order = epoch, np.lexsort((ties, self.lengths))
        return self._order[1]


# --- evaluation -------------------------------------------------------------------------------------------------------

# The rows of an evaluation are the same for any run, rank and world, and `max_tokens` positions at most.


def evenly_spaced(rows: Sequence[T], seq_len: int, max_tokens: int) -> list[T]:
    """Rows at equal distances, as many as have `max_tokens` positions, but at least one."""
    count = min(len(rows), max(1, max_tokens // seq_len))
    return [rows[number * len(rows) // count] for number in range(count)]


def split_rows(batch: Batch, rows: int) -> list[Batch]:
    """A batch as batches of at most `rows`."""
    return [rows_of(batch, first, first + rows) for first in range(0, len(batch.tokens), rows)]


def eval_windows(
    shards: Sequence[TokenShards], seq_len: int, max_tokens: int, *, rows: int = 8, isolate_documents: bool = False
) -> list[Batch]:
    """Windows of all shards; each token is a target at most once. The last one of a shard is filled up with EOS,
    which is no target."""
    places = [(source, start) for source in shards for start in range(0, len(source) - 1, seq_len)]
    if not places:
        raise DataError("data.val: nothing to validate on, the documents have no two tokens")
    chosen = evenly_spaced(places, seq_len, max_tokens)
    windows = np.full((len(chosen), seq_len + 1), IGNORE, np.int64)
    for row, (source, start) in enumerate(chosen):
        tokens = source.window(start, seq_len + 1)
        windows[row, : len(tokens)] = tokens
    return split_rows(_text_batch(windows, shards[0].eos_id, isolate_documents), rows)


def chat_windows(examples: Sequence[Example], seq_len: int, max_tokens: int, *, rows: int = 8) -> list[Batch]:
    """Rows of packed conversations."""
    slots = pack_lengths([len(example.ids) for example in examples], seq_len)
    if not slots:
        raise DataError("chat.val: nothing to validate on, there are no conversations")
    chosen = [[examples[index] for index in slot] for slot in evenly_spaced(slots, seq_len, max_tokens)]
    return split_rows(pack_rows(chosen, seq_len, filler=examples[0].ids[-1]), rows)


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """Bytes of each id [V], for bits per byte; control tokens stand for no text: 0."""
    sizes = torch.zeros(tokenizer.n_vocab, dtype=torch.int64)
    for token_id, token in tokenizer.engine.text_bytes.items():
        sizes[token_id] = len(token)
    return sizes


# --- on the device ----------------------------------------------------------------------------------------------------


class Micro(NamedTuple):
    """A micro-batch, on the device."""

    tokens: Tensor  # [B, T]
    targets: Tensor  # [B, T]
    documents: Tensor | None  # [B, T]
    at: Tensor | None  # [N] positions with a target; None: all have one. Found on the host, without a sync
    extra: tuple[Tensor, ...] = ()  # further inputs of an objective


def micro_batches(batch: Any, rows: int, device: torch.device) -> list[Micro]:
    """A batch cut into parts of `rows`; what is not of single rows is in each of them.

    batch: a Batch, or a NamedTuple that begins as one and continues with further inputs of an objective
    """
    micros = []
    for tokens, targets, documents, *extra in split_rows(batch, rows):
        trained = (targets != IGNORE).flatten()
        at = None if trained.all() else trained.nonzero().squeeze(1)
        moved = [None if t is None else to_device(t, device) for t in (tokens, targets, documents, at, *extra)]
        micros.append(Micro(*moved[:4], tuple(moved[4:])))
    return micros


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """From pinned memory, so that the copy waits neither for the device nor the program for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# --- command line -----------------------------------------------------------------------------------------------------


def show(batch: Batch, tokenizer: Tokenizer, colour: bool) -> str:
    """The rows of a batch as text, one tone for what is trained and another (or `[- -]`) for what is only read."""
    trained, read = ("\033[32m{}\033[0m", "\033[90m{}\033[0m") if colour else ("{}", "[-{}-]")
    lines = []
    for number, (tokens, targets) in enumerate(zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)):
        learned = [False, *(target != IGNORE for target in targets)]  # of each token: is it a target?
        lines.append(f"--- row {number}: {sum(learned)} of {len(targets)} positions are trained")
        row = [*tokens, targets[-1]] if learned[-1] else tokens
        line = ""
        for is_target, run in itertools.groupby(zip(learned, row, strict=False), key=lambda pair: pair[0]):
            text = escape_terminal(_readable([token for _, token in run], tokenizer))
            line += (trained if is_target else read).format(text)
        lines.append(line)
    return "\n".join(lines)


def write_text(text: str) -> None:
    """To stdout, whatever characters its encoding has."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def _readable(ids: list[int], tokenizer: Tokenizer) -> str:
    """Text of ids; of a control token many times over, as at the end of a row that is filled up, one and the count."""
    chunks = []
    for token, run in itertools.groupby(ids):
        times = len(list(run))
        is_filling = times > 3 and token in tokenizer.special.values()
        chunks.append(tokenizer.decode_bytes([token] * (1 if is_filling else times)))
        chunks.append(f" x {times}".encode() * is_filling)
    return b"".join(chunks).decode("utf-8", "replace")


def main(argv: list[str]) -> int:
    usage = "python data.py prepare [--verify]|show [FILE.yaml] [--preset NAME] [--key=value ...]"
    command = argv[0] if argv else "--help"
    if command not in ("prepare", "show", "-h", "--help"):
        raise ConfigError(f"{command}: expected prepare or show ({usage})")
    verify = command == "prepare" and "--verify" in argv
    options = [word for word in argv[1:] if not (verify and word == "--verify")]
    cfg = load_config([command, *options] if command.startswith("-") else options, "data", usage=usage)
    prepared = prepare(cfg.data, cfg.model.vocab_size)
    tokenizer = prepared.tokenizer
    print(f"tokenizer  {tokenizer.n_vocab:,} ids, {tokenizer.hash[:12]}, {escape_terminal(tokenizer.name)}")
    splits = [("train", source, weight) for source, weight in prepared.train]
    for split, source, weight in [*splits, *(("val", source, 1.0) for source in prepared.val)]:
        left_out = {name: count for name, count in source.counts.items() if name not in ("train", "val")}
        print(f"{split:<9}  {source.n_documents:,} documents, {len(source):,} tokens, weight {weight:g}, {source.path}")
        if left_out:
            print(f"{'':<9}  left out of both splits: {describe_counts(left_out)}")
        if verify:
            source.verify()
    if command == "show":
        length = cfg.model.max_position_embeddings
        batches = open_batches(cfg.data, prepared, length, 2, cfg.run.seed)
        text = show(batches(0), tokenizer, sys.stdout.isatty())
        print(f"epoch      {batches.steps_per_epoch * 2:,} rows of {length} tokens; [- -] is read, but not trained")
        write_text(text)
    return 0


if __name__ == "__main__":
    run_script(main)
