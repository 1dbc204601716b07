"""Text to tokens: sources -> documents -> token shards on disk.

A source is builtin:python (the standard library of the running Python), a file, a glob or a folder of .txt .md .py
(a document per file), .jsonl .jsonl.gz .jsonl.zst .parquet (a document per row), or a Hugging Face data set: an id
such as owner/name, or hf:ID_OR_FOLDER[:CONFIG]. Sources without weights are one corpus. As SOURCE=WEIGHT, all of
them, they are a mixture: each has its fraction of the rows, whatever its size, and starts again at its end.
"""

from __future__ import annotations

import codecs
import functools
import glob
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import weakref
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from nanoqwen.config import DataConfig, split_weight
from nanoqwen.errors import DataError
from nanoqwen.files import lock, sync_open, write_atomic
from nanoqwen.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

BUILTIN = "builtin:python"
TEXT_FILES, ROW_FILES = (".txt", ".md", ".py"), (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
LOWER = bytes(range(256)).lower()  # of each byte
FORMAT = 1  # of the shards; raise it whenever the same text would give other files
LONGEST_ROW = 1 << 29  # bytes of a line of JSONL; an archive of a few megabytes may hold one without end
PIECE = 1 << 22  # bytes of a text file that are tokenised at once
JOB = 1 << 19  # characters that a thread tokenises at once
PART = 1 << 24  # characters of a part of the tokens: at most this much work is done twice after a kill
SPLITS = ("train", "val")
SAMPLE = 8 << 20  # characters that `tokenizer: auto` is trained on
HEAD = 64 << 20  # characters at the head of a stream in which its validation documents are looked for


# --- sources ----------------------------------------------------------------------------------------------------


class Input(NamedTuple):
    """A file, or a data set of the `datasets` library."""

    name: str  # as errors call it
    path: Path | None = None
    lenient: bool = False  # files of the standard library that are no UTF-8 are there on purpose: counted, not refused


def python_files() -> list[Path]:
    """The standard library's own sources, tests included where they are installed."""
    paths: list[Path] = []
    for folder, inner, files in os.walk(sysconfig.get_paths()["stdlib"]):
        inner[:] = set(inner) - {"site-packages", "dist-packages", "__pycache__"}  # not entered
        paths += (Path(folder, name) for name in files if name.endswith(".py"))
    return sorted(paths)


def expand(sources: Iterable[str], key: str) -> list[Input]:
    """The files behind sources, each once by whichever name, in an order that does not depend on the file system."""
    inputs: dict[str, Input] = {}
    for source in sources:
        for item in _inputs(source, key):  # links may make a circle, in which a glob finds a file many times
            inputs.setdefault(os.path.realpath(item.path) if item.path else item.name, item)
    return list(inputs.values())


def _inputs(source: str, key: str) -> list[Input]:
    if source == BUILTIN:
        inputs = [Input(str(path), path, lenient=True) for path in python_files()]
    elif source.startswith("hf:"):
        inputs = [Input(source)]
    elif os.path.isdir(source):
        root = Path(source)
        files = [path for path in root.rglob("*") if path.is_file() and not _hidden(path, root)]
        inputs = [Input(str(path), path) for path in sorted(files) if _kind(path) and not _of_a_run(path, root)]
    elif os.path.isfile(source):
        inputs = [Input(source, Path(source))]
    elif matches := sorted(name for name in glob.glob(source, recursive=True) if os.path.isfile(name)):
        root = Path(os.path.dirname(source[: re.search(r"[*?[]", source).start()]))
        inputs = [Input(name, Path(name)) for name in matches if not _of_a_run(Path(name), root)]
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) and not _kind(Path(source)):
        inputs = [Input(f"hf:{source}")]
    else:
        raise DataError(f"{key}: {source}: no such file or folder (a Hugging Face data set is written hf:NAME)")
    known = ", ".join(TEXT_FILES + ROW_FILES)
    if not inputs:
        raise DataError(f"{key}: {source}: expected files of kind {known}, found none")
    for item in inputs:
        if item.path and not _kind(item.path):
            raise DataError(f"{key}: {item.name}: expected a file of kind {known}")
    return inputs


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _of_a_run(path: Path, root: Path) -> bool:
    """True within a run's folder below `root`: what a run writes is no text for it, or for the next one."""
    below = path.parents[: max(0, len(path.parts) - len(root.parts) - 1)]
    return any((folder / "config.yaml").is_file() and (folder / "status.json").is_file() for folder in below)


