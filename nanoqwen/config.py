"""config.yaml <-> dataclasses, strictly: what is not understood is refused, in one line that says where.

Each scalar of the file is resolved by the type of the field it lands in, never by YAML 1.1's own rules, under
which `3e-4` is a string, `on` is True, `010` is 8, `12:30` is 750 and the second of two equal keys wins.
A new key is one more field of a section's dataclass and one more commented line of config.yaml.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from model import ModelConfig, Sampling
from nanoqwen.errors import ConfigError
from nanoqwen.lora import LoraConfig
from nanoqwen.routing import RoutingConfig, routed_layers

DEFAULT_FILE = Path(__file__).parents[1] / "config.yaml"


def require(holds: object, name: str, expected: str, got: object) -> None:
    """Of a key of a configuration."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def weighted(source: str) -> tuple[str, float | None]:
    """SOURCE or SOURCE=WEIGHT. A name that itself ends in `=3` takes a weight after it."""
    name, equals, number = source.rpartition("=")
    try:
        return (name, float(number)) if equals else (source, None)
    except ValueError:
        return source, None


@dataclass(frozen=True)
class DataConfig:
    tokenizer: str = "auto"
    train: tuple[str, ...] = ("builtin:python",)
    val: tuple[str, ...] = ()
    val_fraction: float = 0.05
    text_key: str = "text"
    split: str = "train"
    streaming: bool = False
    isolate_documents: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    workers: int = 0
    cache_dir: str = ".cache"

    def __post_init__(self) -> None:
        weights = [weight for _, weight in map(weighted, self.train)]
        require(self.train, "train", "at least one source", "none")
        require(all(name for name, _ in map(weighted, self.train)) and all(self.val), "train", "sources", "''")
        for source, weight in zip(self.train, weights, strict=True):
            require(weight is None or 0 < weight < math.inf, "train", "a weight above 0 and finite", source)
        require(
            len({weight is None for weight in weights}) < 2, "train", "a weight for each source or none", self.train
        )
        require(len(weights) <= 32 or weights[0] is None, "train", "at most 32 weighted sources", len(weights))
        plain = next((name for name in self.val if weighted(name)[1] is not None), None)
        require(plain is None, "val", "sources without weights", plain)
        require(0 < self.val_fraction < 1, "val_fraction", "above 0 and below 1", self.val_fraction)
        require(self.workers >= 0, "workers", "0 (all cores) or more", self.workers)


@dataclass(frozen=True)
class ChatConfig:
    train: tuple[str, ...] = ("builtin:docstrings",)
    val: tuple[str, ...] = ()
    val_fraction: float = 0.05
    split: str = "train"
    on_error: Literal["stop", "skip"] = "stop"
    limit: int = 0
    system: str | None = None
    pack: bool = True

    def __post_init__(self) -> None:
        require(self.train and all(self.train), "train", "at least one source", self.train)
        require(all(self.val), "val", "sources", self.val)
        plain = next((name for name in (*self.train, *self.val) if weighted(name)[1] is not None), None)
        require(plain is None, "train", "sources without weights", plain)
        require(0 < self.val_fraction < 1, "val_fraction", "above 0 and below 1", self.val_fraction)
        require(self.limit >= 0, "limit", "0 (all) or more", self.limit)


