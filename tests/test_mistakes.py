"""What people type wrongly, over all scripts: one line that says what is wrong, the right exit code, no traceback."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from pathlib import Path

import pytest
import tiny

from nanoqwen.errors import run_script
from nanoqwen.tokenizer import load_tokenizer
from nanoqwen.weights import export

# (script, words, exit code, a part of what is said). MODEL, TEXT, ROWS, EMPTY, OUT stand for paths of the test.
MISTAKES = [
    # --- options
    ("train", "--train.stpes=5", 2, "did you mean --train.steps"),
    ("train", "--steps", 2, "--steps"),
    ("train", "--steps=abc", 2, "expected int >= 1, got 'abc'"),
    ("train", "--steps=-1", 2, "expected int >= 1, got -1"),
    ("train", "--steps=0", 2, "expected int >= 1, got 0"),
    ("train", "--steps=1e3000", 2, "steps"),
    ("train", "--lr=0", 2, "lr"),
    ("train", "--lr=fast", 2, "lr"),
    ("train", "--lr=1e-3=2", 2, "lr"),
    ("train", "nowhere.yaml", 2, "nowhere.yaml"),
    ("train", "TEXT", 2, "a.md"),
    ("train", "--preset=13B", 2, "preset"),
    ("train", "--run.device=gpu", 2, "expected auto, cpu, mps, cuda or cuda:N, got 'gpu'"),
    ("train", "--run.device=cuda", 2, "cuda"),
    ("train", "--run.dtype=fp8", 2, "float32|bfloat16|float16"),
    ("train", "--run.parallel=tensor", 2, "ddp|fsdp"),
    ("train", "--optimizer=sgd", 2, "adamw|muon"),
    ("train", "--schedule=step", 2, "cosine|"),
    ("train", "--beta1=1.5", 2, "beta1"),
    ("train", "--batch_tokens=1000", 2, "batch_tokens"),
    ("train", "--seq_len=1000000", 2, "seq_len"),
    ("train", "--micro_batch=0", 2, "micro_batch"),
    ("train", "--tokens=5 --epochs=2", 2, "epochs"),
    ("train", "--run.resume=must --run.dir=OUT", 4, "must"),
    ("train", "--run.resume=nowhere --run.dir=OUT", 4, "nowhere"),
    ("train", "--run.overwrite", 2, "overwrite"),
    ("train", "--run.dir=", 2, "dir: expected a folder"),
    ("train", "--run.dir=TEXT", 6, "a.md"),
    ("train", "--run.seed=-1", 2, "seed"),
    ("train", "--run.keep=0", 2, "keep"),
    # --- shapes
    ("train", "--model.num_attention_heads=3", 2, "must be a multiple of num_key_value_heads (2)"),
    ("train", "--model.num_key_value_heads=3", 2, "num_key_value_heads"),
    ("train", "--model.head_dim=7", 2, "even"),
    ("train", "--model.dropout=1", 2, "dropout"),
    ("train", "--data.train=TEXT --run.dir=OUT", 3, "data.val_fraction 0.05: nothing to validate on"),
    ("train", "--model.rope_scaling=yarn", 2, "rope_scaling"),
    ("train", "--routing.kind=moe", 2, "dense|mod|dtf|tdtf"),
    ("train", "--routing.kind=mod --routing.capacity=2", 2, "capacity"),
    ("train", "--routing.kind=mod --routing.layers=[9]", 2, "layers"),
    # --- data
    ("train", "--data.train=nowhere --run.dir=OUT", 3, "nowhere"),
    ("train", "--data.train=EMPTY --run.dir=OUT", 3, "EMPTY"),
    ("train", "--data.train=TEXT=0 --run.dir=OUT", 2, "train: expected a weight above 0"),
    ("train", "--data.train=TEXT --data.tokenizer=gpt5 --run.dir=OUT", 3, 'tokenizer "gpt5"'),
    ("train", "--data.val_fraction=2", 2, "val_fraction"),
    ("train", "--base_ckpt=nowhere", 4, "nowhere"),
    ("data", "prepair", 2, "prepare"),
    ("data", "show --data.train=nowhere", 3, "nowhere"),
    # --- fine-tuning
    ("finetune", "", 2, "base_ckpt"),
    ("finetune", "--base_ckpt=nowhere", 4, "nowhere"),
    ("finetune", "--base_ckpt=EMPTY", 4, "EMPTY"),
    ("finetune", "--base_ckpt=MODEL --objective=rlhf", 2, "objective"),
    ("finetune", "--base_ckpt=MODEL --lora.rank=-1", 2, "rank"),
    (
        "finetune",
        "--base_ckpt=MODEL --lora.rank=4 --lora.targets=[query] --seq_len=64 --chat.train=builtin:tasks --run.dir=OUT",
        2,
        "query",
    ),
    ("finetune", "--base_ckpt=MODEL --chat.train=nowhere --seq_len=64 --run.dir=OUT", 3, "nowhere"),
    ("finetune", "--base_ckpt=MODEL --chat.train=ROWS --seq_len=64 --run.dir=OUT", 3, "ROWS"),
    # --- sampling
    ("infer", "--ckpt=nowhere --prompt=a", 4, "nowhere"),
    ("infer", "--ckpt=MODEL --prompt=a --temperature=-1", 2, "temperature"),
    ("infer", "--ckpt=MODEL --prompt=a --top_p=-0.1", 2, "top_p"),
    ("infer", "--ckpt=MODEL --prompt=a --num_beams=2 --stop=x", 2, "stop and num_beams"),
    ("infer", "--ckpt=MODEL --prompt=a --max_new_tokens=100000", 2, "context"),
    ("infer", "--ckpt=MODEL --prompt_file=nowhere", 2, "nowhere"),
    ("infer", "--ckpt=MODEL --prompt=a --weights=int2", 2, "auto|int8|int4"),
    # --- the other scripts
    ("eval", "--ckpt=nowhere", 4, "nowhere"),
    ("eval", "--ckpt=MODEL --data=nowhere", 3, "nowhere"),
    ("eval", "--ckpt=MODEL --suite=other", 2, "suite"),
    ("bench", "sped", 2, "sped"),
    ("checkpoint", "", 2, "usage"),
    ("checkpoint", "export nowhere OUT", 4, "nowhere"),
    ("checkpoint", "export MODEL TEXT", 4, "a.md"),
    ("checkpoint", "verify nowhere", 4, "nowhere"),
    ("checkpoint", "verify MODEL", 4, "manifest"),
    ("checkpoint", "gguf nowhere OUT", 4, "nowhere"),
    ("checkpoint", "push nowhere a/b --dry_run", 4, "nowhere"),
    ("nanoqwen.report", "nowhere", 4, "nowhere"),
    ("nanoqwen.report", "compare nowhere TEXT", 4, "nowhere"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mistakes")
    tokenizer = load_tokenizer("bytes")
    export(tiny.model(vocab_size=tokenizer.n_vocab, lively=False), tokenizer, folder / "MODEL")
    (folder / "a.md").write_text("# A text\n\n" + "Some words of it. " * 300)
    (folder / "ROWS.jsonl").write_text("".join(json.dumps({"question": n}) + "\n" for n in range(20)))
    (folder / "EMPTY").mkdir()
    return {
        "MODEL": folder / "MODEL",
        "TEXT": folder / "a.md",
        "ROWS": folder / "ROWS.jsonl",
        "EMPTY": folder / "EMPTY",
    }


@pytest.mark.parametrize(("script", "words", "code", "said"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_one_line(
    script: str, words: str, code: int, said: str, places: dict[str, Path], tmp_path: Path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    arguments = []
    for word in words.split():
        for name, path in (places | {"OUT": tmp_path / "out"}).items():
            word = word.replace(name, str(path))
        arguments.append(word)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    mask, before = os.umask(0o022), set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as left:
        run_script(importlib.import_module(script).main)
    os.umask(mask)
    shown = capfd.readouterr().err
    assert left.value.code == code, shown
    assert said in shown
    assert "Traceback" not in shown
    *_, last = shown.strip().splitlines()
    assert "error: " in last
    left_behind = {path.name for path in set(tmp_path.iterdir()) - before}
    assert left_behind <= {"out", ".cache", "runs"}
