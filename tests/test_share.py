"""Sharing: folders that transformers loads, cards that tell the truth and leak nothing, uploads to a stand-in hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hub
import huggingface_hub
import pytest
import runs
import tiny
import torch
import transformers
import yaml
from safetensors.torch import save_file

import checkpoint
import finetune
import train
from model import generate
from nanoqwen import weights
from nanoqwen.chat import render_chat
from nanoqwen.errors import ConfigError, DataError, exit_code_of
from nanoqwen.routing import RoutingConfig, build_model
from nanoqwen.share import card as card_module
from nanoqwen.tokenizer import load_tokenizer
from nanoqwen.weights import CheckpointError, export, load_model, resolve

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

pytestmark = [  # of other people's code: the hub's client hands a file to httpx as it once was done
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft, transformers
]
HERE = {"PYTHONPATH": os.pathsep.join([str(runs.ROOT), *sys.path])}
TOKEN = "hf_" + "s3cr3t" * 6
CHATS = [
    [{"role": "user", "content": "Write a function."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Why?\n\nSay it."}],
    [{"role": role, "content": f"{role} says: 3 < 4 & 'π'"} for role in ("user", "assistant", "user")],
    [
        {"role": "user", "content": "öü 日本 🙂"},
        {"role": "assistant", "content": "x = 1\n"},
        {"role": "user", "content": "?"},
    ],
]


def main_as(script: str, main: Callable[[list[str]], int], words: list[str]) -> None:
    """Run a script as if it had been called so, with a secret among the words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"/home/jane/nanoqwen/{script}", *words, f"--hub_token={TOKEN}"])
        main(words)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of train.py, whose command and paths hold secrets."""
    root = tmp_path_factory.mktemp("jane")
    (root / "corpus").mkdir()
    listed = runs.options(
        runs.write_corpus(root / "corpus"),
        root / "runs" / "base",
        *("--data.tokenizer=auto", "--model.vocab_size=300", "--train.eval_every=6", "--train.sample_tokens=0"),
    )
    main_as("train.py", train.main, listed)
    return root / "runs" / "base"


@pytest.fixture(scope="module")
def chat_run(pretrained: Path) -> Path:
    """Adapters on that run, trained on conversations."""
    rows = pretrained.parents[1] / "chat.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "response": f"it is {n}"}) + "\n" for n in range(20)))
    run = pretrained.with_name("chat")
    steps = (
        "--steps=4 --seq_len=64 --batch_tokens=128 --micro_batch=2 --eval_every=2 --sample_tokens=0 --warmup_steps=1"
    )
    where = [f"--base_ckpt={pretrained}", f"--run.dir={run}", f"--chat.train={rows}", "--chat.val_fraction=0.3"]
    main_as("finetune.py", finetune.main, [*where, *steps.split(), "--lora.rank=2", "--run.device=cpu"])
    return run


@pytest.fixture(scope="module")
def folders(pretrained: Path, chat_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the command makes of them."""
    root = tmp_path_factory.mktemp("exported")
    adapter = [str(chat_run), str(root / "adapter"), "--base", "jane/base"]
    for name, words in {
        "base": [str(pretrained), str(root / "base")],
        "sharded": [str(pretrained), str(root / "sharded"), "--shard_size", "20KB"],
        "bf16": [str(pretrained), str(root / "bf16"), "--dtype", "bfloat16"],
        "chat": [str(chat_run), str(root / "chat"), "--merge"],
        "adapter": adapter,
        "local-adapter": [str(chat_run), str(root / "local-adapter")],
    }.items():
        assert checkpoint.main(["export", *words]) == 0, name
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def the_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Hub]:
    with hub.running() as stand_in:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stand_in.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.utils.disable_progress_bars()
        yield stand_in
        huggingface_hub.close_session()


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