@dataclass(frozen=True)
class ContrastConfig:
    train: tuple[str, ...] = ("builtin:injections",)
    val: tuple[str, ...] = ()
    val_fraction: float = 0.1
    split: str = "train"
    max_bad_rows: int = 0
    limit: int = 0
    loss: Literal["infonce", "margin", "linear"] = "infonce"
    weight: float = 0.1
    temperature: float = 0.07
    margin_benign: float = 0.9
    margin_injection: float = 0.2
    head_size: int = 256
    weight_benign: float = 1.0
    weight_cf: float = 0.5
    weight_injection: float = 1.0
    eval_rows: int = 60
    answer_tokens: int = 24

    def __post_init__(self) -> None:
        require(self.train and all(self.train), "train", "at least one source", self.train)
        require(all(self.val), "val", "sources", self.val)
        plain = next((name for name in (*self.train, *self.val) if weighted(name)[1] is not None), None)
        require(plain is None, "train", "sources without weights", plain)
        require(0 < self.val_fraction < 1, "val_fraction", "above 0 and below 1", self.val_fraction)
        for name in ("max_bad_rows", "limit"):
            require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in ("weight", "weight_benign", "weight_cf", "weight_injection"):
            require(0 <= getattr(self, name) < math.inf, name, "0 or more", getattr(self, name))
        require(self.weight_benign + self.weight_cf + self.weight_injection > 0, "weight_benign", "a weight above 0", 0)
        require(0 < self.temperature < math.inf, "temperature", "above 0", self.temperature)
        for name in ("margin_benign", "margin_injection"):
            require(-1 <= getattr(self, name) <= 1, name, "a cosine, -1 to 1", getattr(self, name))
        for name in ("head_size", "eval_rows", "answer_tokens"):
            require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))

    @property
    def stream_weights(self) -> tuple[float, float, float]:
        return self.weight_benign, self.weight_cf, self.weight_injection


@dataclass(frozen=True)
class RunConfig:
    seed: int = 1337
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    dir: str = "auto"
    resume: str = "auto"
    overwrite: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    keep: int = 2
    save_every: int = 400
    allow_change: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", "0 .. 2**63 - 1", self.seed)
        known = re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", self.device)
        require(known, "device", "auto, cpu, mps, cuda or cuda:N", self.device)
        require(self.dir.strip(), "dir", "a folder", self.dir)
        require(self.keep >= 1, "keep", "1 or more", self.keep)
        require(self.save_every >= 1, "save_every", "1 or more", self.save_every)
        require(not self.overwrite or self.resume == "never", "overwrite", "resume never beside it", self.resume)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1200
    seq_len: int = 128
    batch_tokens: int = 1024
    micro_batch: int | Literal["auto"] = "auto"
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 4e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: Literal["cosine", "wsd", "linear", "constant", "plateau"] = "cosine"
    warmup_steps: int = 60
    decay_share: float = 0.2
    floor: float = 0.1
    plateau_factor: float = 0.5
    plateau_patience: int = 2
    plateau_threshold: float = 1e-3
    plateau_cooldown: int = 0
    z_loss: float = 0.0
    checkpoint_activations: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    eval_every: int = 400
    eval_tokens: int = 32_768
    log_every: int = 50
    sample_tokens: int = 100
    skip_limit: int = 5
    patience: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "batch_tokens", "eval_every", "eval_tokens", "log_every"):
            require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        for name in (
            "warmup_steps",
            "sample_tokens",
            "weight_decay",
            "z_loss",
            "skip_limit",
            "plateau_patience",
            "patience",
        ):
            require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in ("lr", "eps", "clip", "plateau_threshold"):
            require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("beta1", "beta2", "decay_share", "floor"):
            require(0 <= getattr(self, name) <= 1, name, "0 to 1", getattr(self, name))
        require(0 < self.plateau_factor < 1, "plateau_factor", "between 0 and 1", self.plateau_factor)
        require(self.plateau_cooldown >= 0, "plateau_cooldown", "0 or more", self.plateau_cooldown)
        require(self.warmup_steps <= self.steps, "warmup_steps", f"at most steps {self.steps}", self.warmup_steps)
        rows = self.batch_tokens % self.seq_len
        require(rows == 0, "batch_tokens", f"a multiple of seq_len {self.seq_len}", self.batch_tokens)
        require(
            self.micro_batch == "auto" or self.micro_batch >= 1, "micro_batch", "auto or 1 and more", self.micro_batch
        )

    @property
    def rows(self) -> int:
        """Rows of an optimizer step, over all micro-batches and ranks."""
        return self.batch_tokens // self.seq_len


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    base_ckpt: str | None = None
    objective: Literal["sft", "contrast"] = "sft"
    show_data: bool = False
    steps: int = 400
    seq_len: int = 256
    batch_tokens: int = 2048
    lr: float = 2e-3
    schedule: Literal["cosine", "wsd", "linear", "constant", "plateau"] = "plateau"
    weight_decay: float = 0.0
    warmup_steps: int = 20
    eval_every: int = 50
    log_every: int = 20
    patience: int = 6