def _kind(path: Path) -> str | None:
    return next((suffix for suffix in TEXT_FILES + ROW_FILES if path.name.lower().endswith(suffix)), None)


def _identity(item: Input, cfg: DataConfig) -> list[Any]:
    """What changes when the text does. ctime, because an editor can put size and mtime back."""
    if item.path is None:
        return [item.name, cfg.split, "" if cfg.streaming else _data_set(item, cfg)._fingerprint]
    try:
        stat = item.path.stat()
    except OSError as error:
        raise DataError(f"{item.name}: {error.strerror}") from None
    return [str(item.path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _data_set(item: Input, cfg: DataConfig) -> Any:
    import datasets

    name, _, config = item.name.removeprefix("hf:").partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=cfg.split, streaming=cfg.streaming)
    except Exception as error:  # a dozen types, by what is missing: the network, the id, the split, a file
        why = f"{type(error).__name__}: {error}"
        raise DataError(f"{item.name}: cannot be loaded, split {cfg.split!r} ({why:.300})") from None


# --- documents --------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A document, or a part of one that is too large to be tokenised at once."""

    text: str
    split: str  # train or val
    ends: bool  # the document ends here
    cursor: list[Any]  # then: where the next one begins, as [input, row, state of a streamed data set]
    position: int  # bytes of the input that were read so far


class BadRow(Exception):
    """What is wrong with a row, and in a text file on which line."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


SplitFn = Callable[[bytes], "str | None"]  # digest of a document -> train, val, or None: left out


def normalized(text: str) -> bytes:
    """What splits go by: texts that differ in white space or case alone count as the same one."""
    return text.encode("utf-8", "surrogatepass").translate(LOWER, b" \t\r\n\f\v")


class RowReader:
    """The rows of some inputs, in order, from a cursor on, as the `items` of a subclass. Malformed rows are counted."""

    def __init__(
        self,
        cfg: DataConfig,
        inputs: Sequence[Input],
        cursor: Sequence[Any] = (0, 0, None),
        column: str | None = None,  # the one that is needed of a table; None: all
    ) -> None:
        self.cfg, self.inputs, self.cursor, self.column = cfg, inputs, cursor, column
        self.left = math.inf  # characters to read, about
        self.counts: Counter[str] = Counter()
        self._state: Any = None  # behind the last row: of a streamed data set its own, of plain lines the byte
        self._position: Callable[[], int] = lambda: 0

    def items(self, raw: Any, cursor: list[Any]) -> Iterator[Any]:
        """What comes of a row: the path of a text file, a line of JSON, or a dictionary."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        first, row, state = self.cursor
        for number in range(first, len(self.inputs)):
            item = self.inputs[number]
            with closing(self._rows(item, row, state)) as rows:  # and with it the file, whatever happens
                while True:
                    row += 1
                    try:
                        raw = next(rows, None)
                        if raw is None or self.left <= 0:
                            break
                        if not isinstance(raw, bytes) or raw.strip():
                            yield from self.items(raw, [number, row, self._state])
                    except DataError:
                        raise
                    except (BadRow, ValueError, RecursionError, EOFError, OSError, zlib.error) as error:
                        self._bad(item, row, error)
            row, state, self._state = 0, None, None

    def _rows(self, item: Input, skip: int, state: Any) -> Iterator[Any]:
        """A path (a text file is one row), lines of JSON, or dictionaries, from row `skip` on."""
        self._position = lambda: 0
        if item.path is None:
            yield from self._data_set_rows(item, skip, state)
        elif _kind(item.path) in TEXT_FILES:
            yield from [item.path][skip:]
        else:
            with open(item.path, "rb") as file:
                self._position = file.tell
                if _kind(item.path) == ".parquet":
                    yield from _parquet_rows(file, self.column, skip)
                else:
                    yield from self._line_rows(file, item.path, skip, state)

    def _line_rows(self, file: BinaryIO, path: Path, skip: int, place: int | None) -> Iterator[bytes]:
        """Lines, which end at \\n alone, whatever JSON holds. In a plain file those before are skipped unread."""
        lines, first = _lines(file, path), 0
        if lines is file and place is not None:
            file.seek(place)
            first = skip
        for number, line in enumerate(iter(lambda: lines.readline(LONGEST_ROW + 1), b""), start=first):
            if len(line) > LONGEST_ROW:
                raise DataError(
                    f"{path}:{number + 1}: expected rows of at most {LONGEST_ROW >> 20} MiB, got a longer one"
                )
            if number >= skip:
                self._state = file.tell() if lines is file else None
                yield line if number else line.removeprefix(codecs.BOM_UTF8)

    def _data_set_rows(self, item: Input, skip: int, state: Any) -> Iterator[Any]:
        rows = _data_set(item, self.cfg)
        if state is not None:
            rows.load_state_dict(state)
        elif skip:
            rows = rows.skip(skip)
        try:
            for row in rows:
                self._state = rows.state_dict() if self.cfg.streaming else None
                yield row
        except Exception as error:  # reading over the network fails in as many ways as loading does
            raise DataError(f"{item.name}: reading failed ({type(error).__name__}: {error!s:.300})") from None

    def leave_out(self, reason: str, where: str) -> None:
        """Called for each row that is malformed and may be; `where` is file:line."""
        self.counts[reason] += 1

    def _bad(self, item: Input, row: int, error: Exception) -> None:
        if item.lenient or self.cfg.on_error == "skip":
            self.leave_out("unreadable" if item.lenient else "malformed", f"{item.name}:{row}")
            return
        line = getattr(error, "line", None) or row
        raise DataError(f"{item.name}:{line}: {describe_error(error)}") from None


class Reader(RowReader):
    """The documents of some inputs."""

    def __init__(
        self,
        cfg: DataConfig,
        inputs: Sequence[Input],
        split_of: SplitFn,
        cursor: Sequence[Any] = (0, 0, None),
        limit: float = math.inf,
    ) -> None:
        super().__init__(cfg, inputs, cursor, cfg.text_key)
        self.split_of, self.left = split_of, limit

    def _texts(self, raw: Any) -> Iterable[str]:
        return _file_pieces(raw) if isinstance(raw, Path) else [_text(raw, self.cfg.text_key)]

    def items(self, raw: Any, cursor: list[Any]) -> Iterator[Piece]:
        # A large file is read twice: its split has to be known before its first token is written.
        is_large = isinstance(raw, Path) and raw.stat().st_size > PIECE
        texts = None if is_large else list(self._texts(raw))
        digest, is_blank = hashlib.sha256(), True
        for text in self._texts(raw) if is_large else texts:
            digest.update(normalized(text))
            is_blank = is_blank and (not text or text.isspace())
            self.left -= len(text)
        split = self.split_of(digest.digest()[:8])
        if is_blank or split is None:
            self.counts["empty" if is_blank else "other_split"] += 1
            return
        previous = None
        for text in self._texts(raw) if is_large else texts:
            if previous is not None:
                yield Piece(previous, split, False, cursor, self._position())
            previous = text
        self.counts[split] += 1
        yield Piece(previous, split, True, cursor, self._position())


def describe_error(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"expected UTF-8 text, got byte {error.object[error.start]:#04x}"
    if isinstance(error, json.JSONDecodeError):
        return f"expected a JSON object, got invalid JSON ({error.msg}, column {error.colno})"
    if isinstance(error, RecursionError):
        return "expected a JSON object, got brackets nested too deep"
    return str(error) or type(error).__name__


def _lines(file: BinaryIO, path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if path.name.lower().endswith(".zst"):
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
        return io.BufferedReader(stream, 1 << 20)
    return file


def _parquet_rows(file: BinaryIO, column: str | None, skip: int) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    table = parquet.ParquetFile(file)
    if column and column not in table.schema_arrow.names:
        raise BadRow(f"expected a column {column!r}, got {', '.join(table.schema_arrow.names)}")
    for batch in table.iter_batches(batch_size=1024, columns=[column] if column else None):
        for row in range(skip, len(batch)):  # one by one: as Python objects, all of them would take many times the room
            yield {name: values[row].as_py() for name, values in zip(batch.schema.names, batch.columns, strict=True)}
        skip = max(0, skip - len(batch))


def row_object(raw: Any) -> dict[str, Any]:
    """A row as a dictionary, refused where a lenient reader would guess."""
    if isinstance(raw, bytes):
        raw = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    if not isinstance(raw, dict):
        raise BadRow(f"expected a JSON object, got {type_name(raw)}")
    return raw


def _text(raw: Any, key: str) -> str:
    row = row_object(raw)
    if key not in row:
        raise BadRow(f"expected a key {key!r}, got {listed(row)}")
    return text_field(row, key)


def text_field(row: Mapping[str, Any], key: str, where: str = "") -> str:
    if not isinstance(row[key], str):
        raise BadRow(f"{where}{key}: expected text, got {type_name(row[key])}")
    return row[key]


def listed(keys: Iterable[Any]) -> str:
    return (", ".join(map(repr, keys)) or "none")[:160]


def type_name(value: Any) -> str:
    """As JSON calls it."""
    names = {type(None): "null", dict: "an object", list: "an array", bool: "a boolean", int: "a number"}
    return (names | {float: "a number", str: "text"}).get(type(value), type(value).__name__)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadRow(f"key {twice!r} comes twice")
    return values


def _no_constant(name: str) -> None:
    raise BadRow(f"expected a JSON object, got {name}, which is not JSON")


def _file_pieces(path: Path) -> Iterator[str]:
    """A text file, cut after line ends where it is large, so that memory does not grow with it."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest, lines = "", 1
    with open(path, "rb") as file:
        block = file.read(PIECE)
        while block:
            following = file.read(PIECE)
            try:
                text = rest + decoder.decode(block, final=not following)
            except UnicodeDecodeError as error:
                line = lines + error.object.count(b"\n", 0, error.start)
                hint = " (UTF-16?)" if lines == 1 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
                raise BadRow(describe_error(error) + hint, line) from None
            cut = (text.rfind("\n") + 1 or len(text)) if following else len(text)
            yield text[:cut]
            rest, lines, block = text[cut:], lines + block.count(b"\n"), following


# --- shards -----------------------------------------------------------------------------------------------------

# A shard: 16 bytes of magic; the SHA-256, in hex, of all that follows it; a JSON header, padded with spaces to 4096
# bytes; the tokens; the document index: for each document where it ends, as uint64. All little-endian.
MAGIC = b"nanoqwen tokens\n"
HEADER = 4096
BODY = len(MAGIC) + 64


class TokenShards:
    """The tokens of one prepared split. Opening checks sizes and header, `verify` every byte.

    Windows are read, not mapped: a file that shrinks, or a disk that fails, under a memory map kills the process.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from None
        weakref.finalize(self, os.close, self._descriptor)
        head, size = self._read(0, HEADER), os.fstat(self._descriptor).st_size
        if head[: len(MAGIC)] != MAGIC:
            raise DataError(f"{self.path}: expected token shards, got another kind of file")
        try:
            header = json.loads(head[BODY:])
            version, self._count, self.dtype = header["version"], int(header["count"]), np.dtype(header["dtype"])
            self.fingerprint = head[len(MAGIC) : BODY].decode("ascii")  # knows no paths and dates
            self.tokenizer_hash: str = header["tokenizer_hash"]
            self.eos_id = int(header["eos_id"])
            self.n_documents = int(header["documents"])
            self.counts: dict[str, int] = header["counts"]
        except (ValueError, LookupError, TypeError):
            raise DataError(f"{self.path}: damaged header") from None
        if version != FORMAT:
            raise DataError(f"{self.path}: expected format {FORMAT}, got {version}")
        end = HEADER + self._count * self.dtype.itemsize
        if size != end + 8 * self.n_documents:
            raise DataError(f"{self.path}: expected {end + 8 * self.n_documents} bytes, got {size}")

    def _read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def verify(self) -> None:
        """Compare the whole file with the SHA-256 in its header."""
        if _body_sha256(self.path) != self.fingerprint:
            again = f"delete {self.path.parent} and run python data.py prepare again"
            raise DataError(f"{self.path}: damaged, its SHA-256 is not the one in its header; {again}")

    def __len__(self) -> int:
        return self._count

    def window(self, start: int, length: int) -> np.ndarray:
        """`length` tokens from `start` on, fewer at the end."""
        return self._array(self.dtype, HEADER, start, min(length, self._count - start))

    def document_ends(self) -> np.ndarray:
        """Where each document ends, behind its EOS."""
        return self._array(np.dtype("<u8"), HEADER + self._count * self.dtype.itemsize, 0, self.n_documents)

    def _array(self, dtype: np.dtype, offset: int, start: int, count: int) -> np.ndarray:
        content = self._read(offset + start * dtype.itemsize, count * dtype.itemsize)
        if len(content) != count * dtype.itemsize:
            raise DataError(f"{self.path}: is shorter than when it was opened; run python data.py prepare again")
        return np.frombuffer(content, dtype)


def _body_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(BODY)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")


def _narrowed(ids: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Ids in the width of the shards; one that does not fit is refused, never wrapped."""
    most = np.iinfo(dtype).max
    if len(ids) and not 0 <= ids.min() <= ids.max() <= most:
        raise DataError(f"token id: expected 0 .. {most} ({dtype}), got {ids.min()} .. {ids.max()}")
    return ids.astype(dtype)


class Job(NamedTuple):
    pieces: list[Piece]
    counts: dict[str, int]  # of the reader, when the last piece was read


def _jobs(reader: Reader) -> Iterator[Job]:
    pieces: list[Piece] = []
    size = 0
    for piece in reader:
        pieces.append(piece)
        size += len(piece.text)
        if size >= JOB:
            yield Job(pieces, dict(reader.counts))
            pieces, size = [], 0
    yield Job(pieces, dict(reader.counts))  # perhaps without pieces, for the counts after the last document


def _encode(job: Job, tokenizer: Tokenizer) -> dict[str, list[np.ndarray]]:
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for piece in job.pieces:
        ids = tokenizer.encode_array(piece.text)  # control tokens off
        if piece.ends:
            ids = np.append(ids, np.uint32(tokenizer.eos_id))  # from here alone
        tokens[piece.split].append(_narrowed(ids, _dtype(tokenizer)))
    return tokens


def _in_order(pool: ThreadPoolExecutor, function: Callable, jobs: Iterable[Job], ahead: int) -> Iterator[tuple]:
    """Each job with its result. At most `ahead` wait, which bounds the memory."""
    waiting: deque = deque()
    for job in jobs:
        waiting.append((job, pool.submit(function, job)))
        if len(waiting) > ahead:
            first, result = waiting.popleft()
            yield first, result.result()
    for job, result in waiting:
        yield job, result.result()


class Part(NamedTuple):
    """Some of the tokens, a bounded number. A killed preparation resumes behind the parts that are on the disk."""

    cursor: list[Any] | None  # where the reader continues behind it; None: within a document, or not resumable
    counts: dict[str, int]  # of the reader, from the start to here
    tokens: dict[str, np.ndarray]  # of each split


def _write_part(folder: Path, number: int, part: Part) -> None:
    """A file of: SHA-256 of the rest in hex, a line of JSON, the tokens of each split."""
    sizes = {split: len(tokens) for split, tokens in part.tokens.items()}
    line = json.dumps({"cursor": part.cursor, "counts": part.counts, "sizes": sizes}).encode()
    body = b"".join([line, b"\n", *(tokens.tobytes() for tokens in part.tokens.values())])
    write_atomic(folder / f"{number:06}.part", hashlib.sha256(body).hexdigest().encode() + body)


def _read_part(folder: Path, number: int, dtype: np.dtype) -> Part | None:
    """None where there is none, or a damaged one."""
    try:
        content = (folder / f"{number:06}.part").read_bytes()
    except OSError:
        return None
    if hashlib.sha256(memoryview(content)[64:]).hexdigest().encode() != content[:64]:
        return None
    start, tokens = content.index(b"\n") + 1, {}
    header = json.loads(content[64:start])
    for split, size in header["sizes"].items():
        tokens[split] = np.frombuffer(content, dtype, size, start)
        start += size * dtype.itemsize
    return Part(header["cursor"], header["counts"], tokens)


def _resume(folder: Path, reader: Reader, dtype: np.dtype) -> int:
    """Puts a reader behind the last part from which it can continue; returns the number of the next part."""
    number, following = 0, 0
    while part := _read_part(folder, number, dtype):
        number += 1
        if part.cursor is not None:
            reader.cursor, reader.counts, following = part.cursor, Counter(part.counts), number
    for path in sorted(folder.glob("*.part"))[following:]:
        path.unlink()
    return following


def tokenise(folder: Path, reader: Reader, tokenizer: Tokenizer, progress: bool) -> tuple[int, dict[str, int]]:
    """Writes the tokens of both splits in parts, behind those of a killed run. Returns the number of parts, and how
    many documents are in each split or left out."""
    from tqdm import tqdm

    folder.mkdir(exist_ok=True)
    number = _resume(folder, reader, _dtype(tokenizer))
    sizes = [item.path.stat().st_size if item.path else 0 for item in reader.inputs]
    before = np.cumsum([0, *sizes]).tolist()
    bar = tqdm(total=before[-1], initial=before[reader.cursor[0]], unit="B", unit_scale=True, desc="tokenising",
               disable=None if progress else True)  # fmt: skip
    workers = reader.cfg.workers or os.cpu_count() or 1
    chunks: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    counts, characters = dict(reader.counts), 0

    def write_part(cursor: list[Any] | None) -> None:
        empty = np.empty(0, _dtype(tokenizer))
        tokens = {split: np.concatenate([empty, *arrays]) for split, arrays in chunks.items()}
        _write_part(folder, number, Part(cursor, counts, tokens))
        for arrays in chunks.values():
            arrays.clear()

    with bar, ThreadPoolExecutor(workers) as pool:  # tiktoken lets go of the interpreter lock
        encode = functools.partial(_encode, tokenizer=tokenizer)
        for job, tokens in _in_order(pool, encode, _jobs(reader), 2 * workers):
            for split, arrays in tokens.items():
                chunks[split] += arrays
            counts = job.counts
            if not job.pieces:
                continue
            last = job.pieces[-1]
            read = last.position or (sizes[last.cursor[0]] if last.ends else 0)
            bar.update(max(0, before[last.cursor[0]] + read - bar.n))
            characters += sum(len(piece.text) for piece in job.pieces)
            if characters >= PART:
                write_part(last.cursor if last.ends and reader.left == math.inf else None)
                number, characters = number + 1, 0
    write_part(None)
    return number + 1, counts


def _join_parts(folder: Path, count: int, path: Path, split: str, dtype: np.dtype) -> None:
    """The tokens of a split in one file, with room for a header."""
    with open(path, "wb") as file:
        file.write(bytes(HEADER))
        for number in range(count):
            part = _read_part(folder, number, dtype)
            if part is None:
                raise DataError(f"{folder}: part {number} is damaged; run it again")
            file.write(part.tokens[split])


def _finish(path: Path, tokenizer: Tokenizer, split: str, counts: dict[str, int]) -> None:
    """Adds the document index and the header, which makes a shard of a file of tokens."""
    dtype = _dtype(tokenizer)
    count = (path.stat().st_size - HEADER) // dtype.itemsize
    with open(path, "r+b") as file:
        documents = 0
        for start in range(0, count, 1 << 20):
            file.seek(HEADER + start * dtype.itemsize)
            chunk = np.frombuffer(file.read(min(count - start, 1 << 20) * dtype.itemsize), dtype)
            ends = np.flatnonzero(chunk == tokenizer.eos_id) + start + 1
            file.seek(HEADER + count * dtype.itemsize + 8 * documents)
            file.write(ends.astype("<u8"))
            documents += len(ends)
        if documents != counts.get(split, 0):
            raise DataError(f"{path}: expected {counts.get(split, 0)} ends of documents, got {documents}")
        header = {"version": FORMAT, "dtype": dtype.str, "count": count, "documents": documents, "split": split}
        header |= {"vocab": tokenizer.n_vocab, "tokenizer_hash": tokenizer.hash, "eos_id": tokenizer.eos_id}
        body = json.dumps(header | {"counts": counts}, sort_keys=True).encode().ljust(HEADER - BODY)
        file.seek(BODY)
        file.write(body)
        file.flush()
        file.seek(0)
        file.write(MAGIC + _body_sha256(path).encode())
        sync_open(file)


def _open_shards(folder: Path) -> dict[str, TokenShards] | None:
    """The shards of both splits; None where there are none, or unusable ones."""
    if not folder.is_dir():
        return None
    try:
        return {split: TokenShards(folder / f"{split}.bin") for split in SPLITS}
    except DataError as error:
        print(f"{error}; building it again", file=sys.stderr)
        return None


def _shards(reader: Reader, settings: list[Any], tokenizer: Tokenizer, progress: bool) -> dict[str, TokenShards]:
    """The shards of what `reader` reads: those of an earlier run if nothing has changed since, else new ones."""
    cfg, inputs = reader.cfg, reader.inputs

    def key() -> str:
        return short_hash([identities(cfg, inputs), settings, tokenizer.hash])

    name = key()
    folder = Path(cfg.cache_dir) / "shards" / name
    with lock(folder.with_suffix(".lock")):
        if shards := _open_shards(folder):
            return shards
        building = folder.with_suffix(".building")
        building.mkdir(exist_ok=True)
        parts, counts = tokenise(building / "parts", reader, tokenizer, progress)
        if key() != name:
            shutil.rmtree(building)
            raise DataError(f"{inputs[0].name}, ...: changed while being read; run it again")
        for split in SPLITS:
            _join_parts(building / "parts", parts, building / f"{split}.bin", split, _dtype(tokenizer))
            _finish(building / f"{split}.bin", tokenizer, split, counts)
        shutil.rmtree(building / "parts")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(building, folder)
        return {split: TokenShards(folder / f"{split}.bin") for split in SPLITS}


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def identities(cfg: DataConfig, inputs: Iterable[Input]) -> list[Any]:
    return [FORMAT, cfg.text_key, cfg.on_error, *(_identity(item, cfg) for item in inputs)]


# --- prepare ----------------------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    tokenizer: Tokenizer
    train: list[tuple[TokenShards, float]]  # and their weights; empty where the text is streamed
    val: list[TokenShards]


class Corpus(NamedTuple):
    """The inputs of a configuration, and which of their documents go where."""

    groups: list[tuple[float, list[Input]]]  # of training text, with their weights
    val: list[Input]
    settings: list[Any]  # what decides the split, for keys
    split_of: SplitFn  # of the documents of the groups


def open_corpus(cfg: DataConfig) -> Corpus:
    sources = [split_weight(source) for source in cfg.train]
    groups = [(weight, expand([name], "data.train")) for name, weight in sources if weight is not None]
    groups = groups or [(1.0, expand([name for name, _ in sources], "data.train"))]
    val = expand(cfg.val, "data.val")
    if not val:
        limit = int(cfg.val_fraction * 2**64)
        return Corpus(groups, [], [cfg.val_fraction], lambda digest: split_by_hash(digest, limit))
    # A document that is in both is not trained on.
    held_out: set[bytes] = set()
    for _ in Reader(replace(cfg, streaming=False), val, held_out.add):
        pass
    settings = [identities(replace(cfg, streaming=False), val)]
    return Corpus(groups, val, settings, lambda digest: None if digest in held_out else "train")


def split_by_hash(digest: bytes, limit: int) -> str:
    """By the text alone, so equal documents are on one side, and a document added elsewhere moves no other."""
    return "val" if int.from_bytes(digest, "little") < limit else "train"


def prepare(
    cfg: DataConfig, vocab_size: int | str, *, tokenizer: Tokenizer | None = None, progress: bool = True
) -> Prepared:
    """Tokenises on first use, later opens the shards of an earlier run. Several processes may do it at once.

    vocab_size: ids that a model has; auto: as many as the tokenizer that is named
    tokenizer: that of a model that there is already, whatever the configuration names
    """
    text = open_corpus(cfg)
    tokenizer = tokenizer or _tokenizer(cfg, text, vocab_size, progress)
    if vocab_size != "auto" and tokenizer.n_vocab > vocab_size:
        raise DataError(f"data.tokenizer: expected at most model.vocab_size {vocab_size} ids, got {tokenizer.n_vocab}")
    train: list[tuple[TokenShards, float]] = []
    val: list[TokenShards] = []
    unstreamed = replace(cfg, streaming=False)  # validation text is small
    if text.val:
        val.append(_shards(Reader(unstreamed, text.val, lambda digest: "val"), ["val"], tokenizer, progress)["val"])
    for weight, inputs in text.groups:
        if cfg.streaming:
            if not text.val:  # at its head; the batches leave these documents out wherever they come
                reader = Reader(
                    cfg, inputs, lambda digest: "val" if text.split_of(digest) == "val" else None, limit=HEAD
                )
                val.append(_shards(reader, ["head", HEAD, *text.settings], tokenizer, progress)["val"])
            continue
        shards = _shards(Reader(cfg, inputs, text.split_of), text.settings, tokenizer, progress)
        if not len(shards["train"]):
            raise no_training_text(inputs, shards["train"].counts)
        train.append((shards["train"], weight))
        val += [] if text.val else [shards["val"]]
    if not any(map(len, val)):
        counts = describe_counts(val[0].counts)
        where = f"data.val: {describe_inputs(text.val)}" if text.val else f"data.val_fraction {cfg.val_fraction:g}"
        hint = "" if text.val else "; give data.val, a larger fraction or more documents"
        raise DataError(f"{where}: nothing to validate on ({counts}){hint}")
    return Prepared(tokenizer, train, [shards for shards in val if len(shards)])


def describe_inputs(inputs: list[Input]) -> str:
    return inputs[0].name + (f" and {len(inputs) - 1} more" if len(inputs) > 1 else "")


def describe_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts.items())) or "no documents"


def no_training_text(inputs: list[Input], counts: dict[str, int]) -> DataError:
    return DataError(f"data.train: {describe_inputs(inputs)}: nothing to train on ({describe_counts(counts)})")


def _tokenizer(cfg: DataConfig, text: Corpus, vocab_size: int, progress: bool) -> Tokenizer:
    """The named one; for `auto` a BPE trained on a sample of the training documents, once."""
    if cfg.tokenizer != "auto":
        return load_tokenizer(cfg.tokenizer)
    inputs = [identities(cfg, inputs) for _, inputs in text.groups]
    folder = Path(cfg.cache_dir) / "tokenizers" / short_hash([inputs, text.settings, SAMPLE, vocab_size])
    with lock(folder.with_suffix(".lock")):
        tokenizer = _load_trained(folder)
        if tokenizer is None:
            sample = [piece for _, group in text.groups for piece in _sample(cfg, group, text, len(text.groups))]
            if not sample:
                raise DataError(f"data.train: {describe_inputs(text.groups[0][1])}: nothing to train on")
            if progress:
                size = sum(map(len, sample))
                print(f"training a tokenizer of {vocab_size} ids on {size:,} characters", file=sys.stderr)
            trained = train_tokenizer(sample, vocab_size)
            building = folder.with_suffix(".building")
            trained.save(building)
            (building / "hash").write_text(trained.hash)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(building, folder)
            tokenizer = load_tokenizer(folder)
    return tokenizer


def _load_trained(folder: Path) -> Tokenizer | None:
    try:
        tokenizer = load_tokenizer(folder)
        return tokenizer if (folder / "hash").read_text() == tokenizer.hash else None
    except (DataError, OSError, ValueError):
        return None  # not there, or damaged


def _sample(cfg: DataConfig, inputs: list[Input], text: Corpus, groups: int) -> list[str]:
    """Training text from all over the inputs: this group's part of SAMPLE characters."""
    limit = SAMPLE / groups
    total = math.inf if any(item.path is None for item in inputs) else sum(item.path.stat().st_size for item in inputs)
    fraction = 1.0 if total == math.inf else min(1.0, limit / max(1, total))
    taken, read, sample = 0, 0, []
    for piece in Reader(cfg, inputs, text.split_of):
        read += len(piece.text)
        if piece.split == "train" and taken < fraction * read:
            sample.append(piece.text)
            taken += len(piece.text)
        if taken >= limit:
            break
    return sample