# --- exported folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "sharded", "bf16", "chat"])
def test_transformers_writes_the_same_greedy_text(name: str, folders: dict[str, Path]):
    ours, tokenizer = load_model(folders[name], dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    reader = transformers.AutoTokenizer.from_pretrained(folders[name])
    inputs = reader("line 3 of", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=20)  # with what generation_config.json says, and nothing else
    (expected,) = generate(ours, inputs.input_ids.tolist(), temperature=0.0, max_new_tokens=20, eos=tokenizer.stop_ids)
    assert ids[0].tolist()[: len(expected)] == expected
    assert tokenizer.encode("line 3 of") == inputs.input_ids[0].tolist()
    stored = json.loads((folders[name] / "config.json").read_text())["torch_dtype"]
    assert stored == ("bfloat16" if name == "bf16" else "float32")
    assert len(list(folders[name].glob("model*.safetensors"))) == (6 if name == "sharded" else 1)


def test_generation_stops_at_the_end_of_a_turn_and_draws_nothing(folders: dict[str, Path]):
    tokenizer = load_tokenizer(folders["chat"])
    config = transformers.GenerationConfig.from_pretrained(folders["chat"])
    assert config.eos_token_id == sorted(tokenizer.stop_ids)
    assert tokenizer.special["<|im_end|>"] in config.eos_token_id
    assert not config.do_sample
    assert set(json.loads((folders["chat"] / "generation_config.json").read_text())) == {
        *("eos_token_id", "bos_token_id", "pad_token_id")
    }


@pytest.mark.parametrize("messages", CHATS, ids=len)
def test_the_chat_template_renders_the_ids_that_were_trained(messages: list[dict], folders: dict[str, Path]):
    reader = transformers.AutoTokenizer.from_pretrained(folders["chat"])
    tokenizer = load_tokenizer(folders["chat"])
    for generating in (False, True):
        rendered = reader.apply_chat_template(messages, add_generation_prompt=generating, return_dict=False)
        assert rendered == render_chat(messages, tokenizer, generate=generating)[0]


@pytest.mark.parametrize("name", ["base", "chat", "adapter", "routed", "bytes", "no-tokenizer"])
def test_the_snippet_of_a_card_runs(name: str, folders, pretrained: Path, tmp_path: Path, monkeypatch, capsys):
    folder = folders.get(name, tmp_path / "model")
    if name == "adapter":  # the hub is not asked in a test: the base lies where its id would be
        monkeypatch.chdir(tmp_path)
        shutil.copytree(folder, tmp_path / "adapter")
        folder = tmp_path / "adapter"
        shutil.copytree(folders["base"], folder / "jane" / "base")
    elif name not in folders:
        shape = tiny.config(vocab_size=300)
        kind = "mod" if name == "routed" else "dense"
        model = build_model(shape, RoutingConfig(kind=kind))
        tokenizer = None if name == "no-tokenizer" else load_tokenizer("bytes")
        export(model, tokenizer, tmp_path / "plain")
        checkpoint.main(["export", str(tmp_path / "plain"), str(folder)])
    snippet = re.search(r"```python\n(.*?)```", text_of(folder), re.DOTALL)[1]
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(snippet, {})
    assert capsys.readouterr().out.strip()


# --- cards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "sharded", "bf16", "chat", "adapter", "local-adapter"])
def test_the_front_matter_is_what_the_hub_reads(name: str, folders: dict[str, Path]):
    data = huggingface_hub.ModelCard.load(folders[name] / "README.md").data
    apart = "adapter" in name
    assert data.library_name == ("peft" if apart else "transformers")
    assert data.pipeline_tag == "text-generation"
    assert data.model_name == name
    assert data.license is None
    assert data.base_model == ("jane/base" if name == "adapter" else None)
    assert {"nanoqwen", "qwen2"} <= set(data.tags)
    assert ("conversational" in data.tags) == (apart or name == "chat")
    assert ("lora" in data.tags) == apart


def test_losses_are_those_of_the_run(folders: dict[str, Path], pretrained: Path, chat_run: Path):
    for name, run in (("base", pretrained), ("chat", chat_run)):
        rows = runs.lines(run / "metrics.jsonl")
        step = int(resolve(run).name[5:])
        evaluations = {row["step"]: row for row in rows if "val/loss" in row}
        best = min(evaluations.values(), key=lambda row: row["val/loss"])["step"]
        text = text_of(folders[name])
        for label, at in (("these weights", step), ("lowest val/loss", best), ("last of the run", max(evaluations))):
            (line,) = [line for line in text.splitlines() if line.startswith("| ") and label in line]
            row = evaluations[at]
            assert re.fullmatch(rf"\| {at} \| .* \| {row['val/loss']:.4f} \| {row['val/bits_per_byte']:.4f} \|", line)
        targets = sum(row["targets"] for row in rows if "targets" in row and row["step"] <= step)
        assert f"trained on {int(targets):,} tokens in {step} steps" in text


def test_lineage_names_code_weights_base_and_hashes(folders: dict[str, Path], pretrained: Path, chat_run: Path):
    source = json.loads((chat_run / "source.json").read_text())
    adapter = resolve(chat_run)
    text = text_of(folders["chat"])
    assert f"run `chat`, step {int(adapter.name[5:])}" in text
    assert hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest() in text
    assert f"base: `base/{resolve(pretrained).name}`" in text
    assert weights.hash_weights(pretrained) in text
    if source["commit"]:
        assert source["commit"] in text
    assert f"torch {source['versions']['torch']}" in text
    assert load_tokenizer(folders["chat"]).hash[:16] in text


def test_a_card_has_the_metrics_of_evaluation_reports(pretrained: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    fraction = {"count": 1, "of": 4, "value": 0.25, "interval": [0, 1]}
    scores = {"fine-tuned": {"all rows": {"attack_success": fraction}, "new family": {"attack_success": fraction}}}
    (run / "injection.json").write_text(json.dumps({"model": "/home/jane/x/step-8", "scores": scores, "answers": [1]}))
    (run / "harness.json").write_text(json.dumps({"results": {"arc": {"acc,none": 0.5}}, "config": {"limit": 3}}))
    heldout = {"seed": 7777, "versions": {"torch": "2"}, "model": {"loss": {"value": 1.25, "standard_error": 0.5}}}
    (run / "heldout.json").write_text(json.dumps(heldout | {"model": "x", "as used": heldout["model"]}))
    (run / "damaged.json").write_text("{")
    (run / "metrics.jsonl").write_text("{\n[]\n" + (run / "metrics.jsonl").read_text())
    checkpoint.main(["export", str(run), str(tmp_path / "out")])
    text = text_of(tmp_path / "out")
    assert "From `injection.json` of `step-8`" in text
    assert "| `fine-tuned, all rows, attack_success` | 0.25 |" in text
    assert "new family" not in text
    assert "| `arc, acc,none` | 0.5 |" in text
    assert "limit" not in text
    assert "| `as used, loss` | 1.25 |" in text
    assert "7777" not in text


@pytest.mark.parametrize("name", ["base", "chat", "adapter", "local-adapter"])
def test_no_secret_and_no_folder_of_the_user_is_in_a_card(name: str, folders: dict[str, Path], pretrained: Path):
    text = text_of(folders[name])
    assert TOKEN not in text
    assert "--hub_token=***" in text
    assert str(pretrained.parents[1]) not in text
    assert "/home/" not in text
    assert not re.search(r"(?<![\w.…/:])/\w", text.replace("</", ""))
    assert "…/corpus" in text or name != "base"
    assert f"\npython {'train' if name == 'base' else 'finetune'}.py " in text


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("/home/jane/data/a.txt", "…/a.txt"),
        ("--data.train=/home/jane doe/x/a b.txt", "--data.train=…/a b.txt"),
        ("['/mnt/x/a.txt', \"/y/b.txt\"]", "['…/a.txt', \"…/b.txt\"]"),
        ("/data/a.jsonl=0.3", "…/a.jsonl=0.3"),
        ("/home/jane", "…/~"),
        ("~/runs/x", "…/x"),
        ("C:\\Users\\jane\\a.txt", "…/a.txt"),
        ("file:///home/jane/a.txt", "…/a.txt"),
        ("builtin:python", "builtin:python"),
        ("runs/base", "runs/base"),
        ("owner/name", "owner/name"),
        ("https://host/x/y?token=abc#z", "https://host/x/y"),
        ("https://me:word@host/x", "https://***@host/x"),
        (f"a {TOKEN} b", "a *** b"),
        ("3 / 4", "3 / 4"),
    ],
)
def test_secrets_and_folders_are_redacted(text: str, redacted: str, monkeypatch: pytest.MonkeyPatch):
    for home in ("/", "/srv/people/joe", None):  # whoever exports need not be who trained
        monkeypatch.setenv("HOME", home) if home else monkeypatch.delenv("HOME")
        assert card_module.redact(text) == redacted