@dataclass(frozen=True)
class LogConfig:
    wandb: Literal["off", "online", "offline"] = "off"
    project: str = "nanoqwen"
    name: str | None = None


@dataclass(frozen=True)
class InferConfig:
    ckpt: str | None = None
    prompt: tuple[str, ...] = ()
    prompt_file: str | None = None
    instruct: bool = False
    chat: bool = False
    system: str | None = None
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop: tuple[str, ...] = ()
    num_samples: int = 1
    stream: bool = True
    overflow: Literal["error", "stop", "slide"] = "error"
    cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    allow_special: bool = False
    allow_mismatch: bool = False
    show_routing: bool = False

    def __post_init__(self) -> None:
        self.sampling()
        require(self.top_p > 0, "top_p", "above 0 (1: off)", self.top_p)
        require(self.num_samples >= 1, "num_samples", "1 or more", self.num_samples)
        enough = self.min_new_tokens <= self.max_new_tokens
        require(enough, "min_new_tokens", f"at most max_new_tokens {self.max_new_tokens}", self.min_new_tokens)
        used = self.chat or self.instruct or self.system is None
        require(used, "system", "chat or instruct beside it", self.system)

    def sampling(self, **more: Any) -> Sampling:
        """The part that chooses tokens, which has its own checks; `more` is what only the caller knows (eos, seed)."""
        shared = {field.name for field in fields(Sampling)} & {field.name for field in fields(self)}
        return Sampling(**{name: getattr(self, name) for name in shared}, **more)


@dataclass(frozen=True)
class EvalConfig:
    ckpt: str | None = None
    suite: Literal["heldout", "injection"] | None = None
    tasks: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    limit: int | None = None
    seq_len: int | None = None
    calibrate: bool = False
    include_path: str | None = None
    num_fewshot: int | None = None
    chat: bool = False
    batch_tokens: int = 8192
    base: str | None = None
    answer_tokens: int = 24
    output: str | None = None

    def __post_init__(self) -> None:
        require(all(self.data), "data", "sources", self.data)
        require(all(self.task_names), "tasks", "names, one per option or with commas between them", self.tasks)
        require((self.limit or 0) >= 0, "limit", "0 (all) or more", self.limit)
        require(self.seq_len is None or self.seq_len >= 1, "seq_len", "1 or more", self.seq_len)
        require((self.num_fewshot or 0) >= 0, "num_fewshot", "0 or more", self.num_fewshot)
        require(self.batch_tokens >= 1, "batch_tokens", "1 or more", self.batch_tokens)
        require(self.answer_tokens >= 1, "answer_tokens", "1 or more", self.answer_tokens)

    @property
    def task_names(self) -> list[str]:
        """Each once; `a,b` are two."""
        return list(dict.fromkeys(name.strip() for names in self.tasks for name in names.split(",")))


@dataclass(frozen=True)
class Config:
    run: RunConfig
    model: ModelConfig
    routing: RoutingConfig
    data: DataConfig
    chat: ChatConfig
    train: TrainConfig
    finetune: FinetuneConfig
    lora: LoraConfig
    contrast: ContrastConfig
    log: LogConfig
    infer: InferConfig
    eval: EvalConfig


