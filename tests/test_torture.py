"""Whole runs, killed, starved, damaged and disturbed: does each go on to the very bits of a run that nobody touched?

Everything here works from outside: arguments, signals, system calls, exit codes and the files of a run. Digests are
compared, not losses: trainers that forgot the optimizer, the random numbers or the data position ended within half a
percent of the true loss. No failure in N random kills bounds the rate of failures at about 3 / N, so the kills at each
system call of a save are the first line, and the random ones the second.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import runs
import torch
from runs import CHECKPOINTS, ROOT, SAVE_EVERY, STEPS, Started, Starter, at, killed_at, options, reached, rows, steps
from safetensors.torch import load_file, save_file

from nanoqwen import runfolder
from nanoqwen.runfolder import verify

slow = pytest.mark.slow


def no_warning(text: str) -> None:
    pytest.fail(f"a checkpoint was damaged: {text}")


def newest_valid(run: Path, warn: Callable[[str], None]) -> Path | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runfolder, "warn", warn)
        return runfolder.newest_valid(run)


KEPT = ("step", "loss", "grad_norm", "lr", "targets", "epoch", "cursor", "batch_sha")


def assert_same_run(run: Path, reference: Path) -> None:
    """To the bit, at the end and in each line on the way; no step missing, none told twice."""
    assert verify(run) == verify(reference)
    told = [[{key: row[key] for key in KEPT} for row in rows(folder)] for folder in (run, reference)]
    assert told[0] == told[1]
    evaluated = [
        [row for row in runs.lines(folder / "metrics.jsonl") if "val/loss" in row] for folder in (run, reference)
    ]
    assert evaluated[0] == evaluated[1]
    assert (run / "samples.jsonl").read_text() == (reference / "samples.jsonl").read_text()
    assert not runs.leftovers(run)


@pytest.fixture(scope="module")
def halfway(corpus: Path, starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its third save, at step 12 of 20: checkpoints of 8 and 12. To be copied."""
    run = tmp_path_factory.mktemp("halfway") / "run"
    started = starter.start(*options(corpus, run))
    assert started.until(lambda: "CKPT step=12 " in started.stdout)
    started.signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    assert set(steps(run)) >= {8, 12}
    return run


# --- A: exact resume --------------------------------------------------------------------------------------------------


@slow
def test_a1_the_same_run_wherever_and_whenever(corpus: Path, reference: Path, tmp_path: Path):
    """With another seed for Python's own hashes, from another folder, and as a process of its own."""
    for number, hashes in enumerate(("0", "12345")):
        run, elsewhere = tmp_path / f"{number}", tmp_path / f"from-{number}"
        elsewhere.mkdir()
        done = runs.script(*options(corpus, run), env={"PYTHONHASHSEED": hashes}, cwd=elsewhere)
        assert done.returncode == 0, done.stderr
        assert_same_run(run, reference)


