"""config.yaml and the command line: what is meant arrives with its type, everything else is refused in one line."""

import errno
import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest

from model import Bound, ModelConfig, RopeScaling, Sampling, SamplingOptions, alternatives, field_types
from nanoqwen import config
from nanoqwen.config import Config, DataConfig, check, dump, flatten, help_text, load_config, read_values, to_dict
from nanoqwen.errors import ConfigError, exit_code_of, run_script

ROOT = Path(config.__file__).parents[1]
TINY_MODEL = "hidden_size: 64\n  num_attention_heads: 4\n  num_key_value_heads: 2\n"


def load(folder: Path, text: str | bytes, *argv: str, section: str = "infer") -> Config:
    path = folder / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config([str(path), *argv], section)


def refusal(folder: Path, text: str | bytes, *argv: str) -> str:
    """What is said about a bad configuration: always one line, here without the folder."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *argv)
    message = str(caught.value)
    assert message.isprintable()
    return message.replace(f"{folder}/", "")


# --- the file --------------------------------------------------------------------------------------------------

MALFORMED = {
    "tab": ("run:\n\tseed: 1\n", 2),
    "open bracket": ("infer:\n  stop: [a, b\n", 3),
    "open quote": ('run:\n  device: "cpu\n', 3),
    "list at the top": ("- run\n- model\n", 1),
    "scalar at the top": ("hello\n", 1),
    "empty": ("", 1),
    "comments only": ("# nothing\n", 1),
    "binary": (b"run:\n  seed: 1\n\x80\x81\xff\n", 3),
    "NUL": (b"run:\n  device: 'c\0pu'\n", 2),
    "UTF-16": ("run:\n  seed: 1\n".encode("utf-16"), 1),
    "UTF-16 without a mark": ("run:\n  seed: 1\n".encode("utf-16-le"), 1),
    "UTF-8 with a mark": ("run:\n  seed: 1\n".encode("utf-8-sig"), 1),
    "two documents": ("run:\n  seed: 1\n---\nrun:\n  seed: 2\n", 3),
    "section is a list": ("run:\n  seed: 1\nmodel: []\n", 3),
    "section is nothing": ("run:\nmodel:\n  bias: true\n", 1),
    "section is a number": ("model: 3\n", 1),
    "presets is a list": ("presets: [tiny]\n", 1),
    "key is a list": ("run:\n  [seed]: 1\n", 2),
    "bad indentation": ("run:\n  seed: 1\n dtype: auto\n", 3),
    "merge key": ("run: &a\n  seed: 1\ninfer:\n  <<: *a\n", 4),
    "unknown anchor": ("run:\n  seed: *nowhere\n", 2),
    "python tag": ("run:\n  device: !!python/object/apply:os.system ['touch canary']\n", 2),
    "tag on a mapping": ("run: !!python/object:config.RunConfig\n  seed: 1\n", 1),
    "tag that changes a type": ("run:\n  seed: !!int '1'\n", 2),
    "contains itself": ("run: &a\n  seed: *a\n", 1),
    "deeper than the stack": ("[" * 10_000, 1),
    "character beyond Unicode": ('run:\n  device: "\\UFFFFFFFF"\n', 1),
}


@pytest.mark.parametrize(("text", "line"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_refused_with_its_line(tmp_path, monkeypatch, text, line):
    monkeypatch.chdir(tmp_path)
    assert refusal(tmp_path, text).startswith(f"a.yaml:{line}: ")
    assert not Path("canary").exists()


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    folder = tmp_path / "a.yaml"
    folder.mkdir()
    with pytest.raises(ConfigError, match=f"^{re.escape(str(folder))}: Is a directory"):
        load_config([str(folder)], "infer")
    with pytest.raises(ConfigError, match="No such file"):
        load_config(["no\n\x1b[31msuch.yaml"], "infer")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle:\n  bias: true\n", "a.yaml:1: modle: unknown key; did you mean model?"),
        ("run:\n  sed: 1\n", "a.yaml:2: run.sed: unknown key; did you mean seed?"),
        ("model:\n  hiden_size: 64\n", "a.yaml:2: model.hiden_size: unknown key; did you mean hidden_size?"),
        (
            "model:\n  rope_scaling:\n    rope_type: yarn\n    facto: 2\n",
            "a.yaml:4: model.rope_scaling.facto: unknown key; did you mean factor?",
        ),
        (
            "presets:\n  a:\n    model: {bais: true}\n",
            "a.yaml:3: presets.a.model.bais: unknown key; did you mean bias?",
        ),
        ("zzz: 1\n", "a.yaml:1: zzz: unknown key"),
        ("run:\n  {seed: 1, seed: 2}\n", "a.yaml:2: run.seed: key comes twice"),
        ("run:\n  seed: 1\nmodel:\n  bias: true\nrun:\n  seed: 1\n", "a.yaml:5: run: key comes twice"),
        ("presets:\n  a: {}\n  a: {}\n", "a.yaml:3: presets.a: key comes twice"),
        (
            "model:\n  rope_scaling: {factor: 2}\n",
            "model.rope_scaling.rope_type: expected linear|dynamic|yarn|llama3, got nothing",
        ),
    ],
)
def test_unknown_double_and_missing_keys(tmp_path, text, said):
    assert refusal(tmp_path, text) == said


@pytest.mark.parametrize("key", ["hf_token", "WANDB_API_KEY", "password", "aws_secret", "apikey"])
def test_a_secret_is_refused_and_never_echoed(tmp_path, key):
    for text in (f"{key}: CANARY\n", f"run:\n  {key}: CANARY\n", f"run:\n  seed: {{{key}: CANARY}}\n"):
        assert "CANARY" not in refusal(tmp_path, text)
    for argv in ((f"--{key}=CANARY",), (f"--{key}", "CANARY"), (f"--infer.{key}=CANARY",), (f"{key}=CANARY",)):
        assert "CANARY" not in refusal(tmp_path, "run: {}\n", *argv)
    assert "environment" in refusal(tmp_path, f"{key}: CANARY\n")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://me:CANARY@host/x.txt", "https://***@host/x.txt"),
        ("https://host/x.txt?a=1&api_key=CANARY", "https://host/x.txt?a=1&***"),
        ("hf_CANARYCANARY", "***"),
        ("mine CANARY-of-the-shell", "mine ***"),
    ],
)
@pytest.mark.parametrize("key", ["log.name", "log.project", "data.tokenizer", "run.dir"])
def test_a_secret_in_a_value_is_refused_before_anything_is_written(tmp_path, monkeypatch, key, value, shown):
    monkeypatch.setenv("HF_TOKEN", "CANARY-of-the-shell")
    section, name = key.split(".")
    said = refusal(tmp_path, f"{section}:\n  {name}: {json.dumps(value)}\n")
    assert said == refusal(tmp_path, "run: {}\n", f"--{key}={value}")
    assert f"expected no secret, got '{shown}'" in said
    assert "CANARY" not in said + refusal(tmp_path, "run: {}\n", f"--data.train={value}")
    assert load(tmp_path, "run: {}\n", f"--infer.prompt={value}").infer.prompt == (value,)  # nothing keeps it


# --- values ----------------------------------------------------------------------------------------------------

REFUSED = object()
TYPED = [  # what stands in the file, the key, its value
    ("3e-4", "model.dropout", 0.0003),
    ("1e5", "model.rope_theta", 100000.0),
    ("1e5", "model.vocab_size", 100000),
    ("1.5e3", "model.vocab_size", 1500),
    ("1_000", "model.vocab_size", 1000),
    ("9223372036854775807", "run.seed", 2**63 - 1),
    ("+5", "model.vocab_size", 5),
    (".5", "model.dropout", 0.5),
    ("0", "model.dropout", 0.0),
    ("-1", "infer.length_penalty", -1.0),
    ("1.5", "model.vocab_size", REFUSED),
    ("1e-5", "model.vocab_size", REFUSED),
    ("1e400", "model.rope_theta", REFUSED),
    ("1e999999999999", "model.vocab_size", REFUSED),
    ("010", "model.vocab_size", REFUSED),
    ("0x10", "model.vocab_size", REFUSED),
    ("12:30", "model.vocab_size", REFUSED),
    ("1__0", "model.vocab_size", REFUSED),
    ("٣", "model.vocab_size", REFUSED),
    ("5 * 8", "model.vocab_size", REFUSED),
    ("None", "model.vocab_size", REFUSED),
    ("None", "model.head_dim", REFUSED),
    ('"5"', "model.vocab_size", REFUSED),
    ("true", "model.vocab_size", REFUSED),
    ("2024-01-01", "model.vocab_size", REFUSED),
    ("[5]", "model.vocab_size", REFUSED),
    ("{a: 5}", "model.vocab_size", REFUSED),
    ("~", "model.vocab_size", REFUSED),
    ("", "model.vocab_size", REFUSED),
    (".inf", "model.rope_theta", REFUSED),
    (".nan", "infer.temperature", REFUSED),
    ("nan", "infer.temperature", REFUSED),
    ("true", "model.bias", True),
    ("False", "model.tie_word_embeddings", False),
    ("on", "model.bias", REFUSED),
    ("yes", "model.bias", REFUSED),
    ("1", "model.bias", REFUSED),
    ('"true"', "model.bias", REFUSED),
    ("~", "model.bias", REFUSED),
    ("null", "infer.ckpt", None),
    ("~", "infer.ckpt", None),
    ("", "infer.ckpt", None),
    ('"null"', "infer.ckpt", "null"),
    ("runs/a b", "infer.ckpt", "runs/a b"),
    ("on", "infer.ckpt", "on"),
    ("2024-01-01", "infer.ckpt", "2024-01-01"),
    ("123", "data.tokenizer", REFUSED),
    ('"123"', "data.tokenizer", "123"),
    ("3e-4", "data.tokenizer", REFUSED),
    ("true", "data.tokenizer", REFUSED),
    ("~", "data.tokenizer", REFUSED),
    ("[bytes]", "data.tokenizer", REFUSED),
    ('"\\ud800"', "data.tokenizer", REFUSED),
    ("bfloat16", "run.dtype", "bfloat16"),
    ("bf16", "run.dtype", REFUSED),
    ("never", "infer.early_stopping", "never"),
    ("true", "infer.early_stopping", True),
    ("maybe", "infer.early_stopping", REFUSED),
    ('["a", "1"]', "infer.stop", ("a", "1")),
    ("[a, 1]", "infer.stop", REFUSED),
    ("[a, [b]]", "infer.stop", REFUSED),
    ("a", "infer.stop", REFUSED),
    ("~", "infer.stop", REFUSED),
]


@pytest.mark.parametrize(("written", "key", "expected"), TYPED)
def test_a_value_arrives_as_what_was_meant_or_is_refused(tmp_path, written, key, expected):
    section, name = key.split(".")
    text = f"{section}:\n  {name}: {written}\n"
    if expected is REFUSED:
        assert refusal(tmp_path, text).startswith(f"a.yaml:2: {key}: expected ")
    else:
        value = getattr(getattr(load(tmp_path, text), section), name)
        assert (value, type(value)) == (expected, type(expected))


def test_a_refusal_says_what_was_expected_and_how_to_write_it(tmp_path):
    said = refusal(tmp_path, "model:\n  num_hidden_layers: abc\n")
    assert said == "a.yaml:2: model.num_hidden_layers: expected int in [1, 10000], got 'abc'"
    said = refusal(tmp_path, "model:\n  num_hidden_layers: '6'\n")
    assert said == "a.yaml:2: model.num_hidden_layers: expected int in [1, 10000] without quotes, got '6'"
    said = refusal(tmp_path, "data:\n  tokenizer: 5\n")
    assert said == "a.yaml:2: data.tokenizer: expected text in quotes, got '5'"


def test_anchors_are_plain_repetition(tmp_path):
    assert load(tmp_path, "model:\n  hidden_size: &h 448\n  intermediate_size: *h\n").model.intermediate_size == 448


# --- impossible values -----------------------------------------------------------------------------------------

FIELDS = [  # of every section, and of the mapping inside one
    (cls, name, hint)
    for cls in (*get_type_hints(Config).values(), RopeScaling, Sampling)
    for name, hint in field_types(cls).items()
]
BOUNDS = [
    (cls, name, *get_args(kind))
    for cls, name, hint in FIELDS
    for kind in alternatives(hint)
    if get_origin(kind) is Annotated
]
NONSENSE = {  # what is of no such type; `True` is no number, and 1 is neither true nor text
    bool: [1, "true", None],
    int: [True, 1.0, "1", math.nan, math.inf, -math.inf],
    float: [True, "1", math.nan, math.inf, -math.inf],
    str: [1, True],
}


@cache
def assembled(cls: type) -> Any:
    """A section with the values of config.yaml."""
    sections = {type(section): section for section in vars(load_config([], "train")).values()}
    return (sections | {RopeScaling: RopeScaling("yarn"), Sampling: Sampling()})[cls]


def assert_refused(section: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got {re.escape(repr(value))}$"):
        replace(section, **{name: value})


@pytest.mark.parametrize(("cls", "name", "kind", "bound"), BOUNDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_bound_is_held(cls: type, name: str, kind: type, bound: Bound):
    section = assembled(cls)
    near = (lambda end, step: end + step) if kind is int else (lambda end, step: math.nextafter(end, step * math.inf))
    inside = [kind(bound.low) if not bound.open_low else near(bound.low, 1)]
    outside = [kind(bound.low) if bound.open_low else near(bound.low, -1)]
    if bound.high < math.inf:
        inside += [near(bound.high, -1) if bound.open_high else kind(bound.high)]
        outside += [kind(bound.high) if bound.open_high else near(bound.high, 1)]
    assert all(map(bound.allows, inside))
    for value in outside:
        assert_refused(section, name, value)


def test_every_type_is_held():
    """Also where code makes a section, without YAML or a command line."""
    sections = {cls: assembled(cls) for cls, _, _ in FIELDS}
    for cls, name, hint in FIELDS:
        kinds = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in alternatives(hint)]
        if any(get_origin(kind) not in (None, Literal) for kind in kinds):
            continue  # a list
        for value in NONSENSE.get(kinds[0], ["nonsense", 1]):
            if value not in map(str, kinds) and not (value is None and type(None) in kinds):
                assert_refused(sections[cls], name, value)
    assert_refused(sections[DataConfig], "val", ("a", 1))
    assert_refused(sections[DataConfig], "val", "a")


IMPOSSIBLE = {  # option: what the refusal names
    "--model.num_key_value_heads=3": "num_attention_heads num_key_value_heads 4 3",
    "--model.num_attention_heads=6 --model.num_key_value_heads=6": "hidden_size num_attention_heads 64 6",
    "--model.head_dim=15": "head_dim 15",
    "--model.rope_scaling.rope_type=yarn --model.rope_scaling.factor=0.5": "rope_scaling factor 0.5",
    "--model.rope_scaling.factor=2": "rope_scaling.rope_type",
    "--device=gpu": "device gpu auto",
    "--device=cuda:": "device cuda:",
    "--temperature=nan": "temperature nan",
    "--temperature=inf": "temperature inf",
    "--min_new_tokens=200": "min_new_tokens max_new_tokens 200 128",
    "--stop=": "stop",
    "--system=hello": "system chat instruct",
    "--thinking=false": "thinking chat instruct",
}


@pytest.mark.parametrize("options", IMPOSSIBLE)
def test_an_impossible_value_leaves_with_2_and_one_line(tmp_path, monkeypatch, capsys, options):
    path = tmp_path / "a.yaml"
    path.write_text("model:\n  " + TINY_MODEL)
    monkeypatch.setattr(sys, "argv", ["script.py", str(path), *options.split()])
    with pytest.raises(SystemExit) as left:
        run_script(lambda argv: load_config(argv, "infer") and 0)
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert [word for word in IMPOSSIBLE[options].split() if word not in err] == []


def test_check_refuses_what_this_machine_lacks(monkeypatch):
    import torch

    def of(device: str, dtype: str = "auto") -> Config:
        return load_config([f"--device={device}", f"--dtype={dtype}"], "infer")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    check(of("auto"))
    check(of("cpu", "bfloat16"))
    check(of("cpu", "float16"))  # slow, and its scaler can be tested there
    for cfg in (of("cuda"), of("cuda:0"), of("mps")):
        with pytest.raises(ConfigError, match=r"^run\."):
            check(cfg)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check(of("cuda:1", "float16"))
    check(of("auto", "float16"))
    with pytest.raises(ConfigError, match="cuda:2"):
        check(of("cuda:2"))
    with pytest.raises(ConfigError, match="world size"):
        check(of("cpu"), world_size=0)


# --- the command line ------------------------------------------------------------------------------------------

OVERRIDES = [
    (["--infer.top_k=40"], "infer.top_k", 40),
    (["--top_k=40"], "infer.top_k", 40),
    (["--top_k", "40"], "infer.top_k", 40),
    (["--seed=7"], "run.seed", 7),
    (["--device", "cpu"], "run.device", "cpu"),
    (["--dtype=float32"], "run.dtype", "float32"),
    (["--model.rms_norm_eps=1e-5"], "model.rms_norm_eps", 1e-5),
    (["--length_penalty", "-1"], "infer.length_penalty", -1.0),
    (["--length_penalty=-.5"], "infer.length_penalty", -0.5),
    (["--instruct"], "infer.instruct", True),
    (["--instruct", "--top_k=1"], "infer.instruct", True),
    (["--stream=false"], "infer.stream", False),
    (["--stream", "False"], "infer.stream", False),
    (["--early_stopping"], "infer.early_stopping", True),
    (["--early_stopping", "never"], "infer.early_stopping", "never"),
    (["--prompt", "a b"], "infer.prompt", ("a b",)),
    (["--prompt=a=b=c"], "infer.prompt", ("a=b=c",)),
    (["--prompt=--x"], "infer.prompt", ("--x",)),
    (["--prompt", "-x"], "infer.prompt", ("-x",)),
    (["--prompt", "3e-4"], "infer.prompt", ("3e-4",)),
    (["--prompt", "null"], "infer.prompt", ("null",)),
    (["--prompt="], "infer.prompt", ("",)),
    (["--prompt", "naïve 日本\n🎉"], "infer.prompt", ("naïve 日本\n🎉",)),
    (["--prompt", "x", "--prompt", "x"], "infer.prompt", ("x", "x")),
    (["--data.tokenizer=123"], "data.tokenizer", "123"),
    (["--data.tokenizer", "a.yaml"], "data.tokenizer", "a.yaml"),
    (["--ckpt=null"], "infer.ckpt", None),
    (["--ckpt=~/runs"], "infer.ckpt", "~/runs"),
    (["--model.rope_scaling=null"], "model.rope_scaling", None),
    (["--lora.targets", "[q_proj,v_proj]"], "lora.targets", ("q_proj", "v_proj")),
    (["--lora.targets=[q_proj]", "--lora.targets=v_proj"], "lora.targets", ("q_proj", "v_proj")),
    (["--routing.layers=[1, 3]"], "routing.layers", (1, 3)),
    (["--eval.tasks", '["a,b", c]'], "eval.tasks", ("a,b", "c")),
    (["--data.val=[]"], "data.val", ()),
    (["--data.val=[ab].txt"], "data.val", ("[ab].txt",)),
    (["--prompt", "[x]"], "infer.prompt", ("[x]",)),
    (["--stop=[a, b]"], "infer.stop", ("[a, b]",)),
]


@pytest.mark.parametrize(("argv", "key", "expected"), OVERRIDES)
def test_an_override_wins_over_the_file(tmp_path, argv, key, expected):
    cfg = load(tmp_path, "infer:\n  prompt: [old]\n  ckpt: old\n", *argv)
    section, name = key.split(".")
    value = getattr(getattr(cfg, section), name)
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--top_kk=4"], "--top_kk: unknown option; did you mean --top_k?"),
        (["--hidden_size=4"], "--hidden_size: unknown option; did you mean --model.hidden_size?"),
        (["--model.hiden_size=4"], "--model.hiden_size: unknown option; did you mean --model.hidden_size?"),
        (["--top-k=4"], "--top-k: unknown option; did you mean --top_k?"),
        (["--qqqq"], "--qqqq: unknown option"),
        (["--"], "--: unknown option"),
        (["--model.num_hidden_layers=abc"], "--model.num_hidden_layers: expected int in [1, 10000], got 'abc'"),
        (["--top_k", "4.5"], "--top_k: expected int >= 0, got '4.5'"),
        (["--top_k="], "--top_k: expected int >= 0, got ''"),
        (["--top_k= 4"], "--top_k: expected int >= 0, got ' 4'"),
        (["--stream=on"], "--stream: expected true|false, got 'on'"),
        (["--stream", "on"], "'on': expected --key=value or one FILE.yaml"),
        (["--overflow=wrap"], "--overflow: expected error|stop|slide, got 'wrap'"),
        (["--top_k"], "--top_k: expected int >= 0, got nothing (--top_k=VALUE takes any text)"),
        (["--prompt", "--x"], "--prompt: expected list of text, got nothing (--prompt=VALUE takes any text)"),
        (["--top_k=1", "--top_k=1"], "--top_k: option comes twice"),
        (["--top_k=1", "--infer.top_k=2"], "--infer.top_k: option comes twice"),
        (
            ["--model.rope_scaling=null", "--model.rope_scaling.factor=2"],
            "--model.rope_scaling.factor: option comes twice",
        ),
        (["--model=x"], "--model: expected mapping, got 'x'"),
        (["--routing.layers=[1, x]"], "--routing.layers:1: expected int, got 'x'"),
        (["--data.val=[a: ]"], "--data.val:1: expected text, got a mapping"),
        (["--model.rope_scaling=yarn"], "--model.rope_scaling: expected mapping or null, got 'yarn'"),
        (["hello"], "'hello': expected --key=value or one FILE.yaml"),
        (["b.yaml"], "'b.yaml': expected --key=value or one FILE.yaml"),
        (["-k", "4"], "'-k': expected --key=value or one FILE.yaml"),
        (["--data.tokenizer=\udcff"], "--data.tokenizer: expected text, got '\\udcff'"),
        (["--preset=tinny"], "--preset: unknown preset; did you mean tiny?"),
        (["--preset=tiny", "--preset=3B"], "--preset: option comes twice"),
        (["--preset"], "--preset: expected text, got nothing (--preset=VALUE takes any text)"),
    ],
)
def test_a_bad_option_is_refused(tmp_path, argv, said):
    assert refusal(tmp_path, "run: {}\n", *argv) == said


def test_a_mapping_can_be_opened_and_closed_from_the_command_line(tmp_path):
    options = ("--model.rope_scaling.rope_type=yarn", "--model.rope_scaling.factor=4")
    assert load(tmp_path, "run: {}\n", *options).model.rope_scaling.factor == 4.0
    text = "model:\n  rope_scaling: {rope_type: linear, factor: 2}\n"
    assert load(tmp_path, text, "--model.rope_scaling.factor=8").model.rope_scaling.rope_type == "linear"
    assert load(tmp_path, text, "--model.rope_scaling=null").model.rope_scaling is None


def test_a_bare_key_is_of_the_scripts_own_section_first(tmp_path):
    assert load(tmp_path, "run: {}\n", "--bias", section="model").model.bias is True
    cfg = load(tmp_path, "run: {}\n", "--rope_scaling.rope_type=linear", section="model")
    assert cfg.model.rope_scaling.rope_type == "linear"


def test_precedence_is_config_yaml_file_preset_command_line(tmp_path):
    text = "run: {seed: 1}\nmodel: {vocab_size: 7, dropout: 0.5, bias: true}\n"
    text += "presets: {mine: {model: {vocab_size: 8, dropout: 0.25}}, tiny: {model: {vocab_size: 9}}}\n"
    assert load(tmp_path, "run: {}\n") == load_config([], "infer")
    assert load(tmp_path, text).model.vocab_size == 7
    cfg = load(tmp_path, text, "--model.dropout=0", "--preset", "mine")
    assert (cfg.run.seed, cfg.model.bias, cfg.model.vocab_size, cfg.model.dropout) == (1, True, 8, 0.0)
    cfg = load(tmp_path, text, "--preset=10M")  # a shipped one, over a file of one's own
    assert (cfg.run.seed, cfg.model.vocab_size) == (1, 8192)
    cfg = load(tmp_path, text, "--preset=tiny")  # one's own takes the place of a shipped one
    assert (cfg.model.vocab_size, cfg.model.hidden_size) == (9, 128)


def test_an_edit_of_config_yaml_counts_for_a_file_of_ones_own(tmp_path, monkeypatch):
    edited = tmp_path / "config.yaml"
    edited.write_text(re.sub(r"hidden_size: 128", "hidden_size: 192", config.DEFAULT_FILE.read_text()))
    monkeypatch.setattr(config, "DEFAULT_FILE", edited)
    assert load(tmp_path, "model: {dropout: 0.5}\n").model.hidden_size == 192
    assert load(tmp_path, "model: {hidden_size: 256}\n").model.hidden_size == 256
    edited.write_text(re.sub(r"  hidden_size: .*\n", "", edited.read_text()))  # no second place has a value for it
    with pytest.raises(ConfigError, match=r"^model\.hidden_size: expected int .*, got nothing$"):
        load(tmp_path, "model: {dropout: 0.5}\n")


def test_finetune_takes_over_what_files_say_about_train(tmp_path):
    text = "train: {beta2: 0.9, eps: 1e-6, lr: 1, sample_tokens: 7}\nfinetune: {eps: 1e-7}\n"
    text += "presets: {mine: {train: {clip: 3}}}\n"
    options = ["--train.sample_tokens=9", "--train.floor=0.5", "--preset=mine", "--finetune.z_loss=1"]
    cfg = load(tmp_path, text, *options, section="finetune")
    assert (cfg.train.beta2, cfg.train.eps, cfg.train.sample_tokens, cfg.train.clip) == (0.9, 1e-6, 9, 3.0)
    assert (cfg.finetune.beta2, cfg.finetune.eps) == (0.9, 1e-7)  # its own word counts
    assert cfg.finetune.lr == "auto"  # config.yaml's word on finetune is not undone by a file's word on train
    assert (cfg.finetune.sample_tokens, cfg.finetune.floor, cfg.finetune.clip) == (7, 0.1, 1.0)
    assert (cfg.train.z_loss, cfg.finetune.z_loss) == (0.0, 1.0)
    assert load(tmp_path, dump(cfg), section="finetune") == cfg


# --- config.yaml, its presets and its comments -----------------------------------------------------------------

PRESETS = {  # hidden, inner, layers, heads, key/value heads, vocabulary, context
    "tiny": (64, 128, 4, 4, 2, 512, 256),
    "10M": (256, 768, 10, 4, 2, 8192, 1024),
    "30M": (384, 1152, 14, 6, 2, 16_384, 1024),
    "124M": (768, 2048, 12, 12, 12, 50_304, 1024),
    "350M": (1024, 2816, 24, 16, 16, 50_304, 1024),
    "0.5B": (896, 4864, 24, 14, 2, 151_936, 32_768),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, 32_768),
    "3B": (2048, 11_008, 36, 16, 2, 151_936, 32_768),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, 32_768),
}


def parameters(m: ModelConfig) -> int:
    """By hand, for the shapes of the presets: gated, biases on q, k and v."""
    kv = m.num_key_value_heads * m.head_size
    attention = 2 * m.hidden_size**2 + m.hidden_size + 2 * (m.hidden_size + 1) * kv
    block = attention + 3 * m.hidden_size * m.intermediate_size + 2 * m.hidden_size
    matrices = 1 if m.tie_word_embeddings else 2
    return matrices * m.vocab_size * m.hidden_size + m.num_hidden_layers * block + m.hidden_size


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_model_that_its_comment_counts(tmp_path, name):
    m = load_config(["--preset", name], "infer").model
    shape = (m.hidden_size, m.intermediate_size, m.num_hidden_layers, m.num_attention_heads, m.num_key_value_heads)
    assert (*shape, m.vocab_size, m.max_position_embeddings) == PRESETS[name]
    assert (m.tie_word_embeddings, m.rope_theta, m.rms_norm_eps) == (name != "7B", 1e6, 1e-6)
    counted = re.search(rf"--preset {re.escape(name)} +([0-9.]+) M parameters", help_text("infer", everything=True))[1]
    digits = len(counted.partition(".")[2])
    if name != "tiny":  # today's small shapes once were 98 % embedding
        in_blocks = 1 - parameters(replace(m, num_hidden_layers=1)) / parameters(m)
        in_blocks *= m.num_hidden_layers / (m.num_hidden_layers - 1)
        assert in_blocks > 0.65
        assert f"{100 * in_blocks:.0f} % of them in blocks" in " ".join(help_text("infer", everything=True).split())
    assert f"{parameters(m) / 1e6:.{digits}f}" == counted
    resolved = tmp_path / "resolved.yaml"  # its head_dim is a number, which another width must not inherit
    resolved.write_text(dump(load_config([], "infer")))
    assert load_config([str(resolved), "--preset", name], "infer").model == m


def test_every_preset_is_known_to_the_tests_and_possible():
    assert config.preset_names() == list(PRESETS)


DELIBERATE = {  # where an importer's default is another: config.yaml trains a small model and samples with some warmth
    config.ModelSection: "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "max_position_embeddings",
    config.FinetuneConfig: "steps seq_len batch_tokens lr weight_decay schedule eval_every log_every patience",
    SamplingOptions: "temperature top_p",
}


@pytest.mark.parametrize("cls", [*get_type_hints(Config).values(), SamplingOptions])
def test_a_default_of_a_class_is_that_of_config_yaml(cls: type):
    """Two sets of defaults once drifted apart: a file of one's own got other values than `--help` showed."""
    values = next(part for part in vars(load_config([], "train")).values() if isinstance(part, cls))
    if fields(cls)[0].default is MISSING:
        with pytest.raises(TypeError):
            cls()
        return
    other = {name for name, value in asdict(cls()).items() if value != getattr(values, name)}
    assert other == set(DELIBERATE.get(cls, "").split())


