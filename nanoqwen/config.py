"""config.yaml <-> dataclasses, strictly: what is not understood is refused, in one line that says where.

Values are read by the core schema of YAML 1.2. Under YAML 1.1, which PyYAML reads by itself, `3e-4` is a string, `on`
is True, `010` is 8, `12:30` is 750 and the second of two equal keys wins.
A new key is one more field of a section's dataclass and one more commented line of config.yaml.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import torch
import yaml

from model import (
    Bound,
    Count,
    Fraction,
    ModelConfig,
    NonNegative,
    OpenFraction,
    Positive,
    SamplingOptions,
    Size,
    TensorSize,
    alternatives,
    check_fields,
    describe,
    field_types,
    require,
)
from nanoqwen.errors import ConfigError
from nanoqwen.lora import LoraConfig
from nanoqwen.redact import redact
from nanoqwen.routing import RoutingConfig, routed_layers

DEFAULT_FILE = Path(__file__).parents[1] / "config.yaml"
FREE_TEXT = {("infer", "prompt"), ("infer", "stop")}  # lists whose items may look like a list themselves
HELP_WIDTH, HELP_COLUMN = 100, 36  # columns of `--help`, and where its comments begin
AUTO_VOCAB = 2_048  # ids of a tokenizer that is trained here, unless model.vocab_size says otherwise
LENGTHS = {"steps", "tokens", "epochs"}  # ways to say how long a run is
WARMUP_SHARE, MAX_WARMUP = 1 / 20, 2_000  # of the steps; at most
# The rate from scratch falls as 1 / width, as muP has it for AdamW (arXiv 2203.03466), from 4e-3 at width 128 (the
# first run: NOTES.md). At 768 that is 6.7e-4 (GPT-2 and GPT-3 of 124 M: 6e-4), at 2,048 2.5e-4 (GPT-3 of 1.3 B: 2e-4).
HIGHEST_RATE, RATE_TIMES_WIDTH = 4e-3, 0.512


# --- the sections ----------------------------------------------------------------------------------------------
#
# config.yaml decides what a run gets. The defaults below are for those who import a class and construct it by hand, as
# the tests do; a test holds them equal to config.yaml. What configuration alone constructs (RunConfig, LogConfig,
# EvalConfig) has none. Types and bounds are in the annotations, rules between fields in __post_init__.


def split_weight(source: str) -> tuple[str, float | None]:
    """SOURCE or SOURCE=WEIGHT. A name that itself ends in `=3` takes a weight after it."""
    name, equals, number = source.rpartition("=")
    try:
        return (name, float(number)) if equals else (source, None)
    except ValueError:
        return source, None


def refuse_weights(field: str, sources: tuple[str, ...]) -> None:
    with_weight = next((source for source in sources if split_weight(source)[1] is not None), None)
    require(with_weight is None, field, "sources without weights", with_weight)


def check_sources(train: tuple[str, ...], val: tuple[str, ...]) -> None:
    """Of sections whose sources are not a mixture."""
    require(train and all(train), "train", "at least one source", train)
    require(all(val), "val", "sources", val)
    refuse_weights("train", train)
    refuse_weights("val", val)


@dataclass(frozen=True)
class ModelSection(ModelConfig):
    """A shape that may leave the size of its vocabulary to the tokenizer."""

    vocab_size: TensorSize | Literal["auto"] = "auto"


@dataclass(frozen=True)
class DataConfig:
    tokenizer: str = "auto"
    train: tuple[str, ...] = ("builtin:python",)
    val: tuple[str, ...] = ()
    val_fraction: OpenFraction = 0.05
    text_key: str = "text"
    split: str = "train"
    streaming: bool = False
    isolate_documents: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    workers: Count = 0
    cache_dir: str = ".cache"

    def __post_init__(self) -> None:
        check_fields(self)
        weights = [weight for _, weight in map(split_weight, self.train)]
        require(self.train, "train", "at least one source", "none")
        require(all(name for name, _ in map(split_weight, self.train)) and all(self.val), "train", "sources", "''")
        for source, weight in zip(self.train, weights, strict=True):
            require(weight is None or 0 < weight < math.inf, "train", "a weight above 0 and finite", source)
        mixed = len({weight is None for weight in weights}) > 1
        require(not mixed, "train", "a weight for each source or none", self.train)
        require(len(weights) <= 32 or weights[0] is None, "train", "at most 32 weighted sources", len(weights))
        refuse_weights("val", self.val)


@dataclass(frozen=True)
class ChatConfig:
    train: tuple[str, ...] = ("builtin:docstrings",)
    val: tuple[str, ...] = ()
    val_fraction: OpenFraction = 0.05
    split: str = "train"
    on_error: Literal["stop", "skip"] = "stop"
    limit: Count = 0
    system: str | None = None
    pack: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_sources(self.train, self.val)


@dataclass(frozen=True)
class ContrastConfig:
    train: tuple[str, ...] = ("builtin:injections",)
    val: tuple[str, ...] = ()
    val_fraction: OpenFraction = 0.1
    split: str = "train"
    max_bad_rows: Count = 0
    limit: Count = 0
    weight: NonNegative = 0.1
    temperature: Positive = 0.07
    head_size: Size = 256
    weight_benign: NonNegative = 1.0
    weight_cf: NonNegative = 0.5
    weight_injection: NonNegative = 1.0
    eval_rows: Size = 60
    answer_tokens: Size = 24

    def __post_init__(self) -> None:
        check_fields(self)
        check_sources(self.train, self.val)
        require(sum(self.stream_weights) > 0, "weight_benign", "a weight above 0", 0)

    @property
    def stream_weights(self) -> tuple[float, float, float]:
        return self.weight_benign, self.weight_cf, self.weight_injection


@dataclass(frozen=True)
class RunConfig:
    seed: Annotated[int, Bound(0, 2**63, open_high=True)]
    device: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    dir: str
    resume: str
    overwrite: bool
    dry_run: bool
    parallel: Literal["ddp", "fsdp"]
    timeout: Annotated[float, Bound(1)]
    keep: Size
    save_every: Size
    allow_change: tuple[str, ...]

    def __post_init__(self) -> None:
        check_fields(self)
        known = re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", self.device)
        require(known, "device", "auto, cpu, mps, cuda or cuda:N", self.device)
        require(self.dir.strip(), "dir", "a folder", self.dir)
        require(not self.overwrite or self.resume == "never", "overwrite", "resume never beside it", self.resume)


@dataclass(frozen=True)
class TrainConfig:
    base_ckpt: str | None = None
    steps: Size = 1200
    tokens: Positive | None = None
    epochs: Positive | None = None
    seq_len: Size = 128
    batch_tokens: Size = 1024
    micro_batch: Size | Literal["auto"] = "auto"
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Positive | Literal["auto"] = 4e-3
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    clip: Positive = 1.0
    schedule: Literal["cosine", "wsd", "linear", "constant", "plateau"] = "cosine"
    warmup_steps: Count | Literal["auto"] = "auto"
    decay_share: Fraction = 0.2
    floor: Fraction = 0.1
    plateau_factor: OpenFraction = 0.5
    plateau_patience: Count = 2
    plateau_threshold: Positive = 1e-3
    plateau_cooldown: Count = 0
    z_loss: NonNegative = 0.0
    checkpoint_activations: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    eval_every: Size = 400
    eval_tokens: Size = 32_768
    log_every: Size = 50
    sample_tokens: Count = 100
    skip_limit: Count = 5
    patience: Count = 0

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.tokens is None or self.epochs is None, "epochs", "null beside tokens", self.epochs)
        if self.warmup_steps != "auto" and self.tokens is None and self.epochs is None:
            within = self.warmup_steps <= self.steps
            require(within, "warmup_steps", f"at most steps {self.steps}", self.warmup_steps)
        whole_rows = self.batch_tokens % self.seq_len == 0
        require(whole_rows, "batch_tokens", f"a multiple of seq_len {self.seq_len}", self.batch_tokens)

    @property
    def rows(self) -> int:
        """Rows of an optimizer step, over all micro-batches and ranks."""
        return self.batch_tokens // self.seq_len

    def counted(self, steps_per_epoch: float | None = None) -> TrainConfig:
        """With `steps` from tokens or epochs; epochs need data to be counted."""
        steps = self.steps
        if self.tokens is not None:
            steps = math.ceil(self.tokens / self.batch_tokens)
        elif self.epochs is not None:
            if steps_per_epoch is None:
                return self
            steps = math.ceil(self.epochs * steps_per_epoch)
        warmup = self.warmup_steps if self.warmup_steps == "auto" else min(self.warmup_steps, steps)
        return replace(self, steps=steps, warmup_steps=warmup)

    def with_warmup(self) -> TrainConfig:
        """With the warm-up from the steps, if it is `auto`."""
        warmup = min(int(WARMUP_SHARE * self.steps), MAX_WARMUP)
        return replace(self, warmup_steps=warmup) if self.warmup_steps == "auto" else self


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Its own values for the keys of TrainConfig are in config.yaml alone."""

    objective: Literal["sft", "contrast"] = "sft"
    show_data: bool = False


