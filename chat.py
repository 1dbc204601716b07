"""Conversations to batches: rows of any of four shapes -> messages -> ids and what is trained of them -> packed rows.

A row is {"messages": [{"role", "content"}]}, {"instruction", "input", "output"}, {"prompt", "response"} or ShareGPT's
{"conversations": [{"from", "value"}]}. `builtin:docstrings` are pairs from the standard library of the running Python:
what a function promises, and the function. Only what an assistant writes is trained, with the token that ends its turn.

Letters in shapes: B rows, T tokens of a row (seq_len).
"""

from __future__ import annotations

import ast
import bisect
import hashlib
import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from corpus import BadRow, DataConfig, Input, Reader, expand, json_object, python_files
from data import IGNORE, Batch, key_of, sha_of, shuffled
from tokenizer import DataError, Tokenizer, render_chat

BUILTIN = "builtin:docstrings"
LISTED = 5  # offending rows that the audit names
LONGEST_ANSWER, LONGEST_PROMISE = 400, 200  # characters of a built-in pair: what a small model can learn
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ChatConfig:
    train: tuple[str, ...] = (BUILTIN,)
    val: tuple[str, ...] = ()
    val_fraction: float = 0.05
    split: str = "train"
    on_error: Literal["stop", "skip"] = "stop"
    limit: int = 0
    system: str | None = None
    pack: bool = True

    def __post_init__(self) -> None:
        if not self.train or not all((*self.train, *self.val)):
            raise ValueError(f"train: expected at least one source and no empty one, got {self.train!r}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction: expected above 0 and below 1, got {self.val_fraction!r}")
        if self.limit < 0:
            raise ValueError(f"limit: expected 0 (all rows) or more, got {self.limit!r}")


# --- rows to messages -------------------------------------------------------------------------------------------------


def to_messages(row: Mapping[str, Any]) -> Messages:
    """The messages of a row, whichever of the four shapes it has."""
    if row.get("messages") is not None:
        turns = [(_of(turn, "role"), _of(turn, "content")) for turn in _list(row, "messages")]
    elif row.get("conversations") is not None:
        turns = [(_of(turn, "from"), _of(turn, "value")) for turn in _list(row, "conversations")]
    elif "instruction" in row and "output" in row:
        more = row.get("input") or ""
        asked = _of(row, "instruction") + ("\n\n" + _of(row, "input") if more else "")
        turns = [("user", asked), ("assistant", _of(row, "output"))]
    elif "prompt" in row and "response" in row:
        turns = [("user", _of(row, "prompt")), ("assistant", _of(row, "response"))]
    else:
        keys = ", ".join(map(repr, row)) or "none"
        shapes = "messages; instruction, input and output; prompt and response; or conversations"
        raise BadRow(f"expected the keys {shapes}; got {keys:.200}")
    for number, (role, _) in enumerate(turns):
        if role not in ROLES:
            raise BadRow(f"turn {number}: expected a role of {', '.join(ROLES)}, got {role!r:.60}")
    return [{"role": ROLES[role], "content": content} for role, content in turns]


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(row[key], list) or not row[key]:
        raise BadRow(f"{key}: expected a list of turns, got {row[key]!r:.60}")
    return row[key]


def _of(row: Any, key: str) -> str:
    if not isinstance(row, Mapping) or not isinstance(row.get(key), str):
        got = row.get(key) if isinstance(row, Mapping) else row
        raise BadRow(f"{key}: expected text, got {got!r:.60}")
    return row[key]


class Conversation(NamedTuple):
    messages: Messages
    where: str  # file:line


class ConversationReader(Reader):
    """The conversations of files and data sets. A row that is none is an error at its line, or counted."""

    def __init__(self, cfg: ChatConfig, inputs: Sequence[Input]) -> None:
        super().__init__(DataConfig(split=cfg.split, on_error=cfg.on_error), inputs, lambda digest: None)
        self.columns = None

    def of_row(self, raw: Any, cursor: list[Any]) -> Iterator[Conversation]:
        if isinstance(raw, Path):
            raise BadRow("expected rows (.jsonl, .parquet or a data set), got a text file")
        if not isinstance(raw, bytes) or raw.strip():
            number, row, _ = cursor
            yield Conversation(to_messages(json_object(raw)), f"{self.inputs[number].name}:{row}")