NASTY = [
    "# x", "| a | b |", "`code` ``", "```\n# out", "<script>alert(1)</script>", "<!-- ", "[a](http://b)", "![a](b)",
    "---\nlicense: mit\n---", "a: b", "- x", "*&!%@`", "\x1b[31m", "'\"\\", "\u202e", "{{ x }}", "  ", "`",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY, ids=repr)
def test_text_of_a_run_stays_inert(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """CommonMark: within a code span nothing acts but a run of backticks of the fence's length."""
    span = card_module.code_span(text)
    fence = re.match("`+", span)[0]
    inner = span.removeprefix(fence).removesuffix(fence)
    assert span == fence + inner + fence
    assert not re.search(rf"(?<!`){fence}(?!`)", inner)
    assert inner.strip("` ") or not text.strip("` ")
    assert not set("\n|\x1b\u202e") & set(span)
    model, run, cards = tiny.model(vocab_size=300), tmp_path / "checkpoints" / "step-00000001", []
    export(model, None, run)
    for value in (text, "harmless"):
        origin = card_module.Origin(
            {"step": 1, "config": {"data": {"train": [value]}}}, {"command": [value] * 2}, [], {}
        )
        monkeypatch.setattr(card_module, "origin_of", lambda _, origin=origin: origin)
        cards.append(card_module.model_card(value, run, model, None))
    front = yaml.safe_load(cards[0].split("\n---\n")[0].removeprefix("---\n"))
    assert front["model_name"].strip() == card_module.one_line(card_module.redact(text)).strip()
    assert front.keys() == {"library_name", "pipeline_tag", "model_name", "tags"}
    assert huggingface_hub.ModelCard(cards[0]).data.license is None
    outside = [re.sub(r"(`+)(sh|python)\n.*?\n\1\n", "", card, flags=re.DOTALL).splitlines() for card in cards]
    assert len(outside[0]) == len(outside[1])
    assert [line for line in outside[0][8:] if line.startswith("#")][1:] == ["## Use", "## Training", "## Lineage"]


def test_a_card_for_weights_from_elsewhere_and_for_routed_ones(tmp_path: Path):
    export(tiny.model(vocab_size=300), load_tokenizer("bytes"), tmp_path / "plain")
    checkpoint.main(["export", str(tmp_path / "plain"), str(tmp_path / "again")])
    text = text_of(tmp_path / "again")
    assert "Not recorded" in text
    assert "PreTrainedTokenizerFast.from_pretrained reads it" in text
    gpt = build_model(tiny.config(vocab_size=300), RoutingConfig(kind="mod"))
    export(gpt, None, tmp_path / "routed")
    checkpoint.main(["export", str(tmp_path / "routed"), str(tmp_path / "routed2")])
    text = text_of(tmp_path / "routed2")
    assert "No class of transformers does that" in text
    assert huggingface_hub.ModelCard(text).data.library_name == "nanoqwen"
    assert "mod" in huggingface_hub.ModelCard(text).data.tags


def test_a_base_on_the_hub_is_named_and_a_deleted_run_is_not_taken_for_one(pretrained: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    file = resolve(run) / "state.json"
    for base, base_model in (("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"), ("runs/gone", None), ("/x/gone", None)):
        state = json.loads(file.read_text())
        state["config"]["finetune"]["base_ckpt"] = base
        file.write_text(json.dumps(state))
        runs.seal(file.parent)
        checkpoint.main(["export", str(run), str(tmp_path / f"out{len(base)}")])
        card = huggingface_hub.ModelCard(text_of(tmp_path / f"out{len(base)}"))
        assert card.data.base_model == base_model
        assert "base: `" in card.text


def test_nothing_is_half_exported(pretrained: Path, chat_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device")

    for what in ("save_file", "load_tokenizer"):
        if what == "load_tokenizer":
            monkeypatch.undo()
            monkeypatch.setattr(card_module, "_lineage", fails)
        else:
            monkeypatch.setattr(weights, what, fails)
        for source in (pretrained, chat_run):
            with pytest.raises(Exception, match="No space left") as error:
                checkpoint.main(["export", str(source), str(tmp_path / "out")])
            assert exit_code_of(error.value) == 6
            assert not list(tmp_path.iterdir())


def test_options_that_do_not_fit_are_one_line(pretrained: Path, chat_run: Path, tmp_path: Path, capsys):
    out = str(tmp_path / "out")
    for source, more, message in (
        (pretrained, ["--base", "a/b"], "--base: expected an adapter"),
        (pretrained, ["--merge"], "--merge: expected an adapter"),
        (chat_run, ["--base", "no id"], "OWNER/NAME"),
        (chat_run, ["--base", str(tmp_path)], "OWNER/NAME"),
    ):
        with pytest.raises(ConfigError, match=message):
            checkpoint.main(["export", str(source), out, *more])
    for size in ("5 apples", "0GB", "-1"):
        with pytest.raises(SystemExit) as left:
            checkpoint.main(["export", str(pretrained), out, f"--shard_size={size}"])
        assert left.value.code == 2
    assert not list(tmp_path.iterdir())
    assert [checkpoint._bytes(text) for text in ("5GB", "20KB", "1.5mb", "7")] == [5 * 10**9, 20_000, 1_500_000, 7]


KILLED = """
import os, signal, sys
import checkpoint, gguf, nanoqwen.weights as weights
def killed(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
weights.Path.write_text = gguf.GGUFWriter.write_tensors_to_file = killed  # config.json and the card come last
checkpoint.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_kill_leaves_nothing_under_the_name_asked_for(folders: dict[str, Path], tmp_path: Path):
    outs = {"export": tmp_path / "out", "gguf": tmp_path / "out.gguf"}
    started = [
        runs.launch(tmp_path / "log", [sys.executable, "-c", KILLED, command, str(folders["base"]), str(out)], HERE)
        for command, out in outs.items()
    ]
    assert [process.wait() for process in started] == [-signal.SIGKILL] * 2
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]) == 2
    assert not any(out.exists() for out in outs.values())
    checkpoint.main(["export", str(folders["base"]), str(outs["export"])])  # nothing is in the way
    load_model(outs["export"])


# --- uploads ----------------------------------------------------------------------------------------------------------


def test_the_right_bytes_arrive_where_they_were_sent(the_hub: hub.Hub, folders: dict[str, Path], capsys):
    folder = folders["sharded"]
    checkpoint.main(["push", str(folder), "jane/model", "--private", "--message", "First."])
    remote = the_hub.trees["jane/model", "main"]
    assert {name: content for name, content in remote.items() if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert the_hub.private == {"jane/model": True}
    assert [commit["summary"] for commit in the_hub.commits] == ["First."]
    assert the_hub.tokens == {f"Bearer {TOKEN}"}
    assert f"{the_hub.url}/jane/model/commit/" in capsys.readouterr().out

    before = the_hub.uploaded
    checkpoint.main(["push", str(folder), "jane/model"])
    assert the_hub.uploaded == before  # nothing has changed, so not a byte goes again
    assert len(the_hub.commits) == 1

    checkpoint.main(["push", str(folders["base"]), "jane/model", "--revision", "one/file"])
    branch = the_hub.trees["jane/model", "one%2Ffile"]
    assert branch["model.safetensors"] == (folders["base"] / "model.safetensors").read_bytes()
    assert not [name for name in branch if name.startswith("model-") or name.endswith("index.json")]  # no stale ones
    assert remote.keys() >= {"model.safetensors.index.json"}  # main is as it was


def test_the_token_is_in_no_file_and_no_message(
    the_hub: hub.Hub, folders: dict[str, Path], tmp_path: Path, capfd, caplog
):
    folder = tmp_path / "model"
    shutil.copytree(folders["base"], folder)
    checkpoint.main(["push", str(folder), "jane/model"])
    for status in (401, 500):
        the_hub.fails = {"/api/repos/create": status}
        with pytest.raises((ConfigError, CheckpointError)) as error:
            checkpoint.main(["push", str(folder), "jane/other"])
        assert TOKEN not in str(error.value)
    printed = capfd.readouterr()
    assert TOKEN not in printed.out + printed.err + caplog.text
    assert not [path for path in folder.rglob("*") if TOKEN.encode() in path.read_bytes()]
    assert not [content for tree in the_hub.trees.values() for content in tree.values() if TOKEN.encode() in content]


@pytest.mark.parametrize(
    ("where", "status", "code", "message"),
    [
        ("/api/repos/create", 401, 2, "the token is not accepted"),
        ("/api/repos/create", 403, 2, "forbidden"),
        ("/api/repos/create", 404, 2, "no such owner"),
        ("/preupload/", 403, 2, "forbidden"),
        ("/commit/", 409, 2, "a conflict"),
        ("/api/repos/create", 500, 4, "not shared"),
        ("/commit/", 500, 4, "not shared"),
        ("/store/", 403, 2, "forbidden"),
    ],
)
def test_refusals_are_one_line(
    where: str, status: int, code: int, message: str, the_hub: hub.Hub, folders: dict[str, Path]
):
    the_hub.fails = {where: status}
    with pytest.raises(Exception, match=message) as error:
        checkpoint.main(["push", str(folders["base"]), "jane/model"])
    assert exit_code_of(error.value) == code
    assert "\n" not in str(error.value)
    assert "jane/model" in str(error.value)
    assert not the_hub.commits


def test_without_a_network_or_a_token_nothing_happens(the_hub: hub.Hub, folders: dict[str, Path], monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(CheckpointError, match="not shared") as error:
        checkpoint.main(["push", str(folders["base"]), "jane/model"])
    assert "\n" not in str(error.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        checkpoint.main(["push", str(folders["base"]), "jane/model"])
    assert not the_hub.calls


def test_a_private_upload_does_not_go_to_a_public_repository(the_hub: hub.Hub, folders: dict[str, Path]):
    checkpoint.main(["push", str(folders["base"]), "jane/model"])
    before = the_hub.uploaded
    with pytest.raises(ConfigError, match="exists already, and is public"):
        checkpoint.main(["push", str(folders["chat"]), "jane/model", "--private"])
    assert the_hub.uploaded == before


def test_a_dry_run_lists_the_files_and_makes_no_request(
    the_hub: hub.Hub, folders: dict[str, Path], tmp_path: Path, capsys
):
    folder = tmp_path / "model"
    shutil.copytree(folders["base"], folder)
    (folder / "notes.txt").write_text("mine")
    (folder / ".hidden").mkdir()
    save_file({"x": torch.zeros(2)}, folder / "head.safetensors")
    checkpoint.main(["push", str(folder), "jane/model", "--dry_run", "--private", "--revision", "v1"])
    printed = capsys.readouterr().out
    assert "jane/model at v1, private" in printed
    for file in folders["base"].iterdir():
        assert re.search(rf"{file.stat().st_size:,}  {re.escape(file.name)}\n", printed)
    assert f"{sum(file.stat().st_size for file in folders['base'].iterdir()):,}  bytes in 6 files" in printed
    for name in ("notes.txt", ".hidden", "head.safetensors"):
        assert f"left out: {name}" in printed
    assert not the_hub.calls
    checkpoint.main(["push", str(folder), "jane/model"])
    assert not {"notes.txt", "head.safetensors"} & the_hub.trees["jane/model", "main"].keys()


def test_an_adapter_is_shared_with_the_id_of_its_base_or_not_at_all(the_hub: hub.Hub, folders: dict[str, Path]):
    with pytest.raises(CheckpointError, match="--base OWNER/NAME"):
        checkpoint.main(["push", str(folders["local-adapter"]), "jane/adapter"])
    assert not the_hub.calls
    checkpoint.main(["push", str(folders["adapter"]), "jane/adapter"])
    remote = the_hub.trees["jane/adapter", "main"]
    assert json.loads(remote["adapter_config.json"])["base_model_name_or_path"] == "jane/base"
    assert json.loads(remote["base.json"]).keys() == {"sha256", "tokenizer_hash"}


SPOIL = {
    "a run": lambda folder, run: shutil.copytree(run / "checkpoints", folder / "checkpoints"),
    "trainer": lambda folder, run: (folder / "optimizer.safetensors").write_bytes(b""),
    "state": lambda folder, run: (folder / "state.json").write_text("{}"),
    "pickle": lambda folder, run: (folder / "pytorch_model.bin").write_bytes(b"x"),
    "half": lambda folder, run: (folder / ".tmp-1").write_text(""),
    "no config": lambda folder, run: (folder / "config.json").unlink(),
    "no weights": lambda folder, run: (folder / "model.safetensors").unlink(),
    "cut": lambda folder, run: (folder / "model.safetensors").write_bytes(b"x"),
    "gone": lambda folder, run: shutil.rmtree(folder),
    "secret": lambda folder, run: (folder / "README.md").write_text(f"token: {TOKEN}"),
}


@pytest.mark.parametrize("what", SPOIL)
def test_only_a_complete_exported_folder_is_shared(
    what: str, the_hub: hub.Hub, folders: dict[str, Path], pretrained: Path, tmp_path: Path
):
    folder = tmp_path / "model"
    shutil.copytree(folders["base"], folder)
    SPOIL[what](folder, pretrained)
    for more in ([], ["--dry_run"]):
        with pytest.raises((CheckpointError, DataError)) as error:
            checkpoint.main(["push", str(folder), "jane/model", *more])
        assert "\n" not in str(error.value)
        assert TOKEN not in str(error.value)
        if what in ("a run", "trainer", "state", "pickle", "half"):
            assert "checkpoint.py export" in str(error.value)
    assert not the_hub.calls


@pytest.mark.parametrize("name", ["model", "a/b/c", "a b/c", "../x", "a/..", "a--b/c", "/x", "jané/x", ""])
def test_a_name_that_the_hub_cannot_have_is_refused(name: str, the_hub: hub.Hub, folders: dict[str, Path]):
    for more in ([], ["--dry_run"]):
        with pytest.raises(ConfigError, match="OWNER/NAME"):
            checkpoint.main(["push", str(folders["base"]), name, *more])
    assert not the_hub.calls
