"""Triplets for contrastive fine-tuning: a request, the same reworded, and the same with an injected instruction.

    python finetune.py --objective contrast --show_data                           the built-in set, validated
    python finetune.py --objective contrast --show_data --contrast.train FILE     rows of one's own

A row of .jsonl (.gz, .zst), .parquet or a Hugging Face data set has these fields, or one of their aliases (ALIASES):

    system, user, user_cf, user_injection, answer      text, required
    answer_cf, answer_injection                        text; absent: `answer`
    id, group_id                                       absent: file:line; a hash of system, context and user
    context                                            text in front of all three requests, or of none
    attack                                             {type, technique, goal, canary}, or attack_type, attack_technique
    relation                                           "different_task" where answer_cf differs on purpose

Letters in shapes: B rows, T tokens of a row (seq_len), N tokens of a stream, G triplets of a step; a triplet has three
streams (benign, reworded, injected), each a prompt with its answer.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import IGNORE, Batch, Batches, pack_rows, random_key, shuffled, split_rows
from nanoqwen.builtin import INJECTIONS, triplets
from nanoqwen.chat import Audit, Example, ExampleReader, pack_lengths
from nanoqwen.chat_template import Rendered, render
from nanoqwen.config import ContrastConfig, DataConfig
from nanoqwen.corpus import (
    BadRow,
    Input,
    describe_error,
    expand,
    listed,
    normalized,
    split_by_hash,
    text_field,
    type_name,
)
from nanoqwen.errors import DataError
from nanoqwen.tokenizer import Tokenizer

INJECTIONS_TEST = f"{INJECTIONS}-test"
STREAMS = ("benign", "cf", "injection")
ALIASES = {
    "system": ("system", "system_instruction", "instruction", "system_prompt"),
    "user": ("user", "benign_input", "user_input_benign_1", "user_input_1", "benign_1"),
    "user_cf": ("user_cf", "benign_cf_input", "user_input_benign_2", "user_input_2", "benign_2"),
    "user_injection": (
        "user_injection",
        "injection_input",
        "user_input_injection",
        "adversarial_input",
        "attack_input",
    ),
    "answer": ("answer", "benign_output", "expected_output_1", "expected_output", "reference_output"),
    "answer_cf": ("answer_cf", "expected_output_2"),
    "answer_injection": ("answer_injection", "injection_output", "expected_output_injection"),
}
REQUIRED = ("system", "user", "user_cf", "user_injection", "answer")
# Other people's names for a context of some prompts. All three have the same one here, or else the model could tell
# an injected prompt by whether there is any.
ONE_SIDED = ("benign_context", "context_benign", "context_cf", "injection_context", "context_injection")


# --- rows to triplets -------------------------------------------------------------------------------------------------


class Attack(NamedTuple):
    """What is known about an injected instruction."""

    type: str = "unknown"
    technique: str = "unknown"
    goal: str = "canary"
    canary: str | None = None
    novelty: str = "unknown"  # in what it is not in the training rows: family, wording, or nothing (seen)


class Triplet(NamedTuple):
    where: str  # file:line
    id: str
    group: str  # rows of one group are on one side of a split, and no negatives of each other
    system: str
    context: str | None
    users: tuple[str, str, str]  # by stream
    answers: tuple[str, str, str]
    attack: Attack
    relation: str

    def messages(self, stream: int) -> list[dict[str, str]]:
        """What the model is asked in a stream."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.request(stream)}]

    def request(self, stream: int) -> str:
        return f"{self.context}\n\n{self.users[stream]}" if self.context else self.users[stream]


def triplet(row: Mapping[str, Any], where: str) -> Triplet:
    """A row of any known shape. A table has every column in every row: null is as good as absent."""
    row = {key: value for key, value in row.items() if value is not None}
    texts = {}
    for name, aliases in ALIASES.items():
        key = next((alias for alias in aliases if alias in row), None)
        if key is not None:
            texts[name] = text_field(row, key)
        elif name in REQUIRED:
            raise BadRow(f"expected {' or '.join(aliases[:2])}, got {listed(row)}")
    blank = next((name for name, text in texts.items() if name != "system" and not text.strip()), None)
    if blank is not None:
        raise BadRow(f"{blank}: expected text, got white space")
    one_sided = next((key for key in ONE_SIDED if key in row), None)
    if one_sided is not None:
        raise BadRow(f"{one_sided}: expected one context for all three prompts, under the key 'context'")
    context = (text_field(row, "context") or None) if "context" in row else None
    group = _label(row, "group_id") or _digest(texts["system"], context or "", texts["user"])
    answer = texts["answer"]
    return Triplet(
        where,
        _label(row, "id") or where,
        group,
        texts["system"],
        context,
        (texts["user"], texts["user_cf"], texts["user_injection"]),
        (answer, texts.get("answer_cf", answer), texts.get("answer_injection", answer)),
        _attack(row),
        _label(row, "relation") or "same_task",
    )