class Killer:
    """Kills runs at random moments, half of them close to a save, and starts them again, until it had its kills."""

    def __init__(self, starter: Starter, arguments: list[str], run: Path, seconds: float, seed: int):
        self.starter, self.arguments, self.run, self.seconds = starter, arguments, run, seconds
        self.random, self.kills = random.Random(seed), 0

    def until_done(self, kills: int) -> None:
        """Start until the run is complete; at most `kills` starts are killed."""
        while True:
            before = reached(self.run)
            started = self.starter.start(*self.arguments)
            if self.kills < kills:
                self._wait(started)
                started.signal(signal.SIGKILL)
            code = started.wait()
            if before > SAVE_EVERY:  # of itself; and killed after its last save it is complete
                assert re.search("resuming from|is complete", started.stderr) or code, started.stderr
            if code == 0:
                return
            assert code == -signal.SIGKILL, started.stderr
            self.kills += 1
            self._at_most_one_interval_is_lost()

    def _wait(self, started: Started) -> None:
        if self.random.random() < 0.5:
            time.sleep(self.random.uniform(0, self.seconds))
        else:  # when the next save is about to begin
            goal = (reached(self.run) // SAVE_EVERY + 1) * SAVE_EVERY
            started.until(lambda: reached(self.run) >= goal)
            time.sleep(self.random.uniform(0, 0.1))

    def _at_most_one_interval_is_lost(self) -> None:
        newest = newest_valid(self.run, no_warning)
        assert reached(self.run) - (int(newest.name[5:]) if newest else 0) <= SAVE_EVERY + 1


def kill_and_compare(
    starter: Starter, corpus: Path, folder: Path, kills: int, *more: str, seed: int = 0, reference: Path | None = None
) -> None:
    if reference is None:
        reference = folder / "straight"
        starter.run(*options(corpus, reference, *more))
    total, number = 0, 0
    while total < kills:
        run = folder / f"killed-{number}"
        killer = Killer(starter, options(corpus, run, *more), run, seconds=1.0, seed=1000 * seed + number)
        killer.until_done(kills - total)
        assert_same_run(run, reference)
        assert killer.kills, "a run that was never killed shows nothing"
        total, number = total + killer.kills, number + 1


def test_a2_killed_at_random_moments(starter: Starter, corpus: Path, reference: Path, tmp_path: Path):
    """kill -9, again and again, and the same command after each: bitwise, and each batch stands in the metrics once."""
    kill_and_compare(starter, corpus, tmp_path, 3, reference=reference)


@slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a2_killed_at_many_random_moments(starter: Starter, corpus: Path, reference: Path, tmp_path: Path, seed: int):
    kill_and_compare(starter, corpus, tmp_path, 15, seed=seed, reference=reference)


MODES = {
    "accumulation": ("--train.micro_batch=2", "--model.dropout=0.3"),
    "one-micro-batch": ("--train.micro_batch=8", "--train.schedule=wsd"),
    "muon": ("--train.optimizer=muon",),
    "bf16": ("--run.dtype=bfloat16", "--train.checkpoint_activations=true"),
    "documents": ("--data.isolate_documents=true", "--model.qk_norm=true", "--train.z_loss=1e-4"),
}


@slow
@pytest.mark.parametrize("mode", MODES)
def test_a2_killed_in_each_mode(starter: Starter, corpus: Path, tmp_path: Path, mode: str):
    kill_and_compare(starter, corpus, tmp_path, 5, *MODES[mode], seed=3)


@pytest.fixture(scope="module")
def rows_of_text(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same thirty documents as a source of each kind that can be streamed."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("rows")
    texts = [path.read_text() for path in sorted(corpus.glob("*.txt"))]
    (folder / "plain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "parquet").mkdir()
    parquet.write_table(pyarrow.table({"text": texts}), folder / "parquet" / "train.parquet")
    (folder / "jsonl").mkdir()
    shutil.copy(folder / "plain.jsonl", folder / "jsonl" / "train.jsonl")
    return {
        "lines": str(folder / "plain.jsonl"),
        "data set of parquet": f"hf:{folder / 'parquet'}",
        "data set of jsonl": f"hf:{folder / 'jsonl'}",
    }


@pytest.mark.parametrize("streaming", ["true", pytest.param("false", marks=slow)])
@pytest.mark.parametrize(
    "kind", ["lines", pytest.param("data set of parquet", marks=slow), pytest.param("data set of jsonl", marks=slow)]
)
def test_d07_killed_in_the_middle_of_a_stream(
    starter: Starter, corpus: Path, rows_of_text: dict[str, str], tmp_path: Path, kind: str, streaming: str
):
    """A stream has no index to go back to: it once began again with its first document after every stop."""
    more = (f"--data.train={rows_of_text[kind]}", f"--data.streaming={streaming}")
    kill_and_compare(starter, corpus, tmp_path, 2, *more)


def test_story_no_batch_is_read_again_after_a_resume(starter: Starter, corpus: Path, reference: Path, tmp_path: Path):
    """nanoGPT seeds its global random numbers alike at each start and draws its batches from them. A run that is
    resumed at step 10,000 is therefore fed the batches of steps 0, 1, 2 ... once more, and what it would have seen next
    never comes. The loss curve looks better for it: the model has seen these batches before.

    Here a batch is a function of its step. After a resume come the batches that an uninterrupted run would have had,
    and none of the first ones.
    """
    run = tmp_path / "run"
    assert killed_at(starter, run, 9, signal.SIGKILL, options(corpus, run)).wait() == -signal.SIGKILL
    first = [row["batch_sha"] for row in rows(run)]
    resumed_at = int(newest_valid(run, no_warning).name[5:])
    starter.run(*options(corpus, run))
    after = [row["batch_sha"] for row in rows(run) if row["step"] > resumed_at]
    assert after == [row["batch_sha"] for row in rows(reference) if row["step"] > resumed_at]
    assert not set(after) & set(first[:resumed_at])


# --- A3, A4: each system call of a save -------------------------------------------------------------------------------

needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
SAVE_CALLS = ("openat", "fsync", "rename", "unlink", "unlinkat", "mkdir", "rmdir", "chmod")


# The process sends itself a signal after so many backward passes.
SIGNAL_AT = """
import os, signal, torch
seen, backward = 0, torch.Tensor.backward
def counted(self, *arguments, **more):
    global seen
    backward(self, *arguments, **more)
    seen += 1
    if seen == {micro}:
        os.kill(os.getpid(), signal.{signal})
torch.Tensor.backward = counted
"""
MICROS = 2  # micro-batches, and so backward passes, of a step


def traced(starter: Starter, arguments: list[str], log: Path, *flags: str, micro: int = 0) -> tuple[Started, list[str]]:
    """(ended run, its system calls) under strace, from its first call on or from a certain backward pass."""
    how = {"first": SIGNAL_AT.format(micro=micro, signal="SIGSTOP")} if micro else {"halted": True}
    started = starter.start(*arguments, **how)
    assert started.until(lambda: "State:\tT" in Path(f"/proc/{started.pid}/status").read_text())
    command = ["strace", "-f", "-y", "-s", "400", "-o", str(log), "-p", str(started.pid), *flags]
    strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    if "attached" not in (said := strace.stderr.readline()):
        started.signal(signal.SIGKILL)
        strace.communicate()
        pytest.skip(f"strace may not look at other processes here: {said.strip()}")
    started.signal(signal.SIGCONT)
    started.wait()
    strace.communicate(timeout=runs.PATIENCE)
    return started, log.read_text().splitlines()


def save_points(lines: list[str], step: int) -> list[tuple[str, int]]:
    """(kind of call, its number from 1) of each between the begin of the save of a step and its CKPT line."""
    counts: Counter[str] = Counter()
    points: list[tuple[str, int]] = []
    saving = False
    for line in lines:
        if not (name := re.match(r"\d+\s+(\w+)\(", line)):
            continue
        if name[1] == "write" and f"CKPT step={step} " in line:
            return points
        counts[name[1]] += 1
        saving |= name[1] == "mkdir" and "/.tmp-" in line
        if saving and name[1] in SAVE_CALLS:
            points.append((name[1], counts[name[1]]))
    raise AssertionError(f"no save of step {step}")


@needs_strace
@pytest.mark.parametrize("stride", [40, pytest.param(1, marks=slow)])
def test_a3_killed_at_each_system_call_of_a_save(
    starter: Starter, corpus: Path, reference: Path, halfway: Path, tmp_path: Path, stride: int
):
    """Two checkpoints lie there, a third is being written, and the kernel kills the run at its k-th call.

    Whatever k: the next start goes on by itself, ends with the bits of the undisturbed run, and leaves no rubbish.
    """
    run, micro = shutil.copytree(halfway, tmp_path / "run"), (16 - 12) * MICROS
    calls = ",".join(SAVE_CALLS)
    _, lines = traced(starter, options(corpus, run), tmp_path / "log", "-e", f"trace={calls},write", micro=micro)
    points = save_points(lines, 16)
    assert len(points) >= 40, points
    for call, k in points[::stride]:
        shutil.rmtree(run)
        shutil.copytree(halfway, run)
        inject = ("-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={k}")
        killed, _ = traced(starter, options(corpus, run), tmp_path / "log", *inject, micro=micro)
        assert killed.wait() == -signal.SIGKILL, (call, k)
        assert verify(newest_valid(run, no_warning)), (call, k)
        assert steps(run)[-1] in (14, 16), (call, k)  # 14 had the best evaluation
        starter.run(*options(corpus, run))
        assert_same_run(run, reference)


def call_index(lines: list[str], pattern: str, begin: int = 0) -> list[int]:
    return [i for i, line in enumerate(lines) if i >= begin and re.search(pattern, line)]


@needs_strace
@pytest.mark.parametrize("keep", [1, pytest.param(2, marks=slow), pytest.param(5, marks=slow)])
def test_a4_b7_synced_then_renamed_then_told_then_deleted(
    starter: Starter, corpus: Path, reference: Path, tmp_path: Path, keep: int
):
    """In each of 20 saves, in the order in which the kernel saw it. "A temporary file and a rename" without the syncs
    lost every checkpoint in 8 of 8 simulated power cuts. And while `keep` is 1 the new one is durable before the old
    one goes: at no moment is there none."""
    run, log = tmp_path / "run", tmp_path / "log"
    more = ("--run.save_every=1", f"--run.keep={keep}")
    calls = "trace=openat,write,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir"
    started, lines = traced(starter, options(corpus, run, *more), log, "-e", calls)
    assert started.wait() == 0
    published = call_index(lines, r'rename\(".*/\.tmp-\w+", ".*/step-\d+"\) += 0')
    assert len(published) == STEPS
    for step, n in enumerate(published, start=1):
        unfinished, final = re.search(r'rename\("([^"]+)", "([^"]+)"\)', lines[n]).groups()
        assert final == str(at(run, step))
        for name in sorted(path.name for path in at(run, STEPS).iterdir()):
            opened = call_index(lines[:n], rf'openat\(.*"{unfinished}/{name}", O_\w*WR')
            synced = call_index(lines[:n], rf"f(data)?sync\(\d+<{unfinished}/{name}>\) += 0")
            assert synced, (step, name)
            assert max(opened, default=-1) < max(synced), (step, name)
        assert call_index(lines[:n], rf"fsync\(\d+<{unfinished}>\) += 0"), step
        parent = call_index(lines, rf"fsync\(\d+<{run}/checkpoints>\) += 0", n)[0]
        told = call_index(lines, rf'write\(.*"CKPT step={step} ')[0]
        later = published[step] if step < len(published) else len(lines)
        gone = call_index(lines[:later], r'rename\(".*/step-\d+", ".*/\.(del|old)-|(unlink|unlinkat|rmdir)\(.*step-', n)
        assert n < parent < told, step
        assert not gone or min(gone) > parent, step
    assert verify(run) == verify(reference)


# --- A6, A7, A9, A10, A11: signals and edges --------------------------------------------------------------------------


def stop_and_check(starter: Starter, run: Path, arguments: list[str], seconds: float) -> bool:
    """SIGTERM so long after the first step; whether it came in time. The last step is saved by then, within 5 s."""
    before, started = reached(run), starter.start(*arguments)
    started.until(lambda: reached(run) > before)
    time.sleep(seconds)
    began = time.monotonic()
    started.signal(signal.SIGTERM)
    code = started.wait()
    if code == 0:
        return False
    assert code == 75, started.stderr
    assert time.monotonic() - began < 5
    assert (runs.status(run)["status"], runs.status(run)["code"]) == ("preempted", 75)
    assert runs.status(run)["reason"]
    newest = newest_valid(run, no_warning)
    assert int(newest.name[5:]) == reached(run), "what was done and logged was saved"
    assert f"CKPT step={reached(run)} " in started.stdout
    return True


@pytest.mark.parametrize("stops", [pytest.param(20, marks=slow)])
def test_a6_stopped_at_random_moments(starter: Starter, corpus: Path, reference: Path, tmp_path: Path, stops: int):
    """SIGTERM is what a cluster sends before it takes a machine away."""
    moments, done = random.Random(6), 0
    for number in range(10 * stops):
        if done >= stops:
            break
        run = tmp_path / f"run-{number}"
        arguments = options(corpus, run)
        while stop_and_check(starter, run, arguments, moments.uniform(0, 0.3)):
            done += 1
        assert_same_run(run, reference)
    assert done >= stops


SLOW_DISK = """
import os, time
fsync = os.fsync
def slow(descriptor):
    time.sleep(0.1)
    fsync(descriptor)
os.fsync = slow
"""


def saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("until_saved", [True, False])
def test_a7_more_sigterms_do_not_break_off_the_save(
    starter: Starter, corpus: Path, halfway: Path, reference: Path, tmp_path: Path, until_saved: bool
):
    """Schedulers repeat themselves. On a slow disk a save takes seconds, and each of them may bring another signal."""
    run = shutil.copytree(halfway, tmp_path / "run")
    started = starter.start(*options(corpus, run), first=SLOW_DISK)
    assert started.until(lambda: reached(run) >= 13)
    started.signal(signal.SIGTERM)
    assert started.until(lambda: saving(run))
    while started.poll() is None and not (until_saved and runs.status(run)["status"] == "preempted"):
        started.signal(signal.SIGTERM)
        time.sleep(0.02)
    assert started.wait() == 75
    assert int(newest_valid(run, no_warning).name[5:]) == reached(run) > 12
    starter.run(*options(corpus, run))
    assert_same_run(run, reference)


def test_a7_a_second_ctrl_c_leaves_at_once(
    starter: Starter, corpus: Path, halfway: Path, reference: Path, tmp_path: Path
):
    """A person who presses twice means it; what was saved before is still whole."""
    run = shutil.copytree(halfway, tmp_path / "run")
    started = starter.start(*options(corpus, run), first=SLOW_DISK)
    assert started.until(lambda: reached(run) >= 13)
    started.signal(signal.SIGINT)
    assert started.until(lambda: saving(run))
    time.sleep(0.3)
    began = time.monotonic()
    started.signal(signal.SIGINT)
    assert started.until(lambda: runs.status(run)["status"] == "failed")
    assert time.monotonic() - began < 1
    assert started.wait() == runs.status(run)["code"] == 130
    assert "Traceback" not in started.stderr
    assert newest_valid(run, no_warning) == at(run, 12)
    starter.run(*options(corpus, run))
    assert_same_run(run, reference)


def stop_after(starter: Starter, run: Path, arguments: list[str], step: int) -> None:
    """Run until the end of exactly this step, and be stopped there."""
    micro = (step - reached(run)) * MICROS
    started = starter.run(*arguments, first=SIGNAL_AT.format(micro=micro, signal="SIGTERM"), code=75)
    assert f"CKPT step={step} " in started.stdout
    assert reached(run) == step


EDGES = {
    "the first step": 1,
    "before the first save": 3,
    "with a save": 4,
    "after the end of the warm-up": 5,
    "the last batch of an epoch": 6,
    "with an evaluation": 7,
    "the step before the last": 19,
}
FAST_EDGES = ("with an evaluation",)


@pytest.mark.parametrize(
    "edge",
    [name if name in ("the first step", "with an evaluation") else pytest.param(name, marks=slow) for name in EDGES],
)
def test_a9_stopped_at_an_edge(starter: Starter, corpus: Path, reference: Path, tmp_path: Path, edge: str):
    run = tmp_path / "run"
    stop_after(starter, run, options(corpus, run), EDGES[edge])
    starter.run(*options(corpus, run))
    assert_same_run(run, reference)


@slow
def test_a9_started_again_after_the_end(starter: Starter, corpus: Path, reference: Path, tmp_path: Path):
    """A loop in a shell script starts it once too often: it says so, and no file changes."""
    run = shutil.copytree(reference, tmp_path / "run")
    starter.run(*options(corpus, run))  # from here on it is a run of this folder
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}
    said = starter.run(*options(corpus, run))
    assert "complete" in said.stderr
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()} == before


def test_a9_what_a_kill_after_the_last_checkpoint_left_goes(
    starter: Starter, corpus: Path, reference: Path, tmp_path: Path
):
    """Killed while it tidies up behind its last save, a run is complete, and no later save sweeps for it."""
    run = shutil.copytree(reference, tmp_path / "run")
    (run / ".tmp-0123").write_text("half a file")
    (run / CHECKPOINTS / ".tmp-0123").mkdir()
    shutil.copytree(at(run, STEPS), run / CHECKPOINTS / ".del-0123")
    assert "complete" in starter.run(*options(corpus, run)).stderr
    assert_same_run(run, reference)
    # Killed between two renames, the last checkpoint is there under a name that is swept otherwise.
    at(run, STEPS).rename(run / CHECKPOINTS / f".old-{at(run, STEPS).name}")
    assert "complete" in starter.run(*options(corpus, run)).stderr
    assert verify(run) == verify(reference)


@slow
def test_a10_a_relay_of_processes(starter: Starter, corpus: Path, reference: Path, tmp_path: Path):
    """Each of twenty processes does one step and hands over."""
    run = tmp_path / "run"
    for step in range(1, STEPS):
        stop_after(starter, run, options(corpus, run), step)
    starter.run(*options(corpus, run))
    assert_same_run(run, reference)


@pytest.fixture(scope="module")
def short_epochs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options under which an epoch is a few steps long."""
    folder = tmp_path_factory.mktemp("short")
    (folder / "text.txt").write_text((corpus / "1.txt").read_text())
    return (f"--data.train={folder / 'text.txt'}", f"--data.val={corpus / '3.txt'}", "--train.eval_tokens=256")


@pytest.mark.parametrize("stop", [pytest.param(stop, marks=slow) for stop in (10, 13, 14)])
def test_a11_every_epoch_is_complete_across_a_crash(
    starter: Starter, corpus: Path, short_epochs: tuple[str, ...], tmp_path: Path, stop: int
):
    """Killed in the second epoch: no batch is missing and none comes twice, also in the third."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    starter.run(*options(corpus, straight, *short_epochs))
    arguments = options(corpus, run, *short_epochs)
    assert killed_at(starter, run, stop, signal.SIGKILL, arguments).wait() == -signal.SIGKILL
    starter.run(*arguments)
    assert_same_run(run, straight)
    assert rows(run)[-1]["epoch"] > 2
    for _, epoch in itertools.groupby(rows(run), key=lambda row: int(row["epoch"])):
        batches = [row["batch_sha"] for row in epoch]
        assert len(batches) == len(set(batches))


# --- B: disks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of so many bytes; asked again, it becomes larger."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: int) -> Path:
        flags = [f"remount,size={size}"] if disk.is_mount() else [f"size={size}"]
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", *flags, "none", str(disk)], capture_output=True)
        if done.returncode:
            pytest.skip("cannot mount a file system here")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)


