"""A tokenizer's own chat template: conversations to text as transformers renders it, to ids, and to what is learned.

The template sees a placeholder for each text of a message. So it is known which text of the rendering is whose: that of
a message becomes no control token, and what is learned can be checked. Two proofs are made for each conversation:

    text    the placeholders filled in are the rendering of the messages themselves
    answer  the rendering of the messages before it, with the header of an answer, begins the whole rendering (or the
            template marks it with {% generation %}); from there to its stop token stands no other message's text
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from nanoqwen.errors import DataError
from nanoqwen.tokenizer import IM_END, IM_START, Tokenizer, without_surrogates

ROLES = ("system", "user", "assistant")
# Halves of a UTF-16 pair, which no text of a message holds: around the number of a text, in front of the number of an
# answer where it begins, and within what would be a control token.
OPEN, CLOSE, ANSWER, BREAK = "\ud800", "\ud801", "\ud802", "\ud803"
MARK = re.compile(f"([{OPEN}{ANSWER}][0-9]*{CLOSE})")
# What a model writes before its answer, between tokens of their own: a template may move it or leave it out.
REASONING = re.compile(r"(\s*<think>)(.*?)(</think>)(.*)", re.DOTALL)


class RefusedByTemplate(DataError):
    """The template does not take these messages, such as two questions in a row; it may take others."""


# --- the template as transformers sees it -----------------------------------------------------------------------------


class Generation(Extension):
    """The tag {% generation %}: what it encloses is an answer."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own name

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Callable[[], str]) -> str:
        return ANSWER + CLOSE + caller()


