"""Text from weights that there are: `train.py --base_ckpt` begins where the base is, and is a run like any other."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import runs
import tiny
import torch

import eval as evaluation
import train
from nanoqwen import plan
from nanoqwen.config import load_config
from nanoqwen.distributed import World
from nanoqwen.errors import ConfigError
from nanoqwen.runfolder import verify
from nanoqwen.weights import export, is_adapter, load_model

ADAPTERS = "--lora.rank=4"
ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "max_position_embeddings": 64}
    return tiny.base_over_bytes(folder, seed=1, **shape)


def options(base: Path, corpus: Path, run: Path, *more: str) -> list[str]:
    """Without the options of a shape, which the base brings, as it does the tokenizer."""
    listed = runs.options(corpus, run, f"--train.base_ckpt={base}", "--data.tokenizer=gpt2", *more)
    return [word for word in listed if not word.startswith("--model.")]


def evaluations(run: Path) -> dict[int, float]:
    return {row["step"]: row["val/loss"] for row in runs.lines(run / "metrics.jsonl") if "val/loss" in row}


@pytest.fixture(scope="module", params=[ADAPTERS, "--lora.rank=0"])
def done(request, base: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    run = tmp_path_factory.mktemp("continued") / "run"
    train.main(options(base, corpus, run, request.param))
    return request.param, run


def test_step_0_is_the_base_as_eval_py_measures_it(done: tuple[str, Path], base: Path, corpus: Path, tmp_path: Path):
    _, run = done
    shape = json.loads((base / "config.json").read_text())
    assert load_config([str(run / "config.yaml")], "train").model.hidden_size == shape["hidden_size"]
    recorded = tmp_path / "recorded"  # the base in a place where eval.py takes the text of a run
    at = runs.at(recorded, 0)
    shutil.copytree(base, at)
    shutil.copy(runs.at(run, 20) / "state.json", at)
    evaluation.main([f"--ckpt={at}", f"--data.cache_dir={corpus.with_name('cache')}", "--dtype=float32"])
    found = json.loads((recorded / "heldout.json").read_text())["loss"]["loss"]["value"]
    losses = evaluations(run)
    assert losses[0] == pytest.approx(found, abs=1e-6)
    assert losses[20] < losses[0] - 0.1


def test_it_is_the_same_run_after_kill_9(done: tuple[str, Path], base: Path, corpus: Path, starter, tmp_path: Path):
    more, run = done
    stopped = tmp_path / "stopped"
    arguments = options(base, corpus, stopped, more)
    assert runs.killed_at(starter, stopped, 2, signal.SIGKILL, arguments).poll() == -signal.SIGKILL  # nothing saved
    assert runs.killed_at(starter, stopped, 10, signal.SIGKILL, arguments).poll() == -signal.SIGKILL
    starter.run(*arguments)
    assert verify(stopped) == verify(run)
    assert list(evaluations(stopped).items()) == list(evaluations(run).items())
    assert len([row for row in runs.lines(stopped / "metrics.jsonl") if row["step"] == 0]) == 1
    assert is_adapter(runs.at(run, 20)) == (more == ADAPTERS)


def test_a_frozen_base_stays_as_it_is_stored(base: Path, corpus: Path, starter, tmp_path: Path):
    """Beside adapters, where bf16 is computed in: half of the memory, no second copy, and the same run."""
    model, tokenizer = load_model(base)
    export(model.bfloat16(), tokenizer, tmp_path / "half")
    more = (ADAPTERS, "--run.dtype=bfloat16", "--train.lr=3e-3")
    found = {}
    for kind in ("auto", "float32"):
        run = tmp_path / kind
        trainer = train.build(config := load_config(options(tmp_path / "half", corpus, run, *more,
                              f"--lora.base={kind}"), "train"), ALONE)  # fmt: skip
        frozen = {p.dtype for p in trainer.model.parameters() if p.dim() > 1 and not p.requires_grad}
        others = {p.dtype for p in trainer.model.parameters() if p.dim() < 2 or p.requires_grad}
        assert frozen == {torch.bfloat16 if kind == "auto" else torch.float32}, config.lora
        assert others == {torch.float32}
        train.main(options(tmp_path / "half", corpus, run, *more, f"--lora.base={kind}"))
        found[kind] = runs.metrics(run)[runs.STEPS]["loss"]
    assert found["auto"] == pytest.approx(found["float32"], rel=1e-2)
    arguments = options(tmp_path / "half", corpus, tmp_path / "stopped", *more)
    assert runs.killed_at(starter, tmp_path / "stopped", 10, signal.SIGKILL, arguments).poll() == -signal.SIGKILL
    starter.run(*arguments)
    assert verify(tmp_path / "stopped") == verify(tmp_path / "auto")


@pytest.mark.parametrize(
    ("stored", "more", "kept"),
    [
        ("bfloat16", (ADAPTERS, "--run.dtype=bfloat16"), "bfloat16"),
        ("float32", (ADAPTERS, "--run.dtype=bfloat16"), "float32"),
        ("bfloat16", (ADAPTERS, "--run.dtype=float32"), "float32"),
        ("bfloat16", (ADAPTERS, "--run.dtype=bfloat16", "--run.parallel=fsdp"), "float32"),
        ("bfloat16", ("--run.dtype=bfloat16",), "float32"),
        ("float32", (ADAPTERS, "--run.dtype=bfloat16", "--lora.base=bfloat16"), "bfloat16"),
        ("float32", (ADAPTERS, "--run.dtype=float32", "--lora.base=bfloat16"), None),
    ],
)
def test_what_a_base_is_kept_in(stored: str, more: tuple[str, ...], kept: str | None, base: Path, tmp_path: Path):
    model, tokenizer = load_model(base)
    export(model.to(getattr(torch, stored)), tokenizer, tmp_path / "base")
    cfg = load_config(list(more), "train")
    computed = getattr(torch, cfg.run.dtype)
    if kept is None:
        with pytest.raises(ConfigError, match=r"lora.base bfloat16: expected float32 or run.dtype, got torch.float32"):
            plan.base_dtype(cfg, tmp_path / "base", computed)
    else:
        assert plan.base_dtype(cfg, tmp_path / "base", computed) == getattr(torch, kept)


@pytest.mark.slow
def test_two_ranks_are_the_same_run(done: tuple[str, Path], base: Path, corpus: Path, tmp_path: Path):
    more, run = done
    started = runs.torchrun(tmp_path / "output", options(base, corpus, tmp_path / "two", more))
    assert started.wait(120) == 0, started.stderr[-2000:]
    one, two = runs.metrics(run), runs.metrics(tmp_path / "two")
    for step, row in one.items():
        assert two[step]["batch_sha"] == row["batch_sha"]
        assert two[step]["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert evaluations(tmp_path / "two")[0] == pytest.approx(evaluations(run)[0], abs=1e-6)


@pytest.mark.parametrize(("kind", "more"), [("mod", ADAPTERS), ("dtf", "--lora.rank=0"), ("tdtf", ADAPTERS)])
def test_a_dense_base_is_continued_with_routers(kind: str, more: str, base: Path, corpus: Path, tmp_path: Path):
    routed = (f"--routing.kind={kind}", "--train.steps=6", "--train.eval_every=6", more)
    train.main(options(base, corpus, tmp_path / "run", *routed))
    model, _ = load_model(tmp_path / "run")
    assert model.routing.kind == kind
    assert (model.routing.prior_lr, model.routing.mod_lr) == (1e-3, 1e-3)  # of new routers beside published weights
    rows = [row for row in runs.lines(tmp_path / "run" / "metrics.jsonl") if "val/loss_topk" in row]
    assert [row["step"] for row in rows] == [0, 6]
    assert rows[1]["val/loss"] < rows[0]["val/loss"]


def test_it_has_a_folder_of_its_own_and_spares_that_of_its_base(base: Path, corpus: Path, tmp_path: Path):
    assert load_config(["--base_ckpt=x/y"], "train").run.dir == "runs/continued"
    assert load_config([], "train").run.dir == "runs/base"
    run = tmp_path / "run"
    shutil.copytree(base, run / "base")
    with pytest.raises(ConfigError, match=r"train\.base_ckpt: .* is in the run folder"):
        train.main(options(run / "base", corpus, run))


# --- rates by origin --------------------------------------------------------------------------------------------------


def test_the_rate_is_by_origin_and_width(done: tuple[str, Path], base: Path, reference: Path, tmp_path: Path):
    def rate(section: str, *argv: str) -> float:
        return getattr(plan.settle(load_config(list(argv), section), section), section).lr

    assert rate("train") == 4e-3
    assert rate("train", "--preset=0.5B") == pytest.approx(0.512 / 896)
    assert rate("train", "--model.hidden_size=64") == 4e-3  # and never higher
    for section in ("train", "finetune"):
        assert rate(section, f"--base_ckpt={base}") == 2e-5
        assert rate(section, f"--base_ckpt={base}", "--lora.rank=8") == 2e-4
        assert rate(section, f"--base_ckpt={reference}") == 2e-3  # a run from scratch; of width 32
        assert rate(section, f"--base_ckpt={done[1]}") in (2e-5, 2e-4)  # a run, but of published weights
        assert rate(section, f"--base_ckpt={base}", "--lr=7e-4") == 7e-4


def test_a_rate_that_breaks_weights_is_warned_of(base: Path, corpus: Path, tmp_path: Path, capfd):
    run = tmp_path / "run"
    train.main(options(base, corpus, run, "--run.dry_run=true", "--train.lr=2e-3"))
    said = capfd.readouterr().err
    assert f"warning: lr 0.002 is 100 times what is usual for weights from {base}, 2e-05 (--lr auto)" in said
    assert "would start" in said
    assert not run.exists()