def size_of(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def test_b1_a_disk_that_fills_up(
    starter: Starter, corpus: Path, reference: Path, tmp_path: Path, small_disk: Callable[[int], Path]
):
    """Room for two and a half checkpoints, until somebody else's file takes the rest: a save fails half-way.

    What was there stays whole, nothing half-written bears a final name, and with room again the run goes on.
    """
    one = size_of(at(reference, STEPS))
    disk = small_disk(int(2.5 * one) + 65_536)
    run = disk / "run"
    arguments = options(corpus, run, "--run.keep=1")
    started = starter.start(*arguments, first=SLOW_DISK.replace("0.1", "0.01"))
    assert started.until(lambda: "CKPT step=4 " in started.stdout)
    os.kill(started.pid, signal.SIGSTOP)
    free = shutil.disk_usage(disk).free
    (disk / "somebody-else").write_bytes(bytes(max(0, free - one // 2)))
    os.kill(started.pid, signal.SIGCONT)
    assert started.wait() == 6, started.stderr
    assert "Traceback" not in started.stderr
    last = started.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "No space left on device" in last
    assert "needed" in last
    assert newest_valid(run, no_warning) == at(run, 4)
    assert not any(name.startswith(".tmp-") for name in runs.leftovers(run))
    assert runs.status(run)["code"] == 6
    (disk / "somebody-else").unlink()
    small_disk(8 * one)
    starter.run(*arguments)
    assert_same_run(run, reference)


def test_b3_no_room_is_said_before_the_first_step(
    starter: Starter, corpus: Path, reference: Path, small_disk: Callable[[int], Path]
):
    """Hours are lost when it is said at the first save."""
    disk = small_disk(size_of(at(reference, STEPS)) * 2)
    began = time.monotonic()
    said = starter.run(*options(corpus, disk / "run", "--run.keep=2"), code=6).stderr
    assert time.monotonic() - began < 10
    assert re.search(r"error: .*3 checkpoints need [\d,]+ bytes, free are [\d,]+$", said.strip()), said
    assert not reached(disk / "run")


@slow
@needs_strace
@pytest.mark.parametrize("keep", [1, 2, 5])
def test_b7_deletes_that_fail_do_not_stop_a_run(
    starter: Starter, corpus: Path, reference: Path, tmp_path: Path, keep: int
):
    """A file system that lets nobody delete costs room, and a warning."""
    run = tmp_path / "run"
    calls = ",".join(("unlink", "unlinkat", "rmdir"))
    inject = ("-e", f"trace={calls}", "-e", f"inject={calls}:error=EPERM")
    started, _ = traced(starter, options(corpus, run, f"--run.keep={keep}"), tmp_path / "log", *inject)
    assert started.wait() == 0, started.stderr
    if keep < 5:
        assert re.search(r"warning: .*not (deleted|pruned): Operation not permitted", started.stderr)
    assert verify(run) == verify(reference)


# --- C: damage --------------------------------------------------------------------------------------------------------


def go_on_from_8(starter: Starter, corpus: Path, run: Path, reference: Path, named: str) -> None:
    """The checkpoint of step 12 is damaged: one warning that names it, and on from step 8, to the same bits."""
    said = starter.run(*options(corpus, run)).stderr
    warnings = [line for line in said.splitlines() if "damaged checkpoint" in line]
    assert len(warnings) == 1, said
    assert named in warnings[0]
    assert "step-00000008" in said
    assert verify(run) == verify(reference)
    assert reached(run) == STEPS


def damaged(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
        return
    size = {"empty": 0, "one byte": 1, "half": len(data) // 2, "a byte short": len(data) - 1}[how]
    file.write_bytes(data[:size])


CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "config.json")
DAMAGES = ("empty", "one byte", "half", "a byte short", "missing")
QUICK_DAMAGE = ("optimizer.safetensors", "half")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=() if (name, how) == QUICK_DAMAGE else slow)
        for name, how in itertools.product(CHECKPOINT_FILES, DAMAGES)
    ],
)
def test_c1_a_damaged_checkpoint(
    starter: Starter, corpus: Path, halfway: Path, reference: Path, tmp_path: Path, name: str, how: str
):
    run = shutil.copytree(halfway, tmp_path / "run")
    damaged(at(run, 12) / name, how)
    go_on_from_8(starter, corpus, run, reference, name)


def test_c1_no_usable_checkpoint_is_not_a_fresh_start(starter: Starter, corpus: Path, halfway: Path, tmp_path: Path):
    """A run that silently begins anew overwrites what might still be mended."""
    run = shutil.copytree(halfway, tmp_path / "run")
    for step in steps(run):
        damaged(at(run, step) / "model.safetensors", "half")
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    said = starter.run(*options(corpus, run), code=4).stderr
    assert said.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in said
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=slow)])
def test_c2_a_flipped_bit(starter: Starter, corpus: Path, halfway: Path, reference: Path, tmp_path: Path, count: int):
    """torch.load took 2,980 of 3,000 flipped bits for numbers, safetensors 2,996 of 3,000."""
    flips = random.Random(2)
    for number in range(count):
        run = shutil.copytree(halfway, tmp_path / f"{number}")
        files = sorted(path for path in at(run, 12).iterdir())
        (file,) = flips.choices(files, [path.stat().st_size for path in files])
        data = bytearray(file.read_bytes())
        data[flips.randrange(len(data))] ^= 1 << flips.randrange(8)
        file.write_bytes(data)
        go_on_from_8(starter, corpus, run, reference, "step-00000012")


