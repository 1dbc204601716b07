"""Sharing a model: the card that says what it is and how it came to be, the upload to a hub, and the commands.

    python checkpoint.py export SOURCE FOLDER    the folder gets a README.md, which a hub shows as the model's card
    python checkpoint.py push FOLDER OWNER/NAME  what is complete is uploaded in one commit; --dry_run only tells what

A card has what the run folder knows: data, command, figures, lineage. Text from there stays text, whatever it spells;
secrets and the user's folders are left out. The token of the hub comes from HF_TOKEN or `hf auth login`, never from an
option, and is written nowhere.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from model import GPT
from nanoqwen.errors import CheckpointError, one_line
from nanoqwen.files import read_json_if_any
from nanoqwen.hf_format import OWN_TYPE, model_type
from nanoqwen.run_reader import rows_of
from nanoqwen.runfolder import SECRET_TEXT
from nanoqwen.tokenizer import QWEN2_PATTERN, Tokenizer
from nanoqwen.weights import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    HUB_ID,
    Adapter,
    exists,
    is_adapter,
    read_adapter,
    resolve,
    routed_note,
)

# --- what a run folder knows ------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """What a run folder tells of one of its checkpoints. Empty where the weights come from elsewhere."""

    state: dict[str, Any]  # state.json of the checkpoint
    source: dict[str, Any]  # source.json: code and command
    rows: list[dict[str, Any]]  # metrics.jsonl
    reports: dict[str, dict[str, Any]]  # what eval.py has left beside them, by the name of the file

    @property
    def config(self) -> dict[str, Any]:
        return self.state.get("config") or {}

    @property
    def base(self) -> str | None:
        """What the run started from, as it was named then."""
        return (self.config.get("finetune") or {}).get("base_ckpt")

    @property
    def data(self) -> list[str]:
        """Sources of what was trained on."""
        objective = (self.config.get("finetune") or {}).get("objective")
        section = ("contrast" if objective == "contrast" else "chat") if self.base else "data"
        return list((self.config.get(section) or {}).get("train") or [])

    @property
    def loop(self) -> dict[str, Any]:
        return self.config.get("finetune" if self.base else "train") or {}


def origin_of(folder: Path) -> Origin:
    folder = folder.resolve()
    if folder.parent.name != "checkpoints":
        return Origin({}, {}, [], {})
    run = folder.parents[1]
    files = [file for file in sorted(run.glob("*.json")) if file.name not in ("source.json", "status.json")]
    reports = {file.name: found for file in files if (found := read_json_if_any(file))}
    rows = [row for row in rows_of(run / "metrics.jsonl") if type(row.get("step")) is int]
    return Origin(read_json_if_any(folder / "state.json"), read_json_if_any(run / "source.json"), rows, reports)


# --- text from elsewhere ----------------------------------------------------------------------------------------------

# An absolute path, up to what ends it in an option or a list; blanks are a part of it.
_PATH = re.compile(r"""(?<![\w.:/\\~-])(?:file:/{2,3})?(?:~\w*|[A-Za-z]:)?[/\\][^\s"'\[\],;=|][^"'\[\],;=|]*""")
_OF_A_PERSON = re.compile(r"""([/\\](?:home|Users)[/\\])[^/\\"'\[\],;=|]+(?=[/\\"'\[\],;=|]|$)""")
_QUERY = re.compile(r"(\w://[^\s?#]+)[?#]\S*")  # of an address; keys hide there


def public(text: str) -> str:
    """Text without secrets, and with nothing of an absolute path but its last part."""
    text = SECRET_TEXT.sub("***", _QUERY.sub(r"\1", text))
    home = os.path.expanduser("~")
    if len(home) > 1:  # in some containers it is /
        text = text.replace(home, "/home/~")
    text = _OF_A_PERSON.sub(r"\1~", text)
    return _PATH.sub(lambda path: "…/" + re.split(r"[/\\]", path[0].rstrip("/\\"))[-1], text)


def code(text: object) -> str:
    """Text in a code span, where no markdown, HTML or YAML in it acts."""
    line = one_line(public(str(text))).replace("|", "¦")  # which would end a cell of a table
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line or not line.strip() else f"`{line}`"


def _block(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}\n"


# --- the card ---------------------------------------------------------------------------------------------------------


def card(
    name: str,
    source: str | Path,
    model: GPT,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype | None = None,
    adapter: Adapter | None = None,
    apart: bool = False,
) -> str:
    """The README.md of an exported folder.

    adapter  of the source, if it has one; `apart`: the folder holds the adapter alone
    """
    folder = resolve(source)
    origin, parents = origin_of(folder), list(_ancestors(folder, adapter))
    hub_ids = [parent for parent in [str(source), *parents] if on_hub(parent)]
    sections = [
        f"---\n{_front_matter(name, model, origin, next(iter(hub_ids), None), apart)}---",
        f"# {code(name)}",
        _what(model, adapter if apart else None, dtype),
        "## Use",
        _block(snippet(model, tokenizer, chat=bool(origin.base), apart=apart), "python").rstrip("\n"),
        *_notes(model, tokenizer, adapter if apart else None),
        "## Training",
        _training(origin, tokenizer),
        *_figures(origin),
        "## Lineage",
        _lineage(folder, origin, adapter, parents),
    ]
    return SECRET_TEXT.sub("***", "\n\n".join(section.strip("\n") for section in sections if section)) + "\n"


def _front_matter(name: str, model: GPT, origin: Origin, base: str | None, apart: bool) -> str:
    kind = model_type(model)
    tags = [OWN_TYPE, kind, *([model.routing.kind] if model.routing else [])]
    tags += ["lora"] * apart + ["conversational"] * bool(origin.base)
    known = {
        "library_name": OWN_TYPE if kind == OWN_TYPE else "peft" if apart else "transformers",
        "pipeline_tag": "text-generation",
        "model_name": one_line(public(name)),
        **({"base_model": base} if base else {}),
        "tags": list(dict.fromkeys(tags)),
    }
    return yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=2**20)


