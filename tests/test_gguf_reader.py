"""GGUF files in, against transformers, which reads the same files, and against the gguf package."""

from __future__ import annotations

import itertools
import json
import random
import resource
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import tokenizers
import torch
import transformers

import train
from model import generate
from nanoqwen.errors import CheckpointError, DataError, exit_code_of
from nanoqwen.gguf import write_gguf
from nanoqwen.gguf_reader import KINDS, merges_by_score, read_gguf, read_tensor
from nanoqwen.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from nanoqwen.weights import export, hash_weights, load_model

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TEXTS = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("t*.py"))]
KINDS_OF_MODEL = ["qwen2", "qwen2-untied", "wide-heads", "qwen3", "llama", "llama3", "yarn", "linear"]
IDS = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(3))
LETTERS = "abcdeABC 0123  \n\t.,'!?_-()äöüπЖ中日🙂"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 320)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, Path]:
    """Each with the same model as a folder and as model.gguf; rows are multiples of 32."""
    root = tmp_path_factory.mktemp("gguf")
    for kind in KINDS_OF_MODEL:
        model = tiny.model(kind, vocab_size=324, hidden_size=64, intermediate_size=96, max_position_embeddings=128)
        export(model, tokenizer, root / kind)
        write_gguf(root / kind, root / kind / "model.gguf", torch.float32)
    return {kind: root / kind for kind in KINDS_OF_MODEL}


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(LETTERS, k=draw.randrange(1, 60))) for _ in range(count)]


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_a_file_is_the_folder_that_it_was_made_from(kind: str, folders: dict[str, Path]):
    expected, tokenizer = load_model(folders[kind])
    got, its = load_model(folders[kind] / "model.gguf")
    state = got.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    assert state.keys() == expected.state_dict().keys()
    with torch.no_grad():
        a, b = got(IDS).logits, expected(IDS).logits
    assert (a - b).abs().max() <= 1e-6 * b.abs().max()  # the rope settings too
    assert (its.special, its.eos_id, its.prefix) == (tokenizer.special, tokenizer.eos_id, tokenizer.prefix)
    assert (its.chat_template, its.stop_ids) == (tokenizer.chat_template, tokenizer.stop_ids)
    assert hash_weights(folders[kind] / "model.gguf") == hash_weights(folders[kind])