@dataclass(frozen=True)
class LogConfig:
    wandb: Literal["off", "online", "offline"]
    project: str
    name: str | None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class InferConfig(SamplingOptions):
    temperature: NonNegative = 0.8
    top_p: Positive = 0.95
    ckpt: str | None = None
    prompt: tuple[str, ...] = ()
    prompt_file: str | None = None
    instruct: bool = False
    chat: bool = False
    system: str | None = None
    thinking: bool = True
    num_samples: Size = 1
    stream: bool = True
    weights: Literal["auto", "int8", "int4"] = "auto"
    cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    allow_special: bool = False
    allow_mismatch: bool = False
    show_routing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        enough = self.min_new_tokens <= self.max_new_tokens
        require(enough, "min_new_tokens", f"at most max_new_tokens {self.max_new_tokens}", self.min_new_tokens)
        has_template = self.chat or self.instruct
        require(has_template or self.system is None, "system", "chat or instruct beside it", self.system)
        require(has_template or self.thinking, "thinking", "chat or instruct beside it", self.thinking)


@dataclass(frozen=True)
class EvalConfig:
    ckpt: str | None
    suite: Literal["heldout", "injection"] | None
    tasks: tuple[str, ...]
    data: tuple[str, ...]
    limit: Count | None
    seq_len: Size | None
    calibrate: bool
    include_path: str | None
    num_fewshot: Count | None
    chat: bool
    batch_tokens: Size
    base: str | None
    weights: Literal["auto", "int8", "int4"]
    answer_tokens: Size
    output: str | None

    def __post_init__(self) -> None:
        check_fields(self)
        require(all(self.data), "data", "sources", self.data)
        require(all(self.task_names), "tasks", "names, one per option or with commas between them", self.tasks)

    @property
    def task_names(self) -> list[str]:
        """Each once; `a,b` are two."""
        return list(dict.fromkeys(name.strip() for names in self.tasks for name in names.split(",")))