def load_config(argv: Sequence[str], section: str, path: Path | None = None, usage: str | None = None) -> Config:
    """Dataclass defaults < file < preset < command line.

    `argv` is without the program's name; a bare `--key` is a key of `section`, else of `run`. Without a file in
    `argv` it is `path`, else the config.yaml beside this module. `--help` prints and leaves with 0.
    """
    default_file = path or DEFAULT_FILE
    if not {"-h", "--help"}.isdisjoint(argv):
        print(help_text(section, usage, default_file), flush=True)
        raise SystemExit(0)
    file, options = _read_argv(argv, section)
    values = _read_file(file or default_file)
    presets = values.pop("presets", {})
    preset = options.pop("preset", None)
    if preset is not None:
        if preset not in presets and file is not None:  # a file of one's own may still name a shipped preset
            presets = _read_file(default_file).get("presets", {}) | presets
        if preset not in presets:
            raise ConfigError(f"--preset: {_unknown(preset, presets, 'preset')}")
        values = _merge(values, presets[preset])
    cfg = _build(Config, _merge(values, options))
    if cfg.run.dir == "auto":
        name = cfg.finetune.objective if section == "finetune" else "base"
        cfg = replace(cfg, run=replace(cfg.run, dir=f"runs/{name}"))
    return cfg


def preset_names() -> list[str]:
    """The shipped ones, as they stand in config.yaml."""
    return list(_read_file(DEFAULT_FILE)["presets"])


def check(cfg: Config, world_size: int = 1, loop: TrainConfig | None = None) -> None:
    """Refuses what no section sees alone, and what this machine lacks, before anything is allocated.

    loop: the section of the script, where it is not `train`
    """
    import torch  # here, so that reading a configuration asks nothing of a device

    kind, _, index = cfg.run.device.partition(":")
    present = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind in present and int(index or 0) >= present[kind]:
        raise ConfigError(f"run.device: expected a device of this machine, got {cfg.run.device!r} (try auto)")
    on_cpu = kind == "cpu" or (kind == "auto" and not any(present.values()))
    if on_cpu and cfg.run.dtype == "float16":
        raise ConfigError(f"run.dtype: float16 needs a GPU, got run.device {cfg.run.device!r} (try float32)")
    if world_size < 1:
        raise ConfigError(f"world size: expected 1 or more, got {world_size}")
    loop = loop or cfg.train
    if world_size > 1 and cfg.run.parallel == "fsdp" and loop.optimizer == "muon":
        raise ConfigError("run.parallel: fsdp cuts the matrices that optimizer muon needs whole (try ddp)")
    check_rows(loop, world_size, "train" if loop is cfg.train else "finetune")
    if loop is cfg.train:  # else the model comes from a checkpoint
        check_context(loop, cfg.model)
        try:
            routed_layers(cfg.model, cfg.routing)
        except ValueError as error:
            raise ConfigError(f"routing.kind {cfg.routing.kind}: {error}") from None


def check_rows(loop: TrainConfig, world_size: int, section: str) -> None:
    if loop.rows % world_size:
        rows = f"{loop.rows} rows of {loop.seq_len} tokens"
        raise ConfigError(f"{section}.batch_tokens: {rows} a step cannot be shared by {world_size} ranks")


def check_context(loop: TrainConfig, model: ModelConfig) -> None:
    if loop.seq_len > model.context:
        raise ConfigError(f"seq_len: expected at most the model's context of {model.context}, got {loop.seq_len}")


# --- the file --------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> dict[str, Any]:
    """The typed values of a file by section, and its `presets`, each a partial Config of the same grammar."""
    hints = get_type_hints(Config) | {"presets": dict[str, Config]}
    return _read_mapping(_compose(path), hints, "", str(path))


