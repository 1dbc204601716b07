"""Tasks of lm-evaluation-harness: a model of this project behind the interface that they ask.

    python eval.py --ckpt runs/base --tasks hellaswag,arc_easy          tasks of lm-eval, which fetch their data
    python eval.py --ckpt runs/base --tasks mine --include_path tasks   of your own, without a network

Tokens, truncation and prefixes are those of lm-eval's own `hf` backend, which the tests compare with; so are figures.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data import IGNORE
from model import GPT, RequestError, Sampling, beam_search, pad_rows, stream
from nanoqwen.chat import chat_turns, joined
from nanoqwen.config import Config
from nanoqwen.errors import ConfigError, DataError, escape_terminal, say
from nanoqwen.evaluate import Finished, figures_file, json_text, open_finished, source_folder, token_losses
from nanoqwen.files import write_atomic
from nanoqwen.runfolder import source_record
from nanoqwen.tokenizer import IM_END, Tokenizer
from nanoqwen.weights import CheckpointError, resolve

NEW_TOKENS = 256  # of an answer to a task that does not say how many, as lm-eval's hf backend has it
# lm-eval's own, so that few-shot examples and whatever a task draws are those of its command line.
RANDOM_SEED, OTHER_SEED = 0, 1234
BOOTSTRAP = 1000  # resamples for the standard error of a figure without a formula
INSTALL = 'pip install -e ".[eval]" -c constraints.txt'
# Names of one thing in generation_kwargs; the first that is there counts.
NEW_TOKEN_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


# --- the interface ----------------------------------------------------------------------------------------------------


class HarnessLM:
    """What lm-eval calls an LM; `evaluated` registers it as one. Requests are objects with `args`, in any order."""

    rank, world_size = 0, 1  # lm-eval shares work out among processes by these

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, *, autocast: Any = None, batch_tokens: int = 8192, seed: int = 0
    ):
        self.model, self.tokenizer, self.seed, self.batch_tokens = model, tokenizer, seed, batch_tokens
        self.autocast = autocast or nullcontext()
        self.length = model.cfg.max_position_embeddings  # not the stretched one: the hf backend takes this
        named = tokenizer.named_bos
        self.prefix = tokenizer.eos_id if named is None else named  # what stands in front of a text
        self.device = model.get_input_embeddings().weight.device
        self.cut = 0  # requests that lost their beginning

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log p of the continuation given the context, whether it is the greedy one) of (context, continuation)."""
        return self._scores([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p of whole texts. A long one is cut into windows; the last sees as many tokens as the others."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs, owners = [], []
        for number, request in enumerate(requests):
            ids = self._encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix, max_seq_len=self.length, context_len=1)
            found = [make_disjoint_window(window) for window in windows]
            pairs += found
            owners += [number] * len(found)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._scores(pairs), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model writes after each context, up to the first stop string, of (context, generation_kwargs)."""
        texts = [""] * len(requests)
        groups: dict[str, list[tuple[int, list[int]]]] = {}
        seen: dict[str, int] = {}
        for number, (context, kwargs) in enumerate(request.args for request in requests):
            how = json.dumps(kwargs, sort_keys=True)
            time = seen[context + how] = seen.get(context + how, -1) + 1  # a request that is repeated draws anew
            groups.setdefault(json.dumps([time, how]), []).append((number, self._encode(context)))
        for key, members in groups.items():
            time, how = json.loads(key)
            params, until, most = generation(json.loads(how))
            room = self.length - most
            if room < 1:
                raise DataError(f"eval.tasks: {most} new tokens leave no room for a question in {self.length} tokens")
            self.cut += sum(len(ids) > room for _, ids in members)
            prompts = [ids[-room:] or [self.prefix] for _, ids in members]
            for part in self._batches("writing", [len(prompt) + most for prompt in prompts]):
                said = self._written([prompts[i] for i in part], params | {"seed": self.seed + time}, until, most)
                for place, text in zip(part, said, strict=True):
                    texts[members[place][0]] = text
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; it ends with the header of an answer, or within the last message, to go on there."""
        ids, _ = joined(chat_turns(chat_history, self.tokenizer))
        text = self.tokenizer.decode(ids)
        return f"{text}<|im_start|>assistant\n" if add_generation_prompt else text.removesuffix(f"{IM_END}\n")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.hash

    # --- tokens

    def _encode(self, text: str, begin: bool = True) -> list[int]:
        """As transformers does: control tokens that are spelled out count, and a BOS that is there is not doubled."""
        begin = begin and not text.startswith(self.tokenizer.decode([self.prefix]))
        return [*(self.tokenizer.prefix if begin else ()), *self.tokenizer.encode(text, allow_special=True)]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of both. They are cut together and parted behind: a space before a word belongs to the word."""
        if not context:
            ids = self._encode(continuation, begin=False)
            return (ids[:1], ids[1:]) if ids[:1] == [self.prefix] else ([self.prefix], ids)
        stripped = context.rstrip()
        both, before = self._encode(context + continuation), self._encode(stripped)
        return before or [self.prefix], both[len(before) :]

    # --- batches

    def _batches(self, doing: str, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of requests, the longest first, so that what does not fit into memory shows at once."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        with tqdm(total=len(order), desc=doing, unit="requests", disable=None) as bar:  # on a terminal alone
            while order:
                rows = max(1, self.batch_tokens // max(1, lengths[order[0]]))
                yield order[:rows]
                bar.update(min(rows, len(order)))
                order = order[rows:]

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(summed log p, all greedy) of the second ids of each pair. What does not fit is cut off in front."""
        for _, wanted in pairs:
            if not 0 < len(wanted) <= self.length:
                expected = f"1 to {self.length} tokens, which the context holds"
                raise DataError(f"eval.tasks: a continuation: expected {expected}, got {len(wanted)} of its own")
        self.cut += sum(len(before) + len(wanted) > self.length + 1 for before, wanted in pairs)
        rows = [(before + wanted)[-(self.length + 1) :] for before, wanted in pairs]
        found = [(0.0, True)] * len(pairs)
        for part in self._batches("scoring", [len(row) - 1 for row in rows]):
            tokens, _ = pad_rows([rows[index][:-1] for index in part])
            targets = torch.full_like(tokens, IGNORE)
            for place, index in enumerate(part):
                end, wanted = len(rows[index]) - 1, pairs[index][1]
                targets[place, end - len(wanted) : end] = torch.tensor(wanted)
            with self.autocast:
                scored = token_losses(self.model, tokens.to(self.device), targets.to(self.device))
            counts = [len(pairs[index][1]) for index in part]
            each = (scored.nats.cpu().split(counts), scored.greedy.cpu().split(counts))
            for index, nats, greedy in zip(part, *each, strict=True):
                found[index] = -float(nats.sum()), bool(greedy.all())
        return found

    def _written(self, prompts: list[list[int]], params: dict[str, Any], until: list[str], most: int) -> list[str]:
        ends = sorted(self.tokenizer.stop_ids)
        how = {"max_new_tokens": most, "eos": ends, **params}
        how["banned"] = range(self.tokenizer.n_vocab, self.model.cfg.vocab_size)  # ids that stand for nothing
        with self.autocast:
            if how.get("num_beams", 1) > 1:
                beams = beam_search(self.model, prompts, **how)
                rows = [best[0].ids[len(ids) :] for best, ids in zip(beams, prompts, strict=True)]
            else:
                rows = [[] for _ in prompts]
                for event in stream(self.model, prompts, decode=self.tokenizer.decode, stop=until, **how):
                    rows[event.row].append(event.token)
        texts = [self.tokenizer.decode(row, skip_special=True) for row in rows]
        # A token may hold the end of the answer and the beginning of the stop string: text is cut, not tokens.
        return [text[: min((text.index(end) for end in until if end in text), default=None)] for text in texts]


def generation(kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[str], int]:
    """(fields of Sampling, stop strings, new tokens at most) of a task's generation_kwargs."""
    rest = dict(kwargs)
    until = rest.pop("until", None) or []
    until = [text for text in ([until] if isinstance(until, str) else until) if text]
    asked = [rest.pop(name, None) for name in NEW_TOKEN_NAMES]
    most = int(next((number for number in asked if number is not None), NEW_TOKENS))
    draws, warmth = rest.pop("do_sample", None), float(rest.pop("temperature", None) or 0.0)
    if draws and not warmth:
        raise DataError("eval.tasks: generation_kwargs: expected a temperature above 0 beside do_sample: true")
    known = {field.name for field in fields(Sampling)} - {"eos", "banned", "stop", "seed", "overflow"}
    strange = [name for name in rest if name not in known]
    if strange:
        near = difflib.get_close_matches(strange[0], known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"eval.tasks: generation_kwargs: {strange[0]} is not known here{hint}")
    given = {name: value for name, value in rest.items() if value is not None}
    return given | {"temperature": 0.0 if draws is False else warmth}, until, most


# --- asking -----------------------------------------------------------------------------------------------------------


def require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"eval.tasks: needs lm-eval, which is not installed: {INSTALL}")


def find_tasks(names: Sequence[str], include_path: str | None) -> Any:
    """A TaskManager of lm-eval that knows all the names. Its own 14,000 tasks take ten seconds: only where needed."""
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
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"eval.tasks: {name}: no such task of lm-eval or under eval.include_path{hint}")
    return manager


def load_tasks(manager: Any, names: Sequence[str], num_fewshot: int | None) -> dict[str, Any]:
    """Tasks with their data, as lm-eval's evaluate takes them. One that is to be asked without examples stays so."""
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # a data set that is not there, a field that is not: in as many ways as there are tasks
        raise DataError(f"eval.tasks: cannot be loaded: {type(error).__name__}: {error!s:.300}") from None
    for name, task in loaded["tasks"].items():
        default = task.get_config("num_fewshot")
        if num_fewshot is not None and default == 0 and num_fewshot:
            say(f"note: {name} is always asked without examples")
        elif num_fewshot is not None or default is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=OTHER_SEED)
    return loaded


@contextmanager
def held_back() -> Iterator[None]:
    """lm-eval prints where figures go, and resamples in a process per core, forked from one that has threads."""
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


def evaluated(lm: Any, loaded: dict[str, Any], limit: int | None, chat: bool) -> dict[str, Any]:
    """Ask all tasks; what lm-eval's evaluate returns, without the answers."""
    import numpy as np
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate

    LM.register(HarnessLM)
    random.seed(RANDOM_SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    try:
        with held_back():
            return evaluate(
                lm,
                loaded,
                limit=limit or None,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
    except (ArithmeticError, AssertionError, ImportError, LookupError, RequestError, TypeError, ValueError) as error:
        # Mostly a task that does not fit its data, or more examples than there are.
        raise DataError(f"eval.tasks: failed: {type(error).__name__}: {error!s:.300}") from error


def record_of(cfg: Config, of: Finished) -> dict[str, Any]:
    """What was measured, by which code, how."""
    kind = str(of.dtype).removeprefix("torch.")
    return {"model": str(of.folder), "device": str(of.device), "dtype": kind, "seed": cfg.run.seed, **source_record()}


def ask_tasks(cfg: Config) -> None:
    """Ask the model of eval.ckpt, print a table, write tasks.json."""
    require_lm_eval()
    output, names = figures_file(cfg, source_folder(cfg), "tasks.json"), cfg.eval.task_names
    manager = find_tasks(names, cfg.eval.include_path)
    of = open_finished(cfg)
    if cfg.eval.chat and of.tokenizer.special.get(IM_END) is None:
        raise ConfigError(f"eval.chat: expected a tokenizer with {IM_END}, that of {of.folder} has none")
    loaded = load_tasks(manager, names, cfg.eval.num_fewshot)
    how = {"autocast": of.autocast, "batch_tokens": cfg.eval.batch_tokens, "seed": cfg.run.seed}
    lm = HarnessLM(of.model, of.tokenizer, **how)
    found = evaluated(lm, loaded, cfg.eval.limit, cfg.eval.chat)
    if lm.cut:
        say(f"note: {lm.cut} requests were longer than {lm.length} tokens and lost their beginning")
    kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better", "configs")
    figures = {name: found[name] for name in kept if name in found}
    record = record_of(cfg, of) | {"lm_eval": importlib.metadata.version("lm_eval"), "asked": settings(cfg)}
    seeds = {"random": RANDOM_SEED, "numpy": OTHER_SEED, "torch": OTHER_SEED, "fewshot": OTHER_SEED}
    record |= {"seeds": seeds, "resamples": BOOTSTRAP}
    write_atomic(output, json_text(record | {"cut": lm.cut} | figures))
    print(escape_terminal(task_table(found)))
    print(f"wrote {output}")


def settings(cfg: Config) -> dict[str, Any]:
    """Which keys decide the figures of a model."""
    names = ("include_path", "num_fewshot", "limit", "chat")
    return {"tasks": cfg.eval.task_names} | {name: getattr(cfg.eval, name) for name in names}


def task_table(found: dict[str, Any]) -> str:
    """Markdown: each figure with its standard error."""
    lines = ["| task | examples | documents | figure | value | standard error |", "| --- |" + " --- |" * 5]
    for name, figures in found["results"].items():
        shots, samples = found["n-shot"].get(name, ""), found.get("n-samples", {}).get(name, {}).get("effective", "")
        for key, value in sorted(figures.items()):
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = figures.get(f"{metric}_stderr,{kind}", "N/A")
            error = f"{error:.4f}" if isinstance(error, (int, float)) else "N/A"
            label = metric if kind == "none" else f"{metric} ({kind})"
            lines.append(f"| {name} | {shots} | {samples} | {label} | {value:.4f} | {error} |")
    return "\n".join(lines)


# --- at the end of a run ----------------------------------------------------------------------------------------------


def check_tasks(cfg: Config) -> None:
    """Before a run begins: refuse names that could only be refused after it."""
    if cfg.eval.tasks:
        require_lm_eval()
        find_tasks(cfg.eval.task_names, cfg.eval.include_path)


def ask_at_the_end(cfg: Config) -> bool:
    """Ask eval.tasks of the best checkpoint of a run, unless that is done; returns whether there are new figures.

    Whatever happens, the run is finished.
    """
    if not cfg.eval.tasks:
        return False
    try:
        folder = resolve(cfg.run.dir)
        if already_asked(cfg, folder):
            say(f"tasks      {cfg.run.dir}/tasks.json has them")
            return False
        ask_tasks(replace(cfg, eval=replace(cfg.eval, ckpt=str(folder), output=None)))
    except Exception as error:
        say(f"warning: eval.tasks: not evaluated: {type(error).__name__}: {' '.join(str(error).split()):.300}"
            " (the same command asks again)")  # fmt: skip
        return False
    return True


def already_asked(cfg: Config, folder: Path) -> bool:
    try:
        found = json.loads((Path(cfg.run.dir) / "tasks.json").read_bytes())
        return (found["model"], found["asked"]) == (str(folder), settings(cfg))
    except (OSError, ValueError, LookupError, TypeError, CheckpointError):
        return False
