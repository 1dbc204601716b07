"""What a reader does with a run whose checkpoints are damaged, copied, half-made, or deleted while they are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import tiny
import torch

import checkpoint
import eval as evaluation
import infer
from nanoqwen import manifest, runfolder, weights
from nanoqwen.config import load_config
from nanoqwen.tokenizer import load_tokenizer
from nanoqwen.weights import CheckpointError, load_model, resolve


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints, the last the best; the last norm holds the step."""
    folder, tokenizer = tmp_path / "run", load_tokenizer("bytes")
    for step in (10, 20, 30):
        model = tiny.model(vocab_size=512)
        with torch.no_grad():
            model.model.norm.weight.fill_(step)
        optimizer = {"model.norm.weight.exp_avg": torch.zeros(32)}
        runfolder.save(folder, step, model=model, tokenizer=tokenizer, optimizer=optimizer, keep=9,
                       state={"best": {"step": step}, "config": {}})  # fmt: skip
    return folder


def flip(file: Path, place: int = -3) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 64  # of an exponent: a factor of 2**64, or an infinity
    file.write_bytes(data)


def step_of(run: Path) -> int:
    return int(load_model(run)[0].model.norm.weight[0])


def is_exported(source: Path, out: Path) -> None:
    checkpoint.main(["export", str(source), str(out)])


def is_converted(source: Path, out: Path) -> None:
    checkpoint.main(["gguf", str(source), str(out)])


def is_sampled(source: Path, out: Path) -> None:
    infer.Session(load_config([f"--ckpt={source}", "--run.device=cpu"], "infer"))


def is_evaluated(source: Path, out: Path) -> None:
    text = out.with_name("text.txt")
    text.write_text("some text " * 100)
    cache = f"--data.cache_dir={out.with_name('cache')}"
    evaluation.main([f"--ckpt={source}", f"--output={out}", f"--eval.data={text}", cache, "--run.device=cpu"])


READERS = [is_exported, is_converted, is_sampled, is_evaluated]


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_a_flipped_bit_is_refused_by_every_reader(read: Callable[[Path, Path], None], run: Path, tmp_path: Path):
    """Loaded, it gave 3e33 bits per byte and exit code 0, and an exported folder that every other tool loads."""
    for step in (10, 20, 30):
        flip(runs.at(run, step) / "model.safetensors")
    for source, message in ((run, "none of its 3 checkpoints is usable"), (runs.at(run, 20), "changed since it was")):
        with pytest.raises(CheckpointError, match=message):
            read(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "state.json"])
def test_the_next_whole_one_is_read_and_the_damage_named(file: str, run: Path, capsys: pytest.CaptureFixture):
    flip(path := runs.at(run, 30) / file)
    assert step_of(run) == 20
    assert f"warning: damaged checkpoint ignored: {path}: " in capsys.readouterr().err


def test_what_no_reader_reads_may_be_damaged(run: Path):
    flip(runs.at(run, 30) / "optimizer.safetensors")
    assert step_of(run) == 30
    assert runfolder.newest_valid(run) == runs.at(run, 20)  # but a resume reads it


def test_the_best_one_gives_way_to_the_newest_if_it_is_damaged(run: Path):
    state = runs.at(run, 30) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"best": {"step": 10}}))
    runs.seal(state.parent)
    assert step_of(run) == 10
    flip(runs.at(run, 10) / "model.safetensors")
    assert step_of(run) == 30


@pytest.mark.parametrize("name", ["step-best", "step-00000020.bak", "step-99", "step-00000040-copy", ".tmp-abc"])
def test_a_copy_beside_the_checkpoints_is_none(name: str, run: Path):
    shutil.copytree(runs.at(run, 10), run / "checkpoints" / name)
    assert step_of(run) == 30
    assert [step for step, _ in manifest.checkpoints(run)] == [10, 20, 30]


def test_a_newer_folder_that_is_not_whole_is_passed_over(run: Path):
    shutil.copytree(runs.at(run, 30), half := runs.at(run, 40))
    for file in half.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert step_of(run) == 30


@pytest.mark.parametrize("moment", ["_read_state", "_read_tensor"])
def test_a_checkpoint_deleted_while_it_is_read_is_followed_by_the_next(
    run: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    """Of 200 loads during training 4 failed: the run had pruned what was being read."""
    read, pruned = getattr(weights, moment), [30, 20]

    def prune_then_read(*arguments):
        if pruned:
            runfolder._delete(runs.at(run, pruned.pop(0)))
        return read(*arguments)

    monkeypatch.setattr(weights, moment, prune_then_read)
    assert step_of(run) == 10


def test_files_are_hashed_once_for_a_command(run: Path, monkeypatch: pytest.MonkeyPatch):
    hashed, real = [], manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", lambda path: hashed.append(path.name) or real(path))
    for _ in range(3):
        load_model(run)
        resolve(run)
    assert sorted(hashed) == sorted({*hashed})
    assert "optimizer.safetensors" not in hashed