def _compose(path: Path) -> yaml.Node:
    """The file as a tree of nodes that know their lines; no value is constructed."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
        if text.startswith("\ufeff"):
            raise ConfigError(f"{path}:1: expected plain UTF-8, got a byte-order mark")
        root = yaml.compose(text, Loader=yaml.BaseLoader)  # first: it gives up where brackets nest without end
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            if getattr(event, "tag", None):
                raise ConfigError(f"{path}:{event.start_mark.line + 1}: tags are refused, got {_clipped(event.tag)}")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: expected UTF-8 text, got byte {raw[error.start]:#04x}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: expected text, got control character {error.character:#x}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        reason = " ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{path}:{line}: not valid YAML: {reason}") from None
    except (RecursionError, ValueError, OverflowError) as error:  # nesting, escapes or a version without end
        raise ConfigError(f"{path}:1: not valid YAML: {error}") from None
    if root is None:
        raise ConfigError(f"{path}:1: expected a mapping of sections, got an empty file")
    return root


def _read_mapping(node: yaml.Node, hints: dict[str, Any], name: str, file: str, other: Any = None) -> dict[str, Any]:
    """Typed values of a mapping whose keys are those of `hints`, or any key where there is a type for `other`."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{_at(node, name, file)}: expected a mapping, got {_shown(node)}")
    values: dict[str, Any] = {}
    for key, child in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{_at(key, name, file)}: expected a key, got {_shown(key)}")
        path = f"{name}.{key.value}".lstrip(".")
        hint = hints.get(key.value, other)
        if hint is None:
            raise ConfigError(f"{_at(key, path, file)}: {_unknown(key.value, hints)}")
        if key.value in values:
            raise ConfigError(f"{_at(key, path, file)}: key comes twice")
        values[key.value] = _read(child, hint, path, file)
    return values


def _read(node: yaml.Node, hint: Any, name: str, file: str) -> Any:
    """One node as a value of type `hint`; a mapping becomes a dict, to be merged and built later."""
    nested, item = _nested(hint), _item(hint)
    if get_origin(hint) is dict:
        return _read_mapping(node, {}, name, file, other=get_args(hint)[1])
    if nested and (isinstance(node, yaml.MappingNode) or hint is nested):
        return _read_mapping(node, get_type_hints(nested), name, file)
    if item and isinstance(node, yaml.SequenceNode):
        return [_read(child, item, name, file) for child in node.value]
    remedy = ""
    if isinstance(node, yaml.ScalarNode):
        style, other_style = ("quoted", "plain") if node.style else ("plain", "quoted")
        if (value := _scalar(node.value, style, hint)) is not MISSING:
            return value
        if node.value and _scalar(node.value, other_style, hint) is not MISSING:
            remedy = " without quotes" if node.style else " in quotes"
    raise ConfigError(f"{_at(node, name, file)}: expected {_described(hint)}{remedy}, got {_shown(node)}")


def _at(node: yaml.Node, name: str, file: str) -> str:
    return f"{file}:{node.start_mark.line + 1}" + (name and f": {name}")


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return _clipped(node.value) if node.value or node.style else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


# --- the command line ------------------------------------------------------------------------------------------


def _read_argv(argv: Sequence[str], section: str) -> tuple[Path | None, dict[str, Any]]:
    """The file that is named, and the typed values of the options, nested as in a file, with `preset` beside them."""
    file: Path | None = None
    values: dict[str, Any] = {}
    seen: list[tuple[str, ...]] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-") and word.endswith((".yaml", ".yml")) and file is None:
            file = Path(word)
            continue
        option, equals, text = word.partition("=")
        if not option.startswith("--"):
            raise ConfigError(f"{_clipped(option)}: expected --key=value or one FILE.yaml")
        path, hint = _resolve(option, section)
        item = _item(hint)
        if not item and any(path[: len(old)] == old or old[: len(path)] == path for old in seen):
            raise ConfigError(f"{option}: option comes twice")
        seen.append(path)
        if not equals:
            text = _following(option, hint, words)
        value = _scalar(text, "raw", item or hint)
        if value is MISSING:
            raise ConfigError(f"{option}: expected {_described(item or hint)}, got {_clipped(text)}")
        *parents, last = path
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = [*target.get(last, []), value] if item else value
    return file, values