def sign_again(folder: Path) -> None:
    """A manifest that agrees with the files as they are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def change_tensors(file: Path, change: str) -> None:
    tensors = load_file(file)
    name = sorted(n for n, t in tensors.items() if t.dim() == 2)[0]
    if change == "a tensor missing":
        del tensors[name]
    elif change == "a tensor too many":
        tensors["surplus"] = torch.zeros(2)
    elif change == "another shape":
        tensors[name] = tensors[name][:-1].contiguous()
    elif change == "another dtype":
        tensors[name] = tensors[name].bfloat16()
    elif change == "prefixes of torch.compile":
        tensors = {f"_orig_mod.{n}": t for n, t in tensors.items()}
    elif change == "prefixes of DDP":
        tensors = {f"module.{n}": t for n, t in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


TENSOR_CHANGES = ("a tensor missing", "a tensor too many", "another shape", "another dtype")
TENSOR_CHANGES += ("prefixes of torch.compile", "prefixes of DDP", "another order")


@slow
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("change", TENSOR_CHANGES)
@pytest.mark.parametrize("table", ["old", "new"])
def test_c4_other_tensors_under_a_right_checksum(
    request: pytest.FixtureRequest,
    starter: Starter,
    corpus: Path,
    halfway: Path,
    reference: Path,
    tmp_path: Path,
    file: str,
    change: str,
    table: str,
):
    """Signed again, and in the second round with a matching table of tensors in state.json, too: it is refused by
    name, or the load is shown to be right by the bits that the run ends with. Half a load is neither."""
    run = shutil.copytree(halfway, tmp_path / "run")
    for step in steps(run):  # all of them, or an older one would serve
        folder = at(run, step)
        change_tensors(folder / file, change)
        if table == "new":
            state = json.loads((folder / "state.json").read_text())
            part = file.removesuffix(".safetensors")
            state["tensors"] = {k: v for k, v in state["tensors"].items() if not k.startswith(f"{part}: ")}
            for name, tensor in load_file(folder / file).items():
                kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
                state["tensors"][f"{part}: {name}"] = f"{kind} {list(tensor.shape)}"
            (folder / "state.json").write_text(json.dumps(state))
        sign_again(folder)
    ended = starter.run(*options(corpus, run), code=None)
    if ended.wait() == 0:
        assert verify(run) == verify(reference)
        assert change == "another order"
    else:
        assert ended.wait() == 4, ended.stderr
        assert "Traceback" not in ended.stderr
        assert ended.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("value", [99, pytest.param(0, marks=slow), pytest.param(None, marks=slow)])
def test_c6_a_checkpoint_of_another_version(
    starter: Starter, corpus: Path, halfway: Path, tmp_path: Path, value: object
):
    """To guess what a newer program meant is worse than to stop."""
    run = shutil.copytree(halfway, tmp_path / "run")
    state = json.loads((at(run, 12) / "state.json").read_text())
    state["format"] = value
    if value is None:
        del state["format"]
    (at(run, 12) / "state.json").write_text(json.dumps(state))
    sign_again(at(run, 12))
    said = starter.run(*options(corpus, run), code=4).stderr
    assert "format" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_d8_the_recorded_configuration_is_the_run(starter: Starter, corpus: Path, reference: Path, tmp_path: Path):
    """What lies in the run folder is what was run: started from it alone, another run ends with the same bits."""
    starter.run(str(reference / "config.yaml"), f"--run.dir={tmp_path / 'again'}")
    assert_same_run(tmp_path / "again", reference)


# --- F: numbers -------------------------------------------------------------------------------------------------------

# The gradient that leaves the last norm in the backward of certain micro-batches, numbered from 1, is multiplied.
SPOIL = """
import torch
first, last, factor, norms, seen = {first}, {last}, {factor}, {norms}, 0
def spoil(module, grad_input, grad_output):
    global seen
    if type(module).__name__ == "RMSNorm":
        seen += 1
        micro, earlier = divmod(seen - 1, norms)
        if not earlier and first <= micro + 1 <= last:
            return tuple(None if grad is None else grad * factor for grad in grad_input)
