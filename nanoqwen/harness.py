"""Tasks of lm-evaluation-harness, by its interface for language models.

    python eval.py --ckpt runs/base --tasks hellaswag,arc_easy          tasks of lm-eval, which download their data
    python eval.py --ckpt runs/base --tasks mine --include_path tasks   your own, without a network

Tokenisation, truncation and prefixes are those of lm-eval's own `hf` backend, so the scores are too; the tests compare.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data import IGNORE
from model import GPT, RequestError, Sampling, beam_search, pad_rows, stream
from nanoqwen.chat_template import text_to_answer, text_to_continue
from nanoqwen.config import Config
from nanoqwen.errors import ConfigError, DataError, escape_terminal, say
from nanoqwen.evaluate import LoadedModel, json_text, load_for_eval, results_file, source_folder, token_losses
from nanoqwen.files import read_json_or_empty, write_atomic
from nanoqwen.runfolder import source_record
from nanoqwen.tokenizer import Tokenizer
from nanoqwen.weights import resolve

NEW_TOKENS = 256  # of an answer, for tasks without a limit: the default of lm-eval's hf backend
# Seeds of lm-eval's command line, so that few-shot examples and all that a task draws are the same.
RANDOM_SEED, OTHER_SEED = 0, 1234
BOOTSTRAP = 1000  # resamples for the standard error of a metric without a formula
INSTALL = 'pip install -e ".[eval]" -c constraints.txt'
# Synonyms in generation_kwargs; the first one present counts.
NEW_TOKEN_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


# --- the interface ----------------------------------------------------------------------------------------------------


class HarnessLM:
    """An LM of lm-eval, registered by `evaluated`. Requests are objects with `args`, in any order."""

    rank, world_size = 0, 1  # lm-eval splits the requests among processes by these

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, *, autocast: Any = None, batch_tokens: int = 8192, seed: int = 0
    ):
        self.model, self.tokenizer, self.seed, self.batch_tokens = model, tokenizer, seed, batch_tokens
        self.autocast = autocast or nullcontext()
        self.length = model.cfg.max_position_embeddings  # as the hf backend: without the extension by RoPE scaling
        bos = tokenizer.named_bos
        self.prefix = tokenizer.eos_id if bos is None else bos  # the token before a text
        self.device = model.device
        self.cut = 0  # requests that lost their beginning

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of (context, continuation): (log p of the continuation given the context, whether it is the greedy one)."""
        return self._scores([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p of whole texts; a long one in disjoint windows, the last with as much context as fits."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs, owners = [], []
        for number, request in enumerate(requests):
            ids = self._encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix, max_seq_len=self.length, context_len=1)
            pairs += [make_disjoint_window(window) for window in windows]
            owners += [number] * (len(pairs) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._scores(pairs), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Of (context, generation_kwargs): the generated text up to the first stop string."""
        texts = [""] * len(requests)
        groups: dict[str, list[tuple[int, list[int]]]] = {}  # requests with equal settings make batches
        repeats: dict[str, int] = {}
        for number, (context, kwargs) in enumerate(request.args for request in requests):
            settings = json.dumps(kwargs, sort_keys=True)
            # A repeated request gets a new seed.
            repeat = repeats[context + settings] = repeats.get(context + settings, -1) + 1
            groups.setdefault(json.dumps([repeat, settings]), []).append((number, self._encode(context)))
        for key, members in groups.items():
            repeat, settings = json.loads(key)
            options, until, max_new_tokens = generation(json.loads(settings))
            room = self.length - max_new_tokens
            if room < 1:
                raise DataError(f"eval.tasks: {max_new_tokens} new tokens leave no room for a question in "
                                f"{self.length} tokens")  # fmt: skip
            self.cut += sum(len(ids) > room for _, ids in members)
            prompts = [ids[-room:] or [self.prefix] for _, ids in members]
            options |= {"seed": self.seed + repeat, "max_new_tokens": max_new_tokens}
            for batch in self._batches("generating", [len(prompt) + max_new_tokens for prompt in prompts]):
                generated = self._generate([prompts[index] for index in batch], options, until)
                for index, text in zip(batch, generated, strict=True):
                    texts[members[index][0]] = text
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text: it ends with the header of an answer, or within the last message to continue it."""
        return (text_to_answer if add_generation_prompt else text_to_continue)(chat_history, self.tokenizer)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.hash

    # --- tokens

    def _encode(self, text: str, begin: bool = True) -> list[int]:
        """As transformers does: spelled-out control tokens are control tokens, and a BOS is not doubled."""
        begin = begin and not text.startswith(self.tokenizer.decode([self.prefix]))
        return [*(self.tokenizer.prefix if begin else ()), *self.tokenizer.encode(text, allow_special=True)]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of both, encoded together and then split: a space before a word belongs to the word."""
        if not context:
            ids = self._encode(continuation, begin=False)
            return (ids[:1], ids[1:]) if ids[:1] == [self.prefix] else ([self.prefix], ids)
        stripped = context.rstrip()
        both, before = self._encode(context + continuation), self._encode(stripped)
        return before or [self.prefix], both[len(before) :]

    # --- batches

    def _batches(self, title: str, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of requests, the longest first, so that a lack of memory shows at once."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        with tqdm(total=len(order), desc=title, unit="requests", disable=None) as bar:  # on a terminal alone
            while order:
                rows = max(1, self.batch_tokens // max(1, lengths[order[0]]))
                yield order[:rows]
                bar.update(min(rows, len(order)))
                order = order[rows:]

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(summed log p, all greedy) of the second ids of each pair. Contexts lose their beginning where too long."""
        for _, continuation in pairs:
            if not 0 < len(continuation) <= self.length:
                expected = f"1 to {self.length} tokens, which the context holds"
                raise DataError(f"eval.tasks: a continuation: expected {expected}, got {len(continuation)} of its own")
        self.cut += sum(len(context) + len(continuation) > self.length + 1 for context, continuation in pairs)
        rows = [(context + continuation)[-(self.length + 1) :] for context, continuation in pairs]
        scores = [(0.0, True)] * len(pairs)
        for batch in self._batches("scoring", [len(row) - 1 for row in rows]):
            tokens, _ = pad_rows([rows[index][:-1] for index in batch])
            targets = torch.full_like(tokens, IGNORE)
            for row, index in enumerate(batch):
                end, continuation = len(rows[index]) - 1, pairs[index][1]
                targets[row, end - len(continuation) : end] = torch.tensor(continuation)
            with self.autocast:
                scored = token_losses(self.model, tokens.to(self.device), targets.to(self.device))
            counts = [len(pairs[index][1]) for index in batch]
            columns = (scored.nats.cpu().split(counts), scored.greedy.cpu().split(counts))
            for index, nats, greedy in zip(batch, *columns, strict=True):
                scores[index] = -float(nats.sum()), bool(greedy.all())
        return scores

    def _generate(self, prompts: list[list[int]], options: dict[str, Any], until: list[str]) -> list[str]:
        unused_ids = range(self.tokenizer.n_vocab, self.model.cfg.vocab_size)
        options = {"eos": sorted(self.tokenizer.stop_ids), **options, "banned": unused_ids}
        with self.autocast:
            if options.get("num_beams", 1) > 1:
                beams = beam_search(self.model, prompts, **options)
                rows = [best[0].ids[len(ids) :] for best, ids in zip(beams, prompts, strict=True)]
            else:
                rows = [[] for _ in prompts]
                for event in stream(self.model, prompts, decode=self.tokenizer.decode, stop=until, **options):
                    rows[event.row].append(event.token)
        texts = [self.tokenizer.decode(row, skip_special=True) for row in rows]
        # One token may hold the end of the answer and the start of a stop string, so text is cut, not tokens.
        return [text[: min((text.index(end) for end in until if end in text), default=None)] for text in texts]


def generation(kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[str], int]:
    """(fields of Sampling, stop strings, maximum of new tokens) of a task's generation_kwargs."""
    rest = dict(kwargs)
    until = rest.pop("until", None) or []
    until = [text for text in ([until] if isinstance(until, str) else until) if text]
    limits = [rest.pop(name, None) for name in NEW_TOKEN_NAMES]
    max_new_tokens = int(next((limit for limit in limits if limit is not None), NEW_TOKENS))
    do_sample, temperature = rest.pop("do_sample", None), float(rest.pop("temperature", None) or 0.0)
    if do_sample and not temperature:
        raise DataError("eval.tasks: generation_kwargs: expected a temperature above 0 beside do_sample: true")
    known = {field.name for field in fields(Sampling)} - {"eos", "banned", "stop", "seed", "overflow"}
    unknown = [name for name in rest if name not in known]
    if unknown:
        raise DataError(f"eval.tasks: generation_kwargs: {unknown[0]} is not known here{near_name(unknown[0], known)}")
    options = {name: value for name, value in rest.items() if value is not None}
    return options | {"temperature": 0.0 if do_sample is False else temperature}, until, max_new_tokens


def near_name(name: str, names: Iterable[str]) -> str:
    """The end of an error message about an unknown name."""
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]}?" if near else ""


