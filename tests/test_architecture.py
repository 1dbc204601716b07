"""The rules of the house that a machine can hold: who imports whom, and what no file may do."""

from __future__ import annotations

import ast
import itertools
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The reading order: a file imports files to its left only, inside functions too, without exceptions.
LIBRARY = (
    "redact errors files manifest sources model kernels quantize cpu_kernels fast distributed heartbeat lora routing "
    "flops config patterns gguf_reader tokenizer builtin corpus chat_template chat data hf_format weights runfolder "
    "optim log plan evaluate harness run_reader report gguf"
).split()
WINGS = "injection.triplets injection.contrast injection.score injection.suite share.card share.hub".split()
SCRIPTS = "train finetune infer eval bench checkpoint".split()
AT_ROOT = {"model", "data", *SCRIPTS}
ORDER = [name if name in AT_ROOT else f"nanoqwen.{name}" for name in (*LIBRARY, *WINGS, *SCRIPTS)]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for pattern in ("*.py", "nanoqwen/**/*.py")
    for path in ROOT.glob(pattern)
    if path.name != "__init__.py"
)
KERNELS = "nanoqwen.kernels"
OPTIONAL = {
    "datasets",
    "wandb",
    "lm_eval",
    "transformers",
    "huggingface_hub",
    "gguf",
    "pyarrow",
    "zstandard",
    "triton",
}


def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def imported(node: ast.AST) -> set[str]:
    names: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names |= {alias.name.split(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom) and not child.level:
            names.add(child.module.split(".")[0])
    return names


def ours(module: str) -> set[str]:
    """Files of ours that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & set(MODULES)


def test_every_file_is_in_the_reading_order():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_every_import_goes_to_the_left(module: str):
    place, others = ORDER.index(module), ours(module)
    assert others <= set(ORDER[:place])
    assert not others & set(SCRIPTS) - ({"train"} if module in ("finetune", "bench") else set())
    if place < len(LIBRARY):
        assert not {name for name in others if name.count(".") > 1}, "only scripts import the wings"


def test_only_scripts_have_a_main():
    """And the two files that are a command beside it."""
    with_main = {name for name in MODULES if any(getattr(node, "name", "") == "main" for node in tree(name).body)}
    assert with_main == {*SCRIPTS, "data", "nanoqwen.report"}


def test_the_model_knows_nothing_of_routing_but_the_protocol():
    text = (ROOT / "model.py").read_text(encoding="utf-8")
    assert not re.findall(r"RoutedCache|SelectedSlots|DTF|MoD|surprise|selected|import nanoqwen", text)


# What a run needs at its end, or never, is not loaded with its start.
LATE = ("nanoqwen.injection", "nanoqwen.share", "nanoqwen.report", "nanoqwen.harness", "torch.distributed.fsdp")
LATE_CODE = f"import sys, train; print([name for name in sys.modules if name.startswith({LATE!r})])"


def test_importing_train_loads_no_wing_report_or_harness():
    done = subprocess.run([sys.executable, "-c", LATE_CODE], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


LONGEST_FILE, LONGEST_MODEL, LONGEST_FUNCTION = 930, 1500, 60  # lines; 1,300 is the aim for model.py


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short_enough_to_read(module: str):
    lines = len((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8").splitlines())
    assert lines <= (LONGEST_MODEL if module == "model" else LONGEST_FILE)
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= LONGEST_FUNCTION}
    assert not long


@pytest.mark.parametrize("module", MODULES)
def test_heavy_optional_libraries_are_imported_where_they_are_used(module: str):
    at_top = [node for node in tree(module).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    allowed = {"triton"} if module == KERNELS else set()  # whose kernels are decorated functions; imported where used
    assert not set().union(*map(imported, at_top)) & OPTIONAL - allowed


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
    code = IMPORT_ALL.format(optional=sorted(OPTIONAL), modules=", ".join(name for name in MODULES if name != KERNELS))
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def text_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, cwd=ROOT)
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


SECRETS = re.compile(r"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY")


def test_w02_the_tree_holds_no_secrets():
    for path in text_files():
        assert not SECRETS.search(path.read_text(encoding="utf-8", errors="replace")), path


def test_k04_every_configuration_key_is_read_somewhere():
    """A key that nothing reads is a promise that nothing keeps."""
    from dataclasses import fields, is_dataclass
    from typing import get_type_hints

    from model import Sampling
    from nanoqwen.config import Config

    # Not where a section checks its own keys, which does not make them do anything.
    trees = [tree(module) for module in MODULES]
    for node in itertools.chain.from_iterable(map(ast.walk, trees)):
        if isinstance(node, ast.ClassDef):
            node.body = [part for part in node.body if getattr(part, "name", "") != "__post_init__"] or [ast.Pass()]
    code = "\n".join(map(ast.unparse, trees))
    handed_on = {field.name for field in fields(Sampling)}  # generate and stream take these as a whole
    for section, kind in get_type_hints(Config).items():
        assert is_dataclass(kind)
        for field in fields(kind):
            read = re.search(
                rf"\b(?:cfg|self|train|loop|log|infer|finetune|contrast|eval|run|data|m|model|routing)\.{field.name}\b",
                code,
            )
            assert read or field.name in handed_on, f"{section}.{field.name}"


@pytest.mark.parametrize("script", [*SCRIPTS, "data"])
def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(script: str):
    """Somebody who has mistyped is answered with a page of torch."""
    process = subprocess.Popen([sys.executable, f"{script}.py"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert "Traceback" not in said
    assert process.returncode == -signal.SIGINT