def _resolve(option: str, section: str) -> tuple[tuple[str, ...], Any]:
    """The path and the type behind an option: a full name, else a key of the script's section, else of `run`."""
    names = tuple(option[2:].split("."))
    if names == ("preset",):
        return names, str
    found: list[tuple[tuple[str, ...], Any]] = []
    for path in (names, (section, *names), ("run", *names)):
        hint: Any = Config
        for name in path:
            nested = _nested(hint)
            hint = get_type_hints(nested).get(name) if nested else None
        found += [(path, hint)] if hint is not None else []
    if found:  # a key before a section: `--chat` is infer.chat, not the section of that name
        return next((path for path in found if path[1] is not _nested(path[1])), found[0])
    paths = [path for path, _ in _walk(Config)]
    short = [path[1:] for path in paths if path[0] in (section, "run")]
    known = ["--preset", "--help", *("--" + ".".join(path) for path in short + paths)]
    raise ConfigError(f"{option}: {_unknown(option, known, 'option')}")


def _following(option: str, hint: Any, words: list[str]) -> str:
    """The value of an option without `=`: the next word; a boolean takes it only where it is one of its values."""
    if bool in _kinds(hint) and not (words and _scalar(words[0], "raw", hint) is not MISSING):
        return "true"
    if not words or words[0].startswith("--"):
        raise ConfigError(f"{option}: expected {_described(hint)}, got nothing ({option}=VALUE takes any text)")
    return words.pop(0)


# --- values ----------------------------------------------------------------------------------------------------

_TRUTH = {"true": True, "True": True, "false": False, "False": False}
_NULLS = ("", "~", "null", "Null", "NULL")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*(_[0-9]+)*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


def _scalar(text: str, style: Literal["plain", "quoted", "raw"], hint: Any) -> Any:
    """The value of `text` for a field of type `hint`; MISSING where it has none.

    plain: a bare word of YAML, which is text only where it looks like nothing else; quoted: text, whatever it looks
    like; raw: a word of the command line, where the shell has eaten the quotes.
    """
    kinds = _kinds(hint)
    literals = {str(value): value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)}
    if text in literals:
        return literals[text]
    if style != "quoted":
        if NoneType in kinds and (text == "null" or (style == "plain" and text in _NULLS)):
            return None
        if bool in kinds and text in _TRUTH:
            return _TRUTH[text]
        if {int, float} & set(kinds) and _NUMBER.fullmatch(text) and math.isfinite(number := float(text)):
            if int in kinds and not set(text) & set(".eE"):
                return int(text)
            if int in kinds and number.is_integer() and abs(number) <= 2**53:  # 1e5; beyond that a float skips some
                return int(number)
            if float in kinds:
                return number
    typed = style == "plain" and (_NUMBER.fullmatch(text) or text in _TRUTH or text in _NULLS)
    if str in kinds and not typed and not re.search("[\ud800-\udfff]", text):  # halves of a character: not UTF-8
        return text
    return MISSING


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _nested(hint: Any) -> type | None:
    """The dataclass of a section or of a mapping within it."""
    return next((kind for kind in _kinds(hint) if is_dataclass(kind)), None)


def _item(hint: Any) -> Any:
    """The type of the items of list[T] and tuple[T, ...]."""
    return next((get_args(kind)[0] for kind in _kinds(hint) if get_origin(kind) in (list, tuple)), None)


def _described(hint: Any) -> str:
    names = {bool: "true|false", int: "int", float: "float", str: "text", NoneType: "null"}
    parts = []
    for kind in _kinds(hint):
        if get_origin(kind) is Literal:
            parts += map(str, get_args(kind))
        else:
            parts.append(f"list of {_described(_item(kind))}" if _item(kind) else names.get(kind, "mapping"))
    return "|".join(parts)


