"""Text, settings and folders that are meant to hurt."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import VOCAB
from runs import ROOT, Starter, options

from nanoqwen.config import DataConfig
from nanoqwen.corpus import prepare
from nanoqwen.errors import DataError
from nanoqwen.runfolder import verify


def peak_of(code: str) -> tuple[float, str]:
    """(MB at most, output) of a program."""
    tail = "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    done = subprocess.run([sys.executable, "-c", head + code + tail], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    *said, peak = done.stdout.splitlines()
    return float(peak), "\n".join(said)


PREPARE = """
from nanoqwen.config import DataConfig
from nanoqwen.corpus import prepare
from nanoqwen.errors import DataError
import torch
try:
    found = prepare(DataConfig(train=({source!r},), val_fraction=0.2, tokenizer="bytes", cache_dir={cache!r}), 259,
                    progress=False)
    print(sum(len(shards) for shards, _ in found.train), "tokens")
except DataError as error:
    print("refused:", error)
"""


def test_e3_a_line_of_200_mb(tmp_path: Path, figure):
    """Beside short ones; memory stays a small multiple of the line."""
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(50):
            file.write(json.dumps({"text": f"short {number} " * 20}) + "\n")
        file.write('{"text": "' + "word " * 40_000_000 + '"}\n')
    peak, said = peak_of(PREPARE.format(source=str(tmp_path / "a.jsonl"), cache=str(tmp_path / "cache")))
    figure(f"{said[:60]}, peak {peak:.0f} MB")
    assert peak < 3_000


def test_e6_a_gzip_bomb(tmp_path: Path, figure):
    """2 GB of spaces in 2 MB: read in pieces, or refused; never unpacked at once."""
    with gzip.open(tmp_path / "a.txt.gz", "wb", compresslevel=9) as file:
        for _ in range(2_000):
            file.write(b" " * 1_000_000)
    began = time.monotonic()
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"text {n} " * 50}) + "\n" for n in range(50)))
    shutil.move(tmp_path / "a.txt.gz", tmp_path / "a.jsonl.gz")
    peak, said = peak_of(PREPARE.format(source=str(tmp_path / "a.jsonl.gz"), cache=str(tmp_path / "cache")))
    figure(f"{said[-80:]!r}, peak {peak:.0f} MB, {time.monotonic() - began:.0f} s")
    assert peak < 3_000
    assert said.startswith("refused")


def test_e7_a_cache_with_any_flipped_bit_is_not_used(tmp_path: Path, figure):
    """200 bits, spread over the shard: noticed by `verify`."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n} " * 50}) + "\n" for n in range(200)))
    cfg = DataConfig(
        train=(str(tmp_path / "a.jsonl"),), val_fraction=0.2, tokenizer="bytes", cache_dir=str(tmp_path / "cache")
    )
    shards = prepare(cfg, VOCAB, progress=False).train[0][0]
    content, noticed = shards.path.read_bytes(), 0
    places = np.random.default_rng(7).integers(0, 8 * len(content), 200).tolist()
    shards.path.chmod(0o644)
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        shards.path.write_bytes(damaged)
        try:
            type(shards)(shards.path).verify()
        except DataError:
            noticed += 1
    figure(f"{noticed} of 200")
    assert noticed == 200


def test_e11_names_that_are_no_names(tmp_path: Path, figure):
    """Files whose names hold a newline, an escape, a byte that is no UTF-8, 255 characters: all read."""
    names = [b"a\nb.txt", b"\x1b[31m.txt", b"\xff\xfe.txt", b"x" * 251 + b".txt", "ü ß 漢.txt".encode(), b"-rf.txt"]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, name in enumerate(names):
        with open(os.path.join(os.fsencode(folder), name), "w") as file:
            file.write(f"text number {number} " * 60)
    cfg = DataConfig(train=(str(folder),), val_fraction=0.3, tokenizer="bytes", cache_dir=str(tmp_path / "cache"))
    found = prepare(cfg, VOCAB, progress=False)
    documents = sum(shards.n_documents for shards, _ in found.train) + sum(shards.n_documents for shards in found.val)
    figure(f"{documents} of {len(names)} documents")
    assert documents == len(names)