# --- running tasks ----------------------------------------------------------------------------------------------------


def require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"eval.tasks: needs lm-eval, which is not installed: {INSTALL}")


def find_tasks(names: Sequence[str], include_path: str | None) -> Any:
    """A TaskManager of lm-eval that knows all names. Indexing its own 14,000 tasks takes 10 s: only if needed."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ConfigError(f"eval.include_path: expected a folder with tasks, got {include_path}")
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_subtasks):  # groups and tags may have members that only lm-eval has
            return own
    manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.task_index:
            hint = near_name(name, manager.all_tasks)
            raise ConfigError(f"eval.tasks: {name}: no such task of lm-eval or under eval.include_path{hint}")
    return manager


def load_tasks(manager: Any, names: Sequence[str], num_fewshot: int | None) -> dict[str, Any]:
    """Tasks with their data, as lm-eval's evaluate takes them. A task that is zero-shot by its definition stays so."""
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # a missing data set or field: tasks raise whatever they like
        raise DataError(f"eval.tasks: cannot be loaded: {type(error).__name__}: {error!s:.300}") from None
    for name, task in loaded["tasks"].items():
        default = task.get_config("num_fewshot")
        if num_fewshot is not None and default == 0 and num_fewshot:
            say(f"note: {name} is always zero-shot")
        elif num_fewshot is not None or default is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=OTHER_SEED)
    return loaded


@contextmanager
def contained() -> Iterator[None]:
    """Send lm-eval's prints to stderr, and resample in this process: it would fork one that has threads."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def run_lm_eval(lm: Any, loaded: dict[str, Any], limit: int | None, chat: bool) -> dict[str, Any]:
    """Run all tasks; returns what lm-eval's evaluate returns, without the answers."""
    import numpy as np
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate

    LM.register(HarnessLM)
    random.seed(RANDOM_SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    options = {"limit": limit or None, "bootstrap_iters": BOOTSTRAP, "log_samples": False}
    try:
        with contained():
            return evaluate(lm, loaded, apply_chat_template=chat, fewshot_as_multiturn=chat, **options)
    except (ArithmeticError, AssertionError, ImportError, LookupError, RequestError, TypeError, ValueError) as error:
        # Mostly a task that does not match its data, or more few-shot examples than rows.
        raise DataError(f"eval.tasks: failed: {type(error).__name__}: {error!s:.300}") from error


def record_of(cfg: Config, loaded: LoadedModel) -> dict[str, Any]:
    """What is evaluated, by which code, on which device."""
    dtype = str(loaded.dtype).removeprefix("torch.")
    where = {"model": str(loaded.folder), "device": str(loaded.device), "dtype": dtype}
    return where | {"seed": cfg.run.seed, **source_record()}


def run_tasks(cfg: Config) -> None:
    """Run eval.tasks on eval.ckpt, print a table, write tasks.json."""
    require_lm_eval()
    output, names = results_file(cfg, source_folder(cfg), "tasks.json"), cfg.eval.task_names
    manager = find_tasks(names, cfg.eval.include_path)
    loaded = load_for_eval(cfg)
    if cfg.eval.chat and loaded.tokenizer.chat_template is None:
        raise ConfigError(f"eval.chat: expected a tokenizer with a chat template, that of {loaded.folder} has none")
    tasks = load_tasks(manager, names, cfg.eval.num_fewshot)
    batch_tokens, seed = cfg.eval.batch_tokens, cfg.run.seed
    lm = HarnessLM(loaded.model, loaded.tokenizer, autocast=loaded.autocast, batch_tokens=batch_tokens, seed=seed)
    results = run_lm_eval(lm, tasks, cfg.eval.limit, cfg.eval.chat)
    if lm.cut:
        say(f"note: {lm.cut} requests were longer than {lm.length} tokens and lost their beginning")
    keys = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better", "configs")
    record = record_of(cfg, loaded)
    record |= {"lm_eval": importlib.metadata.version("lm_eval"), "asked": settings(cfg)}
    record["seeds"] = {"random": RANDOM_SEED, "numpy": OTHER_SEED, "torch": OTHER_SEED, "fewshot": OTHER_SEED}
    record |= {"resamples": BOOTSTRAP, "cut": lm.cut} | {key: results[key] for key in keys if key in results}
    write_atomic(output, json_text(record))
    print(escape_terminal(task_table(results)))
    say(f"wrote {output}", sys.stdout)


def settings(cfg: Config) -> dict[str, Any]:
    """The keys that decide the scores of a model."""
    names = ("include_path", "num_fewshot", "limit", "chat")
    return {"tasks": cfg.eval.task_names} | {name: getattr(cfg.eval, name) for name in names}


def task_table(results: dict[str, Any]) -> str:
    """Markdown: each metric with its standard error."""
    lines = ["| task | examples | documents | metric | value | standard error |", "| --- |" + " --- |" * 5]
    for name, metrics in results["results"].items():
        shots = results["n-shot"].get(name, "")
        samples = results.get("n-samples", {}).get(name, {}).get("effective", "")
        for key, value in sorted(metrics.items()):
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}", "N/A")
            error = f"{error:.4f}" if isinstance(error, (int, float)) else "N/A"
            label = metric if kind == "none" else f"{metric} ({kind})"
            lines.append(f"| {name} | {shots} | {samples} | {label} | {value:.4f} | {error} |")
    return "\n".join(lines)


# --- at the end of a run ----------------------------------------------------------------------------------------------


def check_tasks(cfg: Config) -> None:
    """Before a run begins: refuse task names that do not exist."""
    if cfg.eval.tasks:
        require_lm_eval()
        find_tasks(cfg.eval.task_names, cfg.eval.include_path)


def run_tasks_after_training(cfg: Config) -> bool:
    """Run eval.tasks on the best checkpoint of a run, unless tasks.json has them; returns whether it was written.

    Errors become a warning, because the run itself is finished.
    """
    if not cfg.eval.tasks:
        return False
    try:
        folder = resolve(cfg.run.dir)
        record = read_json_or_empty(Path(cfg.run.dir) / "tasks.json")
        if (record.get("model"), record.get("asked")) == (str(folder), settings(cfg)):
            say(f"tasks      {cfg.run.dir}/tasks.json has them")
            return False
        run_tasks(replace(cfg, eval=replace(cfg.eval, ckpt=str(folder), output=None)))
    except Exception as error:
        say(f"warning: eval.tasks: not evaluated: {type(error).__name__}: {' '.join(str(error).split()):.300}"
            " (the same command tries again)")  # fmt: skip
        return False
    return True