def _label(row: Mapping[str, Any], key: str) -> str | None:
    """A name or a number."""
    value = row.get(key)
    if value is not None and (not isinstance(value, str | int) or isinstance(value, bool)):
        raise BadRow(f"{key}: expected text or a whole number, got {type_name(value)}")
    return None if value is None else str(value)


def _attack(row: Mapping[str, Any]) -> Attack:
    known = row.get("attack", {})
    if not isinstance(known, dict):
        raise BadRow(f"attack: expected an object, got {type_name(known)}")
    fields = {"type": row.get("attack_type"), "technique": row.get("attack_technique")} | known
    values = {key: text_field(fields, key) for key in Attack._fields if fields.get(key) is not None}
    if not values.get("canary", "x").strip():
        raise BadRow("attack.canary: expected text, got white space")
    strange = next((key for key, text in values.items() if key != "canary" and not text.isprintable()), None)
    if strange is not None:  # tables and terminals show it
        raise BadRow(f"attack.{strange}: expected printable characters, got {values[strange]!r:.60}")
    return Attack(**values)


def _digest(*texts: str) -> str:
    return hashlib.sha256(repr([normalized(text) for text in texts]).encode()).hexdigest()[:16]


class TripletReader(ExampleReader):
    """Triplets. Up to `most_bad` malformed rows of all that the audit knows are left out, one more is refused."""

    def __init__(self, cfg: DataConfig, inputs: Sequence[Input], audit: Audit, most_bad: int) -> None:
        super().__init__(cfg, inputs, audit, triplet)
        self.most_bad = most_bad

    def _bad(self, item: Input, row: int, error: Exception) -> None:
        bad = self.audit.dropped.get("malformed", 0) + 1
        if bad > self.most_bad:
            excess = f" (bad row number {bad}, contrast.max_bad_rows is {self.most_bad})" if self.most_bad else ""
            raise DataError(f"{item.name}:{row}: {describe_error(error)}{excess}")
        self.leave_out("malformed", f"{item.name}:{row}: {describe_error(error)}")


def read_triplets(cfg: ContrastConfig, sources: Sequence[str], key: str, audit: Audit) -> Iterator[Triplet]:
    """The triplets of some sources, in order."""
    for name, test in ((INJECTIONS, False), (INJECTIONS_TEST, True)):
        if name in sources:
            yield from (triplet(row, f"{name}:{number}") for number, row in enumerate(triplets(test), start=1))
    inputs = expand([source for source in sources if source not in (INJECTIONS, INJECTIONS_TEST)], key)
    if inputs:
        data = DataConfig(train=tuple(sources), split=cfg.split)
        yield from TripletReader(data, inputs, audit, cfg.max_bad_rows)


# --- validation -------------------------------------------------------------------------------------------------------

LENGTH_AUC = 0.6  # above this, the length of a prompt tells too much about whether it is injected


class Finding(NamedTuple):
    text: str
    refused: bool  # else a warning


