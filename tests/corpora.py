"""Small corpora for the tests, and shards read back."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from pathlib import Path

import numpy as np

from nanoqwen import corpus
from nanoqwen.config import DataConfig
from nanoqwen.corpus import Prepared, TokenShards
from nanoqwen.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
EOS = 256  # of the tokenizer `bytes`


VOCAB = 4096


def texts(count: int, size: int = 40, seed: int = 0) -> list[str]:
    """Different documents of about `size` characters."""
    rng = random.Random(seed)
    return [
        f"{seed} {i} " + "".join(rng.choices("abcdefgh \n", k=rng.randint(1, 2 * size))) + "." for i in range(count)
    ]


def jsonl(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
    return path


def tokens(shards: TokenShards) -> list[int]:
    return shards.window(0, len(shards)).tolist()


def documents(shards: TokenShards) -> list[str]:
    """The texts of a shard, by its document index."""
    starts = [0, *shards.document_ends().tolist()]
    parts = [shards.window(a, b - a).tolist() for a, b in itertools.pairwise(starts)]
    assert all(part[-1] == EOS and EOS not in part[:-1] for part in parts)
    return [bytes(part[:-1]).decode() for part in parts]


def all_documents(prepared: Prepared) -> list[str]:
    return [text for shards, _ in prepared.train for text in documents(shards)] + [
        text for shards in prepared.val for text in documents(shards)
    ]


def made(path: Path, ids: list[int], tokenizer: str = "bytes") -> TokenShards:
    """A shard of given tokens."""
    path.write_bytes(bytes(corpus.HEADER) + np.array(ids, "<u2").tobytes())
    corpus._finish(path, load_tokenizer(tokenizer), "train", {"train": ids.count(EOS)})
    return TokenShards(path)


def write_as(path: Path, rows: list[str]) -> None:
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines[:500]) + gzip.compress(lines[500:]))  # two members, as `cat` makes them
    elif path.name.endswith(".zst"):
        import pyarrow

        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines)
    elif path.name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.table({"id": list(range(len(rows))), "text": rows})
        parquet.write_table(table, path, row_group_size=17)
    else:
        path.write_bytes(lines)


def stream_config(folder: Path, *sources: str, **options: object) -> DataConfig:
    options = {"val_fraction": 0.2, "cache_dir": str(folder / "stream-cache")} | options
    names = tuple(name if name.startswith("hf:") else str(folder / name) for name in sources)
    return DataConfig("bytes", names, streaming=True, **options)


def split_at_eos(ids: list[int]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == EOS:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts
