"""Signals at odd times, mixed precision across a kill, and runs that go on for long."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import runs
from runs import ROOT, Starter, metrics, options, reached, rows

from nanoqwen.runfolder import newest_valid, verify

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT)


def test_a8_signals_at_odd_times(starter: Starter, corpus: Path, reference: Path, tmp_path: Path, figure):
    """Up to three in a row, of five kinds, from the first moment on: the run ends, and the next start goes on to
    the bits of the undisturbed run."""
    moments, ended = random.Random(8), []
    for number in range(20):
        run = tmp_path / f"{number}"
        started = starter.start(*options(corpus, run))
        for _ in range(moments.randrange(1, 4)):
            time.sleep(moments.uniform(0, 0.4))
            started.signal(moments.choice(SIGNALS))
        ended.append(started.wait(30))
        assert "Traceback" not in started.stderr, started.stderr[-2000:]
        starter.run(*options(corpus, run))
        assert verify(run) == verify(reference)
    figure(f"exit codes {sorted(set(ended))}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a13_mixed_precision_goes_on_bitwise(starter: Starter, corpus: Path, tmp_path: Path, dtype: str, figure):
    """In fp16 with the scale of the loss, which a killed run must find again."""
    more = (f"--run.dtype={dtype}", "--train.schedule=constant")
    starter.run(*options(corpus, tmp_path / "straight", *more))
    run, kills = tmp_path / "run", 0
    for goal in (3, 9, 14):
        started = starter.start(*options(corpus, run, *more))
        started.until(lambda goal=goal: reached(run) >= goal)
        started.signal(signal.SIGKILL)
        kills += started.wait() == -signal.SIGKILL
    starter.run(*options(corpus, run, *more))
    assert verify(run) == verify(tmp_path / "straight")
    figure(f"{kills} kills, bitwise")


def rss(pid: int) -> float:
    """MB"""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_m1_m5_m9_a_long_run(starter: Starter, corpus: Path, tmp_path: Path, figure):
    """20,000 steps: memory by least squares after a warm-up, speed of the last tenth against the first, the size of
    what is written. Saved often, evaluated often."""
    run, length = tmp_path / "run", 20_000
    more = (f"--train.steps={length}", "--run.save_every=200", "--train.eval_every=500", "--train.log_every=10")
    started = starter.start(*options(corpus, run, *more, "--train.schedule=constant"))
    samples: list[tuple[float, float]] = []
    began = time.monotonic()
    while started.poll() is None:
        time.sleep(1)
        if time.monotonic() - began > 60 and started.poll() is None:
            samples.append((time.monotonic() / 60, rss(started.pid)))
    assert started.wait() == 0, started.stderr[-2000:]
    minutes, sizes = np.array(samples).T
    slope = np.polyfit(minutes, sizes, 1)[0]
    rates = [row["tokens_per_s"] for row in rows(run) if "tokens_per_s" in row][20:]
    tenth = len(rates) // 10
    drift = 1 - np.median(rates[-tenth:]) / np.median(rates[:tenth])
    size = (run / "metrics.jsonl").stat().st_size / length
    figure(f"{slope:.2f} MB a minute, {100 * drift:.0f} % slower at the end, {size:.0f} bytes a step")
    assert slope <= 1
    assert drift <= 0.1
    assert size <= 1024


def test_m8_a_thousand_starts_leave_nothing(starter: Starter, corpus: Path, tmp_path: Path, figure):
    """A run that is complete, started again and again: no file of it changes, nothing is left in /dev/shm or /tmp."""
    run = tmp_path / "run"
    starter.run(*options(corpus, run))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*") if path.is_file()}
    shared = set(os.listdir("/dev/shm"))
    for _ in range(60):
        starter.run(*options(corpus, run))
    after = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*") if path.is_file()}
    figure(f"60 starts, {len(before)} files unchanged")
    assert after == before
    assert set(os.listdir("/dev/shm")) <= shared


def test_g6_a_rank_without_memory(corpus: Path, tmp_path: Path, figure):
    """Rank 1 may not allocate: the job ends, and says what happened."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1' and any('train.py' in word for word in sys.orig_argv):\n"
        "    import torch\n"
        "    def backward(self, *a, **k): raise RuntimeError('[enforce fail] out of memory: you tried to allocate')\n"
        "    torch.Tensor.backward = backward\n"
    )
    began = time.monotonic()
    run = tmp_path / "run"
    started = runs.torchrun(tmp_path / "output", options(corpus, run), env={"PYTHONPATH": str(tmp_path)})
    assert started.wait(120) != 0
    figure(f"ended after {time.monotonic() - began:.0f} s")
    assert "out of memory" in started.stderr
    assert not set(runs.processes_of(run))
    assert runs.status(run)["status"] != "done"


def test_m6_open_files_are_few(starter: Starter, corpus: Path, tmp_path: Path, figure):
    """With 64 descriptors a run completes."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, {resource.RLIM_INFINITY}))\n"
    limit = limit.replace(str(resource.RLIM_INFINITY), "64")
    started = starter.run(*options(corpus, tmp_path / "run"), first=limit)
    assert newest_valid(tmp_path / "run")
    figure("64 descriptors, done")
    assert "Traceback" not in started.stderr


def test_f12_a_model_that_diverges(starter: Starter, corpus: Path, tmp_path: Path, figure):
    """A rate of 1e4: the run ends with 7, or at its end with finite weights; nothing that is not finite is saved."""
    run = tmp_path / "run"
    more = ("--train.lr=1e4", "--train.clip=1e9", "--train.schedule=constant", "--train.warmup_steps=0")
    started = starter.run(*options(corpus, run, *more), code=None)
    newest = newest_valid(run)
    figure(f"exit code {started.wait()}, last loss {metrics(run)[reached(run)]['loss']}")
    assert started.wait() in (0, 7)
    assert "Traceback" not in started.stderr
    assert newest is None or verify(newest)


def test_m3_m7_a_process_that_answers_for_long(tmp_path: Path, starter: Starter, corpus: Path, figure):
    """2,000 prompts in one process: no growth."""
    starter.run(*options(corpus, tmp_path / "run"))
    code = (
        "import sys, os, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from model import generate\nfrom nanoqwen.weights import load_model\nfrom nanoqwen.fast import fast\n"
        f"model, tokenizer = load_model({str(tmp_path / 'run')!r})\nmodel = fast(model)\n"
        "def rss(): return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6\n"
        "for n in range(2200):\n"
        "    generate(model, [[n % 250 + 1] * (n % 30 + 1)], max_new_tokens=8, temperature=0.0)\n"
        "    if n == 200: before = rss()\n"
        "print(rss() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    figure(f"{float(done.stdout):.1f} MB more after 2,000 prompts")
    assert float(done.stdout) <= 20
