"""The model card of an exported folder: `card.md` is its text, this file gathers the facts.

The facts are those on disk: of the model, and of the run folder that it comes from (data, command, losses, lineage).
Text from there stays text, whatever it spells; secrets and the user's folders are left out.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import torch
import yaml

from model import GPT
from nanoqwen import redact as secrets
from nanoqwen.errors import CheckpointError, one_line
from nanoqwen.files import read_json_or_empty
from nanoqwen.hf_format import OWN_TYPE, model_type
from nanoqwen.run_reader import read_jsonl
from nanoqwen.runfolder import recorded_base
from nanoqwen.tokenizer import QWEN2_PATTERN, Tokenizer
from nanoqwen.weights import (
    ADAPTER_WEIGHTS,
    HUB_ID,
    Adapter,
    is_adapter,
    path_exists,
    read_adapter,
    resolve,
    routing_note,
)

METRICS_SHOWN = 40  # of a report
UNRECORDED = "Not recorded in the folder that this was made from."
AUTOTOKENIZER_NOTE = (
    "AutoTokenizer takes Qwen2's split pattern for this model_type, which is not this tokenizer's; "
    "PreTrainedTokenizerFast.from_pretrained reads it as it is"
)

# --- what a run folder knows ------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """What a run folder says about one of its checkpoints. Empty where the weights come from elsewhere."""

    state: dict[str, Any]  # state.json of the checkpoint
    source: dict[str, Any]  # source.json: code and command
    metrics: list[dict[str, Any]]  # metrics.jsonl
    reports: dict[str, dict[str, Any]]  # of eval.py, by the name of the file

    def section(self, name: str) -> dict[str, Any]:
        """Of the configuration."""
        return (self.state.get("config") or {}).get(name) or {}

    @property
    def loop(self) -> str:
        """The section of its loop, `train` or `finetune`."""
        return "finetune" if self.section("finetune").get("base_ckpt") else "train"

    @property
    def base(self) -> str | None:
        """What the run started from, as it was named then."""
        return recorded_base(self.state.get("config") or {})


def origin_of(folder: Path) -> Origin:
    folder = folder.resolve()
    if folder.parent.name != "checkpoints":
        return Origin({}, {}, [], {})
    run = folder.parents[1]
    files = [file for file in sorted(run.glob("*.json")) if file.name not in ("source.json", "status.json")]
    reports = {file.name: report for file in files if (report := read_json_or_empty(file))}
    metrics = [row for row in read_jsonl(run / "metrics.jsonl") if type(row.get("step")) is int]
    return Origin(read_json_or_empty(folder / "state.json"), read_json_or_empty(run / "source.json"), metrics, reports)


# --- text from elsewhere ----------------------------------------------------------------------------------------------

# An absolute path, up to what ends it in an option or a list; blanks are a part of it.
_PATH = re.compile(r"""(?<![\w.:/\\~-])(?:file:/{2,3})?(?:~\w*|[A-Za-z]:)?[/\\][^\s"'\[\],;=|][^"'\[\],;=|]*""")
_USER_NAME = re.compile(r"""([/\\](?:home|Users)[/\\])[^/\\"'\[\],;=|]+(?=[/\\"'\[\],;=|]|$)""")
_QUERY = re.compile(r"(\w://[^\s?#]+)[?#]\S*")  # of an address; keys hide there


def redact(text: str) -> str:
    """Text without secrets, and with nothing of an absolute path but its last part."""
    text = secrets.redact(_QUERY.sub(r"\1", text))
    home = os.path.expanduser("~")
    if len(home) > 1:  # in some containers it is /
        text = text.replace(home, "/home/~")
    text = _USER_NAME.sub(r"\1~", text)
    return _PATH.sub(lambda path: "…/" + re.split(r"[/\\]", path[0].rstrip("/\\"))[-1], text)


def code_span(text: object) -> str:
    """Text in a code span, where no markdown, HTML or YAML in it acts."""
    line = one_line(redact(str(text))).replace("|", "¦")  # a bar would end a cell of a table
    fence = _fence(line, 1)
    return f"{fence} {line} {fence}" if "`" in line or not line.strip() else f"`{line}`"


def _fence(text: str, shortest: int) -> str:
    """More backticks than stand anywhere in a row in the text."""
    return "`" * max(shortest, 1 + max(map(len, re.findall("`+", text)), default=0))


def _table(*rows: Sequence[str]) -> str:
    """A markdown table; the first row is its header."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


# --- the card ---------------------------------------------------------------------------------------------------------


def model_card(
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
    origin, bases = origin_of(folder), list(_bases(folder, adapter))
    facts = {
        "front_matter": _front_matter(name, model, origin, next(filter(is_hub_id, [str(source), *bases]), None), apart),
        "name": code_span(name),
        "snippet": snippet(model, tokenizer, chat=origin.loop == "finetune", apart=apart),
        "note": _note(model, tokenizer),
        "local_base": code_span(adapter.base) if apart and not is_hub_id(adapter.base) else "",
        **_description(model, adapter if apart else None, dtype),
        **_training(origin, tokenizer),
        "losses": _losses(origin),
        "reports": "\n\n".join(_reports(origin)),
        **_lineage(folder, origin, adapter, bases),
    }
    return secrets.redact(_fill(_text("card.md"), facts))


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _fill(template: str, facts: dict[str, str]) -> str:
    """The template with its fields filled. A line with an empty field is left out, then a section without lines."""
    lines = [line for line in template.splitlines() if all(facts[field] for field in re.findall(r"{(\w+)}", line))]
    text = re.sub(r"^## .*\n\s*(?=## |\Z)", "", "\n".join(lines), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip().format_map(facts) + "\n"


def _front_matter(name: str, model: GPT, origin: Origin, base: str | None, apart: bool) -> str:
    kind = model_type(model)
    tags = [OWN_TYPE, kind, *([model.routing.kind] if model.routing else [])]
    tags += ["lora"] * apart + ["conversational"] * (origin.loop == "finetune")
    metadata = {
        "library_name": OWN_TYPE if kind == OWN_TYPE else "peft" if apart else "transformers",
        "pipeline_tag": "text-generation",
        "model_name": one_line(redact(name)),
        **({"base_model": base} if base else {}),
        "tags": list(dict.fromkeys(tags)),
    }
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=2**20).rstrip("\n")


def _description(model: GPT, adapter: Adapter | None, dtype: torch.dtype | None) -> dict[str, str]:
    cfg = model.cfg
    stored = dtype or model.model.embed_tokens.weight.dtype
    return {
        "type": model_type(model),
        "shape": f"{cfg.num_hidden_layers} layers of width {cfg.hidden_size}, context of {cfg.context:,} tokens",
        "dtype": str(stored).removeprefix("torch."),
        "size": "" if adapter else f"{sum(p.numel() for p in model.parameters()):,}",
        "rank": str(adapter.config.rank) if adapter else "",
        "adapter_size": f"{sum(tensor.numel() for tensor in adapter.tensors.values()):,}" if adapter else "",
    }


def snippet(model: GPT, tokenizer: Tokenizer | None, *, chat: bool, apart: bool) -> str:
    """Python that loads the folder it lies in, and uses it. Of an adapter alone, peft loads the base that it names."""
    snippets = dict(
        re.findall(r"^## ([^\n]+)\n\n```python\n(.*?)\n```$", _text("snippets.md"), re.DOTALL | re.MULTILINE)
    )
    if model_type(model) == OWN_TYPE:
        return snippets["own format, text" if tokenizer else "own format, token ids"]
    package, loader = ("peft", "AutoPeftModelForCausalLM") if apart else ("transformers", "AutoModelForCausalLM")
    imports, reader, kind = f"from {package} import {loader}", "", "token ids"
    if tokenizer is not None:
        reader = "AutoTokenizer" if autotokenizer_fits(model, tokenizer) else "PreTrainedTokenizerFast"
        imports += f"\nfrom transformers import {reader}" if apart else f", {reader}"
        kind = "chat" if chat and tokenizer.chat_template else "text"
    return Template(snippets[kind]).substitute(imports=imports, loader=loader, reader=reader)


def autotokenizer_fits(model: GPT, tokenizer: Tokenizer) -> bool:
    """transformers 5 gives every folder of model_type qwen2 Qwen2's own split pattern and normaliser."""
    return model_type(model) != "qwen2" or (tokenizer.engine.nfc and tokenizer.engine.pattern == QWEN2_PATTERN)


def _note(model: GPT, tokenizer: Tokenizer | None) -> str:
    if model.routing:
        return routing_note(model).rstrip("\n")
    if model_type(model) == OWN_TYPE:
        return "No class of transformers computes this shape."
    return f"{AUTOTOKENIZER_NOTE}." if tokenizer is not None and not autotokenizer_fits(model, tokenizer) else ""


def _training(origin: Origin, tokenizer: Tokenizer | None) -> dict[str, str]:
    loop = origin.section(origin.loop)
    data = "data" if origin.loop == "train" else "contrast" if loop.get("objective") == "contrast" else "chat"
    step = origin.state.get("step") or 0
    targets = sum(row["targets"] for row in origin.metrics if "targets" in row and row["step"] <= step)
    facts = {
        "data": ", ".join(map(code_span, origin.section(data).get("train") or [])),
        "targets": f"{int(targets):,}" if targets else "",
        "tokenizer": f"{tokenizer.n_vocab:,} tokens, hash `{tokenizer.hash[:16]}`" if tokenizer else "",
        "command": _command(origin.source.get("command")),
    }
    facts["no_training"] = "" if any(facts.values()) else UNRECORDED
    tokenizer_name = None if origin.base else origin.section("data").get("tokenizer")
    if tokenizer and tokenizer_name:
        facts["tokenizer"] = f"{code_span(tokenizer_name)}, {facts['tokenizer']}"
    return facts | {"steps": f"{step:,}"} | {key: f"{loop.get(key) or 0:,}" for key in ("batch_tokens", "seq_len")}


def _command(words: Any) -> str:
    if not isinstance(words, list) or not words:
        return ""
    redacted = [Path(str(words[0])).name, *(one_line(redact(str(word))) for word in words[1:])]
    line = "python " + shlex.join(redacted)
    return f"\n\n{_fence(line, 3)}sh\n{line}\n{_fence(line, 3)}"


def _losses(origin: Origin) -> str:
    evaluations = {row["step"]: row for row in origin.metrics if _is_number(row.get("val/loss"))}
    if not evaluations:
        return ""
    labels = {
        "these weights": origin.state.get("step"),
        "lowest val/loss": min(evaluations, key=lambda step: evaluations[step]["val/loss"]),
        "last of the run": max(evaluations),
    }
    rows = []
    for step in dict.fromkeys(step for step in labels.values() if step in evaluations):
        loss, bits = (evaluations[step].get(f"val/{name}") for name in ("loss", "bits_per_byte"))
        label = ", ".join(label for label, labelled in labels.items() if labelled == step)
        rows.append((f"{step:,}", label, f"{loss:.4f}", f"{bits:.4f}" if _is_number(bits) else ""))
    return "Loss in nats per token, on validation text.\n\n" + _table(("step", "", "val/loss", "bits per byte"), *rows)


def _reports(origin: Origin) -> Iterator[str]:
    for file_name, report in origin.reports.items():
        sections = {name: value for name, value in report.items() if isinstance(value, dict)}  # numbers are settings
        metrics = list(_numbers(report.get("scores") or report.get("results") or sections))
        if metrics:
            rows = [(code_span(name), f"{value:.4g}") for name, value in metrics[:METRICS_SHOWN]]
            model = f" of {code_span(Path(str(report['model'])).name)}" if report.get("model") else ""
            rest = len(metrics) - METRICS_SHOWN
            more = f"\n\n{rest} more in the file." if rest > 0 else ""
            yield f"From {code_span(file_name)}{model}:\n\n{_table(('metric', 'value'), *rows)}{more}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of a report: fractions by their value, groups of rows by all of them; lists are left out."""
    if _is_number(value):
        yield name, value
    elif isinstance(value, dict) and _is_number(value.get("value")):
        yield name, value["value"]
    elif isinstance(value, dict):
        groups = {"all rows": value["all rows"]} if "all rows" in value else value
        for key, group in groups.items():
            yield from _numbers(group, f"{name}, {key}" if name else str(key))


# --- lineage ----------------------------------------------------------------------------------------------------------


def is_hub_id(name: str) -> bool:
    """Whether a name can only be an id on a hub. A run folder that has been deleted since is none."""
    return bool(HUB_ID.fullmatch(name)) and not path_exists(name) and not name.startswith("runs/")


def _bases(folder: Path, adapter: Adapter | None) -> Iterator[str]:
    """The base of a folder, the base of that base, and so on, as far as their folders are here."""
    seen: set[str] = set()
    base = adapter.base if adapter else origin_of(folder).base
    while base and base not in seen:
        seen.add(base)
        yield base
        try:
            folder = resolve(base) if path_exists(base) else None
            adapter = read_adapter(folder) if folder and is_adapter(folder) else None
        except CheckpointError:
            return
        base = folder and (adapter.base if adapter else origin_of(folder).base)


def _lineage(folder: Path, origin: Origin, adapter: Adapter | None, bases: list[str]) -> dict[str, str]:
    file = ADAPTER_WEIGHTS if adapter else "model.safetensors"
    manifest = read_json_or_empty(folder / "manifest.json").get("files") or {}
    commit, versions = origin.source.get("commit"), origin.source.get("versions")
    changed = " with local changes" if origin.source.get("changes") else ""
    versions = versions if isinstance(versions, dict) else {}
    base, *ancestors = [code_span(_run_name(base)) for base in bases] or [""]
    return {
        "run": code_span(folder.resolve().parents[1].name) if origin.state else "",
        "step": f"{origin.state.get('step', 0):,}",
        "weights_file": file,
        "weights_hash": (origin.state and (manifest.get(file) or {}).get("sha256")) or "",
        "commit": f"{code_span(commit)}{changed}" if commit else "",
        "versions": code_span(", ".join(f"{name} {v}" for name, v in versions.items() if v)) if versions else "",
        "base": base,
        "base_hash": (adapter and adapter.base_hash) or "",
        "ancestors": ", ".join(ancestors),
        "no_lineage": "" if origin.state or commit or versions or bases else UNRECORDED,
    }


def _run_name(base: str) -> str:
    """RUN/step-N for a checkpoint of a run: the last part of its path alone would say little."""
    path = Path(base)
    return f"{path.parents[1].name}/{path.name}" if path.parent.name == "checkpoints" else base
