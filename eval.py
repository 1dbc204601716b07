"""Figures of a finished model, with their uncertainty.

    python eval.py --ckpt runs/base                           loss, perplexity and bits per byte of held-out text
    python eval.py --ckpt FOLDER --data "notes/*.md"          any model, any text
    python eval.py --ckpt runs/base --tasks mine --include_path tasks     tasks of lm-eval: see harness.py
    python eval.py --suite injection --ckpt runs/contrast     attacks, beside the model that it was made from
    python eval.py --suite injection --ckpt runs/contrast --data rows.jsonl --output figures.json

The table goes to stdout; all figures, and of an attack every answer, go to a JSON file.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from data import Batch, PretrainBatches, chat_windows, eval_windows
from nanoqwen.chat import prepare_chat
from nanoqwen.config import (
    ChatConfig,
    Config,
    ContrastConfig,
    DataConfig,
    FinetuneConfig,
    TrainConfig,
    check,
    load_config,
)
from nanoqwen.corpus import expand, prepare
from nanoqwen.distributed import ranks
from nanoqwen.errors import ConfigError, DataError, escape_terminal, run_script
from nanoqwen.evaluate import (
    Estimate,
    Finished,
    Measured,
    figures_file,
    json_text,
    measure_finished,
    open_finished,
    recorded,
    run_of,
    section,
)
from nanoqwen.files import write_atomic
from nanoqwen.harness import ask_tasks, record_of
from nanoqwen.injection.suite import injection_suite
from nanoqwen.injection.triplets import prepare_triplets, row_width, triplet_windows

WIDTH = 1024  # tokens in a row of held-out text for a model that does not say, if its context holds them
ALL = 1 << 40  # rows, or triplets: more than there are

# --- held-out text ----------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """What is predicted."""

    windows: list[Batch]
    what: str
    seq_len: int


def text_of(cfg: Config, of: Finished) -> Text:
    """The text that is named; else what the run that wrote the model was validated on; else that of `data`."""
    run = recorded(of.folder)
    tuned = bool(run.get("finetune", {}).get("base_ckpt"))
    loop = section(run, "finetune", FinetuneConfig) if tuned else section(run, "train", TrainConfig)
    context, limit = of.model.cfg.context, cfg.eval.limit
    width = cfg.eval.seq_len or (loop.seq_len if run else min(context, WIDTH))
    if width > context:
        raise ConfigError(f"eval.seq_len: expected at most the model's context of {context}, got {width}")
    most = loop.eval_tokens if limit is None and not cfg.eval.data else (limit or ALL) * width
    rows = max(1, cfg.eval.batch_tokens // width)
    if tuned and not cfg.eval.data:
        return conversations(of, run, replace(loop, seq_len=width, batch_tokens=width * loop.rows), most, rows)
    data, what = documents(cfg, run, of.folder)
    try:
        prepared = prepare(data, of.model.cfg.vocab_size, tokenizer=of.tokenizer)
    except DataError as error:  # a mistake bears the name of the key that the person has set
        raise DataError(str(error).replace("data.val: ", "eval.data: ", bool(cfg.eval.data))) from None
    if prepared.train and PretrainBatches(prepared.train, width, 1, 0).fingerprint != trained_on(of.folder):
        print("warning    the text of the run has changed since")
    windows = eval_windows(prepared.val, width, most, rows=rows, isolate_documents=data.isolate_documents)
    return Text(windows, what, width)


def documents(cfg: Config, run: dict[str, dict[str, Any]], folder: Path) -> tuple[DataConfig, str]:
    """(where the text is, as `data.val` or as what is held out of `data.train`; what to call it)"""
    named = cfg.eval.data
    if named:
        expand(named, "eval.data")
        apart = section(run, "data", DataConfig).isolate_documents if run else cfg.data.isolate_documents
        # Training text that is streamed is not tokenised here, and none is wanted.
        data = replace(cfg.data, train=named, val=named, streaming=True, isolate_documents=apart)
        return data, ", ".join(named)
    if run:
        data = replace(section(run, "data", DataConfig), cache_dir=cfg.data.cache_dir)
        return data, f"validation text of {run_of(folder) or folder}"
    return replace(cfg.data, streaming=True), f"held out of {', '.join(cfg.data.val or cfg.data.train)}"


def trained_on(folder: Path) -> str | None:
    """Fingerprint of the training text, as a run recorded it."""
    return json.loads((folder / "state.json").read_bytes()).get("data")


def conversations(of: Finished, run: dict[str, dict[str, Any]], loop: FinetuneConfig, most: int, rows: int) -> Text:
    """What a fine-tuned model was validated on: answers alone, each after its conversation."""
    what, width = f"validation data of {run_of(of.folder) or of.folder}", loop.seq_len
    if loop.objective == "sft":
        chats = prepare_chat(section(run, "chat", ChatConfig), of.tokenizer, width)
        return Text(chat_windows(chats.val, width, most, rows=rows), what, width)
    found = prepare_triplets(section(run, "contrast", ContrastConfig), of.tokenizer, width)
    width = row_width(found.train, width, loop.rows, of.model.cfg.context)
    return Text(triplet_windows(found.val, width, most, rows=rows), what, width)


def heldout_suite(cfg: Config) -> None:
    of = open_finished(cfg)
    output = figures_file(cfg, of.folder, "heldout.json")
    text = text_of(cfg, of)
    found = measure_finished(of, text.windows, cfg.eval.calibrate)
    print(escape_terminal(heldout_table(found, text)))
    figures = {name: plain(each) for name, each in found.items()}
    named = {"suite": "heldout", "data": text.what, "seq_len": text.seq_len, "calibrated": cfg.eval.calibrate}
    named["isolate_documents"] = text.windows[0].documents is not None
    write_atomic(output, json_text(record_of(cfg, of) | named | figures))
    print(f"wrote {output}")


def plain(found: Measured) -> dict[str, Any]:
    """For JSON."""

    def each(value: Any) -> Any:
        return {"value": value.value, "standard_error": value.error} if isinstance(value, Estimate) else value

    return {name: each(value) for name, value in found._asdict().items()}


def heldout_table(found: dict[str, Measured], text: Text) -> str:
    """Markdown: each figure with its standard error over rows of text."""
    first = next(iter(found.values()))
    size = f"{first.rows:,} rows of {text.seq_len:,} tokens, {first.tokens:,} of them predicted, {first.bytes:,} bytes"
    lines = [
        f"text       {text.what}: {size}",
        "",
        f"| ± standard error over rows | {' | '.join(found)} |",
        "| --- |" + " --- |" * len(found),
        f"| nats per token | {' | '.join(str(each.loss) for each in found.values())} |",
        f"| perplexity | {' | '.join(str(each.perplexity) for each in found.values())} |",
        f"| bits per byte | {' | '.join(str(each.bits_per_byte) for each in found.values())} |",
    ]
    if first.used is not None:
        shares = " | ".join(f"{100 * each.used:.1f}" for each in found.values())
        lines.append(f"| tokens that routed layers compute, % | {shares} |")
    return "\n".join(lines)


# --- command line -----------------------------------------------------------------------------------------------------

SUITES = {"heldout": heldout_suite, "injection": injection_suite}


def main(argv: list[str]) -> None:
    usage = "python eval.py [FILE.yaml] --ckpt SOURCE [--suite NAME] [--tasks NAMES] [--key=value ...]"
    cfg = load_config(argv, "eval", usage=usage)
    check(cfg)
    if ranks() > 1:
        raise ConfigError(f"eval.py: expected one process, got {ranks()} of torchrun")
    asked = [SUITES[cfg.eval.suite]] if cfg.eval.suite else []
    asked += [ask_tasks] if cfg.eval.tasks else []
    if len(asked) > 1 and cfg.eval.output:
        raise ConfigError("eval.output: expected one of suite and tasks, got both, each with a file of its own")
    for ask in asked or [heldout_suite]:
        ask(cfg)


if __name__ == "__main__":
    run_script(main)