def test_s6_a_folder_that_leads_elsewhere(starter: Starter, corpus: Path, tmp_path: Path, figure):
    """A run folder with links to /etc/passwd in the place of its files: nothing of it is shown or overwritten."""
    secret = tmp_path / "secret"
    secret.write_text("CANARY\n" * 10)
    for name in ("metrics.jsonl", "config.yaml", "status.json", "report.html", "source.json"):
        run = tmp_path / f"run-{name}"
        run.mkdir()
        (run / name).symlink_to(secret)
        started = starter.run(*options(corpus, run), code=None)
        assert "CANARY" not in started.stdout + started.stderr
        report = run / "report.html"
        assert not report.exists() or "CANARY" not in report.read_text(errors="replace")
    figure("5 links followed by nobody" if "CANARY" in secret.read_text() else "a linked log was written to")


@pytest.mark.parametrize("script", ["train.py", "infer.py", "data.py", "eval.py"])
def test_s10_nothing_asks_the_network(script: str, starter: Starter, corpus: Path, tmp_path: Path, figure):
    """In a process without any network."""
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("may not cut the network here")
    run = tmp_path / "run"
    arguments = options(corpus, run, "--train.steps=4")
    if script != "train.py":
        starter.run(*arguments)
    words = {
        "train.py": arguments,
        "infer.py": [f"--ckpt={run}", "--prompt=line", "--max_new_tokens=4"],
        "data.py": ["show", *[word for word in arguments if word.startswith(("--data", "--train.seq", "--model.voc"))]],
        "eval.py": [f"--ckpt={run}"],
    }[script]
    strace = (
        ["strace", "-f", "-qq", "-e", "trace=connect", "-o", str(tmp_path / "log")] if shutil.which("strace") else []
    )
    done = subprocess.run(
        ["unshare", "-n", *strace, sys.executable, str(ROOT / script), *words],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    log = tmp_path / "log"
    asked = [line for line in log.read_text().splitlines() if "AF_INET" in line] if log.exists() else []
    figure(f"{len(asked)} connections asked for")
    assert not asked


def test_s11_no_code_of_a_source_runs(starter: Starter, corpus: Path, tmp_path: Path, figure):
    """Python files beside weights, and a config.json that names them: never imported."""
    starter.run(*options(corpus, tmp_path / "run", "--train.steps=4"))
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(next((tmp_path / "run/checkpoints").glob("step-*")), folder)
    (folder / "manifest.json").unlink()
    for name in ("modeling.py", "tokenization.py", "__init__.py", "sitecustomize.py", "torch.py"):
        (folder / name).write_text(f"open({str(canary)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model", "AutoTokenizer": "tokenization.Tokenizer"}
    (folder / "config.json").write_text(json.dumps(config))
    for words in (["infer.py", f"--ckpt={folder}", "--prompt=a", "--max_new_tokens=1"], ["eval.py", f"--ckpt={folder}",
                  f"--data={corpus}"]):  # fmt: skip
        subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=folder.parent, capture_output=True)
        assert not canary.exists()
    figure("5 files of code, none imported")


def test_h5_another_number_of_threads(starter: Starter, corpus: Path, reference: Path, tmp_path: Path, figure):
    """A resume with two threads instead of one: the same batches, losses within rounding."""
    run = tmp_path / "run"
    started = starter.start(*options(corpus, run))
    started.until(lambda: (run / "checkpoints").exists() and any((run / "checkpoints").glob("step-*")))
    started.signal(9)
    started.wait()
    starter.run(*options(corpus, run), first="import torch; torch.set_num_threads(2)\n")
    from runs import rows

    ours, theirs = rows(run), rows(reference)
    assert [row["batch_sha"] for row in ours] == [row["batch_sha"] for row in theirs]
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True))
    figure(
        f"largest difference of a loss {worst:.1e}; digests {'equal' if verify(run) == verify(reference) else 'differ'}"
    )
    assert worst < 1e-5