def _walk(hint: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and type of every key below a dataclass, in the order of its fields."""
    for name, kind in get_type_hints(_nested(hint)).items():
        if kind is not _nested(kind):
            yield (*path, name), kind
        if _nested(kind):
            yield from _walk(kind, (*path, name))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins, key by key, also inside the mappings that both have."""
    shared = {k: _merge(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | over | shared


def _build(cls: type, values: dict[str, Any], path: str = "") -> Any:
    """The dataclass of typed values; what its own checks refuse is reported under its section."""
    arguments = {}
    hints = get_type_hints(cls)
    for field in fields(cls):
        name, hint = f"{path}.{field.name}".lstrip("."), hints[field.name]
        value = values.get(field.name, {} if hint is _nested(hint) else MISSING)
        if isinstance(value, dict):
            value = _build(_nested(hint), value, name)
        elif isinstance(value, list):
            value = next(get_origin(kind) for kind in _kinds(hint) if _item(kind))(value)
        elif value is MISSING:
            if field.default is MISSING and field.default_factory is MISSING:
                raise ConfigError(f"{name}: expected {_described(hint)}, got nothing")
            continue
        arguments[field.name] = value
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


# --- out --------------------------------------------------------------------------------------------------------


def dump(cfg: Config) -> str:
    """All keys as YAML, from which load_config makes an equal Config."""
    return "".join(f"{line}\n" for line in _lines(cfg, ""))


def _lines(section: Any, indent: str) -> Iterator[str]:
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield f"{indent}{field.name}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{field.name}: {_written(value)}"


def _written(value: Any) -> str:
    if isinstance(value, str):  # always quoted, so that no text is taken for a number, a boolean or null
        return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=math.inf).strip()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_written, value)) + "]"
    return json.dumps(value)


def help_text(section: str, usage: str | None = None, path: Path | None = None) -> str:
    """Every key with its type, and its default and comment in config.yaml; the script's own section comes first."""
    _read_file(path or DEFAULT_FILE)  # refuses a bad one
    written = _documented(path or DEFAULT_FILE)
    sections = get_type_hints(Config)
    text = [
        f"usage: {usage or f'python {section}.py [FILE.yaml] [--preset NAME] [--key=value ...]'}",
        "--key=value and --key value are the same; a boolean alone is true; a list takes one option per item.",
        f"A name without a section is a key of {section}, else of run.",
    ]
    for name in sorted(sections, key=lambda name: (name != section, name != "run")):
        text += ["", f"{name}: {written.get((name,), ('', ''))[1]}"]
        for keys, hint in _walk(sections[name], (name,)):
            default, comment = written.get(keys, ("", ""))
            left = f"  --{'.'.join(keys[name == section :])} {_described(hint)}" + (default and f" = {default}")
            text.append(f"{left:<58}  {comment}".rstrip())
    presets = {keys[1]: comment for keys, (_, comment) in written.items() if keys[:-1] == ("presets",)}
    text += ["", "presets:", *(f"  --preset {name:<6} {comment}" for name, comment in presets.items())]
    return "\n".join(text)


def _documented(file: Path) -> dict[tuple[str, ...], tuple[str, str]]:
    """Default and comment of each key, as they stand on its line of the file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    entries: dict[tuple[str, ...], tuple[str, str]] = {}
    nodes: list[tuple[tuple[str, ...], yaml.Node]] = [((), _compose(file))]
    for path, node in nodes:  # grows as it is walked
        for key, child in node.value if isinstance(node, yaml.MappingNode) else ():
            default, _, comment = lines[key.end_mark.line][key.end_mark.column + 1 :].partition("#")
            entries[(*path, key.value)] = (default.strip(), comment.strip())
            nodes.append(((*path, key.value), child))
    return entries


# --- words ------------------------------------------------------------------------------------------------------


def _clipped(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _unknown(name: str, known: Iterable[str], kind: str = "key") -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    if near:
        return f"unknown {kind}; did you mean {near[0]}?"
    if re.search(r"(api_?key|token|password|passwd|secret|credential)s?$", name, re.IGNORECASE):
        return f"unknown {kind}; secrets belong in the environment, never in a configuration"
    return f"unknown {kind}"
