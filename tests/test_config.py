"""config.yaml and the command line: what is meant arrives with its type, everything else is refused in one line."""

import random
import re
import subprocess
import sys
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from model import ModelConfig
from nanoqwen import config
from nanoqwen.config import Config, check, dump, help_text, load_config
from nanoqwen.errors import ConfigError, run_script

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
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            load_config([], "infer", path)
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
        extra = "  num_attention_heads: 14\n" if section == "model" else ""
        value = getattr(getattr(load(tmp_path, text + extra), section), name)
        assert (value, type(value)) == (expected, type(expected))


def test_a_refusal_says_what_was_expected_and_how_to_write_it(tmp_path):
    said = refusal(tmp_path, "model:\n  num_hidden_layers: abc\n")
    assert said == "a.yaml:2: model.num_hidden_layers: expected int, got 'abc'"
    said = refusal(tmp_path, "model:\n  num_hidden_layers: '6'\n")
    assert said == "a.yaml:2: model.num_hidden_layers: expected int without quotes, got '6'"
    said = refusal(tmp_path, "data:\n  tokenizer: 5\n")
    assert said == "a.yaml:2: data.tokenizer: expected text in quotes, got '5'"


def test_anchors_are_plain_repetition(tmp_path):
    assert load(tmp_path, "model:\n  hidden_size: &h 448\n  intermediate_size: *h\n").model.intermediate_size == 448


# --- impossible values -----------------------------------------------------------------------------------------

IMPOSSIBLE = {  # option: what the refusal names
    "--model.num_key_value_heads=3": "num_attention_heads num_key_value_heads 4 3",
    "--model.num_key_value_heads=0": "num_key_value_heads 0",
    "--model.num_attention_heads=6 --model.num_key_value_heads=6": "hidden_size num_attention_heads 64 6",
    "--model.head_dim=15": "head_dim 15",
    "--model.head_dim=-2": "head_dim -2",
    "--model.num_hidden_layers=0": "num_hidden_layers 0",
    "--model.hidden_size=-64": "hidden_size -64",
    "--model.intermediate_size=0": "intermediate_size 0",
    "--model.vocab_size=0": "vocab_size 0",
    "--model.max_position_embeddings=0": "max_position_embeddings 0",
    "--model.dropout=1.0": "dropout 1.0",
    "--model.dropout=-0.1": "dropout -0.1",
    "--model.rope_theta=0": "rope_theta 0",
    "--model.rms_norm_eps=0": "rms_norm_eps 0",
    "--model.rope_scaling.rope_type=yarn --model.rope_scaling.factor=0.5": "rope_scaling factor 0.5",
    "--model.rope_scaling.factor=2": "rope_scaling.rope_type",
    "--seed=-1": "seed -1",
    "--seed=9223372036854775808": "seed 9223372036854775808",
    "--device=gpu": "device gpu auto",
    "--device=cuda:": "device cuda:",
    "--top_p=0": "top_p 0",
    "--top_p=-1": "top_p -1",
    "--min_p=1.5": "min_p 1.5",
    "--top_k=-1": "top_k -1",
    "--temperature=-1": "temperature -1",
    "--temperature=nan": "temperature nan",
    "--temperature=inf": "temperature inf",
    "--repetition_penalty=0": "repetition_penalty 0",
    "--no_repeat_ngram_size=-1": "no_repeat_ngram_size -1",
    "--num_beams=0": "num_beams 0",
    "--num_samples=0": "num_samples 0",
    "--max_new_tokens=-1": "max_new_tokens -1",
    "--min_new_tokens=200": "min_new_tokens max_new_tokens 200 128",
    "--stop=": "stop",
    "--system=hello": "system chat instruct",
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
    for cfg in (of("cuda"), of("cuda:0"), of("mps"), of("cpu", "float16"), of("auto", "float16")):
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
        (["--model.num_hidden_layers=abc"], "--model.num_hidden_layers: expected int, got 'abc'"),
        (["--top_k", "4.5"], "--top_k: expected int, got '4.5'"),
        (["--top_k="], "--top_k: expected int, got ''"),
        (["--top_k= 4"], "--top_k: expected int, got ' 4'"),
        (["--stream=on"], "--stream: expected true|false, got 'on'"),
        (["--stream", "on"], "'on': expected --key=value or one FILE.yaml"),
        (["--overflow=wrap"], "--overflow: expected error|stop|slide, got 'wrap'"),
        (["--top_k"], "--top_k: expected int, got nothing (--top_k=VALUE takes any text)"),
        (["--prompt", "--x"], "--prompt: expected list of text, got nothing (--prompt=VALUE takes any text)"),
        (["--top_k=1", "--top_k=1"], "--top_k: option comes twice"),
        (["--top_k=1", "--infer.top_k=2"], "--infer.top_k: option comes twice"),
        (
            ["--model.rope_scaling=null", "--model.rope_scaling.factor=2"],
            "--model.rope_scaling.factor: option comes twice",
        ),
        (["--model=x"], "--model: expected mapping, got 'x'"),
        (["--model.rope_scaling=yarn"], "--model.rope_scaling: expected mapping|null, got 'yarn'"),
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


def test_precedence_is_defaults_file_preset_command_line(tmp_path):
    text = "run: {seed: 1}\nmodel: {vocab_size: 7, dropout: 0.5, bias: true}\n"
    text += "presets: {mine: {model: {vocab_size: 8, dropout: 0.25}}}\n"
    assert load(tmp_path, "run: {}\n").model == ModelConfig()
    assert load(tmp_path, text).model.vocab_size == 7
    cfg = load(tmp_path, text, "--model.dropout=0", "--preset", "mine")
    assert (cfg.run.seed, cfg.model.bias, cfg.model.vocab_size, cfg.model.dropout) == (1, True, 8, 0.0)
    assert load(tmp_path, text, "--preset=tiny").model.vocab_size == 512  # a shipped one, over a file of one's own


# --- config.yaml, its presets and its comments -----------------------------------------------------------------

PRESETS = {  # hidden, inner, layers, heads, key/value heads, vocabulary, context
    "tiny": (64, 128, 4, 4, 2, 512, 256),
    "10M": (64, 256, 4, 4, 2, 151_936, 2048),
    "50M": (256, 1024, 12, 4, 2, 151_936, 2048),
    "125M": (512, 2048, 12, 8, 2, 151_936, 2048),
    "0.5B": (896, 4864, 24, 14, 2, 151_936, 32_768),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, 32_768),
    "3B": (2048, 11_008, 36, 16, 2, 151_936, 32_768),
}


