"""Text to token ids and back: BPE tokenizers and streamed decoding.

tiktoken encodes where its ids are provably those of the file; elsewhere the `tokenizers` library itself does.
"""

from __future__ import annotations

import base64
import codecs
import difflib
import functools
import hashlib
import json
import re
import threading
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from nanoqwen import gguf_reader
from nanoqwen.errors import CheckpointError, DataError
from nanoqwen.files import json_bytes, read_json
from nanoqwen.patterns import BYTES_PATTERN, CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, QWEN2_PATTERN
from nanoqwen.sources import HUB_ID, TOKENIZER_FILES, is_gguf, resolve

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
END_TOKENS = (ENDOFTEXT, "<|end_of_text|>", "</s>", IM_END, "<|eot_id|>", "<|eom_id|>")
NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
TEMPLATE_FILE = "chat_template.jinja"
_PUBLISHED = "https://openaipublic.blob.core.windows.net"
TIKTOKEN_NAMES = {  # and where tiktoken fetches them
    "gpt2": [f"{_PUBLISHED}/gpt-2/encodings/main/{file}" for file in ("vocab.bpe", "encoder.json")],
    "cl100k_base": [f"{_PUBLISHED}/encodings/cl100k_base.tiktoken"],
    "o200k_base": [f"{_PUBLISHED}/encodings/o200k_base.tiktoken"],
}
DOWNLOAD_SECONDS = 60  # tiktoken itself downloads without a time limit
# fancy-regex backtracks over `\s+(?!\S)` with one stack entry per character and gives up near 1,000,000.
LONG_SPACE = 100_000
UNKNOWN = "\ufffd".encode()


class RankFile(NamedTuple):
    """What a .tiktoken file does not hold."""

    pattern: str
    special: dict[str, int]  # none: ChatML's tokens follow the others
    nfc: bool = False


