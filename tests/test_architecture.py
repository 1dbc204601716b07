"""The rules of the house that a machine can hold: who imports whom, and what no file may do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))

# Dependencies run from volatile to stable; a file imports files of lower lines only.
IMPORTS = {
    "model": set(),
    "routing": {"model"},
    "tokenizer": set(),
    "lora": set(),
    "distributed": set(),
    "corpus": {"tokenizer"},
    "data": {"corpus", "tokenizer"},
    "chat": {"corpus", "data", "tasks", "tokenizer"},
    "tasks": set(),
    "contrast": set(),
    "triplets": {"chat", "corpus", "data", "tasks", "tokenizer"},
    "config": {"model", "routing", "lora", "corpus", "chat", "triplets"},
    "published": {"model", "routing"},
    "checkpoint": {"config", "lora", "model", "published", "routing", "tokenizer"},
    "runfolder": {"checkpoint", "config", "model", "tokenizer"},
    "parity": {"checkpoint", "model", "published", "tokenizer"},
    "gguf_export": {"checkpoint", "model", "published", "tokenizer"},
    "share": {
        "checkpoint",
        "config",
        "gguf_export",
        "history",
        "model",
        "parity",
        "published",
        "runfolder",
        "tokenizer",
    },
    "injection": {"chat", "contrast", "model", "tokenizer", "triplets"},
    "eval": {
        "chat",
        "checkpoint",
        "config",
        "contrast",
        "corpus",
        "data",
        "distributed",
        "harness",
        "heldout",
        "injection",
        "lora",
        "model",
        "runfolder",
        "tokenizer",
        "triplets",
    },
    "infer": {"config", "model", "routing", "tokenizer", "checkpoint", "distributed"},
    "heldout": {"checkpoint", "config", "data", "distributed", "model", "routing", "tokenizer"},
    "harness": {"checkpoint", "config", "data", "heldout", "log", "model", "runfolder", "tokenizer"},
    "optim": {"config", "distributed", "routing"},
    "plot": set(),
    "pages": {"plot"},
    "history": set(),
    "report": {"checkpoint", "config", "history", "pages", "plot", "runfolder"},
    "log": {"config", "distributed", "model", "routing", "runfolder"},
    "plan": {"config", "distributed", "log", "lora", "model", "optim", "routing"},
    "train": {
        "chat",
        "triplets",
        "config",
        "model",
        "tokenizer",
        "corpus",
        "data",
        "distributed",
        "checkpoint",
        "runfolder",
        "harness",
        "heldout",
        "optim",
        "log",
        "plan",
        "report",
        "routing",
    },
    "finetune": {
        "chat",
        "checkpoint",
        "config",
        "data",
        "distributed",
        "contrast",
        "injection",
        "log",
        "lora",
        "model",
        "routing",
        "tokenizer",
        "train",
        "triplets",
    },
    "bench": {
        "chat",
        "checkpoint",
        "config",
        "corpus",
        "data",
        "distributed",
        "lora",
        "model",
        "optim",
        "plan",
        "routing",
        "train",
    },
}
# A file may read the configuration when it is itself the program.
AS_PROGRAM = {("data", "config"), ("data", "triplets"), ("chat", "config"), ("checkpoint", "share")}
OPTIONAL = {
    "datasets",
    "wandb",
    "lm_eval",
    "transformers",
    "huggingface_hub",
    "gguf",
    "pyarrow",
    "zstandard",
}


def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))


def imported(node: ast.AST) -> set[str]:
    names: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names |= {alias.name.split(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom) and not child.level:
            names.add(child.module.split(".")[0])
    return names


def test_every_module_is_in_the_table_and_in_the_package():
    assert set(IMPORTS) == set(MODULES)
    line = re.search(r"^py-modules = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert ast.literal_eval(line[1]) == MODULES  # tomllib is not in Python 3.10


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_from_volatile_to_stable(module: str):
    ours = imported(tree(module)) & set(MODULES)
    assert ours - {name for program, name in AS_PROGRAM if program == module} <= IMPORTS[module]


@pytest.mark.parametrize("module", MODULES)
def test_heavy_optional_libraries_are_imported_where_they_are_used(module: str):
    at_top = [node for node in tree(module).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not set().union(*map(imported, at_top)) & OPTIONAL


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {("yaml", "load"), ("os", "system"), ("torch", "hub"), ("pickle", "load"), ("pickle", "loads")}
FORBIDDEN_KEYWORDS = {("weights_only", False), ("trust_remote_code", True), ("shell", True), ("allow_pickle", True)}


@pytest.mark.parametrize("module", MODULES)
def test_s3_no_file_can_be_made_to_run_code(module: str):
    assert not imported(tree(module)) & {"pickle", "marshal", "shelve", "dill"}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, node.lineno
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in FORBIDDEN_ATTRIBUTES, node.lineno
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            assert (node.arg, node.value.value) not in FORBIDDEN_KEYWORDS, node.lineno


@pytest.mark.parametrize("module", MODULES)
def test_public_signatures_are_annotated(module: str):
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare, f"{node.name}: {bare}"


IMPORT_ALL = """
import sys, socket
before = set(sys.modules)
def refuse(*args, **kwargs): raise AssertionError("network at import")
socket.socket.connect = refuse
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {optional!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Gone())
import {modules}
import torch
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
"""


def test_k08_s10_importing_everything_needs_no_network_device_or_optional_package():
    code = IMPORT_ALL.format(optional=sorted(OPTIONAL), modules=", ".join(MODULES))
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def text_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, cwd=ROOT)
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


SECRETS = re.compile(r"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY")


def test_w02_the_tree_holds_no_secrets():
    for path in text_files():
        assert not SECRETS.search(path.read_text(encoding="utf-8", errors="replace")), path


def test_w01_files_that_the_documentation_names_exist():
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for name in set(re.findall(r"`([\w/]+\.(?:py|yaml|md|toml|txt))`", text)):
            assert (ROOT / name).exists(), f"{document} names {name}"
        targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
        known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert targets <= known, f"{document}: {targets - known}"


def test_w01_options_that_the_readme_uses_exist():
    from config import load_config

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for script, options in re.findall(
        r"^(?:\$ )?python (train|infer|finetune|eval)\.py ?(.*?)(?:\s{2,}#.*)?$", text, re.MULTILINE
    ):
        words = re.findall(r"\"[^\"]*\"|'[^']*'|\S+", options)
        if "--help" not in words:
            load_config([word.strip("\"'") for word in words], script)


def test_k04_every_configuration_key_is_read_somewhere():
    """A key that nothing reads is a promise that nothing keeps."""
    from dataclasses import fields, is_dataclass
    from typing import get_type_hints

    from config import Config
    from model import Sampling

    # Not config.py: there a section checks its own keys, which does not make them do anything.
    others = [module for module in MODULES if module != "config"]
    code = "\n".join((ROOT / f"{module}.py").read_text(encoding="utf-8") for module in others)
    handed_on = {field.name for field in fields(Sampling)}  # InferConfig.sampling passes these as a whole
    for section, kind in get_type_hints(Config).items():
        assert is_dataclass(kind)
        for field in fields(kind):
            read = re.search(
                rf"\b(?:cfg|self|train|loop|log|infer|finetune|contrast|eval|run|data|m|model|routing)\.{field.name}\b",
                code,
            )
            assert read or field.name in handed_on, f"{section}.{field.name}"