torch.nn.modules.module.register_module_full_backward_hook(spoil)
"""
NORMS = 5  # two in each of two layers, and the last


def spoiled(first: int, last: int, factor: float | str) -> str:
    return SPOIL.format(first=first, last=last, factor=factor, norms=NORMS)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor
        for name in ("model", "optimizer")
        for key, tensor in load_file(folder / f"{name}.safetensors").items()
    }


@pytest.mark.parametrize(
    ("step", "micro"),
    [(7, 1), *(pytest.param(*when, marks=slow) for when in ((1, 1), (6, 2), (20, 2)))],
)
def test_f1_f6_a_step_with_a_nan_is_skipped(starter: Starter, corpus: Path, tmp_path: Path, step: int, micro: int):
    """One NaN in one gradient once made all 27 tensors of a model NaN, and both kept checkpoints with it. The update
    times zero is no way out: 0 x NaN is NaN. The step is left out, with moments, step counts and weight decay."""
    run, k = tmp_path / "run", (step - 1) * MICROS + micro
    arguments = options(corpus, run, "--run.save_every=1", "--run.keep=30")
    starter.run(*arguments, first=spoiled(k, k, "float('nan')"))
    skipped = {number: row["skipped"] for number, row in runs.metrics(run).items() if row["skipped"]}
    assert skipped == {step: 1}
    after = tensors_of(at(run, step))
    assert all(tensor.isfinite().all() for tensor in after.values())
    if step > 1:
        before = tensors_of(at(run, step - 1))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    if step < STEPS:
        moved = tensors_of(at(run, step + 1))
        assert not all(torch.equal(moved[name], after.get(name, moved[name])) for name in moved)


def test_f1_a_run_without_finite_gradients_gives_up(starter: Starter, corpus: Path, tmp_path: Path):
    """After skip_limit in a row: exit code 7, and what lies there is clean."""
    run = tmp_path / "run"
    arguments = options(corpus, run, "--train.skip_limit=3", "--run.save_every=1", "--run.keep=30")
    ended = starter.run(*arguments, first=spoiled(5 * MICROS + 1, 10**6, "float('nan')"), code=7)
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert runs.status(run)["status"] == "failed"
    assert runs.status(run)["code"] == 7
    assert [number for number, row in runs.metrics(run).items() if row["skipped"]] == [6, 7, 8, 9]
    assert steps(run)[:5] == [1, 2, 3, 4, 5]
    for step in steps(run):
        verify(at(run, step))
        assert all(tensor.isfinite().all() for tensor in tensors_of(at(run, step)).values())


@pytest.mark.parametrize("factor", [1e3, pytest.param(1e6, marks=slow)])
def test_f4_a_spike_is_clipped(starter: Starter, corpus: Path, tmp_path: Path, factor: float):
    """A poisoned batch: the norm is logged as it was, and the update uses the clipped gradient. That one is read out
    of the optimizer's moments: m' = 0.9 m + 0.1 g."""
    run, step = tmp_path / "run", 8
    arguments = options(corpus, run, "--run.save_every=1", "--run.keep=30")
    starter.run(*arguments, first=spoiled((step - 1) * MICROS + 1, (step - 1) * MICROS + 2, factor))
    logged = runs.metrics(run)
    assert logged[step]["grad_norm"] > 30 * max(logged[n]["grad_norm"] for n in range(1, step))
    assert logged[step]["batch_sha"]
    before, after = tensors_of(at(run, step - 1)), tensors_of(at(run, step))
    used = [(after[n].double() - 0.9 * before[n].double()) / 0.1 for n in after if n.endswith(".exp_avg")]
    assert torch.cat([g.flatten() for g in used]).norm().item() == pytest.approx(1.0, abs=1e-5)
    assert all(tensor.isfinite().all() for tensor in tensors_of(at(run, STEPS)).values())


# --- G: ranks ---------------------------------------------------------------------------------------------------------

WRAPS = {"ddp": (), "fsdp": ("--run.parallel=fsdp",)}


@pytest.fixture(scope="module", params=sorted(WRAPS))
def wrap(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Options of each way to spread a run over two ranks."""
    return WRAPS[request.param]


