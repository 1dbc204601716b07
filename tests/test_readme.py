"""W01: every command of the documentation runs, in a small clone without a network, and what it names exists.

The commands are those of the README and of docs/, but for the replacements in SHORTER. The published models that they
name are tiny ones of the same shape with random weights, in folders of the same names.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model import GPT, ModelConfig
from nanoqwen import builtin
from nanoqwen.config import load_config
from nanoqwen.tokenizer import Tokenizer, train_tokenizer
from nanoqwen.weights import export

ROOT = Path(__file__).parents[1]
CHAPTERS = {
    path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
DOCUMENTS = CHAPTERS | {"CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")}
# Sections and keys of config.yaml, and their values in the clone.
SMALL = {
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
# The reader's own configuration, complete enough for a short run.
MINE = """
data: {train: ["text/*.py"], val_fraction: 0.2}
train: {warmup_steps: 1, eval_tokens: 1024, sample_tokens: 8}
"""
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
# What would take long, or needs the network: (pattern, replacement)
SHORTER = [
    (r"--(train\.)?steps \d+", r"--\1steps 2"),
    (r"step-00000800", "step-00000004"),
    (r"--tasks hellaswag,arc_easy", "--tasks mine --include_path tasks"),
    (r"(checkpoint\.py push .*?)( --dry_run)?$", r"\1 --dry_run"),
    (r"bench\.py routing$", "bench.py routing --kinds mod --capacities 0.5 --lengths 64 --turns 1"),
]


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", "\n".join(CHAPTERS.values()), re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def commands() -> list[str]:
    """All commands in the order of the documents, each once, without comments."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    typed = [re.sub(r"\s{2,}#.*", "", line) for line in lines if re.match(r"(python|torchrun|make|pytest|pip) ", line)]
    return list(dict.fromkeys(typed))


def shortened(command: str) -> str:
    for pattern, replacement in SHORTER:
        command = re.sub(pattern, replacement, command)
    return command


def small_config(text: str) -> str:
    """config.yaml with the values of SMALL in place of its own, at the head of each section."""
    section, lines = "", []
    for line in text.splitlines():
        if header := re.match(r"(\w+):", line):
            section = header[1]
            own = [f"  {key}: {value}" for (name, key), value in SMALL.items() if name == section]
            lines += [line, *own]
        elif not ((entry := re.match(r"  (\w+): ", line)) and (section, entry[1]) in SMALL):
            lines.append(line)
    return "\n".join(lines)


def write_model(folder: Path, tokenizer: Tokenizer) -> None:
    """A tiny model in the format of a published one."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    cfg = ModelConfig(vocab_size=tokenizer.n_vocab, num_key_value_heads=2, max_position_embeddings=512, **shape)
    export(GPT(cfg), tokenizer, folder)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with the reader's own files: a configuration, notes, conversations, attacks, a task, published models."""
    home = tmp_path_factory.mktemp("clone")
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.split():
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, home / name)
    (home / "config.yaml").write_text(
        small_config((ROOT / "config.yaml").read_text(encoding="utf-8")), encoding="utf-8"
    )
    (home / "mine.yaml").write_text(MINE)
    for folder in ("text", "notes", "chats", "tasks"):
        (home / folder).mkdir()
    sources = sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")])
    for source in sources:
        shutil.copy(source, home / "text")
    for number in range(30):
        text = f"# Note {number}\n\n" + "A line about many things, and another one.\n" * 20
        (home / "notes" / f"{number}.md").write_text(text)
    pairs = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(40)]
    write_rows(home / "chats" / "own.jsonl", pairs)
    write_rows(home / "attacks.jsonl", list(itertools.islice(builtin.triplets(test=False), 30)))
    (home / "tasks" / "mine.yaml").write_text(TASK.format(file=home / "tasks" / "rows.jsonl"))
    questions = [{"question": f"{n} and {n}?", "choices": [" much", f" {2 * n}"], "label": 1} for n in range(6)]
    write_rows(home / "tasks" / "rows.jsonl", questions)
    tokenizer = train_tokenizer([source.read_text() for source in sources[:6]], 600)
    for name in ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-0.6B"):
        write_model(home / name, tokenizer)
    return home


