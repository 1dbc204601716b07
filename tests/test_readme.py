"""W01: every command of the README runs, in a copy of the clone whose config.yaml asks for little, without a network.

What is typed there is what is run here, but for the few words in SHORTER. The published models that it names are tiny
ones of the same shape with random weights, in folders of the same names.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import GPT, ModelConfig
from nanoqwen.tokenizer import Tokenizer, train_tokenizer
from nanoqwen.weights import export

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Sections and keys of config.yaml, and what they are in the copy.
LITTLE = {
    ("run", "save_every"): "4",
    ("model", "hidden_size"): "32",
    ("model", "intermediate_size"): "64",
    ("data", "train"): '["text/*.py"]',
    ("data", "val_fraction"): "0.2",
    ("train", "steps"): "4",
    ("train", "warmup_steps"): "1",
    ("train", "eval_every"): "4",
    ("train", "eval_tokens"): "1024",
    ("train", "sample_tokens"): "8",
    ("finetune", "steps"): "2",
    ("finetune", "warmup_steps"): "1",
    ("finetune", "eval_every"): "2",
    ("chat", "limit"): "60",
    ("contrast", "limit"): "60",
    ("contrast", "eval_rows"): "4",
    ("infer", "max_new_tokens"): "8",
    ("eval", "limit"): "8",
    ("eval", "answer_tokens"): "4",
}
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
fewshot_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
# What would take long, or come from the network: (pattern, what is run in its place)
SHORTER = [
    (r"--(train\.)?steps \d+", r"--\1steps 2"),
    (r"step-00000800", "step-00000004"),
    (r"--tasks hellaswag,arc_easy", "--tasks mine --include_path tasks"),
    (r"--data\.tokenizer gpt2", "--data.tokenizer bytes"),
    (r"(checkpoint\.py push .*?)( --dry_run)?$", r"\1 --dry_run"),
    (r"bench\.py routing --quality", "bench.py routing --quality --kinds mod --seeds 1"),
    (r"bench\.py routing$", "bench.py routing --kinds mod --capacities 0.5 --lengths 64 --turns 1"),
]


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands() -> list[str]:
    """Of the README's blocks, in their order, without their comments."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    typed = [re.sub(r"\s{2,}#.*", "", line) for line in lines if re.match(r"(python|torchrun|make|pytest|pip) ", line)]
    return list(dict.fromkeys(typed))


def shortened(command: str) -> str:
    for pattern, other in SHORTER:
        command = re.sub(pattern, other, command)
    return command


def little(text: str) -> str:
    """config.yaml with the values of LITTLE, each of which has to be there."""
    section, left, out = "", dict(LITTLE), []
    for line in text.splitlines():
        if found := re.match(r"(\w+):", line):
            section = found[1]
        if (found := re.match(r"  (\w+): ", line)) and (section, found[1]) in left:
            line = f"  {found[1]}: {left.pop((section, found[1]))}"
        out.append(line)
    assert not left
    return "\n".join(out)


def published(folder: Path, tokenizer: Tokenizer) -> None:
    """A model as the hub has them, but for its size."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    cfg = ModelConfig(vocab_size=tokenizer.n_vocab, num_key_value_heads=2, max_position_embeddings=512, **shape)
    export(GPT(cfg), tokenizer, folder)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with what the README takes for given: notes, conversations, models of the hub, an adapter."""
    home = tmp_path_factory.mktemp("clone")
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.split():
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, home / name)
    (home / "config.yaml").write_text(little((ROOT / "config.yaml").read_text(encoding="utf-8")), encoding="utf-8")
    for folder in ("text", "notes", "chats", "tasks"):
        (home / folder).mkdir()
    sources = sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")])
    for source in sources:
        shutil.copy(source, home / "text")
    for number in range(30):
        text = f"# Note {number}\n\n" + "A line about many things, and another one.\n" * 20
        (home / "notes" / f"{number}.md").write_text(text)
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(40)]
    (home / "chats" / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "tasks" / "mine.yaml").write_text(TASK.format(file=home / "tasks" / "rows.jsonl"))
    questions = [{"question": f"{n} and {n}?", "choices": [" much", f" {2 * n}"], "label": 1} for n in range(6)]
    (home / "tasks" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    tokenizer = train_tokenizer([source.read_text() for source in sources[:6]], 600)
    for name in ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"):
        published(home / name, tokenizer)
    return home


def run(home: Path, command: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command, comments=True)
    tools = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    if words[0] == "make":  # its targets install; that they exist is another test
        tools, words = {"make": ["make", "-n"]}, [words[0], *words[1:]]
    env = os.environ | {"PYTHONPATH": "", "WANDB_MODE": "offline", "GLOO_SOCKET_IFNAME": "lo"}
    whole = [*tools[words[0]], *words[1:]]
    return subprocess.run(whole, cwd=home, env=env, input="Hello.\n", capture_output=True, text=True, timeout=600)


# What the README's reader has when a command comes: what it needs of those that stand further down.
BEFORE = [
    "python train.py",
    "python finetune.py --base_ckpt runs/base --lora.rank 4 --run.dir path/to/run",
]


@pytest.mark.slow
def test_w01_every_command_of_the_readme_runs(clone: Path):
    for command in BEFORE:
        done = run(clone, command)
        assert done.returncode == 0, done.stderr[-2000:]
    newest = max((clone / "path/to/run/checkpoints").iterdir())
    (clone / "path/to/adapter").symlink_to(newest)
    rows = subprocess.run([sys.executable, "-c", ATTACKS], cwd=clone, capture_output=True, text=True, check=True).stdout
    (clone / "attacks.jsonl").write_text(rows)
    failed = []
    for command in commands():
        done = run(clone, shortened(command))
        if done.returncode != 0:
            failed.append(f"$ {shortened(command)}\n{done.returncode}: {(done.stderr or done.stdout)[-600:]}")
    assert not failed, "\n\n".join(failed)


ATTACKS = """
import itertools, json, tasks
for row in itertools.islice(tasks.triplets(test=False), 30):
    print(json.dumps(row))
"""


@pytest.mark.slow
def test_w01_the_python_of_the_readme_runs(clone: Path):
    if not (clone / "runs/base").exists():
        assert run(clone, "python train.py").returncode == 0
    for block in blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=clone, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"


def test_the_commands_are_found_and_each_shortcut_is_needed():
    found = commands()
    assert "python train.py" in found
    assert len(found) > 30
    for pattern, _ in SHORTER:
        assert any(re.search(pattern, command) for command in found), pattern