def keys_of(cls: type, prefix: str = "") -> list[str]:
    names = []
    for name, hint in get_type_hints(cls).items():
        names += keys_of(hint, f"{prefix}{name}.") if is_dataclass(hint) else [prefix + name]
    return names


def comments_of_config_yaml() -> list[tuple[str, str]]:
    """Each key of a section, with its comment."""
    found = re.findall(r"^(\w+):  # \S|^  (\w+): .*? # (\S.*)$", (ROOT / "config.yaml").read_text(), re.MULTILINE)
    comments, section = [], ""
    for top, key, comment in found:
        section = top or section
        comments += [(f"{section}.{key}", comment)] if key and section != "presets" else []
    return comments


def test_config_yaml_holds_every_key_once_with_a_comment():
    keys = [name for name, _ in comments_of_config_yaml()]
    taken_over = [f"finetune.{name}" for name in field_types(config.TrainConfig) if f"finetune.{name}" not in keys]
    assert sorted(keys + taken_over) == sorted(keys_of(Config))


@pytest.mark.parametrize("section", ["infer", "finetune"])
def test_help_lists_every_key_with_type_bound_default_and_comment(section: str):
    text = help_text(section, everything=True)
    lines, words = text.splitlines(), " ".join(text.split())
    assert max(map(len, lines)) <= 100
    comments = dict(comments_of_config_yaml())
    for key in keys_of(Config):
        name, comment = key.removeprefix(f"{section}."), comments.get(key) or comments[key.replace("finetune", "train")]
        assert re.search(rf" --{re.escape(name)} [^#]{{1,120}} = \S.*? {re.escape(comment)} ", words + " "), key
    assert ("--top_k" if section == "infer" else "--infer.top_k") + " int >= 0 = 0" in words
    assert "--model.rope_scaling.factor float in [1, 2**40]" in text
    assert "--preset 0.5B" in text
    assert help_text(section, "python infer.py PROMPT").startswith("usage: python infer.py PROMPT\n")