# Imports torch once and forks for each line of stdin: most of a short command is that import.
SERVER = """
import json, os, runpy, signal, sys
import numpy, safetensors.torch, tiktoken, torch, torch.nn.functional, yaml
for line in sys.stdin:
    output, words = json.loads(line)
    if (child := os.fork()) == 0:
        signal.alarm(600)  # seconds until a command that hangs is killed
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open("stdin.txt", os.O_RDONLY), 0), os.dup2(file, 1), os.dup2(file, 2)
        sys.stdin = open(0, closefd=False)
        module = words[0] == "-m"
        sys.argv, sys.path[0] = words[module:], os.getcwd()
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Shell:
    """Runs commands in the clone, one after the other, in processes of their own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = os.environ | {"PYTHONPATH": "", "WANDB_MODE": "offline", "GLOO_SOCKET_IFNAME": "lo"}
        (home / "stdin.txt").write_text("Hello.\n")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=home, env=self.env, **pipes)

    def run(self, command: str) -> tuple[int, str]:
        """(exit code, output) of a command."""
        tool, *words = shlex.split(command, comments=True)
        output = self.home / "output.txt"
        if tool == "python":
            self.server.stdin.write(json.dumps([str(output), words]) + "\n")
            self.server.stdin.flush()
            code = int(self.server.stdout.readline())
            return code, output.read_text(errors="replace")
        # The targets of make install something; that they exist is another test.
        tools = {"torchrun": [sys.executable, "-m", "torch.distributed.run"], "make": ["make", "-n"]}
        options = {"cwd": self.home, "env": self.env, "capture_output": True, "text": True, "timeout": 600}
        done = subprocess.run([*tools[tool], *words], **options)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def shell(clone: Path) -> Iterator[Shell]:
    shell = Shell(clone)
    with shell.server:
        yield shell
    assert shell.server.returncode == 0


# What the documents take for given: a base, and an adapter of somebody else's.
BEFORE = ["python train.py", "python finetune.py --base_ckpt runs/base --lora.rank 4 --run.dir path/to/run"]


@pytest.mark.slow
def test_w01_every_command_runs(clone: Path, shell: Shell):
    for command in BEFORE:
        code, output = shell.run(command)
        assert code == 0, output[-2000:]
    newest = max((clone / "path/to/run/checkpoints").iterdir())
    (clone / "path/to/adapter").symlink_to(newest)
    failures = []
    for command in map(shortened, commands()):
        code, output = shell.run(command)
        if code != 0:
            failures.append(f"$ {command}\n{code}: {output[-600:]}")
    assert not failures, "\n\n".join(failures)


def test_w01_the_python_runs_in_a_folder_that_has_a_config_py_of_its_own(clone: Path, tmp_path: Path):
    (tmp_path / "config.py").write_text("mine = True\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "base").symlink_to(clone / "Qwen/Qwen2.5-0.5B")
    for block in blocks("python"):
        (tmp_path / "program.py").write_text(
            block.replace("path/to/nanoqwen", str(clone)) + "\nimport config\nassert config.mine\n"
        )
        done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]


def test_the_commands_are_found_and_each_replacement_is_needed():
    typed = commands()
    assert "python train.py" in typed
    assert len(typed) > 50
    for pattern, _ in SHORTER:
        assert any(re.search(pattern, command) for command in typed), pattern


@pytest.mark.parametrize("name", DOCUMENTS)
def test_w01_files_and_make_targets_that_a_document_names_exist(name: str):
    text = DOCUMENTS[name]
    # Files of the library may stand without their folder where the one before them has it.
    for path in set(re.findall(r"`([\w/]+\.(?:py|yaml|md|toml|txt|sh))`", text)):
        assert any((ROOT / folder / path).exists() for folder in ("", "nanoqwen")), path
    for link in re.findall(r"\]\(([\w/.-]+)\)", text):
        assert (ROOT / link).exists() or (ROOT / "docs" / link).exists(), link
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_map_of_contributing_names_what_is_in_the_files():
    rows = [row.split("|")[2:4] for row in DOCUMENTS["CONTRIBUTING.md"].splitlines() if row.startswith("| ")][1:]
    assert len(rows) >= 10
    for files, place in rows:
        source = "".join((ROOT / file).read_text(encoding="utf-8") for file in re.findall(r"`([\w/]+\.\w+)`", files))
        for name in re.findall(r"`(?:\w+\.)*(\w+)`", re.sub(r"`[\w/]+\.(?:py|yaml)`", "", place)):
            assert re.search(rf"\b{name}\b", source), f"{name} in {files}"


def test_w01_options_that_the_documents_use_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.yaml").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    for command in commands():
        script = re.match(r"python (train|infer|finetune|eval)\.py ?(.*)", command)
        if script and "--help" not in command:
            load_config(shlex.split(script[2]), script[1])
