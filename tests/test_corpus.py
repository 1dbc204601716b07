"""Text to tokens: sources and their faults, the split, shards that survive kills and bit flips."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import EOS, ROOT, VOCAB, all_documents, documents, jsonl, texts, tokens, write_as

from data import PretrainBatches
from nanoqwen import corpus
from nanoqwen.config import DataConfig
from nanoqwen.corpus import Prepared, TokenShards, prepare
from nanoqwen.errors import DataError, DiskError
from nanoqwen.tokenizer import load_tokenizer, train_tokenizer

# --- D01, D02: documents and their ends -----------------------------------------------------------------------------


def test_d01_every_document_ends_in_exactly_one_eos_and_empty_ones_are_counted(build, tmp_path):
    """A document that ends in the text of the EOS token, as scraped corpora do, once got two EOS, or none."""
    rows = [*texts(50), "ends in <|endoftext|>", "<|endoftext|>", "", "  \n\t", "\u3000", "no final newline", "x\n"]
    jsonl(tmp_path / "a.jsonl", rows)
    prepared = build("a.jsonl")
    assert sorted(all_documents(prepared)) == sorted(row for row in rows if row.strip())
    train = prepared.train[0][0]
    assert train.counts["empty"] == 3
    assert train.n_documents == train.counts["train"] == tokens(train).count(EOS)
    assert train.eos_id == EOS
    assert train.tokenizer_hash == prepared.tokenizer.hash


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py"])
def test_a_text_file_is_one_document(build, tmp_path, name):
    for i, text in enumerate(texts(30)):
        (tmp_path / "docs" / str(i)).mkdir(parents=True)
        (tmp_path / "docs" / str(i) / name).write_bytes(text.encode())
    assert sorted(all_documents(build("docs"))) == sorted(texts(30))
    assert sorted(all_documents(build(f"docs/**/{name[:1]}.*"))) == sorted(texts(30))


def test_a_large_file_is_cut_for_the_tokenizer_but_stays_one_document(build, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 64)
    long = "".join(f"line {i} é\n" for i in range(200)) + "x" * 300 + "€" * 100
    (tmp_path / "long.txt").write_bytes(long.encode())
    jsonl(tmp_path / "val.jsonl", ["other"])
    found = build("long.txt", val=(str(tmp_path / "val.jsonl"),))
    assert documents(found.train[0][0]) == [long]
    assert documents(found.val[0]) == ["other"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_kind_of_file_gives_the_same_tokens(build, tmp_path, suffix):
    rows = texts(100)
    write_as(tmp_path / f"a{suffix}", rows)
    found = build(f"a{suffix}")
    train = set(documents(found.train[0][0]))
    assert documents(found.train[0][0]) == [row for row in rows if row in train]  # in the order of the file
    assert documents(found.val[0]) == [row for row in rows if row not in train]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_reader_goes_on_behind_any_row(tmp_path, suffix):
    rows = texts(40)
    write_as(tmp_path / f"a{suffix}", rows[:25])
    write_as(tmp_path / f"b{suffix}", rows[25:])
    cfg = DataConfig(train=(str(tmp_path),))
    inputs = corpus.expand(cfg.train, "data.train")
    pieces = list(corpus.Reader(cfg, inputs, lambda digest: "train"))
    assert [piece.text for piece in pieces] == rows
    if suffix == ".jsonl":  # knows the byte, so that what was read is not read again
        lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
        assert pieces[7].cursor == [0, 8, sum(map(len, lines[:8]))]
    for at in (0, 16, 17, 24, 25, 38, 39):
        again = corpus.Reader(cfg, inputs, lambda digest: "train", pieces[at].cursor)
        assert [piece.text for piece in again] == rows[at + 1 :]


# --- D03, E8: the width of ids ----------------------------------------------------------------------------------------


def test_d03_the_header_says_what_the_tokens_are(build, tmp_path):
    jsonl(tmp_path / "a.jsonl", texts(50))
    shards = build("a.jsonl").train[0][0]
    content = shards.path.read_bytes()
    assert content.startswith(corpus.MAGIC)
    assert content[16:80].decode() == hashlib.sha256(content[80:]).hexdigest() == shards.fingerprint
    header = json.loads(content[80 : corpus.HEADER])
    assert header["dtype"] == "<u2"
    assert header["vocab"] == 259
    assert header["eos_id"] == EOS
    assert header["tokenizer_hash"] == load_tokenizer("bytes").hash


class Wide:
    """A tokenizer with 70,000 ids, of which each character is one."""

    n_vocab, eos_id, hash, name = 70_000, 69_999, "wide", "wide"

    def encode_array(self, text: str) -> np.ndarray:
        return np.array([69_998 if letter == "!" else ord(letter) for letter in text], np.uint32)


def test_e8_ids_above_65535_round_trip(build, tmp_path, monkeypatch):
    """uint16 shards of a large vocabulary wrapped silently: id 65,537 was read as 1."""
    monkeypatch.setattr(corpus, "load_tokenizer", lambda name: Wide())
    jsonl(tmp_path / "a.jsonl", [text + "!" for text in texts(50)])
    cfg = DataConfig("wide", (str(tmp_path / "a.jsonl"),), val_fraction=0.2, cache_dir=str(tmp_path / "cache"))
    shards = prepare(cfg, 70_000, progress=False).train[0][0]
    found = tokens(shards)
    assert shards.dtype == np.uint32
    assert found.count(69_998) == found.count(69_999) == shards.n_documents > 20
    assert PretrainBatches([(shards, 1.0)], 8, 64, seed=0)(0).tokens.max() == 69_999


def test_a_shard_that_shrinks_in_use_is_an_error_and_not_the_end_of_the_process(build, tmp_path):
    """Under a memory map it was SIGBUS, and the run stayed `running`."""
    jsonl(tmp_path / "a.jsonl", texts(400))
    shards = build("a.jsonl").train[0][0]
    whole = shards.window(0, len(shards))
    os.truncate(shards.path, corpus.HEADER + len(shards))  # of two bytes a token
    assert np.array_equal(shards.window(0, 64), whole[:64])
    with pytest.raises(DataError, match="is shorter than when it was opened"):
        shards.window(len(shards) - 64, 64)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_row_without_end_is_refused_before_it_is_read(name: str, build, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST_ROW", 1 << 20)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("short", "x" * (1 << 20), "short"))
    with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wt") as file:
        file.write(rows)
    with pytest.raises(DataError, match=rf"{name}:2: expected rows of at most 1 MiB, got a longer one"):
        build(name)


@pytest.mark.parametrize(("ids", "width"), [([65_536], "<u2"), ([1, 2**32], "<u4"), ([-1], "<u2"), ([2**62], "<u4")])
def test_d03_an_id_that_does_not_fit_is_refused(ids, width):
    with pytest.raises(DataError, match="token id"):
        corpus._narrowed(np.array(ids), np.dtype(width))


@pytest.mark.parametrize("ids", [[], [0, 65_535]])
def test_the_largest_ids_fit(ids):
    for width in ("<u2", "<u4"):
        assert corpus._narrowed(np.array(ids, np.uint32), np.dtype(width)).tolist() == ids
    assert corpus._narrowed(np.array([2**32 - 1]), np.dtype("<u4")).tolist() == [2**32 - 1]


def test_a_vocabulary_larger_than_the_models_is_refused(build, tmp_path):
    jsonl(tmp_path / "a.jsonl", texts(50))
    cfg = DataConfig("bytes", (str(tmp_path / "a.jsonl"),), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"at most model\.vocab_size 258 ids, got 259"):
        prepare(cfg, 258, progress=False)


# --- D04: train and validation ----------------------------------------------------------------------------------------


def test_d04_a_document_and_its_near_duplicates_are_on_one_side(build, tmp_path):
    """A split by position puts copies of a page on both sides, and the validation loss looks better than it is."""
    rows = texts(200)
    twins = [row.upper().replace(" ", "  ") for row in rows] + rows
    random.Random(1).shuffle(twins)
    jsonl(tmp_path / "a.jsonl", rows + twins)
    found = build("a.jsonl")
    sides = [{"".join(text.lower().split()) for text in documents(s)} for s in (found.train[0][0], found.val[0])]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 200
    assert 0.1 < len(sides[1]) / 200 < 0.3


def test_d04_the_split_of_a_document_does_not_depend_on_the_others(build, tmp_path):
    rows = texts(200)
    jsonl(tmp_path / "a.jsonl", rows)
    jsonl(tmp_path / "b.jsonl", texts(50, seed=1) + rows[::-1])
    one, two = build("a.jsonl"), build("b.jsonl")
    assert set(documents(one.val[0])) <= set(documents(two.val[0]))
    assert set(documents(one.train[0][0])) <= set(documents(two.train[0][0]))


# --- E2, D08: nothing to train on -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "data.train: .*a.jsonl: nothing to train on \\(no documents\\)"),
        (b'{"text": ""}\n{"text": " "}\n\n', "data.train: .*a.jsonl: nothing to train on \\(2 empty\\)"),
        (b'{"text": "some text"}\n', "data.val_fraction 0.2: nothing to validate on \\(1 train\\); give data.val"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "auto"])
def test_e2_nothing_to_train_or_validate_on(build, tmp_path, content, said, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=said if tokenizer == "bytes" else "nothing to (train|validate) on"):
        build("a.jsonl", tokenizer=tokenizer)


def test_e2_an_empty_validation_file_is_named(build, tmp_path):
    jsonl(tmp_path / "a.jsonl", texts(5))
    jsonl(tmp_path / "val.jsonl", [""])
    with pytest.raises(DataError, match=r"data.val: .*val.jsonl: nothing to validate on \(1 empty\)"):
        build("a.jsonl", val=(str(tmp_path / "val.jsonl"),))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing.txt", "data.train: .*missing.txt: no such file or folder"),
        ("*.txt", "no such file or folder"),
        ("empty", "expected files of kind .txt, .md, .py, .jsonl, .* found none"),
        ("a.csv", "a.csv: expected a file of kind"),
    ],
)
def test_d08_a_source_that_is_not_there_is_an_error_and_never_replaced(build, tmp_path, source, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=said):
        build(source)


@pytest.mark.parametrize("source", ["somebody/something", "hf:wikitext:wikitext-2-raw-v1", "hf:somebody/something"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore")  # of the libraries behind `datasets`
def test_d08_a_hub_data_set_without_network_is_one_clear_line(tmp_path, source, streaming):
    cfg = DataConfig("bytes", (source,), streaming=streaming, cache_dir=str(tmp_path))
    with pytest.raises(DataError, match=f"hf:{source.removeprefix('hf:')}: cannot be loaded, split 'train'") as error:
        prepare(cfg, VOCAB, progress=False)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 3


# --- E1, E4: rows and encodings ---------------------------------------------------------------------------------------


BAD_ROWS = {
    "not JSON": (b"{text: 1}", "invalid JSON"),
    "single quotes": (b"{'text': 'a'}", "invalid JSON"),
    "plain text": (b"hello", "invalid JSON"),
    "trailing comma": (b'{"text": "a",}', "invalid JSON"),
    "half a line": (b'{"text": "ab', "invalid JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "invalid JSON"),
    "raw newline escape": (b'{"text": "a\tb"}', "invalid JSON"),
    "raw NUL": (b'{"text": "a\x00b"}', "invalid JSON"),
    "array": (b'["text"]', "expected a JSON object, got an array"),
    "number": (b"5", "expected a JSON object, got a number"),
    "string": (b'"text"', "expected a JSON object, got text"),
    "null": (b"null", "expected a JSON object, got null"),
    "null text": (b'{"text": null}', "text: expected text, got null"),
    "number as text": (b'{"text": 5}', "text: expected text, got a number"),
    "boolean as text": (b'{"text": true}', "text: expected text, got a boolean"),
    "list as text": (b'{"text": ["a"]}', "text: expected text, got an array"),
    "nested": (b'{"text": {"text": "a"}}', "text: expected text, got an object"),
    "missing key": (b'{"Text": "a"}', "expected a key 'text', got 'Text'"),
    "no key": (b"{}", "expected a key 'text', got none"),
    "key twice": (b'{"text": "a", "text": "b"}', "key 'text' comes twice"),
    "NaN": (b'{"text": "a", "score": NaN}', "got NaN, which is not JSON"),
    "Infinity": (b'{"text": "a", "score": -Infinity}', "got -Infinity, which is not JSON"),
    "5,000 digits": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "4300"),
    "200 k brackets": (b'{"text": ' + b"[" * 200_000, "nested too deep"),
    "Latin-1": (b'{"text": "\xe9t\xe9"}', "expected UTF-8 text, got byte 0xe9"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "expected UTF-8 text, got byte 0xff"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_e1_a_malformed_row_is_named_by_file_and_line_or_counted(build, tmp_path, kind):
    bad, said = BAD_ROWS[kind]
    good = [json.dumps({"text": text}).encode() for text in texts(40)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good[:20], bad, *good[20:]]))
    with pytest.raises(DataError) as error:
        build("a.jsonl")
    assert str(error.value).startswith(f"{tmp_path}/a.jsonl:21: ")
    assert said in str(error.value)
    assert len(str(error.value)) < 500
    found = build("a.jsonl", on_error="skip")
    assert sorted(all_documents(found)) == sorted(texts(40))
    assert found.train[0][0].counts["malformed"] == 1


def test_e1_half_a_line_at_the_end(build, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", texts(40))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"a.jsonl:40: expected a JSON object, got invalid JSON"):
        build("a.jsonl")
    assert len(all_documents(build("a.jsonl", on_error="skip"))) == 39


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("harm", ["cut", "other"])
def test_e1_a_damaged_file_is_named(build, tmp_path, suffix, harm):
    path = tmp_path / f"a{suffix}"
    write_as(path, texts(400))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if harm == "cut" else b"this is something else\n")
    with pytest.raises(DataError, match=rf"a{suffix}:[0-9]+: "):
        build(path.name)
    (tmp_path / "good.jsonl").write_bytes(jsonl(tmp_path / "b.jsonl", texts(30)).read_bytes())
    assert build(path.name, "good.jsonl", on_error="skip").train[0][0].counts["malformed"] == 1


@pytest.mark.parametrize("rows", [{"other": ["a"]}, {"text": [None, "a"]}, {"text": [1, 2]}])
def test_e1_parquet_rows_are_checked_like_json(build, tmp_path, rows):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet:1: .*(expected a column 'text', got other|text: expected text)"):
        build("a.parquet")


ENCODINGS = {
    "CRLF": (b'{"text": "a\\r\\nb"}\r\n{"text": "c"}\r\n', ["a\r\nb", "c"]),
    "lone CR between tokens": (b'{"text":\r"a"}\n{"text": "b\\rc"}\n', ["a", "b\rc"]),
    "BOM": (b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
    "NUL escaped": (b'{"text": "a\\u0000b"}\n', ["a\0b"]),
    "U+2028 raw": ('{"text": "a\u2028b\u2029c\x85d"}\n'.encode(), ["a\u2028b\u2029c\x85d"]),
    "U+2028 escaped": (b'{"text": "a\\u2028b"}\n', ["a\u2028b"]),
    "lone surrogate": (b'{"text": "a\\ud800b"}\n', ["a\ufffdb"]),
    "surrogate pair": (b'{"text": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
    "no final newline": (b'{"text": "a"}\n{"text": "b"}', ["a", "b"]),
    "blank lines": (b'\n{"text": "a"}\n  \n\n{"text": "b"}\n\n', ["a", "b"]),
    "ZWJ and combining": ('{"text": "👩\u200d💻 e\u0301 \u0301"}\n'.encode(), ["👩\u200d💻 e\u0301 \u0301"]),
    "form feed": (b'{"text": "a\\fb\\u001c"}\n', ["a\fb\x1c"]),
}


@pytest.mark.parametrize("kind", ENCODINGS)
def test_e4_encodings(build, tmp_path, kind):
    content, expected = ENCODINGS[kind]
    (tmp_path / "a.jsonl").write_bytes(content)
    jsonl(tmp_path / "val.jsonl", ["validation"])
    found = build("a.jsonl", val=(str(tmp_path / "val.jsonl"),))
    assert documents(found.train[0][0]) == expected


TEXTS = {
    "CRLF": (b"a\r\nb\r\n", "a\r\nb\r\n"),
    "BOM": (b"\xef\xbb\xbfa", "a"),
    "NUL": (b"a\0b", "a\0b"),
    "U+2028": ("a\u2028b".encode(), "a\u2028b"),
    "CR": (b"a\rb", "a\rb"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_e4_text_files_are_taken_as_they_are(build, tmp_path, kind):
    content, expected = TEXTS[kind]
    (tmp_path / "a.txt").write_bytes(content)
    jsonl(tmp_path / "val.jsonl", ["validation"])
    assert documents(build("a.txt", val=(str(tmp_path / "val.jsonl"),)).train[0][0]) == [expected]


@pytest.mark.parametrize("piece", [4, 1 << 22])
def test_e4_text_that_is_not_utf8_is_named_by_line(build, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(corpus, "PIECE", piece)
    (tmp_path / "a.txt").write_bytes("éa\nb\n".encode() + b"caf\xe9\nd\n")
    with pytest.raises(DataError, match=r"a\.txt:3: expected UTF-8 text, got byte 0xe9"):
        build("a.txt")
    (tmp_path / "a.txt").write_bytes("a\nb\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.txt:1: expected UTF-8 text, got byte 0xf[ef] \(UTF-16\?\)"):
        build("a.txt")


def test_the_standard_librarys_odd_files_are_counted(build, tmp_path, monkeypatch):
    files = []
    for i, text in enumerate([*texts(40), ""]):
        files.append(tmp_path / f"{i}.py")
        files[-1].write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    monkeypatch.setattr(corpus, "python_files", lambda: [*files, tmp_path / "latin.py"])
    found = build("builtin:python")
    assert found.train[0][0].counts["unreadable"] == 1
    assert found.train[0][0].counts["empty"] == 1
    assert len(all_documents(found)) == 40


def test_the_builtin_corpus_is_the_standard_library():
    files = corpus.python_files()
    assert len(files) > 500
    assert any(path.name == "argparse.py" for path in files)
    assert not any("site-packages" in str(path) for path in files)


# --- E7, D05: the cache -----------------------------------------------------------------------------------------------


def stamps(prepared: Prepared) -> list[int]:
    return [shards.path.stat().st_ino for shards in (prepared.train[0][0], prepared.val[0])]


def test_e7_the_same_again_is_reused_and_anything_else_is_built(build, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", texts(60))
    first = build("a.jsonl")
    assert stamps(build("a.jsonl")) == stamps(first)
    assert stamps(build("a.jsonl", workers=1, isolate_documents=True)) == stamps(first)
    for changed in ({"val_fraction": 0.3}, {"on_error": "skip"}):
        assert stamps(build("a.jsonl", **changed)) != stamps(first)
    stat = path.stat()
    time.sleep(0.02)
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"X" + content[-3:])  # one byte; size and date as before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = build("a.jsonl")
    assert stamps(again) != stamps(first)
    assert any("X" in text for text in all_documents(again))
    assert again.train[0][0].fingerprint != first.train[0][0].fingerprint


def test_e7_another_tokenizer_is_another_cache(build, tmp_path):
    jsonl(tmp_path / "a.jsonl", texts(60))
    train_tokenizer(texts(60), 300).save(tmp_path / "bpe")
    found = [build("a.jsonl", tokenizer=name).train[0][0] for name in ("bytes", str(tmp_path / "bpe"), "auto")]
    assert len({shards.tokenizer_hash for shards in found}) == 3
    assert len({shards.fingerprint for shards in found}) == 3


def test_the_fingerprint_is_of_the_content_not_of_the_place(build, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "a.jsonl", texts(60))
    one, two = build("one"), build("two")
    assert one.train[0][0].path != two.train[0][0].path
    assert one.train[0][0].fingerprint == two.train[0][0].fingerprint


def test_e7_any_flipped_bit_is_found_by_verify(build, tmp_path):
    jsonl(tmp_path / "a.jsonl", texts(30))
    shards = build("a.jsonl").train[0][0]
    shards.verify()
    good = shards.path.read_bytes()
    rng = random.Random(0)
    places = [0, 17, 79, 80, 100, 300, corpus.HEADER - 1, corpus.HEADER, len(good) - 1]
    for at in [*places, *(rng.randrange(len(good)) for _ in range(60))]:
        bad = bytearray(good)
        bad[at] ^= 1 << rng.randrange(8)
        shards.path.write_bytes(bad)
        with pytest.raises(DataError):
            TokenShards(shards.path).verify()
    shards.path.write_bytes(bad)
    with pytest.raises(DataError, match=r"train\.bin: damaged, its SHA-256 .*; delete .* and run python data\.py"):
        shards.verify()


def test_e7_a_shard_without_a_header_or_of_another_size_is_built_again(build, tmp_path, capsys):
    jsonl(tmp_path / "a.jsonl", texts(30))
    path = build("a.jsonl").train[0][0].path
    good = path.read_bytes()
    no_json = good[: corpus.BODY] + b"?" + good[corpus.BODY + 1 :]
    for bad in (b"", good[:50], good[:-1], good + b"\0", good[: corpus.HEADER], b"x" + good[1:], no_json):
        path.write_bytes(bad)
        with pytest.raises(DataError):
            TokenShards(path)
        assert build("a.jsonl").train[0][0].path.read_bytes() == good
        assert "building it again" in capsys.readouterr().err


def test_e7_a_flipped_bit_in_the_trained_tokenizer_is_mended(build, tmp_path):
    jsonl(tmp_path / "a.jsonl", texts(60))
    first = build("a.jsonl", tokenizer="auto")
    path = Path(first.tokenizer.name) / "tokenizer.json"
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"a"', b'"\\u0062"', 1))
    assert build("a.jsonl", tokenizer="auto").tokenizer.hash == first.tokenizer.hash
    assert path.read_bytes() == good


KILLED = """
import json, os, sys
from nanoqwen import corpus
corpus.JOB, corpus.PART = 200, 1000
left = int(sys.argv[2])
def dying(path, content, write=corpus.write_atomic):
    global left
    write(path, content)
    left -= 1
    if left <= 0:
        os.kill(os.getpid(), 9)