def families(rows: Iterable[Triplet]) -> list[list[Triplet]]:
    """Rows that share a group or a prompt, together: what must not be on two sides of a split."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    rows = list(rows)
    for row in rows:
        for stream in range(3):
            parent[root(_digest(row.request(stream)))] = root(f"group {row.group}")
    together: dict[str, list[Triplet]] = {}
    for row in rows:
        together.setdefault(root(f"group {row.group}"), []).append(row)
    return list(together.values())


def area_under_curve(positive: Sequence[float], negative: Sequence[float]) -> float:
    """How often a positive is above a negative, ties half (the area under the ROC curve; Mann and Whitney 1947)."""
    values = np.concatenate([positive, negative])
    order = np.sort(values)
    ranks = (np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right") + 1) / 2
    count = len(positive)
    return float((ranks[:count].sum() - count * (count + 1) / 2) / (count * len(negative)))


def overlaps(train: Sequence[Triplet], val: Sequence[Triplet]) -> list[str]:
    """What is on both sides of a split, which makes results on one side say nothing about the other."""
    overlaps = []
    groups = {row.group for row in train} & {row.group for row in val}
    if groups:
        overlaps.append(f"{len(groups)} groups are on both sides of the split, such as {sorted(groups)[0]!r}")
    seen = {request: row.where for row in train for request in _requests(row)}
    same = [(seen[request], row.where) for row in val for request in _requests(row) if request in seen]
    if same:
        overlaps.append(f"{len(same)} prompts are on both sides of the split, such as {same[0][0]} and {same[0][1]}")
    return overlaps


def _requests(row: Triplet) -> list[bytes]:
    return [normalized(row.request(stream)) for stream in range(3)]


def validate(train: Sequence[Triplet], val: Sequence[Triplet]) -> list[Finding]:
    """What makes results on these rows worthless, and what may."""
    problems, rows = overlaps(train, val), [*train, *val]
    other = [row.where for row in rows if row.answers[0] != row.answers[1] and row.relation != "different_task"]
    if other:
        problems.append(
            f"{len(other)} reworded requests have another answer, such as {other[0]} "
            "(relation: different_task where that is meant)"
        )
    if len(rows) > 1:
        problems += [f"{name}: the same in all {len(rows)} rows" for name, values in _columns(rows) if len(values) == 1]
    aside = [row.where for row in rows if row.context and 0 < sum(row.context in user for user in row.users) < 3]
    if aside:
        problems.append(f"{len(aside)} rows repeat the context in some of their prompts alone, such as {aside[0]}")
    findings = [Finding(text, True) for text in problems]
    auc = area_under_curve([len(row.users[2]) for row in rows], [len(row.users[0]) for row in rows])
    if max(auc, 1 - auc) > LENGTH_AUC:
        findings.append(Finding(f"length alone tells injected from benign prompts with an AUC of {auc:.2f}", False))
    return findings


def _columns(rows: Sequence[Triplet]) -> Iterator[tuple[str, set[str]]]:
    for stream, name in enumerate(("user", "user_cf", "user_injection")):
        yield name, {row.users[stream] for row in rows}
    yield "answer", {row.answers[0] for row in rows}


def split_triplets(cfg: ContrastConfig, audit: Audit) -> tuple[list[Triplet], list[Triplet]]:
    """Rows to train on and rows to validate on, as a configuration has them."""
    val = list(read_triplets(cfg, cfg.val, "contrast.val", audit))
    # With rows of their own to validate on, no more are read than are kept. Else all are, so that a limit leaves the
    # split as it is, and runs of different limits are measured on the same rows.
    most = cfg.limit if cfg.val and cfg.limit else None
    train = list(islice(read_triplets(cfg, cfg.train, "contrast.train", audit), most))
    audit.rows += len(train) + len(val)
    if not cfg.val:
        limit, all_rows = int(cfg.val_fraction * 2**64), train
        train = []
        for family in families(all_rows):
            digest = min(hashlib.sha256(row.group.encode()).digest()[:8] for row in family)
            (val if split_by_hash(digest, limit) == "val" else train).extend(family)
        place = {row.where: number for number, row in enumerate(all_rows)}  # in the order of the files
        train.sort(key=lambda row: place[row.where]), val.sort(key=lambda row: place[row.where])
        del train[cfg.limit or len(train) :]
    for rows, name in ((train, "contrast.train"), (val, "contrast.val" if cfg.val else "contrast.val_fraction")):
        if not rows:
            raise DataError(f"{name}: expected at least one triplet on either side of the split, got none here")
    return train, val


# --- triplets to examples ---------------------------------------------------------------------------------------------


class Stream(NamedTuple):
    """One prompt of a triplet with its answer."""

    example: Example
    pooled: np.ndarray  # bool [N], true on the user's text: what the prompt is represented by
    prompt: list[int]  # up to where the answer begins
    cut: bool  # the middle of the request is left out


class Tokenised(NamedTuple):
    row: Triplet
    streams: tuple[Stream, Stream, Stream]

    @property
    def lengths(self) -> list[int]:
        return [len(stream.example.ids) for stream in self.streams]


def tokenise_triplet(row: Triplet, tokenizer: Tokenizer, size: int) -> Tokenised | None:
    """The three streams of a triplet, each in at most `size` tokens; None where system text and answer fill that."""
    streams = [_stream(row, number, tokenizer, size) for number in range(3)]
    return None if None in streams else Tokenised(row, tuple(streams))


def _stream(row: Triplet, number: int, tokenizer: Tokenizer, size: int) -> Stream | None:
    *before, user = row.messages(number)
    answer = {"role": "assistant", "content": row.answers[number]}
    request, own_text = (tokenizer.encode(text) for text in (user["content"], row.users[number]))
    text, excess = tokenizer.decode(own_text), 0
    while True:
        rendered = render([*before, user, answer], tokenizer)
        end = len(rendered.mask) - rendered.mask[::-1].index(1)
        if end <= size:
            break
        excess += end - size
        if excess >= len(request):
            return None
        user, text = _without_middle(request, own_text, excess, tokenizer)
    ids, mask = np.array(rendered.ids[:end], "<i4"), np.array(rendered.mask[:end], bool)
    pooled = np.zeros(end, bool)
    pooled[_end_of_message(rendered, len(before), text, tokenizer)] = True
    prompt = rendered.ids[: rendered.mask.index(1)]
    return Stream(Example(ids, mask, f"{row.where} ({STREAMS[number]})"), pooled, prompt, excess > 0)


def _without_middle(
    request: list[int], own_text: list[int], excess: int, tokenizer: Tokenizer
) -> tuple[dict[str, str], str]:
    """A request without `excess` tokens of its middle, and what is left of the user's own text, with which it ends."""
    keep = len(request) - excess
    first, last = _whole_characters(request, keep // 2, len(request) - (keep - keep // 2), tokenizer)
    head, tail = tokenizer.decode(request[:first]), tokenizer.decode(request[last:])
    own = len(tokenizer.decode(own_text))
    context = len(tokenizer.decode(request)) - own
    return {"role": "user", "content": head + tail}, head[context:] + tail[-own:]


def _end_of_message(rendered: Rendered, message: int, text: str, tokenizer: Tokenizer) -> slice:
    """The ids of the text that stands at the end of a message: not those of the header, nor of a context."""
    if message not in rendered.places:  # white space alone
        return slice(0, 0)
    place = rendered.places[message]
    text = text if place.text.endswith(text) else text.strip()  # a template may trim
    ends = np.cumsum([len(tokenizer.decode_bytes([token])) for token in rendered.ids[place.start : place.stop]])
    stop = ends[-1] - _size(place.after, tokenizer)
    first = np.searchsorted(ends, stop - _size(text, tokenizer), "right")
    last = np.searchsorted(ends, stop, "left")
    return slice(place.start + int(first), place.start + int(last) + 1)


def _size(text: str, tokenizer: Tokenizer) -> int:
    """In bytes, as the tokenizer normalises it."""
    return len(tokenizer.without_first_space(tokenizer.decode_bytes(tokenizer.encode(text))))


def _whole_characters(ids: list[int], first: int, last: int, tokenizer: Tokenizer) -> tuple[int, int]:
    """The borders of what is cut, moved outwards until no character is cut in two."""

    def broken(ids: list[int]) -> bool:
        try:
            tokenizer.decode_bytes(ids).decode("utf-8")
        except UnicodeDecodeError:
            return True
        return False

    while first > 0 and broken(ids[:first]):
        first -= 1
    while last < len(ids) and broken(ids[last:]):
        last += 1
    return first, last


class TripletData(NamedTuple):
    train: list[Tokenised]
    val: list[Tokenised]
    audit: Audit


def prepare_triplets(cfg: ContrastConfig, tokenizer: Tokenizer, seq_len: int) -> TripletData:
    """Reads, validates and renders triplets, with an audit."""
    audit = Audit()
    train, val = split_triplets(cfg, audit)
    for finding in validate(train, val):
        if finding.refused:
            raise DataError(f"contrast.train: {finding.text} (--show_data lists all)")
        audit.warnings.append(finding.text)
    sides = [_tokenise(rows, tokenizer, seq_len, audit) for rows in (train, val)]
    audit.train, audit.val = map(len, sides)
    for rows, name in zip(sides, ("train", "val"), strict=True):
        if not rows:
            raise DataError(f"contrast.{name}: no triplet fits into seq_len {seq_len}")
    examples = [stream.example for item in sides[0] for stream in item.streams]
    audit.tokens = sum(len(example.ids) for example in examples)
    audit.supervised = sum(int(example.mask.sum()) for example in examples)
    return TripletData(*sides, audit)


def _tokenise(rows: list[Triplet], tokenizer: Tokenizer, seq_len: int, audit: Audit) -> list[Tokenised]:
    items = []
    for row in rows:
        item = tokenise_triplet(row, tokenizer, seq_len)
        if item is None:
            audit.leave_out("too long an answer", row.where)
            continue
        items.append(item)
        for stream in item.streams:
            if stream.cut:
                audit.truncated += 1
                audit.name("truncated", stream.example.where)
    return items


# --- examples to batches ----------------------------------------------------------------------------------------------


class TripletBatch(NamedTuple):
    """A Batch, and what the contrast looks at. Stream s of triplet t of the step is number 3 t + s."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    weights: Tensor  # fp32 [B, T], of the loss at each target
    streams: Tensor  # int64 [B, T], number of the stream whose request a token belongs to; IGNORE: to none
    groups: Tensor  # int64 [G], of the whole step: equal numbers are rows of one group


def triplet_batch(
    items: Sequence[Tokenised], slots: Sequence[Sequence[int]], seq_len: int, weights: Sequence[float]
) -> TripletBatch:
    """The streams of some triplets in rows. `slots`: numbers of the streams in each row."""
    rows = [[items[number // 3].streams[number % 3] for number in slot] for slot in slots]
    filler = items[0].streams[0].example.ids[-1]
    packed_rows = pack_rows([[stream.example for stream in row] for row in rows], seq_len, filler)
    loss_weights = np.zeros((len(slots), seq_len), np.float32)
    streams = np.full((len(slots), seq_len), IGNORE, np.int64)
    for row, slot in enumerate(slots):
        end = 0
        for number, stream in zip(slot, rows[row], strict=True):
            start, end = end, end + len(stream.pooled)
            loss_weights[row, start:end] = weights[number % 3]
            streams[row, start:end] = np.where(stream.pooled, number, IGNORE)
    groups = np.array(numbered(item.row.group for item in items))
    return TripletBatch(*packed_rows, *map(torch.from_numpy, (loss_weights, streams, groups)))


def numbered(names: Iterable[str]) -> list[int]:
    """Numbers for names, equal ones for equal names."""
    known: dict[str, int] = {}
    return [known.setdefault(name, len(known)) for name in names]


def fits_into_step(lengths: Sequence[int], seq_len: int, rows: int) -> bool:
    """Whether a step of `rows` x `seq_len` positions has room for a triplet."""
    return max(lengths) <= seq_len and len(pack_lengths(lengths, seq_len)) <= rows


class TripletBatches(Batches):
    """Packed triplets.

    The rows of a step are filled with as many triplets as fit, whose streams may lie in any of them. The next step
    continues with the next triplet of the epoch's permutation, epochs follow each other without a gap. Where a step
    begins depends on the lengths before, which costs about a millisecond for each step that is skipped.
    """

    def __init__(
        self, items: Sequence[Tokenised], seq_len: int, rows: int, seed: int = 0, weights: Sequence[float] = (1, 1, 1)
    ) -> None:
        self.items, self.seq_len, self.rows, self.seed, self.weights = items, seq_len, rows, seed, tuple(weights)
        self.lengths = np.array([item.lengths for item in items])
        for item, lengths in zip(items, self.lengths.tolist(), strict=True):
            if not fits_into_step(lengths, seq_len, rows):
                need = f"{item.row.where}: its three prompts of {lengths} tokens"
                raise DataError(f"{need} do not fit into a step of {rows} x {seq_len} tokens (finetune.batch_tokens)")
        digest = hashlib.sha256(repr((seq_len, self.weights)).encode())
        for item in items:
            for stream in item.streams:
                digest.update(stream.example.ids.tobytes() + stream.example.mask.tobytes() + stream.pooled.tobytes())
            digest.update(item.row.group.encode())
        self.fingerprint = digest.hexdigest()[:32]
        self._starts = [0]  # of each step: how many triplets came before
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    @property
    def targets(self) -> float:
        """Fraction of the positions that have one, about."""
        learned = sum(int(stream.example.mask.sum()) for item in self.items for stream in item.streams)
        return learned / self.lengths.sum() * (1 - self.padding)

    @property
    def steps_per_epoch(self) -> int:
        """About: the first epoch's."""
        step = 0
        while self._start(step + 1) < len(self.items):
            step += 1
        return step + 1

    @property
    def padding(self) -> float:
        """Fraction of the positions of the first epoch that hold nothing."""
        steps = self.steps_per_epoch
        members = self._members(0, self._start(steps))
        return 1 - self.lengths[members].sum() / (steps * self.rows * self.seq_len)

    def make(self, step: int) -> TripletBatch:
        members, slots = self._plan(step)
        return triplet_batch([self.items[member] for member in members], slots, self.seq_len, self.weights)

    def epoch(self, step: int) -> float:
        """How often, at the start of `step`, as many triplets have come as there are."""
        return self._start(step) / len(self.items)

    def _start(self, step: int) -> int:
        while len(self._starts) <= step:
            self._starts.append(self._starts[-1] + self._fitting(self._starts[-1]))
        return self._starts[step]

    def _plan(self, step: int) -> tuple[list[int], list[list[int]]]:
        """(the triplets of a step, the streams in each of its rows)"""
        members = self._members(self._start(step), self._start(step + 1))
        slots = pack_lengths(self.lengths[members].flatten().tolist(), self.seq_len)
        return members, slots + [[] for _ in range(self.rows - len(slots))]

    def _fitting(self, first: int) -> int:
        """How many triplets, from the `first` one on, fit into a step."""
        room = self.rows * self.seq_len
        most = room // int(self.lengths.sum(1).min()) + 1
        lengths = self.lengths[self._members(first, first + most)]
        count = int(np.searchsorted(lengths.sum(1).cumsum(), room, "right"))
        while len(pack_lengths(lengths[:count].flatten().tolist(), self.seq_len)) > self.rows:
            count -= 1
        return count

    def _members(self, first: int, last: int) -> list[int]:
        """The triplets with these numbers, counted over all epochs."""
        epochs, places = np.divmod(np.arange(first, last), len(self.items))
        members: list[int] = []
        for epoch in np.unique(epochs).tolist():
            members += self._permutation(epoch)[places[epochs == epoch]].tolist()
        return members

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            count = len(self.items)
            self._order = epoch, shuffled(np.arange(count), count, random_key(self.seed, "triplets", epoch))
        return self._order[1]


PADDING = 0.1  # fraction of a step's positions that may be padding, where wider rows can prevent it


def row_width(items: Sequence[Tokenised], seq_len: int, rows: int, most: int) -> int:
    """How wide the rows of a step of `rows` x `seq_len` positions have to be for a padding below a tenth.

    Streams are about as long as each other, so that in short rows there is often no room for one more. A row stays
    within `most` tokens. The number of ranks plays no part, because the width decides what is in a step.
    """
    factors = [times for times in range(1, rows + 1) if rows % times == 0 and times * seq_len <= most]
    factors = [t for t in factors if all(fits_into_step(item.lengths, t * seq_len, rows // t) for item in items)] or [1]
    padding = {times * seq_len: TripletBatches(items, times * seq_len, rows // times).padding for times in factors}
    return next((width for width, fraction in padding.items() if fraction < PADDING), min(padding, key=padding.get))


def triplet_windows(items: Sequence[Tokenised], seq_len: int, max_tokens: int, *, rows: int = 8) -> list[Batch]:
    """Rows of packed triplets, as for `data.eval_windows`: a fixed sample of about `max_tokens` positions."""
    chosen = fixed_sample(items, max(1, max_tokens * len(items) // sum(sum(item.lengths) for item in items)))
    slots = pack_lengths([length for item in chosen for length in item.lengths], seq_len)
    batch = triplet_batch(chosen, slots, seq_len, (1.0, 1.0, 1.0))
    return split_rows(Batch(*batch[:3]), rows)


def fixed_sample(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count`, in their order: always the same, but at no equal distances, where all may be of one kind."""
    drawn = shuffled(np.arange(min(count, len(items))), len(items), random_key("spread"))
    return [items[number] for number in sorted(drawn.tolist())]


# --- command line -----------------------------------------------------------------------------------------------------


def check_triplets(cfg: ContrastConfig) -> int:
    """Print counts of the rows and their findings; returns the exit code."""
    audit = Audit()
    train, val = split_triplets(cfg, audit)
    kinds = Counter(row.attack.type for row in (*train, *val))
    print(f"rows       {audit.rows:,} read, {len(train):,} to train on, {len(val):,} to validate on")
    print(f"groups     {len({row.group for row in (*train, *val)}):,}")
    print(f"attacks    {', '.join(f'{kind} {count:,}' for kind, count in kinds.most_common())}")
    for why, count in audit.dropped.items():
        print(f"{why:<9}  {count:,} ({'; '.join(audit.places[why])})")
    findings = validate(train, val)
    for finding in findings:
        print(f"{'REFUSED' if finding.refused else 'warning':<9}  {finding.text}")
    refused = sum(finding.refused for finding in findings)
    print(f"{'verdict':<9}  {f'{refused} reasons not to train on this' if refused else 'sound'}")
    return DataError.exit_code if refused else 0