class PublicNamespace(Namespace):
    """A namespace without names such as __class__, by which a template could reach Python's own objects."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=1)` is allowed
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}")
        super().__setitem__(name, value)


def _refuse(message: str) -> None:
    raise RefusedByTemplate(f"refused by the chat template: {message}")


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


@functools.lru_cache(maxsize=8)
def compile_template(text: str) -> jinja2.Template:
    """With what transformers gives a template, and in the same sandbox."""
    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now, "namespace": PublicNamespace}
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)  # without the class's attributes
    return environment.from_string(text)


# --- a conversation in it ---------------------------------------------------------------------------------------------


class Content(NamedTuple):
    """A text that a placeholder stands for. The space around it is left to the template, which may trim it."""

    message: int
    before: str
    text: str
    after: str


class Place(NamedTuple):
    """Where the text of a message stands among the ids."""

    start: int  # of the ids between two control tokens
    stop: int
    text: str
    after: str  # the template's text up to the next control token


class Rendered(NamedTuple):
    ids: list[int]
    mask: list[int]  # 1 on what is learned: an answer and its stop token
    places: dict[int, Place]  # of each message with a text


class Piece(NamedTuple):
    text: str | None  # None where the answer begins
    message: int | None  # whose text it is; None: the template's


class Conversation:
    """Messages rendered by the template of a tokenizer."""

    def __init__(
        self, messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, variables: Mapping[str, Any] | None = None
    ) -> None:
        if tokenizer.chat_template is None:
            raise DataError(
                f'tokenizer "{tokenizer.name}": a chat needs a chat template, or {IM_START} and {IM_END} among '
                "the control tokens"
            )
        self.tokenizer, self.variables = tokenizer, tokenizer.named_tokens | (variables or {})
        pairs = [_role_and_content(number, message) for number, message in enumerate(messages)]
        if not pairs:
            raise DataError("messages: expected at least one message, got none")
        self.answers = [number for number, (role, _) in enumerate(pairs) if role == "assistant"]
        self.contents: list[Content] = []
        self.hidden = self._messages(pairs, self._hide)
        self.safe = self._messages(pairs, lambda text, _: self._break_control_tokens(text))

    def rendering(self, generate: bool = False) -> str:
        """With placeholders, which are proven to stand for what the template makes of the messages themselves."""
        rendering = self._render(self.hidden, generate)
        texts = [self._break_control_tokens(content.text) for content in self.contents]
        filled = MARK.sub(lambda mark: mark[0] if mark[0][0] == ANSWER else texts[int(mark[0][1:-1])], rendering)
        if filled != self._render(self.safe, generate):
            raise RefusedByTemplate("the chat template rewrites the text of messages: which text is whose is not known")
        return rendering

    def with_answers_marked(self, rendering: str) -> str:
        """The rendering with the number of each proven answer where it begins."""
        if ANSWER in rendering:
            numbers = iter(self.answers)
            return re.sub(ANSWER, lambda mark: f"{ANSWER}{next(numbers, len(self.hidden))}", rendering)
        for number in reversed(self.answers):
            prompt = self._render(self.hidden[:number], generate=True)
            if rendering.startswith(prompt):
                rendering = f"{prompt}{ANSWER}{number}{CLOSE}{rendering[len(prompt) :]}"
        return rendering

    def pieces(self, rendering: str) -> list[Piece]:
        """At even places text of the template, between them texts of messages and where answers begin."""
        parts = [Piece(text, None) for text in MARK.split(rendering)]
        for at in range(1, len(parts), 2):
            kind, number = parts[at].text[0], parts[at].text[1:-1]
            if kind == ANSWER:
                parts[at] = Piece(None, int(number))
                continue
            message, before, text, after = self.contents[int(number)]
            # Space around a text that the template has kept is the message's.
            before = before if parts[at - 1].text.endswith(before) else ""
            after = after if parts[at + 1].text.startswith(after) else ""
            parts[at - 1] = Piece(parts[at - 1].text.removesuffix(before), None)
            parts[at] = Piece(before + text + after, message)
            parts[at + 1] = Piece(parts[at + 1].text.removeprefix(after), None)
        return parts

    def _messages(self, pairs: Sequence[tuple[str, str]], replace: Callable[[str, int], str]) -> list[dict[str, str]]:
        messages = []
        for number, (role, content) in enumerate(pairs):
            reasoning = REASONING.fullmatch(content) if role == "assistant" else None
            if reasoning:
                start, thought, end, answer = reasoning.groups()
                content = start + replace(thought, number) + end + replace(answer, number)
            else:
                content = replace(content, number)
            messages.append({"role": role, "content": content})
        return messages

    def _hide(self, text: str, message: int) -> str:
        core = text.strip()
        if not core:
            return text
        before, _, after = text.partition(core)
        self.contents.append(Content(message, before, core, after))
        return f"{before}{OPEN}{len(self.contents) - 1}{CLOSE}{after}"

    def _break_control_tokens(self, text: str) -> str:
        parts = self.tokenizer.split_control_tokens(text)
        parts[1::2] = [f"{part[0]}{BREAK}{part[1:]}" for part in parts[1::2]]
        return "".join(parts)

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        try:
            template = compile_template(self.tokenizer.chat_template)
            given = {"messages": messages, "tools": [], "documents": None, "add_generation_prompt": generate}
            return template.render(**given, **self.variables)
        except RefusedByTemplate:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            if not messages:
                raise RefusedByTemplate("an answer to nothing") from None
            raise self.failure(f"cannot be rendered ({type(error).__name__}: {error})"[:300]) from error

    def failure(self, what: str) -> DataError:
        return DataError(f'tokenizer "{self.tokenizer.name}": its chat template {what}')


def _role_and_content(index: int, message: Mapping[str, str]) -> tuple[str, str]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ROLES:
        raise DataError(f"message {index}: expected role system, user or assistant, got {role!r}")
    content = message.get("content")
    if not isinstance(content, str):
        raise DataError(f"message {index} ({role}): expected content to be a string, got {content!r:.80}")
    return role, without_surrogates(content)


# --- to ids -----------------------------------------------------------------------------------------------------------

NO_PROMPT = "the rendering of what comes before it and of its header does not begin the whole rendering"
NO_END = "no stop token ends it"
EXTRA = "there is none, but it is marked as an answer"
MIXED = "its text is on the wrong side of where an answer begins or ends"


class _Encoder:
    """Ids and mask of a rendering, piece by piece. Text between two control tokens is encoded as one."""

    def __init__(self, answers: Sequence[int], tokenizer: Tokenizer) -> None:
        self.answers, self.tokenizer = answers, tokenizer
        self.ids: list[int] = []
        self.mask: list[int] = []
        self.places: dict[int, Place] = {}
        self.unproven = dict.fromkeys(answers, NO_PROMPT)  # why the mask may be wrong, by message
        self._answer: int | None = None  # the one that is being encoded
        self._text, self._cut = "", 0  # since the last control token, and where an answer begins in it
        self._ends: dict[int, tuple[str, int]] = {}  # of texts of messages in it

    def add(self, piece: Piece) -> None:
        if piece.text is None:
            self._answer, self._cut = piece.message, len(self._text)
            self.unproven[piece.message] = NO_END if piece.message in self.answers else EXTRA
        elif piece.message is not None:
            self._text += piece.text
            self._ends[piece.message] = (piece.text, len(self._text))
            belongs_to = piece.message if piece.message in self.answers else None
            if self._answer != belongs_to and self.unproven.get(piece.message) != NO_PROMPT:
                self.unproven[piece.message] = MIXED
        else:
            text, *others = self.tokenizer.split_control_tokens(piece.text)
            self._text += text
            for token, text in zip(others[::2], others[1::2], strict=True):
                self._add_control_token(self.tokenizer.special[token])
                self._text += text

    def _add_control_token(self, token_id: int) -> None:
        self.flush()
        self.ids.append(token_id)
        self.mask.append(int(self._answer is not None))
        if token_id in self.tokenizer.stop_ids:
            if self.unproven.get(self._answer) == NO_END:
                del self.unproven[self._answer]
            self._answer = None

    def flush(self) -> None:
        """Encode the text that has come together."""
        ids, prompt = self._encode(self._text, self._cut)
        start, stop = len(self.ids), len(self.ids) + len(ids)
        for message, (text, end) in self._ends.items():
            self.places[message] = Place(start, stop, text, self._text[end:])
        self.ids += ids
        self.mask += [0] * prompt + [int(self._answer is not None)] * (len(ids) - prompt)
        self._text, self._cut, self._ends = "", 0, {}

    def _encode(self, text: str, cut: int) -> tuple[list[int], int]:
        """Ids, and how many come before the answer. No token is of the prompt and of the answer: neither is what a
        model writes, so training and sampling see the same ids."""
        ids, prompt = self.tokenizer.encode(text), self.tokenizer.encode(text[:cut])
        if ids[: len(prompt)] != prompt:
            ids = prompt + self._encode_middle(text[cut:])
        return ids, len(prompt)

    def _encode_middle(self, text: str) -> list[int]:
        """Without the space that a tokenizer such as Llama 2's puts in front."""
        if not self.tokenizer.engine.strips_space:
            return self.tokenizer.encode(text)
        newline, ids = self.tokenizer.encode("\n"), self.tokenizer.encode(f"\n{text}")
        return ids[len(newline) :] if ids[: len(newline)] == newline else self.tokenizer.encode(text)