def _what(model: GPT, adapter: Adapter | None, dtype: torch.dtype | None) -> str:
    cfg = model.cfg
    stored = str(dtype or model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    size = sum(p.numel() for p in model.parameters())
    shape = f"{cfg.num_hidden_layers} layers of width {cfg.hidden_size}, context of {cfg.context:,} tokens"
    if adapter is None:
        return f"A language model of type {model_type(model)}: {size:,} parameters in {stored}, {shape}."
    own = sum(tensor.numel() for tensor in adapter.tensors.values())
    what = f"An adapter (LoRA of rank {adapter.config.rank}) of {own:,} parameters for a language model of type"
    return f"{what} {model_type(model)}: {shape}. Without its base it is nothing."


_LOAD = """\
source = "."  # this folder, or its id on a hub
tokenizer = {reader}.from_pretrained(source)
model = {loader}.from_pretrained(source)
"""
_CONTINUE = """\
inputs = tokenizer("def ", return_tensors="pt", return_token_type_ids=False)
ids = model.generate(**inputs, max_new_tokens=40)
print(tokenizer.decode(ids[0], skip_special_tokens=True))"""
_CHAT = """\
messages = [{"role": "user", "content": "What is a list?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=40)
print(tokenizer.decode(ids[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_WITHOUT_TOKENIZER = """\
model = {loader}.from_pretrained(".")  # this folder, or its id on a hub
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=40))"""
_OWN = """\
from nanoqwen.weights import load_model  # of the program that wrote this folder
from model import generate