RANK_FILES = {
    "cl100k_base": RankFile(
        CL100K_PATTERN,
        {ENDOFTEXT: 100_257, "<|fim_prefix|>": 100_258, "<|fim_middle|>": 100_259, "<|fim_suffix|>": 100_260}
        | {"<|endofprompt|>": 100_276},
    ),
    "o200k_base": RankFile(O200K_PATTERN, {ENDOFTEXT: 199_999, "<|endofprompt|>": 200_018}),
    "qwen": RankFile(QWEN2_PATTERN, {}, nfc=True),
}

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Tokenizer:
    """A BPE vocabulary. Text never becomes a control token unless `allow_special` says so."""

    def __init__(
        self,
        name: str,
        engine: Tiktoken | Library,
        special: Mapping[str, int],
        *,
        eos: str,
        bos: str | None = None,
        prefix: tuple[int, ...] = (),
        visible: frozenset[int] = frozenset(),
        chat_template: str | None = None,
        stop_ids: Iterable[int] = (),
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.name, self.engine, self.special, self.prefix = name, engine, dict(special), prefix
        has_chatml = {IM_START, IM_END} <= self.special.keys()
        self.chat_template = CHATML_TEMPLATE if chat_template is None and has_chatml else chat_template
        self.eos_id = self.special[eos]
        self.bos_id = None if bos is None else self.special[bos]
        ends = {self.special[token] for token in END_TOKENS if token in self.special}
        self.stop_ids = frozenset(ends | {self.eos_id} | set(stop_ids))
        self._bytes = engine.text_bytes | {token_id: text.encode() for text, token_id in self.special.items()}
        if len(self._bytes) != engine.n_tokens + len(self.special):
            raise DataError(f'tokenizer "{name}": two tokens have the same id')
        self.n_vocab = max(self._bytes) + 1
        self.hidden = frozenset(self.special.values()) - visible  # ids of control tokens, which decoding may leave out
        longest_first = sorted(self.special, key=len, reverse=True)
        self._special_cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._files = files

    @functools.cached_property
    def hash(self) -> str:
        """sha256 over everything that decides ids."""
        parts = [*self.engine.identity(), sorted(self.special.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @functools.cached_property
    def named_tokens(self) -> dict[str, str]:
        """The tokens that the tokenizer's own files name, as transformers sees them: `eos_token` and so on."""
        files = self._files or {}
        config, token_map = (
            json.loads(files.get(name, b"{}")) for name in ("tokenizer_config.json", "special_tokens_map.json")
        )
        tokens = {f"{which}_token": _named_token(which, config, token_map, {}, {}) for which in NAMED_TOKENS}
        return {name: token for name, token in tokens.items() if token is not None}

    @property
    def named_bos(self) -> int | None:
        """`bos_id` may be that of a generation configuration: Qwen2.5 has one, although its texts begin with none."""
        token = self.named_tokens.get("bos_token")
        return self.prefix[0] if token is None and self.prefix else self.special.get(token)

    def split_control_tokens(self, text: str) -> list[str]:
        """`text` in parts: at even places text, between two of them the text of a control token."""
        return self._special_cut.split(text)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`. `allow_special` turns the exact text of a control token into its id."""
        text = without_surrogates(text)
        if not allow_special:
            return self._checked(self.engine.encode, text)
        ids: list[int] = []
        for part in self.split_control_tokens(text):
            ids += [self.special[part]] if part in self.special else self._checked(self.engine.encode, part)
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as uint32 [T]: a list of Python integers would take a quarter longer to make and to convert."""
        return np.asarray(self._checked(self.engine.encode_array, without_surrogates(text)), np.uint32)

    def _checked(self, encode: Callable[[str], Any], text: str) -> Any:
        try:
            return encode(text)
        except BaseException as error:  # a Rust panic is no Exception, and the bindings raise no narrower type than it
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            what = f"cannot encode a text of {len(text)} characters ({_short(error)})"
            raise DataError(f'tokenizer "{self.name}": {what}') from None

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        data = self.decode_bytes(ids, skip_special=skip_special)
        return self.without_first_space(data).decode("utf-8", "replace")

    def without_first_space(self, data: bytes) -> bytes:
        """The start of a text without the space that a tokenizer such as Llama 2's has put there."""
        return data.removeprefix(b" ") if self.engine.strips_space else data

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """The bytes of each token. An id without a token (a model's padded vocabulary) is U+FFFD."""
        skipped = self.hidden if skip_special else frozenset()
        return b"".join(self._bytes.get(i, UNKNOWN) for i in map(int, ids) if i not in skipped)

    def save(self, folder: str | Path) -> None:
        """Write the Hugging Face files: those the tokenizer came with, unchanged, or ones built here."""
        if self._files is None:
            self._files = _built_files(self)
        Path(folder).mkdir(parents=True, exist_ok=True)
        for file_name, content in self._files.items():
            (Path(folder) / file_name).write_bytes(content)


class Tiktoken:
    """Byte-level BPE by tiktoken, which knows but the ranks of tokens and the pattern that cuts a text before BPE."""

    strips_space = False

    def __init__(self, name: str, ranks: Mapping[bytes, int], pattern: str, nfc: bool = False) -> None:
        self.ranks, self.pattern, self.nfc = dict(ranks), pattern, nfc
        self.n_tokens, self.text_bytes = len(self.ranks), {i: token for token, i in self.ranks.items()}
        # tiktoken drops text that no alternative matches; `tokenizers` keeps it as one piece, so we do.
        pieces = rf"{pattern}|(?:(?!{pattern})[\s\S])+"
        try:
            self.encoding = tiktoken.Encoding(name, pat_str=pieces, mergeable_ranks=self.ranks, special_tokens={})
        except ValueError as error:
            raise DataError(f'tokenizer "{name}": bad split pattern {pattern!r}: {_short(error)}') from error

    def identity(self) -> list[Any]:
        """What decides ids."""
        pairs = sorted((token.hex(), token_id) for token, token_id in self.ranks.items())
        return [pairs, self.pattern, "NFC" if self.nfc else None]

    def encode(self, text: str) -> list[int]:
        text = _nfc(text) if self.nfc else text
        return self._encode_pieces(text) if _has_long_space(text) else self.encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> list[int] | np.ndarray:
        text = _nfc(text) if self.nfc else text
        if _has_long_space(text):
            return self._encode_pieces(text)
        return self.encoding.encode_to_numpy(text, allowed_special=frozenset(), disallowed_special=())

    def _encode_pieces(self, text: str) -> list[int]:
        """The same ids by the slower regex engine of `tokenizers`, which takes some millions of spaces."""
        from tokenizers import Regex, pre_tokenizers

        cut = pre_tokenizers.Split(Regex(self.pattern), "isolated")
        pieces = [piece.encode() for piece, _ in cut.pre_tokenize_str(text)]
        return [token_id for piece in pieces for token_id in self.encoding._encode_single_piece(piece)]


class Library:
    """A tokenizer.json by the `tokenizers` library, without its added tokens: no text can become one of them."""

    pattern, nfc = None, False  # what it does to a text is in its specification alone

    def __init__(self, path: Path, spec: dict[str, Any], special: Mapping[str, int]) -> None:
        import tokenizers

        model = _text_model(path, spec["model"], special)
        kept = {name: spec.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")}
        self.spec = {"version": "1.0", "added_tokens": [], **kept, "model": model}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self.spec))
        except Exception as error:  # the binding raises no narrower type
            raise DataError(f"{path}: `tokenizers` cannot load it ({_short(error)})") from error
        to_bytes, self.strips_space = _decoder(path, spec.get("decoder"))
        vocab = {token: i for token, i in model["vocab"].items() if token not in special}
        # Two ids may have the same bytes, such as `a` and `<0x61>`.
        self.n_tokens, self.text_bytes = len(vocab), {i: to_bytes(token) for token, i in vocab.items()}

    def identity(self) -> list[Any]:
        """What decides ids."""
        return [self.spec]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    encode_array = encode


def _text_model(path: Path, model: dict[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
    """The file's BPE without its control tokens; the unknown token alone stays, for text without any other."""
    unknown = model.get("unk_token")
    if unknown in special and model.get("ignore_merges"):
        raise DataError(f"{path}: with ignore_merges the text {unknown!r} would become the control token unk_token")
    vocab = {token: i for token, i in model["vocab"].items() if token not in special or token == unknown}
    merges = [pair for pair in _merges(model) if not {*pair, "".join(pair)} & special.keys()]
    return {**model, "type": "BPE", "vocab": vocab, "merges": merges}


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """In older files a pair is one string."""
    return [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]


def _decoder(path: Path, decoder: dict[str, Any] | None) -> tuple[Callable[[str], bytes], bool]:
    """How a token's text becomes its bytes, and whether a text loses one space at its start."""
    steps = decoder.get("decoders", [decoder]) if decoder else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _by_letters, False
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    replaced = [step for step in steps if step["type"] == "Replace" and "String" in step["pattern"]]
    known = [*replaced, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if "Fuse" not in kinds or any(step not in known for step in steps if step != strip):
        got = json.dumps(decoder, ensure_ascii=False)[:200]
        raise DataError(f"{path}: decoder is {got}; supported are ByteLevel and Replace, ByteFallback, Fuse, Strip")

    def to_bytes(token: str) -> bytes:
        if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        for step in replaced:
            token = token.replace(step["pattern"]["String"], step["content"])
        return token.encode()

    return to_bytes, strip in steps


def _by_letters(token: str) -> bytes:
    letters = _byte_letters()
    # A token that is not spelled in them stands for itself, as in the decoder of `tokenizers`.
    return bytes(letters[letter] for letter in token) if letters.keys() >= set(token) else token.encode()


def without_surrogates(text: str) -> str:
    """Halves of a UTF-16 pair are joined; a lone half, which UTF-8 cannot hold, becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _has_long_space(text: str) -> bool:
    """Whether LONG_SPACE characters in a row are white space."""
    # A glance first, since searching takes as long as tokenising a tenth of the text: a run that long covers one of
    # these places, and goes on from there for half its length to one side or the other.
    near = min(500, LONG_SPACE // 2)
    places = range(0, len(text), LONG_SPACE)
    if not any(text[max(0, i - near) : i + 1].isspace() or text[i : i + near].isspace() for i in places):
        return False
    # No \s before the run: else a run a little too short would be scanned again from each of its spaces.
    return re.search(rf"(?<!\s)\s{{{LONG_SPACE}}}", text) is not None


def _nfc(text: str) -> str:
    # `tokenizers` knows an older Unicode than Python and orders newer combining marks differently; its answer
    # counts, since models were trained on it. Text that is NFC in the newer Unicode is so in the older.
    if unicodedata.is_normalized("NFC", text):
        return text
    from tokenizers import normalizers

    return normalizers.NFC().normalize_str(text)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


class StreamDecoder:
    """Decodes one row of ids as they come; returned text is final."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), skip_special: bool = True) -> None:
        if isinstance(stop, str) or not all(stop):
            raise DataError(f"stop: expected a list of non-empty strings, got {stop!r}")
        self.stopped = False
        self._tokenizer, self._stop, self._skip_special = tokenizer, tuple(stop), skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending, self._begun = "", False

    def feed(self, ids: Iterable[int]) -> str:
        """New printable text, without half a character and what may still become a stop string."""
        data = self._tokenizer.decode_bytes(ids, skip_special=self._skip_special)
        if data and not self._begun:
            self._begun, data = True, self._tokenizer.without_first_space(data)
        return self._release(data, final=False)

    def flush(self) -> str:
        """The rest, at the end of the row."""
        return self._release(b"", final=True)

    def _release(self, data: bytes, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._pending + self._utf8.decode(data, final)
        # The stop string that was completed first decides; of two that end together, the longer.
        starts = [(text.find(stop), stop) for stop in self._stop]
        matches = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if matches:
            self.stopped, self._pending = True, ""
            return text[: min(matches)[1]]
        keep = 0 if final else self._open_stop(text)
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _open_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each id; bytes of one character go with the last of them. Joined they are the printable text."""
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed([token]) for token in ids]
    return [*pieces[:-1], pieces[-1] + decoder.flush()] if pieces else []


def load_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer by name (bytes, gpt2, cl100k_base, o200k_base), of a tokenizer.json, a .tiktoken file, or a model."""
    if source == "bytes":
        special = {ENDOFTEXT: 256, IM_START: 257, IM_END: 258}
        ranks = {bytes([byte]): byte for byte in range(256)}
        engine = Tiktoken("bytes", ranks, BYTES_PATTERN)
        return Tokenizer("bytes", engine, special, eos=ENDOFTEXT)
    if source in TIKTOKEN_NAMES:
        return _from_tiktoken(str(source))
    path = Path(source)
    if path.suffix == ".tiktoken":
        return _from_ranks(path)
    folder = path.parent if path.name == "tokenizer.json" else path
    if not (folder / "tokenizer.json").is_file():
        folder = _resolved(source, folder)
    return _from_gguf(folder) if is_gguf(folder) else _from_folder(folder)


def _resolved(source: str | Path, folder: Path) -> Path:
    """The folder or GGUF file of a model; of a hub id the tokenizer's files alone are fetched."""
    plain = folder.is_dir() and not (folder / "checkpoints").is_dir()
    try:
        found = folder if plain else resolve(folder, TOKENIZER_FILES)
    except CheckpointError as error:
        names = ("bytes", *TIKTOKEN_NAMES)
        close = difflib.get_close_matches(str(source), names, n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        if HUB_ID.fullmatch(str(source)):
            hint = "; offline, put its tokenizer.json and tokenizer_config.json into a folder and name that"
        files = "a tokenizer.json, a .tiktoken file, or a folder, hub id or .gguf file of a model"
        raise DataError(f'tokenizer "{source}": {error}; expected {", ".join(names)}, {files}{hint}') from None
    if not is_gguf(found) and not (found / "tokenizer.json").is_file():
        raise DataError(f'tokenizer "{source}": expected a tokenizer.json in this folder, found none')
    return found


def _from_gguf(path: Path) -> Tokenizer:
    try:
        files = gguf_reader.tokenizer_files(path)
        return _from_files(str(path), files, path, json.loads(files.pop("generation_config.json")))
    except CheckpointError as error:
        raise DataError(f'tokenizer "{path}": {error}') from None


def _from_ranks(path: Path) -> Tokenizer:
    """Such a file holds tokens and their ids alone; its name says which tokenizer's they are."""
    if path.stem not in RANK_FILES:
        known = ", ".join(f"{name}.tiktoken" for name in RANK_FILES)
        raise DataError(f"{path}: which split pattern has it? Expected one of the names {known}")
    kind = RANK_FILES[path.stem]
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: expected a token in base64 and its id on each line ({_short(error)})") from None
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise DataError(f"{path}: expected each of the 256 bytes among its {len(ranks)} tokens")
    special = kind.special or {token: len(ranks) + i for i, token in enumerate((ENDOFTEXT, IM_START, IM_END))}
    return _over_ranks(path.stem, ranks, kind.pattern, special, kind.nfc)


def _over_ranks(
    name: str, ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int], nfc: bool = False
) -> Tokenizer:
    """With tokens of ChatML after the others, where it has none."""
    special = dict(special)
    for token in (IM_START, IM_END):
        special.setdefault(token, max(*ranks.values(), *special.values()) + 1)
    engine = Tiktoken(name, ranks, pattern, nfc)
    return Tokenizer(name, engine, special, eos=ENDOFTEXT)


def _from_tiktoken(name: str) -> Tokenizer:
    encoding = _download(name)
    # `{1,3}+` is possessive in tiktoken's regex engine, but "once or more" in that of `tokenizers`, which reads
    # the saved file. In these patterns nothing follows it, so the plain form matches the same.
    pattern = re.sub(r"(\{[\d,]+\})\+", r"\1", encoding._pat_str)
    return _over_ranks(name, encoding._mergeable_ranks, pattern, encoding._special_tokens)


def _download(name: str) -> tiktoken.Encoding:
    outcome: list[tiktoken.Encoding | Exception] = []

    def fetch() -> None:
        try:
            outcome.append(tiktoken.get_encoding(name))
        except Exception as error:
            outcome.append(error)

    worker = threading.Thread(target=fetch, daemon=True)
    worker.start()
    worker.join(DOWNLOAD_SECONDS)
    if outcome and isinstance(outcome[0], tiktoken.Encoding):
        return outcome[0]
    why = type(outcome[0]).__name__ if outcome else f"no answer in {DOWNLOAD_SECONDS} s"
    # tiktoken looks for a file under the hash of its address before it asks for it.
    kept = " and ".join(f"{url} as {hashlib.sha1(url.encode()).hexdigest()}" for url in TIKTOKEN_NAMES[name])
    raise DataError(
        f'tokenizer "{name}": its vocabulary must be downloaded once and that failed ({why}); '
        f'set TIKTOKEN_CACHE_DIR to a folder that has {kept}, or use "bytes" or a folder with a tokenizer.json'
    )


@functools.cache
def _byte_letters() -> dict[str, int]:
    """GPT-2's printable letter for each byte, as vocabularies in tokenizer.json spell them."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(shown))
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _from_folder(folder: Path) -> Tokenizer:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", TEMPLATE_FILE)
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    older = folder / "chat_template.json"
    if TEMPLATE_FILE not in files and older.is_file():
        template = read_json(older, DataError).get("chat_template")
        if not isinstance(template, str):
            raise DataError(f"{older}: chat_template: expected a string, got {template!r:.80}")
        files[TEMPLATE_FILE] = template.encode()
    generation = folder / "generation_config.json"
    ends = read_json(generation, DataError) if generation.is_file() else {}
    return _from_files(str(folder), files, folder, ends)


def _from_files(name: str, files: dict[str, bytes], folder: Path, generation: dict[str, Any]) -> Tokenizer:
    path = folder / "tokenizer.json"
    spec = _parse_json(path, files["tokenizer.json"])
    config = _parse_json(folder / "tokenizer_config.json", files.get("tokenizer_config.json", b"{}"))
    token_map = _parse_json(folder / "special_tokens_map.json", files.get("special_tokens_map.json", b"{}"))
    try:
        added = [(t["content"], t["id"], t["special"]) for t in spec.get("added_tokens") or []]
        listed = config.get("added_tokens_decoder") or {}
        added += [(t["content"], int(i), t.get("special", False)) for i, t in listed.items()]
        special = {text: token_id for text, token_id, _ in added}
        visible = frozenset(token_id for _, token_id, hidden in added if not hidden)
        engine = _engine(name, path, spec, special)
        prefix = _prefix(path, spec.get("post_processor"))
        letters = {token_id: text for text, token_id in special.items()}
        eos = _named_token("eos", config, token_map, generation, letters)
        bos = _named_token("bos", config, token_map, generation, letters)
        template = _chat_template(config, files)
        stop_ids = _stop_ids(generation)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not the layout of a tokenizer.json ({_short(error)})") from error
    eos = eos or next((token for token in END_TOKENS if token in special), None)
    bos = bos or (letters.get(prefix[0]) if prefix else None)
    if eos is None:
        raise DataError(f"{path}: no end-of-text token; name one as eos_token in tokenizer_config.json")
    for which, token in (("eos_token", eos), ("bos_token", bos)):
        if token is not None and token not in special:
            raise DataError(f"{path}: {which} {token!r} is not among the added_tokens")
    if not config.get("eos_token"):
        files = files | {"tokenizer_config.json": json_bytes(_config(eos, bos, None) | config | {"eos_token": eos})}
    options = {"prefix": prefix, "visible": visible, "chat_template": template, "stop_ids": stop_ids}
    tokenizer = Tokenizer(name, engine, special, eos=eos, bos=bos, files=files, **options)
    if template != tokenizer.chat_template:  # goes along to where others read it
        files[TEMPLATE_FILE] = tokenizer.chat_template.encode()
    return tokenizer


class _OtherIds(Exception):
    """tiktoken would give other ids than the file does."""


def _engine(name: str, path: Path, spec: dict[str, Any], special: Mapping[str, int]) -> Tiktoken | Library:
    """tiktoken where its ids are provably those of the file, else the library."""
    model = spec["model"]
    if model.get("type", "BPE") != "BPE":
        raise DataError(f"{path}: model.type is {model['type']!r}; only BPE is supported")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise DataError(f"{path}: model.{option} is {model[option]!r}; only BPE without it works")
    try:
        pattern, nfc = _pattern(spec.get("pre_tokenizer")), _is_nfc(spec.get("normalizer"))
        return Tiktoken(name, _ranks(model, special), pattern, nfc)
    except _OtherIds:
        return Library(path, spec, special)


def _parse_json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({_short(error)})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _ranks(model: dict[str, Any], special: Mapping[str, int]) -> dict[bytes, int]:
    """Bytes -> id. tiktoken merges by id: not the ranks of a file in which that would give other ids."""
    letters = _byte_letters()
    vocab = {token: token_id for token, token_id in model["vocab"].items() if token not in special}
    if model.get("byte_fallback") or not all(token and letters.keys() >= set(token) for token in vocab):
        raise _OtherIds("not spelled in byte-level letters")
    ranks = {bytes(letters[letter] for letter in token): token_id for token, token_id in vocab.items()}
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise _OtherIds("a byte without a token")
    merges = _merges(model)
    products = [vocab.get(left + right, -1) for left, right in merges]
    if -1 in products or not {part for pair in merges for part in pair} <= vocab.keys():
        raise _OtherIds("a merge that is not made of tokens")
    if products != sorted(products):
        raise _OtherIds("merges in another order than ids")
    _check_reachable(vocab, merges, bool(model.get("ignore_merges")))
    return ranks


def _check_reachable(vocab: dict[str, int], merges: list[tuple[str, str]], whole_pieces: bool) -> None:
    """Make sure that tiktoken, which knows only ids, merges what the file's list of merges does.

    tiktoken joins any two neighbours that make a token; the file only listed pairs. Both keep to the lowest id
    first, so a token's inside goes the same way alone as in a longer text, and the two can part only where a
    token's own bytes end in two parts whose pair is not listed. tiktoken also takes a piece that is a token as
    it is, which without ignore_merges needs every token to be reached by merges.
    """
    from tokenizers import models

    bpe = models.BPE(vocab=vocab, merges=merges)
    for token in vocab:
        parts = len(bpe.tokenize(token))
        if parts == 2 or (parts > 2 and not whole_pieces):
            raise _OtherIds("a token that is not what the merges make of its own bytes")


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    kinds = [step["type"] for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space", True):
        uses_regex = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and uses_regex:
            return GPT2_PATTERN
        if kinds == ["Split", "ByteLevel"] and not uses_regex:
            split = steps[0]
            pattern = split["pattern"].get("Regex")
            if pattern and split["behavior"] == "Isolated" and not split["invert"]:
                return pattern
    raise _OtherIds("not one regex that isolates, without a space put in front")


def _is_nfc(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise _OtherIds("a normalizer other than NFC")
    return normalizer is not None


def _prefix(path: Path, post_processor: dict[str, Any] | None) -> tuple[int, ...]:
    """The ids before a text. What a template puts after a text is left to the caller (`eos_id`)."""
    steps = post_processor.get("processors", [post_processor]) if post_processor else []
    prefix: list[int] = []
    for step in steps:
        if step["type"] not in ("ByteLevel", "TemplateProcessing"):
            raise DataError(f"{path}: post_processor is {step['type']}; supported: ByteLevel, TemplateProcessing")
        for part in step.get("single", []):
            if "Sequence" in part:
                break
            prefix += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    return tuple(prefix)


def _named_token(
    which: str,
    config: dict[str, Any],
    token_map: dict[str, Any],
    generation: dict[str, Any],
    texts: dict[int, str],
) -> str | None:
    for token in (config.get(f"{which}_token"), token_map.get(f"{which}_token")):
        if token:
            text = token.get("content") if isinstance(token, dict) else token
            if not isinstance(text, str):
                raise DataError(f"tokenizer_config.json: {which}_token: expected the text of a token, got {text!r:.80}")
            return text
    token_id = generation.get(f"{which}_token_id")
    return texts.get(token_id[0] if isinstance(token_id, list) else token_id)


def _stop_ids(generation: dict[str, Any]) -> list[int]:
    """What ends a text by generation_config.json."""
    ids = generation.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(token_id) is int for token_id in ids):
        raise DataError(f"generation_config.json: eos_token_id: expected a token's number or several, got {ids!r:.80}")
    return ids


def _chat_template(config: dict[str, Any], files: Mapping[str, bytes]) -> str | None:
    if TEMPLATE_FILE in files:
        return files[TEMPLATE_FILE].decode()
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise DataError(f"tokenizer_config.json: chat_template: expected a string, got {template!r:.80}")
    return template


def _config(eos: str, bos: str | None, chat_template: str | None) -> dict[str, Any]:
    # By this class transformers takes tokenizer.json as it is. Not so beside a config.json of model_type qwen2:
    # AutoTokenizer of transformers 5 then always cuts by Qwen2's pattern, after NFC. PreTrainedTokenizerFast itself
    # still reads any of these folders.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "pad_token": eos,
        "bos_token": bos,
        "chat_template": chat_template,
    }
    return {key: value for key, value in config.items() if value is not None}


def _built_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a tokenizer that came without any: bytes and tiktoken's."""
    letters = {byte: letter for letter, byte in _byte_letters().items()}
    ranks = tokenizer.engine.ranks
    by_id = sorted(ranks, key=ranks.__getitem__)
    spelled = {token: "".join(letters[byte] for byte in token) for token in by_id}
    halves = [pair for token in by_id if len(token) > 1 and (pair := _halves(token, ranks))]
    model = {
        "type": "BPE",
        "ignore_merges": True,  # as tiktoken: a piece that is a token is taken whole
        "vocab": {spelled[token]: ranks[token] for token in by_id},
        "merges": [[spelled[left], spelled[right]] for left, right in halves],
    }
    spec = _spec(model, tokenizer.engine.pattern, tokenizer.engine.nfc, tokenizer.special)
    eos = next(text for text, token_id in tokenizer.special.items() if token_id == tokenizer.eos_id)
    config = _config(eos, None, tokenizer.chat_template)
    return {"tokenizer.json": json_bytes(spec), "tokenizer_config.json": json_bytes(config)}


def _spec(model: dict[str, Any], pattern: str, nfc: bool, special: Mapping[str, int]) -> dict[str, Any]:
    """A tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    by_id = sorted(special, key=special.__getitem__)
    return {
        "version": "1.0",
        "added_tokens": [{"id": special[text], "content": text, **flags} for text in by_id],
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": model,
    }


def _halves(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The last merge that BPE does to make `token`; None if merging gets stuck before."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [(ranks.get(parts[i] + parts[i + 1]), i) for i in range(len(parts) - 1)]
        known = [pair for pair in pairs if pair[0] is not None]
        if not known:
            return None
        at = min(known)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = (ENDOFTEXT, IM_START, IM_END),
    pattern: str = QWEN2_PATTERN,
) -> Tokenizer:
    """Byte-level BPE with at most `vocab_size` tokens: bytes, then merges, then `special_tokens`.

    The first special token ends a document. A small text may have fewer merges than asked for: see `n_vocab`.
    Text is brought to NFC, as Qwen2.5 does, so that transformers reads the saved files alike (see `_config`).
    """
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    smallest = 256 + len(special_tokens)
    if vocab_size < smallest or not special_tokens:
        raise DataError(
            f"vocab_size: expected at least {smallest} (256 bytes and one or more special tokens), "
            f"got {vocab_size} with {len(special_tokens)} special tokens"
        )
    try:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    except Exception as error:  # the binding raises no narrower type
        raise DataError(f"pattern: {pattern!r} is not a regular expression ({_short(error)})") from error
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    size, alphabet = vocab_size - len(special_tokens), sorted(_byte_letters())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(map(without_surrogates, texts), trainer)
    special = {token: bpe.get_vocab_size() + i for i, token in enumerate(special_tokens)}
    spec = _spec(json.loads(bpe.to_str())["model"], pattern, True, special)
    has_chat = {IM_START, IM_END} <= special.keys()
    config = _config(special_tokens[0], None, CHATML_TEMPLATE if has_chat else None)
    files = {"tokenizer.json": json_bytes(spec), "tokenizer_config.json": json_bytes(config)}
    return _from_files("trained", files, Path("trained"), {})