def render(
    messages: Sequence[Mapping[str, str]],
    tokenizer: Tokenizer,
    *,
    generate: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> Rendered:
    """A conversation as ids. `generate` appends the header of an answer; without it the mask is proven, or an error.

    variables  what the template reads beside the messages, such as enable_thinking
    """
    conversation = Conversation(messages, tokenizer, variables)
    encoder = _Encoder(conversation.answers, tokenizer)
    for piece in conversation.pieces(conversation.with_answers_marked(conversation.rendering(generate))):
        encoder.add(piece)
    encoder.flush()
    if encoder.unproven and not generate:
        message, reason = min(encoder.unproven.items())
        if 0 in conversation.answers:
            raise RefusedByTemplate("an answer to nothing")
        raise conversation.failure(f"does not show what the answers are: message {message}, {reason}")
    return Rendered(encoder.ids, encoder.mask, encoder.places)


def text_to_continue(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> str:
    """The text of a conversation up to the end of its last message's content."""
    conversation, last = Conversation(messages, tokenizer), len(messages) - 1
    pieces = conversation.pieces(conversation.rendering().replace(ANSWER + CLOSE, ""))
    end = max((at for at, piece in enumerate(pieces) if piece.message == last), default=None)
    if end is None:
        raise conversation.failure(f"does not show the text of message {last}, which is to be continued")
    return "".join(piece.text for piece in pieces[: end + 1])


def text_to_answer(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> str:
    """The text of a conversation with the header of an answer to it."""
    conversation = Conversation(messages, tokenizer)
    pieces = conversation.pieces(conversation.rendering(generate=True).replace(ANSWER + CLOSE, ""))
    return "".join(piece.text for piece in pieces)
