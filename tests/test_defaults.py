"""What a run gets that says little: sizes, lengths and precision by rule, and a word where they make no sense."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import runs

import train
from nanoqwen import plan
from nanoqwen.config import TrainConfig, load_config
from nanoqwen.errors import ConfigError
from nanoqwen.runfolder import verify


def loop(*argv: str) -> TrainConfig:
    return load_config(list(argv), "train").train


@pytest.mark.parametrize(
    ("argv", "steps", "warmup"),
    [
        ([], 1200, 60),
        (["--steps=20"], 20, 1),
        (["--steps=1"], 1, 0),
        (["--steps=600000"], 600_000, 2000),
        (["--tokens=2.5e9", "--batch_tokens=524288"], 4769, 238),
        (["--tokens=1e4", "--warmup_steps=300"], 10, 10),
        (["--steps=20", "--warmup_steps=7"], 20, 7),
    ],
)
def test_steps_follow_tokens_and_the_warmup_follows_the_steps(argv: list[str], steps: int, warmup: int):
    assert (loop(*argv).steps, loop(*argv).with_warmup().warmup_steps) == (steps, warmup)


def test_a_longer_run_differs_in_its_length_alone():
    """A warm-up of `auto` was once written down as a number: a change of the steps alone was refused."""
    assert replace(loop("--steps=100"), steps=4_000) == loop("--steps=4000")


def test_an_option_says_how_long_whatever_a_file_says(tmp_path: Path):
    """`--train.steps 20`, to try a recipe, was once 5,000 steps of its tokens."""
    (tmp_path / "mine.yaml").write_text("train: {tokens: 1e6, batch_tokens: 1024}\n")
    assert loop(str(tmp_path / "mine.yaml")).steps == 977
    assert loop(str(tmp_path / "mine.yaml"), "--steps=20").steps == 20
    assert loop(str(tmp_path / "mine.yaml"), "--epochs=2").tokens is None


def test_epochs_are_counted_when_the_data_is_known(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    run = tmp_path / "run"
    train.main(runs.options(corpus, run, "--train.epochs=0.05", "--train.warmup_steps=auto"))
    last = runs.rows(run)[-1]
    assert last["step"] == len(runs.rows(run))
    assert 0.05 <= last["epoch"] < 0.05 + 2 * last["epoch"] / last["step"]
    assert f"{last['step']} steps" in capfd.readouterr().err
    train.main(runs.options(corpus, run, "--train.epochs=0.05", "--train.warmup_steps=auto"))
    assert "is complete" in capfd.readouterr().err
    with pytest.raises(ConfigError, match=r"epochs: expected text of a known length"):
        train.main(runs.options(corpus, tmp_path / "other", "--train.epochs=1", "--data.streaming=true"))
    with pytest.raises(ConfigError, match="epochs: expected null beside tokens"):
        loop("--epochs=1", "--tokens=5")


def test_a_vocabulary_is_that_of_the_tokenizer_in_full_rows(corpus: Path, tmp_path: Path):
    """50,257 ids of gpt2 were refused by the 2,048 of the first run."""
    train.main(
        runs.options(corpus, tmp_path / "run", "--model.vocab_size=auto", "--train.steps=2", "--train.warmup_steps=0")
    )
    config = json.loads((runs.at(tmp_path / "run", 2) / "config.json").read_text())
    assert config["vocab_size"] == 384  # 257 ids of bytes
    assert load_config([], "train").model.vocab_size == 2048
    assert plan.model_shape(load_config(["--data.tokenizer=bytes"], "train")).vocab_size == 384


def test_a_run_that_cannot_make_sense_is_told_so(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    def warnings(*more: str) -> list[str]:
        train.main(runs.options(corpus, tmp_path / "run", "--run.dry_run=true", *more))
        return [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]

    assert warnings("--train.steps=2000") == []
    (few,) = warnings()
    assert "0.01 M tokens for 0 M parameters: such a model learns little" in few
    (high,) = warnings("--train.steps=2000", "--train.lr=0.1")
    assert "lr 0.1 is 25 times what is usual for a model of this width from scratch, 0.004" in high
    (often,) = warnings("--train.steps=20000")
    assert "passes over the text: after about 40" in often
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_a_run_would_cost_and_writes_nothing(reference: Path, corpus: Path, tmp_path: Path, capfd):
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    train.main(runs.options(corpus, reference, "--run.dry_run=true"))
    said = capfd.readouterr().err
    flops = 20 * 256 * plan.flops_per_token(load_config([str(reference / "config.yaml")], "train").model, None, 32)
    assert f"cost       {flops:.2g} FLOP: 0 s at 40% MFU" in said
    assert "3 checkpoints of" in said
    assert "it would resume" in said
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*")} == before


# Of a scale that overflows at first, so that the scaler has a history when the run is killed.
LARGE_SCALE = """
import torch
class Scaler(torch.amp.GradScaler):
    def __init__(self, device, enabled):
        super().__init__(device, init_scale=2.0**26, growth_interval=6, enabled=enabled)
torch.amp.GradScaler = Scaler
"""


def scaler(run: Path, step: int) -> dict:
    return json.loads((runs.at(run, step) / "state.json").read_text())["scaler"]


def test_fp16_on_a_cpu_goes_on_with_the_state_of_its_scaler(starter: runs.Starter, corpus: Path, tmp_path: Path):
    more, first = ("--run.dtype=float16", "--train.skip_limit=30", "--run.keep=9"), {"first": LARGE_SCALE}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    started = starter.run(*runs.options(corpus, straight, *more), **first)
    assert "float16 (as asked; slow: no CPU computes it by itself)" in started.stderr
    skipped = [row["step"] for row in runs.rows(straight) if row["skipped"]]
    assert 0 < len(skipped) < 20
    scales = [scaler(straight, step)["scale"] for step in (4, 8, 20)]
    assert scales[0] > scales[1]
    assert scaler(straight, 20)["_growth_tracker"] > 0 or scales[2] > scales[1]
    arguments = runs.options(corpus, stopped, *more)
    killed = starter.start(*arguments, **first)
    killed.until(lambda: runs.reached(stopped) >= 10)
    killed.signal(signal.SIGKILL)
    killed.wait()
    starter.run(*arguments, **first)
    assert scaler(stopped, 20) == scaler(straight, 20)
    assert verify(stopped) == verify(straight)
    assert [row["loss"] for row in runs.rows(stopped)] == [row["loss"] for row in runs.rows(straight)]