def test_help_of_a_script_is_its_own_section_and_run():
    lines = help_text("infer").splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split(":")[0] for line in lines if re.match(r"\w+: ", line)] == ["usage", "infer", "run"]
    assert lines[lines.index("infer: prompt, stream, chat, beams") + 1].startswith("  --ckpt text or null = null ")
    assert "--help all" in "".join(lines)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--top_k=1", "-h"], ["--nonsense", "--help"], ["--help", "all"]])
def test_help_goes_to_stdout_and_leaves_with_0(capsys, argv):
    with pytest.raises(SystemExit) as left:
        load_config(argv, "infer")
    assert not left.value.code
    assert capsys.readouterr().out == help_text("infer", everything="all" in argv) + "\n"


def test_help_needs_a_file_that_can_be_read(tmp_path, monkeypatch):
    (tmp_path / "bad.yaml").write_text("run: &a {seed: *a, [b]: 1}\n")
    for name in ("bad.yaml", "none.yaml"):
        monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / name)
        with pytest.raises(ConfigError, match=name):
            load_config(["--help"], "infer")


# --- round trip ------------------------------------------------------------------------------------------------

NASTY = ["", " ", "null", "~", "true", "3e-4", "010", "a: b", "# no", "-", "'", '"', "\\", "\n", " a\n b ", "\t", "\r"]
NASTY += ["\0", "\x1b[31m", "\x7f\x85\xa0", "\u2028\u2029\ufeff", "日本 🎉", "e\u0301", "\ufffe\uffff", "x " * 200]