def requantised(file: Path, out: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """The same file with its matrices in another type, by the gguf package."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        as_it_is = len(tensor.shape) == 1
        data = tensor.data if as_it_is else gguf.quantize(tensor.data, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=None if as_it_is else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "F16"),
        ("qwen2", "BF16"),
        ("llama", "Q8_0"),
        ("qwen2-untied", "Q4_0"),
        ("qwen2", "Q4_1"),
        ("llama", "Q5_0"),
        ("qwen2", "Q5_1"),
    ],
)
def test_quantised_weights_are_those_of_transformers(kind: str, name: str, folders: dict[str, Path], tmp_path: Path):
    file = requantised(folders[kind] / "model.gguf", tmp_path / "q.gguf", gguf.GGMLQuantizationType[name])
    config = transformers.AutoConfig.from_pretrained(folders[kind])
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path, gguf_file=file.name, config=config, dtype=torch.float32).eval()
    ours, _ = load_model(file, dtype=torch.float32)
    with torch.no_grad():
        expected, got = theirs(IDS).logits, ours(IDS).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    prompt = IDS[:1, :8]
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    row = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, **greedy)
    assert generate(ours, prompt.tolist(), temperature=0.0, max_new_tokens=64) == row.tolist()


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_decoded_as_transformers_decodes_them(name: str, tmp_path: Path, monkeypatch):
    """Nothing here writes them: any bytes are a tensor."""
    from transformers.integrations.gguf import dequant

    kind = gguf.GGMLQuantizationType[name]
    block = next(stored for stored in KINDS.values() if stored.name == name)
    data = np.random.default_rng(0).integers(0, 60, (5, 3 * block.size), np.uint8)  # no scale is infinite
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("x", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr("nanoqwen.gguf_reader.CHUNK_BYTES", 2 * 3 * block.size)  # two rows at a time
    got = read_tensor(tmp_path / "k.gguf", read_gguf(tmp_path / "k.gguf").tensors["x"])
    assert got.shape == (5, 768)
    expected = dequant.dequantize(torch.from_numpy(data), int(kind), torch.float32)
    assert torch.allclose(got, expected.view(5, 768), rtol=1e-6)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def written(file: Path, **values: object) -> Path:
    """A file with a tokenizer, and nothing else that a tokenizer needs."""
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in values.items():
        if name == "chat_template":
            writer.add_chat_template(value)
        elif isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{name}", value)
        else:
            kind = {bool: "bool", int: "uint32", str: "string"}[type(value)]
            getattr(writer, f"add_{kind}")(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def vocabulary(tokenizer: Tokenizer, folder: Path) -> dict[str, object]:
    """Tokens and merges of a byte-level tokenizer, as a GGUF file lists them."""
    tokenizer.save(folder)
    file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocab = file.get_vocab()
    texts = sorted(vocab, key=vocab.__getitem__)
    types = [3 if text in tokenizer.special else 1 for text in texts]
    merges = [" ".join(pair) for pair in json.loads(file.to_str())["model"]["merges"]]
    return {"model": "gpt2", "tokens": texts, "token_type": types, "merges": merges, "eos_token_id": tokenizer.eos_id}


@pytest.mark.parametrize("pre", ["gpt-2", "default", "qwen2", "llama-bpe", "smollm"])
def test_ids_are_those_of_the_library_with_the_named_split(pre: str, tokenizer: Tokenizer, tmp_path: Path):
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as THEIR_SPLITS

    values = vocabulary(tokenizer, tmp_path)
    ours = load_tokenizer(written(tmp_path / "t.gguf", pre=pre, **values))
    merges = [tuple(merge.split(" ")) for merge in values["merges"]]
    oracle = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(values["tokens"])}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in THEIR_SPLITS)
    steps = [pre_tokenizers.Split(Regex(THEIR_SPLITS[pre]), "isolated")] if pre in THEIR_SPLITS else []
    steps += [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    oracle.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    oracle.normalizer = normalizers.NFC() if pre == "qwen2" else None
    oracle.decoder = decoders.ByteLevel()
    for text in random_texts(500):
        assert ours.encode(text) == (ids := oracle.encode(text, add_special_tokens=False).ids), text
        assert ours.decode(ids) == oracle.decode(ids)
    ours.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").hash == ours.hash
    assert not set(ours.encode("<|im_start|>a<|endoftext|>")) & set(ours.special.values())


SENTENCES = ["the cat", " a cat sat", "the  the", "cats\nat é 中🙂", "", "   ", "<s>at</s>", "\u2581a"]


def pieces() -> tuple[list[str], list[float], list[int]]:
    """A SentencePiece vocabulary: control tokens, bytes, letters, and longer pieces with scores out of order."""
    longer = ["▁t", "he", "▁the", "at", "▁c", "▁cat", "cat", "▁a", "▁▁", "sat", "▁s", "ts", "the", "s▁"]
    letters = sorted({letter for piece in longer for letter in piece} | set("an"))
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *longer]
    ranks = random.Random(4).sample(range(len(longer)), len(longer))
    scores = [0.0] * 259 + [-1000.0 - i for i in range(len(letters))] + [-float(rank) for rank in ranks]
    return texts, scores, [2, 3, 3, *[6] * 256, *[1] * (len(letters) + len(longer))]


def sentencepiece_ids(text: str) -> list[int]:
    """The rule itself: the neighbours whose join has the best score, the leftmost of equals, until there are none."""
    texts, scores, types = pieces()
    known = {piece: i for i, piece in enumerate(texts) if types[i] == 1}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joins = [(-scores[known[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts))
                 if a + b in known]  # fmt: skip
        if not joins:
            break
        at = min(joins)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    fallback = {part: [3 + byte for byte in part.encode()] for part in parts if part not in known}
    return [i for part in parts for i in fallback.get(part) or [known[part]]]


def test_sentencepiece_joins_the_best_score_first(tmp_path: Path):
    texts, scores, types = pieces()
    values = {"model": "llama", "tokens": texts, "scores": scores, "token_type": types}
    file = written(tmp_path / "t.gguf", **values, bos_token_id=1, eos_token_id=2, chat_template="{{ messages }}")
    ours = load_tokenizer(file)
    draw = random.Random(0)
    random_pieces = ["".join(draw.choices(["the", " ", "cat", "s", "a", "é", "t", "he"], k=9)) for _ in range(300)]
    for text in SENTENCES + random_pieces:
        assert ours.encode(text) == sentencepiece_ids(text), text
        assert ours.decode(ours.encode(text)) == text.replace("\u2581", " ")
    assert (ours.prefix, ours.bos_id, ours.eos_id, ours.special) == ((1,), 1, 2, {"<unk>": 0, "<s>": 1, "</s>": 2})
    assert ours.chat_template == "{{ messages }}"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in [text for text in random_pieces if not text.startswith(" ")]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
    ends = {"eos_token_id": 2, "eot_token_id": 7}
    quiet = load_tokenizer(written(tmp_path / "u.gguf", **values, **ends, add_space_prefix=False))
    assert quiet.stop_ids == {2, 7}
    assert quiet.encode("the") == [texts.index("the")]
    assert quiet.prefix == ()


def test_pairs_of_a_token_are_tried_in_one_order():
    vocab = {"a": 0, "b": 1, "ab": 2, "aba": 3, "ba": 4}
    scores = {"a": -9.0, "b": -9.0, "ab": -1.0, "aba": -2.0, "ba": -1.0}
    assert merges_by_score(scores, vocab) == [
        ("a", "b"),
        ("b", "a"),
        ("a", "ba"),
        ("ab", "a"),
    ]  # of equals the lower id


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre: expected one of gpt-2, default, qwen2.*got 'deepseek-llm'"),
        ({"model": "t5"}, "tokenizer.ggml.model: expected gpt2 or llama, got 't5'"),
        ({"eos_token_id": 10**6}, "eos_token_id: expected one of 320 ids, got 1000000"),
        ({"merges": ["a"]}, "expected pairs of tokens, got 'a'"),
        ({"token_type": [1, 1]}, "expected 320 numbers, got 2"),
        ({"tokens": ["a"] * 320}, "expected different texts"),
        ({"tokens": [1, 2]}, "expected texts"),
        ({"model": "llama"}, "tokenizer.ggml.scores: expected list, got nothing"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(change, reason: str, tokenizer: Tokenizer, tmp_path: Path):
    values = {"pre": "qwen2", **vocabulary(tokenizer, tmp_path)} | change
    with pytest.raises(DataError, match=reason) as error:
        load_tokenizer(written(tmp_path / "t.gguf", **values))
    assert "\n" not in str(error.value)


# --- what is refused --------------------------------------------------------------------------------------------------


def changed(file: Path, out: Path, what: bytes, to: bytes) -> Path:
    data = file.read_bytes()
    assert what in data
    assert len(what) == len(to)
    out.write_bytes(data.replace(what, to, 1))
    return out


def header(n_tensors: int, n_values: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_values) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


ARCH = text("general.architecture") + struct.pack("<I", 8)
HOSTILE = {
    "empty": (b"", "ends within its header"),
    "magic": (b"GGML" + bytes(60), "starts with b'GGML'"),
    "version": (b"GGUF" + struct.pack("<I", 1) + bytes(60), "expected version 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(60), "expected version 2 or 3"),
    "values": (header(0, 2**63), "ends within its header"),
    "tensors": (header(2**63, 0), "ends within its header"),
    "name": (header(0, 1, struct.pack("<Q", 2**62)), "ends within its header"),
    "array": (header(0, 1, text("a") + struct.pack("<IIQ", 9, 4, 2**61)), "ends within its header"),
    "nested": (header(0, 1, text("a") + struct.pack("<IIQ", 9, 9, 1)), "unknown type 9"),
    "kind": (header(0, 1, text("a") + struct.pack("<I", 99)), "unknown type 99"),
    "utf-8": (header(0, 1, struct.pack("<Q", 1) + b"\xff"), "not UTF-8"),
    "twice": (header(0, 2, (ARCH + text("llama")) * 2), "stands twice"),
    "arch": (header(0, 1, ARCH + text("mamba")), "expected one of llama, qwen2, qwen3, got 'mamba'"),
    "arch-type": (header(0, 1, text("general.architecture") + struct.pack("<II", 4, 7)), "expected str, got int"),
    "dimensions": (header(1, 0, text("x") + struct.pack("<I", 99)), "1 to 4 dimensions, got 99"),
    "type": (header(1, 0, text("x") + struct.pack("<IQIQ", 1, 32, 19, 0)), "expected weights in F32.*got type 19"),
    "block": (header(1, 0, text("x") + struct.pack("<IQIQ", 1, 33, 8, 0)), "blocks of 32 numbers"),
    "size": (header(1, 0, text("x") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)), "would end at byte"),
    "start": (header(1, 0, text("x") + struct.pack("<IQIQ", 1, 1, 0, 2**63)), "would end at byte"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line_at_once(name: str, tmp_path: Path):
    content, reason = HOSTILE[name]
    (tmp_path / "x.gguf").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=reason) as error:
        load_model(tmp_path / "x.gguf")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "x.gguf") in str(error.value)
    assert exit_code_of(error.value) == 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_file_cut_anywhere_is_refused(folders: dict[str, Path], tmp_path: Path):
    data = (folders["qwen2"] / "model.gguf").read_bytes()
    for end in [*range(0, 4000, 97), *range(4000, len(data), 20_011), len(data) - 1]:
        (tmp_path / "cut.gguf").write_bytes(data[:end])
        with pytest.raises(CheckpointError, match=r"ends within its header|would end at byte"):
            load_model(tmp_path / "cut.gguf")


def test_a_model_that_would_be_computed_otherwise_is_refused(folders: dict[str, Path], tmp_path: Path):
    def refusal(kind: str, what: bytes, to: bytes) -> str:
        with pytest.raises(CheckpointError) as error:
            load_model(changed(folders[kind] / "model.gguf", tmp_path / "x.gguf", what, to))
        return str(error.value)

    def count(value: int) -> bytes:
        return struct.pack("<II", 4, value)

    assert "unexpected: blk.0.attn_z.weight" in refusal("llama", b"blk.0.attn_q.weight", b"blk.0.attn_z.weight")
    assert "missing: model.norm.weight" in refusal("llama", b"output_norm.weight", b"output_morn.weight")
    blocks = b"llama.block_count"
    assert "expected layers and heads" in refusal("llama", blocks + count(3), blocks + count(10**9))
    rotated = b"llama.rope.dimension_count"
    assert "expected whole heads of 16, got 8" in refusal("llama", rotated + count(16), rotated + count(8))
    scaling = text("linear")
    assert "expected none, linear or yarn, got 'lineal'" in refusal("linear", scaling, text("lineal"))
    assert "rope.scaling.factoz: expected type" in refusal("linear", b"rope.scaling.factor", b"rope.scaling.factoz")
    assert "mis-shaped" in refusal(
        "qwen2", b"qwen2.feed_forward_length" + count(96), b"qwen2.feed_forward_length" + count(64)
    )
    (tmp_path / "y.bin").write_bytes(b"GGUF")
    for missing in (tmp_path / "no.gguf", tmp_path / "y.bin", "owner/name.gguf"):
        with pytest.raises(CheckpointError, match=r"no such folder|expected a folder"):
            load_model(missing)


# --- the scripts ------------------------------------------------------------------------------------------------------


def test_a_run_starts_from_a_file(folders: dict[str, Path], tmp_path: Path, corpus: Path):
    file = folders["llama"] / "model.gguf"
    options = {"base_ckpt": file, "steps": 1, "seq_len": 32, "batch_tokens": 64, "eval_tokens": 64}
    argv = [f"--train.{name}={value}" for name, value in options.items()]
    argv += [f"--run.dir={tmp_path / 'run'}", f"--data.train={corpus}/*.txt", "--run.device=cpu", "--lora.rank=2"]
    assert train.main([*argv, f"--data.cache_dir={tmp_path / 'cache'}"]) == 0
    model, tokenizer = load_model(tmp_path / "run")  # the adapter finds its base
    assert tokenizer.eos_id == load_tokenizer(file).eos_id
    assert model.cfg == load_model(file)[0].cfg
    export(model, tokenizer, tmp_path / "exported")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