def conversations(cfg: ChatConfig, sources: Iterable[str], key: str, counts: Counter[str]) -> Iterator[Conversation]:
    for source in sources:
        if source == BUILTIN:
            yield from docstring_pairs()
            continue
        reader = ConversationReader(cfg, expand([source], key, section="chat"))
        yield from reader
        counts.update(reader.counts)


# --- the built-in set -------------------------------------------------------------------------------------------------


@lru_cache
def docstring_pairs() -> list[Conversation]:
    """Functions of the standard library that say what they do, and their code without the saying; shortest first."""
    found = [
        pair for path in python_files() if not {"test", "tests", "idlelib"} & {*path.parts} for pair in _pairs(path)
    ]
    unique = {pair.messages[0]["content"]: pair for pair in reversed(found)}  # the first of those that ask the same
    return sorted(unique.values(), key=lambda pair: (len(pair.messages[1]["content"]), pair.messages[0]["content"]))


def _pairs(path: Path) -> Iterator[Conversation]:
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources have escapes that new Pythons warn of
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, OSError):  # broken on purpose: for tests of tools
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and (promise := ast.get_docstring(node)):
            promise = " ".join(promise.split("\n\n")[0].split())
            indent = " " * node.col_offset
            head = lines[node.lineno - 1 : node.body[0].lineno - 1]
            body = lines[node.body[1].lineno - 1 : node.end_lineno]
            code = "\n".join(line.removeprefix(indent).rstrip() for line in head + body)
            if head and len(code) <= LONGEST_ANSWER and len(promise) <= LONGEST_PROMISE:
                asked = f"Write the Python function {node.name}. {promise}"
                messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": code}]
                yield Conversation(messages, f"{path}:{node.lineno}")


# --- messages to ids --------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A conversation as it is trained on, up to its last trained token."""

    ids: np.ndarray  # int32 [n]
    mask: np.ndarray  # bool [n]: what an assistant has to write
    where: str

    @property
    def positions(self) -> int:
        """Of a row: the last token is a target and no input."""
        return len(self.ids) - 1


class Dropped(Exception):
    """Why a conversation cannot be trained on."""


def to_example(messages: Messages, tokenizer: Tokenizer, seq_len: int) -> tuple[list[int], list[int], bool]:
    """(ids, mask, whether something was cut). At most seq_len + 1 ids, since the last one is a target only.

    What is too long loses its oldest exchanges, then the beginning of what is asked; the system message stays, and no
    answer is ever cut.
    """
    system = [m for m in messages[:1] if m["role"] == "system"]
    rest = messages[len(system) :]
    while True:
        ids, mask = trimmed(system + rest, tokenizer)
        if len(ids) <= seq_len + 1:
            return ids, mask, len(system + rest) < len(messages)
        answers = [at for at, m in enumerate(rest) if m["role"] == "assistant"]
        if len(answers) < 2:
            break
        rest = rest[answers[0] + 1 :]
    while rest[0]["role"] != "assistant":
        cut = _shortened(system, rest, tokenizer, seq_len)
        if cut is not None:
            return *cut, True
        rest = rest[1:]
    raise Dropped("answer too long")


def _shortened(system: Messages, rest: Messages, tokenizer: Tokenizer, seq_len: int) -> tuple[list, list] | None:
    """With as few characters as possible off the beginning of the first message; None: not even without all of them."""
    text = rest[0]["content"]

    def without(count: int) -> tuple[list[int], list[int]]:
        return trimmed([*system, rest[0] | {"content": text[count:]}, *rest[1:]], tokenizer)

    # One character less can be one token more, so this is a fit, and very nearly the longest.
    enough = bisect.bisect_left(range(len(text)), True, key=lambda count: len(without(count)[0]) <= seq_len + 1)
    found = without(enough)
    return found if len(found[0]) <= seq_len + 1 else None


