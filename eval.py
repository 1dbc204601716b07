"""Metrics of a finished model, with their uncertainty.

    python eval.py --ckpt runs/base                           loss, perplexity and bits per byte of held-out text
    python eval.py --ckpt FOLDER --data "notes/*.md"          any model, any text
    python eval.py --ckpt runs/base --tasks mine --include_path tasks     tasks of lm-eval: see nanoqwen/harness.py
    python eval.py --suite injection --ckpt runs/contrast     success of attacks, beside the model's base
    python eval.py --suite injection --ckpt runs/contrast --data rows.jsonl --output scores.json

A table goes to stdout; all metrics, and each answer to an attack, go to a JSON file.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C while torch is being imported: leave, without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
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
from nanoqwen.errors import ConfigError, DataError, escape_terminal, run_script, say
from nanoqwen.evaluate import (
    Estimate,
    LoadedModel,
    Measured,
    evaluate_with_errors,
    json_text,
    load_for_eval,
    recorded_config,
    results_file,
    run_of,
    section,
)
from nanoqwen.files import read_json, write_atomic
from nanoqwen.harness import record_of, run_tasks
from nanoqwen.injection.suite import injection_suite
from nanoqwen.injection.triplets import prepare_triplets, row_width, triplet_windows

DEFAULT_SEQ_LEN = 1024  # tokens of a row for a model without a recorded run, if its context is as long
NO_LIMIT = 1 << 40  # rows: more than there are

# --- held-out text ----------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """The rows whose tokens are predicted."""

    windows: list[Batch]
    source: str
    seq_len: int


def text_of(cfg: Config, loaded: LoadedModel) -> Text:
    """The text of eval.data; else the validation data of the run that wrote the model; else that of `data`."""
    run = recorded_config(loaded.folder)
    finetuned = bool(run.get("finetune", {}).get("base_ckpt"))
    loop = section(run, "finetune", FinetuneConfig) if finetuned else section(run, "train", TrainConfig)
    context, limit = loaded.model.cfg.context, cfg.eval.limit
    of_the_run = run and not cfg.eval.data  # another text is read in the same rows from every model: figures compare
    seq_len = cfg.eval.seq_len or (loop.seq_len if of_the_run else min(context, DEFAULT_SEQ_LEN))
    if seq_len > context:
        raise ConfigError(f"eval.seq_len: expected at most the model's context of {context}, got {seq_len}")
    max_tokens = loop.eval_tokens if limit is None and not cfg.eval.data else (limit or NO_LIMIT) * seq_len
    rows = max(1, cfg.eval.batch_tokens // seq_len)
    if finetuned and not cfg.eval.data:
        loop = replace(loop, seq_len=seq_len, batch_tokens=seq_len * loop.rows)
        return conversations(loaded, run, loop, max_tokens, rows)
    data, source = documents(cfg, run, loaded.folder)
    try:
        prepared = prepare(data, loaded.model.cfg.vocab_size, tokenizer=loaded.tokenizer)
    except DataError as error:  # name the key that the user has set
        raise DataError(str(error).replace("data.val: ", "eval.data: ", bool(cfg.eval.data))) from None
    if prepared.train and PretrainBatches(prepared.train, seq_len, 1, 0).fingerprint != trained_on(loaded.folder):
        print("warning    the text of the run has changed since")
    windows = eval_windows(prepared.val, seq_len, max_tokens, rows=rows, isolate_documents=data.isolate_documents)
    return Text(windows, source, seq_len)


def documents(cfg: Config, run: dict[str, dict[str, Any]], folder: Path) -> tuple[DataConfig, str]:
    """(configuration whose validation split is the text, description of the text)"""
    paths = cfg.eval.data
    if paths:
        expand(paths, "eval.data")
        isolate = section(run, "data", DataConfig).isolate_documents if run else cfg.data.isolate_documents
        # `streaming`, so that no training text is tokenised.
        return replace(cfg.data, train=paths, val=paths, streaming=True, isolate_documents=isolate), ", ".join(paths)
    if run:
        data = replace(section(run, "data", DataConfig), cache_dir=cfg.data.cache_dir)
        return data, f"validation text of {run_of(folder) or folder}"
    return replace(cfg.data, streaming=True), f"held out of {', '.join(cfg.data.val or cfg.data.train)}"


def trained_on(folder: Path) -> str | None:
    """Fingerprint of the training text of a run."""
    return read_json(folder / "state.json").get("data")


def conversations(
    loaded: LoadedModel, run: dict[str, dict[str, Any]], loop: FinetuneConfig, max_tokens: int, rows: int
) -> Text:
    """The validation data of a fine-tuned model: only answers are predicted, each after its conversation."""
    source, seq_len = f"validation data of {run_of(loaded.folder) or loaded.folder}", loop.seq_len
    if loop.objective == "sft":
        chats = prepare_chat(section(run, "chat", ChatConfig), loaded.tokenizer, seq_len)
        return Text(chat_windows(chats.val, seq_len, max_tokens, rows=rows), source, seq_len)
    triplets = prepare_triplets(section(run, "contrast", ContrastConfig), loaded.tokenizer, seq_len)
    seq_len = row_width(triplets.train, seq_len, loop.rows, loaded.model.cfg.context)
    return Text(triplet_windows(triplets.val, seq_len, max_tokens, rows=rows), source, seq_len)


def heldout_suite(cfg: Config) -> None:
    loaded = load_for_eval(cfg)
    output = results_file(cfg, loaded.folder, "heldout.json")
    text = text_of(cfg, loaded)
    results = evaluate_with_errors(loaded, text.windows, cfg.eval.calibrate)
    print(escape_terminal(heldout_table(results, text)))
    settings = {"suite": "heldout", "data": text.source, "seq_len": text.seq_len, "calibrated": cfg.eval.calibrate}
    settings["isolate_documents"] = text.windows[0].documents is not None
    metrics = {name: measured_json(measured) for name, measured in results.items()}
    write_atomic(output, json_text(record_of(cfg, loaded) | settings | metrics))
    say(f"wrote {output}", sys.stdout)


def measured_json(measured: Measured) -> dict[str, Any]:
    return {
        name: {"value": value.value, "standard_error": value.error} if isinstance(value, Estimate) else value
        for name, value in measured._asdict().items()
    }


METRICS = {"loss": "nats per token", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}


def heldout_table(results: dict[str, Measured], text: Text) -> str:
    """Markdown: each metric with its standard error over rows of text."""
    first = next(iter(results.values()))
    size = f"{first.rows:,} rows of {text.seq_len:,} tokens, {first.tokens:,} of them predicted, {first.bytes:,} bytes"
    table = [("± standard error over rows", list(results)), ("---", ["---"] * len(results))]
    table += [(label, [str(getattr(each, name)) for each in results.values()]) for name, label in METRICS.items()]
    if first.used is not None:
        fractions = [f"{100 * each.used:.1f}" for each in results.values()]
        table.append(("tokens that routed layers compute, %", fractions))
    rows = [f"| {' | '.join([label, *cells])} |" for label, cells in table]
    return "\n".join([f"text       {text.source}: {size}", "", *rows])


# --- command line -----------------------------------------------------------------------------------------------------

SUITES = {"heldout": heldout_suite, "injection": injection_suite}


def main(argv: list[str]) -> None:
    usage = "python eval.py [FILE.yaml] --ckpt SOURCE [--suite NAME] [--tasks NAMES] [--key=value ...]"
    cfg = load_config(argv, "eval", usage=usage)
    check(cfg)
    if ranks() > 1:
        raise ConfigError(f"eval.py: expected one process, got {ranks()} of torchrun")
    evaluations = [SUITES[cfg.eval.suite]] if cfg.eval.suite else []
    evaluations += [run_tasks] if cfg.eval.tasks else []
    if len(evaluations) > 1 and cfg.eval.output:
        raise ConfigError("eval.output: expected one of suite and tasks, got both, each with a file of its own")
    for evaluation in evaluations or [heldout_suite]:
        evaluation(cfg)


if __name__ == "__main__":
    run_script(main)