corpus.write_atomic = dying
cfg = corpus.DataConfig("bytes", (sys.argv[1],), val_fraction=0.2, cache_dir=sys.argv[3], workers=2)
corpus.prepare(cfg, 4096, progress=False)
"""


def shard_bytes(cache: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(cache.glob("shards/*/*.bin")) if ".building" not in str(path)]


def test_d05_a_killed_preparation_goes_on_and_ends_byte_identical(build, tmp_path, monkeypatch):
    jsonl(tmp_path / "a.jsonl", texts(150))
    whole = build("a.jsonl")
    expected = shard_bytes(tmp_path / "cache")
    for parts in ("1", "3"):  # the second resumes behind the first, and is killed as well
        script = [sys.executable, "-c", KILLED, str(tmp_path / "a.jsonl"), parts, str(tmp_path / "killed")]
        done = subprocess.run(script, cwd=ROOT, check=False)
        assert done.returncode == -signal.SIGKILL
        assert not shard_bytes(tmp_path / "killed")  # nothing is there before all of it is
    paths = sorted((tmp_path / "killed").glob("shards/*.building/parts/*.part"))
    assert len(paths) == 4
    assert corpus._read_part(paths[-1].parent, 3, np.dtype("<u2")).cursor[1] > 20
    for path, at in ((paths[0], -5), (paths[-1], 80), (paths[1], 3)):  # what was damaged since is read anew
        copy = tmp_path / f"copy-{path.name}"
        shutil.copytree(tmp_path / "killed", copy)
        (damaged,) = copy.glob(f"shards/*.building/parts/{path.name}")
        content = bytearray(damaged.read_bytes())
        content[at] ^= 1
        damaged.write_bytes(content)
        build("a.jsonl", cache_dir=str(copy))
        assert shard_bytes(copy) == expected
    read = []
    document = corpus.Reader.items
    monkeypatch.setattr(corpus.Reader, "items", lambda self, *a: read.append(a) or document(self, *a))
    again = build("a.jsonl", cache_dir=str(tmp_path / "killed"))
    assert shard_bytes(tmp_path / "killed") == expected
    assert len(read) < 130  # the work of the parts was not done twice
    assert again.train[0][0].fingerprint == whole.train[0][0].fingerprint
    assert {path.name for path in again.train[0][0].path.parent.iterdir()} == {"train.bin", "val.bin"}
    assert not list((tmp_path / "killed").glob("shards/*.building"))


def test_e7_two_builders_at_once_end_with_one_result(tmp_path):
    jsonl(tmp_path / "a.jsonl", texts(300))
    code = KILLED.replace("left <= 0", "False")
    script = [sys.executable, "-c", code, str(tmp_path / "a.jsonl"), "9", str(tmp_path / "cache")]
    builders = [subprocess.Popen(script, cwd=ROOT) for _ in range(2)]
    assert [builder.wait(60) for builder in builders] == [0, 0]
    assert len(list((tmp_path / "cache").glob("shards/*/train.bin"))) == 1
    found = prepare(
        DataConfig("bytes", (str(tmp_path / "a.jsonl"),), val_fraction=0.2, cache_dir=str(tmp_path / "cache")),
        VOCAB,
        progress=False,
    )
    assert sorted(all_documents(found)) == sorted(texts(300))


def test_a_cache_that_cannot_be_written_is_one_line(build, tmp_path):
    jsonl(tmp_path / "a.jsonl", texts(5))
    with pytest.raises(DiskError, match=r"a\.jsonl.*: (File exists|Not a directory)"):
        build("a.jsonl", cache_dir=str(tmp_path / "a.jsonl"))


def test_e7_text_that_changes_while_it_is_read_is_refused(build, tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", texts(30))
    tokenise = corpus.tokenise

    def slow(*args):
        counts = tokenise(*args)
        path.write_bytes(path.read_bytes() + b"\n")
        return counts

    monkeypatch.setattr(corpus, "tokenise", slow)
    with pytest.raises(DataError, match="changed while being read"):
        build("a.jsonl")
    monkeypatch.setattr(corpus, "tokenise", tokenise)
    assert len(all_documents(build("a.jsonl"))) == 30


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_do_not_change_the_shards(build, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(corpus, "JOB", 100)
    jsonl(tmp_path / "a.jsonl", texts(200))
    found = build("a.jsonl", workers=workers, cache_dir=str(tmp_path / f"cache{workers}"))
    train = set(documents(found.train[0][0]))
    assert documents(found.train[0][0]) == [text for text in texts(200) if text in train]


def test_the_automatic_tokenizer_sees_training_text_alone_and_is_trained_once(build, tmp_path, monkeypatch):
    rows = texts(100)
    jsonl(tmp_path / "a.jsonl", rows)
    samples: list[list[str]] = []
    monkeypatch.setattr(corpus, "train_tokenizer", lambda s, size: samples.append(s) or train_tokenizer(s, size))
    first = build("a.jsonl", tokenizer="auto")
    second = build("a.jsonl", tokenizer="auto")
    assert len(samples) == 1
    assert first.tokenizer.hash == second.tokenizer.hash
    val = {first.tokenizer.decode(tokens(first.val[0]), skip_special=True)}
    assert 50 < len(samples[0]) < 100
    assert all(text not in samples[0] for text in rows if text in "".join(val))
    assert first.tokenizer.n_vocab <= VOCAB


def test_the_sample_for_the_tokenizer_is_bounded_and_from_all_over(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SAMPLE", 2000)
    jsonl(tmp_path / "a.jsonl", texts(500))
    cfg = DataConfig("auto", (str(tmp_path / "a.jsonl"),), cache_dir=str(tmp_path / "cache"))
    text = corpus.open_corpus(cfg)
    sample = corpus._sample(cfg, text.groups[0][1], text, 1)
    assert 1000 < sum(map(len, sample)) < 2300
    numbers = [int(row.split()[1]) for row in sample]
    assert min(numbers) < 50
    assert max(numbers) > 400


# --- E9: mixtures -----------------------------------------------------------------------------------------------------


def test_e9_weights_on_the_way_from_the_configuration(build, tmp_path):
    jsonl(tmp_path / "a.jsonl", texts(60))
    jsonl(tmp_path / "b.jsonl", texts(60, seed=1))
    found = build("a.jsonl=1", "b.jsonl=3")
    assert [weight for _, weight in found.train] == [1, 3]
    assert len(found.val) == 2
    one = build("a.jsonl", "b.jsonl")
    assert len(one.train) == 1
    assert one.train[0][0].n_documents == sum(shards.n_documents for shards, _ in found.train)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train": ("a=0",)}, "a weight above 0 and finite, got 'a=0'"),
        ({"train": ("a=-1",)}, "a weight above 0"),
        ({"train": ("a=nan",)}, "a weight above 0"),
        ({"train": ("a=inf",)}, "a weight above 0"),
        ({"train": ("a=1", "b")}, "a weight for each source or none"),
        ({"train": ()}, "at least one source"),
        ({"train": ("",)}, "expected sources"),
        ({"train": ("=1",)}, "expected sources"),
        ({"train": tuple(f"{i}=1" for i in range(33))}, "at most 32 weighted sources"),
        ({"val": ("a=1",)}, "val: expected sources without weights"),
        ({"val_fraction": 0.0}, "val_fraction"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"workers": -1}, "workers"),
    ],
)
def test_e9_what_a_configuration_may_not_say(options, said):
    with pytest.raises(ValueError, match=said):
        DataConfig(**options)


def test_the_grammar_of_weights():
    assert corpus.split_weight("a.txt") == ("a.txt", None)
    assert corpus.split_weight("a=3/b.txt") == ("a=3/b.txt", None)
    assert corpus.split_weight("a=3=0.5") == ("a=3", 0.5)
    assert corpus.split_weight("hf:a/b:c=2e-1") == ("hf:a/b:c", 0.2)


# --- D06, D07: streams ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of the libraries behind `datasets`
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_local_folder_through_datasets(build, tmp_path, quiet_datasets, suffix):
    (tmp_path / "docs").mkdir()
    write_as(tmp_path / "docs" / f"a.{suffix}", texts(60))
    assert all_documents(build(f"hf:{tmp_path}/docs")) == all_documents(build("docs"))
    with pytest.raises(DataError, match="cannot be loaded, split 'nothing'"):
        build(f"hf:{tmp_path}/docs", split="nothing")
    with pytest.raises(DataError, match=r"hf:.*docs:1: expected a key 'body', got 'text'|'id', 'text'"):
        build(f"hf:{tmp_path}/docs", text_key="body")


# --- command line -----------------------------------------------------------------------------------------------------


PREPARE = """
import resource, sys
from nanoqwen.corpus import prepare
from nanoqwen.config import DataConfig
found = prepare(DataConfig("bytes", (sys.argv[1],), cache_dir=sys.argv[2]), 4096, progress=False)
print(len(found.train[0][0]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_memory_does_not_grow_with_the_text(tmp_path, name):
    """1 GB in one document, or in 4,000: less than 1 GB of memory, torch and all."""
    piece = "".join(path.read_text("utf-8", "replace") for path in corpus.python_files()[:40])[:250_000]
    with open(tmp_path / name, "w", encoding="utf-8") as file:
        for number in range(4000):
            file.write(json.dumps({"text": f"{number} {piece}"}) + "\n" if name == "a.jsonl" else f"{number}\n{piece}")
    jsonl(tmp_path / "val.jsonl", texts(50))
    source = str(tmp_path / name)
    code = PREPARE if name == "a.jsonl" else PREPARE.replace("cache_dir", f"val=('{tmp_path}/val.jsonl',), cache_dir")
    done = subprocess.run([sys.executable, "-c", code, source, str(tmp_path / "cache")], cwd=ROOT, capture_output=True)
    count, peak = map(int, done.stdout.split())
    assert count > 9e8
    assert peak < 1e9


@pytest.mark.slow
def test_the_whole_standard_library(tmp_path):
    start = time.monotonic()
    prepared = prepare(DataConfig(cache_dir=str(tmp_path)), 4096, progress=False)
    assert time.monotonic() - start < 60
    train = prepared.train[0][0]
    assert len(train) > 1_000_000
    assert prepared.tokenizer.n_vocab == 4096
    start = time.monotonic()
    prepare(DataConfig(cache_dir=str(tmp_path)), 4096, progress=False)
    assert time.monotonic() - start < 5


def names(*sources: str) -> list[str]:
    return [item.name for item in corpus.expand(sources, "data.train")]


def test_a_real_file_is_read_once_by_whichever_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A glob through a circle of links once read 31 files 41 times."""
    monkeypatch.chdir(tmp_path)
    Path("notes/deep").mkdir(parents=True)
    for name in ("notes/a.txt", "notes/deep/b.txt"):
        Path(name).write_text(name)
    Path("notes/deep/circle").symlink_to("..")
    Path("notes/c.txt").symlink_to("a.txt")
    assert names("notes/**/*.txt") == ["notes/a.txt", "notes/deep/b.txt"]
    assert names("notes", "notes/a.txt", "./notes/a.txt") == ["notes/a.txt", "notes/deep/b.txt"]


@pytest.mark.parametrize("source", ["notes", "notes/**/*", "*/**/*.jsonl"])
def test_what_a_run_writes_is_no_text(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the run's folder below the text, a resume once found other data than the run had begun with."""
    monkeypatch.chdir(tmp_path)
    Path("notes/run/checkpoints/step-00000001").mkdir(parents=True)
    for name in ("rows.jsonl", "run/metrics.jsonl", "run/config.yaml", "run/status.json"):
        Path("notes", name).write_text("{}")
    Path("notes/run/checkpoints/step-00000001/merges.txt").write_text("a b")
    assert names(source) == ["notes/rows.jsonl"]
    assert names("notes/run/metrics.jsonl") == ["notes/run/metrics.jsonl"]  # named, it is meant