def trimmed(messages: Messages, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids and mask up to the last trained token: nothing is learned from what comes after."""
    ids, mask = render_chat(messages, tokenizer)
    end = next((at for at in range(len(mask), 0, -1) if mask[at - 1]), 0)
    if not end:
        raise Dropped("no answer")
    return ids[:end], mask[:end]


class Audit(NamedTuple):
    """What became of the rows. Printed before the first step."""

    counts: Counter[str]
    trained: int  # tokens
    tokens: int
    offending: list[str]  # file:line and why, the first few

    def __str__(self) -> str:
        kept = self.counts["train"] + self.counts["val"]
        left_out = {name: n for name, n in sorted(self.counts.items()) if name not in ("rows", "train", "val")}
        lines = [
            f"{self.counts['rows']:,} conversations, {kept:,} kept: {self.counts['train']:,} to train on, "
            f"{self.counts['val']:,} to validate; {self.trained:,} of {self.tokens:,} tokens are trained"
        ]
        if left_out:
            lines.append(", ".join(f"{n:,} {name}" for name, n in left_out.items()))
        return "\n".join([*lines, *(f"{where}" for where in self.offending)])


class ChatData(NamedTuple):
    train: list[Example]
    val: list[Example]
    audit: Audit


def prepare_chat(cfg: ChatConfig, tokenizer: Tokenizer, seq_len: int) -> ChatData:
    """Read, render, cut, split and count. Rows that ask the same are never in both splits."""
    counts: Counter[str] = Counter()
    offending: list[str] = []
    held_out: set[bytes] = set()
    splits: dict[str, list[Example]] = {"train": [], "val": []}

    def take(sources: Iterable[str], key: str, split_of: Callable[[bytes], str | None]) -> None:
        for messages, where in conversations(cfg, sources, key, counts):
            if cfg.limit and len(splits["train"]) + len(splits["val"]) >= cfg.limit:
                break
            counts["rows"] += 1
            if cfg.system is not None and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": cfg.system}, *messages]
            try:
                ids, mask, cut = to_example(messages, tokenizer, seq_len)
            except Dropped as reason:
                counts[f"dropped: {reason}"] += 1
                offending.append(f"{where}: dropped, {reason}")
                continue
            split = split_of(_asked(messages))
            if split is None:
                counts["asked in the validation rows too"] += 1
                continue
            counts[split] += 1
            counts["cut to fit"] += cut
            splits[split].append(Example(np.array(ids, np.int32), np.array(mask, bool), where))

    def held(digest: bytes) -> str:
        held_out.add(digest)
        return "val"

    limit = int(cfg.val_fraction * 2**64)
    take(cfg.val, "val", held)
    if cfg.val:
        take(cfg.train, "train", lambda digest: None if digest in held_out else "train")
    else:
        take(cfg.train, "train", lambda digest: "val" if int.from_bytes(digest, "little") < limit else "train")
    audit = Audit(
        +counts,
        sum(int(example.mask.sum()) for example in splits["train"]),
        sum(len(example.ids) for example in splits["train"]),
        offending[:LISTED] + ([f"... and {len(offending) - LISTED} more"] if len(offending) > LISTED else []),
    )
    for split, what in (("train", "to train on"), ("val", "to validate on")):
        if not splits[split]:
            wanted = "; give chat.val, a larger chat.val_fraction or more rows" if split == "val" else ""
            raise DataError(f"chat.{split}: nothing {what} ({' | '.join(str(audit).splitlines())}){wanted}")
    return ChatData(splits["train"], splits["val"], audit)


def _asked(messages: Messages) -> bytes:
    """A digest of all that stands before the first answer."""
    until = next(at for at, message in enumerate(messages) if message["role"] == "assistant")
    return hashlib.sha256(json.dumps(messages[:until]).encode()).digest()[:8]


# --- batches ----------------------------------------------------------------------------------------------------------


def packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of lengths in rows of at most `room` together: the longest first, each where the least is left over."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # room that is left -> rows
    rooms: list[int] = []  # its keys, sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(rooms, lengths[index])
        if at == len(rooms):
            row, left = len(rows), room
            rows.append([])
        else:
            left = rooms[at]
            row = with_room[left].pop()
            if not with_room[left]:
                del rooms[at]
        rows[row].append(index)
        left -= lengths[index]
        if not with_room[left]:
            bisect.insort(rooms, left)
        with_room[left].append(row)
    return rows


def to_batch(rows: Sequence[Sequence[Example]], seq_len: int, fill: int) -> Batch:
    """Rows of conversations as [B, T], each a document of its own, as is what is left of a row: without targets."""
    tokens = np.full((len(rows), seq_len), fill, np.int64)
    targets = np.full((len(rows), seq_len), IGNORE, np.int64)
    documents = np.zeros((len(rows), seq_len), np.int64)
    for row, examples in enumerate(rows):
        start = 0
        for number, example in enumerate(examples):
            end = start + example.positions
            tokens[row, start:end] = example.ids[:-1]
            targets[row, start:end] = np.where(example.mask[1:], example.ids[1:], IGNORE)
            documents[row, start:end] = number
            start = end
        documents[row, start:] = len(examples)
    return Batch(*map(torch.from_numpy, (tokens, targets, documents)))


class ChatBatches:
    """The global batch of each step, a pure function of (seed, step), as in `PretrainBatches`.

    Conversations are packed into rows once; the rows are permuted anew in each epoch, and each comes once in it.
    """

    def __init__(
        self, examples: Sequence[Example], seq_len: int, rows: int, seed: int, *, pack: bool = True, fill: int = 0
    ) -> None:
        self.examples, self.seq_len, self.rows, self.seed, self.fill = list(examples), seq_len, rows, seed, fill
        lengths = [example.positions for example in self.examples]
        self.packed = packed(lengths, seq_len) if pack else [[index] for index in range(len(lengths))]
        self.padding = 1 - sum(lengths) / (seq_len * len(self.packed))
        self.steps_per_epoch = -(-len(self.packed) // rows)
        digest = hashlib.sha256(repr((seq_len, pack)).encode())
        for example in self.examples:
            digest.update(example.ids.tobytes() + example.mask.tobytes())
        self.fingerprint = digest.hexdigest()[:32]

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        return self._batch(step, self.rows * rank // world, self.rows * (rank + 1) // world)

    def sha(self, step: int) -> str:
        """Hash of the token ids and targets of the global batch."""
        batch = self._batch(step, 0, self.rows)
        return sha_of(np.stack([batch.tokens.numpy(), batch.targets.numpy()]))

    def epoch(self, step: int) -> float:
        return step * self.rows / len(self.packed)

    def examples_of(self, step: int) -> list[list[Example]]:
        """The conversations of each row of the global batch."""
        nth = np.arange(step * self.rows, (step + 1) * self.rows)
        count, found = len(self.packed), []
        for epoch in np.unique(nth // count).tolist():
            places = nth[nth // count == epoch] % count
            found += shuffled(places, count, key_of(self.seed, "chat", epoch)).tolist()
        return [[self.examples[index] for index in self.packed[row]] for row in found]

    def _batch(self, step: int, first: int, last: int) -> Batch:
        return to_batch(self.examples_of(step)[first:last], self.seq_len, self.fill)


def chat_windows(examples: Sequence[Example], seq_len: int, max_tokens: int, *, rows: int = 8) -> list[Batch]:
    """The rows that every evaluation uses, as batches of at most `rows`."""
    order = packed([example.positions for example in examples], seq_len)
    count = min(len(order), max(1, max_tokens // seq_len))
    chosen = [[examples[i] for i in order[row * len(order) // count]] for row in range(count)]
    return [to_batch(chosen[first : first + rows], seq_len, 0) for first in range(0, count, rows)]
