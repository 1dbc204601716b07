"""Devices and the precision that each is fast in; a step of two ranks, which is that of one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import runs
import torch

from nanoqwen.distributed import pick_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ({}, torch.float32),
        ({"avx2": True}, torch.float32),
        ({"avx512_bf16": True, "avx512_vnni": True}, torch.float32),  # measured: half the rate of fp32
        ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_on_a_cpu_is_bf16_only_where_products_of_tiles_exist(
    features: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert pick_dtype("auto", CPU)[0] == dtype
    assert pick_dtype("bfloat16", CPU) == (torch.bfloat16, "as asked")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two ranks found in tests/ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    done = runs.torchrun(
        folder, [str(folder / "found.json")], env={"PYTHONPATH": str(runs.ROOT)}, script="tests/ranks.py"
    )
    assert done.wait(120) == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_step_of_two_ranks_is_that_of_one(wrap: str, two_ranks: list[dict]):
    """Four micro-batches each: gradients travel with the last of them, and are divided by all targets once."""
    for found in two_ranks:
        ours, expected = found[f"{wrap}: metrics"]
        assert ours == pytest.approx(expected, rel=1e-5)
        assert found[f"{wrap}: furthest weight"] < 1e-5
    assert two_ranks[0][f"{wrap}: digest"] == two_ranks[1][f"{wrap}: digest"]


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_nan_on_one_rank_skips_the_step_on_all(wrap: str, two_ranks: list[dict]):
    for found in two_ranks:
        assert found[f"{wrap}: skipped"] == 1
        assert found[f"{wrap}: moved by a NaN"] == 0


def test_ranks_draw_dropout_of_their_own(two_ranks: list[dict]):
    assert two_ranks[0]["drawn"] != two_ranks[1]["drawn"]


def test_a_stop_asked_of_one_rank_is_known_to_all(two_ranks: list[dict]):
    assert all(found["asked on rank 1 alone"] for found in two_ranks)


def test_a_signal_to_one_rank_stops_all(corpus: Path, tmp_path: Path):
    """They agree on the step; one that left alone would take the others down, unsaved."""
    run = tmp_path / "run"
    more = ("--train.steps=4000", "--run.save_every=1000")
    started = runs.torchrun(tmp_path / "output", runs.options(corpus, run, *more))
    assert started.until(lambda: runs.reached(run) >= 2, 120)
    os.kill(max(set(runs.processes_of(run)) - {started.pid}), signal.SIGTERM)
    started.wait(60)
    assert (runs.status(run)["status"], runs.status(run)["code"]) == ("preempted", 75)
    assert runs.steps(run)[-1] == runs.reached(run)
