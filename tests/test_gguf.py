"""GGUF files, with two judges that we did not write: transformers reads them, and llama.cpp where it is installed."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import tiny
import torch
import transformers

import checkpoint
from model import GPT, RopeScaling, generate
from nanoqwen import gguf as gguf_writer
from nanoqwen.errors import ConfigError, exit_code_of
from nanoqwen.gguf import write_gguf
from nanoqwen.gguf_reader import read_gguf
from nanoqwen.patterns import LLAMA3_PATTERN
from nanoqwen.routing import RoutingConfig, build_model
from nanoqwen.tokenizer import CHATML_TEMPLATE, GPT2_PATTERN, Tiktoken, Tokenizer, load_tokenizer, train_tokenizer
from nanoqwen.weights import CheckpointError, export, load_model

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TEXTS = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("t*.py"))]
KINDS = ["qwen2", "qwen2-untied", "wide-heads", "qwen3", "llama", "llama3", "yarn", "linear"]
IDS = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 320)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gguf")
    for kind in KINDS:  # with rows of the embedding that no token has
        model = tiny.model(kind, vocab_size=324, hidden_size=64, intermediate_size=96, max_position_embeddings=128)
        export(model, tokenizer, root / kind)
        write_gguf(root / kind, root / kind / "float32.gguf", torch.float32)
    return {kind: root / kind for kind in KINDS}


def theirs(folder: Path, file: str) -> transformers.PreTrainedModel:
    """What transformers makes of the file. Scaling and size of heads it takes from config.json: it reads neither."""
    config = transformers.AutoConfig.from_pretrained(folder)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, gguf_file=file, config=config, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama3"])
def test_transformers_computes_the_same_logits_from_the_file(kind: str, folders: dict[str, Path]):
    ours, _ = load_model(folders[kind])
    with torch.no_grad():
        expected, got = ours(IDS).logits, theirs(folders[kind], "float32.gguf")(IDS).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_have_the_requested_dtype_and_vectors_fp32(dtype: str, folders: dict[str, Path], tmp_path: Path):
    write_gguf(folders["qwen2"], folders["qwen2"] / f"{dtype}.gguf", getattr(torch, dtype))
    ours, _ = load_model(folders["qwen2"], dtype=getattr(torch, dtype))
    with torch.no_grad():
        expected, got = ours.float()(IDS).logits, theirs(folders["qwen2"], f"{dtype}.gguf")(IDS).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    stored = gguf.GGUFReader(folders["qwen2"] / f"{dtype}.gguf").tensors
    short = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert {tensor.tensor_type.name for tensor in stored if len(tensor.shape) > 1} == {short}
    assert {tensor.tensor_type.name for tensor in stored if len(tensor.shape) == 1} == {"F32"}


def test_q8_0_is_what_the_package_quantises(folders: dict[str, Path], tmp_path: Path):
    checkpoint.main(["gguf", str(folders["llama"]), str(tmp_path / "q8.gguf"), "--dtype", "q8_0"])
    plain, quantised = (gguf.GGUFReader(file) for file in (folders["llama"] / "float32.gguf", tmp_path / "q8.gguf"))
    assert quantised.fields["general.file_type"].contents() == 7
    for before, after in zip(plain.tensors, quantised.tensors, strict=True):
        kind = gguf.GGMLQuantizationType.Q8_0 if len(before.shape) > 1 else gguf.GGMLQuantizationType.F32
        assert (after.name, after.tensor_type) == (before.name, kind)
        assert (after.data == gguf.quantize(before.data, kind)).all()
    assert {*plain.fields} ^ {*quantised.fields} <= {"general.quantization_version"}


def test_the_file_says_what_the_model_is(folders: dict[str, Path], tokenizer: Tokenizer):
    config = transformers.AutoConfig.from_pretrained(folders["qwen2"], gguf_file="float32.gguf")
    cfg = load_model(folders["qwen2"])[0].cfg
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads"):
        assert getattr(config, name) == getattr(cfg, name), name
    assert config.tie_word_embeddings
    assert config.rope_parameters["rope_theta"] == cfg.rope_theta
    fields = gguf.GGUFReader(folders["yarn"] / "float32.gguf").fields
    value = {name: field.contents() for name, field in fields.items()}
    assert value["qwen2.rope.scaling.type"] == "yarn"
    assert (value["qwen2.rope.scaling.factor"], value["qwen2.rope.scaling.original_context_length"]) == (4.0, 16)
    assert value["qwen2.context_length"] == 128
    assert value["tokenizer.ggml.pre"] == "qwen2"
    assert value["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    assert value["tokenizer.ggml.eot_token_id"] == tokenizer.special["<|im_end|>"]
    assert value["tokenizer.chat_template"] == CHATML_TEMPLATE
    assert not value["tokenizer.ggml.add_bos_token"]
    assert len(value["tokenizer.ggml.tokens"]) == len(value["tokenizer.ggml.token_type"]) == 324


def test_transformers_makes_the_same_ids_from_the_file(folders: dict[str, Path], tokenizer: Tokenizer):
    reference = transformers.AutoTokenizer.from_pretrained(folders["qwen2"], gguf_file="float32.gguf")
    draw = random.Random(0)
    letters = "abcdeABC 0123  \n\t.,'!?_-()äöüπЖ中日🙂"
    for _ in range(500):
        text = "".join(draw.choices(letters, k=draw.randrange(1, 60)))
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False), text
    ids = tokenizer.encode("a<|im_start|>b<|endoftext|>", allow_special=True)
    assert reference.encode("a<|im_start|>b<|endoftext|>", add_special_tokens=False) == ids


def test_the_divisors_of_llama3_are_those_of_transformers(folders: dict[str, Path]):
    (stored,) = [
        t for t in gguf.GGUFReader(folders["llama3"] / "float32.gguf").tensors if t.name == "rope_freqs.weight"
    ]
    rotary = theirs(folders["llama3"], "float32.gguf").model.rotary_emb
    dim = 2 * len(stored.data)
    plain = 1e6 ** -(torch.arange(0, dim, 2) / dim)
    assert torch.allclose(plain / torch.tensor(stored.data), rotary.inv_freq, rtol=1e-5)


# --- what is refused --------------------------------------------------------------------------------------------------


def shape(name: str, **overrides: object) -> GPT:
    return tiny.model(name, vocab_size=324, **overrides)


def routed() -> GPT:
    return build_model(tiny.config(vocab_size=324, num_hidden_layers=4), RoutingConfig(kind="mod"))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (routed, "compute all tokens in its routed layers"),
        (lambda: shape("j-branch"), "shape of Qwen2, Qwen3 or Llama"),
        (lambda: shape("gpt2"), "shape of Qwen2, Qwen3 or Llama"),
        (lambda: shape("llama", bias=True), "without biases"),
        (lambda: shape("dynamic"), "no dynamic rope scaling"),
        (lambda: shape("qwen2", rope_scaling=tiny.LLAMA3), "no llama3 rope scaling for qwen2"),
        (lambda: shape("qwen2", rope_scaling=RopeScaling("yarn", 2.0, 32, attention_factor=1.5)), "yarn as published"),
    ],
    ids=["routed", "j", "gpt2", "biases", "dynamic", "llama3", "attention_factor"],
)
def test_models_that_llama_cpp_would_compute_differently_are_refused(
    build, reason: str, tokenizer: Tokenizer, tmp_path: Path
):
    export(build(), tokenizer, tmp_path / "model")
    with pytest.raises(CheckpointError, match=reason):
        write_gguf(tmp_path / "model", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_tokenizer_that_llama_cpp_would_split_differently_is_refused(tmp_path: Path):
    def refusal(tokenizer: Tokenizer | None) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        export(shape("qwen2"), tokenizer, folder)
        with pytest.raises(CheckpointError) as error:
            write_gguf(folder, tmp_path / "out.gguf")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "expected a tokenizer.json" in refusal(None)
    assert "none that llama.cpp has" in refusal(train_tokenizer(TEXTS, 320, pattern=r"\p{L}+|[^\p{L}]+"))
    spec_file = tmp_path / "0" / "tokenizer.json"
    train_tokenizer(TEXTS, 320).save(spec_file.parent)
    spec_file.write_text(json.dumps(json.loads(spec_file.read_text()) | {"normalizer": {"type": "NFKC"}}))
    assert "byte-level BPE tokenizer of one split pattern" in refusal(load_tokenizer(spec_file.parent))
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abcd": 256}  # which no pair of tokens makes
    assert "made by no merge" in refusal(
        Tokenizer("stuck", Tiktoken("stuck", ranks, GPT2_PATTERN), {"<|endoftext|>": 257}, eos="<|endoftext|>")
    )
    assert "without merges" in refusal(load_tokenizer("bytes"))


def test_digits_one_by_one_are_smollm_s_split(tmp_path: Path):
    """A fine-tuned SmolLM2 goes back into the format that it came in; its ids are those of before."""
    spec_file = tmp_path / "tokenizer" / "tokenizer.json"
    train_tokenizer(TEXTS, 320, pattern=GPT2_PATTERN).save(spec_file.parent)
    spec = json.loads(spec_file.read_text())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = [{"type": "Digits", "individual_digits": True}, byte_level]
    spec |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "normalizer": None}
    spec_file.write_text(json.dumps(spec))
    tokenizer = load_tokenizer(spec_file.parent)
    export(shape("llama"), tokenizer, tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "out.gguf")
    again = load_tokenizer(tmp_path / "out.gguf")
    for text in (*TEXTS[:5], "12345 and 6,789.01", "a1b22c333"):
        assert again.encode(text) == tokenizer.encode(text)
    assert read_gguf(tmp_path / "out.gguf").metadata["tokenizer.ggml.pre"] == "smollm"


def test_a_file_is_there_when_it_is_complete_or_not_at_all(folders: dict[str, Path], tmp_path: Path, monkeypatch):
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full_disk)
    with pytest.raises(Exception, match="No space left") as error:
        checkpoint.main(["gguf", str(folders["qwen2"]), str(tmp_path / "out.gguf")])
    assert exit_code_of(error.value) == 6
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine.gguf").write_text("precious")
    for file in (tmp_path / "mine.gguf", tmp_path / "nowhere" / "out.gguf"):
        with pytest.raises(CheckpointError, match="a new file in a folder that exists"):
            write_gguf(folders["qwen2"], file)
    assert (tmp_path / "mine.gguf").read_text() == "precious"
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        write_gguf(folders["qwen2"], tmp_path / "out.gguf")


def test_the_command_writes_a_file_and_notes_the_missing_nfc(folders: dict[str, Path], tmp_path: Path, capsys):
    checkpoint.main(["gguf", str(folders["llama"]), str(tmp_path / "out.gguf"), "--dtype", "float16"])
    assert "does not normalise text to NFC" in capsys.readouterr().out
    assert oct((tmp_path / "out.gguf").stat().st_mode & 0o777) == "0o644"
    with pytest.raises((SystemExit, ConfigError)):
        checkpoint.main(["gguf", str(folders["llama"]), str(tmp_path / "x.gguf"), "--dtype", "int4"])


# --- llama.cpp itself -------------------------------------------------------------------------------------------------

# xllamacpp is llama.cpp as a wheel. Cache and attention are in fp32, so that nothing is rounded beside the weights.
LLAMA_CPP = """
import json, os, sys, urllib.request
import xllamacpp as x
p = x.CommonParams()
p.model.path, p.n_gpu_layers, p.n_ctx, p.n_parallel, p.warmup, p.port = sys.argv[1], 0, 256, 1, False, 0
p.cpuparams.n_threads = 1  # idle ones would spin
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = x.Server(p)
def ask(path, **body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
    return json.loads(urllib.request.urlopen(request, timeout=60).read())
question = json.load(sys.stdin)
options = {"n_predict": 40, "temperature": 0, "top_k": 1, "return_tokens": True, "cache_prompt": False}
answer = {
    "ids": [ask("/tokenize", content=text)["tokens"] for text in question["texts"]],
    "new": [ask("/completion", prompt=ids, **options)["tokens"] for ids in question["prompts"]],
    "chat": ask("/apply-template", messages=question["chat"])["prompt"],
}
print("ANSWER" + json.dumps(answer), flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="pip install xllamacpp")
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_writes_the_same_greedy_text(kind: str, folders: dict[str, Path], tokenizer: Tokenizer):
    texts = [
        "def f(x):\n    return 12345",
        "  a\t b\n\n\nc's DON'T it’s  ",
        "日本語 🙂👩‍🚀 äöü",
        "3.14 \r\n\r\n $%^&*()_+",
    ]
    chat = [{"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant", "user")]
    prompts = [tokenizer.encode(text) for text in texts]
    question = json.dumps({"texts": texts, "prompts": prompts, "chat": chat})
    command = [sys.executable, "-c", LLAMA_CPP, str(folders[kind] / "float32.gguf")]
    done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=300)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")] or [done.stderr[-2000:]]
    answer = json.loads(line.removeprefix("ANSWER"))
    assert answer["ids"] == prompts
    model, _ = load_model(folders[kind])
    rows = generate(model, prompts, temperature=0.0, max_new_tokens=40, eos=sorted(tokenizer.stop_ids))
    for prompt, row, new in zip(prompts, rows, answer["new"], strict=True):
        ours = row[len(prompt) :]
        assert new[: len(ours)] == ours
        assert len(new) - len(ours) in (0, 1)
    expected = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in chat)
    assert answer["chat"] == expected + "<|im_start|>assistant\n"


def test_names_of_split_patterns_are_those_of_llama_cpp():
    """Read in its src/llama-vocab.cpp; the pattern of Llama 3's tokenizer.json differs from Qwen2's in its digits."""
    assert set(gguf_writer.PRE_TOKENIZERS.values()) == {"qwen2", "gpt-2", "llama-bpe"}
    assert r"\p{N}{1,3}| ?[^\s" in LLAMA3_PATTERN
