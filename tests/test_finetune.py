"""Fine-tuning: the right tokens, the right rate, and checkpoints that go on and that other tools load."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import runs
import tiny
import torch

import finetune
from model import generate
from nanoqwen.chat import prepare_chat, render_chat
from nanoqwen.config import ChatConfig
from nanoqwen.errors import ConfigError
from nanoqwen.runfolder import verify
from nanoqwen.weights import export, load_model, resolve

COLOURS = ["red", "blue", "green", "black", "white", "pink", "grey"]


def pair(number: int) -> dict[str, str]:
    word = COLOURS[number % len(COLOURS)]
    return {"prompt": f"{number} times {word}?", "response": f"{word} {number * 7 % 10}{number % 3} {word[::-1]}"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair(number)) + "\n" for number in range(37)))
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 256}
    return tiny.base_over_bytes(folder, seed=0, **shape)


def options(base: Path, pairs: Path, run: Path, *more: str) -> list[str]:
    """20 steps, saved every 4; `more` overrides."""
    listed = {"--base_ckpt": base, "--chat.train": pairs, "--chat.val": pairs.with_name("val.jsonl"), "--run.dir": run}
    rows = [json.dumps({"prompt": f"what of {n}?", "response": f"nothing {n}"}) + "\n" for n in range(8)]
    pairs.with_name("val.jsonl").write_text("".join(rows))
    listed |= {
        "--run.device": "cpu",
        "--run.dtype": "float32",
        "--run.save_every": 4,
        "--steps": 20,
        "--warmup_steps": 6,
        "--seq_len": 128,
    }
    listed |= {"--batch_tokens": 512, "--micro_batch": 2, "--eval_every": 3, "--log_every": 1, "--lr": 3e-3}
    listed |= {"--plateau_patience": 1, "--plateau_threshold": 0.5, "--patience": 0, "--sample_tokens": 4}
    listed |= dict(word.split("=", 1) for word in more)
    return [f"{key}={value}" for key, value in listed.items()]


def killed(step: int, run: Path, tmp_path: Path, arguments: list[str]) -> None:
    started = runs.launch(tmp_path / "out", [sys.executable, str(runs.ROOT / "finetune.py"), *arguments])
    started.until(lambda: runs.reached(run) >= step)
    started.signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL


def rates(run: Path) -> list[float]:
    return [row["lr"] for _, row in sorted(runs.metrics(run).items())]


WITH_ADAPTERS = ("--lora.rank=4", "--lora.dropout=0.1", "--lora.modules_to_save=norm")


@pytest.mark.parametrize("more", [pytest.param((), marks=pytest.mark.slow), WITH_ADAPTERS])
def test_s01_s04_rate_and_weights_are_the_same_after_kill_9(
    base: Path, pairs: Path, tmp_path: Path, more: tuple[str, ...]
):
    """Two schedulers once drove one rate: a warm-up that multiplied what the plateau rule had lowered, and on a resume
    the base rate was read back from an optimizer whose rate had already fallen."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    finetune.main(options(base, pairs, straight, *more))
    trace = rates(straight)
    assert trace[:6] == pytest.approx([3e-3 * (step + 1) / 6 for step in range(6)])
    losses = {row["step"]: row["val/loss"] for row in runs.lines(straight / "metrics.jsonl") if "val/loss" in row}
    assert trace == expected_rates(losses)
    assert len(set(trace[6:])) > 1  # the rule has been tried
    killed(5, stopped, tmp_path, options(base, pairs, stopped, *more))  # in the warm-up
    killed(13, stopped, tmp_path, options(base, pairs, stopped, *more))  # between the two bad evaluations of the rule
    finetune.main(options(base, pairs, stopped, *more))
    assert rates(stopped) == trace
    assert verify(stopped) == verify(straight)


def expected_rates(losses: dict[int, float]) -> list[float]:
    """The rule in full, from the losses alone: warm-up, then x 0.5 after two evaluations that do not halve the loss."""
    found, scale, best, bad = [], 1.0, float("inf"), 0
    for step in range(20):
        found.append(3e-3 * (step + 1) / 6 if step < 6 else 3e-3 * scale)
        done = step + 1
        if done in losses and done > 6:
            bad = 0 if losses[done] < best * 0.5 else bad + 1
            best = losses[done] if not bad else best
            if bad > 1:
                scale, bad = max(scale * 0.5, 0.1), 0
    return found


def test_it_ends_when_the_validation_loss_stops_falling_and_the_best_is_kept(base: Path, pairs: Path, tmp_path: Path):
    run = tmp_path / "run"
    more = ("--lr=0.3", "--warmup_steps=0", "--patience=2", "--plateau_factor=0.9", "--steps=60", "--run.keep=1")
    finetune.main(options(base, pairs, run, *more))
    evaluations = [row for row in runs.lines(run / "metrics.jsonl") if "val/loss" in row]
    losses = {row["step"]: row["val/loss"] for row in evaluations if row["step"]}  # no checkpoint holds step 0
    best = min(losses, key=losses.get)
    last = max(losses)
    assert last < 60
    assert last == best + 2 * 3  # two evaluations without a better one
    assert resolve(run) == runs.at(run, best)
    assert sorted(runs.steps(run)) == [best, last]
    before = (run / "metrics.jsonl").stat().st_mtime_ns
    finetune.main(options(base, pairs, run, *more))  # and stays ended
    assert (run / "metrics.jsonl").stat().st_mtime_ns == before


ADAPTERS = ("--lora.rank=32", "--lora.alpha=32", "--lora.modules_to_save=embed_tokens", "--lr=1e-2")


@pytest.mark.parametrize("more", [(), pytest.param(ADAPTERS, marks=pytest.mark.slow)])
def test_37_pairs_are_learned_by_heart(base: Path, pairs: Path, tmp_path: Path, more: tuple[str, ...]):
    """Were the mask or the shift off by one, or the end of the turn untrained, no answer would come out right."""
    run = tmp_path / "run"
    heart = ("--steps=300", "--eval_every=300", "--run.save_every=300", "--schedule=cosine", "--floor=0.05")
    finetune.main(options(base, pairs, run, *heart, "--batch_tokens=1024", "--micro_batch=8", *more))
    model, tokenizer = load_model(run)
    prompts = [render_chat([{"role": "user", "content": pair(n)["prompt"]}], tokenizer, generate=True)[0]
               for n in range(37)]  # fmt: skip
    found = generate(model, prompts, max_new_tokens=40, temperature=0.0, eos=sorted(tokenizer.stop_ids))
    right = sum(
        row[len(prompt) :] == [*tokenizer.encode(pair(n)["response"]), tokenizer.special["<|im_end|>"]]
        for n, (row, prompt) in enumerate(zip(found, prompts, strict=True))
    )
    assert right >= 0.95 * 37
    command = [sys.executable, str(runs.ROOT / "infer.py"), f"--ckpt={run}", "--instruct", "--temperature=0"]
    asked = runs.launch(tmp_path / "out", [*command, f"--prompt={pair(5)['prompt']}", "--device=cpu"])
    assert asked.wait() == 0, asked.stderr
    assert asked.stdout.strip() == pair(5)["response"]  # and it stops by itself


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_an_adapter_of_a_run_is_what_peft_makes_of_it(base: Path, pairs: Path, tmp_path: Path):
    import peft
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    finetune.main(options(base, pairs, run, "--lora.rank=4", "--steps=8"))
    ours, _ = load_model(run)
    folder = resolve(run)
    assert not (folder / "model.safetensors").exists()
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    ids = torch.randint(256, (2, 20))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        plain = load_model(base)[0](ids).logits
    assert (plain - expected).abs().max() > 1e-3  # it has learned something


def test_s05_the_base_is_named_and_proven(base: Path, pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    with pytest.raises(ConfigError, match=r"finetune\.base_ckpt: expected"):
        finetune.main([word for word in options(base, pairs, tmp_path / "a") if "base_ckpt" not in word])
    with pytest.raises(Exception, match="no such folder") as missing:
        finetune.main(options(tmp_path / "nowhere", pairs, tmp_path / "a"))
    assert missing.value.exit_code == 4
    finetune.main(options(base, pairs, tmp_path / "run", "--steps=6", "--lora.rank=2"))
    said = capfd.readouterr().err
    assert f"base       {base}, weights " in said
    other = tmp_path / "other"
    model, tokenizer = load_model(base)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    export(model, tokenizer, other)
    more = ("--steps=12", "--lora.rank=2", "--run.allow_change=finetune.base_ckpt", "--run.allow_change=finetune.steps")
    with pytest.raises(Exception, match="belongs to base weights") as changed:
        finetune.main([*options(other, pairs, tmp_path / "run", *more[:2]), *more[2:]])
    assert changed.value.exit_code == 4


def test_show_data_trains_nothing(base: Path, pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    finetune.main([*options(base, pairs, tmp_path / "run"), "--show_data"])
    out, err = capfd.readouterr()
    assert "37 to train on" in err
    assert "[-<|im_start|>user" in out
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_one_line_and_leaves_nothing(base: Path, pairs: Path, tmp_path: Path):
    for more, code in ((("--seq_len=1024", "--batch_tokens=1024"), 2), (("--chat.train=/nowhere.jsonl",), 3)):
        command = [sys.executable, str(runs.ROOT / "finetune.py"), *options(base, pairs, tmp_path / "run", *more)]
        started = runs.launch(tmp_path / "out", command)
        assert started.wait() == code, started.stderr
        assert started.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in started.stderr


def test_the_folder_of_the_base_is_no_run_folder(base: Path, pairs: Path, tmp_path: Path):
    """With run.overwrite the base was deleted first, and then looked for."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(base, run / "checkpoints" / "step-00000001")
    runs.seal(run / "checkpoints" / "step-00000001")
    for source in (run, run / "checkpoints" / "step-00000001"):
        with pytest.raises(ConfigError, match="is in the run folder"):
            finetune.main([*options(source, pairs, run), "--run.resume=never", "--run.overwrite"])
    assert resolve(run) == run / "checkpoints" / "step-00000001"
    assert (run / "checkpoints" / "step-00000001" / "model.safetensors").exists()


def ended(source: Path) -> float:
    """The share of greedy answers to the built-in validation prompts that end by themselves."""
    model, tokenizer = load_model(source)
    data = prepare_chat(ChatConfig(), tokenizer, 256)
    prompts = [example.ids[: example.mask.tolist().index(True)].tolist() for example in data.val]
    stops = sorted(tokenizer.stop_ids)
    found = generate(model, prompts, max_new_tokens=150, temperature=0.0, eos=stops)
    return sum(row[-1] in stops for row in found) / len(found)


@pytest.mark.slow
def test_a_fine_tuned_model_ends_its_answers_and_its_base_does_not(tmp_path: Path):
    """The commands of the README, with their defaults, from nothing: some five minutes on one thread."""
    base, sft = f"{tmp_path}/base", f"{tmp_path}/sft"
    for script, *more in (
        ("train.py", f"--run.dir={base}"),
        ("finetune.py", f"--base_ckpt={base}", f"--run.dir={sft}"),
    ):
        command = [sys.executable, str(runs.ROOT / script), *more, f"--data.cache_dir={tmp_path}/cache"]
        assert runs.launch(tmp_path / "out", command, {"OMP_NUM_THREADS": "1"}).wait(900) == 0
    assert ended(Path(base)) < 0.05
    assert ended(Path(sft)) >= 0.95
