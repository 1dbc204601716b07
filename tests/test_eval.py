"""Held-out text: that it is the run's own figure, that of transformers and that by hand, and what a person meets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from corpora import write_as
from torch.nn import functional

import eval as suite
import finetune
import train
from data import Batch, eval_windows, token_bytes
from model import IGNORE
from nanoqwen.config import load_config
from nanoqwen.distributed import World
from nanoqwen.errors import ConfigError
from nanoqwen.evaluate import evaluate, measure, ratio, run_of, token_losses
from nanoqwen.lora import LoraConfig, apply_lora
from nanoqwen.routing import RoutingConfig, build_model
from nanoqwen.tokenizer import load_tokenizer
from nanoqwen.weights import export, load_model, resolve, write_adapter

ALONE = World(0, 0, 1, torch.device("cpu"))
BYTES = load_tokenizer("bytes")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoqwen.log.SECONDS", 0.0)  # for the measurement of this CPU's peak


def trained(corpus: Path, run: Path, *more: str) -> Path:
    assert train.main(runs.options(corpus, run, "--train.steps=8", "--train.eval_every=4", *more)) == 0
    return run


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(corpus, tmp_path_factory.mktemp("runs") / "dense")


def in_float32(options: tuple[str, ...]) -> list[str]:
    """Computed in fp32, unless asked otherwise: `auto` is bf16 on a CPU that has instructions for it."""
    return [] if any("dtype" in word for word in options) else ["--run.dtype=float32"]


def evaluated(source: Path, corpus: Path, output: Path, *more: str) -> dict[str, Any]:
    """What eval.py writes about a source."""
    cache = f"--data.cache_dir={corpus.with_name('cache')}"
    suite.main([f"--ckpt={source}", f"--output={output}", "--run.device=cpu", *in_float32(more), cache, *more])
    return json.loads(output.read_text(), parse_constant=lambda text: pytest.fail(f"no JSON: {text}"))


def validated(run: Path) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in runs.lines(run / "metrics.jsonl") if "val/loss" in row}


def values(result: dict[str, Any], name: str = "loss") -> dict[str, float]:
    return {key: result[name][key]["value"] for key in ("loss", "perplexity", "bits_per_byte")}


# --- the figure of the run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("--data.streaming=true", "--run.dtype=bfloat16"), marks=pytest.mark.slow),
        pytest.param(("--data.isolate_documents=true", "--train.eval_tokens=100000"), marks=pytest.mark.slow),
    ],
)
def test_it_is_what_the_run_said_of_each_of_its_checkpoints(
    corpus: Path, tmp_path: Path, run: Path, more: tuple[str, ...]
):
    run = trained(corpus, tmp_path / "run", *more) if more else run
    dtype = [word for word in more if "dtype" in word] or in_float32(more)
    checkpoints = {step: row for step, row in validated(run).items() if step}  # there is none of step 0
    for step, row in checkpoints.items():
        result = evaluated(runs.at(run, step), corpus, tmp_path / "out.json", *dtype, "--batch_tokens=100")
        for name, value in values(result).items():
            assert value == pytest.approx(row[f"val/{name}"], rel=1e-6)
        assert result["model"] == str(runs.at(run, step))
    best = min(validated(run).values(), key=lambda row: row["val/loss"])
    suite.main([f"--ckpt={run}", "--run.device=cpu", f"--data.cache_dir={corpus.with_name('cache')}", *dtype])
    result = json.loads((run / "heldout.json").read_text())  # beside the run, when nothing else is asked for
    assert result["loss"]["loss"]["value"] == pytest.approx(best["val/loss"], rel=1e-6)
    assert result["model"] == str(resolve(run))


@pytest.mark.parametrize("kind", ["mod", pytest.param("tdtf", marks=pytest.mark.slow)])
def test_a_routed_model_is_measured_as_it_is_stored_and_beside_it_looking_ahead(
    corpus: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture
):
    shape = ("--model.num_hidden_layers=4", "--routing.calibrate_tokens=512", "--routing.capacity=0.5")
    run = trained(corpus, tmp_path / "run", f"--routing.kind={kind}", *shape)
    step, row = max(validated(run).items())
    digest = runs.at(run, step).joinpath("model.safetensors").read_bytes()
    result = evaluated(runs.at(run, step), corpus, tmp_path / "out.json")
    assert [name for name in result if name.startswith("loss")] == ["loss_causal", "loss_topk"]
    assert result["loss_causal"]["loss"]["value"] == pytest.approx(row["val/loss_causal"], rel=1e-6)
    assert result["loss_topk"]["loss"]["value"] == pytest.approx(row["val/loss_topk"], rel=1e-6)
    assert result["loss_causal"]["used"] == pytest.approx(row["val/used"], rel=1e-6)
    shown = capsys.readouterr().out
    assert "| ± standard error over rows | loss_causal | loss_topk |" in shown
    assert f"| tokens that routed layers compute, % | {100 * result['loss_causal']['used']:.1f} |" in shown
    # Thresholds that do not suit the text stay, unless new ones are asked for; these are not kept.
    other = tmp_path / "other.txt"
    other.write_text("".join(chr(97 + n * n % 26) for n in range(4000)))
    stored = evaluated(run, corpus, tmp_path / "out.json", f"--eval.data={other}")
    again = evaluated(run, corpus, tmp_path / "out.json", f"--eval.data={other}", "--calibrate")
    assert (stored["calibrated"], again["calibrated"]) == (False, True)
    assert abs(stored["loss_causal"]["used"] - 0.5) > abs(again["loss_causal"]["used"] - 0.5)
    assert again["loss_causal"]["used"] == pytest.approx(0.5, abs=0.06)
    assert again["loss_topk"] == stored["loss_topk"]
    assert runs.at(run, step).joinpath("model.safetensors").read_bytes() == digest


def test_a_fine_tuned_model_is_measured_on_the_answers_that_its_run_was_validated_on(
    corpus: Path, tmp_path: Path, run: Path
):
    rows = [{"prompt": f"what of {n}?", "response": f"nothing {n}"} for n in range(30)]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed = {"--base_ckpt": run, "--chat.train": chats, "--run.dir": tmp_path / "sft", "--run.device": "cpu"}
    listed |= {"--run.dtype": "float32"}
    listed |= {"--steps": 4, "--eval_every": 2, "--seq_len": 64, "--batch_tokens": 128, "--warmup_steps": 0}
    listed |= {"--lora.rank": 2, "--sample_tokens": 0, "--chat.val_fraction": 0.3}
    assert finetune.main([f"{key}={value}" for key, value in listed.items()]) == 0
    best = min(validated(tmp_path / "sft").values(), key=lambda row: row["val/loss"])
    result = evaluated(tmp_path / "sft", corpus, tmp_path / "out.json")
    for name, value in values(result).items():
        assert value == pytest.approx(best[f"val/{name}"], rel=1e-6)
    assert result["data"] == f"validation data of {tmp_path / 'sft'}"
    # and on any text, as every other model
    text = next(corpus.glob("*.txt"))
    assert evaluated(tmp_path / "sft", corpus, tmp_path / "out.json", f"--eval.data={text}")["data"] == str(text)


@pytest.mark.slow
def test_a_model_that_withstands_is_measured_on_the_triplets_that_its_run_was_validated_on(
    corpus: Path, tmp_path: Path
):
    export(tiny.model(vocab_size=BYTES.n_vocab, max_position_embeddings=1024), BYTES, tmp_path / "base")
    listed = {"--base_ckpt": tmp_path / "base", "--run.dir": tmp_path / "run", "--run.device": "cpu"}
    listed |= {"--run.dtype": "float32"}
    listed |= {"--objective": "contrast", "--contrast.limit": 60, "--contrast.eval_rows": 2, "--seq_len": 256}
    listed |= {
        "--contrast.answer_tokens": 2,
        "--steps": 2,
        "--eval_every": 1,
        "--warmup_steps": 0,
        "--sample_tokens": 0,
    }
    assert finetune.main([f"{key}={value}" for key, value in listed.items()]) == 0
    step, row = max(validated(tmp_path / "run").items())
    result = evaluated(runs.at(tmp_path / "run", step), corpus, tmp_path / "out.json")
    for name, value in values(result).items():
        assert value == pytest.approx(row[f"val/{name}"], rel=1e-6)


def test_text_that_has_changed_since_the_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "corpus"
    folder.mkdir()
    runs.write_corpus(folder)
    run = trained(folder, tmp_path / "run", "--train.steps=4")
    evaluated(run, folder, tmp_path / "out.json")
    assert "warning" not in capsys.readouterr().out
    (folder / "0.txt").write_text("Another text. " * 50)
    evaluated(run, folder, tmp_path / "out.json")
    assert "warning    the text of the run has changed since\n" in capsys.readouterr().out


# --- the figure of transformers, and that by hand ---------------------------------------------------------------------


def test_it_is_the_loss_of_transformers_on_the_same_rows(corpus: Path, run: Path, tmp_path: Path):
    import transformers

    result = evaluated(run, corpus, tmp_path / "out.json")
    cfg = load_config(runs.options(corpus, run), "train")
    prepared = train.corpus.prepare(cfg.data, cfg.model.vocab_size, progress=False)
    windows = eval_windows(prepared.val, 32, 1024)
    reference = transformers.AutoModelForCausalLM.from_pretrained(resolve(run), dtype=torch.float32).eval()
    nats, sizes, counts = [], [], []
    for window in windows:
        with torch.no_grad():
            logits = reference(window.tokens, use_cache=False).logits
        for row, targets in zip(logits, window.targets, strict=True):
            mask = targets != IGNORE
            nats.append(functional.cross_entropy(row[mask].double(), targets[mask], reduction="sum").item())
            counts.append(int(mask.sum()))
            sizes.append(sum(int(target) < 256 for target in targets[mask]))  # a byte each, but for <|endoftext|>
    nats, sizes, counts = map(np.array, (nats, sizes, counts))
    loss, bits = nats.sum() / counts.sum(), nats.sum() / math.log(2) / sizes.sum()
    assert values(result) == pytest.approx(
        {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits}, rel=1e-6
    )
    assert (result["loss"]["tokens"], result["loss"]["bytes"]) == (counts.sum(), sizes.sum())
    assert result["loss"]["rows"] == len(nats) == 32
    spread = {name: result["loss"][name]["standard_error"] for name in ("loss", "perplexity", "bits_per_byte")}
    off = nats - loss * counts
    error = math.sqrt(len(off) / (len(off) - 1) * (off**2).sum()) / counts.sum()
    assert spread["loss"] == pytest.approx(error, rel=1e-6)
    assert spread["perplexity"] == pytest.approx(error * math.exp(loss), rel=1e-6)
    off = nats / math.log(2) - bits * sizes
    error = math.sqrt(len(off) / (len(off) - 1) * (off**2).sum()) / sizes.sum()
    assert spread["bits_per_byte"] == pytest.approx(error, rel=1e-6)


def test_a_text_is_read_in_the_same_rows_from_every_model(corpus: Path, run: Path, folder: Path, tmp_path: Path):
    """A run of short rows once seemed a tenth worse on another text than the base that it began with."""
    text = tmp_path / "a.md"
    text.write_text("Some words of a text. " * 40)
    of_run, of_folder = (evaluated(model, corpus, tmp_path / "o", f"--eval.data={text}") for model in (run, folder))
    assert of_run["seq_len"] == of_folder["seq_len"] == 64
    assert evaluated(run, corpus, tmp_path / "o")["seq_len"] == 32  # its own text, as it was trained


def test_the_standard_error_is_that_of_a_mean_and_near_that_of_resampling():
    rng = np.random.default_rng(0)
    over = torch.tensor(rng.normal(3, 1, 400))
    same = ratio(over, torch.ones(400, dtype=torch.float64))
    assert same.error == pytest.approx(float(over.std()) / math.sqrt(400), rel=1e-9)
    under = torch.tensor(rng.integers(5, 30, 400).astype(float))
    over = over * under
    drawn = rng.integers(0, 400, (4000, 400))
    resampled = (over.numpy()[drawn].sum(1) / under.numpy()[drawn].sum(1)).std()
    assert ratio(over, under).error == pytest.approx(resampled, rel=0.05)
    assert ratio(over[:1], under[:1]).error is None
    assert str(ratio(torch.tensor([6.0]), torch.tensor([2.0]))) == "3.0000"


def windows_of(count: int = 6, share: float = 0.7) -> list[Batch]:
    """Rows in which some tokens are no targets, of several documents."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(97, (count, 25), generator=rng)
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=rng) > share] = IGNORE
    documents = (torch.arange(24) // 9).expand(count, -1)
    return [Batch(*(part[first : first + 4] for part in (ids[:, :-1], targets, documents))) for first in (0, 4)]


@pytest.mark.parametrize("kind", ["dense", "mod", "dtf", "tdtf"])
@pytest.mark.parametrize("logits", [97, 2**25])  # at a time: one token's, or all
def test_measuring_by_rows_is_evaluating_as_the_loop_does(kind: str, logits: int, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    routing = RoutingConfig(kind=kind, **({} if kind == "dense" else {"capacity": 0.5}))
    model = build_model(tiny.config(num_hidden_layers=4), routing).eval()
    sizes = torch.arange(97) % 5
    with torch.no_grad():
        expected = evaluate(model, windows_of(), sizes, ALONE, torch.no_grad())
    monkeypatch.setattr("model.LOGITS_PER_CHUNK", logits)
    result = measure(model, windows_of(), sizes, ALONE.device, torch.no_grad())
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert getattr(result, name).value == pytest.approx(expected[name], rel=1e-6)
    assert result.used == (None if kind == "dense" else pytest.approx(expected["router/mean/selected_fraction"]))


def test_losses_of_tokens_and_whether_they_are_the_likeliest():
    model, (window, _) = tiny.model(), windows_of()
    result = token_losses(model, window.tokens, window.targets)
    with torch.no_grad():
        log_p = model(window.tokens).logits.log_softmax(-1)
    mask = window.targets != IGNORE
    expected = -log_p.gather(-1, window.targets.clamp(min=0)[..., None])[..., 0][mask]
    assert torch.allclose(result.nats, expected, atol=1e-5)
    assert torch.equal(result.greedy, log_p.argmax(-1)[mask] == window.targets[mask])
    best = torch.where(mask, log_p.argmax(-1), IGNORE)
    assert token_losses(model, window.tokens, best).greedy.all()


# --- any source, any text ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder that no run has written."""
    path = tmp_path_factory.mktemp("models") / "bare"
    export(tiny.model(vocab_size=BYTES.n_vocab), BYTES, path)
    return path


def test_any_kind_of_file_gives_the_same_figures(folder: Path, corpus: Path, tmp_path: Path):
    texts = [f"Document {n}: {'wörd ' * (n % 5)}end.\n" for n in range(12)]
    notes = tmp_path / "notes"
    notes.mkdir()
    for number, text in enumerate(texts):
        (notes / f"{number:02}.md").write_text(text, encoding="utf-8")
    sources = [f"{notes}/*.md", str(notes)]
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet"):
        write_as(tmp_path / name, texts)
        sources.append(str(tmp_path / name))
    results = [evaluated(folder, corpus, tmp_path / "out.json", f"--eval.data={source}") for source in sources]
    sizes = sum(len(text.encode()) for text in texts)
    for source, each in zip(sources, results, strict=True):
        assert each["data"] == source
        assert each["loss"] == results[0]["loss"]
        assert each["loss"]["tokens"] == sizes + len(texts) - 1  # and their ends; the first byte follows nothing
        assert each["loss"]["bytes"] == sizes - 1
        assert each["seq_len"] == 64  # the context
    two = evaluated(folder, corpus, tmp_path / "out.json", *(f"--eval.data={source}" for source in sources[2:4]))
    assert two["loss"]["bytes"] > results[0]["loss"]["bytes"]
    few = evaluated(folder, corpus, tmp_path / "out.json", f"--eval.data={sources[0]}", "--seq_len=16", "--limit=3")
    assert (few["seq_len"], few["loss"]["rows"], few["loss"]["tokens"]) == (16, 3, 48)


def test_a_folder_that_no_run_has_written_is_measured_on_what_is_held_out_of_data(
    folder: Path, corpus: Path, tmp_path: Path
):
    more = (f"--data.train={corpus}", "--data.val_fraction=0.2")
    result = evaluated(folder, corpus, tmp_path / "out.json", *more, "--seq_len=32", "--limit=32")
    cfg = load_config(runs.options(corpus, tmp_path / "run"), "train")
    prepared = train.corpus.prepare(cfg.data, cfg.model.vocab_size, progress=False)
    windows = eval_windows(prepared.val, 32, 1024)
    model, _ = load_model(folder)
    expected = evaluate(model, windows, token_bytes(BYTES), ALONE, torch.no_grad())
    assert values(result) == pytest.approx(expected, rel=1e-6)
    assert result["data"] == f"held out of {corpus}"


def test_weights_that_are_stored_in_bf16_are_computed_in_fp32_where_the_run_would(corpus: Path, tmp_path: Path):
    half = tmp_path / "half"
    export(tiny.model(vocab_size=BYTES.n_vocab), BYTES, half, torch.bfloat16)
    text = f"--eval.data={next(corpus.glob('*.txt'))}"
    result = evaluated(half, corpus, tmp_path / "out.json", text, "--run.dtype=float32")
    export(load_model(half, dtype=torch.float32)[0], BYTES, tmp_path / "whole")
    assert values(result) == values(
        evaluated(tmp_path / "whole", corpus, tmp_path / "out.json", text, "--run.dtype=float32")
    )
    assert result["dtype"] == "float32"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_an_adapter_is_measured_beside_its_base(folder: Path, corpus: Path, tmp_path: Path, stored: torch.dtype):
    """As while it was trained, in fp32: merged into a base in bf16, most of what it adds would be rounded away."""
    export(load_model(folder)[0], BYTES, tmp_path / "base", stored)
    folder = tmp_path / "base"
    model, _ = load_model(folder, dtype=torch.float32)
    cfg = LoraConfig(rank=2)
    apply_lora(model, cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    (tmp_path / "adapter").mkdir()
    write_adapter(model, cfg, folder, BYTES, tmp_path / "adapter")
    text = f"--eval.data={next(corpus.glob('*.txt'))}"
    result = evaluated(tmp_path / "adapter", corpus, tmp_path / "out.json", text)
    merged = tmp_path / "merged"
    export(load_model(tmp_path / "adapter", dtype=torch.float32)[0], BYTES, merged)
    other = values(evaluated(merged, corpus, tmp_path / "out.json", text))
    for name in ("loss", "bits_per_byte"):  # a perplexity's relative difference is the loss' absolute one
        assert values(result)[name] == pytest.approx(other[name], rel=1e-6)
    assert values(result)["perplexity"] == pytest.approx(math.exp(values(result)["loss"]), rel=1e-12)
    assert values(result) != pytest.approx(values(evaluated(folder, corpus, tmp_path / "out.json", text)), rel=1e-3)


# --- what a person meets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--ckpt"], r"^eval\.ckpt: expected a run, a checkpoint or a Hugging Face folder, got nothing$", 2),
        (["--ckpt=nowhere"], r"^nowhere: no such folder", 4),
        (["--ckpt=."], r"^\.: expected a folder with a config\.json", 4),
        (["--eval.data=nowhere.txt"], r"^eval\.data: nowhere\.txt: no such file or folder", 3),
        (["--eval.data=picture.png"], r"^eval\.data: picture\.png: expected a file of kind", 3),
        (["--eval.data=empty.txt"], r"^eval\.data: empty\.txt: .*1 empty", 3),
        (["--eval.data=bad.jsonl"], r"^bad\.jsonl:1: expected a JSON object", 3),
        (["--suite=perplexity"], r"^--suite: expected heldout\|injection or null, got 'perplexity'$", 2),
        (["--seq_len=65"], r"^eval\.seq_len: expected at most the model's context of 64, got 65$", 2),
        (["--limit=-1"], r"^eval: limit: expected int >= 0 or null, got -1$", 2),
        (["--output=nowhere/out.json"], r"^eval\.output: expected a file in a folder that exists, got nowhere/out", 2),
        (["--output=."], r"^eval\.output: expected a file in a folder that exists, got \.$", 2),
        (["--calibrate", "--eval.data=a.txt"], r"^eval\.calibrate: expected a model with routed layers, ", 2),
        (["--ckpt=mute"], r"^eval\.ckpt: expected a model with a tokenizer, mute has none$", 2),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str, code: int
):
    monkeypatch.chdir(tmp_path)
    export(tiny.model(), None, tmp_path / "mute")
    for name, text in (("a.txt", "text"), ("empty.txt", " \n"), ("picture.png", ""), ("bad.jsonl", "[1]\n")):
        (tmp_path / name).write_text(text)
    ckpt = [] if any("--ckpt" in word for word in arguments) else [f"--ckpt={folder}"]
    with pytest.raises(Exception, match=message) as error:
        suite.main([*ckpt, *(word for word in arguments if word != "--ckpt"), "--run.device=cpu"])
    assert error.value.exit_code == code
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.json"))


def test_a_checkpoint_is_named_from_wherever_one_stands(
    run: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = []
    for folder, name in ((run / "checkpoints", resolve(run).name), (run, f"checkpoints/{resolve(run).name}")):
        monkeypatch.chdir(folder)
        names.append(evaluated(Path(name), corpus, tmp_path / "out.json")["data"])
        assert run_of(Path(name)).resolve() == run.resolve()
    assert names == [f"validation text of {run}", "validation text of ."]
    assert run_of(tmp_path) is None


def test_a_run_of_an_older_version_has_the_defaults_of_younger_keys(run: Path, corpus: Path, tmp_path: Path):
    expected = evaluated(run, corpus, tmp_path / "out.json")
    checkpoint = tmp_path / "older" / "checkpoints" / "step-00000008"
    checkpoint.mkdir(parents=True)
    for file in resolve(run).iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    state = json.loads((checkpoint / "state.json").read_text())
    del state["config"]["data"]["on_error"], state["config"]["train"]["patience"], state["config"]["contrast"]
    state["config"]["train"]["forgotten"] = 1
    (checkpoint / "state.json").write_text(json.dumps(state))
    runs.seal(checkpoint)
    assert evaluated(checkpoint, corpus, tmp_path / "out.json")["loss"] == expected["loss"]
    state["config"]["train"]["seq_len"] = "many"
    (checkpoint / "state.json").write_text(json.dumps(state))
    runs.seal(checkpoint)
    with pytest.raises(Exception, match=r"^state\.json: config: train: ") as error:
        evaluated(checkpoint, corpus, tmp_path / "out.json")
    assert error.value.exit_code == 4


def test_one_process_asks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^eval\.py: expected one process, got 2 of torchrun$"):
        suite.main(["--ckpt=x"])