@pytest.fixture(scope="module")
def two(corpus: Path, wrap: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run on two ranks, never stopped."""
    folder = tmp_path_factory.mktemp("two")
    done = runs.torchrun(folder / "output", options(corpus, folder / "run", *wrap))
    assert done.wait(180) == 0, done.stderr[-3000:]
    return folder / "run"


def ranks_of(run: Path, launcher: Started) -> list[int]:
    return sorted(set(runs.processes_of(run)) - {launcher.pid})


def all_gone(run: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := runs.processes_of(run):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@slow
def test_g10_two_ranks_twice(corpus: Path, two: Path, wrap: tuple[str, ...], tmp_path: Path):
    done = runs.torchrun(tmp_path / "output", options(corpus, tmp_path / "run", *wrap))
    assert done.wait(180) == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "run", two)


@slow
@pytest.mark.parametrize("victim", [1, 0])
def test_g1_a_rank_is_killed(corpus: Path, two: Path, wrap: tuple[str, ...], tmp_path: Path, victim: int):
    """The other one must not wait for it for ever, and nothing may stay behind and hold the folder."""
    run, moments = tmp_path / "run", random.Random(victim)
    arguments = options(corpus, run, *wrap)
    for goal in (moments.randrange(1, 8), moments.randrange(9, 17)):
        started = runs.torchrun(tmp_path / "output", arguments)
        assert started.until(lambda goal=goal: reached(run) >= goal, 120)
        os.kill(ranks_of(run, started)[victim], signal.SIGKILL)
        began = time.monotonic()
        assert started.wait(60) != 0
        all_gone(run, 60 - (time.monotonic() - began))
        newest_valid(run, no_warning)
    done = runs.torchrun(tmp_path / "output", arguments)
    assert done.wait(180) == 0, done.stderr[-3000:]
    assert_same_run(run, two)


@slow
def test_a2_all_ranks_killed_at_random_moments(corpus: Path, two: Path, wrap: tuple[str, ...], tmp_path: Path):
    """A machine that loses its power takes the launcher and every rank with it."""
    run, moments = tmp_path / "run", random.Random(4)
    arguments, kills = options(corpus, run, *wrap), 0
    while kills < 4:
        started = runs.torchrun(tmp_path / "output", arguments)
        before = reached(run)
        started.until(lambda before=before: reached(run) > before, 120)
        time.sleep(moments.uniform(0, 0.3))
        for pid in runs.processes_of(run):
            os.kill(pid, signal.SIGKILL)
        if started.wait() == 0:
            break
        kills += 1
        all_gone(run, 10)
        newest_valid(run, no_warning)
    assert kills
    done = runs.torchrun(tmp_path / "output", arguments)
    assert done.wait(180) == 0, done.stderr[-3000:]
    assert_same_run(run, two)


@slow
def test_g3_sigterm_to_torchrun(corpus: Path, two: Path, wrap: tuple[str, ...], tmp_path: Path):
    """torchrun kills what is alive 30 s after SIGTERM, and returns 1 although every rank has saved and left in order:
    its exit code cannot carry the truth, so status.json does."""
    run, moments = tmp_path / "run", random.Random(3)
    arguments = options(corpus, run, *wrap)
    for goal in (2, 9, 15):
        started = runs.torchrun(tmp_path / "output", arguments)
        assert started.until(lambda goal=goal: reached(run) >= goal, 120)
        time.sleep(moments.uniform(0, 0.05))
        began = time.monotonic()
        started.signal(signal.SIGTERM)
        started.wait(60)
        assert time.monotonic() - began < 25
        all_gone(run, 5)
        assert (runs.status(run)["status"], runs.status(run)["code"]) == ("preempted", 75)
        assert int(newest_valid(run, no_warning).name[5:]) == reached(run)
    done = runs.torchrun(tmp_path / "output", arguments)
    assert done.wait(180) == 0, done.stderr[-3000:]
    assert_same_run(run, two)


RAISE_ON_ONE = """
import os, torch
seen = 0
backward = torch.Tensor.backward
def counted(self, *arguments, **more):
    global seen
    seen += 1
    if seen == 9 and os.environ.get("RANK") == "1":
        raise ValueError("a bad sample on rank one")
    backward(self, *arguments, **more)
torch.Tensor.backward = counted
"""


def site_customize(folder: Path, code: str) -> dict[str, str]:
    """An environment in which every Python runs `code` before anything else, once torch can be imported."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\nif any('train.py' in word for word in sys.orig_argv):\n"
        + "".join(f"    {line}\n" for line in code.strip().splitlines())
    )
    return {"PYTHONPATH": str(folder)}


