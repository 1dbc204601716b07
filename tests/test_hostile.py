"""Folders from elsewhere whose files hold nonsense: one line, the right exit code, little time and memory."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

import infer
from nanoqwen.errors import UserError
from nanoqwen.tokenizer import load_tokenizer
from nanoqwen.weights import export

NONSENSE = ["abc", "", -3, 0, 1.5, 2**62, 10**400, True, None, [1], [], {}, {"a": 1}]
KEYS = {
    "config.json": "vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings head_dim "
    "rope_theta rms_norm_eps tie_word_embeddings model_type architectures rope_scaling rope_parameters eos_token_id "
    "layer_types",
    "generation_config.json": "eos_token_id bos_token_id pad_token_id",
    "tokenizer_config.json": "chat_template eos_token bos_token pad_token added_tokens_decoder tokenizer_class",
    "tokenizer.json": "model added_tokens pre_tokenizer decoder normalizer post_processor",
}
EDITS = [(file, key) for file, keys in KEYS.items() for key in keys.split()]
DEEP = '{"a":' + "[" * 200_000 + "]" * 200_000 + "}"
FILES = {
    "nested": DEEP.encode(),
    "a list": b"[]",
    "empty": b"",
    "binary": bytes(range(256)),
    "cut": b'{"a": ',
    "a number of 5,000 digits": b'{"vocab_size": ' + b"9" * 5_000 + b"}",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = load_tokenizer("bytes")
    folder = tmp_path_factory.mktemp("hostile") / "whole"
    export(tiny.model(vocab_size=tokenizer.n_vocab, lively=False), tokenizer, folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(folder: Path, file: str, **changes) -> None:
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))


def refusal(folder: Path) -> str | None:
    """Ask the model, by itself and in a chat: the refusal, one line, or None where it could be taken as it is."""
    for more in ((), ("--instruct",)):
        try:
            infer.main([f"--ckpt={folder}", "--prompt=hi", "--max_new_tokens=1", "--run.device=cpu", *more])
        except UserError as error:
            refused = error
            break
    else:
        return None
    said = str(refused)
    assert refused.exit_code in (2, 3, 4), said
    assert said.isprintable()
    assert len(said) < 2_000
    return said


@pytest.mark.parametrize(("file", "key"), EDITS)
def test_a_key_of_nonsense_is_refused_or_harmless(file: str, key: str, folder: Path):
    content = (folder / file).read_bytes()
    for value in NONSENSE:
        edit(folder, file, **{key: value})
        refusal(folder)
        (folder / file).write_bytes(content)


@pytest.mark.parametrize(("file", "content"), list(itertools.product(KEYS, FILES)))
def test_a_file_of_nonsense_is_refused(file: str, content: str, folder: Path):
    (folder / file).write_bytes(FILES[content])
    said = refusal(folder)
    assert said or content.startswith("a number")  # of a key that this file does not have
    if said:
        assert file in said


def header(entries: int) -> bytes:
    names = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(entries)}
    text = json.dumps(names).encode()
    return struct.pack("<Q", len(text)) + text


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a million layers": (lambda f: edit(f, "config.json", num_hidden_layers=10**6), "num_hidden_layers: expected int"),
    "a wide layer": (lambda f: edit(f, "config.json", hidden_size=2**39), "lm_head|embed_tokens|hidden_size|shape"),
    "a wide head": (lambda f: edit(f, "config.json", head_dim=2**62), "head_dim: expected int"),
    "a stretch without end": (
        lambda f: edit(f, "config.json", rope_scaling={"rope_type": "yarn", "factor": 1e308}),
        "factor: expected float",
    ),
    "an angle without end": (lambda f: edit(f, "config.json", rope_theta=10**400), "too large"),
    "many empty tensors": (lambda f: (f / "model.safetensors").write_bytes(header(100_000)), "and 99,980 more"),
    "a header without end": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "model.safetensors",
    ),
    "a template that is a number": (lambda f: edit(f, "tokenizer_config.json", chat_template=5), "chat_template"),
    "an index that leads elsewhere": (
        lambda f: (
            (f / "model.safetensors").rename(f / "x"),
            (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../../etc/passwd"}}'),
        ),
        "weight_map: expected names of files in the same folder",
    ),
    "an index of numbers": (
        lambda f: (
            (f / "model.safetensors").rename(f / "x"),
            (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}'),
        ),
        "model.safetensors.index.json",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_refused(case: str, folder: Path):
    harm, expected = HOSTILE[case]
    harm(folder)
    assert any(words in refusal(folder) for words in expected.split("|"))