def round_trip(folder: Path, cfg: Config) -> None:
    assert load(folder, dump(cfg)) == cfg
    assert read_values(folder / "a.yaml") == to_dict(cfg)
    assert dump(load(folder, dump(cfg))) == dump(cfg)


def test_a_dumped_config_is_an_equal_config(tmp_path):
    round_trip(tmp_path, load_config([], "infer"))
    options = ["--model.rope_scaling.rope_type=yarn", "--model.rope_scaling.factor=4", "--early_stopping", "never"]
    round_trip(tmp_path, load_config([*options, "--stop=a", "--stop=b", "--temperature=1e-30", "--preset=3B"], "infer"))
    rng = random.Random(0)
    codes = [*range(0xD800), *range(0xE000, 0x110000)]
    texts = NASTY + ["".join(map(chr, rng.choices(codes, k=rng.randrange(1, 9)))) for _ in range(200)]
    argv = [f"--prompt={text}" for text in texts] + [f"--ckpt={texts[1]}"]
    cfg = load_config(argv, "infer")
    assert cfg.infer.prompt == tuple(texts)
    round_trip(tmp_path, cfg)


def test_the_dump_is_complete_and_plain_yaml():
    cfg = load_config(["--ckpt=3e-4", "--prompt=true"], "infer")
    lines = dump(cfg).splitlines()
    assert list(flatten(to_dict(cfg))) == [
        name for name in keys_of(Config) if not name.startswith("model.rope_scaling.")
    ]
    assert len(lines) == len(flatten(to_dict(cfg))) + len(fields(Config))
    for line in ("  temperature: 0.8", "  wandb: off", "  ckpt: '3e-4'", "  prompt: ['true']", "  seed: 1337"):
        assert line in lines