def parameters(m: ModelConfig) -> int:
    """By hand, for the shapes of the presets: tied, gated, biases on q, k and v."""
    kv = m.num_key_value_heads * m.head_size
    attention = 2 * m.hidden_size**2 + m.hidden_size + 2 * (m.hidden_size + 1) * kv
    block = attention + 3 * m.hidden_size * m.intermediate_size + 2 * m.hidden_size
    return m.vocab_size * m.hidden_size + m.num_hidden_layers * block + m.hidden_size


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_model_that_its_comment_counts(tmp_path, name):
    m = load_config(["--preset", name], "infer").model
    shape = (m.hidden_size, m.intermediate_size, m.num_hidden_layers, m.num_attention_heads, m.num_key_value_heads)
    assert (*shape, m.vocab_size, m.max_position_embeddings) == PRESETS[name]
    assert (m.tie_word_embeddings, m.rope_theta, m.rms_norm_eps) == (True, 1e6, 1e-6)
    counted = re.search(rf"--preset {re.escape(name)} +([0-9.]+) M parameters", help_text("infer"))[1]
    digits = len(counted.partition(".")[2])
    assert f"{parameters(m) / 1e6:.{digits}f}" == counted
    resolved = tmp_path / "resolved.yaml"  # its head_dim is a number, which another width must not inherit
    resolved.write_text(dump(load_config([], "infer")))
    assert load_config([str(resolved), "--preset", name], "infer").model == m


def test_every_preset_is_known_to_the_tests_and_possible():
    assert list(config._read_file(config.DEFAULT_FILE)["presets"]) == list(PRESETS)


@pytest.mark.parametrize("section", ["run", "data", "chat", "train", "finetune", "lora", "log", "infer"])
def test_a_key_that_a_file_leaves_out_has_the_value_of_config_yaml(section: str):
    """Two sets of defaults once drifted apart: a file of one's own got other values than `--help` showed."""
    loaded = getattr(load_config(["--run.dir=auto"] if section != "run" else ["--run.dir=x"], "train"), section)
    neutral = replace(type(loaded)(), dir="x") if section == "run" else type(loaded)()
    assert loaded == neutral


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
    assert [name for name, _ in comments_of_config_yaml()] == keys_of(Config)


def test_help_lists_every_key_with_type_default_and_comment():
    text = help_text("infer")
    lines = text.splitlines()
    comments = dict(comments_of_config_yaml())
    for key in keys_of(Config):
        shown = key.removeprefix("infer.")
        row = next(line for line in lines if line.startswith(f"  --{shown} "))
        assert row.endswith(comments[key])
        assert " = " in row
    assert lines.index("infer: prompt, stream, chat, beams") < lines.index("run: what all scripts share")
    assert next(line for line in lines if "--top_k " in line).split()[:4] == ["--top_k", "int", "=", "0"]
    assert "--model.rope_scaling.factor float" in text
    assert help_text("infer", "python infer.py PROMPT").startswith("usage: python infer.py PROMPT\n")


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--top_k=1", "-h"], ["--nonsense", "--help"]])
def test_help_goes_to_stdout_and_leaves_with_0(capsys, argv):
    with pytest.raises(SystemExit) as left:
        load_config(argv, "infer")
    assert not left.value.code
    assert capsys.readouterr().out == help_text("infer") + "\n"


def test_help_needs_a_file_that_can_be_read(tmp_path):
    (tmp_path / "part.yaml").write_text("run: {seed: 1}\n")
    assert "--model.bias true|false\n" in help_text("infer", path=tmp_path / "part.yaml")
    (tmp_path / "bad.yaml").write_text("run: &a {seed: *a, [b]: 1}\n")
    for name in ("bad.yaml", "none.yaml"):
        with pytest.raises(ConfigError, match=name):
            load_config(["--help"], "infer", tmp_path / name)


# --- round trip ------------------------------------------------------------------------------------------------

NASTY = ["", " ", "null", "~", "true", "3e-4", "010", "a: b", "# no", "-", "'", '"', "\\", "\n", " a\n b ", "\t", "\r"]
NASTY += ["\0", "\x1b[31m", "\x7f\x85\xa0", "\u2028\u2029\ufeff", "日本 🎉", "e\u0301", "\ufffe\uffff", "x " * 200]


def round_trip(folder: Path, cfg: Config) -> None:
    assert load(folder, dump(cfg)) == cfg
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
    cfg = load_config([], "infer")
    tree = yaml.safe_load(dump(cfg))
    assert [f"{section}.{key}" for section in tree for key in tree[section]] == keys_of(Config)
    assert tree["infer"]["temperature"] == 0.8


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
        assert wrong.communicate(timeout=60) == ("", "error: infer: top_k: expected >= 0, got -1\n")
        assert endless.stdout.readline() == "run:\n"
        endless.stdout.close()
        assert endless.stderr.read() == ""
    assert (wrong.returncode, endless.returncode) == (2, 141)
