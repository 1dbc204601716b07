"""A stopped rank is named by the others, which leave; one that ends, or a machine that sleeps, is not blamed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import runs

from nanoqwen.errors import SILENT
from nanoqwen.heartbeat import GONE, Silence


class Counters(dict):
    """A store as torchrun's, of one process."""

    def add(self, key: str, amount: int) -> int:
        if self.get("broken"):
            raise RuntimeError("connection reset")
        self[key] = self.get(key, 0) + amount
        return self[key]


def world(size: int) -> tuple[Counters, list[Silence]]:
    store = Counters()
    return store, [Silence(store, rank, size) for rank in range(size)]


def beats(ranks: list[Silence], seconds: int) -> None:
    for _ in range(seconds):
        for rank in ranks:
            rank.beat(1.0)


def test_who_is_silent_and_who_says_so():
    _, ranks = world(4)
    beats(ranks, 20)
    assert not any(rank.silent(3) for rank in ranks)
    beats([ranks[1], ranks[3]], 2)
    assert not any(rank.silent(3) for rank in ranks)
    beats([ranks[1], ranks[3]], 2)
    assert ranks[1].silent(3) == ranks[3].silent(3) == "ranks 0, 2"
    assert (ranks[1].speaks(3), ranks[3].speaks(3)) == (True, False)
    beats(ranks, 2)  # they are back
    assert not any(rank.silent(3) for rank in ranks)


def test_a_rank_that_has_left_is_not_missed():
    store, ranks = world(2)
    beats(ranks, 2)
    ranks[0].leave()
    assert store["0"] >= GONE
    beats(ranks[1:], 50)
    assert ranks[1].silent(3) is None


def test_a_store_that_does_not_answer_is_the_launchers():
    store, ranks = world(2)
    beats(ranks, 2)
    store["broken"] = True
    beats(ranks[1:], 3)
    assert ranks[1].silent(3) == "the launcher's store"
    ranks[0].leave()  # no error on the way out
    store["broken"] = False
    beats(ranks, 1)
    assert ranks[1].silent(3) is None


@pytest.mark.parametrize("victim", [1, 0])
def test_a_stopped_rank_ends_the_run(victim: int, tmp_path: Path):
    """The others once waited for four hours in the next collective."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    run = tmp_path / "run"
    arguments = runs.options(runs.write_corpus(corpus), run, "--train.steps=4000", "--run.timeout=4")
    started = runs.torchrun(tmp_path / "output", arguments)
    assert started.until(lambda: runs.reached(run) >= 2, 120)
    ranks = sorted(set(runs.processes_of(run)) - {started.pid})
    os.kill(ranks[victim], signal.SIGSTOP)
    began = time.monotonic()
    said = f"rank {victim} gave no sign of life for 4 s"
    assert started.until(lambda: runs.status(run)["status"] == "failed", 30)
    assert time.monotonic() - began < 15
    assert runs.status(run)["code"] == SILENT
    assert said in runs.status(run)["reason"]
    assert f"error: {said}" in started.stderr
    for pid in ranks:  # torchrun itself would wait for half a minute
        os.kill(pid, signal.SIGKILL)
    assert started.wait(30) != 0