@pytest.mark.parametrize("text", ["[a]\n", "a: [\n", "a: !!int 1\n", "{[a]: 1}\n", f"a: {'9' * 5000}\n"])
def test_read_values_refuses_what_is_no_mapping(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        read_values(tmp_path / "a.yaml")


# --- scripts ---------------------------------------------------------------------------------------------------


class Busy(Exception):
    exit_code = 5


OUTCOMES = {  # what main raises or returns, the exit code, what stands on stderr
    "nothing": (None, 0, ""),
    "a number": (3, 3, ""),
    "refusal": (ConfigError("a\nb\x1b"), 2, "error: a b\\x1b\n"),
    "an error with a code": (Busy("the folder\nis taken"), 5, "error: the folder is taken\n"),
    "memory": (MemoryError(), 8, "error: MemoryError\n"),
    "memory of a device": (RuntimeError("MPS backend out of memory"), 8, "error: MPS backend out of memory\n"),
    "Ctrl-C": (KeyboardInterrupt(), 130, ""),
    "leaving": (SystemExit(4), 4, ""),
}


@pytest.mark.parametrize(("outcome", "code", "said"), OUTCOMES.values(), ids=OUTCOMES)
def test_run_script_gives_exit_codes(capsys, outcome, code, said):
    def main(argv: list[str]) -> int | None:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as left:
        run_script(main)
    assert (left.value.code, capsys.readouterr().err) == (code, said)


def test_nobody_else_may_write_what_a_script_writes(tmp_path: Path):
    """With umask 000 metrics and shards once were files that all could change."""
    old = os.umask(0)
    try:
        with pytest.raises(SystemExit):
            run_script(lambda argv: (tmp_path / "file").write_text("") and None)
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_run_script_lets_errors_of_the_program_through():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda argv: 1 // 0)


SCRIPT = """\
import sys
sys.path.insert(0, {root!r})
from nanoqwen import config
from nanoqwen.errors import run_script

def main(argv):
    print(config.dump(config.load_config(argv, "infer")), flush=True)
    while "--chat" in argv:
        print("on and on")

run_script(main)
"""


def test_a_real_script_end_to_end(tmp_path):
    """One line and no traceback for a mistake; quiet when its reader leaves."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    command = [sys.executable, str(script)]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    mistaken, chatting = [*command, "--top_k=-1"], [*command, "--chat"]
    with subprocess.Popen(mistaken, **piped) as wrong, subprocess.Popen(chatting, **piped) as endless:
        assert wrong.communicate(timeout=60) == ("", "error: infer: top_k: expected int >= 0, got -1\n")
        assert endless.stdout.readline() == "run:\n"
        endless.stdout.close()
        assert endless.stderr.read() == ""
    assert (wrong.returncode, endless.returncode) == (2, 141)


def test_a_folder_that_no_file_system_can_have_is_refused():
    with pytest.raises(ConfigError, match=r"run\.dir: .* NUL"):
        check(load_config(["--run.device=cpu", "--run.dir=a\0b"], "train"))


def test_a_disk_that_fails_is_no_defect_of_the_program():
    for number in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.EROFS):
        assert exit_code_of(OSError(number, os.strerror(number), "metrics.jsonl")) == 6
