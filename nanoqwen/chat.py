"""Conversations to examples for supervised fine-tuning: the assistant's turns are learned, the rest is context.

    python finetune.py --show_data --chat.train mine.jsonl     counts, and the first rows

A source is builtin:docstrings (instruction -> function, from the standard library of the running Python),
builtin:tasks (small questions and orders: see builtin.py), or rows of .jsonl .jsonl.gz .jsonl.zst .parquet or a Hugging
Face data set, each of which has one of these shapes:

    {"messages": [{"role": "system" | "user" | "assistant", "content": TEXT}, ...]}
    {"conversations": [{"from": "system" | "human" | "gpt", "value": TEXT}, ...]}
    {"instruction": TEXT, "input": TEXT or absent, "output": TEXT}
    {"prompt": TEXT, "response": TEXT}

The tokenizer's chat template makes a text of them: see chat_template.py.

Letters in shapes: B rows, T tokens of a row (seq_len), N tokens of a conversation.
"""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanoqwen.builtin import DOCSTRINGS, TASKS, conversations, docstring_pairs
from nanoqwen.chat_template import RefusedByTemplate, Rendered, render
from nanoqwen.config import ChatConfig, DataConfig
from nanoqwen.corpus import (
    ROW_FILES,
    BadRow,
    Input,
    RowReader,
    expand,
    listed,
    normalized,
    python_files,
    row_object,
    split_by_hash,
    text_field,
    type_name,
)
from nanoqwen.errors import DataError
from nanoqwen.tokenizer import Tokenizer

SHAPES = "messages, conversations, instruction and output, or prompt and response"
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
PLACES = 5  # rows that the audit names of those left out for one reason


# --- rows to messages -------------------------------------------------------------------------------------------------

Message = dict[str, str]  # role and content


def conversation(row: Mapping[str, Any]) -> list[Message]:
    """The messages of a row of any known shape. A table has every column in every row: null is as good as absent."""
    row = {key: value for key, value in row.items() if value is not None}
    if "messages" in row:
        messages = _messages("messages", row["messages"], "role", "content", ("system", "user", "assistant"))
    elif "conversations" in row:
        messages = _messages("conversations", row["conversations"], "from", "value", tuple(SPEAKERS))
    elif {"instruction", "output"} <= row.keys():
        texts = [text_field(row, key) for key in ("instruction", "input") if key in row]
        request = "\n\n".join(filter(None, texts))
        messages = [_message("user", request), _message("assistant", text_field(row, "output"))]
    elif {"prompt", "response"} <= row.keys():
        messages = [_message("user", text_field(row, "prompt")), _message("assistant", text_field(row, "response"))]
    else:
        raise BadRow(f"expected {SHAPES}, got {listed(row)}")
    if row.get("system") and messages[0]["role"] != "system":
        return [_message("system", text_field(row, "system")), *messages]
    return messages


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _messages(name: str, turns: Any, role_key: str, text_key: str, roles: Sequence[str]) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{name}: expected a list of messages, got {type_name(turns) if turns else 'none'}")
    messages = []
    for number, turn in enumerate(turns):
        where = f"{name}[{number}]"
        if not isinstance(turn, dict):
            raise BadRow(f"{where}: expected an object, got {type_name(turn)}")
        if not {role_key, text_key} <= turn.keys():
            raise BadRow(f"{where}: expected {role_key!r} and {text_key!r}, got {listed(turn)}")
        role = turn[role_key]
        if role not in roles:
            raise BadRow(f"{where}.{role_key}: expected {', '.join(roles)}, got {role!r:.60}")
        messages.append(_message(SPEAKERS[role], text_field(turn, text_key, f"{where}.")))
    return messages


class ExampleReader(RowReader):
    """What `parse` makes of each row and its place (file:line). Malformed rows that may be skipped go to the audit."""

    def __init__(
        self, cfg: DataConfig, inputs: Sequence[Input], audit: Audit, parse: Callable[[dict[str, Any], str], Any]
    ) -> None:
        super().__init__(cfg, inputs)
        self.audit, self.parse = audit, parse

    def leave_out(self, reason: str, where: str) -> None:
        self.audit.rows += 1
        self.audit.leave_out(reason, where)

    def items(self, raw: Any, cursor: list[Any]) -> Iterator[Any]:
        if isinstance(raw, Path):
            raise DataError(f"{raw}: expected rows ({', '.join(ROW_FILES)}), got a text file")
        yield self.parse(row_object(raw), f"{self.inputs[cursor[0]].name}:{cursor[1]}")


# --- the built-in set -------------------------------------------------------------------------------------------------


def _docstring_rows(audit: Audit) -> Iterator[tuple[str, list[Message]]]:
    seen: set[tuple[str, str]] = set()
    for path in python_files():
        if {"test", "tests", "idle_test", "lib2to3"} & set(path.parts):
            continue
        try:
            pairs = sorted(docstring_pairs(path.read_text("utf-8")))
        except (SyntaxError, ValueError, RecursionError):  # there on purpose, or for another Python
            audit.leave_out("unreadable files", str(path))
            continue
        for line, request, answer in pairs:
            if (request, answer) not in seen:
                seen.add((request, answer))
                yield f"{path}:{line}", conversation({"prompt": request, "response": answer})