@dataclass(frozen=True)
class Config:
    run: RunConfig
    model: ModelSection
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


# --- the configuration of a script -----------------------------------------------------------------------------


def load_config(argv: Sequence[str], section: str, usage: str | None = None) -> Config:
    """config.yaml < the YAML file in `argv` < its --preset < its other options.

    `argv` is without the program's name; a bare `--key` is a key of `section`, else of `run`. `--help` prints and
    leaves with 0.
    """
    if not {"-h", "--help"}.isdisjoint(argv):
        print(help_text(section, usage, everything="all" in argv), flush=True)
        raise SystemExit(0)
    file, options = _read_argv(argv, section)
    values, presets = _read_files(file)
    preset = options.pop("preset", None)
    if preset is not None:
        if preset not in presets:
            raise ConfigError(f"--preset: {_unknown(preset, presets, 'preset')}")
        values = _merge(values, presets[preset])
    for name in ("train", "finetune"):  # an option says how long; what a file says of it in another unit is dropped
        if (said := options.get(name, {})).keys() & LENGTHS:
            values[name] = values[name] | dict.fromkeys(LENGTHS - said.keys() - {"steps"})
    values = _merge(values, options)
    for name in values.keys() - {"infer"}:  # a prompt is a person's own affair: no file keeps it
        _refuse_secrets(values[name], name)
    return _settled(_build(Config, values), section)


def _refuse_secrets(value: Any, path: str) -> None:
    """A run writes its configuration to its folder, its report and its logs."""
    if isinstance(value, dict | list | tuple):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_secrets(item, f"{path}.{name}")
    elif isinstance(value, str) and redact(value) != value:
        where = "a run keeps its configuration: keys belong into the environment (HF_TOKEN, WANDB_API_KEY)"
        raise ConfigError(f"{path}: expected no secret, got {redact(value)!r}; {where}")