model, tokenizer = load_model(".")
ids = generate(model, [{prompt}], max_new_tokens=40, temperature=0.0)[0]
print({shown})"""


def snippet(model: GPT, tokenizer: Tokenizer | None, *, chat: bool, apart: bool) -> str:
    """Python that loads the folder it lies in, and uses it. Of an adapter alone, peft loads the base that it names."""
    if model_type(model) == OWN_TYPE:
        prompt, shown = ('tokenizer.encode("def ")', "tokenizer.decode(ids)") if tokenizer else ("[1, 2, 3]", "ids")
        return _OWN.format(prompt=prompt, shown=shown)
    package, loader = ("peft", "AutoPeftModelForCausalLM") if apart else ("transformers", "AutoModelForCausalLM")
    if tokenizer is None:
        return f"import torch\nfrom {package} import {loader}\n\n{_WITHOUT_TOKENIZER.format(loader=loader)}"
    reader = "AutoTokenizer" if auto_reads(model, tokenizer) else "PreTrainedTokenizerFast"
    between = f"\nfrom transformers import {reader}" if apart else f", {reader}"
    imports = f"from {package} import {loader}{between}"
    use = _CHAT if chat and tokenizer.chat_template else _CONTINUE
    return f"{imports}\n\n{_LOAD.format(reader=reader, loader=loader)}\n{use}"


def auto_reads(model: GPT, tokenizer: Tokenizer) -> bool:
    """transformers 5 gives every folder of model_type qwen2 Qwen2's own split pattern and normaliser."""
    return model_type(model) != "qwen2" or (tokenizer.nfc and tokenizer.pattern == QWEN2_PATTERN)


AUTOTOKENIZER_NOTE = (
    "note: AutoTokenizer takes Qwen2's split pattern for this model_type, which is not this tokenizer's; "
    "PreTrainedTokenizerFast.from_pretrained reads it as it is"
)


def _notes(model: GPT, tokenizer: Tokenizer | None, adapter: Adapter | None) -> Iterator[str]:
    if model.routing:
        yield routed_note(model)
    elif model_type(model) == OWN_TYPE:
        yield "No class of transformers computes this shape."
    elif tokenizer is not None and not auto_reads(model, tokenizer):
        yield AUTOTOKENIZER_NOTE.removeprefix("note: ") + "."
    if adapter is not None and not on_hub(adapter.base):
        yield (
            f"`{ADAPTER_CONFIG}` names its base, {code(adapter.base)}, by the folder in which it lay. "
            "`checkpoint.py export --base OWNER/NAME` puts an id on a hub there."
        )


def _training(origin: Origin, tokenizer: Tokenizer | None) -> str:
    lines = [f"- data: {', '.join(map(code, origin.data))}"] if origin.data else []
    step, loop = origin.state.get("step"), origin.loop
    targets = sum(row["targets"] for row in origin.rows if "targets" in row and row["step"] <= (step or 0))
    if targets:
        cut = f"{loop.get('batch_tokens', 0):,} positions a step in rows of {loop.get('seq_len', 0):,}"
        lines.append(f"- trained on {int(targets):,} tokens in {step:,} steps, {cut}")
    if tokenizer is not None:
        named = None if origin.base else (origin.config.get("data") or {}).get("tokenizer")
        known = f"{tokenizer.n_vocab:,} tokens, hash `{tokenizer.hash[:16]}`"
        lines.append(f"- tokenizer: {f'{code(named)}, ' if named else ''}{known}")
    words = origin.source.get("command")
    if isinstance(words, list) and words:
        shown = [Path(str(words[0])).name, *(one_line(public(str(word))) for word in words[1:])]
        lines.append("- command:\n\n" + _block("python " + shlex.join(shown), "sh"))
    return "\n".join(lines) or "Not recorded in the folder that this was made from."