@slow
def test_g5_one_rank_raises(corpus: Path, wrap: tuple[str, ...], tmp_path: Path):
    """Its own error is the one to be seen, not the broken connection of its neighbour; and the job ends."""
    run, env = tmp_path / "run", site_customize(tmp_path / "site", RAISE_ON_ONE)
    began = time.monotonic()
    started = runs.torchrun(tmp_path / "output", options(corpus, run, *wrap), env=env)
    assert started.wait(90) != 0
    assert time.monotonic() - began < 60 + 20  # and the start
    all_gone(run, 5)
    said = started.stderr
    assert "a bad sample on rank one" in said
    assert runs.status(run)["status"] != "done"


def weights_differ(ours: Path, theirs: Path) -> float:
    mine, other = (load_file(at(run, STEPS) / "model.safetensors") for run in (ours, theirs))
    assert mine.keys() == other.keys()
    return max((mine[name] - other[name]).abs().max().item() for name in mine)


@slow
def test_g7_the_number_of_ranks_changes_on_the_way(
    starter: Starter, corpus: Path, wrap: tuple[str, ...], tmp_path: Path
):
    """2, then 1, then 2: the same batches in the same order, and the same weights but for the order of sums. Dropout
    is off, since each rank draws its own."""
    more = ("--model.dropout=0.0", *wrap)
    straight, run = tmp_path / "straight", tmp_path / "run"
    starter.run(*options(corpus, straight, *more))
    arguments = options(corpus, run, *more)
    started = runs.torchrun(tmp_path / "output", arguments)
    assert started.until(lambda: reached(run) >= 6, 120)
    started.signal(signal.SIGTERM)
    started.wait()
    all_gone(run, 30)
    first = verify(run)
    assert runs.status(run)["code"] == 75
    killed_at(starter, run, 13, signal.SIGTERM, arguments)
    assert runs.status(run)["code"] == 75
    assert verify(run) != first
    done = runs.torchrun(tmp_path / "output", arguments)
    assert done.wait(180) == 0, done.stderr[-3000:]
    assert [row["batch_sha"] for row in rows(run)] == [row["batch_sha"] for row in rows(straight)]
    assert weights_differ(run, straight) <= 1e-5


@slow
def test_g7_rows_that_do_not_divide(corpus: Path, tmp_path: Path):
    """8 rows on 3 ranks: refused by each rank with code 2, which torchrun turns into its own."""
    started = runs.torchrun(tmp_path / "output", options(corpus, tmp_path / "run"), ranks=3)
    assert started.wait(120) != 0
    assert re.search(r"error: .*batch_tokens", started.stderr)
    assert re.search(r"exitcode\s*:\s*2\b", started.stderr)
    assert not (tmp_path / "run").exists()


# --- H: a changed set-up ----------------------------------------------------------------------------------------------


def test_h1_harmless_changes(starter: Starter, corpus: Path, halfway: Path, reference: Path, tmp_path: Path):
    """Another folder, another interval of logs and saves, more checkpoints kept: the same bits."""
    run = shutil.copytree(halfway, tmp_path / "renamed")
    starter.run(*options(corpus, run, "--train.log_every=7", "--run.keep=5", "--run.save_every=3", "--data.workers=2"))
    assert_same_run(run, reference)


STRUCTURE = {
    "--model.num_hidden_layers=3": "model.num_hidden_layers 2 -> 3",
    "--model.num_attention_heads=8": "model.num_attention_heads 4 -> 8",
    "--model.max_position_embeddings=128": "model.max_position_embeddings 64 -> 128",
    "--model.vocab_size=300": "model.vocab_size 259 -> 300",
    "--model.tie_word_embeddings=false": "model.tie_word_embeddings True -> False",
}
TRAINING = {
    "--train.lr=1e-3": "train.lr 0.003 -> 0.001",
    "--train.batch_tokens=512": "train.batch_tokens 256 -> 512",
    "--run.seed=1": "run.seed 1337 -> 1",
    "--train.steps=30": "train.steps 20 -> 30",
    "--model.dropout=0.2": "model.dropout 0.1 -> 0.2",
}


def test_h2_h3_each_change_is_listed(starter: Starter, corpus: Path, halfway: Path, tmp_path: Path):
    """All of them at once, each old -> new."""
    run = shutil.copytree(halfway, tmp_path / "run")
    ended = starter.run(*options(corpus, run, *STRUCTURE, *TRAINING), code=2)
    for said in (*STRUCTURE.values(), *TRAINING.values()):
        assert said in ended.stderr, said
    assert "Traceback" not in ended.stderr
    assert newest_valid(run, no_warning) == at(run, 12)


@slow
@pytest.mark.parametrize("change", [*STRUCTURE, *TRAINING])
def test_h2_h3_each_change_is_refused(starter: Starter, corpus: Path, halfway: Path, tmp_path: Path, change: str):
    run = shutil.copytree(halfway, tmp_path / "run")
    ended = starter.run(*options(corpus, run, change), code=2)
    assert {**STRUCTURE, **TRAINING}[change] in ended.stderr.splitlines()[-1]