# --- messages to examples ---------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A conversation up to the last token that is learned."""

    ids: np.ndarray  # int32 [N]
    mask: np.ndarray  # bool [N], true on what is learned: each of the assistant's answers and its stop token
    where: str  # file:line


@dataclass
class Audit:
    """How many rows were read, kept, shortened and left out, and why."""

    rows: int = 0
    train: int = 0
    val: int = 0
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # by reason
    places: dict[str, list[str]] = field(default_factory=dict)  # the first ones as file:line, also of truncated rows
    tokens: int = 0
    supervised: int = 0  # of the tokens
    padding: float = 0.0  # fraction of the positions of a training epoch
    warnings: list[str] = field(default_factory=list)

    @property
    def kept(self) -> int:
        return self.train + self.val

    def leave_out(self, reason: str, where: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.name(reason, where)

    def name(self, reason: str, where: str) -> None:
        places = self.places.setdefault(reason, [])
        if len(places) < PLACES:
            places.append(where)

    def __str__(self) -> str:
        learned = self.supervised / max(1, self.tokens)
        lines = [
            f"rows       {self.rows:,} read, {self.train:,} to train on, {self.val:,} to validate on",
            f"tokens     {self.tokens:,}, of which {learned:.1%} are learned; {self.padding:.1%} of a batch is padding",
        ]
        for reason, count in {"truncated": self.truncated, **self.dropped}.items():
            if count:
                more = ", ..." if count > len(self.places[reason]) else ""
                verb = "" if reason == "truncated" else "dropped, "
                lines.append(f"{'':<9}  {verb}{reason}: {count:,} ({', '.join(self.places[reason])}{more})")
        lines += [f"warning    {text}" for text in self.warnings]
        return "\n".join(lines)


def pack_lengths(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most seq_len tokens: the longest first, each into the fullest row with room.

    "Best fit decreasing" needs at most 11/9 of the fewest rows, and a few (Johnson and others, SIAM J. Comput. 1974).
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows that have that much room
    rooms: list[int] = []  # those of which there are rows, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, row = seq_len, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(at)
        rows[row].append(index)
        if not by_room[room - length]:
            rooms.insert(bisect_left(rooms, room - length), room - length)
        by_room[room - length].append(row)
    return rows


class ChatData(NamedTuple):
    train: list[Example]
    val: list[Example]
    audit: Audit


def render_chat(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, *, generate: bool = False, thinking: bool = True
) -> tuple[list[int], list[int]]:
    """Ids, and a mask that is 1 on what is learned. `generate` appends the header of an answer; `thinking`: one that
    may begin with reasoning, where the template knows the difference."""
    variables = {} if thinking else {"enable_thinking": False}
    rendered = render(messages, tokenizer, generate=generate, variables=variables)
    return rendered.ids, rendered.mask


def fit_conversation(
    messages: Sequence[Message], tokenizer: Tokenizer, size: int
) -> tuple[list[int], list[int], bool] | str:
    """(ids, mask, truncated) of a conversation in at most `size` tokens, or why there is none."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:  # nothing is learned from what nobody answers
        return "no answer"
    messages = messages[: answers[-1] + 1]
    try:
        ids, mask = _up_to_the_last_answer(render(messages, tokenizer))
    except RefusedByTemplate as error:
        return str(error)
    answer, truncated = ids[len(mask) - [*mask[::-1], 0].index(0) :], len(ids) > size
    while len(ids) > size:
        messages = shorten(messages, len(ids) - size, tokenizer)
        try:
            ids, mask = _up_to_the_last_answer(render(messages, tokenizer))
        except DataError:  # no message is left, or an answer to nothing
            return "too long an answer"
        if ids[-len(answer) :] != answer:  # Qwen3's template leaves the reasoning out where no question is left
            return "too long an answer"
    return ids, mask, truncated


def _up_to_the_last_answer(rendered: Rendered) -> tuple[list[int], list[int]]:
    end = len(rendered.mask) - rendered.mask[::-1].index(1)
    return rendered.ids[:end], rendered.mask[:end]


def shorten(messages: Sequence[Message], excess: int, tokenizer: Tokenizer) -> list[Message]:
    """A conversation that ends in an answer, without some `excess` tokens. The answer and a system message stay.

    The oldest turn loses its beginning, or goes whole with the answers to it. Of an answer alone nothing is left.
    """
    head = [message for message in messages[:1] if message["role"] == "system"]
    oldest, *rest = messages[len(head) :]
    if not rest:
        return []
    ids = tokenizer.encode(oldest["content"])
    if oldest["role"] != "assistant" and len(ids) > excess:
        text = _without_start(oldest["content"], ids, excess, tokenizer)
        if text:
            return [*head, _message(oldest["role"], text), *rest]
    while len(rest) > 1 and rest[0]["role"] == "assistant":  # an answer without its question teaches to make things up
        rest.pop(0)
    return [*head, *rest]


def _without_start(text: str, ids: list[int], excess: int, tokenizer: Tokenizer) -> str:
    """A text without its first `excess` tokens, or a few more: it begins with a whole character, and is shorter."""
    kept = ids[excess:]
    in_a_character = 0x80  # the upper two bits of such a byte
    while kept and tokenizer.decode_bytes(kept[:1])[0] & 0xC0 == in_a_character:
        kept.pop(0)
    while len(shorter := tokenizer.decode(kept)) >= len(text):  # only the space was lost that a tokenizer puts in front
        kept.pop(0)
    return shorter


def _digest(messages: Sequence[Message]) -> bytes:
    """Of the first question, whatever the system message: equal questions are on one side of the split."""
    before_answer = itertools.takewhile(lambda message: message["role"] != "assistant", messages)
    questions = [message["content"] for message in before_answer if message["role"] == "user"]
    text = "\n".join(questions) if questions else messages[0]["content"]
    return hashlib.sha256(normalized(text)).digest()[:8]


class _Examples:
    """The examples of some sources, in order; what is left out goes to the audit."""

    def __init__(self, cfg: ChatConfig, tokenizer: Tokenizer, size: int, audit: Audit) -> None:
        self.cfg, self.tokenizer, self.size, self.audit = cfg, tokenizer, size, audit

    def read(self, sources: Iterable[str], key: str) -> Iterator[tuple[Example, bytes]]:
        for where, messages in self._conversations(list(sources), key):
            self.audit.rows += 1
            if self.cfg.system is not None and messages[0]["role"] != "system":
                messages = [_message("system", self.cfg.system), *messages]
            try:
                fit = fit_conversation(messages, self.tokenizer, self.size)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            if isinstance(fit, str):
                self.audit.leave_out(fit, where)
                continue
            ids, mask, truncated = fit
            self.audit.truncated += truncated
            if truncated:
                self.audit.name("truncated", where)
            yield Example(np.array(ids, "<i4"), np.array(mask, bool), where), _digest(messages)

    def _conversations(self, sources: list[str], key: str) -> Iterator[tuple[str, list[Message]]]:
        if DOCSTRINGS in sources:
            yield from _docstring_rows(self.audit)
        if TASKS in sources:
            for number, row in enumerate(conversations(), start=1):
                yield f"{TASKS}:{number}", conversation(row)
        sources = [source for source in sources if source not in (DOCSTRINGS, TASKS)]
        inputs = expand(sources, key)
        if inputs:
            cfg = DataConfig(train=tuple(sources), split=self.cfg.split, on_error=self.cfg.on_error)
            yield from ExampleReader(cfg, inputs, self.audit, lambda row, where: (where, conversation(row)))


def prepare_chat(cfg: ChatConfig, tokenizer: Tokenizer, seq_len: int) -> ChatData:
    """Reads, renders, shortens and splits conversations, with an audit."""
    audit = Audit()
    examples = _Examples(cfg, tokenizer, seq_len, audit)
    train: list[Example] = []
    val: list[Example] = []
    val_digests: set[bytes] = set()
    for example, digest in examples.read(cfg.val, "chat.val"):
        val.append(example)
        val_digests.add(digest)
    limit = int(cfg.val_fraction * 2**64)
    for example, digest in examples.read(cfg.train, "chat.train"):
        if digest in val_digests:
            audit.leave_out("in the validation set", example.where)
            continue
        is_val = not cfg.val and split_by_hash(digest, limit) == "val"
        (val if is_val else train).append(example)
        if len(train) + (not cfg.val) * len(val) == cfg.limit:
            break
    audit.train, audit.val = len(train), len(val)
    audit.tokens = sum(len(example.ids) for example in train)
    audit.supervised = sum(int(example.mask.sum()) for example in train)
    _refuse_nothing(cfg, audit)
    lengths = [len(example.ids) for example in train]
    audit.padding = 1 - sum(lengths) / ((len(pack_lengths(lengths, seq_len)) if cfg.pack else len(lengths)) * seq_len)
    return ChatData(train, val, audit)


def _refuse_nothing(cfg: ChatConfig, audit: Audit) -> None:
    dropped = [f"{count} {reason} ({', '.join(audit.places[reason])})" for reason, count in audit.dropped.items()]
    counts = "; ".join([f"{audit.rows} rows", *dropped])
    if not audit.train:
        raise DataError(f"chat.train: {', '.join(cfg.train)}: nothing to train on ({counts})")
    if not audit.val:
        where = f"chat.val: {', '.join(cfg.val)}" if cfg.val else f"chat.val_fraction {cfg.val_fraction:g}"
        raise DataError(f"{where}: nothing to validate on ({counts}); give chat.val, a larger fraction or more rows")