def _figures(origin: Origin) -> Iterator[str]:
    evaluations = {row["step"]: row for row in origin.rows if _number(row.get("val/loss"))}
    if evaluations:
        best = min(evaluations.values(), key=lambda row: row["val/loss"])["step"]
        named = {
            "these weights": origin.state.get("step"),
            "lowest val/loss": best,
            "last of the run": max(evaluations),
        }
        lines = ["| step | | val/loss | bits per byte |", "| --- | --- | --- | --- |"]
        for step in dict.fromkeys(step for step in named.values() if step in evaluations):
            row, labels = evaluations[step], [label for label, at in named.items() if at == step]
            bits = row.get("val/bits_per_byte")
            shown = f"{bits:.4f}" if _number(bits) else ""
            lines.append(f"| {step:,} | {', '.join(labels)} | {row['val/loss']:.4f} | {shown} |")
        yield "## Figures"
        yield "Loss in nats a token, on validation text.\n\n" + "\n".join(lines)
    for name, report in origin.reports.items():
        nested = {name: part for name, part in report.items() if isinstance(part, dict)}  # bare numbers are settings
        figures = list(_leaves(report.get("scores") or report.get("results") or nested))
        if figures:
            rows = [f"| {code(label)} | {value:.4g} |" for label, value in figures[:FIGURES_SHOWN]]
            of = f" of {code(Path(str(report['model'])).name)}" if report.get("model") else ""
            more = f"\n\n{len(figures) - FIGURES_SHOWN} more in the file." if len(figures) > FIGURES_SHOWN else ""
            yield f"From {code(name)}{of}:\n\n| figure | value |\n| --- | --- |\n" + "\n".join(rows) + more


FIGURES_SHOWN = 40  # of a report


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of a report: shares by their value, groups of rows by all of them; lists are left out."""
    if _number(value):
        yield name, value
    elif isinstance(value, dict) and _number(value.get("value")):
        yield name, value["value"]
    elif isinstance(value, dict):
        parts = {"all rows": value["all rows"]} if "all rows" in value else value
        for key, part in parts.items():
            yield from _leaves(part, f"{name}, {key}" if name else str(key))


# --- lineage ----------------------------------------------------------------------------------------------------------


def on_hub(name: str) -> bool:
    """Whether a name can only be an id on a hub. A run that has gone away since is none."""
    return bool(HUB_ID.fullmatch(name)) and not exists(name) and not name.startswith("runs/")


def _ancestors(folder: Path, adapter: Adapter | None) -> Iterator[str]:
    """The bases of a folder, the nearest first, as far as they are here to be asked."""
    seen: set[str] = set()
    base = adapter.base if adapter else origin_of(folder).base
    while base and base not in seen:
        seen.add(base)
        yield base
        try:
            folder = resolve(base) if exists(base) else None
            adapter = read_adapter(folder) if folder and is_adapter(folder) else None
        except CheckpointError:
            return
        base = folder and (adapter.base if adapter else origin_of(folder).base)


def _lineage(folder: Path, origin: Origin, adapter: Adapter | None, parents: list[str]) -> str:
    lines = []
    if origin.state:
        run = code(folder.resolve().parents[1].name)
        lines.append(f"- weights: run {run}, step {origin.state.get('step', 0):,}{_file_hash(folder, adapter)}")
    if commit := origin.source.get("commit"):
        changed = " with local changes" if origin.source.get("changes") else ""
        lines.append(f"- code: commit {code(commit)}{changed}")
    versions = origin.source.get("versions") or {}
    if isinstance(versions, dict) and versions:
        lines.append("- versions: " + code(", ".join(f"{name} {v}" for name, v in versions.items() if v)))
    for number, base in enumerate(parents):
        known = f", weights `{adapter.base_hash}`" if adapter and adapter.base_hash and not number else ""
        lines.append(f"- {'base' if not number else 'made from'}: {code(_run_name(base))}{known}")
    return "\n".join(lines) or "Not recorded in the folder that this was made from."


def _file_hash(folder: Path, adapter: Adapter | None) -> str:
    files = read_json_if_any(folder / "manifest.json").get("files") or {}
    found = (files.get(ADAPTER_WEIGHTS if adapter else "model.safetensors") or {}).get("sha256")
    return f", {'adapter' if adapter else 'file'} `{found}`" if found else ""


def _run_name(base: str) -> str:
    """RUN/step-N for a checkpoint of a run: of a path the last part alone would not tell much."""
    path = Path(base)
    if path.parent.name == "checkpoints":
        return f"{path.parents[1].name}/{path.name}"
    return base