def test_h3_an_allowed_change_is_recorded(starter: Starter, corpus: Path, halfway: Path, tmp_path: Path):
    run = shutil.copytree(halfway, tmp_path / "run")
    starter.run(*options(corpus, run, "--train.lr=1e-3", "--run.allow_change=train.lr"))
    assert runs.metrics(run)[12]["lr"] == pytest.approx(3e-3)
    assert runs.metrics(run)[13]["lr"] == pytest.approx(1e-3)
    assert "train.lr" in (run / "metrics.jsonl").read_text(), "the change is an event in the metrics"


def test_h6_other_versions_are_warned_of(
    starter: Starter, corpus: Path, halfway: Path, reference: Path, tmp_path: Path
):
    """Another torch may round otherwise; who compares the two halves of a curve has to know."""
    run = shutil.copytree(halfway, tmp_path / "run")
    for step in steps(run):
        state = json.loads((at(run, step) / "state.json").read_text())
        state["versions"]["torch"] = "1.0.0"
        (at(run, step) / "state.json").write_text(json.dumps(state))
        sign_again(at(run, step))
    ended = starter.run(*options(corpus, run))
    assert re.search(r"warning: .*torch.*1\.0\.0", ended.stderr), ended.stderr
    assert verify(run) == verify(reference)


# --- I: two at once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=slow)])
def test_i1_two_runs_in_one_folder(starter: Starter, corpus: Path, reference: Path, tmp_path: Path, times: int):
    """Started within 100 ms: one runs as if it were alone, the other leaves with code 5 and touches nothing."""
    moments = random.Random(times)
    for number in range(times):
        run = tmp_path / f"{number}"
        first = starter.start(*options(corpus, run))
        time.sleep(moments.uniform(0, 0.1))
        second = starter.start(*options(corpus, run))
        codes = sorted((first.wait(), second.wait()))
        assert codes == [0, 5], (number, first.stderr, second.stderr)
        refused = first if first.wait() == 5 else second
        assert "busy" in refused.stderr.splitlines()[-1]
        assert "Traceback" not in refused.stderr
        assert_same_run(run, reference)


@slow
def test_i2_a_killed_run_blocks_nobody(starter: Starter, corpus: Path, tmp_path: Path):
    """A file with a process number in it would; this lock is the system's."""
    run = tmp_path / "run"
    for step in (1, 2, 3):
        assert killed_at(starter, run, step, signal.SIGKILL, options(corpus, run)).wait() == -signal.SIGKILL
    starter.run(*options(corpus, run))


def files_of(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_i4_a_fresh_start_over_old_results(
    starter: Starter, corpus: Path, halfway: Path, reference: Path, tmp_path: Path
):
    """Refused, unless it is asked for in so many words; and then nothing of the old run shows in the new one."""
    run = shutil.copytree(halfway, tmp_path / "run")
    before = files_of(run)
    ended = starter.run(*options(corpus, run, "--run.resume=never"), code=2)
    assert "overwrite" in ended.stderr.splitlines()[-1]
    assert files_of(run) == before
    (run / "tasks.json").write_text("{}")  # figures of a checkpoint that goes
    starter.run(*options(corpus, run, "--run.resume=never", "--run.overwrite=true"))
    assert_same_run(run, reference)
    assert not (run / "tasks.json").exists()


MISTAKES = {"no such text": ("--data.train=/nowhere/*.txt", 3), "rows that do not fit": ("--train.batch_tokens=100", 2)}


@pytest.mark.parametrize(
    "mistake",
    [
        "no such text",
        "rows that do not fit",
    ],
)
def test_i4_nothing_is_deleted_for_a_run_that_cannot_start(
    starter: Starter, corpus: Path, halfway: Path, tmp_path: Path, mistake: str
):
    """Who mistypes the path of the new text should still have the old run."""
    run = shutil.copytree(halfway, tmp_path / "run")
    option, code = MISTAKES[mistake]
    ended = starter.run(*options(corpus, run, "--run.resume=never", "--run.overwrite=true", option), code=code)
    assert "Traceback" not in ended.stderr
    assert steps(run) == steps(halfway)
    assert rows(run) == rows(halfway)


def test_a_run_is_wound_back(starter: Starter, corpus: Path, halfway: Path, reference: Path, tmp_path: Path):
    """To a checkpoint that is named, though newer ones lie there: the steps after it come again, and are told once."""
    run = shutil.copytree(halfway, tmp_path / "run")
    said = starter.run(*options(corpus, run, f"--run.resume={at(run, 8)}")).stderr
    assert f"resuming from {at(run, 8)}" in said
    assert_same_run(run, reference)


# --- M: leaks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [pytest.param(300, marks=slow)])
def test_m2_nothing_piles_up(starter: Starter, corpus: Path, tmp_path: Path, length: int):
    """Open files, threads, children and shared memory after the first saves, and at the end."""
    run = tmp_path / "run"
    shared = set(os.listdir("/dev/shm"))
    started = starter.start(*options(corpus, run, f"--train.steps={length}", "--train.eval_every=5"))
    process = Path(f"/proc/{started.pid}")

    def count() -> dict[str, int]:
        os.kill(started.pid, signal.SIGSTOP)
        children = (process / f"task/{started.pid}/children").read_text().split()
        counted = {name: len(list((process / name).iterdir())) for name in ("fd", "task")} | {"children": len(children)}
        os.kill(started.pid, signal.SIGCONT)
        return counted

    assert started.until(lambda: reached(run) >= 15)
    before = count()
    assert started.until(lambda: reached(run) >= length - 10)
    after = count()
    assert started.wait() == 0
    assert all(abs(after[name] - before[name]) <= 2 for name in before), (before, after)
    assert after["children"] == 0
    assert set(os.listdir("/dev/shm")) <= shared
    assert (run / "metrics.jsonl").stat().st_size <= 1024 * length


# --- first contact ----------------------------------------------------------------------------------------------------


def offline(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["unshare", "-n", *command], cwd=folder, capture_output=True, text=True, timeout=500)


@slow
@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="not a clone of a repository")
def test_first_contact(tmp_path: Path):
    """A clone, no network, no flag but a few that make it short: it trains, says where everything is, and the same
    command again says that it is done. Then what tests/smoke.sh does."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("may not cut the network here")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    short = ["--train.steps=12", "--train.warmup_steps=2", "--train.eval_tokens=4096", "--train.batch_tokens=1024"]
    command = [sys.executable, "train.py", *short]
    first = offline(command, clone)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "python infer.py" in first.stderr
    again = offline(command, clone)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "complete" in again.stderr
    assert "step 1/" not in again.stderr
    assert not subprocess.run(
        ["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True
    ).stdout, "a run leaves nothing that git would see"
    smoke = offline(["sh", "tests/smoke.sh", sys.executable], clone)
    assert smoke.returncode == 0, smoke.stderr[-3000:]
    assert "smoke: ok" in smoke.stdout