def rate_from_scratch(hidden_size: int) -> float:
    return min(HIGHEST_RATE, RATE_TIMES_WIDTH / hidden_size)


def _settled(cfg: Config, section: str) -> Config:
    """What `auto` stands for, where the configuration alone decides it."""
    if cfg.run.dir == "auto":
        pretrained = "continued" if cfg.train.base_ckpt else "base"
        name = cfg.finetune.objective if section == "finetune" else pretrained
        cfg = replace(cfg, run=replace(cfg.run, dir=f"runs/{name}"))
    if cfg.model.vocab_size == "auto" and cfg.data.tokenizer == "auto":
        cfg = replace(cfg, model=replace(cfg.model, vocab_size=AUTO_VOCAB))
    train = cfg.train.counted()
    if train.lr == "auto" and train.base_ckpt is None:
        train = replace(train, lr=rate_from_scratch(cfg.model.hidden_size))
    return replace(cfg, train=train, finetune=cfg.finetune.counted())


def _read_files(file: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values of config.yaml with those of a person's own file over them, the presets of both)"""
    values, own = _read_file(DEFAULT_FILE), {} if file is None else _read_file(file)
    presets = values.pop("presets", {}) | own.pop("presets", {})
    values = _merge(values, own)
    values["finetune"] = values.get("train", {}) | values.get("finetune", {})
    return values, presets


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins, key by key, also inside the mappings that both have."""
    both = {k: _merge(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | over | both


def _build(cls: type, values: dict[str, Any], path: str = "") -> Any:
    """The dataclass of typed values; what its own checks refuse is reported under its section."""
    optional = {field.name for field in fields(cls) if "." in path and field.default is not MISSING}
    arguments = {}
    for field, hint in field_types(cls).items():
        name = f"{path}.{field}".lstrip(".")
        if field in values:
            value = values[field]
            value = _build(_section(hint), value, name) if isinstance(value, dict) else value
            arguments[field] = tuple(value) if isinstance(value, list) else value
        elif field not in optional:  # config.yaml is complete: a default of a section's class never serves a run
            raise ConfigError(f"{name}: expected {describe(hint)}, got nothing")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def preset_names() -> list[str]:
    """The shipped ones, as they stand in config.yaml."""
    return list(_read_file(DEFAULT_FILE)["presets"])


def check(cfg: Config, world_size: int = 1, loop: TrainConfig | None = None) -> None:
    """Refuse what no section sees alone, and what this machine lacks, before anything is allocated.

    loop: the section of the script, where it is not `train`
    """
    check_device(cfg.run)
    if "\0" in cfg.run.dir:
        raise ConfigError(f"run.dir: expected the path of a folder, got a NUL character in {cfg.run.dir!r}")
    if world_size < 1:
        raise ConfigError(f"world size: expected 1 or more, got {world_size}")
    loop = loop or cfg.train
    if world_size > 1 and cfg.run.parallel == "fsdp" and loop.optimizer == "muon":
        raise ConfigError("run.parallel: fsdp shards the matrices that optimizer muon needs whole (try ddp)")
    check_rows(loop, world_size, "train" if loop is cfg.train else "finetune")
    if loop is cfg.train and loop.base_ckpt is None:  # else the model comes from a checkpoint
        check_context(loop, cfg.model)
        try:
            routed_layers(cfg.model, cfg.routing)
        except ValueError as error:
            raise ConfigError(f"routing.kind {cfg.routing.kind}: {error}") from None


def check_device(run: RunConfig) -> None:
    kind, _, index = run.device.partition(":")
    present = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind in present and int(index or 0) >= present[kind]:
        raise ConfigError(f"run.device: expected a device of this machine, got {run.device!r} (try auto)")


def check_rows(loop: TrainConfig, world_size: int, section: str) -> None:
    if loop.rows % world_size:
        rows = f"{loop.rows} rows of {loop.seq_len} tokens"
        raise ConfigError(f"{section}.batch_tokens: {rows} per step cannot be divided among {world_size} ranks")


def check_context(loop: TrainConfig, model: ModelConfig) -> None:
    if loop.seq_len > model.context:
        raise ConfigError(f"seq_len: expected at most the model's context of {model.context}, got {loop.seq_len}")


# --- YAML ------------------------------------------------------------------------------------------------------


def _int(text: str) -> float:
    return int(text) if math.isfinite(float(text)) else math.inf  # Python refuses to read thousands of digits


_TAG = "tag:yaml.org,2002:"
_WHOLE = r"0|[1-9][0-9]*(_[0-9]+)*"
# The core schema of YAML 1.2, without octal, hexadecimal, .inf and .nan: (type, pattern, first characters, reader).
CORE_SCHEMA = (
    ("bool", r"true|True|false|False", "tTfF", lambda text: text in ("true", "True")),
    ("null", r"|~|null|Null|NULL", ["", *"~nN"], lambda text: None),
    ("int", rf"[-+]?({_WHOLE})", "-+0123456789", _int),
    ("float", rf"[-+]?(({_WHOLE})(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", "-+.0123456789", float),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}  # in place of YAML 1.1's

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, "tags are refused", event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[
        dict
    ] = {}  # so that a text is quoted where `_Loader` would take it for something else


for _type, _pattern, _first, _ in CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _type, re.compile(f"(?:{_pattern})$"), _first)
_Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence(_TAG + "seq", items, flow_style=True))


def plain_scalar(text: str) -> Any:
    """The value of a word without quotes: a boolean, null, a number, else the text itself."""
    return next((read(text) for _, pattern, _, read in CORE_SCHEMA if re.fullmatch(pattern, text)), text)


def read_values(path: Path) -> dict[str, Any]:
    """A file as nested dictionaries, whatever its keys: for reading what `dump` wrote."""
    try:
        values = _Loader("").construct_document(_compose(*_read_text(path)))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: expected a mapping, got {type(values).__name__}")
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}"""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def to_dict(cfg: Config) -> dict[str, Any]:
    """All values by section, as they come back from YAML or JSON: lists for tuples."""
    return json.loads(json.dumps(asdict(cfg)))


def dump(cfg: Config) -> str:
    """All keys as YAML, from which load_config makes an equal Config."""
    return yaml.dump(to_dict(cfg), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def _read_file(path: Path) -> dict[str, Any]:
    """The typed values of a file by section, and its `presets`, each a partial Config of the same grammar."""
    hints = field_types(Config) | {"presets": dict[str, Config]}
    return _read_mapping(_compose(*_read_text(path)), hints, "", str(path))


def _read_text(path: Path) -> tuple[str, str]:
    """(text, name) of a UTF-8 file."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: expected UTF-8 text, got byte {raw[error.start]:#04x}") from None
    if text.startswith("\ufeff"):
        raise ConfigError(f"{path}:1: expected plain UTF-8, got a byte-order mark")
    return text, str(path)


def _compose(text: str, name: str) -> yaml.Node:
    """YAML as a tree of nodes that know their lines; no value is constructed."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name}:{line}: expected text, got control character {error.character:#x}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        reason = " ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{name}:{line}: not valid YAML: {reason}") from None
    except (RecursionError, ValueError, OverflowError) as error:  # nesting, escapes or a version without end
        raise ConfigError(f"{name}:1: not valid YAML: {error}") from None
    if root is None:
        raise ConfigError(f"{name}:1: expected a mapping of sections, got an empty file")
    return root


def _read_mapping(node: yaml.Node, hints: dict[str, Any], path: str, file: str, other: Any = None) -> dict[str, Any]:
    """Typed values of a mapping whose keys are those of `hints`, or any key where there is a type for `other`."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{_at(node, path, file)}: expected mapping, got {_shown(node)}")
    values: dict[str, Any] = {}
    for key, child in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{_at(key, path, file)}: expected a key, got {_shown(key)}")
        name = f"{path}.{key.value}".lstrip(".")
        hint = hints.get(key.value, other)
        if hint is None:
            raise ConfigError(f"{_at(key, name, file)}: {_unknown(key.value, hints)}")
        if key.value in values:
            raise ConfigError(f"{_at(key, name, file)}: key comes twice")
        values[key.value] = _read(child, hint, name, file)
    return values


def _read(node: yaml.Node, hint: Any, path: str, file: str) -> Any:
    """One node as a value of type `hint`; a mapping becomes a dict, to be merged and built later."""
    section, item, remedy = _section(hint), _item(hint), ""
    if get_origin(hint) is dict:
        return _read_mapping(node, {}, path, file, other=get_args(hint)[1])
    if section and (isinstance(node, yaml.MappingNode) or hint is section):
        return _read_mapping(node, field_types(section), path, file)
    if item and isinstance(node, yaml.SequenceNode):
        return [_read(child, item, path, file) for child in node.value]
    if isinstance(node, yaml.ScalarNode):
        unquoted, text = plain_scalar(node.value), node.value
        value, otherwise = (text, unquoted) if node.style else (unquoted, text)
        if (typed := _typed(value, hint)) is not MISSING:
            return typed
        if text and _typed(otherwise, hint) is not MISSING:
            remedy = " without quotes" if node.style else " in quotes"
    raise ConfigError(f"{_at(node, path, file)}: expected {describe(hint)}{remedy}, got {_shown(node)}")


def _typed(value: Any, hint: Any) -> Any:
    """A scalar as a value of type `hint`, whatever its bounds; MISSING where it is none."""
    kinds = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in alternatives(hint)]
    if isinstance(value, str):
        named = any(value in get_args(kind) for kind in kinds if get_origin(kind) is Literal)
        readable = str in kinds and not re.search("[\ud800-\udfff]", value)  # halves of a character: not UTF-8
        return value if named or readable else MISSING
    if type(value) in (bool, NoneType):
        return value if type(value) in kinds else MISSING
    if int in kinds and (isinstance(value, int) or (value.is_integer() and abs(value) <= 2**53)):
        return int(value)  # 1e5 too; beyond 2**53 a float skips some integers
    return float(value) if float in kinds and math.isfinite(value) else MISSING


def _at(node: yaml.Node, path: str, file: str) -> str:
    return f"{file}:{node.start_mark.line + 1}" + (path and f": {path}")


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return _clipped(node.value) if node.value or node.style else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _section(hint: Any) -> type | None:
    """The dataclass of a section or of a mapping within it."""
    return next((kind for kind in alternatives(hint) if is_dataclass(kind)), None)


def _item(hint: Any) -> Any:
    """The type of the items of a list."""
    return next((get_args(kind)[0] for kind in alternatives(hint) if get_origin(kind) is tuple), None)


# --- the command line ------------------------------------------------------------------------------------------


def _read_argv(argv: Sequence[str], section: str) -> tuple[Path | None, dict[str, Any]]:
    """The file that is named, and the typed values of the options, nested as in a file, with `preset` beside them."""
    file: Path | None = None
    values: dict[str, Any] = {}
    earlier: list[tuple[str, ...]] = []
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
        is_list = _item(hint) is not None
        if not is_list and any(path[: len(old)] == old or old[: len(path)] == path for old in earlier):
            raise ConfigError(f"{option}: option comes twice")
        earlier.append(path)
        value = _read_option(option, path, hint, text if equals else _following(option, hint, words))
        *parents, last = path
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = [*target.get(last, []), *value] if is_list else value
    return file, values


def _read_option(option: str, path: tuple[str, ...], hint: Any, text: str) -> Any:
    """The value of an option; of a list, the items that this option adds."""
    item = _item(hint)
    if item and path not in FREE_TEXT and text.startswith("[") and text.endswith("]"):
        return _read(_compose(text, option), hint, "", option)
    value = _read_word(text, item or hint)
    if value is MISSING:
        raise ConfigError(f"{option}: expected {describe(item or hint)}, got {_clipped(text)}")
    return [value] if item else value


def _read_word(text: str, hint: Any) -> Any:
    """A word of the command line, where the shell has eaten the quotes: text where it can be nothing else."""
    value = plain_scalar(text)
    if value is None and text != "null":  # `--prompt=` and `--ckpt=~` are texts
        value = text
    typed = _typed(value, hint)
    return _typed(text, hint) if typed is MISSING else typed


def _resolve(option: str, section: str) -> tuple[tuple[str, ...], Any]:
    """The path and the type behind an option: a full name, else a key of the script's section, else of `run`."""
    names = tuple(option[2:].split("."))
    if names == ("preset",):
        return names, str
    candidates: list[tuple[tuple[str, ...], Any]] = []
    for path in (names, (section, *names), ("run", *names)):
        hint: Any = Config
        for name in path:
            cls = _section(hint)
            hint = field_types(cls).get(name) if cls else None
        candidates += [(path, hint)] if hint is not None else []
    if candidates:  # a key before a section: `--chat` is infer.chat, not the section of that name
        return next(((path, hint) for path, hint in candidates if hint is not _section(hint)), candidates[0])
    paths = [path for path, _ in _walk(Config)]
    short = [path[1:] for path in paths if path[0] in (section, "run")]
    known = ["--preset", "--help", *("--" + ".".join(path) for path in short + paths)]
    raise ConfigError(f"{option}: {_unknown(option, known, 'option')}")


def _following(option: str, hint: Any, words: list[str]) -> str:
    """The value of an option without `=`: the next word; a boolean takes it only where it is one of its values."""
    if bool in alternatives(hint) and not (words and _read_word(words[0], hint) is not MISSING):
        return "true"
    if not words or words[0].startswith("--"):
        raise ConfigError(f"{option}: expected {describe(hint)}, got nothing ({option}=VALUE takes any text)")
    return words.pop(0)


def _walk(hint: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and type of every key below a dataclass, in the order of its fields."""
    for name, kind in field_types(_section(hint)).items():
        if kind is not _section(kind):
            yield (*path, name), kind
        if _section(kind):
            yield from _walk(kind, (*path, name))


# --- help ------------------------------------------------------------------------------------------------------


def help_text(section: str, usage: str | None = None, everything: bool = False) -> str:
    """The keys of the script's section and of `run`, else of all sections: type, bound, default and comment."""
    entries, presets = _documented()
    places = {path: place for place, path in enumerate(entries)}  # what finetune takes over from train comes last
    sections = sorted(field_types(Config), key=lambda name: (name != section, name != "run"))
    shown = sections if everything else [name for name in sections if name in (section, "run")]
    text = [
        f"usage: {usage or f'python {section}.py [FILE.yaml] [--preset NAME] [--key=value ...]'}",
        "--key=value and --key value are the same; a boolean alone is true.",
        "A list takes one option per item, or --key='[a, b]' as in YAML; prompt and stop are always text.",
        f"A name without a section is a key of {section}, else of run.",
    ]
    if not everything:
        text += ["--help all also shows the presets, and these sections:", "  " + " ".join(sections[len(shown) :])]
    for name in shown:
        text += ["", f"{name}: {entries[name,][1]}"]
        keys = _walk(field_types(Config)[name], (name,))
        for path, hint in sorted(keys, key=lambda key: places.get(key[0][:2], len(places))):
            default, comment = entries.get(path) or entries.get(("train", *path[1:]), ("", ""))
            option = f"--{'.'.join(path[name == section :])} {describe(hint)}" + (default and f" = {default}")
            text += _columns(option, comment)
    if everything:
        text += ["", "presets:", *(f"  --preset {name:<6} {comment}" for name, comment in presets.items())]
    return "\n".join(text)


def _columns(option: str, comment: str) -> list[str]:
    """An option, and its comment in a column of its own."""
    left = textwrap.wrap(option, HELP_WIDTH, initial_indent="  ", subsequent_indent="      ")
    right = textwrap.wrap(comment, HELP_WIDTH - HELP_COLUMN, break_on_hyphens=False)
    if right and len(left[-1]) < HELP_COLUMN - 1:
        left[-1] = f"{left[-1]:<{HELP_COLUMN}}{right.pop(0)}"
    return left + [" " * HELP_COLUMN + line for line in right]


def _documented() -> tuple[dict[tuple[str, ...], tuple[str, str]], dict[str, str]]:
    """(default and comment of each section and key, comment of each preset), as they stand in config.yaml."""
    text, name = _read_text(DEFAULT_FILE)
    _read_file(DEFAULT_FILE)  # refuses a bad one
    lines = text.splitlines()
    entries: dict[tuple[str, ...], tuple[str, str]] = {}
    nodes: list[tuple[tuple[str, ...], yaml.Node]] = [((), _compose(text, name))]
    for path, node in nodes:  # grows as it is walked
        for key, child in node.value if isinstance(node, yaml.MappingNode) else ():
            default, _, comment = lines[key.end_mark.line][key.end_mark.column + 1 :].partition("#")
            entries[(*path, key.value)] = (default.strip(), comment.strip())
            nodes.append(((*path, key.value), child))
    presets = {path[1]: comment for path, (_, comment) in entries.items() if path[:-1] == ("presets",)}
    return entries, presets


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
